"""Language models built from a configuration of transformers, and models of that library for text by folder or hub id."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from limbeck.errors import UserError, nearest, unknown
from limbeck.places import user_path


@dataclass(frozen=True)
class Tokens:
    """What a language model must know of a tokenizer.

    Attributes:
        vocabulary: number of tokens V.
        length: the most positions that it will see.
        kind: of the task: "causal-lm", "seq2seq", "embedding", "classification".
        pad, bos, eos: special ids; None where there is none.
        classes: of a classification.
    """

    vocabulary: int
    length: int
    kind: str = "causal-lm"
    pad: int | None = None
    bos: int | None = None
    eos: int | None = None
    classes: int | None = None


def _sizes(layers: int, width: int, heads: int, inner: int | None) -> tuple[int, int]:
    for name, value in (("layers", layers), ("width", width), ("heads", heads)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name} is {value!r}", "give a whole number of at least 1")
    if width % heads:
        raise UserError(f"width {width} cannot be shared by {heads} heads", "give a width that heads divides")
    return width // heads, inner or 4 * width


def _llama(t: Tokens, layers: int, width: int, heads: int, inner: int | None) -> dict[str, Any]:
    head, inner = _sizes(layers, width, heads, inner or 8 * width // 3)
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head,
        "intermediate_size": inner,
        "max_position_embeddings": t.length,
        "tie_word_embeddings": True,
    }


def _mixtral(t: Tokens, layers: int, width: int, heads: int, inner: int | None) -> dict[str, Any]:
    return _llama(t, layers, width, heads, inner or 2 * width)


def _gpt2(t: Tokens, layers: int, width: int, heads: int, inner: int | None) -> dict[str, Any]:
    _, inner = _sizes(layers, width, heads, inner)
    return {
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "n_inner": inner,
        "n_positions": t.length,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _t5(t: Tokens, layers: int, width: int, heads: int, inner: int | None) -> dict[str, Any]:
    head, inner = _sizes(layers, width, heads, inner)
    return {
        "d_model": width,
        "num_layers": layers,
        "num_decoder_layers": layers,
        "num_heads": heads,
        "d_kv": head,
        "d_ff": inner,
        "dropout_rate": 0.0,
        "decoder_start_token_id": t.pad if t.pad is not None else t.bos,
    }


def _bert(t: Tokens, layers: int, width: int, heads: int, inner: int | None) -> dict[str, Any]:
    _, inner = _sizes(layers, width, heads, inner)
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "max_position_embeddings": t.length,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


LANGUAGE = {"llama": _llama, "mixtral": _mixtral, "gpt2": _gpt2, "t5": _t5, "bert": _bert}
"""Architectures that are built from sizes alone; every other one through a folder with its config.json (`hf:<folder>`)."""

_ABOUT = {
    "llama": "Decoder of the Llama family (rotary positions, RMS norm, gated layers), random weights.",
    "mixtral": "Decoder of the Mixtral family: num_local_experts (8) experts, num_experts_per_tok (2) of them at work, random weights.",
    "gpt2": "Decoder of the GPT-2 family (learned positions), random weights.",
    "t5": "Encoder-decoder of the T5 family, random weights.",
    "bert": "Encoder of the BERT family, random weights: for classification and embedding of texts.",
}

_AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "embedding": "AutoModel",
    "classification": "AutoModelForSequenceClassification",
}


def listing() -> list[dict[str, Any]]:
    """One row for each architecture, as `limbeck.zoo.listing` gives them."""
    sizes = {"layers": 2, "width": 64, "heads": 4, "inner": None}
    return [{"name": name, "about": text, "arguments": sizes} for name, text in _ABOUT.items()]


def library() -> Any:
    """The transformers package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise UserError("transformers is not installed", "`pip install 'limbeck[hf]'`") from None
    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers inside: a file of a few megabytes needs none."""
    logging = library().utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _auto(kind: str) -> Any:
    return getattr(library(), _AUTO[kind])


def build_language(
    name: str, tokens: Tokens, layers: int = 2, width: int = 64, heads: int = 4, inner: int | None = None, **config: Any
) -> nn.Module:
    """A small language model with random weights.

    Args:
        name: of `LANGUAGE`.
        tokens: the tokenizer's facts.
        layers, width, heads: its size (of T5 the layers of each half).
        inner: width inside the feed-forward layers; the family's usual multiple of `width` when left out.
        config: further entries of the family's transformers configuration.

    Raises:
        UserError: unknown architecture or entry, sizes that do not fit, or an architecture that is not for this kind of task.
    """
    if name not in LANGUAGE:
        raise unknown("language model", name, LANGUAGE)
    transformers = library()
    entries = LANGUAGE[name](tokens, layers, width, heads, inner)
    special = {"pad_token_id": tokens.pad, "bos_token_id": tokens.bos, "eos_token_id": tokens.eos}
    entries |= {"vocab_size": tokens.vocabulary, **special}
    if tokens.classes is not None:
        entries["num_labels"] = tokens.classes
    blank = transformers.AutoConfig.for_model(name)
    for key in config:
        if not hasattr(blank, key) and key != "attn_implementation":
            offer = " or ".join(map(repr, nearest(key, blank.to_dict())))
            raise UserError(f"network {name!r}: its configuration has no entry {key!r}", f"did you mean {offer}?")
    attention = config.pop("attn_implementation", None)
    made = transformers.AutoConfig.for_model(name, **{**entries, **config})
    if attention is not None:
        made._attn_implementation = attention  # "eager" gives attention maps
    return from_config(made, tokens.kind, f"network {name!r}")


def from_config(config: Any, kind: str, what: str) -> nn.Module:
    """A model with random weights from a transformers configuration, of the class that a kind of task needs.

    Raises:
        UserError: the architecture is not for this task.
    """
    auto = _auto(kind)
    if type(config) not in auto._model_mapping:
        raise UserError(f"{what} ({config.model_type}) is not for a {kind} task", _offer(kind))
    if kind == "embedding":
        return without_pooler(auto._model_mapping[type(config)], config)
    return auto.from_config(config)


def without_pooler(make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What `make` makes, without the pooling layer that BERT-like encoders carry and sentence embeddings never use."""
    try:
        return make(*args, add_pooling_layer=False, **options)
    except TypeError:  # it has none
        return make(*args, **options)


