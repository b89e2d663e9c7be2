"""Texts that every Python has: the source files of its own standard library, split by package."""

from __future__ import annotations

import ast
import io
import sys
import sysconfig
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from limbeck import storage
from limbeck.data.text.rows import Corpus, Row, divide, draw
from limbeck.errors import UserError, unknown

LEFT_OUT = ("encodings", "pydoc_data")
"""Packages that are tables in the main, not programs."""

_TESTS = {"test", "tests", "idle_test"}


@dataclass(frozen=True)
class File:
    """A source file: its package, its name inside the library, and its text."""

    package: str
    name: str
    text: str


def read_source(path: Path) -> str:
    """A Python file as text, in the encoding that it declares.

    Raises:
        UserError: it is not encoded as it says.
    """
    content = path.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return io.TextIOWrapper(io.BytesIO(content), encoding).read()
    except (SyntaxError, UnicodeDecodeError, LookupError) as error:
        raise UserError(f"{path} is no source of this Python: {error}", "restore the Python installation") from None


def library_files(packages: Sequence[str] = ()) -> list[File]:
    """The source files of the standard library by package and name, without its tests.

    Args:
        packages: only these; () takes all but `LEFT_OUT`.

    Raises:
        UserError: a package is not there.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    wanted = packages or [n for n in sys.stdlib_module_names if n not in LEFT_OUT and n not in _TESTS]
    files = []
    for package in sorted(wanted):
        inside = folder / package
        if (inside / "__init__.py").is_file():
            paths = sorted(p for p in inside.rglob("*.py") if not _TESTS & set(p.relative_to(folder).parts[:-1]))
        else:
            paths = [p for p in [folder / f"{package}.py"] if p.is_file()]
        if packages and not paths:
            raise unknown("package of the standard library", package, sys.stdlib_module_names)
        files += [File(package, path.relative_to(folder).as_posix(), read_source(path)) for path in paths]
    return [file for file in files if file.text.strip()]


def package_sizes(files: Sequence[File]) -> dict[str, int]:
    """Characters by package."""
    sizes: dict[str, int] = {}
    for file in files:
        sizes[file.package] = sizes.get(file.package, 0) + len(file.text)
    return sizes


def identity_of(files: Sequence[File]) -> str:
    """A digest of names and contents."""
    return storage.fingerprint([[f.name, storage.sha256(f.text.encode())] for f in files])


def _corpus(
    name: str,
    rows: Callable[[File], Iterator[Row]],
    shape: str,
    kind: str,
    shares: dict[str, float],
    seed: int,
    packages: Sequence[str],
    *marks: object,
) -> Corpus:
    """A corpus whose parts share no package."""
    files = library_files(packages)
    where = divide(package_sizes(files), shares, seed)
    missing = [part for part in ("train", *(p for p in shares if shares[p])) if part not in where.values()]
    if missing:
        raise UserError(f"there are too few packages for a {missing[0]} part", "name more packages, or leave `packages` out")

    found: dict[str, list[Row]] = {}  # parsing takes longer than all else, and the tokenizer and the token file both ask

    def read(part: str) -> Iterator[Row]:
        for file in files:
            if where[file.package] == part:
                if file.name not in found:
                    found[file.name] = list(rows(file))
                yield from found[file.name]

    parts = {part: partial(read, part) for part in ("train", "test", "valid") if part == "train" or shares[part]}
    return Corpus(name, ["3", name, identity_of(files), where, *marks], parts, shape, kind)


def _text(file: File) -> Iterator[Row]:
    yield Row(text=file.text, place=file.name)


def stdlib_text(shares: dict[str, float], seed: int = 0, packages: tuple[str, ...] = ()) -> Corpus:
    """About 10 MB of programs: the source files of Python's standard library, split by package."""
    return _corpus("stdlib-text", _text, "text", "causal-lm", shares, seed, packages)


# ---- functions with docstrings ----


@dataclass(frozen=True)
class Function:
    """A function with a docstring: its signature, docstring and body, each without the common indentation."""

    signature: str
    docstring: str
    body: str
    place: str


