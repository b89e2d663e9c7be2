"""How good optimised pictures are: against held-out pictures of the same class, in the features of one classifier, and by themselves."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from limbeck.data.pictures import Pictures
from limbeck.diffusion import Denoiser, sample
from limbeck.errors import UserError
from limbeck.evaluation.generation import density_coverage
from limbeck.evaluation.particles import pairwise_distance, saturation
from limbeck.features import Features
from limbeck.vector import Drawing, jaggedness, self_intersections

MOST = 5000
"""Held-out pictures that are looked at."""

NEIGHBOUR = 5
"""Of density and coverage (Naeem et al. 2020: 5)."""


@dataclass
class Measured:
    """What was found out about one set of pictures.

    Attributes:
        key: role in tables. name: what people call it.
        figures: by name. pictures: `(N, C, H, W)` in [-1, 1]; labels: `(N,)` the class asked for, or None.
    """

    key: str
    name: str
    figures: dict[str, float]
    pictures: Tensor = field(repr=False)
    labels: Tensor | None = field(default=None, repr=False)


class PictureJudge:
    """Measures pictures against held-out ones of the classes that were asked for.

    Args:
        pictures: the data. features: the classifier. labels: `(V,)` classes of the variants, as in `PictureProblem`.
        samples: pictures of each measurement. seed: of what is random in it. final: "test" or "valid".

    Raises:
        UserError: no held-out pictures of these classes.
    """

    def __init__(self, pictures: Pictures, features: Features, labels: Tensor | None, samples: int, seed: int, final: str = "test") -> None:
        data = pictures.data
        held = data.valid if final == "valid" else data.test
        if held is None:
            raise UserError(f"evaluation.final is {final}, and {data.name} has no such split", "set data.valid, or evaluation.final=test")
        self.pictures, self.features, self.samples, self.seed = pictures, features, samples, seed
        self.labels = labels = None if labels is None else labels.cpu()
        parts = list(pictures.whole(held, MOST))
        real = torch.cat([x.cpu() for x, _ in parts])
        if labels is not None and bool((labels < pictures.classes).all()):
            of = torch.cat([y for _, y in parts]).cpu()
            own = torch.isin(of, labels.unique())
            real, self.real_labels = real[own], of[own]
        else:
            self.real_labels = None
        if len(real) <= NEIGHBOUR:
            raise UserError(
                f"{len(real)} held-out pictures are of the class asked for, and {NEIGHBOUR + 1} are needed to measure coverage",
                "hold out more with data.test, or ask for another class with scene.label",
            )
        self.real, self.held = real, features(real)[0]

    def _figures(self, x: Tensor, labels: Tensor | None) -> dict[str, float]:
        shown = x.clamp(-1, 1)
        found, said = self.features(shown)
        figures = density_coverage(self.held, found, NEIGHBOUR)
        if labels is not None and bool((labels < self.pictures.classes).all()):
            figures = {"class_accuracy": float((said == labels.cpu()).double().mean()), **figures}
        share = torch.bincount(said, minlength=max(self.pictures.classes, 1)).double() / len(said)
        figures["modes"] = float((share > 0).sum())
        figures["mode_entropy"] = float(-(share[share > 0] * share[share > 0].log()).sum())
        if len(x) > 1:
            figures["diversity"] = pairwise_distance(shown)
        figures["saturation"] = saturation(x)
        figures["contrast"] = float(shown.double().std())
        return figures

    @torch.no_grad()
    def draw(self, student: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Pictures of a student and the classes they were asked to be of: each variant once, or as often as `samples` asks where
        renderings are random."""
        variants, device = int(student.variants), next(student.parameters()).device
        again = 1 if not getattr(student, "latent", 0) or isinstance(student, Drawing) else -(-self.samples // variants)
        pick = torch.arange(variants, device=device).repeat(again)
        if again > 1:
            rng = torch.Generator().manual_seed(self.seed)
            x = student.render(pick, torch.randn(len(pick), student.latent, generator=rng).to(device))
        else:
            x = student.render(pick)
        return x.cpu(), None if self.labels is None else self.labels[pick.cpu()]

    def measure(self, student: nn.Module, key: str, name: str) -> Measured:
        """Everything about a student."""
        student.eval()
        x, labels = self.draw(student)
        figures = self._figures(x, labels)
        if isinstance(student, Drawing):
            figures |= path_figures(student)
        return Measured(key, name, figures, x.clamp(-1, 1), labels)

    def glance(self, student: nn.Module) -> dict[str, float]:
        """What is watched while a student is optimised."""
        found = self.measure(student.eval(), "", "").figures
        return {name: found[name] for name in ("class_accuracy", "coverage", "diversity", "saturation") if name in found}

    def floor(self) -> Measured:
        """Real pictures of the training part, as many as are measured of a student, and of the same classes."""
        count, rng = self.samples, torch.Generator().manual_seed(self.seed)
        parts = list(self.pictures.whole(self.pictures.data.train, MOST))
        x = torch.cat([part.cpu() for part, _ in parts])
        labels = None
        if self.real_labels is not None:
            of = torch.cat([y for _, y in parts]).cpu()
            own = torch.isin(of, self.real_labels.unique())
            x, labels = x[own], of[own]
        order = torch.randperm(len(x), generator=rng)[:count]
        x, labels = x[order], None if labels is None else labels[order]
        return Measured("floor", "real pictures", self._figures(x, labels), x, labels)

    @torch.no_grad()
    def prior(self, teacher: Denoiser, steps: int = 32) -> Measured:
        """What the score model draws by itself, unguided, in `steps` Heun steps."""
        rng = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(self.samples, *self.pictures.shape, generator=rng).to(self.features.device)
        labels = None
        if self.labels is not None and teacher.classes:
            labels = self.labels[torch.arange(self.samples) % len(self.labels)].to(noise.device)
        x = sample(teacher, noise, labels, steps=steps, sampler="heun").cpu()
        own = None if labels is None else labels.cpu()
        return Measured("teacher", f"the score model, {steps} Heun steps", self._figures(x, own), x.clamp(-1, 1), own)


@torch.no_grad()
def path_figures(drawing: Drawing) -> dict[str, float]:
    """How clean the paths of drawings are: share of kept paths that cross themselves, mean excess turning in radians, kept paths."""
    chains = drawing.chains()[drawing.kept.bool()].cpu()
    return {
        "self_intersections": float((self_intersections(chains) > 0).double().mean()),
        "jaggedness": float(jaggedness(chains).mean()),
        "paths": float(drawing.kept.sum(1).mean()),
    }
