"""Speculative decoding: the target's law by enumeration, its greedy text, and acceptance in theory and practice."""

import copy
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch

from limbeck.decoding import (
    accept,
    acceptance,
    block_efficiency,
    generate,
    greedy_agreement,
    speculative,
    speculative_report,
    speedup,
)
from limbeck.errors import UserError

transformers = pytest.importorskip("transformers")


def llama(seed, vocab=8, hidden=16, layers=1, context=96, spread=0.5, kind="Llama", **more):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=context, initializer_range=spread, pad_token_id=0, bos_token_id=0, eos_token_id=None,
        **more,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def gpt2(seed, vocab=40):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=vocab, n_embd=16, n_layer=2, n_head=2, n_positions=96)
    config = transformers.GPT2Config(**sizes, initializer_range=0.4, eos_token_id=None)
    return transformers.GPT2LMHeadModel(config).eval()


def near(target, seed, noise):
    """A draft that is the target with noise on its weights."""
    torch.manual_seed(seed)
    draft = copy.deepcopy(target)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(noise * torch.randn_like(weight))
    return draft


class Table(torch.nn.Module):
    """A language model whose next-token law depends on the last token only: fast, and easy to enumerate."""

    class Cache:
        def __init__(self):
            self.seen = 0

        def crop(self, count):
            assert count < 0
            self.seen += count

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("table", logits)
        self.config = SimpleNamespace(vocab_size=logits.shape[1])
        self.reads = []

    def forward(self, input_ids, past_key_values=None, use_cache=None, return_dict=None):
        cache = past_key_values if isinstance(past_key_values, Table.Cache) else Table.Cache()
        cache.seen += input_ids.shape[1]
        self.reads.append(input_ids.shape[1])
        return SimpleNamespace(logits=self.table[input_ids], past_key_values=cache)


def joint(table, first, length, temperature=1.0):
    """Law of the next `length` tokens after token `first`, by enumeration."""
    p = (table.double() / temperature).softmax(-1)
    width = len(table)
    law = torch.zeros((width,) * length, dtype=torch.float64)
    for text in itertools.product(range(width), repeat=length):
        chance, last = 1.0, first
        for token in text:
            chance, last = chance * float(p[last, token]), token
        law[text] = chance
    return law


def histogram(texts, width, length):
    code = sum(texts[:, i] * width ** (length - 1 - i) for i in range(length))
    return torch.bincount(code, minlength=width**length).double().reshape((width,) * length) / len(texts)


def tv(a, b):
    return 0.5 * float((a - b).abs().sum())


def excess(found, law, runs):
    """Pearson's chi-square beyond its mean, in standard deviations. Cells expected fewer than 5 times are counted as one: alone they have
    a heavy tail, and a single rare text would decide."""
    counts, expected = (found * runs).flatten(), (law * runs).flatten()
    rare = expected < 5
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    freedom = len(expected) - 1
    assert freedom > 10
    return (float(((counts - expected).square() / expected.clamp(min=1e-9)).sum()) - freedom) / (2 * freedom) ** 0.5


def emitted(target, draft, runs, length, seed=0, **how):
    draws = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[1]])
    return torch.cat([speculative(target, draft, ids, new_tokens=length, generator=draws, **how).ids for _ in range(runs)])


