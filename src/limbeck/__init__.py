"""limbeck: distillation of every kind. One command, the same few nouns, honest evidence of what was kept."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Card": "limbeck.method",
    "Condenser": "limbeck.condensation.condenser",
    "Data": "limbeck.data",
    "Denoiser": "limbeck.diffusion",
    "Distiller": "limbeck.knowledge.distiller",
    "FewStep": "limbeck.sampling.few_step",
    "Generator": "limbeck.sampling.generator",
    "Method": "limbeck.method",
    "Reader": "limbeck.signals",
    "Recipe": "limbeck.recipe",
    "Result": "limbeck.run",
    "SceneMethod": "limbeck.scenes.scene_method",
    "Signals": "limbeck.signals",
    "UserError": "limbeck.errors",
    "compare": "limbeck.trials",
    "distill": "limbeck.run",
    "load_generator": "limbeck.sampling.generator",
    "load_dataset": "limbeck.condensation.judging",
    "load_scene": "limbeck.scenes.scene",
    "load_recipe": "limbeck.recipe",
    "load_student": "limbeck.run",
    "open_data": "limbeck.data",
    "run_recipe": "limbeck.run",
    "setting": "limbeck.method",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import limbeck` costs next to nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'limbeck' has no attribute {name!r}")
    import importlib

    module = importlib.import_module(_HOMES[name])
    return getattr(module, {"load_recipe": "load"}.get(name, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
