"""Mixtures of experts of transformers: which neurons of which experts matter, and the same model with thinner or fewer experts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.signals.modes import evaluating

WIDTHS = {
    "mixtral": "intermediate_size",
    "phimoe": "intermediate_size",
    "olmoe": "intermediate_size",
    "qwen2_moe": "moe_intermediate_size",
    "qwen3_moe": "moe_intermediate_size",
}
"""Architectures whose experts are stacked as (E, 2 F, D) gate and up, (E, D, F) down, and where their configuration keeps F."""

GATED, DOWN = "gate_up_proj", "down_proj"


@dataclass(frozen=True)
class Layer:
    """One mixture layer of a model and the attention of the same block.

    Attributes:
        path: of the block.
        experts: path of the module with the stacked matrices.
        router: path of the module whose weight `(E, D)` scores the experts.
        attention: path of the attention.
    """

    path: str
    experts: str
    router: str
    attention: str


@dataclass(frozen=True)
class Sensitivity:
    """First-order Taylor scores of one layer.

    Attributes:
        neurons: `(E, F)`.
        groups: `(G,)` of the groups of query heads that share keys and values.
    """

    neurons: Tensor
    groups: Tensor


def mixture_layers(model: nn.Module) -> list[Layer]:
    """The mixture layers of a decoder, first to last.

    Raises:
        UserError: an architecture that is not known here (naming it and the known ones), or a model without experts.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in WIDTHS:
        raise UserError(
            f"{type(model).__name__} ({kind or 'no model of transformers'}) has no experts that can be made thinner",
            f"use a mixture of experts of transformers: {', '.join(WIDTHS)}; limbeck builds `mixtral` by sizes",
        )
    found = []
    for path, block in model.named_modules():
        if not hasattr(block, "self_attn"):
            continue
        inside = dict(block.named_modules())
        experts = [name for name, m in inside.items() if isinstance(getattr(m, GATED, None), nn.Parameter)]
        if len(experts) == 1:
            above, _, _ = experts[0].rpartition(".")
            router = f"{above}.gate" if f"{above}.gate" in inside else f"{above}.router"
            found.append(Layer(path, f"{path}.{experts[0]}", f"{path}.{router}", f"{path}.self_attn"))
    if not found:
        raise UserError(f"{type(model).__name__} has no layer with stacked experts", "give a mixture of experts")
    return found


def expert_width(model: nn.Module) -> int:
    """F, the neurons of one expert."""
    return int(getattr(model.config, WIDTHS[model.config.model_type]))  # type: ignore[union-attr, arg-type]


def width_step(width: int) -> int:
    """What widths of experts are multiples of: 8, as long as the model's own width is one, else 4, else 1.

    >>> width_step(192), width_step(12)
    (8, 4)
    """
    return next(step for step in (8, 4, 1) if width % step == 0)


def head_groups(model: nn.Module) -> int:
    """G, the groups of query heads that share keys and values."""
    return int(model.config.num_key_value_heads)  # type: ignore[union-attr]


def sensitivity(model: nn.Module, layers: Sequence[Layer], losses: Iterable[Callable[[], Tensor]]) -> list[Sensitivity]:
    """|theta dL/dtheta| of every weight, averaged over batches and summed for each neuron and each attention group.

    neuron i of expert e: its gate row, its up row and its column of the down matrix. Group g: the query rows of its heads, its key and
    value rows, the matching output columns. The model is read in evaluation mode (no routing noise); no gradient is left behind.

    Args:
        model: whose loss `losses` give.
        layers: of `mixture_layers`.
        losses: one function for each calibration batch.
    """
    tensors = [_tensors(model, layer) for layer in layers]
    flat = [t for row in tensors for t in row]
    total = [torch.zeros_like(t, dtype=torch.float32) for t in flat]
    count = 0
    with evaluating(model), torch.enable_grad():
        for loss in losses:
            for sum_, tensor, gradient in zip(total, flat, torch.autograd.grad(loss(), flat, allow_unused=True)):
                if gradient is not None:
                    sum_ += (tensor.detach() * gradient).abs()
            count += 1
    found, rest = [], iter(value / max(count, 1) for value in total)
    for _ in layers:
        gated, down, query, key, value, out = (next(rest) for _ in range(6))
        gate, up = gated.sum(2).chunk(2, 1)
        number = head_groups(model)
        groups = sum(x.reshape(number, -1).sum(1) for x in (query, key, value, out.T))
        found.append(Sensitivity((gate + up + down.sum(1)).cpu(), groups.cpu()))
    return found


def _tensors(model: nn.Module, layer: Layer) -> list[Tensor]:
    experts, attention = model.get_submodule(layer.experts), model.get_submodule(layer.attention)
    return [getattr(experts, GATED), getattr(experts, DOWN)] + [
        getattr(attention, name).weight for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    ]


def highest(scores: Tensor, keep: int) -> Tensor:
    """Places of the `keep` highest scores of the last axis, in their order.

    >>> highest(torch.tensor([[3.0, 1.0, 2.0]]), 2)
    tensor([[0, 2]])
    """
    return scores.topk(keep, -1).indices.sort(-1).values