def tables(width=4, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return [Table(1.5 * torch.randn(width, width, generator=draws)) for _ in range(2)]


@pytest.mark.parametrize(("gamma", "temperature"), [(1, 1.0), (4, 1.0), (2, 0.7)])
def test_the_text_follows_the_law_of_the_target(gamma, temperature):
    target, draft = tables()
    runs = 1500
    law = joint(target.table, 1, 3, temperature)
    found = histogram(emitted(target, draft, runs, 3, gamma=gamma, temperature=temperature), 4, 3)
    assert excess(found, law, runs) < 4
    assert tv(joint(draft.table, 1, 3, temperature), law) > 0.3  # the draft alone would be noticed


def test_another_rule_would_be_noticed(monkeypatch):
    """Accepting always, and drawing from p instead of the rest, must leave the law: the bound above can fail."""
    target, draft = tables()
    law, runs = joint(target.table, 1, 3), 800

    def measured():
        return excess(histogram(emitted(target, draft, runs, 3, gamma=2), 4, 3), law, runs)

    module = sys.modules["limbeck.decoding.speculative"]
    assert measured() < 4
    monkeypatch.setattr(module, "accept", lambda p, q, tokens, *_: (len(tokens), module.draw(p[-1:])))
    assert measured() > 6  # the bound of the test above, and a margin

    def from_p(p, q, tokens, lenience, generator):
        taken, _ = accept(p, q, tokens, lenience, generator)
        return taken, module.draw(p[taken : taken + 1], generator)

    monkeypatch.setattr(module, "accept", from_p)
    assert measured() > 6  # the bound of the test above, and a margin


def test_transformers_models_emit_the_law_of_the_target():
    target, draft = llama(0, vocab=6), llama(1, vocab=6)
    ids = torch.tensor([[1, 2]])
    law = torch.zeros(6, 6, dtype=torch.float64)
    with torch.no_grad():
        first = target(ids).logits[0, -1].double().softmax(-1)
        for token in range(6):
            law[token] = first[token] * target(torch.tensor([[1, 2, token]])).logits[0, -1].double().softmax(-1)
        far = draft(ids).logits[0, -1].double().softmax(-1)
    assert tv(far, first) > 0.25
    draws = torch.Generator().manual_seed(0)
    texts = torch.cat([speculative(target, draft, ids, new_tokens=2, gamma=2, generator=draws).ids for _ in range(500)])
    found = histogram(texts, 6, 2)
    assert excess(found, law, 500) < 4


PAIRS = {
    "llama": lambda: (llama(0, vocab=40, layers=2), 0.05),
    "gpt2": lambda: (gpt2(0), 0.05),
    "mistral": lambda: (llama(0, vocab=40, layers=2, kind="Mistral", sliding_window=5), 0.05),
}


@pytest.mark.parametrize("kind", list(PAIRS))
@pytest.mark.parametrize("gamma", [1, 3, 7])
def test_greedy_text_is_that_of_plain_decoding(kind, gamma):
    target, noise = PAIRS[kind]()
    draft = near(target, 1, noise)
    ids = torch.randint(0, 40, (1, 11), generator=torch.Generator().manual_seed(2))
    plain = generate(target, ids, new_tokens=40, temperature=0).ids
    got = speculative(target, draft, ids, new_tokens=40, gamma=gamma, temperature=0)
    assert torch.equal(got.ids, plain)
    assert 0 < got.accepted < got.examined <= got.drafted  # tokens were taken and tokens were refused
    assert got.target_passes < 40 and got.block_efficiency == 40 / got.target_passes


def test_a_perfect_draft_needs_one_pass_a_block():
    target = llama(0, vocab=40, layers=2)
    ids = torch.randint(0, 40, (1, 7), generator=torch.Generator().manual_seed(2))
    for temperature in (0, 1.0):
        got = speculative(target, target, ids, new_tokens=40, gamma=4, temperature=temperature)
        assert (got.target_passes, got.accepted, got.drafted, got.acceptance) == (8, 32, 32, 1.0)
        assert got.draft_seconds > 0 and got.target_seconds > 0 and got.seconds == got.draft_seconds + got.target_seconds


def test_each_token_is_read_once_by_the_target_unless_it_was_refused():
    target, draft = tables()
    got = speculative(target, draft, torch.tensor([[1, 2, 3]]), new_tokens=30, gamma=3, generator=torch.Generator().manual_seed(0))
    assert len(target.reads) == got.target_passes
    assert target.reads[0] == 3 + 3 and max(target.reads[1:]) <= 4  # the prompt and the first block; then one emitted token and a block
    assert draft.reads[0] == 3 and max(draft.reads[1:]) <= 2
    assert sum(target.reads) == 3 + got.target_passes - 1 + got.drafted


@pytest.mark.parametrize("new_tokens", [1, 2, 5, 6])
def test_no_more_tokens_than_asked_for(new_tokens):
    target, draft = tables()
    for seed in range(5):
        got = speculative(target, draft, torch.tensor([[1]]), new_tokens=new_tokens, gamma=4, generator=torch.Generator().manual_seed(seed))
        assert got.ids.shape == (1, new_tokens)
    if new_tokens == 1:
        assert (got.drafted, got.examined, got.acceptance, got.target_passes) == (0, 0, None, 1)


def test_the_text_ends_with_the_end_of_text():
    target = llama(0, vocab=40, layers=2)
    draft = near(target, 1, 0.05)
    ids = torch.randint(0, 40, (1, 11), generator=torch.Generator().manual_seed(2))
    plain = generate(target, ids, new_tokens=40, temperature=0).ids[0].tolist()
    for end in list(dict.fromkeys(plain))[-5:]:
        expected = plain[: plain.index(end) + 1]
        for gamma in (1, 4, 7):
            got = speculative(target, draft, ids, new_tokens=40, gamma=gamma, temperature=0, eos=[end, 39 if end != 39 else 38])
            assert got.ids[0].tolist() == expected[: next((i + 1 for i, t in enumerate(expected) if t in (end, 39 if end != 39 else 38)))]
            assert got.accepted <= got.ids.shape[1]


def test_acceptance_in_theory_is_acceptance_in_practice():
    target, draft = tables(width=8, seed=5)
    got = speculative(target, draft, torch.tensor([[1]]), new_tokens=4000, gamma=4, generator=torch.Generator().manual_seed(0))
    before = torch.cat([torch.tensor([1]), got.ids[0, :-1]])
    alphas = acceptance(target.table[before], draft.table[before])
    assert alphas.std() > 0.1  # it depends on the place
    assert abs(got.acceptance - float(alphas.mean())) < 0.02, (got.acceptance, float(alphas.mean()))


@pytest.mark.parametrize("kind", list(PAIRS))
def test_laws_read_through_caches_are_those_of_the_whole_text(kind, monkeypatch):
    """After every rejection both caches must hold exactly the text so far."""
    target, noise = PAIRS[kind]()
    draft, module, seen = near(target, 1, noise), sys.modules["limbeck.decoding.speculative"], []

    def spy(p, q, tokens, *rest):
        taken, follow = accept(p, q, tokens, *rest)
        seen.append((taken, p, q))
        return taken, follow

    monkeypatch.setattr(module, "accept", spy)
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (1, 9), generator=draws)
    got = speculative(target, draft, ids, new_tokens=60, gamma=3, generator=draws)
    with torch.no_grad():
        p, q = (model(torch.cat([ids, got.ids], 1)).logits[0, 8:-1].softmax(-1) for model in (target, draft))
    place, refused = 0, 0
    for taken, one, other in seen:
        assert torch.allclose(one[: taken + 1], p[place : place + taken + 1], atol=1e-5)
        count = min(taken + 1, len(other))
        assert torch.allclose(other[:count], q[place : place + count], atol=1e-5)
        refused += taken < len(other)
        place += taken + 1
    assert refused > 5 and got.accepted > 5 and place >= 59


