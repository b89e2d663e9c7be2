"""Low-rank adapters on transformers models through peft: trained, saved and opened as adapters."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.errors import UserError
from limbeck.storage import load_tensors

_KINDS = {"causal-lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "multiclass": "SEQ_CLS", "embedding": "FEATURE_EXTRACTION"}


def library(extra: str = "lora") -> Any:
    """The peft package.

    Args:
        extra: of this package, that a user is told to install.

    Raises:
        UserError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise UserError("peft is not installed", f"`pip install 'limbeck[{extra}]'`") from None
    return peft


def is_adapted(model: nn.Module) -> bool:
    """Whether `adapt` made it."""
    return any(kind.__module__.startswith("peft.") and kind.__name__ == "PeftModel" for kind in type(model).__mro__)


def adapt(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    kind: str = "causal-lm",
) -> nn.Module:
    """Freeze a transformers model and train low-rank updates of its linear layers instead (Hu et al. 2021, arXiv:2106.09685).

    Args:
        model: of transformers; it is changed in place.
        rank: r.
        alpha: the update is scaled by alpha / r.
        dropout: of the adapters' inputs while training.
        targets: names of the layers ("q_proj"); None for peft's choice for this architecture.
        kind: of the task.

    Returns:
        A `peft.PeftModel`; only the adapters ask for gradients.

    Raises:
        UserError: peft is missing, the model is not of transformers, or no layer has such a name.
    """
    peft = library()
    if not hasattr(model, "config"):
        raise UserError(f"an adapter for {type(model).__name__}", "adapters go into models of transformers: hf:, llama, gpt2, t5, bert")
    task = _KINDS.get(kind)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=None if targets is None else list(targets), task_type=task
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        names = sorted({path.rpartition(".")[2] for path, part in model.named_modules() if isinstance(part, nn.Linear)})
        raise UserError(f"adapter: {str(error).splitlines()[0]}", f"its linear layers are {', '.join(names[:12])}") from None


ADAPTER = "adapter_model.safetensors"
"""The file with an adapter's weights, as peft calls it."""

BASE = "base"
"""Folder beside an adapter with the network that it belongs to, where no folder or hub id holds that network."""


def save_adapter(model: nn.Module, folder: Path) -> str:
    """Write the adapter as peft does, and its network beside it where nobody else keeps that.

    Returns:
        The folder or hub id of the network that it belongs to: `BASE` (inside `folder`) for one that limbeck built or trained.
    """
    base = model.get_base_model()  # type: ignore[operator]
    name = str(getattr(base, "name_or_path", "") or "")
    model.save_pretrained(folder)  # type: ignore[operator]
    if not name:
        plain = _without_adapter(model)
        # what is no model of transformers but holds one (an encoder of sentences) has a form of its own
        write = getattr(plain, "save_pretrained", None) or plain.save
        (folder / BASE).mkdir(exist_ok=True)
        write(folder / BASE)
        return BASE
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _without_adapter(model: nn.Module) -> nn.Module:
    """A copy of the network as it was before it got its adapter."""
    return copy.deepcopy(model).unload()  # type: ignore[operator]


def load_adapter(folder: Path, base: nn.Module) -> nn.Module:
    """The network with its adapter, as it was saved; the adapter can go on learning.

    Args:
        folder: holds the adapter.
        base: the network that it belongs to. One that has an adapter already keeps it, with the weights of the folder.

    Raises:
        UserError: the adapter is missing or does not fit the network.
    """
    peft = library()
    if not (folder / ADAPTER).is_file():  # peft would take a pickle, or look for one on the hub
        raise UserError(f"no file at {folder / ADAPTER}", "adapters are read from safetensors only: restore or remake the folder")
    try:
        if not is_adapted(base):
            return peft.PeftModel.from_pretrained(base, str(folder), is_trainable=True)
        found = peft.set_peft_model_state_dict(base, load_tensors(folder / ADAPTER))
        missing = [name for name in found.missing_keys if "lora_" in name]
        if missing or found.unexpected_keys:
            raise ValueError(f"{len(missing)} missing and {len(found.unexpected_keys)} foreign weights")
        return base
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        what = f"the adapter in {folder} does not fit {type(base).__name__}: {str(error).splitlines()[0]}"
        raise UserError(what, "name its own base") from None
