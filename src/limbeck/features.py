"""The classifier in whose features generated pictures are measured: trained once on the training part, kept in the user's cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck import __version__, models, schema, storage
from limbeck.data.batch import UNLABELLED, Batch
from limbeck.data.pictures import Pictures
from limbeck.engine.clock import Clock
from limbeck.engine.program import PlainProgram
from limbeck.engine.schedule import make_optimizer
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.signals import Reader


class _Lessons(PlainProgram):
    """Cross-entropy on the labelled training pictures."""

    def __init__(self, network: nn.Module, pictures: Pictures, training: Any, seed: int) -> None:
        self.network, self.pictures, self.training = network, pictures, training
        self._batches = pictures.batches(training.batch, seed)
        self.steps_per_epoch = self._batches.steps_per_epoch
        self.total = training.steps or max(1, round(training.epochs * self.steps_per_epoch))

    def modules(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"network": make_optimizer(self.training, self.network.parameters())}

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        return (self.pictures.ready(batch) for batch in self._batches.epoch(epoch, start))

    def turns(self, clock: Clock) -> tuple[str, ...]:
        return ("network",)

    def losses(self, turn: str, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        assert batch.labels is not None
        known = batch.labels != self.pictures.classes
        labels = torch.where(known, batch.labels, torch.full_like(batch.labels, UNLABELLED))
        return {"cross_entropy": F.cross_entropy(self.network(batch.inputs), labels, ignore_index=UNLABELLED)}


def feature_network(spec: schema.Model, pictures: Pictures, session: Session, key: str = "generate.features") -> nn.Module:
    """The recipe's `generate.features` (or the block named `key`): loaded, or trained on the pictures and kept.

    Raises:
        UserError: the data has no labels and the classifier is not given, or it cannot read the pictures.
    """
    data = pictures.data
    if not data.classes and spec.train is not None:
        raise UserError(
            f"{data.name} has no labels, so no classifier can be trained to measure generated pictures with",
            f"name a trained network in {key}, with train: null",
        )
    network = models.build(spec, data, spec.train.seed if spec.train else 0, key).to(session.device)
    models.check_input(network, data, session, key)
    if spec.train is None:
        return network.eval()
    school = spec.train
    if school.method.id != "alone" or school.data:
        raise UserError(f"the classifier of {key} is trained on labels alone", "leave method and data out of its train block")
    content = {
        "what": "classifier that generated pictures are measured with",
        "model": spec.model_dump(exclude={"train"}),
        "start": storage.tensors_fingerprint(network.state_dict()),
        "train": school.model_dump(exclude={"method", "data"}),
        "data": data.fingerprint,
        "inputs": "in [-1, 1]",
        "jitter": pictures.jitter,
        "limbeck": __version__,
        "device": session.device.type,
    }
    if session.precision != "no":
        content["precision"] = session.precision

    def train(work: Path, key: str) -> nn.Module:
        session.fit(_Lessons(network, pictures, school, school.seed), "features", seed=school.seed, folder=work, digest=key, evaluate=False)
        return network

    return models.kept(content, network, session, "feature classifier", train).eval()


class Features:
    """Penultimate features and classes of pictures.

    Args:
        network: a classifier of pictures in [-1, 1].
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.network, self.device = network.eval(), device
        self._reader = Reader(network, ("embedding", "logits"))

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(N, D)` features and `(N,)` classes of pictures `(N, C, H, W)`, on the CPU."""
        features, classes = [], []
        for part in x.split(512):
            said = self._reader(part.to(self.device))
            features.append(said.embedding.float().cpu())
            classes.append(said.logits.argmax(1).cpu())
        return torch.cat(features), torch.cat(classes)
