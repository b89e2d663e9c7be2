"""Labelling with Ray Data: whole shards are labelled by a pool of workers; the command alone moves them into the store.

A task is a few shards in a row. A worker opens the data and the teacher once, writes each shard under a name of its own, syncs it, and
says its checksum. The command streams these notes, moves the file to its place and then writes the manifest, so that a shard
is in the store once, whoever labelled it how often. What a killed worker left is a file that nobody was told of; it is removed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck import recipe as schema
from limbeck.errors import UserError
from limbeck.knowledge.labelling import Labelling, labelling
from limbeck.knowledge.surroundings import surroundings
from limbeck.scaling.cluster import Fleet, cluster, ended_badly
from limbeck.scaling.site import Site, machine, shared_site
from limbeck.scaling.sizing import RETRIES, Sizing
from limbeck.signals.manifest import Manifest
from limbeck.signals.store import StoreWriter
from limbeck.storage import save_tensors

BATCHES = 8
"""A task holds at least the rows of about so many batches: what two tasks share at their border is computed twice."""

TASKS = 8
"""But every worker gets at least about so many tasks, so that all end at about the same time."""


@dataclass(frozen=True)
class Job:
    """What a worker needs to know. Plain data: it travels.

    Attributes:
        recipe: as written.
        device: kind of the command's own device; a teacher that the recipe trained is kept for this kind.
        signals, k: what is read, see `limbeck.knowledge.labelling.labelling`.
        manifest: of the store that is filled.
        site: what must be found on the worker's machine.
    """

    recipe: dict[str, Any]
    device: str
    signals: tuple[str, ...]
    k: int | None
    manifest: Manifest
    site: Site


def tasks_of(missing: Sequence[int], shard_rows: int, batch_rows: int, workers: int) -> list[range]:
    """Cut the missing shards into tasks: runs of neighbours, long enough for `BATCHES`, short enough for `TASKS` a worker."""
    length = max(1, min(-(-BATCHES * batch_rows // shard_rows), len(missing) // (TASKS * workers)))
    tasks: list[range] = []
    for number in missing:
        if tasks and tasks[-1].stop == number and len(tasks[-1]) < length:
            tasks[-1] = range(tasks[-1].start, number + 1)
        else:
            tasks.append(range(number, number + 1))
    return tasks


def fill(
    writer: StoreWriter, labels: Labelling, recipe: schema.Recipe, sizing: Sizing, told: Callable[[int], None], say: Callable[[str], None]
) -> None:
    """Label what is missing in a store, with the workers of a cluster.

    Args:
        writer: of the store, which the caller holds alone.
        labels: the teacher and data as this process has them; workers must find the same.
        recipe: from which workers open them.
        sizing: how many workers of what size, and where.
        told: of the rows that are done.
        say: told who works.

    Raises:
        UserError: no cluster, a machine that cannot do the work, or workers that were killed again and again.
    """
    threads = recipe.threads or torch.get_num_threads()
    with shared_site(writer.folder, threads) as site, cluster(sizing, threads, gpu=labels.device.type == "cuda") as fleet:
        job = Job(recipe.data_as_written(), labels.device.type, labels.wants, labels.k, writer.manifest(), site)
        say(f"{fleet}, {threads} threads each")
        tasks = tasks_of(writer.missing(), writer.shard_size, labels.rows_a_batch, fleet.workers)
        for note in _notes(job, tasks, fleet):
            _raise(note)
            writer.commit(note["shard"], note["sha256"], writer.folder / note["file"])
            told(writer.stored)


def _notes(job: Job, tasks: Sequence[range], fleet: Fleet) -> Iterator[dict[str, Any]]:
    """What the workers say, shard by shard, as soon as it is said; nothing is collected."""
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # a note leaves its worker when its shard is written, not when the task ends
    with ray.data.DataContext.current(context):
        rows = ray.data.from_items([{"first": task.start, "stop": task.stop} for task in tasks], override_num_blocks=len(tasks))
        notes = rows.map_batches(
            Labeller,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(fleet.workers, len(tasks)), max_tasks_in_flight_per_actor=2),
            fn_constructor_kwargs={"job": job},
            num_cpus=fleet.cpus,
            num_gpus=fleet.gpus or None,
        )
        try:
            yield from notes.iter_rows()
        except (UserError, KeyboardInterrupt, GeneratorExit):
            raise
        except Exception as error:
            raise ended_badly(error, "labelling") from error


def _raise(note: dict[str, Any]) -> None:
    """A worker's complaint, raised here."""
    if note["error"] == "user":
        raise UserError(note["message"], note["hint"])
    if note["error"] == "system":
        raise OSError(note["number"], note["message"], note["hint"])


