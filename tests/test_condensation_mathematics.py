"""The condensation wing's mathematics against independent formulas: distances, augmentation, unrolling, sharpness, inversion, kernels."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.condensation import inversion, mixing, selection
from limbeck.condensation.condenser import surrogate
from limbeck.condensation.experts import gradient_penalty
from limbeck.condensation.functional import Functional, fresh
from limbeck.condensation.methods.ast_smooth_expert import balance
from limbeck.condensation.methods.cda import curriculum
from limbeck.condensation.scoring import augmentation_robust, label_robust
from limbeck.condensation.sharpness import gsam_direction
from limbeck.condensation.siamese import Draw, Siamese
from limbeck.condensation.students import lesson_loss
from limbeck.condensation.unrolling import constant_memory_gradient, train, trajectory_distance, unroll
from limbeck.errors import UserError
from limbeck.losses import attention_map
from limbeck.losses.inversion import image_variation, statistics_distance
from limbeck.losses.kernel import barlow_twins, kernel_ridge_prediction
from limbeck.losses.matching import characteristic, characteristic_discrepancy, gradient_distance, mean_distance
from tests.conftest import saved_bytes

torch.set_num_threads(1)


def wide(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- distances of gradients and distributions ----


def test_row_cosines_against_a_loop():
    """One minus the cosine of each output row, summed; biases count nothing; the scale of a gradient does not matter."""
    a, b = [wide(4, 3, 2, 2), wide(4), wide(5, 7)], [wide(4, 3, 2, 2, seed=1), wide(4, seed=2), wide(5, 7, seed=3)]
    expected = 0.0
    for s, r in ((a[0], b[0]), (a[2], b[2])):
        for row, other in zip(s.numpy().reshape(len(s), -1), r.numpy().reshape(len(r), -1)):
            expected += 1 - row @ other / (np.linalg.norm(row) * np.linalg.norm(other) + 1e-6)
    assert float(gradient_distance(a, b)) == pytest.approx(expected, rel=1e-9)
    assert float(gradient_distance([3 * x for x in a], b)) == pytest.approx(expected, rel=1e-5)
    assert float(gradient_distance(a, [b[0], 100 * b[1], b[2]])) == pytest.approx(expected, rel=1e-9)
    assert float(gradient_distance(a, a)) == pytest.approx(0, abs=1e-5)


def test_other_gradient_distances():
    a, b = [wide(2, 2), wide(3)], [wide(2, 2, seed=1), wide(3, seed=2)]
    flat = [torch.cat([x.flatten() for x in side]).numpy() for side in (a, b)]
    assert float(gradient_distance(a, b, "mse")) == pytest.approx(((flat[0] - flat[1]) ** 2).sum())
    cosine = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert float(gradient_distance(a, b, "cosine")) == pytest.approx(1 - cosine, rel=1e-5)
    with pytest.raises(UserError, match="rows"):
        gradient_distance(a, b, "row")
    with pytest.raises(UserError, match="2 gradients"):
        gradient_distance(a, b[:1])


def test_mean_distance():
    s, r = wide(3, 4, 5), wide(3, 9, 5, seed=1)
    assert float(mean_distance(s, r)) == pytest.approx(float(((s.mean(1) - r.mean(1)) ** 2).sum()))


def test_attention_vectors_have_length_one():
    x = wide(4, 3, 5, 5)
    for power in (1.0, 4.0):
        found = attention_map(x, power)
        assert found.shape == (4, 25) and torch.allclose(found.norm(dim=1), torch.ones(4, dtype=torch.float64))
    one = (x[1].abs() ** 4).sum(0).flatten()
    assert torch.allclose(attention_map(x, 4.0)[1], one / one.norm())


def test_characteristic_function_of_a_gaussian():
    """For standard normal samples it tends to exp(-|t|^2 / 2)."""
    t = torch.tensor([[0.3, 0.0], [0.5, -1.0], [1.5, 0.2]], dtype=torch.float64)
    real, imaginary = characteristic(wide(200_000, 2), t)
    assert torch.allclose(real, (-(t**2).sum(1) / 2).exp(), atol=0.01) and float(imaginary.abs().max()) < 0.01


def test_amplitude_and_phase_add_up_to_the_whole_difference():
    """|P_r|^2 + |P_s|^2 - 2 Re = |P_r - P_s|^2: with equal weights w the root's content is w |P_r - P_s|^2."""
    s, r, t = wide(6, 4), wide(9, 4, seed=1), wide(12, 4, seed=2)
    phi = [np.exp(1j * (x.numpy() @ t.numpy().T)).mean(0) for x in (s, r)]
    expected = (np.sqrt(0.5) * np.abs(phi[0] - phi[1])).mean()
    assert float(characteristic_discrepancy(s, r, t)) == pytest.approx(expected, rel=1e-6)
    only = characteristic_discrepancy(s, r, t, amplitude=1.0, phase=0.0)
    assert float(only) == pytest.approx(np.abs(np.abs(phi[0]) - np.abs(phi[1])).mean(), rel=1e-5)


