"""AGD: guidance folded into small adapters, so that one pass does what two did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.diffusion import Denoiser
from limbeck.diffusion.samplers import ddim_step
from limbeck.engine.clock import Clock
from limbeck.engine.schedule import make_optimizer
from limbeck.errors import UserError
from limbeck.method import Card, setting
from limbeck.sampling.few_step import FewStep, Pair
from limbeck.sampling.generator import Generator
from limbeck.sampling.trajectories import guidance_error
from limbeck.zoo.guided import Guided


@dataclass
class AGD(FewStep):
    """The network stays frozen; adapters on its stages, told scale, level and label, make its conditional pass give the guided prediction.

    L = mean |f_adapted(x, t, c, w) - (f(none) + w (f(c) - f(none)))|^2 on states that guided sampling visits, w ~ U(1, w_max) for each
    path. The generator acts at the recipe's `generate.guidance`.
    """

    card = Card(
        id="agd",
        title="Efficient Distillation of Classifier-Free Guidance using Adapters",
        year=2025,
        wing="sampling",
        family="trajectory",
        claim="Guided quality with half the network calls; about 2 % new parameters, the base untouched.",
        equation="L = |f_a(x,t,c,w) - (f(0) + w (f(c) - f(0)))|^2 on guided trajectories",
        arxiv="2503.07274",
        baseline="fewer-steps",
        deviations=(
            "short DDIM trajectories, kept in memory; adapters on whole stages where a network has no attention; scale and level are "
            "embedded as they are, not times 1000"
        ),
    )
    needs_classes = True
    sampler = "ddim"
    contract = {"paths": 16, "path_steps": 4, "hidden": 8}

    hidden: int = setting(64, "width of the adapters (paper: 256 for DiT-XL)", at_least=1)
    form: str = setting(
        "additive", "of the adapters (paper: additive for DiT, attention for Stable Diffusion)", choices=("additive", "attention")
    )
    w_max: float = setting(0.0, "greatest scale that is learned (paper: 6 for DiT, 12 for SD); 0 for the recipe's guidance", at_least=0)
    states: str = setting("paths", "where it learns: on guided paths (paper), or on noised pictures", choices=("paths", "noised"))
    paths: int = setting(1024, "guided paths that are stored", at_least=1)
    path_steps: int = setting(16, "steps of each (paper: 1000)", at_least=1)
    whole: bool = setting(False, "train the whole network instead of adapters (the costly alternative)")

    def needs_pictures(self) -> bool:
        return self.states == "noised"

    def setup(self, pair: Pair) -> None:
        assert pair.teacher is not None
        scale = pair.teacher.guidance.scale
        if not pair.teacher.guidance.acts:
            raise UserError(
                "agd folds guidance into a network, and generate.guidance asks for none", "set generate.guidance above 1, such as 3"
            )
        self._most = self.w_max or float(scale)
        self._low, self._high = pair.teacher.guidance.low, pair.teacher.guidance.high
        if self._most < float(scale):
            raise UserError(f"agd: w_max {self._most:g} is below the scale {float(scale):g} that the generator is to act by", "raise w_max")
        guided = Guided(pair.pictures.shape, pair.classes, pair.student.network.cpu(), None, self.hidden, self.form, float(scale))
        if self.whole:
            guided.inner.requires_grad_(True)
        pair.student.network = guided.to(pair.device)
        if self.states == "paths":
            self._store(pair)

    def _store(self, pair: Pair) -> None:
        """Guided paths with a scale each: states, times, labels, and the guided output in the network's own terms."""
        assert pair.teacher is not None
        process = pair.teacher.process
        times = process.times(self.path_steps, pair.spec.grid, device=pair.device)
        kept: list[list[Tensor]] = [[], [], [], [], []]
        rng = torch.Generator().manual_seed(pair.seed + 78)
        for first in range(0, self.paths, 512):
            count = min(512, self.paths - first)
            scale = (1 + (self._most - 1) * torch.rand(count, generator=rng)).to(pair.device)
            labels = torch.randint(pair.classes, (count,), generator=rng).to(pair.device)
            x = torch.randn(count, *pair.pictures.shape, generator=rng).to(pair.device) * process.scale(times[:1])
            guided = pair.teacher.guided(scale, self._low, self._high)
            with torch.no_grad():
                for number in range(self.path_steps):
                    t = times[number].expand(count)
                    value = guided.raw(x, t, labels)
                    for place, item in zip(kept, (x, t, labels, scale, value)):
                        place.append(item)
                    x = ddim_step(
                        process, *process.parts(guided.prediction, value, x, t, guided.sigma_data), times[number + 1].expand(count)
                    )
        self._kept = [torch.cat(place) for place in kept]

    def optimizers(self, pair: Pair) -> dict[str, torch.optim.Optimizer]:
        network = pair.student.network
        assert isinstance(network, Guided)
        return {"student": make_optimizer(pair.training, [p for p in network.parameters() if p.requires_grad])}

    def losses(self, turn: str, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        pair = self.pair
        network, teacher = pair.student.network, pair.teacher
        assert isinstance(network, Guided) and teacher is not None
        if self.states == "paths":
            pick = torch.randint(len(self._kept[0]), (self.batch_size,)).to(pair.device)
            x, t, labels, scale, aim = (item[pick] for item in self._kept)
        else:
            x0, labels = batch.inputs, batch.labels
            assert labels is not None
            t = teacher.process.draw(len(x0), device=pair.device)
            scale = 1 + (self._most - 1) * torch.rand(len(x0), device=pair.device)
            x = teacher.process.diffuse(x0, torch.randn_like(x0), t)
            with torch.no_grad():
                aim = teacher.guided(scale, self._low, self._high).raw(x, t, labels)
        network.told = scale
        try:
            made = pair.student.raw(x, t, labels)
        finally:
            network.told = None
        return {"guidance": (made - aim).square().mean()}

    def finish(self, student: Denoiser) -> Generator:
        generator = super().finish(student)
        generator.options["grid"] = self.pair.spec.grid
        return generator

    def figures(self, generator: Generator) -> dict[str, float]:
        """`guidance_error`: root mean squared distance of its samples from the guided teacher's by the same sampler, from the same noise;
        `adapter_share`: new parameters over those of the network inside."""
        pair, steps = self.pair, max(self.pair.spec.steps)
        assert pair.teacher is not None
        network = generator.denoiser.network
        assert isinstance(network, Guided)
        inside = sum(p.numel() for p in network.inner.parameters())
        new = sum(p.numel() for p in network.parameters()) - inside
        return {"guidance_error": guidance_error(pair, generator, steps), "adapter_share": new / inside}