def _note(**said: Any) -> dict[str, list[Any]]:
    """One row for Ray; every note has the same columns."""
    row = {"shard": -1, "sha256": "", "file": "", "error": "", "message": "", "hint": "", "number": 0} | said
    return {name: [value] for name, value in row.items()}


class Labeller:
    """A worker: it opens data and teacher once, when the first task comes, and labels the shards of its tasks.

    Called with a batch of one row `{"first", "stop"}`, it gives a note for each shard. What the user can mend is a note too.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.labels = job, None

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
        task = range(int(batch["first"][0]), int(batch["stop"][0]))
        try:
            self.job.site.enter()
            self._begin(task)
            if self.labels is None:
                self.labels = self._open()
            yield from self._shards(task)
        except UserError as error:
            yield _note(error="user", message=error.message, hint=error.hint)
        except OSError as error:
            yield _note(error="system", message=error.strerror or str(error), hint=str(error.filename or ""), number=error.errno or 0)

    def _begin(self, task: range) -> None:
        """Count the attempts at a task on the disk, where a killed process cannot forget them."""
        for attempt in range(RETRIES + 1):
            try:
                self.job.site.own(f"task-{task.start}-{attempt}").touch(exist_ok=False)
                return
            except FileExistsError:
                continue
        raise UserError(
            f"the processes that labelled the shards from {task.start} on were killed {RETRIES + 1} times, last on {machine()}",
            "give each more memory: fewer workers, or a smaller training.batch; then the same command goes on where it stopped",
        )

    def _open(self) -> Labelling:
        job, manifest = self.job, self.job.manifest
        recipe = schema.resolve(job.recipe)
        session = surroundings(recipe)
        session.trains = False
        if session.device.type != job.device:
            raise UserError(
                f"{machine()} would compute on {session.device.type}, the command itself on {job.device}",
                "set device in the recipe, and --worker-gpus 1 for workers that compute on a GPU",
            )
        labels = labelling(recipe, session, job.signals, job.k)
        found = (labels.teacher_fingerprint, labels.data_fingerprint, labels.rows)
        for name, here, there in zip(("teacher", "data", "rows"), found, (manifest.teacher, manifest.data, manifest.samples)):
            if here != there:
                raise UserError(
                    f"{machine()} finds another {name} than the command: {here} there, {there} here",
                    "the files that the recipe names must be the same on all machines",
                )
        return labels

    def _shards(self, task: range) -> Iterator[dict[str, list[Any]]]:
        """Write each shard of a task under a name of its own."""
        manifest, labels = self.job.manifest, self.labels
        assert labels is not None
        layout = manifest.layout()
        number, parts = task.start, []
        first, count = manifest.rows_of(task.start)
        last, more = manifest.rows_of(task.stop - 1)
        done = first
        for index, said in labels.pieces(first, last + more):
            packed = layout.pack(said)
            start = 0
            while start < len(index):
                first, count = manifest.rows_of(number)
                stop = min(len(index), start + first + count - done)
                parts.append({name: value[start:stop] for name, value in packed.items()})
                done, start = done + stop - start, stop
                if done == first + count:
                    yield self._save(number, parts, layout.tensors())
                    number, parts = number + 1, []

    def _save(self, number: int, parts: list[dict[str, Tensor]], names: Any) -> dict[str, list[Any]]:
        joined = {name: torch.cat([part[name] for part in parts]) for name in names}
        path = self.job.site.own(f"shard-{number}-{machine()}-{os.getpid()}")
        return _note(shard=number, file=path.name, sha256=save_tensors(path, joined))
