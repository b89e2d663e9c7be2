"""Noise processes and denoisers against formulas written out here, in numpy and float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from limbeck.diffusion import PREDICTIONS, Denoiser, Discrete, Flow, Guidance, Mixture, Trig, exact_denoiser, make_process
from limbeck.errors import UserError

torch.set_num_threads(1)
FACTS = {
    "flow": "flow",
    "flow-3": {"name": "flow", "shift": 3.0},
    "trig": "trig",
    "cosine": "cosine",
    "edm": "edm",
    "ddpm": "ddpm",
    "ddpm-scaled": "ddpm-scaled",
    "ddpm-cosine": "ddpm-cosine",
}
PROCESSES = {name: make_process(facts) for name, facts in FACTS.items()}
INSIDE = {"flow": (0.02, 0.98), "flow-3": (0.02, 0.98), "trig": (0.03, 1.54), "cosine": (0.02, 0.98), "edm": (0.01, 75.0)}
ENDS = {"flow": (0, 1), "flow-3": (0, 1), "trig": (0, math.pi / 2), "cosine": (0, 1), "edm": (0, 80)}
each = pytest.mark.parametrize("name", PROCESSES)
SD = 0.5


def inside(name):
    return INSIDE.get(name, (-0.7, 985.0))


def ends(name):
    return ENDS.get(name, (-1, 999))


def products(name):
    if name == "ddpm":
        betas = np.linspace(1e-4, 0.02, 1000)
    elif name == "ddpm-scaled":
        betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    else:
        bar = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    return np.cumprod(1 - betas)


PRODUCTS = {name: products(name) for name in ("ddpm", "ddpm-scaled", "ddpm-cosine")}


def coefficients(name, t):
    """alpha and sigma as numpy, from the papers."""
    t = np.asarray(t, dtype=np.float64)
    if name.startswith("flow"):
        return 1 - t, t
    if name == "trig":
        return np.cos(t), np.sin(t)
    if name == "cosine":
        return np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)
    if name == "edm":
        return np.ones_like(t), t
    bar = PRODUCTS[name]
    half = 0.5 * np.log(bar / (1 - bar))
    level = np.interp(t, np.arange(1000), half)
    sigma = np.where(t < 0, (t + 1) * np.sqrt(1 - bar[0]), 1 / np.sqrt(1 + np.exp(2 * level)))
    return np.sqrt(1 - sigma**2), sigma


def time_of(name, angle):
    """The time at which atan(sigma / alpha) is `angle`."""
    if name.startswith("flow"):
        return np.sin(angle) / (np.sin(angle) + np.cos(angle))
    if name == "trig":
        return angle
    if name == "cosine":
        return 2 * angle / np.pi
    if name == "edm":
        return np.tan(angle)
    bar = PRODUCTS[name]
    first = math.sqrt(1 - bar[0])
    inner = np.interp(np.log(np.tan(angle)), 0.5 * np.log((1 - bar) / bar), np.arange(1000))
    return np.where(np.sin(angle) < first, np.sin(angle) / first - 1, inner)


def inner_times(name, count=9, seed=0):
    low, high = inside(name)
    return low + (high - low) * torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def column(a):
    return torch.as_tensor(np.asarray(a), dtype=torch.float64).reshape(-1, 1, 1)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, torch.as_tensor(np.asarray(b), dtype=a.dtype), rtol=tolerance, atol=tolerance)


def one_line(error):
    assert error.value.hint and "\n" not in error.value.message and "\n" not in str(error.value)


# ---- alpha, sigma and what is made of them ----


@each
def test_alpha_and_sigma_are_those_of_the_paper(name):
    process, t = PROCESSES[name], inner_times(name, 40)
    whole = torch.tensor([0.0, 1.0]) if ends(name)[1] <= 80 else torch.tensor([-1.0, -0.5, 0.0, 1.0, 500.0, 999.0])
    for times in (t, whole.double()):
        alpha, sigma = coefficients(name, times.numpy())
        close(process.alpha(times), alpha, 1e-10)
        close(process.sigma(times), sigma, 1e-10)
    alpha, sigma = coefficients(name, t.numpy())
    close(process.log_snr(t), np.log(alpha / sigma))
    close(process.angle(t), np.arctan(sigma / alpha))
    close(process.scale(t), np.sqrt(alpha**2 + sigma**2))


@each
def test_the_ends_are_data_and_noise(name):
    process = PROCESSES[name]
    assert (process.t_data, process.t_noise) == ends(name)
    edges = torch.tensor([process.t_data, process.t_noise], dtype=torch.float64)
    close(process.alpha(edges)[0], 1.0)
    close(process.sigma(edges)[0], 0.0)
    assert float(process.alpha(edges)[1] / process.sigma(edges)[1]) < (0.07 if name == "ddpm-scaled" else 0.0126)
    position = process.position(edges)
    close(position, [0.0, 1.0])


@each
def test_the_signal_falls_and_the_noise_rises(name):
    process = PROCESSES[name]
    t = torch.linspace(*inside(name), 500, dtype=torch.float64)
    assert (process.log_snr(t).diff() < 0).all() and (process.angle(t).diff() > 0).all() and (process.position(t).diff() >= 0).all()


@each
@settings(max_examples=30, derandomize=True, deadline=None)
@given(place=st.floats(0, 1), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_the_time_at_an_angle_is_the_inverse_of_the_angle(name, place, dtype):
    low, high = inside(name)
    t = torch.tensor([low + (high - low) * place], dtype=dtype)
    again = PROCESSES[name].time_at(PROCESSES[name].angle(t))
    assert again.dtype == dtype
    torch.testing.assert_close(again, t, rtol=1e-9 if dtype is torch.float64 else 2e-5, atol=1e-8 if dtype is torch.float64 else 5e-3)


@each
def test_the_time_at_an_angle_is_the_formula_and_stays_within_the_process(name):
    process = PROCESSES[name]
    angles = np.linspace(0.03, 1.49, 50)
    close(process.time_at(torch.as_tensor(angles)), time_of(name, angles), 1e-8)
    for dtype in (torch.float32, torch.float64):
        edges = process.time_at(torch.tensor([0.0, math.pi / 2], dtype=dtype))
        torch.testing.assert_close(edges, torch.tensor([process.t_data, process.t_noise], dtype=dtype), rtol=1e-5, atol=1e-6)


@each
def test_slopes_against_central_differences(name):
    process = PROCESSES[name]
    t = inner_times(name, 60)
    if name.startswith("ddpm"):  # between whole steps: there are corners at them
        t = t.floor() + 0.1 + 0.8 * (t - t.floor())
    h = 1e-5
    alpha, sigma = process.slopes(t)
    (before, low), (after, high) = coefficients(name, t.numpy() - h), coefficients(name, t.numpy() + h)
    close(alpha, (after - before) / (2 * h), 1e-7)
    close(sigma, (high - low) / (2 * h), 1e-7)


@each
def test_slopes_in_a_single_precision_batch_before_the_first_step(name):
    process = PROCESSES[name]
    t = torch.tensor([process.t_data, 0.5 * process.t_data], dtype=torch.float32)
    alpha, sigma = process.slopes(t)
    assert alpha.dtype == sigma.dtype == torch.float32 and alpha.isfinite().all() and sigma.isfinite().all()
    assert (sigma > 0).all() and (alpha <= 0).all()


# ---- predictions ----


def prediction(name, kind, x0, z, t):
    """What a network of a kind would say, from `_notation`."""
    alpha, sigma = (column(part) for part in coefficients(name, t.numpy()))
    if kind == "x0":
        return x0
    if kind == "noise":
        return z
    if kind == "v":
        return alpha * z - sigma * x0
    if kind == "score":
        return -z / sigma
    if kind == "edm":
        s, y = sigma / alpha, x0 + sigma / alpha * z
        skip, out = SD**2 / (s**2 + SD**2), s * SD / (s**2 + SD**2).sqrt()
        return (x0 - skip * y) / out
    if name.startswith("flow"):
        return z - x0
    if name == "trig":
        return alpha * z - sigma * x0
    if name == "cosine":
        return math.pi / 2 * (alpha * z - sigma * x0)
    if name == "edm":
        return z
    h = 1e-5
    (before, low), (after, high) = coefficients(name, t.numpy() - h), coefficients(name, t.numpy() + h)
    return (column(after - before) * x0 + column(high - low) * z) / (2 * h)


@pytest.mark.parametrize("kind", PREDICTIONS)
@each
def test_every_prediction_is_its_formula_and_comes_back(name, kind):
    process, t = PROCESSES[name], inner_times(name)
    if name.startswith("ddpm"):
        t = t.floor() + 0.1 + 0.8 * (t - t.floor())
    x0, z = normal(9, 2, 3), normal(9, 2, 3, seed=1)
    alpha, sigma = (column(part) for part in coefficients(name, t.numpy()))
    x = alpha * x0 + sigma * z
    close(process.diffuse(x0, z, t), x)
    value = prediction(name, kind, x0, z, t)
    close(process.read(kind, x0, z, t), value, 1e-6 if kind == "velocity" else 1e-8)
    data, noise = process.parts(kind, process.read(kind, x0, z, t), x, t)
    close(data, x0, 1e-7)
    close(noise, z, 1e-7)
    for target in PREDICTIONS:
        close(process.convert(kind, target, value, x, t), prediction(name, target, x0, z, t), 1e-5)


@each
def test_parts_always_add_up_to_the_state(name):
    """Whatever a network says, however wrong, alpha x0 + sigma z is the state."""
    process, t = PROCESSES[name], inner_times(name, seed=4)
    x, wrong = normal(9, 2, 3, seed=2), normal(9, 2, 3, seed=3)
    alpha, sigma = (column(part) for part in coefficients(name, t.numpy()))
    for kind in PREDICTIONS:
        data, noise = process.parts(kind, wrong, x, t)
        close(alpha * data + sigma * noise, x, 1e-8)
        close(process.read(kind, data, noise, t), wrong, 1e-6)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(sd=st.floats(0.1, 3), sigma=st.floats(0.01, 50))
def test_the_preconditioning_knows_the_deviation_of_the_data(sd, sigma):
    x0, z, t = normal(1, 3), normal(1, 3, seed=1), torch.tensor([sigma], dtype=torch.float64)
    process, x = PROCESSES["edm"], x0 + sigma * z
    raw = process.read("edm", x0, z, t, sd)
    close(raw, (x0 - sd**2 / (sigma**2 + sd**2) * x) * math.sqrt(sigma**2 + sd**2) / (sigma * sd), 1e-8)
    close(process.parts("edm", raw, x, t, sd)[0], x0, 1e-8)
    close(process.convert("edm", "score", raw, x, t, sd), (x0 - x) / sigma**2, 1e-7)


@each
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_both_ends_stay_finite(name, kind):
    process = PROCESSES[name]
    for dtype in (torch.float32, torch.float64):
        t = torch.tensor([process.t_data, process.t_noise], dtype=dtype)
        x0, z = normal(2, 3).to(dtype), normal(2, 3, seed=1).to(dtype)
        x = process.diffuse(x0, z, t)
        data, noise = process.parts(kind, process.read(kind, x0, z, t), x, t)
        assert data.isfinite().all() and noise.isfinite().all()
        torch.testing.assert_close(data[0], x0[0], rtol=1e-3, atol=1e-3)
        if name != "edm":  # at 80 the data is one part in eighty
            torch.testing.assert_close(noise[1], z[1], rtol=1e-2, atol=2e-2)


# ---- from a level to a noisier one ----


@each
@settings(max_examples=20, derandomize=True, deadline=None)
@given(places=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)).map(sorted))
def test_noise_on_noise_is_noise(name, places):
    """The mean and the variance after s -> t are those of 0 -> t, also with a stop on the way."""
    process = PROCESSES[name]
    low, high = inside(name)
    s, m, t = (torch.tensor([low + (high - low) * place], dtype=torch.float64) for place in places)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    (a, b), (alpha, sigma) = coefficients(name, s.numpy()), coefficients(name, t.numpy())

    def gain(start, end):
        return process.noisier(one, start, end, zero), process.noisier(zero, start, end, one)

    (kept, added), (kept1, added1), (kept2, added2) = gain(s, t), gain(s, m), gain(m, t)
    close(kept * a, alpha[None], 1e-8)
    close((kept * b) ** 2 + added**2, sigma[None] ** 2, 1e-8)
    close(kept2 * kept1 * a, alpha[None], 1e-8)
    close((kept2 * kept1 * b) ** 2 + (kept2 * added1) ** 2 + added2**2, sigma[None] ** 2, 1e-8)
    close(process.noisier(one, s, s, one), one, 1e-6)


# ---- times ----


def kolmogorov(values, cdf):
    values = np.sort(values.double().numpy())
    exact, n = cdf(values), len(values)
    gap = max(np.abs(exact - np.arange(n) / n).max(), np.abs(np.arange(1, n + 1) / n - exact).max())
    assert gap < 1.63 / math.sqrt(n), gap  # one in a hundred, of a fixed seed


def phi(x):
    return 0.5 * (1 + np.vectorize(math.erf)(np.asarray(x) / math.sqrt(2)))


def place_of(name, t):
    """Positions of drawn times: the inverse of the process's spread over its times."""
    if name == "flow-3":
        return t / (3 - 2 * t)
    if name == "edm":
        return (t ** (1 / 7) - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))
    low, high = ends(name)
    return (t - low) / (high - low)


