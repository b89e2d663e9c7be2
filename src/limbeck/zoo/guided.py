"""A denoising network with adapters that are told a guidance scale: one pass does what two did."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import UserError

FORMS = ("additive", "attention")


class _Scalar(nn.Module):
    """A number as a vector: cos(2 pi (f s + p)) with fixed random f and p, then a small network (Tancik et al. 2020, arXiv:2006.10739)."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(hidden))
        self.register_buffer("phases", torch.rand(hidden))
        self.layers = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.ReLU(), nn.Linear(4 * hidden, hidden), nn.LayerNorm(hidden))

    def forward(self, value: Tensor) -> Tensor:
        return self.layers((2 * math.pi * (value[:, None] * self.frequencies + self.phases)).cos())


class _Additive(nn.Module):
    """The same vector added to every token of a stage; zero at first."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.LayerNorm(hidden), nn.Linear(hidden, width))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, tokens: Tensor, told: Tensor) -> Tensor:
        return self.layers(told.sum(1))[:, None].expand_as(tokens)


class _Attention(nn.Module):
    """Tokens of a stage ask the told vectors, one head; zero at first."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, hidden, bias=False)
        self.key, self.value = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.out = nn.Linear(hidden, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, tokens: Tensor, told: Tensor) -> Tensor:
        share = (self.query(tokens) @ self.key(told).transpose(1, 2) / told.shape[-1] ** 0.5).softmax(-1)
        return self.out(share @ self.value(told))


class Guided(nn.Module):
    """A frozen denoising network with adapters on its stages that are told guidance scale, level and label.

    Adapter guidance distillation (Jensen & Sadat 2025, arXiv:2503.07274): the conditional pass alone gives the guided prediction. At
    first the adapters add nothing.

    Args:
        input_shape, classes: of the network inside.
        network, args: reference and arguments of the network inside, as for `limbeck.zoo.build`; or the network itself.
        hidden: width of the adapters (paper: 256 for DiT).
        form: "additive" (paper's choice for DiT) or "attention" (for Stable Diffusion).
        scale: the guidance scale that it acts by when it is told none.

    Attributes:
        inner: the network inside, frozen.
        adapters: what learns.
        told: `(B,)` guidance scales for the next passes, or None for `scale`.
    """

    denoises = True

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int,
        network: str | nn.Module = "denoising-mlp",
        args: dict[str, Any] | None = None,
        hidden: int = 64,
        form: str = "additive",
        scale: float = 1.0,
    ) -> None:
        from limbeck.zoo.build import build

        super().__init__()
        if form not in FORMS:
            raise UserError(f"network 'guided': form is {form!r}", f"choose one of {', '.join(FORMS)}")
        if classes < 1:
            raise UserError("a network without classes cannot be guided", "give a conditional network")
        made = (
            network
            if isinstance(network, nn.Module)
            else build(network, **{"input_shape": input_shape, "classes": classes, **(args or {})})
        )
        self.inner = made.requires_grad_(False)
        self.input_shape, self.classes, self.null_label = tuple(input_shape), classes, classes
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.told: Tensor | None = None
        self.places = tuple(f"{path}.attention" if hasattr(made.get_submodule(path), "attention") else path for path in made.taps)
        self.by_scale, self.by_level = _Scalar(hidden), _Scalar(hidden)
        self.by_label = nn.Embedding(classes + 1, hidden)
        kind = _Additive if form == "additive" else _Attention
        self.adapters = nn.ModuleList(kind(width, hidden) for width in self._widths())
        note = getattr(made, "limbeck_config", None)
        if note is not None:
            inside = {"input_shape": list(input_shape), "classes": classes, "network": note["ref"], "args": note["args"]}
            self.limbeck_config = {"ref": "zoo:guided", "args": {**inside, "hidden": hidden, "form": form}}

    @property
    def taps(self) -> tuple[str, ...]:
        """Stages of the network inside."""
        return tuple(f"inner.{path}" for path in self.inner.taps)

    def _widths(self) -> list[int]:
        found: dict[str, int] = {}

        def note(path: str) -> Any:
            return lambda module, args, out: found.__setitem__(path, out.shape[1] if out.ndim != 3 else out.shape[2])

        with ExitStack() as stack, torch.no_grad():
            for path in self.places:
                stack.callback(self.inner.get_submodule(path).register_forward_hook(note(path)).remove)
            self.inner(torch.zeros(1, *self.input_shape), torch.zeros(1), torch.zeros(1, dtype=torch.long))
        return [found[path] for path in self.places]

    def learning(self) -> list[nn.Parameter]:
        """What is trained: everything but the network inside."""
        return [p for name, p in self.named_parameters() if not name.startswith("inner.")]

    def forward(self, x: Tensor, level: Tensor, label: Tensor | None = None) -> Tensor:
        """Like the network inside. Without a label there is nothing to guide by, and the adapters rest."""
        if label is None:
            return self.inner(x, level, label)
        scale = self.scale.expand(len(x)) if self.told is None else self.told
        told = torch.stack([self.by_scale(scale), self.by_level(level), self.by_label(label)], 1)

        def adapted(adapter: nn.Module) -> Any:
            def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
                tokens = out[:, None] if out.ndim == 2 else out.flatten(2).transpose(1, 2) if out.ndim == 4 else out
                added = adapter(tokens, told)
                if out.ndim == 2:
                    return out + added[:, 0]
                return out + (added.transpose(1, 2).reshape(out.shape) if out.ndim == 4 else added)

            return hook

        with ExitStack() as stack:  # hooks live only for this pass, so that a copy of the network has none of the original's
            for path, adapter in zip(self.places, self.adapters):
                stack.callback(self.inner.get_submodule(path).register_forward_hook(adapted(adapter)).remove)
            return self.inner(x, level, label)
