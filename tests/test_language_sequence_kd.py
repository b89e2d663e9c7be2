"""Sequence-level distillation: what the teacher wrote is what is learned, kept, resumed, and asked of a server only once."""

import copy
import json

import numpy as np
import pytest
import torch
import yaml

from limbeck import recipe as schema
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.knowledge import asking, models
from limbeck.knowledge.asking import Written, with_written, write
from limbeck.knowledge.methods.sequence_kd import SequenceKD
from limbeck.knowledge.teachers import FrozenTeacher, Teacher
from tests.conftest import TINY_TEXT
from tests.test_endpoint import fake  # noqa: F401

TINY = {**TINY_TEXT, "method": {"id": "sequence-kd"}, "data": {"source": "stdlib-explain", "train": 24, "test": 8}}


@pytest.fixture(scope="module")
def parts():
    """Recipe, data, task and an untrained teacher."""
    recipe = schema.resolve(copy.deepcopy(TINY))
    data = models.open_recipe_data(recipe.data, None, recipe)
    torch.manual_seed(0)
    network = models.build(recipe.teacher.models["teacher"], data, 0, "teacher")
    return recipe, data, models.task_of(recipe, data), network


def rows(split):
    return [split.columns["completion"][row].tolist() for row in split.rows.tolist()]


def test_greedy_texts_are_the_argmax_of_the_teacher(parts):
    """Token by token, without a cache, without padding: the same texts as the batched writer."""
    _, data, _, network = parts
    written = write(network, data.train, Session(), 0, tokens=6, batch=5)
    text = data.text
    for row in (0, 7, 23):
        ids, mask = data.train.prompts(torch.tensor([row]))
        ids = ids[:, mask[0].bool()]
        said = []
        for _ in range(6):
            logits = network.eval()(torch.cat([ids, torch.tensor([said], dtype=torch.int64)], 1)).logits[0, -1, : text.vocabulary]
            said.append(int(logits.argmax()))
            if said[-1] == text.eos:
                break
        assert written[row].text == text.tokenizer.decode(said, skip_special_tokens=True)
        assert written[row].whole == (said[-1] == text.eos)


def test_drawn_texts_depend_on_the_seed_alone_and_a_resumed_run_goes_on(parts, tmp_path, monkeypatch):
    """Stopped in the middle, with a torn line: the same texts, and only what is missing is written."""
    _, data, _, network = parts
    calls = []
    real = asking.generate
    monkeypatch.setattr(asking, "generate", lambda *a, **k: calls.append(1) or real(*a, **k))
    options = {"tokens": 5, "temperature": 1.0, "batch": 5, "binding": "x"}
    whole = write(network, data.train, Session(), 3, **options)
    torch.manual_seed(99)
    assert write(network, data.train, Session(folder=tmp_path), 3, **options) == whole
    assert write(network, data.train, Session(), 4, **options) != whole
    file = next((tmp_path / "written").glob("*.jsonl"))
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:12]) + lines[12][:9])
    calls.clear()
    assert write(network, data.train, Session(folder=tmp_path), 3, **options) == whole and len(calls) == 3
    calls.clear()
    assert write(network, data.train, Session(folder=tmp_path), 3, **options) == whole and not calls
    assert write(network, data.train, Session(folder=tmp_path), 3, **{**options, "binding": "y"}) == whole and calls


def test_a_text_that_was_broken_off_has_no_end(parts):
    """The end token is learned only where the teacher wrote it."""
    _, data, _, _ = parts
    split = data.train.subset(torch.arange(2))
    made = with_written(split, [Written("one two", True), Written("one two", False)])
    ids = data.text.tokenizer("one two", add_special_tokens=False)["input_ids"]
    assert rows(made) == [[*ids, data.text.eos], ids]
    labels = made.batch(torch.tensor([1])).labels[0]
    assert labels[labels >= 0].tolist() == ids
    assert np.array_equal(made.columns["prompt"][0], split.columns["prompt"][int(split.rows[0])])


def test_mix_and_empty_answers(parts):
    """Both: every prompt with its reference too; empty answers are left out, or an error; notes say how many."""
    _, data, _, _ = parts
    split = data.train.subset(torch.arange(3))
    said = [Written("a b"), Written("  "), Written("c", False)]
    session = Session()
    made = SequenceKD()._train(split, said, session)
    prompts = split.prompt_texts(torch.arange(3))
    assert made.prompt_texts(torch.arange(2)) == [prompts[0], prompts[2]] and made.references(torch.arange(2)) == ["a b", "c"]
    assert any("1 of 3 prompts are left out" in note for note in session.notes) and any("1 of 2 answers" in note for note in session.notes)
    both = SequenceKD(mix="both")._train(split, said, session)
    assert both.references(torch.arange(len(both))) == ["a b", "c", *split.references(torch.arange(3))]
    assert both.prompt_texts(torch.arange(len(both))) == [prompts[0], prompts[2], *prompts]
    with pytest.raises(UserError, match="1 of 3 answers of the teacher are empty"):
        SequenceKD(drop_empty=False)._train(split, said, session)
    with pytest.raises(UserError, match="every answer of the teacher is empty"):
        SequenceKD()._train(split, [Written("")] * 3, session)


