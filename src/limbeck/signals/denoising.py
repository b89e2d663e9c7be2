"""Reading a diffusion or flow network: a batch of pictures is noised once, and every model of a step sees the same noise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.data.batch import UNLABELLED, Batch
from limbeck.diffusion import Denoiser, Process
from limbeck.errors import UserError
from limbeck.signals.reader import Reader
from limbeck.signals.signals import Signals


@dataclass(frozen=True)
class Prediction:
    """What a network predicts of noised pictures, and what would have been right: `(B, C, H, W)` each."""

    value: Tensor
    target: Tensor


@dataclass(frozen=True)
class Noising:
    """How pictures become a network's inputs and targets.

    Attributes:
        process: the noise process.
        prediction: what the network gives, one of `limbeck.diffusion.process.PREDICTIONS`.
        code: how it is told the noise level ("position", "log", "time").
        classes: labels besides the null label; 0 for none.
        doubled: pictures lie in [0, 1] and are moved to [-1, 1].
        jitter: standard deviation of noise on the pictures themselves.
        dropout: share of labels that are hidden.
    """

    process: Process
    prediction: str = "velocity"
    code: str = "position"
    classes: int = 0
    doubled: bool = False
    jitter: float = 0.0
    dropout: float = 0.0

    def denoiser(self, network: nn.Module) -> Denoiser:
        """A network, and what its numbers mean."""
        return Denoiser(network, self.process, self.prediction, classes=self.classes, code=self.code)

    def pictures(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Pictures in [-1, 1] and labels for a network; hidden ones are the null label."""
        x0 = 2 * batch.inputs - 1 if self.doubled else batch.inputs
        if batch.labels is None or not self.classes:
            return x0, None
        return x0, torch.where(batch.labels == UNLABELLED, torch.full_like(batch.labels, self.classes), batch.labels)

    def draw(self, batch: Batch) -> dict[str, Tensor]:
        """Times, noise and labels for a batch, from torch's global generator; kept in `batch.extra`, so that all readers see the same."""
        if "noised_t" not in batch.extra:
            x0, labels = self.pictures(batch)
            if self.jitter:
                x0 = x0 + self.jitter * torch.randn_like(x0)
            if labels is not None and self.dropout:
                hidden = torch.rand(len(x0), device=x0.device) < self.dropout
                labels = torch.where(hidden, torch.full_like(labels, self.classes), labels)
            drawn = {"t": self.process.draw(len(x0), device=x0.device), "noise": torch.randn_like(x0), "x0": x0}
            batch.extra |= {f"noised_{name}": value for name, value in drawn.items()}
            if labels is not None:
                batch.extra["noised_label"] = labels
        return {name: batch.extra[f"noised_{name}"] for name in ("t", "noise", "x0", "label") if f"noised_{name}" in batch.extra}


class DenoisingReader:
    """Calls a denoising network with a noised batch and gives the signals that were asked for.

    "prediction" (or "logits", the same here) is the network's output beside its target. Module paths are read as by
    `limbeck.signals.Reader`; "stages" are the modules that the network names in `taps`.

    Args:
        model: a network called `net(x, level, label)`.
        wants: see above.
        noising: how a batch is noised.
        grad: keep the graph.
        stop_early: end the pass after the deepest tap when no prediction is wanted.
        anatomy: taken for the sake of one interface.

    Raises:
        UserError: an unknown signal, or a network that reads no noise level.
    """

    def __init__(
        self, model: nn.Module, wants: Iterable[str], noising: Noising, *, grad: bool = True, stop_early: bool = False, anatomy: Any = None
    ) -> None:
        wants = tuple(wants)
        if not getattr(model, "denoises", False) and not hasattr(model, "null_label"):
            raise UserError(f"{type(model).__name__} is no denoising network", "name denoising-mlp, unet, dit or diffusers:<class>")
        self.noising, self.denoiser = noising, noising.denoiser(model)
        self.stages = self.denoiser.taps() if "stages" in wants else ()
        predicts = {"logits", "prediction"} & set(wants)
        paths = [want for want in wants if want not in ("logits", "prediction", "stages", "output")]
        for name in ("attention", "embedding"):
            if name in paths:
                raise UserError(f"{name!r} cannot be read from a denoising network", "name module paths, or stages")
        outputs = ["output"] if predicts or "output" in wants else []
        self.paths = paths
        self.reader = Reader(model, [*outputs, *paths, *self.stages], grad=grad, stop_early=stop_early)
        self.predicts = bool(predicts)

    def __call__(self, batch: Batch) -> Signals:
        """One forward pass."""
        drawn = self.noising.draw(batch)
        t, x0, noise, label = drawn["t"], drawn["x0"], drawn["noise"], drawn.get("label")
        inputs = self.denoiser.inputs(self.noising.process.diffuse(x0, noise, t), t)
        said = self.reader((*inputs, label) if label is not None else inputs)
        values: dict[str, Any] = {}
        if self.predicts:
            target = self.noising.process.read(self.noising.prediction, x0, noise, t, self.denoiser.sigma_data)
            values["prediction"] = Prediction(said.output, target)
        if self.stages:
            values["stages"] = [said.at[path] for path in self.stages]
        return Signals(output=said.output, at={path: said.at[path] for path in self.paths}, **values)
