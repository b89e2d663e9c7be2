"""The score model that pictures and drawings are optimised under: exact, trained once and kept, or a saved generator's network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import __version__, models, schema, storage
from limbeck.data.batch import Batch
from limbeck.data.pictures import Pictures
from limbeck.diffusion import Denoiser, Mixture, exact_denoiser, make_process
from limbeck.engine.clock import Clock
from limbeck.engine.program import PlainProgram, moving_average
from limbeck.engine.schedule import make_optimizer
from limbeck.engine.session import Session, seed_everything
from limbeck.errors import MISFITS, UserError
from limbeck.places import user_path

EXACT = "exact"
"""What a recipe writes as teacher for the exact score of the diffused training pictures."""

MOST = 1_000_000
"""Numbers that the exact score may hold: each evaluation compares every state with all of them."""


class DenoisingLessons(PlainProgram):
    """Denoising of training pictures at uniform places of the process; labels are hidden now and then, so that it can be guided.

    Args:
        made: what is trained. pictures: its data. training: a `train` block. dropout: share of hidden labels.
    """

    def __init__(self, made: Denoiser, pictures: Pictures, training: Any, seed: int, dropout: float) -> None:
        self.made, self.pictures, self.training, self.dropout = made, pictures, training, dropout
        self._batches = pictures.batches(training.batch, seed)
        self.steps_per_epoch = self._batches.steps_per_epoch
        self.total = training.steps or max(1, round(training.epochs * self.steps_per_epoch))
        self.average = moving_average(made.network, training)

    def modules(self) -> dict[str, nn.Module]:
        return {"network": self.made.network} | ({} if self.average is None else {"average": self.average})

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"network": make_optimizer(self.training, self.made.network.parameters())}

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        return (self.pictures.ready(batch) for batch in self._batches.epoch(epoch, start))

    def turns(self, clock: Clock) -> tuple[str, ...]:
        return ("network",)

    def losses(self, turn: str, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        x, labels = batch.inputs, batch.labels if self.made.classes else None
        if labels is not None:
            hidden = torch.rand(len(x), device=x.device) < self.dropout
            labels = torch.where(hidden, torch.full_like(labels, self.made.classes), labels)
        t = self.made.process.draw(len(x), "uniform", 0.0, 1.0, x.device)
        return {"denoising": self.made.denoising_loss(x, torch.randn_like(x), t, labels)}

    def after_step(self, clock: Clock) -> None:
        if self.average is not None:
            self.average.update_parameters(self.made.network)

    def network(self) -> nn.Module:
        """What is kept: the moving average where there is one."""
        return self.made.network if self.average is None else self.average.module


def exact_prior(pictures: Pictures, process: Any) -> Denoiser:
    """The exact score of the diffused training pictures, with their labels as classes.

    Raises:
        UserError: there are too many of them.
    """
    found = [(x, y) for x, y in pictures.whole(pictures.data.train)]
    x = torch.cat([part for part, _ in found])
    if x.numel() > MOST:
        raise UserError(
            f"the exact score of {len(x)} pictures of {x[0].numel()} numbers holds {x.numel()}, more than {MOST}",
            "set data.train, or train a network: teacher={model: denoising-mlp, train: {...}}",
        )
    labels = None
    if pictures.classes and found[0][1] is not None:
        labels = pictures.labels_of(torch.cat([y for _, y in found])).to(x.device)
        x, labels = x[labels < pictures.classes], labels[labels < pictures.classes]  # without label it would count as a class of its own
        if len(labels.unique()) < pictures.classes:
            raise UserError("a class has no labelled training picture, so its score is not defined", "label at least one of each class")
    mixture = Mixture(x, 0.0, torch.full((len(x),), 1 / len(x), device=x.device), labels)
    return exact_denoiser(mixture, process, "v", classes=pictures.classes if labels is not None else 0)


def _saved(reference: str, session: Session) -> Denoiser | None:
    """The network of a generator's folder that the sampling wing wrote; None for other references."""
    folder = user_path(reference.removeprefix("folder:"))
    note = next((place / "generator.json" for place in (folder, folder / "generator") if (place / "generator.json").is_file()), None)
    if note is None:
        return None
    from limbeck.zoo import load_model

    try:
        facts = json.loads(note.read_text("utf-8"))["denoiser"]
        made = Denoiser.from_facts(load_model(note.parent), facts)
    except MISFITS as error:
        raise UserError(f"{note} is not the note of a generator: {error}", "restore or remake the folder") from None
    return made.guided(1.0) if made.guidance.acts else made