def _offer(kind: str) -> str:
    usual = {"causal-lm": "llama or gpt2", "seq2seq": "t5", "embedding": "bert", "classification": "bert"}[kind]
    return f"use {usual}, or hf:<folder> of such a model"


def open_language(name: str, tokens: Tokens, config_only: bool = False, new_head: bool = False, **overrides: Any) -> nn.Module:
    """A transformers model for text by folder or hub id; weights in safetensors only, no code of the folder is run.

    Args:
        name: a folder with config.json (and weights), or an id of the hub (needs the network, or a filled cache).
        tokens: the tokenizer's facts.
        config_only: random weights.
        new_head: of a classification, begin with a fresh classifier where the folder has none, or one for other classes.
        overrides: entries of the configuration to change.

    Raises:
        UserError: no such folder, not for this kind of task, weights that are pickled, damaged or missing, a vocabulary that is narrower
            than the tokenizer, or a context that is shorter than the texts.
    """
    place, config = open_config(name, overrides)
    check_fits(config, tokens, name)
    auto = _auto(tokens.kind)
    if type(config) not in auto._model_mapping:
        raise UserError(f"{name} ({config.model_type}) is not for a {tokens.kind} task", _offer(tokens.kind))
    if tokens.classes is not None:
        own = config.num_labels if any("Classification" in kind for kind in config.architectures or ()) else None
        if own is not None and own != tokens.classes and not (config_only or new_head):
            raise UserError(f"{name} has {own} classes, but the data has {tokens.classes}", "set new_head: true to train a fresh head")
        config.num_labels = tokens.classes
    if config_only:
        config._name_or_path = ""  # what is built from it does not hold that folder's weights
        return from_config(config, tokens.kind, name)
    options: dict[str, Any] = {"config": config, "use_safetensors": True, "trust_remote_code": False, "dtype": "float32"}
    try:
        with quiet():
            model, found = auto.from_pretrained(place, output_loading_info=True, ignore_mismatched_sizes=new_head, **options)
    except Exception as error:
        hint = "weights are read from safetensors only; config_only: true starts from random ones"
        raise UserError(f"the weights of {name} cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}", hint) from None
    unused = "pooler" if tokens.kind == "embedding" else None  # sentence embeddings never use a pooling layer
    missing = sorted(key for key in found["missing_keys"] if unused is None or unused not in key)
    if missing and not new_head:
        raise UserError(
            f"{name} has no weights for {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''} of a {type(model).__name__}",
            "new_head: true begins with random ones there and trains them"
            if tokens.kind == "classification"
            else f"give a folder that holds a model for a {tokens.kind} task, or config_only: true",
        )
    return model


_OWN_CODE = "ask for the code by its name: put its file on PYTHONPATH and write model: python:<module>:<factory>"


def open_config(name: str, overrides: Mapping[str, Any]) -> tuple[str, Any]:
    """The place and the configuration of a transformers model, some entries changed; no code of a folder is run.

    Raises:
        UserError: no such folder, no configuration of that library, or an entry that it does not have.
    """
    local = user_path(name)
    if name.startswith((".", "/", "~")) and not local.is_dir():
        raise UserError(f"no folder at {local}", "check the path after hf:")
    place = str(local) if local.is_dir() else name
    try:
        config = library().AutoConfig.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # the library raises a dozen kinds, all about the configuration
        why = (str(error) or type(error).__name__).splitlines()[0]
        if "trust_remote_code" in str(error):
            raise UserError(f"{name} needs code of its own, and limbeck runs no code of a model's folder", _OWN_CODE) from None
        raise UserError(f"{name} is not a transformers model that can be opened: {why}", "check its config.json") from None
    for key, value in overrides.items():
        if key == "trust_remote_code":
            raise UserError(f"{name}: limbeck runs no code of a model's folder", _OWN_CODE)
        if not hasattr(config, key):
            offer = " or ".join(map(repr, nearest(key, config.to_dict())))
            raise UserError(f"{name}: the configuration has no entry {key!r}", f"did you mean {offer}?")
        setattr(config, key, value)
    return place, config


def check_fits(config: Any, tokens: Tokens, name: str) -> None:
    """The model has a row for every token and a position for every place of the texts.

    Raises:
        UserError: naming both numbers.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(text, "vocab_size", None)
    if width is not None and width < tokens.vocabulary:
        raise UserError(
            f"{name} has a vocabulary of {width}, the tokenizer {tokens.vocabulary} tokens",
            "use its own tokenizer: text.tokenizer=teacher or hf:<folder>",
        )
    context = getattr(text, "max_position_embeddings", None)
    if context is not None and context < tokens.length:
        raise UserError(
            f"{name} reads at most {context} tokens, the samples have up to {tokens.length}", f"set text.length={context} or less"
        )
