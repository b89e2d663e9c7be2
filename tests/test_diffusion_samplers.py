"""Samplers against Gaussians, whose probability-flow path is known, and against points, whose noisy law is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from limbeck.diffusion import SAMPLERS, Denoiser, Flow, Mixture, evaluations, exact_denoiser, make_process, sample
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
each = pytest.mark.parametrize("name", PROCESSES)
MEAN, STD = torch.tensor([[[0.8, -0.3], [1.5, 0.1]]], dtype=torch.float64), 0.6


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=tolerance, atol=tolerance)


def gaussian(name, kind="velocity"):
    return exact_denoiser(Mixture(MEAN, STD), PROCESSES[name], kind)


def point(name, kind="velocity"):
    return exact_denoiser(Mixture(MEAN, 0.0), PROCESSES[name], kind)


def smooth_times(name, steps, high=1.2, low=0.15):
    """Even steps of log(sigma / alpha) between two angles, then the data end."""
    process = PROCESSES[name]
    angles = torch.linspace(math.log(math.tan(high)), math.log(math.tan(low)), steps, dtype=torch.float64).exp().atan()
    return torch.cat([process.time_at(angles), torch.tensor([process.t_data], dtype=torch.float64)])


def path_end(name, noise, times):
    """The exact path from scale(times[0]) noise to times[-2], then what is seen there."""
    process = PROCESSES[name]
    (a, a1), (s, s1) = (f(times[[0, -2]]) for f in (process.alpha, process.sigma))
    deviation, deviation1 = (a**2 * STD**2 + s**2).sqrt(), (a1**2 * STD**2 + s1**2).sqrt()
    x = (a**2 + s**2).sqrt() * noise
    x = a1 * MEAN + deviation1 / deviation * (x - a * MEAN)
    return MEAN + a1 * STD**2 / deviation1**2 * (x - a1 * MEAN)


ORDERS = {"ddim": 1, "euler": 1, "ancestral-0": 1, "jump-0": 1, "heun": 2, "dpm++2m": 2}


@pytest.mark.parametrize("named", ORDERS)
@each
def test_deterministic_samplers_follow_the_path_with_their_order(name, named):
    sampler, options = (named[:-2], {"eta": 0.0}) if named.endswith("-0") else (named, {})
    noise, errors = normal(3, 2, 2), []
    corners = name.startswith("ddpm") and sampler == "heun"  # the slopes of a table jump at whole steps: a floor of about 1e-4
    for steps in (9, 17, 33) if corners else (33, 65):  # twice as many on the path each time
        times = smooth_times(name, steps)
        made = sample(gaussian(name), noise, times=times, sampler=sampler, **options)
        errors.append(float((made - path_end(name, noise, times)).abs().max()))
    assert errors[-1] < (2e-2 if ORDERS[named] == 1 else 2e-3 if corners else 1e-3), errors
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    if corners:
        assert orders.mean() > 1.6, (errors, orders)
    else:
        assert abs(orders[-1] - ORDERS[named]) < (0.15 if ORDERS[named] == 1 else 0.3), (errors, orders)


@each
@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "dpm++2m"])
def test_the_whole_way_from_noise_to_data(name, sampler):
    """By the process's own grid: x0 = mean + std / deviation (x - alpha mean)."""
    process, noise = PROCESSES[name], normal(3, 2, 2)
    start = torch.tensor(process.t_noise, dtype=torch.float64)
    a, s = process.alpha(start), process.sigma(start)
    exact = MEAN + STD / (a**2 * STD**2 + s**2).sqrt() * ((a**2 + s**2).sqrt() * noise - a * MEAN)
    first = sampler in ("ddim", "euler")
    # one in eighty of the mean is missing where the process starts; the exact path has that too
    close(sample(gaussian(name), noise, steps=80, sampler=sampler), exact, 0.06 if first else 0.02)


