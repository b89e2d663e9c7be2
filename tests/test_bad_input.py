"""What a user can get wrong: exit code 2, one `error:` line, one `hint:` line, no traceback, nothing written or lost."""

import pytest
import torch
import yaml

from limbeck.cli import main


@pytest.fixture
def wrong(tmp_path, monkeypatch, capsys, tiny):
    """Run the tiny recipe with changes and expect a complaint that holds certain words; nothing may be left behind."""
    monkeypatch.chdir(tmp_path)

    def expect(*words, raw=None, text=None, recipe="r.yaml", sets=(), out="out", more=(), clean=True):
        if recipe == "r.yaml":
            (tmp_path / "r.yaml").write_text(text if text is not None else yaml.safe_dump({**tiny, **(raw or {})}))
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        arguments = ["run", recipe, "--out", out, "--quiet", *more]
        for change in sets:
            arguments += ["--set", change]
        code = main(arguments)
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        assert code == 2, captured.err
        assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("hint: "), captured.err
        for word in words:
            assert word in captured.err, captured.err
        for path, content in before.items():
            assert path.read_bytes() == content, f"{path} was touched"
        if clean:
            left = {p for p in tmp_path.rglob("*") if p.is_file() and "__pycache__" not in p.parts} - set(before)
            assert not left, f"left behind: {left}"
        return captured.err

    return expect


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["method=pdl"], ["unknown method 'pdl'", "'pld'"]),
        (["traning.steps=3"], ["unknown key 'traning'", "'training'"]),
        (["training.stepz=3"], ["training.stepz", "training.steps"]),
        (["method.temprature=2"], ["temprature", "temperature"]),
        (["method.temperature=-1"], ["temperature", "greater than 0"]),
        (["method.temperature=hot"], ["temperature", "hot"]),
        (["training.steps=many"], ["training.steps", "many"]),
        (["training.batch=0"], ["training.batch"]),
        (["training.lr=-0.1"], ["training.lr"]),
        (["training.accumulate=5"], ["accumulate"]),
        (["student.args.width=8"], ["width"]),
        (["student=resnett"], ["resnett", "resnet"]),
        (["student=python:nowhere.at:all"], ["nowhere"]),
        (["student.weights=gone.safetensors"], ["gone.safetensors"]),
        (["data=dijits"], ["dijits", "digits"]),
        (["data=csv:gone.csv"], ["gone.csv"]),
        (["data=hf:gone/folder/here"], ["gone/folder/here"]),
        (["data.train=100000"], ["100000"]),
        (["seed"], ["key=value"]),
        (["teacher=null"], ["teacher"]),
        (["device=tpu9"], ["tpu9"]),
        (["trackers=[nobody]"], ["nobody"]),
        (["student.args={classes: 7}"], ["10", "7"]),
        (["teacher={model: mlp, args: {classes: 12}}"], ["12", "10"]),
        (["teacher={model: mlp, args: {input_shape: [1, 16, 16]}}"], ["(1, 8, 8)"]),
        (["student={model: mlp, args: {input_shape: [3, 5, 5]}}"], ["(1, 8, 8)"]),
        (["evaluation.patience=2"], ["evaluation.patience", "data.valid"]),
        (["evaluation.every=1"], ["evaluation.every", "data.valid"]),
        (["precision=fp16"], ["fp16", "bf16"]),
        (["data.args={size: 3}"], ["data.size"]),
        (["teacher={kind: stored}"], ["teacher.store"]),
        (["teacher={kind: stored, store: nowhere}"], ["nowhere"]),
    ],
)
def test_settings(wrong, sets, words):
    wrong(*words, sets=sets)


def test_unknown_recipe(wrong):
    wrong("unknown recipe 'digitz'", "'digits'", recipe="digitz")
    wrong("there is no recipe file", recipe="no/such.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["empty"]),
        ("- a\n- b\n", ["list"]),
        ("data: {source: digits\nmethod: kd", ["line"]),
        ("method: !!python/object/apply:os.system ['true']", ["python", "plain data"]),
        ("method: kd\nmethod: pld\n", ["stands twice"]),
        ("\x00\x01", ["r.yaml"]),
        ("1: 2", ["key"]),
    ],
)
def test_broken_yaml(wrong, text, words):
    wrong(*words, text=text)


