"""A decoder of transformers whose attention became linear attention, or a Mamba block that holds linear attention exactly.

Attention to Mamba (arXiv 2604.14191): keys enter the state (B), queries read it (C), values are its inputs; an input of ones beside
them makes the normaliser in the same scan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import UserError, unknown
from limbeck.zoo.language import from_config, library
from limbeck.zoo.linear_attention import SMALL, LinearMixer, check_convertible
from limbeck.zoo.selective_scan import selective_scan

REFERENCE = "zoo:recurrent-decoder"
MIXERS = ("linear", "mamba")
UNIT_STEP = math.log(math.e - 1)
"""softplus of it is 1."""
UNIT_GATE = 1.2784645427610738
"""SiLU of it is 1."""
NO_DECAY = -16.0
"""Logarithm of -A at the start: over 1000 tokens less than 2e-4 of a state is forgotten."""
_VOLATILE = ("auto_map", "quantization_config", "_name_or_path", "transformers_version", "dtype")


@dataclass
class LayerState:
    """What one layer remembers: `tail` `(B, width - 1, D)` of the convolution's inputs, `h` `(B, G, 2 d, d + 1)`; None before the start."""

    tail: Tensor | None = None
    h: Tensor | None = None


@dataclass
class RecurrentState:
    """What a whole decoder remembers; its size does not depend on how much was read.

    Attributes:
        layers: in order.
        length: tokens read.
    """

    layers: list[LayerState] = field(default_factory=list)
    length: int = 0

    def get_seq_length(self) -> int:
        """Tokens read, as transformers' caches tell it."""
        return self.length


class MambaMixer(LinearMixer):
    """A causal convolution, a selective scan and a gate around the projections and feature maps of a `LinearMixer`.

    x' = conv(x);  B = phi_k(K x'), C = phi_q(Q x'), u = [V x'; 1], dt = softplus(W_dt x' + b)
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t^T,  [num; den] = h_t^T C_t,  y = O (SiLU(G x) * num / (|den| + 1e-6))
    dt has one value for each group of heads and A one for each group and feature, both shared by its channels, so that one channel of ones
    normalises all of them. At the start the convolution is the identity, dt is 1, A all but 0 and the gate 1: linear attention.

    Args:
        mixer: whose projections and maps are taken over (the same modules).
        taps: of the convolution.
    """

    def __init__(self, mixer: LinearMixer, taps: int = 4) -> None:
        if taps < 1:
            raise UserError(f"a convolution over {taps} places", "give at least 1")
        super().__init__(_Heads(mixer))
        self.map_q, self.map_k = mixer.map_q, mixer.map_k
        wide, inner = self.q_proj.in_features, self.q_proj.out_features
        self.taps = taps
        self.conv = nn.Conv1d(wide, wide, taps, groups=wide)
        self.step = nn.Linear(wide, self.groups)
        self.gate = nn.Linear(wide, inner)
        self.log_decay = nn.Parameter(torch.full((self.groups, 2 * self.width), NO_DECAY))
        with torch.no_grad():
            self.conv.weight.zero_()[:, :, -1] = 1
            self.conv.bias.zero_()  # type: ignore[union-attr]
            for layer, bias in ((self.step, UNIT_STEP), (self.gate, UNIT_GATE)):
                layer.weight.zero_()
                layer.bias.fill_(bias)
        self.to(self.q_proj.weight.device)
        self.state: LayerState | None = None

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **options: Any) -> tuple[Tensor, None]:
        """`(B, L, D)` to the same, and None; goes on from `state` where it is set, and leaves it behind the last place."""
        x = self._convolved(hidden_states)
        q, k, v = self.mapped(x, position_embeddings)
        u = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        dt = F.softplus(self.step(x).float())
        if self.keep is not None:
            dt = dt * self.keep.unsqueeze(-1)  # what is no token leaves the state alone
        y, h = selective_scan(u, k, q, dt, -self.log_decay.float().exp(), None if self.state is None else self.state.h)
        if self.state is not None:
            self.state.h = h.detach()
        y = y[..., :-1] / (y[..., -1:].abs() + SMALL)
        return self.o_proj(y.flatten(2).to(hidden_states.dtype) * F.silu(self.gate(hidden_states))), None

    def _convolved(self, x: Tensor) -> Tensor:
        if self.keep is not None:
            x = x * self.keep.unsqueeze(-1)
        tail = x.new_zeros(len(x), self.taps - 1, x.shape[2])
        if self.state is not None and self.state.tail is not None:
            tail = self.state.tail
        padded = torch.cat([tail, x], 1)
        if self.state is not None:
            self.state.tail = padded[:, padded.shape[1] - self.taps + 1 :].detach()
        return self.conv(padded.transpose(1, 2)).transpose(1, 2)


