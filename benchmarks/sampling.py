"""The few-step sampler: latency against the bound of network calls, and what limbeck's training step costs over plain loops.

    python benchmarks/sampling.py [--quick]

Latency: a class-conditional U-Net of about 4 million parameters at 32 x 32, batches of 16. Teacher: 50 Heun steps with guidance (198
network evaluations a picture); student: the same network in 1, 2 and 4 steps. The bound is the time of one forward pass, measured alone
in the same run, times the calls; quality is no matter here (weights are random) and is measured by `limbeck evidence`.

Steps: consistency, distribution matching (DMD2 without and with its critic) at 16 x 16, batch 32, against loops written by hand with the
same networks and the same random numbers. Checked first: equal weights of the student after two steps. `unavoidable`: DMD2's step over
the sum of its forward and backward passes, each timed alone. The engine's measurement of single terms, made every fifty steps or
more, is off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import flops, middle, parser, quantile, row, say, spent
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck import schema
from limbeck.data import open_data
from limbeck.diffusion import Denoiser, Flow
from limbeck.engine.loop import Loop, Plan
from limbeck.sampling.few_step import Pair
from limbeck.sampling.generator import Generator
from limbeck.sampling.methods.consistency import Consistency
from limbeck.sampling.methods.dmd2 import DMD2
from limbeck.sampling.pictures import Pictures
from limbeck.sampling.program import SamplingProgram
from limbeck.zoo import build, parameters

CLASSES = 10
TARGETS = {"share_of_bound": 0.9, "consistency": 1.03, "matching": 1.03, "adversarial": 1.03, "unavoidable": 1.15}


def network(size: int, width: int, channels: int = 3, **more: Any) -> nn.Module:
    """A U-Net with random weights, its zero layers filled, so that no pass is trivial."""
    torch.manual_seed(0)
    made = build("unet", input_shape=(channels, size, size), classes=CLASSES, width=width, **more)
    for parameter in made.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return made


# ---- latency ----


def latency(size: int, width: int, rounds: int, steps: int, **more: Any) -> dict[str, Any]:
    """Milliseconds of a batch of 16, calls, and shares of the bound."""
    net = network(size, width, **more).eval()
    teacher = Denoiser(net, Flow(), classes=CLASSES).guided(2.0)
    student = teacher.with_network(net)
    shape = (3, size, size)
    noise, labels = torch.randn(16, *shape), torch.arange(16) % CLASSES
    arms: dict[str, tuple[Generator, int]] = {f"student@{n}": (Generator(student, shape), n) for n in (1, 2, 4)}
    arms[f"teacher@{steps}"] = (Generator(teacher, shape, sampler="heun"), steps)

    def one(batch: int) -> Callable[[], Any]:
        x, t = torch.randn(batch, *shape), torch.full((batch,), 0.5)
        y = torch.arange(batch) % CLASSES

        def forward() -> Tensor:
            with torch.no_grad():
                return net(x, t, y)

        return forward

    # the bound is measured right before what it bounds, because a shared machine is not the same from one minute to the next
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    one(16)(), one(32)()
    for number in range(rounds):
        for name, (generator, count) in sorted(arms.items(), reverse=number % 2 > 0):
            if name.startswith("teacher") and number:
                continue  # it takes as long as everything else together, and is so long that one round says enough
            guided = generator.denoiser.guidance.acts
            alone = spent(one(32 if guided else 16))
            taken[name].append((alone, spent(partial(generator.from_noise, noise, labels, count))))
    found: dict[str, Any] = {"parameters": parameters(net)}
    for name, (generator, count) in arms.items():
        calls = generator.calls(count)
        passes = calls // 2 if generator.denoiser.guidance.acts else calls
        shares = [passes * alone / took for alone, took in taken[name]]
        found[name] = {
            "calls": calls,
            "ms": round(1000 * middle([took for _, took in taken[name]]), 1),
            "forward_ms": round(1000 * middle([alone for alone, _ in taken[name]]), 1),
            "share_of_bound": round(middle(shares), 3),
            "iqr": [round(quantile(shares, share), 3) for share in (0.25, 0.75)],
        }
    found["forward_gflop"] = round(flops(one(16)) / 1e9, 1)
    found["student@1_over_teacher"] = round(found[f"teacher@{steps}"]["ms"] / found["student@1"]["ms"], 1)
    return found


# ---- steps ----


def pose(size: int, width: int, batch: int, total: int) -> Pair:
    """A teacher and a student on random pictures."""
    torch.manual_seed(0)
    x, y = torch.rand(200, 3, size, size), torch.arange(200) % CLASSES
    data = open_data({"train": (x, y), "test": (x[:20], y[:20])})
    net = network(size, width).requires_grad_(False)
    teacher = Denoiser(net.eval(), Flow(), classes=CLASSES)
    student = teacher.with_network(copy.deepcopy(net).train().requires_grad_(True))
    training = schema.Training(steps=total, batch=batch, optimizer="adam", lr=1e-4, weight_decay=0, schedule="constant", warmup=0)
    return Pair(teacher, student, Pictures(data), schema.Generate(), training, total, torch.device("cpu"))


def adam(net: nn.Module, lr: float = 1e-4) -> torch.optim.Optimizer:
    """As the recipes make it."""
    return torch.optim.Adam(net.parameters(), lr=lr)


def frozen(net: nn.Module, free: bool) -> None:
    """Toggle gradients."""
    for parameter in net.parameters():
        parameter.requires_grad_(free)


def col(t: Tensor) -> Tensor:
    """For broadcasting."""
    return t[:, None, None, None]


def consistency_by_hand(pair: Pair, steps: int) -> None:
    """The plain loop of consistency distillation with a DDIM solver."""
    net, teacher, batch = pair.student.network, pair.teacher.network, pair.training.batch  # type: ignore[union-attr]
    target = copy.deepcopy(net).requires_grad_(False)
    optimizer = adam(net)
    grid = torch.linspace(1, 0, 19)
    batches = pair.pictures.batches(batch, 0)
    for step in range(steps):
        one = batches.batch_at(*divmod(step, batches.steps_per_epoch))
        x0, y = 2 * one.inputs - 1, one.labels
        place = torch.randint(18, (batch,))
        t, s = grid[place], grid[place + 1]
        x = (1 - col(t)) * x0 + col(t) * torch.randn_like(x0)
        made = x - col(t) * net(x, t, y)
        with torch.no_grad():
            near = x + col(s - t) * teacher(x, t, y)
            aim = near - col(s) * target(near, s, y)
        loss = F.mse_loss(made, aim)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for own, new in zip(target.parameters(), net.parameters()):
                own.lerp_(new, 0.05)


def dmd_by_hand(pair: Pair, steps: int, heads: nn.Module | None = None) -> None:
    """The plain loop of DMD2, one update of each side in turn; with `heads` also its diffusion GAN."""
    net, teacher, batch = pair.student.network, pair.teacher.network, pair.training.batch  # type: ignore[union-attr]
    fake = copy.deepcopy(teacher).requires_grad_(True)
    own = adam(net)
    other = torch.optim.Adam([*fake.parameters(), *(heads.parameters() if heads is not None else ())], lr=3e-4)
    found: dict[str, Tensor] = {}
    if heads is not None:
        fake.get_submodule(fake.middle).register_forward_hook(lambda m, a, out: found.__setitem__("f", out))
    batches = pair.pictures.batches(batch, 0)
    ones = torch.ones(batch)

    def noised(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        level, noise = torch.rand(len(x)), torch.randn_like(x)
        return fake((1 - col(level)) * x + col(level) * noise, level, y), noise, level

    for step in range(steps):
        one = batches.batch_at(*divmod(step, batches.steps_per_epoch)) if heads is not None else None
        y = torch.randint(CLASSES, (batch,))
        z = torch.randn(batch, 3, *pair.pictures.shape[1:])
        x = z - net(z, ones, y)
        with torch.no_grad():
            level = 0.02 + 0.96 * torch.rand(batch)
            state = (1 - col(level)) * x + col(level) * torch.randn_like(x)
            real, guess = (state - col(level) * f(state, level, y) for f in (teacher, fake))
            direction = (guess - real) / (x - real).abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-6)
        loss = 0.5 * F.mse_loss(x, (x - direction).detach())
        if heads is not None:
            frozen(fake, False)
            frozen(heads, False)
            noised(x, y)
            loss = loss + 0.003 * F.softplus(-heads([found["f"]], y)).mean()
            frozen(fake, True)
            frozen(heads, True)
        own.zero_grad()
        loss.backward()
        own.step()
        x = x.detach()
        said, noise, _ = noised(x, y)
        loss = F.mse_loss(said, noise - x)
        if heads is not None:
            assert one is not None
            logits = heads([found["f"]], y)
            noised(2 * one.inputs - 1, one.labels)
            loss = loss + 0.01 * (F.softplus(logits).mean() + F.softplus(-heads([found["f"]], one.labels)).mean())
        other.zero_grad()
        loss.backward()
        other.step()


def ours(pair: Pair, method: Any, steps: int) -> Callable[[], Any]:
    """A ready loop of limbeck's engine."""
    program = SamplingProgram(method, pair)
    loop = Loop(program, Plan(pair.training, steps, watch=0))

    def act() -> Any:
        torch.manual_seed(5)
        return loop.run()

    return act


