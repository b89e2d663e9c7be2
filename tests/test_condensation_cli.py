"""The condensation wing as a user types it: a run, its folder, kill and resume, judging again, and mistakes."""

import json
import signal
import subprocess
import sys
import time

import pytest
import yaml

import limbeck
from limbeck.errors import UserError

RECIPE = {
    "name": "tiny",
    "method": {"id": "distribution-matching", "iterations": 20, "batch_real": 8},
    "student": {"model": "convnet", "args": {"width": 4, "depth": 2}},
    "data": {"source": "digits", "train": 300, "valid": 60},
    "condense": {
        "per_class": 1,
        "students": {"steps": 20},
        "lrs": [0.02, 0.1],
        "seeds": 2,
        "networks": ["mlp"],
        "baselines": ["random-real", "k-means"],
        "whole": True,
        "whole_training": {"epochs": 2, "batch": 64},
        "scores": True,
        "budgets": [1, 2],
    },
    "threads": 1,
    "device": "cpu",
    "trackers": [],
}


@pytest.fixture
def file(tmp_path):
    """The recipe as a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def test_a_run_and_what_it_leaves(limbeck, file, tmp_path):
    done = limbeck("run", file, "--out", tmp_path / "run", "--quiet")
    assert done.returncode == 0, done.stderr
    words = ("the whole set", "random-real", "k-means", "synthetic set", "made by distribution-matching", "On mlp, which took no part")
    for word in (*words, "dataset:"):
        assert word in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    metrics = summary["metrics"]
    assert set(metrics) == {"student", "baseline", "k-means", "teacher"} and summary["wing"] == "condensation"
    assert metrics["student"]["samples"] == 10 and metrics["student"]["bytes"] == 10 * 64 + 10 + 8
    assert {"label_robust_score", "augmentation_robust_score", "hard_label_recovery", "accuracy of mlp"} <= set(metrics["student"])
    assert summary["cost"]["teacher"]["bytes"] == 300 * 65 and len(summary["budgets"]["random-real"]) == 2
    page = (tmp_path / "run" / "report.html").read_text()
    for part in ("The synthetic samples", "Accuracy over the budget", "Across architectures", "Storage", "DD-Ranking", "The objective"):
        assert part in page
    assert "<script" not in page
    card = (tmp_path / "run" / "dataset" / "README.md").read_text()
    assert "distribution-matching" in card and "soft labels" in card


def test_it_opens_and_is_judged_again(limbeck, file, tmp_path):
    assert limbeck("run", file, "--out", tmp_path / "run", "--quiet").returncode == 0
    from limbeck.condensation.judging import load_dataset

    made = load_dataset(tmp_path / "run")
    assert len(made) == 10 and made.pixels().shape == (10, 1, 8, 8) and len(made.torch_dataset()) == 10
    again = limbeck("evaluate", tmp_path / "run", "--json")
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout)
    for name, score in found["scores"].items():
        assert score["mean"] == pytest.approx(found["recorded"][name], abs=1e-9)
    other = limbeck("evaluate", tmp_path / "run", "--set", "condense.networks=[linear]")
    assert other.returncode == 0 and "linear" in other.stdout
    network = limbeck("export", tmp_path / "run", "--format", "onnx")
    assert network.returncode == 2 and "synthetic set, not a network" in network.stderr
    model = limbeck("evaluate", tmp_path / "run", "--data", "wine")
    assert model.returncode == 2 and "synthetic set" in model.stderr


def test_killed_and_resumed_it_is_the_same_set(limbeck, file, tmp_path):
    """Killed at random moments of making and judging, the finished run has the same bits."""
    whole = tmp_path / "whole"
    more = ["--set", "method.iterations=150", "--set", "checkpoints.every_steps=5"]
    assert limbeck("run", file, "--out", whole, "--quiet", *more).returncode == 0
    cut = tmp_path / "cut"
    words = [sys.executable, "-m", "limbeck", "run", str(file), "--out", str(cut), "--quiet", *more]
    for seconds in (4.0, 5.5):
        process = subprocess.Popen([*words, *(["--resume"] if (cut / "recipe.yaml").exists() else [])], stdout=subprocess.DEVNULL)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    resume = ["--resume"] if (cut / "recipe.yaml").exists() else []
    assert limbeck("run", file, "--out", cut, "--quiet", *more, *resume).returncode == 0
    names = ("set.safetensors",)
    for name in names:
        assert (whole / "dataset" / name).read_bytes() == (cut / "dataset" / name).read_bytes()
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (whole, cut))
    assert first["metrics"] == second["metrics"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["condense.per_class=100"], "training samples, fewer than the 100"),
        (["training.lr=0.1"], "training.lr has no meaning for a condensation"),
        (["training.batch=8"], "training.batch has no meaning"),
        (["method=trajectory-matching", "student.args.norm=batch"], "normalises over the batch"),
        (["method=gradient-matching", "student=cnn"], "normalises over the batch"),
        (["method=sre2l"], "needs trained networks"),
        (["method={id: sre2l, iterations: 2}", "teacher=convnet"], "no BatchNorm layer"),
        (["method=kd"], "condense has no meaning for kd"),
        (["condense.baselines=[distribution-matching]"], "is no selection of real samples"),
        (["condense.baselines=[random]"], "unknown method 'random'"),
        (["condense.siamese=crop_rotat"], "unknown augmentation 'rotat'"),
        (["condense.per_clas=3"], "per_clas"),
        (["data.valid=null"], "no validation split to choose on"),
        (["condense.whole=false"], "condense.scores needs"),
        (["method={id: ncfm, factor: 3}"], "cannot be made of 3 x 3 parts"),
        (["method={id: ncfm, factr: 2}"], "unknown setting of ncfm 'factr'"),
        (["method.iterations=0"], "iterations is 0"),
        (["precision=bf16"], "not for condensation"),
        (["data={source: iris, valid: 0.2}", "student=mlp", "condense.networks=[]", "method=fyi"], "mirrors pictures"),
        (["data=wine", "method=mirage", "student=mlp"], "condenses graphs"),
    ],
)
def test_mistakes_are_one_line_and_lose_nothing(file, tmp_path, changes, message):
    """Message and hint are one line each, and the folder is as it was."""
    with pytest.raises(UserError) as caught:
        limbeck.run_recipe(str(file), *changes, out=tmp_path / "run")
    assert message in str(caught.value.message) and caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint
    assert not (tmp_path / "run" / "recipe.yaml").exists() or (tmp_path / "run" / "checkpoints").exists()


def test_a_mistake_as_it_is_shown(limbeck, file, tmp_path):
    done = limbeck("run", file, "--out", tmp_path / "run", "--set", "condense.per_class=100")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert done.stderr.startswith("error: the class") and "hint: set condense.per_class to at most" in done.stderr


def test_a_table_can_be_condensed(limbeck, file, tmp_path):
    done = limbeck("run", file, "--out", tmp_path / "run", "--quiet", "--set", "data={source: wine, valid: 0.2}", "--set", "student=mlp",
                   "--set", "condense.networks=[]", "--set", "condense.scores=false", "--set", "condense.budgets=[]")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no images" in (tmp_path / "run" / "report.html").read_text()


def test_methods_of_the_wing_are_listed(limbeck):
    rows = json.loads(limbeck("methods", "--wing", "condensation", "--json").stdout)
    ids = {row["id"] for row in rows}
    wanted = "gradient-matching distribution-matching trajectory-matching ftd datm ast-smooth-expert datadam ncfm"
    assert {*wanted.split(), "cda", "cv-dd", "fyi", "krr-st", "infer", "mirage", "sre2l"} <= ids
    assert "trajectory-matching" in limbeck("show", "ftd").stdout
    assert "tiny-digits" in limbeck("recipes").stdout


def test_compared_by_the_same_runs(file, tmp_path):
    found = limbeck.compare(
        str(file), ["random-real", "k-means"], 2, changes=["condense.whole=false", "condense.scores=false"], out=tmp_path / "c"
    )
    assert found.methods == ["random-real", "k-means"] and len(found.rows) == 4


def test_from_python(tmp_path):
    result = limbeck.run_recipe({**RECIPE, "condense": {"per_class": 1, "students": {"steps": 3}, "seeds": 1}}, out=tmp_path / "run")
    assert len(result.dataset) == 10
    with pytest.raises(UserError, match="made no student"):
        _ = result.student
