"""What holds for all losses: gradients, dtypes, extreme inputs, padding, invariances, errors, and runnable docstrings."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from functools import partial

import pytest
import torch

from limbeck import losses
from limbeck.errors import UserError
from limbeck.losses._rows import wide

torch.set_num_threads(1)
LABELS = torch.tensor([0, 2, 1, -1])
ROWS = {  # (student, teacher, mask) -> loss, over the last axis
    "kl": lambda s, t, **k: losses.kl(s, t, temperature=2.0, **k),
    "reverse": lambda s, t, **k: losses.reverse_kl(s, t, temperature=2.0, **k),
    "jeffreys": losses.jeffreys,
    "js": partial(losses.jensen_shannon, beta=0.3),
    "skew": partial(losses.skew_kl, skew=0.2),
    "alpha": partial(losses.alpha_divergence, alpha=0.3),
    "tv": losses.total_variation,
    "bernoulli": losses.bernoulli_kl,
    "entropy": lambda s, t, **k: losses.entropy(s, **k),
    "soft": lambda s, t, **k: losses.soft_cross_entropy(s, t.softmax(-1), **k),
}
DIVERGENCES = ("kl", "reverse", "jeffreys", "js", "skew", "alpha", "tv")
LABELLED = {
    "dkd": losses.decoupled_kd,
    "ofa": partial(losses.target_enhanced_cross_entropy, eps=1.5),
    "ofa-paper": partial(losses.target_enhanced_cross_entropy, eps=1.5, variant="paper"),
    "pld": losses.plackett_luce,
    "pld-top": partial(losses.plackett_luce, topk=1),
    "ce": lambda s, t, y, **k: losses.cross_entropy(s, y, **k),
}
FEATURES = {
    "mse": losses.mse,
    "l1": losses.l1,
    "cosine": losses.cosine_distance,
    "normalized": losses.normalized_mse,
}
BATCH = {
    "nd": lambda s, t: losses.norm_and_direction(s, torch.nn.functional.normalize(wide(t), dim=-1), wide(t).norm(dim=-1)),
    "rkd-d": losses.rkd_distance,
    "rkd-a": losses.rkd_angle,
    "sp": losses.similarity_preserving,
    "correlation": losses.correlation,
    "cka": losses.cka,
    "nce": losses.info_nce,
    "supcon": lambda s, t: losses.supervised_contrastive(s, torch.arange(len(s)) % 2),
    "listmle": losses.list_mle,
    "transport": losses.batch_transport,
    "at": lambda s, t: losses.attention_transfer(s[:, None], t[:, None]),
}
PAIRS = ROWS | FEATURES | BATCH | {name: (lambda s, t, f=f: f(s, t, LABELS[: len(s)])) for name, f in LABELLED.items()}


def pair(seed=0, shape=(4, 3), dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=dtype), torch.randn(shape, generator=g, dtype=dtype)


@pytest.mark.parametrize("name", PAIRS)
def test_gradient_against_finite_differences(name):
    s, t = pair(1)
    assert torch.autograd.gradcheck(lambda x: PAIRS[name](x, t), s.requires_grad_(), atol=1e-5)


@pytest.mark.parametrize("name", ["kl", "reverse", "js", "bernoulli", "mse"])
def test_no_loss_detaches_the_teacher(name):
    s, t = pair(1)
    assert torch.autograd.gradcheck(lambda x: PAIRS[name](s, x), t.requires_grad_(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", PAIRS)
def test_dtypes_follow_float64(name, dtype):
    s, t = (x.to(dtype) for x in pair(2))  # rounded first: both see the same numbers
    value = PAIRS[name](s.requires_grad_(), t)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.shape == ()
    assert float(value.detach()) == pytest.approx(float(PAIRS[name](s.detach().double(), t.double())), rel=2e-4, abs=2e-5)
    value.backward()
    assert s.grad.dtype == dtype and s.grad.isfinite().all()


@pytest.mark.parametrize("name", PAIRS)
def test_extreme_inputs_stay_finite(name):
    s = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [1e4, 1e4, 1e4], [0.0, 0.0, 0.0]], requires_grad=True)
    for t in (-s.detach(), s.detach().clone(), torch.zeros(4, 3), 1e4 * torch.eye(4)[:, :3]):
        value = PAIRS[name](s, t)
        (grad,) = torch.autograd.grad(value, s)
        assert value.isfinite() and grad.isfinite().all(), (name, value, grad)


@pytest.mark.parametrize("shape", [(1, 3), (4, 1), (1, 1)])
@pytest.mark.parametrize("name", PAIRS)
def test_batch_of_one_and_single_class(name, shape):
    s, t = pair(3, shape, torch.float32)
    if shape[1] == 1 and name in LABELLED:
        f = LABELLED[name]
        value = f(s.requires_grad_(), t, torch.zeros(shape[0], dtype=torch.long))
    else:
        value = PAIRS[name](s.requires_grad_(), t)
    (grad,) = torch.autograd.grad(value, s, allow_unused=True)
    assert value.isfinite() and (grad is None or grad.isfinite().all())
    if shape[1] == 1 and name in (*DIVERGENCES, "dkd", "ce", "pld"):
        assert float(value.detach()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("padding", [0.0, 77.0, -1e4, float("nan")])
@pytest.mark.parametrize("name", ROWS | FEATURES)
def test_padding_reaches_neither_value_nor_gradient(name, padding):
    s, t = pair(4, (2, 3, 5))
    f = (ROWS | FEATURES)[name]
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]])  # integers, as attention masks come
    wide_s, wide_t = torch.full((2, 4, 5), padding, dtype=torch.float64), torch.full((2, 4, 5), padding, dtype=torch.float64)
    wide_s[mask.bool()], wide_t[mask.bool()] = s.flatten(0, 1)[:5], t.flatten(0, 1)[:5]
    plain_s = s.flatten(0, 1)[:5].clone().requires_grad_()
    expected, value = f(plain_s, t.flatten(0, 1)[:5]), f(wide_s.requires_grad_(), wide_t, mask=mask)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    expected.backward()
    value.backward()
    assert torch.allclose(wide_s.grad[mask.bool()], plain_s.grad, rtol=1e-10, atol=1e-14)
    assert (wide_s.grad[~mask.bool()] == 0).all()
    rows = f(wide_s, wide_t, mask=mask, reduction="none")
    assert rows.shape == (2, 4) and (rows[~mask.bool()] == 0).all()


@pytest.mark.parametrize("name", ROWS | FEATURES)
def test_empty_mask_is_zero_with_a_graph(name):
    s, t = pair(5)
    value = (ROWS | FEATURES)[name](s.requires_grad_(), t, mask=torch.zeros(4, dtype=torch.bool))
    assert float(value.detach()) == 0
    value.backward()
    assert (s.grad == 0).all()


@pytest.mark.parametrize("name", LABELLED)
def test_no_label_at_all(name):
    s, t = pair(5)
    value = LABELLED[name](s.requires_grad_(), t, torch.full((4,), -1))
    value.backward()
    assert s.grad.isfinite().all()
    if not name.startswith("ofa"):
        assert float(value.detach()) == 0 and (s.grad == 0).all()


@pytest.mark.parametrize("name", ["kl", "js", "ce", "pld", "mse"])
def test_weight_scales_rows_and_not_the_count(name):
    s, t = pair(6)
    f = (ROWS | FEATURES | {k: (lambda s, t, f=v, **kw: f(s, t, LABELS, **kw)) for k, v in LABELLED.items()})[name]
    weight = torch.tensor([0.0, 1.0, 2.0, 5.0])
    rows = f(s, t, reduction="none")
    scored = 3 if name in LABELLED else 4
    assert float(f(s, t, weight=weight)) == pytest.approx(float((rows * weight).sum()) / scored)
    assert float(f(s, t, weight=weight / 2, reduction="sum")) == pytest.approx(float((rows * weight).sum()) / 2)


def test_one_answer_however_a_batch_is_split():
    s, t = pair(7, (6, 3))
    parts = losses.kl(s[:2], t[:2], reduction="sum") + losses.kl(s[2:], t[2:], reduction="sum")
    assert float(parts / 6) == pytest.approx(float(losses.kl(s, t)), rel=1e-12)


@pytest.mark.parametrize("name", [*DIVERGENCES, "dkd", "ofa", "pld", "transport", "correlation"])
def test_shifting_logits_or_permuting_classes_changes_nothing(name):
    s, t = pair(8)
    value = float(PAIRS[name](s, t))
    assert float(PAIRS[name](s + torch.arange(4.0)[:, None], t - 3)) == pytest.approx(value, rel=1e-9)
    order = torch.tensor([2, 0, 1])
    if name in LABELLED:
        labels = torch.where(LABELS < 0, LABELS, order.argsort()[LABELS])
        assert float(LABELLED[name](s[:, order], t[:, order], labels)) == pytest.approx(value, rel=1e-9)
    else:
        assert float(PAIRS[name](s[:, order], t[:, order])) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("name", [*DIVERGENCES, "pld", "pld-top", "ce", "dkd", "ofa", "listmle"])
def test_a_large_common_offset_costs_no_precision_in_float32(name):
    s = torch.tensor([[0.5, -1.25, 2.0], [0.0, 3.0, -0.5]])  # exact after adding 8192
    t, labels = s.flip(0), torch.tensor([2, 0])
    f = LABELLED[name] if name in LABELLED else lambda s, t, _: PAIRS[name](s, t)
    grads = [torch.autograd.grad(f(x.requires_grad_(), t, labels), x)[0] for x in (s.clone(), s + 8192)]
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*DIVERGENCES, "dkd", "bernoulli", *FEATURES, "rkd-d", "rkd-a", "sp", "at"])
def test_equal_signals_cost_nothing_and_others_something(name):
    s, t = pair(9, dtype=torch.float32)
    assert float(PAIRS[name](s, s.clone())) == pytest.approx(0, abs=1e-6)
    if name != "at":  # attention over one position is constant
        assert float(PAIRS[name](s, t)) > 1e-3


def test_empty_batch():
    s, t, labels = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    for value in (losses.kl(s, t), losses.mse(s, t), losses.l1(s, t), losses.cross_entropy(s, labels)):
        assert float(value.detach()) == 0 and value.requires_grad


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: losses.kl(s, s[:, :2]), ("(4, 3)", "(4, 2)")),
        (lambda s: losses.reverse_kl(s, s[:2]), ("(4, 3)", "(2, 3)")),
        (lambda s: losses.mse(s, s[:, :2]), ("(4, 3)", "(4, 2)")),
        (lambda s: losses.rkd_distance(s, s[:2]), ("(4, 3)", "(2, 3)")),
        (lambda s: losses.kl(s, s, temperature=0), ("temperature", "0")),
        (lambda s: losses.kl(s, s, temperature=-1.0), ("temperature", "-1.0")),
        (lambda s: losses.kl(s, s, temperature=float("nan")), ("temperature", "nan")),
        (lambda s: losses.kl(s, s, teacher_temperature=0.0), ("temperature",)),
        (lambda s: losses.kl(s, s, direction="foward"), ("foward", "'forward'")),
        (lambda s: losses.kl(s, s, mask=torch.ones(3)), ("mask", "(3,)", "(4,)")),
        (lambda s: losses.kl(s, s, weight=torch.ones(4, 3)), ("weight", "(4, 3)", "(4,)")),
        (lambda s: losses.kl(s, s, reduction="men"), ("men", "'mean'")),
        (lambda s: losses.jensen_shannon(s, s, beta=0.0), ("beta", "forward_kl")),
        (lambda s: losses.cross_entropy(s, torch.zeros(3, dtype=torch.long)), ("label", "(3,)", "(4,)")),
        (lambda s: losses.plackett_luce(s, s, LABELS, topk=0), ("topk",)),
        (lambda s: losses.plackett_luce(s, s, LABELS, temperature=0), ("temperature",)),
        (lambda s: losses.target_enhanced_cross_entropy(s, s, LABELS, variant="best"), ("best", "'paper'")),
        (lambda s: losses.attention_transfer(s, s), ("(4, 3)",)),
        (lambda s: losses.info_nce(s, s, symmetric=True, negatives=s), ("negatives",)),
        (lambda s: losses.sinkhorn(s, epsilon=0), ("epsilon",)),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(UserError) as error:
        call(torch.randn(4, 3))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("module", [m.name for m in pkgutil.iter_modules(losses.__path__)])
def test_docstrings_run(module):
    loaded = importlib.import_module(f"limbeck.losses.{module}")
    assert doctest.testmod(loaded).failed == 0
    for name, value in vars(loaded).items():
        if name in losses.__all__ and value.__module__ == loaded.__name__:
            assert ">>>" in value.__doc__, f"{name} has no example"
