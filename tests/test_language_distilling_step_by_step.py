"""Distilling step-by-step: two tasks told apart by a prefix, rationales from the data or from a server, a student measured on the first."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
import yaml

from limbeck import recipe as schema
from limbeck.engine.clock import Clock
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.knowledge import models
from limbeck.knowledge.distiller import Models
from limbeck.knowledge.methods.distilling_step_by_step import DistillingStepByStep
from limbeck.knowledge.prefixes import check_prefixes, prefixed
from limbeck.knowledge.program import KnowledgeProgram
from limbeck.knowledge.teachers import Teacher
from tests.conftest import TINY_TEXT
from tests.test_endpoint import fake  # noqa: F401

TINY = {
    **{key: value for key, value in TINY_TEXT.items() if key != "teacher"},
    "method": {"id": "distilling-step-by-step"},
    "student": {"model": "t5", "args": {"layers": 1, "width": 16, "heads": 2}},
    "data": {"source": "tables-in-words", "args": {"table": "iris", "explain": "tree"}, "train": 30, "test": 9},
    "text": {"tokenizer": "bpe:320", "length": 64, "write": 6, "write_tokens": 6},
    "training": {"steps": 6, "batch": 8, "lr": 0.01},
}
CAUSAL = {
    **TINY,
    "student": {"model": "llama", "args": {"layers": 1, "width": 16, "heads": 2}},
    "text": {"tokenizer": "bpe:320", "length": 96, "task": "causal-lm"},
}


def ready(raw, seed=0, **settings):
    """(method after prepare, prepared data, data as opened, task, untrained student)."""
    recipe = schema.resolve(copy.deepcopy(raw))
    data = models.open_recipe_data(recipe.data, None, recipe)
    task = models.task_of(recipe, data)
    method = DistillingStepByStep(**settings)
    method.task = task
    session = Session()
    made = method.prepare(data, Teacher(), session, seed)
    student = models.build(recipe.student, data, 0, "student").eval()
    KnowledgeProgram(method, student, Teacher(), made, task, recipe.training)
    return method, made, data, task, student, session


def loss_of(student, task, text, prompt, target, causal):
    """Sum of -log p and number of tokens of one pair, from the network's own logits."""
    coder = text.tokenizer
    ids = [*coder(target, add_special_tokens=False)["input_ids"], text.eos]
    source = coder(prompt, add_special_tokens=not causal)["input_ids"]
    if causal:
        logits = student(input_ids=torch.tensor([source + ids])).logits[0, len(source) - 1 : -1, : text.vocabulary]
    else:
        logits = student(input_ids=torch.tensor([source]), labels=torch.tensor([ids])).logits[0, :, : text.vocabulary]
    return F.cross_entropy(logits.float(), torch.tensor(ids), reduction="sum"), len(ids)


@pytest.mark.parametrize("raw", [TINY, CAUSAL], ids=["seq2seq", "causal"])
def test_the_loss_is_both_cross_entropies_each_over_its_own_tokens(raw):
    """Against single forward passes of each prompt; the gradient reaches the student through both terms."""
    method, made, data, task, student, _ = ready(raw, alpha=0.3)
    index = torch.tensor([2, 0, 11])
    batch = made.train.batch(index)
    read = task.reader(student, ("law",))
    student.train()
    terms = method.step(batch, Models(lambda b: read(b), Teacher(), student), Clock(0, 1, 1))
    prompts, labels = data.train.prompt_texts(index), data.train.references(index)
    reasons = [data.train.rationales[row] for row in index.tolist()]
    causal = raw is CAUSAL
    for name, share, front, targets in (("predict", 0.3, "predict: ", labels), ("explain", 0.7, "explain: ", reasons)):
        pairs = [loss_of(student, task, data.text, front + p, t, causal) for p, t in zip(prompts, targets)]
        want = share * sum(v for v, _ in pairs) / sum(n for _, n in pairs)
        assert torch.allclose(terms[name], want, atol=1e-4), name
        grads = torch.autograd.grad(terms[name], [p for p in student.parameters()], retain_graph=True)
        assert max(float(g.abs().max()) for g in grads) > 0


def test_samples_without_a_label_are_explained_and_never_predicted():
    """Of 30 rows 6 have a label: the prediction sees no other completion, whatever the batch; the explanation sees all."""
    method, made, data, *_ = ready(TINY, labelled=6)
    known = method._known_rows.tolist()
    assert len(made.train) == 30 and len(known) == 6
    classes = torch.bincount(data.train.classes[torch.tensor(known)], minlength=3)
    assert classes.tolist() == [2, 2, 2]
    seen, wanted = set(), {tuple(data.train.prompt_texts(torch.tensor([row]))) for row in known}
    for _ in range(8):
        batch = made.train.batch(torch.randperm(30)[:8])
        used = method._labelled(batch, batch.index, torch.device("cpu"))
        assert len(used) == 8
        own = batch.index[method._is_known[batch.index]]
        assert set(own.tolist()) <= set(used.index.tolist())
        seen |= set(used.index.tolist())
    assert seen <= set(known) and len(wanted) == 6
    assert len(method._explain) == 30
    other, alone, *_ = ready(TINY, labelled=6, alpha=1.0)
    assert len(alone.train) == 6 and other._explain is None
    assert sorted(alone.train.prompt_texts(torch.arange(6))) == sorted("predict: " + p for (p,) in wanted)
    assert made.fingerprint != alone.fingerprint


