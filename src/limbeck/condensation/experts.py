"""Experts: networks trained on the real data whose weights after every epoch are kept, made once and shared by runs.

Shapes: E epochs, P weights; a trajectory is `(E + 1, P)`, its first row the random initialisation.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck import __version__, places, schema, storage
from limbeck.condensation.condenser import surrogate
from limbeck.condensation.functional import Functional
from limbeck.condensation.problem import Problem
from limbeck.condensation.sharpness import gsam_direction
from limbeck.condensation.students import Lesson, real_lessons
from limbeck.data.batches import own_randomness
from limbeck.engine.clock import Clock
from limbeck.engine.program import PlainProgram
from limbeck.errors import MISFITS, UserError
from limbeck.places import user_path

REVISION = 2
"""Raised when experts of the same settings come out otherwise than before: those in caches are then made again."""

LOADED_BYTES = 1 << 32
"""Trajectories are kept in memory up to this size (of 100 experts and 50 epochs, those of a network of 200 000 weights)."""


@dataclass(frozen=True)
class Schooling:
    """How experts are trained.

    Attributes:
        count, epochs, batch, lr, momentum, weight_decay: plain SGD.
        rho, alpha, adaptive: of sharpness-aware training (GSAM); rho 0 for none.
        clipping: epochs in which the loss counts less, 0.5 rising by 0.05 (AST's clipping loss); 0 for none.
        penalty: weight of the input-gradient penalty (AST); 0 for none.
        drop: what the learning rate is multiplied by after half of the epochs (rounded down), with a fresh momentum; 1 for none.
        seed: of weights and orders; the same for every run, so that runs of several seeds share their experts.
    """

    count: int = 100
    epochs: int = 50
    batch: int = 256
    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    rho: float = 0.0
    alpha: float = 0.0
    adaptive: bool = True
    clipping: int = 0
    penalty: float = 0.0
    drop: float = 1.0
    seed: int = 0


def gradient_penalty(logits: Tensor, x: Tensor) -> Tensor:
    """mean (|G|_2 - 1)^2 with G the gradient of the sum of all logits for the inputs, differentiable in the weights.

    The norm runs over the channels of each pixel, as in AST's released code; with one channel over the whole picture, because the norm
    of one number is its size.

    Args:
        logits: `(B, K)` of the inputs.
        x: `(B, C, H, W)` (or `(B, F)`), with `requires_grad`.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    flat = gradient.flatten(1) if gradient.ndim < 4 or gradient.shape[1] == 1 else gradient
    return ((flat.norm(dim=1) - 1) ** 2).mean()


class ExpertProgram(PlainProgram):
    """One expert as an engine program; the weights after every epoch are its memory, so that it resumes.

    Args:
        network: in its first state.
        problem: the real data.
        how: the schooling.
        seed: of the order of samples.
    """

    def __init__(self, network: nn.Module, problem: Problem, how: Schooling, seed: int) -> None:
        self.network, self.problem, self.how = network, problem, how
        self.lessons = real_lessons(problem, how.batch, seed=seed)
        self.steps_per_epoch = self.lessons.steps_per_epoch
        self.total = how.epochs * self.steps_per_epoch
        self.half = 0 if how.drop == 1 else how.epochs // 2
        share = (self.half * self.steps_per_epoch - 0.5) / self.total  # half a step early: safe from rounding
        schedule = {"schedule": "step", "milestones": (share,), "gamma": how.drop} if self.half else {"schedule": "constant"}
        self.training = schema.Training(steps=self.total, warmup=0, optimizer="sgd", lr=how.lr, **schedule)  # type: ignore[arg-type]
        self.functional = Functional(network)
        self.snapshots = [self.functional.flatten(network)]
        self._optimizer = torch.optim.SGD(network.parameters(), how.lr, how.momentum, weight_decay=how.weight_decay)

    def modules(self) -> dict[str, nn.Module]:
        return {"expert": self.network}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"expert": self._optimizer}

    def batches(self, epoch: int, start: int) -> Iterator[Lesson]:
        return self.lessons.epoch(epoch, start)

    def turns(self, clock: Clock) -> Sequence[str]:
        return ("expert",)

    def losses(self, turn: str, batch: Lesson, clock: Clock) -> dict[str, Tensor]:
        x = batch.x if self.problem.siamese is None else self.problem.siamese(batch.x)
        share = min(1.0, 0.5 + 0.05 * clock.epoch) if clock.epoch < self.how.clipping else 1.0

        def hard() -> Tensor:
            return share * F.cross_entropy(self.network(x), batch.y)

        if self.how.rho:
            weights = list(self.network.parameters())
            value, direction = gsam_direction(hard, weights, self.how.rho, self.how.alpha, self.how.adaptive)
            return {"hard": surrogate(value, dict(zip(weights, direction)))}
        terms = {"hard": hard()}
        if self.how.penalty:
            plain = batch.x.detach().requires_grad_(True)
            terms["penalty"] = self.how.penalty * gradient_penalty(self.network(plain), plain)
        return terms

    def after_step(self, clock: Clock) -> None:
        step = clock.step + 1
        if step % self.steps_per_epoch == 0:
            self.snapshots.append(self.functional.flatten(self.network))
            if self.half and step // self.steps_per_epoch == self.half:
                self._optimizer.state.clear()  # the released code makes a new optimiser with the lower rate

    def memory(self) -> dict[str, Any]:
        return {"snapshots": torch.stack(self.snapshots)}

    def restore(self, memory: dict[str, Any]) -> None:
        self.snapshots = list(memory["snapshots"].to(self.problem.device))


