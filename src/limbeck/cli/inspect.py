"""`limbeck inspect`."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

import typer

from limbeck.errors import visible


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(help="A recipe, an embedded network, hf:<folder or id>, timm:<name>, python:package.module:factory, or a folder."),
    ] = None,
    other: Annotated[str | None, typer.Argument(help="A second model, the student: pairs are proposed.")] = None,
    data: Annotated[str | None, typer.Option(help="Take the inputs of this data (`limbeck data`).")] = None,
    input_shape: Annotated[
        str | None, typer.Option("--input-shape", metavar="N,N,...", help="Or give the shape of one sample, e.g. 1,8,8.")
    ] = None,
    args: Annotated[
        list[str] | None, typer.Option("--args", metavar="KEY=VALUE", help="An argument of MODEL, e.g. --args width=16. May be repeated.")
    ] = None,
    other_args: Annotated[list[str] | None, typer.Option("--other-args", metavar="KEY=VALUE", help="An argument of OTHER.")] = None,
    list_networks: Annotated[bool, typer.Option("--list", help="List the embedded networks and their arguments.")] = False,
    json: Annotated[bool, typer.Option("--json", help="A JSON object for programs.")] = False,
) -> None:
    """Look into a model: module paths, shapes in a dry pass, parameters; stages, embedding, head and attention that were found.

    With a second model, or a recipe, also the teacher-student pairs that suggest themselves, and where a bridge is needed. A path
    from this list can be named in a method's settings. Nothing is trained.

    Examples: limbeck inspect digits | limbeck inspect resnet20 cnn --data digits | limbeck inspect hf:my-folder | limbeck inspect --list
    """
    from limbeck.errors import UserError

    if list_networks:
        _list(json)
        return
    if model is None:
        raise UserError(
            "no model is named", "for example limbeck inspect cnn --data digits; `limbeck inspect --list` lists the embedded networks"
        )
    shape = None
    if input_shape is not None:
        if data is not None:
            raise UserError("--data and --input-shape both say what the inputs are", "give one of them")
        parts = input_shape.replace("x", ",").split(",")
        if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
            raise UserError(f"--input-shape {input_shape!r} is no shape", "for example --input-shape 1,8,8")
        shape = tuple(int(part) for part in parts)
    given, other_given = _arguments(args, "--args"), _arguments(other_args, "--other-args")
    from limbeck.knowledge.looking import look

    found = look(model, other, data=data, shape=shape, args=given, other_args=other_given)
    if json:
        print(json_module.dumps(found.as_dict(), indent=1))
        return
    for subject in found.subjects:
        _print(subject.as_dict())
    for name, pairs in found.pairs.items():
        _print_pairs(name, pairs)


def _arguments(given: list[str] | None, option: str) -> dict[str, Any]:
    from limbeck.errors import UserError
    from limbeck.recipe import parse_yaml

    found = {}
    for item in given or []:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{option} {item!r} is not of the form key=value", f"for example {option} width=16")
        found[key.strip()] = parse_yaml(text, f"{option} {key}")
    return found


def _list(json: bool) -> None:
    from limbeck.zoo import listing

    rows = listing()
    if json:
        print(json_module.dumps(rows, indent=1, default=str))
        return
    for row in rows:
        arguments = ", ".join(f"{key}={value!r}" if not isinstance(value, type) else key for key, value in row["arguments"].items())
        print(visible(f"{row['name']}: {row['about']}"))
        print(visible(f"    {arguments or 'no arguments'}"))
    print("others: resnet8x4 (depth 8, width 4)  hf:<folder or id>  timm:<name>  python:package.module:factory  <folder>")


def _shape(shape: Any) -> str:
    return "x".join(map(str, shape[1:])) if shape and len(shape) > 1 else "-"


def _print(model: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from limbeck.report.tables import human

    print(visible(f"{model['name']}: {model['class']}, {human(model['params'])} parameters (shapes are those of one sample)"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("path", "class", "in", "out", "parameters"):
        table.add_column(title, justify="right" if title == "parameters" else "left", overflow="fold")
    for row in model["modules"]:
        table.add_row(
            row["path"], row["kind"], " ".join(map(_shape, row["inputs"])), " ".join(map(_shape, row["outputs"])), human(row["parameters"])
        )
    Console().print(table)
    print("stages:    " + (", ".join(f"{stage['path']} ({_shape(stage['shape'])})" for stage in model["stages"]) or "none found"))
    print(
        f"embedding: {_shape(model['embedding_shape'])}, the input of the head ({model['head']})"
        if model["head"]
        else "embedding: no head module was found"
    )
    print("attention: " + (", ".join(model["attention"]) or "none found"))
    print()


def _print_pairs(name: str, pairs: list[Any]) -> None:
    print(visible(f"proposed pairs ({name} -> student):" if pairs else f"no pairs suggest themselves for {name}"))
    for pair in pairs:
        bridge = "a bridge is needed" if pair.bridge else "same shape"
        print(
            f"  {pair.signal:<9}  {pair.teacher} ({_shape(pair.teacher_shape)}) -> {pair.student} ({_shape(pair.student_shape)}): {bridge}"
        )
