"""bd-kd, meal-v2, tgeo-kd, dho and b-mtard against formulas written out here; attacks; what the methods keep between steps."""

from __future__ import annotations

import copy
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limbeck import method as registry
from limbeck import recipe, zoo
from limbeck.data import open_data
from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.evaluation.predict import predict
from limbeck.knowledge.program import KnowledgeProgram
from limbeck.knowledge.reversal import reverse_gradient
from limbeck.knowledge.teachers import EnsembleTeacher, FrozenTeacher, OnlineTeacher, Teacher
from limbeck.knowledge.views import pgd, robust_accuracy
from limbeck.signals import Signals, anatomy
from limbeck.storage import load_tensors
from limbeck.tasks import Classification
from limbeck.zoo.dual_head import mix
from limbeck.zoo.files import signed

torch.set_num_threads(1)
B, C = 6, 5
CLOCK = Clock(0, 10, 100)


def rand(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def ce_rows(logits, labels):
    return -np.log(softmax(logits)[np.arange(len(labels)), labels])


def kl_rows(p, q):
    return (p * np.log(p / q)).sum(-1)


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
    return open_data("digits", train=128, valid=70)


@pytest.fixture(scope="module")
def hidden():
    return open_data("digits", train=128, valid=70, labelled=40)


def network(data, ref="mlp", seed=99, **args):
    torch.manual_seed(seed)
    return zoo.build(ref, input_shape=data.input_shape, classes=10, **args)


def program(id, data, *, student="mlp", args=None, settings=None, teacher=None, seed=0, augment=(), **training):
    made = registry.make(id, settings or {})
    pupil = network(data, student, seed, **(args or {}))
    if teacher is None:
        wants = made.wants()[1]
        if made.teacher_names:
            teacher = EnsembleTeacher(
                {name: FrozenTeacher(network(data, "mlp", 7 + i), wants) for i, name in enumerate(made.teacher_names)}
            )
        elif made.teacher_kind == "none":
            teacher = Teacher()
        else:
            teacher = (OnlineTeacher if made.teacher_kind == "online" else FrozenTeacher)(network(data, "mlp", widths=(32,)), wants)
    options = recipe.Training(**{"epochs": 2, "batch": 32, "lr": 0.01, **training})
    torch.manual_seed(seed)
    return KnowledgeProgram(made, pupil, teacher, data, Classification(data.classes), options, augment=augment)


def first_batch(made):
    return next(iter(made.batches(0, 0)))


def gradient(value, *parameters):
    return torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)


# ---- bd-kd ----


@pytest.mark.parametrize("rule, swap", [("entropy", False), ("entropy", True), ("none", False), ("forward", False), ("reverse", False)])
@pytest.mark.parametrize("temperature, delta", [(3.0, 2.0), (1.0, 0.5)])
def test_bd_kd_is_the_formula(rule, swap, temperature, delta):
    s, t, labels = rand(B, C), rand(B, C, seed=1), [0, 3, 4, 1, 2, 2]
    made = bound("bd-kd", rule=rule, swap=swap, temperature=temperature, delta=delta)
    terms = made.loss(batch_of(labels), Signals(logits=s), Signals(logits=t), CLOCK)
    p, q = softmax(s.numpy() / temperature), softmax(t.numpy() / temperature)
    certain = -(p * np.log(p)).sum(1) < -(q * np.log(q)).sum(1)
    assert 0 < certain.sum() < B  # both cases are met
    forward, reverse = {
        "entropy": (np.where(certain ^ swap, delta, 1.0), np.where(certain ^ swap, 1.0, delta)),
        "none": (1.0, 1.0),
        "forward": (1.0, 0.0),
        "reverse": (0.0, 1.0),
    }[rule]
    student = (ce_rows(s.numpy(), labels) + temperature**2 * (forward * kl_rows(q, p) + reverse * kl_rows(p, q))).mean()
    teacher = (ce_rows(t.numpy(), labels) + temperature**2 * kl_rows(p, q)).mean()
    close(terms["ce"] + terms["forward"] + terms["reverse"], student, 1e-10)
    close(terms["teacher_ce"] + terms["teacher_kl"], teacher, 1e-10)
    assert len(terms) == 5


