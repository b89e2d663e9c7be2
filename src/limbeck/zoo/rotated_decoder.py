"""A decoder of transformers whose keys and values are rotated and cut, and the smaller cache that comes of it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.zoo.language import from_config, library
from limbeck.zoo.rotation import KEYS, VALUES, Rotation

REFERENCE = "zoo:rotated-decoder"
_PREFIX = "limbeck_rotated_"
_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")
_VOLATILE = ("auto_map", "quantization_config", "_name_or_path", "transformers_version", "dtype")
"""Entries of a configuration that say nothing about the network's shape, or would name code."""


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a decoder that a rotation can be put into, in order.

    Raises:
        UserError: naming the layers that are missing (GPT-2 joins query, key and value in one matrix; T5 and BERT are no such decoders).
    """
    found = [m for m in model.modules() if all(isinstance(getattr(m, name, None), nn.Linear) for name in _LAYERS)]
    found = [m for m in found if hasattr(m, "head_dim") and hasattr(m, "num_key_value_groups") and hasattr(m, "layer_idx")]
    if not found:
        raise UserError(
            f"{type(model).__name__} has no attention layers with {', '.join(_LAYERS)}, so its keys and values cannot be rotated",
            "use a decoder of the Llama family: llama, or hf:<folder> of Llama, Mistral, Qwen2, ...",
        )
    return found


def _attend(inner: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> tuple[Tensor, Any]:
    """Attention in rotated coordinates; `inner` is the function that transformers would have called."""
    rotation: Rotation = module.rotation
    if rotation.moments is not None:
        rotation.moments.add(key, value)
    u = rotation.matrices()
    if not rotation.stored:
        key, value = rotation.keys(key, u), rotation.values(value, u)
    mixed, weights = inner(module, rotation.queries(query, u), key, value, mask, **options)
    return rotation.back(mixed, u), weights


def _eager(module: nn.Module, *args: Any, **options: Any) -> tuple[Tensor, Any]:
    """The plain attention of the module's own architecture."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **options)


@functools.cache
def _register() -> None:
    """Make the two kinds of rotated attention known to transformers, with the masks of the kinds that they rest on."""
    library()
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name, inner in (("sdpa", ALL_ATTENTION_FUNCTIONS["sdpa"]), ("eager", _eager)):
        AttentionInterface.register(_PREFIX + name, functools.partial(_attend, inner))
        AttentionMaskInterface.register(_PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])


@functools.cache
def _cache_classes() -> tuple[type, type]:
    """(cache, layer): made when they are needed, because transformers is an extra."""
    library()
    from transformers.cache_utils import Cache, DynamicLayer

    class RotatedLayer(DynamicLayer):
        """Holds the kept coordinates of all heads side by side: `(B, 1, L, sum of ranks)`; nothing is stored for what is cut."""

        def __init__(self, rotation: Rotation) -> None:
            super().__init__()
            self.rotation = rotation
            self.places = [rotation.kept(kind).flatten().nonzero().squeeze(1) for kind in (KEYS, VALUES)]

        def _pack(self, rotated: Tensor, kind: int) -> Tensor:
            return rotated.transpose(1, 2).flatten(2)[..., self.places[kind]].unsqueeze(1)

        def _unpack(self, packed: Tensor, kind: int) -> Tensor:
            heads, width = self.rotation.heads, self.rotation.width
            whole = packed.new_zeros(len(packed), packed.shape[2], heads * width)
            whole[..., self.places[kind]] = packed.squeeze(1)
            return whole.unflatten(-1, (heads, width)).transpose(1, 2)

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
            """Rotate and keep new keys and values; all rotated ones `(B, H, L, d)`, zeros where coordinates are cut."""
            u = self.rotation.matrices()
            key = self._pack(self.rotation.keys(key_states, u), KEYS)
            value = self._pack(self.rotation.values(value_states, u), VALUES)
            key, value = super().update(key, value)
            return self._unpack(key, KEYS), self._unpack(value, VALUES)

    class RotatedCache(Cache):
        """A key-value cache of a `RotatedDecoder`."""

        def __init__(self, rotations: list[Rotation]) -> None:
            super().__init__(layers=[RotatedLayer(rotation) for rotation in rotations])

    return RotatedCache, RotatedLayer


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors that a cache of transformers holds."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


