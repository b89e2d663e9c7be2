"""What outputs mean: losses, probabilities, metrics and calibration of classification."""

from __future__ import annotations

import doctest
import importlib
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from limbeck import losses
from limbeck.errors import UserError
from limbeck.tasks import (
    Classification,
    adaptive_calibration_error,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    reliability,
)

torch.set_num_threads(1)
TWELVE = Classification(tuple("abcdefghijkl"))
MANY = Classification(("a", "b", "c"), "multilabel")
BINARY = Classification(("no", "yes"), "binary")


@pytest.fixture
def split():
    g = torch.Generator().manual_seed(5)
    labels = torch.randint(12, (400,), generator=g)
    labels[::10] = -1
    return torch.randn(400, 12, generator=g) * 2 + 2 * torch.eye(12)[labels.clamp(min=0)], labels


def slow_ece(probabilities, labels, bins):
    rows = [(float(p.max()), int(p.argmax()) == int(y)) for p, y in zip(probabilities, labels) if y != -1]
    total = 0.0
    for i in range(bins):
        inside = [r for r in rows if i / bins < r[0] <= (i + 1) / bins]
        if inside:
            total += len(inside) / len(rows) * abs(np.mean([c for c, _ in inside]) - np.mean([a for _, a in inside]))
    return total


def test_multiclass_metrics_against_loops(split):
    logits, labels = split
    figures = TWELVE.metrics(logits, labels)
    p = torch.softmax(logits.double(), 1)
    known = [i for i in range(400) if labels[i] != -1]
    assert figures["accuracy"] == pytest.approx(np.mean([int(p[i].argmax()) == int(labels[i]) for i in known]))
    assert figures["accuracy_top5"] == pytest.approx(np.mean([int((p[i] > p[i, labels[i]]).sum()) < 5 for i in known]))
    assert figures["nll"] == pytest.approx(np.mean([-math.log(p[i, labels[i]]) for i in known]), rel=1e-5)
    assert figures["brier"] == pytest.approx(np.mean([float((p[i] - torch.eye(12)[labels[i]]).square().sum()) for i in known]), rel=1e-5)
    assert figures["ece"] == pytest.approx(slow_ece(p, labels, 15), rel=1e-5)
    assert all(type(value) is float for value in figures.values())
    assert TWELVE.primary in figures and TWELVE.higher_is_better
    assert "accuracy_top5" not in Classification(("a", "b")).metrics(torch.randn(5, 2), torch.zeros(5, dtype=torch.long))


def test_calibration_agrees_with_torchmetrics(split):
    from torchmetrics.functional.classification import multiclass_calibration_error

    p, labels = torch.softmax(split[0], 1), split[1]
    for bins in (5, 15):
        expected = multiclass_calibration_error(p, labels, 12, n_bins=bins, ignore_index=-1)
        assert expected_calibration_error(p, labels, bins) == pytest.approx(float(expected), rel=1e-4)


def test_reliability_diagram(split):
    p, labels = torch.softmax(split[0], 1), split[1]
    diagram = reliability(p, labels, 10)
    assert diagram.edges.shape == (11,) and diagram.count.shape == (10,)
    assert int(diagram.count.sum()) == int((labels != -1).sum())
    filled = diagram.count > 0
    assert ((diagram.confidence > diagram.edges[:-1]) & (diagram.confidence <= diagram.edges[1:]))[filled].all()
    mean = (diagram.accuracy * diagram.count).sum() / diagram.count.sum()
    assert float(mean) == pytest.approx(TWELVE.metrics(*split)["accuracy"])
    assert diagram.error == expected_calibration_error(p, labels, 10)


def test_adaptive_calibration_error_by_hand():
    p = torch.tensor([0.6, 0.9, 0.7, 0.8])
    labels = torch.tensor([1, 1, 0, 1])
    # sorted: .6 right, .7 wrong | .8 right, .9 right
    assert adaptive_calibration_error(p, labels, 2) == pytest.approx(0.5 * abs(0.5 - 0.65) + 0.5 * abs(1 - 0.85))
    assert adaptive_calibration_error(p, labels, 50) == pytest.approx((0.4 + 0.7 + 0.2 + 0.1) / 4)


def test_certain_and_right_is_perfect_and_certain_and_wrong_is_the_worst():
    p = torch.eye(3)
    for labels, ece, brier in ((torch.tensor([0, 1, 2]), 0.0, 0.0), (torch.tensor([1, 2, 0]), 1.0, 2.0)):
        assert expected_calibration_error(p, labels) == ece
        assert adaptive_calibration_error(p, labels) == ece
        assert brier_score(p, labels) == brier
    assert negative_log_likelihood(p, torch.tensor([0, 1, 2])) == 0
    assert math.isfinite(negative_log_likelihood(p, torch.tensor([1, 2, 0])))


