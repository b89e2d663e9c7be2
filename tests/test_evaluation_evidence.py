"""Evidence files: what they follow from, and how a change is noticed."""

import json

import pytest

from limbeck.errors import UserError
from limbeck.evaluation import evidence


@pytest.fixture
def made(tmp_path):
    source = tmp_path / "kd.py"
    source.write_text("temperature = 4\n")
    return evidence.build(
        "kd",
        metric="accuracy",
        baseline_name="supervised",
        seeds=[0, 1, 2],
        method_values=[0.90, 0.91, 0.93],
        baseline_values=[0.80, 0.80, 0.81],
        claim_tested="A student learns more from soft targets.",
        case={"data": "digits", "steps": 100},
        source=source,
    )


def test_build_save_load_check(made, tmp_path):
    path = tmp_path / "kd.json"
    evidence.save(made, path)
    loaded = evidence.load(path)
    assert loaded == made and loaded.status == "reproduced"
    digest = evidence.source_digest(tmp_path / "kd.py")
    assert evidence.check(loaded, method_source_sha256=digest, case_sha256=evidence.case_digest({"steps": 100, "data": "digits"})) == []
    brief = evidence.brief(loaded)
    assert {"status", "metric", "baseline", "method", "difference", "interval", "seeds", "baseline_name"} <= set(brief)
    json.dumps(brief, allow_nan=False)
    assert evidence.brief(None) is None


def test_changed_source_and_case_are_stale(made, tmp_path):
    (tmp_path / "kd.py").write_text("temperature = 5\n")
    problems = evidence.check(made, method_source_sha256=evidence.source_digest(tmp_path / "kd.py"), case_sha256="0")
    assert len(problems) == 2 and all("stale" in p for p in problems)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"case": {"data": "digits", "steps": 200}}, "case"),
        ({"difference": 0.3}, "difference"),
        ({"method": 0.99}, "method"),
        ({"interval": (0.09, 0.2)}, "interval"),
        ({"status": "not reproduced at this scale"}, "status"),
        ({"seeds": [0, 1]}, "seeds"),
        ({"seeds": [0, 1, 1]}, "twice"),
        ({"machine": {"folder": "/home/someone/x"}}, "private"),
    ],
)
def test_altered_files_are_noticed(made, change, word):
    problems = evidence.check(made.model_copy(update=change))
    assert problems and any(word in p for p in problems)


@pytest.mark.parametrize("text", ["{", "[]", '{"id": "kd"}', '{"difference": NaN}'])
def test_malformed_files_are_user_errors(tmp_path, text):
    (tmp_path / "kd.json").write_text(text)
    with pytest.raises(UserError) as caught:
        evidence.load(tmp_path / "kd.json")
    assert "limbeck evidence kd" in caught.value.hint


def test_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no evidence file"):
        evidence.load(tmp_path / "nd.json")


def test_find_looks_in_the_package_first(made, tmp_path, monkeypatch):
    first, second = tmp_path / "_evidence", tmp_path / "evidence"
    monkeypatch.setattr(evidence, "folders", lambda: [first, second])
    evidence.save(made.model_copy(update={"claim_tested": "second"}), second / "knowledge" / "kd.json")
    assert evidence.find("kd").claim_tested == "second"
    monkeypatch.setattr(evidence, "folders", lambda: [p for p in (first, second) if p.exists()])
    evidence.save(made, first / "knowledge" / "kd.json")
    assert evidence.find("kd") == made
    assert evidence.find("no-such-method") is None
