"""cache, evaluate, export, inspect, plan and doctor, called as a user types them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from limbeck.cli import main
from limbeck.storage import load_tensors

RECIPE = """
name: tiny
method: kd
teacher: {model: mlp, args: {widths: [32, 32]}, train: {epochs: 2, lr: 0.003}}
student: {model: mlp, args: {widths: [8]}}
data: {source: digits, labelled: 200}
training: {epochs: 2, lr: 0.003}
threads: 1
device: cpu
trackers: []
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working folder with a recipe, a cache folder of its own, and one finished run in runs/live."""
    folder = tmp_path_factory.mktemp("tools")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        patch.setattr("limbeck.report.page.write_report", lambda path, report: None)  # pictures take most of a small run's time
        Path("tiny.yaml").write_text(RECIPE)
        assert main(["run", "tiny.yaml", "--out", "runs/live", "--quiet"]) == 0
        yield folder


def say(capsys, *arguments: str, code: int = 0) -> tuple[str, str]:
    """Standard output and error of one command; an expected error is one `error:` and one `hint:` line, and no traceback."""
    capsys.readouterr()
    assert main(list(arguments)) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    if code == 2:
        lines = err.strip().splitlines()
        assert [line.split(":")[0] for line in lines[-2:]] == ["error", "hint"], err
        assert sum(line.startswith("error:") for line in lines) == 1
    return out, err


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_tensors(Path(folder) / "student" / "model.safetensors")


# ---- cache ----


def test_a_student_of_the_float32_store_is_the_live_teachers_bit_for_bit(home, capsys):
    out, err = say(capsys, "cache", "tiny.yaml", "--out", "stores/full", "--form", "float32")
    assert "1347 samples, 40 bytes a sample" in out and "--set teacher.store=stores/full" in out
    assert "at most" in err and err.index("at most") < err.index("cache: step 0 of 1347")
    say(capsys, "run", "tiny.yaml", "--set", "teacher.store=stores/full", "--out", "runs/full", "--quiet")
    live, stored = weights("runs/live"), weights("runs/full")
    assert live.keys() == stored.keys() and all(torch.equal(live[name], stored[name]) for name in live)


def test_a_student_of_the_float16_store_is_close(home, capsys):
    say(capsys, "cache", "tiny.yaml", "--out", "stores/half", "--quiet")
    say(capsys, "run", "tiny.yaml", "--set", "teacher.store=stores/half", "--out", "runs/half", "--quiet")
    live, stored = weights("runs/live"), weights("runs/half")
    assert any(not torch.equal(live[name], stored[name]) for name in live)
    assert all(torch.allclose(live[name], stored[name], atol=2e-2) for name in live)


def test_ctrl_c_says_how_to_go_on_and_the_store_is_the_same(home, capsys, monkeypatch):
    from limbeck.signals.store import StoreWriter

    whole = StoreWriter.write

    def stop(self, index, signals):
        if int(index[0]) > 1200:
            raise KeyboardInterrupt
        whole(self, index, signals)

    monkeypatch.setattr(StoreWriter, "write", stop)
    _, err = say(capsys, "cache", "tiny.yaml", "--out", "stores/cut", "--form", "topk", "--top-k", "3", code=130)
    assert "go on with: limbeck cache tiny.yaml --out stores/cut --form topk --top-k 3" in err
    monkeypatch.undo()
    _, err = say(capsys, "run", "tiny.yaml", "--set", "teacher.store=stores/cut", "--out", "runs/cut", code=2)
    assert "1024 of 1347 rows" in err
    _, err = say(capsys, "cache", "tiny.yaml", "--out", "stores/cut", "--form", "topk", "--top-k", "3")
    assert "cache: step 1024 of 1347 (resumed)" in err
    say(capsys, "cache", "tiny.yaml", "--out", "stores/whole", "--form", "topk", "--top-k", "3", "--quiet")
    for file in sorted(Path("stores/whole").glob("*.*")):
        assert (Path("stores/cut") / file.name).read_bytes() == file.read_bytes()
    out, _ = say(capsys, "cache", "tiny.yaml", "--out", "stores/cut", "--form", "topk", "--top-k", "3")
    assert out.startswith("already complete")


def test_several_teachers_are_stored_as_one_and_bound_to_all(home, capsys):
    several = RECIPE.replace(
        "teacher: {model: mlp, args: {widths: [32, 32]}, train: {epochs: 2, lr: 0.003}}",
        "teacher: {models: {a: {model: mlp}, b: linear}, weights: {a: 3, b: 1}}",
    )
    Path("several.yaml").write_text(several)
    say(capsys, "cache", "several.yaml", "--out", "stores/several", "--form", "float32", "--quiet")
    for name, extra in (("live", []), ("stored", ["--set", "teacher.store=stores/several"])):
        say(capsys, "run", "several.yaml", "--set", "baseline=false", *extra, "--out", f"runs/several-{name}", "--quiet")
    live, stored = weights("runs/several-live"), weights("runs/several-stored")
    assert all(torch.equal(live[name], stored[name]) for name in live)
    other = ["--set", "teacher.weights={a: 1, b: 1}", "--set", "teacher.store=stores/several", "--out", "runs/several-other", "--quiet"]
    assert "another teacher" in say(capsys, "run", "several.yaml", *other, code=2)[1]
    assert "only the logits" in say(capsys, "cache", "several.yaml", "--out", "stores/x", "--signals", "embedding", code=2)[1]


def test_further_signals_are_stored(home, capsys):
    out, _ = say(capsys, "cache", "tiny.yaml", "--out", "stores/more", "--signals", "logits,embedding,stages,stages.0.0", "--quiet")
    assert f"{2 * (10 + 32 + 32 + 32 + 32)} bytes a sample" in out
    assert list(json.loads(Path("stores/more/manifest.json").read_text())["signals"]) == [
        "logits",
        "embedding",
        "stages[0]",
        "stages[1]",
        "stages.0.0",
    ]


def test_a_run_with_augmented_inputs_refuses_stored_outputs(home, capsys):
    say(capsys, "cache", "tiny.yaml", "--out", "stores/plain", "--quiet")
    changes = ["--set", "teacher.store=stores/plain", "--set", "data.augment=[shift:1]", "--set", "teacher.train.data.augment=[]"]
    assert "data.augment" in say(capsys, "run", "tiny.yaml", *changes, "--out", "runs/augmented", "--quiet", code=2)[1]


# ---- evaluate, export ----


def test_evaluate_finds_the_recorded_figures_again(home, capsys):
    found = json.loads(say(capsys, "evaluate", "runs/live", "--json")[0])
    summary = json.loads(Path("runs/live/summary.json").read_text())
    assert found["metrics"] == summary["metrics"]["student"] == found["recorded"] and found["same_data"]
    assert found["cost"]["params"] == summary["cost"]["student"]["params"] == 610
    out, _ = say(capsys, "evaluate", "runs/live/student", "--data", "digits")
    assert "the figures are those that the run recorded" in out


def test_a_student_alone_needs_data_and_an_altered_one_is_named(home, capsys, tmp_path):
    moved = shutil.copytree("runs/live/student", tmp_path / "moved")
    assert "--data" in say(capsys, "evaluate", str(moved), code=2)[1]
    assert "measured on 450 test samples" in say(capsys, "evaluate", str(moved), "--data", "digits")[0]
    file = moved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    assert "torn or was altered" in say(capsys, "evaluate", str(moved), "--data", "digits", code=2)[1]


def test_a_network_of_the_users_code_is_made_only_when_it_is_named(home, capsys, monkeypatch):
    Path("mine.py").write_text("from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n")
    monkeypatch.syspath_prepend(str(home))
    say(capsys, "run", "tiny.yaml", "--set", "student=python:mine:make", "--set", "training.steps=2", "--out", "runs/mine", "--quiet")
    assert "--model python:mine:make" in say(capsys, "evaluate", "runs/mine", code=2)[1]
    out, _ = say(capsys, "evaluate", "runs/mine", "--model", "python:mine:make")
    assert "the figures are those that the run recorded" in out


def test_safetensors_open_without_limbeck(home, capsys):
    from safetensors.torch import load_file

    for _ in range(2):  # an earlier export may be written again
        out, _ = say(capsys, "export", "runs/live", "--format", "safetensors", "--out", "shipped")
    assert "shipped" in out and "on 64 test samples" in out
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
    tensors = load_file("shipped/model.safetensors")
    ours = ("stages.0.0.weight", "stages.0.0.bias", "head.weight", "head.bias")
    plain.load_state_dict({name: tensors[own] for name, own in zip(plain.state_dict(), ours)})
    card, config = Path("shipped/README.md").read_text(), json.loads(Path("shipped/config.json").read_text())
    # brackets are escaped, so that no name makes a link of itself; shown, they are brackets
    assert all(word in card for word in (r"Teacher: mlp (widths=\[32, 32\])", "Method: `kd`", "Evidence for `kd`"))
    assert len(config["classes"]) == 10


def test_onnx_is_checked_on_real_inputs(home, capsys):
    pytest.importorskip("onnxscript")
    found = json.loads(say(capsys, "export", "runs/live", "--format", "onnx", "--json")[0])
    assert found["path"] == "runs/live/export/student.onnx" and found["samples"] == 64 and found["max_abs_difference"] < 1e-5
    assert Path(found["path"]).stat().st_size == found["bytes"]


def test_a_transformers_student_becomes_a_folder_of_its_own_kind(home, capsys):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=10)
    transformers.ViTForImageClassification(config).save_pretrained("vit")
    changes = ["--set", "student=hf:vit", "--set", "training.steps=2", "--set", "baseline=false"]
    say(capsys, "run", "tiny.yaml", *changes, "--out", "runs/vit", "--quiet")
    out, _ = say(capsys, "export", "runs/vit", "--format", "hf", "--out", "vit-shipped")
    assert "difference of an output from the student's: 0" in out
    again = transformers.AutoModelForImageClassification.from_pretrained("vit-shipped")
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in transformers.ViTForImageClassification(config).parameters())
    assert "Method: `kd`" in Path("vit-shipped/README.md").read_text()
    assert "hidden_states" in say(capsys, "inspect", "hf:vit")[0]


# ---- inspect ----


def test_inspect_a_recipe_proposes_pairs(home, capsys):
    found = json.loads(say(capsys, "inspect", "tiny.yaml", "--json")[0])
    assert [model["name"] for model in found["models"]] == ["teacher", "student"]
    assert [model["params"] for model in found["models"]] == [32 * 65 + 32 * 33 + 330, 610]
    assert found["models"][1]["head"] == "head" and found["models"][1]["embedding_shape"] == [2, 8]
    assert {(pair["signal"], pair["bridge"]) for pair in found["pairs"]["teacher"]} == {("stages", True), ("embedding", True)}


def test_inspect_networks(home, capsys):
    out, _ = say(capsys, "inspect", "resnet8", "vit", "--data", "digits", "--args", "width=2")
    assert "stages.0.attention.weights" in out and "a bridge is needed" in out and "Conv2d" in out
    assert "4x4" in say(capsys, "inspect", "cnn", "--input-shape", "1,8,8")[0]
    assert "MLP" in say(capsys, "inspect", "runs/live")[0]
    assert {row["name"] for row in json.loads(say(capsys, "inspect", "--list", "--json")[0])} >= {"cnn", "resnet", "vit"}


# ---- plan ----


def everything_under(*folders: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for folder in folders for path in sorted(folder.rglob("*"))}


def test_plan_tells_and_writes_nothing(home, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = everything_under(tmp_path, home / "cache")
    found = json.loads(say(capsys, "plan", str(home / "tiny.yaml"), "--json")[0])
    assert everything_under(tmp_path, home / "cache") == before
    phases = {phase["name"]: phase for phase in found["phases"]}
    summary = json.loads((home / "runs/live/summary.json").read_text())
    assert {name: phases[name]["steps"] for name in ("student", "baseline")} == {
        name: summary["phases"][name]["steps"] for name in ("student", "baseline")
    }
    assert phases["teacher"]["kept"].startswith(str(home / "cache")) and phases["teacher"]["seconds"] == 0
    assert {role: row["params"] for role, row in found["models"].items()} == {role: row["params"] for role, row in summary["cost"].items()}
    assert phases["student"]["memory"]["gradients"] == 4 * 610 and phases["student"]["memory"]["optimiser"] >= 2 * 4 * 610
    assert phases["student"]["memory"]["activations"] > 64 * 4 * (64 + 8)
    flops = found["models"]
    assert found["store"]["speed_bound"] == 1 + flops["teacher"]["flops"] / (3 * flops["student"]["flops"])
    assert 1347 * 20 <= found["store"]["float16"] <= 1347 * 20 + 4096
    real = sum(file.stat().st_size for file in next((home / "runs/live/checkpoints/student").glob("step-*")).iterdir())
    assert 0.5 < phases["student"]["checkpoint"] / real < 2


def test_plan_says_when_the_teacher_would_be_trained_and_goes_through_every_kind(home, capsys):
    out, _ = say(capsys, "plan", "tiny.yaml", "--set", "teacher.train.seed=5", "--set", "ceiling=true")
    assert "not in the cache yet" in out and "ceiling" in out and "checkpoints/baseline/" in out and "would need a bridge" in out
    for change in ("method=ps-kd", "teacher.kind=online", "teacher.kind=ema", "training.optimizer=sgd", "data.augment=[noise:0.1]"):
        say(capsys, "plan", "tiny.yaml", "--set", change)
    say(capsys, "cache", "tiny.yaml", "--out", "stores/planned", "--quiet")
    say(capsys, "plan", "tiny.yaml", "--set", "teacher.store=stores/planned")


# ---- bad input ----

BAD = """
cache tiny.yaml --out none --set data.augment=[shift:1] => data.augment
cache tiny.yaml --out none --set teacher.kind=online => online
cache tiny.yaml --out none --set teacher={} => names no teacher
cache tiny.yaml --out stores/bound --set data.labelled=100 => begun with another
cache tiny.yaml --out stores/bound --set teacher.train.seed=1 => begun with another teacher fingerprint
cache tiny.yaml --out none --form float8 => unknown form
cache tiny.yaml --out none --form topk => --top-k
cache tiny.yaml --out none --form topk --top-k 11 => k=11
cache tiny.yaml --out none --signals attention => attention
cache tiny.yaml --out none --signals stages.0.9 => stages.0.9
cache tiny.yaml --out runs/live => not empty
cache tiny.yaml --out tiny.yaml => is a file
evaluate nowhere => no folder nowhere
evaluate stores => holds no model
evaluate runs/live --data glyphs => cannot read samples of shape
evaluate runs/live --data digitz => unknown data
evaluate runs/live --set method=kd => changes nothing here
export runs/live --format onx => unknown format
export runs/live --format hf => transformers
export runs/live --format safetensors --out runs/live/student => not empty
export runs/live => --format
inspect => no model
inspect cn --data digits => or 'cnn'
inspect cnn => --input-shape 1,8,8
inspect cnn --input-shape 1,0 => no shape
inspect cnn --data digits --args widht=3 => 'width'
inspect cnn --data digits --args width => key=value
inspect none.yaml => no recipe file
inspect python:nowhere:make --data digits => nowhere
inspect tiny.yaml cnn => a recipe names its own
plan tiny.yaml --set method.temprature=2 => temperature
plan tiny.yaml --set student.args.classes=7 => classes
plan tiny.yaml --set method=kdd => unknown method
plan tiny.yaml --set teacher={} => needs a teacher
"""


@pytest.mark.parametrize("line", BAD.strip().splitlines())
def test_bad_input_is_named_and_writes_nothing(home, capsys, line):
    command, words = line.split(" => ")
    if "stores/bound" in command and not Path("stores/bound").exists():
        say(capsys, "cache", "tiny.yaml", "--out", "stores/bound", "--quiet")
    Path("stores").mkdir(exist_ok=True)
    assert words in say(capsys, *command.split(), code=2)[1]
    assert not Path("none").exists()


# ---- doctor ----


def test_doctor(home, capsys, monkeypatch):
    found = {check["name"]: check for check in json.loads(say(capsys, "doctor", "--json")[0])}
    assert found["torch"]["text"] == torch.__version__ and str(home / "cache") in found["cache"]["text"]
    assert all(check["hint"].startswith("pip install") for check in found.values() if check["status"] == "missing")
    monkeypatch.setenv("LIMBECK_CACHE", str(home / "tiny.yaml"))
    assert "LIMBECK_CACHE" in say(capsys, "doctor", code=2)[1]


def test_doctor_knows_every_extra():
    from importlib.metadata import metadata

    from limbeck.health import EXTRAS

    assert set(EXTRAS) == set(metadata("limbeck").get_all("Provides-Extra")) - {"all", "dev"}


# ---- as a user types them ----


def test_in_a_process_of_its_own(home):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "limbeck", *arguments], capture_output=True, text=True, timeout=60)

    done = run("doctor")
    assert done.returncode == 0 and "extras:" in done.stdout
    wrong = run("export", "runs/nowhere", "--format", "onnx")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: there is no folder") and wrong.stdout == ""


def test_help_comes_without_torch(home):
    code = "import sys; from limbeck.cli import main; [main([c, '--help']) for c in sys.argv[1:]]; sys.exit('torch' in sys.modules)"
    names = ("cache", "evaluate", "export", "inspect", "plan", "doctor")
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.count("Example") == len(names)