def test_the_discrepancy_has_a_finite_gradient_where_both_are_equal():
    x = wide(5, 3).requires_grad_(True)
    characteristic_discrepancy(x, x.detach(), wide(7, 3, seed=1)).backward()
    assert bool(torch.isfinite(x.grad).all())


# ---- siamese augmentation ----


def test_one_draw_does_the_same_to_both_sides():
    torch.manual_seed(0)
    siamese = Siamese("color_crop_cutout_flip_scale_rotate")
    x = torch.randn(3, 2, 8, 8)
    names = set()
    for _ in range(40):
        draw = siamese.draw()
        names.add(draw.operation)
        a, b = siamese.apply(x, draw), siamese.apply(torch.cat([x, x]), draw)
        assert torch.allclose(torch.cat([a, a]), b, atol=1e-6) and a.shape == x.shape
    assert names == {"color", "crop", "cutout", "flip", "scale", "rotate"}
    torch.manual_seed(5)
    first = siamese.pair(x, x)
    torch.manual_seed(5)
    assert torch.equal(first[0], siamese.pair(x, x)[0]) and torch.equal(*first)


def test_operations_pixel_by_pixel():
    x = torch.arange(64.0).view(1, 1, 8, 8)
    assert torch.equal(Siamese.apply(x, Draw("flip", (0.2,))), x.flip(-1))
    assert torch.equal(Siamese.apply(x, Draw("flip", (0.8,))), x)
    down = Siamese.apply(x, Draw("crop", (0.99, 0.5)))  # 8 pixels: at most one
    assert torch.equal(down[..., :7, :], x[..., 1:, :]) and float(down[..., 7, :].abs().sum()) == 0
    right = Siamese.apply(x, Draw("crop", (0.5, 0.0)))
    assert torch.equal(right[..., 1:], x[..., :7]) and float(right[..., 0].abs().sum()) == 0
    hole = Siamese.apply(x + 1, Draw("cutout", (0.5, 0.5)))
    assert int((hole == 0).sum()) == 16 and float(hole[0, 0, 2:6, 2:6].abs().sum()) == 0
    corner = Siamese.apply(x + 1, Draw("cutout", (0.0, 0.0)))
    assert int((corner == 0).sum()) == 4
    assert torch.allclose(Siamese.apply(x, Draw("brightness", (0.75,))), x + 0.25)
    assert torch.allclose(Siamese.apply(x, Draw("contrast", (0.0,))), (x - x.mean()) * 0.5 + x.mean())
    grey = torch.randn(2, 3, 4, 4)
    assert torch.allclose(Siamese.apply(grey, Draw("saturation", (0.0,))), grey.mean(1, keepdim=True).expand_as(grey))
    assert torch.allclose(Siamese.apply(x, Draw("rotate", (0.5,))), x, atol=1e-3)
    assert torch.allclose(Siamese.apply(x, Draw("scale", (0.4545454, 0.4545454))), x, atol=1e-2)


@pytest.mark.parametrize("name", ["color", "crop", "cutout", "flip", "scale", "rotate"])
def test_operations_are_differentiable(name):
    draw = Draw(name, (0.3, 0.7, 0.6)[: {"color": 3, "crop": 2, "cutout": 2, "scale": 2}.get(name, 1)])
    assert torch.autograd.gradcheck(lambda x: Siamese.apply(x, draw), wide(1, 1, 6, 6).requires_grad_(True))


