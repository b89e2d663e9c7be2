"""Trajectory matching, FTD, DATM and AST against loops over ordinary modules, and what each adds to the one before."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from limbeck import models
from limbeck import recipe as schema
from limbeck.condensation import job
from limbeck.condensation.methods import ftd
from limbeck.condensation.methods.ast_smooth_expert import AST, balance, largest_step
from limbeck.condensation.methods.datm import DATM
from limbeck.condensation.methods.ftd import FTD, sharpness
from limbeck.condensation.methods.trajectory_matching import TrajectoryMatching
from limbeck.engine.clock import Clock
from limbeck.engine.session import Session
from limbeck.errors import UserError

CLOCK = Clock(0, 10, 10)
SMALL = {"experts": 2, "epochs": 5, "expert_batch": 64, "expert_lr": 0.05, "syn_steps": 4, "expert_epochs": 2, "max_start": 3, "rate": 0.05}


def problem_of(per_class=2, **condense):
    recipe = schema.resolve(
        {
            "name": "tiny",
            "method": {"id": "trajectory-matching"},
            "student": {"model": "convnet", "args": {"width": 4, "depth": 2}},
            "data": {"source": "digits", "train": 300},
            "condense": {"per_class": per_class, **condense},
            "threads": 1,
            "device": "cpu",
            "trackers": [],
        }
    )
    return job.open_problem(recipe, models.open_recipe_data(recipe.data), Session(), {})


def ready(cls, problem=None, **changes):
    """A prepared method with its problem and its set."""
    problem = problem or problem_of()
    method = cls(**{**SMALL, **changes})
    method.prepare(problem)
    return method, problem, method.begin(problem)


def drawn(method, seed):
    """Expert and start epoch that the next `losses` draws from this seed."""
    torch.manual_seed(seed)
    low, high = method.starts(CLOCK)
    return int(torch.randint(len(method._buffer), ())), int(torch.randint(low, high, ()))


def module_at(problem, weights):
    network = problem.network()
    torch.nn.utils.vector_to_parameters(weights, network.parameters())
    return network


def trained(problem, weights, batches, rate, momentum=0.0):
    """Weights after each step of torch's own SGD on an ordinary module; `batches` are (x, y, factor of the loss), y may be soft."""
    network = module_at(problem, weights.clone())
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum)
    path = []
    for x, y, factor in batches:
        optimizer.zero_grad()
        (factor * F.cross_entropy(network(x), y)).backward()
        optimizer.step()
        path.append(torch.nn.utils.parameters_to_vector(network.parameters()).detach().clone())
    return path


def distance(end, start, target):
    return float(((end - target) ** 2).sum() / ((start - target) ** 2).sum())


# ---- trajectory matching ----


