"""Checkpoints: everything that a run needs to go on as if it had never stopped.

A checkpoint is a folder `step-00001200/` with `state.safetensors` (all tensors) and `state.json` (everything else, and the
checksum of both). It is written under another name, synced, then renamed: it is there whole, or not at all.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck import storage
from limbeck.errors import UserError

_TENSOR, _TUPLE, _PAIRS = "__tensor__", "__tuple__", "__pairs__"


def pack(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Turn a nested state (dicts, lists, tuples, tensors, numbers, words) into JSON data, moving its tensors into `tensors`.

    Raises:
        TypeError: something is neither; a program's state must be plain data and tensors.
    """
    if isinstance(value, Tensor):
        name = path or "value"
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: pack(item, tensors, f"{path}/{key}") for key, item in value.items()}
        return {_PAIRS: [[key, pack(item, tensors, f"{path}/{key}")] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [pack(item, tensors, f"{path}/{number}") for number, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"state at {path!r} is a {type(value).__name__}; only plain data and tensors can be saved")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        if _TUPLE in value:
            return tuple(unpack(item, tensors) for item in value[_TUPLE])
        if _PAIRS in value:
            return {key: unpack(item, tensors) for key, item in value[_PAIRS]}
        return {key: unpack(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    return value


def random_state() -> dict[str, Any]:
    """The state of every random generator that training draws from: Python's, NumPy's, torch's on each device."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {"name": name, "keys": torch.from_numpy(keys.astype(np.int64)), "rest": list(rest)},
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put every generator back to where `random_state` found it."""
    python, numbers = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    np.random.set_state((numbers["name"], numbers["keys"].numpy().astype(np.uint32), *numbers["rest"]))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])  # a run may go on with fewer of them


def of_process(state: Mapping[str, Any], rank: int, world: int) -> dict[str, Any]:
    """What a checkpoint holds for one of several processes: its `memory` and the state of its random generators.

    Written by as many processes, each takes its own back. By another number, all take the memory of process 0, which also takes its
    generators; `random` is None for the others, which keep the stream that they began with.
    """
    kept = state.get("processes", [{"memory": state["memory"], "random": state["random"]}])
    if len(kept) == world:
        return kept[rank]
    return {"memory": kept[0]["memory"], "random": kept[0]["random"] if rank == 0 else None}


def save(folder: Path, step: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write a checkpoint and remove all but the newest `keep`.

    A checkpoint that is there is not touched before the new one is: another one of the same step gets a number behind its name. Those of
    later steps, which could not be read when the run went on from an earlier one, are removed with the oldest: they push no whole one out.

    Args:
        folder: where the checkpoints of this phase live.
        step: names the checkpoint.
        state: nested plain data and tensors.
        keep: how many stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = itertools.chain([f"step-{step:08d}"], (f"step-{step:08d}.{number}" for number in itertools.count(1)))
    final = folder / next(name for name in names if not (folder / name).exists())
    for left in folder.glob(".step-*.tmp"):  # by a killed process
        shutil.rmtree(left, ignore_errors=True)
    draft = folder / f".{final.name}.tmp"
    draft.mkdir()
    tensors: dict[str, Tensor] = {}
    content = pack(state, tensors)
    # safetensors refuses tensors that share memory (tied weights, views of one buffer): each gets its own copy
    seen: set[int] = set()
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        if address in seen:
            tensors[name] = tensor.detach().clone()
        seen.add(address)
    digest = storage.save_tensors(draft / "state.safetensors", tensors)
    body = json.dumps(content)
    storage.write_json(draft / "state.json", {"tensors_sha256": digest, "body_sha256": storage.sha256(body.encode()), "body": body})
    os.replace(draft, final)
    storage.sync_folder(folder)
    paths = _all(folder)
    here = paths.index(final) + 1
    for old in [*paths[: max(0, here - keep)], *paths[here:]]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir()) if folder.is_dir() else []


def read(path: Path) -> Any:
    """Read one checkpoint.

    Raises:
        UserError: it is torn or was altered; the file is named.
    """
    torn = UserError(
        f"the checkpoint {path} is torn or was altered", "an older one is used where there is one; otherwise start again in another folder"
    )
    try:
        head = json.loads((path / "state.json").read_text(encoding="utf-8"))
        body, digest = head["body"], head["tensors_sha256"]
        if storage.sha256(body.encode()) != head["body_sha256"] or len(digest) != 64 or len(head) != 3:
            raise torn
        return unpack(json.loads(body), storage.load_tensors(path / "state.safetensors", digest))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise torn from None


def latest(folder: Path) -> tuple[Any, Path | None, list[str]]:
    """The newest checkpoint that is whole.

    Returns:
        its state and path (both None when there is none at all), and a line for each newer one that could not be read.

    Raises:
        UserError: there are checkpoints, but none is whole.
    """
    warnings: list[str] = []
    paths = _all(folder)
    for path in reversed(paths):
        try:
            return read(path), path, warnings
        except UserError as error:
            warnings.append(error.message)
    if paths:
        raise UserError(f"none of the {len(paths)} checkpoints in {folder} is whole", "start again with another --out folder")
    return None, None, warnings