def test_the_rule_takes_a_token_as_often_as_the_laws_overlap():
    p, q = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.1, 0.3, 0.4, 0.2])
    draws = torch.Generator().manual_seed(0)
    runs = 5000
    tokens = torch.multinomial(q, runs, replacement=True, generator=draws)
    results = [accept(p.expand(2, -1), q[None], token[None], generator=draws) for token in tokens]
    taken = sum(count for count, _ in results) / runs
    assert abs(taken - float(torch.minimum(p, q).sum())) < 0.02
    refused = torch.tensor([int(token) for count, token in results if not count])
    assert (refused == 0).all()  # the only place where p exceeds q
    first = torch.tensor([int(token) if count else int(follow) for token, (count, follow) in zip(tokens, results)])
    assert tv(torch.bincount(first, minlength=4).double() / runs, p.double()) < 0.02


def test_lenience_takes_more_and_leaves_the_law():
    target, draft = tables(seed=3)
    rates, distances = [], []
    law = joint(target.table, 1, 2)
    for lenience in (1.0, 0.5, 0.01):
        draws = torch.Generator().manual_seed(0)
        how = dict(new_tokens=3, gamma=2, lenience=lenience, generator=draws)
        runs = [speculative(target, draft, torch.tensor([[1]]), **how) for _ in range(600)]
        rates.append(sum(r.accepted for r in runs) / sum(r.examined for r in runs))
        distances.append(tv(histogram(torch.cat([r.ids[:, :2] for r in runs]), 4, 2), law))
    assert rates[0] < rates[1] < rates[2] and rates[2] > 0.95
    assert distances[0] < 0.06 < distances[1] < distances[2]


def test_a_generator_decides_everything():
    target, draft = tables()

    def text(seed):
        return speculative(target, draft, torch.tensor([[1]]), new_tokens=30, generator=torch.Generator().manual_seed(seed)).ids.tolist()

    state = torch.get_rng_state()
    assert text(0) == text(0) and text(0) != text(1)
    assert torch.equal(state, torch.get_rng_state())


