"""What a model said about a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


class Signals:
    """The named things that were read from one forward pass.

    A method asks for what it needs ("logits", "embedding", "stages", "attention", or a module's path); only that is
    read, and only that can be taken from here. Tensors of a teacher carry no gradient.

    Attributes:
        output: the model's own return value, whatever it is (None when the forward pass stopped early).
        logits: `(B, C)` class scores before the softmax.
        embedding: `(B, D)` what goes into the classifier head.
        stages: list of feature maps, shallow to deep: `(B, C, H, W)`, `(B, L, D)` or `(B, D)`.
        attention: list of attention maps `(B, heads, L, L)`, shallow to deep.
        at: mapping from a module's path to its output.
        members: the signals of each teacher, when there are several (else empty).
        law: of language models the next-token distributions of the scored positions (`limbeck.losses.vocabulary.Law`, or `Sparse`).
        prediction: of denoising networks what they predict beside what would be right (`limbeck.signals.denoising.Prediction`).
        hidden: of language models `(B, L, D)` what goes into the output matrix.
    """

    __slots__ = ("_values", "at", "members", "output")

    def __init__(
        self, *, output: Any = None, at: dict[str, Any] | None = None, members: dict[str, Signals] | None = None, **values: Any
    ) -> None:
        self.output = output
        self.at = {} if at is None else at
        self.members = {} if members is None else members
        self._values = values

    def _take(self, name: str) -> Any:
        try:
            return self._values[name]
        except KeyError:
            have = ", ".join(sorted(self._values)) or "nothing"
            raise AttributeError(f"{name!r} was not read from this model (read: {have}); add it to the method's `wants`") from None

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __getattr__(self, name: str) -> Any:
        """Signals of other tasks under their own names, such as "law" of language models."""
        if name.startswith("_"):
            raise AttributeError(name)
        return self._take(name)

    @property
    def scores(self) -> Any:
        """What a task's losses take: the `law` of a language model, the `prediction` of a denoising network, else the logits."""
        return self._take(next((name for name in ("law", "prediction") if name in self._values), "logits"))

    @property
    def logits(self) -> Tensor:
        """`(B, C)` class scores before the softmax."""
        return self._take("logits")

    @property
    def embedding(self) -> Tensor:
        """`(B, D)` the input of the classifier head."""
        return self._take("embedding")

    @property
    def stages(self) -> list[Tensor]:
        """Feature maps, shallow to deep."""
        return self._take("stages")

    @property
    def attention(self) -> list[Tensor]:
        """Attention maps `(B, heads, L, L)`, shallow to deep."""
        return self._take("attention")
