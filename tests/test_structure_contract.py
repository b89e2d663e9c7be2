"""Every method of the structure wing as a user runs it: finite, deterministic, the teacher's bits unchanged, resume equals no-stop, and the
result opens again, learns on under a knowledge method and is exported.
"""

import copy
import functools
import os
import signal

import pytest
import torch

import limbeck
from limbeck import recipe as schema
from limbeck.engine.loop import Interrupted
from limbeck.method import find, registered
from limbeck.run import execute, run_recipe
from limbeck.storage import tensors_fingerprint
from limbeck.zoo import load_model
from tests.conftest import TINY, TINY_DENOISING, TINY_PAIRS, TINY_TEXT

STRUCTURE = [id for id, target in registered().items() if target.startswith("limbeck.structure.")]
CASES = [f"{id}/{family}" for id in STRUCTURE for family in find(id).tasks]
FAMILIES = {"classification": TINY, "language": TINY_TEXT, "denoising": TINY_DENOISING, "embedding": TINY_PAIRS}
STEPS = 6


def recipe_of(case, **changes):
    id, _, family = case.partition("/")
    contract = dict(find(id).contract)
    own = contract.pop("recipe", {})
    own = own.get(family, {}) if set(own) & set(FAMILIES) else own
    raw = copy.deepcopy({**FAMILIES[family], **own, "structure": {}, "baseline": False})
    raw.setdefault("student", {"model": "teacher"})
    if "student" not in own:
        raw["student"] = {"model": "teacher"}
    raw["method"] = {"id": id, **contract}
    raw["training"] = {**raw["training"], "steps": STEPS, "batch": 16}
    return raw | changes


@functools.cache
def finished(case, tmp):
    """One undisturbed run of a case, made once for all tests."""
    return run_recipe(recipe_of(case, baseline=True), out=tmp / case.replace("/", "-"))


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("structure")


def go(raw, out, resume=False, **given):
    """A run without a page."""
    return execute(schema.resolve(raw), out, resume=resume, given=given, report=False)


def weights(model):
    return tensors_fingerprint({k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)})


def plain(model):
    return getattr(model, "model", model) if not isinstance(model, torch.nn.Module) else model


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_finite_and_shows_what_it_must(case, tmp):
    result = finished(case, tmp)
    metrics, costs = result.summary["metrics"], result.summary["cost"]
    assert {"teacher", "student", "baseline"} <= set(metrics)
    assert all(value == value and abs(value) != float("inf") for row in metrics.values() for value in row.values())
    assert all(torch.isfinite(t).all() for t in plain(result.student).state_dict().values() if t.is_floating_point())
    assert costs["student"]["params"] > 0 and costs["student"]["bytes"] > 0
    names = [row["name"] for row in result.summary["table"]["rows"]]
    assert names[0] == "teacher" and names[-1].endswith("distilled")
    page = (result.folder / "report.html").read_text()
    assert "Quality over cost" in page


@pytest.mark.parametrize("case", CASES)
def test_the_result_opens_again(case, tmp):
    """What is on disk gives the same weights as what was measured, without a word about how it was made."""
    result = finished(case, tmp)
    again = load_model(result.folder / "student")
    assert weights(again) == weights(plain(result.student))


@pytest.mark.parametrize("case", CASES)
def test_the_same_seed_gives_the_same_bits_and_a_given_teacher_keeps_its_own(case, tmp):
    """Once more with the teacher as an object: pruning or quantising copies of it leaves it alone, and the student is the same."""
    first, teacher = finished(case, tmp), load_teacher(case)
    before = weights(teacher)
    again = go(recipe_of(case, teacher={"model": "object:Module"}), tmp / f"given-{case.replace('/', '-')}", teacher=teacher)
    assert weights(teacher) == before
    assert weights(plain(again.student)) == weights(plain(first.student))


@pytest.mark.parametrize("case", CASES)
def test_resume_equals_no_stop(case, tmp, monkeypatch):
    """Ctrl-C in the middle of the recovery, then --resume: the bits of an undisturbed run."""
    cls = find(case.partition("/")[0])
    if not cls.trains:
        pytest.skip("nothing is trained")
    first = finished(case, tmp)
    folder = tmp / f"stopped-{case.replace('/', '-')}"
    usual, done = cls.after_step, []

    def stopping(self, clock):
        usual(self, clock)
        done.append(clock.step)
        if len(done) == STEPS // 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(cls, "after_step", stopping)
    with pytest.raises(Interrupted):
        go(recipe_of(case), folder)
    monkeypatch.setattr(cls, "after_step", usual)
    resumed = go(recipe_of(case), folder, resume=True)
    assert weights(plain(resumed.student)) == weights(plain(first.student))


def load_teacher(case):
    from limbeck import models as floor
    from limbeck import recipe as schema
    from limbeck.engine.session import Session
    from limbeck.knowledge import models

    recipe = schema.resolve(recipe_of(case))
    data = floor.open_recipe_data(recipe.data, None, recipe)
    return next(iter(models.teacher_networks(recipe, data, Session(), {}).values()))


@pytest.mark.parametrize("case", CASES)
def test_the_result_is_a_student_for_knowledge(case, tmp):
    """Where weights are left to train, a method of the knowledge wing trains them."""
    student = load_model(finished(case, tmp).folder / "student")
    if not any(p.requires_grad for p in student.parameters()):
        pytest.skip("every weight is a code: a teacher, and no student")
    raw = recipe_of(case, student={"model": "object:Module"})
    family = case.partition("/")[2]
    raw |= {"method": {"id": "kd" if family in ("classification", "language") else "alone"}, "student": {"model": "object:Module"}}
    del raw["structure"]
    before = weights(student)
    taught = go(raw, tmp / f"kd-{case.replace('/', '-')}", student=student)
    assert weights(plain(taught.student)) != before


@pytest.mark.parametrize("case", CASES)
def test_the_result_is_exported(case, tmp):
    """ONNX says the same as the network."""
    pytest.importorskip("onnxruntime")
    from limbeck.zoo.export import export_onnx

    result = finished(case, tmp)
    if result.summary["data"]["name"] != "digits" or not case.endswith("/classification"):
        pytest.skip("pictures of digits only")
    student = load_model(result.folder / "student").eval()
    inputs = limbeck.data.open_data("digits", train=200).test.batch(torch.arange(3)).inputs
    made = export_onnx(student, inputs, tmp / f"{case.replace('/', '-')}.onnx", real_inputs=inputs)
    assert made["max_abs_difference"] < 1e-3
