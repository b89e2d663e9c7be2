"""Losses of generators against definitions, and against Gaussians whose divergences are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.diffusion import Flow, Mixture, exact_denoiser, make_process
from limbeck.errors import UserError
from limbeck.losses import generation

torch.set_num_threads(1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=tolerance, atol=tolerance)


# ---- fields ----


@pytest.mark.parametrize("shape", [(3,), (2, 5), (4, 1, 3, 3)])
def test_the_gradient_of_a_field_is_the_direction(shape):
    x, d = normal(*shape).requires_grad_(), normal(*shape, seed=1).requires_grad_()
    value = generation.field_loss(x, d)
    close(value.detach(), 0.5 * (d.detach() ** 2).mean())
    value.backward()
    close(x.grad, d.detach() / d.numel())
    assert d.grad is None


def test_the_direction_of_matching_is_the_formula():
    x, teacher, fake = normal(3, 2, 4), normal(3, 2, 4, seed=1), normal(3, 2, 4, seed=2)
    expected = np.stack([(f - t) / np.abs(a - t).mean() for a, t, f in zip(x.numpy(), teacher.numpy(), fake.numpy())])
    close(generation.matching_direction(x, teacher, fake), torch.as_tensor(expected))
    close(generation.pixel_distance(x, teacher), (x - teacher).abs().mean((1, 2), keepdim=True))
    assert generation.pixel_distance(x, teacher).shape == (3, 1, 1)


def test_the_direction_carries_no_gradient_and_survives_a_perfect_teacher():
    x, teacher, fake = (normal(3, 4, seed=seed).requires_grad_() for seed in range(3))
    assert not generation.matching_direction(x, teacher, fake).requires_grad
    assert not generation.pixel_distance(x, teacher).requires_grad
    assert generation.matching_direction(x, x, x).abs().max() == 0
    far = torch.full((1, 4), float("inf"))
    assert generation.matching_direction(torch.zeros(1, 4), far, far).isfinite().all()
    close(generation.pixel_distance(x, x).flatten(), [1e-6] * 3)


@pytest.mark.parametrize("name", ["flow", "trig", "edm", "ddpm"])
def test_distribution_matching_is_the_gradient_of_the_divergence_of_two_gaussians(name):
    """With x = m + s n, the mean direction is sigma^2/alpha^2 times the slope of KL(N(m_t, v_t) || teacher) in m, and drives s likewise."""
    process = make_process(name)
    m, s, mean, std = 0.7, 0.4, -0.5, 0.9  # the generator's, the teacher's
    teacher = exact_denoiser(Mixture(torch.full((1, 1), mean, dtype=torch.float64), std), process, "x0")
    fake = exact_denoiser(Mixture(torch.full((1, 1), m, dtype=torch.float64), s), process, "x0")
    count = 20000
    n, z = normal(count, 1), normal(count, 1, seed=1)
    n, z = (n - n.mean()) / n.std(correction=0), z - z.mean()
    z = z - (z * n).mean() * n
    z = z / z.std(correction=0)  # exact first and second moments: affine formulas then hold exactly
    level = torch.tensor([0.6], dtype=torch.float64)
    t = process.time_at(level)
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    location = torch.tensor(m, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(s, dtype=torch.float64, requires_grad=True)
    x = location + scale * n
    at, times = process.diffuse(x, z, t).detach(), t.expand(count)
    generation.field_loss(x, fake.x0(at, times) - teacher.x0(at, times)).backward()

    p, q = alpha**2 * s**2 + sigma**2, alpha**2 * std**2 + sigma**2
    # KL = 0.5 (log q/p + (p + alpha^2 (m - mean)^2) / q - 1); X = (x_t + sigma^2 score) / alpha
    assert float(location.grad) == pytest.approx(sigma**2 / alpha**2 * alpha**2 * (m - mean) / q, rel=1e-8)
    assert float(scale.grad) == pytest.approx(sigma**2 / alpha**2 * alpha**2 * s * (1 / q - 1 / p), rel=1e-8)
    assert float(location.grad) > 0 and float(scale.grad) < 0  # a step of descent goes to the teacher's mean and width


def test_the_normalised_direction_points_the_same_way():
    t = torch.full((500,), 0.5, dtype=torch.float64)
    x, z = 0.7 + 0.4 * normal(500, 1), normal(500, 1, seed=1)
    teacher = exact_denoiser(Mixture(torch.full((1, 1), -0.5, dtype=torch.float64), 0.9), Flow(), "x0")
    fake = exact_denoiser(Mixture(torch.full((1, 1), 0.7, dtype=torch.float64), 0.4), Flow(), "x0")
    at = Flow().diffuse(x, z, t)
    see, own = teacher.x0(at, t), fake.x0(at, t)
    assert float(generation.matching_direction(x, see, own).mean()) > 0.3
    close(generation.matching_direction(x, see, own) * (x - see).abs(), own - see)


# ---- score identity ----


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_the_score_identity_is_the_formula(alpha):
    x, teacher, fake = normal(3, 2, 4), normal(3, 2, 4, seed=1), normal(3, 2, 4, seed=2)
    rows = [
        ((t - f) * ((t - a) - alpha * (t - f))).mean() / np.abs(a - t).mean() for a, t, f in zip(x.numpy(), teacher.numpy(), fake.numpy())
    ]
    close(generation.score_identity(x, teacher, fake, alpha), np.mean(rows))
    if alpha == 1:
        close(generation.score_identity(x, teacher, fake), np.mean(rows))


def test_the_score_identity_is_zero_where_fake_and_teacher_agree():
    x = normal(3, 4).requires_grad_()
    seen = torch.tanh(x)
    value = generation.score_identity(x, seen, seen)
    assert float(value.detach()) == 0
    value.backward()
    assert x.grad.abs().max() == 0
    assert generation.score_identity(x, x, x).isfinite()


@pytest.mark.parametrize("alpha", [0.7, 1.0, 1.2])
def test_gradients_of_the_score_identity_run_through_all_three(alpha):
    x, teacher, fake = (normal(2, 3, seed=seed).requires_grad_() for seed in range(3))
    generation.score_identity(x, teacher, fake, alpha).backward()
    with torch.no_grad():
        gap, weight = teacher - fake, (x - teacher).abs().mean(1, keepdim=True) * x.numel()
        close(x.grad, -gap / weight)
        close(fake.grad, (-(teacher - x) + 2 * alpha * gap) / weight)
        close(teacher.grad, ((teacher - x) + gap - 2 * alpha * gap) / weight)


def test_the_score_identity_is_a_multiple_of_the_fisher_divergence_of_gaussians():
    """With the fake at its optimum, E gap (X_T - x - alpha gap) = (1 - alpha) E gap^2, and the gap is b^2/a of that of the scores."""
    m, s, mean, std, level = 0.7, 0.4, -0.5, 0.9, 0.5
    count = 40000
    n, z = normal(count, 1), normal(count, 1, seed=1)
    n = (n - n.mean()) / n.std(correction=0)
    z = z - z.mean() - (z * n).mean() * n
    z = z / z.std(correction=0)
    t = torch.full((count,), level, dtype=torch.float64)
    a, b = 1 - level, level
    p, q = a * a * s * s + b * b, a * a * std**2 + b * b
    teacher = exact_denoiser(Mixture(torch.full((1, 1), mean, dtype=torch.float64), std), Flow(), "x0")
    fake = exact_denoiser(Mixture(torch.full((1, 1), m, dtype=torch.float64), s), Flow(), "x0")

    def loss(location, alpha):
        x = location + s * n
        at = Flow().diffuse(x, z, t)
        see, own = teacher.x0(at, t), fake.x0(at, t)
        return (generation.score_identity(x, see, own, alpha) * 1.0, x, see, own)

    # scores: s_T = -(x - a mean)/q, s_F = -(x - a m)/p; X_T - X_F = (b^2/a) (s_T - s_F); E over x_t ~ N(a m, p)
    fisher = a * a * (m - mean) ** 2 / q**2 + p * (1 / p - 1 / q) ** 2
    gap2 = b**4 / a**2 * fisher
    for alpha in (0.5, 1.0, 1.2):
        location = torch.tensor(m, dtype=torch.float64, requires_grad=True)
        _, x, see, own = loss(location, alpha)
        # at the fake's optimum E gap (X_F - x) = 0, so E gap ((X_T - x) - alpha gap) = (1 - alpha) E gap^2
        weight = (x - see).abs().detach()
        plain = float((generation.score_identity(x * 1.0, see, own, alpha)).detach())
        by_hand = float((((see - own) * ((see - x) - alpha * (see - own))) / weight).mean().detach())
        assert plain == pytest.approx(by_hand, rel=1e-9)
        unweighted = float(((see - own) * ((see - x) - alpha * (see - own))).mean().detach())
        assert unweighted == pytest.approx((1 - alpha) * gap2, rel=1e-8, abs=1e-12)
    # against finite differences, with the normaliser held as the paper holds it
    location = torch.tensor(m, dtype=torch.float64, requires_grad=True)
    value, x, see, _ = loss(location, 1.2)
    (slope,) = torch.autograd.grad(value, location)
    frozen = (x - see).abs().detach()

    def held(place):
        _, x, see, own = loss(torch.tensor(place, dtype=torch.float64), 1.2)
        return float(((see - own) * ((see - x) - 1.2 * (see - own)) / frozen).mean())

    assert float(slope) == pytest.approx((held(m + 1e-5) - held(m - 1e-5)) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("alpha", [0.7, 1.0, 1.2])
def test_the_score_identity_moves_the_generator_to_the_teacher(alpha):
    """One pixel of every sample at the same distance from what the teacher sees: the loss is then the plain form over that distance."""
    a = b = 0.5
    m, s, mean, std = 0.7, 0.4, -0.5, 0.9
    p, q = a * a * s * s + b * b, a * a * std**2 + b * b
    n, z = normal(20000, 1), normal(20000, 1, seed=1)
    n = (n - n.mean()) / n.std(correction=0)
    z = z - z.mean() - (z * n).mean() * n
    z = z / z.std(correction=0)
    location = torch.tensor(m, dtype=torch.float64, requires_grad=True)
    x = (location + s * n).T  # one sample of many pixels, so one normaliser for all of them
    at = a * x + b * z.T

    def see(centre, variance):
        return (at - b * b * (at - a * centre) / variance) / a

    loss = generation.score_identity(x, see(mean, q), see(m, p), alpha)
    weight = float((x - see(mean, q)).abs().mean().detach())
    (slope,) = torch.autograd.grad(loss, location)
    # d/dm at a fixed fake of E gap (X_T - x - alpha gap), gap = (b^2/a)(s_T - s_F), all affine in x_t with mean a m
    k = b * b / a
    gap, d_gap = -k * a * (m - mean) / q, k * a * (1 / p - 1 / q)
    rest, d_rest = -k * a * (m - mean) / q, a / a * (1 - b * b / q) - 1
    expected = d_gap * (rest - alpha * gap) + gap * (d_rest - alpha * d_gap)
    assert float(slope) * weight == pytest.approx(expected, rel=1e-7)
    if alpha == 1:
        assert float(slope) > 0  # downhill is towards the teacher's mean


# ---- adversarial games ----


P, Q = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.4, 0.25, 0.25, 0.1])
"""A real and a generated distribution over four things, in twentieths."""


def draws(values):
    """Logits of a discriminator on both sides: each of the four things as often as it occurs in twenty."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return values.repeat_interleave(torch.as_tensor((P * 20).round()).long()), values.repeat_interleave(
        torch.as_tensor((Q * 20).round()).long()
    )


