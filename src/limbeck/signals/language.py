"""Reading a language model up to its output matrix: next-token distributions that are not built."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import processes
from limbeck.data.batch import IGNORE, Batch
from limbeck.errors import UserError
from limbeck.losses.vocabulary import Law
from limbeck.signals.anatomy import hidden_states
from limbeck.signals.modes import evaluating
from limbeck.signals.outputs import call, logits_of
from limbeck.signals.signals import Signals

WANTS = ("law", "logits", "hidden", "output", "stages", "attention")
_AGREE = 1e-3
"""Greatest difference between the logits of a model and of its law, as a share of the largest logit."""


class _Reached(BaseException):
    """Ends a forward pass in front of the output matrix; a BaseException, so that a model's own `except Exception` lets it through."""


def scored(labels: Tensor, kind: str) -> Tensor:
    """`(B, L')` which predictions are scored: of a causal model position i speaks of label i + 1, so L' = L - 1; of seq2seq L' = L."""
    return (labels[:, 1:] if kind == "causal-lm" else labels) != IGNORE


def targets(labels: Tensor, kind: str) -> Tensor:
    """`(N,)` the scored tokens, row by row of the batch: what the N rows of a law are about."""
    own = labels[:, 1:] if kind == "causal-lm" else labels
    return own[own != IGNORE]


