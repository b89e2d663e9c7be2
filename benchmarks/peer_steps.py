"""A distillation step of torchdistill and of Model-Optimizer, as their documentation lays it out, for the benchmarks to time.

One `Job` says what is to be computed, and every arm computes it: kd at T = 4 with 0.9 soft and 0.1 hard; `taps`: in addition a distance
of stages behind 1x1 convolutions; `crd`: in addition the contrastive loss of CRD over memory banks.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peers import need
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

TEMPERATURE, ALPHA = 4.0, 0.9
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}
Step = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Job:
    """What a step computes.

    Attributes:
        teacher, student: networks; every arm takes copies.
        kind: "kd", "taps" or "crd".
        teacher_stages, student_stages: paths of the modules whose outputs are compared by `taps`.
        bridges: 1x1 convolutions from the student's stages to the teacher's.
        levels: sizes to which stages are pooled as well, each for half the weight of the one before (HCL of ReviewKD); none: plain.
        teacher_embedding, student_embedding: paths of the modules whose flattened outputs `crd` compares, and their widths.
        width, negatives, samples: of the embedding, of the contrast, of the memory banks.
    """

    teacher: nn.Module
    student: nn.Module
    kind: str = "kd"
    teacher_stages: tuple[str, ...] = ()
    student_stages: tuple[str, ...] = ()
    bridges: nn.ModuleList = field(default_factory=nn.ModuleList)
    levels: tuple[int, ...] = ()
    teacher_embedding: tuple[str, int] = ("", 0)
    student_embedding: tuple[str, int] = ("", 0)
    width: int = 128
    negatives: int = 256
    samples: int = 512

    def models(self) -> tuple[nn.Module, nn.Module, nn.ModuleList]:
        """Fresh copies of teacher, student and bridges."""
        return copy.deepcopy(self.teacher).eval(), copy.deepcopy(self.student), copy.deepcopy(self.bridges)

    def crd_start(self) -> tuple[tuple[nn.Linear, nn.Linear], tuple[Tensor, Tensor]]:
        """The heads of student and teacher, and their memory banks, the same for every arm."""
        torch.manual_seed(2)
        heads = nn.Linear(self.student_embedding[1], self.width), nn.Linear(self.teacher_embedding[1], self.width)
        banks = tuple((torch.rand(self.samples, self.width) * 2 - 1) * (3 / self.width) ** 0.5 for _ in range(2))
        return heads, banks  # type: ignore[return-value]


def pooled_distance(mine: Tensor, theirs: Tensor, levels: tuple[int, ...]) -> Tensor:
    """Mean squared distance of two feature maps and of their pooled forms (hierarchical context loss of ReviewKD)."""
    loss, weight, total = F.mse_loss(mine, theirs), 1.0, 1.0
    for size in levels:
        if size < mine.shape[2]:
            weight /= 2
            loss = loss + weight * F.mse_loss(F.adaptive_avg_pool2d(mine, size), F.adaptive_avg_pool2d(theirs, size))
            total += weight
    return loss / total


def contrast(mine: Tensor, theirs: Tensor, banks: tuple[Tensor, Tensor], places: Tensor, scales: list[Tensor], job: Job) -> Tensor:
    """The loss of CRD on both sides; `places` (B, 1 + negatives) are rows of the memory banks, a sample's own first.

    Banks are updated in place (momentum 0.5); `scales` are the normalisers, set from the first batch.
    """
    losses, noise = [], job.negatives / job.samples
    banks_now = [bank[places] for bank in banks]
    for number, (embedding, other) in enumerate(((mine, banks_now[1]), (theirs, banks_now[0]))):
        scores = torch.exp(torch.bmm(other, embedding.unsqueeze(2)).squeeze(2) / 0.07)
        if len(scales) <= number:
            scales.append(scores.detach().mean() * job.samples)
        scores = scores / scales[number]
        own, rest = scores[:, 0], scores[:, 1:]
        likely = torch.log(own / (own + noise + 1e-7)).sum() + torch.log(noise / (rest + noise + 1e-7)).sum()
        losses.append(-likely / len(places))
    for bank, embedding in zip(banks, (mine, theirs)):
        bank[places[:, 0]] = F.normalize(0.5 * bank[places[:, 0]] + 0.5 * embedding.detach())
    return losses[0] + losses[1]


# ---- torchdistill ----


def torchdistill_box(job: Job, total: int, dataset: Dataset[Any] | None = None, batch: int = 0, device: str = "cpu") -> Any:
    """A `DistillationBox` with a cosine schedule over `total` steps; with `dataset`, also its data loader."""
    box_of = need("torchdistill.core.distillation", stand_in=True).DistillationBox
    teacher, student, bridges = job.models()
    end = {"sequential": [], "wrapper": None, "forward_proc": "forward_batch_only"}
    taught: dict[str, Any] = {**end, "requires_grad": False}
    learning: dict[str, Any] = {**end, "requires_grad": True}
    where = {"student_module_path": ".", "student_module_io": "output", "teacher_module_path": ".", "teacher_module_io": "output"}
    loss = {"key": "KDLoss", "kwargs": where | {"temperature": TEMPERATURE, "alpha": 1 - ALPHA, "reduction": "batchmean"}}
    terms: dict[str, Any] = {"kd": {"criterion": loss, "weight": 1.0}}
    optimizer: dict[str, Any] = {"key": "SGD", "kwargs": dict(SGD)}
    if job.kind == "taps":
        terms |= _taps(job, bridges, taught, learning)
    if job.kind == "crd":
        terms["crd"] = _crd(job, taught, learning)
        optimizer["module_wise_configs"] = [{"module": "model"}, {"module": "normalizer"}, {"module": "normalizer", "is_teacher": True}]
    config: dict[str, Any] = {
        "num_epochs": 1,
        "teacher": taught,
        "student": learning,
        "optimizer": optimizer,
        "scheduler": {"key": "CosineAnnealingLR", "kwargs": {"T_max": total}, "scheduling_step": 1},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms, "model_term": {"weight": 0}}},
    }
    if dataset is not None:
        sampler = {"class_or_func": torch.utils.data.RandomSampler}
        config["train_data_loader"] = {"dataset_id": "train", "sampler": sampler, "kwargs": {"batch_size": batch, "drop_last": True}}
        if job.kind == "crd":
            given = {"num_negative_samples": job.negatives, "mode": "exact", "ratio": 1.0}
            config["train_data_loader"]["dataset_wrapper"] = {"key": "CRDDatasetWrapper", "kwargs": given}
    made = box_of(teacher, student, {"train": dataset}, config, torch.device(device), None, False, 1)
    if job.kind == "crd":
        _same_start(made, job)
    made.pre_epoch_process(epoch=0)
    return made


def _taps(job: Job, bridges: nn.ModuleList, taught: dict[str, Any], learning: dict[str, Any]) -> dict[str, Any]:
    """The terms of the stages; convolutions live in a registered wrapper around the student."""
    base = need("torchdistill.models.wrapper", stand_in=True).AuxiliaryModelWrapper
    register = need("torchdistill.models.registry", stand_in=True).register_auxiliary_model_wrapper

    class Bridge(nn.Module):
        """A convolution whose output has the form that HierarchicalContextLoss expects."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Any:
            return (self.inner(x), None) if job.levels else self.inner(x)

    class BridgedStudent(base):  # type: ignore[misc, valid-type]
        """The student, and its stages through the convolutions."""

        def __init__(self, student_model: nn.Module, **given: Any) -> None:
            super().__init__()
            self.model, self.bridges = student_model, nn.ModuleList(Bridge(one) for one in bridges)

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

        def secondary_forward(self, io_dict: Any) -> None:
            for bridge, path in zip(self.bridges, job.student_stages):
                bridge(io_dict["model." + path]["output"])

    register(BridgedStudent)
    learning["auxiliary_model_wrapper"] = {"key": "BridgedStudent"}
    learning["forward_hook"] = {"output": ["model." + path for path in job.student_stages] + [f"bridges.{i}" for i in range(len(bridges))]}
    taught["forward_hook"] = {"output": list(job.teacher_stages)}
    terms: dict[str, Any] = {}
    for i, path in enumerate(job.teacher_stages):
        if job.levels:
            where = {"student_module_path": f"bridges.{i}", "student_module_io": "output"}
            where |= {"teacher_module_path": path, "teacher_module_io": "output"}
            loss = {"key": "HierarchicalContextLoss", "kwargs": where | {"output_sizes": list(job.levels)}}
            terms[f"tap{i}"] = {"criterion": loss, "weight": 1.0}
        else:
            sides = {"input": {"is_from_teacher": False, "module_path": f"bridges.{i}", "io": "output"}}
            sides["target"] = {"is_from_teacher": True, "module_path": path, "io": "output"}
            wrap = {"key": "SimpleLossWrapper", "kwargs": sides}
            terms[f"tap{i}"] = {"criterion": {"key": "MSELoss", "kwargs": {}}, "criterion_wrapper": wrap, "weight": 1.0}
    return terms