OPTIMA = {
    "non-saturating": (np.log(P / Q), 2 * math.log(2) - (P * np.log(2 * P / (P + Q)) + Q * np.log(2 * Q / (P + Q))).sum()),
    "hinge": (np.sign(P - Q), 2 - np.abs(P - Q).sum()),
    "least-squares": (P / (P + Q), (P * Q / (P + Q)).sum()),
}


@pytest.mark.parametrize("kind", generation.ADVERSARIAL)
def test_the_best_critic_has_the_value_of_its_divergence(kind):
    best, value = OPTIMA[kind]
    logits = torch.tensor(best, dtype=torch.float64, requires_grad=True)
    real = logits.repeat_interleave(torch.as_tensor((P * 20).round()).long())
    fake = logits.repeat_interleave(torch.as_tensor((Q * 20).round()).long())
    loss = generation.critic_loss(real, fake, kind)
    close(loss.detach(), value)
    if kind != "hinge":  # which has a corner there
        (slope,) = torch.autograd.grad(loss, logits)
        assert slope.abs().max() < 1e-12
    for seed in range(10):
        assert float(generation.critic_loss(*draws(best + 0.3 * normal(4, seed=seed).numpy()), kind)) >= value


@settings(max_examples=30, derandomize=True, deadline=None)
@given(real=st.lists(st.floats(-30, 30), min_size=1, max_size=4), fake=st.lists(st.floats(-30, 30), min_size=1, max_size=4))
def test_adversarial_losses_are_their_definitions(real, fake):
    r, f = np.array(real), np.array(fake)
    a, b = torch.tensor(real, dtype=torch.float64), torch.tensor(fake, dtype=torch.float64)
    close(generation.critic_loss(a, b), np.logaddexp(0, f).mean() + np.logaddexp(0, -r).mean(), 1e-7)
    close(generation.critic_loss(a, b, "hinge"), np.maximum(0, 1 - r).mean() + np.maximum(0, 1 + f).mean())
    close(generation.critic_loss(a, b, "least-squares"), ((r - 1) ** 2).mean() + (f**2).mean())
    close(generation.fooling_loss(b), np.logaddexp(0, -f).mean(), 1e-7)
    close(generation.fooling_loss(b, "hinge"), -f.mean())
    close(generation.fooling_loss(b, "least-squares"), ((f - 1) ** 2).mean())