def head_of(model: nn.Module) -> nn.Module | None:
    """The output matrix of a transformers model (also behind an adapter of peft); None where there is no plain one."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Linear) else None


def _after(model: nn.Module) -> tuple[float, float | None]:
    """(scale, softcap) that a model applies behind its output matrix, as its configuration says.

    Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`, Gemma 2 and later cap with `final_logit_softcapping`.
    """
    config = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)() if config is not None else None
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    if divisor := getattr(config, "logits_scaling", None):
        scale /= float(divisor)
    return scale, getattr(config, "final_logit_softcapping", None)


class LanguageReader:
    """Calls a language model with a batch and gives the signals that were asked for.

    "law" (or "logits", the same here) are the distributions of the scored positions as `Law`: the forward pass ends in front of the
    output matrix, and positions that nobody scores never reach it. "hidden" `(B, L, D)` is what would go into it. "stages" are
    the hidden states of all layers, "attention" the maps; with them, or with "output", the pass runs to its end.

    Args:
        model: a transformers model with an output matrix, or any module that returns logits `(B, L, V)`.
        wants: see above.
        kind: "causal-lm" or "seq2seq".
        vocabulary: tokens of the tokenizer; further columns of the output matrix are padding and are cut.
        grad: keep the graph.
        dense: take logits as the model makes them, for models that do more behind their output matrix than this reader knows.
        stop_early, anatomy: taken for the sake of one interface; this reader always stops as early as it can.

    Raises:
        UserError: an unknown signal, or an output matrix that is narrower than the tokenizer.
    """

    def __init__(
        self,
        model: nn.Module,
        wants: Iterable[str],
        *,
        kind: str,
        vocabulary: int,
        grad: bool = True,
        dense: bool = False,
        stop_early: bool = False,
        anatomy: Any = None,
    ) -> None:
        self.model, self.wants, self.kind, self.vocabulary, self.grad = model, tuple(wants), kind, vocabulary, grad
        for want in self.wants:
            if want not in WANTS:
                raise UserError(f"{want!r} cannot be read from a language model", f"choose of {', '.join(WANTS)}")
        self.head = None if dense or getattr(model, "limbeck_dense", False) else head_of(model)
        self.scale, self.softcap = _after(model)
        width = None if self.head is None else self.head.weight.shape[0]
        if width is not None and width < vocabulary:
            raise UserError(
                f"the model has {width} outputs, the tokenizer {vocabulary} tokens",
                "use the tokenizer that the model was trained with (text.tokenizer), or a model with a larger vocabulary",
            )
        self._whole = bool({"stages", "attention", "output"} & set(self.wants))

    def __call__(self, batch: Batch) -> Signals:
        """One forward pass."""
        if not self.grad and torch.is_grad_enabled():
            with torch.no_grad():
                return self._read(batch)
        return self._read(batch)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What the model is called with; of seq2seq with the decoder's inputs that belong to the labels."""
        inputs = dict(batch.inputs)
        if self.kind == "seq2seq" and "decoder_input_ids" not in inputs:
            if batch.labels is None:
                raise UserError("a sequence-to-sequence batch needs labels", "give pairs of source and target")
            shift = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
            if shift is None:
                raise UserError(
                    f"{type(self.model).__name__} does not tell how its decoder's inputs are made from labels",
                    "use a sequence-to-sequence model of transformers, such as T5",
                )
            inputs["decoder_input_ids"] = shift(labels=batch.labels)
        return inputs

    def _read(self, batch: Batch) -> Signals:
        options: dict[str, Any] = {}
        if "stages" in self.wants:
            options["output_hidden_states"] = True
        if "attention" in self.wants:
            options["output_attentions"] = True
        output, caught, handle = None, [], None

        def catch(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            caught.append(args[0])
            if self._whole:
                return None
            if processes.sharding():  # a sharded network must come to its end, or its shards stay gathered: one position costs little
                return (args[0][:, :1],)
            raise _Reached

        try:
            if self.head is not None:  # for this call only, so that copies of the model carry no hook
                handle = self.head.register_forward_pre_hook(catch)
            output = call(self.model, self.inputs(batch), **options)
        except _Reached:
            pass
        finally:
            if handle is not None:
                handle.remove()
        said: dict[str, Any] = {}
        if self.head is None or not caught:  # no output matrix, or one that the model multiplies with without calling it
            logits = logits_of(output)
            hidden = None
            said["law"] = Law(dense=self.rows(logits, batch), vocabulary=self._cut(logits.shape[-1]))
        else:
            hidden = caught[-1]
            weight, bias = self.head.weight, self.head.bias
            law = Law(self.rows(hidden, batch), weight, bias, self.scale, self.softcap, None, self._cut(weight.shape[0]))
            said["law"] = law
        if "hidden" in self.wants:
            if hidden is None:
                raise UserError(f"{type(self.model).__name__} has no plain output matrix: no hidden states to read", "ask for law")
            said["hidden"] = hidden
        if "stages" in self.wants:
            said["stages"] = list(hidden_states(output))
        if "attention" in self.wants:
            said["attention"] = list(output.decoder_attentions if self.kind == "seq2seq" else output.attentions)
        return Signals(output=output, **said)

    def _cut(self, width: int) -> int | None:
        return self.vocabulary if width != self.vocabulary else None

    def rows(self, values: Tensor, batch: Batch) -> Tensor:
        """The scored rows `(N, ...)` of `(B, L, ...)`; all L - 1 (or L) where the batch has no labels."""
        if self.kind == "causal-lm":
            values = values[:, :-1]
        if batch.labels is None:
            return values.flatten(0, 1)
        mask = scored(batch.labels, self.kind)
        return values[mask]


def settle(model: nn.Module, batch: Batch, kind: str, vocabulary: int, role: str) -> str | None:
    """Compare what `LanguageReader` reads with the model's own logits, and mark the model where the two differ.

    A marked model (`limbeck_dense`) is read by its logits from then on: right, but as wide as the vocabulary in memory.

    Returns:
        A note for the user where it was marked, else None.

    Raises:
        UserError: the model cannot read the batch; its logits are no `(B, L, V)`.
    """
    with evaluating(model), torch.no_grad():
        reader = LanguageReader(model, ("law",), kind=kind, vocabulary=vocabulary, grad=False)
        if kind == "causal-lm":
            batch = batch.replace(labels=None)  # every position is compared, also where none of these texts is scored
        read = reader(batch).law
        law, called = read.logits(), read.dense is None or reader.head is None
        own = logits_of(call(model, reader.inputs(batch)))
        if own.ndim != 3 or own.shape[-1] < vocabulary:
            raise UserError(
                f"{role}: the model gives outputs of shape {tuple(own.shape)}, the task needs (batch, length, {vocabulary} or more)",
                "give a language model with the vocabulary of the tokenizer (text.tokenizer)",
            )
        if kind == "causal-lm":
            _check_causal(model, batch, own, vocabulary, role)
        expected = reader.rows(own, batch)[:, :vocabulary].float()
        most = max(1.0, float(expected.abs().amax())) if expected.numel() else 1.0
        if called and torch.allclose(law, expected, atol=_AGREE * most, rtol=0):
            return None
        model.limbeck_dense = True  # type: ignore[assignment]
        return f"{role}: {type(model).__name__} does more behind its output matrix than is known here, so whole logits are kept"


def _check_causal(model: nn.Module, batch: Batch, own: Tensor, vocabulary: int, role: str) -> None:
    """Other tokens in the second half of the texts must not change what a causal model says in the first half."""
    ids = batch.inputs["input_ids"]
    half = ids.shape[1] // 2
    other = ids.clone()
    other[:, half:] = (other[:, half:] + 1) % vocabulary
    again = logits_of(call(model, {**batch.inputs, "input_ids": other}))
    share = 1e-5 if own.dtype == torch.float32 else _AGREE  # a fresh model looks ahead by little, and rounding is less
    if bool(((again - own)[:, :half].abs() > share * own.abs().max()).any()):
        raise UserError(
            f"{role}: {type(model).__name__} sees tokens that come later in a text, so it cannot learn which one comes next",
            "use llama, gpt2 or hf:<folder> of a decoder (of BERT-like models: args.is_decoder=true)",
        )
