"""`limbeck plan`."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import typer

from limbeck.errors import visible


def plan(
    recipe: Annotated[str, typer.Argument(help="An embedded recipe's name (`limbeck recipes`) or a YAML file.")],
    set: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one value of the recipe. May be repeated.")
    ] = None,
    processes: Annotated[
        str, typer.Option(metavar="N,N,...", help="Numbers of processes for which the memory on each card is told.")
    ] = "1,8,64",
    json: Annotated[bool, typer.Option("--json", help="A JSON object for programs.")] = False,
) -> None:
    """Tell what a recipe will cost before it runs: parameters, memory, time, disk, and which features pair up.

    Sizes are counted; the time of a step is measured by a few dry steps on copies of the models (an untrained teacher costs what a
    trained one does). Nothing is trained, and no file is written (the tokens of texts are made when they are first opened, and kept).

    Examples: limbeck plan digits | limbeck plan digits --set training.batch=256 | limbeck plan my.yaml --processes 1,8,64 --json
    """
    from limbeck import recipe as schema

    checked, counts = schema.load(recipe, list(set or [])), _counts(processes)

    from limbeck.engine.loop import Interrupted
    from limbeck.knowledge.planning import plan as forecast_of
    from limbeck.knowledge.surroundings import surroundings
    from limbeck.run import new_folder

    try:
        found = forecast_of(checked, surroundings(checked), counts)
    except Interrupted:
        raise KeyboardInterrupt from None
    if json:
        print(json_module.dumps({**found.as_dict(), "folder": str(new_folder(checked))}, indent=1, default=str))
        return
    _print(found, checked.checkpoints.keep, str(new_folder(checked)))


def _counts(text: str) -> list[int]:
    from limbeck.errors import UserError

    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 0 < int(word) <= 1_000_000 for word in words):
        raise UserError(f"--processes is {text!r}", "give whole numbers from 1 on, such as --processes 1,8,64")
    return [int(word) for word in words]


def _print(found: Any, keep: int, folder: str) -> None:
    from rich.console import Console

    from limbeck.report.tables import duration, human, milliseconds

    console, data = Console(), found.data
    labelled = f" ({data['labelled']} with a label)" if data["classes"] else ""
    samples = f"{data['train']} training samples{labelled}, {data['test']} test samples"
    print(visible(f"{found.method} on {data['name']}: {samples}, {found.device}\n"))
    models = _table("model", "parameters", "FLOPs a sample", "size on disk")
    for role, row in found.models.items():
        models.add_row(role, human(row["params"]), human(row["flops"], "FLOP"), human(row["bytes"], "B"))
    console.print(models)
    if found.example:
        print(visible(f"(FLOPs are those of the first sample, {found.example['tokens']} tokens)"))
    print()
    phases = _table("phase", "steps", "batch", "a step", "time", "memory", "a checkpoint")
    for phase in found.phases:
        measured = (
            milliseconds(phase.step_ms),
            duration(phase.seconds),
            human(sum(phase.memory.values()), "B"),
            human(phase.checkpoint, "B"),
        )
        phases.add_row(phase.name, str(phase.steps), str(phase.batch), *(("kept", "0 s", "", "") if phase.kept else measured))
    console.print(phases)
    print(visible(f"\ntime:    about {duration(found.seconds)} of training, from a few dry steps; measurements and the report come on top"))
    for phase in found.phases:
        if phase.kept:
            print(visible(f"         {phase.name}: trained already, kept in {phase.kept}"))
        elif phase.name.startswith("teacher"):
            print(visible(f"         {phase.name}: not in the cache yet, would be trained once and kept ({duration(phase.seconds)})"))
    largest = max((phase for phase in found.phases), key=lambda phase: sum(phase.memory.values()))
    uses = " + ".join(f"{use} {human(size, 'B')}" for use, size in largest.memory.items())
    print(
        visible(f"memory:  {human(found.memory, 'B')} at the most, in the phase {largest.name}: {uses}; data and torch itself come on top")
    )
    if found.store:
        _print_store(found.store)
    _print_scale(found)
    place = f"to {folder}/ where no other place is named (the last {keep} checkpoints of each phase stay)"
    print(visible(f"disk:    {human(found.as_dict()['disk'], 'B')} would be written, {place}"))
    for name, size in found.files.items():
        print(visible(f"         {name}" + (f"  {human(size, 'B')}" if size else "")))
    _print_pairs(found)


def _print_store(store: dict[str, Any]) -> None:
    from limbeck.report.tables import human

    each, row = store["row_bytes"], store["row"]
    top = f", top-{store['k']} {human(store['topk'], 'B')} ({human(each['topk'], 'B')} a {row})" if "topk" in store else ""
    whole = f"float16 {human(store['float16'], 'B')} ({human(each['float16'], 'B')} a {row})"
    print(visible(f"cache:   `limbeck cache` would store {', '.join(store['signals'])} of {store['rows']} {row}s: {whole}{top}"))
    if store["speed_bound"]:
        print(
            visible(f"         a step can become at most {store['speed_bound']:.2f} times as fast with it: 1 + F_teacher / (3 F_student)")
        )


def _print_scale(found: Any) -> None:
    from limbeck.report.tables import human

    scale = found.scale
    if scale["teacher_share"]:
        print(f"scale:   the teacher takes {scale['teacher_share']:.0%} of a step's FLOPs: F_teacher / (F_teacher + 3 F_student)")
    if "passes" in scale:
        rates = ", ".join(f"{form} {human(size, 'B')}/s" for form, size in scale["read_bytes_a_second"].items())
        print(f"         training goes over the data {scale['passes']:.3g} times; storing pays from the second time on (or student),")
        print(f"         where the disk keeps up: at this speed {rates}")
    for row in scale["cards"]:
        sides = f"DDP {human(row['ddp'], 'B')}, FSDP {human(row['fsdp'], 'B')}"
        where = "in one process" if row["processes"] == 1 else f"in each of {row['processes']} processes"
        print(f"         {where}: {sides} (phase {scale['phase']}; the batch is shared out)")


def _print_pairs(found: Any) -> None:
    used = {name.split("[")[0] for names in found.reads.values() for name in names}
    read = [", ".join(found.reads[role]) or "nothing" for role in ("teacher", "student")]
    print(visible(f"pairs:   {found.method} reads {read[0]} of the teacher and {read[1]} of the student"))
    for pair in found.pairs:
        bridge = "shapes differ; the method bridges them" if found.parts else "shapes differ"
        if not pair.bridge:
            bridge = "same shape"
        elif pair.signal not in used:
            bridge = "would need a bridge"
        shapes = ["x".join(map(str, shape[1:])) for shape in (pair.teacher_shape, pair.student_shape)]
        print(visible(f"         {pair.signal}: {pair.teacher} ({shapes[0]}) -> {pair.student} ({shapes[1]}): {bridge}"))
    if found.parts:
        print(visible(f"         trained with the student and thrown away: {found.parts} parameters"))
    for note in found.notes:
        print(visible(f"note: {note}"))


def _table(*titles: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left")
    return table
