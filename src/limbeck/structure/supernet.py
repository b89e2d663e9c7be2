"""Many encoders in one: sub-spaces of sizes, a super-model whose slices are its sub-networks, and its training under a teacher."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from limbeck.data.batch import Batch
from limbeck.data.choose import generator
from limbeck.engine.clock import Clock
from limbeck.errors import UserError, unknown
from limbeck.knowledge.distiller import Distiller, Models
from limbeck.losses import self_relation
from limbeck.method import Card, setting
from limbeck.signals.modes import evaluating
from limbeck.signals.outputs import call
from limbeck.zoo.slicing import Shape, bert_of, check_shape, encoder_parameters, shape_of, skeleton, slices

SIZES = ("layers", "heads", "hidden", "ratio")
PARTS = ("query", "key", "value")


@dataclass(frozen=True)
class Space:
    """A sub-space of sizes: every combination of its values is a sub-network.

    Attributes:
        layers, heads, hidden: numbers, each in rising order.
        ratios: F / H.
    """

    layers: tuple[int, ...]
    heads: tuple[int, ...]
    hidden: tuple[int, ...]
    ratios: tuple[float, ...]

    @classmethod
    def of(cls, entries: Mapping[str, Sequence[float]], full: Shape) -> Space:
        """From shares of an encoder's layers, heads and width (0 to 1) and feed-forward ratios.

        Numbers are rounded to what there can be: whole layers and heads, widths that the heads of a whole layer divide.

        Raises:
            UserError: a name that is missing or unknown, or a share outside (0, 1].
        """
        for name in entries:
            if name not in SIZES:
                raise unknown("size of a sub-space", name, SIZES)
        for name in SIZES:
            if not entries.get(name):
                raise UserError(f"a sub-space without {name}", f"give {', '.join(SIZES)}, each with one value or more")
            if any(not 0 < v <= (1 if name != "ratio" else 64) for v in entries[name]):
                raise UserError(
                    f"{name} of a sub-space: {', '.join(map(str, entries[name]))}", "give shares above 0 and up to 1 (ratio: F / H above 0)"
                )

        def whole(name: str, most: int, step: int = 1) -> tuple[int, ...]:
            return tuple(sorted({min(most, max(step, round(share * most / step) * step)) for share in entries[name]}))

        return cls(
            whole("layers", full.layers),
            whole("heads", full.heads),
            whole("hidden", full.hidden, full.heads),
            tuple(sorted(set(entries["ratio"]))),
        )

    def shapes(self, full: Shape) -> list[Shape]:
        """Every sub-network, from few to many parameters (embeddings left out); inner widths are cut at the whole encoder's."""
        found = {
            Shape(layers, heads, hidden, min(full.inner, max(1, round(ratio * hidden))))
            for layers, heads, hidden, ratio in itertools.product(self.layers, self.heads, self.hidden, self.ratios)
        }
        return sorted(found, key=lambda shape: (encoder_parameters(shape, full.heads, 0), shape))


class SuperNet(nn.Module):
    """A network with a BERT-like encoder that computes with slices of its weights.

    Args:
        network: the whole; its weights are what is trained.
        shapes: the sub-networks, from small to large.
    """

    def __init__(self, network: nn.Module, shapes: Sequence[Shape]) -> None:
        super().__init__()
        self.whole, self.full, self.shapes = network, shape_of(network), list(shapes)
        for shape in self.shapes:
            check_shape(self.full, shape)
        self._skeletons: dict[Shape, nn.Module] = {}
        self.chosen = self.shapes[-1]

    def choose(self, shape: Shape) -> None:
        """Which sub-network the next calls compute."""
        self.chosen = shape

    def _skeleton(self, shape: Shape) -> nn.Module:
        if shape not in self._skeletons:
            made = skeleton(self.whole, shape)
            device = next(self.whole.parameters()).device
            for module in made.modules():
                module._buffers.update({name: None if b is None else b.to(device) for name, b in module._buffers.items()})
            self._skeletons[shape] = made
        made = self._skeletons[shape]
        return made.train(self.training)

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """What the chosen sub-network says."""
        return functional_call(self._skeleton(self.chosen), slices(self.whole, self.full, self.chosen), args, inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> SuperNet:
        import copy

        made = SuperNet(copy.deepcopy(self.whole, memo), self.shapes)
        made.choose(self.chosen)
        return made.train(self.training)

    def last(self) -> nn.Module:
        """The last layer of the chosen sub-network, for hooks."""
        return last_layer(self._skeleton(self.chosen))


def last_layer(network: nn.Module) -> nn.Module:
    """The last layer of a network's BERT-like encoder."""
    return network.last() if isinstance(network, SuperNet) else bert_of(network).encoder.layer[-1]


class _Enough(BaseException):
    """Ends a forward pass when queries, keys and values of the last layer are there."""


def relations_of(network: nn.Module, inputs: Any) -> list[Tensor]:
    """Queries, keys and values `(B, L, D)` of the last layer; what comes behind them is not computed.

    Raises:
        UserError: no encoder of the BERT family.
    """
    found: dict[str, Tensor] = {}
    layer = last_layer(network)

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            found[name] = output
            if len(found) == len(PARTS):
                raise _Enough

        return hook

    handles = [getattr(layer.attention.self, name).register_forward_hook(keep(name)) for name in PARTS]
    try:
        call(network, inputs)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [found[name] for name in PARTS]


def relation_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], heads: int, mask: Tensor | None, kind: str, reduction: str = "mean"
) -> Tensor:
    """The sum of `self_relation` over queries, keys and values; fewer heads where the student is narrower than that."""
    heads = min(heads, *(x.shape[-1] for x in student))
    parts = [self_relation(s, t, heads=heads, mask=mask, kind=kind, reduction=reduction) for s, t in zip(student, teacher)]
    return torch.stack(parts).sum(0)


