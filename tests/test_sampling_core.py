"""Corners of the sampling wing: nothing is ignored without a word, looking changes nothing, broken notes are one line."""

import json

import pytest
import torch
from torch import nn

from limbeck import models, schema
from limbeck.cli.sample import sample as sample_command
from limbeck.data import open_data
from limbeck.diffusion import Denoiser, Flow
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.sampling.features import feature_network
from limbeck.sampling.generator import Generator, load_generator
from limbeck.sampling.job import check_recipe
from limbeck.sampling.judge import Judge
from limbeck.sampling.pictures import Pictures
from limbeck.sampling.teachers import Loader
from limbeck.zoo import build


def pictures(channels=1):
    x, y = torch.rand(40, channels, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4
    return Pictures(open_data({"train": (x, y), "test": (x[:20], y[:20])}))


def small(channels=1):
    """A generator of four classes with fresh weights."""
    network = build("denoising-mlp", input_shape=(channels, 8, 8), classes=4, width=8, depth=1)
    return Generator(Denoiser(network, Flow(), classes=4), (channels, 8, 8), classes=tuple("abcd"))


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ({"task": "binary"}, "task"),
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"ceiling": True}, "ceiling"),
        ({"condense": {}}, "condense"),
        ({"data": {"augment": ["shift:1"]}}, "data.augment"),
        ({"teacher": {"models": {}, "kind": "ema"}}, "teacher.kind"),
        ({"generate": {"interval": [0.1, 2.0]}}, "guidance is 1"),
        ({"generate": {"interval": [2.0, 0.1], "guidance": 2.0}}, "empty"),
    ],
)
def test_settings_without_effect_are_refused(blocks, said):
    with pytest.raises(UserError, match=said):
        check_recipe(schema.Recipe.model_validate(blocks))
    check_recipe(schema.Recipe.model_validate({"generate": {"interval": [0.1, 2.0], "guidance": 2.0}}))


def test_a_missing_valid_split_is_not_replaced_by_the_test_split():
    class Flat:
        def __call__(self, x):
            return x.flatten(1), torch.zeros(len(x), dtype=torch.long)

    found = pictures()
    found.data.valid = None
    with pytest.raises(UserError, match="no such split"):
        Judge(found, Flat(), 64, 0, "valid")


def test_looking_at_a_network_moves_no_average():
    """The dry pass and the probe run in evaluation mode, and leave the mode as it was."""

    class Normed(nn.Module):
        denoises = True

        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x, level, label=None):
            return self.norm(x)

    made = Denoiser(Normed().train(), Flow())
    Loader(schema.Generate(), pictures(), Session(device=torch.device("cpu"))).check(made, "student")
    assert int(made.network.norm.num_batches_tracked) == 0 and made.network.training


def test_arguments_that_would_be_ignored_are_refused(tmp_path):
    small().save(tmp_path / "generator")
    loader = Loader(schema.Generate(), pictures(), Session(device=torch.device("cpu")))
    assert loader.open(schema.Model(model=str(tmp_path)), "student").classes == 4
    for more in ({"args": {"width": 9}}, {"weights": "x.safetensors"}):
        with pytest.raises(UserError, match="says itself"):
            loader.open(schema.Model(model=str(tmp_path), **more), "student")
    with pytest.raises(UserError, match="argument of diffusers"):
        loader.open(schema.Model(model="diffusers:./none", args={"promts": []}), "teacher")
    with pytest.raises(UserError, match="takes no args"):
        loader.student(schema.Model(model="teacher", args={"width": 9}), small().denoiser)


def test_a_note_with_an_endless_number_is_one_line(tmp_path):
    small().save(tmp_path)
    note = json.loads((tmp_path / "generator.json").read_text())
    (tmp_path / "generator.json").write_text(json.dumps({**note, "shape": [float("inf"), 8, 8]}))
    with pytest.raises(UserError, match="note of a generator"):
        load_generator(tmp_path)


def test_latents_are_written_as_tensors(tmp_path):
    """--tensors works where no sheet can be drawn, as the message promises."""
    small(4).save(tmp_path)
    with pytest.raises(UserError, match="--tensors"):
        sample_command(tmp_path, n=4, steps=1, seed=0, label=None, out=None, each=None, tensors=False, json=False)
    sample_command(tmp_path, n=4, steps=1, seed=0, label=None, out=None, each=None, tensors=True, json=False)
    assert (tmp_path / "samples-1-0.safetensors").is_file() and not (tmp_path / "samples-1-0.png").exists()


def test_kept_networks_know_their_precision(monkeypatch):
    """A teacher or classifier trained in bf16 is not taken for one trained in float32, nor the other way round."""
    seen = []
    monkeypatch.setattr(models, "kept", lambda content, network, *rest: seen.append(content) or network)
    spec = schema.Generate()
    named = schema.Model.model_validate({"model": "denoising-mlp", "args": {"width": 8, "depth": 1}, "train": {"steps": 2}})
    for precision in ("no", "bf16"):
        session = Session(device=torch.device("cpu"), precision=precision)
        loader = Loader(spec, pictures(), session)
        loader.schooled(loader.open(named, "teacher"), named, "teacher", None)
        feature_network(spec.features, loader.pictures, session)
    assert seen[0] != seen[2] and seen[1] != seen[3]
