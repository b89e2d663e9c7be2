"""Softmax attention to linear attention to Mamba blocks: the scan, the exact embedding, what learns, saving, writing, the whole job."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

import limbeck
from limbeck.errors import UserError
from limbeck.structure.attention_to_mamba import FeatureMaps, heard
from limbeck.zoo import Tokens, build, load_model, save_model
from limbeck.zoo.linear_attention import FeatureMap, check_convertible, linear_attention, rotate
from limbeck.zoo.recurrent_decoder import MambaMixer, RecurrentDecoder
from limbeck.zoo.selective_scan import selective_scan
from tests.conftest import TINY_TEXT

SIZES = {"layers": 2, "width": 16, "heads": 4, "num_key_value_heads": 2}


def llama(seed=0, **changes):
    torch.manual_seed(seed)
    made = build("llama", tokens=Tokens(64, 64, pad=0), **{**SIZES, **changes}).eval()
    for parameter in made.parameters():
        parameter.data.mul_(4) if parameter.ndim > 1 else None
    return made


def ids(length=40, count=3):
    return torch.randint(1, 64, (count, length), generator=torch.Generator().manual_seed(length))


def lived_in(model, seed=5):
    """Mixers whose every part has moved away from where it begins."""
    generator = torch.Generator().manual_seed(seed)
    for mixer in model.mixers:
        for name, parameter in mixer.named_parameters():
            scale = 2.0 if name == "log_decay" else 0.3
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
        if isinstance(mixer, MambaMixer):
            mixer.log_decay.data += 14  # decays that matter
    return model


# ---- the parts ----


def test_feature_map():
    """softmax over features of [W x + b; -(W x + b)], for each head; here written for one head at a time."""
    torch.manual_seed(0)
    phi = FeatureMap(3, 4)
    phi.weight.data += torch.randn(3, 4, 4)
    phi.bias.data += torch.randn(3, 4)
    x = torch.randn(2, 5, 3, 4)
    for head in range(3):
        z = x[:, :, head] @ phi.weight[head].T + phi.bias[head]
        expected = torch.exp(torch.cat([z, -z], -1))
        assert torch.allclose(phi(x)[:, :, head], expected / expected.sum(-1, keepdim=True), atol=1e-6)
    assert torch.allclose(FeatureMap(1, 4)(x[:, :, :1]), torch.cat([x, -x], -1)[:, :, :1].softmax(-1))


def random_inputs(length, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(2, length, *shape, generator=generator, dtype=torch.float64)

    return draw(3, 5), draw(3, 4).abs(), draw(3, 2, 4).abs(), draw(3).abs(), -draw(3, 4)[0, 0].abs()


@pytest.mark.parametrize("length,chunk", [(1, 16), (16, 16), (37, 16), (37, 5), (12, 100)])
def test_scan_is_the_recurrence(length, chunk):
    """h_t = exp(dt a) h + dt b u^T, y = h^T c, one place at a time; also when it goes on from a state."""
    u, b, c, dt, a = random_inputs(length)
    h = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    y = torch.zeros(2, length, 3, 2, 5, dtype=torch.float64)
    for t in range(length):
        for g in range(3):
            kept = h[:, g] * torch.exp(dt[:, t, g, None] * a[g])[..., None]
            h[:, g] = kept + dt[:, t, g, None, None] * b[:, t, g, :, None] * u[:, t, g, None, :]
            for r in range(2):
                y[:, t, g, r] = torch.einsum("zn,znp->zp", c[:, t, g, r], h[:, g])
    got, state = selective_scan(u, b, c, dt, a, chunk=chunk)
    assert torch.allclose(got, y, atol=1e-10) and torch.allclose(state, h, atol=1e-10)
    if length > 2:
        half = length // 2
        first, middle = selective_scan(*(x[:, :half] for x in (u, b, c, dt)), a, chunk=chunk)
        second, last = selective_scan(*(x[:, half:] for x in (u, b, c, dt)), a, middle, chunk=chunk)
        assert torch.allclose(torch.cat([first, second], 1), y, atol=1e-10) and torch.allclose(last, h, atol=1e-10)


def test_scan_without_decay_is_the_quadratic_form():
    u, b, c, dt, a = random_inputs(29)
    ones = torch.ones_like(u[..., :1])
    y, _ = selective_scan(torch.cat([u, ones], -1), b, c, torch.ones_like(dt), torch.zeros_like(a))
    expected = linear_attention(c, b, u)
    assert torch.allclose(y[..., :-1] / y[..., -1:], expected, atol=1e-5)
    for t in (0, 7, 28):  # the quadratic form itself
        weights = torch.einsum("zgrn,zsgn->zgrs", c[:, t], b[:, : t + 1])
        by_hand = torch.einsum("zgrs,zsgp->zgrp", weights, u[:, : t + 1]) / weights.sum(-1, keepdim=True)
        assert torch.allclose(expected[:, t], by_hand, atol=1e-5)


def test_strong_decays_do_not_overflow():
    u, b, c, dt, a = random_inputs(40)
    y, h = selective_scan(u.float(), b.float(), c.float(), 50 * dt.float(), 20 * a.float())
    assert torch.isfinite(y).all() and torch.isfinite(h).all()


def test_rotation_is_that_of_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = torch.randn(2, 7, 4, 8), torch.randn(2, 7, 2, 8)
    cos, sin = torch.randn(2, 7, 8), torch.randn(2, 7, 8)
    expected = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    assert torch.allclose(rotate(q, cos, sin), expected[0].transpose(1, 2)) and torch.allclose(
        rotate(k, cos, sin), expected[1].transpose(1, 2)
    )


# ---- the models ----


def test_mamba_begins_as_linear_attention():
    """Max difference of logits below 1e-4, with padding too; a block that has trained says something else."""
    linear = lived_in(RecurrentDecoder(llama(), "linear"))
    mamba = copy.deepcopy(linear).to_mamba()
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[0, 25:], mask[1, :9] = 0, 0
    for attention_mask in (None, mask):
        a, b = (m(input_ids=ids(), attention_mask=attention_mask).logits for m in (linear, mamba))
        keep = torch.ones(3, 40, dtype=torch.bool) if attention_mask is None else mask.bool()
        assert (a - b)[keep].abs().max() < 1e-4
        assert a.abs().max() > 1
    assert (lived_in(mamba)(input_ids=ids()).logits - a).abs().max() > 1e-2


def test_mixer_by_hand():
    """One Mamba block with everything moved, place by place in plain loops."""
    model = lived_in(RecurrentDecoder(llama(layers=1), "mamba"))
    mixer = model.mixers[0]
    x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(1))
    cos, sin = torch.randn(1, 6, 4), torch.randn(1, 6, 4)
    with torch.no_grad():
        got = mixer(x, (cos, sin))[0][0]
        past = torch.cat([torch.zeros(3, 16), x[0]])
        h, a = torch.zeros(2, 8, 5), -mixer.log_decay.exp()
        for t in range(6):
            z = (past[t : t + 4] * mixer.conv.weight[:, 0].T).sum(0) + mixer.conv.bias
            q, k, v = (p(z).view(-1, 4) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
            q, k = (rotate(y[None, None], cos[:, t : t + 1], sin[:, t : t + 1]) for y in (q, k))
            q, k = mixer.map_q(q)[0, 0], mixer.map_k(k)[0, 0]
            dt = F.softplus(mixer.step(z))
            said = []
            for g in range(2):
                u = torch.cat([v[g], torch.ones(1)])
                h[g] = torch.exp(dt[g] * a[g])[:, None] * h[g] + dt[g] * k[g][:, None] * u
                for head in (2 * g, 2 * g + 1):
                    y = q[head] @ h[g]
                    said.append(y[:4] / (y[4].abs() + 1e-6))
            out = mixer.o_proj(torch.cat(said) * F.silu(mixer.gate(x[0, t])))
            assert torch.allclose(got[t], out, atol=1e-5), t


def test_padding_changes_nothing():
    """Left or right of a text, for trained blocks: the text's logits are those of the text alone."""
    model = lived_in(RecurrentDecoder(llama(), "mamba"))
    text = ids(20, 1)
    alone = model(input_ids=text).logits
    rest = torch.full((1, 9), 7)
    ones, zeros = torch.ones(1, 20, dtype=torch.long), torch.zeros(1, 9, dtype=torch.long)
    out = model(input_ids=torch.cat([text, rest], 1), attention_mask=torch.cat([ones, zeros], 1), use_cache=True)
    right, state = out.logits[:, :20], model(input_ids=text, use_cache=True).past_key_values
    for padded, plain in zip(out.past_key_values.layers, state.layers, strict=True):
        assert torch.allclose(padded.h, plain.h, atol=1e-4)
    mask = torch.cat([zeros, ones], 1)
    left = model(input_ids=torch.cat([rest, text], 1), attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 9:]
    assert torch.allclose(right, alone, atol=1e-4) and torch.allclose(left, alone, atol=1e-4)


