"""Local folders of transformers as teacher and student, adapters, padded vocabularies, and what families do behind their matrix."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import limbeck
from limbeck.errors import UserError

from .conftest import TINY_TEXT

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789", "say", "it", "is", "then", "what"]
LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
CONFIGS = {
    "llama": ("LlamaConfig", {**LAYERS, "num_key_value_heads": 1, "max_position_embeddings": 32}),
    "gpt2": ("GPT2Config", {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32}),
    "t5": ("T5Config", {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 24, "decoder_start_token_id": 0}),
    "bert": ("BertConfig", {**LAYERS, "max_position_embeddings": 32, "num_labels": 3}),
    "gemma2": ("Gemma2Config", {**LAYERS, "num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 0.5}),
    "granite": ("GraniteConfig", {**LAYERS, "num_key_value_heads": 1, "logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "cohere": ("CohereConfig", {**LAYERS, "num_key_value_heads": 1, "logit_scale": 0.25}),
}
KIND = {"t5": "AutoModelForSeq2SeqLM", "bert": "AutoModelForSequenceClassification"}


def tokenizer(words=WORDS, model="WordLevel", **special):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(getattr(models, model)({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"} | special
    )


WIDTH = len(WORDS)


def folder(path, family, width=WIDTH, seed=0, coder=None, **entries):
    """A model with random weights and its tokenizer, saved as their makers do."""
    import transformers

    name, sizes = CONFIGS[family]
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    torch.manual_seed(seed)
    config = getattr(transformers, name)(vocab_size=width, **{**special, **sizes, **entries})
    model = getattr(transformers, KIND.get(family, "AutoModelForCausalLM")).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # freshly made models say nearly nothing
    model.save_pretrained(path)
    # transformers takes the words of a folder of BERT for those of a WordPiece model, whatever its tokenizer.json says
    (coder or tokenizer(model="WordPiece" if family == "bert" else "WordLevel")).save_pretrained(path)
    return model


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Files of rows: pairs, and texts with a class."""
    place = tmp_path_factory.mktemp("rows")
    letters = "abcdefghij"
    pairs = [{"prompt": f"say {letters[n % 10]}", "completion": f"it is {letters[(n + 1) % 10]} then {n % 7}"} for n in range(120)]
    texts = [{"text": f"what {letters[n % 10]} is {n % 3}", "label": str(n % 3)} for n in range(120)]
    for name, content in (("pairs", pairs), ("classes", texts)):
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    return place


def recipe(rows, teacher, student, **changes):
    made = copy.deepcopy(TINY_TEXT) | {"baseline": False, "teacher": teacher, "student": student}
    made["data"] = {"source": f"jsonl:{rows / 'pairs.jsonl'}", "train": 32, "test": 8}
    made["text"] = {"tokenizer": "auto", "length": 16}
    made["training"] = {"steps": 4, "batch": 8, "lr": 0.01}
    for key, value in changes.items():
        made[key] = {**made[key], **value} if isinstance(made.get(key), dict) and isinstance(value, dict) else value
    return made


def run(made, out):
    return limbeck.run_recipe(made, out=out)


def opened(path, kind="AutoModelForCausalLM"):
    import transformers

    # beside a BERT configuration AutoTokenizer opens BERT's own class, which ignores a tokenizer.json of another kind, as here
    coder = transformers.PreTrainedTokenizerFast if "Sequence" in kind else transformers.AutoTokenizer
    return getattr(transformers, kind).from_pretrained(path).eval(), coder.from_pretrained(path)


