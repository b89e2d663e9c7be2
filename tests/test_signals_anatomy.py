"""Anatomy on architectures of different kinds, and the pairs that `inspect` proposes."""

import pytest
import torch
from torch import nn

from limbeck.errors import UserError
from limbeck.signals import Reader, anatomy, inspect

torch.set_num_threads(1)


class Basic(nn.Module):
    def __init__(self, i, o, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.downsample = nn.Sequential(nn.Conv2d(i, o, 1, stride), nn.BatchNorm2d(o)) if stride > 1 else None

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Laid out as torchvision's."""

    def __init__(self, width=4, blocks=2):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, width, 7, 2, 3), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for n in range(4):
            i, o = width * 2 ** max(n - 1, 0), width * 2**n
            self.add_module(f"layer{n + 1}", nn.Sequential(Basic(i, o, 1 + (n > 0)), *[Basic(o, o, 1) for _ in range(blocks - 1)]))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(width * 8, 5)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Gate(nn.Module):
    """A block with squeeze and excitation, in the manner of MobileNet."""

    def __init__(self, i, o, stride):
        super().__init__()
        self.grow = nn.Conv2d(i, o, 1)
        self.deep = nn.Conv2d(o, o, 3, stride, 1, groups=o)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(o, o, 1), nn.Sigmoid())

    def forward(self, x):
        x = self.deep(self.grow(x))
        return x * self.squeeze(x)


