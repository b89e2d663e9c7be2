"""Drawings as a user meets them: `limbeck run` in a tiny form, the artifact opened again, resumed, and what is wrong with a recipe."""

import copy
import json
import xml.etree.ElementTree as ET

import pytest
import torch
from typer.testing import CliRunner

from limbeck import schema
from limbeck.cli.app import app
from limbeck.engine.clock import Clock
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.run import execute
from limbeck.scenes import job
from limbeck.scenes.again import measure_again
from limbeck.scenes.drawing_method import overlap
from limbeck.scenes.path_prior import path_network
from limbeck.scenes.pictures_report import grid_of
from limbeck.scenes.scene import load_scene
from limbeck.vector import DirectDrawing, LatentDrawing

torch.set_num_threads(1)
TINY = {
    "name": "tiny-drawing",
    "method": {"id": "t2v-npr", "width": 16, "path_steps": 4, "path_width": 16, "path_characters": "AO"},
    "teacher": {"model": "denoising-mlp", "args": {"width": 16, "depth": 1}, "train": {"steps": 20, "batch": 16, "lr": 0.003}},
    "student": {"model": "drawing", "args": {"paths": 3}},
    "data": {"source": "glyphs", "size": 12, "args": {"characters": "AB", "jitters": 4}},
    "training": {"steps": 8, "batch": 2, "optimizer": "adam", "lr": 0.05, "weight_decay": 0},
    "scene": {
        "variants": 2,
        "label": "latin capital letter b",
        "samples": 8,
        "curve": 2,
        "features": {"model": "cnn", "args": {"width": 4}, "train": {"steps": 10}},
    },
    "threads": 1,
    "device": "cpu",
    "trackers": [],
}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def recipe_of(**changes):
    raw = copy.deepcopy(TINY)
    for key, value in changes.items():
        raw[key] = {**raw[key], **value} if isinstance(value, dict) and key in ("scene", "training", "method") else value
    return schema.Recipe.model_validate(raw)


def ready(**changes):
    method, problem = job.open_problem(recipe_of(**changes), Session(), {})
    torch.manual_seed(0)
    method.bind(problem)
    method.setup(problem)
    return method


