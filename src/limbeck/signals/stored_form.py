"""How a teacher's outputs are laid out on disk: forms, sizes, packing and unpacking, fingerprints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.errors import UserError, unknown
from limbeck.storage import fingerprint, tensors_fingerprint

Form = Literal["float16", "float32", "topk"]
FORMS = ("float16", "float32", "topk")
VALUES, INDICES, REST = "logits.values", "logits.indices", "logits.rest"
_HEADER = 1024


@dataclass(frozen=True)
class Layout:
    """What one stored row holds.

    Attributes:
        signals: name to shape of one sample's signal, without the batch.
        form: "float16", "float32", or "topk": of the logits only the `k` largest in float16, their indices, and the probability
            mass of all others in float32; further signals are float16.
        k: how many logits are kept in the form "topk".
    """

    signals: dict[str, tuple[int, ...]]
    form: Form = "float16"
    k: int | None = None

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise unknown("stored form", self.form, FORMS)
        if not self.signals:
            raise UserError("nothing to store: no signals were given", 'name them with their shapes, for example {"logits": (10,)}')
        object.__setattr__(self, "signals", {name: tuple(int(n) for n in shape) for name, shape in self.signals.items()})
        if self.form != "topk":
            return
        if "logits" not in self.signals:
            raise UserError("the form 'topk' is for logits, and none are stored", "store 'logits' too, or use the form 'float16'")
        if self.k is None or not 1 <= self.k <= self.classes:
            raise UserError(f"top-k storage with k={self.k} of {self.classes} classes", "give k between 1 and the number of classes")

    @property
    def classes(self) -> int:
        """Width of the logits."""
        return self.signals["logits"][-1]

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The stored tensors of one row: name to (shape, type)."""
        wide = torch.float32 if self.form == "float32" else torch.float16
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, shape in self.signals.items():
            if self.form == "topk" and name == "logits":
                short = torch.int16 if self.classes <= 32768 else torch.int32
                found[VALUES] = ((*shape[:-1], self.k or 0), torch.float16)
                found[INDICES] = ((*shape[:-1], self.k or 0), short)
                found[REST] = (shape[:-1], torch.float32)
            else:
                found[name] = (shape, wide)
        return found

    @property
    def bytes_per_sample(self) -> int:
        """Bytes of one row (one view of one sample), without the files' headers."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensors().values())

    def pack(self, signals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows `(B, ...)` of signals in their stored form, on the CPU.

        In the form "topk" the three stored parts may be given instead of "logits".

        Raises:
            UserError: a signal is missing, has another shape, or has values that the form cannot hold (NaN; beyond 65504 in half).
        """
        packed: dict[str, Tensor] = {}
        for name, shape in self.signals.items():
            if name == "logits" and self.form == "topk" and VALUES in signals:  # a caller that never had the whole vocabulary
                packed |= {part: signals[part].detach().cpu() for part in (VALUES, INDICES, REST)}
                continue
            if name not in signals:
                raise unknown("signal to store", name, signals)
            value = signals[name].detach().cpu()
            if tuple(value.shape[1:]) != shape:
                raise UserError(f"signal {name!r} has shape {tuple(value.shape[1:])} a sample, the store was planned for {shape}")
            packed |= self._top(value.float()) if self.form == "topk" and name == "logits" else {name: value}
        for name, (_, dtype) in self.tensors().items():
            packed[name] = packed[name].to(dtype).contiguous()
            if dtype.is_floating_point and not torch.isfinite(packed[name]).all():
                raise UserError(
                    f"signal {name!r} has values that {str(dtype).removeprefix('torch.')} cannot hold (NaN, infinite or beyond 65504)",
                    "use form='float32' for large values; NaN or infinite ones come from the teacher itself",
                )
        return packed

    def _top(self, logits: Tensor) -> dict[str, Tensor]:
        values, indices = logits.topk(self.k or 0, dim=-1)
        others = logits.scatter(-1, indices, -math.inf)
        rest = (others.logsumexp(-1) - logits.logsumexp(-1)).exp()
        return {VALUES: values, INDICES: indices, REST: rest}


def dense_logits(values: Tensor, indices: Tensor, rest: Tensor, classes: int) -> Tensor:
    """Full logits from the top k: the mass of the rest is spread evenly over the classes that were not kept.

    The kept logits are exact (up to half precision), and so are their softmax probabilities at temperature 1; each other class
    gets `rest / (classes - k)`. At other temperatures, and for the order among the others, this is an approximation.

    Args:
        values: `(..., k)` largest logits.
        indices: `(..., k)` their classes, any integer type.
        rest: `(...)` probability mass of all other classes at temperature 1.
        classes: width of the result.

    Returns:
        `(..., classes)` float32.
    """
    values, rest = values.float(), rest.float()
    others = max(classes - values.shape[-1], 1)
    tiny = torch.finfo(torch.float32).tiny
    odds = rest.clamp_min(tiny).log() - torch.log1p(-rest.clamp_max(1 - 1e-6))
    floor = values.logsumexp(-1) + odds - math.log(others)
    dense = floor.unsqueeze(-1).expand(*values.shape[:-1], classes).clone()
    return dense.scatter_(-1, indices.long(), values)


def plan_bytes(
    samples: int,
    signals: Mapping[str, tuple[int, ...]],
    form: Form = "float16",
    k: int | None = None,
    views: int = 1,
    shard_size: int = 1024,
) -> int:
    """Bytes that a store will take at most, before anything is written: the rows and 1 KB a shard for headers and manifest.

    Args:
        samples: number of samples, N.
        signals: name to shape of one sample's signal.
        form, k: as in `Layout`.
        views: stored augmentations a sample.
        shard_size: rows a file.
    """
    rows = samples * views
    return rows * Layout(dict(signals), form, k).bytes_per_sample + _HEADER * (math.ceil(rows / shard_size) + 1)


def model_fingerprint(model: nn.Module) -> str:
    """A short digest (16 hex digits) of a model: its class, its configuration if it has one, and every tensor of its state.

    The same weights give the same digest on every device; wrappers of `torch.compile` and DDP are looked through.
    """
    for wrapper in ("_orig_mod", "module"):
        inner = getattr(model, wrapper, None)
        if isinstance(inner, nn.Module) and type(model).__name__ in ("OptimizedModule", "DistributedDataParallel", "DataParallel"):
            model = inner
    config = _config(model)
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    return fingerprint({"class": kind, "config": config, "tensors": tensors_fingerprint(tensors)})


SAVED_WITH = ("architectures", "dtype", "torch_dtype", "transformers_version")
"""Keys that transformers adds to a configuration when a model is saved; a teacher just trained and the same one found again are one."""


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    elif hasattr(config, "__dataclass_fields__") and not isinstance(config, type):
        config = asdict(config)
    if not isinstance(config, Mapping):
        return None
    return {str(k): v for k, v in config.items() if not str(k).startswith("_") and k not in SAVED_WITH}
