"""Every registered condenser, a few steps: finite, deterministic, the set moves, teachers keep their bits, resume equals no-stop."""

import copy

import pytest
import torch

from limbeck import models
from limbeck import recipe as schema
from limbeck.condensation import job
from limbeck.condensation.synthetic import SyntheticSet
from limbeck.engine.loop import Interrupted
from limbeck.engine.session import Session
from limbeck.method import find, registered
from limbeck.storage import tensors_fingerprint

CONDENSERS = [id for id, target in registered().items() if target.startswith("limbeck.condensation.")]
PICTURES = [id for id in CONDENSERS if "samples" in find(id).works_on]
LEARNING = [id for id in PICTURES if find(id).card.family != "baseline"]

SMALL = {
    "name": "tiny",
    "student": {"model": "convnet", "args": {"width": 4, "depth": 2}},
    "data": {"source": "digits", "train": 300, "valid": 60},
    "training": {"steps": 4},
    "condense": {"per_class": 2, "students": {"steps": 5}, "seeds": 1},
    "threads": 1,
    "device": "cpu",
    "trackers": [],
}

TEACHERS = {
    "models": {
        name: {"model": "convnet", "args": {"width": width, "depth": 2, "norm": "batch"}, "train": {"steps": 20, "batch": 32, "lr": 0.01}}
        for name, width in (("a", 4), ("b", 6))
    }
}


def recipe_of(id):
    """The small recipe of a method; a method's `contract` says which settings make it quick."""
    cls = find(id)
    raw = copy.deepcopy(SMALL)
    raw["method"] = {"id": id, **cls.contract}
    if cls.needs_teachers:
        raw["teacher"] = copy.deepcopy(TEACHERS)
    return schema.resolve(raw)


def condensed(id, folder=None, callbacks=()):
    """The set that a few steps make, and the problem."""
    recipe = recipe_of(id)
    session = Session(folder=folder, checkpoints=schema.Checkpoints(every_steps=1), digest="contract", callbacks=callbacks)
    data = models.open_recipe_data(recipe.data)
    problem = job.open_problem(recipe, data, session, {})
    method = copy.deepcopy(job.make_method(recipe.method))
    return job.condense(method, problem, recipe.training.steps), problem, method


def bits(set):
    return tensors_fingerprint({**set.state_dict(), **set.encoded()})


@pytest.mark.parametrize("id", PICTURES)
def test_a_few_steps(id):
    """The set is finite, has the budget that was asked for, survives its file, and two runs give the same bits."""
    made, problem, _ = condensed(id)
    assert all(bool(torch.isfinite(p).all()) for p in made.parameters())
    counts = torch.bincount(made.decode()[1], minlength=10) if made.targets is None else None
    assert counts is None or (counts.min() >= 2 and counts.min() == counts.max())
    again, _, _ = condensed(id)
    assert bits(made) == bits(again)
    if id in LEARNING:
        start = problem.initial("real")
        moved = [p for name, p in made.named_parameters() if name in ("images", "patterns", "targets", "logits")]
        assert any(p.shape != start.images.shape or not torch.equal(p, start.images) for p in moved)


@pytest.mark.parametrize("id", PICTURES)
def test_the_file_holds_what_was_made(id, tmp_path):
    """A set that was saved and opened equals the set as stored; the counted bytes are those of the tensors in the file."""
    made, _, _ = condensed(id)
    made.save(tmp_path / "dataset")
    opened = SyntheticSet.load(tmp_path)
    stored = made.as_stored()
    for (name, a), (other, b) in zip(sorted(opened.state_dict().items()), sorted(stored.state_dict().items())):
        assert name == other and torch.allclose(a.float(), b.float(), atol=1e-6), name
    assert torch.equal(opened.decode()[1], stored.decode()[1])
    from safetensors.torch import load_file

    assert sum(t.numel() * t.element_size() for t in load_file(tmp_path / "dataset" / "set.safetensors").values()) == made.size()


@pytest.mark.parametrize("id", LEARNING)
def test_resume_equals_no_stop(id, tmp_path):
    """Stopped after two outer steps and run again, the set has the bits of the run that was not stopped."""
    from limbeck.engine.callbacks import Callback

    class Stop(Callback):
        def __init__(self):
            self.phase = ""

        def start(self, phase, step, total):
            self.phase = phase

        def log(self, record):
            if self.phase == job.PHASE and record.get("step", 0) >= 2:
                raise KeyboardInterrupt

    whole, _, _ = condensed(id, tmp_path / "whole")
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        condensed(id, tmp_path / "cut", [Stop()])
    resumed, _, _ = condensed(id, tmp_path / "cut")
    assert bits(whole) == bits(resumed)


@pytest.mark.parametrize("id", [id for id in LEARNING if find(id).needs_teachers])
def test_teachers_keep_their_bits(id):
    """Making a set changes no weight and no running statistic of a trained network."""
    recipe = recipe_of(id)
    data = models.open_recipe_data(recipe.data)
    problem = job.open_problem(recipe, data, Session(), {})
    before = {name: tensors_fingerprint(network.state_dict()) for name, network in problem.teachers.items()}
    job.condense(copy.deepcopy(job.make_method(recipe.method)), problem, 2)
    assert before == {name: tensors_fingerprint(network.state_dict()) for name, network in problem.teachers.items()}


@pytest.mark.parametrize("id", [id for id in LEARNING])
def test_soft_labels_can_be_given_to_others(id):
    """A method whose set has soft labels gives the same kind to random real images: the fair comparison needs it."""
    made, problem, method = condensed(id)
    if not made.soft and made.targets is None:
        assert method.soften(problem.initial("real"), problem) is None
        return
    other = method.soften(problem.initial("real"), problem)
    assert other is not None and other.soft == made.soft and (other.targets is None) == (made.targets is None)
    assert (other.view_logits is None) == (made.view_logits is None) and (other.logits is None) == (made.logits is None)
    assert other.how == made.how
