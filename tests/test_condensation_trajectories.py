"""Experts against loops written by hand, their files when a run is killed, torn or mistaken, and both gradients of a real method."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

from limbeck import models
from limbeck import recipe as schema
from limbeck.condensation import job
from limbeck.condensation.experts import Buffer, ExpertProgram, Schooling, gradient_penalty
from limbeck.condensation.methods.trajectory_matching import TrajectoryMatching
from limbeck.data.choose import generator
from limbeck.engine.callbacks import Callback
from limbeck.engine.clock import Clock
from limbeck.engine.loop import Interrupted
from limbeck.engine.session import Session
from limbeck.errors import UserError

RECIPE = {
    "name": "tiny",
    "method": {"id": "trajectory-matching"},
    "student": {"model": "convnet", "args": {"width": 4, "depth": 2}},
    "data": {"source": "digits", "train": 200},
    "condense": {"per_class": 2},
    "threads": 1,
    "device": "cpu",
    "trackers": [],
}
QUICK = Schooling(count=2, epochs=3, batch=64, lr=0.05)


def problem_of(changes=None, callbacks=()):
    """A small problem; `changes` are dotted keys of the recipe."""
    raw = copy.deepcopy(RECIPE)
    for key, value in (changes or {}).items():
        block = raw
        *path, last = key.split(".")
        for name in path:
            block = block[name]
        block[last] = value
    recipe = schema.resolve(raw)
    session = Session(checkpoints=schema.Checkpoints(every_steps=1), callbacks=callbacks)
    return job.open_problem(recipe, models.open_recipe_data(recipe.data), session, {})


def checksums(buffer):
    return {number: entry["sha256"] for number, entry in json.loads((buffer.folder / "index.json").read_text())["experts"].items()}


# ---- one expert ----


def by_hand(network, problem, how, seed):
    """The same schooling without the engine and without torch's optimiser: weights after every epoch."""
    x, y = problem.all()
    steps = len(y) // how.batch
    weights = list(network.parameters())
    velocity = [torch.zeros_like(w) for w in weights]
    rate, path = how.lr, [torch.cat([w.detach().flatten() for w in weights])]
    for epoch in range(how.epochs):
        if how.drop != 1 and epoch == how.epochs // 2:
            rate, velocity = how.lr * how.drop, [torch.zeros_like(w) for w in weights]
        order = torch.randperm(len(y), generator=generator(seed, epoch))
        share = [0.50, 0.55, 0.60, 0.65][epoch] if epoch < how.clipping else 1.0
        for k in range(steps):
            index = order[k * how.batch : (k + 1) * how.batch]
            loss = share * F.cross_entropy(network(x[index]), y[index])
            if how.penalty:
                plain = x[index].clone().requires_grad_(True)
                loss = loss + how.penalty * gradient_penalty(network(plain), plain)
            with torch.no_grad():
                for w, v, g in zip(weights, velocity, torch.autograd.grad(loss, weights)):
                    v.mul_(how.momentum).add_(g + how.weight_decay * w)
                    w.sub_(rate * v)
        path.append(torch.cat([w.detach().flatten() for w in weights]))
    return torch.stack(path)


@pytest.mark.parametrize(
    "how",
    [
        Schooling(epochs=3, batch=64, lr=0.05),
        Schooling(epochs=3, batch=64, lr=0.02, momentum=0.9, weight_decay=0.01),
        Schooling(epochs=3, batch=64, lr=0.02, momentum=0.9, weight_decay=1e-3, clipping=2, penalty=2.0, drop=0.6),
        Schooling(epochs=4, batch=64, lr=0.02, momentum=0.9, clipping=4, drop=0.5),
    ],
    ids=["plain", "momentum", "smooth", "even epochs"],
)
def test_an_expert_against_a_loop_by_hand(how):
    """Snapshots at the start and after each epoch: plain, with momentum and decay, and AST's slowed kind (odd and even epochs)."""
    problem = problem_of()
    torch.manual_seed(1)
    network = problem.network()
    expected = by_hand(copy.deepcopy(network), problem, how, seed=7)
    program = ExpertProgram(network, problem, how, seed=7)
    problem.session.fit(program, "expert", seed=7, evaluate=False)
    found = torch.stack(program.snapshots)
    assert found.shape == (how.epochs + 1, program.functional.size)
    assert torch.allclose(found, expected, atol=2e-5)
    assert float((found[1] - found[0]).norm()) > 0.01


