"""Exports give back the model they were made from, or nothing."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from limbeck.errors import UserError
from limbeck.zoo.export import export_onnx, export_safetensors

torch.set_num_threads(1)


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def test_onnx_round_trip_with_another_batch_size(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = tiny().train(), tmp_path / "out" / "model.onnx"
    found = export_onnx(model, torch.randn(1, 1, 8, 8), path, real_inputs=torch.randn(7, 1, 8, 8))
    assert found["max_abs_difference"] < 1e-5 and found["opset"] >= 13 and found["samples"] == 7 and found["top1_agreement"] == 1
    assert model.training and [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = torch.randn(5, 1, 8, 8)
    got = session.run(None, {found["inputs"][0]: x.numpy()})[0]
    assert torch.allclose(torch.from_numpy(got), model.eval()(x), atol=1e-5)


class Restless(nn.Module):
    def forward(self, x):
        return x.flatten(1) + torch.rand_like(x.flatten(1))


def test_a_file_that_differs_is_not_written(tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(UserError, match="differs"):
        export_onnx(Restless(), torch.randn(2, 3), tmp_path / "m.onnx", real_inputs=torch.randn(4, 3))
    assert list(tmp_path.iterdir()) == []


def test_missing_extra_names_the_pip_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UserError) as caught:
        export_onnx(tiny(), torch.randn(2, 1, 8, 8), tmp_path / "m.onnx", real_inputs=torch.randn(2, 1, 8, 8))
    assert "pip install" in caught.value.hint


def test_safetensors_round_trip(tmp_path):
    model = tiny()
    written = export_safetensors(model, tmp_path / "student", {"name": "tiny", "classes": ["a", "b", "c"]})
    other = tiny()
    nn.init.zeros_(other[5].weight)
    other.load_state_dict(load_file(tmp_path / "student" / "model.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config == written and config["name"] == "tiny" and config["params"] == sum(p.numel() for p in model.parameters())