class RotatedDecoder(nn.Module):
    """A causal language model of transformers with rotated, cut keys and values (MatryoshkaKV, arXiv 2410.14731).

    At full ranks it computes what the model computes. With `use_cache` it makes a cache that holds the kept coordinates alone; the ranks
    must not change while a cache lives. A cache that is given from elsewhere holds whole keys and values.

    Args:
        base: the model; its attention layers get a `Rotation` each. Changed in place.

    Raises:
        UserError: attention layers that are not of the Llama kind, or an attention function other than sdpa and eager.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        layers = attention_layers(base)
        kind = str(base.config._attn_implementation)  # type: ignore[union-attr]
        if kind not in ("sdpa", "eager"):
            raise UserError(f"rotated keys and values with attention {kind!r}", "set attn_implementation to sdpa or eager")
        _register()
        for layer in layers:
            heads = layer.k_proj.out_features // layer.head_dim
            layer.rotation = Rotation(heads, layer.head_dim).to(layer.k_proj.weight.device)
        self.base = base
        base.set_attn_implementation(_PREFIX + kind)  # type: ignore[operator]
        if getattr(base, "limbeck_dense", False):
            self.limbeck_dense = True

    @property
    def config(self) -> Any:
        """The base model's."""
        return self.base.config

    @property
    def limbeck_config(self) -> dict[str, Any]:
        """What `limbeck.zoo.build` makes it from again; the base model's weights are saved with the rotations."""
        config = {k: v for k, v in self.base.config.to_dict().items() if k not in _VOLATILE}  # type: ignore[union-attr,operator]
        kind = str(self.config._attn_implementation).removeprefix(_PREFIX)
        return {"ref": REFERENCE, "args": {"config": config, "attention": kind}}

    def get_output_embeddings(self) -> nn.Module | None:
        """The base model's output matrix."""
        return self.base.get_output_embeddings()  # type: ignore[operator]

    def rotations(self) -> list[Rotation]:
        """One for each attention layer, in order."""
        return [module for module in self.base.modules() if isinstance(module, Rotation)]

    @property
    def ranks(self) -> Tensor:
        """`(layers, 2, H)` int64: kept coordinates of keys (0) and values (1)."""
        return torch.stack([rotation.ranks for rotation in self.rotations()]).long()

    def set_ranks(self, ranks: Tensor | int) -> None:
        """Keep so many coordinates: one number for all, or `(layers, 2, H)`.

        Raises:
            UserError: below 1 or above the size of a head.
        """
        rotations = self.rotations()
        shape = (len(rotations), 2, rotations[0].heads)
        whole = torch.as_tensor(ranks).expand(shape)
        if whole.min() < 1 or whole.max() > rotations[0].width:
            raise UserError(
                f"ranks from {int(whole.min())} to {int(whole.max())}, heads of {rotations[0].width}",
                f"keep 1 to {rotations[0].width} coordinates",
            )
        for rotation, own in zip(rotations, whole):
            rotation.ranks.copy_(own)

    @contextmanager
    def at(self, ranks: Tensor | int) -> Iterator[None]:
        """With other ranks meanwhile."""
        before = self.ranks
        self.set_ranks(ranks)
        try:
            yield
        finally:
            self.set_ranks(before)

    def new_cache(self) -> Any:
        """An empty cache for the present ranks."""
        return _cache_classes()[0](self.rotations())

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> Any:
        """As of the base model."""
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()
        stored = past_key_values is not None and isinstance(past_key_values, _cache_classes()[0])
        for rotation in self.rotations():
            rotation.stored = stored
        return self.base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **options,
        )


def rebuild_rotated(config: Mapping[str, Any], attention: str = "sdpa") -> RotatedDecoder:
    """A `RotatedDecoder` with random weights from plain data, for `load_model`.

    Args:
        config: of the base model, as transformers writes it; no code that it may name is run.
        attention: "sdpa" or "eager".

    Raises:
        UserError: transformers does not know the architecture, or it is no causal language model.
    """
    transformers = library()
    entries = {k: v for k, v in config.items() if k not in _VOLATILE}
    kind = entries.pop("model_type", None)
    try:
        made = transformers.AutoConfig.for_model(kind, **entries)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"the base model's configuration cannot be read: {str(error).splitlines()[0][:200]}", "save it again") from None
    made._attn_implementation = attention
    return RotatedDecoder(from_config(made, "causal-lm", "a rotated decoder"))
