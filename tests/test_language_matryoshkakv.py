"""Rotated, cut keys and values: Cayley transforms, principal directions, attention against formulas, the cache, the rank search."""

import copy

import numpy as np
import pytest
import torch

from limbeck.data.batch import Batch
from limbeck.decoding import generate
from limbeck.errors import UserError
from limbeck.knowledge.rank_search import collect, random_ranks, search_ranks, start_at_random, start_from_data
from limbeck.zoo import Tokens, build, load_model, save_model
from limbeck.zoo.rotated_decoder import RotatedDecoder, cache_bytes
from limbeck.zoo.rotation import Moments, Rotation, cayley, inverse_cayley

TOKENS = Tokens(61, 64, "causal-lm", 0, 1, 2)


def llama(kv=2, **config):
    torch.manual_seed(3)
    model = build("llama", tokens=TOKENS, layers=2, width=32, heads=4, num_key_value_heads=kv, **config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4)  # attention that is far from uniform
    return model


def rotated(model, seed=0):
    torch.manual_seed(seed)
    wrapped = RotatedDecoder(copy.deepcopy(model)).eval()
    for rotation in wrapped.rotations():
        rotation.free.data.normal_()
        rotation.key_mean.normal_()
        rotation.value_mean.data.normal_()
    return wrapped


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 61, (3, 14), generator=torch.Generator().manual_seed(1))


def orthogonal(d, sign, seed):
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]
    if np.linalg.det(q) * sign < 0:
        q[:, 0] = -q[:, 0]
    return torch.tensor(q)


def test_cayley_is_orthogonal_and_is_its_formula():
    x = torch.randn(5, 2, 16, 16, generator=torch.Generator().manual_seed(0)) * 3
    u = cayley(x)
    assert u.dtype is torch.float32
    assert (u.mT @ u - torch.eye(16)).abs().max() < 2e-6
    wide = cayley(x.double())
    assert (wide.mT @ wide - torch.eye(16)).abs().max() < 1e-12
    a = (x.double() - x.double().mT).numpy()
    eye = np.eye(16)
    np.testing.assert_allclose(wide.numpy(), np.linalg.inv(eye - a / 2) @ (eye + a / 2), atol=1e-9)
    assert cayley(x.half()).dtype is torch.float32
    assert torch.equal(cayley(torch.zeros(4, 4)), torch.eye(4))


@pytest.mark.parametrize("sign", [1, -1])
def test_inverse_cayley_comes_back(sign):
    u = torch.stack([orthogonal(12, sign, seed) for seed in range(20)])
    x, signs = inverse_cayley(u)
    assert torch.equal(x, x.tril(-1)) and set(signs.unique().tolist()) <= {-1.0, 1.0}
    assert (cayley(x) - u * signs.unsqueeze(1)).abs().max() < 1e-8
    assert x.abs().max() < 1e3


def test_inverse_cayley_of_reflections_and_of_the_identity():
    """Eigenvalues of -1 make I + U singular: the plain inverse map has no value here."""
    for diagonal in ([1, 1, 1, 1], [-1, 1, 1, 1], [-1, -1, 1, 1], [-1, -1, -1, -1]):
        u = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        x, signs = inverse_cayley(u)
        assert torch.allclose(cayley(x), u * signs, atol=1e-12)
        assert torch.equal(x, torch.zeros(4, 4, dtype=torch.float64))
    swap = torch.eye(4, dtype=torch.float64)[[1, 0, 3, 2]]
    x, signs = inverse_cayley(swap)
    assert torch.allclose(cayley(x), swap * signs, atol=1e-12)
    with pytest.raises(UserError, match="orthonormal"):
        inverse_cayley(torch.ones(3, 3))


def test_moments_and_principal_directions_against_numpy():
    g = torch.Generator().manual_seed(2)
    mix = torch.randn(3, 6, 6, generator=g)
    keys = (torch.randn(4, 3, 9, 6, generator=g) @ mix) + 2
    values = (torch.randn(4, 3, 9, 6, generator=g) @ mix.flip(0)) - 1
    keep = torch.rand(4, 9, generator=g) < 0.7
    moments = Moments(3, 6, torch.device("cpu"))
    moments.keep = keep
    moments.add(keys, values)
    means, bases, spread = moments.principal()
    plain_means, plain_bases, _ = moments.principal(centred=False)
    for kind, x in enumerate((keys, values)):
        for head in range(3):
            rows = x[:, head][keep].double().numpy()
            np.testing.assert_allclose(means[kind, head], rows.mean(0), atol=1e-6)
            expected, vectors = np.linalg.eigh(np.cov(rows.T, bias=True))
            np.testing.assert_allclose(spread[kind, head], expected[::-1], rtol=1e-5)
            for j in range(6):
                assert abs(bases[kind, head, :, j].numpy() @ vectors[:, 5 - j]) == pytest.approx(1, abs=1e-5)
            top = np.linalg.eigh(rows.T @ rows / len(rows))[1][:, -1]
            assert abs(plain_bases[kind, head, :, 0].numpy() @ top) == pytest.approx(1, abs=1e-5)
    assert not plain_means.any()


