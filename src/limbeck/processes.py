"""Several processes that work on one run, as `torchrun` or `accelerate launch` start them: who is who, and what they tell each other.

Started alone (no `WORLD_SIZE` in the environment) every function here is the identity and costs nothing. Process 0 is the one that writes
and prints. Numbers and objects travel over gloo, on the processor; gradients travel as `limbeck.engine` has it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from limbeck.errors import UserError, of_system

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
Mode = Literal["auto", "ddp", "fsdp"]

if {"RANK", "WORLD_SIZE"} <= set(os.environ):
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else each process warns that every weight was used, which is as it should be

PATIENCE = timedelta(days=7)
"""How long a process waits for another: a teacher that another run is training, a slow disk, a long report."""

LAUNCHER = {
    "ACCELERATE_MIXED_PRECISION": ("no", "the launcher's --mixed_precision is not read", "leave it out, and set precision in the recipe"),
    "ACCELERATE_USE_DEEPSPEED": ("false", "DeepSpeed is not offered", "start without --use_deepspeed; parallel=fsdp cuts models"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "1",
        "the launcher's --gradient_accumulation_steps is not read",
        "leave it out, and set training.accumulate",
    ),
}
"""Settings of `accelerate launch` that a recipe has a place for, or that are not offered: the value that is fine, and what is said."""

_state: dict[str, Any] = {"group": None, "mode": "ddp"}


def asked() -> int:
    """How many processes the launcher's environment speaks of; 1 without a launcher."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ):
        return 1
    return int(os.environ["WORLD_SIZE"])


def number() -> int:
    """This process's number as the environment says it; 0 without a launcher. Needs no torch."""
    return int(os.environ["RANK"]) if asked() > 1 else 0


def check_alone(command: str, instead: str) -> None:
    """Refuse a launcher for a command whose work several processes cannot share.

    Raises:
        UserError: naming the command.
    """
    if asked() > 1:
        raise UserError(f"`limbeck {command}` works in one process, and a launcher started {asked()}", instead)


def check_even(batch: int) -> None:
    """Refuse a batch that the processes cannot share out evenly.

    Raises:
        UserError: naming both numbers.
    """
    if batch % world():
        raise UserError(
            f"a batch of {batch} cannot be shared out evenly among {world()} processes",
            "set training.batch (it counts the samples of all processes together) to a multiple",
        )


def begin(device: str = "auto", mode: Mode = "auto") -> None:
    """Join the other processes, once; nothing to do when there is one only.

    Args:
        device: of the recipe; "cpu" joins over gloo, everything else over the accelerator's own library.
        mode: "ddp" keeps whole models on every process, "fsdp" shards them (FSDP2). "auto" is what `accelerate launch --use_fsdp` asked
            for, else "ddp".

    Raises:
        UserError: the launcher asked for what a recipe says, or for what is not offered (FSDP 1, DeepSpeed).
    """
    if asked() == 1:
        return
    for name, (fine, message, hint) in LAUNCHER.items():
        if os.environ.get(name, fine).lower() not in (fine, "false", "0", ""):
            raise UserError(message, hint)
    if mode == "auto":
        wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
        if wanted and os.environ.get("FSDP_VERSION", "2") != "2":
            raise UserError("FSDP version 1 is not offered", "start with `accelerate launch --use_fsdp --fsdp_version 2`")
        mode = "fsdp" if wanted else "ddp"
    _state["mode"] = mode
    if _state["group"] is not None:
        return
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=PATIENCE)
    _state["group"] = dist.new_group(backend="gloo", timeout=PATIENCE)


def end() -> None:
    """Leave the others, when the work is done."""
    if _state["group"] is None:
        return
    import torch.distributed as dist

    _state["group"] = None
    dist.destroy_process_group()


def world() -> int:
    """How many processes work together."""
    if _state["group"] is None:
        return 1
    import torch.distributed as dist

    return dist.get_world_size()


def rank() -> int:
    """Which of them this is."""
    if _state["group"] is None:
        return 0
    import torch.distributed as dist

    return dist.get_rank()


def sharding() -> bool:
    """Whether models are sharded over the processes (FSDP2)."""
    return world() > 1 and _state["mode"] == "fsdp"


# ---- telling ----


def told(value: T) -> T:
    """Process 0's value, on every process."""
    if world() == 1:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0, group=_state["group"])
    return box[0]


