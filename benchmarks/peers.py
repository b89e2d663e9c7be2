"""The other libraries: imported where they are installed (`make bench` installs them), else the reason why not.

`torchdistill` and `ddranking` import torchvision, whose wheels do not match every torch build and which this project never installs. What
is measured of them does not use it, so while they are imported the absent packages are replaced by empty modules.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import Any

STAND_INS = ("torchvision", "pycocotools", "cv2", "timm")


class Absent(Exception):
    """A peer that cannot be run here; the text is the reason."""


class _Empty:
    """Finds an empty package for the names in `STAND_INS` that nothing else finds."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """A package for each of the names and what is below it."""
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in STAND_INS else None  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """A module in which every name is an empty class."""
        module = types.ModuleType(spec.name)

        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = attribute  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


@contextmanager
def without_torchvision() -> Iterator[None]:
    """Absent packages of `STAND_INS` can be imported inside, as empty ones; afterwards nobody else finds them."""
    finder, before = _Empty(), set(sys.modules)
    sys.meta_path.append(finder)  # type: ignore[arg-type]
    try:
        for name in ("datasets", "models", "transforms"):  # torchdistill looks for these in sys.modules
            importlib.import_module(f"torchvision.{name}")
        yield
    finally:
        sys.meta_path.remove(finder)  # type: ignore[arg-type]
        for name in set(sys.modules) - before:
            if name.split(".")[0] in STAND_INS and isinstance(getattr(sys.modules[name], "__loader__", None), _Empty):
                del sys.modules[name]


def need(module: str, stand_in: bool = False) -> Any:
    """A module of a peer.

    Raises:
        Absent: it is not installed, or its import fails.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not stand_in:
                return importlib.import_module(module)
            with without_torchvision():
                return importlib.import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == module.split(".")[0]
        raise Absent("not installed here; `make bench` installs it" if missing else f"import fails: {error}".splitlines()[0]) from None
    except Exception as error:  # whatever a peer's import raises is the row's reason, not this script's end
        raise Absent(f"import fails: {type(error).__name__}: {error}".splitlines()[0]) from None


def version(distribution: str) -> str:
    """Name and version of an installed distribution."""
    try:
        return f"{distribution} {installed(distribution)}"
    except PackageNotFoundError:
        return distribution