def test_tap_path_that_does_not_exist(wrong, tmp_path):
    """A method that asks for a module that is not there hears the nearest paths."""
    (tmp_path / "own_taps.py").write_text(
        "from dataclasses import dataclass\nfrom limbeck.method import Card\nfrom limbeck.knowledge.methods.kd import KD\n\n"
        "@dataclass\nclass Mine(KD):\n"
        "    card = Card(id='mine', title='t', year=2026, wing='knowledge', family='x', claim='c', equation='e')\n"
        "    student_wants = ('logits', 'at:stages.0.linaer')\n"
    )
    import sys

    sys.path.insert(0, str(tmp_path))
    try:
        wrong("stages.0", sets=["method=python:own_taps:Mine"])
    finally:
        sys.path.remove(str(tmp_path))


def test_nan_and_empty_data(wrong, tmp_path):
    header = "a,b,label\n"
    (tmp_path / "nan.csv").write_text(header + "".join(f"{i},{'nan' if i == 3 else i},{i % 2}\n" for i in range(40)))
    wrong("NaN", "sample 3", sets=["data={source: 'csv:nan.csv'}"])
    (tmp_path / "empty.csv").write_text(header)
    wrong("empty", sets=["data={source: 'csv:empty.csv'}"])


def test_folder_not_writable_or_not_empty(wrong, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    wrong("not empty", out="full")
    (tmp_path / "file").write_text("x")
    wrong("is a file", out="file")
    wrong("cannot be written", out="/proc/nowhere/run")
    wrong("no run to resume", out="new", more=["--resume"])


def test_resume_with_another_recipe_says_what_differs(wrong, tmp_path, tiny, capsys):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tiny))
    assert main(["run", "r.yaml", "--out", "out", "--quiet"]) == 0
    capsys.readouterr()
    wrong("training.lr was 0.01, is 0.02", more=["--resume"], sets=["training.lr=0.02"], clean=False)
    wrong("already holds a run", clean=False)


def test_every_checkpoint_torn(wrong, tmp_path, tiny, capsys):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tiny))
    assert main(["run", "r.yaml", "--out", "out", "--quiet"]) == 0
    capsys.readouterr()
    for file in (tmp_path / "out/checkpoints/student").glob("*/state.json"):
        file.write_text("{}")
    wrong("is whole", more=["--resume"], clean=False)


def test_pickle_instead_of_safetensors(wrong, tmp_path):
    torch.save({"head.bias": torch.zeros(10)}, tmp_path / "w.safetensors")
    wrong("pickle", sets=["student.weights=w.safetensors"])


def test_diverging_run_names_step_samples_and_checkpoint(wrong, tmp_path):
    error = wrong(
        "NaN",
        "at step",
        "samples",
        "checkpoint",
        sets=["training.lr=1e30", "training.optimizer=sgd", "training.warmup=0", "training.schedule=constant"],
        clean=False,
    )
    assert "student" in error or "baseline" in error


def test_a_torn_kept_teacher_is_trained_again_and_said(tmp_path, tiny, capsys, monkeypatch):
    """Somebody damages the kept teacher: it is not used, not guessed, and the run says so."""
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tiny))
    assert main(["run", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "one"), "--quiet"]) == 0
    kept = next((tmp_path / "cache/models").glob("*/model.safetensors"))
    kept.write_bytes(kept.read_bytes()[:-4] + b"\0\0\0\1")
    capsys.readouterr()
    assert main(["run", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "two"), "--quiet"]) == 0
    assert "trained again" in capsys.readouterr().out
    assert (tmp_path / "one/student/model.safetensors").read_bytes() == (tmp_path / "two/student/model.safetensors").read_bytes()
