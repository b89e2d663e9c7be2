"""What a network was made from, for the notes of networks that are made of other ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from limbeck.errors import UserError
from limbeck.zoo.language import library
from limbeck.zoo.sentence import SentenceEncoder, head

TRANSFORMERS, SENTENCE = "quantised:transformers", "quantised:sentence"
_VOLATILE = ("auto_map", "quantization_config", "_name_or_path", "transformers_version", "dtype")
"""Entries of a configuration that say nothing about the network's shape, or would name code."""


def _is_transformers(network: nn.Module) -> bool:
    return any(kind.__module__.startswith("transformers.") and kind.__name__ == "PreTrainedModel" for kind in type(network).__mro__)


def origin_of(network: nn.Module) -> dict[str, Any] | None:
    """`{"ref", "args"}` by which `limbeck.zoo.build` makes the network with random weights; None where nobody knows."""
    own = getattr(network, "limbeck_config", None)
    if own is not None and not str(own.get("ref")).startswith("hf:"):
        return dict(own)
    if _is_transformers(network):
        config = {k: v for k, v in network.config.to_dict().items() if k not in _VOLATILE}  # type: ignore[union-attr,operator]
        pooled = getattr(network, "pooler", "") is not None
        kind = str(getattr(network.config, "_attn_implementation", None) or "eager")
        return {"ref": TRANSFORMERS, "args": {"config": config, "model": type(network).__name__, "attention": kind, "pooler": pooled}}
    if isinstance(network, SentenceEncoder):
        args: dict[str, Any] = {"of": origin_of(network.encoder), "pooling": network.pooling}
        if network.projection is not None:
            matrix = [m for m in network.projection.modules() if isinstance(m, nn.Linear)][-1]
            args |= {"projection": [matrix.in_features, matrix.out_features], "norm": not isinstance(network.projection, nn.Linear)}
        return {"ref": SENTENCE, "args": args}
    return None if own is None else dict(own)


def rebuild_transformers(config: Mapping[str, Any], model: str, attention: str = "sdpa", pooler: bool = True) -> nn.Module:
    """A model of transformers with random weights from its configuration as plain data; no code that it may name is run.

    Args:
        config: as transformers writes it.
        model: the class.
        attention: its kind of attention.
        pooler: whether a BERT-like encoder keeps its pooling layer.

    Raises:
        UserError: transformers knows no such architecture or class.
    """
    transformers = library()
    entries = {k: v for k, v in config.items() if k not in _VOLATILE}
    kind = getattr(transformers, model, None) if model.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise UserError(f"transformers has no model class {model!r}", "save the network again with the installed version")
    try:
        made = transformers.AutoConfig.for_model(entries.pop("model_type", None), **entries)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"the configuration of a {model} cannot be read: {str(error).splitlines()[0][:200]}", "save it again") from None
    made._attn_implementation = attention
    network = kind(made)
    if not pooler:
        network.pooler = None
    return network


def rebuild_sentence(
    of: Mapping[str, Any], pooling: str = "mean", projection: list[int] | None = None, norm: bool = True
) -> SentenceEncoder:
    """A `SentenceEncoder` with random weights.

    Args:
        of: `{"ref", "args"}` of the encoder of tokens.
        pooling: see `SentenceEncoder`.
        projection: its two widths, or None.
        norm: a layer norm stands in front of the matrix.
    """
    from limbeck.zoo.build import build

    inner = build(str(of.get("ref", "")), **dict(of.get("args") or {}))
    layer = None if projection is None else head(*projection) if norm else nn.Linear(*projection)
    return SentenceEncoder(inner, pooling, layer)
