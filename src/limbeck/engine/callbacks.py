"""Who is told about a run while it goes on: the log file, the trackers, the terminal."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Callback:
    """Told about a phase of a run. Every method may be left out."""

    def start(self, phase: str, step: int, total: int) -> None:
        """A phase begins, or goes on, at `step` of `total`."""

    def log(self, record: dict[str, Any]) -> None:
        """A record: terms, metrics or an alarm; the shapes are those of `log.jsonl`."""

    def tick(self, step: int) -> None:
        """Steps were made; called often, must be cheap."""

    def finish(self, phase: str) -> None:
        """The phase is over."""

    def close(self) -> None:
        """Nothing more will come."""


class JsonLines(Callback):
    """Appends each record to `log.jsonl`, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def start(self, phase: str, step: int, total: int) -> None:
        """Drop the lines of this phase that lie beyond the checkpoint from which it goes on."""
        if not self.path.exists():
            return
        kept = [r for r in read_log(self.path) if r.get("phase") != phase or r.get("step", 0) <= step]
        from limbeck.storage import write_text

        write_text(self.path, "".join(json.dumps(r) + "\n" for r in kept))

    def log(self, record: dict[str, Any]) -> None:
        """Append one line; a line is written in one call, so that it is whole or absent."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _is_record(value: Any) -> bool:
    """Whether a line is what a run writes: a phase, a step, numbers by name."""
    if not isinstance(value, dict) or not isinstance(value.get("phase", ""), str) or not isinstance(value.get("step", 0), int):
        return False
    metrics, terms = value.get("metrics", {}), value.get("terms", {})
    if not isinstance(metrics, dict) or not isinstance(terms, dict) or not isinstance(value.get("alarm", ""), str):
        return False
    parts = [metrics, *terms.values()]
    return all(isinstance(part, dict) and all(n is None or isinstance(n, (int, float)) for n in part.values()) for part in parts)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log; lines that are none are left out: a last one that a crash cut short, or one that was altered since."""
    records = []
    if path.exists():
        for line in path.read_bytes().decode("utf-8", "replace").splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if _is_record(record):
                records.append(record)
    return records


class Trackers(Callback):
    """Hands the numbers to experiment trackers through Accelerate (TensorBoard, W&B, MLflow, ...)."""

    def __init__(self, names: list[str], folder: Path, config: dict[str, Any]) -> None:
        from accelerate import Accelerator
        from accelerate.utils import ProjectConfiguration

        self.accelerator = Accelerator(
            log_with=names, project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "trackers"))
        )
        flat = {key: value for key, value in config.items() if isinstance(value, (int, float, str, bool))}
        self.accelerator.init_trackers("limbeck", config=flat)

    def log(self, record: dict[str, Any]) -> None:
        """Numbers only, named `phase/term` and `phase/metric`."""
        phase, values = record["phase"], {}
        for name, parts in record.get("terms", {}).items():
            values[f"{phase}/{name}"] = parts["value"]
            if "norm" in parts:
                values[f"{phase}/{name}_gradient_norm"] = parts["norm"]
        for name in ("loss", "lr", "rate"):
            if name in record:
                values[f"{phase}/{name}"] = record[name]
        for name, value in record.get("metrics", {}).items():
            values[f"{phase}/{name}"] = value
        if values:
            self.accelerator.log(values, step=record["step"])

    def close(self) -> None:
        """Flush and close every tracker. Accelerate's `end_training` would also leave the other processes, which are still needed."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


def available_trackers(wanted: list[str] | str) -> list[str]:
    """The trackers to use: those that are named, or with "auto" TensorBoard where it is installed (and not in CI-like quiet runs).

    Raises:
        UserError: a tracker is named that Accelerate does not know or that is not installed.
    """
    from limbeck.errors import UserError

    if wanted == "auto":
        from accelerate.utils import is_tensorboard_available

        return ["tensorboard"] if is_tensorboard_available() and not os.environ.get("LIMBECK_NO_TRACKERS") else []
    if not wanted:
        return []
    from accelerate.tracking import get_available_trackers

    have = [str(getattr(t, "value", t)) for t in get_available_trackers()]
    for name in wanted:
        if name not in have:
            raise UserError(
                f"the tracker {name!r} is not available here",
                f"installed: {', '.join(have) or 'none'}; `pip install {name}` or leave it out",
            )
    return list(wanted)
