"""What happens inside the forked children of `tests.faults`. Imported once by the server that forks them: everything heavy is here."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

import limbeck.report.charts
import limbeck.report.figures

torch.set_num_threads(1)

IMPORTED = """
limbeck.cli.app limbeck.cli.progress limbeck.condensation.job limbeck.engine.loop limbeck.knowledge.caching limbeck.knowledge.job
limbeck.report.page limbeck.sampling.job limbeck.run limbeck.trials limbeck.evaluation.predict limbeck.evaluation.text limbeck.decoding
accelerate filelock jinja2 pytest tests.conftest pandas platformdirs psutil pyarrow rich.console rich.table sklearn.datasets sympy
torch._dynamo torch.func torch.utils.flop_counter tokenizers transformers.models.llama.modeling_llama
"""
"""What the commands import while they run."""

for name in IMPORTED.split():
    importlib.import_module(name)


def enter(work: Callable[..., Any], arguments: tuple[Any, ...], cwd: str, cache: str, printed: str) -> None:
    """The life of a child: its own folder, cache and output, then the work."""
    os.chdir(cwd)
    os.environ.update(LIMBECK_CACHE=cache, LIMBECK_NO_TRACKERS="1", HF_HUB_OFFLINE="1")
    handle = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    try:
        code = work(*arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(code if isinstance(code, int) else 0)


def _no_figure(paint: Any, width: float, height: float, kind: str = "svg") -> str:
    """Instead of a figure: drawing them takes five times as long as all of the rest, and reads only what is not changed any more."""
    return "data:,"


def command(words: list[str], fault: Callable[[], None] | None) -> int:
    """`limbeck WORDS`, after something was broken on purpose."""
    from limbeck.cli import main

    limbeck.report.figures._draw = limbeck.report.charts._draw = _no_figure
    if fault is not None:
        fault()
    return main(words)
