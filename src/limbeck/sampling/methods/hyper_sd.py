"""Hyper-SD: consistency inside segments of the path, fewer and fewer of them, then an adversarial and a reward term."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.diffusion import Denoiser
from limbeck.diffusion.samplers import ddim_step
from limbeck.engine.clock import Clock
from limbeck.engine.schedule import make_optimizer
from limbeck.errors import UserError
from limbeck.losses import critic_loss, fooling_loss
from limbeck.method import Card, setting
from limbeck.sampling.critics import Heads, widths_of
from limbeck.sampling.few_step import FewStep, Pair, frozen
from limbeck.sampling.generator import Generator
from limbeck.sampling.rewards import make_reward
from limbeck.sampling.trajectories import solver_step


@dataclass
class HyperSD(FewStep):
    """Trajectory segmented consistency: within one of k equal segments of time, jumps from two neighbouring points to a common end agree.

    L = |G(x_t, t -> e) - sg G_target(x_r, r -> e)|^2 with G(x, t -> e) = alpha_e x0(x, t) + sigma_e z(x, t), r one step of the teacher's
    solver below t, e drawn between the segment's lower end and r. k falls in stages; the adversarial term (hinge, heads on the frozen
    teacher's features, at the level e) grows as it falls, because regression blurs when segments are long.
    """

    card = Card(
        id="hyper-sd",
        title="Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis",
        year=2024,
        wing="sampling",
        family="trajectory",
        claim="State of the art from 1 to 8 steps for SDXL and SD1.5; +0.68 CLIP score over SDXL-Lightning in one step.",
        equation="L = |G(x_t, t->e) - sg G_ema(x_r, r->e)|^2 in segments k = 8, 4, 2, 1;  + adversarial + reward",
        arxiv="2404.13686",
        baseline="consistency",
        certainty="recalled",
        deviations=(
            "whole networks unless `rank` asks for adapters; score distillation for one step is a run of its own (student.train); "
            "rewards are "
            "given by name instead of the paper's preference models"
        ),
    )
    sampler = "jump"
    contract = {"grid_steps": 16}

    segments: tuple[int, ...] = setting((8, 4, 2, 1), "numbers of segments, one stage after the other (paper: 8, 4, 2, 1)", at_least=1)
    grid_steps: int = setting(64, "steps of the teacher's solver over the whole path", at_least=2)
    order: int = setting(1, "of that solver: 1 DDIM (paper), 2 Heun", choices=(1, 2))
    target: float = setting(0.95, "decay of the target network", at_least=0, at_most=0.9999)
    adversarial: float = setting(0.1, "weight of the adversarial term in the last stage; (1/k of it before); 0 for none", at_least=0)
    lr_critic: float = setting(1e-3, "learning rate of the heads", above=0)
    eta: float = setting(0.3, "randomness of the sampler's jumps (paper: 0.3; 0 jumps straight)", at_least=0, at_most=1)
    rank: int = setting(0, "of low-rank adapters on the student (paper: 64); 0 trains the whole network", at_least=0)
    reward: str = setting("", "what the last quarter of the steps also raises: ink, or python:module:function; nothing by default")
    reward_weight: float = setting(0.1, "of mean relu(margin - reward)", at_least=0)
    margin: float = setting(0.0, "of the reward: what is above it counts no more")

    def setup(self, pair: Pair) -> None:
        for k in self.segments:
            if self.grid_steps % k:
                raise UserError(
                    f"hyper-sd: {self.grid_steps} steps of the solver cannot be cut into {k} segments", "make grid_steps a multiple of each"
                )
        if self.rank:
            from limbeck.sampling.adapters import add_lora

            pair.student.network = add_lora(pair.student.network, self.rank)
        self.parts["target"] = copy.deepcopy(pair.student.network).requires_grad_(False)
        self._target = pair.student.with_network(self.parts["target"])
        self._grid = pair.student.process.times(self.grid_steps, "uniform", device=pair.device)
        assert pair.teacher is not None
        if self.adversarial:
            self.parts["heads"] = Heads(widths_of(pair.teacher, pair), pair.classes).to(pair.device)
        self._reward = make_reward(self.reward, pair) if self.reward else None

    def optimizers(self, pair: Pair) -> dict[str, torch.optim.Optimizer]:
        found = {"student": make_optimizer(pair.training, [p for p in pair.student.network.parameters() if p.requires_grad])}
        if self.adversarial:
            found["critic"] = make_optimizer(pair.training, self.parts["heads"].parameters(), lr=self.lr_critic)
        return found

    def turns(self, clock: Clock) -> Sequence[str]:
        return ("student", "critic") if self.adversarial else ("student",)

    def stage(self, clock: Clock) -> int:
        """How many segments there are now."""
        return self.segments[min(int(clock.progress * len(self.segments)), len(self.segments) - 1)]

    def jump(self, denoiser: Denoiser, x: Tensor, t: Tensor, end: Tensor, labels: Tensor | None) -> Tensor:
        """G(x, t -> e): along the straight line of the denoiser's own prediction."""
        return ddim_step(denoiser.process, *denoiser.parts(x, t, labels), end)

    def losses(self, turn: str, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        pair, x0 = self.pair, batch.inputs
        labels = batch.labels if pair.classes else None
        teacher, process, k = pair.teacher, pair.student.process, self.stage(clock)
        assert teacher is not None
        if turn == "critic":
            seen, aim, end, labels = self._jumped
            with torch.no_grad():
                real = teacher.features(aim, end, labels)[0]
            heads = self.parts["heads"]
            return {"critic": critic_loss(heads(real, labels), heads(seen, labels), "hinge")}
        # grid index 0 is noise, grid_steps is data: a segment of length `long` ends at its data side
        place = torch.randint(self.grid_steps, (len(x0),), device=x0.device)
        long = self.grid_steps // k
        last = (place // long + 1) * long
        t, r = self._grid[place], self._grid[place + 1]
        room = (last - place - 1).float()
        stop = place + 1 + (torch.rand(len(x0), device=x0.device) * (room + 1)).floor().clamp(max=room).long()
        end = self._grid[stop]
        x = process.diffuse(x0, torch.randn_like(x0), t)
        clean, noise = pair.student.parts(x, t, labels)
        self.show(clean, labels)
        made = ddim_step(process, clean, noise, end)
        with torch.no_grad():
            near = solver_step(teacher, x, t, r, labels, self.order)
            aim = torch.where((stop == place + 1).reshape(-1, *(1,) * (x.ndim - 1)), near, self.jump(self._target, near, r, end, labels))
        terms = {"segments": F.mse_loss(made, aim)}
        if self.adversarial:
            with frozen(self.parts["heads"]):
                seen = teacher.features(made, end, labels)[0]
                terms["adversarial"] = self.adversarial / k * fooling_loss(self.parts["heads"](seen, labels), "hinge")
            # the critic's turn looks at the same pictures: the teacher's features of them are computed once a step
            self._jumped = ([feature.detach() for feature in seen], aim, end, labels)
        if self._reward is not None and clock.progress > 0.75:
            terms["reward"] = self.reward_weight * F.relu(self.margin - self._reward(self._late(len(x0)))).mean()
        return terms

    def _late(self, count: int) -> Tensor:
        """Samples of which only the last of the student's steps carries a gradient (ReFL, Xu et al. 2023, arXiv:2304.05977)."""
        pair = self.pair
        times = pair.student.process.times(4, "uniform", device=pair.device)
        labels = pair.labels(count)
        walked = int(torch.randint(4, (1,)))
        x = pair.student.process.scale(times[:1]) * pair.noise(count)
        with torch.no_grad():
            for number in range(walked):
                x = self.jump(pair.student, x, times[number].expand(count), times[number + 1].expand(count), labels)
        return pair.student.x0(x, times[walked].expand(count), labels)

    def after_step(self, clock: Clock) -> None:
        with torch.no_grad():
            for own, new in zip(self.parts["target"].parameters(), self.pair.student.network.parameters()):
                own.lerp_(new, 1 - self.target)

    def sampling(self) -> dict[str, Any]:
        return {"eta": self.eta}

    def finish(self, student: Denoiser) -> Generator:
        if self.rank:
            from limbeck.sampling.adapters import merge_lora

            student = student.with_network(merge_lora(student.network))
        return super().finish(student)

    def figures(self, generator: Generator) -> dict[str, float]:
        return {"endpoint_error": self.endpoint_error(generator, max(self.pair.spec.steps))}