def test_bd_kd_cross_terms_move_one_network_each():
    s, t = rand(B, C).requires_grad_(), rand(B, C, seed=1).requires_grad_()
    made = bound("bd-kd", rule="none")
    terms = made.loss(batch_of([0, -1, 4, 1, -1, 2]), Signals(logits=s), Signals(logits=t), CLOCK)
    for name, mine, other in (("ce", s, t), ("forward", s, t), ("reverse", s, t), ("teacher_ce", t, s), ("teacher_kl", t, s)):
        moved, still = gradient(terms[name], mine, other)
        assert float(moved.abs().sum()) > 0 and still is None, name
    # the reverse divergence has its gradient through both factors of p: T p (log p/q - KL) a row
    p, q = softmax(s.detach().numpy() / 3), softmax(t.detach().numpy() / 3)
    expected = 3 * p * (np.log(p / q) - kl_rows(p, q)[:, None]) / B
    assert np.allclose(gradient(terms["reverse"], s)[0].numpy(), expected, atol=1e-12)


def test_bd_kd_trains_both_networks(digits):
    made = program("bd-kd", digits)
    teacher = made.teacher.network
    before = [copy.deepcopy(n.state_dict()) for n in (made.student, teacher)]
    (optimizer,) = made.optimizers().values()
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for n in (made.student, teacher) for p in n.parameters()}
    batch = first_batch(made)
    made.train()
    assert set(made.losses("student", batch, CLOCK)) == {"ce", "forward", "reverse", "teacher_ce", "teacher_kl"}  # the program adds none
    Session().fit(made, "student", seed=0)
    for start, net in zip(before, (made.student, teacher)):
        assert any(not torch.equal(start[k], v) for k, v in net.state_dict().items())


# ---- meal-v2 ----


def discriminate(layers, x, final_relu):
    """The released discriminator by hand."""
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    for number, layer in enumerate(linear):
        x = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        if number < 2 or final_relu:
            x = np.maximum(x, 0)
    return x


@pytest.mark.parametrize("final_relu", [False, True])
@pytest.mark.parametrize("members", [1, 3])
def test_meal_v2_is_the_formula(final_relu, members):
    s, ts = rand(B, 16).float(), [rand(B, 16, seed=1 + k).float() for k in range(members)]
    made = bound("meal-v2", 16, final_relu=final_relu, discriminator=0.7)
    torch.manual_seed(0)
    made.setup(SimpleNamespace(student_signals=Signals(logits=s), task=made.task))
    layers = made.parts["discriminator"]
    assert [(m.in_features, m.out_features) for m in layers if isinstance(m, nn.Linear)] == [(16, 4), (4, 2), (2, 2)]
    if members == 1:
        teacher = Signals(logits=ts[0])
    else:
        said = {str(k): (lambda batch, t=t: Signals(logits=t)) for k, t in enumerate(ts)}
        teacher = EnsembleTeacher(said)(batch_of([0] * B))
    terms = made.loss(batch_of([-1] * B), Signals(logits=s), teacher, CLOCK)
    q = np.mean([softmax(t.double().numpy()) for t in ts], 0)
    close(terms["soft"], -(q * np.log(softmax(s.double().numpy()))).sum(1).mean(), 1e-5)
    rows = np.concatenate([s.numpy(), np.mean([t.numpy() for t in ts], 0)])
    said = discriminate(layers, rows, final_relu)
    target = np.array([[1.0, 0.0]] * B + [[0.0, 1.0]] * B)
    probability = 1 / (1 + np.exp(-said))
    bce = -(target * np.log(probability) + (1 - target) * np.log(1 - probability)).mean()
    close(terms["discriminator"], 0.7 * bce, 1e-5)
    if members > 1:  # probabilities are averaged for the target, logits are not
        wrong = softmax(np.mean([t.numpy() for t in ts], 0))
        assert abs(float(terms["soft"]) + (wrong * np.log(softmax(s.numpy()))).sum(1).mean()) > 1e-2


def test_meal_v2_reversal_turns_the_students_gradient_and_not_the_discriminators():
    found = {}
    for adversarial in (False, True):
        s, t = rand(B, 16).float().requires_grad_(), rand(B, 16, seed=1).float()
        made = bound("meal-v2", 16, adversarial=adversarial, reversal=0.5)
        torch.manual_seed(0)
        made.setup(SimpleNamespace(student_signals=Signals(logits=s), task=made.task))
        term = made.loss(batch_of([0] * B), Signals(logits=s), Signals(logits=t), CLOCK)["discriminator"]
        found[adversarial] = gradient(term, s, *made.parts.parameters())
    assert float(found[False][0].abs().sum()) > 0
    assert torch.allclose(found[True][0], -0.5 * found[False][0])
    for a, b in zip(found[True][1:], found[False][1:]):
        assert torch.equal(a, b)
    x = torch.ones(3, requires_grad=True)
    y = reverse_gradient(2 * x, 3.0)
    assert torch.equal(y, 2 * x)
    assert gradient(y.sum(), x)[0].tolist() == [-6.0] * 3


