"""What `limbeck inspect` looks at: networks by reference, or those of a recipe, built but never trained, with inputs that they read."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck import recipe as schema
from limbeck import zoo
from limbeck.data import Data, open_data
from limbeck.data.text import is_text, open_text
from limbeck.errors import UserError
from limbeck.knowledge import models
from limbeck.models import tokens_of
from limbeck.places import user_path
from limbeck.signals import Anatomy, Pair, anatomy
from limbeck.signals.inspection import pairs
from limbeck.zoo.cut import made_from
from limbeck.zoo.language import LANGUAGE, Tokens
from limbeck.zoo.sentence import SentenceEncoder

CLASSES = 10
"""Classes of a network whose data is not known."""

_OTHER_TASKS = {"t5": "seq2seq", "bert": "classification"}

TOKENS = {
    name: Tokens(1024, 128, kind, pad=0, bos=2, eos=1, classes=CLASSES if kind == "classification" else None)
    for name, kind in ((name, _OTHER_TASKS.get(name, "causal-lm")) for name in LANGUAGE)
}
"""What a language model is told of a tokenizer where no texts are named."""

_NO_RECIPE = schema.Recipe(student=schema.Model(model="object:seen"))


@dataclass
class Subject:
    """A network by the name that the user gave, and what a dry pass found in it."""

    name: str
    network: nn.Module
    anatomy: Anatomy

    def as_dict(self) -> dict[str, Any]:
        """For programs: JSON can hold it."""
        found = self.anatomy
        rows = [{**row._asdict(), "inputs": list(row.inputs), "outputs": list(row.outputs)} for row in found.modules]
        return {
            "name": self.name,
            "class": found.model,
            "params": zoo.parameters(self.network),
            "modules": rows,
            "stages": [{"path": path, "shape": shape} for path, shape in zip(found.stages, found.stage_shapes)],
            "head": found.head,
            "embedding_shape": found.embedding_shape,
            "attention": found.attention,
        }


@dataclass
class Look:
    """One network, or teachers and a student with the pairs that suggest themselves: `{teacher's name: pairs}`."""

    subjects: list[Subject] = field(default_factory=list)
    pairs: dict[str, list[Pair]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For programs: JSON can hold it."""
        return {
            "models": [s.as_dict() for s in self.subjects],
            "pairs": {name: [p._asdict() for p in found] for name, found in self.pairs.items()},
        }


def is_recipe(reference: str) -> bool:
    """Whether a name means a recipe: an embedded one, or a YAML file."""
    return reference in schema.embedded() or Path(reference).suffix in (".yaml", ".yml")


def inner(network: nn.Module) -> nn.Module:
    """The network whose stages are looked for: of an encoder of sentences the encoder of tokens."""
    return network.encoder if isinstance(network, SentenceEncoder) else network


def _dry(name: str, network: nn.Module, inputs: Any) -> Subject:
    try:
        return Subject(name, network, anatomy(inner(network), inputs))
    except UserError:
        raise
    except Exception as error:  # a network may fail in any way; the message is all that helps
        first = str(error).splitlines()[0][:200] if str(error) else ""
        shape = tuple(inputs.shape[1:]) if isinstance(inputs, torch.Tensor) else "of that data"
        hint = "give inputs that it was made for: --input-shape or --data"
        raise UserError(f"{name} cannot read samples {shape}: {type(error).__name__}: {first}", hint) from None


def _build(reference: str, data: Data | None, shape: tuple[int, ...] | None, args: Mapping[str, Any]) -> nn.Module:
    known: dict[str, Any] = {}
    if data is not None and data.text is not None:
        known = {"tokens": tokens_of(data)}
    elif data is None and reference in TOKENS:
        known = {"tokens": TOKENS[reference]}
    elif data is not None:
        known = {"input_shape": data.input_shape, "classes": len(data.classes) or CLASSES}
    elif shape is not None:
        known = {"input_shape": shape}
    kind, _, name = reference.partition(":")
    folder = user_path(name if kind == "folder" else reference)
    is_folder = folder.is_dir() and reference not in zoo.NETWORKS
    if is_folder and (folder / "student").is_dir():
        reference = str(folder / "student")
    elif is_folder or kind == "hf":
        known.pop("classes", None)  # it has its own
    elif known and "tokens" not in known:
        known.setdefault("classes", CLASSES)
    if is_folder and "tokens" in known:
        known.pop("tokens")
    try:
        return zoo.build(reference, **{**known, **args})
    except UserError as error:
        if "needs input_shape" in error.message:
            raise UserError(error.message, "add --input-shape 1,8,8 or --data digits") from None
        raise


