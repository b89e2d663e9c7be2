"""Every registered few-step method, a few steps: finite, deterministic, the student moves, the teacher keeps its bits, resume is exact."""

import copy

import pytest
import torch

from limbeck import recipe as schema
from limbeck.engine.callbacks import Callback
from limbeck.engine.loop import Interrupted
from limbeck.engine.session import Session
from limbeck.method import find, registered
from limbeck.sampling import job
from limbeck.sampling.generator import load_generator
from limbeck.storage import tensors_fingerprint

METHODS = [id for id, target in registered().items() if target.startswith("limbeck.sampling.")]
LEARNING = [id for id in METHODS if find(id).trains]
TEACHER = {"model": "denoising-mlp", "args": {"width": 24, "depth": 2}, "train": {"steps": 60, "batch": 32, "lr": 0.003}}
SMALL = {
    "name": "tiny",
    "student": {"model": "teacher"},
    "teacher": TEACHER,
    "data": {"source": "digits", "train": 300},
    "training": {"steps": 4, "batch": 8, "optimizer": "adam", "lr": 0.001, "ema": 0.9},
    "generate": {"steps": [1], "samples": 64, "features": {"model": "cnn", "args": {"width": 4}, "train": {"steps": 20}}},
    "threads": 1,
    "device": "cpu",
    "trackers": [],
}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """One cache for the module, so that the tiny teacher is trained once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def recipe_of(id):
    """The small recipe of a method; a method's `contract` says which settings make it quick."""
    cls = find(id)
    raw = copy.deepcopy(SMALL)
    raw["method"] = {"id": id, **cls.contract}
    if id in ("agd", "decoupled-dmd"):
        raw["generate"]["guidance"] = 2.0
    if id in ("pso", "diversity-distillation", "decoupled-dmd", "hyper-sd"):
        raw["generate"]["steps"] = [2]
    if not cls.needs_teacher and id == "diffusion-training":
        raw["student"] = {"model": "denoising-mlp", "args": {"width": 24, "depth": 2}}
    return schema.resolve(raw)


def distilled(id, folder=None, callbacks=()):
    """The generator that a few steps make, the job and the teacher's bits before and after."""
    recipe = recipe_of(id)
    session = Session(folder=folder, checkpoints=schema.Checkpoints(every_steps=1), digest="contract", callbacks=callbacks)
    method, pair = job.open_pair(recipe, session, {})
    before = {name: value.clone() for name, value in pair.student.network.state_dict().items()}
    teacher = None if pair.teacher is None else tensors_fingerprint(pair.teacher.network.state_dict())
    generator = job.distilled(method, pair, session)
    if pair.teacher is not None:
        assert teacher == tensors_fingerprint(pair.teacher.network.state_dict())
        assert not any(p.requires_grad for p in pair.teacher.network.parameters())
    return generator, pair, before


def bits(generator):
    return tensors_fingerprint(generator.denoiser.network.state_dict())


@pytest.mark.parametrize("id", METHODS)
def test_a_few_steps(id):
    """Weights are finite and moved, pictures are finite, two runs give the same bits, and what is measured can be named."""
    generator, pair, before = distilled(id)
    steps = max(pair.spec.steps)
    pictures = generator.sample(12, steps, seed=3)
    assert pictures.shape == (12, 1, 8, 8) and bool(torch.isfinite(pictures).all()) and float(pictures.abs().max()) <= 1
    after = generator.denoiser.network.state_dict()
    assert all(bool(torch.isfinite(value).all()) for value in after.values())
    if find(id).trains and id != "agd":
        assert any(not torch.equal(before[name], after[name]) for name in before), "the student did not move"
    if id == "agd":
        assert all(torch.equal(before[name], after[f"inner.{name}"]) for name in before), "the frozen network moved"
        assert any(float(p.abs().max()) > 0 for n, p in after.items() if n.endswith("layers.3.weight"))
    if find(id).trains:
        again, _, _ = distilled(id)
        assert bits(generator) == bits(again)


@pytest.mark.parametrize("id", LEARNING)
def test_resume_equals_no_stop(id, tmp_path):
    """Stopped after two steps and run again, the generator has the bits of the run that was not stopped."""

    class Stop(Callback):
        phase = ""

        def start(self, phase, step, total):
            self.phase = phase

        def log(self, record):
            if self.phase == job.PHASE and record.get("step", 0) >= 2:
                raise KeyboardInterrupt

    whole, _, _ = distilled(id, tmp_path / "whole")
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        distilled(id, tmp_path / "cut", [Stop()])
    resumed, _, _ = distilled(id, tmp_path / "cut")
    assert bits(whole) == bits(resumed)


@pytest.mark.parametrize("id", METHODS)
def test_the_folder_draws_the_same_pictures(id, tmp_path):
    """A generator that was saved and opened draws the very pictures of the one in memory, in any batch."""
    generator, pair, _ = distilled(id)
    generator.save(tmp_path / "generator")
    opened = load_generator(tmp_path)
    steps = max(pair.spec.steps)
    assert torch.equal(generator.sample(10, steps, seed=1), opened.sample(10, steps, seed=1))
    assert torch.allclose(generator.sample(10, steps, seed=1, batch=3), opened.sample(10, steps, seed=1), atol=1e-5)
