"""A student that was saved: opened together with the recipe of its run, measured again, handed on in other formats."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck import recipe as schema
from limbeck.errors import UserError
from limbeck.places import user_path
from limbeck.recorded import recipe_of, run_of, summary_if_finished

if TYPE_CHECKING:
    from torch import Tensor, nn

    from limbeck.data import Data
    from limbeck.data.batch import Batch
    from limbeck.engine.session import Session
    from limbeck.tasks import Task

_MAY_CHANGE = ("data", "text", "evaluation", "device", "threads", "task")


@dataclass
class Saved:
    """A saved student.

    Attributes:
        network: in evaluation mode.
        folder: where its weights are.
        run: the folder of the run that it came from, if it still lies there.
        recipe: of that run.
        summary: of that run.
    """

    network: nn.Module
    folder: Path
    run: Path | None = None
    recipe: schema.Recipe | None = None
    summary: dict[str, Any] | None = None


def open_saved(path: str | Path, model: str | None = None) -> Saved:
    """Open a run's folder, or the folder of a student.

    Args:
        path: what `limbeck run` wrote, or the `student/` folder inside it, or any folder that `limbeck.zoo.save_model` wrote.
        model: a reference to the network that takes the weights, for networks that limbeck cannot make from the folder's note
            (`python:` factories are called only when they are named here: a folder's note never runs code).

    Raises:
        UserError: there is no student in it, the run is not finished, or the network cannot be made.
    """
    from limbeck import zoo

    path = user_path(path)
    if not path.is_dir():
        raise UserError(
            f"there is no folder {path}", "give the folder of a run, such as runs/digits-kd-001, or the student/ folder inside it"
        )
    if (path / "dataset").is_dir() or (path / "set.json").is_file():
        raise UserError(
            f"{path} holds a synthetic set, not a network", "open it with limbeck.load_dataset(folder); `limbeck evaluate` judges it again"
        )
    if (path / "generator").is_dir() or (path / "generator.json").is_file():
        raise UserError(
            f"{path} holds a generator, which is no classifier",
            "open it with limbeck.load_generator(folder), or draw with `limbeck sample`",
        )
    if (path / "scene").is_dir() or (path / "scene.json").is_file():
        raise UserError(
            f"{path} holds a scene, which is no classifier", "open it with limbeck.load_scene(folder); `limbeck evaluate` measures it again"
        )
    run = run_of(path)
    folder = path / "student" if run == path else path
    if run == path and not folder.is_dir():
        raise UserError(
            f"the run in {path} is not finished: it has no student yet", f"`limbeck run ... --out {path} --resume` goes on with it"
        )
    recipe = summary = None
    if run is not None:
        recipe, summary = recipe_of(run), summary_if_finished(run)
    note = zoo.read_note(folder)
    made: Any = None
    if model is not None:
        data = (summary or {}).get("data") or {}
        made = zoo.build(model, input_shape=data.get("input_shape"), classes=len(data["classes"]) if "classes" in data else None)
    elif note and not (folder / "limbeck.json").is_file():
        ref = note.get("ref")
        if not isinstance(ref, str) or ref.startswith("python:"):
            named = f"names the Python factory {ref}, and no code is run because a file names it"
            what = named if ref else f"holds a {note.get('class')}, which only your code can make"
            raise UserError(f"{folder} {what}", f"add --model {ref or 'python:package.module:factory'}")
    network = zoo.load_model(folder, model=made).eval()
    return Saved(network, folder, run, recipe, summary)


def data_of(saved: Saved, source: str | None = None, changes: Sequence[str] = ()) -> tuple[schema.Recipe, Data]:
    """The recipe and data to look at a student with: those of its run, or others that the user names.

    Args:
        saved: the student.
        source: a data reference instead of the run's.
        changes: `data.key=value` overrides.

    Raises:
        UserError: no data is known, or it cannot be opened.
    """
    from limbeck.models import open_recipe_data

    for change in changes:
        if not change.startswith(_MAY_CHANGE):
            offer = "only data, text, evaluation, task, device and threads can be set for a saved student"
            raise UserError(f"--set {change} changes nothing here", offer)
    raw: dict[str, Any] = {"student": {"model": "object:saved"}} if saved.recipe is None else saved.recipe.data_as_written()
    if source is not None:
        raw["data"] = {"source": source}
    elif saved.recipe is None and not any(change.startswith("data") for change in changes):
        raise UserError(f"{saved.folder} does not tell on which data", "add --data SOURCE (`limbeck data` lists the embedded sets)")
    if (saved.folder / "tokenizer.json").is_file():
        raw["text"] = _own_tokens(saved, dict(raw.get("text") or {}))
    recipe = schema.resolve(raw, "the run's recipe", changes)
    if recipe.data.source.startswith("object:"):
        raise UserError("the run's data was a Python object, which no file keeps", "add --data SOURCE, for example --data csv:my.csv")
    return recipe, open_recipe_data(recipe.data, None, recipe)


def _own_tokens(saved: Saved, text: dict[str, Any]) -> dict[str, Any]:
    """The `text` block with the student's own tokenizer, whatever data it reads; alone, it reads as much as its positions allow."""
    text["tokenizer"] = f"hf:{saved.folder.resolve()}"
    if saved.recipe is None:
        context = getattr(getattr(saved.network, "config", None), "max_position_embeddings", None)
        text.setdefault("length", min(128, context or 128))
    return text


def _session(saved: Saved, recipe: schema.Recipe, data: Data) -> Session:
    from limbeck.knowledge.surroundings import surroundings
    from limbeck.models import check_input

    session = surroundings(recipe)
    saved.network.to(session.device)
    check_input(saved.network, data, session, "student")
    return session


def measure(saved: Saved, source: str | None = None, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Measure a student on the test split, as its run did.

    Returns:
        `metrics` and `cost` of the student, `data`, `recorded` (the metrics in the run's summary; None where there are none),
        `same_data` (whether these were measured on the very same samples; None when that is unknown).

    Raises:
        UserError: the data does not fit the student, or has no labels.
    """
    from limbeck.models import task_of

    recipe, data = data_of(saved, source, changes)
    if recipe.evaluation.final == "valid" and data.valid is not None:
        data = replace(data, test=data.valid)
    session = _session(saved, recipe, data)
    task = task_of(recipe, data)
    data = data.to(session.device)
    metrics = task.measure(saved.network, data.test, recipe.evaluation.batch, session.device, full=True).metrics
    if not metrics:
        raise UserError(f"the test part of {data.name} has no labels, so nothing can be measured", "give a labelled test split")
    summary = saved.summary or {}
    before = (summary.get("data") or {}).get("fingerprint")
    return {
        "path": str(saved.folder),
        "metrics": metrics,
        "cost": task.price(saved.network, data.example(1).to(session.device)),
        "data": data.describe(),
        "recorded": (summary.get("metrics") or {}).get("student"),
        "same_data": None if before is None else before == data.fingerprint,
    }


# ---- handing on ----


def _largest(a: Any, b: Any) -> float:
    return float((a - b).abs().max()) if a.numel() else 0.0


def _card(saved: Saved) -> str:
    from limbeck.report.card import model_card, teacher_text

    if saved.summary is not None and saved.recipe is not None:
        return model_card(saved.summary, teacher_text(saved.recipe))
    beside = saved.folder / "README.md"
    return beside.read_text(encoding="utf-8") if beside.is_file() else f"# {type(saved.network).__name__}, saved by limbeck\n"


def _free(folder: Path, saved: Saved) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", "name a folder with --out")
    if folder.is_dir() and (folder.resolve() == saved.folder.resolve() or (any(folder.iterdir()) and not (folder / ".exported").is_file())):
        raise UserError(f"the folder {folder} is not empty, and no earlier export", "name an empty or new folder with --out")


def hand_on(saved: Saved, form: str, out: Path | None = None, source: str | None = None, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Write a student in another format and check what was written against the student on real test inputs.

    Args:
        saved: the student.
        form: "onnx", "safetensors" or "hf" (for models of the transformers library; adapters are merged into their network).
        out: the file (onnx) or folder; by default in `export/` of the run's folder.
        source, changes: the data to check with, see `data_of`.

    Returns:
        `path`, `bytes`, `max_abs_difference` of the logits (or embeddings), `samples` that were compared, and what the format adds.

    Raises:
        UserError: the student cannot be written so, or what was written differs.
    """
    import torch

    from limbeck.models import task_of
    from limbeck.zoo.export import export_onnx

    _check_form(saved.network, form)
    base = (saved.run or saved.folder) / "export"
    target = out or (base / "student.onnx" if form == "onnx" else base / form)
    if form == "onnx" and target.is_dir():
        raise UserError(f"{target} is a folder", "name a file, such as --out student.onnx")
    if form != "onnx":
        _free(target, saved)
    recipe, data = data_of(saved, source, changes)
    recipe = recipe.model_copy(update={"device": "cpu"})
    _session(saved, recipe, data)
    task, batch = task_of(recipe, data), data.test.batch(torch.arange(min(64, len(data.test))))
    if form == "onnx":
        inputs = task.cost_inputs(saved.network, batch)
        made = export_onnx(saved.network, inputs, target, real_inputs=inputs)
        return {"format": form, **made, **({} if task.classes else {"top1_agreement": None})}
    again = _write_folder(saved, form, target, data)
    with torch.no_grad():
        said, expected = (_said(model.eval(), task, batch) for model in (again, saved.network))
    difference = _largest(said, expected)
    if difference > 1e-5 * max(1.0, float(expected.abs().max())):
        raise UserError(
            f"what was written to {target} differs from the student by {difference:.3g}", "does the model act at random in evaluation mode?"
        )
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    return {"format": form, "path": str(target), "bytes": size, "max_abs_difference": difference, "samples": len(batch)}


def _check_form(network: nn.Module, form: str) -> None:
    """Refuse what cannot be written in a form."""
    from limbeck.zoo.files import _is_transformers
    from limbeck.zoo.lora import is_adapted
    from limbeck.zoo.sentence import SentenceEncoder

    kind = type(network).__name__
    if form == "hf" and not (_is_transformers(network) or is_adapted(network) or isinstance(network, SentenceEncoder)):
        raise UserError(
            f"--format hf is for models of transformers, and this student is of the class {kind}", "use --format safetensors or onnx"
        )
    made_from = str((getattr(network, "limbeck_config", None) or {}).get("ref", ""))
    if form == "hf" and made_from.startswith(("quantised:", "cut:")):
        raise UserError(
            f"--format hf is for models as transformers builds them, and the weights of this {kind} are {made_from.split(':')[0]}",
            "use --format safetensors or onnx",
        )
    if form == "onnx" and getattr(getattr(network, "config", None), "is_encoder_decoder", False):
        raise UserError(
            f"--format onnx is for one pass, and a {kind} writes by two networks with a memory in between", "use --format hf or safetensors"
        )


def _said(network: nn.Module, task: Task, batch: Batch) -> Tensor:
    """What two copies of a student are compared by: logits `(N, C)`, or embeddings."""
    import torch

    said = task.reader(network, ("logits",), grad=False)(batch)
    if task.family == "embedding":
        return torch.cat([said.query, said.document])
    return said.law.logits() if task.family == "language" else said.logits


def _write_folder(saved: Saved, form: str, target: Path, data: Data) -> nn.Module:
    """Write the folder, with its model card, and open it again as somebody without limbeck would."""
    from limbeck import storage, zoo
    from limbeck.zoo.export import export_safetensors

    card = _card(saved)
    target.mkdir(parents=True, exist_ok=True)
    storage.write_text(target / ".exported", "by limbeck export; it may be written again\n")
    network = saved.network
    if data.text is not None:
        data.text.tokenizer.save_pretrained(target)
    if form == "hf":
        from limbeck.zoo.lora import is_adapted

        if is_adapted(network):
            network = copy.deepcopy(network).merge_and_unload()  # type: ignore[operator]
        zoo.save_model(network, target, card=card)
        return zoo.load_model(target.resolve())
    made = getattr(network, "limbeck_config", None) or {}
    config = {**made, "classes": list(data.classes), "input_shape": list(data.input_shape), "labels": data.kind}
    export_safetensors(network, target, config)
    storage.write_text(target / "README.md", card)
    again = copy.deepcopy(network)
    again.load_state_dict(storage.load_tensors(target / "model.safetensors"))
    return again
