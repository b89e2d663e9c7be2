"""The teacher and the student of a distillation: opened, trained once, copied; and whether a network means what it is said to mean."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck import __version__, models, schema, storage
from limbeck import method as registry
from limbeck.diffusion import Denoiser, make_process
from limbeck.diffusion.process import PREDICTIONS
from limbeck.engine.session import Session, seed_everything
from limbeck.errors import UserError, unknown
from limbeck.sampling.few_step import FewStep, Pair
from limbeck.sampling.generator import Generator, is_generator, load_generator
from limbeck.sampling.pictures import Pictures
from limbeck.sampling.program import SamplingProgram

SAME = "teacher"
"""What a recipe writes for a student that is a copy of the teacher."""


def make_method(spec: schema.Method, given: Any = None) -> FewStep:
    """A method of this wing, made from a recipe's block.

    Raises:
        UserError: it belongs to another wing.
    """
    return registry.of_wing(spec.id, spec.settings, given, FewStep, "sampling")


def steps_of(training: Any, pictures: Pictures) -> int:
    """The number of steps that a `training` block asks for."""
    if training.steps is not None:
        return int(training.steps)
    return max(1, round(training.epochs * max(1, len(pictures.data.train) // training.batch)))


@dataclass
class Loader:
    """Opens the networks of one recipe.

    Attributes:
        spec: the recipe's `generate` block.
        pictures: its data.
        session: device, folder, who is told.
    """

    spec: schema.Generate
    pictures: Pictures
    session: Session

    def _wrap(self, network: nn.Module, name: str) -> Denoiser:
        process = make_process("flow" if self.spec.process == "auto" else self.spec.process)
        if not getattr(network, "denoises", False) and not hasattr(network, "null_label"):
            raise UserError(
                f"{name} is a {type(network).__name__}, no denoising network",
                "name denoising-mlp, unet or dit, a generator's folder, or diffusers:<folder>; a student may be `teacher` for a copy of it",
            )
        classes = int(getattr(network, "classes", 0))
        return Denoiser(network, process, self.spec.prediction, classes=classes, code=self.spec.code)

    def _agreeing(self, made: Denoiser, name: str) -> Denoiser:
        """The same network; refuses a recipe that names another process than the one it was saved with."""
        if self.spec.process != "auto" and make_process(self.spec.process) != made.own:
            raise UserError(
                f"{name}: trained under the process {made.own.name!r}, and generate.process names another one",
                "leave generate.process at auto",
            )
        return made

    def open(self, spec: schema.Model, name: str) -> Denoiser:
        """A network as a recipe names it, before any training."""
        reference = spec.model.removeprefix("folder:")
        saved, bridged = is_generator(reference), spec.model.startswith("diffusers:")
        if (spec.weights and (saved or bridged)) or (spec.args and saved):
            raise UserError(f"{name}: {spec.model} says itself what it is, with its weights", "leave weights and args out")
        if saved:
            opened = load_generator(reference, self.session.device)
            if opened.base is not None or {"start", "levels"} & set(opened.options):
                self.session.notes.append(f"{name}: the generator in {reference} has a sampling of its own; only its network is taken")
            return self._agreeing(opened.denoiser, name)
        if bridged:
            from limbeck.sampling.pipelines import open_pipeline

            takes = ("prompts", "subfolder", "scheduler", "null")
            for key in spec.args:
                if key not in takes:
                    raise unknown(f"argument of {spec.model}", key, takes)
            made = open_pipeline(spec.model.removeprefix("diffusers:"), device=self.session.device, **spec.args)
            return self._agreeing(made, name)
        network = models.build(spec, self.pictures.data, spec.train.seed if spec.train else 0, name)
        return self._wrap(network, name)

    def teacher(self, spec: schema.Teacher, given: Any = None) -> Denoiser | None:
        """The teacher, trained if the recipe says so, guided, frozen; None where the recipe names none.

        Raises:
            UserError: several teachers, a network that is no denoiser, does not fit the pictures, or does not predict what is said.
        """
        if given is not None:
            made = (
                given if isinstance(given, Denoiser) else given.denoiser if isinstance(given, Generator) else self._wrap(given, "teacher")
            )
            trained = False
        elif not spec.models:
            return None
        elif len(spec.models) > 1:
            raise UserError(f"a generator learns from one teacher, and the recipe names {len(spec.models)}", "name one")
        else:
            ((name, model),) = spec.models.items()
            made, trained = self.open(model, name), model.train is not None
            if model.train is not None:
                made = self.schooled(made, model, name, None)
        made.network.to(self.session.device).eval()  # before it is looked at: a pass in training mode would move a batch norm's averages
        self.check(made, "teacher")
        if not trained:
            probe(made, self.pictures)
        made.network.eval().requires_grad_(False)
        if self.spec.guidance != 1.0:
            made = made.guided(self.spec.guidance, *(self.spec.interval or ()))
        return made

    def student(self, spec: schema.Model, teacher: Denoiser | None, given: Any = None) -> Denoiser:
        """The student as it is before its distillation; distilled before by another method where the recipe's `student.train` says so."""
        if given is not None:
            made = (
                given if isinstance(given, Denoiser) else given.denoiser if isinstance(given, Generator) else self._wrap(given, "student")
            )
            made = made.with_network(copy.deepcopy(made.network))
        elif spec.model == SAME:
            if spec.args or spec.weights:
                raise UserError("a student that is a copy of the teacher takes no args and no weights", "leave them out, or name a network")
            if teacher is None:
                raise UserError("the student is to be a copy of the teacher, and there is none", "name a network as student")
            made = teacher.with_network(copy.deepcopy(teacher.network))
        else:
            made = self.open(spec, "student")
            if teacher is not None and not is_generator(spec.model.removeprefix("folder:")) and not spec.model.startswith("diffusers:"):
                made = replace_meaning(made, teacher)
        made.network.to(self.session.device).requires_grad_(True)
        self.check(made, "student")
        if given is None and spec.train is not None:
            made = self.schooled(made, spec, "student", teacher)
            made.network.requires_grad_(True)
        return made

    def check(self, made: Denoiser, name: str) -> None:
        """One dry pass: a network that cannot read the pictures is named now.

        Raises:
            UserError: shapes differ, or the number of classes does.
        """
        shape = self.pictures.shape
        own = getattr(made.network, "input_shape", None)
        own = None if own is None else tuple(own)
        if own is not None and own[:1] != shape[:1]:
            raise UserError(f"{name}: made for {own[0]} channels, and the pictures have {shape[0]}", "set data.channels")
        if own is not None and own != shape:
            raise UserError(f"{name}: made for pictures {own}, and these are {shape}", "set data.size, or build the network for them")
        if made.classes and self.pictures.classes and made.classes != self.pictures.classes:
            raise UserError(
                f"{name}: knows {made.classes} classes, and the data has {self.pictures.classes}", "give data with the same classes"
            )
        x = torch.zeros(2, *shape, device=self.session.device)
        t = torch.full((2,), float(made.process.at(torch.tensor(0.5))), device=self.session.device)
        label = torch.zeros(2, dtype=torch.long, device=self.session.device) if made.classes else None
        training = made.network.training
        made.network.eval()
        try:
            with torch.no_grad():
                out = made.raw(x, t, label)
        except UserError:
            raise
        except Exception as error:  # a network may fail in any way; the message is all that helps
            raise UserError(
                f"{name}: the network cannot read pictures of shape {shape}: {type(error).__name__}: {str(error).splitlines()[0][:200]}",
                "a denoising network is called as network(x, level, label)",
            ) from None
        finally:
            made.network.train(training)
        if out.shape != x.shape:
            raise UserError(f"{name}: gives {tuple(out.shape[1:])} for pictures {shape}", "a denoising network gives what it is given")

    def schooled(self, made: Denoiser, spec: schema.Model, name: str, teacher: Denoiser | None) -> Denoiser:
        """The network after the training of its `train` block, made once and kept."""
        school = spec.train
        assert school is not None
        usual = schema.Method(id="diffusion-training") if school.method.id == "alone" else school.method
        if school.data:
            raise UserError(f"{name}.train.data has no meaning for generators", "leave it out")
        method = make_method(usual)
        content = {
            "what": "denoiser",
            "method": usual.model_dump(),
            "model": spec.model_dump(exclude={"train"}),
            "meaning": made.facts(),
            "start": storage.tensors_fingerprint(made.network.state_dict()),
            "train": school.model_dump(exclude={"method", "data"}),
            "data": self.pictures.data.fingerprint,
            "jitter": self.pictures.jitter,
            "label_dropout": self.spec.label_dropout,
            "limbeck": __version__,
            "device": self.session.device.type,
        }
        if self.session.precision != "no":
            content["precision"] = self.session.precision
        if self.spec.compile:
            content["compile"] = True
        if teacher is not None:
            content["teacher"] = {"weights": storage.tensors_fingerprint(teacher.network.state_dict()), **teacher.facts()}
            content["spec"] = self.spec.model_dump(exclude={"samples", "features", "teacher_steps", "teacher_sampler"})

        def train(work: Path, key: str) -> nn.Module:
            total = steps_of(school, self.pictures)
            pair = Pair(teacher, made, self.pictures, self.spec, school, total, self.session.device, school.seed, self.session)
            seed_everything(school.seed, f"{name} set-up")
            program = SamplingProgram(copy.deepcopy(method), pair)
            self.session.fit(program, name, seed=school.seed, folder=work, digest=key, evaluate=False)
            return program.denoiser().network

        network = models.kept(content, made.network, self.session, name, train)
        return made.with_network(network)


