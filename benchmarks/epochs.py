"""Whole epochs with their data loading: limbeck against loops in the style of two libraries, written here from their descriptions.

    python benchmarks/epochs.py [--quick]

Data: random 8-bit pictures of CIFAR-100's shape in memory; a pair of two-layer networks and a pair of ResNets of depth 8; the loss of
kd. Setting up (networks, optimiser, dry passes) is outside the times. The peers' habits: a `DataLoader`
that makes a tensor of each picture; "meters" reads the loss with `.item()` every step (torchdistill's examples), "topk" also measures
top-1 and top-5 accuracy every step (mdistiller's trainer). These arms are our own code in that style, not those libraries.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial

import torch
from common import CLASSES, SHAPE, TASK, facts, middle, resnets, spent
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

TARGET, BATCH = 1.2, 64
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


def measure(pair: str, rounds: int, samples: int) -> dict[str, object]:
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
    times: dict[str, list[float]] = {name: [] for name in ("limbeck", "meters", "topk")}
    for number in range(rounds):
        made = program()
        ours = Loop(made, Plan(SETTINGS, made.total))
        arms: dict[str, Callable[[], object]] = {
            "limbeck": ours.run,
            "meters": partial(loop, copy.deepcopy(teacher), copy.deepcopy(student), pictures, False),
            "topk": partial(loop, copy.deepcopy(teacher), copy.deepcopy(student), pictures, True),
        }
        for name in sorted(arms, reverse=number % 2 > 0):
            times[name].append(spent(arms[name]))
    result: dict[str, object] = {name: {"images_per_second": round(samples / middle(values), 1)} for name, values in times.items()}
    for name in ("meters", "topk"):
        result["speedup_over_" + name] = round(middle([a / b for a, b in zip(times[name], times["limbeck"])]), 3)
    return result | {"rounds": rounds, "samples": samples}


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    cases = {"two_layers": measure("two_layers", *((1, 128) if quick else (5, 4096)))}
    cases["resnet8"] = measure("resnet8", *((1, 128) if quick else (2, 1024)))
    print(json.dumps({"benchmark": "epochs", "quick": quick, "target": TARGET, **cases, **facts()}))


if __name__ == "__main__":
    main()
