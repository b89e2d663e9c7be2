"""The YAML of recipes: plain data only, one meaning for every word in both directions, and bounds that no file can talk its way around.

YAML 1.1 without what a recipe never needs and an attacker does: tags, binary data, sets, dates, keys that stand twice, anchors that
contain themselves or that blow up when they are written out.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from limbeck.errors import UserError

MOST_CHARACTERS = 1 << 18
"""A longer text is no recipe."""

MOST_PARTS = 20_000
"""Values of a recipe, each use of an anchor counted in full."""

MOST_DEPTH = 32
"""How deep blocks may stand inside each other."""

MOST_DIGITS = 40
"""Characters of a whole number; the number itself must fit into 64 bits."""

_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+  # 1e-3, 2.5E4: YAML 1.1 takes the first for a word
    |[-+]?[0-9][0-9_]*\.[0-9_]*
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_FLOAT_TAG, _FIRST = "tag:yaml.org,2002:float", list("-+0123456789.")
_LOOK = "check the indentation, the colons and the quotes at that place"
_PLAIN = ("null", "bool", "int", "float", "seq", "map", "str")


class _Refused(yaml.MarkedYAMLError):
    """Sound YAML that is no recipe."""

    def __init__(self, problem: str, mark: Any, hint: str = "a recipe is small, plain data: leave it out or write it otherwise") -> None:
        super().__init__(None, None, problem, mark)
        self.hint = hint


class _Loader(yaml.SafeLoader):
    """Reads plain data; refuses a key that stands twice, a part inside itself, and too much of anything."""

    yaml_constructors = {
        tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag.rpartition(":")[2] in _PLAIN
    }
    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in known if not tag.endswith(":timestamp")]  # a date is a word
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._parts: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Count before anything is built: an anchor counts each time it is used."""
        mark = self.peek_event().start_mark
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise _Refused(f"more than {MOST_DEPTH} blocks stand inside each other", mark)
        again = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if again and id(node) not in self._parts:
            raise _Refused("an anchor stands inside itself", mark)
        if node is None or again:
            return node
        children = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
        children = children if isinstance(node, yaml.CollectionNode) else []
        self._parts[id(node)] = 1 + sum(self._parts[id(child)] for child in children)
        if self._parts[id(node)] > MOST_PARTS:
            raise _Refused(f"it has more than {MOST_PARTS} values", mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if isinstance(key, (list, dict)):
                raise _Refused("a key must be a word", key_node.start_mark, _LOOK)
            if key in seen:
                raise _Refused(f"the key {key!r} stands twice", key_node.start_mark, "take one of them out")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        text = super().construct_scalar(node)
        for character in text if isinstance(text, str) else "":
            if (character < " " and character not in "\t\n\r") or "\ud800" <= character <= "\udfff":
                found = f"a text holds the character {ascii(character)[1:-1]}, which cannot be shown"
                raise _Refused(found, node.start_mark, "take it out")
        return text

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number of at most 64 bits."""
        number = super().construct_yaml_int(node) if len(node.value) <= MOST_DIGITS else 2**64
        if not -(2**63) <= number < 2**63:
            raise _Refused("a whole number is larger than 64 bits", node.start_mark, "write a smaller number")
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_implicit_resolver(_FLOAT_TAG, _FLOAT, _FIRST)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: the word "1e3" gets quotes, and a part that is used twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    """PyYAML folds some line breaks in plain and single-quoted words, so that they come back as others."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _text)
_Dumper.add_implicit_resolver(_FLOAT_TAG, _FLOAT, _FIRST)


def parse_yaml(text: str, where: str) -> Any:
    """Read YAML as plain data.

    Raises:
        UserError: broken YAML (with line and column), a tag that would build a Python object, a key that stands twice, a character or
            number that cannot be kept, or a text that is too long, too deep or too large once its anchors are written out.
    """
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{where} has {len(text)} characters", f"a recipe has at most {MOST_CHARACTERS}; is this one?")
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: it builds plain data only
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        if "could not determine a constructor" in problem:
            hint = "recipes hold plain data only; tags such as !!python/... are never read"
        else:
            hint = getattr(error, "hint", _LOOK)
        raise UserError(f"{where}{place}: {problem}", hint) from None
    except (ValueError, RecursionError, TypeError, KeyError, IndexError) as error:  # what PyYAML lets through of broken scalars
        raise UserError(f"{where}: {error or type(error).__name__}", "write the recipe as plain, flat YAML") from None


def write_yaml(value: Any) -> str:
    """Plain data as YAML that `parse_yaml` reads back as the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