def test_padded_vocabularies_are_cut_to_the_tokens():
    target, draft = llama(0, vocab=24), llama(1, vocab=30)
    ids = torch.tensor([[1, 2]])
    with pytest.raises(UserError, match="target has 24 logits, the draft 30"):
        speculative(target, draft, ids, new_tokens=4, temperature=0)
    with pytest.raises(UserError, match="vocabulary 26"):
        speculative(target, draft, ids, new_tokens=4, vocabulary=26)
    got = speculative(target, draft, ids, new_tokens=60, vocabulary=20, temperature=2.0, generator=torch.Generator().manual_seed(0))
    assert int(got.ids.max()) < 20 and got.examined > 0
    greedy = speculative(target, draft, ids, new_tokens=30, vocabulary=20, temperature=0)
    assert torch.equal(greedy.ids, generate(target, ids, new_tokens=30, vocabulary=20, temperature=0).ids)


def test_modes_come_back():
    target, draft = llama(0), llama(1)
    target.train(), draft.train()
    draft.model.layers[0].eval()
    speculative(target, draft, torch.tensor([[1, 2]]), new_tokens=4)
    assert target.training and draft.training and not draft.model.layers[0].training and torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(gamma=0), "gamma = 0"),
        (dict(gamma=-2), "gamma = -2"),
        (dict(ids=torch.zeros(1, 0, dtype=torch.long)), "(1, 0)"),
        (dict(ids=torch.zeros(0, 3, dtype=torch.long)), "(0, 3)"),
        (dict(ids=torch.ones(2, 3, dtype=torch.long)), "2 prompts at once"),
        (dict(new_tokens=0), "new_tokens = 0"),
        (dict(temperature=-1), "temperature -1"),
        (dict(lenience=0.0), "lenience 0.0"),
        (dict(lenience=0.5, temperature=0), "greedy"),
        (dict(new_tokens=200), "context holds 96"),
        (dict(ids=torch.ones(1, 97, dtype=torch.long)), "the prompt has 97 tokens, the model's context holds 96"),
    ],
)
def test_what_cannot_be_speculated_is_refused_in_plain_words(change, says):
    given = dict(ids=torch.tensor([[1, 2]]), new_tokens=4) | change
    with pytest.raises(UserError) as error:
        speculative(llama(0), llama(1), given.pop("ids"), **given)
    assert says in error.value.message and error.value.hint


def test_models_whose_cache_cannot_go_back_are_refused():
    torch.manual_seed(0)
    if not hasattr(transformers, "Lfm2Config"):
        pytest.skip("this transformers has no Lfm2")
    sizes = dict(vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    model = transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**sizes, layer_types=["conv", "full_attention"], pad_token_id=0)).eval()
    with pytest.raises(UserError, match="cannot be taken back"):
        speculative(model, model, torch.tensor([[1, 2]]), new_tokens=4)


def test_acceptance_is_one_minus_total_variation():
    draws = torch.Generator().manual_seed(0)
    p, q = (2 * torch.randn(50, 20, generator=draws, dtype=torch.float64) for _ in range(2))
    for temperature in (1.0, 0.5):
        expected = 1 - 0.5 * ((p / temperature).softmax(-1) - (q / temperature).softmax(-1)).abs().sum(-1)
        found = acceptance(p, q, temperature=temperature)
        assert found.dtype == torch.float32 and torch.allclose(found.double(), expected, atol=1e-6)
    cut = 1 - 0.5 * (p[:, :15].softmax(-1) - q[:, :15].softmax(-1)).abs().sum(-1)
    assert torch.allclose(acceptance(p, q[:, :17], vocabulary=15).double(), cut, atol=1e-6)
    whole = acceptance(p, q)
    assert torch.equal(acceptance(p, q, chunk=3), whole)
    agree = (p.argmax(-1) == q.argmax(-1)).float()
    assert torch.equal(greedy_agreement(p, q), agree) and torch.equal(acceptance(p, q, temperature=0), agree)
    assert len(acceptance(p[:0], q[:0])) == 0
    for bad, says in ((lambda: acceptance(p, q[:9]), "50 places"), (lambda: acceptance(p, q[:, :9]), "20 logits, the draft 9")):
        with pytest.raises(UserError, match=says):
            bad()


def test_closed_forms():
    for alpha in (0.0, 0.3, 0.72, 0.999):
        for gamma in (1, 3, 7):
            tau = (1 - alpha ** (gamma + 1)) / (1 - alpha)
            assert block_efficiency(alpha, gamma) == pytest.approx(tau)
            assert speedup(alpha, gamma, 0.2) == pytest.approx(tau / (0.2 * gamma + 1))
    assert block_efficiency(1.0, 5) == 6.0
    for bad in ((1.2, 3, 0.1), (-0.1, 3, 0.1), (0.5, 0, 0.1), (0.5, 2.5, 0.1), (0.5, 3, -1)):
        with pytest.raises(UserError):
            speedup(*bad)


