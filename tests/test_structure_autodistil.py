"""AutoDistil: slices and extraction, parameter counts, sandwiches, relations of tokens, the search, whole runs."""

from __future__ import annotations

import copy
import doctest
import itertools

import pytest
import torch
from torch import nn

from limbeck import losses, zoo
from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.losses import self_relation
from limbeck.method import make
from limbeck.recipe import resolve
from limbeck.structure import supernet
from limbeck.structure.job import run as structure_job
from limbeck.structure.methods.autodistil import PAPER
from limbeck.structure.supernet import Space, SuperNet, SuperTraining, relation_loss, relations_of, sandwich
from limbeck.zoo import slicing
from limbeck.zoo.language import Tokens
from limbeck.zoo.slicing import Shape, encoder_parameters, extract, shape_of

torch.set_num_threads(1)
FULL = Shape(3, 4, 32, 64)


def bert(kind="classification", seed=0, **sizes):
    torch.manual_seed(seed)
    classes = 5 if kind == "classification" else None
    tokens = Tokens(60, 12, kind, 0, 1, 2, classes)
    made = zoo.build("bert", tokens=tokens, **{"layers": 3, "width": 32, "heads": 4, "inner": 64, **sizes}).eval()
    for name, parameter in made.named_parameters():
        if "attention.self" in name:
            parameter.data *= 10  # fresh weights are so small that attention is flat, whatever its scale
    return made


def texts(rows=3, length=9, pad=True):
    torch.manual_seed(1)
    mask = torch.ones(rows, length, dtype=torch.long)
    if pad:
        mask[0, 6:] = 0
    return {"input_ids": torch.randint(3, 60, (rows, length)), "attention_mask": mask}


def said(network, inputs):
    with torch.no_grad():
        out = network(**inputs)
    return out.logits if hasattr(out, "logits") else out


SHAPES = [Shape(3, 4, 32, 64), Shape(2, 4, 32, 64), Shape(3, 2, 32, 40), Shape(1, 4, 16, 17), Shape(2, 3, 20, 64), Shape(3, 1, 4, 8)]


# ---- slices ----


@pytest.mark.parametrize("shape", SHAPES)
def test_extraction_reproduces_the_super_models_outputs(shape, tmp_path):
    network, inputs = bert(), texts()
    net = SuperNet(network, SHAPES).eval()
    net.choose(shape)
    expected = said(net, inputs)
    alone = extract(network, shape).eval()
    assert shape_of(alone) == shape
    assert torch.allclose(said(alone, inputs), expected, atol=1e-5)
    zoo.save_model(alone, tmp_path)
    again = zoo.load_model(tmp_path).eval()
    assert torch.allclose(said(again, inputs), expected, atol=1e-5)
    assert (tmp_path / "limbeck.json").is_file() == (shape.heads == 4), "with all heads it is a plain folder of transformers"
    if shape.heads == 4:
        import transformers

        plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        assert torch.allclose(said(plain, inputs), expected, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), bert().state_dict().values())), "the whole was changed"


