"""MGSR: where a text is corrected, how it is written on, the clipped KL, spans of words, the buffer."""

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from limbeck import recipe as schema
from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.knowledge import models
from limbeck.knowledge.methods.mgsr import LEAST, MGSR, ClipNetwork, clipped_kl, span_gap
from limbeck.knowledge.on_policy import Writer
from limbeck.knowledge.program import KnowledgeProgram
from limbeck.knowledge.revision import Draft, Reviser, error_tokens, rewrite
from limbeck.knowledge.word_spans import neighbours, pieces, token_spans
from limbeck.losses import vocabulary
from limbeck.losses.vocabulary import Law
from limbeck.method import make
from limbeck.zoo import Tokens, build
from tests.conftest import TINY_TEXT

V = 23


def logits(*shape, seed=0, scale=3.0):
    return torch.randn(*shape, V, generator=torch.Generator().manual_seed(seed)) * scale


def fixed(low, high):
    return lambda seen: (torch.full((len(seen), 1), low), torch.full((len(seen), 1), high))


# ---- tokens: the clipped KL ----


def dac_by_hand(z, t, target, low, high, width):
    """One row after the other, plain numpy in the order of the vocabulary."""
    found = []
    for s_row, t_row, label in zip(z.double().numpy(), t.double().numpy(), target.tolist()):
        p = np.exp(t_row - t_row.max())
        p /= p.sum()
        q = np.exp(s_row - s_row.max())
        q /= q.sum()
        w = np.empty(V)
        for v in range(V):
            c = p[p > p[v]].sum()
            w[v] = 1 / (1 + np.exp(-(c - low) / width)) / (1 + np.exp(-(high - c) / width))
        w[label] = 1
        a, b = w * p / (w * p).sum(), w * q / (w * q).sum()
        found.append((a * np.log(a / b)).sum())
    return np.array(found)


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.1, 0.8), (0.3, 0.85)])
def test_clipped_kl_against_its_formula(low, high):
    z, t, target = logits(30, seed=1), logits(30, seed=2), torch.randint(V, (30,), generator=torch.Generator().manual_seed(3))
    values, kept = clipped_kl(z, t, target, fixed(low, high), 5, 0.02)
    np.testing.assert_allclose(values, dac_by_hand(z, t, target, low, high, 0.02), rtol=2e-4, atol=1e-6)
    assert kept.shape == (30,) and torch.allclose(kept, torch.tensor(high - low))
    assert values.min() > -1e-6


def test_clipped_kl_of_equal_laws_is_zero_and_pulls_nothing():
    z = logits(12, seed=4).requires_grad_()
    clip = ClipNetwork(7, 8)
    values, _ = clipped_kl(z, z.detach(), torch.zeros(12, dtype=torch.int64), clip, 7, 0.02)
    values.sum().backward()
    assert values.abs().max() < 1e-6 and z.grad.abs().max() < 1e-6
    assert max(p.grad.abs().max() for p in clip.parameters()) < 1e-4


def test_a_wide_clip_is_forward_kl():
    z, t = logits(9, seed=5), logits(9, seed=6)
    values, _ = clipped_kl(z, t, torch.zeros(9, dtype=torch.int64), fixed(-1.0, 2.0), 5, 0.02)
    whole = vocabulary.divergence(Law(dense=z), Law(dense=t), "forward", reduction="none")
    assert torch.allclose(values, whole, atol=1e-5)


def test_the_label_is_always_kept():
    """A label far outside the bounds: with its weight 1 the student is pulled to it, without it not at all."""
    t = torch.full((1, V), -4.0)
    t[0, :3] = torch.tensor([3.0, 2.0, 1.0])
    z = torch.zeros(1, V, requires_grad=True)
    values, _ = clipped_kl(z, t, torch.tensor([20]), fixed(0.0, 0.7), 5, 0.01)
    values.sum().backward()
    assert z.grad[0, 20].abs() > 1e-3 and z.grad[0, 19].abs() < 1e-6


def test_gradients_reach_student_and_clip_network_and_are_right():
    torch.manual_seed(0)
    clip = ClipNetwork(4, 6).double()
    z = logits(5, seed=7).double().requires_grad_()
    t, target = logits(5, seed=8).double(), torch.arange(5)

    def value(x, *_):
        return clipped_kl(x, t, target, clip, 4, 0.1)[0].sum()

    value(z).backward()
    step = torch.randn(clip.layers[0].weight.shape, generator=torch.Generator().manual_seed(9)).double()
    slope = float((clip.layers[0].weight.grad * step).sum())
    with torch.no_grad():
        clip.layers[0].weight += 1e-6 * step
        up = value(z)
        clip.layers[0].weight -= 2e-6 * step
        assert float(up - value(z)) / 2e-6 == pytest.approx(slope, rel=1e-4)
    assert abs(slope) > 0

    constant = fixed(0.1, 0.8)
    assert torch.autograd.gradcheck(lambda x: clipped_kl(x, t, target, constant, 4, 0.1)[0], z, atol=1e-6)


