"""From a name or a path to texts that are ready for use: read, split, turned into tokens, kept, fingerprinted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from limbeck import places, storage
from limbeck.data.arguments import check_arguments
from limbeck.data.choose import amount, stratified
from limbeck.data.data import Data
from limbeck.data.split import Split, TensorSplit
from limbeck.data.text import chat as chats
from limbeck.data.text.domains import mixed
from limbeck.data.text.encode import Encoder
from limbeck.data.text.notion import Text
from limbeck.data.text.pairs import PairSplit, pad_rows
from limbeck.data.text.retrieval import RetrievalSplit
from limbeck.data.text.rows import KINDS, Corpus
from limbeck.data.text.sources import EMBEDDED, FOREIGN, TEXT_ONLY
from limbeck.data.text.table import Table, write_table
from limbeck.data.text.tokens import eos_of, load_tokenizer, mark_of
from limbeck.data.text.windows import WindowSplit
from limbeck.errors import UserError, unknown

VERSION = "1"
"""Of what is stored; another one makes every token file anew."""

_FITS = {
    "text": ("causal-lm",),
    "pair": ("causal-lm", "seq2seq", "embedding"),
    "chat": ("causal-lm",),
    "retrieval": ("embedding",),
    "windows": ("classification",),
    "labelled": ("classification",),
}


_TEST = {"tables-in-words": 0.25}
"""Share of the test part where nobody says, if it is not a tenth."""


def is_text(source: str, forced: bool = False) -> bool:
    """Whether a source is read by `open_text`.

    Args:
        source: as in a recipe.
        forced: the recipe has a `text` block, so that sources which can be either (csv, parquet, hf) are texts too.
    """
    kind, colon, _ = source.partition(":")
    if not colon:
        return source in EMBEDDED
    return kind in TEXT_ONLY or (forced and kind in FOREIGN)


def open_text(
    source: str,
    *,
    kind: str = "auto",
    tokenizer: Any = "bpe:1024",
    length: int = 128,
    train: int | float | None = None,
    valid: int | float | None = None,
    test: int | float | None = None,
    seed: int = 0,
    prompt_length: int | None = None,
    packing: bool = True,
    columns: dict[str, str] | None = None,
    chat: bool = False,
    domains: list[str] | None = None,
    pad: str | None = None,
    drop_empty: bool = False,
    mix: dict[str, float] | None = None,
    **args: Any,
) -> Data:
    """Open texts by name or path. Tokens are written once into the cache folder and mapped from there; memory stays flat.

    Args:
        source: an embedded name (`limbeck.data.text.EMBEDDED`); `text:<folder or pattern>`, `jsonl:<file>`, `parquet:<file>`,
            `csv:<file>`, `hf:<id or folder>`.
        kind: "causal-lm", "seq2seq", "embedding" or "classification"; "auto" takes what the source is made for.
        tokenizer: see `load_tokenizer`.
        length: the most tokens of a sample.
        train, valid, test: how many samples, or which share. A source without parts of its own gives 10 % (files or packages where there
            are any, else rows) for testing, and as much for `valid` when that is asked for.
        seed: of the split and of draws.
        prompt_length: see `PairSplit`.
        packing: see `WindowSplit`.
        columns: which column is `text`, `prompt`, `completion`, `query`, `document`, `messages` or `label`, where names are unusual.
        chat: rows hold `messages`, written with the tokenizer's chat template.
        domains: of the source's domains, take these.
        pad: "eos" takes the end token for padding where the tokenizer has no other.
        drop_empty: leave out pairs without a completion.
        mix: share of each domain in the training part, by name; None takes what there is.
        args: what the source itself takes, such as `packages` or `streaming`.

    Raises:
        UserError: anything that the user can mend.
    """
    if kind != "auto" and kind not in KINDS:
        raise unknown("kind of text task", str(kind), ["auto", *KINDS])
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise UserError(f"length is {length!r}", "give the number of tokens of a sample, at least 2")
    counts = {"train": train, "valid": valid, "test": test}
    asked = {"columns": columns, "chat": chat, "domains": domains, "kind": kind}
    corpus = _corpus(source, _shares(source, counts), seed, {k: v for k, v in asked.items() if v}, args)
    task = corpus.kind if kind == "auto" else kind
    if task not in _FITS[corpus.shape]:
        fitting = ", ".join(_FITS[corpus.shape])
        raise UserError(f"{source} gives rows for {fitting}, not for {task}", "leave the task out, or name columns that it needs")
    coder = load_tokenizer(tokenizer, corpus, pad)
    text = _text(coder, task, length, corpus.domains)
    encoder = Encoder(coder, corpus.shape, task, drop_empty, bool(corpus.domains), corpus.reasons)
    options = {"prompt_length": prompt_length, "packing": packing}
    splits: dict[str, Split | None] = {"valid": None}
    marks: dict[str, Any] = {}
    for part in corpus.parts:
        table = _table(corpus, part, encoder, text.mark, chat)
        whole = _split(table, encoder, text, options, part)
        splits[part], drawn = _draw(whole, counts[part], part, corpus, seed, mix if part == "train" else None)
        marks[part] = [table.digest, drawn]
    if splits["valid"] is not None and valid is None:
        splits["valid"] = None if corpus.derived else splits["valid"]
    mark = storage.fingerprint([VERSION, marks, text.mark, task, length, prompt_length, packing])
    assert splits["train"] is not None and splits["test"] is not None
    shown = "multiclass" if task == "classification" else task
    return Data(source, splits["train"], splits["test"], splits["valid"], (length,), corpus.classes, shown, mark, text=text)


def _shares(source: str, counts: dict[str, int | float | None]) -> dict[str, float]:
    """The share of each part where a source has none of its own: the usual one when a count or nothing is asked for."""
    usual = {"test": _TEST.get(source, 0.1), "valid": 0.1}
    shares = {}
    for part in ("test", "valid"):
        asked = counts[part]
        if isinstance(asked, float) and not 0 < asked < 1:
            raise UserError(f"{part} is {asked!r}", "give a positive count of samples, or a share between 0 and 1 such as 0.2")
        shares[part] = asked if isinstance(asked, float) else 0.0 if asked is None and part == "valid" else usual[part]
    if sum(shares.values()) >= 1:
        raise UserError("test and valid leave nothing to train on", "give shares that sum to less than 1")
    return shares


def _corpus(source: str, shares: dict[str, float], seed: int, asked: dict[str, Any], args: dict[str, Any]) -> Corpus:
    kind, colon, path = source.partition(":")
    given: dict[str, Any] = {"shares": shares, "seed": seed, **args}
    readers: dict[str, Callable[..., Corpus]] = FOREIGN if colon else EMBEDDED
    name = kind if colon else source
    if name not in readers:
        raise unknown("kind of texts" if colon else "texts", name, readers, "limbeck data")
    if colon:
        given["path"] = path
    import inspect

    takes = inspect.signature(readers[name]).parameters
    for key, value in asked.items():
        if key in takes:
            given[key] = value
        elif key != "kind":
            raise UserError(f"{source} takes no {key}", f"leave {key} out")
    check_arguments(readers[name], given, f"data {source!r}")
    return readers[name](**given)


def _text(tokenizer: Any, kind: str, length: int, domains: tuple[str, ...]) -> Text:
    bos = tokenizer.bos_token_id
    return Text(
        tokenizer, kind, length, len(tokenizer), domains, mark_of(tokenizer),
        int(tokenizer.pad_token_id), eos_of(tokenizer), None if bos is None else int(bos),
    )  # fmt: skip


def _table(corpus: Corpus, part: str, encoder: Encoder, mark: str, chat: bool) -> Table:
    template = encoder.tokenizer.chat_template if chat else None
    key = storage.fingerprint([VERSION, corpus.identity, part, mark, corpus.shape, encoder.kind, encoder.drop_empty, template])
    folder = places.cache_folder() / "text" / key
    table = write_table(folder, encoder.columns, encoder.pieces(corpus.parts[part]), note=[corpus.name, part])
    if not len(table):
        raise UserError(f"the {part} data of {corpus.name} is empty", "give more rows, or another seed or share")
    return table


def _split(table: Table, encoder: Encoder, text: Text, options: dict[str, Any], part: str) -> Split:
    columns = {name: table[name] for name in encoder.columns}
    if encoder.shape in ("text", "windows"):
        numbers = next((columns[n].flat for n in ("label", "domain") if n in columns), None)
        windows = WindowSplit(columns["tokens"], text, options["packing"], numbers)
        if not len(windows):
            raise UserError(f"the {part} data has no text of two tokens", "give longer texts")
        return windows if encoder.shape == "text" else _in_memory(windows)
    if encoder.shape == "labelled":
        rows = [columns["tokens"][i][: text.length] for i in range(len(table))]
        ids, mask = pad_rows(rows, text.pad)
        return TensorSplit({"input_ids": ids, "attention_mask": mask}, torch.from_numpy(columns["label"].flat.astype("int64")))
    if encoder.kind == "embedding":
        return RetrievalSplit(columns, text)
    closing = chats.closing(text.tokenizer) if encoder.shape == "chat" else None
    return PairSplit(columns, text, options["prompt_length"], closing)


def _in_memory(windows: WindowSplit) -> TensorSplit:
    """Windows with the class that is their domain, as tensors."""
    index = torch.arange(len(windows))
    inputs = dict(windows.batch(index).inputs)
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    return TensorSplit(inputs, windows.domains)


def _draw(split: Split, count: Any, part: str, corpus: Corpus, seed: int, mix: dict[str, float] | None) -> tuple[Split, Any]:
    """(the samples that were asked for, a mark of which they are)."""
    if mix is not None:
        chosen = mixed(split, corpus.domains, mix, count, seed)
    elif count is None or (isinstance(count, float) and part != "train" and corpus.derived):
        return split, None
    else:
        size = amount(count, len(split), part)
        if size == len(split):
            return split, None
        classes = getattr(split, "classes", None) if split.labels is None else split.labels
        chosen = stratified(classes, len(split), size, seed + ("test", "valid", "train").index(part))
    return split.subset(chosen), storage.tensors_fingerprint({"chosen": chosen})