def test_rotation_agrees_with_kornia():
    """An independent implementation of the same rotation (square pictures, bilinear, zeros outside)."""
    kornia = pytest.importorskip("kornia")
    x = torch.rand(2, 1, 16, 16)
    angle = (0.9 - 0.5) * 30
    ours = Siamese.apply(x, Draw("rotate", (0.9,)))
    theirs = kornia.geometry.transform.rotate(x, torch.tensor(angle), align_corners=False)
    assert torch.allclose(ours[..., 3:13, 3:13], theirs[..., 3:13, 3:13], atol=2e-2)


def test_an_unknown_operation_is_named():
    with pytest.raises(UserError, match="rotat"):
        Siamese("crop_rotat")
    with pytest.raises(UserError, match="empty"):
        Siamese("_")


# ---- unrolling ----


class Quadratic:
    """Inner loss 0.5 |A_k (w - x_k)|^2, whose training has a closed form to compare with."""

    def __init__(self, steps, size):
        self.a = [wide(size, size, seed=10 + k) / size for k in range(steps)]

    def loss(self, x):
        return lambda w, k: 0.5 * ((self.a[k] @ (w - x[k])) ** 2).sum()


def test_unrolled_steps_are_plain_gradient_steps():
    q, x, w, rate = Quadratic(3, 4), wide(3, 4), wide(4, seed=5), torch.tensor(0.3, dtype=torch.float64)
    path = unroll(q.loss(x), w, 3, rate)
    now = w.clone()
    for k in range(3):
        now = now - 0.3 * q.a[k].T @ q.a[k] @ (now - x[k])
        assert torch.allclose(path[k + 1], now)
    assert torch.allclose(train(q.loss(x), w, 3, rate), now)


def test_heavy_ball_steps():
    q, x, w, rate = Quadratic(4, 3), wide(4, 3), wide(3, seed=5), torch.tensor(0.2, dtype=torch.float64)
    now, velocity = w.clone(), torch.zeros(3, dtype=torch.float64)
    for k in range(4):
        velocity = 0.9 * velocity + q.a[k].T @ q.a[k] @ (now - x[k])
        now = now - 0.2 * velocity
    assert torch.allclose(unroll(q.loss(x), w, 4, rate, 0.9)[-1], now)
    assert torch.allclose(train(q.loss(x), w, 4, rate, 0.9), now)


def test_gradient_through_all_steps_by_finite_differences():
    """Of the trajectory distance, for the samples and for the rate, with a real network."""
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    functional = Functional(network)
    start, target = functional.flatten(network), functional.flatten(network) + 0.3 * wide(functional.size)
    y = torch.tensor([0, 1, 1])

    def value(x, rate):
        path = unroll(lambda w, k: F.cross_entropy(functional(w, x), y), start, 3, rate)
        return trajectory_distance(path[-1], start, target)

    x, rate = wide(3, 3).requires_grad_(True), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value, (x, rate))


def small_problem(steps):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    functional = Functional(network)
    start = functional.flatten(network)
    target = start + 0.2 * wide(functional.size)
    y = torch.tensor([0, 1, 2, 0, 1])
    x = wide(5, 4, seed=3).requires_grad_(True)
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    loss = lambda w, k: F.cross_entropy(functional(w, x), y)  # noqa: E731
    return loss, start, target, x, rate


def both_gradients(steps):
    loss, start, target, x, rate = small_problem(steps)
    whole = trajectory_distance(unroll(loss, start, steps, rate)[-1], start, target)
    full = torch.autograd.grad(whole, (x, rate))
    value, by_rate, (by_x,) = constant_memory_gradient(loss, start, target, steps, rate, [x])
    return whole, full, value, by_x, by_rate


def test_constant_memory_is_exact_for_one_step():
    """With the true factor 2; the released code of TESLA has half of this gradient."""
    whole, full, value, by_x, by_rate = both_gradients(1)
    assert float(value) == pytest.approx(float(whole.detach()), rel=1e-12)
    assert torch.allclose(by_x, full[0], rtol=1e-9) and torch.allclose(by_rate, full[1], rtol=1e-9)


def test_constant_memory_is_close_for_five_steps():
    whole, full, value, by_x, _ = both_gradients(5)
    assert float(value) == pytest.approx(float(whole.detach()), rel=1e-12)
    cosine = float((by_x * full[0]).sum() / by_x.norm() / full[0].norm())
    assert cosine > 0.95
    assert 0.8 < float(by_x.norm() / full[0].norm()) < 1.25