def test_the_clip_network_keeps_half_of_the_mass_and_begins_with_nearly_all():
    torch.manual_seed(1)
    clip = ClipNetwork(8, 16)
    low, high = clip(torch.rand(50, 16))
    assert low.max() < 0.05 and high.min() > 0.95
    for parameter in clip.parameters():
        parameter.data.normal_(std=20)
    low, high = clip(torch.rand(500, 16))
    assert low.min() >= 0 and high.max() <= 1 + 1e-6 and (high - low).min() >= LEAST - 1e-6
    assert low.max() > 0.4


# ---- spans ----


def test_span_gap_against_numpy():
    a, b, c, d = (logits(6, seed=s).double() for s in range(4))
    soft = [torch.softmax(x, -1).numpy() for x in (a, b, c, d)]
    expected = ((soft[2] * soft[3] - soft[0] * soft[1]) ** 2).sum(-1)
    np.testing.assert_allclose(span_gap(a, b, c, d), expected, rtol=1e-9)
    assert not span_gap(a, b, a, b).any()


TABLE = ["ret", "urn", " the", " val", "ue", " of", " x", "os", ".", "path", " ", "\n", "()"]


def test_spans_of_sub_words():
    find = lambda *ids: token_spans(list(ids), TABLE)  # noqa: E731
    assert find(0, 1) == [(0, 1)]  # return
    assert find(0, 1, 2, 3, 4) == [(0, 1), (3, 4)]  # return | the is one token | value
    assert find(5, 2, 3, 4) == [(0, 3)]  # of the value
    assert find(5, 6) == [(0, 1)]  # of x
    assert find(7, 8, 9, 12) == [(0, 3)]  # os.path()
    assert find(0, 11, 1) == []  # a line's end parts ret and urn
    assert find(6) == [] and find() == []


def test_neighbours_are_rows_of_the_law():
    """Two texts with gaps between scored tokens; weights are means over pairs, then over spans."""
    labels = torch.tensor([[-100, 5, 2, 3, 4, -100, 0], [-100, -100, 0, 1, 10, 0, 1]])
    rows, weight = neighbours(labels, TABLE)
    # law rows: text 0: 5 2 3 4 | 0 -> 0..3, 4 ; text 1: 0 1 10 0 1 -> 5..9
    assert rows.tolist() == [0, 1, 2, 5, 8]
    assert weight.tolist() == pytest.approx([1 / 9, 1 / 9, 1 / 9, 1 / 3, 1 / 3])
    none, empty = neighbours(torch.full((2, 4), -100), TABLE)
    assert len(none) == len(empty) == 0


def test_pieces_of_tokenizers():
    class Fake:
        all_special_ids = [0]

        def __init__(self, tokens):
            self.tokens = tokens

        def __len__(self):
            return len(self.tokens)

        def convert_ids_to_tokens(self, ids):
            return [self.tokens[i] for i in ids]

    assert pieces(Fake(["<pad>", "Ġthe", "Ċ", "ab"])) == ["\n", " the", "\n", "ab"]
    assert pieces(Fake(["[PAD]", "the", "##ing", "ab"])) == ["\n", " the", "ing", " ab"]
    assert pieces(Fake(["<s>", "▁the", "ing"])) == ["\n", " the", "ing"]


# ---- sequences ----


def test_error_token_by_brute_force():
    g = torch.Generator().manual_seed(0)
    distance, open_ = torch.rand(200, 7, generator=g), torch.rand(200, 7, generator=g) < 0.7
    written, choice = torch.randint(3, (2, 200, 7), generator=g)
    place, found = error_tokens(distance, written, choice, open_)
    empty = 0
    for row in range(200):
        best = None
        for i in range(7):
            if open_[row, i] and written[row, i] != choice[row, i] and (best is None or distance[row, i] > distance[row, best]):
                best = i
        assert bool(found[row]) == (best is not None)
        if best is None:
            empty += 1
        else:
            assert int(place[row]) == best
    assert empty == 0 or empty < 200
    nothing = error_tokens(distance, written, written, open_)[1]
    assert not nothing.any()


def tiny(seed=0):
    torch.manual_seed(seed)
    model = build("llama", tokens=Tokens(V, 64, "causal-lm", 0, 1, 2), layers=1, width=16, heads=2).eval()
    for parameter in model.parameters():
        parameter.data.mul_(6)
    return model


