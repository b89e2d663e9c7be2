"""How work is shared out: which engine, how many workers, and what each of them may take."""

from __future__ import annotations

import os
from dataclasses import dataclass

from limbeck.errors import UserError, unknown

ENGINES = ("local", "ray")
"""local: this machine; ray: a cluster of Ray, or one that is started here for the time of the command."""

RETRIES = 3
"""How often a piece of work is begun again after the process that worked on it was killed."""


@dataclass(frozen=True)
class Sizing:
    """How work is shared out.

    Attributes:
        engine: one of `ENGINES`.
        workers: how many; None takes as many as the machines have room for.
        cpus: processors that Ray sets aside for each; None takes the threads that a worker computes with, or with `workers` its share of
            the machine.
        gpus: accelerators that Ray sets aside for each, also parts of one; None takes one where the command itself computes on one.
        address: of a running cluster ("auto" or "HOST:PORT"); None starts one on this machine.

    Raises:
        UserError: no such engine, or a setting that the engine does not have.
    """

    engine: str = "local"
    workers: int | None = None
    cpus: float | None = None
    gpus: float | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise unknown("engine", self.engine, ENGINES)
        for name, value, least in (("--workers", self.workers, 1), ("--worker-cpus", self.cpus, 0.01), ("--worker-gpus", self.gpus, 0)):
            if value is not None and not least <= value < float("inf"):
                raise UserError(f"{name} is {value}", f"give {'0' if least == 0 else 'at least 1' if least == 1 else 'more than 0'}")
        if self.engine == "local":
            for name, value in (("--worker-cpus", self.cpus), ("--worker-gpus", self.gpus), ("--address", self.address)):
                if value is not None:
                    raise UserError(f"{name} is for --engine ray", "add --engine ray, or leave it away")

    def words(self) -> list[str]:
        """The options of the command line that say the same."""
        names = {"--workers": self.workers, "--worker-cpus": self.cpus, "--worker-gpus": self.gpus, "--address": self.address}
        engine = [] if self.engine == "local" else ["--engine", self.engine]
        return engine + [word for name, value in names.items() if value is not None for word in (name, str(value))]


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
