"""Plain decoding against transformers' own, and what it refuses."""

import pytest
import torch

from limbeck.decoding import generate, sample
from limbeck.errors import UserError

transformers = pytest.importorskip("transformers")

PAD, EOS, V = 0, 1, 61


def llama(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, initializer_range=0.4, pad_token_id=PAD, bos_token_id=2, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | changes))).eval()


def gpt2(seed=0):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=40, initializer_range=0.4,
        bos_token_id=2, eos_token_id=None, pad_token_id=PAD,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def mistral(seed=0):
    torch.manual_seed(seed)
    config = transformers.MistralConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, sliding_window=6, initializer_range=0.4, pad_token_id=PAD, bos_token_id=2, eos_token_id=None,
    )  # fmt: skip
    return transformers.MistralForCausalLM(config).eval()


def t5(seed=0):
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, initializer_factor=3.0,
        decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=EOS,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.lm_head = torch.nn.Linear(16, V, bias=False)  # with the head tied to random embeddings it repeats one token
    return model


def prompts(rows=5, length=9, left=True, seed=0):
    draws = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (rows, length), generator=draws)
    lengths = torch.arange(rows) * 2 % length + 1
    mask = torch.arange(length) < lengths[:, None]
    mask = mask.flip(1) if left else mask
    return ids.masked_fill(~mask, PAD), mask


def theirs(model, ids, mask, new_tokens, eos):
    out = model.generate(
        input_ids=ids, attention_mask=mask.long(), max_new_tokens=new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=PAD
    )
    return out[:, 1:] if model.config.is_encoder_decoder else out[:, ids.shape[1] :]


@pytest.mark.parametrize("make", [llama, gpt2, mistral, t5])
@pytest.mark.parametrize("padded", [True, False])
def test_greedy_text_is_that_of_transformers(make, padded):
    model = make()
    ids, mask = prompts(left=make is not t5)
    if not padded:
        ids, mask = prompts(rows=5, length=9)[0].clamp(min=3), torch.ones(5, 9, dtype=torch.bool)
    ours = generate(model, ids, mask, new_tokens=20, temperature=0)
    free = theirs(model, ids, mask, 20, None)
    assert ours.ids.tolist() == free[:, : ours.ids.shape[1]].tolist() and ours.ids.shape == (5, 20)
    assert ours.mask.all() and ours.mask.dtype == torch.bool and len(set(ours.ids.flatten().tolist())) > 7
    end = int(free[0, 7])  # a token that comes in the middle of at least one text
    ours = generate(model, ids, mask, new_tokens=20, temperature=0, eos=end, pad=PAD)
    expected = theirs(model, ids, mask, 20, end)
    assert ours.ids.tolist() == expected[:, : ours.ids.shape[1]].tolist()
    for row, written in zip(ours.ids, ours.mask):
        assert (row[~written] == PAD).all()
        places = (row == end).nonzero().flatten().tolist()
        assert not places or places[0] == int(written.sum()) - 1


def test_the_loop_stops_when_all_rows_have_ended():
    model, calls = llama(), []
    ids, mask = prompts()
    every = list(range(3, V))
    model.register_forward_hook(lambda *_: calls.append(1))
    out = generate(model, ids, mask, new_tokens=20, temperature=0, eos=every, pad=PAD)
    assert len(calls) <= 3 and out.ids.shape[1] == len(calls) and out.mask.any(0).all()


