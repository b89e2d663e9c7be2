"""Batches in an order that is arithmetic: epoch and step say which samples come, so resuming needs no state."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import torch
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.data.choose import generator
from limbeck.data.split import LoaderSplit, Split, TensorSplit
from limbeck.data.streaming import StreamSplit
from limbeck.errors import UserError


@contextlib.contextmanager
def own_randomness(*numbers: int) -> Iterator[None]:
    """Random numbers of torch, numpy and Python that depend only on `numbers` inside the block; untouched outside."""
    import numpy

    seed = generator(*numbers).initial_seed()
    python, array = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(array)


class _Steps(torch.utils.data.Dataset):
    """The batches of one epoch as items, so that a worker makes whole batches."""

    def __init__(self, batches: Batches, epoch: int) -> None:
        self.batches, self.epoch = batches, epoch

    def __getitem__(self, step: int) -> Batch:
        return self.batches._raw(self.epoch, step)


class Batches:
    """The batches of a split, epoch after epoch.

    The samples of `(epoch, step)` are a pure function of `(seed, epoch, step)`; a run that stops in the middle of an epoch goes on with
    `epoch(e, start=k)`. Splits that read items (not held in memory) also get their random numbers from that triple, so
    the number of workers changes no bit. The split's augmentation is applied here and draws from torch's global generator.

    Args:
        split: where samples come from.
        batch_size: samples in a batch; the last batch of an epoch may be smaller, see `drop_last`.
        seed: of the order.
        shuffle: False keeps the split's order (evaluation).
        drop_last: leave out the incomplete last batch; None means: when shuffling and there is at least one whole batch.
        labelled_share: this share of each batch are samples with a label, the rest samples without; both are cycled
            through permutations of their own, and an epoch has as many steps as without it.
        workers: processes that read items ahead; of use only for splits that are not held in memory.
        share: (r, R): give every R-th sample of each batch, from the r-th on: what one of several processes computes.

    Raises:
        UserError: an empty split, a batch size below 1, a labelled share that the labels cannot give, or a loader that is to be shared out.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool | None = None,
        labelled_share: float | None = None,
        workers: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        if len(split) == 0:
            raise UserError("there are no samples to make batches of", "check the data's train, test and valid sizes")
        if batch_size < 1:
            raise UserError(f"batch size is {batch_size}", "give at least 1")
        if share[1] > 1 and isinstance(split, LoaderSplit):
            message = f"an iterable loader has batches of its own, which {share[1]} processes cannot share out"
            raise UserError(message, "give a map-style Dataset or tensors")
        self.split, self.batch_size, self.seed, self.shuffle, self.workers = split, batch_size, seed, shuffle, workers
        self.drop_last = (shuffle and len(split) >= batch_size) if drop_last is None else drop_last
        self._own = slice(share[0], None, share[1])
        self._streams = () if share[0] == 0 else (share[0],)
        self._cache: dict[tuple[int, int], Tensor] = {}
        self._pools: tuple[Tensor, Tensor] | None = None
        if labelled_share is not None:
            self._pools = self._divide(labelled_share)

    def _divide(self, share: float) -> tuple[Tensor, Tensor]:
        if not self.split.random_access:
            raise UserError("labelled_share needs sample positions, and a stream has none", "give a map-style Dataset")
        self.drop_last = True
        self.labelled_size = round(self.batch_size * share)
        if not 0 < self.labelled_size < self.batch_size:
            raise UserError(f"labelled_share={share} of a batch of {self.batch_size} leaves one side empty", "give a share such as 0.5")
        if self.split.labels is None:
            raise UserError("labelled_share was asked for, but the data has no labels", "leave it out, or give labels")
        labelled = Batch(None, self.split.labels).labelled.cpu()
        pools = labelled.nonzero()[:, 0], (~labelled).nonzero()[:, 0]
        for pool, word in zip(pools, ("labelled", "unlabelled")):
            if len(pool) == 0:
                raise UserError(f"labelled_share was asked for, but there are no {word} samples", "set `labelled` of the data to a count")
        return pools

    @property
    def steps_per_epoch(self) -> int:
        """How many batches an epoch has."""
        if isinstance(self.split, LoaderSplit):
            return self.split.steps
        whole, rest = divmod(len(self.split), self.batch_size)
        if self._pools:
            return max(1, whole)
        return whole + bool(rest and not self.drop_last)

    def __len__(self) -> int:
        return self.steps_per_epoch

    def _permutation(self, pool: int, round_: int) -> Tensor:
        """Positions of one pool (0 = whole split, 1 = labelled, 2 = unlabelled) in the order of one round; the latest are kept."""
        key = (pool, round_)
        if key not in self._cache:
            for old in [k for k in self._cache if k[0] == pool and abs(k[1] - round_) > 1]:
                del self._cache[old]
            size = len(self.split) if pool == 0 else len(self._pools[pool - 1])  # type: ignore[index]
            order = torch.randperm(size, generator=generator(self.seed, round_, pool)) if self.shuffle else torch.arange(size)
            if pool:
                order = self._pools[pool - 1][order]  # type: ignore[index]
            elif isinstance(self.split, TensorSplit):
                order = order.to(self.split.device)
            self._cache[key] = order
        return self._cache[key]

    def _cycled(self, pool: int, first: int, count: int) -> Tensor:
        """`count` positions from an endless chain of permutations of a pool, beginning at place `first` of the chain."""
        size = len(self._pools[pool - 1])  # type: ignore[index]
        parts = []
        while count:
            round_, place = divmod(first, size)
            part = self._permutation(pool, round_)[place : place + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return torch.cat(parts)

    def index_at(self, epoch: int, step: int) -> Tensor:
        """`(B,)` positions of the samples of one whole batch, whoever computes them."""
        if not self._pools:
            return self._permutation(0, epoch)[step * self.batch_size : (step + 1) * self.batch_size]
        number = epoch * self.steps_per_epoch + step
        rest = self.batch_size - self.labelled_size
        return torch.cat([self._cycled(1, number * self.labelled_size, self.labelled_size), self._cycled(2, number * rest, rest)])

    def _raw(self, epoch: int, step: int) -> Batch:
        index = self.index_at(epoch, step)[self._own]
        if isinstance(self.split, TensorSplit):
            return self.split.batch(index)
        with own_randomness(self.seed, epoch, step, *self._streams):
            return self.split.batch(index)

    def _augmented(self, batch: Batch) -> Batch:
        return batch if self.split.augment is None else batch.replace(inputs=self.split.augment(batch.inputs))

    def batch_at(self, epoch: int, step: int) -> Batch:
        """One batch by its place.

        Raises:
            UserError: the split is an iterable loader; IndexError: there is no such step.
        """
        if not self.split.random_access:
            raise UserError("a stream has no batch positions", "use epoch(), or give a map-style Dataset")
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch of {self.steps_per_epoch}")
        return self._augmented(self._raw(epoch, step))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch in order, from step `start` on."""
        if isinstance(self.split, StreamSplit):
            for batch in self.split.batches(self.seed, epoch, self.batch_size, start, self.shuffle, self.drop_last):
                yield self._augmented(batch.rows(self._own))
        elif isinstance(self.split, LoaderSplit):
            for step, batch in enumerate(self.split):
                if step >= start:
                    yield self._augmented(batch.rows(self._own))
        elif self.workers and not isinstance(self.split, TensorSplit):
            from torch.utils.data import DataLoader

            steps = range(start, self.steps_per_epoch)
            # The generator is given so that the loader takes no number from torch's global one.
            loader = DataLoader(
                _Steps(self, epoch), batch_size=None, sampler=steps, num_workers=self.workers, generator=generator(self.seed, epoch)
            )
            yield from map(self._augmented, loader)
        else:
            for step in range(start, self.steps_per_epoch):
                yield self.batch_at(epoch, step)