def by_hand(act: Callable[..., None], *given: Any) -> Callable[[], Any]:
    """The same beginning for a plain loop."""

    def run() -> None:
        torch.manual_seed(5)
        act(*given)

    return run


def arms(size: int, width: int, batch: int, steps: int) -> dict[str, tuple[Callable[[], tuple[Pair, Callable[[], Any]]], ...]]:
    """For each kind of step: makers of limbeck's arm and of the plain loop."""

    def made(method: Callable[[], Any]) -> Callable[[], tuple[Pair, Callable[[], Any]]]:
        def make() -> tuple[Pair, Callable[[], Any]]:
            pair = pose(size, width, batch, steps)
            torch.manual_seed(4)
            return pair, ours(pair, method(), steps)

        return make

    def plain(act: Callable[..., None], heads: bool = False) -> Callable[[], tuple[Pair, Callable[[], Any]]]:
        def make() -> tuple[Pair, Callable[[], Any]]:
            pair = pose(size, width, batch, steps)
            given: list[Any] = [pair, steps]
            if heads:  # the very heads that the method makes, with the same first weights
                torch.manual_seed(4)
                method = DMD2(ratio=1)
                method.bind(pair)
                method.setup(pair)
                given.append(method.parts["heads"])
            return pair, by_hand(act, *given)

        return make

    return {
        "consistency": (made(lambda: Consistency(order=1, distance="mse")), plain(consistency_by_hand)),
        "matching": (made(lambda: DMD2(ratio=1, gan=0.0)), plain(dmd_by_hand)),
        "adversarial": (made(lambda: DMD2(ratio=1)), plain(dmd_by_hand, True)),
    }