def test_only_logits_of_the_last_place_are_made():
    model, seen = llama(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    ids, mask = prompts()
    generate(model, ids, mask, new_tokens=4)
    assert seen == [1, 1, 1, 1]


def test_the_encoder_reads_once():
    model, calls = t5(), []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    ids, mask = prompts(left=False)
    generate(model, ids, mask, new_tokens=6)
    assert calls == [1]


def test_modes_come_back_and_no_gradient_is_kept():
    model = llama(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    ids, mask = prompts()
    a = generate(model, ids, mask, new_tokens=6, temperature=0)
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert a.ids.tolist() == generate(model.eval(), ids, mask, new_tokens=6, temperature=0).ids.tolist()
    model.train()
    with pytest.raises(IndexError):
        generate(model, ids.clamp(min=3) + V, mask, new_tokens=2)
    assert model.training and torch.is_grad_enabled()
    embedded = torch.nn.Embedding(V, 2)(a.ids)  # may be read with gradient afterwards
    embedded.sum().backward()


def test_a_generator_decides_everything():
    model = llama()
    ids, mask = prompts()

    def text(seed):
        return generate(model, ids, mask, new_tokens=12, generator=torch.Generator().manual_seed(seed)).ids.tolist()

    state = torch.get_rng_state()
    assert text(3) == text(3) and text(3) != text(4)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    first = generate(model, ids, mask, new_tokens=12).ids.tolist()
    torch.manual_seed(5)
    assert first == generate(model, ids, mask, new_tokens=12).ids.tolist()


def law_of(draws, width):
    return torch.bincount(draws, minlength=width).double() / len(draws)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, None, None), (0.5, None, None), (1.0, 3, None), (1.0, None, 0.7), (2.0, 5, 0.6)]
)
def test_sampling_follows_the_law_asked_for(temperature, top_k, top_p):
    logits = torch.tensor([1.0, 2.0, 0.5, -1.0, 3.0, 2.5, -30.0])
    p = (logits.double() / temperature).softmax(0)
    order = p.argsort(descending=True).tolist()
    kept = order[:top_k]
    if top_p is not None:
        total, kept_p, mass = sum(float(p[i]) for i in kept), [], 0.0
        for i in kept:
            kept_p.append(i)
            mass += float(p[i]) / total
            if mass >= top_p:
                break
        kept = kept_p
    expected = torch.zeros_like(p)
    expected[kept] = p[kept] / p[kept].sum()
    draws = sample(logits.expand(40000, -1), temperature, top_k, top_p, torch.Generator().manual_seed(0))
    found = law_of(draws, 7)
    assert (found[expected == 0] == 0).all()
    assert 0.5 * (found - expected).abs().sum() < 0.012


def test_temperature_zero_takes_the_likeliest():
    assert sample(torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]]), 0).tolist() == [1, 0]


def test_tokens_behind_the_vocabulary_are_never_written():
    model = llama()
    ids, mask = prompts()
    ids = ids.clamp(max=19)
    out = generate(model, ids, mask, new_tokens=20, temperature=3.0, vocabulary=20)
    assert int(out.ids.max()) < 20
    assert int(generate(model, ids, mask, new_tokens=20, temperature=3.0).ids.max()) >= 20


class Forgetful(torch.nn.Module):
    def forward(self, input_ids, attention_mask=None):
        return torch.zeros(*input_ids.shape, V)


class Deaf(torch.nn.Module):
    """Takes a cache, gives none back."""

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None, return_dict=None):
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=torch.zeros(*input_ids.shape, V))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(model=Forgetful()), "keeps no key-value cache"),
        (dict(model=Deaf()), "keeps no key-value cache"),
        (dict(new_tokens=0), "new_tokens = 0"),
        (dict(ids=torch.zeros(0, 4, dtype=torch.long), mask=None), "(0, 4)"),
        (dict(ids=torch.zeros(2, 0, dtype=torch.long), mask=None), "(2, 0)"),
        (dict(mask=torch.ones(2, 3)), "mask of shape (2, 3)"),
        (dict(mask=torch.zeros(5, 9)), "a prompt is empty"),
        (dict(mask=prompts(left=False)[1]), "padded on the right"),
        (dict(temperature=-1.0), "temperature -1.0"),
        (dict(temperature=float("nan")), "temperature nan"),
        (dict(top_k=0), "top_k = 0"),
        (dict(top_p=1.5), "top_p = 1.5"),
        (dict(ids=torch.ones(1, 70, dtype=torch.long), mask=None), "the prompt has 70 tokens, the model's context holds 64"),
        (dict(new_tokens=57), "65 positions, the model's context holds 64"),
    ],
)
def test_what_cannot_be_decoded_is_refused_in_plain_words(change, says):
    ids, mask = prompts(rows=5)
    mask[-1] = True
    given = dict(model=llama(), ids=ids, mask=mask, new_tokens=2) | change
    with pytest.raises(UserError) as error:
        generate(given.pop("model"), given.pop("ids"), given.pop("mask"), **given)
    assert says in error.value.message and error.value.hint


def test_the_last_position_of_the_context_is_used():
    ids, mask = prompts()
    mask[-1] = True
    assert generate(llama(), ids, mask, new_tokens=56).ids.shape == (5, 56)
    assert generate(gpt2(), ids.clamp(min=3), None, new_tokens=32).ids.shape == (5, 32)
    with pytest.raises(UserError, match="41 positions"):
        generate(gpt2(), ids.clamp(min=3), None, new_tokens=33)


def test_adapters_are_looked_through():
    peft = pytest.importorskip("peft")
    ids, mask = prompts()
    plain = generate(llama(), ids, mask, new_tokens=8, temperature=0).ids
    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"))
    assert torch.equal(generate(wrapped, ids, mask, new_tokens=8, temperature=0).ids, plain)