def test_a_slice_against_a_forward_pass_written_out():
    """Two heads of three, the leading half of the channels, written with the weights' slices by hand."""
    network, inputs = bert("embedding", layers=1, heads=4), texts(pad=False)
    inner = network.encoder
    w = {k: v for k, v in inner.state_dict().items()}
    h, d, a, f = 16, 4, 2, 10

    def norm(x, name):
        return nn.functional.layer_norm(x, (h,), w[f"{name}.weight"][:h], w[f"{name}.bias"][:h], 1e-12)

    ids = inputs["input_ids"]
    e = "embeddings."
    x = w[e + "word_embeddings.weight"][ids, :h] + w[e + "position_embeddings.weight"][: ids.shape[1], :h]
    x = norm(x + w[e + "token_type_embeddings.weight"][0, :h], e + "LayerNorm")
    rows = torch.tensor([head * 8 + c for head in range(a) for c in range(d)])
    p = "encoder.layer.0."
    q, k, v = (
        (x @ w[f"{p}attention.self.{n}.weight"][rows, :h].T + w[f"{p}attention.self.{n}.bias"][rows]).unflatten(-1, (a, d)).transpose(1, 2)
        for n in ("query", "key", "value")
    )
    mixed = ((q @ k.mT / d**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    o = p + "attention.output."
    x = norm(x + mixed @ w[o + "dense.weight"][:h][:, rows].T + w[o + "dense.bias"][:h], o + "LayerNorm")
    y = nn.functional.gelu(x @ w[p + "intermediate.dense.weight"][:f, :h].T + w[p + "intermediate.dense.bias"][:f])
    x = norm(x + y @ w[p + "output.dense.weight"][:h, :f].T + w[p + "output.dense.bias"][:h], p + "output.LayerNorm")
    shape = Shape(1, a, h, f)
    net = SuperNet(inner, [shape]).eval()
    with torch.no_grad():
        assert torch.allclose(net(**inputs).last_hidden_state, x, atol=1e-5)
        for got, expected in zip(relations_of(net, inputs), (q, k, v)):
            assert torch.allclose(got, expected.transpose(1, 2).flatten(2), atol=1e-5)


def test_gradients_reach_the_slices_and_nothing_else():
    network = bert()
    net = SuperNet(network, [Shape(1, 2, 16, 20)])
    net(**texts()).logits.sum().backward()
    grad = network.bert.encoder.layer[0].intermediate.dense.weight.grad
    assert grad[:20, :16].abs().sum() > 0 and grad[20:].abs().sum() == 0 and grad[:, 16:].abs().sum() == 0
    q = network.bert.encoder.layer[0].attention.self.query.weight.grad.unflatten(0, (4, 8))
    assert q[:2, :4].abs().sum() > 0 and q[2:].abs().sum() == 0 and q[:, 4:].abs().sum() == 0
    assert network.bert.encoder.layer[1].intermediate.dense.weight.grad is None


@pytest.mark.parametrize("shape", SHAPES)
def test_parameter_count_is_that_of_the_module(shape):
    encoder = bert("embedding").encoder
    rows = 60 + 12 + 2
    made = extract(encoder, shape)
    assert zoo.parameters(made) == encoder_parameters(shape, 4, rows)


def test_sizes_that_are_no_slice():
    network = bert()
    for wrong in (Shape(4, 4, 32, 64), Shape(3, 0, 32, 64), Shape(3, 4, 30, 64), Shape(3, 4, 32, 65)):
        with pytest.raises(UserError):
            extract(network, wrong)
    with pytest.raises(UserError, match="no encoder of the BERT family"):
        shape_of(nn.Linear(2, 2))
    network.bert.encoder.layer[0].extra = nn.Linear(3, 3)
    with pytest.raises(UserError, match="no rule says how"):
        extract(network, FULL)


@pytest.mark.parametrize("module", [slicing])
def test_examples_in_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


# ---- spaces ----


def test_the_papers_spaces_have_the_papers_numbers():
    """256 sub-networks each of a BERT-base; parameters as the paper tells them, within what its count of embeddings differs."""
    full = Shape(12, 12, 768, 3072)
    rows = 30522 + 512 + 2
    for name, (least, most), widths in (("base", (38.5e6, 79.3e6), (544, 640)), ("small", (12.3e6, 27.8e6), (256, 352)),
                                        ("tiny", (4.4e6, 10.6e6), (128, 224))):  # fmt: skip
        space = Space.of(PAPER[name], full)
        assert all(abs(h - w) < 12 for h, w in zip((space.hidden[0], space.hidden[-1]), widths))
        shapes = space.shapes(full)
        assert len(shapes) == 256
        assert encoder_parameters(shapes[0], 12, rows) == pytest.approx(least, rel=0.1)
        assert encoder_parameters(shapes[-1], 12, rows) == pytest.approx(most, rel=0.1)


def test_small_spaces_are_rounded_and_ordered():
    space = Space.of({"layers": [0.1, 0.5, 1], "heads": [0.5, 0.6], "hidden": [0.4, 0.41, 1], "ratio": [1, 8]}, FULL)
    assert space == Space((1, 2, 3), (2,), (12, 32), (1, 8))
    shapes = space.shapes(FULL)
    counts = [encoder_parameters(shape, 4, 0) for shape in shapes]
    assert counts == sorted(counts) and max(shape.inner for shape in shapes) == 64 and len(set(shapes)) == len(shapes) == 12
    for wrong in ({"layers": [1]}, {"layers": [2], "heads": [1], "hidden": [1], "ratio": [1]}, {"depth": [1]},
                  {"layers": [], "heads": [1], "hidden": [1], "ratio": [1]}):  # fmt: skip
        with pytest.raises(UserError):
            Space.of(wrong, FULL)


def test_the_sandwich():
    shapes = SHAPES
    draws = [sandwich(shapes, 4, 7, step) for step in range(200)]
    assert all(d[0] == shapes[-1] and d[1] == shapes[0] and len(d) == 4 for d in draws)
    assert {s for d in draws for s in d[2:]} == set(shapes)
    assert sandwich(shapes, 4, 7, 3) == draws[3] and any(sandwich(shapes, 4, 8, s) != draws[s] for s in range(5))
    assert sandwich(shapes[:1], 4, 0, 0) == shapes[:1] and len(sandwich(shapes, 1, 0, 0)) == 1


# ---- relations ----


def relation_by_hand(s, t, heads, kind, mask):
    total, count = 0.0, 0
    a, b = s.shape[-1] // heads, t.shape[-1] // heads
    for n, head in itertools.product(range(len(s)), range(heads)):
        rs = s[n, :, head * a : (head + 1) * a] @ s[n, :, head * a : (head + 1) * a].T / a**0.5
        rt = t[n, :, head * b : (head + 1) * b] @ t[n, :, head * b : (head + 1) * b].T / b**0.5
        for i in range(len(rs)):
            if kind == "mse":
                total += float(((rs[i] - rt[i]) ** 2).sum())
                count += len(rs)
            elif mask[n, i]:
                seen = mask[n].bool()
                p, q = rt[i][seen].softmax(0), rs[i][seen].softmax(0)
                total += float((p * (p / q).log()).sum())
                count += 1
    return total / count


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_relations_against_loops(kind):
    torch.manual_seed(0)
    s, t, mask = torch.randn(3, 5, 11), torch.randn(3, 5, 16), torch.ones(3, 5)
    mask[1, 3:] = 0
    found = self_relation(s, t, heads=4, mask=mask, kind=kind)
    assert float(found) == pytest.approx(relation_by_hand(s, t, 4, kind, mask), rel=1e-4)
    rows = self_relation(s, t, heads=4, mask=mask, kind=kind, reduction="none")
    if kind == "mse":
        assert torch.allclose(rows.mean(), found)
    assert rows.shape == (3,) and float(self_relation(s, s, heads=4, kind=kind)) == pytest.approx(0, abs=1e-6)
    noisy = torch.cat([s[..., :8], 100 * torch.randn(3, 5, 3)], -1)
    assert torch.allclose(self_relation(noisy, t, heads=4, mask=mask, kind=kind), found), "surplus channels count"


def test_relations_that_do_not_fit():
    x = torch.randn(2, 4, 6)
    wrong = ((x, x[:, :3], 2, "mse"), (x, x, 7, "mse"), (x, x, 0, "mse"), (x, x, 2, "l1"), (x[0], x[0], 2, "kl"))
    for student, teacher, heads, kind in wrong:
        with pytest.raises(UserError):
            self_relation(student, teacher, heads=heads, kind=kind)
    assert "self_relation" in losses.__all__


def test_relations_are_those_of_the_last_layer():
    network, inputs = bert(), texts()
    kept = {}
    own = network.bert.encoder.layer[-1].attention.self
    handles = [getattr(own, n).register_forward_hook(lambda m, a, o, n=n: kept.__setitem__(n, o)) for n in ("query", "key", "value")]
    said(network, inputs)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        assert all(torch.equal(got, kept[n]) for got, n in zip(relations_of(network, inputs), ("query", "key", "value")))
    assert not own.query._forward_hooks


def test_one_step_adds_up_the_gradients_of_its_sub_networks():
    teacher, student, inputs = bert(seed=5), bert(), texts()
    shapes = SHAPES[::-1]
    net = SuperNet(copy.deepcopy(student), shapes)
    method = SuperTraining(per_step=4, heads=4, seed=3)

    class Teacher:
        def networks(self):
            return {"teacher": teacher}

    class Both:
        module = net

    both = Both()
    both.teacher = Teacher()
    terms = method.step(Batch(inputs), both, Clock(2, 10, 10))
    assert list(terms) == ["largest", "smallest", "random_1", "random_2"]
    sum(terms.values()).backward()
    expected = {name: torch.zeros_like(p) for name, p in student.named_parameters()}
    for shape in sandwich(shapes, 4, 3, 2):
        one = SuperNet(copy.deepcopy(student), shapes)
        one.choose(shape)
        with torch.no_grad():
            target = relations_of(teacher, inputs)
        relation_loss(relations_of(one, inputs), target, 4, inputs["attention_mask"], "mse").backward()
        for name, p in one.whole.named_parameters():
            if p.grad is not None:
                expected[name] += p.grad
    for name, p in net.whole.named_parameters():
        got = torch.zeros_like(p) if p.grad is None else p.grad
        assert torch.allclose(got, expected[name], atol=1e-5), name


# ---- whole runs ----

SPACES = {
    "large": {"layers": [0.5, 1], "heads": [0.5, 1], "hidden": [0.75, 1], "ratio": [1, 2]},
    "small": {"layers": [0.5], "heads": [0.5, 1], "hidden": [0.25, 0.5], "ratio": [1, 2]},
}


def job(tmp_path, name="run", budget=None, **settings):
    recipe = {
        "name": "tiny-autodistil",
        "method": {"id": "autodistil", "steps": 8, "spaces": SPACES, "held_out": 32, **settings},
        "teacher": {"model": "bert", "args": {"layers": 2, "width": 32, "heads": 4},
                    "train": {"method": "masked-lm", "steps": 10, "batch": 8, "lr": 0.002}},
        "student": {"model": "teacher"},
        "data": {"source": "stdlib-windows", "train": 120, "test": 32, "valid": 32},
        "text": {"tokenizer": "bpe:320", "length": 16},
        "training": {"steps": 4, "batch": 8, "lr": 0.001},
        "baseline": False, "threads": 1, "device": "cpu", "trackers": [],
    }  # fmt: skip
    if budget:
        recipe["structure"] = {"budget": budget}
    return run(recipe, tmp_path / name)


def run(recipe, folder):
    """The job alone, without its report; what it told its log."""

    class Keep:
        start = tick = finish = close = lambda self, *a: None

        def log(self, record):
            phases.append(record["phase"])

    folder.mkdir(parents=True, exist_ok=True)
    phases = []
    outcome = structure_job(resolve(recipe), Session(folder=folder, callbacks=[Keep()]), {})
    zoo.save_model(outcome.artifacts["student"].held, folder / "student")
    return outcome, set(phases)


def decision(tmp_path, name="run"):
    import json

    return json.loads((tmp_path / name / "decisions" / "student-subnetwork.json").read_text())["decision"]


def test_the_best_within_the_budget_is_cut_out(tmp_path):
    result, phases = job(tmp_path, budget={"params": "60%"})
    cost = result.summary["cost"]
    assert cost["student"]["params"] <= 0.6 * cost["teacher"]["params"]
    chosen = decision(tmp_path)
    assert 0 < chosen["within"] < chosen["all"] == 16 + 8
    network = zoo.load_model(tmp_path / "run" / "student")
    assert shape_of(network).as_dict() == chosen["shape"] and zoo.parameters(network) == cost["student"]["params"]
    assert result.summary["metrics"]["student"]["relation_loss"] > 0
    assert {"student-super-large", "student-super-small"} <= phases
    job(tmp_path, "random", budget={"params": "60%"}, choose="random")
    other = decision(tmp_path, "random")
    assert other["shape"] != chosen["shape"] and other["loss"] >= chosen["loss"] and other["within"] == chosen["within"]


def test_one_space_and_a_measured_budget(tmp_path):
    result, phases = job(tmp_path, budget={"flops": "70%"}, partition=False, relation="kl")
    assert result.summary["cost"]["student"]["flops"] <= 0.7 * result.summary["cost"]["teacher"]["flops"]
    assert "student-super-all" in phases and "student-super-large" not in phases
    with pytest.raises(UserError, match="cannot be met by the sub-networks"):
        job(tmp_path, "no", budget={"params": "5%"})


def test_students_that_are_no_encoders(tiny, tmp_path):
    with pytest.raises(UserError, match="BERT family"):
        run({**tiny, "method": {"id": "autodistil", "steps": 2}}, tmp_path / "run")
    with pytest.raises(UserError, match="steps is 0"):
        make("autodistil", {"steps": 0})
    assert supernet.mask_of(torch.zeros(1)) is None