@pytest.mark.parametrize("name", ["flow", "flow-3", "edm"])
def test_ddim_is_euler_on_straight_processes(name):
    noise = normal(4, 2, 2)
    for steps in (1, 3, 8):
        close(sample(gaussian(name), noise, steps=steps, sampler="ddim"), sample(gaussian(name), noise, steps=steps, sampler="euler"), 1e-8)


def test_one_euler_step_of_a_flow_by_hand():
    noise = normal(4, 2, 2)
    out = gaussian("flow")
    x = noise + (0.5 - 1.0) * out.velocity(noise, torch.ones(4, dtype=torch.float64))
    x = x - 0.5 * out.velocity(x, torch.full((4,), 0.5, dtype=torch.float64))
    close(sample(gaussian("flow"), noise, steps=2, sampler="euler"), x)
    slope = out.velocity(noise, torch.ones(4, dtype=torch.float64))
    x = noise - 0.25 * (slope + out.velocity(noise - 0.5 * slope, torch.full((4,), 0.5, dtype=torch.float64)))
    x = x - 0.5 * out.velocity(x, torch.full((4,), 0.5, dtype=torch.float64))
    close(sample(gaussian("flow"), noise, steps=2, sampler="heun"), x)


@each
def test_without_randomness_the_stochastic_samplers_are_ddim(name):
    noise = normal(4, 2, 2)
    plain = sample(gaussian(name), noise, steps=6)
    close(sample(gaussian(name), noise, steps=6, sampler="ancestral", eta=0.0), plain, 1e-6)
    close(sample(gaussian(name), noise, steps=6, sampler="jump", eta=0.0), plain, 1e-6)


# ---- laws ----


class Law(nn.Module):
    """The network of a point, which keeps what it is shown."""

    def __init__(self, process):
        super().__init__()
        self.process, self.seen = process, []

    def forward(self, x, level, label=None):
        self.seen.append((x, level))
        return MEAN.expand_as(x)


@pytest.mark.parametrize("named", ["ancestral", "ancestral-.5", "renoise", "jump", "jump-.7", "jump-1"])
@each
def test_every_state_of_a_stochastic_sampler_has_the_law_of_its_time(name, named):
    """For a point the law at every time is N(alpha mean, sigma^2): whatever randomness was chosen."""
    sampler, _, eta = named.partition("-")
    process, count = PROCESSES[name], 6000
    network = Law(process)
    denoiser = Denoiser(network, process, "x0", code="time")
    end = torch.tensor(process.t_noise, dtype=torch.float64)
    start = (process.alpha(end) * MEAN + process.sigma(end) * normal(count, 2, 2)) / process.scale(
        end
    )  # not quite noise: some data is left
    options = {"eta": float(eta)} if eta else {}
    made = sample(denoiser, start, steps=5, sampler=sampler, rng=torch.Generator().manual_seed(3), **options)
    assert len(network.seen) == 5
    close(made, MEAN.expand_as(made))
    for x, level in network.seen[1:]:
        a, s = float(process.alpha(level)[0]), float(process.sigma(level)[0])
        z = (x - a * MEAN) / s
        assert (z.mean(0).abs() < 4.5 / math.sqrt(count)).all(), (level[0], z.mean(0))
        assert ((z.var(0) - 1).abs() < 4.5 * math.sqrt(2 / count)).all(), (level[0], z.var(0))


SHARES = {("ancestral", 1.0), ("ancestral", 0.5), ("jump", 0.3), ("jump", 1.0), ("renoise", None), ("jump", None), ("ancestral", None)}