def functions(file: File) -> Iterator[Function]:
    """The functions of a file that have a docstring and a body, in the order in which they stand there."""
    lines = file.text.splitlines()
    try:
        tree = ast.parse(file.text)
    except SyntaxError as error:
        raise UserError(f"{file.name} is no source of this Python: {error}", "restore the Python installation") from None
    found = [n for n in _statements(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and len(n.body) > 1]
    for node in sorted(found, key=lambda n: n.lineno):
        docstring = ast.get_docstring(node)
        head, first = node.body[0], node.body[1]
        if not docstring or not docstring.strip() or head.lineno <= node.lineno or first.lineno <= (head.end_lineno or 0):
            continue  # a function on one line has no signature of its own
        signature = textwrap.dedent("\n".join(lines[node.lineno - 1 : head.lineno - 1])).rstrip()
        body = textwrap.dedent("\n".join(lines[head.end_lineno : node.end_lineno])).strip("\n").rstrip()
        if signature and body.strip():
            yield Function(signature, docstring.strip(), body, f"{file.name}:{node.lineno}")


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Every statement of a tree; expressions, which hold no function with a docstring, are not entered."""
    stack = [tree]
    while stack:
        node = stack.pop()
        yield node
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            inside = getattr(node, name, None)
            if isinstance(inside, list):
                stack += inside


def _quoted(docstring: str) -> str:
    return textwrap.indent(f'"""{docstring}"""', "    ", lambda line: bool(line.strip()))


def _docstring_rows(file: File) -> Iterator[Row]:
    for f in functions(file):
        yield Row(prompt=f'"""{f.docstring}"""\n', completion=f.body, place=f.place)


def stdlib_docstrings(shares: dict[str, float], seed: int = 0, packages: tuple[str, ...] = ()) -> Corpus:
    """Pairs from Python's standard library: a function's docstring, and its body."""
    return _corpus("stdlib-docstrings", _docstring_rows, "pair", "causal-lm", shares, seed, packages)


def _completion_rows(lines: int, file: File) -> Iterator[Row]:
    for f in functions(file):
        body = textwrap.indent("\n".join(f.body.splitlines()[:lines]).rstrip(), "    ")
        yield Row(prompt=f"{f.signature}\n{_quoted(f.docstring)}\n", completion=body, place=f.place)


def stdlib_completion(shares: dict[str, float], seed: int = 0, packages: tuple[str, ...] = (), lines: int = 4) -> Corpus:
    """Pairs from Python's standard library: a function's signature and docstring, and the first lines of its body."""
    if lines < 1:
        raise UserError(f"lines is {lines}", "give at least 1")
    return _corpus("stdlib-completion", partial(_completion_rows, lines), "pair", "causal-lm", shares, seed, packages, lines)


def _explain_rows(file: File) -> Iterator[Row]:
    for f in functions(file):
        words = f.docstring.split("\n\n")[0].split()
        first = len(f.docstring.splitlines()[0].split())
        kept = max(1, first // 3)
        if len(words) - kept >= 3:
            yield Row(prompt=f'{f.signature}\n    """{" ".join(words[:kept])}', completion=" " + " ".join(words[kept:]), place=f.place)


def stdlib_explain(shares: dict[str, float], seed: int = 0, packages: tuple[str, ...] = ()) -> Corpus:
    """Pairs from Python's standard library: a signature and how its docstring begins, and the rest of the docstring's first paragraph.

    The first third of the words of the docstring's first line is given. Paragraphs with fewer than 3 words left are no rows.
    """
    return _corpus("stdlib-explain", _explain_rows, "pair", "causal-lm", shares, seed, packages)


def stdlib_retrieval(shares: dict[str, float], seed: int = 0, packages: tuple[str, ...] = ()) -> Corpus:
    """Pairs from Python's standard library: a docstring as a query, the function without it as the document; no text occurs twice."""
    corpus = _corpus("stdlib-retrieval", _retrieval_rows, "retrieval", "embedding", shares, seed, packages)
    reads = dict(corpus.parts)

    def once(part: str) -> Iterator[Row]:
        seen: set[str] = set()
        for other in ("train", "valid", "test"):  # what an earlier part has is not repeated in a later one
            for row in reads[other]() if other in reads else ():
                texts = {f"q{row.query}", f"d{row.document}"}
                if not texts & seen and other == part:
                    yield row
                seen |= texts
            if other == part:
                return

    corpus.parts = {part: partial(once, part) for part in reads}
    return corpus


def _retrieval_rows(file: File) -> Iterator[Row]:
    for f in functions(file):
        yield Row(query=f.docstring, document=f"{f.signature}\n{textwrap.indent(f.body, '    ')}", place=f.place)


# ---- which package ----


def stdlib_windows(shares: dict[str, float], seed: int = 0, packages: tuple[str, ...] = (), classes: int = 12) -> Corpus:
    """Windows of tokens of Python's standard library; the class is the package (the 12 largest), split by file."""
    files = library_files(packages)
    by_size = sorted(package_sizes(files).items(), key=lambda item: (-item[1], item[0]))
    enough = [name for name, _ in by_size if sum(f.package == name for f in files) >= 4]
    names = tuple(sorted(enough[: len(packages) or classes]))
    if len(names) < (len(packages) or classes) or len(names) < 2:
        raise UserError(f"only {len(names)} packages have at least 4 files", "ask for fewer classes, or name larger packages")
    where: dict[str, str] = {}
    for name in names:
        own = {f.name: len(f.text) for f in files if f.package == name}
        where |= _divide_files(own, shares, seed)

    def read(part: str) -> Iterator[Row]:
        for file in (f for f in files if where.get(f.name) == part):
            yield Row(text=file.text, label=names.index(file.package), place=file.name)

    parts = {part: partial(read, part) for part in ("train", "test", "valid") if part == "train" or shares[part]}
    identity = ["2", "stdlib-windows", identity_of([f for f in files if f.package in names]), where]
    return Corpus("stdlib-windows", identity, parts, "windows", "classification", classes=names)


def _divide_files(sizes: dict[str, int], shares: dict[str, float], seed: int) -> dict[str, str]:
    """As `divide`, but every part that has a share gets at least one file, and train keeps the largest."""
    largest = max(sizes, key=lambda n: (sizes[n], n))
    parts = {largest: "train"}
    total = sum(sizes.values())
    free = sorted((n for n in sizes if n != largest), key=lambda n: draw(seed, n))
    for part in ("test", "valid"):
        have = 0
        while free and shares[part] and (not have or have + sizes[free[0]] <= shares[part] * total):
            name = free.pop(0)
            parts[name] = part
            have += sizes[name]
    return parts | dict.fromkeys(free, "train")