def _guess(name: str, network: nn.Module) -> Any:
    """Inputs for a network that tells its own shape: by limbeck's note, or by its transformers configuration."""
    made = made_from(network)
    if "input_shape" in made:
        return torch.zeros(2, *made["input_shape"])
    config = getattr(network, "config", None)
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if channels and size:
        sides = list(size) if isinstance(size, (list, tuple)) else [size, size]
        return torch.zeros(2, channels, *sides)
    if getattr(config, "vocab_size", None):
        ones = torch.ones(2, min(16, getattr(config, "max_position_embeddings", None) or 16), dtype=torch.long)
        decoder = {"decoder_input_ids": ones} if getattr(config, "is_encoder_decoder", False) else {}
        return {"input_ids": ones, "attention_mask": ones, **decoder}
    raise UserError(f"{name} does not tell what inputs it reads", "add --input-shape 1,8,8 or --data SOURCE")


def look(
    reference: str,
    other: str | None = None,
    *,
    data: str | None = None,
    shape: tuple[int, ...] | None = None,
    args: Mapping[str, Any] | None = None,
    other_args: Mapping[str, Any] | None = None,
) -> Look:
    """Build what is named, make one dry pass through each, and propose pairs.

    Args:
        reference: a recipe (its teachers and student are looked at), or a network as `limbeck.zoo.build` takes it, or a run's folder.
        other: a second network, the student.
        data: where the inputs come from; else `shape`, else what the network itself tells.
        shape: of one sample, without the batch.
        args, other_args: of the two networks.

    Raises:
        UserError: a name is unknown, or a network cannot read the inputs.
    """
    if is_recipe(reference):
        if other is not None or data is not None or shape is not None or args or other_args:
            raise UserError("a recipe names its own models and data", "change a copy of the recipe, or inspect one model by name")
        return _recipe(schema.load(reference))
    opened = None if data is None else open_text(data) if is_text(data) else open_data(data)
    first = _build(reference, opened, shape, args or {})
    inputs = _inputs(reference, first, opened, shape)
    found = Look([_dry(reference, first, inputs)])
    if other is not None:
        same_shape = tuple(inputs.shape[1:]) if isinstance(inputs, torch.Tensor) else shape
        student = _build(other, opened, same_shape, other_args or {})
        second = _dry(other, student, inputs if opened is None or opened.text is None else _inputs(other, student, opened, shape))
        found.subjects.append(second)
        found.pairs[reference] = pairs(found.subjects[0].anatomy, second.anatomy)
    return found


def _inputs(name: str, network: nn.Module, data: Data | None, shape: tuple[int, ...] | None) -> Any:
    """Two samples: of the data, of a shape, or of what the network itself tells."""
    if data is None:
        return torch.zeros(2, *shape) if shape is not None else _guess(name, network)
    return models.task_of(_NO_RECIPE, data).cost_inputs(network, data.example(2)) if data.text is not None else data.example(2).inputs


def recipe_networks(recipe: schema.Recipe, data: Data) -> tuple[dict[str, nn.Module], nn.Module]:
    """The recipe's teachers by name and its student as they are built, before any training."""
    teachers = {}
    for name, spec in recipe.teacher.models.items():
        role = "teacher" if len(recipe.teacher.models) == 1 else f"teacher {name}"
        teachers[name] = models.build(spec, data, spec.train.seed if spec.train else 0, role)
    if recipe.student.model == "teacher" and len(teachers) == 1:
        return teachers, copy.deepcopy(next(iter(teachers.values())))
    return teachers, models.build(recipe.student, data, recipe.seed, "student")


def _recipe(recipe: schema.Recipe) -> Look:
    data = models.open_recipe_data(recipe.data, None, recipe)
    teachers, student = recipe_networks(recipe, data)
    task, example = models.task_of(recipe, data), data.example(2)
    found = Look()
    small = _dry("student", student, task.cost_inputs(student, example))
    for name, network in teachers.items():
        label = "teacher" if len(teachers) == 1 else f"teacher {name}"
        found.subjects.append(_dry(label, network, task.cost_inputs(network, example)))
        found.pairs[label] = pairs(found.subjects[-1].anatomy, small.anatomy)
    found.subjects.append(small)
    return found