def test_meal_v2_discriminator_has_its_own_rate_and_is_thrown_away(digits):
    made = program("meal-v2", digits, settings={"discriminator_lr": 0.002}, lr=0.01, schedule="constant", optimizer="sgd")
    (optimizer,) = made.optimizers().values()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.002]
    start = copy.deepcopy(made.method.parts.state_dict())
    Session().fit(made, "student", seed=0)
    assert any(not torch.equal(start[k], v) for k, v in made.method.parts.state_dict().items())
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.002]
    assert set(made.finish().state_dict()) == set(network(digits).state_dict())
    off = program("meal-v2", digits, settings={"discriminator": 0.0})
    assert set(off.losses("student", first_batch(off), CLOCK)) == {"soft"}


# ---- tgeo-kd ----


def tgeo_state(s, t, labels, average):
    S, T, G, M = softmax(s), softmax(t), np.eye(s.shape[1])[labels], average[labels]
    return np.concatenate([S, T, G, M, (M - S) ** 2, (G - S) ** 2, (T - S) ** 2, (T - G) ** 2, (M - G) ** 2], 1)


def tgeo_alpha(controller, state):
    x = state
    linear = [layer for layer in controller if isinstance(layer, nn.Linear)]
    for number, layer in enumerate(linear):
        x = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        if number < 2:
            x = np.where(x > 0, x, 0.01 * x)
    return 1 / (1 + np.exp(-x[:, 0]))


class TestTGeo:
    """A linear student in float64, for which one step and its validation loss can be written out."""

    tau, eta, classes, width = 1.5, 0.3, 4, 3

    def setup_method(self):
        torch.manual_seed(0)
        self.made = bound("tgeo-kd", self.classes, temperature=self.tau, unroll_lr=self.eta)
        self.student = nn.Linear(self.width, self.classes).double()
        self.x, self.t, self.labels = rand(B, self.width), rand(B, self.classes, seed=2), [0, 3, 1, 1, 2, 0]
        self.vx, self.vy = rand(8, self.width, seed=3), [1, 2, 3, 0, 0, 1, 2, 3]
        self.average = softmax(rand(self.classes, self.classes, seed=4).numpy())
        layers = (
            nn.Linear(9 * self.classes, 32),
            nn.LeakyReLU(0.01),
            nn.Linear(32, 16),
            nn.LeakyReLU(0.01),
            nn.Linear(16, 1),
            nn.Sigmoid(),
        )
        self.made.parts["controller"] = nn.Sequential(*layers).double()
        self.made.state["average"] = torch.tensor(self.average)
        valid = Batch(self.vx, torch.tensor(self.vy))
        self.made._valid = SimpleNamespace(batch_at=lambda epoch, step: valid, steps_per_epoch=1)
        self.made._device = torch.device("cpu")
        self.batch = Batch(self.x, torch.tensor(self.labels))
        self.models = SimpleNamespace(module=self.student, teacher=lambda batch: Signals(logits=self.t))

    def validation(self):
        """Validation loss after one step of the student, in numpy."""
        w, b = (p.detach().numpy() for p in self.student.parameters())
        s, t, x = self.x.numpy() @ w.T + b, self.t.numpy(), self.x.numpy()
        alpha = tgeo_alpha(self.made.parts["controller"], tgeo_state(s, t, self.labels, self.average))[:, None]
        hot = np.eye(self.classes)[self.labels]
        ds = (alpha * self.tau * (softmax(s / self.tau) - softmax(t / self.tau)) + (1 - alpha) * (softmax(s) - hot)) / B
        w, b = w - self.eta * ds.T @ x, b - self.eta * ds.sum(0)
        return ce_rows(self.vx.numpy() @ w.T + b, self.vy).mean()

    def test_hypergradient_is_that_of_finite_differences(self):
        value = self.made.losses("controller", self.batch, self.models, CLOCK)["validation"]
        close(value, self.validation(), 1e-10)
        value.backward()
        checked = 0
        for parameter in self.made.parts.parameters():
            flat, slope = parameter.detach().view(-1), parameter.grad.view(-1)
            for place in slope.abs().topk(min(4, len(slope))).indices.tolist():
                kept, h = float(flat[place]), 1e-4
                flat[place] = kept + h
                up = self.validation()
                flat[place] = kept - h
                down = self.validation()
                flat[place] = kept
                assert float(slope[place]) == pytest.approx((up - down) / (2 * h), rel=1e-5, abs=1e-11)
                checked += abs(float(slope[place])) > 1e-6
        assert checked > 10

    def test_student_turn_is_the_formula_with_constant_ratios(self):
        s = self.student(self.x)
        terms = self.made.loss(self.batch, Signals(logits=s), Signals(logits=self.t), CLOCK)
        logits, t = s.detach().numpy(), self.t.numpy()
        alpha = tgeo_alpha(self.made.parts["controller"], tgeo_state(logits, t, self.labels, self.average))
        close(terms["kl"], (alpha * self.tau**2 * kl_rows(softmax(t / self.tau), softmax(logits / self.tau))).mean(), 1e-10)
        close(terms["ce"], ((1 - alpha) * ce_rows(logits, self.labels)).mean(), 1e-10)
        sum(terms.values()).backward()
        assert all(p.grad is None for p in self.made.parts.parameters())
        assert float(self.student.weight.grad.abs().sum()) > 0

    def test_unlabelled_samples_follow_the_teacher(self):
        labels = [0, -1, 1, -1, 2, 0]
        batch = Batch(self.x, torch.tensor(labels))
        s = self.student(self.x).detach()
        alpha = self.made.ratios(batch, s, self.t).detach()
        assert alpha[1] == alpha[3] == 1 and alpha[0] < 1
        filled = [y if y >= 0 else int(self.t[b].argmax()) for b, y in enumerate(labels)]
        expected = tgeo_alpha(self.made.parts["controller"], tgeo_state(s.numpy(), self.t.numpy(), filled, self.average))
        known = [0, 2, 4, 5]
        assert np.allclose(alpha.numpy()[known], expected[known])


