"""The structure wing through the command line, as a user types it: the chain of `slim`, evaluate, export, compare, and bad input."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import yaml

from .conftest import TINY
from .test_cli_tools import say

CNN = {"model": "cnn", "args": {"width": 8, "depth": 3}, "train": {"steps": 60, "batch": 32, "lr": 0.01}}


def recipe(**changes):
    """Prune, then quantise, in seconds; blocks changed."""
    made = copy.deepcopy(TINY) | {
        "name": "tiny-slim",
        "teacher": CNN,
        "structure": {"budget": {"params": "50%"}},
        "stages": [
            {"name": "slim", "method": {"id": "gcp-sad"}},
            {"name": "quantise", "method": {"id": "quantized-distillation", "bits": 4, "bucket": 32}, "training": {"steps": 8}},
        ],
        "data": {"source": "digits", "train": 300},
        "training": {"steps": 12, "batch": 32, "lr": 0.01},
    }
    del made["student"], made["method"]
    return made | changes


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(**changes):
        Path("slim.yaml").write_text(yaml.safe_dump(recipe(**changes)))
        return "slim.yaml"

    return write


def test_prune_then_quantise_with_and_without_a_teacher(here, capsys):
    out, _ = say(capsys, "run", here(), "--out", "run")
    for row in ("teacher", "slim: untrained", "slim: without distillation", "slim: distilled", "quantise: distilled"):
        assert row in out
    summary = json.loads(Path("run/summary.json").read_text())
    cost, metrics = summary["cost"], summary["metrics"]
    assert summary["wing"] == "structure" and set(metrics) == set(cost)
    assert cost["slim"]["params"] <= 0.5 * cost["teacher"]["params"] and cost["slim"]["flops"] < cost["teacher"]["flops"]
    assert cost["student"]["params"] == cost["slim"]["params"] == cost["baseline"]["params"]
    assert cost["student"]["bytes"] < 0.4 * cost["slim"]["bytes"]
    assert summary["budget"]["used"]["params"] <= 1
    on_disk = Path("run/student/model.safetensors").stat().st_size
    assert cost["student"]["bytes"] <= on_disk < cost["student"]["bytes"] + 8000  # the header names every tensor
    page = Path("run/report.html").read_text()
    assert "Quality over cost" in page and "Budget" in page
    out, _ = say(capsys, "evaluate", "run")
    assert f"{100 * metrics['student']['accuracy']:.1f}" in out
    say(capsys, "export", "run", "--format", "onnx")
    say(capsys, "export", "run", "--format", "safetensors")
    say(capsys, "run", "slim.yaml", "--out", "taught", "--set", "stages=[]", "--set", "method=kd", "--set", "student=folder:run/student",
        "--set", "structure=null")  # fmt: skip


def test_methods_side_by_side(here, capsys):
    out, _ = say(capsys, "compare", here(stages=[], method={"id": "gcp-sad"}), "--methods", "gcp-sad,global-pruning", "--seeds", "2")
    assert "gcp-sad" in out and "global-pruning" in out


def test_what_is_wrong_is_said_in_one_line(here, capsys):
    file = here()
    wrong = {
        "structure.budget.params=20": "smallest reachable",
        "structure.budget.weight=3": "weight",
        "structure.budget.params=-5%": "budget.params",
        "structure.budget.flops=lots": "budget.flops",
        "teacher.model=mlp": "batch norm",
    }
    for number, (change, part) in enumerate(wrong.items()):
        extra = ("--set", "teacher.args={widths: [16]}") if "mlp" in change else ()
        _, err = say(capsys, "run", file, "--set", change, *extra, "--out", f"bad-{number}", code=2)
        assert part in err, err
        assert not Path(f"bad-{number}/student").exists()


@pytest.mark.parametrize(
    ("method", "changes", "part"),
    [
        ("ppcl", {}, "classification"),
        ("diswot", {"space": {}}, "search space is empty"),
        ("diswot", {"space": {"depth": [9]}}, "can be built"),
        ("hedge-mamba", {}, "classification"),
        ("slimmoe", {}, "classification"),
        ("quantized-distillation", {"layers": ["stages.0.1"]}, "stages.0.1"),
    ],
)
def test_a_method_that_cannot_says_why(here, capsys, method, changes, part):
    file = here(stages=[], method={"id": method, **changes}, structure={})
    _, err = say(capsys, "run", file, "--out", "bad", code=2)
    assert part in err, err


def test_a_student_that_nobody_named_is_refused(here, capsys):
    raw = recipe(stages=[], method={"id": "quantised", "bits": 4})
    del raw["structure"]
    Path("none.yaml").write_text(yaml.safe_dump(raw))
    _, err = say(capsys, "run", "none.yaml", "--out", "bad", code=2)
    assert "student=teacher" in err


def test_a_list_of_what_there_is(here, capsys):
    out, _ = say(capsys, "methods", "--wing", "structure", "--json")
    for id in ("gcp-sad", "quantized-distillation", "diswot", "ppcl", "slimmoe", "autodistil", "hedge-mamba", "topkld"):
        assert id in out
        say(capsys, "show", id)
