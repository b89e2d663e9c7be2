"""`limbeck sample`."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from limbeck.errors import UserError, visible


def sample(
    path: Annotated[Path, typer.Argument(help="A run's folder, or the folder of a generator.")],
    n: Annotated[int, typer.Option("-n", "--count", min=1, help="How many pictures.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the noise; the same seed gives the same pictures.")] = 0,
    label: Annotated[str | None, typer.Option("--class", metavar="NAME", help="One class for all; by default all classes in turn.")] = None,
    out: Annotated[Path | None, typer.Option(help="The PNG file; by default samples-<steps>-<seed>.png in the generator's folder.")] = None,
    each: Annotated[Path | None, typer.Option(help="Also write every picture as a PNG file of its own into this folder.")] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="Also write the pictures as .safetensors (float32 in [-1, 1]).")] = False,
    json: Annotated[bool, typer.Option("--json", help="A JSON object for programs.")] = False,
) -> None:
    """Draw pictures from a generator and write them as one sheet.

    Examples: limbeck sample runs/few-step-digits-consistency-001 -n 64 --steps 1 --seed 0 | limbeck sample FOLDER --class 7 --steps 4
    """
    import torch

    from limbeck import storage
    from limbeck.report.sheets import enlargement, png, sheet, write_each
    from limbeck.sampling.generator import NOTE, load_generator

    generator = load_generator(path)
    number = None if label is None else _class(label, generator.classes, generator.denoiser.classes)
    pictures = generator.sample(n, steps, seed, number)
    shown = pictures.shape[1] in (1, 3)
    if not shown and (each is not None or not tensors):
        raise UserError(
            f"pictures of {pictures.shape[1]} channels cannot be shown", "give --tensors without --each and look at them yourself"
        )
    columns = max(1, round(n**0.5)) if label is not None or not generator.denoiser.classes else generator.denoiser.classes
    rows = -(-n // columns)
    folder = path if (path / NOTE).is_file() else path / "generator"
    target = out or folder / f"samples-{steps}-{seed}.png"
    if not target.parent.is_dir():
        raise UserError(f"there is no folder {target.parent}", "make it, or name another file with --out")
    if shown:
        page = sheet((pictures + 1) / 2, torch.arange(n) // columns, rows, most=columns)
        target.write_bytes(png(page, enlargement(pictures.shape[-1], 32)))
    said = {
        "path": str(target if shown else target.with_suffix(".safetensors")),
        "pictures": n,
        "steps": steps,
        "calls": generator.calls(steps),
        "seed": seed,
    }
    if each is not None:
        write_each(pictures, each)
        said["each"] = str(each)
    if tensors:
        beside = target.with_suffix(".safetensors")
        storage.save_tensors(beside, {"pictures": pictures})
        said["tensors"] = str(beside)
    if json:
        print(json_module.dumps(said))
        return
    print(visible(f"{n} pictures in {said['calls']} network call{'s' if said['calls'] > 1 else ''} each: {said['path']}"))
    if each is not None:
        print(visible(f"single pictures: {each}"))
    if tensors:
        print(visible(f"tensors: {said['tensors']}"))


def _class(label: str, names: tuple[str, ...], classes: int) -> int:
    from limbeck.errors import unknown

    if label in names:
        return names.index(label)
    if label.isdecimal() and int(label) < classes:
        return int(label)
    if not classes:
        raise UserError("this generator has no classes to choose from", "leave --class out")
    raise unknown("class", label, names or tuple(map(str, range(classes))))
