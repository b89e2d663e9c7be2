"""The list of commands. Nothing heavy is imported here: `limbeck --help` must be there at once."""

from __future__ import annotations

import importlib

import typer

COMMANDS = {
    "run": "Distil: run a recipe from beginning to end.",
    "compare": "Run several methods side by side, over several seeds.",
    "methods": "List the methods and their evidence.",
    "show": "One method: paper, equation, settings, evidence.",
    "recipes": "List the embedded recipes.",
    "data": "List the embedded data sets.",
    "evidence": "Make or check the evidence of methods.",
    "cache": "Store a teacher's outputs once, to train from them many times.",
    "sample": "Draw pictures from a generator.",
    "evaluate": "Measure a saved student.",
    "export": "Write a saved student as safetensors or ONNX.",
    "inspect": "Module paths, shapes, and proposed teacher-student pairs.",
    "plan": "Memory, time and disk of a recipe, before it runs.",
    "doctor": "Versions, devices, optional extras.",
}
"""Every command in the order of `--help`; `limbeck/cli/<name>.py` holds a function of the same name."""

app = typer.Typer(
    name="limbeck",
    help="Distillation of every kind: one command, the same few nouns, honest evidence.\n\n"
    "Begin with `limbeck run digits`, then `limbeck methods` and `limbeck compare digits --methods kd,pld --seeds 3`.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and leave.")) -> None:
    if version:
        from limbeck import __version__

        print(f"limbeck {__version__}")
        raise typer.Exit


for _name, _help in COMMANDS.items():
    _module = importlib.import_module(f"limbeck.cli.{_name}")
    app.command(name=_name, short_help=_help)(getattr(_module, _name))
