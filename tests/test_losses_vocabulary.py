"""The chunked losses against formulas over all logits, written here in float64 probabilities; autograd gives their gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses import divergences
from limbeck.losses.vocabulary import KINDS, Law, cross_entropy, divergence

N, V, WIDTH, TEACHER_WIDTH = 7, 19, 5, 8
SHAPES = {
    "forward": [{}],
    "reverse": [{}],
    "js": [{}, {"beta": 0.1}, {"beta": 0}, {"beta": 1}],
    "skew": [{}, {"skew": 0.6}, {"skew": 0}],
    "skew-reverse": [{}, {"skew": 0.6}, {"skew": 0}],
    "alpha": [{}, {"alpha": 0.8}, {"alpha": 1}, {"alpha": 0}],
    "alpha-beta": [{}, {"alpha": 1, "beta": 0}, {"alpha": 0, "beta": 1}, {"alpha": 0.5, "beta": 0.9}, {"alpha": 0, "beta": 0.5}],
    "tv": [{}],
    "adaptive": [{}, {"head": 0.8}],
    "interpolated": [{"progress": 0.3}, {"progress": torch.tensor(0.7)}],
    "decoupled": [{}, {"alpha": 0.5, "beta": 2.0}],
}
CASES = [(kind, shape) for kind, shapes in SHAPES.items() for shape in shapes]
PLAIN = [(kind, shapes[0]) for kind, shapes in SHAPES.items()]


def formula(kind, z, u, target, shape):
    """One value a row from tempered logits of student z and teacher u."""
    s, t = z.softmax(-1), u.softmax(-1)
    kl = lambda p, q: (p * (p / q).log()).sum(-1)  # noqa: E731
    if kind == "forward":
        return kl(t, s)
    if kind == "reverse":
        return kl(s, t)
    if kind == "js":
        b = shape.get("beta", 0.5)
        if b in (0, 1):
            return kl(s, t) if b else kl(t, s)
        m = b * t + (1 - b) * s
        return b * kl(t, m) + (1 - b) * kl(s, m)
    if kind == "skew":
        a = shape.get("skew", 0.1)
        return kl(t, a * t + (1 - a) * s)
    if kind == "skew-reverse":
        a = shape.get("skew", 0.1)
        return kl(s, (1 - a) * t + a * s)
    if kind == "alpha":
        a = shape.get("alpha", 0.5)
        if a in (0, 1):
            return kl(t, s) if a else kl(s, t)
        return (1 - (t**a * s ** (1 - a)).sum(-1)) / (a * (1 - a))
    if kind == "alpha-beta":
        a, b = shape.get("alpha", 0.2), shape.get("beta", 0.7)
        if b == 0:
            return (t**a * (t**a / s**a).log() - t**a + s**a).sum(-1) / a**2
        if a == 0:
            return (s**b * (s**b / t**b).log() - s**b + t**b).sum(-1) / b**2
        return -(t**a * s**b - a / (a + b) * t ** (a + b) - b / (a + b) * s ** (a + b)).sum(-1) / (a * b)
    if kind == "tv":
        return (t - s).abs().sum(-1) / 2
    if kind == "adaptive":
        rows = []
        for p, q in zip(t, s):
            mass, head = 0.0, []
            for token in sorted(range(len(p)), key=lambda c: -float(p[c])):
                if mass >= shape.get("head", 0.5):
                    break
                head.append(token)
                mass += float(p[token])
            gaps = [abs(float(a - b)) for a, b in zip(p, q.detach())]
            share = sum(gaps[c] for c in head) / sum(gaps)
            rows.append(share * kl(p, q) + (1 - share) * kl(q, p))
        return torch.stack(rows)
    if kind == "interpolated":
        x = shape["progress"]
        return -(((1 - x) * z.detach() + x * u).softmax(-1) * s.log()).sum(-1)
    rest = torch.ones_like(s).scatter_(-1, target[:, None], 0).bool()
    rows = []
    for p, q, keep, y in zip(t, s, rest, target):
        binary = p[y] * (p[y] / q[y]).log() + p[keep].sum() * (p[keep].sum() / q[keep].sum()).log()
        inside = kl(p[keep] / p[keep].sum(), q[keep] / q[keep].sum())
        rows.append(shape.get("alpha", 1.0) * binary + shape.get("beta", 8.0) * inside)
    return torch.stack(rows)


class Case:
    """A student with everything: scale, softcap, bias, columns of padding; a teacher of another width."""

    def __init__(self, seed=0, n=N, v=V, dtype=torch.float64, softcap=4.0, scale=1.3, spread=1.0):
        draw = torch.Generator().manual_seed(seed)
        rand = lambda *size: (torch.randn(*size, generator=draw, dtype=torch.float64) * spread).to(dtype)  # noqa: E731
        self.leaves = [rand(n, WIDTH).requires_grad_(), rand(v + 3, WIDTH).requires_grad_(), rand(v + 3).requires_grad_()]
        self.scale, self.softcap, self.v = scale, softcap, v
        self.student = Law(*self.leaves, scale=scale, softcap=softcap, vocabulary=v)
        self.teacher = Law(rand(n, TEACHER_WIDTH), rand(v, TEACHER_WIDTH))
        self.targets = torch.randint(v, (n,), generator=draw)
        self.weight = torch.rand(n, generator=draw, dtype=torch.float64).to(dtype)

    def logits(self):
        """Both sides' logits in float64, by hand."""
        hidden, weight, bias = (leaf.double() for leaf in self.leaves)
        z = self.scale * (torch.einsum("nd,vd->nv", hidden, weight) + bias)[:, : self.v]
        if self.softcap is not None:
            z = self.softcap * (z / self.softcap).tanh()
        return z, torch.einsum("nd,vd->nv", self.teacher.hidden.double(), self.teacher.weight.double())

    def arguments(self, kind):
        return {"targets": self.targets} if kind == "decoupled" else {}


