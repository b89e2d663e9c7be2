"""Models cut over processes by FSDP2 (`torch.distributed.fsdp.fully_shard`), and made whole again for checkpoints and for keeping."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import processes
from limbeck.errors import UserError


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network, which are gathered one after the other: what transformers names, else members of module lists."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    if names and (found := [module for module in model.modules() if type(module).__name__ in names]):
        return found
    found, inside = [], set()
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1 and id(module) not in inside:
            inside |= {id(part) for part in module.modules()}
            found += [part for part in module if any(True for _ in part.parameters())]
    return found


def shard(model: nn.Module, device: torch.device, precision: str = "no") -> nn.Module:
    """Cut a network's weights over all processes, in place: each block is gathered when its turn comes, and let go afterwards.

    Args:
        model: every process must hold the same weights.
        device: where its shards live; a model on the processor is moved there block by block.
        precision: "bf16" gathers and computes in bfloat16 and sums gradients in float32.

    Raises:
        UserError: no FSDP of fp16.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if precision == "fp16":
        raise UserError("sharded models are not trained in fp16", "set precision=bf16 or precision=no")
    if next(model.parameters(), None) is None:
        return model
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if precision == "bf16" else MixedPrecisionPolicy()
    mesh = init_device_mesh(device.type, (processes.world(),))
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def let_go(model: nn.Module) -> None:
    """Drop gathered weights: after a pass without gradient the outermost ones stay, and an optimiser must be given the shards."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_shard(value: Any) -> bool:
    """Whether it is a sharded tensor."""
    if not processes.sharding():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def local(value: Tensor) -> Tensor:
    """This process's part of a tensor: all of it where it is not sharded."""
    return value.to_local() if is_shard(value) else value  # type: ignore[attr-defined]


def whole(value: Any) -> Any:
    """The same nested state with every shard gathered, on the processor; all processes must call it together."""
    if not processes.sharding():
        return value
    if is_shard(value):
        gathered = value.full_tensor()
        return gathered.cpu() if processes.rank() == 0 else gathered.new_empty(0, device="cpu")
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return type(value)(whole(item) for item in value) if isinstance(value, (list, tuple)) else value


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """A sharded network's state with every tensor whole, on every process, on the processor."""
    return {name: value.full_tensor().cpu() if is_shard(value) else value for name, value in model.state_dict().items()}


def _like(value: Tensor, shard: Tensor) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(shard.device, shard.dtype), shard.device_mesh, shard.placements)  # type: ignore[attr-defined]


def load_weights(model: nn.Module, state: dict[str, Tensor]) -> None:
    """`load_state_dict` of whole tensors into a network that may be sharded."""
    if processes.sharding():
        own = model.state_dict()
        state = {name: _like(value, own[name]) if name in own and is_shard(own[name]) else value for name, value in state.items()}
    model.load_state_dict(state)


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """The same of an optimiser: what has a sharded weight's shape is cut as that weight is."""
    if processes.sharding():
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        cut = {}
        for place, kept in state["state"].items():
            weight = weights[int(place)]
            fits = {k: isinstance(v, Tensor) and is_shard(weight) and v.shape == weight.shape and v.ndim > 0 for k, v in kept.items()}
            cut[place] = {k: _like(v, weight) if fits[k] else v for k, v in kept.items()}
        state = {**state, "state": cut}
    optimizer.load_state_dict(state)


def mixed(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether some of them are sharded and others are not; torch's fused updates cannot take both at once."""
    return len({is_shard(parameter) for parameter in parameters}) > 1


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> None:
    """`torch.nn.utils.clip_grad_norm_` over weights of which some may be sharded: one norm for all of them."""
    if not mixed(parameters):
        nn.utils.clip_grad_norm_(parameters, limit)
        return
    sides = [[p for p in parameters if is_shard(p) is side and p.grad is not None] for side in (True, False)]
    norms = [nn.utils.get_total_norm([p.grad for p in side]) for side in sides if side]
    norm = torch.stack([n.full_tensor() if is_shard(n) else n for n in norms]).norm()
    for side in sides:
        nn.utils.clip_grads_with_norm_(side, limit, norm)
