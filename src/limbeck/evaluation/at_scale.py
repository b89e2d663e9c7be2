"""What a distillation needs at sizes that nobody tries out first: FLOPs, bytes on a card, bytes on a disk, and when storing pays.

Pure arithmetic; `limbeck plan` fills in the sizes that it measured, docs/scale.md those of two large examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

WEIGHT, GRADIENT, ADAM = 4, 4, 8
"""Bytes for each trained number: float32 weights and gradients, and Adam's two float32 moments. Autocast adds none that stay."""


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder-only transformer.

    Attributes:
        layers, width, heads: blocks, hidden size, attention heads.
        inner: width of the feed-forward layer.
        vocabulary: tokens.
        kv_heads: heads of keys and values where they are fewer (grouped queries); None for as many.
        gated: three matrices in the feed-forward layer (SwiGLU) instead of two.
        tied: input and output matrix are one.
    """

    layers: int
    width: int
    heads: int
    inner: int
    vocabulary: int
    kv_heads: int | None = None
    gated: bool = True
    tied: bool = False

    @property
    def block(self) -> int:
        """Weights of the matrices of one block.

        >>> Decoder(1, 8, 2, 16, 100).block
        640
        """
        keys = self.width * (self.kv_heads or self.heads) // self.heads
        return 2 * self.width * self.width + 2 * self.width * keys + (3 if self.gated else 2) * self.width * self.inner

    @property
    def params(self) -> int:
        """Weights in all; norms (less than one in a thousand) are left out."""
        return self.layers * self.block + (1 if self.tied else 2) * self.vocabulary * self.width

    def forward_flops(self, length: int) -> float:
        """FLOPs of one token in a text of `length`: 2 N + 2 L n d, with N the weights that multiply (all but the input table), L layers,
        n tokens of context and d the width (Kaplan et al. 2020, arXiv:2001.08361, section 2.1; causal attention sees half of n).

        >>> Decoder(1, 8, 2, 16, 100).forward_flops(10)
        3040.0
        """
        matrices = self.layers * self.block + self.vocabulary * self.width
        return 2.0 * matrices + 2.0 * self.layers * length * self.width

    def activations(self, length: int, batch: int, kept_scores: bool = False) -> float:
        """Bytes that a backward pass keeps in 16 bit: s b h (34 + 5 a s / h) for each block, without the second part where attention keeps
        no scores (Korthikanti et al. 2022, arXiv:2205.05198, equation 1; of GPT-like blocks, others differ by some per cent).

        >>> Decoder(2, 8, 2, 16, 100).activations(10, 3)
        16320.0
        """
        scores = 5 * self.heads * length / self.width if kept_scores else 0.0
        return self.layers * length * batch * self.width * (34 + scores)


def teacher_share(teacher: float, student: float, passes: float = 3.0) -> float:
    """The teacher's share of a step's FLOPs: F_T / (F_T + 3 F_S); a training step costs a student three forward passes.

    Args:
        teacher, student: FLOPs of a forward pass.
        passes: forward passes that a student's step is worth.

    >>> teacher_share(3.0, 1.0)
    0.5
    """
    return teacher / (teacher + passes * student)


def on_a_card(
    trained: float,
    frozen: float,
    activations: float,
    processes: int = 1,
    sharded: bool = False,
    *,
    optimiser: float = ADAM,
    frozen_bytes: float = WEIGHT,
    gathered: float = 0.0,
) -> float:
    """Bytes on each card.

    Args:
        trained: numbers that learn; each costs its weight, its gradient and the optimiser's state.
        frozen: numbers of the teacher.
        activations: bytes that a backward pass keeps on this card.
        processes: cards.
        sharded: FSDP cuts everything but activations; DDP keeps it whole on every card.
        optimiser: bytes of state for each trained number (8 of Adam, 4 of SGD with momentum).
        frozen_bytes: for each frozen number (4, or 2 in a 16-bit type).
        gathered: bytes of the weights that are whole at one moment: the largest block of teacher or student, twice (one is fetched ahead),
            and the embeddings and output matrices of both, which stay whole for the whole step.

    >>> on_a_card(10, 100, 7), on_a_card(10, 100, 7, 4, True, gathered=3)
    (567.0, 150.0)
    """
    state = trained * (WEIGHT + GRADIENT + optimiser) + frozen * frozen_bytes
    return float(state / processes + gathered if sharded else state) + activations


def topk_bytes(k: int, vocabulary: int) -> int:
    """Bytes of one token's stored top-k: k values in float16, k indices in 16 bit (32 above 32768 tokens), the rest's mass in float32.

    >>> topk_bytes(64, 32000), topk_bytes(64, 151936)
    (260, 388)
    """
    return k * (2 + (2 if vocabulary <= 32768 else 4)) + 4


def passes_until_storing_pays(teacher: float, student: float, rate: float, stored: float = 0.0, disk: float = math.inf) -> float:
    """How often the data must be gone through (epochs, students) before storing the teacher's outputs costs less time than asking it live.

    Live, a sample takes (F_T + 3 F_S) / rate each time. Stored, it takes F_T / rate once, and then the longer of 3 F_S / rate and
    bytes / disk each time. The two lines cross at the number that is returned; infinity where the disk is too slow for them to cross.

    Args:
        teacher, student: FLOPs of a forward pass of one sample (or token).
        rate: FLOPs a second that are reached.
        stored: bytes of a sample (or token) on the disk.
        disk: bytes a second that all processes together can read.

    >>> passes_until_storing_pays(10, 1, rate=1), passes_until_storing_pays(10, 1, rate=1, stored=8, disk=1)
    (1.0, 2.0)
    """
    live, kept = (teacher + 3 * student) / rate, max(3 * student / rate, stored / disk)
    return (teacher / rate) / (live - kept) if live > kept else math.inf
