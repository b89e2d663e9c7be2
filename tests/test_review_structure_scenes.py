"""What a review of the structure and scenes wings found: settings without effect, clocks, copies and files that lie."""

import copy
import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import limbeck
from limbeck.errors import UserError
from limbeck.evaluation.budget import MEASURED
from limbeck.rendering import Cameras
from limbeck.rendering.posed import read_posed
from limbeck.rendering.views import Views, ViewSet, marked

from .conftest import TINY, TINY_DENOISING

PICTURE = {
    "name": "pictures",
    "method": {"id": "sds"},
    "teacher": {"model": "exact"},
    "student": {"model": "particles"},
    "data": {"source": "digits", "train": 40},
    "training": {"steps": 2, "batch": 2},
    "scene": {"variants": 2, "samples": 8, "curve": 0, "features": {"model": "cnn", "args": {"width": 4}, "train": {"steps": 2}}},
    "trackers": [],
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("base", "changes", "words"),
    [
        (PICTURE, ["scene.points=9"], "scene.points has no meaning"),
        (PICTURE, ["scene.background=black"], "scene.background has no meaning"),
        (PICTURE, ["scene.equal=seconds"], "scene.equal has no meaning"),
        (PICTURE, ["scene.rivals=[asd, asd]"], "twice"),
        (PICTURE, ["scene.rivals=[sds]"], "the run's own"),
        (PICTURE, ["structure={budget: {params: 10%}}"], "structure has no meaning"),
        (PICTURE, ["student={model: particles, train: {steps: 3}}"], "student.train has no meaning"),
        (PICTURE, ["teacher={model: exact, store: somewhere}"], "teacher.store has no meaning"),
        (TINY, ["structure={budget: {params: 10%}}"], "structure has no meaning for kd"),
        (TINY, ["scene={variants: 3}"], "scene has no meaning for kd"),
        (TINY, ["generate={steps: [2]}"], "generate has no meaning for kd"),
        (TINY, ["condense={per_class: 2}"], "condense has no meaning for kd"),
        ("scene-convert", ["scene.rivals=[pvd]"], "the run's own method"),
    ],
)
def test_blocks_and_keys_that_would_be_ignored_are_refused(base, changes, words, tmp_path):
    raw = base if isinstance(base, str) else {**copy.deepcopy(base), **({} if base is PICTURE else {"method": {"id": "kd"}})}
    with pytest.raises(UserError) as caught:
        limbeck.run_recipe(raw, *changes, out=tmp_path / "run")
    assert words in caught.value.message and caught.value.hint and not (tmp_path / "run").exists()


def test_the_clock_of_a_scene_stops_with_its_last_step():
    """Seconds are those of optimising: not of rivals and measurements that come afterwards, nor of loading before."""
    from limbeck.engine.session import Session
    from limbeck.scenes.methods.sds import SDS
    from limbeck.scenes.program import optimise
    from limbeck.scenes.scene_method import Problem
    from limbeck.schema import Scene, Training

    class Still(SDS):
        needs_teacher = False

        def setup(self, problem):
            time.sleep(0.3)

        def losses(self, turn, clock):
            return {"square": self.problem.student.weight.square().sum()}

    problem = Problem(nn.Linear(2, 2), None, Scene(), Training(steps=2), 2, torch.device("cpu"), session=Session())
    program = optimise(Still(), problem, problem.session)
    first = program.seconds
    time.sleep(0.05)
    assert program.seconds == first and 0 < first < 0.3


def test_what_a_method_remembers_comes_back_on_its_device():
    """Checkpoints are read on the processor; pools and targets of a run on another device must go back there."""
    from limbeck.scenes.program import SceneProgram

    program = SceneProgram.__new__(SceneProgram)
    program.method, program.problem = SimpleNamespace(state={}), SimpleNamespace(device=torch.device("meta"))
    state = {"pool": torch.ones(2), "list": [torch.ones(1), 3], "deep": {"target": torch.ones(1)}, "cursor": 5}
    program.restore({"state": state, "trace": [], "seconds": 1.5})
    found = program.method.state
    assert {found["pool"].device.type, found["list"][0].device.type, found["deep"]["target"].device.type} == {"meta"}
    assert found["cursor"] == 5 and found["list"][1] == 3 and program._before == 1.5