def test_a_flat_experts_step_looks_ahead():
    """One step of a sharpness-aware expert without the surrogate gap is a step along the gradient at w + rho w^2 g / | |w| g |."""
    problem = problem_of()
    torch.manual_seed(1)
    network = problem.network()
    how = Schooling(epochs=1, batch=200, lr=0.1, rho=0.5, alpha=0.0)
    moved = copy.deepcopy(network)
    index = torch.randperm(200, generator=generator(3, 0))
    x, y = (part[index[:200]] for part in problem.all())
    gradients = torch.autograd.grad(F.cross_entropy(moved(x), y), list(moved.parameters()))
    size = sum(((w.detach() * g) ** 2).sum() for w, g in zip(moved.parameters(), gradients)).sqrt()
    start = [w.detach().clone() for w in moved.parameters()]
    with torch.no_grad():
        for w, g in zip(moved.parameters(), gradients):
            w.add_(0.5 * g * w**2 / size)
    ahead = torch.autograd.grad(F.cross_entropy(moved(x), y), list(moved.parameters()))
    expected = torch.cat([(w - 0.1 * g).flatten() for w, g in zip(start, ahead)])
    plain = torch.cat([(w - 0.1 * g).flatten() for w, g in zip(start, gradients)])
    program = ExpertProgram(network, problem, how, seed=3)
    assert program.total == 1
    problem.session.fit(program, "expert", seed=3, evaluate=False)
    assert torch.allclose(program.snapshots[1], expected, atol=1e-6)
    assert not torch.allclose(program.snapshots[1], plain, atol=1e-4)


# ---- many experts in a folder ----


class StopAt(Callback):
    """Ctrl-C in the middle of a phase."""

    def __init__(self, phase, step):
        self.phase, self.step, self.now = phase, step, ""

    def start(self, phase, step, total):
        self.now = phase

    def log(self, record):
        if self.now == self.phase and record.get("step", 0) >= self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("how", [QUICK, Schooling(2, 3, 64, 0.02, 0.9, 1e-3, clipping=2, drop=0.6)], ids=["plain", "smooth"])
@pytest.mark.parametrize("step", [2, 4])
def test_killed_and_made_again(tmp_path, how, step):
    """Stopped inside the second expert, the buffer keeps the first, goes on with the second, and ends with equal bits."""
    whole = Buffer(problem_of(), how, tmp_path / "whole").make()
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        Buffer(problem_of(callbacks=[StopAt("expert-1", step)]), how, tmp_path / "cut").make()
    cut = Buffer(problem_of(), how, tmp_path / "cut")
    assert list(checksums(cut)) == ["0"]
    written = (cut.folder / "expert-000.safetensors").stat().st_mtime_ns
    begun = []

    class Note(Callback):
        def start(self, phase, step, total):
            begun.append((phase, step > 0))

    cut = Buffer(problem_of(callbacks=[Note()]), how, tmp_path / "cut").make()
    assert begun == [("expert-1", True)]  # the finished one is left alone, the other does not begin at step 0
    assert (cut.folder / "expert-000.safetensors").stat().st_mtime_ns == written
    assert checksums(cut) == checksums(whole)
    assert not list(cut.folder.glob("training-*"))