def test_rewrite_keeps_the_prefix_and_writes_on_as_the_model_would():
    """Greedy, rows of different places and prompts of different lengths, against one row at a time without a cache."""
    model, tokens = tiny(), 9
    g = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, V, (4, 5), generator=g)
    mask = torch.ones_like(prompts)
    mask[0, :2] = mask[2, :3] = 0
    ids = torch.randint(3, V, (4, 7), generator=g)
    kept = torch.ones_like(ids, dtype=torch.bool)
    place, token = torch.tensor([2, 0, 6, 4]), torch.tensor([5, 6, 7, 2])
    made = rewrite(model, Draft(prompts, mask, ids, kept), place, token, tokens=tokens, temperature=0, eos=2, pad=0)
    for row in range(4):
        text = [*ids[row, : place[row]].tolist(), int(token[row])]
        while len(text) < tokens and text[-1] != 2:
            whole = torch.tensor([[*prompts[row][mask[row].bool()].tolist(), *text]])
            with torch.no_grad():
                text.append(int(model(input_ids=whole).logits[0, -1].argmax()))
        assert made.ids[row][made.kept[row]].tolist() == text
        assert made.kept[row].long().diff().max() <= 0  # no holes
        assert (made.ids[row][~made.kept[row]] == 0).all()
    assert made.kept[3].sum() == 5  # the teacher ended that text


class Sides:
    """Student and teacher as `Models` gives them, reading with the task's reader."""

    def __init__(self, student, teacher):
        from limbeck.signals.language import LanguageReader

        self.module = student
        self.student = LanguageReader(student, ("law",), kind="causal-lm", vocabulary=V)
        self.teacher = LanguageReader(teacher, ("law",), kind="causal-lm", vocabulary=V, grad=False)


class Prompts:
    def __init__(self, ids, mask):
        self.ids, self.mask = ids, mask

    def prompts(self, index):
        return self.ids[index], self.mask[index]


def setting(seed=0):
    g = torch.Generator().manual_seed(seed)
    prompts = torch.randint(3, V, (6, 4), generator=g)
    mask = torch.ones_like(prompts)
    mask[1, :2] = 0
    text = SimpleNamespace(pad=0, eos=2, vocabulary=V, length=16, tokenizer=None)
    return Prompts(prompts, mask), Batch({"input_ids": prompts}, None, torch.arange(6)), text


def test_equal_sides_written_greedily_need_no_correction():
    """The student writes what the teacher would: no candidates, so the text stays."""
    model = tiny()
    split, batch, text = setting()
    once, count = Reviser(Writer(8, 4, 0.0), 1, text)(Sides(model, model), split, batch)
    plain, none = Reviser(Writer(8, 4, 0.0), 0, text)(Sides(model, model), split, batch)
    assert int(count) == int(none) == 0
    assert torch.equal(once.inputs["input_ids"], plain.inputs["input_ids"]) and torch.equal(once.labels, plain.labels)


@pytest.mark.parametrize("corrections", [1, 3])
def test_revised_text_by_brute_force(corrections):
    """Greedy writing: every correction is found again with whole logits, and what is written on is the student's."""
    student, teacher = tiny(1), tiny(2)
    split, batch, text = setting()
    made, count = Reviser(Writer(8, 4, 0.0), corrections, text)(Sides(student, teacher), split, batch)
    expected, total = [], 0
    for row in range(6):
        prompt = split.ids[row][split.mask[row].bool()].tolist()

        def write(answer, prompt=prompt):
            while len(answer) < 8 and (not answer or answer[-1] != 2):
                with torch.no_grad():
                    answer.append(int(student(input_ids=torch.tensor([prompt + answer])).logits[0, -1].argmax()))
            return answer

        answer, after = write([]), -1
        for _ in range(corrections):
            whole = torch.tensor([prompt + answer])
            with torch.no_grad():
                p = teacher(input_ids=whole).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
                q = student(input_ids=whole).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            gap = (p.exp() * (p - q)).sum(-1)
            wrong = [i for i in range(len(answer)) if int(p[i].argmax()) != answer[i] and i > after]
            if not wrong:
                break
            after = max(wrong, key=lambda i: float(gap[i]))
            answer = write([*answer[:after], int(p[after].argmax())])
            total += 1
        expected.append((prompt, answer))
    assert int(count) == total > 3
    for row, (prompt, answer) in enumerate(expected):
        assert made.inputs["input_ids"][row][made.inputs["attention_mask"][row].bool()].tolist() == prompt + answer
        assert made.labels[row][made.labels[row] != -100].tolist() == answer


# ---- the method ----


@pytest.fixture
def cached(monkeypatch, tmp_path_factory):
    """One cache for the tests of this file: the teacher is trained once."""
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path_factory.getbasetemp() / "mgsr-cache"))