@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("attention", [None, "eager"])
def test_full_rank_is_the_model_itself(ids, kv, attention):
    model = llama(kv, **({"attn_implementation": attention} if attention else {}))
    mask = torch.ones_like(ids)
    mask[0, 10:] = 0
    with torch.no_grad():
        meant = model(input_ids=ids, attention_mask=mask).logits
        said = rotated(model)(input_ids=ids, attention_mask=mask).logits
        assert (said - meant)[mask.bool()].abs().max() < 1e-5 * meant.abs().max().clamp_min(1) * 10
        cut = rotated(model)
        cut.set_ranks(2)
        assert (cut(input_ids=ids, attention_mask=mask).logits - meant).abs().max() > 0.05


def by_hand(attention, rotation, hidden, ranks, with_mean_term=True):
    """One layer's attention as the paper writes it: loops over heads, matrices that are cut for good, rotary embedding of the model."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    d, groups, length = attention.head_dim, attention.num_key_value_groups, hidden.shape[1]
    q, k, v = (getattr(attention, name)(hidden).unflatten(-1, (-1, d)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
    cos, sin = LlamaRotaryEmbedding(attention.config)(hidden, torch.arange(length).unsqueeze(0))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    u = cayley(rotation.free)
    heads = []
    for head in range(q.shape[1]):
        h = head // groups
        rk, rv = int(ranks[0, h]), int(ranks[1, h])
        uk, uv = u[0, h][:, :rk], u[1, h][:, :rv]
        stored_k = (k[:, h] - rotation.key_mean[h]) @ uk
        stored_v = (v[:, h] - rotation.value_mean[h]) @ uv
        scores = (q[:, head] @ uk) @ stored_k.mT
        if with_mean_term:
            scores = scores + (q[:, head] @ rotation.key_mean[h]).unsqueeze(-1)
        scores = (scores / d**0.5).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ stored_v @ uv.T + rotation.value_mean[h])
    return attention.o_proj(torch.cat(heads, -1))


@pytest.mark.parametrize("with_mean_term", [True, False])
def test_cut_ranks_are_truncated_matrices(ids, with_mean_term):
    """Also: the term q . m_k changes nothing, because it is the same for all keys of a query."""
    wrapped = rotated(llama(2))
    ranks = torch.tensor([[[3, 8], [5, 1]], [[2, 2], [8, 4]]])
    wrapped.set_ranks(ranks)
    layer = wrapped.base.model.layers[1].self_attn
    seen = {}
    layer.register_forward_pre_hook(lambda m, args, kw: seen.update(hidden=kw["hidden_states"]), with_kwargs=True)
    layer.register_forward_hook(lambda m, args, out: seen.update(out=out[0]))
    with torch.no_grad():
        wrapped(input_ids=ids)
        expected = by_hand(layer, layer.rotation, seen["hidden"], ranks[1], with_mean_term)
    assert (seen["out"] - expected).abs().max() < 1e-4 * expected.abs().max()


def test_key_means_get_no_gradient_and_value_means_do(ids):
    wrapped = rotated(llama(2))
    wrapped.set_ranks(4)
    for rotation in wrapped.rotations():
        rotation.key_mean.requires_grad_()
    wrapped(input_ids=ids).logits.logsumexp(-1).mean().backward()
    for rotation in wrapped.rotations():
        assert rotation.key_mean.grad.abs().max() < 1e-5 * rotation.value_mean.grad.abs().max()
        assert rotation.free.grad[0].abs().max() > 0 and rotation.free.grad[1].abs().max() > 0


@pytest.mark.parametrize("kv", [4, 2])
def test_cached_decoding_equals_uncached_and_stores_only_what_is_kept(ids, kv):
    wrapped = rotated(llama(kv))
    g = torch.Generator().manual_seed(5)
    wrapped.set_ranks(torch.randint(1, 9, (2, 2, kv), generator=g))
    with torch.no_grad():
        whole = wrapped(input_ids=ids, use_cache=False).logits
        out = wrapped(input_ids=ids[:, :6], use_cache=True)
        cache, parts = out.past_key_values, [out.logits]
        for place in range(6, ids.shape[1]):
            parts.append(wrapped(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True).logits)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-4 * whole.abs().max()
    assert cache.get_seq_length() == ids.shape[1]
    assert cache_bytes(cache) == int(wrapped.ranks.sum()) * ids.numel() * 4
    for layer, ranks in zip(cache.layers, wrapped.ranks):
        assert layer.keys.shape == (3, 1, 14, ranks[0].sum()) and layer.values.shape == (3, 1, 14, ranks[1].sum())
        assert layer.keys.untyped_storage().nbytes() == layer.keys.numel() * 4


def test_tokens_at_full_rank_are_those_of_the_model(ids):
    model = llama(2)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    meant = generate(model, ids, mask, new_tokens=12, temperature=0)
    wrapped = rotated(model)
    assert torch.equal(generate(wrapped, ids, mask, new_tokens=12, temperature=0).ids, meant.ids)
    full = cache_bytes(model(input_ids=ids, use_cache=True).past_key_values)
    assert cache_bytes(wrapped(input_ids=ids, use_cache=True).past_key_values) == full
    wrapped.set_ranks(2)
    assert cache_bytes(wrapped(input_ids=ids, use_cache=True).past_key_values) * 4 == full


def test_another_models_cache_holds_whole_keys(ids):
    """Speculative decoding brings a cache of its own, which can be taken back."""
    from transformers import DynamicCache

    wrapped = rotated(llama(2))
    wrapped.set_ranks(3)
    with torch.no_grad():
        whole = wrapped(input_ids=ids, use_cache=False).logits
        cache = DynamicCache(config=wrapped.config)
        first = wrapped(input_ids=ids[:, :9], past_key_values=cache, use_cache=True).logits
        rest = wrapped(input_ids=ids[:, 9:], past_key_values=cache, use_cache=True).logits
    assert (torch.cat([first, rest], 1) - whole).abs().max() < 1e-4 * whole.abs().max()


def test_matrices_are_made_again_when_parameters_change():
    rotation = Rotation(2, 4)
    with torch.no_grad():
        before = rotation.matrices()
        assert rotation.matrices() is before
        rotation.free.normal_()
        assert not torch.equal(rotation.matrices(), before)
        assert torch.equal(rotation.matrices(), cayley(rotation.free))
    rotation.load_state_dict({**rotation.state_dict(), "free": torch.ones(2, 2, 4, 4).tril(-1)})
    with torch.no_grad():
        assert torch.equal(rotation.matrices(), cayley(rotation.free))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_saved_and_opened_again(ids, tmp_path, kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=61, max_position_embeddings=64, **sizes)).eval()
    with torch.no_grad():
        meant = base(input_ids=ids).logits
        wrapped = rotated(base)
        assert (wrapped(input_ids=ids).logits - meant).abs().max() < 1e-5
        wrapped.set_ranks(torch.tensor([[[3, 8], [5, 1]], [[2, 2], [8, 4]]]))
        save_model(wrapped, tmp_path)
        again = load_model(tmp_path).eval()
        assert type(again) is RotatedDecoder and type(again.base) is type(base)
        assert torch.equal(again.ranks, wrapped.ranks)
        assert torch.equal(again(input_ids=ids).logits, wrapped(input_ids=ids).logits)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_other_architectures_are_told_what_is_missing(name):
    kind = {"gpt2": "causal-lm", "t5": "seq2seq", "bert": "classification"}[name]
    model = build(name, tokens=Tokens(61, 64, kind, 0, 1, 2, 2 if kind == "classification" else None), layers=1, width=16, heads=2)
    with pytest.raises(UserError, match="q_proj, k_proj, v_proj, o_proj"):
        RotatedDecoder(model)


def test_ranks_out_of_range():
    wrapped = rotated(llama(2))
    for wrong in (0, 9):
        with pytest.raises(UserError, match="ranks from"):
            wrapped.set_ranks(wrong)
    with pytest.raises(ZeroDivisionError), wrapped.at(3):
        assert wrapped.ranks.unique().tolist() == [3]
        raise ZeroDivisionError
    assert wrapped.ranks.unique().tolist() == [8]


def test_start_from_data_spans_the_leading_directions(ids):
    """The first coordinates hold the most energy of real keys, padding left out; full rank stays the model."""
    model = llama(2)
    wrapped = RotatedDecoder(copy.deepcopy(model)).eval()
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    batches = [Batch({"input_ids": ids, "attention_mask": mask}, None)]
    start_from_data(wrapped, batches)
    assert (wrapped(input_ids=ids).logits - model(input_ids=ids).logits).abs().max() < 1e-4
    for rotation, moments in zip(wrapped.rotations(), collect(wrapped, batches)):
        assert int(moments.count) == int(mask.sum())
        means, _, values = moments.principal()
        covariance = moments.outer / moments.count - means.unsqueeze(-1) * means.unsqueeze(-2)
        u = cayley(rotation.free).double().detach()
        turned = u.mT @ covariance @ u
        assert torch.allclose(turned.diagonal(dim1=-2, dim2=-1), values, atol=1e-4 * values.max())
        assert (turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-4 * values.max()
        assert torch.allclose(rotation.key_mean.double(), means[0], atol=1e-5)


def test_random_start_and_random_ranks():
    wrapped = RotatedDecoder(llama(2))
    torch.manual_seed(0)
    start_at_random(wrapped)
    a, b = (r.free for r in wrapped.rotations())
    assert not torch.equal(a, b) and not torch.equal(a[0], a[1])
    ranks = random_ranks(50, 4, 32, 8)
    assert ranks.shape == (50, 2, 4) and ranks.unique().tolist() == [4, 8, 12, 16, 20, 24, 28, 32]
    assert abs(float(ranks.double().mean()) - 18) < 2
    assert random_ranks(3, 2, 4, 8).min() >= 1


def test_greedy_search_by_brute_force():
    """A quadratic toy: hidden states are weights times ranks, so the cheapest entries are known."""
    weight = torch.tensor([1.0, 50.0, 2.0, 40.0, 3.0, 60.0, 4.0, 70.0])
    tried = []

    def hidden(ranks):
        tried.append(ranks.flatten().tolist())
        return 1000 + weight * ranks.flatten()

    start = torch.full((2, 2, 2), 8)
    found = search_ranks(hidden, start, 6.0, 2, 2, 0.5)
    assert start.unique().tolist() == [8]
    # four cheapest entries fall together: 8, 6, 4 (mean 6 is reached after two rounds of four)
    assert found.flatten().tolist() == [4, 8, 4, 8, 4, 8, 4, 8]
    assert all(max(row) <= 8 and min(row) >= 2 for row in tried)
    assert float(found.double().mean()) <= 6.0


@pytest.mark.parametrize("mean", [7.0, 5.5, 3.1, 2.0])
def test_search_is_within_budget_and_no_further_than_needed(mean):
    g = torch.Generator().manual_seed(0)
    weight = torch.rand(12, generator=g)
    found = search_ranks(lambda r: weight * r.flatten().double(), torch.full((3, 2, 2), 8), mean, 2, 2, 0.4)
    assert mean - 2 / 12 < float(found.double().mean()) <= mean
    assert found.min() >= 2
    smaller = search_ranks(lambda r: weight * r.flatten().double(), found, 2.0, 2, 2, 0.4)
    assert bool((smaller <= found).all())
    with pytest.raises(UserError, match="mean rank"):
        search_ranks(lambda r: r.double(), torch.full((1, 2, 2), 8), 1.5, 2, 2, 0.5)


def test_the_method_on_a_recipe(tmp_path, monkeypatch):
    """Training lowers the loss at cut ranks, the student is checked to be the teacher, figures are those of the cache in memory."""
    from limbeck import recipe as schema
    from limbeck.engine.session import Session
    from limbeck.knowledge import job
    from tests.conftest import TINY_TEXT

    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path))
    raw = copy.deepcopy(TINY_TEXT)
    raw |= {"method": {"id": "matryoshkakv", "samples": 16, "search_step": 0.25}, "student": "teacher", "baseline": False}
    raw["data"] = {**raw["data"], "train": 96}
    out = job.run(schema.resolve(raw), Session(digest="t"), {})
    figures, teacher = out.summary["metrics"]["student"], out.summary["metrics"]["teacher"]
    assert figures["nll@rank16"] == pytest.approx(teacher["nll"], abs=1e-4)
    assert figures["nll@searched"] == figures["nll"] and figures["mean_rank"] == 8
    assert figures["kv_bytes_per_token_full"] == 2 * 32 * 4 and figures["kv_bytes_per_token"] == 32 * 4
    assert {"nll@rank12", "nll@rank8", "nll@rank4"} <= set(figures)
    artifact = next(iter(out.artifacts.values()))
    student = artifact.network
    assert not any(p.requires_grad for n, p in student.named_parameters() if "rotation" not in n)
    artifact.save(tmp_path / "student")
    again = load_model(tmp_path / "student").eval()
    tokens = torch.randint(3, 300, (2, 9))
    assert torch.equal(again(input_ids=tokens).logits, student(input_ids=tokens).logits) and again.ranks.double().mean() == 8
    with pytest.raises(UserError, match="other weights"):
        job.run(schema.resolve({**raw, "student": TINY_TEXT["teacher"]["model"]}), Session(digest="t"), {})
