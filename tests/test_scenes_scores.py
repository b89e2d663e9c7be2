"""Score distillation: directions against closed forms, what distinguishes the methods, priors, followers, figures, bad input."""

import copy
import math

import numpy as np
import pytest
import torch

from limbeck import losses, schema
from limbeck.diffusion import Cosine, Denoiser, Flow, Mixture, exact_denoiser
from limbeck.engine.clock import Clock
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.evaluation.particles import pairwise_distance, saturation
from limbeck.method import make
from limbeck.scenes import job, pictures_job
from limbeck.scenes.priors import exact_prior
from limbeck.scenes.score_method import Noised

torch.set_num_threads(1)
SMALL = {
    "name": "tiny",
    "teacher": {"model": "denoising-mlp", "args": {"width": 16, "depth": 1}, "train": {"steps": 30, "batch": 32, "lr": 0.003}},
    "student": {"model": "particles"},
    "data": {"source": "digits", "train": 300},
    "training": {"steps": 4, "batch": 6, "optimizer": "adam", "lr": 0.01, "weight_decay": 0},
    "scene": {"variants": 4, "samples": 16, "curve": 0, "features": {"model": "cnn", "args": {"width": 4}, "train": {"steps": 20}}},
    "threads": 1,
    "device": "cpu",
    "trackers": [],
}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def recipe_of(method, **changes):
    raw = copy.deepcopy(SMALL) | {"method": method}
    for key, value in changes.items():
        raw[key] = {**raw[key], **value} if isinstance(value, dict) and key in ("scene", "training") else value
    return schema.Recipe.model_validate(raw)


def ready(method, **changes):
    """A method bound to its problem."""
    made, problem = job.open_problem(recipe_of(method, **changes), Session(), {})
    torch.manual_seed(5)
    made.bind(problem)
    made.setup(problem)
    return made


def noised(method, seed=0, variants=4):
    torch.manual_seed(seed)
    problem = method.problem
    pick = torch.arange(variants)
    return method.noised(problem.student.render(pick).detach(), pick, Clock(1, 4, 4))


# ---- pure functions ----


def test_the_surrogates_gradient_is_exactly_the_given_one_divided_by_the_batch():
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    g = torch.randn_like(x)
    value = losses.score_surrogate(x, g)
    value.backward()
    assert torch.allclose(x.grad, g / 3, atol=1e-12)
    assert math.isclose(float(value.detach()), 0.5 * float((g**2).sum()) / 3, rel_tol=1e-9)


def test_the_surrogate_leaves_numbers_that_are_not_finite_out():
    x = torch.zeros(1, 3, requires_grad=True)
    losses.score_surrogate(x, torch.tensor([[math.nan, math.inf, 2.0]])).backward()
    assert x.grad.tolist() == [[0.0, 0.0, 2.0]]


def test_least_norm_against_a_grid_of_1001_shares():
    rng = np.random.default_rng(0)
    for scale in (0.1, 1.0, 5.0):
        a, b = rng.normal(size=(6, 7)) + 1, scale * (rng.normal(size=(6, 7)) + 1)
        shares = np.linspace(0, 1, 1001)
        norms = np.linalg.norm(shares[:, None, None] * a + (1 - shares[:, None, None]) * b, axis=-1)
        point, share = losses.least_norm(torch.from_numpy(a), torch.from_numpy(b))
        assert np.abs(share.numpy() - shares[norms.argmin(0)]).max() <= 5.01e-4
        assert (np.linalg.norm(point.numpy(), axis=1) <= norms.min(0) + 1e-12).all()
    same = torch.ones(2, 3)
    assert torch.equal(losses.least_norm(same, same)[0], same)


def test_least_norm_takes_the_shorter_of_two_that_agree():
    a, b = torch.tensor([[3.0, 0.1]]), torch.tensor([[1.0, 0.0]])
    assert losses.least_norm(a, b)[1].item() == 0.0 and losses.least_norm(b, a)[1].item() == 1.0


def test_weights_of_levels_are_functions_of_the_cumulative_product():
    for process in (Cosine(), Flow()):
        t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
        alpha, sigma = process.alpha(t), process.sigma(t)
        bar = alpha**2 / (alpha**2 + sigma**2)
        assert torch.allclose(losses.level_weight(process.angle(t), "sds"), 1 - bar)
        assert torch.allclose(losses.level_weight(process.angle(t), "fantasia3d"), bar.sqrt() * (1 - bar))
    with pytest.raises(UserError, match="weight of noise levels"):
        losses.level_weight(torch.zeros(1), "sdz")