@each
def test_drawn_times_follow_their_law(name):
    process, count = PROCESSES[name], 20000
    torch.manual_seed(1)
    kolmogorov(place_of(name, process.draw(count).double()), lambda p: p)
    kolmogorov(place_of(name, process.draw(count, "uniform", 0.2, 0.7).double()), lambda p: ((p - 0.2) / 0.5).clip(0, 1))
    kolmogorov(place_of(name, process.draw(count, "logit-normal", -0.5, 0.8).double()), lambda p: phi((np.log(p / (1 - p)) + 0.5) / 0.8))
    u = place_of(name, process.draw(count, "u-shaped", 4.0).double())
    kolmogorov(u, lambda p: (np.expm1(4 * p) + math.exp(4) * -np.expm1(-4 * p)) / (2 * math.expm1(4)))
    t = process.draw(count, "log-normal", -0.8, 0.7).double()
    alpha, sigma = coefficients(name, t.numpy())
    kolmogorov(torch.as_tensor(np.log(sigma / alpha)), lambda v: phi((v + 0.8) / 0.7))
    assert t.shape == (count,)


def test_a_flat_u_is_uniform():
    torch.manual_seed(0)
    kolmogorov(PROCESSES["flow"].draw(5000, "u-shaped"), lambda p: p)


