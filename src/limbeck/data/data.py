"""A data set ready for use: its parts, what the inputs look like, what the classes are called."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from limbeck.data.batch import Batch
from limbeck.data.split import Split
from limbeck.storage import fingerprint as digest

if TYPE_CHECKING:
    from limbeck.data.text import Text


@dataclass
class Data:
    """A data set, split and checked.

    Attributes:
        name: what it was opened as.
        train, test, valid: its parts; `valid` is None unless asked for.
        input_shape: shape of one sample, `(C, H, W)` for pictures, `(F,)` for tables, `(L,)` for token ids.
        classes: names of the classes in the order of their numbers; empty when there are no labels.
        kind: "multiclass" (one of several classes), "multilabel" (any of several) or "binary" (one logit for yes or no); of texts also
            "causal-lm", "seq2seq" or "embedding".
        fingerprint: digest of content, preprocessing and split arguments: equal exactly when the samples are.
        images: whether the inputs can be shown as pictures (`(B, 1 or 3, H, W)` floats).
        hidden_labels: `(N,)` true labels of the whole training part when some were hidden, else None.
        text: the tokenizer and what belongs to it when the samples are texts, else None.
    """

    name: str
    train: Split
    test: Split
    valid: Split | None = None
    input_shape: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()
    kind: str = "multiclass"
    fingerprint: str = ""
    images: bool = False
    hidden_labels: Tensor | None = field(default=None, repr=False)
    text: Text | None = None

    def example(self, n: int = 2) -> Batch:
        """The first `n` training samples (all of them when there are fewer), for dry passes."""
        return self.train.batch(torch.arange(min(n, len(self.train))))

    def with_all_labels(self) -> Data:
        """The same data with nothing hidden: what a run could reach at best ("ceiling")."""
        if self.hidden_labels is None:
            return self
        mark = digest([self.fingerprint, "all labels"])
        return replace(self, train=self.train.with_labels(self.hidden_labels), hidden_labels=None, fingerprint=mark)

    def only_labelled(self) -> Data:
        """The same data with only the labelled training samples, numbered from 0: what plain training has."""
        if self.hidden_labels is None or self.train.labels is None:
            return self
        kept = Batch(None, self.train.labels).labelled.nonzero()[:, 0]
        mark = digest([self.fingerprint, "only labelled"])
        return replace(self, train=self.train.subset(kept), hidden_labels=None, fingerprint=mark)

    def with_augment(self, augment: Any) -> Data:
        """The same data whose training batches are augmented (see `limbeck.data.Augment`); None for none."""
        return replace(self, train=self.train.with_augment(augment))

    def to(self, device: torch.device | str) -> Data:
        """The same data with what is held in memory on a device."""
        valid = None if self.valid is None else self.valid.to(device)
        return replace(self, train=self.train.to(device), test=self.test.to(device), valid=valid)

    @property
    def labelled(self) -> int:
        """How many training samples have a label."""
        return 0 if self.train.labels is None else int(Batch(None, self.train.labels).labelled.sum())

    def describe(self) -> dict[str, Any]:
        """What a report says about the data; JSON can hold it."""
        return {
            "name": self.name,
            "kind": self.kind,
            "input_shape": list(self.input_shape),
            "classes": list(self.classes),
            "train": len(self.train),
            "labelled": self.labelled,
            "valid": 0 if self.valid is None else len(self.valid),
            "test": len(self.test),
            "images": self.images,
            "fingerprint": self.fingerprint,
        }
