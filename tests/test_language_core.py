"""The language task and what stands on it: reading, parts of a batch, stored teachers, schedules, exits."""

import copy
import math

import pytest
import torch

from limbeck import recipe as schema
from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.knowledge import models
from limbeck.knowledge.methods.ddk import next_shares
from limbeck.knowledge.methods.ernie_tiny import attention_scores, masked_mse
from limbeck.knowledge.methods.modular_star_encoder import MultiExit
from limbeck.knowledge.methods.taid import TAID, next_progress
from limbeck.knowledge.on_policy import written_batch
from limbeck.knowledge.program import KnowledgeProgram
from limbeck.knowledge.teachers import FrozenTeacher, StoredLanguageTeacher
from limbeck.losses import vocabulary
from limbeck.method import make
from limbeck.signals.language import LanguageReader, settle, targets
from limbeck.signals.store import Store, StoreWriter
from limbeck.zoo import Tokens, build
from limbeck.zoo.sentence import SentenceEncoder
from tests.conftest import TINY_TEXT

TOKENS = Tokens(vocabulary=50, length=32, kind="causal-lm", pad=0, bos=1, eos=2)


def batch(seed=0, padded=True):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (3, 9), generator=draw)
    labels = ids.clone()
    labels[:, :3] = -100
    mask = torch.ones_like(ids)
    if padded:
        ids[1, 6:], labels[1, 6:], mask[1, 6:] = 0, -100, 0
    return Batch({"input_ids": ids, "attention_mask": mask}, labels, torch.arange(3))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_law_is_what_the_model_says(name):
    """Rows of the law are the model's own logits in front of every scored token, in the order of the batch; gradients agree too."""
    torch.manual_seed(0)
    model = build(name, tokens=TOKENS, width=16, heads=2).eval()
    some = batch()
    said = LanguageReader(model, ("law", "hidden"), kind="causal-lm", vocabulary=50)(some)
    full = model(**some.inputs).logits
    rows, expected = [], []
    for b in range(3):
        for place in range(1, 9):
            if some.labels[b, place] != -100:
                rows.append(full[b, place - 1])
                expected.append(some.labels[b, place])
    assert torch.allclose(said.law.logits(), torch.stack(rows), atol=1e-6)
    assert torch.equal(targets(some.labels, "causal-lm"), torch.stack(expected))
    assert said.hidden.shape == (3, 9, 16)
    loss = torch.nn.functional.cross_entropy(torch.stack(rows), torch.stack(expected))
    own = vocabulary.cross_entropy(said.law, targets(some.labels, "causal-lm"))
    assert torch.allclose(own, loss)
    theirs = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], retain_graph=True)
    for mine, other in zip(torch.autograd.grad(own, [p for p in model.parameters() if p.requires_grad]), theirs):
        assert torch.allclose(mine, other, atol=1e-6)


def test_a_sequence_to_sequence_law():
    """T5 scales its decoder's output when embeddings are tied; the law includes that."""
    torch.manual_seed(0)
    model = build("t5", tokens=Tokens(50, 32, "seq2seq", 0, 1, 2), width=16, heads=2).eval()
    some = batch()
    said = LanguageReader(model, ("law",), kind="seq2seq", vocabulary=50)(some)
    full = model(**some.inputs, labels=some.labels).logits
    assert torch.allclose(said.law.logits(), full[some.labels != -100], atol=1e-5)


def test_a_copy_of_a_read_model_carries_no_hook():
    model = build("llama", tokens=TOKENS, width=16, heads=2)
    LanguageReader(model, ("law",), kind="causal-lm", vocabulary=50)(batch())
    assert copy.deepcopy(model)(**batch().inputs).logits.shape == (3, 9, 50)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_model_that_does_more_behind_its_matrix_is_read_by_its_logits():
    """A head that nobody announced: the law would be wrong, so whole logits are taken, and the user is told."""

    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build("llama", tokens=TOKENS, width=16, heads=2)

        def get_output_embeddings(self):
            return self.inner.get_output_embeddings()

        def forward(self, **inputs):
            return {"logits": self.inner(**inputs).logits * 3 + 1.0 * torch.arange(50)}

    model, some = Odd(), batch()
    assert "whole logits" in settle(model, some, "causal-lm", 50, "student")
    said = LanguageReader(model, ("law",), kind="causal-lm", vocabulary=50)(some)
    assert torch.allclose(said.law.logits(), model(**some.inputs)["logits"][:, :-1][some.labels[:, 1:] != -100])
    assert settle(build("llama", tokens=TOKENS, width=16, heads=2), some, "causal-lm", 50, "student") is None


