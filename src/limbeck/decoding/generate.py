"""Plain decoding with a cache: many prompts at once, one token a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limbeck import processes
from limbeck.decoding.cached import Cached, check_context, context_of, evaluating, forward_arguments, is_encoder_decoder, no_cache
from limbeck.decoding.sampling import check_generator, check_sampling, sample
from limbeck.errors import UserError

_LOOK = 16  # on an accelerator, steps between two looks at whether all rows have ended: a look waits for the device


@dataclass(frozen=True)
class Generated:
    """What was written after the prompts.

    Attributes:
        ids: `(B, n)` int64; `pad` where a row had ended. n is the length of the longest row.
        mask: `(B, n)` bool, true on written tokens, up to and with the end-of-text token.
    """

    ids: Tensor
    mask: Tensor


class _Decoder:
    """The decoder of an encoder-decoder model: the encoder reads once, then one token a step."""

    def __init__(self, model: nn.Module, ids: Tensor, mask: Tensor | None, vocabulary: int | None) -> None:
        if not {"past_key_values", "use_cache"} <= forward_arguments(model):
            raise no_cache(model)
        self.model, self.mask, self.vocabulary, self.cache = model, mask, vocabulary, None
        self.encoded = model.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True)

    def feed(self, ids: Tensor) -> Tensor:
        out = self.model(
            encoder_outputs=self.encoded,
            attention_mask=self.mask,
            decoder_input_ids=ids,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        )
        if out.past_key_values is None:
            raise no_cache(self.model)
        self.cache = out.past_key_values
        return out.logits[:, -1:, : self.vocabulary]


def _check_whole(model: nn.Module) -> None:
    """Processes would wait for each other without end: each writes other texts, of other lengths."""
    if not processes.sharding():
        return
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise UserError("a model that is cut over several processes cannot write texts", "set parallel=ddp")


def generate(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | Iterable[int] | None = None,
    pad: int = 0,
    generator: torch.Generator | None = None,
    vocabulary: int | None = None,
) -> Generated:
    """Continue prompts with a transformers language model: causal, or encoder-decoder (the prompt is then the source).

    The model is put into evaluation mode without gradients and every module gets its own mode back. Tokens that follow an end are `pad`.
    With temperature 0 the tokens are those of the model's own `generate(do_sample=False)`; forced or suppressed tokens, penalties and
    beams of a `generation_config` are not applied.

    Args:
        model: with `past_key_values` in its `forward`.
        ids: `(B, P)` prompts, causal ones padded on the left.
        mask: `(B, P)` true (or 1) on tokens; None when nothing is padded.
        new_tokens: at most so many; the loop ends when all rows have ended.
        temperature: divides the logits; 0 is greedy.
        top_k, top_p: as in `limbeck.decoding.sample`; None keeps all tokens.
        eos: the token (or tokens) that end a text; None writes `new_tokens` for every row.
        pad: what fills rows that have ended.
        generator: draws tokens; torch's global generator when None.
        vocabulary: only the first so many logits are tokens (output matrices are often padded).

    Raises:
        UserError: no prompts, empty or right-padded prompts, more positions than the model has, a model without a cache, or one that is cut
            over processes.
    """
    _check_whole(model)
    check_sampling(temperature, top_k, top_p)
    check_generator(generator, ids.device)
    mask = check_prompts(ids, mask, new_tokens)
    with evaluating(model):
        if is_encoder_decoder(model):
            _check_source(model, ids, new_tokens)
            reader = _Decoder(model, ids, mask, vocabulary)
            fed = torch.full_like(ids[:, :1], decoder_start(model))
        else:
            _check_causal(model, ids, mask, new_tokens)
            reader = Cached(model, mask if mask is None or not bool(mask.all()) else None, new_tokens, vocabulary)
            fed = ids
        ends = torch.tensor(end_tokens(eos), device=ids.device, dtype=ids.dtype)
        out = ids.new_full((len(ids), new_tokens), pad)
        live = torch.ones_like(out[:, 0], dtype=torch.bool)
        written = torch.zeros_like(out, dtype=torch.bool)
        every = 1 if ids.device.type == "cpu" else _LOOK
        for step in range(new_tokens):
            token = sample(reader.feed(fed)[:, -1], temperature, top_k, top_p, generator)
            out[:, step] = torch.where(live, token, pad)
            written[:, step] = live
            if len(ends):
                live = live & ~torch.isin(token, ends)
                if step % every == every - 1 and not bool(live.any()):
                    break
            fed = out[:, step : step + 1]
    length = int(written.sum(1).max())
    return Generated(out[:, :length], written[:, :length])


def end_tokens(eos: int | Iterable[int] | None) -> list[int]:
    """The tokens that end a text, as a list."""
    return [] if eos is None else [eos] if isinstance(eos, int) else [int(token) for token in eos]


def decoder_start(model: nn.Module) -> int:
    """The token an encoder-decoder model's answers begin with."""
    for holder in (getattr(model, "generation_config", None), model.config):
        start = getattr(holder, "decoder_start_token_id", None)
        if start is not None:
            return int(start)
    raise UserError(f"{type(model).__name__} has no decoder_start_token_id", "set it in model.config (T5: the padding token)")


def check_prompts(ids: Tensor, mask: Tensor | None, new_tokens: int) -> Tensor | None:
    """The mask as bool, once prompts, mask and number of new tokens make sense together."""
    if new_tokens < 1:
        raise UserError(f"new_tokens = {new_tokens}", "ask for 1 or more")
    if ids.ndim != 2 or not ids.shape[0] or not ids.shape[1]:
        raise UserError(f"prompts of shape {tuple(ids.shape)}", "give at least one prompt of at least one token, (B, P)")
    if mask is None:
        return None
    if mask.shape != ids.shape:
        raise UserError(f"mask of shape {tuple(mask.shape)} for prompts of shape {tuple(ids.shape)}", "give one entry a token")
    mask = mask.bool()
    if bool((~mask.any(1)).any()):
        raise UserError("a prompt is empty: its mask is false everywhere", "leave empty prompts out, or begin them with a start token")
    return mask


def _check_causal(model: nn.Module, ids: Tensor, mask: Tensor | None, new_tokens: int) -> None:
    longest = ids.shape[1]
    if mask is not None:
        if not bool(mask[:, -1].all()):
            raise UserError("prompts are padded on the right: a causal model continues from the last place", "pad prompts on the left")
        longest = int(mask.sum(1).max())
    check_context(model, longest, new_tokens)


def _check_source(model: nn.Module, ids: Tensor, new_tokens: int) -> None:
    context = context_of(model)
    for what, count in (("source", ids.shape[1]), ("answer", new_tokens)):
        if context is not None and count > context:
            raise UserError(f"the {what} has {count} tokens, the model's context holds {context}", f"cut it to {context} tokens or fewer")
