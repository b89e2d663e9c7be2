"""Language through the command line, as a user types it: run, resume, cache, compare, evaluate, export, inspect, plan, lists."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from limbeck.cli import main
from limbeck.storage import load_tensors

from .conftest import TINY_PAIRS, TINY_TEXT
from .test_cli_tools import say

SMALL = {"layers": 1, "width": 16, "heads": 2}
FEW = {"packages": ["asyncio", "email", "http", "importlib", "logging", "multiprocessing", "urllib", "xml"]}
"""Packages of the standard library: enough for the tests, and read in a second."""


def recipe(base=TINY_TEXT, **changes):
    """A copy of a tiny recipe, quicker still, with blocks changed."""
    made = copy.deepcopy(base) | {"baseline": False}
    made["data"]["args"] = FEW
    made["teacher"]["train"]["steps"] = 6
    made["training"]["steps"] = 6
    for key, value in changes.items():
        made[key] = {**made[key], **value} if isinstance(made.get(key), dict) and isinstance(value, dict) else value
    return made


def both(model):
    """Teacher and student of one architecture."""
    teacher = {"model": model, "args": {**SMALL, "width": 32}, "train": {"steps": 6, "batch": 8, "lr": 0.01}}
    return {"teacher": teacher, "student": {"model": model, "args": SMALL}}


RECIPES = {
    "pairs": recipe(),
    "windows": recipe(data={"source": "stdlib-text"}),
    "seq2seq": recipe(**both("t5"), data={"source": "tables-in-words", "args": {}}),
    "classes": recipe(
        **both("bert"), method={"id": "kd"}, data={"source": "stdlib-windows", "args": {"packages": ["email", "http", "json"]}}
    ),
    "vectors": recipe(TINY_PAIRS),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working folder with the recipes, a cache folder of its own, and one finished run of each in runs/."""
    folder = tmp_path_factory.mktemp("language")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        patch.setattr("limbeck.report.page.write_report", lambda path, report: None)
        for name, content in RECIPES.items():
            Path(f"{name}.yaml").write_text(yaml.safe_dump(content))
            assert main(["run", f"{name}.yaml", "--out", f"runs/{name}", "--quiet"]) == 0
        yield folder


def weights(folder):
    return load_tensors(Path(folder) / "student" / "model.safetensors")


def equal(one, other):
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- run ----


