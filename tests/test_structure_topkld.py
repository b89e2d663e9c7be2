"""TopKLD: the split divergence against sums written out, its identities, laws in chunks, digits as words, scaling."""

from __future__ import annotations

import copy
import doctest
import math

import pytest
import torch

from limbeck import zoo
from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.evaluation import scaling
from limbeck.evaluation.scaling import fit_scaling
from limbeck.losses import forward_kl, reverse_kl, split_divergence
from limbeck.losses.vocabulary import Law, divergence
from limbeck.method import make
from limbeck.recipe import resolve
from limbeck.signals.signals import Signals
from limbeck.structure.job import run
from limbeck.tasks import Classification
from limbeck.zoo import quantised as q
from tests.conftest import TINY_TEXT

torch.set_num_threads(1)


def logits(rows=5, classes=9, seed=0):
    torch.manual_seed(seed)
    return torch.randn(rows, classes), 2 * torch.randn(rows, classes)


def by_hand(s, t, top, head, tail):
    """Token by token, in Python."""
    total = 0.0
    for zs, zt in zip(s.double(), t.double()):
        p, r = zt.softmax(0).tolist(), zs.softmax(0).tolist()
        first = sorted(range(len(p)), key=lambda i: -p[i])[:top]
        for i in range(len(p)):
            how = head if i in first else tail
            if how == "forward":
                total += p[i] * math.log(p[i] / r[i]) - p[i] + r[i]
            else:
                total += r[i] * math.log(r[i] / p[i]) - r[i] + p[i]
    return total / len(s)


@pytest.mark.parametrize("head", ["forward", "reverse"])
@pytest.mark.parametrize("tail", ["forward", "reverse"])
@pytest.mark.parametrize("top", [0, 1, 4, 9, 100])
def test_against_sums_written_out(head, tail, top):
    s, t = logits()
    assert split_divergence(s, t, top=top, head=head, tail=tail) == pytest.approx(by_hand(s, t, top, head, tail), abs=1e-5)


def test_identities():
    """All classes on one side, or one divergence on both: the whole KL."""
    s, t = logits()
    for temperature in (1.0, 3.0):
        kl, reverse = forward_kl(s, t, temperature=temperature), reverse_kl(s, t, temperature=temperature)
        for settings in ({"top": 9, "head": "forward", "tail": "reverse"}, {"top": 0, "head": "reverse", "tail": "forward"},
                         {"top": 4, "head": "forward", "tail": "forward"}):  # fmt: skip
            assert torch.allclose(split_divergence(s, t, temperature=temperature, **settings), kl, atol=1e-5)
        assert torch.allclose(split_divergence(s, t, top=3, head="reverse", tail="reverse", temperature=temperature), reverse, atol=1e-5)


def test_terms_are_never_negative_and_gradients_are_right():
    s, t = logits(2, 6)
    each = [split_divergence(s, t, top=k, head=h, tail="forward", reduction="none") for k in range(7) for h in ("forward", "reverse")]
    assert min(float(rows.min()) for rows in each) >= 0
    assert float(split_divergence(t, t, top=3)) == pytest.approx(0, abs=1e-6)
    x = s.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: split_divergence(z, t.double(), top=2), (x,))
    with pytest.raises(UserError, match="unknown direction"):
        split_divergence(s, t, top=2, head="upward")
    with pytest.raises(UserError, match="-1 classes"):
        split_divergence(s, t, top=-1)


def method(**settings):
    made = make("topkld", settings)
    made.task, made.complete, made.count = Classification(tuple("abc")), True, 2
    return made