def agree(value, exact, leaves, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(value.double(), exact.double(), rtol=rtol, atol=atol)
    got, true = (torch.autograd.grad(side.sum(), leaves, retain_graph=True) for side in (value, exact))
    for a, b in zip(got, true):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_value_and_gradients(kind, shape):
    case = Case()
    z, u = case.logits()
    exact = formula(kind, z / 2, u / 2, case.targets, shape).mean()
    for chunk in (1, 3, N, 100, None):
        value = divergence(case.student, case.teacher, kind, temperature=2.0, chunk=chunk, **case.arguments(kind), **shape)
        agree(value, exact, case.leaves)


@pytest.mark.parametrize(("kind", "shape"), PLAIN)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weight_total_and_scaled_temperature(kind, shape, reduction):
    case = Case(1, softcap=None)
    z, u = case.logits()
    rows = formula(kind, z / 3, u / 3, case.targets, shape) * case.weight * (1 if kind == "tv" else 9)
    exact = {"mean": rows.sum() / 11, "sum": rows.sum(), "none": rows}[reduction]
    more = {"total": 11} if reduction == "mean" else {}
    value = divergence(
        *(case.student, case.teacher, kind),
        **{"temperature": 3.0, "scale_temperature": True, "weight": case.weight, "reduction": reduction, "chunk": 2},
        **(more | case.arguments(kind) | shape),
    )
    assert value.shape == exact.shape
    agree(value, exact, case.leaves)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_rows_with_different_upstream(reduction):
    case = Case(2)
    z, u = case.logits()
    pull = torch.linspace(-1, 2, N, dtype=torch.float64)
    exact = (formula("js", z, u, None, {}) * pull).sum()
    if reduction == "none":
        value = (divergence(case.student, case.teacher, "js", reduction="none", chunk=3) * pull).sum()
    else:
        value = divergence(case.student, case.teacher, "js", weight=pull, total=1, chunk=3)
    agree(value, exact, case.leaves)


def test_a_temperature_for_each_row():
    case = Case(3)
    z, u = case.logits()
    t = torch.linspace(0.5, 4, N, dtype=torch.float64)
    exact = (formula("forward", z / t[:, None], u / t[:, None], None, {}) * t**2).mean()
    agree(divergence(case.student, case.teacher, temperature=t, scale_temperature=True, chunk=2), exact, case.leaves)
    scalar = divergence(case.student, case.teacher, temperature=torch.tensor(2.0), scale_temperature=True)
    torch.testing.assert_close(scalar, divergence(case.student, case.teacher, temperature=2.0, scale_temperature=True))


def test_gradient_reaches_a_weight_that_learns():
    case = Case(4)
    case.weight.requires_grad_()
    rows = divergence(case.student, case.teacher, reduction="none").detach()
    (got,) = torch.autograd.grad(divergence(case.student, case.teacher, weight=case.weight), case.weight)
    torch.testing.assert_close(got, rows / N)
    value = divergence(case.student, case.teacher, weight=case.weight, reduction="none")
    torch.testing.assert_close(torch.autograd.grad(value.sum(), case.weight)[0], rows)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [1, 3, None])