def test_tgeo_class_averages_come_from_plain_samples(digits):
    made = program("tgeo-kd", digits, augment=["noise:0.5"])
    x, y = digits.train.inputs, digits.train.labels
    with torch.no_grad():
        said = made.teacher.network(x).softmax(-1)
    for c in range(10):
        assert torch.allclose(made.method.state["average"][c], said[y == c].mean(0), atol=1e-6)


def test_tgeo_outer_step_leaves_running_statistics_and_modes(digits):
    made = program("tgeo-kd", digits, student="cnn", args={"width": 4})
    made.train()
    frozen = made.student.stem if hasattr(made.student, "stem") else next(made.student.children())
    frozen.eval()
    modes = [m.training for m in made.student.modules()]
    before = copy.deepcopy(dict(made.student.named_buffers()))
    assert before
    weights = copy.deepcopy(made.student.state_dict())
    made.losses("controller", first_batch(made), CLOCK)["validation"].backward()
    assert [m.training for m in made.student.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in made.student.named_buffers())
    assert all(torch.equal(weights[name], value) for name, value in made.student.state_dict().items())
    assert all(float(p.grad.abs().sum()) > 0 for p in made.method.parts.parameters())


def test_tgeo_turns_and_the_controllers_optimiser(digits):
    made = program("tgeo-kd", digits, settings={"outer_every": 3, "controller_lr": 0.01})
    assert [made.turns(Clock(step, 4, 8)) for step in range(4)] == [
        ("controller", "student"),
        ("student",),
        ("student",),
        ("controller", "student"),
    ]
    optimizers = made.optimizers()
    assert list(optimizers) == ["controller", "student"]
    assert optimizers["controller"].param_groups[0]["lr"] == 0.01 and optimizers["controller"].param_groups[0]["weight_decay"] == 0.05
    mine = {id(p) for p in made.method.parts.parameters()}
    assert {id(p) for g in optimizers["controller"].param_groups for p in g["params"]} == mine
    assert not mine & {id(p) for g in optimizers["student"].param_groups for p in g["params"]}


def test_tgeo_validation_batches_follow_from_the_step_alone(digits):
    made = program("tgeo-kd", digits)
    batch = first_batch(made)

    def value(step):
        return float(made.losses("controller", batch, Clock(step, 4, 8))["validation"].detach())

    in_order = [value(step) for step in range(5)]
    assert [value(step) for step in reversed(range(5))] == in_order[::-1]
    assert len(set(in_order)) == 5
    with pytest.raises(UserError, match="validation split"):
        program("tgeo-kd", open_data("digits", train=64))


# ---- dho ----