def test_later_tokens_are_not_seen():
    model = lived_in(RecurrentDecoder(llama(), "mamba"))
    other = ids().clone()
    other[:, 20:] = (other[:, 20:] + 1) % 64
    assert torch.equal(model(input_ids=other).logits[:, :20], model(input_ids=ids()).logits[:, :20])


def test_state_does_not_grow_and_goes_on():
    """Token by token with a state: the logits of the whole text; the state's size is the same after 5 and after 40 tokens."""
    model = lived_in(RecurrentDecoder(llama(), "mamba"))
    whole = model(input_ids=ids()).logits
    out = model(input_ids=ids()[:, :5], use_cache=True)
    sizes = [sum(s.h.numel() + s.tail.numel() for s in out.past_key_values.layers)]
    said = [out.logits]
    for t in range(5, 40):
        out = model(input_ids=ids()[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        said.append(out.logits)
    sizes.append(sum(s.h.numel() + s.tail.numel() for s in out.past_key_values.layers))
    assert torch.allclose(torch.cat(said, 1), whole, atol=1e-4)
    assert sizes[0] == sizes[1] == 2 * 3 * (2 * 8 * 5 + 3 * 16) and out.past_key_values.get_seq_length() == 40
    assert all(mixer.state is None and mixer.keep is None for mixer in model.mixers)


def test_writing():
    """`limbeck.decoding` writes with the state, from left-padded prompts, what greedy whole passes write."""
    from limbeck.decoding import generate

    model = lived_in(RecurrentDecoder(llama(), "mamba"))
    prompt = ids(6, 2)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, :3] = False
    made = generate(model, prompt, mask, new_tokens=5, temperature=0.0)
    for row, start in ((0, 0), (1, 3)):
        text = prompt[row, start:]
        for _ in range(5):
            text = torch.cat([text, model(input_ids=text[None]).logits[0, -1].argmax()[None]])
        assert made.ids[row].tolist() == text[-5:].tolist()


@pytest.mark.parametrize("mixer", ["linear", "mamba"])
def test_saving(mixer, tmp_path):
    model = lived_in(RecurrentDecoder(llama(), mixer, taps=3))
    save_model(model, tmp_path / "kept")
    again = load_model(tmp_path / "kept").eval()
    assert again.mixer == mixer and again.taps == 3
    assert torch.equal(again(input_ids=ids()).logits, model(input_ids=ids()).logits)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight  # tied, as in the teacher


# ---- what cannot be converted ----


@pytest.mark.parametrize(
    "name,args,what",
    [
        ("mixtral", {"sliding_window": 8}, "sliding window of 8"),
        ("gpt2", {}, "gpt2"),
        ("bert", {}, "bert"),
        ("t5", {}, "attends to later tokens"),
    ],
)
def test_refused_by_name(name, args, what):
    kind = {"t5": "seq2seq", "bert": "embedding"}.get(name, "causal-lm")
    model = build(name, tokens=Tokens(64, 16, kind, pad=0), layers=1, width=16, heads=2, **args)
    with pytest.raises(UserError, match=what) as error:
        check_convertible(getattr(model, "encoder", model))
    assert "llama" in error.value.hint


def test_refused_configurations():
    for change, what in [
        ({"attn_logit_softcapping": 50.0}, "caps its attention logits"),
        ({"layer_types": ["sliding_attention"]}, "sliding window"),
        ({"is_causal": False}, "later tokens"),
        ({"model_type": "strange"}, "strange"),
    ]:
        model = llama(layers=1)
        for key, value in change.items():
            object.__setattr__(model.config, key, value) if key != "model_type" else setattr(type(model.config), key, value)
        try:
            with pytest.raises(UserError, match=what):
                check_convertible(model)
        finally:
            type(model.config).model_type = "llama"
    with pytest.raises(UserError, match="mixer"):
        RecurrentDecoder(llama(layers=1), "rwkv")
    with pytest.raises(UserError, match="convolution over 0"):
        RecurrentDecoder(llama(layers=1), "mamba", taps=0)


# ---- what learns ----


def stage_one(mask=None):
    """(terms, linear model, softmax model) of one step of the feature maps' training."""
    softmax = llama()
    linear = RecurrentDecoder(copy.deepcopy(softmax), "linear").requires_grad_(False)
    for mixer in linear.mixers:
        mixer.map_q.requires_grad_(True)
        mixer.map_k.requires_grad_(True)
    inputs = {"input_ids": ids()} | ({} if mask is None else {"attention_mask": mask})
    batch = type("Batch", (), {"inputs": inputs})
    method = FeatureMaps()
    method.reference, method.read = softmax, lambda b: softmax(**b.inputs)
    return method.step(batch, type("Models", (), {"module": linear}), None), linear, softmax


def test_cosine_loss_by_hand_and_whom_it_reaches():
    """Mean over layers and tokens of 1 - cos of the layers' outputs, each fed with the softmax model's hidden states."""
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[2, 30:] = 0
    terms, linear, softmax = stage_one(mask)
    with heard(softmax) as layers, torch.no_grad():
        softmax(input_ids=ids(), attention_mask=mask)
    hidden = softmax(input_ids=ids(), attention_mask=mask, output_hidden_states=True).hidden_states
    total = 0.0
    for number, (mixer, layer) in enumerate(zip(linear.mixers, layers, strict=True)):
        assert torch.allclose(layer.x, softmax.model.layers[number].input_layernorm(hidden[number]), atol=1e-5)
        q, k, v = (p(layer.x).unflatten(-1, (-1, 4)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        q, k = mixer.map_q(rotate(q, *layer.positions)), mixer.map_k(rotate(k, *layer.positions))
        for b in range(3):
            for t in range(int(mask[b].sum())):
                said = []
                for head in range(4):
                    weights = k[b, : t + 1, head // 2] @ q[b, t, head]
                    said.append((weights[:, None] * v[b, : t + 1, head // 2]).sum(0) / weights.sum())
                own = mixer.o_proj(torch.cat(said))
                total += float(1 - torch.cosine_similarity(own, layer.y[b, t], dim=0).detach())
    assert terms["cosine"].item() == pytest.approx(total / (2 * int(mask.sum())), rel=5e-3)
    terms["cosine"].backward()
    reached = {name for name, p in linear.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == {name for name, _ in linear.named_parameters() if ".map_" in name} and len(reached) == 8
    assert all(p.grad is None for p in softmax.parameters())


RECIPE = {
    **TINY_TEXT,
    "teacher": {"model": "llama", "args": {"layers": 1, "width": 32, "heads": 2}, "train": {"steps": 20, "batch": 8, "lr": 0.01}},
    "student": {"model": "teacher"},
    "training": {"steps": 9, "batch": 8, "lr": 0.003},
    "baseline": False,
}


def test_the_whole_job(tmp_path):
    """Steps of stage 1 are `split` of all; embeddings stay, all else of the mixers learns; the folder opens."""
    done = limbeck.run_recipe({**RECIPE, "method": {"id": "hedge-mamba", "split": 0.4}}, out=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = {line["phase"]: line["step"] for line in lines if "phase" in line and "step" in line}
    terms = {line["phase"]: set(line["terms"]) for line in lines if line.get("terms")}
    assert steps["student-maps"] == 6 and steps["student"] == 9
    assert terms["student-maps"] == {"cosine"} and terms["student"] == {"ce"}
    student, teacher = load_model(tmp_path / "run" / "student"), done.summary["cost"]["teacher"]
    assert isinstance(student, RecurrentDecoder) and student.mixer == "mamba"
    mixer = student.mixers[0]
    assert mixer.conv.weight[:, 0, :-1].any() and mixer.gate.weight.any()
    assert mixer.step.weight.any() and done.summary["cost"]["student"]["params"] > teacher["params"]


def test_embeddings_stay_and_kd_is_optional(tmp_path):
    torch.manual_seed(0)
    recipe = {**RECIPE, "method": {"id": "naive-mamba", "kd": 0.5}, "training": {"steps": 3, "batch": 8, "lr": 0.01}}
    done = limbeck.run_recipe(recipe, out=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {t for line in lines if line.get("phase") == "student" and line.get("terms") for t in line["terms"]} == {"ce", "kl"}
    student = done.student
    again = limbeck.run_recipe({**recipe, "method": {"id": "naive-mamba"}}, out=tmp_path / "again").student
    assert torch.equal(student.get_input_embeddings().weight, again.get_input_embeddings().weight)  # both are the teacher's
    assert not torch.equal(student.mixers[0].q_proj.weight, again.mixers[0].q_proj.weight)
