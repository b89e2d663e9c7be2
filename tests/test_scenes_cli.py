"""The wing as a user types it: a conversion from the command line, resume, evaluation, and what bad input is told."""

import json

import pytest

import limbeck as package
from limbeck import zoo
from limbeck.errors import UserError

TINY = [
    "teacher.args={levels: 2, table: 64, coarsest: 3, finest: 6, width: 8, head: 8}",
    "teacher.train.steps=20",
    "teacher.train.batch=16",
    "student.args={width: 8, depth: 2, frequencies: 2, head: 8}",
    "training.steps=8",
    "training.batch=8",
    "data.train=3",
    "data.test=2",
    "data.size=12",
    "scene.points=6",
    "scene.curve=2",
]
SET = [word for change in TINY for word in ("--set", change)]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """One tiny conversion, run as a user does."""
    import os
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("runs") / "run"
    words = [sys.executable, "-m", "limbeck", "run", "scene-convert", *SET, "--out", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return folder, done


def test_a_conversion_tells_what_came_out(converted):
    folder, done = converted
    assert "PSNR" in done.stdout and "by from-images" in done.stdout and "teacher" in done.stdout
    assert "The field converted by pvd reaches" in done.stdout and "as many seconds" in done.stdout
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["wing"] == "scenes" and summary["primary"] == "psnr"
    assert set(summary["metrics"]) == {"teacher", "baseline", "student"}
    assert summary["cost"]["student"]["params"] < summary["cost"]["teacher"]["params"] * 10
    assert [point["step"] for point in summary["curve"]["student"]] == [4, 8]
    page = (folder / "report.html").read_text()
    assert "Held-out views" in page and "PSNR over time" in page and "data:image/png" in page
    for name in ("model.safetensors", "config.json", "scene.json", "views.png", "README.md"):
        assert (folder / "scene" / name).stat().st_size > 0
    assert "load_scene" in (folder / "scene" / "README.md").read_text()


def test_evaluate_gives_the_recorded_figures(converted, limbeck):
    folder, _ = converted
    done = limbeck("evaluate", folder, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kind"] == "field"
    assert found["figures"]["psnr"] == pytest.approx(found["recorded"]["psnr"], abs=1e-5)
    from limbeck.scenes.again import measure_again

    other = measure_again(folder, ["data.source=scene:letter"])["figures"]
    assert other["psnr"] != found["figures"]["psnr"]
    with pytest.raises(UserError, match="changes nothing here"):
        measure_again(folder, ["training.lr=1"])
    with pytest.raises(UserError, match="holds no scene"):
        measure_again(folder.parent)


def test_resume_of_a_finished_run_changes_nothing(converted):
    folder, _ = converted
    before = (folder / "scene" / "model.safetensors").read_bytes()
    metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    package.run_recipe("scene-convert", *TINY, out=folder, resume=True)
    assert (folder / "scene" / "model.safetensors").read_bytes() == before
    assert json.loads((folder / "summary.json").read_text())["metrics"] == metrics


def test_a_saved_field_is_a_teacher_and_opens_in_python(converted, tmp_path):
    folder, _ = converted
    opened, note = package.load_scene(folder)
    assert note["facts"]["bound"] == 1.0 and type(opened).__name__ == "MLPField"
    assert type(zoo.load_model(folder / "scene")).__name__ == "MLPField"
    changes = [change for change in TINY if not change.startswith(("teacher", "student"))]
    words = ["--set", f"teacher={{model: {folder / 'scene'}}}", "--set", "student={model: field-voxels, args: {resolution: 4}}"]
    result = package.run_recipe("scene-convert", *changes, *words[1::2], "scene.equal=steps", out=tmp_path / "back")
    assert "as many steps" in result.summary["headline"] and type(result.scene).__name__ == "VoxelField"
    from limbeck.saved import open_saved

    with pytest.raises(UserError, match="holds a scene"):
        open_saved(folder)


def test_methods_side_by_side(tmp_path):
    """`limbeck compare` works through the role "student"."""
    found = package.compare("scene-convert", ["from-images", "pvd-al@cells=0"], 2, changes=TINY, out=tmp_path / "c")
    assert found.metric == "psnr" and len(found.rows) == 4
    assert [line["n"] for line in found.table("psnr")] == [2, 2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["data.source=scene:globs"], "unknown scene"),
        (["data.source=digits"], "no posed views"),
        (["data.source=posed:nowhere"], "no nowhere"),
        (["data.channels=1"], "data.channels"),
        (["data.size=2"], "2 pixels"),
        (["data.train=0.5"], "counted"),
        (["training.steps=null"], "no epochs"),
        (["training.accumulate=2"], "accumulate"),
        (["teacher=null", "scene.equal=steps"], "teacher"),
        (["teacher={model: field-hash}"], "untrained"),
        (["teacher={model: cnn}"], "no radiance field"),
        (["teacher={model: field-hash, train: {epochs: 3}}"], "no epochs"),
        (["teacher={model: field-hash, train: {steps: 3, method: pvd}}"], "learns no field"),
        (["student={model: field-mpl}"], "unknown network"),
        (["student={model: field-mlp, args: {bound: 0.5}}"], "half side"),
        (["student={model: field-mlp, train: {steps: 5}}"], "student.train"),
        (["method={id: pvd, stages: [0.5, 0.2]}"], "backwards"),
        (["method={id: pvd, copy_head: true}", "student={model: field-voxels}"], "copy_head"),
        (["method={id: pvd, k_color: -1}"], "k_color"),
        (["scene.rivals=[kd]"], "belongs to the wing knowledge"),
        (["scene.rivals=[from-images, from-images]"], "twice"),
        (["scene.variants=3"], "scene.variants"),
        (["scene.point=3"], "scene.points"),
        (["evaluation.final=valid"], "no such part"),
        (["data.args={bound: 2}"], "bound"),
    ],
)
def test_bad_input_is_told_in_one_line(changes, words, tmp_path):
    """Each mistake: a UserError with a hint, before anything long begins, and nothing is left behind."""
    with pytest.raises(UserError) as caught:
        package.run_recipe("scene-convert", *TINY, *changes, out=tmp_path / "run")
    assert words in caught.value.message + caught.value.hint and caught.value.hint
    assert "\n" not in caught.value.message and not (tmp_path / "run").exists()


