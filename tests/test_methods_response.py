"""pld, nd, ofa, sinkd and ps-kd against formulas written out here, and against their papers' special cases."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from limbeck import method as registry
from limbeck import recipe, zoo
from limbeck.data import open_data
from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.knowledge.methods.ofa import _branch, _Tokens
from limbeck.knowledge.program import KnowledgeProgram
from limbeck.knowledge.teachers import FrozenTeacher, HistoryTeacher
from limbeck.signals import Signals
from limbeck.tasks import Classification

torch.set_num_threads(1)
B, C = 4, 5
CLOCK = Clock(0, 10, 100)


def rand(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def ce(logits, labels):
    """Mean over the rows that have a label."""
    known = [(row, y) for row, y in zip(np.asarray(logits), labels) if y >= 0]
    return sum(-np.log(softmax(row)[y]) for row, y in known) / max(len(known), 1)


def kl(s, t, temperature):
    p, q = softmax(np.asarray(t) / temperature), softmax(np.asarray(s) / temperature)
    return temperature**2 * (p * np.log(p / q)).sum(1).mean()


def bound(id, classes=C, **settings):
    made = registry.make(id, settings)
    made.bind(Classification(tuple(map(str, range(classes)))))
    return made


def batch_of(labels, **extra):
    return Batch(torch.zeros(len(labels), 1), torch.tensor(labels), torch.arange(len(labels)), extra)


def close(value, expected, tolerance=1e-6):
    value = float(value.detach()) if isinstance(value, torch.Tensor) else value
    assert value == pytest.approx(float(expected), rel=tolerance, abs=tolerance)


@pytest.fixture(scope="module")
def digits():
    return open_data("digits", train=96, valid=60, labelled=60)


def program(id, data, *, student="mlp", args=None, teacher=None, seed=0, augment=(), settings=None, **training):
    torch.manual_seed(seed)
    made = registry.make(id, settings or {})
    network = zoo.build(student, input_shape=data.input_shape, classes=10, **(args or {}))
    torch.manual_seed(99)
    other = teacher or zoo.build("cnn", input_shape=data.input_shape, classes=10, width=6)
    who = HistoryTeacher(len(data.train), 10) if made.teacher_kind == "history" else FrozenTeacher(other, made.wants()[1])
    options = recipe.Training(**{"epochs": 3, "batch": 32, **training})
    return KnowledgeProgram(made, network, who, data, Classification(data.classes), options, augment=augment)


# ---- pld ----


def pld_row(s, t, y, temperature):
    order = [y, *[c for c in np.argsort(-t, kind="stable") if c != y]]
    alpha = softmax(t / temperature)
    return sum(alpha[c] * (np.log(np.exp(s[order[k:]]).sum()) - s[c]) for k, c in enumerate(order)), order, alpha


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_pld_is_the_formula_and_its_gradient_is_the_papers(temperature):
    s, t, labels = rand(B, C).requires_grad_(), rand(B, C, seed=1), [0, 3, 4, 1]
    value = bound("pld", temperature=temperature).loss(batch_of(labels), Signals(logits=s), Signals(logits=t), CLOCK)
    assert list(value) == ["pld"]
    rows = [pld_row(a, b, y, temperature) for a, b, y in zip(s.detach().numpy(), t.numpy(), labels)]
    close(value["pld"], np.mean([row for row, _, _ in rows]), 1e-12)
    value["pld"].backward()
    expected = np.zeros((B, C))
    for b, (_, order, alpha) in enumerate(rows):
        worth = np.exp(s.detach().numpy()[b])
        for rank, i in enumerate(order):
            expected[b, i] = sum(alpha[order[k]] * worth[i] / worth[order[k:]].sum() for k in range(rank + 1)) - alpha[i]
    assert np.allclose(s.grad.numpy() * B, expected, atol=1e-10)


def test_pld_special_cases():
    s, t, labels = rand(B, C), rand(B, C, seed=1), [0, 3, 4, 1]
    loss = bound("pld").loss
    value = loss(batch_of(labels), Signals(logits=s), Signals(logits=t), CLOCK)["pld"]
    close(loss(batch_of(labels), Signals(logits=s + 7), Signals(logits=t), CLOCK)["pld"], value, 1e-12)
    sure = 1e4 * torch.eye(C, dtype=torch.float64)[labels]
    close(loss(batch_of(labels), Signals(logits=s), Signals(logits=sure), CLOCK)["pld"], ce(s, labels), 1e-10)
    unknown = [0, -1, 4, -1]
    best = [y if y >= 0 else int(t[b].argmax()) for b, y in enumerate(unknown)]
    expected = np.mean([pld_row(a, b, y, 1.0)[0] for a, b, y in zip(s.numpy(), t.numpy(), best)])
    close(loss(batch_of(unknown), Signals(logits=s), Signals(logits=t), CLOCK)["pld"], expected, 1e-12)
    # the two best of the teacher and the label: the rest is neither weighted nor in the sums
    short = bound("pld", topk=2).loss(batch_of(labels), Signals(logits=s), Signals(logits=t), CLOCK)["pld"]
    total = 0.0
    for a, b, y in zip(s.numpy(), t.numpy(), labels):
        order = [y, *[c for c in np.argsort(-b)[:2] if c != y]]
        total += sum(softmax(b)[c] * (np.log(np.exp(a[order[k:]]).sum()) - a[c]) for k, c in enumerate(order))
    close(short, total / B, 1e-10)


# ---- nd ----


def test_nd_is_the_formula_with_its_warm_up_and_hidden_labels():
    made = bound("nd", nd=2.5, kd=3.0, cls=0.5)
    s, t, labels = rand(B, C), rand(B, C, seed=1), [0, 3, -1, 1]
    f, g = rand(B, 6, seed=2, scale=0.7).requires_grad_(), rand(B, 6, seed=3)
    means = rand(C, 6, seed=4)
    made.state["directions"] = means / means.norm(dim=1, keepdim=True)
    student, teacher = Signals(logits=s, embedding=f), Signals(logits=t, embedding=g)
    expected, known = 0.0, [b for b in range(B) if labels[b] >= 0]
    for b in known:
        a, c = f.detach().numpy()[b], means[labels[b]].numpy()
        expected += 1 - a @ (c / np.linalg.norm(c)) / max(np.linalg.norm(a), np.linalg.norm(g.numpy()[b]))
    for step, warm in ((0, 0.0), (59, 0.25), (200, 1.0), (900, 1.0)):
        terms = made.loss(batch_of(labels), student, teacher, Clock(step, 10, 1000))
        close(terms["ce"], 0.5 * ce(s, labels), 1e-10)
        close(terms["kl"], warm * 3.0 * kl(s, t, 4.0), 1e-10)
        close(terms["nd"], 2.5 * expected / len(known), 1e-10)
    assert set(terms) == {"ce", "kl", "nd"}
    nothing = made.loss(batch_of([-1] * B), student, teacher, CLOCK)
    close(nothing["nd"], 0)
    close(nothing["ce"], 0)


def test_nd_pulls_short_embeddings_along_and_only_turns_long_ones():
    made = bound("nd", nd=1.0)
    e = torch.eye(C, dtype=torch.float64)
    made.state["directions"] = e
    f = torch.tensor([[0.1, 0.2, 0, 0, 0], [30.0, 40.0, 0, 0, 0]], dtype=torch.float64, requires_grad=True)
    g = torch.full((2, C), 2.0, dtype=torch.float64)
    terms = made.loss(batch_of([0, 0]), Signals(logits=e[:2], embedding=f), Signals(logits=e[:2], embedding=g), CLOCK)
    terms["nd"].backward()
    assert torch.allclose(f.grad[0], -e[0] / g[0].norm() / 2)  # the same pull everywhere inside the teacher's norm
    close(f.grad[1] @ f.detach()[1], 0, 1e-10)
    assert float(f.grad[1].norm()) > 0


def test_nd_directions_are_class_means_of_plain_labelled_samples(digits):
    made = program("nd", digits, augment=["noise:0.5"])
    teacher = made.teacher.network
    x, y = digits.train.inputs, digits.train.labels
    with torch.no_grad():
        features = teacher.pool(teacher.stages(teacher.stem(x.float()))).double().numpy()
    assert (y == -1).sum() == 36
    for c in range(10):
        mean = features[(y == c).numpy()].mean(0)
        assert np.allclose(made.method.state["directions"][c].numpy(), mean / np.linalg.norm(mean), atol=1e-5)
    assert "adapter" in made.method.parts and list(map(type, made.method.parts["adapter"])) == [nn.BatchNorm1d, nn.Dropout, nn.Linear]
    assert float(made.method.parts["adapter"][2].bias.detach().abs().max()) == 0
    same = program("nd", digits, args={"widths": (16, features.shape[1])})
    assert not same.method.parts
    Session().fit(made, "student", seed=0)
    figures = made.method.figures(made.finish(), digits, made.task, torch.device("cpu"))
    assert set(figures) == {"norm_ratio", "direction", "projection"}
    with torch.no_grad():
        test = digits.test.batch(torch.arange(len(digits.test)))
        s = made.method.parts["adapter"].eval()(made.student.stages(made.student.stem(test.inputs)))
        t = teacher.pool(teacher.stages(teacher.stem(test.inputs)))
        close(figures["norm_ratio"], (s.norm(dim=1) / t.norm(dim=1)).mean(), 1e-5)
        e = made.method.state["directions"][test.labels]
        close(figures["direction"], nn.functional.cosine_similarity(s, e).mean(), 1e-5)
        close(figures["projection"], ((s * e).sum(1) / t.norm(dim=1)).mean(), 1e-5)


# ---- ofa ----


def ofa_np(s, t, labels, eps, temperature, variant):
    total = 0.0
    for a, b, label in zip(s, t, labels):
        p, q = softmax(b / temperature), softmax(a / temperature)
        for c in range(len(a)):
            hit = float(c == label)
            if variant == "code":
                w = (p[c] + hit) ** eps - hit
            else:
                w = (1 + p[c]) ** eps if hit else p[c]
            total -= w * np.log(q[c])
    return total / len(s)


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("labels", [[0, 3, 4, 1], [0, -1, -1, 1]])
def test_ofa_is_the_formula_at_every_exit(variant, labels):
    made = bound("ofa", eps=(1.0, 1.5, 2.0), temperature=2.0, gt=0.7, kd=0.6, ofa=0.5, variant=variant)
    s, t = rand(B, C).requires_grad_(), rand(B, C, seed=1)
    features = [rand(B, 3, 4, 4, seed=2).requires_grad_(), rand(B, 6, seed=3).requires_grad_()]
    found = Signals(logits=s, stages=features)
    made.setup(SimpleNamespace(task=made.task, student_signals=found, teacher_signals=None))
    made.parts.double().eval()
    terms = made.loss(batch_of(labels), found, Signals(logits=t), CLOCK)
    exits = [made.parts[f"exit{i}"](features[i]).detach().numpy() for i in (0, 1)]
    close(terms["ce"], 0.7 * ce(s.detach(), labels), 1e-10)
    close(terms["kd"], 0.6 * ofa_np(s.detach().numpy(), t.numpy(), labels, 2.0, 2.0, variant), 1e-10)
    expected = sum(ofa_np(x, t.numpy(), labels, eps, 2.0, variant) for x, eps in zip(exits, (1.0, 1.5)))
    close(terms["exits"], 0.5 * expected, 1e-10)
    sum(terms.values()).backward()
    for feature in features:
        assert float(feature.grad.abs().sum()) > 0
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in made.parts.parameters())


def test_ofa_with_eps_one_is_the_soft_cross_entropy():
    made = bound("ofa", stages=())
    s, t = rand(B, C), rand(B, C, seed=1)
    found = Signals(logits=s, stages=[rand(B, 6)])
    made.setup(SimpleNamespace(task=made.task, student_signals=found))
    terms = made.loss(batch_of([0, 1, 2, 3]), found, Signals(logits=t), CLOCK)
    assert set(terms) == {"ce", "kd"} and not made.parts
    close(terms["kd"], -(softmax(t.numpy()) * np.log(softmax(s.numpy()))).sum(1).mean(), 1e-10)


def test_ofa_chooses_stages_and_refuses_wrong_ones():
    found = Signals(logits=rand(B, C), stages=[rand(B, 3, 4, 4), rand(B, 6, 2, 2), rand(B, 8, 1, 1)])
    pair = SimpleNamespace(task=Classification(tuple("abcde")), student_signals=found)
    made = bound("ofa", stages=(-1, 0), eps=[1.0, 1.0, 1.5])
    made.setup(pair)
    assert set(made.parts) == {"exit0", "exit2"}
    with pytest.raises(UserError, match="no stage 3"):
        bound("ofa", stages=(3,)).setup(pair)
    with pytest.raises(UserError, match="eps has 2"):
        bound("ofa", eps=(1.0, 1.0)).setup(pair)
    with pytest.raises(UserError, match="eps"):
        bound("ofa", eps=0.5)


def test_ofa_exits_of_maps_follow_the_papers_depth():
    exit = _branch(torch.zeros(2, 8, 16, 16), 2, 40, C)
    kinds = [type(m).__name__ for m in exit]
    block = ["Conv2d", "Conv2d", "BatchNorm2d", "ReLU"] * 2
    assert kinds == [*block, *block, "AdaptiveAvgPool2d", "Flatten", "Linear"]
    assert exit[:4](torch.zeros(2, 8, 16, 16)).shape == (2, 8, 8, 8) and exit[:8](torch.zeros(2, 8, 16, 16)).shape == (2, 16, 8, 8)
    assert exit[:16](torch.zeros(2, 8, 16, 16)).shape == (2, 40, 4, 4)
    assert exit[0].groups == 8 and exit[0].stride == (2, 2) and exit[4].stride == (1, 1)
    last = _branch(torch.zeros(2, 8, 4, 4), 0, 40, C)
    assert [type(m).__name__ for m in last] == ["Conv2d", "AdaptiveAvgPool2d", "Flatten", "Linear"] and last[0].kernel_size == (1, 1)
    assert float(last[-1].bias.detach().abs().max()) == 0 and float(last[-1].weight.detach().std()) < 0.03


@pytest.mark.parametrize("length, merges, extra", [(49, 0, 0), (50, 0, 1), (64, 1, 0), (66, 1, 2), (196, 1, 0), (784, 2, 0), (31, 0, None)])
def test_ofa_exits_of_tokens(length, merges, extra):
    tokens = _Tokens(length, 6, 2)
    assert len(tokens.merges) == merges and len(tokens.blocks) == 2
    assert tokens.extra == extra
    x = rand(2, length, 6).float()
    assert tokens(x).shape == (2, 6)
    tokens.blocks = nn.Identity()
    if extra:
        assert torch.equal(tokens(x), x[:, 0])
    elif not merges:
        assert torch.allclose(tokens(x), x.mean(1), atol=1e-6)
    else:
        seen = []
        tokens.merges[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        tokens(x)
        side = int(length**0.5)
        grid = x.view(2, side, side, 6)
        square = torch.cat([grid[:, 2, 4], grid[:, 2, 5], grid[:, 3, 4], grid[:, 3, 5]], -1)
        assert torch.equal(seen[0][:, side // 2 + 2], square)


@pytest.mark.parametrize("student, args", [("cnn", {"width": 4}), ("mixer", {"depth": 2, "dim": 12}), ("mlp", {"widths": (12, 12)})])
def test_ofa_trains_students_of_every_shape(digits, student, args):
    made = program("ofa", digits, student=student, args=args, epochs=1)
    before = copy.deepcopy(made.method.parts.state_dict())
    fit = Session().fit(made, "student", seed=0)
    after = made.method.parts.state_dict()
    assert fit.steps == 3 and made.method.parts
    assert all(not torch.equal(before[name], after[name]) for name, _ in made.method.parts.named_parameters())


# ---- sinkd ----


def sinkhorn_np(s, t, temperature, eps, rounds):
    p, q = softmax(s / temperature), softmax(t / temperature)
    w = np.abs(p[:, None] - q[None]).sum(-1)
    k = np.exp(-w / eps)
    for _ in range(rounds):
        k = k / k.sum(1, keepdims=True)
        k = k / k.sum(0, keepdims=True)
    assert np.allclose(k.sum(0), 1)
    return (k * w).sum()


def test_sinkd_is_the_formula():
    s, t, labels = rand(B, C).requires_grad_(), rand(B, C, seed=1), [0, -1, 4, 1]
    made = bound("sinkd", temperature=1.5, alpha=0.8, beta=0.5, scale=0.02)
    terms = made.loss(batch_of(labels), Signals(logits=s), Signals(logits=t), CLOCK)
    a, b = s.detach().numpy(), t.numpy()
    close(terms["soft"], -0.8 * (softmax(b / 1.5) * np.log(softmax(a / 1.5))).sum(1).mean(), 1e-10)
    close(terms["ce"], 0.2 * ce(a, labels), 1e-10)
    close(terms["transport"], 0.01 * sinkhorn_np(a, b, 2.0, 0.1, 20), 1e-8)
    (gradient,) = torch.autograd.grad(terms["transport"], s)
    h, (i, j) = 1e-5, (2, 3)
    up, down = a.copy(), a.copy()
    up[i, j] += h
    down[i, j] -= h
    close(gradient[i, j], 0.01 * (sinkhorn_np(up, b, 2.0, 0.1, 20) - sinkhorn_np(down, b, 2.0, 0.1, 20)) / (2 * h), 1e-6)
    assert set(bound("sinkd", beta=0, alpha=1).loss(batch_of(labels), Signals(logits=s), Signals(logits=t), CLOCK)) == {"soft"}


def test_sinkd_does_not_see_the_order_of_a_batch():
    t = rand(B, C, seed=1, scale=6)
    made = bound("sinkd", beta=1, scale=1, epsilon=0.005, iterations=50)
    other = made.loss(batch_of([0] * B), Signals(logits=t[[2, 0, 3, 1]]), Signals(logits=t), CLOCK)
    assert float(other["transport"]) < 1e-6
    far = made.loss(batch_of([0] * B), Signals(logits=t.roll(1, 1)), Signals(logits=t), CLOCK)
    assert float(far["transport"]) > 0.1


# ---- ps-kd ----


RAMP = [(0, 100, 0.08), (9, 100, 0.08), (10, 100, 0.16), (99, 100, 0.8), (14, 25, 1.6 / 3), (24, 25, 0.8), (3, 4, 0.8)]


@pytest.mark.parametrize("step, total, share", RAMP)
def test_ps_kd_is_the_formula_and_its_ramp(step, total, share):
    s, q, labels = rand(B, C).requires_grad_(), softmax(rand(B, C, seed=1).numpy()), [0, 3, -1, 1]
    terms = bound("ps-kd").loss(batch_of(labels), Signals(logits=s), Signals(logits=torch.from_numpy(q).log()), Clock(step, 10, total))
    known = [b for b in range(B) if labels[b] >= 0]
    target = (1 - share) * np.eye(C)[labels] + share * q
    logs = np.log(softmax(s.detach().numpy()))
    close(terms["ce"], -sum((target[b] * logs[b]).sum() for b in known) / len(known), 1e-6)
    terms["ce"].backward()
    for b in range(B):
        expected = (softmax(s.detach().numpy()[b]) - target[b]) / len(known) if b in known else 0
        assert np.allclose(s.grad[b].numpy(), expected, atol=1e-6)


def test_ps_kd_writes_back_what_was_said_after_the_target_was_made(digits):
    made = program("ps-kd", digits, args={"widths": (12,)})
    clock = Clock(0, made.steps_per_epoch, made.total)
    batch = next(iter(made.batches(0, 0)))
    table = made.teacher
    first = made.losses("student", batch, clock)["ce"]
    with torch.no_grad():
        said = made.student(batch.inputs)
    close(first, ce(said.double(), batch.labels.tolist()), 1e-5)  # the first meeting: the label alone
    assert torch.allclose(table.probabilities[batch.index], said.softmax(-1), atol=1e-6)
    assert int(table.seen.sum()) == len(batch)
    with torch.no_grad():
        made.student.head.bias += torch.randn(10)
        now = made.student(batch.inputs)
    clock.step = made.total - 1
    second = made.losses("student", batch, clock)["ce"]
    known = batch.labelled
    target = 0.2 * nn.functional.one_hot(batch.labels.clamp_min(0), 10) + 0.8 * said.softmax(-1)
    close(second, -(target * now.log_softmax(-1)).sum(1)[known].mean(), 1e-5)
    assert torch.allclose(table.probabilities[batch.index], now.softmax(-1), atol=1e-6)


def test_ps_kd_snapshot_is_the_student_of_the_former_epoch(digits):
    made = program("ps-kd", digits, student="cnn", args={"width": 4}, settings={"source": "snapshot"})
    snapshot = made.method.parts["snapshot"]
    (optimizer,) = made.optimizers().values()
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in made.student.parameters()}
    start = copy.deepcopy(made.student.state_dict())
    at_end: list[dict] = []
    inner = made.after_step

    def after_step(clock):
        inner(clock)
        state = snapshot.state_dict()
        if (clock.step + 1) % 3 == 0:
            at_end.append(copy.deepcopy(made.student.state_dict()))
        expected = at_end[-1] if at_end else start
        assert all(torch.equal(state[name], value) for name, value in expected.items())

    made.after_step = after_step
    Session().fit(made, "student", seed=0)
    assert len(at_end) == 3

    made.train()
    assert snapshot.training  # as the program leaves it; answers are given in evaluation mode all the same
    batch, clock = next(iter(made.batches(2, 0))), Clock(8, 3, 9)
    held = copy.deepcopy(snapshot.state_dict())
    with torch.no_grad():
        old = copy.deepcopy(snapshot).eval()(batch.inputs).softmax(-1)
        now = copy.deepcopy(made.student)(batch.inputs).log_softmax(-1)
    value = made.losses("student", batch, clock)["ce"]
    target = 0.2 * nn.functional.one_hot(batch.labels.clamp_min(0), 10) + 0.8 * old
    close(value, -(target * now).sum(1)[batch.labelled].mean(), 1e-5)
    assert all(torch.equal(held[name], tensor) for name, tensor in snapshot.state_dict().items())
    clock.step = 1  # in the first epoch there is no former network: labels alone
    with torch.no_grad():
        now = copy.deepcopy(made.student)(batch.inputs)
    close(made.losses("student", batch, clock)["ce"], ce(now.double(), batch.labels.tolist()), 1e-5)


@pytest.mark.parametrize("source", ["memory", "snapshot"])
@pytest.mark.parametrize("stop", [2, 6, 7])
def test_ps_kd_resumes_as_if_it_had_never_stopped(digits, tmp_path, source, stop):
    def fresh():
        return program("ps-kd", digits, student="cnn", args={"width": 4}, settings={"source": source, "alpha": 0.8}, epochs=4)

    whole = fresh()
    Session().fit(whole, "student", seed=0)
    torn = fresh()
    inner = torn.after_step

    def after_step(clock):
        if clock.step == stop:
            raise RuntimeError("pulled the plug")
        inner(clock)

    torn.after_step = after_step
    often = SimpleNamespace(every_seconds=1e9, every_steps=1, keep=2)
    with pytest.raises(RuntimeError):
        Session(folder=tmp_path, checkpoints=often).fit(torn, "student", seed=0)
    again = fresh()
    fit = Session(folder=tmp_path, checkpoints=often).fit(again, "student", seed=0)
    assert fit.steps == 12
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, again.student.state_dict()[name]), name
    for name, value in whole.method.parts.state_dict().items():
        assert torch.equal(value, again.method.parts.state_dict()[name]), name
    assert torch.equal(whole.teacher.probabilities, again.teacher.probabilities)


# ---- all five ----


@pytest.mark.parametrize("id, settings", [("pld", {}), ("nd", {"warm_up": 1}), ("ofa", {}), ("sinkd", {"beta": 0}), ("ps-kd", {})])
def test_a_batch_in_parts_gives_the_same_gradient(digits, id, settings):
    made = program(id, digits, args={"widths": (12, 6)}, settings=settings)
    made.student.eval()
    made.method.parts.eval()
    batch = next(iter(made.batches(0, 0)))
    clock = Clock(8, 3, 9)

    def gradient(parts):
        made.student.zero_grad()
        (sum(sum(made.losses("student", part, clock).values()) for part in parts) / len(parts)).backward()
        return torch.cat([p.grad.flatten() for p in made.student.parameters()])

    if id == "ps-kd":
        made.losses("student", batch, clock)
    assert torch.allclose(gradient([batch]), gradient(made.parts(batch, 4)), atol=1e-6)


@pytest.mark.parametrize("id", ["pld", "nd", "ofa", "sinkd", "ps-kd"])
def test_tasks_without_a_distribution_are_refused(id):
    x, y = torch.rand(40, 6), (torch.rand(40, 3) > 0.5).float()
    data = open_data((x, y), test=8)
    made = registry.make(id)
    network = zoo.build("mlp", input_shape=(6,), classes=3)
    teacher = HistoryTeacher(len(data.train), 3) if id == "ps-kd" else FrozenTeacher(copy.deepcopy(network), made.wants()[1])
    with pytest.raises(UserError, match=f"{id} needs one class of several"):
        KnowledgeProgram(made, network, teacher, data, Classification(data.classes, kind="multilabel"), recipe.Training(epochs=1, batch=8))