@pytest.mark.parametrize(("sampler", "eta"), sorted(SHARES, key=str))
def test_the_share_of_fresh_noise_is_the_formula(sampler, eta):
    """From t to s of a flow: what remains of the old noise, and how much is new."""
    process, count, t, s = PROCESSES["flow"], 40000, 0.8, 0.5
    network = Law(process)
    noise = normal(count, 2, 2)
    times = torch.tensor([t, s, 0.0], dtype=torch.float64)
    options = {} if eta is None else {"eta": eta}
    rng = torch.Generator().manual_seed(1)
    denoiser = Denoiser(network, process, "x0", code="time")
    sample(denoiser, noise, times=times, sampler=sampler, rng=rng, **options)
    (x, _), (x1, _) = network.seen
    old = (x - (1 - t) * MEAN) / t
    new = x1 - (1 - s) * MEAN
    kept = ((old - old.mean(0)) * new).mean(0) / (old - old.mean(0)).square().mean(0)
    left = (new - kept * old).std(0)
    if sampler == "ancestral":
        eta = 1.0 if eta is None else eta
        fresh = eta * s / t * math.sqrt(t**2 - ((1 - t) / (1 - s) * s) ** 2)
    elif sampler == "jump":
        below = (1 - (0.3 if eta is None else eta)) * s
        fresh = math.sqrt(s**2 - ((1 - s) / (1 - below) * below) ** 2)
    else:
        fresh = s
    close(left, torch.full((2, 2), fresh), 0.01)
    close(kept, torch.full((2, 2), math.sqrt(s**2 - fresh**2)), 0.015)


@pytest.mark.parametrize("name", ["flow", "cosine"])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ancestral_samples_have_the_mean_and_the_variance(name, eta):
    noise = normal(3000, 2, 2)
    noise = (noise - noise.mean(0)) / noise.std(0)
    made = sample(gaussian(name), noise, steps=300, sampler="ancestral", eta=eta, rng=torch.Generator().manual_seed(0))
    assert ((made.mean(0) - MEAN[0]).abs() < 5 * STD / math.sqrt(3000)).all()
    assert ((made.std(0) / STD - 1).abs() < 0.06).all()


@each
def test_renoise_with_the_exact_map_keeps_the_law(name):
    """With the end of the path instead of the mean, re-noising gives N(mean, std^2) after any number of steps."""
    process = PROCESSES[name]

    class Map(nn.Module):
        def forward(self, x, level, label=None):
            a, s = (f(level).reshape(-1, 1, 1) for f in (process.alpha, process.sigma))
            return MEAN + STD / (a**2 * STD**2 + s**2).sqrt() * (x - a * MEAN)

    denoiser = Denoiser(Map(), process, "x0", code="time")
    for sampler, options in (("renoise", {}), ("jump", {"eta": 1.0})):
        made = sample(denoiser, normal(6000, 2, 2), steps=3, sampler=sampler, rng=torch.Generator().manual_seed(2), **options)
        assert ((made.mean(0) - MEAN[0]).abs() < 5 * STD / math.sqrt(6000)).all()
        assert ((made.std(0) / STD - 1).abs() < 5 / math.sqrt(2 * 6000)).all()


# ---- randomness ----

STOCHASTIC = ("ancestral", "renoise", "jump")


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "from-noise"])
def test_the_seed_decides(sampler):
    noise = normal(4, 2, 2)

    def made(seed):
        return sample(gaussian("flow"), noise, steps=4, sampler=sampler, rng=torch.Generator().manual_seed(seed))

    assert torch.equal(made(1), made(1))
    assert torch.equal(made(1), made(2)) is (sampler not in STOCHASTIC)
    torch.manual_seed(5)
    first = sample(gaussian("flow"), noise, steps=4, sampler=sampler)
    torch.manual_seed(5)
    assert torch.equal(first, sample(gaussian("flow"), noise, steps=4, sampler=sampler))


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "from-noise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_stream_a_sample_makes_batches_indifferent(sampler, dtype):
    noise = normal(5, 2, 2).to(dtype)
    denoiser = exact_denoiser(Mixture(MEAN.to(dtype), STD), PROCESSES["flow"])

    def made(rows):
        rng = [torch.Generator().manual_seed(10 + row) for row in rows]
        return sample(denoiser, noise[rows], steps=4, sampler=sampler, rng=rng)

    whole = made([0, 1, 2, 3, 4])
    assert whole.dtype == dtype
    torch.testing.assert_close(torch.cat([made([0, 1]), made([2, 3, 4])]), whole)
    torch.testing.assert_close(made([3])[0], whole[3])
    if sampler in STOCHASTIC:
        rng = [torch.Generator().manual_seed(0) for _ in range(2)]
        twins = sample(denoiser, noise[:1].expand(2, -1, -1), steps=4, sampler=sampler, rng=rng)
        assert torch.equal(twins[0], twins[1])


