"""The spine; the first file to read: from a recipe to a finished run folder.

recipe -> folder (locked) -> wing's job (models, phases through the engine's loop, measurements)
       -> artifact folders, summary.json, report.html
"""

from __future__ import annotations

import importlib
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck import __version__, processes, storage
from limbeck import recipe as schema
from limbeck.errors import UserError, unwritable
from limbeck.places import user_path

if TYPE_CHECKING:
    from torch import nn

    from limbeck.engine.callbacks import Callback
    from limbeck.outcome import Outcome

JOBS = {
    "knowledge": "limbeck.knowledge.job",
    "condensation": "limbeck.condensation.job",
    "sampling": "limbeck.sampling.job",
    "scenes": "limbeck.scenes.job",
    "structure": "limbeck.structure.job",
}
"""Where each wing's job is: a module with `run(recipe, session, given) -> Outcome`."""

JOINT = ("knowledge", "structure", "sampling")
"""Wings whose runs several processes can share (`torchrun`, `accelerate launch`)."""

BLOCKS = {"condense": "condensation", "generate": "sampling", "scene": "scenes", "structure": "structure"}
"""Blocks of a recipe that one wing reads; diffusion networks (`task: denoising`) read `generate` in knowledge and structure too."""

NOT_BINDING = ("checkpoints", "trackers", "watch", "stop_on_alarm", "about", "name", "parallel")
"""Blocks of a recipe that may differ when a run is resumed: they change no weight."""


@dataclass
class Result:
    """What a finished run gives back.

    Attributes:
        summary: what summary.json holds.
        folder: the run's folder.
        artifacts: everything that was kept, by folder name.
    """

    summary: dict[str, Any]
    folder: Path
    artifacts: dict[str, Any] = field(default_factory=dict)

    @property
    def student(self) -> nn.Module:
        """The distilled network, in evaluation mode.

        Raises:
            UserError: this run made something else.
        """
        return self._artifact("student")

    @property
    def dataset(self) -> Any:
        """The synthetic set of a condensation.

        Raises:
            UserError: this run made something else.
        """
        return self._artifact("dataset")

    @property
    def generator(self) -> Any:
        """The generator of the sampling wing.

        Raises:
            UserError: this run made something else.
        """
        return self._artifact("generator")

    @property
    def scene(self) -> Any:
        """The field, picture or drawing of the scenes wing.

        Raises:
            UserError: this run made something else.
        """
        return self._artifact("scene")

    def _artifact(self, name: str) -> Any:
        if name not in self.artifacts:
            raise UserError(f"this run made no {name}", f"it made {', '.join(self.artifacts)}: see result.artifacts")
        return self.artifacts[name]

    def __repr__(self) -> str:
        figures = {role: round(m[self.summary["primary"]], 4) for role, m in self.summary["metrics"].items()}
        return f"Result({self.summary['primary']}: {figures}, folder={str(self.folder)!r})"


# ---- the folder ----


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += _differences(a, b, f"{path}{key}.")
        elif a != b:
            found.append(f"{path}{key} was {a!r}, is {b!r}")
    return found


def binding(recipe: schema.Recipe) -> dict[str, Any]:
    """The part of a recipe that decides the weights: what a resumed run must agree with."""
    return {key: value for key, value in recipe.data_as_written().items() if key not in NOT_BINDING}


