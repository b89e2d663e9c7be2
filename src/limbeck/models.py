"""From the blocks of a recipe to data, task and networks; what every wing needs before it begins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from limbeck import places, processes, schema, storage, zoo
from limbeck.data import Data, open_data
from limbeck.data.choose import amount, hide
from limbeck.data.text import is_text, open_text
from limbeck.engine import checkpoint
from limbeck.engine.session import Session, seed_everything
from limbeck.errors import MISFITS, UserError
from limbeck.places import user_path
from limbeck.signals import anatomy
from limbeck.signals.language import settle
from limbeck.tasks import Classification, Language, Task, Writing
from limbeck.zoo.language import Tokens, check_fits

NOISING = {"process", "prediction", "code", "label_dropout", "jitter", "latents", "teacher_steps"}
"""Keys of the `generate` block that the task denoising reads."""


def open_recipe_data(spec: schema.Data, given: Any = None, recipe: schema.Recipe | None = None, like: Data | None = None) -> Data:
    """The data set of a recipe (or the object that stands for it).

    Args:
        spec: the recipe's `data` block, perhaps with some keys changed.
        given: an object instead of the block's source.
        recipe: whose `text` block and teacher say how texts become tokens.
        like: data whose tokenizer these texts must share (those of another stage of the same run).
    """
    source = spec.source if given is None else given
    if isinstance(source, Data):
        return source
    text = recipe.text if recipe is not None else None
    if isinstance(source, str) and is_text(source, text is not None):
        return _open_text(spec, text or schema.Text(), recipe, like)
    if text is not None:
        raise UserError(
            f"the recipe has a `text` block, and {spec.source} is no text",
            "leave `text` out, or name a text source (`limbeck data` lists the embedded ones; jsonl:, parquet:, csv:, hf:, text:)",
        )
    options = {
        key: getattr(spec, key) for key in ("train", "valid", "test", "labelled", "label", "size", "channels", "seed", "label_noise")
    }
    for name in spec.args:
        if name in options or name in ("kind", "augment"):
            raise UserError(f"data.args.{name} is a key of data itself", f"write data.{name}")
    return open_data(source, **options, **spec.args)


def _open_text(spec: schema.Data, text: schema.Text, recipe: schema.Recipe | None, like: Data | None) -> Data:
    for name in ("size", "channels", "label_noise"):
        if getattr(spec, name) is not None:
            raise UserError(f"data.{name} is not for texts", "leave it out")
    if spec.augment:
        raise UserError("data.augment is not for texts", "leave it out")
    data = open_text(
        spec.source,
        kind=text.task,
        tokenizer=_tokenizer(text, recipe) if like is None or like.text is None else like.text.tokenizer,
        pad=text.pad,
        length=text.length,
        prompt_length=text.prompt_length,
        packing=text.packing,
        columns=text.columns or None,
        chat=text.chat,
        train=spec.train,
        valid=spec.valid,
        test=spec.test,
        seed=spec.seed,
        **({"label": spec.label} if spec.label is not None else {}),
        **spec.args,
    )
    if spec.labelled is None:
        return data
    if data.train.labels is None:
        raise UserError(f"data.labelled is for classes, and {spec.source} is a {data.kind} task", "leave it out")
    true = data.train.labels
    mark = storage.fingerprint([data.fingerprint, "labelled", spec.labelled, spec.seed])
    hidden = data.train.with_labels(hide(true, amount(spec.labelled, len(data.train), "labelled"), spec.seed))
    return replace(data, train=hidden, hidden_labels=true, fingerprint=mark)


def _tokenizer(text: schema.Text, recipe: schema.Recipe | None) -> str:
    """The tokenizer's reference; "auto" and "teacher" look at the teacher's folder."""
    if text.tokenizer not in ("auto", "teacher"):
        return text.tokenizer
    specs = [*recipe.teacher.models.values(), recipe.student] if recipe is not None else []
    for spec in specs if text.tokenizer == "auto" else specs[:-1]:
        if spec.model == "minilm":
            return "minilm"
        name = spec.model.removeprefix("hf:").removeprefix("folder:")
        if spec.model.startswith("hf:") or (user_path(name) / "tokenizer.json").is_file():
            return f"hf:{name}"
    if text.tokenizer == "teacher":
        raise UserError("text.tokenizer is teacher, and the teacher is no folder with a tokenizer", "name a tokenizer, such as bpe:1024")
    return "bpe:1024"


def task_of(recipe: schema.Recipe, data: Data) -> Task:
    """What outputs mean, from the recipe or, with `task: auto`, from the data.

    Raises:
        UserError: the data has no labels and so no classes; or a task that the data are not for.
    """
    if recipe.task == "denoising":
        from limbeck.tasks.denoising import Denoising, noising_of

        generate = recipe.generate or schema.Generate()
        for name in set(schema.Generate.model_fields) - NOISING:
            if getattr(generate, name) != getattr(schema.Generate(), name):
                known = ", ".join(sorted(NOISING))
                raise UserError(f"generate.{name} has no meaning for the task denoising", f"leave it out; it reads {known}")
        noising = noising_of(generate, data)
        for spec in (*recipe.teacher.models.values(), recipe.student):
            _check_noising(spec.model, noising)
        return Denoising(tuple(data.classes), noising, generate.teacher_steps[-1])
    if data.text is not None and data.kind in ("causal-lm", "seq2seq"):
        spec = recipe.text or schema.Text()
        if spec.write and not hasattr(data.test, "prompts"):
            raise UserError(f"text.write asks for written texts, and {data.name} has no prompts", "leave it out, or give pairs")
        writing = Writing(spec.write, spec.write_tokens, spec.write_temperature)
        return Language(data.text, data.kind, writing)
    if data.kind == "embedding":
        from limbeck.tasks.embedding import Embedding

        return Embedding(data.text)
    if not data.classes:
        raise UserError(f"the data {data.name} has no labels, so its classes are unknown", "name the label column with data.label")
    return Classification(data.classes, kind=data.kind if recipe.task == "auto" else recipe.task, label_smoothing=recipe.label_smoothing)


def _check_noising(reference: str, noising: Any) -> None:
    """The folder of a generator says under which noise its network was trained; another one would make its predictions meaningless.

    Raises:
        UserError: the recipe's `generate` block says otherwise.
    """
    folder = user_path(reference.removeprefix("folder:"))
    note = next((place / "generator.json" for place in (folder, folder / "generator") if (place / "generator.json").is_file()), None)
    if note is None or not folder.is_dir():
        return
    try:
        facts = json.loads(note.read_text(encoding="utf-8"))["denoiser"]
        own = {"process": facts["process"], "prediction": facts["prediction"], "code": facts["code"]}
    except (OSError, *MISFITS) as error:
        raise UserError(f"{note} is not the note of a generator: {error}", "restore or remake the folder") from None
    asked = json.loads(json.dumps({"process": noising.process.facts(), "prediction": noising.prediction, "code": noising.code}))
    for name, value in own.items():
        if value != asked[name]:
            raise UserError(f"{reference} was trained with {name} {value}, and the recipe says {asked[name]}", f"set generate.{name}")


def tokens_of(data: Data) -> Tokens | None:
    """What networks must know of the tokenizer; None where samples are no texts."""
    if data.text is None:
        return None
    text = data.text
    texts = data.kind in ("causal-lm", "seq2seq", "embedding")
    kind = data.kind if texts else "classification"
    return Tokens(text.vocabulary, text.length, kind, text.pad, text.bos, text.eos, None if texts else len(data.classes))


def build(spec: schema.Model, data: Data, seed: int, role: str) -> nn.Module:
    """A network from its reference, with its weights if some are named; `seed` decides its first weights."""
    seed_everything(seed, "network")
    # a student of more classes than the data is the user's mistake to see, so an explicit `classes` argument wins over the data's
    args = {"input_shape": data.input_shape, "classes": len(data.classes), **spec.args}
    if reserved := {"ref", "tokens"} & set(args):
        raise UserError(f"{role}: {min(reserved)} is no argument of {spec.model}", "leave it out; it is told by the recipe")
    try:
        network = zoo.build(spec.model, tokens=tokens_of(data), **args)
        if spec.weights:
            path = user_path(spec.weights)
            if path.is_dir():
                network = zoo.load_model(path, model=network)
            else:
                tensors = storage.load_tensors(path)
                try:
                    network.load_state_dict(tensors)
                except RuntimeError as error:
                    raise UserError(
                        f"{path} does not fit {spec.model}: {str(error).splitlines()[-1]}", "give the weights of this very network"
                    ) from None
        if spec.adapter is not None:
            if spec.weights and hasattr(network, "name_or_path"):
                network.name_or_path = ""  # other weights than those of the folder that it came from, see `zoo.lora.save_adapter`
            network = zoo.adapt(network, **spec.adapter.model_dump(), kind=data.kind)
    except UserError as error:
        raise UserError(f"{role}: {error.message}", error.hint) from None
    return network


def check_input(network: nn.Module, data: Data, session: Session, role: str) -> None:
    """One forward pass on two samples: a network that cannot read the data is named now, not in the middle of training."""
    example = data.example(2).to(session.device)
    texts = data.text is not None and data.kind in ("causal-lm", "seq2seq")
    if (tokens := tokens_of(data)) is not None and (config := getattr(network, "config", None)) is not None:
        check_fits(config, tokens, role)
    try:
        if texts:
            note = settle(network, example, data.kind, data.text.vocabulary, role)
            session.notes += [note] if note and note not in session.notes else []
        elif data.kind != "embedding" and not getattr(network, "denoises", False):
            anatomy(network, example.inputs)
    except UserError:
        raise
    except Exception as error:  # a network may fail in any way; the message is all that helps
        if texts:
            raise UserError(
                f"{role}: the network cannot read texts: {type(error).__name__}: {str(error).splitlines()[0][:200]}",
                f"give the {role} a language model of transformers for a {data.kind} task, such as llama, gpt2 or t5",
            ) from None
        shape = tuple(data.input_shape)
        raise UserError(
            f"{role}: the network cannot read samples of shape {shape}: {type(error).__name__}: {str(error).splitlines()[0][:200]}",
            f"give the {role} inputs of the shape it was made for (data.size, data.channels), or build it with args.input_shape",
        ) from None


def kept(content: dict[str, Any], network: nn.Module, session: Session, what: str, train: Callable[[Path, str], nn.Module]) -> nn.Module:
    """A trained network, made once: it is kept in the user's cache folder and found again by what it was made from.

    Args:
        content: everything that decides its weights; JSON can hold it.
        network: as it is before training; a kept one is loaded into it.
        session: told when a kept network cannot be used.
        what: its name in notes.
        train: makes it, given a folder for checkpoints (so that an interrupted training goes on, also in another run) and the key.
    """
    from filelock import FileLock

    key = storage.fingerprint(content)
    folder = places.cache_folder() / "models" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with processes.held_by_first(FileLock(folder.parent / f"{key}.lock")):
        if processes.first(folder.is_dir):
            failed = None
            try:
                found = zoo.load_model(folder, model=network)
            except UserError as error:
                failed = error.message
            failed = next((text for text in processes.every(failed) if text), None)
            if failed is None:
                work = folder.parent / f"{key}.training"
                processes.first(lambda: shutil.rmtree(work, ignore_errors=True))  # of a process killed just before
                return found
            if not session.trains:
                raise UserError(f"the kept {what} cannot be used: {failed}", "remove that folder, and run the same command again")
            session.notes.append(f"the kept {what} in {folder} cannot be used and is trained again: {failed}")
            processes.first(lambda: shutil.rmtree(folder))
        if not session.trains:
            raise UserError(f"the kept {what} is not in {folder}", "workers look for it in LIMBECK_CACHE: share that folder with them")
        work = folder.parent / f"{key}.training"
        random = checkpoint.random_state()
        trained = train(work, key)
        checkpoint.restore_random_state(random)  # what follows draws the same numbers whether the network was trained now or found
        draft = folder.parent / f".{key}.tmp"

        def keep() -> None:
            shutil.rmtree(draft, ignore_errors=True)
            zoo.save_model(trained, draft, extra={"made_from": content})
            draft.rename(folder)
            shutil.rmtree(work, ignore_errors=True)

        processes.first(keep)
        return trained
