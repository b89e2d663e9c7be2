"""From the blocks of a recipe to data, task and networks; what every wing needs before it begins."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from limbeck import places, schema, storage, zoo
from limbeck.data import Data, open_data
from limbeck.engine import checkpoint
from limbeck.engine.session import Session, seed_everything
from limbeck.errors import UserError
from limbeck.signals import anatomy
from limbeck.tasks import Classification


def open_recipe_data(spec: schema.Data, given: Any = None) -> Data:
    """The data set of a recipe (or the object that stands for it)."""
    source = spec.source if given is None else given
    options = {
        key: getattr(spec, key) for key in ("train", "valid", "test", "labelled", "label", "size", "channels", "seed", "label_noise")
    }
    if isinstance(source, Data):
        return source
    for name in spec.args:
        if name in options or name in ("kind", "augment"):
            raise UserError(f"data.args.{name} is a key of data itself", f"write data.{name}")
    return open_data(source, **options, **spec.args)


def task_of(recipe: schema.Recipe, data: Data) -> Classification:
    """What outputs mean, from the recipe or, with `task: auto`, from the labels.

    Raises:
        UserError: the data has no labels and so no classes.
    """
    if not data.classes:
        raise UserError(f"the data {data.name} has no labels, so its classes are unknown", "name the label column with data.label")
    return Classification(data.classes, kind=data.kind if recipe.task == "auto" else recipe.task, label_smoothing=recipe.label_smoothing)


def build(spec: schema.Model, data: Data, seed: int, role: str) -> nn.Module:
    """A network from its reference, with its weights if some are named; `seed` decides its first weights."""
    seed_everything(seed, "network")
    # a student of more classes than the data is the user's mistake to see, so an explicit `classes` argument wins over the data's
    args = {"input_shape": data.input_shape, "classes": len(data.classes), **spec.args}
    try:
        network = zoo.build(spec.model, **args)
        if spec.weights:
            path = Path(spec.weights).expanduser()
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
    except UserError as error:
        raise UserError(f"{role}: {error.message}", error.hint) from None
    return network


def check_input(network: nn.Module, data: Data, session: Session, role: str) -> None:
    """One forward pass on two samples: a network that cannot read the data is named now, not in the middle of training."""
    example = data.example(2).to(session.device)
    try:
        anatomy(network, example.inputs)
    except UserError:
        raise
    except Exception as error:  # a network may fail in any way; the message is all that helps
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
    with FileLock(folder.parent / f"{key}.lock"):
        if folder.is_dir():
            try:
                return zoo.load_model(folder, model=network)
            except UserError as error:
                session.notes.append(f"the kept {what} in {folder} cannot be used and is trained again: {error.message}")
                shutil.rmtree(folder)
        work = folder.parent / f"{key}.training"
        random = checkpoint.random_state()
        trained = train(work, key)
        checkpoint.restore_random_state(random)  # what follows draws the same numbers whether the network was trained now or found
        draft = folder.parent / f".{key}.tmp"
        shutil.rmtree(draft, ignore_errors=True)
        zoo.save_model(trained, draft, extra={"made_from": content})
        draft.rename(folder)
        shutil.rmtree(work, ignore_errors=True)
        return trained
