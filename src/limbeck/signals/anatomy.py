"""What a model is made of, found from one dry pass: stages, embedding, classifier head, attention."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.signals.outputs import call, first_tensor, logits_of
from limbeck.signals.stages import Call, find_stages

Shape = tuple[int, ...]


class Row(NamedTuple):
    """One module call of the dry pass: its path, class name, shapes in and out, and parameters (its children's included)."""

    path: str
    kind: str
    inputs: list[Shape]
    outputs: list[Shape]
    parameters: int


@dataclass
class Anatomy:
    """Where the named signals of one model are.

    Attributes:
        model: the model's class name.
        modules: one `Row` a module call, in call order (the model itself is left out).
        stages: where the feature maps are read, shallow to deep: module paths, `path#n` for call n (from 0) of a module that is
            called several times, or `hidden_states[i]` for a Hugging Face model (the embeddings, `hidden_states[0]`, are left out).
        stage_shapes: their shapes, batch first.
        head: path of the layer (Linear or 1x1 convolution) whose output is the logits; None when no module computes them.
        embedding_shape: shape of what goes into the head, before flattening.
        attention: paths of the attention modules, or of the leaf inside (a softmax, say) that puts out the maps `(B, heads, L, L)`.
        hugging_face: stages and attention come from `output_hidden_states` and `output_attentions`.
        ticks: path to the (begin, end) time of each of its calls, in events of the dry pass.
    """

    model: str
    modules: list[Row] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    stage_shapes: list[Shape] = field(default_factory=list)
    head: str | None = None
    embedding_shape: Shape | None = None
    attention: list[str] = field(default_factory=list)
    hugging_face: bool = False
    ticks: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    @property
    def embedding(self) -> str:
        """The path of the module whose input is the embedding: the head.

        Raises:
            UserError: no module's output is the logits.
        """
        if self.head is None:
            raise UserError(
                f"{self.model} has no classifier head module: no Linear or 1x1 convolution gives the logits as they come out",
                "name the module whose output to read instead ('at:<path>'; `limbeck inspect` lists them), or make the head a module",
            )
        return self.head


def is_hugging_face(model: nn.Module) -> bool:
    """Whether the model is a transformers `PreTrainedModel` (transformers is not imported to find out)."""
    return any(base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.") for base in type(model).__mro__)


@contextmanager
def dry(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient; every module's own mode and the random state are put back at the end."""
    modes = {module: module.training for module in model.modules()}
    random_state = torch.get_rng_state()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_rng_state(random_state)
        for module, mode in modes.items():
            module.training = mode


class _Recorder:
    """Hooks on every module that write the tree of calls; `heads` keeps the last few candidates for the classifier head."""

    def __init__(self, model: nn.Module) -> None:
        self.root: Call | None = None
        self.calls: list[Call] = []
        self.heads: deque[tuple[Call, Tensor, Tensor]] = deque(maxlen=8)
        self._open: list[Call] = []
        self._tick = 0
        self._counts: dict[str, int] = {}
        self._handles: list[Any] = []
        for path, module in model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._begin(path), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._end, prepend=True))

    def _begin(self, path: str) -> Any:
        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            shapes = [tuple(v.shape) for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            number = self._counts.get(path, 0)
            self._counts[path] = number + 1
            here = Call(path, module, number, self._tick, inputs=shapes)
            self._tick += 1
            if self._open:
                self._open[-1].children.append(here)
            else:
                self.root = here
            self._open.append(here)
            self.calls.append(here)

        return begin

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        here = self._open.pop()
        here.end = self._tick
        self._tick += 1
        outputs = output if isinstance(output, (tuple, list)) else [output]
        here.outputs = [tuple(v.shape) for v in outputs if isinstance(v, Tensor)]
        first = first_tensor(output)
        if first is not None and not here.outputs:
            here.outputs = [tuple(first.shape)]
        if first is not None:
            here.shape = tuple(first.shape) if first.is_floating_point() else None
            here.is_map = not here.children and _is_attention_map(first)
        if first is not None and is_head_layer(module) and args and isinstance(args[0], Tensor):
            self.heads.append((here, args[0], first))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def is_head_layer(module: nn.Module) -> bool:
    """Whether a module can be a classifier head: a Linear layer (of any library) or a 1x1 convolution."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return all(size == 1 for size in module.kernel_size)
    return isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "LazyLinear", "NormedLinear", "TwoHeads")


def _is_logits(output: Tensor, logits: Tensor) -> bool:
    """Whether the logits are this output, reshaped, or (for convolutions) averaged over space, with or without a ReLU."""
    if output is logits or (output.numel() == logits.numel() and torch.equal(output.flatten(), logits.flatten())):
        return True
    if output.ndim > 2 and logits.ndim == 2 and output.shape[:2] == logits.shape:
        flat = output.flatten(2)
        return any(torch.allclose(x.mean(2), logits, rtol=1e-4, atol=1e-5) for x in (flat, flat.relu()))
    return False


def _is_attention_map(x: Tensor) -> bool:
    """Whether `(B, heads, L, L)` with rows of probabilities: what a softmax or the dropout after it puts out inside an attention."""
    if x.ndim != 4 or not x.is_floating_point() or x.shape[-1] != x.shape[-2] or x.shape[-1] == 1:
        return False
    sums = x.sum(-1)
    return bool((x >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-2)


def _attention_paths(calls: list[Call]) -> list[str]:
    """Where attention is read, each path once, in call order.

    Outermost called modules that are attention by type or by class name; where a leaf inside one puts out the maps themselves, that leaf.
    """
    found: dict[str, str] = {}
    for here in calls:
        name = type(here.module).__name__
        if not (isinstance(here.module, nn.MultiheadAttention) or name.endswith("Attention")):
            continue
        if not any(here.path.startswith(f"{other}.") for other in found):
            maps = [inner.path for inner in here.walk()[1:] if inner.is_map]
            found[here.path] = maps[-1] if maps else here.path
    return list(found.values())


def anatomy(model: nn.Module, inputs: Any) -> Anatomy:
    """Find a model's stages, head, embedding and attention from one dry pass.

    The pass runs in evaluation mode without gradient; modes, hooks and the random state are as before afterwards, also when the
    model fails.

    Args:
        model: any module; Hugging Face models are read through their own `hidden_states`.
        inputs: one batch as the model takes it (tensor, mapping or tuple); two samples are enough.
    """
    hugging_face = is_hugging_face(model)
    recorder = _Recorder(model)
    try:
        with dry(model):
            output = call(model, inputs, **({"output_hidden_states": True} if hugging_face else {}))
            result = _describe(model, recorder, output)
    finally:
        recorder.remove()
    if hugging_face and (hidden := hidden_states(output)):
        result.hugging_face = True
        result.stages = [f"hidden_states[{i}]" for i in range(1, len(hidden))]
        result.stage_shapes = [tuple(h.shape) for h in hidden[1:]]
    return result


def hidden_states(output: Any) -> tuple[Tensor, ...]:
    """The hidden states of a Hugging Face output (a decoder's when there are two), embeddings first; empty when it has none."""
    return getattr(output, "hidden_states", None) or getattr(output, "decoder_hidden_states", None) or ()


def _describe(model: nn.Module, recorder: _Recorder, output: Any) -> Anatomy:
    result = Anatomy(type(model).__name__)
    counted: dict[nn.Module, int] = {}
    for here in recorder.calls:
        result.ticks.setdefault(here.path, []).append((here.begin, here.end))
        if here.path:
            if here.module not in counted:
                counted[here.module] = sum(p.numel() for p in here.module.parameters())
            result.modules.append(Row(here.path, type(here.module).__name__, here.inputs, here.outputs, counted[here.module]))
    try:
        logits: Tensor | None = logits_of(output)
    except UserError:
        logits = None
    head: Call | None = None
    if logits is not None:
        for here, x, y in reversed(recorder.heads):
            if here.path and _is_logits(y, logits):
                head, result.head, result.embedding_shape = here, here.path, tuple(x.shape)
                break
    result.attention = _attention_paths(recorder.calls)
    if recorder.root is not None:
        counts = {path: len(times) for path, times in result.ticks.items()}
        for stage in find_stages(recorder.root, head):
            result.stages.append(f"{stage.path}#{stage.number}" if counts[stage.path] > 1 else stage.path)
            result.stage_shapes.append(stage.shape or ())
    return result
