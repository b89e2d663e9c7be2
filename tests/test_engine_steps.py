"""What of a training step is still held when the step is over, and which steps a compiled student takes uncompiled."""

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch

from limbeck import recipe, zoo
from limbeck.data import open_data
from limbeck.engine.callbacks import Callback
from limbeck.engine.loop import Loop, Plan
from limbeck.knowledge.methods.kd import KD
from limbeck.knowledge.program import KnowledgeProgram
from limbeck.knowledge.teachers import FrozenTeacher
from limbeck.tasks import Classification


def job(method, network, steps):
    """A program of a small picture task, its teacher and its plan's training."""
    x, y = torch.rand(32, 3, 8, 8), torch.arange(32) % 4
    data = open_data((x, y), test=8)
    teacher = FrozenTeacher(zoo.build("cnn", input_shape=(3, 8, 8), classes=4, width=4), method.teacher_wants)
    training = recipe.Training(steps=steps, batch=8, optimizer="sgd", lr=1e-3)
    return KnowledgeProgram(method, network, teacher, data, Classification(data.classes), training)


def student():
    torch.manual_seed(0)
    return zoo.build("cnn", input_shape=(3, 8, 8), classes=4, width=4)


class Log(Callback):
    def __init__(self):
        self.terms = []

    def log(self, record):
        if "terms" in record:
            self.terms.append(record["terms"])


def norms_of(network, steps=4, watch=2):
    torch.manual_seed(1)
    log, program = Log(), job(KD(), network, steps)
    Loop(program, Plan(program.training, steps, watch=watch, log_every=1), callbacks=[log]).run()
    return [[term["norm"] for term in terms.values()] for terms in log.terms if "norm" in terms["kl"]]


def test_a_compiled_student_is_not_compiled_where_terms_are_measured():
    """A compiled backward pass must not be gone through twice: of four steps the first, second and fourth are measured."""
    ran = []

    def backend(module, example):
        def run(*given):
            ran.append(torch.is_grad_enabled())
            return module.forward(*given)

        return run

    network = student()
    network.compile(backend=backend)
    measured = norms_of(network)
    assert len(measured) == 3 and sum(ran) == 1
    for found, plain in zip(measured, norms_of(student())):
        assert found == pytest.approx(plain, rel=1e-5)
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_student_that_was_trained_compiled_before(tmp_path, monkeypatch):
    """Its compiled backward pass is there already when limbeck begins."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    network = student()
    network.compile()
    network(torch.rand(8, 3, 8, 8)).logsumexp(1).sum().backward()
    network.zero_grad(set_to_none=True)
    for found, plain in zip(norms_of(network), norms_of(student()), strict=True):
        assert found == pytest.approx(plain, rel=1e-4)


def test_feature_maps_are_gone_before_the_next_step():
    """Nothing keeps the signals of a step: their maps would lie beside those of the next one."""
    seen, alive = [], []

    @dataclass
    class Watching(KD):
        student_wants = ("logits", "stages")
        teacher_wants = ("logits", "stages")

        def step(self, batch, models, clock):
            gc.collect()
            alive.append(sum(map_() is not None for map_ in seen))
            return super().step(batch, models, clock)

        def loss(self, batch, student, teacher, clock):
            seen.extend(weakref.ref(value) for side in (student, teacher) for value in side.stages)
            return {**super().loss(batch, student, teacher, clock), "map": student.stages[0].square().mean()}

    program = job(Watching(), student(), 4)
    Loop(program, Plan(program.training, 4)).run()
    assert len(seen) >= 8 and alive == [0] * 4
    assert program.vitals() == []