def test_memory_does_not_grow_with_the_steps():
    def constant(steps):
        loss, start, target, x, rate = small_problem(steps)
        return saved_bytes(lambda: constant_memory_gradient(loss, start, target, steps, rate, [x]))

    def full(steps):
        loss, start, target, _, rate = small_problem(steps)
        return saved_bytes(lambda: trajectory_distance(unroll(loss, start, steps, rate)[-1], start, target).backward())

    assert constant(40) <= 1.15 * constant(5)
    assert full(40) > 4 * full(5)


def test_a_surrogate_has_the_given_value_and_gradients():
    a, b = wide(3).requires_grad_(True), wide(2, 2, seed=1).requires_grad_(True)
    loss = surrogate(torch.tensor(2.5, dtype=torch.float64), {a: torch.ones(3), b: torch.full((2, 2), 3.0)})
    (2 * loss).backward()
    assert float(loss.detach()) == 2.5
    assert torch.equal(a.grad, torch.full((3,), 2.0).double()) and torch.equal(b.grad, torch.full((2, 2), 6.0).double())


# ---- experts ----


def test_gsam_without_perturbation_is_the_gradient():
    w = nn.Parameter(wide(5))
    loss = lambda: (w**4).sum()  # noqa: E731
    value, (direction,) = gsam_direction(loss, [w], rho=0.0, alpha=0.0)
    assert torch.allclose(direction, 4 * w.detach() ** 3) and float(value) == pytest.approx(float((w**4).sum()))


@pytest.mark.parametrize("adaptive", [True, False])
def test_gsam_against_an_independent_formula(adaptive):
    w = nn.Parameter(wide(6))
    before = w.detach().clone()
    rho, alpha = 0.1, 0.4
    gradient = lambda v: 4 * v**3  # noqa: E731
    v = w.detach().numpy()
    g = 4 * v**3
    e = rho * g * v * v / np.sqrt(((np.abs(v) * g) ** 2).sum()) if adaptive else rho * g / np.linalg.norm(g)
    moved = gradient(v + e)
    along = (g @ moved) / np.linalg.norm(moved) ** 2
    expected = moved - alpha * (g - along * moved)
    _, (direction,) = gsam_direction(lambda: (w**4).sum(), [w], rho, alpha, adaptive)
    assert np.allclose(direction.numpy(), expected, rtol=1e-8)
    assert torch.equal(w.detach(), before)


def test_the_gradient_penalty_is_zero_for_a_map_of_unit_slope():
    x = wide(3, 1, 4, 4).requires_grad_(True)
    u = torch.ones(16, dtype=torch.float64) / 4  # length 1
    assert float(gradient_penalty((x.flatten(1) @ u)[:, None], x)) == pytest.approx(0, abs=1e-12)
    assert float(gradient_penalty((x.flatten(1) @ (3 * u))[:, None], x)) == pytest.approx(4.0)


def test_balance_of_start_epochs():
    assert balance(10, 20) == pytest.approx(math.log(8, 5)) and balance(9, 20) == pytest.approx(1 / math.log(9, 5))
    assert balance(19, 20) > balance(10, 20) > 1 > balance(9, 20) > balance(0, 20)


# ---- inversion ----


def test_statistics_at_batch_norm_inputs():
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 3, 3)
    network = nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), second, nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2))
    x = torch.randn(6, 1, 8, 8)
    network(x)
    network.eval()
    reader = inversion.BatchStatistics(network)
    logits, distance = reader(x, first=10.0)
    expected, value = 0.0, x
    for number, layer in enumerate(network):
        if isinstance(layer, nn.BatchNorm2d):
            array = value.detach().numpy().transpose(1, 0, 2, 3).reshape(value.shape[1], -1)
            gap = np.linalg.norm(array.var(1) - layer.running_var.numpy()) + np.linalg.norm(array.mean(1) - layer.running_mean.numpy())
            expected += gap * (10 if number == 1 else 1)
        value = layer(value)
    assert float(distance) == pytest.approx(expected, rel=1e-4) and torch.allclose(logits, value)
    reader.close()
    with pytest.raises(UserError, match="no BatchNorm"):
        inversion.BatchStatistics(nn.Linear(2, 2), "teacher a")