@pytest.mark.parametrize("memory", ["full", "constant"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_distance_against_an_ordinary_training(memory, seed):
    method, problem, made = ready(TrajectoryMatching, memory_use=memory)
    expert, begin = drawn(method, seed)
    path = method._buffer.trajectory(expert)
    x, y = made.decode()
    end = trained(problem, path[begin], [(x.detach(), y, 1.0)] * 4, 0.05)[-1]
    torch.manual_seed(seed)
    found = method.losses("set", made, problem, CLOCK)
    assert list(found) == ["trajectory"]
    assert float(found["trajectory"].detach()) == pytest.approx(distance(end, path[begin], path[begin + 2]), rel=1e-4)


@pytest.mark.parametrize("cls", [TrajectoryMatching, DATM])
def test_further_views_have_the_labels_of_their_originals(cls):
    """Copies stand behind the originals, whether labels are classes or rows of logits."""
    method, problem, made = ready(cls, **({"rho": 0.05, "threshold": 10.0} if cls is DATM else {}))
    method.views = lambda x: torch.cat([x, x.flip(-1)])
    expert, begin = drawn(method, 1)
    path = method._buffer.trajectory(expert)
    x, y = made.decode()
    y = y if made.logits is None else made.logits.detach().softmax(1)
    both = torch.cat([x, x.flip(-1)]).detach(), torch.cat([y, y]), 1.0
    end = trained(problem, path[begin], [both] * 4, 0.05)[-1]
    torch.manual_seed(1)
    found = float(method.losses("set", made, problem, CLOCK)["trajectory"].detach())
    assert found == pytest.approx(distance(end, path[begin], path[begin + 2]), rel=1e-4)


def test_batches_use_every_sample_before_any_again():
    method, problem, made = ready(TrajectoryMatching, batch_syn=8, syn_steps=6)
    seen, decode = [], made.decode
    made.decode = lambda index=None: (seen.append(index), decode(index))[1]
    method.losses("set", made, problem, CLOCK)
    assert [len(index) for index in seen] == [8, 8, 4, 8, 8, 4]
    for part in (seen[:3], seen[3:]):
        assert torch.cat(part).sort().values.tolist() == list(range(20))
    assert torch.cat(seen[:3]).tolist() != torch.cat(seen[3:]).tolist()


def test_starts_stay_within_the_window():
    method, problem, made = ready(TrajectoryMatching, min_start=1, max_start=3, syn_steps=1)
    begun, step_loss = set(), method.step_loss
    method.step_loss = lambda s, p, begin: (begun.add(begin), step_loss(s, p, begin))[1]
    for seed in range(20):
        torch.manual_seed(seed)
        method.losses("set", made, problem, CLOCK)
    assert begun == {1, 2}


def test_steps_lower_the_distance_and_move_the_rate():
    """Sixty outer steps come nearer than random real images, with either gradient."""
    for memory in ("full", "constant"):
        problem = problem_of()
        method = TrajectoryMatching(**{**SMALL, "lr_images": 10.0, "lr_rate": 1e-3, "memory_use": memory})
        made = job.condense(method, problem, 60)
        figures = method.figures(made, problem)
        assert figures["matching_loss"] < 0.8 * figures["matching_loss_before"]
        assert figures["learnt_rate"] == pytest.approx(float(made.lr.detach())) and figures["learnt_rate"] != pytest.approx(0.05)


def test_the_first_rate_and_the_first_images():
    method, problem, made = ready(TrajectoryMatching)
    assert float(made.lr.detach()) == pytest.approx(0.05) and torch.equal(made.images, problem.initial("real").images)
    groups = method.optimizers(made)["set"].param_groups
    assert [g["momentum"] for g in groups] == [0.5, 0.5] and groups[0]["params"][0] is made.images and groups[1]["params"][0] is made.lr


def test_the_figure_is_the_mean_over_experts_and_starts():
    method, problem, made = ready(TrajectoryMatching)
    x, y = made.decode()
    found = []
    for expert in range(2):
        path = method._buffer.trajectory(expert)
        for begin in range(3):
            end = trained(problem, path[begin], [(x.detach(), y, 1.0)] * 4, 0.05)[-1]
            found.append(distance(end, path[begin], path[begin + 2]))
    assert method.matching_loss(made, problem) == pytest.approx(sum(found) / 6, rel=1e-4)


def test_errors_accumulate_over_segments():
    """Each stretch begins where the student ended; five epochs hold two stretches of two."""
    method, problem, made = ready(TrajectoryMatching)
    x, y = made.decode()
    found = []
    for expert in range(2):
        path = method._buffer.trajectory(expert)
        end = trained(problem, path[0], [(x.detach(), y, 1.0)] * 8, 0.05)[-1]
        found.append(distance(end, path[0], path[4]))
    assert method.accumulated_error(made, problem) == pytest.approx(sum(found) / 2, rel=1e-4)


# ---- FTD ----


def test_the_average_of_the_images_is_what_is_kept():
    method, problem, made = ready(FTD, rho=0.05, ema=0.7)
    expected = made.images.detach().clone()
    for step in range(5):
        with torch.no_grad():
            made.images.add_(torch.randn_like(made.images))
        method.after_step(made, problem, CLOCK)
        expected = 0.7 * expected + 0.3 * made.images.detach()
        if step == 2:  # through a checkpoint
            kept = copy.deepcopy(method.memory())
            method.begin(problem)
            method.restore(kept)
    last = made.images.detach().clone()
    assert torch.allclose(method.finish(made, problem).images, expected, atol=1e-6) and not torch.allclose(last, expected)
    method, problem, made = ready(FTD, rho=0.05, ema=0.0)
    with torch.no_grad():
        made.images.add_(1.0)
    last = made.images.detach().clone()
    method.after_step(made, problem, CLOCK)
    assert torch.equal(method.finish(made, problem).images, last)


def test_an_average_that_stays_where_it_began_is_told():
    method, problem, made = ready(FTD, rho=0.05)
    assert method.alarms() == []
    method.after_step(made, problem, Clock(0, 150, 150))
    assert "93%" in method.alarms()[0] and "method.ema" in method.alarms()[0]
    method.after_step(made, problem, Clock(0, 5000, 5000))
    assert method.alarms() == []


def test_sharpness_against_a_module(monkeypatch):
    """The rise of the loss along its gradient by 0.05; the size of the chunks does not matter."""
    method, problem, _ = ready(FTD, rho=0.05)
    x, y = problem.all()
    found = []
    for expert in range(2):
        network = module_at(problem, method._buffer.trajectory(expert)[-1].clone())
        loss = F.cross_entropy(network(x), y)
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in network.parameters()]).norm()
        with torch.no_grad():
            for p in network.parameters():
                p.add_(0.05 * p.grad / norm)
            found.append(float(F.cross_entropy(network(x), y) - loss))
    expected = sum(found) / 2
    assert expected > 0 and sharpness(method, problem) == pytest.approx(expected, rel=1e-2)
    monkeypatch.setattr(ftd, "CHUNK", 70)
    assert sharpness(method, problem) == pytest.approx(expected, rel=1e-2)


