"""Texts of a teacher for many prompts: asked of a server, or written by a network at hand; both are kept, none is made twice."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck import places, schema, storage
from limbeck.data import Data
from limbeck.data.split import Split
from limbeck.data.text import PairSplit, Ragged
from limbeck.decoding import generate
from limbeck.endpoint import Endpoint, EndpointSettings, Request
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.places import user_path

PHASE = "ask"
"""The phase under which callbacks are told how many texts are there."""


@dataclass(frozen=True)
class Written:
    """A teacher's answer to one prompt.

    Attributes:
        text: as it came.
        whole: False where it was broken off because it became too long.
    """

    text: str
    whole: bool = True


class Progress:
    """Tells a session's callbacks about texts that are made, as the phase "ask".

    Args:
        session: whose callbacks.
        total: texts in all.
    """

    def __init__(self, session: Session, total: int) -> None:
        self.session, self.total, self.first, self.began = session, total, -1, 0.0

    def __call__(self, done: int, total: int | None = None) -> None:
        """So many texts are there; the first call begins the phase."""
        if self.first < 0:
            self.first, self.began = done, time.perf_counter()
            for callback in self.session.callbacks:
                callback.start(PHASE, done, self.total)
            return
        rate = (done - self.first) / max(time.perf_counter() - self.began, 1e-9)
        told = done == self.total or done % max(1, self.total // 100) == 0
        for callback in self.session.callbacks:
            if told:
                callback.log({"phase": PHASE, "step": done, "terms": {}, "rate": rate})
            callback.tick(done)

    def finish(self) -> None:
        """All are there."""
        for callback in self.session.callbacks if self.first >= 0 else ():
            callback.finish(PHASE)


def pairs_of(data: Data, method: str) -> PairSplit:
    """The training part as prompts with completions.

    Raises:
        UserError: it holds plain texts, which have no prompts.
    """
    if not isinstance(data.train, PairSplit):
        raise UserError(
            f"{method} needs prompts that a teacher can answer, and {data.name} holds plain texts",
            "use data of prompts and completions, such as stdlib-explain, tables-in-words or jsonl:<file>",
        )
    return data.train


# ---- a teacher behind a server ----


def endpoint_of(block: schema.Endpoint) -> Endpoint:
    """The teacher of a recipe's `teacher.endpoint` block; answers are kept in its `log`, by default in the user's cache folder."""
    known = {item.name for item in fields(EndpointSettings)}
    given = {name: value for name, value in block.model_dump().items() if name in known}
    if given["stop"] is not None:
        given["stop"] = tuple(given["stop"])
    settings = EndpointSettings(**given)
    if block.log is not None:
        log = user_path(block.log)
    else:
        log = places.cache_folder() / "endpoint" / f"{storage.fingerprint([settings.base_url, settings.model])}.jsonl"
    return Endpoint(settings, log)


def ask(block: schema.Endpoint, prompts: Sequence[str], session: Session) -> list[Written]:
    """What the server's model answers to each prompt. Only what the log lacks is sent; what that is and costs is noted before.

    Args:
        block: the recipe's `teacher.endpoint`.
        prompts: texts.
        session: gets the note, and its callbacks the progress.

    Raises:
        UserError: as `Endpoint.ask`, among them a job that may cost more than `limit_cost` (before anything is sent).
    """
    endpoint = endpoint_of(block)
    requests = [Request(str(number), prompt) for number, prompt in enumerate(prompts)]
    planned = endpoint.estimate(requests)
    session.notes.append(_told(block.model, planned))
    if block.limit_cost is not None and planned.cost is not None and planned.cost > block.limit_cost:
        raise UserError(
            f"{planned.to_ask} questions to {block.model} may cost {planned.cost:.4g}, more than limit_cost {block.limit_cost:g}",
            "raise teacher.endpoint.limit_cost, lower max_tokens, or take fewer training samples (data.train)",
        )
    progress = Progress(session, len(requests))
    answers = endpoint.ask(requests, progress, block.limit_cost)
    progress.finish()
    return [Written(answer.text, answer.finish_reason != "length") for answer in answers]


def _told(model: str, planned: Any) -> str:
    """An estimate in one line."""
    said = f"{model}: {planned.already_answered} of {planned.requests} answers are in the log, {planned.to_ask} questions to ask"
    if planned.to_ask:
        said += f", about {planned.prompt_tokens} tokens of prompts, at most {planned.most_completion_tokens} tokens of answers"
        said += "" if planned.cost is None else f", at most {planned.cost:.4g} in money"
    return said


# ---- a teacher of one's own ----


def write(
    network: nn.Module,
    split: PairSplit,
    session: Session,
    seed: int,
    *,
    tokens: int,
    temperature: float = 0.0,
    top_p: float | None = None,
    batch: int = 16,
    binding: Any = None,
) -> list[Written]:
    """What a language model writes for every prompt of a split; kept in the session's folder, so that a resumed run goes on with it.

    Each batch has random numbers of its own, made from the seed and its place: texts do not depend on where a run was interrupted.

    Args:
        network: reads the tokens of the split.
        split: N prompts.
        session: folder, device and callbacks.
        seed: of the random numbers.
        tokens: at most so many are written for a prompt, and no more than fit behind it into the data's length.
        temperature, top_p: of the choice of tokens; 0 is the likeliest one.
        batch: prompts at a time.
        binding: what else decides the texts (the data's fingerprint, the network's); what was kept for something else is not used.
    """
    text, total = split.text, len(split)
    key = storage.fingerprint([binding, seed, tokens, temperature, top_p, batch, total])
    kept = _Kept(None if session.folder is None else Path(session.folder) / "written" / f"{key}.jsonl", batch, total)
    progress = Progress(session, total)
    progress(len(kept.texts))
    for first in range(len(kept.texts), total, batch):
        index = torch.arange(first, min(first + batch, total))
        ids, mask = split.prompts(index)
        room = split.length - (0 if split.seq2seq else ids.shape[1])  # what the student could not read is not written
        made = generate(
            network,
            ids.to(session.device),
            mask.to(session.device),
            new_tokens=min(tokens, room),
            temperature=temperature,
            top_p=top_p,
            eos=text.eos,
            pad=text.pad,
            vocabulary=text.vocabulary,
            generator=torch.Generator(session.device).manual_seed(_seed_of(seed, first)),
        )
        rows = [row[on].tolist() for row, on in zip(made.ids.cpu(), made.mask.cpu())]
        said = text.tokenizer.batch_decode(rows, skip_special_tokens=True)
        kept.add([Written(t, bool(row) and row[-1] == text.eos) for t, row in zip(said, rows)])
        progress(len(kept.texts))
    progress.finish()
    return kept.texts


def _seed_of(seed: int, place: int) -> int:
    return int(storage.fingerprint([seed, place])[:15], 16)


class _Kept:
    """Texts in a file of JSON lines that grows a batch at a time; a batch that a kill cut short is written again."""

    def __init__(self, path: Path | None, batch: int, total: int) -> None:
        self.path, self.texts = path, []  # type: ignore[var-annotated]
        if path is None or not path.is_file():
            return
        lines = path.read_bytes().split(b"\n")[:-1]
        for line in lines:
            try:
                found = json.loads(line)
                if found.pop("mark") != storage.fingerprint(found):
                    break  # altered: this text and those behind it are written again
                self.texts.append(Written(found["text"], found["whole"]))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                break
        if len(self.texts) < total:
            self.texts = self.texts[: len(self.texts) // batch * batch]
        storage.write_text(path, "".join(self._line(item) for item in self.texts[:total]))

    @staticmethod
    def _line(item: Written) -> str:
        found = {"text": item.text, "whole": item.whole}
        return json.dumps({**found, "mark": storage.fingerprint(found)}) + "\n"

    def add(self, items: list[Written]) -> None:
        """Keep a batch."""
        self.texts += items
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(self._line, items)))
            file.flush()
            os.fsync(file.fileno())


# ---- splits of other texts ----


def with_written(split: PairSplit, written: Sequence[Written]) -> PairSplit:
    """The same prompts with what a teacher wrote; a text that was broken off gets no end token, so that nobody learns to stop there."""
    made = split.with_completions([item.text for item in written])
    cut, own = len(made.closing), made.columns["completion"]
    rows = [own[row] if item.whole else own[row][: len(own[row]) - cut] for row, item in enumerate(written)]
    made.columns["completion"] = Ragged.of(rows)
    return made


def with_training(data: Data, train: Split, session: Session, mark: Any) -> Data:
    """The data with another training part. Checkpoints are bound to what it was made from.

    Args:
        data: as it was.
        train: the new training part.
        session: its digest grows.
        mark: plain data that decides the part: texts, settings.
    """
    print_ = storage.fingerprint([data.fingerprint, mark])
    session.digest += print_
    return replace(data, train=train, fingerprint=print_)