def open_prior(recipe: schema.Recipe, spec: schema.Scene, pictures: Pictures, session: Session, given: Any = None) -> Denoiser | None:
    """The recipe's teacher as a frozen, unguided score model; None where there is none.

    Raises:
        UserError: several teachers, a network that is no denoiser, has other classes or sizes than the data, or was never trained.
    """
    if given is not None:
        made = given if isinstance(given, Denoiser) else _wrap(given, spec, "teacher")
        made = made.guided(1.0) if made.guidance.acts else made  # methods guide it themselves
    elif not recipe.teacher.models:
        return None
    elif len(recipe.teacher.models) > 1:
        raise UserError(f"pictures are optimised under one score model, and the recipe names {len(recipe.teacher.models)}", "name one")
    else:
        ((name, model),) = recipe.teacher.models.items()
        if model.model == EXACT:
            if model.args or model.weights or model.train is not None:
                raise UserError("the exact score takes no args, weights or training", "leave them out")
            made = exact_prior(pictures, make_process(spec.process))
        elif (saved := _saved(model.model, session)) is not None:
            if model.args or model.weights or model.train is not None:
                raise UserError(f"{name}: a generator's folder says itself what it is", "leave args, weights and train out")
            made = saved
        else:
            made = _schooled(model, name, spec, pictures, session)
    made.network.to(session.device).eval().requires_grad_(False)
    _check(made, pictures, session)
    return made


def _wrap(network: nn.Module, spec: schema.Scene, name: str) -> Denoiser:
    if not getattr(network, "denoises", False):
        raise UserError(
            f"{name} is a {type(network).__name__}, no denoising network",
            "name exact, denoising-mlp, unet or dit with a train block, or a generator's folder",
        )
    return Denoiser(network, make_process(spec.process), spec.prediction, classes=int(getattr(network, "classes", 0)))


def _schooled(model: schema.Model, name: str, spec: schema.Scene, pictures: Pictures, session: Session) -> Denoiser:
    school = model.train
    made = _wrap(models.build(model, pictures.data, school.seed if school else 0, name), spec, name)
    if school is None:
        if model.weights is None and not model.model.startswith("folder:"):
            raise UserError(f"{name}: {model.model} was never trained, so it knows no score", "add a `train` block, or name its weights")
        return made
    if school.method.id != "alone" or school.data or school.first is not None:
        raise UserError("a score model is trained by denoising alone", "leave method, data and first out of its train block")
    made.network.to(session.device)
    content = {
        "what": "score model",
        "model": model.model_dump(exclude={"train"}),
        "meaning": made.facts(),
        "start": storage.tensors_fingerprint(made.network.state_dict()),
        "train": school.model_dump(exclude={"method", "data", "first"}),
        "data": pictures.data.fingerprint,
        "jitter": pictures.jitter,
        "label_dropout": spec.label_dropout,
        "limbeck": __version__,
        "device": session.device.type,
        "precision": session.precision,
    }

    def train(work: Path, key: str) -> nn.Module:
        seed_everything(school.seed, f"{name} set-up")
        lessons = DenoisingLessons(made, pictures, school, school.seed, spec.label_dropout)
        session.fit(lessons, name, seed=school.seed, folder=work, digest=key, evaluate=False)
        return lessons.network()

    return made.with_network(models.kept(content, made.network, session, "score model", train))


def _check(made: Denoiser, pictures: Pictures, session: Session) -> None:
    if made.classes and pictures.classes and made.classes != pictures.classes:
        raise UserError(f"the teacher knows {made.classes} classes, and the data has {pictures.classes}", "give data with the same classes")
    shape = getattr(made.network, "input_shape", None)
    if shape is not None and tuple(shape) != pictures.shape:
        raise UserError(f"the teacher was made for pictures {tuple(shape)}, and these are {pictures.shape}", "set data.size")
    x = torch.zeros(2, *pictures.shape, device=session.device)
    t = made.process.at(torch.full((2,), 0.5, device=session.device))
    try:
        with torch.no_grad():
            made.noise(x, t, torch.zeros(2, dtype=torch.long, device=session.device) if made.classes else None)
    except UserError:
        raise
    except Exception as error:  # a network may fail in any way; the message is all that helps
        raise UserError(
            f"the teacher cannot read pictures of shape {pictures.shape}: {type(error).__name__}: {str(error).splitlines()[0][:200]}",
            "a denoising network is called as network(x, level, label)",
        ) from None