def test_sharpness_aware_experts_are_flatter():
    """The mechanism, with a perturbation large enough to be seen after five epochs."""
    flat, problem, _ = ready(FTD, rho=0.5, alpha=0.4)
    plain, _, _ = ready(TrajectoryMatching)
    assert sharpness(flat, problem) < sharpness(plain, problem)
    figures = flat.figures(flat.begin(problem), problem)
    assert {"sharpness", "accumulated_error", "matching_loss", "learnt_rate"} <= set(figures)
    assert all(math.isfinite(value) for value in figures.values())


# ---- DATM ----


def test_the_inner_loss_reads_the_learnt_logits():
    method, problem, made = ready(DATM, rho=0.05, threshold=10.0)
    with torch.no_grad():
        made.logits.add_(torch.randn(made.logits.shape, generator=torch.Generator().manual_seed(3)))
    expert, begin = drawn(method, 1)
    path = method._buffer.trajectory(expert)
    x, _ = made.decode()
    end = trained(problem, path[begin], [(x.detach(), made.logits.detach().softmax(1), 1.0)] * 4, 0.05)[-1]
    torch.manual_seed(1)
    loss = method.losses("set", made, problem, CLOCK)["trajectory"]
    assert float(loss.detach()) == pytest.approx(distance(end, path[begin], path[begin + 2]), rel=1e-4)
    loss.backward()
    assert float(made.logits.grad.abs().sum()) > 0
    assert torch.allclose(made.logits.grad.sum(1), torch.zeros(20), atol=1e-5)  # softmax does not feel a shift
    groups = method.optimizers(made)["set"].param_groups
    assert [g["momentum"] for g in groups] == [0.5, 0.5, 0.9] and groups[2]["lr"] == 5.0


def test_both_memories_reach_the_logits():
    found = {}
    for use in ("full", "constant"):
        method, problem, made = ready(DATM, rho=0.05, threshold=10.0, memory_use=use)
        torch.manual_seed(1)
        method.losses("set", made, problem, CLOCK)["trajectory"].backward()
        found[use] = made.logits.grad.flatten()
    assert float(F.cosine_similarity(found["full"], found["constant"], 0)) > 0.95


def test_images_begin_with_those_that_experts_know(monkeypatch):
    """Rightly classified ones first, in the order of the experts that know them; unknown ones only fill up."""
    method, problem, _ = ready(DATM, rho=0.05)
    known, keys = {}, lambda x: [sample.numpy().tobytes() for sample in x.detach()]

    def logits(x):
        """Of every seven samples the first is known to expert 0 and the second to expert 1."""
        z = torch.zeros(2, len(x), 10)
        z[:, :, 1] = 1.0
        for i, key in enumerate(keys(x)):
            knows = known.setdefault(key, len(known) % 7)
            if knows < 2:
                z[knows, i, 0] = 5.0
        return z

    monkeypatch.setattr(method, "_last_logits", logits)
    problem._positions = problem.positions[:1]
    count = len(problem.positions[0])
    seventh = count // 7
    for wanted, allowed in ((1, {0}), (seventh, {0}), (2 * seventh, {0, 1}), (2 * seventh + 5, {0, 1, 2, 3, 4, 5, 6})):
        problem.per_class = wanted
        chosen = method._correct(problem).decode()[0]
        found = [known[key] for key in keys(chosen)]
        assert len(chosen) == wanted and set(found) <= allowed
    assert found.count(0) >= seventh and found.count(1) >= seventh  # what nobody knows only fills up


def test_a_step_that_is_taken_back_keeps_the_momentum_of_the_one_before():
    method, problem, made = ready(DATM, rho=0.05, threshold=10.0)
    optimizer = method.optimizers(made)["set"]

    def step():
        optimizer.zero_grad()
        method.losses("set", made, problem, CLOCK)["trajectory"].backward()
        optimizer.step()
        method.after_step(made, problem, CLOCK)

    def state():
        return [t.clone() for t in (made.images, made.logits, made.lr, *(s["momentum_buffer"] for s in optimizer.state.values()))]

    first = state()
    step()
    good = state()
    assert all(not torch.equal(a, b) for a, b in zip(first, good))
    method.threshold = 1e-9
    step()
    assert all(torch.equal(a, b) for a, b in zip(good, state()))
    method.threshold = 10.0
    step()
    assert all(not torch.equal(a, b) for a, b in zip(good, state()))


