"""Named arguments from a recipe, checked against the function that will take them before it is called."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from limbeck.errors import UserError, nearest


def _fits(value: Any, wanted: Any) -> bool:
    if wanted in (Any, inspect.Parameter.empty):
        return True
    if wanted is None or wanted is type(None):
        return value is None
    origin = typing.get_origin(wanted)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(wanted))
    if origin in (tuple, list) or wanted in (tuple, list):
        items = [a for a in typing.get_args(wanted) if a is not Ellipsis]
        return isinstance(value, (tuple, list)) and (not items or all(_fits(v, items[0]) for v in value))
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, wanted) if isinstance(wanted, type) else True


def check_arguments(function: Callable[..., Any], given: Mapping[str, Any], owner: str) -> None:
    """Refuse names that `function` does not take, values of the wrong type, and required names left out.

    Args:
        function: a function or class with annotated arguments.
        given: the keyword arguments it is about to get.
        owner: how the user knows the function ("network 'cnn'", "data 'digits'").

    Raises:
        UserError: naming the argument, with the nearest right name or the type that is wanted.
    """
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    target = function.__init__ if isinstance(function, type) else function
    hints = typing.get_type_hints(target)
    for name, value in given.items():
        if name not in parameters:
            offer = f"did you mean {' or '.join(map(repr, nearest(name, parameters)))}?" if parameters else "it takes none"
            raise UserError(f"{owner} takes no argument {name!r}", offer)
        wanted = hints.get(name, Any)
        if not _fits(value, wanted):
            kind = getattr(wanted, "__name__", None) if isinstance(wanted, type) else str(wanted)
            raise UserError(f"{owner}: argument {name!r} is {value!r}, a {type(value).__name__}", f"give it as {kind}")
    missing = [n for n, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL and n not in given]
    if missing:
        raise UserError(f"{owner} needs the argument {missing[0]!r}", f"give {', '.join(missing)}")
