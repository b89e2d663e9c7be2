"""The artifact of this wing: a module that renders, with a note of what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from limbeck import storage
from limbeck.errors import MISFITS, UserError
from limbeck.outcome import Artifact
from limbeck.places import user_path

FORMAT = "limbeck-scene/1"
NOTE = "scene.json"


class Scene(Artifact):
    """A field, picture or drawing on its way into a folder: what `limbeck.zoo.save_model` writes, and `scene.json`.

    Args:
        network: what was optimised; with a `limbeck_config` it opens again by `limbeck.zoo.load_model`.
        kind: a name of `limbeck.scenes.scene_method.KINDS`.
        facts: plain data that whoever renders it must know (near and far planes, classes).
        also: writes further files into the folder (a sheet of pictures, an SVG file).
    """

    def __init__(
        self, network: nn.Module, kind: str, facts: dict[str, Any] | None = None, also: Callable[[Path], None] | None = None
    ) -> None:
        self.network, self.kind, self.facts, self.also = network, kind, dict(facts or {}), also

    @property
    def held(self) -> nn.Module:
        """The module itself."""
        return self.network

    def save(self, folder: str | Path, card: str = "", extra: dict[str, Any] | None = None) -> None:
        """Write it.

        Args:
            folder: made if it is not there.
            card: text of README.md.
            extra: plain data for the note.
        """
        from limbeck.zoo import save_model

        folder = save_model(self.network, folder, card=card, extra=extra)
        storage.write_json(folder / NOTE, {"format": FORMAT, "kind": self.kind, "facts": self.facts})
        if self.also is not None:
            self.also(folder)


def scene_folder(path: str | Path) -> Path | None:
    """The folder of a scene: `path` itself or the `scene/` inside it; None where there is none."""
    path = user_path(path)
    return next((folder for folder in (path, path / "scene") if (folder / NOTE).is_file()), None)


def load_scene(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Open what a run of this wing made.

    Args:
        path: a run's folder, or the `scene/` inside it.

    Returns:
        the module in evaluation mode, and its note: `kind` and `facts`.

    Raises:
        UserError: there is no scene, or its files are torn.
    """
    from limbeck.zoo import load_model

    folder = scene_folder(path)
    if folder is None:
        raise UserError(f"{path} holds no scene", "give a run's folder with a scene/ inside it, or that folder")
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        whole = note["format"] == FORMAT and isinstance(note["kind"], str) and isinstance(note["facts"], dict)
    except (OSError, *MISFITS):
        whole = False
    if not whole:
        raise UserError(f"{folder / NOTE} is not the note of a scene", "restore or remake the folder")
    return load_model(folder).eval(), note