def thinner(model: nn.Module, layers: Sequence[Layer], neurons: Sequence[Tensor], groups: Sequence[Tensor] | None = None) -> nn.Module:
    """The same model with fewer neurons in every expert, and, if asked for, fewer attention groups.

    Args:
        model: left as it is.
        layers: of `mixture_layers`.
        neurons: `(E, F')` of each layer: the neurons that each expert keeps.
        groups: `(G',)` of each layer: the attention groups that stay.

    Returns:
        A model of the same class with a changed configuration.
    """
    config, state = copy.deepcopy(model.config), dict(model.state_dict())
    setattr(config, WIDTHS[config.model_type], int(neurons[0].shape[1]))  # type: ignore[union-attr, index]
    for layer, keep in zip(layers, neurons):
        gated, down = (f"{layer.experts}.{name}" for name in (GATED, DOWN))
        width = state[gated].shape[1] // 2
        keep = keep.to(state[gated].device)
        rows = torch.cat([keep, keep + width], 1)
        state[gated] = state[gated].gather(1, rows.unsqueeze(2).expand(-1, -1, state[gated].shape[2]))
        state[down] = state[down].gather(2, keep.unsqueeze(1).expand(-1, state[down].shape[1], -1))
    if groups is not None:
        _fewer_groups(model, layers, groups, config, state)
    return _with(model, config, state)


def _fewer_groups(model: nn.Module, layers: Sequence[Layer], groups: Sequence[Tensor], config: Any, state: dict[str, Tensor]) -> None:
    number, each = head_groups(model), config.num_attention_heads // config.num_key_value_heads
    for layer, keep in zip(layers, groups):
        attention = model.get_submodule(layer.attention)
        if any(
            getattr(getattr(attention, name, None), "weight", torch.ones(attention.head_dim)).numel() != attention.head_dim
            for name in ("q_norm", "k_norm")
        ):
            raise UserError(f"{layer.attention} normalises all heads together", "leave groups at 0: the attention stays as it is")
        config.head_dim = attention.head_dim
        for name, axis in (("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 1)):
            for part in ("weight", "bias"):
                key = f"{layer.attention}.{name}.{part}"
                if key not in state or (part == "bias" and axis == 1):
                    continue
                parts = state[key].unflatten(axis, (number, -1))
                state[key] = parts.index_select(axis, keep.to(parts.device)).flatten(axis, axis + 1)
    kept = int(groups[0].numel())
    config.num_key_value_heads, config.num_attention_heads = kept, kept * each


def fewer_experts(model: nn.Module, layers: Sequence[Layer], experts: Sequence[Tensor]) -> nn.Module:
    """The same model with some experts of every layer, and the router's rows of them.

    Args:
        model: left as it is.
        layers: of `mixture_layers`.
        experts: `(E',)` of each layer: the experts that stay; at least as many as work on a token.
    """
    config, state = copy.deepcopy(model.config), dict(model.state_dict())
    kept = int(experts[0].numel())
    if kept < config.num_experts_per_tok:  # type: ignore[union-attr]
        raise UserError(
            f"{kept} experts would stay, and {config.num_experts_per_tok} work on every token",  # type: ignore[union-attr]
            "keep more experts",
        )
    name = "num_local_experts" if hasattr(config, "num_local_experts") else "num_experts"
    setattr(config, name, kept)
    for layer, keep in zip(layers, experts):
        for key in (f"{layer.experts}.{GATED}", f"{layer.experts}.{DOWN}", f"{layer.router}.weight"):
            state[key] = state[key][keep.to(state[key].device)]
    return _with(model, config, state)


def _with(model: nn.Module, config: Any, state: dict[str, Tensor]) -> nn.Module:
    """A model of the same class, mode and device with another configuration and these weights."""
    first = next(model.parameters())
    with torch.random.fork_rng(devices=[]):  # its own random weights are thrown away
        made = type(model)(config).to(device=first.device, dtype=first.dtype)
    made.load_state_dict({name: value.clone() for name, value in state.items()})
    if getattr(model, "limbeck_dense", False):
        made.limbeck_dense = True
    return made.train(model.training)


@contextmanager
def router_logits(model: nn.Module, layers: Sequence[Layer]) -> Iterator[list[Tensor]]:
    """What the routers say during the forward passes inside: `(tokens, E)` for each layer in turn."""
    said: list[Tensor] = []
    hooks = [model.get_submodule(layer.router).register_forward_hook(lambda m, a, output: said.append(output[0])) for layer in layers]
    try:
        yield said
    finally:
        for hook in hooks:
            hook.remove()


def balance_loss(logits: Sequence[Tensor], top_k: int, mask: Tensor | None) -> Tensor:
    """The load-balancing loss of Switch Transformers (arXiv 2101.03961, equations 4 to 6) over all layers; 1 times top_k when balanced.

    Args:
        logits: `(B L, E)` of each layer.
        top_k: experts that work on a token.
        mask: `(B, L)` true where there is a token; None counts all.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return load_balancing_loss_func(tuple(logits), logits[0].shape[-1], top_k, mask)