def test_streams_must_be_one_a_sample():
    for count in (1, 3):
        with pytest.raises(UserError) as error:
            sample(gaussian("flow"), normal(4, 2, 2), steps=2, sampler="renoise", rng=[torch.Generator() for _ in range(count)])
        assert error.value.hint and "\n" not in str(error.value)


# ---- accounts, watching, errors ----


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "from-noise"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_evaluations_are_counted(sampler, steps):
    class Plain(nn.Module):
        def forward(self, x, level, label=None):
            return 0.3 * x

    denoiser = Denoiser(Plain(), Flow(), classes=2)
    label, rng = torch.tensor([0, 1, 0]), torch.Generator()
    for guided, one in ((False, denoiser), (True, denoiser.guided(2.0))):
        made = sample(one, normal(3, 2, 2), label, steps=steps, sampler=sampler, rng=rng)
        assert one.calls == evaluations(sampler, steps, guided)
        assert made.shape == (3, 2, 2) and not made.requires_grad


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_watching_sees_every_step_and_the_result(sampler):
    steps, seen = (1 if sampler == "from-noise" else 4), []
    denoiser = gaussian("flow")
    made = sample(
        denoiser, normal(3, 2, 2), steps=steps, sampler=sampler, rng=torch.Generator(), watch=lambda t, x0: seen.append((float(t[0]), x0))
    )
    assert [t for t, _ in seen] == pytest.approx(PROCESSES["flow"].times(steps).tolist()[:-1])
    assert torch.equal(seen[-1][1], made)


@each
def test_a_sampler_starts_at_the_scale_of_its_first_time(name):
    process = PROCESSES[name]
    network = Law(process)
    denoiser = Denoiser(network, process, "x0", code="time")
    noise = normal(3, 2, 2)
    t = float(process.time_at(torch.tensor(0.9, dtype=torch.float64)))
    sample(denoiser, noise, times=torch.tensor([t, process.t_data], dtype=torch.float64))
    sample(denoiser, noise)
    (x, level), (x1, level1) = network.seen
    a, s = (float(f(level[0])) for f in (process.alpha, process.sigma))
    close(x, math.hypot(a, s) * noise)
    assert float(level[0]) == pytest.approx(t) and float(level1[0]) == pytest.approx(process.t_noise)
    close(x1, float(process.scale(level1[:1])) * noise, 1e-6)


@each
def test_from_noise_is_one_call_told_how_far_to_go(name):
    process = PROCESSES[name]
    network = Law(process)
    denoiser = Denoiser(network, process, "x0", code="time")
    noise = normal(3, 2, 2)
    middle = float(process.time_at(torch.tensor(0.9, dtype=torch.float64)))
    for options in ({}, {"end": middle}, {"times": torch.tensor([middle, process.t_data], dtype=torch.float64)}):
        made = sample(denoiser, noise, sampler="from-noise", **options)
        x, level = network.seen.pop()
        close(x, float(process.scale(torch.tensor(process.t_noise, dtype=torch.float64))) * noise, 1e-6)
        assert float(level[0]) == pytest.approx(options.get("end", process.t_data))
        close(made, MEAN.expand_as(made))
    assert denoiser.calls == 3


@pytest.mark.parametrize(
    "wrong", [{"sampler": "dmp"}, {"grid": "linear"}, {"steps": 0}, {"steps": 3, "sampler": "from-noise"}], ids=lambda wrong: str(wrong)
)
def test_wrong_names_and_numbers_are_named(wrong):
    with pytest.raises(UserError) as error:
        sample(gaussian("flow"), normal(2, 2, 2), **wrong)
    assert error.value.hint and "\n" not in str(error.value)
