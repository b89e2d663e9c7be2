"""`limbeck export`."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from limbeck.errors import visible

FORMATS = ("onnx", "safetensors", "hf")


def export(
    path: Annotated[Path, typer.Argument(help="A run's folder, or the folder of a saved student.")],
    format: Annotated[
        str,
        typer.Option(
            "--format", "-f", help="onnx, safetensors (weights, config.json and a model card), or hf (a folder that transformers opens)."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="The file (onnx) or folder to write; by default in export/ of the run's folder.")] = None,
    data: Annotated[str | None, typer.Option(help="Other data than the run's for the check.")] = None,
    set: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one value of the run's data. May be repeated.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The network that takes the weights, when your own code makes it: python:package.module:factory.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="A JSON object for programs.")] = False,
) -> None:
    """Write a saved student for use elsewhere, and check what was written on real test inputs.

    ONNX is run through onnxruntime, safetensors and transformers folders are opened again; the greatest difference of the outputs is
    told. The student opens without limbeck: nothing of the teacher or of the training is in it.

    Examples: limbeck export runs/digits-kd-001 --format onnx | limbeck export runs/digits-kd-001 --format safetensors --out shipped/
    """
    from limbeck.errors import unknown

    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    from limbeck.report.tables import human
    from limbeck.saved import hand_on, open_saved

    found = hand_on(open_saved(path, model), format, out, data, list(set or []))
    if json:
        print(json_module.dumps(found, indent=1))
        return
    print(visible(f"{found['path']}: {human(found['bytes'], 'B')}"))
    print(f"greatest difference of an output from the student's: {found['max_abs_difference']:.2g}, on {found['samples']} test samples")
    if found.get("top1_agreement") is not None:
        print(visible(f"onnxruntime predicts the same class for {found['top1_agreement']:.1%} of them (opset {found['opset']})"))
