"""Teacher and student with different tokenizers: alignment of their tokens, the three bridges, and how a teacher's tokenizer is found."""

import copy
from types import SimpleNamespace

import pytest
import torch

from limbeck import recipe as schema
from limbeck.data.batch import Batch
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.knowledge import models
from limbeck.knowledge.alignment import Aligned, Aligner
from limbeck.knowledge.methods.universal_logit import UniversalLogit, binary_kl, sorted_distance
from limbeck.knowledge.tokens import in_own_tokens
from limbeck.losses.vocabulary import Law
from tests.conftest import TINY_TEXT

TINY = {**TINY_TEXT, "method": {"id": "universal-logit"}}
TINY["teacher"] = {**TINY_TEXT["teacher"], "text": {"tokenizer": "bpe:420"}}
WINDOWS = {**TINY, "data": {"source": "stdlib-text", "train": 24, "test": 6}}
SEQ2SEQ = {
    **TINY,
    "student": {"model": "t5", "args": {"layers": 1, "width": 16, "heads": 2}},
    "teacher": {"model": "t5", "args": {"layers": 1, "width": 16, "heads": 2}, "text": {"tokenizer": "bpe:420"}},
    "data": {"source": "tables-in-words", "args": {"table": "iris"}, "train": 24, "test": 6},
    "text": {"tokenizer": "bpe:320", "length": 64},
}


def opened(raw):
    """(recipe, data, the data in the teacher's tokens, task)."""
    recipe = schema.resolve(copy.deepcopy(raw))
    data = models.open_recipe_data(recipe.data, None, recipe)
    own = in_own_tokens(recipe.teacher.models["teacher"], recipe, data)[1]
    return recipe, data, own, models.task_of(recipe, data)


def law_rows(batch, kind):
    """(sample, position of the scored token) of each row of a law, in order."""
    labels = batch.labels if kind == "seq2seq" else batch.labels[:, 1:]
    shift = 0 if kind == "seq2seq" else 1
    return [(b, i + shift) for b, i in (labels != -100).nonzero().tolist()]


def raw_bytes(tokenizer, ids):
    """The bytes of byte-level tokens, by the table of GPT-2 written out here."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable}
    table |= {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in printable)}
    special = set(tokenizer.all_special_ids)
    return b"".join(bytes(table[c] for c in tokenizer.convert_ids_to_tokens(i)) for i in ids if i not in special)


@pytest.mark.parametrize("raw", [TINY, WINDOWS, SEQ2SEQ], ids=["pairs", "windows", "seq2seq"])
def test_aligned_rows_have_read_the_same_bytes_and_pieces_are_the_same_text(raw):
    """By bytes of the tokens in front of each row, and by the bytes of each piece on both sides."""
    _, data, own, _ = opened(raw)
    align = Aligner(data.text, own.text)
    kind = data.text.kind
    for index in torch.arange(24).split(8):
        batch = data.train.batch(index)
        aligned = align(batch)
        sides = []
        for coder, side in ((data.text.tokenizer, batch), (own.text.tokenizer, aligned.batch)):
            tokens = side.labels if kind == "seq2seq" else side.inputs["input_ids"]
            whole = [[t for t in row.tolist() if t >= 0] for row in tokens]
            sides.append((coder, law_rows(side, kind), whole, side.labels))
        assert len(aligned.student) > 8 and len(aligned.student) == len(set(aligned.student.tolist()))
        for s, t in zip(aligned.student.tolist(), aligned.teacher.tolist()):
            read = [(rows[n][0], raw_bytes(coder, whole[rows[n][0]][: rows[n][1]])) for (coder, rows, whole, _), n in zip(sides, (s, t))]
            assert read[0] == read[1]
        pieces = []
        for (coder, rows, _, labels), chunk in zip(sides, (aligned.student_chunk, aligned.teacher_chunk)):
            assert len(chunk) == len(rows)
            own_pieces = {}
            for (b, i), number in zip(rows, chunk.tolist()):
                own_pieces.setdefault(number, []).append(int(labels[b, i]))
            own_pieces.pop(-1, None)
            pieces.append({n: (raw_bytes(coder, ids), ids[-1] == coder.eos_token_id) for n, ids in own_pieces.items()})
        assert pieces[0] == pieces[1] and sorted(pieces[0]) == list(range(aligned.chunks))
        if raw is not WINDOWS:  # every whole completion's end is a piece of its own in both
            ended = sum(int((row[row >= 0][-1:] == data.text.eos).sum()) for row in batch.labels)
            assert sum(end for _, end in pieces[0].values()) <= ended and ended > 0


def test_one_tokenizer_is_aligned_with_itself_everywhere():
    """Every scored row with its own, every token a piece."""
    _, data, _, _ = opened(TINY)
    batch = data.train.batch(torch.arange(12))
    aligned = Aligner(data.text, data.text)(batch)
    count = int((batch.labels[:, 1:] != -100).sum())
    broken = count - len(aligned.student)
    assert torch.equal(aligned.student, aligned.teacher) and broken <= count // 50
    assert torch.equal(aligned.batch.labels, batch.labels) and torch.equal(aligned.batch.inputs["input_ids"], batch.inputs["input_ids"])


def test_sorted_is_the_l1_distance_of_sorted_probabilities_with_zeros_behind():
    """ULD's equation, value and gradient; zero for a permuted vocabulary; chunks and weights change nothing."""
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7, dtype=torch.float64, requires_grad=True), torch.randn(5, 11, dtype=torch.float64)
    p, q = student.softmax(-1).sort(descending=True).values, teacher.softmax(-1).sort(descending=True).values
    want = (torch.cat([p, p.new_zeros(5, 4)], 1) - q).abs().sum(1)
    assert torch.allclose(sorted_distance(student, teacher), want)
    assert torch.allclose(sorted_distance(teacher, student), want)
    assert torch.autograd.gradcheck(lambda x: sorted_distance(x, teacher), student)
    assert float(sorted_distance(teacher, teacher[:, torch.randperm(11)]).abs().max()) < 1e-12