def test_dho_is_the_formula_and_each_head_has_its_own_loss(hidden):
    made = program("dho", hidden, student="cnn", args={"width": 4}, settings={"lam": 0.3, "temperature": 2.0})
    made.train()
    batch = first_batch(made)
    assert int(batch.labelled.sum()) == 16
    terms = made.losses("student", batch, CLOCK)
    heads = made.student.get_submodule(made.method._head)
    features = []
    hook = heads.register_forward_hook(lambda module, args, output: features.append(args[0].detach()))
    with torch.no_grad():
        output = copy.deepcopy(made.student)(batch.inputs)
        teacher = made.teacher.network(batch.inputs).double().numpy()
        hook.remove()
        ce, kd = heads.ce(features[0]).double().numpy(), heads.kd(features[0]).double().numpy()
    assert np.allclose(output.exp().numpy(), 0.5 * softmax(ce) + 0.5 * softmax(kd), atol=1e-5)
    known = batch.labelled.numpy()
    rows = 4 * kl_rows(softmax(teacher / 2), softmax(kd / 2))
    close(terms["ce"], 0.3 * ce_rows(ce[known], batch.labels.numpy()[known]).mean(), 1e-5)
    close(terms["kd_labelled"], 0.7 * rows[known].mean(), 1e-5)
    close(terms["kd_unlabelled"], 0.7 * rows[~known].mean(), 1e-5)
    backbone = next(made.student.parameters())
    for name, term in terms.items():
        to_ce, to_kd, to_backbone = gradient(term, heads.ce.weight, heads.kd.weight, backbone)
        assert float(to_backbone.abs().sum()) > 0
        assert (to_ce is not None, to_kd is not None) == (name == "ce", name != "ce")


def test_dho_a_batch_in_parts_gives_the_same_gradient(hidden):
    made = program("dho", hidden)
    batch = first_batch(made)

    def slopes(parts):
        made.student.zero_grad()
        (sum(sum(made.losses("student", part, CLOCK).values()) for part in parts) / len(parts)).backward()
        return torch.cat([p.grad.flatten() for p in made.student.parameters()])

    parts = made.parts(batch, 4)
    assert [int(part.labelled.sum()) for part in parts] == [8, 8, 0, 0]
    assert torch.allclose(slopes([batch]), slopes(parts), atol=1e-6)


def test_dho_tunes_the_first_best_pair_on_the_validation_split(hidden):
    made = program("dho", hidden, settings={"alpha_step": 0.25, "betas": (2.0, 0.5, 1.0)}, epochs=6)
    Session().fit(made, "student", seed=0)
    student = made.finish()
    heads = student.get_submodule(made.method._head)
    valid = hidden.valid.batch(torch.arange(len(hidden.valid)))
    seen = []
    hook = heads.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        output = student(valid.inputs)
        hook.remove()
        ce, kd = heads.ce(seen[0]).numpy(), heads.kd(seen[0]).numpy()
    scores = {}
    for beta in (2.0, 0.5, 1.0):
        for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
            mixed = alpha * softmax(ce) + (1 - alpha) * softmax(kd / beta)
            scores[alpha, beta] = (mixed.argmax(1) == valid.labels.numpy()).mean()
    assert len(set(scores.values())) > 2
    best = max(scores, key=scores.get)  # the first of equal ones, in the order of the dictionary
    assert (float(heads.alpha), float(heads.beta)) == best
    assert (output.argmax(1) == valid.labels).float().mean() == pytest.approx(scores[best])
    assert not student.training


@pytest.mark.parametrize("alpha, beta", [(0.3, 2.0), (0.0, 0.5), (1.0, 1.0)])
def test_dho_mixes_probabilities_and_cools_the_teachers_head_only(alpha, beta):
    ce, kd = rand(B, C), rand(B, C, seed=1)
    expected = alpha * softmax(ce.numpy()) + (1 - alpha) * softmax(kd.numpy() / beta)
    assert np.allclose(mix(ce, kd, alpha, beta).exp().numpy(), expected, atol=1e-6)


def test_dho_without_validation_split_mixes_as_its_settings_say():
    made = program("dho", open_data("digits", train=96, labelled=40), settings={"alpha": 0.3, "beta": 1.5})
    heads = made.finish().get_submodule(made.method._head)
    assert (float(heads.alpha), float(heads.beta)) == pytest.approx((0.3, 1.5))