def _crd(job: Job, taught: dict[str, Any], learning: dict[str, Any]) -> dict[str, Any]:
    """The term of CRD with torchdistill's own wrapper and loss."""
    for side, (path, wide) in ((taught, job.teacher_embedding), (learning, job.student_embedding)):
        given = {"input_module_path": "model." + path, "linear_kwargs": {"in_features": wide, "out_features": job.width}}
        side["auxiliary_model_wrapper"] = {"key": "Linear4CRD", "kwargs": given}
        side["forward_proc"] = "forward_batch_supp_dict"
        side["forward_hook"] = {"output": ["model." + path, "normalizer"]}
    learning["forward_hook"]["input"] = ["empty"]
    taught |= {"requires_grad": True, "frozen_modules": ["model"]}
    paths = {"student_norm_module_path": "normalizer", "teacher_norm_module_path": "normalizer", "student_empty_module_path": "empty"}
    sizes = {"input_size": job.width, "output_size": job.samples, "num_samples": job.samples, "num_negative_samples": job.negatives}
    return {"criterion": {"key": "CRDLoss", "kwargs": paths | sizes}, "weight": 1.0}


def _same_start(made: Any, job: Job) -> None:
    """Heads and memory banks as in the other arms."""
    heads, banks = job.crd_start()
    loss = made.criterion.term_dict["crd"][0]
    with torch.no_grad():
        for wrapper, head in zip((made.student_model, made.teacher_model), heads):
            wrapper.normalizer.linear.load_state_dict(head.state_dict())
        for name, bank in zip(("memory_v1", "memory_v2"), banks):
            getattr(loss, name).copy_(bank)


