"""The loop: schedules, accumulation, guards, programs without gradients; each against something computed here by hand."""

import math

import pytest
import torch
from torch import nn

import limbeck as library
from limbeck.engine.clock import Clock
from limbeck.engine.loop import Loop, Plan
from limbeck.engine.schedule import factor
from limbeck.engine.session import Session
from limbeck.engine.watch import shares, term_norms
from limbeck.errors import UserError
from limbeck.recipe import Training


def train(tiny, tmp_path, name, **training):
    tiny["training"] |= training
    tiny["baseline"] = False
    return library.run_recipe(tiny, out=tmp_path / name).student.state_dict()


def test_accumulation_equals_the_whole_batch(tiny, tmp_path):
    """Cut into 4 parts with unequal numbers of labels, the gradient is that of the whole batch (no batch-norm in an mlp)."""
    import copy

    whole = train(copy.deepcopy(tiny), tmp_path, "whole", optimizer="sgd")
    parts = train(copy.deepcopy(tiny), tmp_path, "parts", optimizer="sgd", accumulate=4)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=2e-5, rtol=1e-4)


def test_the_loop_is_the_hand_written_loop():
    """Weights after some steps equal those of a plain loop with the same batches, losses and optimiser, to the bit."""
    from limbeck.data import Batches
    from limbeck.engine.session import seed_everything
    from limbeck.knowledge.methods.kd import KD
    from limbeck.knowledge.program import KnowledgeProgram
    from limbeck.knowledge.teachers import FrozenTeacher
    from limbeck.losses import cross_entropy, forward_kl
    from limbeck.tasks import Classification

    data = library.open_data("digits", train=200)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    import copy

    other = copy.deepcopy(student)
    training = Training(steps=20, batch=32, optimizer="sgd", lr=0.1, schedule="cosine", warmup=0.1)
    program = KnowledgeProgram(KD(), student, FrozenTeacher(teacher), data, Classification(data.classes), training, seed=3)
    Session().fit(program, "student", seed=3)

    seed_everything(3, "student")
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    batches, step = Batches(data.train, 32, seed=3), 0
    for epoch in range(10):
        for batch in batches.epoch(epoch):
            if step == 20:
                break
            with torch.no_grad():
                t = teacher(batch.inputs)
            s = other(batch.inputs)
            loss = 0.9 * forward_kl(s, t, temperature=4.0) + (1 - 0.9) * cross_entropy(s, batch.labels)
            loss.backward()
            warm = int(0.1 * 20)
            rate = (step + 1) / (warm + 1) if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (20 - warm)))
            optimizer.param_groups[0]["lr"] = 0.1 * rate
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    for mine, hand in zip(program.student.parameters(), other.parameters()):
        assert torch.equal(mine, hand)


@pytest.mark.parametrize(("schedule", "expected"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5), ("step", 0.1)])
def test_schedule_in_the_middle(schedule, expected):
    assert factor(Training(schedule=schedule, warmup=0, milestones=(0.5, 0.75)), 50, 100) == pytest.approx(expected)


def test_schedule_ends():
    training = Training(schedule="cosine", warmup=0.1)
    assert 0 < factor(training, 0, 100) < 0.2 and factor(training, 10, 100) == pytest.approx(1) and factor(training, 99, 100) < 0.01


def test_clock():
    clock = Clock(25, 10, 100)
    assert (clock.epoch, clock.epochs, clock.progress) == (2, 10, 0.25)


def test_term_norms_against_a_formula():
    """d/dw of 3 w.x is 3 x, of (w.x)^2 is 2 (w.x) x."""
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    x = torch.tensor([3.0, 4.0])
    norms = term_norms({"a": 3 * (w @ x), "b": (w @ x) ** 2, "c": torch.tensor(1.0)}, [w])
    assert norms == {"a": pytest.approx(15.0), "b": pytest.approx(2 * 11 * 5.0), "c": 0.0}
    assert shares(norms)["a"] == pytest.approx(15 / 125)


class Counter:
    """A program without gradient: it counts, and remembers what it saw."""

    steps_per_epoch = 4

    def __init__(self):
        self.seen = []

    modules = optimizers = evaluate = lambda self: {}
    train = lambda self: None  # noqa: E731
    vitals = lambda self: []  # noqa: E731
    turns = lambda self, clock: ("count",)  # noqa: E731
    after_step = lambda self, clock: None  # noqa: E731

    def batches(self, epoch, start):
        return iter([epoch * 4 + i for i in range(start, 4)])

    def losses(self, turn, batch, clock):
        self.seen.append(batch)
        return {"found": torch.tensor(float(batch))}

    def memory(self):
        return {"seen": list(self.seen)}

    def restore(self, memory):
        self.seen = memory["seen"]


def test_program_without_gradient(tmp_path):
    program = Counter()
    Loop(program, Plan(Training(), 10, tmp_path, every_steps=3)).run()
    assert program.seen == list(range(10))
    again = Counter()
    Loop(again, Plan(Training(), 10, tmp_path, every_steps=3)).run()
    assert again.seen == list(range(10))


def test_nan_guard_names_the_step_and_the_samples(tmp_path):
    class Bad(Counter):
        def losses(self, turn, batch, clock):
            return {"found": torch.tensor(float("nan") if batch == 7 else 1.0)}

    with pytest.raises(UserError, match="at step 7"):
        Loop(Bad(), Plan(Training(), 10, tmp_path, every_steps=3, log_every=1)).run()


def constant_student(tiny, tmp_path, **more):
    import sys

    (tmp_path / "flat.py").write_text(
        "import torch\nfrom torch import nn\n\nclass Flat(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.bias = nn.Parameter(torch.zeros(10))\n\n"
        "    def forward(self, x):\n        return self.bias.expand(len(x), 10)\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        tiny |= {"student": "python:flat:Flat", "baseline": False, **more}
        tiny["data"]["valid"] = 60
        tiny["evaluation"] = {"every": 1}
        return library.run_recipe(tiny, out=tmp_path / "out")
    finally:
        sys.path.remove(str(tmp_path))


def test_alarms_for_a_constant_student(tiny, tmp_path):
    """A student that says the same of everything is below chance and constant: both alarms, in the log and in the summary."""
    result = constant_student(tiny, tmp_path)
    text = " ".join(result.summary["alarms"])
    assert "constant output" in text and "no better than chance" in text
    assert '"alarm"' in (tmp_path / "out/log.jsonl").read_text()


def test_stop_on_alarm(tiny, tmp_path):
    with pytest.raises(UserError, match="constant output"):
        constant_student(tiny, tmp_path, stop_on_alarm=True)


def test_mixed_precision(tiny, tmp_path):
    """bfloat16 through Accelerate gives a student close to, and not the same as, the float32 one."""
    import copy

    plain = train(copy.deepcopy(tiny), tmp_path, "plain")
    mixed = library.run_recipe({**copy.deepcopy(tiny), "precision": "bf16", "baseline": False}, out=tmp_path / "mixed").student.state_dict()
    gap = max(float((plain[k] - mixed[k]).abs().max()) for k in plain)
    assert 0 < gap < 0.2


def test_tensorboard_through_accelerate(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    library.run_recipe({**tiny, "trackers": ["tensorboard"], "baseline": False}, out=tmp_path / "out")
    assert list((tmp_path / "out").rglob("events.out.tfevents*"))