def test_equal_statistics_cost_nothing():
    m, v = [wide(3)], [wide(3, seed=1).abs()]
    assert float(statistics_distance(m, v, m, v)) == 0
    with pytest.raises(UserError):
        statistics_distance([], [], [], [])


def test_variation_of_a_step():
    """A vertical edge of height 1 over H rows: right neighbours differ in H places, both diagonals in H - 1."""
    x = torch.zeros(1, 1, 5, 6, dtype=torch.float64)
    x[..., 3:] = 1
    assert float(image_variation(x)) == pytest.approx(math.sqrt(5) + 0 + 2 * math.sqrt(4))


def test_a_crop_of_the_whole_square_changes_nothing():
    torch.manual_seed(1)
    for _ in range(20):
        top, left, tall, broad = inversion.crop_box(16, 16, 0.3)
        assert 0 <= top <= 16 - tall and 0 <= left <= 16 - broad
        assert 0.2 < tall * broad / 256 <= 1 and 0.6 < broad / tall < 1.7
    assert inversion.crop_box(16, 16, 1.0, 1.0, (1.0, 1.0)) == (0, 0, 16, 16)
    torch.manual_seed(0)
    x = wide(1, 1, 6, 6).requires_grad_(True)

    def crop(value):
        torch.manual_seed(3)
        return inversion.random_resized_crop(value, 0.3)

    assert torch.autograd.gradcheck(crop, x)


def test_curricula():
    for curve in ("cosine", "linear"):
        assert curriculum(0.0, 1.0, 0.08, curve) == pytest.approx(1.0)
        assert curriculum(0.5, 1.0, 0.08, curve) == pytest.approx(0.54)
        assert curriculum(0.4, 0.5, 0.08, curve) > 0.08 == curriculum(0.5, 0.5, 0.08, curve)
    assert curriculum(0.3, 0.5, 0.08, "step") == 1.0 and curriculum(0.6, 0.5, 0.08, "step") == 0.08


def test_votes():
    weights = inversion.committee_weights({"a": 60.0, "b": 65.0, "c": 0.0}, ["a", "b"], 5.0)
    assert weights[1] / weights[0] == pytest.approx(math.e) and sum(weights) == pytest.approx(1)
    assert inversion.committee_weights({}, ["a", "b"], 5.0) == [0.5, 0.5]
    with pytest.raises(UserError, match="teacher d"):
        inversion.committee_weights({"a": 1.0}, ["a", "d"], 5.0)


def test_mixing_keeps_what_it_says():
    torch.manual_seed(0)
    x = torch.rand(6, 1, 8, 8)
    for _ in range(20):
        mixed, other, share, _ = mixing.mixup(x, 0.8)
        assert torch.allclose(mixed, share * x + (1 - share) * x[other]) and 0 <= share <= 1
        mixed, other, share, (top, bottom, left, right) = mixing.cutmix(x, 1.0)
        inside = torch.zeros(8, 8, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert torch.equal(mixed[..., inside], x[other][..., inside]) and torch.equal(mixed[..., ~inside], x[..., ~inside])
        assert share == pytest.approx(float((~inside).float().mean()))
    with pytest.raises(UserError, match="class numbers"):
        mixing.mix_pairs("mixup", x, torch.arange(6), 0.8)
    with pytest.raises(UserError, match="mixup"):
        mixing.mix("mixupp", x, 0.8)


def test_the_mix_is_a_beta_draw():
    torch.manual_seed(0)
    draws = np.array([mixing._beta(0.8) for _ in range(4000)])
    assert draws.mean() == pytest.approx(0.5, abs=0.02) and draws.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.01)


# ---- kernels and self-supervision ----


def test_kernel_ridge_regression_against_the_normal_equations():
    """Dual and primal give the same prediction: Q (S^T S + lambda I)^-1 S^T Y."""
    s, y, q = wide(7, 4), wide(7, 3, seed=1), wide(5, 4, seed=2)
    own, other = (np.c_[z.numpy(), np.ones(len(z))] for z in (s, q))
    strength = 1e-2 * np.trace(own @ own.T)
    primal = other @ np.linalg.solve(own.T @ own + strength * np.eye(5), own.T @ y.numpy())
    assert np.allclose(kernel_ridge_prediction(s, y, q, 1e-2).numpy(), primal)