def test_padded_columns_are_cut_and_narrow_models_refused():
    model = build("llama", tokens=TOKENS, width=16, heads=2)
    said = LanguageReader(model, ("law",), kind="causal-lm", vocabulary=45)(batch())
    assert said.law.width == 45 and said.law.logits().shape[1] == 45
    with pytest.raises(UserError, match="50 outputs, the tokenizer 60"):
        LanguageReader(model, ("law",), kind="causal-lm", vocabulary=60)


# ---- the program ----


def program(method="token-level-kd", **changes):
    recipe = schema.resolve({**copy.deepcopy(TINY_TEXT), "method": method, **changes})
    data = models.open_recipe_data(recipe.data, None, recipe)
    task = models.task_of(recipe, data)
    session = Session()
    networks = models.teacher_networks(recipe, data, session, {})
    student = models.make_student(recipe, data, session, {})
    made = make(recipe.method.id, recipe.method.settings)
    teacher = models.make_teacher(recipe.teacher, made, networks, student, data, session, task)
    return KnowledgeProgram(made, student, teacher, data, task, recipe.training, seed=0)


@pytest.mark.parametrize("method", ["alone", "kd", "token-level-kd", "taid"])
def test_cutting_a_batch_changes_neither_value_nor_gradient(method):
    """Samples have different numbers of tokens; a part weighs as much as it has tokens."""
    whole = program(method)
    whole.train()
    some = next(iter(whole.batches(0, 0)))
    clock = Clock(0, whole.steps_per_epoch, whole.total)
    terms = whole.losses("student", some, clock)
    sum(terms.values()).backward()
    expected = [p.grad.clone() for p in whole.student.parameters()]
    whole.student.zero_grad()
    counts = {int((part.labels[:, 1:] != -100).sum()) for part in whole.parts(some, 4)}
    assert len(counts) > 1, "the parts must differ for this test to mean anything"
    total = 0.0
    for part in whole.parts(some, 4):
        value = sum(whole.losses("student", part, clock).values()) / 4
        value.backward()
        total += float(value.detach())
    assert total == pytest.approx(float(sum(terms.values()).detach()), rel=1e-5)
    for p, other in zip(whole.student.parameters(), expected):
        assert torch.allclose(p.grad, other, atol=1e-6)


def test_a_stored_teacher_says_what_the_live_one_says(tmp_path):
    """With k = V the stored law is the live one up to half precision; with a small k the kept tokens are, and the rest keeps its mass."""
    live = program()
    data, task = live.data, live.task
    width = task.text.vocabulary
    for k in (width, 8):
        counts = [int(task.mask(data.train.batch(torch.tensor([i])).labels).sum()) for i in range(len(data.train))]
        folder = tmp_path / str(k)
        writer = StoreWriter(
            folder, teacher_fingerprint="t", data_fingerprint="d", samples=sum(counts), signals={"logits": (width,)}, form="topk", k=k
        )
        laws = [live.teacher(data.train.batch(torch.tensor([i]))).law.logits().log_softmax(-1) for i in range(len(data.train))]
        writer.write(torch.arange(sum(counts)), {"logits": torch.cat(laws)})
        writer.finish()
        stored = StoredLanguageTeacher(Store(folder), data.train, task)
        some = data.train.batch(torch.tensor([5, 1, 40]))
        law, own = stored(some).law, live.teacher(some).law.logits().log_softmax(-1)
        assert len(law) == len(own) and law.width == width
        assert torch.allclose(own.gather(1, law.ids), law.logs, atol=5e-3)
        tail = 1 - law.logs.exp().sum(1)
        assert torch.allclose(tail, 1 - own.gather(1, law.ids).exp().sum(1), atol=1e-3)
    with pytest.raises(UserError, match="tokens"):
        StoredLanguageTeacher(Store(tmp_path / "8"), data.test, task)


def test_a_method_of_another_task_is_named():
    with pytest.raises(UserError, match="pld is for classification, and this is a causal-lm task"):
        program("pld")


def test_measuring_agrees_with_the_models_own_loss():
    made = program("alone")
    split = made.data.test
    found = made.task.measure(made.student, split, 4, torch.device("cpu")).metrics
    made.student.eval()
    total, count = 0.0, 0
    for i in range(len(split)):
        some = split.batch(torch.tensor([i]))
        scored = int((some.labels[:, 1:] != -100).sum())
        total += float(made.student(**some.inputs, labels=some.labels).loss) * scored
        count += scored
    assert found["nll"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / int(split.bytes.sum()), rel=1e-4)


def test_comparing_with_oneself():
    made = program()
    twin = FrozenTeacher(copy.deepcopy(made.student), read=made.task.reader)
    near = made.task.compare(made.student, twin, made.data.test, 8, made.device)
    assert near["kl"] == pytest.approx(0, abs=1e-6)
    assert near["acceptance"] == pytest.approx(1, abs=1e-5) and near["agreement"] == pytest.approx(1)


# ---- methods ----