def fakes(student, teacher, pairs, student_chunk=None, teacher_chunk=None, labels=None, chunks=0):
    put = lambda v: torch.tensor(v if v is not None else [], dtype=torch.int64)  # noqa: E731
    batch = Batch({}, labels[1] if labels else None)
    aligned = Aligned(batch, put([a for a, _ in pairs]), put([b for _, b in pairs]), put(student_chunk), put(teacher_chunk), chunks)
    return Law(dense=student), Law(dense=teacher), aligned, labels[0] if labels else None


def test_sinkhorn_tends_to_the_sorted_distance_of_the_largest():
    """With little entropy and equal masses the plan pairs ranks: n times its cost is the L1 distance of the n largest."""
    torch.manual_seed(1)
    student, teacher = 3 * torch.randn(4, 9, dtype=torch.float64), 3 * torch.randn(4, 12, dtype=torch.float64)
    pairs = [(0, 1), (2, 3), (3, 0)]
    method = UniversalLogit(bridge="sinkhorn", top=5, epsilon=5e-4, iterations=500)
    found = method.distance(*fakes(student, teacher, pairs))
    top = lambda x: x.softmax(-1).topk(5).values  # noqa: E731
    want = torch.stack([(top(student[a]) - top(teacher[b])).abs().sum() for a, b in pairs]).mean()
    assert float(found) == pytest.approx(float(want), abs=5e-3)
    assert float(method.distance(*fakes(student, teacher, []))) == 0


def test_spans_is_the_binary_kl_of_the_chunk_probabilities():
    """Products of token probabilities of each piece, by hand; tokens outside pieces do not count; gradients only to the student."""
    torch.manual_seed(2)
    student = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    own, other = torch.tensor([[5, 1, 2, 0]]), torch.tensor([[7, 3, 6]])
    method = UniversalLogit(bridge="spans")
    method.task = SimpleNamespace(targets=lambda labels: labels[labels >= 0])
    found = method.distance(*fakes(student, teacher, [], [0, 0, 1, -1], [0, 1, 1], (own, other), 2))
    s, t = student.softmax(-1), teacher.softmax(-1)
    mine = [s[0, 5] * s[1, 1], s[2, 2]]
    theirs = [t[0, 7], t[1, 3] * t[2, 6]]
    want = sum(q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log() for p, q in zip(mine, theirs)) / 2
    assert torch.allclose(found, want)
    found.backward()
    assert teacher.grad is None and float(student.grad[:3].abs().min()) > 0 and float(student.grad[3].abs().max()) == 0
    logs = torch.tensor([-0.0, -1e-9, -200.0], dtype=torch.float64, requires_grad=True)
    value = binary_kl(torch.tensor([-1e-9, -3.0, -0.5], dtype=torch.float64), logs).sum()
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(logs.grad).all()