def test_teacher_answers_as_labels():
    """label: teacher trains on the forest's answers, for every row."""
    _, made, data, *_ = ready(TINY, label="teacher", alpha=1.0)
    assert made.train.references(torch.arange(30)) == data.train.teacher_answers


def test_prefixes():
    """In front of every prompt, kept when prompts are cut; two that a tokenizer cannot tell apart are refused."""
    _, made, data, *_ = ready(TINY)
    rows = torch.arange(9)
    assert made.test.prompt_texts(rows) == ["predict: " + p for p in data.test.prompt_texts(rows)]
    assert made.test.references(rows) == data.test.references(rows)
    assert torch.equal(made.test.classes, data.test.classes) and made.train.rationales == data.train.rationales
    text = {"tokenizer": "bpe:320", "length": 40, "task": "causal-lm", "prompt_length": 30}
    short = schema.resolve({**copy.deepcopy(CAUSAL), "text": text})
    cut = models.open_recipe_data(short.data, None, short)
    front = cut.text.tokenizer("predict: ", add_special_tokens=False)["input_ids"]
    made = prefixed(cut.train, "predict: ")
    ids, mask = made.prompts(torch.arange(30))
    for whole, (row, on) in enumerate(zip(ids, mask.bool())):
        kept = row[on].tolist()
        own = cut.train.columns["prompt"][int(cut.train.rows[whole])].tolist()
        assert len(kept) <= 30 and kept[: len(front) - 1] == front[:-1]  # its last space may join the word that follows
        assert kept[-12:] == own[-12:]
    words = schema.resolve({**copy.deepcopy(TINY), "text": {"tokenizer": "words:64", "length": 64}})
    with pytest.raises(UserError, match="same tokens"):
        check_prefixes(models.open_recipe_data(words.data, None, words).train, ("predict: ", "explain: "))


def test_bad_input():
    """No rationales, plain windows, more labels than there are: one clear line each."""
    plain = {**TINY, "data": {"source": "tables-in-words", "args": {"table": "iris"}, "train": 30, "test": 9}}
    with pytest.raises(UserError, match="needs rationales") as caught:
        ready(plain)
    assert "explain=tree" in caught.value.hint
    with pytest.raises(UserError, match="labelled is 31"):
        ready(TINY, labelled=31)
    with pytest.raises(UserError, match="plain texts"):
        ready({**CAUSAL, "data": {"source": "stdlib-text", "train": 8, "test": 4}})
    method = DistillingStepByStep()
    with pytest.raises(UserError, match="prepare"):
        method.setup(None)


def test_a_run_with_a_server(fake, limbeck, tmp_path):  # noqa: F811
    """Few-shot prompts go out, answers are split, malformed ones teach nothing, and the student is measured with its prefix."""
    recipe = copy.deepcopy(TINY)
    recipe["data"] = {"source": "tables-in-words", "args": {"table": "iris"}, "train": 12, "test": 9}
    examples = [["petal-length 1", "the petal is short", "setosa"]]
    recipe["method"] = {"id": "distilling-step-by-step", "examples": examples}
    recipe["teacher"] = {"endpoint": {"base_url": fake.address, "model": "tiny", "log": str(tmp_path / "log.jsonl")}}
    said = ["the petal is long. So the answer is Virginica.", "it is a flower", "So the answer is setosa."]

    def rule(prompt, times):
        return {"choice": {"message": {"role": "assistant", "content": said[0] if len(prompt) % 3 else said[1 + len(prompt) % 2]}}}

    fake.rule = rule
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    done = limbeck("run", file, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert len(fake.asked) == 12
    front = "Q: petal-length 1\nA: the petal is short So the answer is setosa.\n\nQ: sepal"
    assert all(p.startswith(front) and p.endswith("\nA:") for p in fake.asked)
    bad = sum(len(p) % 3 == 0 for p in fake.asked)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert not bad or any(f"{bad} of 12 answers are not well formed" in note for note in summary["warnings"])
    assert any(f"12 samples with a label, {12 - bad} with a rationale" in note for note in summary["warnings"])
    fake.rule = lambda prompt, times: {"choice": {"message": {"role": "assistant", "content": "no idea"}}}
    recipe["teacher"]["endpoint"]["log"] = str(tmp_path / "other.jsonl")
    file.write_text(yaml.safe_dump(recipe))
    failed = limbeck("run", file, "--out", tmp_path / "failed")
    assert failed.returncode != 0 and "no answer of tiny is a reason" in failed.stderr + failed.stdout


def test_the_student_is_measured_with_its_prefix_and_the_baseline_without():
    """The figures of a whole job are those of the student on prefixed prompts, and of the baseline on the data as they are."""
    from limbeck.knowledge import job

    recipe = schema.resolve(copy.deepcopy(TINY))
    data = models.open_recipe_data(recipe.data, None, recipe)
    task = models.task_of(recipe, data)
    outcome = job.run(recipe, Session(evaluation=recipe.evaluation, checkpoints=recipe.checkpoints), {})
    student = outcome.artifacts["student"].network
    own = DistillingStepByStep().for_measuring(data)
    cpu = torch.device("cpu")
    metrics = outcome.summary["metrics"]
    assert metrics["student"]["nll"] == pytest.approx(task.measure(student, own.test, 512, cpu).metrics["nll"])
    assert metrics["student"]["nll"] != pytest.approx(task.measure(student, data.test, 512, cpu).metrics["nll"])
    assert "exact_match" in metrics["student"]