def replace_meaning(made: Denoiser, teacher: Denoiser) -> Denoiser:
    """A fresh network read as its teacher is (process, prediction, code)."""
    return Denoiser(made.network, teacher.own, teacher.prediction, classes=made.classes, code=teacher.code, sigma_data=teacher.sigma_data)


@torch.no_grad()
def probe(made: Denoiser, pictures: Pictures, count: int = 64) -> dict[str, float]:
    """Whether a network predicts what it is said to, found on noised real pictures.

    At three noise levels its output is read as each kind of prediction; the right kind sees the clean picture best.

    Returns:
        mean squared error of the data for each kind, in units of the data's variance.

    Raises:
        UserError: another kind fits clearly better, or none does better than the mean picture (another process, or an untrained network).
    """
    rng = torch.Generator().manual_seed(0)
    batch = pictures.data.train.batch(torch.arange(min(count, len(pictures.data.train))))
    x0 = pictures.scaled(batch.inputs).to(pictures.device)
    labels = pictures.labels_of(batch.labels)
    labels = None if labels is None or not made.classes else labels.to(pictures.device)
    noise = torch.randn(x0.shape, generator=rng).to(x0.device)
    variance = float(x0.var(0).mean()) + 1e-12
    errors = dict.fromkeys(PREDICTIONS, 0.0)
    angles = (0.4, 0.7, 1.0)
    for angle in angles:
        t = made.own.time_at(torch.full((len(x0),), angle, dtype=x0.dtype, device=x0.device))
        own = replace_view(made)
        x = made.own.diffuse(x0, noise, t)
        for kind in PREDICTIONS:
            reader = copy.copy(own)
            reader.prediction = kind
            value = reader.raw(x, t, labels)
            seen, _ = made.own.parts(kind, value, x, t, made.sigma_data)
            errors[kind] += float((seen - x0).square().mean()) / variance / len(angles)
    said = errors[made.prediction]
    best = min(errors, key=lambda kind: errors[kind])
    if said > 1.0 or (best != made.prediction and errors[best] < 0.5 * said):
        if errors[best] < 0.5 * said and errors[best] < 1.0:
            raise UserError(
                f"the network is said to predict {made.prediction!r}, but on noised pictures it predicts {best!r} "
                f"(error {errors[best]:.2g} instead of {said:.2g} of the data's variance)",
                f"set generate.prediction={best}, or mend the scheduler's prediction_type",
            )
        raise UserError(
            f"read as {made.prediction!r} under the process {made.own.name!r}, the network sees clean pictures no better than their mean "
            f"(error {said:.2g} of the data's variance)",
            "check generate.process, generate.prediction and generate.code; or it is not trained, or trained on other data",
        )
    return errors


def replace_view(made: Denoiser) -> Denoiser:
    """The network unguided and in its own process."""
    plain = made.with_network(made.network)
    return plain.under(made.own)


def describe(made: Mapping[str, Any]) -> str:
    """A denoiser's facts in one line."""
    process = made["process"]["name"]
    guided = made["guidance"][0]
    return f"{made['prediction']} prediction, process {process}" + (f", guidance {guided:g}" if guided != 1.0 else "")
