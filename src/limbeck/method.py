"""What a published method is: a card, typed settings, and a registry that finds each one by its file's name.

`<wing>/methods/ps_kd.py` holds the method `ps-kd`. Nothing else has to be told about it. Methods of other packages
arrive through the entry point group `limbeck.methods` (name = the method's id, value = `module:Class`), and any class
can be named in place as `python:package.module:Class`.

This module imports no torch: `limbeck methods` and the checks of a recipe must be quick.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import typing
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar

from limbeck.errors import UserError, unknown

WINGS = ("knowledge", "sampling", "condensation", "scenes", "structure")
"""The five wings, in the order in which they are listed."""

GROUP = "limbeck.methods"
"""The entry point group for methods of other packages."""


@dataclass(frozen=True)
class Card:
    """Where a method comes from and what it claims.

    Attributes:
        id: the name that recipes and the command line use.
        title: the paper's title.
        year: of its first publication.
        wing, family: where it lives in the house.
        claim: what the paper says it achieves, in one sentence.
        equation: the loss in one or two lines of plain text.
        arxiv: the arXiv number, "" when there is none.
        baseline: the id of the method that the paper argues against.
        certainty: how the method's details are known: "verified-in-code", "paper-text", "recalled" or "inferred-from-abstract".
        deviations: where this file departs from the paper or from the released code, and why.
    """

    id: str
    title: str
    year: int
    wing: str
    family: str
    claim: str
    equation: str
    arxiv: str = ""
    baseline: str = "kd"
    certainty: str = "verified-in-code"
    deviations: str = ""

    @property
    def paper(self) -> str:
        """Title, year and arXiv number in one line."""
        return f"{self.title} ({self.year}{', arXiv:' + self.arxiv if self.arxiv else ''})"

    @property
    def reconstructed(self) -> bool:
        """Whether details had to be guessed, because neither code nor full text could be read."""
        return self.certainty in ("recalled", "inferred-from-abstract")


def setting(
    default: Any,
    help: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """A documented, bounded hyper-parameter of a method: a dataclass field.

    Args:
        default: the paper's value, unless `help` says otherwise.
        help: what it does, in one line, with its unit and where the default comes from.
        above, at_least, at_most: bounds of a number, or of every number of a tuple.
        choices: the values that are allowed.
    """
    metadata = {"help": help, "above": above, "at_least": at_least, "at_most": at_most, "choices": choices}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _check_bounds(owner: str, name: str, value: Any, rules: typing.Mapping[str, Any]) -> None:
    if rules.get("choices") is not None and value not in rules["choices"]:
        raise UserError(f"{owner}: {name} is {value!r}", f"choose one of {', '.join(map(repr, rules['choices']))}")
    numbers = value if isinstance(value, (tuple, list)) else [value]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        if not math.isfinite(number):
            raise UserError(f"{owner}: {name} is {number}", f"{name} must be a finite number")
        if rules.get("above") is not None and not number > rules["above"]:
            raise UserError(f"{owner}: {name} is {number}", f"{name} must be greater than {rules['above']}")
        if rules.get("at_least") is not None and not number >= rules["at_least"]:
            raise UserError(f"{owner}: {name} is {number}", f"{name} must be at least {rules['at_least']}")
        if rules.get("at_most") is not None and not number <= rules["at_most"]:
            raise UserError(f"{owner}: {name} is {number}", f"{name} must be at most {rules['at_most']}")


@dataclass
class Method:
    """A published technique. Subclasses are dataclasses whose fields are the hyper-parameters (made with `setting`).

    Values are checked against the fields' types and bounds when an instance is made.

    Raises:
        UserError: a value has the wrong type or lies outside its bounds.
    """

    card: ClassVar[Card]

    def __post_init__(self) -> None:
        from pydantic import TypeAdapter, ValidationError

        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            if not item.init:
                continue
            value = getattr(self, item.name)
            try:
                value = TypeAdapter(hints[item.name]).validate_python(value)
            except ValidationError as error:
                problem = error.errors()[0]["msg"]
                raise UserError(
                    f"{self.card.id}: {item.name} is {value!r}: {problem}", f"`limbeck show {self.card.id}` explains the settings"
                ) from None
            _check_bounds(self.card.id, item.name, value, item.metadata)
            setattr(self, item.name, value)

    @classmethod
    def settings(cls) -> dict[str, dataclasses.Field]:
        """The hyper-parameters by name, in the order of the file."""
        return {item.name: item for item in dataclasses.fields(cls) if item.init}

    def values(self) -> dict[str, Any]:
        """The hyper-parameters' present values, as plain data."""
        return {name: list(v) if isinstance(v := getattr(self, name), tuple) else v for name in self.settings()}