FAMILIES = {
    "llama": {},
    "gpt2": {},
    "t5": {"text": {"task": "seq2seq"}},
    "bert": {"method": {"id": "kd"}, "text": {"task": "classification"}},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_as_teacher_and_student(tmp_path, rows, family):
    folder(tmp_path / "large", family, seed=1)
    start = folder(tmp_path / "small", family, seed=2)
    changes = dict(FAMILIES[family])
    if family == "bert":
        changes["data"] = {"source": f"jsonl:{rows / 'classes.jsonl'}"}
    result = run(recipe(rows, f"hf:{tmp_path / 'large'}", f"hf:{tmp_path / 'small'}", **changes), tmp_path / "run")
    model, coder = opened(tmp_path / "run" / "student", KIND.get(family, "AutoModelForCausalLM"))
    ids = coder(["say a then", "it is b"], return_tensors="pt", padding=True)["input_ids"]
    assert len(coder) == len(WORDS) and ids[0].tolist() == [WORDS.index(w) for w in ("say", "a", "then")]
    more = {"decoder_input_ids": ids[:, :2]} if family == "t5" else {}
    own = limbeck.load_student(result.folder)
    assert isinstance(result.student, torch.nn.Module) and not result.student.training
    with torch.no_grad():
        torch.testing.assert_close(model(ids, **more).logits, own(ids, **more).logits, rtol=0, atol=0)
    assert any(not torch.equal(a, b) for a, b in zip(model.state_dict().values(), start.state_dict().values()))


def test_distill_in_python_of_folders(tmp_path, rows):
    folder(tmp_path / "large", "llama", seed=1)
    folder(tmp_path / "small", "gpt2", seed=2)
    result = limbeck.distill(
        teacher=f"hf:{tmp_path / 'large'}",
        student=f"hf:{tmp_path / 'small'}",
        data=f"jsonl:{rows / 'pairs.jsonl'}",
        method="token-level-kd",
        steps=4,
        batch=8,
        text={"length": 16},
        baseline=False,
        out=tmp_path / "run",
    )
    assert result.summary["metrics"]["student"]["nll"] > 0 and "acceptance" in result.summary["to_teacher"]["student"]


def test_padded_vocabularies_of_different_width_just_work(tmp_path, rows):
    folder(tmp_path / "large", "llama", width=64, seed=1)
    folder(tmp_path / "small", "llama", width=56, seed=2)
    made = recipe(rows, f"hf:{tmp_path / 'large'}", f"hf:{tmp_path / 'small'}", training={"steps": 30})
    result = run(made, tmp_path / "run")
    near = result.summary["to_teacher"]["student"]
    assert near["kl"] > 0 and 0 < near["acceptance"] < 1 and result.summary["metrics"]["student"]["nll"] < 6
    assert opened(tmp_path / "run" / "student")[0].config.vocab_size == 56


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_are_saved_as_adapters(tmp_path, rows, family):
    import peft
    import transformers

    folder(tmp_path / "large", "llama", seed=1)
    start = folder(tmp_path / "small", family, seed=2).eval()
    student = {"model": f"hf:{tmp_path / 'small'}", "adapter": {"rank": 4}}
    result = run(recipe(rows, f"hf:{tmp_path / 'large'}", student), tmp_path / "run")
    saved = tmp_path / "run" / "student"
    assert (saved / "adapter_model.safetensors").is_file() and not (saved / "model.safetensors").exists()
    ids = torch.randint(3, 40, (2, 9))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        alone = peft.PeftModel.from_pretrained(base, saved).eval()(ids).logits
        own = limbeck.load_student(result.folder)(ids).logits
        assert torch.equal(alone, own) and not torch.allclose(own, start(ids).logits, atol=1e-4)
        from limbeck.saved import hand_on, measure, open_saved

        found = hand_on(open_saved(tmp_path / "run"), "hf", tmp_path / "merged")
        torch.testing.assert_close(opened(tmp_path / "merged")[0](ids).logits, own, rtol=1e-5, atol=1e-5)
    assert found["max_abs_difference"] < 1e-4
    assert measure(open_saved(tmp_path / "run"))["metrics"]["nll"] == pytest.approx(result.summary["metrics"]["student"]["nll"], abs=1e-6)


@pytest.mark.parametrize("built", ["from sizes", "config only"])
def test_an_adapter_of_a_network_that_nobody_keeps_carries_it(tmp_path, rows, built):
    folder(tmp_path / "large", "llama", seed=1)
    student = {"model": "llama", "args": {"layers": 1, "width": 16, "heads": 2}}
    if built == "config only":
        student = {"model": f"hf:{tmp_path / 'large'}", "args": {"config_only": True}}
    made = recipe(rows, f"hf:{tmp_path / 'large'}", student | {"adapter": {"rank": 2}})
    result = run(made, tmp_path / "run")
    from limbeck.saved import measure, open_saved

    again = measure(open_saved(tmp_path / "run"))["metrics"]["nll"]
    assert again == pytest.approx(result.summary["metrics"]["student"]["nll"], abs=1e-6)


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_what_a_family_does_behind_its_matrix_is_read_right(tmp_path, rows, family):
    from limbeck.data.batch import Batch
    from limbeck.signals.language import LanguageReader, settle

    model = folder(tmp_path / "large", family, seed=3).eval()
    ids = torch.randint(3, 40, (2, 9))
    batch = Batch({"input_ids": ids}, ids)
    assert settle(model, batch, "causal-lm", len(WORDS), "teacher") is None and not getattr(model, "limbeck_dense", False)
    with torch.no_grad():
        law = LanguageReader(model, ("law",), kind="causal-lm", vocabulary=len(WORDS))(batch).law
        expected = model(ids).logits[:, :-1].flatten(0, 1)
        torch.testing.assert_close(law.logits(), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(law.hidden @ law.weight.T, expected, rtol=1e-3, atol=1e-4)
    folder(tmp_path / "small", family, seed=4)
    assert run(recipe(rows, f"hf:{tmp_path / 'large'}", f"hf:{tmp_path / 'small'}"), tmp_path / "run").summary["warnings"] == []


def test_a_model_that_does_more_is_read_by_its_logits(tmp_path, rows):
    from limbeck.data.batch import Batch
    from limbeck.signals.language import LanguageReader, settle

    model = folder(tmp_path / "odd", "llama", seed=3).eval()
    plain = model.forward
    model.forward = lambda *a, **k: _halved(plain(*a, **k))
    ids = torch.randint(3, 40, (2, 9))
    batch = Batch({"input_ids": ids}, ids)
    assert "whole logits" in settle(model, batch, "causal-lm", len(WORDS), "teacher")
    law = LanguageReader(model, ("law",), kind="causal-lm", vocabulary=len(WORDS))(batch).law
    torch.testing.assert_close(law.logits(), model(ids).logits[:, :-1].flatten(0, 1))


def _halved(output):
    output.logits = output.logits / 2
    return output


# ---- bad input ----


def refused(made, out, *words):
    """One line that holds all words, with a hint, and no student."""
    with pytest.raises(UserError) as caught:
        run(made, out)
    text = f"{caught.value.message} | {caught.value.hint}"
    assert all(word in text for word in words), text
    assert caught.value.hint and "\n" not in caught.value.message and not (out / "student").exists()


def test_tokenizers_that_differ(tmp_path, rows):
    folder(tmp_path / "large", "llama", seed=1)
    other = tokenizer([*WORDS[:3], *reversed(WORDS[3:])])
    folder(tmp_path / "small", "llama", seed=2, coder=other)
    refused(recipe(rows, f"hf:{tmp_path / 'large'}", f"hf:{tmp_path / 'small'}"), tmp_path / "run", "tokenizer", "universal-logit")


def test_no_padding_token(tmp_path, rows):
    coder = tokenizer(pad_token=None)
    folder(tmp_path / "large", "llama", seed=1, coder=coder)
    folder(tmp_path / "small", "llama", seed=2, coder=coder)
    made = recipe(rows, f"hf:{tmp_path / 'large'}", f"hf:{tmp_path / 'small'}")
    refused(made, tmp_path / "run", "padding", "pad")
    made["text"]["pad"] = "eos"
    assert run(made, tmp_path / "run").summary["metrics"]["student"]["nll"] > 0


def test_texts_longer_than_a_context_and_vocabularies_too_narrow(tmp_path, rows):
    folder(tmp_path / "large", "llama", seed=1)
    folder(tmp_path / "small", "llama", seed=2, max_position_embeddings=8)
    made = recipe(rows, f"hf:{tmp_path / 'large'}", f"hf:{tmp_path / 'small'}")
    refused(made, tmp_path / "a", "at most 8 tokens", "up to 16", "text.length=8")
    folder(tmp_path / "narrow", "llama", width=len(WORDS) - 4, seed=2)
    refused(recipe(rows, f"hf:{tmp_path / 'large'}", f"hf:{tmp_path / 'narrow'}"), tmp_path / "b", str(len(WORDS)), str(len(WORDS) - 4))


def tiny(**changes):
    made = copy.deepcopy(TINY_TEXT) | {"baseline": False}
    made["teacher"]["train"]["steps"] = 2
    for key, value in changes.items():
        made[key] = {**made[key], **value} if isinstance(made.get(key), dict) and isinstance(value, dict) else value
    return made


SMALL = {"layers": 1, "width": 16, "heads": 2}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": {"id": "pld"}}, ("pld", "classification")),
        ({"student": {"model": "t5", "args": SMALL}}, ("student", "t5", "causal-lm")),
        ({"student": {"model": "bert", "args": SMALL}}, ("student", "later", "is_decoder")),
        ({"student": {"model": "minilm", "args": {}}}, ("minilm", "embedding")),
        ({"student": {"model": "cnn", "args": {}}}, ("student",)),
        ({"data": {"source": "digits"}}, ("text", "digits")),
        ({"text": {"prompt_length": 60}}, ("prompt_length 60", "48")),
        ({"text": {"length": 1}}, ("length",)),
        ({"text": {"tokenizer": "bpe:10"}}, ("bpe",)),
        ({"teacher": {"kind": "history"}}, ("history", "classification")),
        ({"data": {"augment": ["noise:0.1"]}}, ("augment", "texts")),
        ({"teacher": {"store": "nowhere"}}, ("nowhere",)),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_what_does_not_fit_is_said_in_one_line(tmp_path, changes, words):
    refused(tiny(**changes), tmp_path / "run", *words)


def test_a_method_of_texts_on_pictures(tmp_path):
    from .conftest import TINY

    refused(copy.deepcopy(TINY) | {"method": {"id": "token-level-kd"}}, tmp_path / "run", "token-level-kd", "language")


def test_bert_as_a_decoder_is_causal(tmp_path):
    made = tiny(student={"model": "bert", "args": SMALL | {"is_decoder": True}}, training={"steps": 1})
    assert run(made, tmp_path / "run").summary["metrics"]["student"]["nll"] > 0
