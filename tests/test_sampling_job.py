"""The sampling wing as a user meets it: recipe, command line, folder, mistakes."""

import json
import os
import subprocess
import sys

import pytest
import torch

import limbeck
from limbeck.errors import UserError

MLP = {"model": "denoising-mlp", "args": {"width": 32, "depth": 2}}
SMALL = {
    "name": "few",
    "method": "consistency",
    "student": "teacher",
    "teacher": {**MLP, "train": {"steps": 80, "batch": 32, "lr": 0.003}},
    "data": {"source": "digits", "train": 300},
    "training": {"steps": 6, "batch": 16, "optimizer": "adam", "lr": 0.001, "ema": 0.9},
    "generate": {
        "steps": [1, 2],
        "teacher_steps": [3],
        "samples": 100,
        "features": {"model": "cnn", "args": {"width": 4}, "train": {"steps": 20}},
    },
    "threads": 1,
    "device": "cpu",
    "trackers": [],
}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """One cache for the module, so that the tiny teacher is trained once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def changed(**blocks):
    """The small recipe with some keys of some blocks replaced."""
    raw = {key: dict(value) if isinstance(value, dict) else value for key, value in SMALL.items()}
    for block, value in blocks.items():
        merged = block != "teacher" and isinstance(value, dict) and isinstance(raw.get(block), dict)
        raw[block] = {**raw[block], **value} if merged else value
    return raw


def limbeck_command(*words, cwd=None):
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "limbeck", *map(str, words)], capture_output=True, text=True, cwd=cwd, env=dict(os.environ), timeout=300
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory, own_cache):
    """One finished run."""
    return limbeck.run_recipe(SMALL, out=tmp_path_factory.mktemp("runs") / "one")


def test_summary_table_and_report(run):
    """Roles, figures at every number of steps, calls, and a report with pictures."""
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["wing"] == "sampling" and summary["primary"] == "feature_distance"
    assert set(summary["metrics"]) == {"teacher", "baseline", "student"}
    student = summary["metrics"]["student"]
    for name in (
        "feature_distance",
        "kernel_distance",
        "precision",
        "recall",
        "density",
        "coverage",
        "class_accuracy",
        "diversity",
        "copies",
    ):
        assert name in student and f"{name}@2" in student
    names = [row["name"] for row in summary["table"]["rows"]]
    assert names == [
        "real pictures",
        "teacher, 1 step",
        "teacher, 2 steps",
        "teacher, 3 heun",
        "distilled, 1 step",
        "distilled, 2 steps",
    ]
    assert [row["cells"][0] for row in summary["table"]["rows"]] == ["–", "1", "2", "5", "1", "2"]
    page = (run.folder / "report.html").read_text()
    assert page.count("data:image/png") >= 5 and "Quality over network calls" in page
    assert summary["floor"]["feature_distance"] < student["feature_distance"]
    card = (run.folder / "generator" / "README.md").read_text()
    assert "limbeck.load_generator" in card and summary["headline"] in card
    assert "FID" not in page.replace("no FID", "")


def test_generator_is_opened_and_drawn(run, tmp_path):
    """`Result.generator`, `load_generator` and `limbeck sample` draw the same pictures from the same seed."""
    opened = limbeck.load_generator(run.folder)
    assert opened.classes == tuple(str(n) for n in range(10))
    assert torch.equal(opened.sample(6, 2, seed=4, labels=7), run.generator.sample(6, 2, seed=4, labels=7))
    out = tmp_path / "sheet.png"
    done = limbeck_command("sample", run.folder, "-n", 20, "--steps", 2, "--seed", 4, "--out", out, "--tensors", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["calls"] == 2 and out.read_bytes().startswith(b"\x89PNG")
    from safetensors.torch import load_file

    assert torch.equal(load_file(said["tensors"])["pictures"], opened.sample(20, 2, seed=4))
    with pytest.raises(UserError, match="class 12"):
        opened.sample(2, labels=12)


def test_evaluate_finds_the_recorded_figures(run):
    """`limbeck evaluate` draws again and measures what the run recorded."""
    done = limbeck_command("evaluate", run.folder, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    recorded = run.summary["metrics"]["student"]
    assert found["figures"]["1"]["feature_distance"] == pytest.approx(recorded["feature_distance"], rel=1e-6)
    assert found["figures"]["2"]["recall"] == pytest.approx(recorded["recall@2"])
    table = limbeck_command("evaluate", run.folder)
    assert table.returncode == 0 and "recorded" in table.stdout
    refused = limbeck_command("export", run.folder, "--format", "onnx")
    assert refused.returncode == 2 and "generator" in refused.stderr


def test_a_generator_is_a_student_and_a_teacher(run, tmp_path):
    """The folder of a run is taken as student (to be tuned) and as teacher."""
    tuned = limbeck.run_recipe(
        changed(method={"id": "pso"}, student=str(run.folder), generate={"steps": [2]}, baseline=False), out=tmp_path / "tuned"
    )
    assert tuned.summary["metrics"]["student"]["reward_before"] != tuned.summary["metrics"]["student"]["reward"]
    again = limbeck.run_recipe(changed(teacher=str(run.folder / "generator"), generate={"steps": [1]}), out=tmp_path / "again")
    assert "teacher" in again.summary["metrics"]


def test_student_distilled_before_by_another_method(tmp_path):
    """`student.train` names the method that comes first; its result is kept and shared."""
    first = {"model": "teacher", "train": {"method": {"id": "dmd2", "ratio": 1, "gan": 0}, "steps": 4, "batch": 8, "lr": 0.001}}
    recipe = changed(method={"id": "diversity-distillation"}, student=first, generate={"steps": [2]})
    one = limbeck.run_recipe(recipe, out=tmp_path / "one")
    two = limbeck.run_recipe(recipe, out=tmp_path / "two")
    assert "student" not in two.summary["phases"] and one.summary["metrics"]["student"] == two.summary["metrics"]["student"]
    assert one.summary["metrics"]["student"]["calls"] > 2
    opened = limbeck.load_generator(tmp_path / "one")
    assert opened.base is not None and torch.equal(opened.sample(4, 2, 1), one.generator.sample(4, 2, 1))


def test_compare(tmp_path):
    """`limbeck compare` ranks generators by distance, lower is better."""
    recipe = changed(generate={"steps": [1]})
    found = limbeck.compare(recipe, ["fewer-steps", "noise-regression@pairs=32;teacher_steps=2"], 1, out=tmp_path / "c")
    assert found.metric == "feature_distance"


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ({"data": {"source": "wine", "train": 100}}, "makes pictures"),
        ({"student": "cnn"}, "no denoising network"),
        ({"teacher": {"model": "cnn"}}, "no denoising network"),
        ({"teacher": [MLP, MLP]}, "one teacher"),
        ({"teacher": MLP}, "no better than their mean"),
        ({"generate": {"sampler": "heum"}}, "sampler"),
        ({"generate": {"process": "flaw"}}, "noise process"),
        ({"generate": {"process": {"name": "flow", "shift": 0}}}, "shift"),
        ({"method": {"id": "boot"}}, "generate.steps"),
        ({"method": {"id": "agd"}}, "guidance"),
        ({"method": {"id": "decoupled-dmd"}}, "guidance"),
        ({"method": {"id": "pso"}, "generate": {"steps": [1]}}, "one step has none"),
        ({"method": {"id": "diversity-distillation"}, "generate": {"steps": [1]}}, "replaces 1"),
        ({"method": {"id": "hyper-sd", "grid_steps": 30}}, "cannot be cut"),
        ({"method": {"id": "embedding-loss", "host": "pso", "host_settings": {}}}, "cannot help"),
        ({"training": {"accumulate": 2}}, "accumulate"),
        ({"evaluation": {"patience": 2}}, "patience"),
        ({"stages": [{"method": "dmd2"}]}, "stages"),
        ({"teacher": {"models": {}}}, "no"),
    ],
)
def test_mistakes_are_one_line(blocks, said, tmp_path):
    """Each mistake is named before anything is trained on it, and leaves no folder behind."""
    raw = changed(**blocks)
    with pytest.raises(UserError) as caught:
        limbeck.run_recipe(raw, out=tmp_path / "run")
    assert said in str(caught.value) and "\n" not in caught.value.message and caught.value.hint
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_wrong_prediction_is_found_by_the_probe(run, tmp_path):
    """A network that predicts velocity and is said to predict noise is found out on noised pictures, and told what it is."""
    from limbeck.diffusion import Denoiser

    made = limbeck.load_generator(run.folder).denoiser
    wrong = Denoiser(made.network, made.own, "noise", classes=made.classes)
    with pytest.raises(UserError, match="it predicts 'velocity'"):
        limbeck.run_recipe(SMALL, out=tmp_path / "run", teacher=wrong)


def test_pixels_outside_the_range_and_other_channels(run, tmp_path):
    x, y = 3 * torch.randn(80, 1, 8, 8), torch.arange(80) % 10
    with pytest.raises(UserError, match="outside"):
        limbeck.run_recipe(changed(data={"train": None}), out=tmp_path / "a", data={"train": (x, y), "test": (x, y)})
    colour = torch.rand(80, 3, 8, 8)
    with pytest.raises(UserError, match="channels"):
        limbeck.run_recipe(
            changed(teacher=str(run.folder), data={"train": None}), out=tmp_path / "b", data={"train": (colour, y), "test": (colour, y)}
        )
    with pytest.raises(UserError, match="classes"):
        ten = torch.rand(80, 1, 8, 8)
        limbeck.run_recipe(
            changed(teacher=str(run.folder), data={"train": None}), out=tmp_path / "c", data={"train": (ten, y % 3), "test": (ten, y % 3)}
        )


def test_an_unconditional_teacher_cannot_be_guided(tmp_path):
    x = torch.rand(200, 1, 8, 8)
    raw = changed(data={"train": None}, generate={"guidance": 2.0, "features": {"model": "cnn", "args": {"classes": 4}, "train": None}})
    with pytest.raises(UserError, match="without classes"):
        limbeck.run_recipe(raw, out=tmp_path / "a", data={"train": x, "test": x[:50]})


def test_a_nan_of_a_critic_is_named_and_the_checkpoint_stays(tmp_path):
    """The term and the last good checkpoint are told; the run can be looked at."""
    raw = changed(method={"id": "dmd2", "ratio": 1, "gan": 0.003, "lr_fake": 1e30}, training={"steps": 30}, checkpoints={"every_steps": 1})
    with pytest.raises(UserError, match=r"NaN|not finite|infinite"):
        limbeck.run_recipe(raw, out=tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").rglob("*.safetensors"))


def test_a_collapsed_generator_raises_the_alarm(tmp_path):
    """A student that draws one picture for every noise is reported in the log and the summary."""
    from limbeck.sampling.methods.dmd2 import DMD2

    class Stuck(DMD2):
        card = DMD2.card

        def generator_losses(self, x, t, labels):
            self.made = torch.zeros_like(x)
            return super().generator_losses(x, t, labels)

    made = limbeck.run_recipe(changed(training={"steps": 20}), out=tmp_path / "run", method=Stuck(ratio=1, gan=0.0))
    assert any("collapse" in alarm for alarm in made.summary["alarms"])


def test_a_broken_folder_is_told(run, tmp_path):
    import shutil

    shutil.copytree(run.folder / "generator", tmp_path / "g")
    (tmp_path / "g" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no file"):
        limbeck.load_generator(tmp_path / "g")
    (tmp_path / "g" / "generator.json").write_text('{"format": "limbeck-generator/1"}')
    with pytest.raises(UserError, match="note of a generator"):
        limbeck.load_generator(tmp_path / "g")
    done = limbeck_command("sample", tmp_path)
    assert done.returncode == 2 and "holds no generator" in done.stderr


def test_inception_is_asked_for_by_name(run, tmp_path, monkeypatch):
    """Without weights or torch-fidelity a clear line; with them, PNG files of both sides are handed over."""
    import types

    from limbeck.sampling.again import measure_again

    with pytest.raises(UserError, match="no Inception weights"):
        measure_again(run.folder, [], tmp_path / "none.pth")
    (tmp_path / "weights.pth").write_bytes(b"x")
    seen = {}

    def calculate_metrics(**given):
        from pathlib import Path

        seen.update({side: len(list(Path(given[side]).glob("*.png"))) for side in ("input1", "input2")})
        assert given["feature_extractor_weights_path"].endswith("weights.pth") and given["fid"]
        return {"frechet_inception_distance": 7.0}

    monkeypatch.setitem(sys.modules, "torch_fidelity", types.SimpleNamespace(calculate_metrics=calculate_metrics))
    found = measure_again(run.folder, [], tmp_path / "weights.pth")
    assert found["inception_fid"] == {"1": 7.0, "2": 7.0} and seen == {"input1": 100, "input2": 450}


def test_a_compiled_generator_draws_the_same(run):
    """Compiling changes the call, not the pictures (traced by dynamo; the slow test below also generates code)."""
    plain = run.generator.sample(5, 2, seed=1)
    opened = limbeck.load_generator(run.folder)
    assert torch.allclose(opened.compile(backend="eager").sample(5, 2, seed=1), plain, atol=1e-6)
    with pytest.raises(UserError, match=r"torch.compile failed"):
        limbeck.load_generator(run.folder).compile(backend="no-such-backend")


@pytest.mark.slow
def test_the_student_is_trained_compiled(tmp_path):
    """`generate.compile` trains and measures through torch.compile; the result is near the plain one, also from the compiler's cache."""
    plain = limbeck.run_recipe(SMALL, out=tmp_path / "plain")
    for name in ("first", "cached"):
        torch._dynamo.reset()
        fast = limbeck.run_recipe(changed(generate={"compile": True}), out=tmp_path / name)
        assert torch.allclose(plain.generator.sample(4, 1), fast.generator.sample(4, 1), atol=1e-2)


def test_latents_are_left_as_they_are(tmp_path):
    """With generate.latents samples of any range are taken, and generated ones are not clipped."""
    x, y = 4 * torch.randn(120, 4, 8, 8), torch.arange(120) % 3
    raw = changed(
        data={"train": None}, generate={"latents": True, "steps": [1]}, method={"id": "noise-regression", "pairs": 32, "teacher_steps": 2}
    )
    made = limbeck.run_recipe(raw, out=tmp_path / "run", data={"train": (x, y), "test": (x[:40], y[:40])})
    drawn = made.generator.sample(20)
    assert drawn.shape == (20, 4, 8, 8) and float(drawn.abs().max()) > 1
    assert torch.equal(limbeck.load_generator(tmp_path / "run").sample(20), drawn)
    assert "neither 1 nor 3 channels" in (tmp_path / "run" / "report.html").read_text()


def test_a_failed_start_leaves_the_folder_free(tmp_path):
    """A mistake found after the folder was made leaves nothing behind, trackers included, so that the mended command can use it."""
    raw = changed(teacher=MLP, trackers=["tensorboard"])
    with pytest.raises(UserError):
        limbeck.run_recipe(raw, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