@each
def test_drawn_times_stay_within_the_process(name):
    process = PROCESSES[name]
    torch.manual_seed(2)
    for law, a, b in (("uniform", 0, 1), ("log-normal", 0, 30), ("logit-normal", 0, 20), ("u-shaped", 9, 1)):
        t = process.draw(2000, law, a, b)
        assert t.isfinite().all() and (t >= process.t_data).all() and (t <= process.t_noise * (1 + 1e-6)).all(), law


@each
@pytest.mark.parametrize("grid", ["uniform", "karras", "log-snr"])
@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_grids_start_and_end_where_they_say_and_fall(name, grid, steps):
    process = PROCESSES[name]
    middle = float(time_of(name, 1.0))
    for start in (None, middle):
        times = process.times(steps, grid, start)
        assert times.shape == (steps + 1,) and times.dtype == torch.float32
        first = process.t_noise if start is None else start
        assert float(times[0]) == pytest.approx(first, rel=1e-6) and float(times[-1]) == process.t_data
        assert (times.diff() < 0).all()


@each
def test_grids_are_even_in_what_they_say(name):
    process = PROCESSES[name]
    alpha, sigma = coefficients(name, process.times(12, "log-snr").double().numpy()[1:-1])
    # a discrete process ends at its least noisy whole step, below which no network was trained
    lowest = max(0.002, float(np.divide(*coefficients(name, 0.0)[::-1]))) if name.startswith("ddpm") else 0.002
    highest = min(80.0, float(np.divide(*coefficients(name, ends(name)[1])[::-1])))
    np.testing.assert_allclose(np.log(sigma / alpha), np.linspace(math.log(highest), math.log(lowest), 12)[1:], atol=1e-4)
    alpha, sigma = coefficients(name, process.times(12, "karras").double().numpy()[1:-1])
    np.testing.assert_allclose(sigma / alpha, np.linspace(highest ** (1 / 7), lowest ** (1 / 7), 12)[1:] ** 7, rtol=1e-3)
    times = process.times(12).double().numpy()
    if name == "edm":
        np.testing.assert_allclose(times, process.times(12, "karras").double().numpy())
    else:
        np.testing.assert_allclose(place_of(name, times), np.linspace(1, 0, 13), atol=1e-6)


