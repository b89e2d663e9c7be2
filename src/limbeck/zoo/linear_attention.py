"""Linear attention with learned feature maps in the place of a decoder's softmax attention (Hedgehog, arXiv 2402.04347)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.zoo.rotated_decoder import attention_layers

KNOWN = ("llama", "mistral", "mixtral", "qwen2")
"""Architectures whose attention is queries, keys, values, rotary positions, softmax and an output matrix, and nothing else."""

SMALL = 1e-6
"""Added to the denominator: where nothing has been read yet, the answer is 0."""


def check_convertible(model: nn.Module) -> None:
    """Refuse decoders whose attention does more than linear attention can stand for.

    Raises:
        UserError: naming what stands in the way: sliding windows, capped logits, non-causal attention, an unknown architecture.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    hint = f"use a causal decoder with plain attention: {', '.join(KNOWN)}"
    if getattr(config, "attn_logit_softcapping", None):
        raise UserError(f"{name} caps its attention logits (attn_logit_softcapping), which has no linear form", hint)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window or "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise UserError(f"{name} attends within a sliding window of {window} tokens, which a running sum cannot forget", hint)
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "is_causal", True) is False:
        raise UserError(f"{name} attends to later tokens, which a recurrent state cannot", hint)
    if getattr(config, "model_type", None) not in KNOWN:
        raise UserError(f"attention of {name} ({getattr(config, 'model_type', 'no model of transformers')}) is not known here", hint)
    layers = attention_layers(model)
    if not all(getattr(layer, "is_causal", True) for layer in layers):
        raise UserError(f"{name} attends to later tokens, which a recurrent state cannot", hint)


class FeatureMap(nn.Module):
    """phi(x) = softmax([W x + b; -(W x + b)]) over the 2 d features of each head; W begins at the identity, b at 0.

    Args:
        heads: H, each with weights of its own.
        width: d.
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width).expand(heads, width, width).clone())
        self.bias = nn.Parameter(torch.zeros(heads, width))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, L, H, d)` to `(B, L, H, 2 d)`, positive, of sum 1, in float32."""
        mapped = torch.einsum("blhd,hed->blhe", x.float(), self.weight.float()) + self.bias.float()
        return torch.cat([mapped, -mapped], -1).softmax(-1)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """y_t = sum_{s<=t} (q_t . k_s) v_s / (sum_{s<=t} q_t . k_s + 1e-6), by the quadratic form.

    Args:
        q: `(B, L, G, R, N)` mapped queries, R of each group.
        k: `(B, L, G, N)` mapped keys; 0 where there is no token.
        v: `(B, L, G, d)`.

    Returns:
        `(B, L, G, R, d)`.
    """
    scores = torch.einsum("btgrn,bsgn->bgrts", q, k).tril()
    mixed = torch.einsum("bgrts,bsgd->btgrd", scores, v.to(scores.dtype))
    return mixed / (scores.sum(-1).abs() + SMALL).permute(0, 3, 1, 2).unsqueeze(-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions as Llama has them; x `(B, L, H, d)`, cos and sin `(B, L, d)`."""
    first, second = x.chunk(2, -1)
    return x * cos.unsqueeze(2) + torch.cat([-second, first], -1) * sin.unsqueeze(2)


class LinearMixer(nn.Module):
    """Stands where a decoder's attention stood: the same projections and positions, feature maps instead of the softmax.

    Args:
        attention: the layer of transformers whose projections are taken over (the same modules, not copies).

    Attributes:
        keep: `(B, L)` true where there is a token; None where all are. Set by the decoder for each call.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (getattr(attention, f"{name}_proj") for name in "qkvo")
        self.width = int(attention.head_dim)  # type: ignore[arg-type]
        self.groups = self.k_proj.out_features // self.width
        self.heads = self.q_proj.out_features // self.width
        self.map_q, self.map_k = FeatureMap(self.heads, self.width), FeatureMap(self.groups, self.width)
        self.to(self.q_proj.weight.device)
        self.keep: Tensor | None = None

    def mapped(self, x: Tensor, positions: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Mapped queries `(B, L, G, R, 2 d)` and keys `(B, L, G, 2 d)`, and values `(B, L, G, d)` of hidden states `(B, L, D)`."""
        q, k, v = (project(x).unflatten(-1, (-1, self.width)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q = self.map_q(rotate(q, *positions)).unflatten(2, (self.groups, -1))
        k = self.map_k(rotate(k, *positions))
        if self.keep is not None:
            k = k * self.keep[..., None, None]
        return q, k, v

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **options: Any) -> tuple[Tensor, None]:
        """What the attention gave: `(B, L, D)`, and no weights."""
        y = linear_attention(*self.mapped(hidden_states, position_embeddings))
        return self.o_proj(y.flatten(2).to(hidden_states.dtype)), None