def test_places_shift_to_more_noise_and_stop_at_its_end():
    place = torch.tensor([0.02, 0.4, 0.97, 1.0])
    later = losses.later_place(place, 0.1, 0.02)
    assert torch.allclose(later, torch.tensor([0.02, 0.438, 1.0, 1.0]))
    assert (losses.later_place(place, 0.1, 0.02, torch.rand(4)) >= place).all()


def test_annealing_in_one_step_and_linearly():
    assert losses.annealed((0.1, 0.9), (0.0, 0.5), 0.199) == (0.1, 0.9)
    assert losses.annealed((0.1, 0.9), (0.0, 0.5), 0.2) == (0.0, 0.5)
    assert losses.annealed((0.5, 0.98), (0.02, 0.5), 1.0, "linear") == pytest.approx((0.02, 0.5))
    with pytest.raises(UserError, match=r"noise levels from 0\.9 to 0\.1"):
        losses.annealed((0.9, 0.1), (0.0, 0.5), 0.0)


# ---- scores against closed forms ----


@pytest.mark.parametrize("process", [Cosine(), Flow()])
def test_the_sds_direction_under_a_gaussian_prior(process):
    """eps_pre of N(m, s^2 I): sigma (x_t - alpha m) / (alpha^2 s^2 + sigma^2)."""
    mean, std = torch.tensor([[[[1.0, -2.0]]]], dtype=torch.float64), 0.7
    prior = exact_denoiser(Mixture(mean, std), process, "v")
    x, noise = torch.randn(5, 1, 1, 2, dtype=torch.float64), torch.randn(5, 1, 1, 2, dtype=torch.float64)
    at = Noised(prior, x, noise, torch.linspace(0.1, 0.9, 5, dtype=torch.float64), None, torch.arange(5), 0.02)
    a, s = (v[:, None, None, None] for v in (process.alpha(at.t), process.sigma(at.t)))
    expected = s * (a * x + s * noise - a * mean) / (a**2 * std**2 + s**2) - noise
    assert torch.allclose(make("sds").direction(at), expected, atol=1e-9)


def test_the_exact_prior_is_the_softmax_over_training_pictures_of_the_class():
    _, problem = job.open_problem(recipe_of({"id": "sds"}, teacher={"model": "exact"}), Session(), {})
    prior = problem.teacher
    x0 = torch.cat([x for x, _ in problem.pictures.whole(problem.pictures.data.train)]).flatten(1).double()
    labels = problem.pictures.data.train.labels
    state, t = torch.randn(3, 1, 8, 8), torch.tensor([0.2, 0.5, 0.8])
    asked = torch.tensor([3, 7, 10])
    for row in range(3):
        own = x0 if asked[row] == 10 else x0[labels == asked[row]]
        a, s = math.cos(float(t[row]) * math.pi / 2), math.sin(float(t[row]) * math.pi / 2)
        energy = -((state[row].flatten().double() - a * own) ** 2).sum(1) / (2 * s * s)
        expected = (energy.softmax(0)[:, None] * own).sum(0)
        found = prior.x0(state, t, asked)[row].flatten().double()
        assert torch.allclose(found, expected, atol=2e-4)
    assert torch.allclose(prior.x0(state, t, torch.full((3,), 10)), prior.x0(state, t), atol=1e-5)


def gaussian_toy(lam, steps=400):
    """Covariance of q = N(mu, S S^T) after descent with exact scores: conditional = the sample itself, marginal = q diffused."""
    torch.manual_seed(0)
    target = torch.tensor([[1.0, 0.3], [0.0, 0.5]], dtype=torch.float64)
    goal, middle = target @ target.T, torch.tensor([1.0, -1.0], dtype=torch.float64)
    mu = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    root = torch.eye(2, dtype=torch.float64).clone().requires_grad_()
    optimizer = torch.optim.Adam([mu, root], 2e-2)
    process, eye = Cosine(), torch.eye(2, dtype=torch.float64)
    for _ in range(steps):
        x = mu + torch.randn(128, 2, dtype=torch.float64) @ root.T
        t = 0.02 + 0.96 * torch.rand(1, dtype=torch.float64)
        a, s, noise = process.alpha(t), process.sigma(t), torch.randn(128, 2, dtype=torch.float64)
        with torch.no_grad():
            state = a * x + s * noise
            prior = s * torch.linalg.solve(a**2 * goal + s**2 * eye, (state - a * middle).T).T
            marginal = s * torch.linalg.solve(a**2 * root @ root.T + s**2 * eye, (state - a * mu).T).T
            step = prior - losses.entropic_prediction(marginal, noise, lam)
        optimizer.zero_grad()
        losses.score_surrogate(x, step).backward()
        optimizer.step()
    return (root @ root.T).detach(), goal


