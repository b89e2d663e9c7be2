"""Every registered scenes method, a few steps: finite, deterministic, the student moves, the teacher keeps its bits, resume is exact."""

import copy

import pytest
import torch
from torch import nn

from limbeck import recipe as schema
from limbeck.engine.callbacks import Callback
from limbeck.engine.loop import Interrupted
from limbeck.engine.session import Session
from limbeck.method import find, registered
from limbeck.scenes import job
from limbeck.scenes.program import PHASE
from limbeck.scenes.scene import Scene, load_scene
from limbeck.scenes.scene_method import KINDS, SceneMethod
from limbeck.storage import tensors_fingerprint

METHODS = [id for id, target in registered().items() if target.startswith("limbeck.scenes.")]
COMMON = {
    "name": "tiny",
    "training": {"steps": 6, "batch": 8, "optimizer": "adam", "lr": 0.01, "weight_decay": 0, "ema": 0.9},
    "threads": 1,
    "device": "cpu",
    "trackers": [],
}
NET = {"levels": 2, "table": 64, "coarsest": 3, "finest": 6, "width": 8, "head": 8}
SCHOOL = {"steps": 20, "batch": 16, "lr": 0.01}
FIELD = {
    "teacher": {"model": "field-hash", "args": NET, "train": SCHOOL},
    "student": {"model": "field-mlp", "args": {"width": 8, "depth": 2, "frequencies": 2, "head": 8}},
    "data": {"source": "scene:globes", "train": 3, "test": 1, "size": 8},
    "scene": {"points": 6, "curve": 2},
}
PICTURE = {
    "teacher": {"model": "denoising-mlp", "args": {"width": 16, "depth": 1}, "train": {"steps": 30, "batch": 32, "lr": 0.003}},
    "student": {"model": "particles"},
    "data": {"source": "digits", "train": 200},
    "scene": {"variants": 3, "samples": 16, "curve": 0, "features": {"model": "cnn", "args": {"width": 4}, "train": {"steps": 20}}},
}
SMALL = {
    "field": FIELD,
    "picture": PICTURE,
    "paths": {**PICTURE, "student": {"model": "drawing"}},
}
"""A small recipe for each kind of scene."""


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """One cache for the module, so that the tiny teachers are trained once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def recipe_of(id, *changes):
    """The small recipe of a method; its `contract` says which settings and keys make it quick."""
    cls = find(id)
    quick = dict(cls.contract)
    own = quick.pop("recipe", {})
    raw = {**copy.deepcopy(COMMON), **copy.deepcopy(SMALL[cls.kind]), "method": {"id": id, **quick}}
    return schema.resolve(raw, changes=[*(f"{key}={value}" for key, value in own.items()), *changes])


def bits_of(teacher):
    network = teacher if isinstance(teacher, nn.Module) else teacher.network
    return tensors_fingerprint(network.state_dict()), any(p.requires_grad for p in network.parameters())


def optimised(id, folder=None, callbacks=(), changes=()):
    """The student after a few steps, its first weights, and its problem."""
    session = Session(folder=folder, checkpoints=schema.Checkpoints(every_steps=1), digest="contract", callbacks=callbacks)
    method, problem = job.open_problem(recipe_of(id, *changes), session, {})
    before = {name: value.clone() for name, value in problem.student.state_dict().items()}
    teacher = None if problem.teacher is None else bits_of(problem.teacher)
    student, program = job.optimised(method, problem, session)
    if problem.teacher is not None:
        assert teacher == bits_of(problem.teacher) and not teacher[1]
    return student, before, method, problem, program


def bits(student):
    return tensors_fingerprint(student.state_dict())


@pytest.mark.parametrize("id", METHODS)
def test_a_few_steps(id):
    """Weights are finite and moved, two runs give the same bits, another seed gives others."""
    student, before, method, problem, program = optimised(id)
    assert isinstance(method, SceneMethod) and method.kind in KINDS
    after = student.state_dict()
    assert all(bool(torch.isfinite(value).all()) for value in after.values() if value.is_floating_point())
    assert any(not torch.equal(before[name], after[name]) for name in before), "the student did not move"
    assert bits(student) == bits(optimised(id)[0])
    assert bits(student) != bits(optimised(id, changes=["seed=1"])[0])
    assert all(isinstance(value, float) for value in method.figures(student).values())
    assert [point["step"] for point in program.trace] == ([3, 6] if problem.spec.curve else [])


@pytest.mark.parametrize("id", METHODS)
def test_resume_equals_no_stop(id, tmp_path):
    """Stopped after three steps and run again, the student has the bits of the run that was not stopped."""

    class Stop(Callback):
        phase = ""

        def start(self, phase, step, total):
            self.phase = phase

        def log(self, record):
            if self.phase == PHASE and record.get("step", 0) >= 3:
                raise KeyboardInterrupt

    whole = optimised(id, tmp_path / "whole")[0]
    with pytest.raises((Interrupted, KeyboardInterrupt)):
        optimised(id, tmp_path / "cut", [Stop()])
    assert bits(optimised(id, tmp_path / "cut")[0]) == bits(whole)


@pytest.mark.parametrize("id", METHODS)
def test_the_gradient_reaches_the_student(id):
    """In every turn something of that turn's optimiser gets a gradient; in the student's turn the student does."""
    session = Session()
    method, problem = job.open_problem(recipe_of(id), session, {})
    from limbeck.engine.clock import Clock
    from limbeck.scenes.program import SceneProgram

    torch.manual_seed(0)
    program = SceneProgram(method, problem)
    program.train()
    reached = set()
    for step in range(3):
        clock = Clock(step, 3, 3)
        for turn in program.turns(clock):
            sum(program.losses(turn, None, clock).values()).backward()
            groups = program.optimizers()[turn].param_groups
            moved = [p for group in groups for p in group["params"] if p.grad is not None and bool(p.grad.abs().max() > 0)]
            assert moved, f"nothing in the turn {turn}"
            reached.add(turn)
            program.optimizers()[turn].step()
            for module in program.modules().values():
                module.zero_grad()
        program.after_step(clock)
    assert reached >= {"student"} and reached <= set(program.optimizers())


@pytest.mark.parametrize("id", METHODS)
def test_what_is_saved_opens_again(id, tmp_path):
    """The artifact of a run is a folder that opens by itself, with the same weights, and says its kind."""
    recipe = recipe_of(id)
    session = Session(folder=tmp_path / "run")
    outcome = job.run(recipe, session, {})
    assert set(outcome.artifacts) == {"scene"} and isinstance(outcome.artifacts["scene"], Scene)
    assert {"method", "wing", "metrics", "primary", "table", "headline", "data", "cost"} <= set(outcome.summary)
    assert outcome.summary["wing"] == "scenes" and outcome.summary["primary"] in outcome.summary["metrics"]["student"]
    scene = outcome.artifacts["scene"]
    scene.save(tmp_path / "scene", card=outcome.card({**outcome.summary, "name": "tiny", "seed": 0, "versions": {}}))
    opened, note = load_scene(tmp_path)
    assert bits(opened) == bits(scene.held) and note["kind"] == find(id).kind
    assert outcome.sections({**outcome.summary, "alarms": []}, []), "the wing's parts of the report"


def test_looking_on_the_way_changes_nothing(monkeypatch):
    """With or without a curve, and whatever a look draws, the student has the same bits."""
    from limbeck.scenes.fields import FieldProblem

    alone = optimised("pvd", changes=["scene.curve=0"])[0]
    monkeypatch.setattr(FieldProblem, "watch", lambda self, student: {"psnr": float(torch.rand(7).sum())})
    looked, *_, program = optimised("pvd", changes=["scene.curve=3"])
    assert bits(alone) == bits(looked) and len(program.trace) == 3


def test_kept_teachers_are_found_again_by_what_made_them():
    """The same views and settings find the same teacher; other views, points or steps have one of their own."""

    def teacher(*changes):
        _, problem = job.open_problem(recipe_of("pvd", *changes), Session(), {})
        return bits_of(problem.teacher)[0]

    usual = teacher()
    assert teacher() == usual == teacher("seed=3", "training.lr=0.1", "student.args.width=4")
    others = [
        teacher("data.source=scene:letter"),
        teacher("scene.points=5"),
        teacher("teacher.train.steps=19"),
        teacher("teacher.train.seed=1"),
    ]
    assert len({usual, *others}) == 5
