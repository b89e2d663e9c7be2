"""The measures of generated samples against closed forms, explicit loops, other implementations and cases made by hand."""

from __future__ import annotations

import doctest
import importlib
import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.optimize import linprog

from limbeck.errors import UserError
from limbeck.evaluation import statistics
from limbeck.evaluation.generation import (
    class_diversity,
    density_coverage,
    frechet_distance,
    kernel_distance,
    memorisation,
    precision_recall,
    quality,
    sliced_distance,
)

torch.set_num_threads(1)
DISTANCES = [frechet_distance, kernel_distance, sliced_distance]


def normal(n, d, seed=0, mean=0.0, sd=1.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * sd + mean


def whitened(n, d, seed=0):
    """Samples whose mean is exactly 0 and whose covariance is exactly 1 (to rounding)."""
    x = normal(n, d, seed)
    x = x - x.mean(0)
    return torch.linalg.qr(x).Q * (n - 1) ** 0.5


def rotation(d, seed=0):
    return torch.linalg.qr(normal(d, d, seed)).Q


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of rows even for few samples."""
    for name in ("_features", "distances"):
        monkeypatch.setattr(importlib.import_module(f"limbeck.evaluation.generation.{name}"), "block", lambda x: 7)


@pytest.mark.parametrize("name", ["distances", "neighbours"])
def test_docstrings_run(name):
    found = doctest.testmod(importlib.import_module(f"limbeck.evaluation.generation.{name}"))
    assert found.attempted >= 3 and found.failed == 0


# Frechet distance


def test_frechet_distance_of_two_normals_is_the_closed_form():
    sd_a, sd_b, shift = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 0.5, 3.0]).double(), torch.tensor([1.0, 0.0, -2.0])
    a, b = whitened(50, 3) * sd_a, whitened(80, 3, 1) * sd_b + shift
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 2.25, rel=1e-12)  # |shift|^2 + sum (sd_a - sd_b)^2
    root_a, root_b = torch.tensor([[2.0, 1], [1, 2]]).double(), torch.tensor([[1.0, 0], [0, 3]]).double()
    a, b = whitened(40, 2) @ root_a, whitened(40, 2, 1) @ root_b
    cross = root_a @ root_a @ root_b @ root_b  # of two rows: tr sqrt = sqrt(tr + 2 sqrt(det))
    expected = 10 + 10 - 2 * math.sqrt(float(cross.trace()) + 2 * math.sqrt(float(torch.linalg.det(cross))))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "m", "d"), [(100, 100, 5), (60, 200, 16), (300, 40, 1)])
def test_frechet_distance_is_that_of_scipy(n, m, d):
    a, b = normal(n, d) @ normal(d, d, 2), normal(m, d, 1, 0.3) @ normal(d, d, 3)
    cov_a, cov_b = (np.atleast_2d(np.cov(x.numpy(), rowvar=False)) for x in (a, b))
    root = np.atleast_2d(sqrtm(cov_a @ cov_b)).real
    expected = float(((a.mean(0) - b.mean(0)) ** 2).sum()) + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_with_singular_covariances():
    few = normal(30, 64) * 100  # fewer samples than features: rank 29
    assert 0 <= frechet_distance(few, few) < 1e-9
    assert all(0 <= frechet_distance(few[:n], few[:n].flip(0)) < 1e-8 for n in range(2, 31))  # no rounding below 0
    low = normal(100, 5) @ normal(5, 64, 1) * 100  # rank 5
    for x in (few, low):
        assert frechet_distance(x, x + 0.001) == pytest.approx(64e-6, rel=1e-2)  # roots of rounded zeros would add up to more
    flat = normal(50, 4) * torch.tensor([1.0, 1.0, 0.0, 0.0])
    flat -= flat.mean(0)
    assert frechet_distance(flat, flat.roll(2, 1)) == pytest.approx(2 * float(torch.cov(flat.T).trace()))  # nothing in common
    assert frechet_distance(torch.zeros(3, 2), torch.ones(5, 2)) == 2
    dead = torch.cat([whitened(40, 2), torch.zeros(40, 3).double()], 1)
    assert frechet_distance(dead, 3 * dead) == pytest.approx(2 * (3 - 1) ** 2, rel=1e-12)


def test_frechet_distance_stays_under_rotation_and_translation():
    a, b = normal(60, 6) @ normal(6, 6, 2), normal(70, 6, 1, 0.5)
    turn, shift = rotation(6, 4), normal(1, 6, 5, sd=10)
    value = frechet_distance(a, b)
    assert frechet_distance(a @ turn + shift, b @ turn + shift) == pytest.approx(value, rel=1e-9)
    assert frechet_distance(a @ turn, b) != pytest.approx(value, rel=1e-2)


# kernel distance


def test_kernel_distance_is_the_double_loop(small_blocks):
    a, b = normal(9, 3), normal(16, 3, 1, 0.5)

    def k(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    own_a = sum(k(a[i], a[j]) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    own_b = sum(k(b[i], b[j]) for i in range(16) for j in range(16) if i != j) / (16 * 15)
    across = sum(k(x, y) for x in a for y in b) / (9 * 16)
    assert kernel_distance(a, b) == pytest.approx(own_a + own_b - 2 * across, rel=1e-10)


def test_kernel_distance_is_that_of_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    a, b = normal(40, 8), normal(40, 8, 1, 0.2)
    assert kernel_distance(a, b) == pytest.approx(float(poly_mmd(a, b)), rel=1e-10)


def test_kernel_distance_is_unbiased():
    draws = torch.tensor([kernel_distance(normal(6, 2, 2 * i), normal(9, 2, 2 * i + 1)) for i in range(1500)])
    error = float(draws.std()) / 1500**0.5
    assert abs(float(draws.mean())) < 4 * error
    assert float((draws < 0).double().mean()) > 0.3  # it has to be negative often to be 0 on average
    # with the diagonals kept in, the mean would be out by E k(x, x) - E k(x, y), over N, on either side: many errors away
    x, y = normal(20000, 2, 7), normal(20000, 2, 8)
    excess = float((((x * x).sum(1) / 2 + 1) ** 3).mean() - (((x * y).sum(1) / 2 + 1) ** 3).mean()) * (1 / 6 + 1 / 9)
    assert excess > 8 * error


# sliced distance


def test_sliced_distance_of_shifted_and_scaled_normals():
    a, shift = normal(500, 8), normal(1, 8, 3)
    found = sliced_distance(a, a + shift, directions=4000)
    assert found == pytest.approx(float(shift.norm()) / 8**0.5, rel=0.04)  # E (shift . u)^2 = |shift|^2 / D
    assert sliced_distance(a, a) == 0
    big, other = normal(4000, 4), normal(4000, 4, 1, sd=3.0)
    assert sliced_distance(big, other) == pytest.approx(2, rel=0.03)  # W2 of N(0, 1) and N(0, 9) on every line


def test_sliced_distance_of_unequal_sizes_is_the_transport_plan():
    a, b = normal(7, 1), normal(5, 1, 1, 0.4)
    cost = ((a - b.T) ** 2).numpy()
    rows, columns = np.kron(np.eye(7), np.ones(5)), np.kron(np.ones(7), np.eye(5))
    plan = linprog(cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=[1 / 7] * 7 + [1 / 5] * 5)
    assert sliced_distance(a, b, directions=3) == pytest.approx(plan.fun**0.5, rel=1e-7)
    a, b = normal(6, 3), normal(4, 3, 1)
    repeated = sliced_distance(a.repeat_interleave(2, 0), b.repeat_interleave(3, 0))
    assert sliced_distance(a, b) == pytest.approx(repeated, rel=1e-12)


def test_sliced_distance_follows_its_seed():
    a, b = normal(30, 5), normal(30, 5, 1, 0.5)
    torch.manual_seed(1)
    first, state = sliced_distance(a, b), torch.get_rng_state()
    assert sliced_distance(a, b) == first and torch.equal(torch.get_rng_state(), state)
    assert sliced_distance(a, b, seed=1) != first


# neighbourhoods


def brute_force(real, generated, k):
    """All four by the papers' formulae, one pair of samples at a time."""

    def radius(points, i):
        return sorted(math.dist(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]

    r, g = real.tolist(), generated.tolist()
    radius_r, radius_g = [radius(r, i) for i in range(len(r))], [radius(g, i) for i in range(len(g))]
    return {
        "precision": sum(any(math.dist(y, x) <= w for x, w in zip(r, radius_r)) for y in g) / len(g),
        "recall": sum(any(math.dist(y, x) <= w for y, w in zip(g, radius_g)) for x in r) / len(r),
        "density": sum(math.dist(y, x) <= w for y in g for x, w in zip(r, radius_r)) / (k * len(g)),
        "coverage": sum(any(math.dist(y, x) <= w for y in g) for x, w in zip(r, radius_r)) / len(r),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbourhoods_are_the_loops(k, small_blocks):
    for seed in range(3):
        real, generated = normal(31, 3, seed), normal(45, 3, seed + 9, 0.7, 1.3)
        expected = brute_force(real, generated, k)
        assert precision_recall(real, generated, k) | density_coverage(real, generated, k) == pytest.approx(expected)
        assert min(expected.values()) > 0 and (k == 5 or max(expected["precision"], expected["recall"]) < 1)  # not where all agree


def test_equal_sets_are_on_each_other_even_where_samples_repeat():
    x = normal(40, 16).float()
    x = torch.cat([x, x[:10].repeat(6, 1)])  # balls of width 0
    assert precision_recall(x, x.flip(0)) == {"precision": 1, "recall": 1}
    assert density_coverage(x, x.flip(0))["coverage"] == 1


def test_one_distribution_has_density_1_and_the_coverage_of_the_lemma():
    n, m, k = 400, 300, 3
    found = [density_coverage(normal(n, 2, 2 * i), normal(m, 2, 2 * i + 1), k) for i in range(20)]
    coverage = 1 - math.prod((n - j) / (n + m - j) for j in range(1, k + 1))
    assert sum(f["density"] for f in found) / 20 == pytest.approx(1, abs=0.03)
    assert sum(f["coverage"] for f in found) / 20 == pytest.approx(coverage, abs=0.01)


def test_dropping_a_mode_lowers_recall_and_coverage_alone():
    left, right = normal(200, 4, 0, -20), normal(200, 4, 1, 20)
    real, whole, half = torch.cat([left, right]), normal(400, 4, 2), normal(400, 4, 3, -20)
    whole[:200] -= 20
    whole[200:] += 20
    full, dropped = (precision_recall(real, g) | density_coverage(real, g) for g in (whole, half))
    assert dropped["precision"] == pytest.approx(full["precision"], abs=0.05) and dropped["density"] > 0.8
    assert full["recall"] > 0.85 and dropped["recall"] < full["recall"] / 2 + 0.05
    assert full["coverage"] > 0.9 and dropped["coverage"] <= 0.5


def test_unreal_samples_lower_precision_and_density_alone():
    real, good = normal(300, 4), normal(300, 4, 1)
    noisy = torch.cat([good[:150], normal(150, 4, 2, 50)])
    clean, bad = (precision_recall(real, g) | density_coverage(real, g) for g in (good, noisy))
    assert bad["precision"] <= 0.5 and bad["density"] < 0.6 * clean["density"]
    assert bad["recall"] > 0.8


def test_a_real_outlier_raises_precision_but_not_density_or_coverage():
    real, poor = normal(300, 4), normal(300, 4, 1, 15, 2)
    before = precision_recall(real, poor) | density_coverage(real, poor)
    with_outlier = torch.cat([real, torch.full((1, 4), 15.0).double()])  # its ball reaches back to the others
    after = precision_recall(with_outlier, poor) | density_coverage(with_outlier, poor)
    assert before["precision"] == before["density"] == 0
    assert after["precision"] > 0.95 and after["density"] <= 0.2 and after["coverage"] < 0.01


def test_density_exceeds_1_where_samples_crowd():
    real = normal(300, 4)
    crowd = normal(300, 4, 1, sd=0.1)
    found = density_coverage(real, crowd)
    assert found["density"] > 1.25 and found["coverage"] < 0.7


# diversity and memory


def test_class_diversity_by_hand(small_blocks):
    features = torch.tensor([[0.0, 0], [3, 4], [6, 8], [1, 1], [1, 2], [50, 50], [99, 0], [0, 99]])
    labels = torch.tensor([4, 4, 4, 2, 2, 7, -1, -1])  # 7 has one sample, -1 is no class
    assert class_diversity(features, labels) == pytest.approx(((5 + 5 + 10) / 3 + 1) / 2)
    x = normal(30, 3)
    pairs = [math.dist(x[i], x[j]) for i in range(30) for j in range(i)]
    assert class_diversity(x, torch.zeros(30)) == pytest.approx(sum(pairs) / len(pairs))
    assert class_diversity(torch.ones(4, 2), torch.zeros(4).long()) == 0


def test_memorisation_tells_copies_from_new_samples(small_blocks):
    train, held_out, new = normal(200, 5), normal(300, 5, 1), normal(300, 5, 2)
    assert memorisation(train[:60], train, held_out) == {"nearest": 0, "copies": 1}
    fresh = memorisation(new, train, held_out)
    assert fresh["nearest"] == pytest.approx(1, abs=0.06) and fresh["copies"] < 0.04
    half = memorisation(torch.cat([train[:100], new[:100]]), train, held_out)
    assert half["nearest"] == pytest.approx(0.5, abs=0.06) and half["copies"] == pytest.approx(0.5, abs=0.04)
    assert memorisation(new + 10, train, held_out)["nearest"] > 3


def test_memorisation_by_hand():
    train, held_out = torch.tensor([[0.0], [100.0]]), torch.arange(1.0, 102)[:, None] / 1000
    held_out[-1] = 50
    found = memorisation(torch.tensor([[0.0015], [0.0025], [99.0], [100.5]]), train, held_out)
    assert found["nearest"] == pytest.approx((0.0015 + 0.0025 + 1 + 0.5) / 4 / ((5.05 + 50) / 101), rel=1e-6)
    assert found["copies"] == 0.25  # the quantile of 0.001 ... 0.1, 50 is 0.002
    held_out[:5] = 0  # some held-out samples are in train: copies still count
    assert memorisation(train, train, held_out)["copies"] == 1


# all together


def test_quality_gives_each_measure(recwarn):
    real, generated, train = normal(50, 4), normal(40, 4, 1, 0.5), normal(60, 4, 2)
    own, other = torch.arange(50) % 3, torch.arange(40) % 3
    found = quality(real, generated, own, other, train, k=3, directions=16, seed=4)
    assert found == {
        "feature_distance": frechet_distance(real, generated),
        "kernel_distance": kernel_distance(real, generated),
        "sliced_distance": sliced_distance(real, generated, 16, 4),
        **precision_recall(real, generated, 3),
        **density_coverage(real, generated, 3),
        "diversity": class_diversity(generated, other),
        "real_diversity": class_diversity(real, own),
        **memorisation(generated, train, real),
    }
    assert all(type(v) is float and math.isfinite(v) for v in found.values())
    plain = quality(real, generated, k=3, directions=16, seed=4)
    assert plain == {name: found[name] for name in list(found)[:7]}
    assert quality(real.float().requires_grad_(), generated.half(), k=3)["precision"] == pytest.approx(found["precision"], abs=0.05)
    assert not recwarn.list  # a gradient that is carried along would warn


def test_all_sums_are_in_float64():
    a, b = normal(100, 3, mean=1000.0).float(), normal(100, 3, 1, 1000.1).float()
    for distance in DISTANCES:
        assert distance(a, b) == distance(a.double(), b.double())
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(a.double() - 1000, b.double() - 1000), rel=1e-9)


GOOD = normal(8, 3)


@pytest.mark.parametrize(
    ("call", "message", "hint"),
    [
        (lambda: quality(GOOD, GOOD[:5]), "5 generated samples where at least 6 are needed", "smaller k"),
        (lambda: quality(GOOD[:3], GOOD, k=3), "3 real samples where at least 4", "smaller k"),
        (lambda: quality(GOOD, GOOD[:, :2]), "3 (real), 2 (generated)", "same feature network"),
        (lambda: quality(GOOD, GOOD.log()), "values of the generated features are not finite", "diverge"),
        (lambda: quality(GOOD * math.inf, GOOD), "24 values of the real features are not finite", "diverge"),
        (lambda: quality(GOOD, GOOD, train=GOOD[:, :1]), "1 (train)", "same feature network"),
        (lambda: quality(GOOD, GOOD, k=0), "k = 0", "k = 1 or more"),
        (lambda: quality(GOOD, GOOD.view(2, 4, 3)), "generated features of shape (2, 4, 3)", "(N, D)"),
        (lambda: quality(GOOD, GOOD, generated_labels=torch.zeros(7)), "labels of shape (7,) for 8 samples", "one label"),
        (lambda: quality(GOOD, GOOD, generated_labels=torch.arange(8)), "no class has two samples", "two samples for each class"),
        (lambda: quality(GOOD, GOOD, train=GOOD), "every held-out sample is a training sample", "not trained on"),
        (lambda: sliced_distance(GOOD, GOOD, 0), "0 directions", "at least 1"),
        (lambda: frechet_distance(GOOD[:1], GOOD), "1 a samples where at least 2", "more samples"),
        (lambda: density_coverage(GOOD[:5], GOOD), "5 real samples where at least 6", "smaller k"),
        (lambda: memorisation(GOOD, GOOD[:0], GOOD), "0 train samples", "more samples"),
    ],
)
def test_mistakes_get_an_error_with_a_hint(call, message, hint):
    with pytest.raises(UserError) as caught:
        call()
    assert message in caught.value.message and hint in caught.value.hint


def test_one_generated_sample_is_enough_for_density():
    assert density_coverage(GOOD, GOOD[:1])["density"] > 0


def test_the_direction_of_each_measure_is_known():
    for name in ("feature_distance", "kernel_distance", "sliced_distance", "copies"):
        assert not any(statistics.higher_is_better(n) for n in (name, f"{name}@2", name.title()))
    for name in ("precision", "recall", "density", "coverage", "diversity", "class_accuracy"):
        assert all(statistics.higher_is_better(n) for n in (name, f"{name}@4"))
    assert statistics.higher_is_better("accuracy@loss") and not statistics.higher_is_better("val_nll@4")