def test_entropy_keeps_the_covariance_that_vsd_of_single_samples_loses():
    found, goal = gaussian_toy(1.0)
    assert float((found - goal).norm() / goal.norm()) < 0.25
    collapsed, goal = gaussian_toy(0.0)
    assert float(collapsed.trace() / goal.trace()) < 0.05
    half, goal = gaussian_toy(0.5)
    assert 0.1 < float(half.trace() / goal.trace()) < 0.6


# ---- what distinguishes the methods ----


def test_esd_with_lam_0_is_vsd_told_the_view_and_lam_is_guidance_of_the_follower():
    plain, entropic = ready({"id": "vsd", "view": "yes", "width": 16}), ready({"id": "esd", "lam": 0.0, "width": 16})
    with torch.no_grad():
        for method in (plain, entropic):  # rows of views and classes differ from here on
            torch.manual_seed(1)
            method.fake.network.condition.label.weight.normal_()
        at = noised(plain)
        assert torch.equal(plain.direction(at), entropic.direction(at))
        entropic.lam = 0.25
        marginal, conditional = entropic.follows(at, False), entropic.follows(at, True)
        assert not torch.allclose(marginal, conditional)
        expected = at.guided(7.5) - (marginal + 0.75 * (conditional - marginal))
        assert torch.allclose(entropic.direction(at), expected, atol=1e-5)


def test_the_follower_begins_as_the_score_model_itself():
    method = ready({"id": "vsd", "width": 16})
    with torch.no_grad():
        at = noised(method)
        for told in (True, False):
            assert torch.allclose(method.follows(at, told), at.given(), atol=1e-6)
        assert torch.allclose(method.direction(at), at.guided(7.5) - at.given(), atol=1e-5)


def test_asd_shifts_to_noise_with_the_same_noise_and_no_guidance():
    method = ready({"id": "asd", "random_shift": False, "eta": 0.2})
    with torch.no_grad():
        at = noised(method)
        seen = []
        prior = method.problem.teacher
        reader = prior.noise
        prior.noise = lambda state, t, label=None: seen.append((state, t, label)) or reader(state, t, label)
        found = method.direction(at)
        state, t, label = seen[-1]
        place = at.place + torch.minimum(0.2 * (at.place - at.low), 1 - at.place)
        assert (t >= at.t).all() and torch.allclose(t, prior.process.at(place))
        back = (state - prior.process.alpha(t)[:, None, None, None] * at.x) / prior.process.sigma(t)[:, None, None, None]
        assert torch.allclose(back, at.noise, atol=1e-4) and torch.equal(label, at.labels)
        assert len(seen) == 3 and torch.allclose(found, at.guided(7.5) - reader(state, t, label), atol=1e-6)


def test_bsd_weighs_the_two_directions_as_it_says():
    method = ready({"id": "bsd"})
    with torch.no_grad():
        at = noised(method)
        free, given = at.free(), at.given()
        rest = free - at.noise
        weight = rest.norm() * math.sqrt(4 * 64 * 64 / 64) * at.angle.sin() / 50
        point = losses.least_norm(given - free, 1.25 * rest)[0]
        assert torch.allclose(method.gradient(at), weight[:, None, None, None] * point, atol=1e-5)
        method.variant = "fixed"
        point = losses.least_norm(15 * (given - free), free)[0]
        assert torch.allclose(method.gradient(at), at.angle.cos()[:, None, None, None] * point, atol=1e-5)
    spread = torch.stack([method.noise(torch.zeros(64, 1, 8, 8)).mean((1, 2, 3)) for _ in range(20)]).std()
    assert abs(float(spread) - math.sqrt(0.1**2 + 1 / 64)) < 0.01  # offset noise is the same all over a channel


def test_guidance_moves_away_from_the_unconditional_prediction():
    method = ready({"id": "sds", "guidance": 3.0})
    with torch.no_grad():
        at = noised(method)
        assert torch.allclose(at.guided(3.0), at.free() + 3 * (at.given() - at.free()), atol=1e-6)
        assert torch.equal(at.guided(1.0), at.given())
        free = at.prior.noise(at.state, at.t, torch.full_like(at.labels, 10))
        assert torch.equal(at.free(), free) and not torch.allclose(free, at.given())


def test_the_gradient_goes_through_the_rendering_and_not_through_the_score_model():
    method = ready({"id": "sds"})
    terms = method.losses("student", Clock(0, 4, 4))
    terms["score"].backward()
    assert method.problem.student.pixels.grad.abs().sum() > 0
    assert all(p.grad is None for p in method.problem.teacher.network.parameters())