@pytest.mark.parametrize("kind", generation.ADVERSARIAL)
def test_critic_and_generator_pull_against_each_other(kind):
    fake = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (critic,) = torch.autograd.grad(generation.critic_loss(torch.zeros(2, dtype=torch.float64), fake + 0.2, kind), fake)
    (fool,) = torch.autograd.grad(generation.fooling_loss(fake + 0.2, kind), fake)
    assert (critic > 0).all() and (fool < 0).all()


def test_unknown_games_are_named():
    for call in (
        lambda: generation.critic_loss(torch.ones(1), torch.ones(1), "wgan"),
        lambda: generation.fooling_loss(torch.ones(1), "hing"),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert error.value.hint and "\n" not in str(error.value)


def test_the_gradient_penalty_of_a_quadratic():
    a = normal(6, 6)
    a = a + a.T
    x = normal(5, 2, 3, seed=1).requires_grad_()
    weight = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    flat = x.flatten(1)
    logits = weight * 0.5 * ((flat @ a) * flat).sum(1)
    value = generation.gradient_penalty(logits, x)
    slopes = (x.detach().flatten(1) @ a).numpy()
    close(value.detach(), 0.5 * (1.5**2) * (slopes**2).sum(1).mean())
    (of_weight,) = torch.autograd.grad(value, weight)
    close(of_weight, 1.5 * (slopes**2).sum(1).mean())


# ---- distances ----


@settings(max_examples=30, derandomize=True, deadline=None)
@given(size=st.floats(1e-3, 1e3), scale=st.floats(1e-3, 10), d=st.integers(1, 6))
def test_pseudo_huber_is_the_formula(size, scale, d):
    error = size * normal(3, d, 2)
    c = scale * 2 * d
    expected = (np.sqrt((error.numpy() ** 2).sum((1, 2)) + c**2) - c) / (2 * d)
    close(generation.pseudo_huber(error, scale), torch.as_tensor(expected), 1e-9)


def test_pseudo_huber_is_square_for_small_and_plain_for_large_errors():
    error = normal(4, 3, 5)
    length = error.flatten(1).norm(dim=1)
    close(generation.pseudo_huber(1e-4 * error, 1.0), (1e-4 * length) ** 2 / (2 * 15 * 15), 1e-6)
    close(generation.pseudo_huber(1e6 * error, 1.0), 1e6 * length / 15, 1e-5)
    close(generation.pseudo_huber(error), ((length**2 + (0.00054 * 15) ** 2).sqrt() - 0.00054 * 15) / 15)
    zero = torch.zeros(2, 3, requires_grad=True)
    generation.pseudo_huber(zero).sum().backward()
    assert generation.pseudo_huber(zero).shape == (2,) and zero.grad.abs().max() == 0


def test_the_discrepancy_against_a_double_loop():
    generated, real = normal(4, 3) * 1.3 + 0.4, normal(6, 3, seed=1) * torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    mean, std = real.numpy().mean(0), real.numpy().std(0, ddof=1)
    u, v = (generation_.numpy() for generation_ in (generated, real))
    u, v = (u - mean) / std, (v - mean) / std

    def kernel(a, b):
        return sum(math.exp(-((one - other) ** 2).sum() / (2 * 3)) for one in a for other in b) / (len(a) * len(b))

    close(generation.gaussian_mmd(generated, real), kernel(u, u) + kernel(v, v) - 2 * kernel(u, v))
    close(generation.gaussian_mmd(real, real), 0.0)
    close(generation.gaussian_mmd(generated * 3 + 1, real * 3 + 1), generation.gaussian_mmd(generated, real))


def test_the_discrepancy_teaches_the_generated_side_alone():
    generated, real = normal(4, 3).requires_grad_(), normal(6, 3, seed=1).requires_grad_()
    generation.gaussian_mmd(generated, real).backward()
    assert real.grad is None and generated.grad.abs().max() > 0
    x = normal(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: generation.gaussian_mmd(x, real.detach()), x)
    constant = torch.ones(5, 3, dtype=torch.float64)
    assert generation.gaussian_mmd(generated.detach(), constant).isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype):
    x, y, z = (normal(3, 4, seed=seed).to(dtype) for seed in range(3))
    for one in (
        generation.field_loss(x, y),
        generation.matching_direction(x, y, z),
        generation.score_identity(x, y, z),
        generation.critic_loss(x, y),
        generation.fooling_loss(x),
        generation.pseudo_huber(x),
        generation.gaussian_mmd(x, y),
    ):
        assert one.dtype == torch.float32 and one.isfinite().all()
    close(generation.score_identity(x, y, z), generation.score_identity(x.double(), y.double(), z.double()).float(), 1e-4)


def test_the_docstring_runs():
    import doctest

    assert doctest.testmod(generation).failed == 0
