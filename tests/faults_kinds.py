"""The kinds of work that the fault tests kill: small recipes whose every part (training, measuring, writing) takes some of their second."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from tests.conftest import TINY, TINY_TEXT
from tests.faults import Kind, digests, run_result, without

FEW = ["email", "http", "json"]
"""Packages of the standard library whose texts the language models read."""


def _training() -> dict[str, Any]:
    """Teacher, student and baseline, augmented, so that checkpoints must carry the random state."""
    recipe = copy.deepcopy(TINY)
    recipe["training"]["steps"] = 150
    recipe["data"]["augment"] = ["shift:1", "noise:0.05"]
    return recipe | {"checkpoints": {"every_steps": 11}}


def _turns() -> dict[str, Any]:
    """A generator, a fake score that follows it, and a discriminator: several optimisers, several turns a step."""
    return {
        "name": "turns",
        "method": {"id": "dmd2"},
        "student": "teacher",
        "teacher": {"model": "denoising-mlp", "args": {"width": 32, "depth": 2}, "train": {"steps": 20, "batch": 32, "lr": 0.003}},
        "data": {"source": "digits", "train": 300},
        "training": {"steps": 12, "batch": 16, "lr": 0.001, "ema": 0.9},
        "generate": {
            "steps": [1, 2],
            "teacher_steps": [3],
            "samples": 64,
            "features": {"model": "cnn", "args": {"width": 4}, "train": {"steps": 10}},
        },
        "checkpoints": {"every_steps": 3},
        "threads": 1,
        "device": "cpu",
        "trackers": [],
    }


def _language() -> dict[str, Any]:
    """A student that writes half of the texts which it learns from."""
    recipe = copy.deepcopy(TINY_TEXT) | {"method": {"id": "distillspec", "settings": {"on_policy": 0.5, "tokens": 8, "measured": 0}}}
    recipe["data"] |= {"test": 8, "args": {"packages": FEW}}
    recipe["teacher"]["train"]["steps"] = 10
    recipe["training"]["steps"] = 12
    return recipe | {"checkpoints": {"every_steps": 2}}


def _caching() -> dict[str, Any]:
    """Several shards: a shard of tokens has 16384 rows."""
    recipe = copy.deepcopy(TINY_TEXT)
    recipe["data"] = {"source": "stdlib-text", "train": 800, "test": 16, "args": {"packages": FEW}}
    return recipe | {"checkpoints": {"every_steps": 3}}


def _experts() -> dict[str, Any]:
    """A trajectory method: experts are made and kept, the set learns from them, students of several networks judge it."""
    return {
        "name": "experts",
        "method": {
            "id": "trajectory-matching",
            "settings": {"experts": 3, "expert_epochs": 2, "max_start": 2, "epochs": 4, "iterations": 20, "syn_steps": 3},
        },
        "student": {"model": "convnet", "args": {"width": 4, "depth": 2}},
        "data": {"source": "digits", "train": 200, "test": 200},
        "condense": {"per_class": 1},
        "checkpoints": {"every_steps": 2},
        "threads": 1,
        "device": "cpu",
        "trackers": [],
    }


def _comparison() -> dict[str, Any]:
    recipe = copy.deepcopy(TINY)
    recipe["teacher"]["train"]["steps"] = 30
    recipe["training"]["steps"] = 30
    return recipe | {"checkpoints": {"every_steps": 7}}


def _written(recipe: dict[str, Any]):
    def prepare(folder: Path) -> None:
        import yaml

        (folder / "r.yaml").write_text(yaml.safe_dump(recipe))

    return prepare


def _run_words(folder: Path) -> list[str]:
    resume = ["--resume"] if (folder / "out/recipe.yaml").exists() else []
    return ["run", "r.yaml", "--out", "out", "--quiet", *resume]


def _of_run(folder: Path) -> dict[str, Any]:
    return run_result(folder / "out")


def _of_experts(folder: Path) -> dict[str, Any]:
    [buffer] = (folder / "cache/experts").iterdir()
    return run_result(folder / "out") | {
        "experts": digests(buffer, "*.safetensors") | {"index": json.loads((buffer / "index.json").read_text())["experts"]},
        "left of experts": sorted(path.name for path in buffer.iterdir() if path.suffix == ".tmp" or path.is_dir()),
    }


def _of_store(folder: Path) -> dict[str, Any]:
    return digests(folder / "store", "*") | {"names": sorted(path.name for path in (folder / "store").iterdir() if path.name != ".lock")}


def _of_comparison(folder: Path) -> dict[str, Any]:
    out = folder / "out"
    table = without(json.loads((out / "comparison.json").read_text()), "seconds")
    runs = {str(path.parent): without(json.loads(path.read_text())["metrics"]) for path in sorted(out.glob("runs/*/summary.json"))}
    left = sorted(str(path.relative_to(out)) for path in out.rglob("*.tmp"))
    return {"table": table, **{path.removeprefix(str(folder)): m for path, m in runs.items()}, **digests(out, "runs/*/*/*.safetensors")} | {
        "left over": left
    }


KINDS = {
    "training": Kind(_run_words, _of_run, _written(_training())),
    "turns": Kind(_run_words, _of_run, _written(_turns())),
    "language": Kind(_run_words, _of_run, _written(_language())),
    "caching": Kind(
        lambda folder: ["cache", "r.yaml", "--out", "store", "--form", "topk", "--top-k", "8", "--quiet"], _of_store, _written(_caching())
    ),
    "experts": Kind(_run_words, _of_experts, _written(_experts())),
    "comparison": Kind(
        lambda folder: ["compare", "r.yaml", "--methods", "alone,kd,pld", "--seeds", "2", "--out", "out"],
        _of_comparison,
        _written(_comparison()),
    ),
}