def every(value: T) -> list[T]:
    """The values of all processes in order, on every process."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value, group=_state["group"])
    return found


def together() -> None:
    """Wait until every process is here."""
    if world() > 1:
        import torch.distributed as dist

        dist.barrier(group=_state["group"])


def first(action: Callable[[], T]) -> T:
    """Let process 0 do something and tell the others what came of it; an error is raised on all of them."""
    if world() == 1:
        return action()
    value, error = None, None
    if rank() == 0:
        try:
            value = action()
        except Exception as caught:  # whatever it is, the others must not wait for a value that never comes
            error = caught
    value, failed = told((value, None if error is None else _portable(error)))
    if error is not None:
        raise error
    if failed is not None:
        raise failed
    return value  # type: ignore[return-value]


def first_then_others(action: Callable[[], T]) -> T:
    """Let process 0 do something that leaves its result on disk, then all others, which find it there; an error stops all."""
    if world() == 1:
        return action()
    found: list[T] = []

    def once() -> None:
        found.append(action())

    first(once)
    return found[0] if rank() == 0 else action()


def _portable(error: Exception) -> Exception:
    """An error that another process can raise; what cannot travel becomes its text."""
    known = error if isinstance(error, UserError) else of_system(error)
    if known is not None:
        return Told(known.message, known.hint)
    return RuntimeError(f"process 0: {type(error).__name__}: {error}")


class Told(UserError):
    """A `UserError` that process 0 raised, and prints; the others only stop."""

    def __reduce__(self) -> tuple[type[Told], tuple[str, str]]:
        return Told, (self.message, self.hint)


@contextmanager
def held_by_first(lock: AbstractContextManager[Any]) -> Iterator[None]:
    """A lock that process 0 holds for all of them; the others wait until it has it."""
    with ExitStack() as held:
        first(lambda: held.enter_context(lock) and None)
        yield


# ---- numbers ----


def wish(values: Tensor) -> Any:
    """Begin to take the largest of each number over all processes, in place; returns what `.wait()` waits for."""
    import torch.distributed as dist

    return dist.all_reduce(values, op=dist.ReduceOp.MAX, group=_state["group"], async_op=True)


def summed(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if world() == 1:
        return value
    import torch.distributed as dist

    total = value.detach().clone()
    # on an accelerator by its own library, which does not make the processor wait
    dist.all_reduce(total, group=_state["group"] if total.device.type == "cpu" else None)
    return total


def averaged(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The means of floating-point tensors over all processes, in one exchange for each type."""
    if world() == 1 or not tensors:
        return list(tensors)
    import torch

    found: dict[int, Tensor] = {}
    for kind in {tensor.dtype for tensor in tensors}:
        own = [(place, tensor) for place, tensor in enumerate(tensors) if tensor.dtype == kind]
        flat = summed(torch.cat([tensor.detach().flatten() for _, tensor in own])) / world()
        for (place, tensor), part in zip(own, flat.split([tensor.numel() for _, tensor in own])):
            found[place] = part.view_as(tensor)
    return [found[place] for place in range(len(tensors))]


def joined(rows: Tensor) -> Tensor:
    """The rows of all processes, one process after another: `(B, ...)` each gives `(world * B, ...)`; every B must be the same."""
    if world() == 1:
        return rows
    import torch
    import torch.distributed as dist

    own = rows.detach().to("cpu").contiguous()
    found = [torch.empty_like(own) for _ in range(world())]
    dist.all_gather(found, own, group=_state["group"])
    return torch.cat(found).to(rows.device)


def shared(items: Sequence[T]) -> Iterator[tuple[T, bool]]:
    """The items that are this process's to do, every `world`-th, with whether it counts.

    Every process gets as many, so that they can work in step; where they do not go round, the last one is done again and does not count.
    """
    for place in range(rank(), -(-len(items) // world()) * world(), world()):
        yield items[min(place, len(items) - 1)], place < len(items)


def in_order(parts: Sequence[list[T]]) -> list[T]:
    """What `shared` handed out, put together again: `parts` are the lists of all processes, of what counted."""
    return [part[place] for place in range(max(map(len, parts))) for part in parts if place < len(part)]


def level_buffers(modules: Sequence[nn.Module]) -> None:
    """Give floating-point buffers (running means of batch norms) their mean over all processes, in place."""
    if world() == 1:
        return
    import torch

    found = {id(b): b for module in modules for b in module.buffers() if b.is_floating_point()}
    with torch.no_grad():
        for buffer, mean in zip(found.values(), averaged(list(found.values()))):
            buffer.copy_(mean)