class _Heads:
    """What `LinearMixer` takes from an attention layer, taken from another mixer."""

    def __init__(self, mixer: LinearMixer) -> None:
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj
        self.head_dim = mixer.width


class RecurrentDecoder(nn.Module):
    """A causal language model of transformers with mixers in place of its attention layers.

    Args:
        base: the model; changed in place.
        mixer: "linear" or "mamba".
        taps: of the convolutions of "mamba".

    Raises:
        UserError: attention that cannot be converted (see `check_convertible`), or an unknown mixer.
    """

    def __init__(self, base: nn.Module, mixer: str = "linear", taps: int = 4) -> None:
        super().__init__()
        if mixer not in MIXERS:
            raise unknown("mixer", mixer, MIXERS)
        check_convertible(base)
        for block in _blocks(base):
            block.self_attn = LinearMixer(block.self_attn)  # type: ignore[arg-type]
        self.base, self.mixer, self.taps = base, "linear", taps
        if getattr(base, "limbeck_dense", False):
            self.limbeck_dense = True
        if mixer == "mamba":
            self.to_mamba(taps)

    def to_mamba(self, taps: int = 4) -> RecurrentDecoder:
        """Put every linear attention into a Mamba block that computes the same; in place."""
        for block in _blocks(self.base):
            block.self_attn = MambaMixer(block.self_attn, taps)  # type: ignore[arg-type]
        self.mixer, self.taps = "mamba", taps
        return self

    @property
    def mixers(self) -> list[LinearMixer]:
        """One for each layer, in order."""
        return [block.self_attn for block in _blocks(self.base)]  # type: ignore[misc]

    @property
    def config(self) -> Any:
        """The base model's."""
        return self.base.config

    @property
    def limbeck_config(self) -> dict[str, Any]:
        """What `limbeck.zoo.build` makes it from again."""
        config = {k: v for k, v in self.base.config.to_dict().items() if k not in _VOLATILE}  # type: ignore[union-attr,operator]
        return {"ref": REFERENCE, "args": {"config": config, "mixer": self.mixer, "taps": self.taps}}

    def get_output_embeddings(self) -> nn.Module | None:
        """The base model's output matrix."""
        return self.base.get_output_embeddings()  # type: ignore[operator]

    def get_input_embeddings(self) -> nn.Module:
        """The base model's token embeddings."""
        return self.base.get_input_embeddings()  # type: ignore[operator]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RecurrentState | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> Any:
        """As of the base model; with `use_cache` (Mamba blocks only) `past_key_values` is a `RecurrentState`, changed in place."""
        state = past_key_values
        if use_cache and state is None and self.mixer == "mamba":
            state = RecurrentState([LayerState() for _ in self.mixers])
        ids = input_ids if input_ids is not None else options["inputs_embeds"]
        start, length = (state.length if state is not None else 0), ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(start, start + length, device=ids.device).unsqueeze(0)
        keep = None if attention_mask is None else attention_mask[:, -length:].bool()
        with self.reading(keep, state):
            output = self.base(input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=logits_to_keep, **options)
        if state is not None:
            state.length += length
            output.past_key_values = state
        return output

    @contextmanager
    def reading(self, keep: Tensor | None, state: RecurrentState | None = None) -> Iterator[None]:
        """The mixers know inside which places hold tokens, and what they remember."""
        try:
            for number, mixer in enumerate(self.mixers):
                mixer.keep = keep
                if state is not None:
                    mixer.state = state.layers[number]  # type: ignore[assignment]
            yield
        finally:
            for mixer in self.mixers:
                mixer.keep = None
                if isinstance(mixer, MambaMixer):
                    mixer.state = None


def _blocks(base: nn.Module) -> list[nn.Module]:
    """The modules that hold an attention layer (or what took its place), in order."""
    return [m for m in base.modules() if isinstance(getattr(m, "self_attn", None), nn.Module)]


def rebuild_recurrent(config: Mapping[str, Any], mixer: str = "mamba", taps: int = 4) -> RecurrentDecoder:
    """A `RecurrentDecoder` with random weights from plain data, for `load_model`.

    Args:
        config: of the base model, as transformers writes it; no code that it may name is run.
        mixer, taps: see `RecurrentDecoder`.

    Raises:
        UserError: transformers does not know the architecture, or its attention cannot be converted.
    """
    entries = {k: v for k, v in config.items() if k not in _VOLATILE}
    kind = entries.pop("model_type", None)
    try:
        made = library().AutoConfig.for_model(kind, **entries)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"the base model's configuration cannot be read: {str(error).splitlines()[0][:200]}", "save it again") from None
    return RecurrentDecoder(from_config(made, "causal-lm", "a recurrent decoder"), mixer, taps)