def program(student_is_teacher=False, **settings):
    raw = copy.deepcopy(TINY_TEXT)
    raw |= {"method": {"id": "mgsr", "tokens": 6, **settings}}
    if student_is_teacher:
        raw["student"] = {"model": "teacher"}
    raw["training"] = {**raw["training"], "steps": 12, "batch": 8}
    recipe = schema.resolve(raw)
    session = Session(digest="t")
    data = models.open_recipe_data(recipe.data, None, recipe)
    task = models.task_of(recipe, data)
    networks = models.teacher_networks(recipe, data, session, {})
    student = models.make_student(recipe, data, session, {})
    method = make("mgsr", recipe.method.settings)
    method.task = task
    teacher = models.make_teacher(recipe.teacher, method, networks, student, data, session, task)
    return KnowledgeProgram(method, student, teacher, data, task, recipe.training, seed=0)


def test_terms_against_dense_formulas_and_zero_for_equal_sides(cached):
    made = program(revised=0.0)
    method, batch = made.method, next(iter(made.batches(1, 0)))
    terms = {name: value.detach() for name, value in method.losses("student", batch, made.models, Clock(0, 1, 12)).items()}
    z, t = made.models.student(batch).law.logits().detach(), made.models.teacher(batch).law.logits()
    target = made.task.targets(batch.labels)
    values, _ = clipped_kl(z, t, target, method.parts["clip"], 64, 0.02)
    assert float(terms["dac"]) == pytest.approx(float(values.detach().mean()), rel=1e-5)
    rows, weight = neighbours(batch.labels, method._pieces)
    assert len(rows) > 5 and float(weight.sum()) == pytest.approx(1, abs=1e-5)
    p, q = t.softmax(-1), z.softmax(-1)
    gaps = (p[rows] * p[rows + 1] - q[rows] * q[rows + 1]).square().sum(-1)
    assert float(terms["span"]) == pytest.approx(float((gaps * weight).sum()), rel=1e-4)
    assert float(terms["ce"]) == pytest.approx(float(torch.nn.functional.cross_entropy(z, target)), rel=1e-5)

    equal = program(student_is_teacher=True, revised=1.0, temperature=0.0)
    terms = equal.method.losses("student", batch, equal.models, Clock(0, 1, 12))
    assert float(terms["dac"].detach()) < 1e-6 and float(terms.get("span", torch.zeros(())).detach()) < 1e-9
    law = equal.models.student(batch).law
    assert all(float(value) < 1e-6 for value in equal.method._terms(batch, law, law.detach()).values())
    assert float(equal.method.state["corrected"]) == 0


def test_the_buffer_is_refreshed_less_and_less(cached):
    made = program(revised=1.0, buffer=3, sft_weight=0.0)
    method, batch = made.method, next(iter(made.batches(1, 0)))
    torch.manual_seed(0)
    for _ in range(8):
        method.losses("student", batch, made.models, Clock(0, 1, 12))
    assert method.state["written"] == 8 and len(method.state["buffer"]) == 3
    clock = Clock(11, 1, 11)
    clock.step = 11
    for _ in range(8):
        method.losses("student", batch, made.models, clock)
    assert method.state["written"] == 8  # at the end all comes from the buffer
    oldest = [row["labels"] for row in method.state["buffer"]]
    assert len({tuple(x.flatten().tolist()) for x in oldest}) == 3
    method.losses("student", batch, made.models, Clock(0, 1, 12))
    same = [any(torch.equal(row["labels"], x) for x in oldest) for row in method.state["buffer"]]
    assert sorted(same) == [False, True, True]
    figures = method.figures(None, None, None, None)
    assert figures["written"] == 9 and 0 < figures["corrected"] <= 1 and LEAST <= figures["kept_mass"] <= 1


def test_switches_and_bad_input(cached):
    made = program(clip=False, revised=0.0, span_weight=0.0)
    batch = next(iter(made.batches(1, 0)))
    terms = made.method.losses("student", batch, made.models, Clock(0, 1, 12))
    assert set(terms) == {"ce", "kl"} and not list(made.method.parts)
    law = made.models.student(batch).law
    assert float(terms["kl"]) == pytest.approx(float(vocabulary.divergence(law, made.models.teacher(batch).law)), rel=1e-5)
    with pytest.raises(UserError, match="dac_weight"):
        MGSR(dac_weight=-1)
    made.method.task = SimpleNamespace(kind="seq2seq")
    with pytest.raises(UserError, match="causal"):
        made.method.setup(made.pair)


def test_learning_rates_are_apart(cached):
    made = program(clip_lr=0.5)
    groups = made.optimizers()["student"].param_groups
    assert [group["lr"] for group in groups] == [0.01, 0.5] and groups[1]["weight_decay"] == 0
    assert len(list(itertools.chain(*(group["params"] for group in groups)))) == sum(
        1 for m in (made.student, made.method.parts) for _ in m.parameters()
    )
