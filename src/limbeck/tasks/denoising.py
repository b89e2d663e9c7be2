"""Denoising: the one thing that a diffusion or flow network is trained for, as a task whose networks can be distilled like any others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.data.pictures import Pictures
from limbeck.diffusion import make_process, sample
from limbeck.errors import UserError
from limbeck.signals.denoising import DenoisingReader, Noising, Prediction
from limbeck.signals.modes import evaluating
from limbeck.tasks.base import Measured, Task

if TYPE_CHECKING:
    from limbeck.data.split import Split
    from limbeck.signals import Signals

PASSES = 4
"""Noise levels at which every sample is measured, one in each quarter of the process."""

CHUNK = 256
"""Samples whose noise is drawn together when a model is measured; fixed, so that figures do not depend on `evaluation.batch`."""

DRAWN = 512
"""Pictures that are drawn from a network whose samples are measured."""


@dataclass(frozen=True)
class Denoising(Task):
    """What the noise, the picture or the velocity in a noised picture is (Ho et al. 2020, arXiv:2006.11239; Lipman et al. 2023).

    Attributes:
        classes: of the pictures; networks are told them.
        noising: process and kind of prediction.
        steps: of the sampler with which samples are drawn and compared with real pictures; 0 leaves that out.
    """

    family: ClassVar[str] = "denoising"
    kind: ClassVar[str] = "denoising"
    classes: tuple[str, ...] = ()
    noising: Noising = field(default_factory=lambda: Noising(make_process("flow")))
    steps: int = 16
    higher_is_better: bool = field(default=False, init=False)

    @property
    def primary(self) -> str:
        """ "denoising_loss": mean squared error of the prediction."""
        return "denoising_loss"

    def hard_loss(self, said: Prediction, labels: Tensor | None = None, **options: Any) -> Tensor:
        """Mean squared error against the target."""
        return F.mse_loss(said.value, said.target)

    def soft_loss(self, student: Prediction, teacher: Prediction, temperature: float = 1.0) -> Tensor:
        """Mean squared error against the teacher's prediction; the temperature has no meaning here."""
        return F.mse_loss(student.value, teacher.value)

    def reader(self, model: nn.Module, wants: Sequence[str], **options: Any) -> Callable[[Batch], Signals]:
        """A `limbeck.signals.denoising.DenoisingReader`."""
        return DenoisingReader(model, wants, self.noising, **options)

    def check_student(self, said: Signals) -> None:
        """Its prediction must have the shape of the pictures."""
        if "prediction" in said and said.prediction.value.shape != said.prediction.target.shape:
            raise UserError(
                f"the network gives {tuple(said.prediction.value.shape)} for pictures {tuple(said.prediction.target.shape)}",
                "name a denoising network: denoising-mlp, unet or dit",
            )

    def check_pair(self, student: Signals, teacher: Signals) -> None:
        """Both predict pictures of one shape."""
        if "prediction" in student and "prediction" in teacher:
            own, other = student.prediction.value.shape[1:], teacher.prediction.value.shape[1:]
            if own != other:
                raise UserError(f"the student predicts {tuple(own)}, the teacher {tuple(other)}", "give both the same pictures")

    def measure(
        self, model: nn.Module | Callable[[Batch], Signals], split: Split, batch: int, device: torch.device, full: bool = False
    ) -> Measured:
        """`denoising_loss` on noise that is the same for every model; with `full` also `sliced_distance` of drawn samples to real ones."""
        read = self.reading(model, ("prediction",))
        total, count = 0.0, 0
        networks = [model] if isinstance(model, nn.Module) else []
        with evaluating(*networks):
            for noised in self.noised(split, device):
                said = read(noised).prediction
                total += float((said.value - said.target).square().flatten(1).mean(1).double().sum())
                count += len(noised)
            metrics = {"denoising_loss": total / count}
            if full and self.steps and networks:
                metrics["sliced_distance"] = self._distance(networks[0], split, device)
        return Measured(metrics)

    def noised(self, split: Split, device: torch.device) -> Iterator[Batch]:
        """A split with times and noise that depend on nothing but the split's size: `PASSES` batches for each chunk of samples."""
        from limbeck.data.batches import Batches

        quiet = replace(self.noising, jitter=0.0, dropout=0.0)
        for number, part in enumerate(Batches(split, min(CHUNK, len(split)), shuffle=False).epoch(0)):
            x0, labels = quiet.pictures(part)
            for one in range(PASSES):
                rng = torch.Generator().manual_seed(number * PASSES + one)
                place = (one + torch.rand(len(x0), generator=rng)) / PASSES
                noise = torch.randn(x0.shape, generator=rng)
                extra = {"noised_t": self.noising.process.at(place), "noised_noise": noise, "noised_x0": x0.cpu()}
                if labels is not None:
                    extra["noised_label"] = labels.cpu()
                yield Batch(part.inputs, part.labels, part.index, extra).to(device)

    def _distance(self, network: nn.Module, split: Split, device: torch.device) -> float:
        """Sliced Wasserstein distance of drawn samples to as many real pictures, of the same classes and from the same noise for all."""
        from limbeck.evaluation.generation import sliced_distance

        count = min(DRAWN, len(split))
        real, labels = self.noising.pictures(split.batch(torch.arange(count)))
        noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0)).to(device)
        label = None if labels is None else labels.to(device)
        with torch.no_grad():
            drawn = sample(self.noising.denoiser(network), noise, label, steps=self.steps, sampler="ddim")
        return sliced_distance(real.flatten(1).cpu(), drawn.clamp(-1, 1).flatten(1).cpu())

    def chance(self, labels: Tensor | None, samples: int | None = None) -> float:
        """Unknown without the pictures; never reached."""
        return math.inf

    def cost_inputs(self, model: nn.Module, batch: Batch) -> Any:
        """State, level and label at the middle of the process."""
        x0, labels = self.noising.pictures(batch)
        t = self.noising.process.at(torch.full((len(x0),), 0.5, device=x0.device))
        inputs = self.noising.denoiser(model).inputs(x0, t)
        return inputs if labels is None else (*inputs, labels)

    def compare(self, student: Any, teacher: Any, split: Split, batch: int, device: torch.device) -> dict[str, float]:
        """`teacher_error`: mean squared difference of the two predictions on the same noise."""
        return {"teacher_error": self.teacher_error(student, teacher, split, device)}

    def teacher_error(self, student: Any, teacher: Any, split: Split, device: torch.device) -> float:
        """Mean squared difference of the predictions of two models on the noised split."""
        total, count = 0.0, 0
        own, other = self.reading(student, ("prediction",)), self.reading(teacher, ("prediction",))
        with evaluating(*(m for m in (student, teacher) if isinstance(m, nn.Module))):
            for noised in self.noised(split, device):
                gap = own(noised).prediction.value - other(noised).prediction.value
                total += float(gap.square().flatten(1).mean(1).double().sum())
                count += len(noised)
        return total / count


def noising_of(spec: Any, data: Any) -> Noising:
    """How a recipe's pictures are noised.

    Args:
        spec: its `generate` block.
        data: the data set.

    Raises:
        UserError: the samples are no pictures, or lie outside [-1, 1].
    """
    if len(data.input_shape) != 3:
        raise UserError(f"denoising is of pictures (C, H, W), and the samples of {data.name} have shape {tuple(data.input_shape)}", "")
    return Noising(
        make_process("flow" if spec.process == "auto" else spec.process),
        spec.prediction,
        spec.code,
        len(data.classes),
        Pictures(data, latents=spec.latents).doubled,
        spec.jitter,
        spec.label_dropout,
    )