def check(size: int, width: int, batch: int) -> None:
    """Equal weights after two steps from equal random numbers."""
    for name, makers in arms(size, width, batch, 2).items():
        ends = []
        for maker in makers:
            pair, act = maker()
            act()
            ends.append(torch.cat([p.detach().flatten() for p in pair.student.network.parameters()]))
        moved = (ends[0] - torch.cat([p.flatten() for p in pair.teacher.network.parameters()])).abs().max()  # type: ignore[union-attr]
        gap = (ends[0] - ends[1]).abs().max()
        assert gap < 0.02 * moved, f"{name}: the arms differ by {gap:.2g} after a move of {moved:.2g}"


def unavoidable(pair: Pair) -> Callable[[], None]:
    """The passes of a DMD2 step without critic, each as it must be, and nothing else."""
    net, teacher, batch = pair.student.network, pair.teacher.network, pair.training.batch  # type: ignore[union-attr]
    fake = copy.deepcopy(teacher).requires_grad_(True)
    x, t, y = torch.randn(batch, *pair.pictures.shape), torch.rand(batch), torch.zeros(batch, dtype=torch.long)

    def act() -> None:
        net(x, t, y).mean().backward()
        with torch.no_grad():
            teacher(x, t, y)
            fake(x, t, y)
        fake(x, t, y).mean().backward()

    return act