def test_multilabel_metrics_against_loops():
    g = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(60, 3, generator=g), (torch.rand(60, 3, generator=g) > 0.6).float()
    labels[:, 2] = 0  # a class that never occurs
    labels[5] = -1
    figures = MANY.metrics(logits, labels)
    keep = [i for i in range(60) if i != 5]
    x, y = logits.double().numpy()[keep], labels.numpy()[keep]
    guess = x > 0
    assert figures["accuracy"] == pytest.approx((guess == y).mean())
    f1s, aps = [], []
    for c in range(2):
        hit = (guess[:, c] * y[:, c]).sum()
        f1s.append(2 * hit / (guess[:, c].sum() + y[:, c].sum()))
        ranked = y[np.argsort(-x[:, c]), c]
        aps.append(sum(ranked[: i + 1].mean() for i in range(len(ranked)) if ranked[i]) / ranked.sum())
    assert figures["f1"] == pytest.approx(np.mean(f1s))
    assert figures["map"] == pytest.approx(np.mean(aps))
    p = 1 / (1 + np.exp(-x))
    assert figures["brier"] == pytest.approx(2 * ((p - y) ** 2).mean(), rel=1e-5)
    assert figures["nll"] == pytest.approx(-(y * np.log(p) + (1 - y) * np.log(1 - p)).mean(), rel=1e-5)
    assert MANY.primary == "map"
    assert MANY.chance(labels) == pytest.approx(y[:, :2].mean())


def test_one_column_is_two_columns():
    column, labels = torch.randn(50, 1, dtype=torch.float64), torch.randint(2, (50,))
    labels[3] = -1
    two = torch.cat([torch.zeros_like(column), column], 1)
    one = BINARY.metrics(column, labels)
    assert one == pytest.approx(BINARY.metrics(two, labels))
    assert BINARY.metrics(column, labels[:, None]) == pytest.approx(one)
    smooth = Classification(("no", "yes"), "binary", label_smoothing=0.1)
    for task in (BINARY, smooth):
        assert float(task.hard_loss(column, labels)) == pytest.approx(float(task.hard_loss(two, labels)))
        assert float(task.hard_loss(column, labels.float()[:, None])) == pytest.approx(float(task.hard_loss(two, labels)))
    other = torch.randn(50, 1, dtype=torch.float64)
    both = float(BINARY.soft_loss(two, torch.cat([torch.zeros_like(other), other], 1), 3.0))
    assert float(BINARY.soft_loss(column, other, 3.0)) == pytest.approx(both)
    assert torch.allclose(BINARY.probabilities(column), BINARY.probabilities(two))


def test_losses_of_the_task_are_the_losses(split):
    logits, labels = split
    smooth = Classification(TWELVE.classes, label_smoothing=0.1)
    weight = torch.rand(400)
    assert torch.equal(smooth.hard_loss(logits, labels, weight), losses.cross_entropy(logits, labels, label_smoothing=0.1, weight=weight))
    assert torch.equal(TWELVE.soft_loss(logits, -logits, 4.0), losses.kl(logits, -logits, temperature=4.0))
    assert smooth.metrics(logits, labels)["nll"] == TWELVE.metrics(logits, labels)["nll"]  # smoothing is for training
    y = (torch.rand(8, 3) > 0.5).float()
    x = torch.randn(8, 3)
    assert torch.equal(MANY.hard_loss(x, y, reduction="none"), losses.binary_cross_entropy(x, y, reduction="none"))
    assert torch.equal(MANY.soft_loss(x, -x, 2.0), losses.bernoulli_kl(x, -x, temperature=2.0))
    unlabelled = TWELVE.hard_loss(logits.requires_grad_(), torch.full((400,), -1))
    assert float(unlabelled.detach()) == 0 and unlabelled.requires_grad


def test_probabilities_in_half_precision_sum_to_one():
    assert torch.allclose(TWELVE.probabilities(torch.randn(3, 12).half()).sum(1), torch.ones(3))


def test_chance_is_the_majority():
    assert TWELVE.chance(torch.tensor([3, 3, 3, 1, -1, -1])) == 0.75
    assert TWELVE.chance(torch.full((5,), -1)) == pytest.approx(1 / 12)
    constant = torch.zeros(4, 12)
    constant[:, 3] = 1
    labels = torch.tensor([3, 3, 3, 1])
    assert TWELVE.metrics(constant, labels)["accuracy"] == TWELVE.chance(labels)


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"\(2, 10\).*12"):
        TWELVE.check_logits(torch.zeros(2, 10))
    with pytest.raises(UserError, match=r"1 or 2"):
        BINARY.check_logits(torch.zeros(2, 3))
    TWELVE.check_logits(torch.zeros(2, 12))
    BINARY.check_logits(torch.zeros(2, 1))
    with pytest.raises(UserError, match="'multiclass'"):
        Classification(("a",), "multiclas")
    with pytest.raises(UserError, match="two"):
        Classification(("a", "b", "c"), "binary")
    with pytest.raises(UserError, match="labelled"):
        TWELVE.metrics(torch.zeros(2, 12), torch.tensor([-1, -1]))


def test_importing_tasks_stays_light():
    code = "import sys, limbeck.tasks; print([m for m in ('torchmetrics', 'sklearn', 'pandas', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["base", "calibration", "classification"])
def test_docstrings_run(module):
    assert doctest.testmod(importlib.import_module(f"limbeck.tasks.{module}")).failed == 0