def _open_folder(folder: Path, recipe: schema.Recipe, resume: bool) -> Any:
    """Create or enter the run's folder and lock it; nothing is written before everything is known to be well.

    Raises:
        UserError: it cannot be written, is not empty, belongs to another recipe, or another run works in it.
    """
    from filelock import FileLock, Timeout

    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", "name a folder with --out")
    if resume and not (folder / "recipe.yaml").is_file():
        raise UserError(f"there is no run to resume in {folder}", "leave --resume away, or name the folder of a run with --out")
    _check_links(folder, folder.rglob("*") if resume else [folder / ".lock", folder / ".probe"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise unwritable(f"the folder {folder}", error, "name another one with --out") from None
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another run works in {folder}", "wait for it, or name another folder with --out") from None
    try:
        before = folder / "recipe.yaml"
        if before.is_file():
            if not resume:
                raise UserError(f"{folder} already holds a run", "add --resume to go on with it, or name another folder with --out")
            old = schema.load(before.absolute())
            changed = _differences(binding(old), binding(recipe))
            if changed:
                raise UserError(
                    f"{folder} was made by another recipe: {'; '.join(changed[:4])}",
                    "resume with the same recipe, or name another folder with --out",
                )
        elif any(item.name != ".lock" and not _left(item) for item in folder.iterdir()):
            raise UserError(f"the folder {folder} is not empty and holds no run", "name an empty or new folder with --out")
        storage.sweep(folder)
        storage.write_text(before, recipe.to_yaml())
    except BaseException:
        lock.release()
        if not before.is_file():
            (folder / ".lock").unlink(missing_ok=True)
        raise
    return lock


def _left(path: Path) -> bool:
    """Whether a run left this behind that was killed before it had its recipe."""
    return path.name == ".probe" or (path.name.startswith(".recipe.yaml.") and path.suffix == ".tmp")


def _check_links(folder: Path, paths: Iterable[Path]) -> None:
    """A run folder that came from elsewhere must not make us write somewhere else.

    Raises:
        UserError: one of the paths in it is a link that leads out of it, or nowhere.
    """
    home = folder.resolve()
    for path in paths:
        if not path.is_symlink():
            continue
        try:
            inside = path.resolve().is_relative_to(home)
        except (OSError, RuntimeError):  # it leads to itself
            inside = False
        if not inside:
            raise UserError(f"{path} is a link that leads out of the run's folder", "remove it, or copy what it leads to")


def new_folder(recipe: schema.Recipe, root: Path = Path("runs")) -> Path:
    """The next free `runs/<name>-<method>-<number>`; whatever stands in the names, it lies in `root`."""
    words = f"{recipe.name}-{recipe.method.id.split(':')[-1].replace('.', '-')}"
    stem = "".join(c if c.isalnum() or c in "-._ +" else "-" for c in words)[:80].lstrip(".")
    number = 1
    while (root / f"{stem}-{number:03d}").exists():
        number += 1
    return root / f"{stem}-{number:03d}"


# ---- the run ----


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    import platform

    import torch

    return {"limbeck": __version__, "torch": torch.__version__, "python": platform.python_version()}


def execute(
    recipe: schema.Recipe,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    given: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    command: str = "",
    report: bool = True,
) -> Result:
    """Run a recipe from beginning to end.

    Args:
        recipe: checked, see `limbeck.recipe`.
        out: the run's folder; None takes the next free one under `runs/`.
        resume: go on with the run in `out`, which must have been made by the same recipe.
        given: Python objects that stand in for references of the recipe ("teacher", "student", "data", "method").
        callbacks: who is told while it runs, beside the log.
        command: what repeats the run, for the report.
        report: write report.html.

    Raises:
        UserError: anything that the user can mend.
        Interrupted: after Ctrl-C; the state is saved, and `resume` goes on.
    """
    started = time.perf_counter()
    processes.begin(recipe.device, recipe.parallel)
    folder = processes.first(lambda: user_path(out) if out is not None else new_folder(recipe))
    existed = folder.exists()
    fresh = not (folder / "recipe.yaml").exists()
    locks: list[Any] = []
    processes.first(lambda: locks.append(_open_folder(folder, recipe, resume)))  # the one that writes holds the lock
    try:
        return _execute(recipe, folder, given or {}, callbacks, command, report, started)
    except UserError:
        if processes.rank() == 0 and fresh and not (folder / "checkpoints").exists():
            _leave_nothing(folder, existed)  # so that the mended command can use the same folder
        raise
    finally:
        for lock in locks:
            lock.release()


def _leave_nothing(folder: Path, existed: bool) -> None:
    """Take back what a run wrote that failed before its first checkpoint."""
    for name in ("recipe.yaml", "log.jsonl", ".lock"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "trackers", ignore_errors=True)
    if not existed and not any(folder.iterdir()):
        folder.rmdir()


def _check_blocks(recipe: schema.Recipe, wing: str) -> None:
    """Refuse blocks that the wing of the recipe's method does not read."""
    for block, owner in BLOCKS.items():
        denoises = block == "generate" and recipe.task == "denoising" and wing in ("knowledge", "structure")
        if getattr(recipe, block) is not None and wing != owner and not denoises:
            raise UserError(
                f"{block} has no meaning for {recipe.method.id}, a method of the wing {wing}",
                f"leave it out, or name a method that reads it: `limbeck methods --wing {owner}`",
            )


def _execute(
    recipe: schema.Recipe, folder: Path, given: Mapping[str, Any], callbacks: Sequence[Callback], command: str, report: bool, started: float
) -> Result:
    import torch

    from limbeck.engine.callbacks import JsonLines, Trackers, available_trackers
    from limbeck.engine.session import Session, choose_device
    from limbeck.method import find

    wing = given["method"].card.wing if "method" in given else find(recipe.method.id).card.wing
    if wing == "knowledge" and any(stage.method is not None and find(stage.method.id).card.wing == "structure" for stage in recipe.stages):
        wing = "structure"  # one of the stages makes its own student
    _check_blocks(recipe, wing)
    if processes.world() > 1 and wing not in JOINT:
        raise UserError(
            f"the wing {wing} works in one process, and {processes.world()} were started",
            f"start `limbeck run` without a launcher; {' and '.join(JOINT)} can use several processes",
        )
    if processes.sharding() and wing == "sampling":
        raise UserError("generators are trained whole on every process", "set parallel=ddp")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    everyone: list[Callback] = []
    if processes.rank() == 0:  # it alone writes and prints
        everyone = [JsonLines(folder / "log.jsonl"), *callbacks]
        if names := available_trackers(recipe.trackers):
            everyone.append(Trackers(names, folder, {"method": recipe.method.id, "seed": recipe.seed}))
    session = Session(
        device=choose_device(recipe.device),
        folder=folder,
        digest=storage.fingerprint(binding(recipe)),
        checkpoints=recipe.checkpoints,
        evaluation=recipe.evaluation,
        watch=recipe.watch,
        precision=recipe.precision,
        stop_on_alarm=recipe.stop_on_alarm,
        callbacks=everyone,
    )
    if recipe.parallel == "fsdp" and processes.world() == 1:
        session.notes.append("parallel is fsdp, and this is one process: nothing is cut (start it with torchrun or accelerate launch)")
    if wing not in JOBS:
        raise UserError(f"the wing {wing} cannot be run yet", "`limbeck methods` lists what can")
    try:
        outcome = importlib.import_module(JOBS[wing]).run(recipe, session, given)
    finally:
        for callback in everyone:
            callback.close()
    summary = {
        "name": recipe.name,
        **outcome.summary,
        "seed": recipe.seed,
        "seconds": round(time.perf_counter() - started, 2),
        "phases": {
            name: {"steps": fit.steps, "seconds": round(fit.seconds, 2), "stopped_early": fit.stopped_early}
            for name, fit in session.fits.items()
        },
        "alarms": [f"{name}: {text}" for name, fit in session.fits.items() for text in fit.alarms],
        "warnings": session.notes,
        "device": str(session.device),
        **({"processes": processes.world()} if processes.world() > 1 else {}),
        "versions": versions(),
        "command": command,
    }
    processes.first(lambda: _write(recipe, folder, outcome, summary, report))
    return Result(summary, folder, {name: getattr(made, "held", made) for name, made in outcome.artifacts.items()})


def _write(recipe: schema.Recipe, folder: Path, outcome: Outcome, summary: dict[str, Any], report: bool) -> None:
    """Artifacts, report, and at the very end the summary, which says that the run is finished."""
    from limbeck.engine.callbacks import read_log

    _keep(recipe, folder, outcome, summary)
    if report:
        from limbeck.report.page import Report, write_report

        records = read_log(folder / "log.jsonl")
        own = None if outcome.sections is None else outcome.sections(summary, records)
        more = [] if outcome.more is None else outcome.more(summary, records)
        write_report(
            folder / "report.html",
            Report(
                recipe.name,
                summary,
                records,
                outcome.logits,
                outcome.labels,
                outcome.inputs,
                outcome.classes,
                recipe_yaml=recipe.to_yaml(),
                own=own,
                more=more,
            ),
        )
    storage.write_json(folder / "summary.json", summary)


def _keep(recipe: schema.Recipe, folder: Path, outcome: Outcome, summary: dict[str, Any]) -> None:
    """Write the artifacts into folders of their own, and what was said about the test split."""
    from limbeck.outcome import Artifact
    from limbeck.report.card import model_card, teacher_text
    from limbeck.report.tables import plain_markdown
    from limbeck.zoo import save_model

    card = model_card(summary, teacher_text(recipe)) if outcome.card is None else outcome.card(plain_markdown(summary))
    note = {"classes": list(outcome.classes), "method": summary["method"], "metrics": summary["metrics"].get("student", {})}
    for name, artifact in outcome.artifacts.items():
        if isinstance(artifact, Artifact):
            artifact.save(folder / name, card=card, extra=note)
        else:
            save_model(artifact, folder / name, card=card, extra=note)
    if outcome.labels is not None:
        tensors = {**{f"logits.{k}": v for k, v in outcome.logits.items()}, "labels": outcome.labels}
        storage.save_tensors(folder / "predictions.safetensors", tensors)


def run_recipe(
    recipe: str | Path | Mapping[str, Any] | schema.Recipe, *changes: str, out: str | Path | None = None, resume: bool = False, **given: Any
) -> Result:
    """`limbeck run` from Python.

    Args:
        recipe: an embedded recipe's name, a YAML file, a mapping, or a `Recipe`.
        changes: `a.b=c` overrides, as after `--set`.
        out, resume: see `execute`.
        given: objects for "teacher", "student", "data", "method".
    """
    if isinstance(recipe, Mapping):
        recipe = schema.resolve(recipe, changes=changes)
    elif not isinstance(recipe, schema.Recipe):
        recipe = schema.load(recipe, changes)
    return execute(recipe, out, resume=resume, given=given)


def distill(
    *,
    teacher: Any = None,
    student: Any,
    data: Any,
    method: Any = "kd",
    epochs: float | None = None,
    steps: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    optimizer: str | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    settings: Mapping[str, Any] | None = None,
    **blocks: Any,
) -> Result:
    """Distil any teacher into any student on any data: the whole job in one call.

    Args:
        teacher: an `nn.Module` or a Hugging Face model, several of them (list or mapping), a reference such as "hf:folder", or None for
            methods that need none. It is never changed.
        student: an `nn.Module` or a reference. A module is copied; the trained copy is `result.student`.
        data: `(inputs, labels)` tensors, a torch Dataset or DataLoader, a `datasets.Dataset`, `{"train": ..., "test": ...}`
            of them, or a reference.
        method: an id (`limbeck methods`) or an instance of a `Distiller`.
        epochs, steps, batch, lr, optimizer: shortcuts into the recipe's `training` block.
        seed: of everything random.
        out: the run's folder; None takes the next free one under `runs/`.
        resume: go on with the run in `out`.
        progress: show a progress line.
        settings: of the method, as after `method:` in a recipe.
        blocks: any other block of a recipe (`training={...}`, `baseline=False`, `evaluation={...}`, `device="cpu"`).

    Returns:
        The student, its measurements beside the teacher's and the student's trained alone, and the folder with the report.

    Raises:
        UserError: anything that the user can mend.
    """
    raw: dict[str, Any] = {"name": "distill", "seed": seed, **blocks}
    given: dict[str, Any] = {}

    def refer(key: str, value: Any, text: bool) -> None:
        if text:
            raw[key] = value
        else:
            given[key] = value
            raw[key] = {"source": f"object:{type(value).__name__}"} if key == "data" else {"model": f"object:{type(value).__name__}"}

    if teacher is not None:
        refer(
            "teacher",
            teacher,
            isinstance(teacher, (str, dict)) and not (isinstance(teacher, dict) and any(hasattr(v, "forward") for v in teacher.values())),
        )
    refer("student", student, isinstance(student, (str, Mapping)))
    refer("data", data, isinstance(data, str) or (isinstance(data, Mapping) and "source" in data))
    if isinstance(method, str):
        raw["method"] = {"id": method, "settings": dict(settings or {})}
    else:
        given["method"] = method
        raw["method"] = {"id": f"object:{type(method).__name__}"}
    training = dict(raw.get("training") or {})
    training |= {
        k: v for k, v in {"epochs": epochs, "steps": steps, "batch": batch, "lr": lr, "optimizer": optimizer}.items() if v is not None
    }
    raw["training"] = training
    recipe = schema.resolve(raw, "distill()")
    callbacks: list[Any] = []
    if progress:
        from limbeck.cli.progress import Progress

        callbacks.append(Progress())
    return execute(recipe, out, resume=resume, given=given, callbacks=callbacks)


def load_student(folder: str | Path, **options: Any) -> nn.Module:
    """Open the student of a run (or any folder that limbeck saved), in evaluation mode.

    Args:
        folder: a run's folder, or the `student/` folder inside it.
        options: see `limbeck.zoo.load_model`.
    """
    from limbeck.zoo import load_model

    folder = Path(folder)
    return load_model(folder / "student" if (folder / "student").is_dir() else folder, **options).eval()