def steps_cost(size: int, width: int, batch: int, steps: int, rounds: int) -> dict[str, Any]:
    """Ratios of limbeck's steps over the plain loops."""
    found: dict[str, Any] = {}
    for name, makers in arms(size, width, batch, steps).items():
        times: list[list[float]] = [[], []]
        for number in range(rounds):
            for side in (0, 1) if number % 2 else (1, 0):
                times[side].append(spent(makers[side]()[1]))
        pairs = [a / b for a, b in zip(*times)]
        spread = [round(quantile(pairs, share), 3) for share in (0.25, 0.75)]
        found[name] = {"ratio": round(middle(pairs), 3), "iqr": spread, "seconds_a_step": round(middle(times[0]) / steps, 3)}
    ratios = []
    for _ in range(rounds):
        _, act = arms(size, width, batch, steps)["matching"][0]()
        bare = unavoidable(pose(size, width, batch, steps))
        alone = sum(spent(bare) for _ in range(steps))
        ratios.append(spent(act) / alone)
    spread = [round(quantile(ratios, share), 3) for share in (0.25, 0.75)]
    found["unavoidable"] = {"ratio": round(middle(ratios), 3), "iqr": spread}
    return found


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of the table."""
    quick, rows = found["latency"], []
    many = next(name for name in quick if name.startswith("teacher@"))
    for name in ("student@1", "student@2", "student@4", many):
        got = quick[name]
        text = f"{got['calls']} calls; one forward pass of 16 pictures (guided: 32) {got['forward_ms']} ms, {quick['forward_gflop']} Gflop"
        title = f"latency of the {name}, {got['ms']} ms a batch of 16: share of the bound that {got['calls']} calls set"
        target = TARGETS["share_of_bound"] if name != many else None
        rows.append(row(title, got["share_of_bound"], target, higher=True, floor=text, iqr=got["iqr"]))
    title = f"one call instead of {quick[many]['calls']}: times as fast"
    text = f"{quick[many]['calls']}: as many as calls are saved, a guided one counted as two"
    rows.append(row(title, quick["student@1_over_teacher"], None, higher=True, floor=text))
    names = {
        "consistency": "step of consistency distillation over a hand-written loop",
        "matching": "step of DMD2 without critic over a hand-written loop",
        "adversarial": "step of DMD2 with its diffusion GAN over a hand-written loop",
        "unavoidable": "step of DMD2 over the sum of its unavoidable passes",
    }
    return rows + [row(text, found[name]["ratio"], TARGETS[name], floor="1.0", iqr=found[name]["iqr"]) for name, text in names.items()]


def main() -> None:
    """Print one line of JSON."""
    given = parser(__doc__).parse_args()
    check(8, 8, 4)
    if given.quick:
        found = {"latency": latency(8, 8, 1, 2), **steps_cost(8, 8, 4, 2, 1)}
    else:
        wide = {"multipliers": (1, 2, 2), "blocks": 2, "attention": (False, False, True)}
        found = {"latency": latency(32, 64, 5, 50, **wide), **steps_cost(16, 32, 32, 6, 11)}
    say("sampling", given.quick, rows_of(found), targets=TARGETS, **found)


if __name__ == "__main__":
    main()
