"""What a model costs: parameters, floating-point operations, latency, bytes on disk and peak memory, all measured."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.signals.modes import evaluating


@dataclass(frozen=True)
class Cost:
    """The price of one model.

    Attributes:
        params: number of weights (`limbeck.zoo.parameters`: a tensor that is shared counts once, weights held as codes count).
        flops: floating-point operations of the forward pass of one sample; a multiply-add counts 2. Only the operations
            that `torch.utils.flop_counter` knows (matrix products, convolutions, attention) are counted.
        latency_ms: median wall time of one forward pass of a batch of `batch` samples, in milliseconds.
        latency_iqr_ms: distance between the quartiles of the same times, in milliseconds.
        bytes: parameters and persistent buffers as safetensors stores them (header left out).
        peak_memory: bytes; what it means is in `peak_memory_kind`.
        peak_memory_kind: "cuda max_memory_allocated" or "cpu estimate: weights + sum of layer outputs".
        batch: samples in the timed and memory-measured batch.
        device: type of the device the model was on.
    """

    params: int
    flops: int
    latency_ms: float
    latency_iqr_ms: float
    bytes: int
    peak_memory: int
    peak_memory_kind: str
    batch: int
    device: str

    def as_dict(self) -> dict[str, Any]:
        """The same as a plain dict, for summary.json."""
        return asdict(self)


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def _resize(value: Any, count: int) -> Any:
    """The first `count` samples of every tensor, repeated from the start where there are fewer."""
    if isinstance(value, Tensor):
        if value.ndim == 0 or len(value) == count:
            return value
        return value[torch.arange(count, device=value.device) % len(value)]
    if isinstance(value, dict):
        return {key: _resize(item, count) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_resize(item, count) for item in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of parameters and persistent buffers; storage that two names share counts once."""
    seen: dict[tuple[int, tuple[int, ...]], int] = {}
    for tensor in model.state_dict().values():
        if isinstance(tensor, Tensor):
            seen[(tensor.data_ptr() if tensor.numel() else id(tensor), tuple(tensor.shape))] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def count_flops(model: nn.Module, inputs: Any) -> int:
    """Floating-point operations of the forward pass of one sample; a multiply-add counts 2."""
    from torch.utils.flop_counter import FlopCounterMode

    grouped = getattr(torch.ops.aten, "_grouped_mm", None)  # the stacked experts of transformers, which torch does not count
    with _measuring(model), FlopCounterMode(display=False, custom_mapping={grouped: _grouped_flops} if grouped else {}) as counter:
        _call(model, _resize(inputs, 1))
    return int(counter.get_total_flops())


def _grouped_flops(rows: Any, matrices: Any, *args: Any, out_shape: Any = None, **options: Any) -> int:
    """Of rows `(T, K)`, each times one of the matrices `(E, K, N)`."""
    return 2 * math.prod(rows) * matrices[-1]


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient; afterwards every submodule is back in the mode that it had.

    Parameters do not ask for gradients meanwhile: torch's FLOP counter stumbles over an output that is a view of one that does.
    """
    asking = [p for p in model.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        with evaluating(model), torch.no_grad():
            yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _peak_memory(model: nn.Module, inputs: Any, device: torch.device) -> tuple[int, str]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        _call(model, inputs)
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)), "cuda max_memory_allocated"
    total = 0

    def add(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal total
        total += sum(t.numel() * t.element_size() for t in _tensors(output))

    leaves = [module for module in model.modules() if not any(module.children())]
    hooks = [module.register_forward_hook(add) for module in leaves]
    try:
        _call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return stored_bytes(model) + total, "cpu estimate: weights + sum of layer outputs"


def cost(model: nn.Module, inputs: Any, *, repeats: int = 30, warmup: int = 5, batch: int = 1) -> Cost:
    """Measure a model on the device it stands on.

    Args:
        model: any module; its train or eval mode is as before afterwards.
        inputs: a tensor `(N, ...)` for `model(x)`, a dict for `model(**x)`, a tuple for `model(*x)`; the first dimension of each
            tensor is the sample. `batch` samples are taken from it (repeated when there are fewer).
        repeats: timed forward passes.
        warmup: forward passes before them.
        batch: samples in one timed pass.
    """
    from limbeck.zoo import parameters

    first = next(chain(model.parameters(), model.buffers()), None)
    device = first.device if first is not None else next(_tensors(inputs)).device
    samples = _resize(inputs, batch)
    flops = count_flops(model, inputs)
    with _measuring(model):
        for _ in range(warmup):
            _call(model, samples)
        times = []
        for _ in range(max(repeats, 1)):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            _call(model, samples)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append((time.perf_counter() - start) * 1e3)
        peak, kind = _peak_memory(model, samples, device)
    low, middle, high = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return Cost(
        params=parameters(model),
        flops=flops,
        latency_ms=middle,
        latency_iqr_ms=high - low,
        bytes=stored_bytes(model),
        peak_memory=peak,
        peak_memory_kind=kind,
        batch=batch,
        device=device.type,
    )
