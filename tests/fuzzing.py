"""What the fuzz tests share: how bytes are altered, what a calm answer is, and limits of time and memory.

The short form (`make test`) draws the same examples each time. `LIMBECK_FUZZ=3000` (as `make fuzz` sets it) draws so many new ones a test.
"""

import os
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from limbeck.errors import UserError

LONG = int(os.environ.get("LIMBECK_FUZZ", "0"))
"""Examples a test in the long form; 0 for the short form."""

SECONDS = 20.0
"""After so long an example counts as hanging."""

ROOM = 1 << 30
"""Bytes of address space that a test may take beyond what the process has."""


def fuzz(short: int, share: float = 1.0) -> settings:
    """Settings of a fuzz test: `short` fixed examples, or `share` of LIMBECK_FUZZ new ones (for tests whose examples are slow)."""
    return settings(
        max_examples=max(short, int(LONG * share)) if LONG else short,
        derandomize=not LONG,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def in_time(seconds: float = SECONDS) -> Iterator[None]:
    """Raise TimeoutError when the block takes longer (processor time, so that a busy machine is no hang)."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"still not done after {seconds:g} seconds")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def little_memory(room: int = ROOM) -> Iterator[None]:
    """Give the block `room` bytes of address space more than the process has now: a size that lies ends in a MemoryError."""
    import resource

    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def calm(function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """What the function gives, or the `UserError` it raises; anything else that it raises goes through and fails the test.

    An error must be one line that can be shown on any terminal, with a hint.
    """
    with in_time():
        try:
            return function(*args, **named)
        except UserError as error:
            for text in (error.message, error.hint):
                assert text and text.isprintable(), f"not one line that a terminal can show: {text!r}"
            assert len(error.message) < 2000, f"{len(error.message)} characters of complaint"
            return error


_NUMBERS = [
    *(struct.pack(form, value) for form in ("<Q", ">I", "<I", ">H") for value in (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF)),
    struct.pack("<Q", 2**63 - 1),
    struct.pack("<Q", 2**64 - 1),
    struct.pack(">I", 2**31 - 1),
    struct.pack(">I", 2**32 - 1),
    struct.pack("<d", float("nan")),
    struct.pack("<d", float("inf")),
]
_BITS = [
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\n",
    b"\r\n",
    b",",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b"-",
    b"&a ",
    b"*a",
    b"!!python/object ",
    b"null",
    b"NaN",
    b"1e999",
    b"9" * 5000,
    b"\xed\xa0\x80",
    b"\x1b[31m",
    b"\x80\x04",
    b"PK\x03\x04",
    "é\u202e\u2028".encode(),
]


@st.composite
def altered(draw: Any, content: bytes, most: int = 3) -> bytes:
    """`content` after 1 to `most` changes: bits flipped, bytes set, cut off, taken out, put in, doubled, swapped."""
    for _ in range(draw(st.integers(1, most))):
        size = len(content)
        at = draw(st.integers(0, max(size - 1, 0)))
        kind = draw(st.sampled_from(("bit", "byte", "cut", "out", "in", "twice", "swap", "number")))
        length = draw(st.integers(1, 64))
        if kind == "bit" and size:
            content = content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
        elif kind == "byte" and size:
            content = content[:at] + draw(st.binary(min_size=1, max_size=1)) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "out":
            content = content[:at] + content[at + length :]
        elif kind == "in":
            content = content[:at] + draw(st.one_of(st.sampled_from(_BITS), st.binary(min_size=1, max_size=32))) + content[at:]
        elif kind == "twice":
            content = content[: at + length] + content[at:]
        elif kind == "swap":
            other = draw(st.integers(0, max(size - 1, 0)))
            first, second = min(at, other), max(at, other)
            length = min(length, second - first, size - second)
            a, b = content[first : first + length], content[second : second + length]
            content = content[:first] + b + content[first + length : second] + a + content[second + length :]
        else:
            number = draw(st.sampled_from(_NUMBERS))
            content = content[:at] + number + content[at + len(number) :]
    return content


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**400]),
    st.sampled_from([0.0, -0.0, 0.5, 1e-300, 1e300, float("inf"), -float("inf"), float("nan")]),
    st.sampled_from(
        [
            "",
            " ",
            "auto",
            "..",
            "../../x",
            "/",
            "~",
            "cnn",
            "kd",
            "python:os:system",
            "hf:",
            "csv:",
            "\0",
            "\x1b[31mred",
            "\ud800",
            "<script>",
            "a" * 3000,
            "é\u202e",
            "0",
            "1e3",
            "none",
            "folder:/nonexistent",
            "object:x",
            "digits",
            "%s{0}",
        ]
    ),
    st.text(max_size=8),
)
"""Values that nobody expects."""

VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.sampled_from(["id", "model"]), inner, max_size=3),
)
"""The same, nested."""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every part of a nested value, itself first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of a nested value with another part at `path`."""
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = put(value[path[0]], path[1:], new)
    return copy


@st.composite
def twisted(draw: Any, value: Any, most: int = 2, values: st.SearchStrategy[Any] = VALUES) -> Any:
    """A nested value after 1 to `most` changes: a part replaced, taken out, renamed, doubled or moved elsewhere."""
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(places(value)))
        part: Any = value
        for key in path:
            part = part[key]
        kind = draw(st.sampled_from(("replace", "replace", "add", "out", "rename", "wrap", "move")))
        if kind == "replace" or not path:
            value = put(value, path, draw(values))
        elif kind == "add" and isinstance(part, dict):
            value = put(value, path, {**part, draw(st.text(max_size=8)): draw(values)})
        elif kind == "wrap":
            value = put(value, path, draw(st.sampled_from(([part], {"a": part}, [part, part]))))
        elif kind == "move":
            other = draw(st.sampled_from(places(value)))
            moved: Any = value
            for key in other:
                moved = moved[key]
            value = put(value, path, moved)
        else:
            owner: Any = value
            for key in path[:-1]:
                owner = owner[key]
            if isinstance(owner, dict):
                rest = {k: v for k, v in owner.items() if k != path[-1]}
                value = put(value, path[:-1], rest if kind == "out" else {**rest, draw(st.text(max_size=8)): part})
            else:
                value = put(value, path[:-1], [v for i, v in enumerate(owner) if i != path[-1]])
    return value
