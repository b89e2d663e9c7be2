"""The label-robust score of one synthetic set by limbeck and by DD-Ranking (package ddranking), and what it costs.

    python benchmarks/condensation_score.py [--quick]

The set: the mean digit of each class (scikit-learn's digits, three channels, 16x16), hard labels. Both train the ConvNet of the papers
(three blocks, width 128) on the set, on random real digits and on the whole training part, with SGD, a step schedule and five learning
rates. What differs is the published protocol: DD-Ranking takes the best accuracy on the test data over epochs and learning rates and a
new random set for each run, limbeck takes the last step and chooses the rate on a validation part. DD-Ranking 0.2.0 puts percentages into
a formula for fractions; its two terms are divided by 100 here before its formula is applied. Of its code two functions are replaced: the
one that downloads CIFAR-10, by one that gives the same digits, and the one that writes a table, which fails (it is given one column that
is twice as long as the others).

Checked first: both networks say the same with equal weights; both formulas agree on equal accuracies. Floor: the operations of the
trainings and measurements that a score needs at the rate of a matrix product.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import absent, clock, floor_ms, flops, parser, row, say
from peers import Absent, need, version
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from limbeck import schema
from limbeck.condensation.problem import Problem
from limbeck.condensation.protocol import Protocol
from limbeck.condensation.scoring import label_robust
from limbeck.condensation.synthetic import SyntheticSet
from limbeck.data import open_data
from limbeck.engine.session import Session
from limbeck.zoo.convnet import ConvNet

CLASSES, SIDE = 10, 16
RATES = [0.001, 0.005, 0.01, 0.05, 0.1]
Part = tuple[Tensor, Tensor]


def digits(train: int, test: int) -> tuple[Part, Part, Part]:
    """Standardised digits: for training, for the choice of rates, for the test."""
    from sklearn.datasets import load_digits

    x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x = F.interpolate(x.float().view(-1, 1, 8, 8) / 16, (SIDE, SIDE), mode="bilinear").expand(-1, 3, -1, -1)[order].contiguous()
    x, y = (x - x.mean()) / x.std(), y.long()[order]
    ends = [0, train, train + test, train + 2 * test]
    return tuple((x[a:b], y[a:b]) for a, b in pairwise(ends))  # type: ignore[return-value]


class Rows(Dataset[tuple[Tensor, int]]):
    """Samples one at a time, as torchvision's data sets give them."""

    def __init__(self, part: Part) -> None:
        self.images, self.targets = part[0], part[1].tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self.images[number], self.targets[number]