def test_a_shifted_grid_is_the_formula():
    place = np.linspace(1, 0, 6)
    np.testing.assert_allclose(Flow(3.0).times(5).numpy(), 3 * place / (1 + 2 * place), rtol=1e-6)
    part = 0.6 / (3 - 2 * 0.6) * place  # from t = 0.6
    np.testing.assert_allclose(Flow(3.0).times(5, start=0.6).numpy(), 3 * part / (1 + 2 * part), rtol=1e-6)


@each
def test_positions_are_the_even_spread_of_times(name):
    process = PROCESSES[name]
    places = torch.linspace(0, 1, 11, dtype=torch.float64)
    close(place_of(name, process.at(places)), places.numpy())


# ---- facts and errors ----


@each
def test_facts_make_the_process_again(name):
    import json

    process = PROCESSES[name]
    facts = json.loads(json.dumps(process.facts()))
    again = make_process(facts)
    assert again == process and type(again) is type(process) and again.facts() == process.facts()
    t = inner_times(name)
    assert torch.equal(again.alpha(t), process.alpha(t)) and torch.equal(again.sigma(t), process.sigma(t))


def test_betas_can_be_chosen():
    process = make_process({"name": "ddpm", "steps": 10, "first": 0.1, "last": 0.3})
    close(torch.tensor(process.products, dtype=torch.float64), np.cumprod(1 - np.linspace(0.1, 0.3, 10)))
    assert process.t_noise == 9
    again = make_process({"name": "edm", "lowest": 0.01, "highest": 10.0})
    assert again.t_noise == 10 and float(again.at(torch.tensor(0.0))) == pytest.approx(0.01)


