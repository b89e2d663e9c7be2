"""What conversions of softmax attention to Mamba blocks share: feature maps that learn, the exact embedding, the loss afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck.data.batch import Batch
from limbeck.data.batches import Batches
from limbeck.engine.clock import Clock
from limbeck.knowledge.distiller import Distiller, Models
from limbeck.knowledge.program import steps_of
from limbeck.losses import cosine_distance
from limbeck.method import Card, setting
from limbeck.signals.modes import evaluating
from limbeck.signals.outputs import call
from limbeck.signals.signals import Signals
from limbeck.structure.shaper import Making, Shaper
from limbeck.zoo.linear_attention import check_convertible
from limbeck.zoo.recurrent_decoder import RecurrentDecoder

EXACT = 1e-4
"""Largest difference of logits, as a share of the largest, that the embedding may make."""


@dataclass
class Heard:
    """What one attention layer got and gave: `x` and `y` `(B, L, D)`, `positions` the rotary cosines and sines."""

    x: Tensor
    positions: tuple[Tensor, Tensor]
    y: Tensor


@contextmanager
def heard(model: nn.Module) -> Iterator[list[Heard]]:
    """What the attention layers of a decoder get and give during the forward passes inside."""
    found: list[Heard] = []

    def note(module: nn.Module, args: tuple[Any, ...], options: Mapping[str, Any], output: Any) -> None:
        x = options["hidden_states"] if "hidden_states" in options else args[0]
        found.append(Heard(x, options["position_embeddings"], output[0]))

    blocks = [m for m in model.modules() if isinstance(getattr(m, "self_attn", None), nn.Module)]
    hooks = [m.self_attn.register_forward_hook(note, with_kwargs=True) for m in blocks]  # type: ignore[union-attr]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class FeatureMaps(Distiller):
    """loss = mean over layers and tokens of 1 - cos(o, o'): o of softmax attention, o' of linear attention on the same hidden states.

    Every layer is fed with what the softmax model's layer is fed with, so errors do not build up. Only feature maps ask for gradients.
    """

    card = Card(
        id="feature-maps",
        title="The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry",
        year=2024,
        arxiv="2402.04347",
        wing="structure",
        family="conversion",
        claim="Learned feature maps let linear attention imitate softmax attention.",
        equation="1 - cos(o_softmax, o_linear), layer by layer",
        baseline="alone",
        certainty="paper-text",
        deviations="The loss is Attention to Mamba's, on the layers' outputs; Hedgehog compares attention weights.",
    )
    tasks: ClassVar[tuple[str, ...]] = ("language",)
    student_wants: ClassVar[tuple[str, ...]] = ("law",)
    teacher_wants: ClassVar[tuple[str, ...]] = ()
    teacher_kind: ClassVar[str] = "none"

    reference: nn.Module | None = field(default=None, init=False, repr=False)
    read: Callable[[Batch], Signals] | None = field(default=None, init=False, repr=False)

    def step(self, batch: Batch, models: Models, clock: Clock) -> dict[str, Tensor]:
        """`cosine`; `reference` is the softmax model, and `read` reads a batch through it."""
        assert self.reference is not None and self.read is not None
        with heard(self.reference) as layers, torch.no_grad():
            self.read(batch)
        student = models.module
        assert isinstance(student, RecurrentDecoder)
        keep = _tokens(batch)
        with student.reading(keep):
            said = [mixer(layer.x, layer.positions)[0] for mixer, layer in zip(student.mixers, layers, strict=True)]
        distances = [cosine_distance(own, layer.y, mask=keep) for own, layer in zip(said, layers)]
        return {"cosine": torch.stack(distances).mean()}


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """`(N, V)` at the places that hold tokens."""
    with evaluating(model), torch.no_grad():
        logits = call(model, batch.inputs).logits
    keep = _tokens(batch)
    return logits.flatten(0, 1) if keep is None else logits[keep]


def _tokens(batch: Batch) -> Tensor | None:
    mask = batch.inputs.get("attention_mask")
    return None if mask is None else mask.bool()


@dataclass
class MambaConversion(Shaper):
    """Base: softmax attention to linear attention, that into Mamba blocks, then the loss of the text; token embeddings stay as they are.

    loss = CE(s, next token) + kd * KL(t, s)
    """

    tasks: ClassVar[tuple[str, ...]] = ("language",)
    student_wants: ClassVar[tuple[str, ...]] = ("law",)
    teacher_wants: ClassVar[tuple[str, ...]] = ("law",)
    contract: ClassVar[Mapping[str, Any]] = {"recipe": {"student": {"model": "teacher"}}}

    taps: int = setting(4, "places that the causal convolution sees", at_least=1)
    kd: float = setting(0.0, "weight of the divergence from the teacher; the paper has none", at_least=0)

    def reshape(self, student: nn.Module, making: Making) -> nn.Module:
        """Linear attention with trained feature maps, embedded in Mamba blocks; checked on a batch.

        Raises:
            UserError: attention that cannot be converted.
        """
        check_convertible(student)
        reference = copy.deepcopy(student).eval().requires_grad_(False)
        linear = RecurrentDecoder(student, "linear")
        linear = self.imitated(linear, reference, making)
        before = _logits(linear, making.example)
        mamba = linear.to_mamba(self.taps)
        gap = float((_logits(mamba, making.example) - before).abs().max() / before.abs().max().clamp_min(1.0))
        if not gap < EXACT:
            raise RuntimeError(f"the Mamba blocks differ from the linear attention that they hold by {gap:.1e}")
        making.session.notes.append(f"{making.phase}: the Mamba blocks begin as the linear attention (difference {gap:.0e})")
        mamba.requires_grad_(True)
        mamba.get_input_embeddings().requires_grad_(False)
        return mamba

    def imitated(self, linear: RecurrentDecoder, reference: nn.Module, making: Making) -> RecurrentDecoder:
        """The linear model after its feature maps have learned from `reference`; here as it is."""
        return linear

    def wants(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The teacher's law only where it counts."""
        return ("law",), (("law",) if self.kd else ())

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`ce`, and `kl` where `kd` is above 0."""
        terms = {"ce": self.hard(batch, student.law)}
        if self.kd:
            terms["kl"] = self.kd * self.task.soft_loss(student.law, teacher.law)
        return terms


def train_maps(linear: RecurrentDecoder, reference: nn.Module, making: Making, split: float, lr: float) -> RecurrentDecoder:
    """Train the feature maps of a linear model, and nothing else of it.

    Args:
        linear: trained in place.
        reference: the softmax model.
        making: the job.
        split: share of all steps (these and the stage's own) that are spent here; below 1.
        lr: learning rate.
    """
    linear.requires_grad_(False)
    for mixer in linear.mixers:
        mixer.map_q.requires_grad_(True)
        mixer.map_k.requires_grad_(True)
    batches = Batches(making.data.train, min(making.training.batch, len(making.data.train)))
    steps = max(1, round(split / (1 - split) * steps_of(making.training, batches.steps_per_epoch)))
    method = FeatureMaps()
    method.reference = reference
    method.read = making.task.reader(reference, ("law",), grad=False)
    return making.fit(method, linear, "maps", training=making.training.model_copy(update={"lr": lr}), total=steps)  # type: ignore[return-value]