def test_the_loss_is_the_cross_entropy_of_the_written_text(parts):
    """Against log-softmax of the student's own logits; the fingerprint and the digest follow the texts."""
    recipe, data, task, network = parts
    session, method = Session(), SequenceKD(tokens=4, temperature=1.0)
    made = method.prepare(data, FrozenTeacher(network, (), read=task.reader), session, 0)
    assert made.fingerprint != data.fingerprint and made.fingerprint in session.digest and made.test is data.test
    method.bind(task)
    batch = made.train.batch(torch.arange(6))
    student = models.build(recipe.student, data, 1, "student").eval()
    value = method.loss(batch, task.reader(student, ("law",))(batch), None, None)["ce"]
    logs = student(**batch.inputs).logits[:, :-1, : data.text.vocabulary].float().log_softmax(-1)
    target = batch.labels[:, 1:]
    picked = logs.gather(-1, target.clamp_min(0).unsqueeze(-1))[..., 0][target >= 0]
    assert torch.allclose(value, -picked.mean(), atol=1e-5)


def test_teachers_and_data_that_cannot_do(parts):
    """Windows have no prompts; several teachers or none write nothing."""
    _, data, _, network = parts
    with pytest.raises(UserError, match="one teacher that writes texts"):
        SequenceKD().prepare(data, Teacher(), Session(), 0)
    raw = schema.resolve({**copy.deepcopy(TINY), "data": {"source": "stdlib-text", "train": 8, "test": 4}})
    windows = models.open_recipe_data(raw.data, None, raw)
    with pytest.raises(UserError, match="plain texts"):
        SequenceKD().prepare(windows, FrozenTeacher(network, ()), Session(), 0)


def test_a_run_with_a_server_asks_each_prompt_once(fake, limbeck, tmp_path):  # noqa: F811
    """`limbeck run` with an endpoint: the student's texts are the server's; a second run sends nothing; a limit of cost stops it before."""
    fake.rule = lambda prompt, times: {"choice": {"message": {"role": "assistant", "content": "it adds two numbers"}}}
    recipe = {**copy.deepcopy(TINY), "baseline": False, "training": {"steps": 6, "batch": 8, "lr": 0.01}}
    recipe["data"] = {"source": "stdlib-explain", "train": 12, "test": 8}
    price = {"price_input": 1.0, "price_output": 2.0}
    block = {"base_url": fake.address, "model": "tiny", "log": str(tmp_path / "log.jsonl"), "max_tokens": 20, **price}
    recipe["teacher"] = {"endpoint": {**block, "limit_cost": 1e-9}}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    refused = limbeck("run", file, "--out", tmp_path / "no")
    assert refused.returncode != 0 and "limit_cost" in refused.stderr + refused.stdout and not fake.asked
    recipe["teacher"] = {"endpoint": {**block, "limit_cost": 1.0}}
    file.write_text(yaml.safe_dump(recipe))
    first = limbeck("run", file, "--out", tmp_path / "one")
    assert first.returncode == 0, first.stderr
    data = models.open_recipe_data(schema.resolve(recipe).data, None, schema.resolve(recipe))
    assert sorted(fake.asked) == sorted(data.train.prompt_texts(torch.arange(12)))
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert any("12 questions to ask" in note and "in money" in note for note in summary["warnings"]), summary.get("warnings")
    log = [json.loads(line) for line in (tmp_path / "one" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log if r["phase"] == "ask"][-1] == 12
    again = limbeck("run", file, "--out", tmp_path / "two")
    assert again.returncode == 0 and len(fake.asked) == 12
    one, two = ((tmp_path / name / "student" / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_token_level_methods_name_the_ones_that_a_server_is_enough_for(parts):
    """A method that wants distributions says so."""
    recipe, data, task, _ = parts
    spec = schema.resolve({**copy.deepcopy(TINY), "teacher": {"endpoint": {"base_url": "http://localhost:1/v1", "model": "m"}}}).teacher
    method = models.make_method(replace_method(recipe, "token-level-kd"))
    with pytest.raises(UserError, match="more than a teacher's texts") as caught:
        models.make_teacher(spec, method, {}, None, data, Session(), task)
    assert "sequence-kd" in caught.value.hint


def replace_method(recipe, id):
    return recipe.method.model_copy(update={"id": id, "settings": {}})