def mask_of(inputs: Any) -> Tensor | None:
    """`(B, L)` the attention mask of a batch's inputs, if there is one."""
    return inputs.get("attention_mask") if isinstance(inputs, Mapping) else None


def texts_of(batch: Batch) -> Any:
    """The inputs that are relations read from: of pairs of texts the first ones.

    Raises:
        UserError: samples that are no texts.
    """
    inputs = batch.inputs
    if isinstance(inputs, Mapping) and "input_ids" in inputs:
        return inputs
    raise UserError("relations of tokens are read from texts", "use a text source such as stdlib-windows and encoders such as bert")


def sandwich(shapes: Sequence[Shape], count: int, seed: int, step: int) -> list[Shape]:
    """The largest and the smallest sub-network and `count` - 2 random ones; the draw depends on seed and step alone."""
    if len(shapes) == 1:
        return [shapes[0]]
    draws = torch.randint(len(shapes), (max(count - 2, 0),), generator=generator(seed, step, 0xA0)).tolist()
    return [shapes[-1], shapes[0], *(shapes[i] for i in draws)][:count]


@dataclass
class SuperTraining(Distiller):
    """Each step trains the largest, the smallest and some random sub-networks on the teacher's relations, gradients added up.

    loss = sum over the step's sub-networks of sum over Q, K, V of the relation loss on the last layers
    """

    card = Card(
        id="autodistil-supernet",
        title="AutoDistil: Few-shot Task-agnostic Neural Architecture Search for Distilling Large Language Models",
        year=2022,
        arxiv="2201.12507",
        wing="structure",
        family="search",
        claim="Part of autodistil.",
        equation="sum_subnets sum_{Q,K,V} MSE(R_s, R_t)",
        baseline="",
    )
    tasks: ClassVar[tuple[str, ...]] = ("classification",)

    per_step: int = setting(4, "sub-networks a step: the largest, the smallest and random ones", at_least=1)
    heads: int = setting(12, "relation heads", at_least=1)
    kind: str = setting("mse", "mse of raw relations, or kl of their softmax", choices=("mse", "kl"))
    seed: int = setting(0, "of the random sub-networks")

    def step(self, batch: Batch, models: Models, clock: Clock) -> dict[str, Tensor]:
        """One term a sub-network."""
        inputs = texts_of(batch)
        with torch.no_grad():
            teacher = relations_of(next(iter(models.teacher.networks().values())), inputs)
        student = models.module
        assert isinstance(student, SuperNet)
        terms = {}
        for number, shape in enumerate(sandwich(student.shapes, self.per_step, self.seed, clock.step)):
            student.choose(shape)
            name = ("largest", "smallest")[number] if number < 2 else f"random_{number - 1}"
            terms[name] = relation_loss(relations_of(student, inputs), teacher, self.heads, mask_of(inputs), self.kind)
        student.choose(student.shapes[-1])
        return terms


@torch.no_grad()
def held_out_loss(student: nn.Module, teacher: nn.Module, batches: Sequence[Batch], heads: int, kind: str) -> float:
    """The mean relation loss of a network (of a super-model, of its chosen sub-network) over the samples of some batches."""
    total, count = 0.0, 0
    with evaluating(student, teacher):
        for batch in batches:
            inputs = texts_of(batch)
            said = relation_loss(relations_of(student, inputs), relations_of(teacher, inputs), heads, mask_of(inputs), kind, "none")
            total += float(said.double().sum())
            count += len(said)
    return total / max(count, 1)