@pytest.mark.parametrize(
    "facts",
    [
        "flwo",
        {},
        {"shift": 2.0},
        {"name": "flow", "shifts": 2.0},
        {"name": "flow", "shift": 0},
        {"name": "flow", "shift": float("nan")},
        {"name": "trig", "shift": 1},
        {"name": "edm", "lowest": 1, "highest": 0.5},
        {"name": "edm", "lowest": 0},
        {"name": "ddpm", "schedule": "quadratic"},
        {"name": "ddpm", "products": [0.9]},
        {"name": "ddpm", "products": [0.5, 0.9]},
        {"name": "ddpm", "products": [1.0, 0.9]},
        {"name": "ddpm", "products": [0.9, 0.0]},
        {"name": "ddpm", "products": [0.9, 0.5], "step": 2},
        {"name": "ddpm", "last": 1.5},
    ],
)
def test_wrong_processes_are_named(facts):
    with pytest.raises(UserError) as error:
        make_process(facts)
    one_line(error)


def test_wrong_names_are_named():
    process, x, t = PROCESSES["flow"], torch.zeros(1, 2), torch.tensor([0.5])
    for call in (
        lambda: process.parts("epsilon", x, x, t),
        lambda: process.read("epsilon", x, x, t),
        lambda: process.times(4, "linear"),
        lambda: process.times(0),
        lambda: process.draw(4, "normal"),
        lambda: Denoiser(nn.Identity(), process, "eps"),
        lambda: Denoiser(nn.Identity(), process, code="sigma"),
        lambda: Denoiser(nn.Identity(), process, guidance=Guidance(2.0)),
        lambda: Denoiser(nn.Identity(), process).guided(2.0),
        lambda: Denoiser(nn.Identity(), process).guided(torch.tensor([1.0])),
        lambda: Denoiser(nn.Identity(), process).taps(),
    ):
        with pytest.raises(UserError) as error:
            call()
        one_line(error)
    assert Denoiser(nn.Identity(), process).guided(1.0).guidance.acts is False


# ---- denoisers ----