def test_blocks_of_independent_acceptance_are_as_long_as_the_closed_form_says():
    row = torch.tensor([2.0, 1.0, 0.0, -1.0])
    other = torch.tensor([1.0, 2.0, 0.5, 0.0])
    target, draft = Table(row.expand(4, -1).clone()), Table(other.expand(4, -1).clone())
    alpha = float(acceptance(row[None], other[None]))
    draws = torch.Generator().manual_seed(0)
    got = speculative(target, draft, torch.tensor([[1]]), new_tokens=6000, gamma=3, generator=draws)
    assert got.block_efficiency == pytest.approx(block_efficiency(alpha, 3), rel=0.03)
    assert got.acceptance == pytest.approx(alpha, abs=0.02)


def test_the_report_counts_what_was_run():
    target = llama(0, vocab=40, layers=2)
    draft = near(target, 1, 0.05)
    draws = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 40, (length,), generator=draws) for length in (3, 9, 5)]
    report = speculative_report(target, draft, prompts, (2, 5), new_tokens=12, seed=7)
    assert (report.prompts, report.tokens, len(report.alphas)) == (3, 36, 3)
    runs = {
        gamma: [
            speculative(target, draft, ids[None], new_tokens=12, gamma=gamma, generator=torch.Generator().manual_seed(7 + i))
            for i, ids in enumerate(prompts)
        ]
        for gamma in (2, 5)
    }
    overlaps = []
    for i, ids in enumerate(prompts):
        text = generate(target, ids[None], new_tokens=12, generator=torch.Generator().manual_seed(7 + i)).ids
        whole = torch.cat([ids[None], text], 1)
        with torch.no_grad():
            p, q = (model(whole).logits[0, len(ids) - 1 : -1].softmax(-1) for model in (target, draft))
        overlaps.append(float(torch.minimum(p, q).sum(-1).mean()))
    assert report.alphas == pytest.approx(overlaps, abs=1e-5) and report.alpha == pytest.approx(sum(overlaps) / 3, abs=1e-5)
    for block in report.blocks:
        done = runs[block.gamma]
        assert block.block_efficiency == 36 / sum(run.target_passes for run in done)
        assert block.acceptance == sum(run.accepted for run in done) / sum(run.examined for run in done)
        assert block.block_efficiencies == [run.block_efficiency for run in done]
        assert block.expected_block_efficiency == block_efficiency(report.alpha, block.gamma)
        assert block.predicted_speedup == pytest.approx(block.block_efficiency / (report.cost_ratio * block.gamma + 1))
        assert block.speedup_with_pass_cost == pytest.approx(block.block_efficiency / (report.cost_ratio * block.gamma + block.pass_cost))
        assert block.speedup == pytest.approx(report.plain_seconds_per_token / block.seconds_per_token)
        assert 0.8 * (block.draft_seconds + block.target_seconds) < 36 * block.seconds_per_token and block.same_text is None
    assert 0.1 < report.cost_ratio < 3


def test_the_report_of_greedy_decoding_compares_texts(monkeypatch):
    target = llama(0, vocab=40, layers=2)
    prompts = torch.randint(0, 40, (2, 5), generator=torch.Generator().manual_seed(0))
    report = speculative_report(target, near(target, 1, 0.05), prompts, (3,), new_tokens=12, temperature=0, eos=1)
    assert report.blocks[0].same_text == 1.0 and 0 <= report.alpha <= 1
    perfect = speculative_report(target, target, prompts, (3,), new_tokens=12, temperature=0)
    assert perfect.alpha == 1 and perfect.blocks[0].block_efficiency == 4 and perfect.blocks[0].acceptance == 1
    module = sys.modules["limbeck.decoding.speculative"]
    monkeypatch.setattr(module, "accept_greedy", lambda logits, tokens: (len(tokens), logits[-1:].argmax(-1)))
    assert speculative_report(target, llama(5, vocab=40), prompts, (3,), new_tokens=12, temperature=0).blocks[0].same_text == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(prompts=[]), "no prompts"),
        (dict(gammas=()), "0 gammas"),
        (dict(gammas=(3, 0)), "gamma = 0"),
        (dict(repeats=0), "0 repeats"),
        (dict(prompts=[torch.tensor([], dtype=torch.long)]), "(1, 0)"),
    ],
)
def test_what_cannot_be_reported_is_refused(change, says):
    given = dict(prompts=[torch.tensor([1, 2])], gammas=(2,)) | change
    with pytest.raises(UserError) as error:
        speculative_report(llama(0), llama(1), given.pop("prompts"), new_tokens=4, **given)
    assert says in error.value.message and error.value.hint
