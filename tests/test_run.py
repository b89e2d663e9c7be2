"""The main job as a user types it, from recipe to report."""

import json
import re

import pytest
import torch

import limbeck as library
from limbeck.engine.callbacks import read_log


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One finished run of the tiny recipe, through the command line."""
    import subprocess
    import sys

    import yaml

    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "ceiling": True}))
    command = [sys.executable, "-m", "limbeck", "run", "tiny.yaml", "--out", "out", "--set", "seed=1"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120)
    assert process.returncode == 0, process.stderr
    return folder / "out", process


def test_folder_holds_what_the_design_promises(done):
    folder, _ = done
    for name in (
        "recipe.yaml",
        "log.jsonl",
        "summary.json",
        "report.html",
        "checkpoints/student",
        "student/model.safetensors",
        "student/config.json",
        "student/README.md",
    ):
        assert (folder / name).exists(), name


def test_summary(done):
    summary = json.loads((done[0] / "summary.json").read_text())
    assert summary["method"] == "kd" and summary["wing"] == "knowledge" and summary["seed"] == 1
    for role in ("teacher", "baseline", "student", "ceiling"):
        assert 0 <= summary["metrics"][role]["accuracy"] <= 1 and "ece" in summary["metrics"][role]
    for role in ("teacher", "student"):
        assert {"params", "flops", "latency_ms", "bytes"} <= set(summary["cost"][role])
    assert summary["cost"]["student"]["params"] == 64 * 8 + 8 + 8 * 10 + 10
    assert summary["data"]["labelled"] == 60
    assert summary["seconds"] > 0 and summary["versions"]["torch"] == torch.__version__


def test_summary_is_true(done):
    """The figures are those of the saved student on the test split, computed here by hand."""
    folder, _ = done
    summary = json.loads((folder / "summary.json").read_text())
    student = library.load_student(folder)
    data = library.open_data("digits", train=300, labelled=60)
    with torch.no_grad():
        right = (student(data.test.inputs).argmax(1) == data.test.labels).float().mean()
    assert summary["metrics"]["student"]["accuracy"] == pytest.approx(float(right))


def test_table_and_report(done):
    folder, process = done
    for word in ("teacher", "alone", "distilled", "ceiling", "report.html"):
        assert word in process.stdout
    page = (folder / "report.html").read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"']?https?:", page)
    assert ("Content-Security-Policy" in page and "<svg" in page) or "data:image" in page


def test_log_has_terms_with_norms_and_shares(done):
    records = [r for r in read_log(done[0] / "log.jsonl") if r["phase"] == "student" and "terms" in r]
    watched = [part for r in records for part in r["terms"].values() if "share" in part]
    assert watched and all(part["norm"] >= 0 and 0 <= part["share"] <= 1 for part in watched)
    one = next(r for r in records if all("share" in p for p in r["terms"].values()))
    assert sum(part["share"] for part in one["terms"].values()) == pytest.approx(1)


def test_the_resolved_recipe_repeats_the_run(done, limbeck):
    folder, _ = done
    process = limbeck("run", folder / "recipe.yaml", "--out", folder.parent / "again")
    assert process.returncode == 0, process.stderr
    assert (folder / "student/model.safetensors").read_bytes() == (folder.parent / "again/student/model.safetensors").read_bytes()


def test_resume_of_a_finished_run_changes_nothing(done, limbeck):
    folder, _ = done
    before = (folder / "student/model.safetensors").read_bytes()
    process = limbeck("run", folder / "recipe.yaml", "--out", folder, "--resume")
    assert process.returncode == 0, process.stderr
    assert (folder / "student/model.safetensors").read_bytes() == before


def test_stages_hand_the_student_on(tiny, tmp_path):
    """Two stages: the second begins with the weights with which the first ended."""
    from limbeck.engine import checkpoint

    tiny["stages"] = [
        {"name": "first", "training": {"steps": 10}},
        {"name": "second", "method": "alone", "training": {"steps": 1, "lr": 1e-12}},
    ]
    result = library.run_recipe(tiny, out=tmp_path / "out")
    state, _, _ = checkpoint.latest(tmp_path / "out/checkpoints/first")
    for name, value in result.student.state_dict().items():
        torch.testing.assert_close(value, state["modules"]["student"][name], atol=1e-6, rtol=0)
    assert result.summary["phases"]["baseline"]["steps"] == 11


def test_ema_evaluation_and_early_stop(tiny, tmp_path):
    """The moving average is what is kept; patience ends a run that no longer improves."""
    tiny["training"] |= {"ema": 0.9, "steps": 300, "lr": 1e-9}
    tiny["data"]["valid"] = 60
    tiny["evaluation"] = {"every": 1, "patience": 2}
    result = library.run_recipe(tiny, "baseline=false", out=tmp_path / "out")
    phase = result.summary["phases"]["student"]
    assert phase["stopped_early"] and phase["steps"] < 300
    assert any("metrics" in r for r in read_log(tmp_path / "out/log.jsonl"))


def test_methods_json(limbeck):
    process = limbeck("methods", "--json")
    rows = {row["id"]: row for row in json.loads(process.stdout)}
    assert {"kd", "pld", "nd", "ofa", "ps-kd", "bd-kd", "meal-v2", "tgeo-kd", "dho", "b-mtard", "sinkd"} <= set(rows)
    for row in rows.values():
        assert {"id", "wing", "family", "paper", "year", "evidence"} <= set(row)
        if row["evidence"] is not None:
            assert {"status", "metric", "baseline", "method", "difference", "interval", "seeds"} <= set(row["evidence"])


@pytest.mark.parametrize(
    "words", [["recipes"], ["recipes", "digits"], ["data"], ["methods", "ranking"], ["show", "kd"], ["--version"], ["run", "--help"]]
)
def test_small_commands(limbeck, words):
    process = limbeck(*words)
    assert process.returncode == 0 and process.stdout.strip(), process.stderr


def test_help_imports_no_torch():
    import subprocess
    import sys

    code = "import sys; from limbeck.cli import main; main(['--help']); assert not {'torch', 'transformers'} & set(sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_compare(tiny_file, tmp_path, limbeck):
    """Methods side by side; the same command again repeats no finished run."""
    words = ["compare", tiny_file, "--methods", "alone,kd,kd@temperature=1;alpha=1.0", "--seeds", 2, "--out", tmp_path / "c"]
    process = limbeck(*words)
    assert process.returncode == 0, process.stderr
    found = json.loads((tmp_path / "c/comparison.json").read_text())
    assert len(found["rows"]) == 6
    for name in ("comparison.csv", "comparison.md", "comparison.parquet", "report.html"):
        assert (tmp_path / "c" / name).is_file()
    again = limbeck(*words)
    assert again.returncode == 0 and json.loads((tmp_path / "c/comparison.json").read_text())["rows"] == found["rows"]