def test_texts_that_lose_tokens_are_told_in_one_line(home, capsys):
    out, _ = say(capsys, "run", "pairs.yaml", "--set", "text.length=24", "--set", "training.steps=1", "--out", "runs/cut", "--quiet")
    (line,) = [line for line in out.splitlines() if line.startswith("note:")]
    assert "training texts lost tokens" in line and "text.length 24" in line
    rows = [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(40)]
    Path("short.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = ("data={source: jsonl:short.jsonl, train: 20, test: 4}", "text.tokenizer=bpe:270", "training.steps=1")
    short = [word for change in changes for word in ("--set", change)]
    out, _ = say(capsys, "run", "pairs.yaml", *short, "--out", "runs/uncut", "--quiet")
    assert "lost tokens" not in out


def test_no_figure_of_the_table_is_cut_off(home, capsys):
    for name in ("pairs", "vectors"):
        changes = ["--set", "text.write=2", "--set", "training.steps=1", "--out", f"runs/t-{name}"]
        out, _ = say(capsys, "run", f"{name}.yaml", *changes, "--quiet")
        assert "…" not in out


@pytest.mark.parametrize("name", ["pairs", "seq2seq"])
def test_a_resumed_run_has_equal_bits(home, capsys, monkeypatch, name):
    from limbeck.knowledge.program import KnowledgeProgram

    whole, calls = KnowledgeProgram.losses, []

    def stop(self, *arguments):
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return whole(self, *arguments)

    monkeypatch.setattr(KnowledgeProgram, "losses", stop)
    every = ["--set", "checkpoints.every_steps=2"]
    say(capsys, "run", f"{name}.yaml", *every, "--out", f"runs/again-{name}", "--quiet", code=130)
    assert not Path(f"runs/again-{name}/student").exists()
    monkeypatch.setattr(KnowledgeProgram, "losses", whole)
    say(capsys, "run", f"{name}.yaml", *every, "--out", f"runs/again-{name}", "--resume", "--quiet")
    assert equal(f"runs/{name}", f"runs/again-{name}")


def test_compare(home, capsys):
    out, _ = say(capsys, "compare", "pairs.yaml", "--methods", "alone,token-level-kd,taid", "--seeds", "2", "--out", "cmp")
    assert all(word in out for word in ("alone", "token-level-kd", "taid"))
    table = json.loads(say(capsys, "compare", "pairs.yaml", "--methods", "alone,taid", "--seeds", "2", "--out", "cmp", "--json")[0])
    assert "nll" in json.dumps(table)


# ---- cache ----


@pytest.mark.parametrize("name", ["pairs", "seq2seq"])
def test_a_student_of_the_float32_store_is_near_the_live_teachers(home, capsys, name):
    out, err = say(capsys, "cache", f"{name}.yaml", "--out", f"stores/{name}", "--form", "float32")
    assert "tokens, 1280 bytes a token" in out and "1280 bytes each" in err
    say(capsys, "run", f"{name}.yaml", "--set", f"teacher.store=stores/{name}", "--out", f"runs/full-{name}", "--quiet")
    live, stored = weights(f"runs/{name}"), weights(f"runs/full-{name}")
    assert all(torch.allclose(live[part], stored[part], atol=2e-4) for part in live)


def test_top_k_of_a_killed_cache(home, capsys, monkeypatch):
    from limbeck.signals.store import StoreWriter

    whole, size = StoreWriter.write, ["--form", "topk", "--k", "16"]
    monkeypatch.setattr("limbeck.knowledge.caching.SHARDS", 10**9)

    def stop(self, index, signals):
        if int(index[0]) > 700:
            raise KeyboardInterrupt
        whole(self, index, signals)

    monkeypatch.setattr(StoreWriter, "write", stop)
    _, err = say(capsys, "cache", "pairs.yaml", "--out", "stores/cut", *size, code=130)
    assert "go on with: limbeck cache pairs.yaml --out stores/cut --form topk --top-k 16" in err
    run = ["run", "pairs.yaml", "--out", "runs/cut-store", "--quiet", "--set"]
    assert "rows" in say(capsys, *run, "teacher.store=stores/cut", code=2)[1]
    monkeypatch.setattr(StoreWriter, "write", whole)
    out, _ = say(capsys, "cache", "pairs.yaml", "--out", "stores/cut", *size, "--quiet")
    assert "tokens, 68 bytes a token" in out  # 16 * (2 + 2) and the rest
    say(capsys, "cache", "pairs.yaml", "--out", "stores/whole", *size, "--quiet")
    for file in sorted(Path("stores/whole").glob("*.*")):
        assert (Path("stores/cut") / file.name).read_bytes() == file.read_bytes()
    say(capsys, "run", "pairs.yaml", "--set", "teacher.store=stores/cut", "--out", "runs/top", "--quiet")
    live, stored = (json.loads(Path(f"runs/{run}/summary.json").read_text())["metrics"]["student"]["nll"] for run in ("pairs", "top"))
    assert live != stored and abs(live - stored) < 0.3


def test_a_store_belongs_to_its_teacher_texts_and_tokens(home, capsys):
    say(capsys, "cache", "pairs.yaml", "--out", "stores/own", "--form", "topk", "--k", "4", "--quiet")
    run = ["run", "pairs.yaml", "--set", "teacher.store=stores/own", "--out", "runs/refused", "--quiet", "--set"]
    assert "teacher" in say(capsys, *run, "teacher.models.teacher.train.steps=2", code=2)[1]
    for change in ("data.train=48", "text.tokenizer=bpe:300", "text.length=40"):
        assert "stores/own" in say(capsys, *run, change, code=2)[1], change
    assert not Path("runs/refused/student").exists()
    assert say(capsys, "cache", "pairs.yaml", "--out", "stores/own", "--form", "topk", "--k", "4")[0].startswith("already complete")


def test_what_cannot_be_stored_is_said(home, capsys):
    assert "next-token" in say(capsys, "cache", "pairs.yaml", "--out", "stores/x", "--signals", "hidden", code=2)[1]
    assert "embedding" in say(capsys, "cache", "vectors.yaml", "--out", "stores/y", code=2)[1]


# ---- evaluate, export ----


@pytest.mark.parametrize("name", RECIPES)
def test_evaluate_finds_the_recorded_figures_again(home, capsys, name):
    found = json.loads(say(capsys, "evaluate", f"runs/{name}", "--json")[0])
    summary = json.loads(Path(f"runs/{name}/summary.json").read_text())
    recorded = summary["metrics"]["student"]
    assert found["metrics"] and all(recorded[key] == pytest.approx(value, abs=1e-6) for key, value in found["metrics"].items())
    assert found["same_data"] and found["cost"]["params"] == summary["cost"]["student"]["params"]


def test_a_student_alone_reads_other_texts_with_its_own_tokens(home, capsys, tmp_path):
    moved = shutil.copytree("runs/pairs/student", tmp_path / "moved")
    assert "--data" in say(capsys, "evaluate", str(moved), code=2)[1]
    lines = [{"text": "def f(x):\n    return x + 1\n" * 4} for _ in range(40)]
    Path("own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = json.loads(say(capsys, "evaluate", str(moved), "--data", "jsonl:own.jsonl", "--json")[0])
    assert found["metrics"]["nll"] > 0 and found["recorded"] is None
    assert "at most 48" in say(capsys, "evaluate", str(moved), "--data", "jsonl:own.jsonl", "--set", "text.length=64", code=2)[1]


@pytest.mark.parametrize("name", ["pairs", "seq2seq", "classes", "vectors"])
def test_export_as_transformers_folder_opens_alone(home, capsys, name):
    import transformers

    found = json.loads(say(capsys, "export", f"runs/{name}", "--format", "hf", "--out", f"shipped/{name}", "--json")[0])
    assert found["max_abs_difference"] < 1e-6 and found["samples"] == 16
    kinds = {"pairs": "CausalLM", "seq2seq": "Seq2SeqLM", "classes": "SequenceClassification", "vectors": ""}
    opened = getattr(transformers, "AutoModelFor" + kinds[name] if kinds[name] else "AutoModel").from_pretrained(f"shipped/{name}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"shipped/{name}")
    assert len(tokenizer) == 320
    inputs = tokenizer(["def f(x): return x"], return_tensors="pt")
    more = {"decoder_input_ids": inputs["input_ids"][:, :2]} if name == "seq2seq" else {}
    assert opened(input_ids=inputs["input_ids"], **more)[0].isfinite().all()


@pytest.mark.parametrize("name", ["pairs", "seq2seq", "classes", "vectors"])
def test_export_as_safetensors(home, capsys, name):
    found = json.loads(say(capsys, "export", f"runs/{name}", "--format", "safetensors", "--out", f"plain/{name}", "--json")[0])
    assert found["max_abs_difference"] == 0 and Path(f"plain/{name}/tokenizer.json").is_file()


def test_onnx_has_a_free_length_and_two_networks_are_refused(home, capsys):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    import limbeck

    found = json.loads(say(capsys, "export", "runs/pairs", "--format", "onnx", "--json")[0])
    session = onnxruntime.InferenceSession(found["path"])
    ids = torch.randint(10, 300, (3, 11))
    (said,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})
    with torch.no_grad():
        expected = limbeck.load_student("runs/pairs")(ids).logits
    torch.testing.assert_close(torch.from_numpy(said), expected, rtol=1e-4, atol=1e-5)
    assert "same class" not in say(capsys, "export", "runs/pairs", "--format", "onnx", "--out", "p.onnx")[0]
    assert "--format hf or safetensors" in say(capsys, "export", "runs/seq2seq", "--format", "onnx", code=2)[1]


# ---- inspect, plan, lists ----


def test_inspect(home, capsys):
    found = json.loads(say(capsys, "inspect", "seq2seq.yaml", "--json")[0])
    assert {(pair["signal"], pair["bridge"]) for pair in found["pairs"]["teacher"]} >= {("stages", True)}
    assert json.loads(say(capsys, "inspect", "vectors.yaml", "--json")[0])["models"][0]["stages"][0]["path"].startswith("hidden_states")
    for words in (["runs/seq2seq"], ["llama", "gpt2"], ["t5"], ["llama", "--data", "stdlib-explain"]):
        assert "lm_head" in say(capsys, "inspect", *words)[0]


@pytest.mark.parametrize("name", RECIPES)
def test_plan(home, capsys, name):
    found = json.loads(say(capsys, "plan", f"{name}.yaml", "--json")[0])
    summary = json.loads(Path(f"runs/{name}/summary.json").read_text())
    assert found["models"]["student"]["params"] == summary["cost"]["student"]["params"]
    assert found["models"]["student"]["flops"] == summary["cost"]["student"]["flops"] > 0
    assert found["phases"][0]["kept"] and 0 < found["example"]["tokens"] <= 48
    store = found["store"]
    if name == "vectors":
        assert store == {}
    elif name == "classes":
        assert store["row"] == "sample" and store["rows"] == 64
    else:
        assert store["row"] == "token" and store["row_bytes"] == {"float16": 640, "topk": 64 * 4 + 4} and store["k"] == 64
        assert store["topk"] > store["rows"] * 260
    say(capsys, "plan", f"{name}.yaml")


def test_plan_tells_what_cache_writes(home, capsys):
    plan = json.loads(say(capsys, "plan", "pairs.yaml", "--json")[0])["store"]
    out, _ = say(capsys, "cache", "pairs.yaml", "--out", "stores/planned", "--form", "topk", "--k", "64", "--quiet")
    assert f"{plan['rows']} tokens, {plan['row_bytes']['topk']} bytes a token" in out
    on_disk = sum(file.stat().st_size for file in Path("stores/planned").glob("*.safetensors"))
    assert plan["rows"] * plan["row_bytes"]["topk"] <= on_disk <= plan["topk"]


def test_lists_name_language(home, capsys):
    out = say(capsys, "data")[0]
    assert all(word in out for word in ("stdlib-explain", "stdlib-retrieval", "tables-in-words", "jsonl:"))
    assert "sentence-encoder" in say(capsys, "recipes")[0] and "stdlib-text" in say(capsys, "recipes", "lm")[0]
    rows = json.loads(say(capsys, "methods", "language", "--json")[0])
    assert {"token-level-kd", "taid", "distillspec"} <= {row["id"] for row in rows}