@pytest.mark.parametrize("student, args", [("mlp", {"widths": (12,)}), ("cnn", {"width": 4}), ("vit", {})])
def test_dho_student_is_saved_and_loaded_without_flags(hidden, tmp_path, student, args):
    made = program("dho", hidden, student=student, args=args)
    Session().fit(made, "student", seed=0)
    kept = made.finish()
    heads = kept.get_submodule(made.method._head)
    heads.alpha.fill_(0.35)
    heads.beta.fill_(1.25)
    zoo.save_model(kept, tmp_path / "student")
    again = zoo.load_model(tmp_path / "student").eval()
    a, _ = predict(kept, hidden.test)
    b, _ = predict(again, hidden.test)
    assert torch.equal(a, b)
    assert torch.allclose(a.exp().sum(1), torch.ones(len(a)), atol=1e-5)
    assert anatomy(again, hidden.example(2).inputs).embedding == made.method._head  # so it can be a teacher of embeddings
    twice = program("dho", hidden, student=student, args=args)
    assert twice.method.wrap(again, hidden.example(2)) is again  # a student that has two heads already keeps them


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_weights_whose_header_length_looks_like_a_pickle(tmp_path, length):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
    path = tmp_path / "w.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header + np.float32(2.5).tobytes())
    assert path.read_bytes()[:1] == b"\x80"
    assert load_tensors(path)["w"].tolist() == [2.5]
    path.write_bytes(pickle.dumps({"w": 2.5}, protocol=4))
    with pytest.raises(UserError, match="is a pickle"):
        load_tensors(path)


def test_a_dual_heads_folder_runs_no_code_that_it_names(digits, tmp_path):
    folder = zoo.save_model(network(digits, "dual-head", network="mlp"), tmp_path / "m")
    note = json.loads((folder / "config.json").read_text())
    for inner, message in (
        ("python:os:getcwd", "runs no code"),
        (f"folder:{tmp_path}", "another folder"),
        ("zoo:dual-head", "runs no code"),
    ):
        args = {"network": "python:os:getcwd"} if inner == "zoo:dual-head" else {}
        (folder / "config.json").write_text(json.dumps(signed({**note, "args": {**note["args"], "network": inner, "args": args}})))
        with pytest.raises(UserError, match=message):
            zoo.load_model(folder)


# ---- attacks ----


@pytest.fixture(scope="module")
def fitted(digits):
    """A network with batch norm that knows digits a little."""
    made = program("alone", digits, student="cnn", args={"width": 8}, epochs=60)
    Session().fit(made, "student", seed=0)
    return made.finish()


def test_pgd_stays_in_the_ball_and_in_the_box_and_raises_the_loss(digits, fitted):
    batch = digits.test.batch(torch.arange(100))
    fitted.train()
    next(fitted.modules()).zero_grad()
    before = copy.deepcopy(fitted.state_dict())
    moved = pgd(fitted, batch.inputs, batch.labels, eps=0.1, step=0.04, steps=5)
    distance = (moved - batch.inputs).abs()
    assert float(distance.max()) <= 0.1 + 1e-6 and float(distance.max()) > 0.09
    assert float(moved.min()) >= 0 and float(moved.max()) <= 1
    assert not moved.requires_grad
    assert all(m.training for m in fitted.modules()) and all(p.grad is None for p in fitted.parameters())
    assert all(torch.equal(before[name], value) for name, value in fitted.state_dict().items())
    fitted.eval()
    with torch.no_grad():
        clean, attacked = (F.cross_entropy(fitted(x), batch.labels) for x in (batch.inputs, moved))
        noise = F.cross_entropy(fitted((batch.inputs + 0.1 * torch.randn_like(moved).sign()).clamp(0, 1)), batch.labels)
    assert float(attacked) > 2 * float(clean) and float(attacked) > 1.2 * float(noise)