def test_cross_entropy(smoothing, reduction, chunk):
    case = Case(5)
    z, _ = case.logits()
    rows = F.cross_entropy(z, case.targets, reduction="none", label_smoothing=smoothing)
    exact = {"mean": rows.mean(), "sum": rows.sum(), "none": rows}[reduction]
    agree(cross_entropy(case.student, case.targets, label_smoothing=smoothing, reduction=reduction, chunk=chunk), exact, case.leaves)
    exact = (rows * case.weight).sum() / 5
    value = cross_entropy(case.student, case.targets, label_smoothing=smoothing, weight=case.weight, total=torch.tensor(5.0))
    agree(value, exact, case.leaves, 1e-7, 1e-8)


@pytest.mark.parametrize(("kind", "shape"), PLAIN)
def test_dense_laws(kind, shape):
    case = Case(6)
    z = torch.randn(N, V + 2, dtype=torch.float64, requires_grad=True)
    u = torch.randn(N, V + 1, dtype=torch.float64)
    exact = formula(kind, z[:, :V] / 2, u[:, :V] / 2, case.targets, shape).mean()
    laws = Law(dense=z, vocabulary=V), Law(dense=u, vocabulary=V)
    agree(divergence(*laws, kind, temperature=2.0, chunk=2, **case.arguments(kind), **shape), exact, [z])
    exact = formula(kind, z[:, :V], case.logits()[1], case.targets, shape).mean()
    agree(divergence(laws[0], case.teacher, kind, **case.arguments(kind), **shape), exact, [z])


@pytest.mark.parametrize(
    ("kind", "shape", "other"),
    [
        ("forward", {}, divergences.forward_kl),
        ("reverse", {}, divergences.reverse_kl),
        ("js", {"beta": 0.3}, divergences.jensen_shannon),
        ("skew", {"skew": 0.2}, divergences.skew_kl),
        ("skew-reverse", {"skew": 0.2}, lambda *a, **k: divergences.skew_kl(*a, reverse=True, **k)),
        ("alpha", {"alpha": 0.3}, divergences.alpha_divergence),
        ("tv", {}, lambda *a, scale_temperature, **k: divergences.total_variation(*a, **k)),
        ("decoupled", {"alpha": 2.0, "beta": 3.0}, None),
    ],
)
def test_same_as_the_divergences_over_classes(kind, shape, other):
    case = Case(7, dtype=torch.float32)
    if other is None:
        other = lambda s, t, **k: divergences.decoupled_kd(s, t, case.targets, **k)  # noqa: E731
    exact = other(case.student.logits(), case.teacher.logits(), temperature=2.0, scale_temperature=True, **shape)
    more = case.arguments(kind)
    value = divergence(case.student, case.teacher, kind, temperature=2.0, scale_temperature=True, chunk=3, **more, **shape)
    assert value.dtype is torch.float32
    agree(value, exact, case.leaves, 2e-5, 2e-6)