def theirs(images: Tensor, train: Part, test: Part, epochs: int, runs: int, folder: Path) -> dict[str, float]:
    """DD-Ranking's score with hard labels."""
    module = need("ddranking.metrics.hard_label", stand_in=True)
    same = {c: c for c in range(CLASSES)}
    parts = (Rows(train), Rows(test), Rows(test))
    module.save_results = lambda *given: None
    module.get_dataset = lambda *given, **more: (3, (SIDE, SIDE), None, None, CLASSES, *parts, same, same)
    options: dict[str, Any] = {
        "dataset": "CIFAR10", "ipc": 1, "model_name": "ConvNet-3", "data_aug_func": None, "num_eval": runs, "im_size": (SIDE, SIDE),
        "num_epochs": epochs, "step_size": max(1, epochs // 2), "num_workers": 0, "device": "cpu", "eval_full_data": True,
        "random_data_format": "tensor", "random_data_path": str(folder), "save_path": str(folder / "scores.csv"),
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        found = module.LabelRobustScoreHard(**options).compute_metrics(image_tensor=images, hard_labels=torch.arange(CLASSES))
    recovery, gain = (found[f"{name}_mean"] / 100 for name in ("hard_label_recovery", "improvement_over_random"))
    return {
        "label_robust_score": (math.exp(0.5 * gain - 0.5 * recovery) - math.exp(-1)) / (math.e - math.exp(-1)),
        "hard_label_recovery": recovery,
        "improvement_over_random": gain,
    }


def ours(images: Tensor, parts: tuple[Part, Part, Part], epochs: int, runs: int) -> dict[str, float]:
    """limbeck's score."""
    train, valid, test = parts
    data = open_data({"train": train, "valid": valid, "test": test})
    students = {"epochs": epochs, "batch": 256, "optimizer": "sgd", "lr": 0.01, "schedule": "step", "milestones": (0.5,)}
    block: dict[str, Any] = {"per_class": 1, "lrs": RATES, "seeds": runs, "students": students, "whole": True}
    block |= {"whole_training": {"epochs": epochs, "batch": 256}, "scores": True, "format": "float32"}
    recipe = schema.Recipe(
        data="digits", method="random-real", student={"model": "convnet", "args": {"width": 128, "depth": 3}}, condense=block
    )  # type: ignore[call-arg, arg-type]
    problem = Problem(data, recipe.condense, recipe.student, Session())  # type: ignore[arg-type]
    judge, names = Protocol(problem, recipe), problem.data.classes
    mean, std = (torch.as_tensor(value).view(-1, 1, 1) for value in (problem.mean, problem.std))
    own = SyntheticSet((images - mean) / std, torch.arange(CLASSES), names, mean=mean, std=std, format="float32")
    chosen = problem.initial("real")
    random = SyntheticSet(chosen.images.detach(), chosen.labels, names, mean=mean, std=std, format="float32")
    whole, any_, rand = judge.whole().mean, judge.score(own.as_stored()).mean, judge.score(random.as_stored()).mean
    score = label_robust(any_, rand, any_, whole)
    return {"label_robust_score": score, "hard_label_recovery": whole - any_, "improvement_over_random": any_ - rand}


def check() -> None:
    """Equal networks; equal formulas."""
    module = need("ddranking.utils", stand_in=True)
    other = module.build_model("ConvNet-3", num_classes=CLASSES, im_size=(SIDE, SIDE), device="cpu")
    mine: nn.Module = ConvNet((3, SIDE, SIDE), CLASSES, width=128, depth=3)
    mine.load_state_dict(dict(zip(mine.state_dict(), other.state_dict().values())))
    x = torch.randn(4, 3, SIDE, SIDE)
    torch.testing.assert_close(mine(x), other(x), rtol=1e-4, atol=1e-5)
    for own, random, hard, whole in ((0.6, 0.4, 0.5, 0.9), (0.3, 0.5, 0.3, 0.8)):
        alpha = 0.5 * (own - random) - 0.5 * (whole - hard)
        assert math.isclose(label_robust(own, random, hard, whole), (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1)))


def main() -> None:
    """Print one line of JSON."""
    given = parser(__doc__).parse_args()
    train, test, epochs, runs = (20, 10, 10, 1) if given.quick else (300, 200, 40, 3)
    parts = digits(train, test)
    images = torch.stack([parts[0][0][parts[0][1] == c].mean(0) for c in range(CLASSES)])
    peer, rows = version("ddranking"), []
    if not given.quick:
        ours(images, digits(20, 10), 2, 1)  # what is imported and compiled once is no part of a score
    begin = clock()
    own = ours(images, parts, epochs, runs)
    seconds = clock()[0] - begin[0]
    network = ConvNet((3, SIDE, SIDE), CLASSES, width=128, depth=3)
    found: dict[str, Any] = {"limbeck": own | {"seconds": round(seconds, 2)}}
    once = flops(lambda: network(parts[0][0][:1]))
    # images that are trained on: limbeck tries all rates on the whole set too, DD-Ranking has a fixed one there
    trained = {
        "limbeck": runs * len(RATES) * epochs * (2 * CLASSES + train),
        "ddranking": runs * epochs * (len(RATES) * 2 * CLASSES + train),
    }
    limit = floor_ms(1000 * 3 * once)
    text = f"{limit['gflop']:.0f} Gflop for a thousand images: {limit['ms']:.0f} ms"
    mine = 1e6 * seconds / trained["limbeck"]
    rows.append(row("label-robust score of the mean digits, limbeck", round(own["label_robust_score"], 4), None, higher=True))
    try:
        check()
        with tempfile.TemporaryDirectory() as folder:
            begin = clock()
            other = theirs(images, parts[0], parts[2], epochs, runs, Path(folder))
            spent = clock()[0] - begin[0]
    except Absent as why:
        rows.append(absent(f"the same by {peer}", str(why)))
    else:
        found["ddranking"] = other | {"seconds": round(spent, 2)}
        rows.append(row(f"the same by {peer} (peer)", round(other["label_robust_score"], 4), None, higher=True))
        their = 1e6 * spent / trained["ddranking"]
        title = f"a score's milliseconds for a thousand images trained on, limbeck over {peer}"
        note = (
            f"{mine:.0f} against {their:.0f} ms; {seconds:.1f} s for {trained['limbeck']} images, {spent:.1f} s for {trained['ddranking']}"
        )
        rows.append(row(title, round(mine / their, 3), 1.0, floor=text, note=note))
    say("condensation_score", given.quick, rows, **found)


if __name__ == "__main__":
    main()
