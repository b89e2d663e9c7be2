"""Reading signals from a model: hooks only for what is wanted, none at all for logits."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import processes
from limbeck.data.batch import Batch
from limbeck.errors import UserError, unknown
from limbeck.signals.anatomy import Anatomy, anatomy, hidden_states, is_hugging_face
from limbeck.signals.outputs import call, first_tensor, logits_of
from limbeck.signals.signals import Signals

_OUTPUTS = ("logits", "output")
_STAGE = re.compile(r"stages\[(-?\d+)\]")
_CALL = re.compile(r"(.+)#(\d+)")


class _Stop(BaseException):
    """Ends a forward pass after the deepest tap; a BaseException, so that a model's own `except Exception` lets it through."""


@dataclass
class _Tape:
    """What one forward pass wrote: for each module path the values of its calls. Taps write only while `active`."""

    active: bool = False
    stop: tuple[str, int] | None = None
    values: dict[str, list[Any]] = field(default_factory=dict)

    def write(self, key: str, value: Any) -> None:
        found = self.values.setdefault(key, [])
        found.append(value)
        if self.stop is not None and self.stop[0] == key and len(found) == self.stop[1]:
            raise _Stop


def _inert(*_: Any, **__: Any) -> None:
    """What a tap becomes in a copy of the model."""


def _make_inert() -> Callable[..., None]:
    return _inert


class _Tap:
    """A hook that writes to one reader's tape. A deep copy or a pickle of the model gets `_inert` in its place."""

    def __init__(self, tape: _Tape, key: str, act: Callable[..., Any]) -> None:
        self.tape, self.key, self.act = tape, key, act

    def __call__(self, *event: Any) -> Any:
        return self.act(self.tape, self.key, *event) if self.tape.active else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _inert

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_inert, ()


def _take_output(tape: _Tape, key: str, module: nn.Module, args: Any, output: Any) -> None:
    tape.write(key, first_tensor(output))