def test_views_with_other_principal_points_are_other_views():
    """A field that is kept must not be found again for another lens."""

    def views(centre):
        pose = torch.eye(4)[None, :3]
        part = Views(Cameras(pose, torch.ones(1, 2), torch.full((1, 2), centre), 2, 2), torch.zeros(1, 3, 2, 2), torch.ones(1, 1, 2, 2))
        return marked(ViewSet("x", part, part, None, 1.0)).fingerprint

    assert views(1.0) == views(1.0) != views(0.5)


def posed(folder, top=(), frame=()):
    """Nine views of one grey picture, from above."""
    from PIL import Image

    folder.mkdir(parents=True)
    Image.new("RGB", (4, 4), (90, 90, 90)).save(folder / "a.png")
    pose = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 3], [0, 0, 0, 1]]
    frames = [{"file_path": "a", "transform_matrix": pose} for _ in range(9)]
    frames[3] |= dict(frame)
    (folder / "transforms.json").write_text(json.dumps({"fl_x": 4, "frames": frames, **dict(top)}))
    return folder


@pytest.mark.parametrize(
    ("top", "frame", "words"),
    [
        ({}, {"fl_x": 8}, "frame 3 has a lens of its own"),
        ({}, {"k1": 0.1}, "frame 3: the lens has a distortion"),
        ({"w": 8}, {}, "w is 8, and the pictures have 4"),
        ({"h": 8}, {}, "h is 8, and the pictures have 4"),
        ({"camera_model": "OPENCV_FISHEYE"}, {}, "no pinhole camera"),
    ],
)
def test_lenses_that_would_be_ignored_are_refused(tmp_path, top, frame, words):
    with pytest.raises(UserError, match=words):
        read_posed(str(posed(tmp_path / "views", top, frame)))
    assert len(read_posed(str(posed(tmp_path / "good", {"w": 4, "h": 4, "camera_model": "OPENCV"}, {"fl_x": 4}))).train) == 7