def test_language_models_in_chunks():
    """The loss of laws is that of their logits, in value and gradient; no matter how rows are cut."""
    from limbeck.losses import vocabulary

    torch.manual_seed(0)
    hidden, matrix = torch.randn(10, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    teacher = Law(dense=torch.randn(10, 9))
    made = method(top=4, head="reverse", tail="forward")
    made.count = 4

    class Tokens:
        family = "language"

    made.task = Tokens()
    found = made.loss(Batch(None), Signals(law=Law(hidden, matrix)), Signals(law=teacher), Clock(0, 1, 1))["topkld"]
    expected = split_divergence(hidden @ matrix.T, teacher.dense, top=4)
    assert torch.allclose(found, expected)
    for a, b in zip(torch.autograd.grad(found, (hidden, matrix)), torch.autograd.grad(expected, (hidden, matrix))):
        assert torch.allclose(a, b, atol=1e-6)
    made.head = made.tail = "forward"
    whole = made.loss(Batch(None), Signals(law=Law(hidden, matrix)), Signals(law=teacher), Clock(0, 1, 1))["topkld"]
    assert torch.allclose(whole, divergence(Law(hidden, matrix), teacher))
    cut = vocabulary.rowwise(lambda z, u: split_divergence(z, u, top=4, reduction="none"), Law(hidden, matrix), teacher, chunk=3)
    assert torch.allclose(cut.mean(), found)


def test_classifiers():
    s, t = logits(4, 3)
    found = method().loss(Batch(None, torch.zeros(4).long()), Signals(logits=s), Signals(logits=t), Clock(0, 1, 1))
    assert torch.allclose(found["topkld"], split_divergence(s, t, top=2))


# ---- digits as words ----


def digits():
    from limbeck.models import open_recipe_data

    source = {"source": "digit-tokens", "test": 0.2, "valid": 0.1}
    made = resolve({**TINY_TEXT, "data": source, "text": {"tokenizer": "words:32", "length": 66}})
    return open_recipe_data(made.data, None, made)


def test_digits_come_back_from_their_words():
    """Every window is one digit: start, 64 grey levels, end; the levels are those of scikit-learn; parts do not overlap."""
    import sklearn.datasets

    data = digits()
    pictures = sklearn.datasets.load_digits().data.astype(int)
    known = {" ".join(map(str, p)) for p in pictures}
    tokenizer = data.text.tokenizer
    seen = []
    for split in (data.train, data.test, data.valid):
        ids = split.batch(torch.arange(len(split))).inputs["input_ids"]
        assert ids.shape[1] == 66
        words = [tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]
        assert all(w[0] == "start" and w[-1] == "<eos>" for w in words)
        own = [" ".join(w[1:-1]) for w in words]
        assert set(own) <= known
        seen += own
    assert len(seen) == 1797 == len(pictures) and sorted(seen) == sorted(" ".join(map(str, p)) for p in pictures)
    assert len(data.train) > 3 * len(data.test) > len(data.valid) > 0
    assert len(tokenizer) == 6 + 1 + 1 + 17  # special tokens, <unk>, start, levels
    again = digits()
    assert again.fingerprint == data.fingerprint


def test_digits_are_listed():
    from limbeck.data.text.sources import listing

    row = next(row for row in listing() if row["name"] == "digit-tokens")
    assert row["task"] == "causal-lm" and "1797" in row["source"]


# ---- a whole run ----


def test_a_quantised_copy_learns_from_itself(tmp_path):
    """The student is the teacher in 2 bits, its ends in 8; it recovers, and is nearer to the teacher than what labels alone make."""
    recipe = copy.deepcopy(TINY_TEXT)
    recipe |= {
        "data": {"source": "digit-tokens", "train": 200, "test": 64, "valid": 32},
        "text": {"tokenizer": "words:32", "length": 66},
        "teacher": {"model": "llama", "args": {"layers": 1, "width": 16, "heads": 2}, "train": {"steps": 50, "batch": 16, "lr": 0.01}},
        "student": {"model": "teacher"},
        "training": {"steps": 25, "batch": 16, "lr": 0.003},
        "method": {"id": "topkld", "bits": 2, "top": 4, "activations": 8},
    }
    result = run(resolve(recipe), Session(folder=tmp_path), {})
    zoo.save_model(result.artifacts["student"].held, tmp_path / "student")
    network = zoo.load_model(tmp_path / "student")
    levels = {name: layer.coded.scheme.levels for name, layer in q.coded_layers(network)}
    assert levels["lm_head"] == levels["model.embed_tokens"] == 256 and levels["model.layers.0.self_attn.q_proj"] == 3
    assert all(layer.coded.scheme.activations == 8 for _, layer in q.coded_layers(network))
    metrics = result.summary["metrics"]
    near = result.summary["to_teacher"]
    assert metrics["student"]["nll"] < metrics["made"]["nll"] and near["student"]["kl"] < near["baseline"]["kl"]


def test_bad_settings():
    for settings in ({"top": 0}, {"head": "both"}, {"bits": 1.5}, {"ends": "none"}):
        with pytest.raises(UserError):
            make("topkld", settings)
    with pytest.raises(UserError, match="1 bit"):
        make("topkld", {"bits": 1}).scheme(1)


def test_share_of_the_vocabulary():
    class Task:
        family = "language"
        kind = "causal-lm"

    from types import SimpleNamespace

    for top, expected in ((0.22, 220), (7, 7), (5000, 1000), (1e-6, 1)):
        made = make("topkld", {"top": top})
        said = Signals(law=Law(dense=torch.zeros(1, 1000)))
        made.setup(SimpleNamespace(task=Task(), student_signals=said, teacher_signals=said))
        assert made.count == expected


# ---- scaling ----


@pytest.mark.parametrize(("c", "g", "floor"), [(30.0, 0.4, 1.0), (2.0, 0.05, 0.0), (5e3, 1.2, 0.3)])
def test_a_power_law_is_found_again(c, g, floor):
    sizes = [3e3, 1e4, 5e4, 2e5, 1e6]
    found = fit_scaling(sizes, [c * n**-g + floor for n in sizes])
    assert found.factor == pytest.approx(c, rel=0.02) and found.exponent == pytest.approx(g, rel=0.01)
    assert found.floor == pytest.approx(floor, abs=0.01) and found.error < 1e-3
    assert found.at(1e5) == pytest.approx(c * 1e5**-g + floor, rel=1e-3)
    assert found.size_for(found.at(7e4)) == pytest.approx(7e4, rel=1e-6) and found.size_for(found.floor) == math.inf


def test_noise_moves_a_fit_little_and_flat_losses_have_no_slope():
    sizes = [2.0**n for n in range(8, 20)]
    noise = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 0.005
    found = fit_scaling(sizes, [4 * n**-0.3 + 1 + float(e) for n, e in zip(sizes, noise)])
    assert found.exponent == pytest.approx(0.3, abs=0.05) and found.error < 0.01
    flat = fit_scaling(sizes, [1.0] * 12)
    assert flat.at(sizes[0]) == pytest.approx(1, abs=1e-6) == pytest.approx(flat.at(sizes[-1]), abs=1e-6)


@pytest.mark.parametrize(("sizes", "losses"), [([1, 2], [1, 2]), ([1, 1, 2], [1, 1, 1]), ([1, 2, 3], [1, 2]), ([0, 1, 2], [1, 1, 1]),
                                                ([1, 2, 3], [1, math.nan, 1])])  # fmt: skip
def test_points_that_fit_no_law(sizes, losses):
    with pytest.raises(UserError):
        fit_scaling(sizes, losses)


def test_example_in_the_docstring():
    assert doctest.testmod(scaling) == (0, 2)