@pytest.mark.parametrize("bridge", ["sorted", "sinkhorn", "spans"])
def test_a_teacher_with_other_tokens_is_learned_from(bridge):
    """A whole job: the teacher is trained and measured in its own tokens, the bridge's term falls with the student's weights."""
    from limbeck.knowledge import job

    raw = {**copy.deepcopy(TINY), "method": {"id": "universal-logit", "bridge": bridge}, "baseline": False, "watch": 5}
    recipe = schema.resolve(raw)
    seen = []
    keep = SimpleNamespace(log=seen.append, start=lambda *a: None, tick=lambda *a: None, finish=lambda *a: None)
    session = Session(callbacks=[keep], watch=5, evaluation=recipe.evaluation, checkpoints=recipe.checkpoints)
    outcome = job.run(recipe, session, {})
    metrics = outcome.summary["metrics"]
    assert "to_teacher" not in outcome.summary and metrics["teacher"]["nll"] < 6.1
    terms = [record["terms"] for record in seen if record.get("phase") == "student" and bridge in record.get("terms", {})]
    assert terms and all(t[bridge]["value"] >= 0 for t in terms) and any(t[bridge].get("norm", 0) > 0 for t in terms)
    own = in_own_tokens(recipe.teacher.models["teacher"], recipe, models.open_recipe_data(recipe.data, None, recipe))[1]
    network = models.teacher_networks(recipe, models.open_recipe_data(recipe.data, None, recipe), Session(), {})["teacher"]
    found = models.task_of(recipe, own).measure(network, own.test, 64, torch.device("cpu")).metrics["nll"]
    assert metrics["teacher"]["nll"] == pytest.approx(found)


def test_a_method_without_a_bridge_names_this_one_also_where_widths_are_equal(tmp_path):
    """A teacher's folder with a tokenizer of the same size and other ids is found; with the data's own tokenizer all is well."""
    from limbeck.data.text.tokens import load_tokenizer
    from limbeck.zoo import save_model

    recipe, data, _, _ = opened({**copy.deepcopy(TINY_TEXT), "method": {"id": "token-level-kd"}})
    network = models.build(recipe.teacher.models["teacher"], data, 0, "teacher")
    words = " ".join("".join(chr(97 + (n * k + n // 7) % 26) for k in (1, 3, 5, 7, 11)) for n in range(120))
    row = SimpleNamespace(texts=lambda: [words] * 9)
    other = load_tokenizer("bpe:320", SimpleNamespace(identity="others", parts={"train": lambda: iter([row])}))
    assert len(other) == len(data.text.tokenizer)
    same, foreign = tmp_path / "same", tmp_path / "foreign"
    for folder, coder in ((same, data.text.tokenizer), (foreign, other)):
        coder.save_pretrained(folder)
        save_model(network, folder)
    for folder, id in ((same, "token-level-kd"), (foreign, "token-level-kd"), (foreign, "universal-logit")):
        own = schema.resolve({**copy.deepcopy(TINY_TEXT), "method": {"id": id}, "teacher": str(folder)})
        networks = models.teacher_networks(own, data, Session(), {})
        method, task = models.make_method(own.method), models.task_of(own, data)
        make = lambda: models.make_teacher(own.teacher, method, networks, network, data, Session(), task)  # noqa: B023, E731
        if folder is foreign and id == "token-level-kd":
            with pytest.raises(UserError, match="teacher's tokenizer") as caught:
                make()
            assert "universal-logit" in caught.value.hint
        else:
            make()
        assert hasattr(networks["teacher"], "limbeck_text") == (folder is foreign)


def test_bad_input():
    """Data given as an object, a slow tokenizer, several foreign teachers."""
    recipe, data, own, task = opened(TINY)
    with pytest.raises(UserError, match="given as an object"):
        in_own_tokens(recipe.teacher.models["teacher"], recipe, data, data)
    with pytest.raises(UserError, match="where its tokens are"):
        Aligner(data.text, SimpleNamespace(tokenizer=SimpleNamespace(is_fast=False)))
    network = models.build(recipe.teacher.models["teacher"], own, 0, "teacher")
    network.limbeck_text = own.text
    with pytest.raises(UserError, match="2 teachers"):
        models.make_teacher(recipe.teacher, UniversalLogit(), {"a": network, "b": network}, network, data, Session(), task)
