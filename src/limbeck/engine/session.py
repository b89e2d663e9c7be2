"""What the phases of one run share: device, folder, checkpoints, who is told."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck import processes, storage
from limbeck.engine.callbacks import Callback
from limbeck.engine.loop import Fit, Loop, Plan
from limbeck.errors import UserError


def seed_everything(seed: int, purpose: str = "") -> None:
    """Seed Python, NumPy and torch; different purposes get different streams from the same seed."""
    mixed = (seed * 1_000_003 + zlib.crc32(purpose.encode())) % (1 << 32)
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def choose_device(name: str) -> torch.device:
    """The device of a recipe: "auto" takes a GPU where there is one.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        from accelerate import PartialState

        device = PartialState().device
        return torch.device("cpu") if device.type == "cpu" else device
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"the device {name!r} cannot be used: {str(error).splitlines()[0]}", "set device=cpu, or see `limbeck doctor`"
        ) from None
    return device


@dataclass
class Session:
    """The surroundings of a run.

    Attributes:
        device: where everything is computed.
        folder: the run's folder; None keeps nothing on disk.
        digest: of the resolved recipe: binds checkpoints to it.
        checkpoints, watch, precision, stop_on_alarm, evaluation: the recipe's blocks of these names.
        callbacks: who is told.
        fits: what came of each phase so far.
        notes: warnings to be shown at the end, oldest first.
        trains: whether a kept network that is not there yet may be trained; a worker of many only takes what it finds.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    folder: Path | None = None
    digest: str = ""
    checkpoints: Any = None
    evaluation: Any = None
    watch: int | None = None
    precision: str = "no"
    stop_on_alarm: bool = False
    callbacks: Sequence[Callback] = ()
    fits: dict[str, Fit] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    trains: bool = True

    def fit(self, program: Any, phase: str, *, seed: int, folder: Path | None = None, digest: str = "", evaluate: bool = True) -> Fit:
        """Run one phase through the loop; its checkpoints live in `checkpoints/<phase>` of the run's folder, or in `folder`.

        Args:
            program: what is trained; `program.total` steps, `program.training` its settings.
            phase: its name in logs and folders.
            seed: of everything random in this phase.
            digest: what else a checkpoint must agree with.
            evaluate: whether the program is measured while it trains.
        """
        # what has a place of its own (a kept teacher, an expert) is shared by runs: it is bound to what made it, not to this recipe
        binding = [self.digest, digest, phase] if folder is None else [digest, phase]
        if folder is None and self.folder is not None:
            folder = self.folder / "checkpoints" / phase
        every = self.evaluation.every if self.evaluation is not None and evaluate else 0
        patience = self.evaluation.patience if self.evaluation is not None and evaluate else None
        if patience and not every:
            every = 1
        plan = Plan(
            training=program.training,
            total=program.total,
            folder=folder,
            every_seconds=self.checkpoints.every_seconds if self.checkpoints is not None else 30.0,
            every_steps=self.checkpoints.every_steps if self.checkpoints is not None else None,
            keep=self.checkpoints.keep if self.checkpoints is not None else 2,
            evaluate_every=max(1, round(every * program.steps_per_epoch)) if every else 0,
            patience=patience,
            watch=self.watch,
            precision=self.precision,
            digest=storage.fingerprint(binding),
            stop_on_alarm=self.stop_on_alarm,
        )
        # every process draws noise of its own; process 0 draws what a single one would
        seed_everything(seed, phase if processes.rank() == 0 else f"{phase} of process {processes.rank()}")
        outcome = Loop(program, plan, phase, self.callbacks).run()
        self.fits[phase] = outcome
        self.notes += [f"{phase}: {text}" for text in outcome.warnings]
        return outcome
