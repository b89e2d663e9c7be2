"""Training pictures in [-1, 1], and labels to ask generators for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from limbeck import processes
from limbeck.data import Data
from limbeck.data.batch import UNLABELLED, Batch
from limbeck.data.batches import Batches
from limbeck.data.split import Split
from limbeck.errors import UserError

LOOKED_AT = 4096
"""Training samples, evenly spread, that are looked at to find the range of the pixels."""


class Pictures:
    """The pictures of a data set, scaled to [-1, 1].

    Args:
        data: with `(C, H, W)` samples whose pixels lie in [0, 1] or in [-1, 1].
        jitter: standard deviation of Gaussian noise that is added to training batches.
        latents: the samples are an autoencoder's latents: any range, left as they are.
        device: where batches go.

    Raises:
        UserError: the samples are no pictures, or their pixels lie outside [-1, 1].
    """

    def __init__(self, data: Data, jitter: float = 0.0, device: torch.device | str = "cpu", latents: bool = False) -> None:
        if len(data.input_shape) != 3:
            raise UserError(
                f"this makes pictures (C, H, W), and the samples of {data.name} have shape {tuple(data.input_shape)}",
                "give picture data; `limbeck data` lists the embedded sets",
            )
        self.data, self.jitter, self.device, self.latents = data, jitter, torch.device(device), latents
        spread = torch.linspace(0, len(data.train) - 1, min(LOOKED_AT, len(data.train))).long()
        some = data.train.batch(spread).inputs
        low, high = float(some.min()), float(some.max())
        if not latents and (low < -1.001 or high > 1.001):
            raise UserError(
                f"the pixels of {data.name} lie in [{low:.3g}, {high:.3g}], outside [-1, 1]",
                "generators work on pictures in [0, 1] or [-1, 1]; leave standardisation out, or set generate.latents for latents",
            )
        self.doubled = low >= 0 and not latents

    @property
    def shape(self) -> tuple[int, ...]:
        """`(C, H, W)`."""
        return tuple(self.data.input_shape)

    @property
    def classes(self) -> int:
        """Number of classes; 0 when there are no labels."""
        return len(self.data.classes)

    def scaled(self, x: Tensor) -> Tensor:
        """Pixels as the data has them, moved to [-1, 1]."""
        return 2 * x - 1 if self.doubled else x

    def labels_of(self, labels: Tensor | None) -> Tensor | None:
        """Labels for a network: hidden ones become the null label (the number of classes)."""
        if labels is None or not self.classes:
            return None
        if labels.ndim != 1:
            raise UserError(f"{self.data.name} has several labels a sample", "generators take one class a picture; give such labels")
        return torch.where(labels == UNLABELLED, torch.full_like(labels, self.classes), labels)

    def batches(self, batch: int, seed: int) -> Batches:
        """The training batches in an order that is arithmetic; scale them with `ready`."""
        size = min(batch, len(self.data.train))
        processes.check_even(size)
        return Batches(self.data.train, size, seed=seed, share=(processes.rank(), processes.world()))

    def ready(self, batch: Batch) -> Batch:
        """A batch of the data as a generator's training wants it: scaled, jittered, on the device."""
        x = self.scaled(batch.inputs).to(self.device)
        if self.jitter:
            x = x + self.jitter * torch.randn_like(x)
        labels = self.labels_of(batch.labels)
        return Batch(x, None if labels is None else labels.to(self.device), batch.index)

    def random(self, count: int) -> tuple[Tensor, Tensor | None]:
        """`count` training pictures drawn from torch's global generator, with their labels."""
        ready = self.ready(self.data.train.batch(torch.randint(len(self.data.train), (count,))))
        return ready.inputs, ready.labels

    def like(self, labels: Tensor) -> Tensor:
        """One random training picture for each label `(B,)`; the null label gets any.

        Raises:
            UserError: a class has no labelled training sample.
        """
        pools = self._pools()
        places = torch.empty(len(labels), dtype=torch.long)
        wanted = labels.cpu()
        for label in wanted.unique().tolist():
            pool = pools[label]
            if not len(pool):
                raise UserError(f"there is no labelled training picture of class {self.data.classes[label]}", "label at least one a class")
            own = wanted == label
            places[own] = pool[torch.randint(len(pool), (int(own.sum()),))]
        return self.ready(self.data.train.batch(places)).inputs

    def _pools(self) -> list[Tensor]:
        if not hasattr(self, "_kept"):
            labels = self.data.train.labels.cpu()
            self._kept = [(labels == c).nonzero()[:, 0] for c in range(self.classes)] + [torch.arange(len(labels))]
        return self._kept

    def whole(self, split: Split, most: int | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """A split's pictures in order, scaled and without jitter, 512 at a time, at most `most` of them."""
        seen = 0
        for batch in Batches(split, 512, shuffle=False).epoch(0):
            x, y = self.scaled(batch.inputs), batch.labels
            if most is not None and seen + len(x) > most:
                x, y = x[: most - seen], None if y is None else y[: most - seen]
            if len(x):
                yield x.to(self.device), y
            seen += len(x)
            if most is not None and seen >= most:
                return