MEANS = normal(3, 2, 3, seed=7)
STDS = torch.tensor([0.3, 0.0, 0.9], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
MIXTURE = Mixture(MEANS, STDS, WEIGHTS)


def posterior_mean(x, alpha, sigma):
    """E[x0 | x] of MIXTURE, one sample and one component at a time."""
    rows = []
    for row, a, s in zip(x.numpy(), alpha, sigma):
        logs, each_mean = [], []
        for weight, mean, std in zip(WEIGHTS.numpy(), MEANS.numpy(), STDS.numpy()):
            variance = a**2 * std**2 + s**2
            logs.append(math.log(weight) - ((row - a * mean) ** 2).sum() / (2 * variance) - 0.5 * row.size * math.log(variance))
            each_mean.append(mean + a * std**2 / variance * (row - a * mean))
        share = np.exp(np.array(logs) - max(logs))
        rows.append(sum(w * m for w, m in zip(share / share.sum(), each_mean)))
    return np.stack(rows)


@pytest.mark.parametrize("kind", PREDICTIONS)
@each
def test_a_denoiser_sees_the_same_data_under_every_process(name, kind):
    """Equal signal-to-noise ratio, rescaled state: the same clean sample, for all pairs of processes."""
    angles = np.array([0.05, 0.3, 0.8, 1.2, 1.45])
    x0, z = normal(5, 2, 3), normal(5, 2, 3, seed=1)
    exact = posterior_mean(np.cos(column(angles)) * x0 + np.sin(column(angles)) * z, np.cos(angles), np.sin(angles))
    denoiser = exact_denoiser(MIXTURE, PROCESSES[name], kind)
    for other in PROCESSES:
        t = time_of(other, angles)
        alpha, sigma = coefficients(other, t)
        x = column(alpha) * x0 + column(sigma) * z
        view = denoiser.under(PROCESSES[other])
        close(view.x0(x, torch.as_tensor(t)), exact, 1e-6)
        noise = (x - column(alpha) * exact) / column(sigma)
        close(view.noise(x, torch.as_tensor(t)), noise, 1e-5)
        close(view.read("score", x, torch.as_tensor(t)), -noise / column(sigma), 1e-4)
        close(view.read("v", x, torch.as_tensor(t)), column(alpha) * noise - column(sigma) * exact, 1e-5)


@each
def test_velocity_under_flow_is_the_formula(name):
    denoiser = exact_denoiser(MIXTURE, PROCESSES[name], "x0").under(Flow())
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x = normal(3, 2, 3)
    exact = torch.as_tensor(posterior_mean(x, 1 - t.numpy(), t.numpy()))
    close(denoiser.velocity(x, t), (x - exact) / column(t), 1e-6)


def test_the_trigflow_wrapper_of_a_flow_network():
    denoiser = exact_denoiser(MIXTURE, Flow(), "velocity")
    tau = torch.tensor([0.1, 0.7, 1.4], dtype=torch.float64)
    x = normal(3, 2, 3)
    t = tau.sin() / (tau.sin() + tau.cos())
    size = (t**2 + (1 - t) ** 2).sqrt()
    x_fm, t1 = x * column(size), column(t)
    v = denoiser.velocity(x_fm, t)
    wrapped = ((1 - 2 * t1) * x_fm + (1 - 2 * t1 + 2 * t1**2) * v) / column(size)
    close(denoiser.under(Trig()).read("v", x, tau), wrapped, 1e-8)
    close(denoiser.under(Trig()).velocity(x, tau), wrapped, 1e-8)


class Probe(nn.Module):
    """Says something of its own and keeps what it was asked."""

    def __init__(self, classes=3):
        super().__init__()
        self.first, self.second = nn.Tanh(), nn.Identity()
        self.taps = ("first", "second")
        self.values, self.asked = normal(classes + 1, 4, seed=5), []

    def forward(self, x, level, label=None):
        self.asked.append((x, level, label))
        own = self.values[-1] if label is None else self.values[label]
        return self.second(self.first(x) * level[:, None] + own)


def test_guidance_is_the_formula():
    probe = Probe()
    denoiser = Denoiser(probe, Flow(), "x0", classes=3)
    x, t, label = normal(4, 4), torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    given_, free = denoiser.raw(x, t, label), denoiser.raw(x, t, None)
    assert denoiser.calls == 2
    close(denoiser.raw(x, t, torch.full((4,), 3)), free)
    guided = denoiser.guided(2.5)
    close(guided.raw(x, t, label), free + 2.5 * (given_ - free))
    assert guided.calls == 2 and denoiser.calls == 3 and len(probe.asked) == 4
    close(guided.x0(x, t, label), free + 2.5 * (given_ - free))
    assert guided.calls == 4
    close(guided.raw(x, t, None), free)
    assert guided.calls == 5
    scales = torch.tensor([0.0, 1.0, 2.0, -1.0], dtype=torch.float64)
    close(denoiser.guided(scales).raw(x, t, label), free + scales[:, None] * (given_ - free))
    inside_ = denoiser.guided(2.5, 0.5, 2.0).raw(x, t, label)  # sigma / alpha = 1/4, 2/3, 3/2, 4
    where = torch.tensor([1.0, 2.5, 2.5, 1.0], dtype=torch.float64)
    close(inside_, free + where[:, None] * (given_ - free))
    close(guided.with_network(probe).raw(x, t, label), given_)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_guidance_from_a_level_up_acts_at_pure_noise(name, dtype):
    process = PROCESSES[name]
    probe = Probe()
    probe.values = probe.values.to(dtype)
    denoiser = Denoiser(probe, process, "x0", classes=3)
    t, label = torch.tensor([process.t_noise, process.t_data], dtype=dtype), torch.tensor([0, 1])
    x = torch.zeros(2, 4, dtype=dtype)
    given_, free = denoiser.raw(x, t, label), denoiser.raw(x, t)
    torch.testing.assert_close(denoiser.guided(3.0, low=0.5).raw(x, t, label)[0], (free + 3 * (given_ - free))[0])
    torch.testing.assert_close(denoiser.guided(3.0, low=0.5).raw(x, t, label)[1], given_[1])
    torch.testing.assert_close(denoiser.guided(3.0, high=0.5).raw(x, t, label)[0], given_[0])
    torch.testing.assert_close(denoiser.guided(3.0, high=0.5).raw(x, t, label)[1], (free + 3 * (given_ - free))[1])


@each
def test_the_network_is_told_the_level_in_its_own_code(name):
    t = inner_times(name, 4)
    alpha, sigma = coefficients(name, t.numpy())
    x = normal(4, 4)
    place = place_of(name, t.numpy()) if name != "flow-3" else t.numpy()  # a shift moves draws and grids, not what a network is told
    for code, told in (("position", place), ("log", np.log(sigma / alpha) / 4), ("time", t.numpy())):
        probe = Probe()
        Denoiser(probe, PROCESSES[name], "x0", code=code).raw(x, t)
        close(probe.asked[0][1], told, 1e-8)
        close(probe.asked[0][0], x)
        assert probe.asked[0][2] is None
    probe = Probe()
    Denoiser(probe, PROCESSES[name], "edm", code="log", sigma_data=0.8).raw(x, t)
    close(probe.asked[0][0], x / torch.as_tensor(alpha * np.sqrt((sigma / alpha) ** 2 + 0.64))[:, None], 1e-8)


def test_a_sample_straight_from_noise():
    z, t = normal(4, 4), torch.full((4,), 0.3, dtype=torch.float64)
    probe = Probe()
    made = Denoiser(probe, Flow(), "velocity").from_noise(z, t)
    close(made, z - (z.tanh() * 0.3 + probe.values[-1]))
    close(probe.asked[0][0], z)
    close(probe.asked[0][1], t.numpy())
    probe = Probe()
    denoiser = Denoiser(probe, Flow(), "velocity", classes=3).under(PROCESSES["edm"])
    made = denoiser.guided(2.0).from_noise(z, torch.full((4,), 1.5, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))
    scale = math.hypot(1, 80) / 81  # from sigma 80 to the same level of the flow
    close(probe.asked[0][0][:4], z * scale, 1e-8)
    close(probe.asked[0][1], torch.full((8,), 0.6, dtype=torch.float64))
    free, given_ = probe.values[-1], probe.values[torch.tensor([0, 1, 2, 0])]
    out = (z * scale).tanh() * 0.6 + free + 2 * (given_ - free)
    close(made, z * scale - 80 / 81 * out, 1e-8)
    assert denoiser.calls == 0


@pytest.mark.parametrize("kind", PREDICTIONS)
@each
def test_the_loss_of_the_exact_network_of_a_point_is_zero(name, kind):
    point = Mixture(MEANS[:1], 0.0)
    denoiser = exact_denoiser(point, PROCESSES[name], kind)
    z = normal(4, 2, 3)
    for other in (name, "flow", "edm"):
        t = torch.as_tensor(time_of(other, np.array([0.1, 0.5, 1.0, 1.45])))
        assert float(denoiser.under(PROCESSES[other]).denoising_loss(MEANS[:1].expand(4, 2, 3), z, t)) < 1e-10


def test_the_loss_is_the_mean_square_of_the_networks_own_kind():
    probe = Probe()
    x0, z, t = normal(4, 4), normal(4, 4, seed=1), torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    label, weight = torch.tensor([0, 1, 2, 3]), torch.tensor([1.0, 2.0, 0.0, 4.0], dtype=torch.float64)
    x = (1 - t[:, None]) * x0 + t[:, None] * z
    out = x.tanh() * t[:, None] + probe.values[label]
    denoiser = Denoiser(probe, Flow(), "velocity", classes=3)
    errors = ((out - (z - x0)) ** 2).mean(1)
    close(denoiser.denoising_loss(x0, z, t, label), errors.mean())
    close(denoiser.denoising_loss(x0, z, t, label, weight), (weight * errors).mean())


def test_features_come_with_the_unguided_output():
    probe = Probe()
    denoiser = Denoiser(probe, Flow(), "velocity", classes=3).guided(3.0)
    x, t, label = normal(2, 4), torch.tensor([0.2, 0.4], dtype=torch.float64), torch.tensor([0, 1])
    found, out = denoiser.features(x, t, label)
    assert denoiser.taps() == ("first", "second") and len(found) == 2 and denoiser.calls == 1 and len(probe.asked) == 1
    close(found[0], x.tanh())
    close(found[1], x.tanh() * t[:, None] + probe.values[label])
    close(out, found[1])
    (only,), _ = denoiser.features(x, t, label, ["second"])
    close(only, found[1])
    assert not probe.first._forward_hooks and not probe.second._forward_hooks


def test_facts_make_the_denoiser_again():
    import json

    probe = Probe()
    denoiser = Denoiser(probe, PROCESSES["flow-3"], "x0", classes=3, code="log", sigma_data=0.7, guidance=Guidance(2.0, 0.1))
    for one in (denoiser, denoiser.guided(2.0, 0.1, 5.0), denoiser.guided(1.0)):
        again = Denoiser.from_facts(probe, json.loads(json.dumps(one.facts())))
        assert again.facts() == one.facts() and again.process == one.process and again.guidance == one.guidance
        assert (again.prediction, again.classes, again.code, again.sigma_data) == ("x0", 3, "log", 0.7)
    moved = denoiser.under(PROCESSES["edm"])
    assert (
        moved.facts()["process"] == denoiser.facts()["process"]
        and moved.process == PROCESSES["edm"]
        and denoiser.process == PROCESSES["flow-3"]
    )
    assert denoiser.guided(torch.ones(2)).facts()["guidance"] == [1.0, 0.0, None]


# ---- the exact mixture ----


def test_the_exact_mean_is_tweedies_formula():
    """x + sigma^2 d/dx log p = alpha E[x0 | x], with or without classes."""
    for label in (None, torch.tensor([0, 1, 2, 3])):
        x = normal(4, 2, 3).requires_grad_()
        alpha, sigma = torch.tensor([0.9, 0.5, 0.2, 1.0], dtype=torch.float64), torch.tensor([0.3, 0.7, 2.0, 1.0], dtype=torch.float64)
        (score,) = torch.autograd.grad(MIXTURE.log_density(x, alpha, sigma, label).sum(), x)
        tweedie = (x + column(sigma) ** 2 * score) / column(alpha)
        close(MIXTURE.x0(x, alpha, sigma, label).detach(), tweedie.detach().numpy())
    free = MIXTURE.x0(x.detach(), alpha, sigma)
    close(free, posterior_mean(x.detach(), alpha.numpy(), sigma.numpy()))
    close(free[3], MIXTURE.x0(x.detach(), alpha, sigma, torch.tensor([0, 1, 2, 3]))[3])


def test_samples_of_the_mixture():
    torch.manual_seed(0)
    x = MIXTURE.sample(20000)
    mean = (WEIGHTS[:, None, None] * MEANS).sum(0)
    assert (x.mean(0) - mean).abs().max() < 0.04
    variance = (WEIGHTS[:, None, None] * (MEANS - mean) ** 2).sum(0) + (WEIGHTS * STDS**2).sum()
    assert (x.var(0) / variance - 1).abs().max() < 0.06
    close(MIXTURE.sample(3, torch.tensor([1, 1, 1])), MEANS[1].expand(3, 2, 3))


def test_a_discrete_process_is_hashable_and_short_to_read():
    assert isinstance(PROCESSES["ddpm"], Discrete) and len(repr(PROCESSES["ddpm"])) < 40 and hash(PROCESSES["ddpm"]) is not None
