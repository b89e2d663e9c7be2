"""A language model with its key-value cache: what it can take, the prompt, one step, and taking steps back."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.signals import modes


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """The models in evaluation mode and without gradients; afterwards every module has the mode back that it had itself."""
    with modes.evaluating(*models), torch.no_grad():
        yield


def forward_arguments(model: nn.Module) -> set[str]:
    """Names of the arguments of the model's `forward`; of the model inside when an adapter (PEFT) is wrapped round it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(inner.forward).parameters)


def context_of(model: nn.Module) -> int | None:
    """How many positions the model was made for (`max_position_embeddings` of its config), or None when nothing says so."""
    config: Any = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    return int(context) if isinstance(context, int) and context > 0 else None


def output_width(model: nn.Module) -> int | None:
    """How many logits the model gives, padding of the output matrix included; None when it does not say."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    return len(weight) if weight is not None else getattr(getattr(model, "config", None), "vocab_size", None)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether an encoder reads the prompt."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def check_context(model: nn.Module, prompt: int, new_tokens: int) -> None:
    """Refuse what does not fit in the positions of the model; the last new token is never read, so it needs no position."""
    context = context_of(model)
    if context is None:
        return
    if prompt > context:
        raise UserError(f"the prompt has {prompt} tokens, the model's context holds {context}", f"cut prompts to {context} tokens or fewer")
    if prompt + new_tokens - 1 > context:
        raise UserError(
            f"{prompt} tokens and {new_tokens} new ones need {prompt + new_tokens - 1} positions, the model's context holds {context}",
            f"ask for at most {context - prompt + 1} new tokens, or cut the prompt",
        )


class Cached:
    """A causal language model that remembers what it has read.

    Only logits that are asked for are computed, where the model's `forward` takes `logits_to_keep` (transformers' name).

    Args:
        model: a transformers causal language model, or one that takes and gives `past_key_values` in the same way.
        mask: `(B, P)` true on tokens of the left-padded prompt; None when nothing is padded.
        new_tokens: how many tokens will follow the prompt at most.
        vocabulary: only the first so many logits are tokens; the others are padding of the output matrix and are cut.
        croppable: the cache will be taken back by `crop`.

    Raises:
        UserError: a model that keeps no cache, or whose cache cannot be taken back when it must.
    """

    def __init__(
        self, model: nn.Module, mask: Tensor | None = None, new_tokens: int = 0, vocabulary: int | None = None, croppable: bool = False
    ) -> None:
        names = forward_arguments(model)
        if not {"past_key_values", "use_cache"} <= names:
            raise no_cache(model)
        self.model, self.vocabulary, self.length = model, vocabulary, 0
        self._keeps = "logits_to_keep" in names
        self._positioned = "position_ids" in names
        self._mask = self._positions = None
        if mask is not None:
            tail = mask.new_ones(len(mask), new_tokens)
            self._mask = torch.cat([mask, tail], 1).long()
            self._positions = (self._mask.cumsum(1) - 1).clamp_(min=0)
        self._cache = _rewindable(model) if croppable else None
        self._croppable = croppable

    def feed(self, ids: Tensor, keep: int = 1) -> Tensor:
        """Read further tokens `(B, n)`; the logits `(B, keep, V)` of the last `keep` of them."""
        more: dict[str, Any] = {}
        end = self.length + ids.shape[1]
        if self._mask is not None:
            more["attention_mask"] = self._mask[:, :end]
            if self._positioned:
                more["position_ids"] = self._positions[:, self.length : end]
        if self._keeps and keep < ids.shape[1]:
            more["logits_to_keep"] = keep
        out = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, return_dict=True, **more)
        if out.past_key_values is None:
            raise no_cache(self.model)
        if self.length == 0 and self._croppable:
            _check_croppable(self.model, out.past_key_values)
        self._cache, self.length = out.past_key_values, end
        return out.logits[:, -keep:, : self.vocabulary]

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens."""
        if count > 0:  # older caches read crop(0) as "keep nothing"
            self._cache.crop(-count)
            self.length -= count


def no_cache(model: nn.Module) -> UserError:
    """The error of a model without a key-value cache."""
    return UserError(
        f"{type(model).__name__} keeps no key-value cache: each token would read the whole text again",
        "decode with a model of transformers that takes `past_key_values` (Llama, GPT-2, Qwen, T5, ...)",
    )


def _rewindable(model: nn.Module) -> Any:
    """A cache that remembers enough to be taken back also where layers look only at a window; None: the model makes its own."""
    try:
        from transformers import DynamicCache
    except ImportError:
        raise UserError("transformers is not installed", "`pip install 'limbeck[hf]'`") from None
    config = getattr(model, "config", None)
    if "config" not in inspect.signature(DynamicCache.__init__).parameters or not hasattr(config, "get_text_config"):
        return None
    cache = DynamicCache(config=config)
    if hasattr(cache, "activate_past_recording"):
        cache.activate_past_recording()
    return cache


def _check_croppable(model: nn.Module, cache: Any) -> None:
    if not hasattr(cache, "crop") or not getattr(cache, "is_croppable", True) or any(getattr(cache, "is_linear", [])):
        raise UserError(
            f"the cache of {type(model).__name__} cannot be taken back after a rejected token",
            "speculative decoding needs models whose layers all attend to keys and values; take others, or decode plainly with `generate`",
        )