class Backbone(nn.Module):
    """A wrapper: everything sits one level deeper, the output is a mapping."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), Gate(4, 4, 1), Gate(4, 8, 2), Gate(8, 8, 1), Gate(8, 8, 2))
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(8, 5))

    def forward(self, image):
        return {"aux": image.mean((1, 2, 3)), "logits": self.classifier(self.features(image).mean((2, 3)))}


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 8, 8)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.norm(self.encoder(self.patch(x).flatten(2).transpose(1, 2)).mean(1)))


class Mix(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.channel = nn.Linear(16, 16), nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.token(x.transpose(1, 2)).transpose(1, 2)
        return x + self.channel(x)


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.blocks, self.head = nn.Linear(48, 8), nn.ModuleList([Mix() for _ in range(2)]), nn.Linear(8, 5)

    def forward(self, x):
        x = self.patch(x.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4).permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def vgg():
    return nn.Sequential(
        *[nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Conv2d(4, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)],
    )


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 12), nn.ReLU(), nn.Dropout(0.1), nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 5))


CASES = [
    (ResNet, 64, ["layer1", "layer2", "layer3", "layer4"], (32, 2, 2), "fc"),
    (Backbone, 32, ["features.1", "features.3", "features.4"], (8, 4, 4), "classifier.1"),
    (Transformer, 32, ["encoder.layers.0", "encoder.layers.1", "encoder.layers.2"], (16, 8), "head"),
    (Mixer, 16, ["blocks.0", "blocks.1"], (16, 8), "head"),
    (vgg, 16, ["2", "7"], (8, 8, 8), "13"),
    (mlp, 4, ["2", "5"], (8,), "6"),
]


@pytest.mark.parametrize(("make", "size", "stages", "last", "head"), CASES, ids=lambda v: getattr(v, "__name__", None))
def test_stages_and_head(make, size, stages, last, head):
    torch.manual_seed(0)
    model, x = make().train(), torch.randn(2, 3, size, size)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = anatomy(model, x)
    assert (found.stages, found.head) == (stages, head) and found.stage_shapes[-1] == (2, *last)
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    said = Reader(model.eval(), ["stages", "embedding"], anatomy=found)(x)
    assert [tuple(s.shape) for s in said.stages] == found.stage_shapes
    torch.testing.assert_close(model.get_submodule(head)(said.embedding), Reader(model, ["logits"])(x).logits)


def test_rows_come_in_call_order_with_shapes():
    found = anatomy(mlp(), torch.randn(2, 3, 4, 4))
    assert [row.path for row in found.modules] == list("0123456")
    assert found.modules[1] == ("1", "Linear", [(2, 48)], [(2, 12)], 48 * 12 + 12)
    assert found.embedding == "6" and found.embedding_shape == (2, 8) and found.attention == []


def test_attention_modules_are_found_once():
    found = anatomy(Transformer(), torch.randn(2, 3, 32, 32))
    assert found.attention == [f"encoder.layers.{i}.self_attn" for i in range(3)]


class Attention(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.qkv, self.soft, self.fused = nn.Linear(8, 24), nn.Softmax(-1), fused

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            y = self.soft(q @ k.mT / 2) @ v
        return y.transpose(1, 2).flatten(2)


def test_attention_maps_inside_a_module_of_ones_own():
    x = torch.randn(2, 4, 8)
    model = nn.Sequential(Attention(False), Attention(False))
    assert anatomy(model, x).attention == ["0.soft", "1.soft"]
    said = Reader(model, ["attention"])(x)
    q, k, _ = model[0].qkv(x).view(2, 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
    assert len(said.attention) == 2 and torch.equal(said.attention[0], (q @ k.mT / 2).softmax(-1))
    fused = nn.Sequential(Attention(True))
    assert anatomy(fused, x).attention == ["0"]
    with pytest.raises(UserError, match=r"'0' \(Attention\) does not return its maps"):
        Reader(fused, ["attention"])(x)


def test_random_state_is_kept():
    model = mlp()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    anatomy(model, torch.zeros(2, 3, 4, 4))
    assert torch.equal(torch.rand(1), expected)


def test_inspect_pairs_by_depth_and_resolution():
    x = torch.randn(2, 3, 64, 64)
    found = inspect(ResNet(8, 2), x, ResNet(4, 1))
    stages = [pair for pair in found.pairs if pair.signal == "stages"]
    assert [(p.teacher, p.student) for p in stages] == [(f"layer{i}", f"layer{i}") for i in range(1, 5)]
    assert all(p.bridge for p in found.pairs) and stages[0].teacher_shape == (2, 8, 16, 16)
    assert found.pairs[-1][:2] == ("embedding", "fc") and found.rows[0].path == "conv1"
    assert not any(p.bridge for p in inspect(ResNet(), x, ResNet()).pairs)
    mixed = [p for p in inspect(ResNet(), x, Backbone()).pairs if p.signal == "stages"]
    assert [p.teacher for p in mixed] == ["layer1", "layer2", "layer3"]
    fewer = [p for p in inspect(mlp(), torch.randn(2, 3, 4, 4), Transformer(), x).pairs if p.signal == "stages"]
    assert [p.teacher for p in fewer] == sorted(p.teacher for p in fewer) and len(fewer) == 3


def hf():
    return pytest.importorskip("transformers")


def test_hugging_face_vit():
    t = hf()
    config = t.ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8)
    model, x = t.ViTForImageClassification(config).eval(), {"pixel_values": torch.randn(2, 3, 16, 16)}
    found = anatomy(model, x)
    assert found.hugging_face and found.stages == ["hidden_states[1]", "hidden_states[2]"] and found.head == "classifier"
    model.set_attn_implementation("sdpa")
    with pytest.raises(UserError, match="sdpa"):
        Reader(model, ["attention"], anatomy=found)(x)
    model.set_attn_implementation("eager")
    said = Reader(model, ["attention", "stages[1]", "embedding", "logits"], anatomy=found)(x)
    assert [a.shape for a in said.attention] == [(2, 2, 5, 5)] * 2
    reference = model(**x, output_hidden_states=True)
    assert said.stages[0] is None and torch.equal(said.stages[1], reference.hidden_states[2])
    assert torch.equal(model.classifier(said.embedding), reference.logits)


def test_hugging_face_bert_and_resnet():
    t = hf()
    config = t.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    bert, ids = t.BertForSequenceClassification(config).eval(), {"input_ids": torch.arange(14).view(2, 7)}
    found = anatomy(bert, ids)
    assert found.head == "classifier" and found.stage_shapes == [(2, 7, 8)] * 2
    assert Reader(bert, ["embedding"], stop_early=True)(ids).output is None
    headless = anatomy(t.BertModel(config), ids)
    assert headless.head is None and len(headless.stages) == 2
    config = t.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic")
    found = anatomy(t.ResNetForImageClassification(config), torch.randn(2, 3, 32, 32))
    assert len(found.stages) == 4 and found.stage_shapes[-1] == (2, 8, 1, 1) and found.head == "classifier.1"