def torchdistill_step(job: Job, total: int) -> Step:
    """forward_process, then post_forward_process, in the order of torchdistill's examples."""
    made = torchdistill_box(job, total)

    def step(inputs: Tensor, labels: Tensor) -> Tensor:
        value = made.forward_process(inputs, labels, None)
        made.post_forward_process(loss=value)
        return value.detach()

    return step


# ---- Model-Optimizer ----


def modelopt_step(job: Job, total: int) -> Step:
    """`mtd.convert` with a loss for each pair of layers, `compute_kd_loss`, and the loop of its documentation with torch's cosine."""
    distill = need("modelopt.torch.distill")
    teacher, student, bridges = job.models()

    class Bridged(nn.modules.loss._Loss):
        """Mean squared distance behind a convolution."""

        def __init__(self, bridge: nn.Module) -> None:
            super().__init__()
            self.bridge = bridge

        def forward(self, mine: Tensor, theirs: Tensor) -> Tensor:
            return F.mse_loss(self.bridge(mine), theirs)

    losses: dict[Any, Any] = {("", ""): distill.LogitsDistillationLoss(temperature=TEMPERATURE, reduction="batchmean")}
    for bridge, pair in zip(bridges, zip(job.student_stages, job.teacher_stages)):
        losses[pair] = Bridged(bridge)

    class Balance(distill.DistillationLossBalancer):  # type: ignore[misc, name-defined]
        """0.9 of the soft loss, 0.1 of the labels', all of the taps; the weights of StaticLossBalancer must not exceed 1."""

        def forward(self, loss: dict[str, Tensor]) -> Tensor:
            loss = dict(loss)
            hard = loss.pop("student_loss")
            soft, *taps = loss.values()
            return ALPHA * soft + (1 - ALPHA) * hard + sum(taps)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the labels' loss must be given, as it is below
        balance = Balance() if bridges else distill.StaticLossBalancer(kd_loss_weight=ALPHA)
    config = {"teacher_model": teacher, "criterion": losses, "loss_balancer": balance}
    model = distill.convert(student, mode=[("kd_loss", config)])
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **SGD)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)

    def step(inputs: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        said = model(inputs)
        loss = model.compute_kd_loss(student_loss=F.cross_entropy(said, labels))
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.detach()

    return step