def test_a_drawing_by_the_command_line_and_everything_in_its_folder(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(recipe_of().to_yaml(), encoding="utf-8")
    out = tmp_path / "run"
    ended = CliRunner().invoke(app, ["run", str(path), "--out", str(out)])
    assert ended.exit_code == 0, ended.output
    summary = json.loads((out / "summary.json").read_text("utf-8"))
    assert set(summary["metrics"]) == {"teacher", "baseline", "student"}
    assert {"class_accuracy", "self_intersections", "jaggedness", "paths"} <= set(summary["metrics"]["student"])
    assert [row["name"] for row in summary["table"]["rows"]][2:] == ["direct-paths", "t2v-npr"]
    scene = out / "scene"
    root = ET.fromstring((scene / "drawing.svg").read_bytes())
    assert root.find("{http://www.w3.org/2000/svg}title").text == "LATIN CAPITAL LETTER B"
    assert 1 <= len(root.findall("{http://www.w3.org/2000/svg}path")) <= 3
    for name in ("drawing-1.svg", "drawing.png", "pictures.png", "model.safetensors", "README.md", "scene.json"):
        assert (scene / name).stat().st_size > 0
    assert "data:image/svg+xml" in (out / "report.html").read_text("utf-8")
    network, note = load_scene(out)
    assert isinstance(network, LatentDrawing) and note["kind"] == "paths" and note["facts"]["asked"] == ["LATIN CAPITAL LETTER B"] * 2
    again = measure_again(out)
    assert again["figures"]["self_intersections"] == summary["metrics"]["student"]["self_intersections"]
    assert again["figures"] == {name: summary["metrics"]["student"][name] for name in again["figures"]}


def test_particles_and_their_rivals_by_the_command_line(tmp_path):
    recipe = recipe_of(
        method={"id": "bsd"}, student={"model": "particles"}, scene={"rivals": [{"id": "sds", "guidance": 3.0}, {"id": "asd"}]}
    )
    recipe.method.settings.clear()
    path = tmp_path / "tiny.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    ended = CliRunner().invoke(app, ["run", str(path), "--out", str(tmp_path / "run")])
    assert ended.exit_code == 0, ended.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert [row["name"] for row in summary["table"]["rows"]][2:] == ["sds", "asd", "bsd"]
    assert not (tmp_path / "run" / "scene" / "drawing.svg").exists() and load_scene(tmp_path / "run")[0].pixels.shape == (2, 1, 12, 12)


def test_the_same_recipe_gives_the_same_drawing(tmp_path):
    first, second = (execute(recipe_of(baseline=False), tmp_path / name, report=False) for name in "ab")
    for name, value in first.scene.state_dict().items():
        assert torch.equal(value, second.scene.state_dict()[name]), name
    assert first.summary["metrics"]["student"]["diversity"] == second.summary["metrics"]["student"]["diversity"]


def test_both_kinds_of_drawing_take_the_same_recipe():
    for id, kind in (("t2v-npr", LatentDrawing), ("direct-paths", DirectDrawing)):
        recipe = recipe_of()
        recipe.method = schema.Method(id=id, settings={k: v for k, v in recipe.method.settings.items() if id == "t2v-npr" or k == "width"})
        _, problem = job.open_problem(recipe, Session(), {})
        assert isinstance(problem.student, kind) and problem.student.chains().shape == (2, 3, 24, 2)
    assert isinstance(
        job.open_problem(recipe_of(method={"id": "direct-paths"}).model_copy(update={"method": schema.Method(id="vsd")}), Session(), {})[
            1
        ].student,
        DirectDrawing,
    )


def test_latents_are_what_is_optimised_and_the_decoder_is_not():
    method, problem = job.open_problem(recipe_of(), Session(), {})
    vae = path_network(8, 24, 16, 4, 0.01, Session(), "AO")
    assert torch.equal(problem.student.decoder.out.weight, vae.decoder.out.weight)
    before = {name: value.clone() for name, value in problem.student.state_dict().items()}
    student, _ = job.optimised(method, problem, Session())
    for name, value in student.state_dict().items():
        moved = not torch.equal(value, before[name])
        assert moved == (name in ("z", "size", "turn", "shift", "colour", "strength")) or name == "kept", name


def test_latents_are_pulled_to_the_prior():
    method = ready()
    pick = torch.tensor([0, 1])
    term = method.extra_losses(pick, None, Clock(0, 8, 8))["prior"]
    assert torch.allclose(term, 0.05 * method.problem.student.z.square().mean())
    method.lam_z = 0.0
    assert method.extra_losses(pick, None, Clock(0, 8, 8)) == {}


def test_cleaning_comes_last_fits_the_target_and_needs_no_follower():
    method = ready(method={"clean": 0.5, "refine": 0.0})
    clocks = [Clock(step, 8, 8) for step in range(8)]
    assert [method.turns(clock) for clock in clocks] == [("student", "fake")] * 4 + [("student",)] * 4
    student = method.problem.student
    with torch.no_grad():
        student.strength[0, 1] = -9.0
        shown = student.render(torch.tensor([0, 1]))
    terms = method.losses("student", clocks[4])
    assert set(terms) == {"fit", "prior", "overlap"} and student.kept[0, 1] == 0
    assert torch.allclose(method.state["target"], student.render(torch.tensor([0, 1])), atol=1e-6)
    assert float(terms["fit"].detach()) < 1e-6 and torch.allclose(method.state["target"], shown, atol=1e-3)
    method.state["target"] = torch.ones_like(shown)
    assert method.losses("student", clocks[5])["fit"] > 1.0


def test_the_target_is_denoised_by_the_score_model():
    method = ready(method={"refine": 0.3})
    torch.manual_seed(3)
    target = method._target()
    torch.manual_seed(3)
    x = method.problem.student.render(torch.tensor([0, 1])).detach()
    prior, t = method.problem.teacher, torch.full((2,), 0.3)
    state = prior.process.diffuse(x, torch.randn_like(x), t)
    with torch.no_grad():
        assert torch.allclose(target, prior.x0(state, t, torch.tensor([1, 1])).clamp(-1, 1), atol=1e-6)


def test_overlap_is_the_mean_product_of_two_layers():
    masks = torch.rand(2, 3, 4, 4)
    pairs = [masks[:, i] * masks[:, j] for i in range(3) for j in range(3) if i != j]
    assert torch.allclose(overlap(masks), torch.stack(pairs).mean())


def test_a_moving_average_keeps_whole_layers():
    recipe = recipe_of(training={"ema": 0.9})
    recipe.method = schema.Method(id="direct-paths", settings={"width": 16, "clean": 0.5})
    method, problem = job.open_problem(recipe, Session(), {})
    with torch.no_grad():
        problem.student.strength[:, 0] = -9.0
    student, _ = job.optimised(method, problem, Session())
    assert set(student.kept.unique().tolist()) <= {0.0, 1.0} and (student.kept[:, 0] == 0).all()
    average = copy.deepcopy(problem.student)
    with torch.no_grad():
        average.strength[:], average.points[:] = 6.0, torch.rand(2, 3, 24, 2) - 0.5
        average.kept[:] = 0.9  # as an average of ones and zeros is
        problem.student.kept[:] = torch.tensor([1.0, 0.0, 1.0])
    kept = method.finish(average).kept
    assert set(kept.unique().tolist()) <= {0.0, 1.0} and (kept[:, 1] == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"model": "drawing", "args": {"pathes": 3}}}, "pathes"),
        ({"student": {"model": "drawing", "args": {"paths": 0}}}, "of 0 paths"),
        ({"scene": {"label": "LATIN CAPITAL LETTER C"}}, "unknown class"),
        ({"method": {"path_characters": " "}}, "none of the characters"),
        ({"method": {"path_width": 6}}, "path autoencoder"),
        ({"training": {"steps": None, "epochs": 2}}, "no epochs"),
        ({"generate": {"steps": [1]}}, "generate has no meaning"),
    ],
)
def test_wrong_recipes_are_one_clear_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        job.open_problem(recipe_of(**changes), Session(), {})
    assert error.value.hint


def test_drawings_refuse_a_student_that_is_none():
    class Grey(torch.nn.Module):
        variants = 2

        def __init__(self):
            super().__init__()
            self.x = torch.nn.Parameter(torch.zeros(2, 1, 12, 12))

        def render(self, pick):
            return self.x[pick]

    method, problem = job.open_problem(recipe_of(), Session(), {"student": Grey()})
    with pytest.raises(UserError, match="optimises drawings"):
        job.optimised(method, problem, Session())
    with pytest.raises(UserError, match="renders 2 variants"):
        job.open_problem(recipe_of(scene={"variants": 3}), Session(), {"student": Grey()})


def test_sheets_hold_every_picture():
    from io import BytesIO

    from PIL import Image

    page = Image.open(BytesIO(grid_of(torch.zeros(13, 1, 12, 12), columns=5)))
    assert page.size == ((5 * 13 + 1) * 3, (3 * 13 + 1) * 3)
