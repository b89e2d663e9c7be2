"""Comparisons and evidence are made of ordinary runs, and tuning never sees the test split."""

import json

import pytest
import yaml

import limbeck as library
from limbeck import trials
from limbeck.errors import UserError
from limbeck.evaluation import evidence


@pytest.fixture
def place(tmp_path, monkeypatch, tiny):
    """A folder of cases with one small case for kd."""
    folder = tmp_path / "evidence"
    folder.mkdir()
    recipe = {**tiny, "training": {**tiny["training"], "steps": 20}}
    case = {
        "id": "kd",
        "claim_tested": "a claim",
        "metric": "accuracy",
        "recipe": recipe,
        "method": {"name": "kd", "set": {"method": "kd"}},
        "baseline": {"name": "alone", "set": {"method": "alone"}},
        "tune": {"seeds": [100], "valid": 50, "method": {"training.lr": [0.001, 0.02]}, "baseline": {"training.lr": [0.001, 0.02]}},
        "seeds": [0, 1],
        "mechanism": ["ece"],
    }
    (folder / "kd.yaml").write_text(yaml.safe_dump(case))
    monkeypatch.setattr(trials, "case_folder", lambda: folder)
    monkeypatch.setattr(evidence, "folders", lambda: [folder])
    return folder, case


def test_evidence_is_what_single_runs_give(place, tmp_path):
    folder, case = place
    found = trials.make_evidence("kd", work=tmp_path / "work")
    saved = json.loads((folder / "kd.json").read_text())
    assert saved["seeds"] == [0, 1] and saved["difference"] == pytest.approx(found.difference)
    for side, values in (("kd", found.method_values), ("alone", found.baseline_values)):
        lr = found.tuned["method" if side == "kd" else "baseline"]["chosen"]["training.lr"]
        for seed, value in enumerate(values):
            out = tmp_path / f"{side}{seed}"
            single = library.run_recipe(case["recipe"], f"method={side}", f"training.lr={lr}", f"seed={seed}", "baseline=false", out=out)
            assert single.summary["metrics"]["student"]["accuracy"] == pytest.approx(value)
    assert found.difference == pytest.approx(sum(a - b for a, b in zip(found.method_values, found.baseline_values)) / 2)
    assert set(found.mechanism["ece"]) >= {"method", "baseline"}


def test_tuning_measures_the_validation_split(tiny, tmp_path):
    """With evaluation.final=valid the figures are those of the validation samples, which are not among the training ones."""
    import torch

    tiny["data"]["valid"] = 60
    result = library.run_recipe(tiny, "evaluation.final=valid", "baseline=false", out=tmp_path / "out")
    data = library.open_data("digits", train=300, labelled=60, valid=60)
    with torch.no_grad():
        right = (result.student(data.valid.inputs).argmax(1) == data.valid.labels).float().mean()
    assert result.summary["metrics"]["student"]["accuracy"] == pytest.approx(float(right))
    rows = {tuple(row.flatten().tolist()) for row in data.train.inputs}
    assert not rows & {tuple(row.flatten().tolist()) for row in data.valid.inputs[:20]}


def test_evidence_goes_stale_with_its_case(place, tmp_path):
    folder, case = place
    trials.make_evidence("kd", work=tmp_path / "work")
    assert trials.check_evidence(["kd"]) == {}
    case["seeds"] = [0, 1, 2]
    (folder / "kd.yaml").write_text(yaml.safe_dump(case))
    assert trials.check_evidence(["kd"])


def test_source_digest_ignores_words_and_sees_numbers(tmp_path):
    """Comments, docstrings, help and cards may improve; a default or a line of code may not change unseen."""
    first = (
        '"""A."""\nfrom x import setting, Card\n\nclass M:\n    """B."""\n    card = Card(id="m", claim="c")\n'
        '    t: float = setting(4.0, "help", above=0)\n'
    )
    paths = [tmp_path / f"{i}.py" for i in range(4)]
    paths[0].write_text(first)
    paths[1].write_text(
        first.replace('"""A."""', '"""Better."""').replace('"help"', '"more help"').replace('claim="c"', 'claim="d"') + "    # why\n"
    )
    paths[2].write_text(first.replace("4.0", "3.0"))
    paths[3].write_text(first + "    u = 1\n")
    digests = [evidence.source_digest(path) for path in paths]
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_unequal_tuning_is_refused(place, tmp_path):
    folder, case = place
    case["tune"]["method"] = {"training.lr": [0.001, 0.02, 0.1]}
    (folder / "kd.yaml").write_text(yaml.safe_dump(case))
    with pytest.raises(UserError, match="tries 3 settings"):
        trials.make_evidence("kd", work=tmp_path / "work")


def test_compare_continues_where_it_stopped(tiny, tmp_path, monkeypatch):
    """The second call finds finished runs and does not run them again."""
    first = trials.compare(tiny, ["alone", "kd"], 2, out=tmp_path / "c")
    import limbeck.run

    monkeypatch.setattr(limbeck.run, "execute", lambda *a, **k: pytest.fail("a finished run was repeated"))
    again = trials.compare(tiny, ["alone", "kd"], 2, out=tmp_path / "c")
    assert again.records() == first.records()
    line = next(line for line in first.table() if line["label"] == "kd")
    by_hand = [first.values("kd", "accuracy")[s] - first.values("alone", "accuracy")[s] for s in (0, 1)]
    assert line["difference"] == pytest.approx(sum(by_hand) / 2)


def test_arms():
    assert trials.parse_arm("kd@temperature=2;alpha=0.5") == ("kd", {"temperature": 2, "alpha": 0.5})
    with pytest.raises(UserError):
        trials.parse_arm("kd@temperature")
    with pytest.raises(UserError, match="twice"):
        trials.compare("digits", ["kd", "kd"], 1)


def test_label_noise_is_for_training_only():
    clean = library.open_data("digits")
    noisy = library.open_data("digits", label_noise={"share": 0.5, "classes": [1, 2]})
    import torch

    changed = clean.train.labels != noisy.train.labels
    assert set(clean.train.labels[changed].tolist()) == {1, 2} and set(noisy.train.labels[changed].tolist()) == {1, 2}
    among = torch.isin(clean.train.labels, torch.tensor([1, 2]))
    assert 0.12 < float(changed[among].float().mean()) < 0.4  # half are redrawn, half of those keep their label
    assert torch.equal(clean.test.labels, noisy.test.labels) and clean.fingerprint != noisy.fingerprint
    with pytest.raises(UserError):
        library.open_data("digits", label_noise={"share": 2})
