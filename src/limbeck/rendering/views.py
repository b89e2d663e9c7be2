"""Pictures with their cameras: what fields are learned from and judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.data.arguments import check_arguments
from limbeck.errors import UserError, unknown
from limbeck.rendering.cameras import Cameras
from limbeck.rendering.marching import cube_bounds
from limbeck.storage import fingerprint, tensors_fingerprint


@dataclass
class Views:
    """Some posed pictures.

    Attributes:
        cameras: N of them.
        colour: `(N, 3, H, W)` in [0, 1], already multiplied by opacity.
        opacity: `(N, 1, H, W)` in [0, 1]; 1 everywhere for pictures without transparency.
    """

    cameras: Cameras
    colour: Tensor
    opacity: Tensor

    def __len__(self) -> int:
        return len(self.cameras)

    def over(self, background: Tensor) -> Tensor:
        """`(N, 3, H, W)` pictures over one colour `(3,)`."""
        return self.colour + (1 - self.opacity) * background.view(1, 3, 1, 1)

    def random_pixels(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rays of random pixels of random views: origins and directions `(count, 3)`, colour times opacity `(count, 3)`, opacity
        `(count, 1)`; from torch's global generator."""
        device = self.colour.device
        view = torch.randint(len(self), (count,), device=device)
        row = torch.randint(self.cameras.height, (count,), device=device)
        column = torch.randint(self.cameras.width, (count,), device=device)
        origins, directions = self.cameras.rays(view, column + 0.5, row + 0.5)
        return origins, directions, self.colour[view, :, row, column], self.opacity[view, :, row, column]

    def to(self, device: torch.device | str) -> Views:
        """The same views on a device."""
        return Views(self.cameras.to(device), self.colour.to(device), self.opacity.to(device))


@dataclass
class ViewSet:
    """A scene's views, split.

    Attributes:
        name: what it was opened as.
        train, test, valid: its parts; `valid` is None unless asked for.
        bound: the scene lies in the cube [-bound, bound]^3.
        around: whether the cameras look at it from all around, so that new ones may stand on their sphere; else new ones stand among them.
        fingerprint: of everything.
    """

    name: str
    train: Views
    test: Views
    valid: Views | None
    bound: float
    around: bool = True
    fingerprint: str = ""

    def to(self, device: torch.device | str) -> ViewSet:
        """The same on a device."""
        valid = None if self.valid is None else self.valid.to(device)
        return ViewSet(self.name, self.train.to(device), self.test.to(device), valid, self.bound, self.around, self.fingerprint)

    def describe(self) -> dict[str, Any]:
        """What a report says about the data; JSON can hold it."""
        return {
            "name": self.name,
            "kind": "views",
            "input_shape": [3, self.train.cameras.height, self.train.cameras.width],
            "classes": [],
            "train": len(self.train),
            "valid": 0 if self.valid is None else len(self.valid),
            "test": len(self.test),
            "fingerprint": self.fingerprint,
        }


def check_seen(name: str, views: Views, bound: float, names: list[str] | None = None) -> None:
    """Refuse cameras that see nothing of the cube.

    Raises:
        UserError: naming the first one.
    """
    for number in range(len(views)):
        near, far = cube_bounds(*views.cameras.all_rays(number), bound)
        if not bool((far > near).any()):
            what = f"view {number}" if names is None else names[number]
            place = ", ".join(f"{x:.3g}" for x in views.cameras.places[number].tolist())
            raise UserError(
                f"{name}: the camera of {what} at ({place}) sees nothing of the cube of half side {bound:g}",
                "check its transform_matrix (camera to world, looking along -z), or set data.args.bound",
            )


def _whole(name: str, count: float | None, usual: int) -> int:
    if count is None:
        return usual
    if isinstance(count, float) or count < 1:
        raise UserError(f"data.{name} is {count}", "views are counted: give a whole number of at least 1")
    return int(count)


def open_views(
    source: str,
    train: float | None = None,
    valid: float | None = None,
    test: float | None = None,
    size: int | None = None,
    seed: int = 0,
    **args: Any,
) -> ViewSet:
    """Posed views by name.

    Args:
        source: `scene:<name>` (exact pictures of an embedded scene) or `posed:<folder>` (transforms.json and pictures).
        train, valid, test: how many views of each part (scenes: 24, none, 8; a folder: all, what it names, what it names or every eighth).
        size: side of the pictures in pixels (scenes: 32; a folder: as they are).
        seed: of the cameras of a scene.
        args: what else the source takes: `character` of scene:letter, `bound` of a folder.

    Raises:
        UserError: unknown sources or arguments, and everything that is wrong with a folder.
    """
    from limbeck.rendering.scenes import SCENES, cameras_for, pictures_of

    kind, colon, name = source.partition(":")
    if not colon or kind not in ("scene", "posed"):
        raise UserError(f"the data {source!r} are no posed views", f"name scene:{', scene:'.join(SCENES)}, or posed:<folder>")
    if kind == "posed":
        from limbeck.rendering.posed import read_posed

        check_arguments(read_posed, {"path": name, **args}, f"data {source!r}")
        return read_posed(name, train=train, valid=valid, test=test, size=size, **args)
    if name not in SCENES:
        raise unknown("scene", name, SCENES, "limbeck data")
    check_arguments(SCENES[name], args, f"data {source!r}")
    solids = SCENES[name](**args)
    counts = (_whole("train", train, 24), None if valid is None else _whole("valid", valid, 0), _whole("test", test, 8))
    parts: list[Views | None] = []
    for part, count in enumerate(counts):
        if count is None:
            parts.append(None)
            continue
        cameras = cameras_for(count, size or 32, seed, part)
        parts.append(Views(cameras, *pictures_of(solids, cameras)))
    learned, held, judged = parts
    assert learned is not None and judged is not None
    return marked(ViewSet(source, learned, judged, held, bound=1.0))


def marked(views: ViewSet) -> ViewSet:
    """The same views with their fingerprint."""
    content: list[Any] = [views.bound, views.around]
    for part in (views.train, views.test, views.valid):
        if part is not None:
            lens = {"focal": part.cameras.focal, "centre": part.cameras.centre}
            tensors = {"poses": part.cameras.poses, **lens, "colour": part.colour, "opacity": part.opacity}
            content.append(tensors_fingerprint(tensors))
    views.fingerprint = fingerprint(content)
    return views