def test_a_link_beside_the_name_does_not_lead_out_of_the_folder(tmp_path):
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    folder = posed(tmp_path / "views", frame={"file_path": "b"})
    (folder / "b.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match="outside the folder"):
        read_posed(str(folder))


def making(teachers, budget):
    from limbeck.knowledge.making import Making

    recipe = SimpleNamespace(structure=SimpleNamespace(budget=budget), seed=0)
    made = Making(teachers, None, None, None, recipe, None, "student", None)  # type: ignore[arg-type]
    made.cost = lambda network: dict.fromkeys(MEASURED.values(), 10.0)  # type: ignore[method-assign]
    return made


def test_a_budget_in_numbers_needs_no_single_teacher():
    numbers = {"latency_ms": 2.0, "memory": "4000", "bits": 4, "params": 7}
    expected = {"latency_ms": 2.0, "memory": 4000.0, "bits": 4.0, "params": 7.0}
    for teachers in ({}, {"a": nn.Identity(), "b": nn.Identity()}):
        assert dict(making(teachers, numbers).budget.limits) == expected
        with pytest.raises(UserError, match="of one teacher"):
            making(teachers, {"params": "40%"}).budget  # noqa: B018
    assert dict(making({"a": nn.Identity()}, {"params": "40%"}).budget.limits) == {"params": 4.0}


def test_a_guided_score_model_is_not_guided_twice():
    from limbeck import zoo
    from limbeck.data import open_data
    from limbeck.data.pictures import Pictures
    from limbeck.diffusion import Denoiser, make_process
    from limbeck.engine.session import Session
    from limbeck.recipe import resolve
    from limbeck.scenes.priors import open_prior

    recipe = resolve(copy.deepcopy(PICTURE))
    pictures = Pictures(open_data("digits", train=40), 0.0, torch.device("cpu"))
    network = zoo.build("denoising-mlp", input_shape=pictures.shape, classes=10, width=8)
    guided = Denoiser(network, make_process("cosine"), "v", classes=10).guided(3.0)
    assert guided.guidance.acts
    assert not open_prior(recipe, recipe.scene, pictures, Session(), guided).guidance.acts


def test_the_chain_without_a_teacher_does_not_copy_the_teacher(monkeypatch):
    """A method that holds the teacher is copied for the baseline; the teacher, which may be large, is not."""
    from limbeck.knowledge import stages

    teacher, seen = nn.Linear(2, 2), []

    class Holding:
        def __init__(self):
            self.teacher = teacher

        def bind(self, task):
            pass

        def finish(self, network, models, data):
            seen.append(self.teacher)
            return network

    def stage_of():
        own = SimpleNamespace(teachers={"teacher": teacher}, phase="", method=None)
        data = SimpleNamespace(only_labelled=lambda: None)
        return stages.Stage("student", Holding(), own, nn.Linear(2, 2), nn.Linear(2, 2), None, data, None, 1)  # type: ignore[arg-type]

    monkeypatch.setattr(stages, "alone", lambda phase, network, *rest: network)
    job = SimpleNamespace(recipe=None, session=None)
    stages.beside(stages.Distilled(job, nn.Linear(2, 2), None, [stage_of()]))  # type: ignore[arg-type]
    assert seen and all(one is teacher for one in seen)


def test_denoising_reads_no_key_without_a_meaning():
    from limbeck import models
    from limbeck.data import open_data
    from limbeck.recipe import resolve

    data = open_data("digits", train=40)
    for change in ("generate.guidance=3", "generate.samples=100", "generate.sampler=heun"):
        with pytest.raises(UserError, match=f"{change.partition('=')[0]} has no meaning"):
            models.task_of(resolve(copy.deepcopy(TINY_DENOISING), changes=[change]), data)
    kept = resolve(copy.deepcopy(TINY_DENOISING), changes=["generate.process=cosine", "generate.prediction=v", "generate.jitter=0.1"])
    assert models.task_of(kept, data).noising.prediction == "v"


def test_denoising_asks_a_saved_generator_under_its_own_noise(tmp_path):
    """A generator's folder says its process; another one in the recipe would distil nonsense."""
    from limbeck import models, zoo
    from limbeck.data import open_data
    from limbeck.diffusion import Denoiser, make_process
    from limbeck.recipe import resolve
    from limbeck.sampling.generator import Generator

    network = zoo.build("denoising-mlp", input_shape=(1, 8, 8), classes=10, width=8)
    Generator(Denoiser(network, make_process("cosine"), "v", classes=10), (1, 8, 8)).save(tmp_path / "generator")
    raw = copy.deepcopy(TINY_DENOISING) | {"teacher": {"model": str(tmp_path / "generator")}}
    data = open_data("digits", train=40)
    with pytest.raises(UserError, match="trained with process"):
        models.task_of(resolve(copy.deepcopy(raw)), data)
    with pytest.raises(UserError, match="trained with prediction v"):
        models.task_of(resolve(copy.deepcopy(raw), changes=["generate.process=cosine"]), data)
    fits = resolve(copy.deepcopy(raw), changes=["generate.process=cosine", "generate.prediction=v"])
    assert models.task_of(fits, data).noising.prediction == "v"


def test_noised_batches_come_one_at_a_time():
    """Four noised copies of a large split need not lie in memory together."""
    from limbeck.data import open_data
    from limbeck.tasks.denoising import Denoising

    found = Denoising().noised(open_data("digits", train=40).test, torch.device("cpu"))
    assert iter(found) is found and len(next(found)) > 0


def test_a_large_picture_of_a_drawing_has_a_limit():
    from limbeck.scenes.pictures_report import LARGEST, large_side
    from limbeck.vector.drawing import DirectDrawing

    assert large_side(DirectDrawing((1, 16, 16))) == 256
    assert large_side(DirectDrawing((1, 64, 64))) == LARGEST == 512
    assert large_side(DirectDrawing((1, 600, 600))) == 600
