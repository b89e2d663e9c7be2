"""Every registered method, a few steps: finite, deterministic, gradient reaches the student, the teacher's bits stay,
resume equals no-stop.
"""

import copy

import pytest
import torch

from limbeck import recipe as schema
from limbeck.engine.loop import Interrupted
from limbeck.engine.session import Session
from limbeck.knowledge import models
from limbeck.knowledge.program import KnowledgeProgram
from limbeck.method import find, make, registered
from limbeck.storage import tensors_fingerprint
from tests.conftest import TINY_DENOISING, TINY_PAIRS, TINY_TEXT

KNOWLEDGE = [id for id, target in registered().items() if target.startswith("limbeck.knowledge.")]
CASES = [f"{id}/{family}" for id in KNOWLEDGE for family in find(id).tasks]
STEPS = 12
WINDOWS = {
    "teacher": {"model": "bert", "args": {"layers": 2, "width": 32, "heads": 2}, "train": {"steps": 20, "batch": 8}},
    "student": {"model": "bert", "args": {"layers": 1, "width": 16, "heads": 2, "attn_implementation": "eager"}},
    "data": {"source": "stdlib-windows", "train": 200, "test": 32, "valid": 32},
    "text": {"tokenizer": "bpe:320", "length": 24},
}
WINDOWS["teacher"]["args"]["attn_implementation"] = "eager"
OWN: dict[str, dict] = {"masked-lm/classification": WINDOWS, "ernie-tiny/classification": WINDOWS}
OWN["ddk/language"] = {
    "data": {"source": "stdlib-domains", "train": 200, "test": 50, "valid": 50},
    "method": {"id": "ddk", "interval": 3, "samples": 4},
}
OWN["sequence-kd/language"] = {"method": {"id": "sequence-kd", "temperature": 1.0, "tokens": 8}}
OWN["universal-logit/language"] = {"teacher": {**TINY_TEXT["teacher"], "text": {"tokenizer": "bpe:400", "length": 40}}}
OWN["distilling-step-by-step/language"] = {
    "student": {"model": "t5", "args": {"layers": 1, "width": 16, "heads": 2}},
    "data": {"source": "tables-in-words", "args": {"explain": "tree"}, "train": 40, "test": 12},
    "text": {"tokenizer": "bpe:320", "length": 96},
    "method": {"id": "distilling-step-by-step", "labelled": 12},
}
OWN["matryoshkakv/language"] = {"student": {"model": "teacher"}, "method": {"id": "matryoshkakv", "samples": 8, "search_step": 0.5}}
OWN["mgsr/language"] = {"method": {"id": "mgsr", "tokens": 6}}
"""What a method needs beyond the tiny recipe of its family."""


def job(case, tiny, **changes):
    """Data, networks and a function that builds a fresh program; every call gives equal bits."""
    id, _, family = case.partition("/")
    cls = find(id)
    tiny = {"classification": tiny, "language": TINY_TEXT, "embedding": TINY_PAIRS, "denoising": TINY_DENOISING}[family or "classification"]
    raw = copy.deepcopy({**tiny, "method": id, **changes, **OWN.get(case, {})})
    raw["data"] = {"valid": 60 if tiny["data"]["source"] == "digits" else 8, **raw["data"]}
    network = raw["teacher"]
    if cls.teacher_names:
        raw["teacher"] = {"models": {name: network for name in cls.teacher_names}}
    raw["training"] = {**tiny["training"], "steps": STEPS, "batch": 16, **changes.get("training", {})}
    recipe = schema.resolve(raw)
    session = Session(digest="contract")
    data = models.open_recipe_data(recipe.data, None, recipe)
    task = models.task_of(recipe, data)
    networks = models.teacher_networks(recipe, data, session, {}) if cls.teacher_kind in ("frozen", "online") else {}

    def program(student=None):
        method = make(id, recipe.method.settings)
        student = student or models.make_student(recipe, data, session, {})
        own = {name: copy.deepcopy(n).requires_grad_(cls.teacher_kind == "online") for name, n in networks.items()}
        teacher = models.make_teacher(recipe.teacher, method, own, student, data, session, task)
        method.task = task
        prepared = method.prepare(data, teacher, session, recipe.seed)
        return KnowledgeProgram(method, student, teacher, prepared, task, recipe.training, seed=0)

    return program


def weights(program):
    return tensors_fingerprint(program.network().state_dict())


