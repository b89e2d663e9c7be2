"""A user's own posed pictures: a folder with transforms.json as NeRF, Blender and Instant-NGP write it. Plain data, read with care."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.errors import UserError
from limbeck.places import user_path
from limbeck.rendering.cameras import Cameras
from limbeck.rendering.views import Views, ViewSet, check_seen, marked

PARTS = {"train": "transforms_train.json", "valid": "transforms_val.json", "test": "transforms_test.json"}
WHOLE = "transforms.json"
PINHOLES = ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV", "RADIAL", "SIMPLE_RADIAL")
DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
LENS = ("camera_angle_x", "fl_x", "fl_y", "cx", "cy", "w", "h")
EVERY = 8
"""Of a folder with one file, every so many views are for testing, as is usual for real scenes."""


def _file(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {error}", "write the cameras as NeRF's transforms.json") from None
    if not isinstance(found, dict) or not isinstance(found.get("frames"), list) or not found["frames"]:
        raise UserError(f"{path} names no frames", 'it needs "frames": [{"file_path": ..., "transform_matrix": ...}, ...]')
    lens = found.get("camera_model", "PINHOLE")
    if lens not in PINHOLES:
        raise UserError(f"{path}: camera_model is {lens!r}, no pinhole camera", "undistort the pictures first, and set it to PINHOLE")
    for where, owner in [(str(path), found), *((f"{path}: frame {number}", frame) for number, frame in enumerate(found["frames"]))]:
        for key in DISTORTION:
            if isinstance(owner, dict) and owner.get(key):
                raise UserError(f"{where}: the lens has a distortion ({key}={owner[key]})", "undistort the pictures first, and set it to 0")
        for key in LENS if owner is not found else ():
            if isinstance(owner, dict) and key in owner and owner[key] != found.get(key):
                raise UserError(f"{where} has a lens of its own ({key}={owner[key]})", f"give all views one {key}, beside `frames`")
    return found


def _pose(frame: Any, where: str) -> Tensor:
    """`(3, 4)` of one frame: finite, a rotation, a place."""
    mend = "give a 4 x 4 matrix, camera to world: a rotation, a place, and the row 0 0 0 1"
    try:
        matrix = torch.tensor(frame["transform_matrix"], dtype=torch.float64)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where} has no readable transform_matrix", mend) from None
    if matrix.shape not in ((4, 4), (3, 4)) or not bool(matrix.isfinite().all()):
        raise UserError(f"{where}: its transform_matrix is {tuple(matrix.shape)} or not finite", mend)
    if len(matrix) == 4 and not torch.allclose(matrix[3], torch.tensor([0.0, 0, 0, 1], dtype=torch.float64), atol=1e-4):
        raise UserError(f"{where}: the last row of its transform_matrix is {matrix[3].tolist()}", mend)
    turn = matrix[:3, :3]
    if not torch.allclose(turn.T @ turn, torch.eye(3, dtype=torch.float64), atol=1e-2) or torch.det(turn) < 0:
        raise UserError(f"{where}: its transform_matrix holds no rotation (it scales, shears or mirrors)", mend)
    return matrix[:3].float()


def _picture(frame: Any, folder: Path, where: str) -> Any:
    """The opened picture of a frame; nothing outside the folder is read."""
    from PIL import Image

    name = frame.get("file_path") if isinstance(frame, dict) else None
    if not isinstance(name, str) or not name:
        raise UserError(f"{where} names no picture", 'give each frame a "file_path"')
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise UserError(f"{where}: its picture {name} lies outside the folder", "put the pictures into the folder")
    if not path.is_file() and (folder / f"{name}.png").is_file():
        path = (folder / f"{name}.png").resolve()
        if not path.is_relative_to(folder.resolve()):  # a link
            raise UserError(f"{where}: its picture {name}.png lies outside the folder", "put the pictures into the folder")
    if not path.is_file():
        raise UserError(f"{where}: there is no picture {name}", "check file_path; it is read relative to the folder")
    try:
        with Image.open(path) as image:
            image.load()
            return image.convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a readable picture: {error}", "restore or remove the file; it may be truncated") from None


def _number(found: dict[str, Any], key: str, path: Path) -> float | None:
    value = found.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise UserError(f"{path}: {key} is {value!r}", "give a number above 0")
    return float(value)


def _lens(found: dict[str, Any], width: int, height: int, path: Path) -> tuple[float, float, float, float]:
    """Focal lengths and principal point in pixels of pictures as they are stored."""
    for key, own in (("w", width), ("h", height)):
        told = _number(found, key, path)
        if told is not None and round(told) != own:
            raise UserError(f"{path}: {key} is {told:g}, and the pictures have {own}", "give the lens for pictures of the size they have")
    angle = _number(found, "camera_angle_x", path)
    focal = _number(found, "fl_x", path)
    if focal is None:
        if angle is None or angle >= math.pi:
            raise UserError(f"{path} says neither camera_angle_x nor fl_x", "give the angle of view (radians) or the focal length (pixels)")
        focal = 0.5 * width / math.tan(angle / 2)
    other = _number(found, "fl_y", path)
    across, down = _number(found, "cx", path), _number(found, "cy", path)
    return (
        focal,
        focal if other is None else other,
        width / 2 if across is None else across,
        height / 2 if down is None else down,
    )


def _read(path: Path, size: int | None, most: int | None, pick: slice | list[int] | None = None) -> tuple[Views, list[str]]:
    """The views of one file and the names of their frames."""
    import numpy
    from PIL import Image

    found = _file(path)
    frames = found["frames"] if pick is None else [found["frames"][number] for number in pick]  # type: ignore[union-attr]
    frames = frames[:most]
    names, poses, pictures = [], [], []
    for number, frame in enumerate(frames):
        where = f"{path}: frame {number}"
        if isinstance(frame, dict) and isinstance(frame.get("file_path"), str):
            where += f" ({frame['file_path']})"
        poses.append(_pose(frame, where))
        pictures.append(_picture(frame, path.parent, where))
        names.append(where.removeprefix(f"{path}: "))
        if pictures[-1].size != pictures[0].size:
            raise UserError(f"{where} is {pictures[-1].size} pixels, and others are {pictures[0].size}", "give all views one size")
    width, height = pictures[0].size
    fx, fy, cx, cy = _lens(found, width, height, path)
    scale = 1.0 if size is None else size / max(width, height)
    if size is not None:
        resized = (max(1, round(width * scale)), max(1, round(height * scale)))
        pictures = [image.resize(resized, Image.Resampling.BOX) for image in pictures]
    values = torch.stack([torch.from_numpy(numpy.array(image)) for image in pictures]).permute(0, 3, 1, 2).float() / 255
    opacity = values[:, 3:]
    count, across, down = len(poses), values.shape[3] / width, values.shape[2] / height
    cameras = Cameras(
        torch.stack(poses),
        torch.tensor([[fx * across, fy * down]]).expand(count, 2).contiguous(),
        torch.tensor([[cx * across, cy * down]]).expand(count, 2).contiguous(),
        values.shape[2],
        values.shape[3],
    )
    return Views(cameras, values[:, :3] * opacity, opacity), names


def _amount(name: str, value: float | None) -> int | None:
    if value is not None and (isinstance(value, float) or value < 1):
        raise UserError(f"data.{name} is {value}", "views are counted: give a whole number of at least 1")
    return None if value is None else int(value)


def read_posed(
    path: str,
    *,
    train: float | None = None,
    valid: float | None = None,
    test: float | None = None,
    size: int | None = None,
    bound: float = 1.5,
) -> ViewSet:
    """Posed pictures of a folder.

    Args:
        path: with transforms_train.json, transforms_val.json and transforms_test.json (NeRF's synthetic scenes), or transforms.json alone;
            then every eighth view is for testing, and `valid` takes views from the end of the rest.
        train, valid, test: how many views of each part at most.
        size: the longer side in pixels, if they are to be made smaller.
        bound: the scene lies in the cube [-bound, bound]^3 (NeRF's synthetic scenes: 1.5).

    Raises:
        UserError: missing, broken or outlying files, poses that are none, lenses with distortion, cameras that see nothing.
    """
    folder = user_path(path)
    if not folder.is_dir():
        raise UserError(f"there is no folder {path}", "name a folder with transforms.json and pictures")
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not bound > 0:
        raise UserError(f"data.args.bound is {bound!r}", "give half the side of the cube that holds the scene, a number above 0")
    wanted = {"train": _amount("train", train), "valid": _amount("valid", valid), "test": _amount("test", test)}
    parts: dict[str, tuple[Views, list[str]]] = {}
    if (folder / PARTS["train"]).is_file():
        for part, name in PARTS.items():
            if (part != "valid" or valid is not None) and (folder / name).is_file():
                parts[part] = _read(folder / name, size, wanted[part])
    elif (folder / WHOLE).is_file():
        parts = _split(folder / WHOLE, size, wanted)
    else:
        raise UserError(f"{folder} holds neither {WHOLE} nor {PARTS['train']}", "write the cameras as NeRF's transforms.json")
    for part in ("train", "test", *(["valid"] if valid is not None else [])):
        if part not in parts:
            raise UserError(f"{folder} has no {PARTS[part]}", f"add it, or give one {WHOLE} that holds all views")
    for part, (views, names) in parts.items():
        check_seen(f"posed:{path}", views, bound, names)
        if (views.cameras.height, views.cameras.width) != (parts["train"][0].cameras.height, parts["train"][0].cameras.width):
            raise UserError(f"the {part} views have another size than those for training", "give all views one size, or set data.size")
    held = parts["valid"][0] if "valid" in parts else None
    learned = parts["train"][0]
    return marked(ViewSet(f"posed:{path}", learned, parts["test"][0], held, float(bound), _around(learned.cameras)))


def _split(path: Path, size: int | None, wanted: dict[str, int | None]) -> dict[str, tuple[Views, list[str]]]:
    count = len(_file(path)["frames"])
    test = list(range(0, count, EVERY))
    rest = [number for number in range(count) if number % EVERY]
    held = rest[max(0, len(rest) - (wanted["valid"] or 0)) :]
    learned = rest[: len(rest) - len(held)]
    if not learned:
        raise UserError(f"{path} has {count} views, which leaves none to train on", "give more views, or a smaller data.valid")
    numbers = {"train": learned, "test": test, **({"valid": held} if held else {})}
    return {part: _read(path, size, wanted[part], pick) for part, pick in numbers.items()}


def _around(cameras: Cameras) -> bool:
    """Whether all cameras look to within a fifth of their distance of the origin, so that new ones may stand on their sphere."""
    ahead = -cameras.poses[:, :, 2]
    along = -(cameras.places * ahead).sum(-1)
    missed = (cameras.places + along[:, None] * ahead).norm(dim=-1)
    return bool((missed < 0.2 * cameras.places.norm(dim=-1)).all() and (along > 0).all())
