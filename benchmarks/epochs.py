"""Whole epochs with their data loading: limbeck against loops in the style of two libraries, written here from their descriptions.

    python benchmarks/epochs.py [--quick]

Data: random 8-bit pictures of CIFAR-100's shape in memory; a pair of two-layer networks and a pair of ResNets of depth 8; the loss of
kd. Setting up (networks, optimiser, dry passes) is outside the times, and the engine's measurement of single terms is off: the loops have
none (`step_overhead.py` says what it costs). The peers' habits: a `DataLoader` that makes a tensor of each picture; "meters" reads the
loss with `.item()` every step (torchdistill's examples), "topk" also measures top-1 and top-5 accuracy every step (mdistiller's trainer).
These arms are our own code in that style, not those libraries; `throughput.py` has torchdistill itself. mdistiller cannot be installed:
it is on no package index.

Targets: 1.2 where loading is a good part of the time (two layers); 1.0 where the networks are nearly all of it (resnet8), so that no loop
can gain much. Floor: the networks' operations at the rate of a matrix product.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import CLASSES, SHAPE, TASK, floor_ms, flops, in_turn, middle, over, parser, resnets, row, say
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from limbeck.data.data import Data
from limbeck.data.split import TensorSplit
from limbeck.engine.loop import Loop, Plan
from limbeck.knowledge.methods.kd import KD
from limbeck.knowledge.program import KnowledgeProgram
from limbeck.knowledge.teachers import FrozenTeacher
from limbeck.recipe import Training

TARGETS, BATCH = {"two_layers": 1.2, "resnet8": 1.0}, 64
SETTINGS = Training(epochs=1, batch=BATCH, optimizer="sgd", lr=0.01, nesterov=False, schedule="constant", warmup=0)


class Pictures(Dataset[tuple[Tensor, int]]):
    """One picture at a time, made a float tensor as a picture data set does."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels.tolist()

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self.inputs[number].float().div_(255), self.labels[number]


class Mean:
    """A running mean of numbers."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, value: float, count: int) -> None:
        """Take in the mean of `count` values."""
        self.total, self.count = self.total + value * count, self.count + count


def loss_of(logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
    """The loss of kd at T = 4, alpha = 0.9."""
    soft = F.kl_div(F.log_softmax(logits / 4, 1), F.log_softmax(target / 4, 1), log_target=True, reduction="batchmean")
    return 0.9 * 16 * soft + 0.1 * F.cross_entropy(logits, labels)


def loop(teacher: nn.Module, student: nn.Module, pictures: Pictures, topk: bool) -> float:
    """One epoch in the peers' style; the mean loss."""
    teacher.eval().requires_grad_(False)
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    losses, first, fifth = Mean(), Mean(), Mean()
    for inputs, labels in DataLoader(pictures, BATCH, shuffle=True, drop_last=True):
        with torch.no_grad():
            target = teacher(inputs)
        logits = student(inputs)
        loss = loss_of(logits, target, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.add(loss.item(), len(labels))
        if topk:
            hits = logits.detach().topk(5, 1).indices == labels.unsqueeze(1)
            first.add(hits[:, 0].float().mean().item(), len(labels))
            fifth.add(hits.any(1).float().mean().item(), len(labels))
    return losses.total / losses.count


def measure(pair: str, rounds: int, samples: int) -> dict[str, Any]:
    """Equal loss on a batch first, then epochs in turn."""
    if pair == "resnet8":
        teacher, student = resnets(8, 8, 1)
    else:
        torch.manual_seed(0)
        wide = [nn.Sequential(nn.Flatten(), nn.Linear(3072, w), nn.ReLU(), nn.Linear(w, CLASSES)) for w in (64, 16)]
        teacher, student = wide
    inputs, labels = torch.randint(256, (samples, *SHAPE), dtype=torch.uint8), torch.randint(CLASSES, (samples,))
    split, pictures = TensorSplit(inputs, labels), Pictures(inputs, labels)
    data = Data("random", split, split, input_shape=SHAPE, classes=TASK.classes)

    def program() -> KnowledgeProgram:
        frozen = FrozenTeacher(copy.deepcopy(teacher))
        return KnowledgeProgram(KD(temperature=4.0, alpha=0.9), copy.deepcopy(student), frozen, data, TASK, SETTINGS)

    made = program()
    made.train()
    batch = next(made.batches(0, 0))
    terms = made.losses("student", batch, Loop(made, Plan(SETTINGS, 1)).clock)
    plain = copy.deepcopy(student).train()
    with torch.no_grad():
        target = copy.deepcopy(teacher).eval()(batch.inputs)
    torch.testing.assert_close(sum(terms.values()), loss_of(plain(batch.inputs), target, batch.labels), rtol=1e-6, atol=0)

    def ours() -> Callable[[], object]:
        fresh = program()
        return Loop(fresh, Plan(SETTINGS, fresh.total, watch=0)).run

    arms: dict[str, Callable[[], Callable[[], object]]] = {
        "limbeck": ours,
        "meters": lambda: partial(loop, copy.deepcopy(teacher), copy.deepcopy(student), pictures, False),
        "topk": lambda: partial(loop, copy.deepcopy(teacher), copy.deepcopy(student), pictures, True),
    }
    times = in_turn(arms, rounds, warm=rounds > 1)
    result: dict[str, Any] = {name: {"images_per_second": round(samples / middle([one[0] for one in times[name]]), 1)} for name in times}
    for name in ("meters", "topk"):
        result["speedup_over_" + name] = over(times, name, "limbeck")
    net, other = copy.deepcopy(student), copy.deepcopy(teacher)

    def least() -> None:
        with torch.no_grad():
            other(batch.inputs)
        F.cross_entropy(net(batch.inputs), batch.labels).backward()

    result["floor"] = floor_ms(flops(least) * samples / BATCH)
    return result | {"rounds": rounds, "samples": samples}


def main() -> None:
    """Print one line of JSON."""
    given = parser(__doc__).parse_args()
    sizes = {"two_layers": (1, 128) if given.quick else (15, 4096), "resnet8": (1, 128) if given.quick else (31, 512)}
    cases = {pair: measure(pair, *size) for pair, size in sizes.items()}
    rows = []
    for pair, found in cases.items():
        limit, own = found["floor"], found["limbeck"]["images_per_second"]
        text = f"{limit['gflop']:.0f} Gflop an epoch: {1e3 * found['samples'] / limit['ms']:.0f} images/s at the rate of a matrix product"
        for peer in ("meters", "topk"):
            gain = found["speedup_over_" + peer]
            title = f"{pair}: images a second, limbeck over the {peer} loop"
            rows.append(row(title, gain["ratio"], TARGETS[pair], higher=True, floor=text, iqr=gain["iqr"], note=f"{own} images/s"))
    say("epochs", given.quick, rows, targets=TARGETS, **cases)


if __name__ == "__main__":
    main()