@pytest.mark.parametrize(("kind", "shape"), PLAIN)
def test_two_parts_with_the_whole_total_make_the_whole(kind, shape):
    case = Case(8)
    more = case.arguments(kind)
    whole = divergence(case.student, case.teacher, kind, **more, **shape)
    parts = 0
    for rows in (slice(0, 2), slice(2, None)):
        here = {name: value[rows] for name, value in more.items()}
        parts = parts + divergence(case.student[rows], case.teacher[rows], kind, total=N, **here, **shape)
    agree(parts, whole, case.leaves)
    halves = [cross_entropy(case.student[rows], case.targets[rows], total=N) for rows in (slice(0, 5), slice(5, N))]
    agree(sum(halves), cross_entropy(case.student, case.targets), case.leaves)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_extreme_logits_stay_finite(kind, shape):
    for dtype in (torch.float32, torch.float64):
        z = torch.tensor([[1e4, -1e4, 0.0, 5.0], [1e4, -1e4, 0.0, 5.0], [0.0, 0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
        u = torch.tensor([[-1e4, 1e4, 0.0, 5.0], [1e4, -1e4, 0.0, 5.0], [1e4, -1e4, -1e4, -1e4]], dtype=dtype)
        more = {"targets": torch.tensor([1, 0, 0])} if kind == "decoupled" else {}
        value = divergence(Law(dense=z), Law(dense=u), kind, reduction="none", **more, **shape)
        (gradient,) = torch.autograd.grad(value.sum(), z)
        assert value.isfinite().all() and gradient.isfinite().all()
        torch.testing.assert_close(gradient.sum(1), torch.zeros(3, dtype=dtype), rtol=0, atol=1e-2 if dtype is torch.float32 else 1e-9)
        if kind not in ("interpolated",):
            assert abs(value[1]) < 1e-3


def test_known_values_at_the_extremes():
    z, u = Law(dense=torch.tensor([[1e4, -1e4]], requires_grad=True)), Law(dense=torch.tensor([[-1e4, 1e4]]))
    known = {"forward": 2e4, "reverse": 2e4, "js": math.log(2), "skew": math.log(10), "skew-reverse": math.log(10), "tv": 1.0, "alpha": 4.0}
    for kind, value in known.items():
        assert divergence(z, u, kind).item() == pytest.approx(value, rel=1e-6), kind
    assert cross_entropy(z, torch.tensor([1])).item() == pytest.approx(2e4)


def test_impossible_tokens():
    """-inf in a dense law or a bias: the token is out of the law, no NaN."""
    u = torch.tensor([[1.0, -math.inf, 0.5]])
    z = torch.tensor([[0.3, -math.inf, -0.2]], requires_grad=True)
    for kind, shape in PLAIN:
        more = {"targets": torch.tensor([0])} if kind == "decoupled" else {}
        value = divergence(Law(dense=z), Law(dense=u), kind, **more, **shape)
        kept = divergence(Law(dense=z[:, [0, 2]]), Law(dense=u[:, [0, 2]]), kind, **more, **shape)
        agree(value, kept, [z], 1e-5, 1e-6)
    hidden, weight = torch.randn(2, 3), torch.randn(3, 3, requires_grad=True)
    value = divergence(Law(hidden, weight, torch.tensor([0.0, -math.inf, 0.0])), Law(hidden, torch.randn(3, 3), u[0]), "forward")
    (gradient,) = torch.autograd.grad(value, weight)
    assert value.isfinite() and gradient.isfinite().all() and gradient[1].abs().max() == 0


def test_one_hot_teacher_is_cross_entropy():
    case = Case(9)
    sure = Law(dense=F.one_hot(case.targets, V).double() * 1e4)
    hard = cross_entropy(case.student, case.targets)
    agree(divergence(case.student, sure), hard, case.leaves)
    agree(divergence(case.student, sure, "interpolated", progress=1.0), hard, case.leaves)


def test_interpolated_at_both_ends():
    case = Case(10)
    z, u = case.logits()
    soft = -(u.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()
    agree(divergence(case.student, case.teacher, "interpolated", progress=1.0), soft, case.leaves)
    start = divergence(case.student, case.teacher, "interpolated", progress=0.0)
    for gradient in torch.autograd.grad(start, case.leaves):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("kind", "shape"), PLAIN)
def test_a_student_that_is_the_teacher(kind, shape):
    case = Case(11)
    more = case.arguments(kind)
    value = divergence(case.student, case.student, kind, **more, **shape)
    for gradient in torch.autograd.grad(value, case.leaves):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-13)
    if kind != "interpolated":
        assert abs(value.item()) < 1e-13


@pytest.mark.parametrize("empty", ["matrix", "dense"])
def test_an_empty_law_gives_zero_in_the_graph(empty):
    case = Case(12)
    dense = torch.randn(N, V, dtype=torch.float64, requires_grad=True)
    law, leaves = (case.student, case.leaves) if empty == "matrix" else (Law(dense=dense), [dense])
    nobody = torch.zeros(N, dtype=torch.bool)
    for value in (
        cross_entropy(law[nobody], case.targets[nobody]),
        cross_entropy(law[nobody], case.targets[nobody], total=0),
        divergence(law[nobody], case.teacher[nobody], "js", total=torch.tensor(0.0)),
        divergence(law[nobody], case.teacher[nobody], reduction="none").sum(),
    ):
        assert value.item() == 0
        for gradient in torch.autograd.grad(value, leaves):
            assert gradient.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "shape"), PLAIN)