class Buffer:
    """The trajectories of all experts, one checked file each, in the user's cache folder.

    Args:
        problem: whose data and inner network the experts have.
        how: their schooling.
        folder: another place than the cache.

    Raises:
        UserError: a file is torn or altered (it is named, and only that expert need be made again), or the folder holds experts of
            another network, of other data or of another schooling.
    """

    def __init__(self, problem: Problem, how: Schooling, folder: str | Path | None = None) -> None:
        self.problem, self.how = problem, how
        template = problem.template
        self.functional = Functional(template)
        self.content = {
            "network": {"shapes": [list(s) for s in self.functional.shapes], "names": self.functional.names, "layers": str(template)},
            "data": problem.data.fingerprint,
            "schooling": asdict(how),
            "siamese": problem.condense.siamese,
            "device": problem.device.type,
            "limbeck": f"{__version__}, revision {REVISION}",
        }
        self.digest = storage.fingerprint(
            {key: value for key, value in self.content.items() if key != "schooling"} | {"how": self._alike()}
        )
        self.folder = user_path(folder) if folder is not None else places.cache_folder() / "experts" / self.digest
        self._loaded: dict[int, Tensor] = {}

    def _alike(self) -> dict[str, Any]:
        """The schooling without the number of experts: more of the same kind join those that are there."""
        return {key: value for key, value in asdict(self.how).items() if key != "count"}

    def _index(self) -> dict[str, Any]:
        file = self.folder / "index.json"
        if not file.is_file():
            return {"digest": self.digest, "content": self.content, "experts": {}}
        try:
            found = json.loads(file.read_text("utf-8"))
            digest, experts = found["digest"], found["experts"]
        except MISFITS:
            raise UserError(f"{file} is damaged", "delete the folder: the experts are then made again") from None
        if digest != self.digest:
            old = found.get("content", {})
            differs = [k for k in ("network", "data", "siamese", "device", "limbeck") if old.get(k) != self.content[k]]
            raise UserError(
                f"the experts in {self.folder} were made with another {' and '.join(differs) or 'schooling'}",
                "use the network, data and settings that they were made with, or another folder",
            )
        return {"digest": digest, "content": self.content, "experts": experts}

    def make(self) -> Buffer:
        """Train the experts that are not there yet; each is written as soon as it is finished, an unfinished one goes on."""
        from filelock import FileLock

        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            storage.sweep(self.folder)
            for number in range(self.how.count):
                index = self._index()
                entry = index["experts"].get(str(number))
                if entry and (self.folder / entry["file"]).is_file():
                    shutil.rmtree(self.folder / f"training-{number:03d}", ignore_errors=True)  # of a process killed just before
                    continue
                trajectory = self._train(number)
                name = f"expert-{number:03d}.safetensors"
                index["experts"][str(number)] = {
                    "file": name,
                    "sha256": storage.save_tensors(self.folder / name, {"trajectory": trajectory}),
                }
                storage.write_json(self.folder / "index.json", index)
                shutil.rmtree(self.folder / f"training-{number:03d}", ignore_errors=True)
        return self

    def _train(self, number: int) -> Tensor:
        seed = self.how.seed * 1000 + number
        with own_randomness(seed, 41):
            network = self.problem.network()
        program = ExpertProgram(network, self.problem, self.how, seed)
        folder = self.folder / f"training-{number:03d}"
        self.problem.session.fit(program, f"expert-{number}", seed=seed, folder=folder, digest=self.digest, evaluate=False)
        return torch.stack(program.snapshots)

    def __len__(self) -> int:
        return self.how.count

    def trajectory(self, number: int) -> Tensor:
        """`(E + 1, P)` of one expert."""
        if number not in self._loaded:
            entry = self._index()["experts"][str(number)]
            path = self.folder / entry["file"]
            try:
                tensors = storage.load_tensors(path, entry["sha256"])
            except UserError as error:
                raise UserError(error.message, "delete that file: the next run makes this expert again, and only this one") from None
            found = tensors["trajectory"].to(self.problem.device)
            while self._loaded and (len(self._loaded) + 1) * found.numel() * found.element_size() > LOADED_BYTES:
                del self._loaded[next(iter(self._loaded))]
            self._loaded[number] = found
        return self._loaded[number]
