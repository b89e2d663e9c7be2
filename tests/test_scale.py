"""The arithmetic of large runs: what docs/scale.md says is what the formulas give, and `limbeck plan` fills them with measured sizes."""

import doctest
import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from limbeck.evaluation import at_scale
from limbeck.evaluation.at_scale import Decoder, on_a_card, passes_until_storing_pays, topk_bytes
from limbeck.signals.stored_form import Layout


def test_what_the_page_says_is_what_the_formulas_give():
    page = Path(__file__).parent.parent / "docs" / "scale.md"
    found = doctest.testfile(str(page), module_relative=False)
    assert found.failed == 0 and found.attempted > 12
    assert doctest.testmod(at_scale).failed == 0


@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_and_flops_are_those_of_a_real_decoder(kv_heads, tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    from limbeck.evaluation.cost import count_flops

    sizes = Decoder(3, 64, 4, 96, 500, kv_heads=kv_heads, tied=tied)
    config = LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv_heads or 4, tie_word_embeddings=tied, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert sum(p.numel() for p in model.parameters()) - norms == sizes.params
    length = 40
    counted = count_flops(model, {"input_ids": torch.zeros(1, length, dtype=torch.long)})
    # eager attention multiplies the whole square, of which a causal model needs half: 2 L n d more for each token
    expected = length * (sizes.forward_flops(length) + 2.0 * sizes.layers * length * sizes.width)
    assert counted == pytest.approx(expected, rel=1e-3)


def test_stored_bytes_are_those_of_the_store():
    for k, vocabulary in ((64, 32000), (64, 151936), (1, 32768), (8, 32769)):
        assert topk_bytes(k, vocabulary) == Layout({"logits": (vocabulary,)}, "topk", k).bytes_per_sample


def test_storing_and_asking_live_cost_the_same_where_the_lines_cross():
    f_t, f_s, rate, size, disk = 7.0, 2.0, 3.0, 5.0, 1.5
    passes = passes_until_storing_pays(f_t, f_s, rate, size, disk)
    live, stored = (f_t + 3 * f_s) / rate, max(3 * f_s / rate, size / disk)
    assert math.isclose(passes * live, f_t / rate + passes * stored)
    assert passes_until_storing_pays(f_t, f_s, rate, size, disk / 100) == math.inf


def test_shards_share_everything_but_activations():
    assert on_a_card(10, 0, 5) == 165 and on_a_card(10, 0, 5, 4) == 165
    assert on_a_card(10, 0, 5, 4, True) == 45
    assert on_a_card(10, 8, 5, 4, True, frozen_bytes=2, optimiser=4) == 10 * 12 / 4 + 16 / 4 + 5


def test_plan_tells_what_each_card_holds_and_when_storing_pays(tiny, tmp_path, limbeck):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    done = limbeck("plan", tmp_path / "tiny.yaml", "--processes", "1, 4", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    scale, sizes = found["scale"], found["models"]
    f_t, f_s = sizes["teacher"]["flops"], sizes["student"]["flops"]
    assert scale["teacher_share"] == pytest.approx(f_t / (f_t + 3 * f_s))
    assert scale["passes"] == pytest.approx(40 * 32 / 300)
    phase = next(phase for phase in found["phases"] if phase["name"] == scale["phase"])
    one, four = scale["cards"]
    assert one["ddp"] == one["fsdp"] == sum(phase["memory"].values()) == found["memory"]
    state = one["ddp"] - phase["memory"]["activations"]
    assert four["ddp"] == pytest.approx(state + phase["memory"]["activations"] / 4, abs=1)
    assert phase["gathered"] > 0
    assert four["fsdp"] == pytest.approx(state / 4 + phase["memory"]["activations"] / 4 + phase["gathered"], abs=1)
    student = next(phase for phase in found["phases"] if phase["name"] == "student")
    assert scale["read_bytes_a_second"]["float16"] == pytest.approx(20 * 32 / (student["step_ms"] / 1e3))
    said = limbeck("plan", tmp_path / "tiny.yaml", "--processes", "0")
    assert said.returncode == 2 and "whole numbers" in said.stderr