def test_the_schedule_of_taid_by_hand():
    """The first loss is only recorded; then t moves by the momentum of the relative change, never below the line, never above the end."""
    settings = TAID(t_start=0.2, t_end=0.9, rate=0.3, momentum=0.5)
    state = {"t": torch.tensor(0.2), "m": torch.tensor(0.0), "before": torch.tensor(math.inf)}
    losses, t, m, before = [4.0, 3.0, 3.5, 1.0, 0.9], 0.2, 0.0, None
    for step, value in enumerate(losses, 1):
        state = next_progress(state, torch.tensor(value), step / 5, settings)
        if before is not None:
            m = 0.5 * m + 0.5 * (before - value) / before
            t = min(0.9, max(0.2 + 0.7 * step / 5, t + 0.3 / (1 + math.exp(-m)) * (1 - t)))
        before = value
        assert float(state["t"]) == pytest.approx(t, abs=1e-6)
    assert float(state["t"]) == pytest.approx(0.9)
    line = next_progress({**state, "t": torch.tensor(0.0)}, torch.tensor(0.5), 0.5, TAID(t_start=0.2, t_end=0.9, adaptive=False))
    assert float(line["t"]) == pytest.approx(0.55)


def test_shares_of_domains():
    """Against the equations written out; the floor holds; the lagging domain gains."""
    shares, ratio = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([1.0, 2.0, 1.5], dtype=torch.float64)
    psi = shares * ratio.exp()
    assert torch.allclose(next_shares(shares, ratio, 0.5), 0.5 * psi / psi.sum() + 0.5 / 3)
    extreme = next_shares(shares, torch.tensor([1.0, 900.0, 1.0], dtype=torch.float64), 0.5)
    assert torch.isfinite(extreme).all() and float(extreme.sum()) == pytest.approx(1) and float(extreme.min()) >= 0.5 / 3 - 1e-12
    assert float(next_shares(shares, ratio, 0.5)[1]) > 0.3


def test_attention_scores_forget_nothing_but_the_constant():
    """From the maps of known scores: equal up to the mean of each row over its keys; padded keys and queries are zero."""
    torch.manual_seed(0)
    scores, mask = torch.randn(2, 1, 5, 5), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    hidden = scores.masked_fill(mask[:, None, None, :] == 0, -1e30)
    found = attention_scores(hidden.softmax(-1), mask)
    for b, keys in ((0, 5), (1, 3)):
        own = scores[b, 0, :keys, :keys]
        assert torch.allclose(found[b, :keys, :keys], own - own.mean(-1, keepdim=True), atol=1e-5)
    assert (found[1, 3:] == 0).all() and (found[1, :, 3:] == 0).all()
    x, y = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    by_hand = (((x - y) ** 2)[0].sum() + ((x - y) ** 2)[1, :3].sum()) / (8 * 4)
    assert torch.allclose(masked_mse(x, y, mask.bool()), by_hand)


def test_written_text_becomes_a_batch():
    """Left padding goes, what follows an end goes; scored is what was written, its end included."""
    prompts, mask = torch.tensor([[0, 0, 5], [6, 7, 8]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
    ids, kept = torch.tensor([[9, 2, 0], [9, 10, 11]]), torch.tensor([[True, True, False], [True, True, True]])
    made = written_batch(prompts, mask, ids, kept, Batch({}, None, torch.arange(2)), pad=0)
    assert made.inputs["input_ids"].tolist() == [[5, 9, 2, 0, 0, 0], [6, 7, 8, 9, 10, 11]]
    assert made.inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert made.labels.tolist() == [[-100, 9, 2, -100, -100, -100], [-100, -100, -100, 9, 10, 11]]


def test_an_exit_alone_says_what_it_said_inside():
    """The kept exit is the same function with only the layers below it."""
    torch.manual_seed(0)
    tokens = Tokens(50, 16, "embedding", 0, 1, 2)
    whole = build("bert", tokens=tokens, layers=3, width=16, heads=2)
    assert isinstance(whole, SentenceEncoder)
    several = MultiExit(whole.encoder, (1, 3), "mean", 24).eval()
    ids, mask = torch.randint(3, 50, (4, 7)), torch.ones(4, 7, dtype=torch.long)
    mask[2, 4:] = 0
    with torch.no_grad():
        said = several(ids, mask)
        for place, layers in ((0, 1), (1, 3)):
            alone = several.cut(place).eval()
            assert alone.config.num_hidden_layers == layers
            assert torch.allclose(alone(ids, mask), said[place], atol=1e-6)
            assert torch.allclose(said[place].norm(dim=-1), torch.ones(4), atol=1e-5)
    assert sum(p.numel() for p in several.cut(0).encoder.parameters()) < sum(p.numel() for p in whole.encoder.parameters())
    assert len(whole.encoder.encoder.layer) == 3, "the cut must not shorten the whole"