def test_pgd_step_by_hand():
    """A linear network, whose gradient can be written out: one step along its sign."""
    net = nn.Linear(4, 3).double()
    x, y = torch.rand(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.5 + 0.25, torch.tensor([0, 1, 2, -1, 1])
    moved = pgd(net, x, y, eps=0.2, step=0.01, steps=1, noise=0.0)
    p = softmax(net(x).detach().numpy())
    slope = (p - np.eye(3)[y.clamp_min(0)]) @ net.weight.detach().numpy()
    slope[3] = 0  # no label, no attack
    assert np.allclose(moved.numpy(), x.numpy() + 0.01 * np.sign(slope))


def test_robust_accuracy(digits, fitted):
    task = Classification(digits.classes)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    attack = {"eps": 0.1, "step": 0.04, "steps": 5}
    robust = robust_accuracy(fitted, digits.test, task, **attack, batch=64, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert robust == robust_accuracy(fitted, digits.test, task, **attack, batch=64, seed=3)
    logits, labels = predict(fitted, digits.test)
    clean = task.metrics(logits, labels)["accuracy"]
    assert robust < clean - 0.1
    close(robust_accuracy(fitted, digits.test, task, 1e-9, 1e-9, 1, batch=64), clean, 5e-3)
    torch.manual_seed(3)
    part = digits.test.batch(torch.arange(len(digits.test)))
    moved = pgd(fitted, part.inputs, part.labels, **attack)
    with torch.no_grad():
        right = (fitted(moved).argmax(1) == part.labels).double().mean()
    close(robust_accuracy(fitted, digits.test, task, **attack, batch=len(digits.test), seed=3), right, 1e-9)
    with pytest.raises(UserError, match="multiclass"):
        robust_accuracy(fitted, digits.test, Classification(digits.classes, kind="multilabel"), **attack)


def test_adversarial_training_makes_robust(digits):
    attack = {"eps": 0.1, "attack_step": 0.04, "attack_steps": 4}
    robust = {}
    for id, settings in (("alone", {}), ("adversarial-training", attack)):
        made = program(id, digits, settings=settings, args={"widths": (32,)}, epochs=25)
        Session().fit(made, "student", seed=0)
        robust[id] = robust_accuracy(made.finish(), digits.valid, made.task, 0.1, 0.02, 10)
    assert robust["adversarial-training"] > robust["alone"] + 0.05
    made.train()
    batch = first_batch(made)
    torch.manual_seed(8)
    value = made.losses("student", batch, CLOCK)["ce"]
    torch.manual_seed(8)
    moved = pgd(made.student, batch.inputs, batch.labels, eps=0.1, step=0.04, steps=4)
    close(value, ce_rows(made.student(moved).detach().double().numpy(), batch.labels.numpy()).mean(), 1e-5)


@pytest.mark.parametrize("id", ["b-mtard", "adversarial-training"])
def test_inputs_that_an_attack_would_tear_are_refused(id):
    x, y = torch.randn(40, 6), torch.arange(40) % 3
    data = open_data((x, y), test=10)
    made = registry.make(id)
    net = zoo.build("mlp", input_shape=(6,), classes=3)
    teacher = EnsembleTeacher({n: FrozenTeacher(copy.deepcopy(net)) for n in ("natural", "robust")}) if made.teacher_names else Teacher()
    with pytest.raises(UserError, match=r"inputs in \[0, 1\]"):
        KnowledgeProgram(made, net, teacher, data, Classification(data.classes), recipe.Training(epochs=1, batch=8))


# ---- b-mtard ----


def mtard_by_hand(tau, weights, first, entropies, losses, eta_t, eta_w):
    """One balance in numpy, order robust, natural; the released code's expressions."""
    robust, natural = entropies
    tau = np.clip([tau[0] - eta_t * np.sign(robust / natural - 1), tau[1] - eta_t * np.sign(natural / robust - 1)], 1, 10)
    first = losses if first is None else first
    r = np.array(losses) / np.array(first)
    weights = np.maximum(0, weights - eta_w * (weights - r / r.sum()))
    return tau, weights / weights.sum(), first


def test_b_mtard_balance_by_hand(digits):
    made = program("b-mtard", digits, settings={"eta_t": 0.3, "eta_w": 0.2}).method
    tau, weights, first = np.ones(2), np.full(2, 0.5), None
    seen = [((-0.1, -0.2), (0.5, 0.4)), ((-0.15, -0.2), (0.4, 0.1)), ((-0.25, -0.2), (0.45, 0.05)), ((-0.2, -0.2), (0.1, 0.2))]
    for entropies, losses in seen:
        tau, weights, first = mtard_by_hand(tau, weights, first, entropies, losses, 0.3, 0.2)
        made.balance(torch.tensor(entropies), torch.tensor(losses))
        assert np.allclose(made.state["tau"].numpy(), tau, atol=1e-6)
        assert np.allclose(made.state["weights"].numpy(), weights, atol=1e-6)
        assert np.allclose(made.state["first"].numpy(), first)
    assert np.allclose(tau, [1.3, 1.3])  # the robust one was heated twice while it was sharper, then cooled, the natural one heated
    for _ in range(60):
        made.balance(torch.tensor([-0.1, -0.2]), torch.tensor([0.5, 0.4]))
    assert made.state["tau"].tolist() == [10.0, 1.0]
    made.state["first"] = torch.full((2,), float("nan"))
    made.balance(torch.zeros(2), torch.zeros(2))  # a student that begins as its teacher
    made.balance(torch.zeros(2), torch.tensor([0.0, 0.3]))
    assert torch.isfinite(made.state["tau"]).all() and torch.isfinite(made.state["weights"]).all()


def test_b_mtard_step_is_the_formula(digits):
    settings = {"eps": 0.1, "attack_step": 0.04, "attack_steps": 3, "eta_t": 0.5, "eta_w": 0.3}
    made = program("b-mtard", digits, student="cnn", args={"width": 4}, settings=settings)
    made.method.state.update(tau=torch.tensor([1.5, 2.0]), weights=torch.tensor([0.7, 0.3]), first=torch.tensor([0.2, 0.1]))
    made.train()
    batch = first_batch(made)
    twin = copy.deepcopy(made.student)
    torch.manual_seed(4)
    terms = made.losses("student", batch, CLOCK)
    assert made.student.training
    torch.manual_seed(4)
    moved = pgd(twin, batch.inputs, batch.labels, eps=0.1, step=0.04, steps=3)
    teachers = {name: net for name, net in made.teacher.networks().items()}
    with torch.no_grad():
        b = [softmax(teachers["robust"](moved).double().numpy() / 1.5), softmax(teachers["natural"](batch.inputs).double().numpy() / 2.0)]
        said = [twin(moved).double().numpy(), twin(batch.inputs).double().numpy()]
    losses = [(q * (np.log(q + 1e-5) - np.log(softmax(s)))).mean() for q, s in zip(b, said)]
    entropies = [(q * np.log(q + 1e-5)).mean() for q in b]
    tau, weights, _ = mtard_by_hand(np.array([1.5, 2.0]), np.array([0.7, 0.3]), np.array([0.2, 0.1]), entropies, losses, 0.5, 0.3)
    close(terms["adversarial"], weights[0] * losses[0], 1e-4)
    close(terms["natural"], weights[1] * losses[1], 1e-4)
    assert np.allclose(made.method.state["tau"].numpy(), tau) and np.allclose(made.method.state["weights"].numpy(), weights, atol=1e-4)


def test_b_mtard_balance_is_in_the_checkpoints(digits, tmp_path):
    settings = {"eps": 0.1, "attack_step": 0.05, "attack_steps": 2, "eta_t": 0.1, "eta_w": 0.3}

    def fresh():
        return program("b-mtard", digits, settings=settings)

    whole, torn, again = fresh(), fresh(), fresh()
    Session().fit(whole, "student", seed=0)
    assert not torch.equal(whole.method.state["tau"], torch.ones(2))
    inner = torn.after_step

    def after_step(clock):
        if clock.step == 5:
            raise RuntimeError("pulled the plug")
        inner(clock)

    torn.after_step = after_step
    often = SimpleNamespace(every_seconds=1e9, every_steps=1, keep=2)
    with pytest.raises(RuntimeError):
        Session(folder=tmp_path, checkpoints=often).fit(torn, "student", seed=0)
    Session(folder=tmp_path, checkpoints=often).fit(again, "student", seed=0)
    for name in ("tau", "weights", "first"):
        assert torch.equal(whole.method.state[name], again.method.state[name]), name
    assert all(torch.equal(v, again.student.state_dict()[k]) for k, v in whole.student.state_dict().items())


# ---- all ----


@pytest.mark.parametrize("id", ["bd-kd", "meal-v2", "tgeo-kd", "dho", "b-mtard", "adversarial-training"])
def test_tasks_without_a_distribution_are_refused(id):
    x, y = torch.rand(60, 6), (torch.rand(60, 3) > 0.5).float()
    data = open_data((x, y), test=8, valid=10)
    made = registry.make(id)
    net = zoo.build("mlp", input_shape=(6,), classes=3)
    teacher = {
        "online": lambda: OnlineTeacher(copy.deepcopy(net)),
        "none": Teacher,
        "frozen": lambda: FrozenTeacher(copy.deepcopy(net), made.wants()[1]),
    }[made.teacher_kind]()
    if made.teacher_names:
        teacher = EnsembleTeacher({name: FrozenTeacher(copy.deepcopy(net)) for name in made.teacher_names})
    with pytest.raises(UserError, match=f"{id} needs one class of several"):
        KnowledgeProgram(made, net, teacher, data, Classification(data.classes, kind="multilabel"), recipe.Training(epochs=1, batch=8))