def _take_input(tape: _Tape, key: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    tape.write(key, first_tensor(args))


def _ask_weights(tape: _Tape, key: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Make an `nn.MultiheadAttention` return its maps per head (it is usually called without)."""
    return args, {**kwargs, "need_weights": True, "average_attn_weights": False}


def _take_weights(tape: _Tape, key: str, module: nn.Module, args: Any, output: Any) -> None:
    parts = output[1:] if isinstance(output, (tuple, list)) else [output] if not any(module.children()) else []
    weights = next((t for t in parts if isinstance(t, Tensor) and t.ndim == 4), None)
    if weights is None:
        raise UserError(
            f"attention module {key.partition(':')[2]!r} ({type(module).__name__}) does not return its maps (batch, heads, L, L)",
            "let its forward return (output, weights), pass the maps through an nn.Softmax module, or ask for another signal",
        )
    tape.write(key, weights)


class Reader:
    """Calls a model and returns the `Signals` that were asked for.

    Without taps (only "logits" or "output") there are no hooks and nothing is done beyond the call. Otherwise the hooks are
    installed once: at once when the anatomy is given or not needed, else at the first call, which makes a dry pass. They act
    only inside this reader's own calls, are inert in deep copies and pickles of the model, and leave with `close()`.

    Args:
        model: any module.
        wants: "logits", "output", "embedding", "stages", "stages[2]" (the others are None in the list), "attention", and module
            paths, bare or as "at:<path>"; "path#1" is the second call of a module in one forward pass, else its last call counts.
        anatomy: of this model, when it is known already.
        stop_early: end the forward pass after the deepest tap when no logits or output are wanted; `Signals.output` is then
            None. Signals of Hugging Face hidden states or attentions need the whole pass, so it is not ended then.
        grad: keep the graph; else the pass runs without gradient.
        all: give for a module path the list of the values of all its calls instead of the last.

    Raises:
        UserError: unknown path (with the nearest ones), no head, no such stage, or attention maps that the model does not give.
    """

    def __init__(
        self,
        model: nn.Module,
        wants: Iterable[str],
        *,
        anatomy: Anatomy | None = None,
        stop_early: bool = False,
        grad: bool = True,
        all: bool = False,
    ) -> None:
        self.model = model
        self.wants = tuple(dict.fromkeys([wants] if isinstance(wants, str) else wants))
        self.anatomy = anatomy
        self.stop_early = stop_early and not processes.sharding()  # a sharded network must come to its end, or its shards stay gathered
        self.grad = grad
        self.all = all
        self._tape = _Tape()
        self._handles: list[Any] = []
        self._options: dict[str, bool] = {}
        self._named = set(self.wants) & {"embedding", "attention", "stages"}
        self._numbers = [int(m[1]) for want in self.wants if (m := _STAGE.fullmatch(want))]
        self._paths = self._check_paths()
        self._stages: list[str | None] = []
        self._attention: list[str] = []
        self._plain = not (self._named or self._numbers or self._paths)
        self._ready = self._plain
        self._logits = "logits" in self.wants
        self._fast = self._plain and self._logits
        needs_map = bool(self._named or self._numbers) or (stop_early and not self._plain)
        if not self._plain and (anatomy is not None or not needs_map):
            self._install()

    def _check_paths(self) -> list[str]:
        known = [path for path, _ in self.model.named_modules() if path]
        paths = []
        for want in self.wants:
            if want in _OUTPUTS or want in self._named or _STAGE.fullmatch(want):
                continue
            path = want.removeprefix("at:")
            if self._module_of(path) not in known:
                names = known if want.startswith("at:") else [*known, *_OUTPUTS, "embedding", "stages", "attention"]
                error = unknown("module path", path, names, "limbeck inspect")
                raise UserError(f"{error.message} in {type(self.model).__name__}", error.hint)
            paths.append(path)
        return paths

    @staticmethod
    def _module_of(path: str) -> str:
        match = _CALL.fullmatch(path)
        return match[1] if match else path

    def _install(self) -> None:
        found = self.anatomy or Anatomy(type(self.model).__name__)
        self._stages = list(self._wanted_stages(found))
        stages = [] if found.hugging_face else list(filter(None, self._stages))
        for path in dict.fromkeys(self._module_of(path) for path in [*self._paths, *stages]):
            tap = _Tap(self._tape, "out:" + path, _take_output)
            self._handles.append(self.model.get_submodule(path).register_forward_hook(tap))
        if "embedding" in self._named:
            head = self.model.get_submodule(found.embedding)
            self._handles.append(head.register_forward_pre_hook(_Tap(self._tape, "in:" + found.embedding, _take_input)))
        if "attention" in self._named:
            self._attention_taps(found)
        if self._stages and found.hugging_face:
            self._options["output_hidden_states"] = True
        if self.stop_early and not self._options and not set(self.wants) & set(_OUTPUTS):
            self._tape.stop = self._deepest(found)
        self._ready = True

    def _wanted_stages(self, found: Anatomy) -> list[str | None]:
        if not self._numbers and "stages" not in self._named:
            return []
        count = len(found.stages)
        for number in self._numbers:
            if not -count <= number < count:
                raise UserError(f"{found.model} has no stages[{number}]: {count} stages were found", f"they are {', '.join(found.stages)}")
        if count == 0:
            raise UserError(f"no stages were found in {found.model}", "name the modules whose outputs to read ('at:<path>')")
        if "stages" in self._named:
            return list(found.stages)
        kept = {number % count for number in self._numbers}
        return [path if i in kept else None for i, path in enumerate(found.stages)]

    def _attention_taps(self, found: Anatomy) -> None:
        if is_hugging_face(self.model):
            kind = getattr(self.model.config, "_attn_implementation", None)
            if kind not in (None, "eager"):
                raise UserError(
                    f"{found.model} runs attention as {kind!r}, which makes no attention maps",
                    'load it with attn_implementation="eager" or call model.set_attn_implementation("eager")',
                )
            self._options["output_attentions"] = True
            return
        if not found.attention:
            raise UserError(f"no attention modules were found in {found.model}", "ask for another signal: stages, embedding or a path")
        self._attention = found.attention
        for path in found.attention:
            module, key = self.model.get_submodule(path), "map:" + path
            if isinstance(module, nn.MultiheadAttention):
                self._handles.append(module.register_forward_pre_hook(_Tap(self._tape, key, _ask_weights), with_kwargs=True))
            self._handles.append(module.register_forward_hook(_Tap(self._tape, key, _take_weights)))

    def _deepest(self, found: Anatomy) -> tuple[str, int] | None:
        """The tap that comes last in the dry pass, as (key, number of the call that ends the pass)."""
        ends: list[tuple[int, str, int]] = []
        for path in [*self._paths, *filter(None, self._stages)]:
            match = _CALL.fullmatch(path)
            times = found.ticks.get(self._module_of(path), [])
            if not times:
                return None
            number = min(int(match[2]), len(times) - 1) if match else len(times) - 1
            ends.append((times[number][1], "out:" + self._module_of(path), number + 1))
        for path in self._attention:
            ends.append((found.ticks[path][-1][1], "map:" + path, len(found.ticks[path])))
        if "embedding" in self._named:
            times = found.ticks[found.embedding]
            ends.append((times[-1][0], "in:" + found.embedding, len(times)))
        return max(ends)[1:] if ends else None

    def __call__(self, inputs: Any) -> Signals:
        """One forward pass: a `Batch`, or inputs as `Batch.inputs` holds them; signals as asked for."""
        if isinstance(inputs, Batch):
            inputs = inputs.inputs
        if self._fast and (self.grad or not torch.is_grad_enabled()):
            output = self.model(inputs) if isinstance(inputs, Tensor) else call(self.model, inputs)
            return Signals(output=output, logits=output if isinstance(output, Tensor) else logits_of(output))
        if not self.grad and torch.is_grad_enabled():
            with torch.no_grad():
                return self._read(inputs)
        return self._read(inputs)

    def _read(self, inputs: Any) -> Signals:
        if self._plain:
            output = self.model(inputs) if isinstance(inputs, Tensor) else call(self.model, inputs)
            return Signals(output=output, logits=logits_of(output)) if self._logits else Signals(output=output)
        if not self._ready:
            if self.anatomy is None:
                self.anatomy = anatomy(self.model, inputs)
            self._install()
        tape = self._tape
        tape.values, tape.active = {}, True
        try:
            output = call(self.model, inputs, **self._options)
        except _Stop:
            output = None
        finally:
            tape.active = False
            values, tape.values = tape.values, {}
        return self._signals(output, values)

    def _signals(self, output: Any, values: dict[str, list[Any]]) -> Signals:
        said: dict[str, Any] = {}
        if self._logits:
            said["logits"] = logits_of(output)
        if "embedding" in self._named:
            read = self._value("in:" + self.anatomy.embedding, values)  # type: ignore[union-attr]
            said["embedding"] = read.flatten(1) if read.ndim >= 4 else read
        if self._stages:
            if "output_hidden_states" in self._options:
                hidden = hidden_states(output)[1:]
                said["stages"] = [h if path else None for h, path in zip(hidden, self._stages)]
            else:
                said["stages"] = [self._value("out:" + path, values) if path else None for path in self._stages]
        if "output_attentions" in self._options:
            said["attention"] = self._attentions(output)
        elif self._attention:
            said["attention"] = [self._value("map:" + path, values) for path in self._attention]
        at = {path: self._at(path, values) for path in self._paths}
        return Signals(output=output, at=at, **said)

    def _at(self, path: str, values: dict[str, list[Any]]) -> Any:
        key = "out:" + self._module_of(path)
        return values.get(key, []) if self.all and "#" not in path else self._value("out:" + path, values)

    def _value(self, key: str, values: dict[str, list[Any]]) -> Tensor:
        match = _CALL.fullmatch(key)
        found = values.get(match[1] if match else key, [])
        number = int(match[2]) if match else -1
        if len(found) <= max(number, 0) or found[number] is None:
            path = key.partition(":")[2]
            raise UserError(
                f"module {path!r} of {type(self.model).__name__} gave no tensor in this forward pass ({len(found)} calls)",
                "it was not run, or returned no tensor; name another module (`limbeck inspect` lists those that run)",
            )
        return found[number]

    def _attentions(self, output: Any) -> list[Tensor]:
        maps = getattr(output, "attentions", None) or getattr(output, "decoder_attentions", None) or ()
        maps = [m for m in maps if m is not None]
        if not maps:
            hint = 'it may have none, or need attn_implementation="eager"'
            raise UserError(f"{type(self.model).__name__} returned no attention maps", hint)
        return maps

    def close(self) -> None:
        """Remove the hooks from the model; the reader installs them again if it is called once more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._options.clear()
        self._ready = self._plain

    def __deepcopy__(self, memo: dict[int, Any]) -> Reader:
        model = copy.deepcopy(self.model, memo)
        return Reader(model, self.wants, anatomy=self.anatomy, stop_early=self.stop_early, grad=self.grad, all=self.all)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
