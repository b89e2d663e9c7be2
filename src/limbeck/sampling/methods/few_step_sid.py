"""Score identity distillation, of one or several steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.diffusion import Denoiser, Guidance
from limbeck.errors import UserError
from limbeck.losses import score_identity
from limbeck.method import Card, setting
from limbeck.sampling.few_step import Pair, frozen
from limbeck.sampling.score_matching import ScoreMatching


@dataclass
class FewStepSiD(ScoreMatching):
    """Minimise the Fisher divergence between generator and teacher through identities of their scores; no picture is needed.

    L = mean (X_T - X_F) ((X_T - x) - alpha (X_T - X_F)) / mean|x - X_T|, gradients through both networks and x. Of K steps a random one is
    trained at a time, so that the uniform mixture of all outputs is what is matched. `preset` sets guidance of both networks.
    """

    card = Card(
        id="few-step-sid",
        title="Few-Step Diffusion via Score identity Distillation",
        year=2025,
        wing="sampling",
        family="distribution",
        claim="State of the art on SDXL in one and few steps, without real images.",
        equation="L = (X_T - X_F) . ((X_T - x) - alpha (X_T - X_F)) / mean|x - X_T|",
        arxiv="2505.12674",
        baseline="dmd2",
        certainty="recalled",
        deviations=(
            "mean over pixels instead of a sum, so that learning rates carry over; it begins at the noise end unless method.start says "
            "otherwise (paper: 0.625 of the way, 2.5 for EDM networks); the values of zero-cfg and anti-cfg are recalled"
        ),
    )

    alpha: float = setting(1.0, "of the identity (paper: 1.0 for Stable Diffusion, 1.2 for EDM networks)", above=0)
    preset: str = setting(
        "plain",
        "guidance: none; long-short (all networks by generate.guidance); zero-cfg (the fake has no labels); anti-cfg (fake by -1)",
        choices=("plain", "long-short", "zero-cfg", "anti-cfg"),
    )

    def setup(self, pair: Pair) -> None:
        super().setup(pair)
        assert pair.teacher is not None
        if self.preset == "long-short" and not pair.teacher.guidance.acts:
            raise UserError("long-short guides all networks by generate.guidance, and that is 1", "set generate.guidance=2, for example")
        if self.preset in ("zero-cfg", "anti-cfg") and not pair.classes:
            raise UserError(f"{self.preset} needs networks with classes, and these have none", "set method.preset=plain")
        self._own = {"long-short": pair.teacher.guidance, "anti-cfg": Guidance(-1.0)}.get(self.preset, Guidance())
        self.teacher = pair.teacher if self.preset == "long-short" else pair.teacher.guided(1.0)

    def _fake(self) -> Denoiser:
        return self.fake.guided(self._own.scale, self._own.low, self._own.high)

    def told(self, labels: Tensor | None) -> Tensor | None:
        return torch.full_like(labels, self.pair.classes) if labels is not None and self.preset == "zero-cfg" else labels

    def generator_losses(self, x: Tensor, t: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        level = self.levels(len(x))
        state = self.teacher.process.diffuse(x, torch.randn_like(x), level)
        with frozen(self.fake.network):
            fake = self._fake().x0(state, level, self.told(labels))
        return {"identity": score_identity(x, self.teacher.x0(state, level, labels), fake, self.alpha)}

    def fake_losses(self, x: Tensor, labels: Tensor | None, batch: Batch) -> dict[str, Tensor]:
        if not self._own.acts:
            return super().fake_losses(x, labels, batch)
        level = self.levels(len(x), 0.0, 1.0)
        # the guided output is what must fit
        terms = {"fake": self._fake().denoising_loss(x, torch.randn_like(x), level, labels)}
        if self.gan > 0:  # the critic reads the network unguided, so it needs a pass of its own
            terms["critic"] = self.critic_term(self._logits(x, labels)[0], batch)
        return terms