@pytest.mark.parametrize("id", CASES)
def test_a_few_steps(id, tiny):
    """The student moves, every term and weight is finite, and a frozen teacher keeps its bits."""
    program = job(id, tiny)()
    before = weights(program)
    frozen = {
        name: tensors_fingerprint(n.state_dict()) for name, n in program.teacher.networks().items() if name not in program.teacher.kept()
    }
    records = []

    class Keep:
        start = tick = finish = close = lambda self, *a: None

        def log(self, record):
            records.append(record)

    Session(callbacks=[Keep()], watch=1).fit(program, "student", seed=0)
    assert weights(program) != before
    assert all(torch.isfinite(p).all() for p in program.student.parameters())
    norms = [part["norm"] for r in records for part in r.get("terms", {}).values() if "norm" in part]
    assert norms and max(norms) > 0, "no term has a gradient"
    for name, network in program.teacher.networks().items():
        if name in frozen:
            assert tensors_fingerprint(network.state_dict()) == frozen[name]
            assert not network.training and not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("id", CASES)
def test_each_student_parameter_is_reached(id, tiny):
    """One step's loss has a gradient in every parameter of the student that is used to predict."""
    if id.startswith("masked-lm"):
        pytest.skip("pre-training leaves the classifier alone")
    program = job(id, tiny)()
    from limbeck.engine.clock import Clock

    program.train()
    clock = Clock(5, program.steps_per_epoch, program.total)
    clock.step = program.steps_per_epoch  # past warm-ups that start at zero
    batch = next(iter(program.batches(1, 0)))
    sum(program.losses("student", batch, clock).values()).backward()
    missing = [
        name for name, p in program.student.named_parameters() if p.requires_grad and (p.grad is None or not torch.isfinite(p.grad).all())
    ]
    assert not missing


@pytest.mark.parametrize("id", CASES)
def test_resume_equals_no_stop(id, tiny, tmp_path):
    """Two whole runs give equal bits; so does one that stops in the middle of an epoch and goes on in a new process's objects."""
    build = job(id, tiny)
    whole = build()
    Session().fit(whole, "student", seed=0)
    again = build()
    Session().fit(again, "student", seed=0)
    assert weights(again) == weights(whole), "the same seed gave other bits"

    class StopAt:
        log = start = finish = close = lambda self, *a: None

        def __init__(self, program):
            self.program = program
            after = program.after_step

            def stop(clock):
                after(clock)
                if clock.step == 6:
                    import os
                    import signal

                    os.kill(os.getpid(), signal.SIGINT)

            program.after_step = stop

        def tick(self, step):
            pass

    first = build()
    StopAt(first)
    with pytest.raises(Interrupted):
        Session(folder=tmp_path).fit(first, "student", seed=0)
    second = build()
    Session(folder=tmp_path).fit(second, "student", seed=0)
    assert weights(second) == weights(whole)


@pytest.mark.parametrize("id", CASES)
def test_the_finished_student_predicts(id, tiny):
    """What comes out of a method is an ordinary network in evaluation mode that its task can measure."""
    from limbeck.evaluation.predict import predict

    program = job(id, tiny)()
    Session().fit(program, "student", seed=0)
    student = program.finish()
    if program.task.family != "classification":
        said = program.task.measure(student, program.data.test, 8, torch.device("cpu"), full=True)
        assert said.metrics[program.task.primary] == said.metrics[program.task.primary], "the headline is NaN"
        return
    logits, _ = predict(student, program.data.test)
    assert logits.shape == (len(program.data.test), len(program.task.classes)) and torch.isfinite(logits).all()


@pytest.mark.parametrize("id", registered())
def test_card(id):
    """A card that a reader can use, an id that agrees with the file, settings that explain themselves."""
    cls = find(id)
    card = cls.card
    assert card.id == id and card.title and 1980 < card.year < 2100 and card.claim and card.equation
    assert card.certainty in ("verified-in-code", "paper-text", "recalled", "inferred-from-abstract")
    assert not card.baseline or card.baseline in registered()
    assert cls.__doc__
    for name, item in cls.settings().items():
        assert item.metadata.get("help"), f"{name} has no help"


@pytest.mark.parametrize("id", CASES)
def test_accumulation_in_two_parts(id, tiny):
    """Cut batches run through the loop for every method (equality is tested where batches are not coupled)."""
    if id.startswith("tgeo-kd"):
        pytest.skip("the outer step needs whole batches")
    program = job(id, tiny, training={**tiny["training"], "steps": 4, "batch": 16, "accumulate": 2})()
    Session().fit(program, "student", seed=0)
    assert all(torch.isfinite(p).all() for p in program.student.parameters())