def test_commands_of_other_wings_say_so(tmp_path, limbeck):
    for words in (["plan", "scene-convert"], ["cache", "scene-convert", "--out", tmp_path / "store"]):
        done = limbeck(*words)
        assert done.returncode == 2 and "belongs to the wing scenes" in done.stderr and "Traceback" not in done.stderr
    listed = limbeck("data")
    assert "scene:globes" in listed.stdout and "posed:<folder>" in listed.stdout
    assert {"field-mlp", "field-hash", "field-vm", "field-voxels"} <= {row["name"] for row in zoo.listing()}


def test_objects_in_python(tmp_path):
    """Views, fields and methods given as objects; the student that was given is not changed."""
    from limbeck.method import make
    from limbeck.rendering import open_views
    from limbeck.zoo.fields import MLPField, VoxelField

    views = open_views("scene:letter", train=3, test=1, size=12)
    student, teacher = VoxelField(4), MLPField(8, 2, 2, 8)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    raw = {
        "name": "objects",
        "teacher": {"model": "object:MLPField"},
        "student": {"model": "object:VoxelField"},
        "method": {"id": "object:PVD"},
        "data": {"source": "object:ViewSet"},
        "training": {"steps": 4, "batch": 8},
        "scene": {"points": 6},
        "trackers": [],
    }
    method = make("pvd", {"cells": 4})
    result = package.run_recipe(raw, out=tmp_path / "run", teacher=teacher, student=student, data=views, method=method)
    assert all((before[name] == value).all() for name, value in student.state_dict().items())
    assert isinstance(result.scene, VoxelField) and result.summary["method"] == "pvd"
    assert any((before[name] != value).any() for name, value in result.scene.state_dict().items())