def test_kernel_ridge_regression_gradient():
    """By finite differences; the ridge's strength is detached, so it is held fixed here through a support of fixed trace."""
    y, q = wide(3, 2, seed=1).requires_grad_(True), wide(4, 5, seed=2)
    s = wide(3, 5)
    assert torch.autograd.gradcheck(lambda t: kernel_ridge_prediction(s, t, q, 1e-3), y)
    angle = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)  # a rotation keeps the trace

    def rotated(a):
        first = torch.stack([a.cos() * s[:, 0] - a.sin() * s[:, 1], a.sin() * s[:, 0] + a.cos() * s[:, 1]], 1)
        return kernel_ridge_prediction(torch.cat([first, s[:, 2:]], 1), y.detach(), q, 1e-3)

    assert torch.autograd.gradcheck(rotated, angle)
    with pytest.raises(UserError, match="ridge"):
        kernel_ridge_prediction(s, y, q, 0.0)


def test_barlow_twins():
    z = wide(64, 5)
    q, _ = torch.linalg.qr(z - z.mean(0))
    assert float(barlow_twins(q, q)) == pytest.approx(0, abs=1e-9)  # equal views, uncorrelated features
    assert float(barlow_twins(q, -q)) == pytest.approx(4 * 5)
    doubled = torch.cat([q[:, :1], q[:, :1]], 1)
    assert float(barlow_twins(doubled, doubled, 0.01)) == pytest.approx(0.02)


# ---- selection, students, scores ----


def test_herding_follows_the_mean_greedily():
    x = wide(12, 3)
    chosen = selection.herding(x, 4).tolist()
    picked = []
    for k in range(1, 5):
        options = [(float(((x[[*picked, i]].sum(0)) / k - x.mean(0)).norm()), i) for i in range(12) if i not in picked]
        picked.append(min(options)[1])
    assert chosen == picked


def test_k_center_takes_the_farthest_and_never_twice():
    x = torch.tensor([[0.0], [1.0], [10.0], [10.0], [-4.0]])
    chosen = selection.k_center(x, 5).tolist()
    assert sorted(chosen) == [0, 1, 2, 3, 4] and x[chosen[1], 0] in (10.0, -4.0)


def test_nearest_to_centres_are_distinct():
    x = torch.cat([torch.zeros(3, 2), torch.ones(3, 2) * 5])
    assert len(set(selection.nearest_to_centres(x, 4, 0).tolist())) == 4


def test_student_losses():
    z, rows = wide(4, 3), wide(4, 3, seed=1)
    p = (rows / 2).softmax(1)
    kl = (p * (p.log() - (z / 2).log_softmax(1))).sum(1).mean()
    assert float(lesson_loss(z, rows, "kl", 2.0)) == pytest.approx(float(kl))  # no factor T^2
    crossed = -(rows.softmax(1) * z.log_softmax(1)).sum(1).mean()
    assert float(lesson_loss(z, rows, "soft_ce")) == pytest.approx(float(crossed))
    y = torch.tensor([0, 2, 1, 1])
    assert float(lesson_loss(z, y)) == pytest.approx(float(F.cross_entropy(z, y)))
    assert float(lesson_loss(z, F.one_hot(y, 3).double())) == pytest.approx(float(F.cross_entropy(z, y)))


def test_robust_scores():
    """alpha = 0 gives 0.2689; fractions, not percent; more is better."""
    assert label_robust(0.6, 0.6, 0.9, 0.9) == pytest.approx((1 - math.exp(-1)) / (math.e - math.exp(-1)))
    assert label_robust(0.6, 0.6, 0.9, 0.9) == pytest.approx(0.2689, abs=1e-4)
    assert label_robust(1, 0, 0, 0) <= 1 and label_robust(0, 1, 0, 1) == pytest.approx(0)
    assert label_robust(0.7, 0.6, 0.5, 0.9) > label_robust(0.65, 0.6, 0.5, 0.9) > label_robust(0.65, 0.6, 0.4, 0.9)
    assert augmentation_robust(0.6, 0.6, 0.5, 0.5) == pytest.approx(0.2689, abs=1e-4)


def test_fresh_draws_again_in_place():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = network[0].weight.clone()
    fresh(network)
    assert not torch.equal(network[0].weight, before)

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

    with pytest.raises(UserError, match="initialised again"):
        fresh(nn.Sequential(Bare()))
