"""Models of transformers, from tiny configurations saved on the spot."""

import json

import pytest
import torch

from limbeck.errors import UserError
from limbeck.zoo import build, load_model, read_note, save_model
from limbeck.zoo.files import signed

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)


def tiny(kind):
    if kind == "vit":
        config = transformers.ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4, num_labels=3
        )
        return transformers.ViTForImageClassification(config), {"pixel_values": torch.rand(2, 3, 8, 8)}
    if kind == "resnet":
        config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
        return transformers.ResNetForImageClassification(config), {"pixel_values": torch.rand(2, 3, 16, 16)}
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config), {"input_ids": torch.randint(0, 20, (2, 5))}


@pytest.mark.parametrize("kind", ["vit", "resnet", "bert"])
def test_open_use_and_save(kind, tmp_path):
    model, inputs = tiny(kind)
    model.eval().save_pretrained(tmp_path / "theirs")
    opened = build(f"hf:{tmp_path / 'theirs'}", classes=3)
    assert type(opened) is type(model) and opened.training
    expected = model(**inputs).logits
    assert torch.equal(opened.eval()(**inputs).logits, expected)
    folder = save_model(opened, tmp_path / "ours", card="card")
    assert torch.equal(load_model(folder).eval()(**inputs).logits, expected), "through limbeck"
    assert torch.equal(type(model).from_pretrained(folder).eval()(**inputs).logits, expected), "without limbeck"
    assert read_note(folder)["class"].endswith(type(model).__name__) and (folder / "README.md").read_text() == "card"
    assert torch.equal(load_model(tmp_path / "theirs").eval()(**inputs).logits, expected)


def test_random_weights_new_heads_and_overrides(tmp_path):
    model, inputs = tiny("vit")
    model.save_pretrained(tmp_path)
    ref = f"hf:{tmp_path}"
    fresh = build(ref, classes=5, config_only=True, hidden_size=16)
    assert fresh(**inputs).logits.shape == (2, 5) and fresh.config.hidden_size == 16
    with pytest.raises(UserError, match=r"3 classes, but the data has 5.*new_head"):
        build(ref, classes=5)
    headed = build(ref, classes=5, new_head=True)
    assert headed(**inputs).logits.shape == (2, 5)
    name = "vit.embeddings.cls_token"
    assert torch.equal(headed.get_parameter(name), model.get_parameter(name))
    with pytest.raises(UserError, match=r"no entry 'hidden_sise'.*'hidden_size'"):
        build(ref, config_only=True, hidden_sise=16)


def test_mistakes(tmp_path):
    model, _ = tiny("bert")
    with pytest.raises(UserError, match="no folder"):
        build(f"hf:{tmp_path / 'nowhere'}")
    (tmp_path / "junk").mkdir()
    with pytest.raises(UserError, match="can be opened"):
        build(f"hf:{tmp_path / 'junk'}")
    (tmp_path / "pickled").mkdir()
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors only"):
        build(f"hf:{tmp_path / 'pickled'}")
    folder = save_model(model, tmp_path / "ours")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UserError, match="torn or was altered"):
        load_model(folder)
    note = json.loads((folder / "limbeck.json").read_text())
    (folder / "limbeck.json").write_text(json.dumps(signed({**note, "files": {}})))
    with pytest.raises(UserError, match="cannot be read"):
        load_model(folder)