def test_a_torn_file_is_named_and_only_it_is_made_again(tmp_path):
    buffer = Buffer(problem_of(), QUICK, tmp_path).make()
    before, kept = checksums(buffer), buffer.trajectory(1)
    torn = tmp_path / "expert-001.safetensors"
    content = torn.read_bytes()
    for broken in (content[: len(content) // 2], content[:-1] + bytes([content[-1] ^ 1])):
        torn.write_bytes(broken)
        fresh = Buffer(problem_of(), QUICK, tmp_path).make()
        assert fresh.trajectory(0).shape[0] == QUICK.epochs + 1
        with pytest.raises(UserError, match="expert-001") as failed:
            fresh.trajectory(1)
        assert "delete that file" in failed.value.hint
    torn.unlink()
    other = (tmp_path / "expert-000.safetensors").stat().st_mtime_ns
    again = Buffer(problem_of(), QUICK, tmp_path).make()
    assert checksums(again) == before and torch.equal(again.trajectory(1), kept)
    assert (tmp_path / "expert-000.safetensors").stat().st_mtime_ns == other


@pytest.mark.parametrize(
    ("changes", "how", "what"),
    [
        ({"student.args": {"width": 5, "depth": 2}}, QUICK, "another network"),
        ({"student.args": {"width": 4, "depth": 2, "pool": "max"}}, QUICK, "another network"),
        ({"data.train": 180}, QUICK, "another data"),
        ({"condense.siamese": "crop"}, QUICK, "another siamese"),
        ({}, Schooling(count=2, epochs=3, batch=64, lr=0.06), "another schooling"),
    ],
)
def test_experts_of_something_else_are_refused(tmp_path, changes, how, what):
    """In a folder of one's own; in the cache they would have another folder."""
    first = Buffer(problem_of(), QUICK, tmp_path).make()
    other = Buffer(problem_of(changes), how, tmp_path)
    with pytest.raises(UserError, match=what):
        other.make()
    with pytest.raises(UserError, match=what):
        other.trajectory(0)
    assert Buffer(problem_of(changes), how).folder != Buffer(problem_of(), QUICK).folder
    assert len(checksums(first)) == 2


def test_a_damaged_index_is_named(tmp_path):
    Buffer(problem_of(), QUICK, tmp_path).make()
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        Buffer(problem_of(), QUICK, tmp_path).make()


def test_runs_of_other_seeds_share_experts_and_more_may_join():
    """The cache's folder depends neither on the run's seed nor on the number of experts."""
    two = Buffer(problem_of(), QUICK).make()
    three = Buffer(problem_of({"seed": 5} | {"condense.per_class": 1}), Schooling(**{**vars(QUICK), "count": 3}))
    assert three.folder == two.folder
    before = checksums(two)
    after = checksums(three.make())
    assert len(after) == 3 and before.items() <= after.items()
    assert len(set(after.values())) == 3
    assert len(Buffer(problem_of(), QUICK)) == 2


def test_only_so_many_trajectories_stay_in_memory(tmp_path, monkeypatch):
    """What does not fit is read again, with the same numbers."""
    from limbeck.condensation import experts

    how = Schooling(**{**vars(QUICK), "count": 3})
    buffer = Buffer(problem_of(), how, tmp_path).make()
    kept = [buffer.trajectory(number).clone() for number in range(3)]
    assert len(buffer._loaded) == 3
    monkeypatch.setattr(experts, "LOADED_BYTES", 2 * kept[0].numel() * 4)
    small = Buffer(problem_of(), how, tmp_path)
    for number in (0, 1, 2, 1, 0):
        assert torch.equal(small.trajectory(number), kept[number])
        assert len(small._loaded) <= 2


# ---- both gradients of a real method, with augmentation and batches ----


def gradients(memory, steps, siamese="crop_scale_rotate", batch=8, views=1):
    """Of the trajectory distance for images and rate, from one state of the generator."""
    problem = problem_of({"condense.siamese": siamese})
    method = TrajectoryMatching(
        experts=2, epochs=3, expert_batch=64, expert_lr=0.05, syn_steps=steps, expert_epochs=2, max_start=2, rate=0.05, memory_use=memory
    )
    method.batch_syn = batch
    if views > 1:
        method.views = lambda x: torch.cat([x, *(x.flip(-1) for _ in range(views - 1))])
    method.prepare(problem)
    made = method.begin(problem)
    torch.manual_seed(11)
    loss = sum(method.losses("set", made, problem, Clock(0, 10, 10)).values())
    loss.backward()
    return float(loss.detach()), made.images.grad, made.lr.grad


@pytest.mark.parametrize("views", [1, 2])
def test_constant_memory_is_exact_for_one_augmented_step(views):
    """The second pass replays the augmentation and the batch of the first."""
    value, images, rate = gradients("full", 1, views=views)
    other, constant, other_rate = gradients("constant", 1, views=views)
    assert value == pytest.approx(other, rel=1e-5)
    assert torch.allclose(images, constant, rtol=1e-3, atol=1e-6) and float(rate) == pytest.approx(float(other_rate), rel=1e-3)
    assert 0 < int((images.flatten(1).abs().sum(1) > 0).sum()) <= 8


def test_constant_memory_is_close_for_five_augmented_steps():
    value, images, _ = gradients("full", 5)
    other, constant, _ = gradients("constant", 5)
    assert value == pytest.approx(other, rel=1e-5)
    assert float(F.cosine_similarity(images.flatten(), constant.flatten(), dim=0)) > 0.95