def test_low_precision(dtype, kind, shape):
    case = Case(13, n=12, v=40, dtype=dtype, spread=0.5)
    z, u = case.logits()
    exact = formula(kind, z, u, case.targets, shape).mean()
    value = divergence(case.student, case.teacher, kind, chunk=5, **case.arguments(kind), **shape)
    assert value.dtype is torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=0.03)
    for a, b in zip(torch.autograd.grad(value, case.leaves), torch.autograd.grad(exact, case.leaves)):
        assert a.dtype is dtype
        assert (a.double() - b).norm() < 0.03 * b.norm()


def test_inside_autocast_the_sums_stay_in_float32():
    case = Case(14, dtype=torch.float32)
    plain = divergence(case.student, case.teacher)
    with torch.autocast("cpu", torch.bfloat16):
        agree(divergence(case.student, case.teacher), plain, case.leaves, 0, 0)
        low = Law(case.leaves[0].bfloat16(), *case.leaves[1:], scale=1.3, softcap=4.0, vocabulary=V)
        value = divergence(low, case.teacher)
    for a, b in zip(*(torch.autograd.grad(side, case.leaves) for side in (value, plain))):
        assert a.dtype is torch.float32 and (a - b).norm() < 0.05 * b.norm()


@pytest.mark.parametrize("kind", ["forward", "js", "adaptive"])
def test_only_what_is_asked_for(kind):
    case = Case(15)
    full = torch.autograd.grad(divergence(case.student, case.teacher, kind), case.leaves)
    for reduction in ("mean", "none"):
        for i in range(3):
            leaves = [leaf.detach().requires_grad_(i == j) for j, leaf in enumerate(case.leaves)]
            law = Law(*leaves, scale=1.3, softcap=4.0, vocabulary=V)
            value = divergence(law, case.teacher, kind, reduction=reduction)
            torch.testing.assert_close(torch.autograd.grad(value.sum() / (N if reduction == "none" else 1), leaves[i])[0], full[i])
    with torch.no_grad():
        assert not divergence(case.student, case.teacher, kind).requires_grad


def test_the_teacher_gets_no_gradient():
    case = Case(16)
    teacher = Law(case.teacher.hidden.requires_grad_(), case.teacher.weight.requires_grad_())
    divergence(case.student, teacher, "js").backward()
    assert teacher.hidden.grad is None and teacher.weight.grad is None
    assert not divergence(case.student.detach(), teacher).requires_grad


def test_twice_through_the_same_graph():
    case = Case(17)
    value = divergence(case.student, case.teacher) * 3
    first = torch.autograd.grad(value, case.leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(value, case.leaves)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["forward", "js", "tv", "skew-reverse", "alpha-beta", "decoupled"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(kind, reduction):
    case = Case(18, n=3, v=6)

    def loss(*leaves):
        law = Law(*leaves, scale=1.3, softcap=4.0, vocabulary=6)
        return divergence(law, case.teacher, kind, temperature=1.5, reduction=reduction, chunk=2, **case.arguments(kind))

    assert torch.autograd.gradcheck(loss, case.leaves)


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 9),
    v=st.integers(2, 30),
    chunk=st.integers(1, 12),
    kind=st.sampled_from([kind for kind in KINDS if kind != "adaptive"]),
    temperature=st.floats(0.3, 5.0),
    softcap=st.sampled_from([None, 2.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_any_shape(n, v, chunk, kind, temperature, softcap, seed):
    case = Case(seed, n=n, v=v, softcap=softcap)
    z, u = case.logits()
    shape = SHAPES[kind][0]
    exact = formula(kind, z / temperature, u / temperature, case.targets, shape).mean()
    value = divergence(case.student, case.teacher, kind, temperature=temperature, chunk=chunk, **case.arguments(kind), **shape)
    agree(value, exact, case.leaves, 1e-6, 1e-9)
