"""Calling any model and finding the logits in whatever it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from limbeck.errors import UserError

LOGIT_NAMES = ("logits", "logit", "out", "output", "outputs", "pred", "preds", "prediction", "predictions", "scores", "y")
"""Keys and attributes under which a model's logits are looked for, in this order."""


def call(model: nn.Module, inputs: Any, **options: Any) -> Any:
    """Call a model with a batch's inputs: a tensor becomes `model(x)`, a mapping `model(**x)`, a tuple or list `model(*x)`.

    Args:
        model: any callable module.
        inputs: what `Batch.inputs` holds.
        options: further keyword arguments for the model.
    """
    if isinstance(inputs, Tensor):
        return model(inputs, **options)
    if isinstance(inputs, Mapping):
        return model(**inputs, **options)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs, **options)
    return model(inputs, **options)


def fields_of(output: Any) -> dict[str, Any]:
    """The named parts of an output: a mapping's items, a dataclass's, named tuple's or plain object's attributes (else empty)."""
    if isinstance(output, Mapping):
        return {str(name): value for name, value in output.items()}
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return {name: getattr(output, name) for name in output._fields}
    return dict(getattr(output, "__dict__", {}))


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor of a module's output: itself, the first of a tuple, list or mapping (searched in depth), or None."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)):
        items: Any = value
    else:
        items = fields_of(value).values() if value is not None else ()
    for item in items:
        if isinstance(item, (Tensor, tuple, list, Mapping)) and (found := first_tensor(item)) is not None:
            return found
    return None


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: `(B, C)`, or `(B, L, V)` for language models, as the model returned them.

    A tensor is taken as it is; a mapping, Hugging Face output, dataclass or object is searched for `LOGIT_NAMES`; a tuple or
    list gives its first tensor.

    Raises:
        UserError: nothing of the kind is there; says what was seen and how to name it.
    """
    if isinstance(output, Tensor):
        return output
    parts = fields_of(output)
    for name in LOGIT_NAMES:
        if isinstance(parts.get(name), Tensor):
            return parts[name]
    if isinstance(output, (tuple, list)):
        for item in output:
            if isinstance(item, Tensor):
                return item
    tensors = [name for name, value in parts.items() if isinstance(value, Tensor)]
    if len(parts) == 1 and tensors:
        return parts[tensors[0]]
    seen = f"with {', '.join(map(repr, parts))}" if parts else "without any tensor"
    raise UserError(
        f"no logits in the model's output: a {type(output).__name__} {seen}",
        "return a tensor, a tuple that starts with it, or name it 'logits' in the output (a small wrapper module does it)",
    )


def shape_of(signal: Any) -> tuple[int, ...] | None:
    """The shape of a signal's first tensor as a plain tuple, batch first; None when there is no tensor in it."""
    tensor = first_tensor(signal)
    return None if tensor is None else tuple(tensor.shape)