@cache
def registered() -> dict[str, str]:
    """Every method's id and where its class is: `id -> "package.module"` or `"package.module:Class"`. Imports nothing."""
    found: dict[str, str] = {}
    root = Path(__file__).parent
    for wing in WINGS:
        for file in sorted((root / wing / "methods").glob("[a-z]*.py")):
            found[file.stem.replace("_", "-")] = f"limbeck.{wing}.methods.{file.stem}"
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, point.value)
    return found


def find(id: str) -> type[Method]:
    """The class of a method.

    Args:
        id: a registered id, or `python:package.module:Class`.

    Raises:
        UserError: there is no such method; the nearest names are offered.
    """
    if id.startswith("python:"):
        target = id.removeprefix("python:")
    else:
        if id not in registered():
            raise unknown("method", id, registered(), "limbeck methods")
        target = registered()[id]
    module_name, _, class_name = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"method {id!r} cannot be imported: {error}", "check the spelling and that its package is installed") from None
    except Exception as error:
        if not id.startswith("python:"):
            raise
        raise UserError(f"importing {module_name!r} failed: {type(error).__name__}: {error}", "mend that module") from error
    if class_name:
        candidate = getattr(module, class_name, None)
        if not (isinstance(candidate, type) and issubclass(candidate, Method)):
            raise UserError(f"{target} is no limbeck method", "it must be a dataclass that derives from limbeck's Distiller or Method")
        return candidate
    for candidate in vars(module).values():
        if isinstance(candidate, type) and issubclass(candidate, Method) and getattr(getattr(candidate, "card", None), "id", None) == id:
            return candidate
    raise UserError(f"{module_name} holds no method whose card says id={id!r}", "the file's name and the card's id must agree")


def make(id: str, settings: typing.Mapping[str, Any] | None = None) -> Method:
    """An instance of a method with some settings changed.

    Raises:
        UserError: unknown method or setting (the nearest names are offered), wrong type, or a value outside its bounds.
    """
    cls = find(id)
    known = cls.settings()
    for name in settings or {}:
        if name not in known:
            raise unknown(f"setting of {id}", name, known, f"limbeck show {id}")
    return cls(**dict(settings or {}))


Kind = typing.TypeVar("Kind", bound=Method)


def of_wing(id: str, settings: typing.Mapping[str, Any], given: Any, kind: type[Kind], wing: str) -> Kind:
    """A method that belongs to a wing: an object that was given, else one made from its id and settings.

    Args:
        given: an instance, or None.
        kind: what the wing's methods derive from.
        wing: its name, for the message.

    Raises:
        UserError: it belongs to another wing.
    """
    made = given if given is not None else make(id, settings)
    if not isinstance(made, kind):
        raise UserError(
            f"{id} belongs to the wing {made.card.wing}, and this is for the {wing} wing",
            f"`limbeck run` takes recipes of every wing; `limbeck methods --wing {wing}` lists this one's methods",
        )
    return made


def everything() -> list[type[Method]]:
    """Every registered method's class, by wing, then by id. Imports them all (and torch)."""
    order = {wing: number for number, wing in enumerate(WINGS)}
    return sorted((find(id) for id in registered()), key=lambda cls: (order.get(cls.card.wing, 99), cls.card.id))