def test_others_get_the_same_soft_labels_and_hard_labels_give_none():
    method, problem, made = ready(DATM, rho=0.05)
    other = method.soften(made.copy(), problem)
    assert torch.allclose(other.logits, made.logits) and other.how["loss"] == "soft_ce"
    hard, _, made = ready(DATM, rho=0.05, soft=False)
    assert made.logits is None and hard.soften(made, problem) is None


# ---- AST ----


@pytest.mark.parametrize("intermediate", ["adaptive", "agg", "none"])
@pytest.mark.parametrize("seed", [0, 3])
def test_terms_against_an_ordinary_training(intermediate, seed):
    """Three epochs, eight steps: intermediate epochs after steps 2 and 4; momentum, balance and perturbed denominators included."""
    changes = {"expert_epochs": 3, "syn_steps": 8, "max_start": 3, "penalty": 0.5, "clipping": 2}
    method, problem, made = ready(AST, intermediate=intermediate, **changes)
    expert, begin = drawn(method, seed)
    path = method._buffer.trajectory(expert)
    start = method.perturbed(path[begin])  # the generator stands where it stands in `losses`
    half = 1
    factor = math.log(begin - half + 8, 5) if begin >= half else 1 / math.log(half - begin + 8, 5)
    x, y = made.decode()
    ends = trained(problem, start, [(x.detach(), y, factor)] * 8, 0.05, 0.9)
    torch.manual_seed(seed)
    found = {name: float(value.detach()) for name, value in method.losses("set", made, problem, CLOCK).items()}
    expected = {"trajectory": distance(ends[7], start, path[begin + 3])}
    if intermediate != "none":
        shares = (1.0, 1.0) if intermediate == "agg" else (1 / 3, 2 / 3)
        expected["intermediate"] = sum(share * distance(ends[2 * i - 1], start, path[begin + i]) for i, share in zip((1, 2), shares))
    assert found == pytest.approx(expected, rel=1e-3)


def test_only_convolutions_are_perturbed_and_by_how_much():
    method, _, _ = ready(AST)
    weights = method._buffer.trajectory(0)[2]
    torch.manual_seed(4)
    moved = method._functional.unflatten(method.perturbed(weights))
    torch.manual_seed(4)
    for name, w in method._functional.unflatten(weights).items():
        if w.ndim == 4:
            z = torch.randn(w.shape)
            assert torch.allclose(moved[name], w + z / z.norm() * w, atol=1e-6) and not torch.equal(moved[name], w)
        else:
            assert torch.equal(moved[name], w)
    method.perturbation = 0.0
    assert torch.equal(method.perturbed(weights), weights)


def test_the_figure_trains_as_the_method_does():
    """Momentum and the factor of the start epoch belong to the distance that is reported."""
    method, problem, made = ready(AST)
    x, y = made.decode()
    found = []
    for expert in range(2):
        path = method._buffer.trajectory(expert)
        for begin in range(3):
            end = trained(problem, path[begin], [(x.detach(), y, balance(begin, 3))] * 4, 0.05, 0.9)[-1]
            found.append(distance(end, path[begin], path[begin + 2]))
    assert method.matching_loss(made, problem) == pytest.approx(sum(found) / 6, rel=1e-3)


def test_slowed_experts_take_smaller_steps():
    """The mechanism: the clipped loss and the lower rate of AST against the same momentum experts without them."""
    slow, _, _ = ready(AST, expert_lr=0.02, clipping=5, penalty=0.0)
    fast, _, _ = ready(AST, expert_lr=0.02, clipping=0, penalty=0.0, drop=1.0)
    assert largest_step(slow) < largest_step(fast)
    paths = [fast._buffer.trajectory(number) for number in range(2)]
    by_hand = [max(float((b - a).norm()) for a, b in itertools.pairwise(path)) for path in paths]
    assert largest_step(fast) == pytest.approx(sum(by_hand) / 2, rel=1e-5)


def test_images_begin_near_distinct_centres():
    _, problem, made = ready(AST)
    assert torch.equal(made.images, problem.initial("kmeans").images)
    flat = made.images.detach().flatten(1)
    assert len({tuple(row.tolist()) for row in flat}) == 20


def test_what_cannot_be_matched_is_refused():
    with pytest.raises(UserError, match="memory_use=constant"):
        AST(**SMALL, memory_use="constant").prepare(problem_of())
    with pytest.raises(UserError, match="2 inner steps cannot stand for 3 epochs"):
        AST(**{**SMALL, "syn_steps": 2, "expert_epochs": 3}).prepare(problem_of())