def test_the_follower_learns_detached_renderings_and_sometimes_without_the_view():
    method = ready({"id": "esd", "drop": 0.5, "width": 16}, scene={"variants": 64}, training={"batch": 64})
    method.losses("student", Clock(0, 4, 4))
    told = []
    method.fake.denoising_loss = lambda x, noise, t, rows, **_: told.append((x, rows)) or x.sum() * 0
    method.losses("fake", Clock(0, 4, 4))
    x, rows = told[0]
    assert not x.requires_grad and 0.2 < float((rows >= 64).double().mean()) < 0.8
    hidden = rows >= 64
    assert torch.equal(rows[hidden] - 64, method.asked(method.made[1])[hidden]) and torch.equal(rows[~hidden], method.made[1][~hidden])


# ---- whole jobs, figures, bad input ----


def test_vsd_keeps_particles_apart_where_sds_lets_them_fall_together():
    figures = {}
    for id, settings in (("sds", {"guidance": 7.5}), ("vsd", {"width": 64})):
        recipe = recipe_of(
            {"id": id, **settings},
            teacher={"model": "exact"},
            training={"steps": 150, "batch": 16, "lr": 0.05},
            scene={"variants": 16, "label": 3},
        )
        method, problem = job.open_problem(recipe, Session(), {})
        student, _ = job.optimised(method, problem, Session())
        figures[id] = pairwise_distance(student.pixels)
    assert figures["vsd"] > 1.5 * figures["sds"]


def test_figures_of_particles():
    x = torch.randn(5, 2, 3)
    pairs = [float((x[i] - x[j]).square().mean().sqrt()) for i in range(5) for j in range(i)]
    assert math.isclose(pairwise_distance(x), sum(pairs) / 10, rel_tol=1e-6)
    assert saturation(torch.tensor([0.98, -0.981, 0.99, 0.0])) == 0.5
    with pytest.raises(UserError, match="have no distance"):
        pairwise_distance(x[:1])


def test_labels_by_number_by_name_and_by_what_a_character_is_called():
    names = ("LATIN CAPITAL LETTER A", "LATIN SMALL LETTER A", "DIGIT ONE")
    assert [pictures_job.class_number(n, names) for n in (2, "digit one", "a", "A")] == [2, 2, 1, 0]
    for wrong in ("latin capital leter a", "B", ""):
        with pytest.raises(UserError, match="unknown class") as error:
            pictures_job.class_number(wrong, names)
        assert "LATIN" in error.value.hint or "DIGIT" in error.value.hint
    with pytest.raises(UserError, match="there are 3 classes"):
        pictures_job.class_number(3, names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"id": "esd", "drop": 0}}, "never trained"),
        ({"method": {"id": "sds", "levels": (0.9, 0.1)}}, "noise levels from 0.9 to 0.1"),
        ({"method": {"id": "bsd"}, "scene": {"label": "any"}}, "asks for no class"),
        ({"method": {"id": "bsd"}, "teacher": {}}, "learns from a teacher"),
        ({"student": {"model": "cnn"}}, "renders no pictures"),
        ({"student": {"model": "particles", "args": {"variants": 3}}}, "scene.variants"),
        ({"student": {"model": "particles", "args": {"spred": 3}}}, "spred"),
        ({"teacher": {"model": "cnn", "train": {"steps": 2}}}, "no denoising network"),
        ({"teacher": {"model": "denoising-mlp"}}, "never trained"),
        ({"teacher": {"model": "exact", "train": {"steps": 2}}}, "exact score takes no"),
        ({"scene": {"label": 12}}, "there are 10 classes"),
        ({"data": {"source": "wine"}}, "makes pictures"),
    ],
)
def test_wrong_recipes_are_one_clear_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        ready(changes.pop("method", {"id": "sds"}), **changes)
    assert error.value.hint


def test_the_exact_score_refuses_what_does_not_fit_into_memory(monkeypatch):
    _, problem = job.open_problem(recipe_of({"id": "sds"}), Session(), {})
    monkeypatch.setattr("limbeck.scenes.priors.MOST", 1000)
    with pytest.raises(UserError, match="more than 1000"):
        exact_prior(problem.pictures, Cosine())


def test_a_given_network_stands_for_the_teacher_and_a_given_module_for_the_student():
    class Wall(torch.nn.Module):
        variants = 4

        def __init__(self):
            super().__init__()
            self.shade = torch.nn.Parameter(torch.zeros(4))

        def render(self, pick):
            return self.shade[pick][:, None, None, None].expand(-1, 1, 8, 8)

    _, problem = job.open_problem(recipe_of({"id": "sds"}), Session(), {})
    given = {"teacher": problem.teacher.network, "student": Wall()}
    method, problem = job.open_problem(recipe_of({"id": "sds"}), Session(), given)
    assert isinstance(problem.teacher, Denoiser) and problem.teacher.prediction == "v"
    student, _ = job.optimised(method, problem, Session())
    assert student.shade.abs().sum() > 0 and given["student"].shade.abs().sum() == 0
