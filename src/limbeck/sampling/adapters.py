"""Low-rank adapters on any network, through peft: a small student beside a frozen teacher of the same weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from limbeck.errors import UserError
from limbeck.zoo.lora import library


def _layers(network: nn.Module) -> list[tuple[str, Any]]:
    """Layers with adapters, by path; none where peft is missing."""
    return [(path, part) for path, part in network.named_modules() if hasattr(part, "lora_A") and hasattr(part, "base_layer")]


def has_lora(network: nn.Module) -> bool:
    """Whether `add_lora` put adapters into it."""
    return bool(_layers(network))


def add_lora(network: nn.Module, rank: int, alpha: float | None = None, targets: tuple[str, ...] | None = None) -> nn.Module:
    """Put low-rank adapters (Hu et al. 2021, arXiv:2106.09685) into a network, in place; only they keep learning.

    W x becomes W x + alpha / rank B A x with B zero at first, so that the network starts as it is.

    Args:
        network: any; a network of this package or a `DiffusersNetwork`.
        rank: of the adapters.
        alpha: their weight times rank; None for `rank`, a weight of 1.
        targets: ends of module paths ("to_q", "attention.qkv"): Linear and Conv2d layers under these names; None for every Linear layer.
            The inner layer of `nn.MultiheadAttention` is left out, for that module never calls it.

    Returns:
        The same network.

    Raises:
        UserError: peft is missing, rank below 1, adapters are there already, or no layer matches.
    """
    peft = library("diffusers")
    if rank < 1:
        raise UserError(f"adapters of rank {rank}", "give at least 1")
    if has_lora(network):
        raise UserError("the network has adapters already", "merge them first")
    inside = {f"{path}.out_proj" for path, part in network.named_modules() if isinstance(part, nn.MultiheadAttention)}
    kinds = (nn.Linear,) if targets is None else (nn.Linear, nn.Conv2d)
    offered = [path for path, part in network.named_modules() if path and isinstance(part, kinds) and path not in inside]
    chosen = offered if targets is None else [p for p in offered if any(p == t or p.endswith("." + t) for t in targets)]
    if not chosen:
        ends = sorted({path.rpartition(".")[2] for path in offered if not path.rpartition(".")[2].isdigit()})[:8]
        raise UserError(
            f"no layer of {type(network).__name__} matches {', '.join(targets or ('any Linear',))}",
            f"its layers end in {', '.join(ends)}" if ends else "adapters go into Linear and Conv2d layers, and it has none",
        )
    learning = tuple(name for name, parameter in network.named_parameters() if parameter.requires_grad)
    config = peft.LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=chosen, lora_dropout=0.0, bias="none")
    peft.inject_adapter_in_model(config, network)
    network.before_lora = learning  # type: ignore[assignment]
    return network


@contextmanager
def without_lora(network: nn.Module) -> Iterator[nn.Module]:
    """Inside, the network is what it was before `add_lora` (the teacher's pass); what learns and what not is left as it is.

    Raises:
        UserError: it has no adapters.
    """
    layers = _layers(network)
    if not layers:
        raise UserError(f"{type(network).__name__} has no adapters to leave out", "call add_lora first")
    before = [part._disable_adapters for _, part in layers]
    try:
        for _, part in layers:
            part._disable_adapters = True
        yield network
    finally:
        for (_, part), was in zip(layers, before):
            part._disable_adapters = was


def merge_lora(network: nn.Module) -> nn.Module:
    """A plain copy with the adapters added to the weights: the original classes, names and `limbeck_config`, and as trainable as before.

    Raises:
        UserError: it has no adapters.
    """
    if not has_lora(network):
        raise UserError(f"{type(network).__name__} has no adapters to merge", "call add_lora first")
    made = copy.deepcopy(network)
    for path, part in _layers(made):
        part.merge(safe_merge=False)
        parent, _, name = path.rpartition(".")
        setattr(made.get_submodule(parent), name, part.base_layer)
    learning = set(getattr(made, "before_lora", ()))
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name in learning)
    for name in ("before_lora", "peft_config", "_hf_peft_config_loaded"):
        if name in vars(made):
            delattr(made, name)
    return made
