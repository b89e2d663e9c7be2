"""What a condenser works on: the real data by class, the inner network, the teachers, and where a set may start."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from limbeck import schema, zoo
from limbeck.condensation.functional import fresh
from limbeck.condensation.synthetic import SyntheticSet
from limbeck.data import Data
from limbeck.data.choose import generator
from limbeck.data.split import Split, TensorSplit
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.signals import Anatomy, Reader, anatomy

if TYPE_CHECKING:
    from limbeck.condensation.protocol import Protocol

_CHUNK = 4096


class Problem:
    """The real data and everything that is made from it, in standardised units.

    Args:
        data: opened; its training part is condensed, its other parts only measured on.
        condense: the recipe's block of that name.
        inner: the inner network: its block of the recipe, or a module whose architecture is taken.
        session: device, folder, callbacks.
        seed: of the run.
        teachers: trained networks by name; they read standardised inputs.

    Attributes:
        classes: K; per_class: images a class; images: whether samples are pictures; input_shape: of one sample.
        mean, std: of the training data, for each channel (for each column of a table).
        siamese: the differentiable augmentation of the matching, or None.

    Raises:
        UserError: a class has too few samples, there are no labels, or the augmentation needs pictures and there are none.
    """

    def __init__(
        self,
        data: Data,
        condense: schema.Condense,
        inner: schema.Model | nn.Module,
        session: Session,
        seed: int = 0,
        teachers: Mapping[str, nn.Module] | None = None,
    ) -> None:
        if data.kind != "multiclass" or not data.classes:
            raise UserError(f"the data {data.name} has no classes to condense", "condensation needs one class label a sample")
        self.data, self.condense, self.session, self.seed = data, condense, session, seed
        self.device, self.classes, self.per_class = session.device, len(data.classes), condense.per_class
        self.images, self.input_shape = data.images, tuple(data.input_shape)
        self.teachers = {name: network.eval().requires_grad_(False) for name, network in (teachers or {}).items()}
        self._inner = inner
        self._positions = self._by_class()
        self.mean, self.std = self._moments()
        if condense.siamese and not self.images:
            raise UserError(
                f"condense.siamese={condense.siamese} changes pictures, and {data.name} has none", 'set condense.siamese="" for tables'
            )
        self.siamese = None
        if condense.siamese:
            from limbeck.condensation.siamese import Siamese

            self.siamese = Siamese(condense.siamese)
        self._standard: Tensor | None = None

    graphs = False

    def whole_bytes(self) -> dict[str, int]:
        """Bytes of the real training samples: one for each value of a picture, four for each of a table, and their labels."""
        count = len(self.labelled)
        return {
            "images": count * math.prod(self.input_shape) * (1 if self.images else 4),
            "labels": count * (1 if self.classes <= 256 else 4),
        }

    def protocol(self, recipe: schema.Recipe) -> Protocol:
        """How sets of these samples are judged."""
        from limbeck.condensation.protocol import Protocol

        return Protocol(self, recipe)

    # ---- the real data ----

    def _by_class(self) -> list[Tensor]:
        labels = self.data.train.labels
        if labels is None:
            raise UserError(f"the training part of {self.data.name} has no labels", "name the label column with data.label")
        found = [(labels.cpu() == c).nonzero()[:, 0] for c in range(self.classes)]
        for name, positions in zip(self.data.classes, found):
            if not len(positions):
                raise UserError(f"the class {name!r} has no training sample", "leave the class out, or give it samples")
            if len(positions) < self.per_class:
                raise UserError(
                    f"the class {name!r} has {len(positions)} training samples, fewer than the {self.per_class} synthetic ones asked for",
                    f"set condense.per_class to at most {len(positions)}",
                )
        return found

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over training samples and pixels, of each channel; in float64, chunk by chunk."""
        count, total, squares = 0, 0.0, 0.0
        for index in torch.arange(len(self.data.train)).split(_CHUNK):
            x = self.data.train.batch(index).inputs.double()
            x = x.transpose(0, 1).flatten(1) if x.ndim > 2 else x.T
            count, total, squares = count + x.shape[1], total + x.sum(1), squares + (x * x).sum(1)
        mean = total / count
        std = (squares / count - mean * mean).clamp(min=0).sqrt()
        std = torch.where(std > 1e-8, std, torch.ones_like(std))  # a constant channel stays as it is
        shape = (-1,) + (1,) * (len(self.input_shape) - 1)
        return mean.float().view(shape).to(self.device), std.float().view(shape).to(self.device)

    def standardise(self, x: Tensor) -> Tensor:
        """Inputs of the data in standardised units, on the run's device."""
        return (x.to(self.device).float() - self.mean) / self.std

    def read(self, split: Split, index: Tensor) -> Tensor:
        """Samples of any split at positions `index`, standardised."""
        return self.standardise(split.batch(index).inputs)

    def _whole(self) -> Tensor | None:
        """The standardised training inputs in memory; None for splits that are read from elsewhere."""
        if self._standard is None and isinstance(self.data.train, TensorSplit):
            chunks = torch.arange(len(self.data.train)).split(_CHUNK)
            self._standard = torch.cat([self.read(self.data.train, index) for index in chunks])
        return self._standard

    def at(self, index: Tensor) -> Tensor:
        """Training samples at positions `index`, standardised."""
        whole = self._whole()
        return self.read(self.data.train, index) if whole is None else whole[index.to(whole.device)]

    def of_class(self, c: int) -> Tensor:
        """Positions of the training samples of a class (on the CPU)."""
        return self._positions[c]

    def real(self, c: int, n: int) -> Tensor:
        """`(min(n, N_c), ...)` random real samples of a class, without replacement, drawn with torch's global generator."""
        positions = self._positions[c]
        return self.at(positions[torch.randperm(len(positions))[:n]])

    def real_batch(self, n: int) -> tuple[Tensor, Tensor]:
        """`n` random labelled real samples and their classes, whatever those are."""
        index = self.labelled[torch.randint(len(self.labelled), (n,))]
        return self.at(index), self.data.train.labels.cpu()[index].to(self.device)

    @cached_property
    def labelled(self) -> Tensor:
        """Positions of all training samples that have a class, in order."""
        return torch.cat(self._positions).sort().values

    def all(self) -> tuple[Tensor, Tensor]:
        """Every labelled training sample, standardised, and its class. Only for data that fits into memory."""
        return self.at(self.labelled), self.data.train.labels.cpu()[self.labelled].to(self.device)

    def pixel_bounds(self) -> tuple[Tensor, Tensor]:
        """`(C, 1, 1)` each: where pixels 0 and 1 lie in standardised units.

        Raises:
            UserError: the samples are no pictures.
        """
        if not self.images:
            raise UserError(f"{self.data.name} has no pixels to keep within bounds", "this method condenses pictures")
        return -self.mean / self.std, (1 - self.mean) / self.std

    @property
    def positions(self) -> list[Tensor]:
        """Positions of the training samples of every class, in the order of the classes."""
        return self._positions

    def features(self, index: Tensor, what: str = "inputs") -> Tensor:
        """`(n, D)` features of training samples: the standardised inputs, or the first teacher's embedding ("teacher").

        Raises:
            UserError: the teacher's features are asked for and the recipe names no teacher.
        """
        x = self.at(index)
        if what == "inputs":
            return x.flatten(1)
        if not self.teachers:
            raise UserError("features of a teacher were asked for, and the recipe names none", "set `teacher`, or features=inputs")
        reader = Reader(next(iter(self.teachers.values())), ("embedding",))
        with torch.no_grad():
            return torch.cat([reader(part).embedding for part in x.split(_CHUNK)])

    # ---- networks ----

    @cached_property
    def template(self) -> nn.Module:
        """One inner network for looking at; no random number is used up."""
        with torch.random.fork_rng(devices=[]):
            return self.network()

    def network(self, reuse: nn.Module | None = None, outputs: int | None = None) -> nn.Module:
        """A new inner network with random weights from torch's global generator, on the device, in training mode.

        Args:
            reuse: an inner network that is no longer needed; its weights are drawn again in place where that gives the same
                distribution (several times faster than making one), else its place is taken by a new one.
            outputs: width of the head; None for the number of classes.

        Raises:
            UserError: another width is asked for and the inner network was given as an object.
        """
        if reuse is not None and getattr(reuse, "plain_start", False):
            return fresh(reuse)
        if isinstance(self._inner, nn.Module):
            if outputs not in (None, self.classes):
                raise UserError(
                    f"the inner network was given as an object with a head for {self.classes} classes, and {outputs} outputs are needed",
                    "name an embedded network instead, for example student=convnet",
                )
            return fresh(copy.deepcopy(self._inner)).to(self.device).train()
        args = {"input_shape": self.input_shape, "classes": outputs or self.classes, **self._inner.args}
        return zoo.build(self._inner.model, **args).to(self.device).train()

    @cached_property
    def anatomy(self) -> Anatomy:
        """Where the inner network's embedding and stages are."""
        return anatomy(self.template, torch.zeros(2, *self.input_shape, device=self.device))

    @cached_property
    def batch_norms(self) -> list[str]:
        """Paths of the inner network's layers that normalise over the batch."""
        return [name for name, module in self.template.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def reader(self, network: nn.Module, *wants: str) -> Reader:
        """Reads signals of an inner network ("embedding", "stages", module paths) with gradient."""
        return Reader(network, wants, anatomy=self.anatomy, stop_early="logits" not in wants)

    # ---- sets ----

    def make(self, images: Tensor, labels: Tensor, **options: Any) -> SyntheticSet:
        """A set of standardised images of this data."""
        given = {"mean": self.mean, "std": self.std, "format": self.condense.format, **options}
        return SyntheticSet(images, labels, self.data.classes, **given).to(self.device)

    def labels(self, per_class: int | None = None) -> Tensor:
        """`(K * per_class,)`: class after class."""
        return torch.arange(self.classes, device=self.device).repeat_interleave(per_class or self.per_class)

    def subset(self, index: Tensor) -> SyntheticSet:
        """Real training samples as a set with hard labels; they are put class after class."""
        labels = self.data.train.labels.cpu()[index]
        order = labels.argsort(stable=True)
        return self.make(self.at(index[order]), labels[order])

    def initial(self, kind: str, per_class: int | None = None) -> SyntheticSet:
        """Where a set may start: "real" (random real samples), "noise" (standard normal) or "kmeans" (nearest to k-means centres).

        Draws come from a generator of the run's seed alone, so that methods compared with one seed start from the same samples.
        """
        n = per_class or self.per_class
        own = generator(self.seed, 11)
        if kind == "noise":
            return self.make(torch.randn(self.classes * n, *self.input_shape, generator=own).to(self.device), self.labels(n))
        if kind == "real":
            chosen = [positions[torch.randperm(len(positions), generator=own)[:n]] for positions in self._positions]
            return self.subset(torch.cat(chosen))
        if kind == "kmeans":
            from limbeck.condensation.selection import nearest_to_centres

            return self.subset(torch.cat([p[nearest_to_centres(self.at(p), n, self.seed)] for p in self._positions]))
        raise UserError(f"a set cannot start from {kind!r}", "choose real, noise or kmeans")
