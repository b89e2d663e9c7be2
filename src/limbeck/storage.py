"""Files that are whole or absent: atomic writes, checksums, and tensors in safetensors only (never pickle)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 20


def sync_folder(folder: Path) -> None:
    """Wait until what was renamed in a folder is on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or all of the new one, also after a power cut.

    The bytes go to a temporary name in the same folder, are synced, then renamed over `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None  # a full disk names no file
        raise
    sync_folder(path.parent)


def sweep(folder: Path, below: bool = True) -> None:
    """Remove the temporary files that killed writers left in a folder (and those below it); whoever calls it is the only writer there."""
    for path in folder.rglob(".*.tmp") if below else folder.glob(".*.tmp"):
        if path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` for UTF-8 text. Bytes of a file name that are no text are written as escapes, which JSON reads back."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, value: Any) -> None:
    """`write_bytes` for JSON, indented, keys in the order given. NaN is refused: strict readers cannot parse it."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path, hint: str = "restore or remake it") -> Any:
    """The value of a JSON file.

    Args:
        path: the file.
        hint: how to mend it.

    Raises:
        UserError: it is missing, cannot be read, is no UTF-8, no JSON, or nested too deeply to be anybody's.
    """
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", hint) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {error}", hint) from None


def sha256(content: bytes | Path) -> str:
    """Hexadecimal SHA-256 of bytes, or of a file read in blocks."""
    digest = hashlib.sha256()
    if isinstance(content, Path):
        with content.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    else:
        digest.update(content)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """A short stable digest (16 hex digits) of anything that JSON can hold; keys are sorted first."""
    return sha256(json.dumps(value, sort_keys=True, default=str).encode())[:16]


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A short digest (16 hex digits) of names, types, shapes and bytes of tensors; the order does not matter."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write tensors to one safetensors file, atomically; returns the file's SHA-256."""
    from safetensors.torch import save

    content = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata=dict(metadata or {}))
    write_bytes(path, content)
    return sha256(content)


def load_tensors(path: str | Path, expected_sha256: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: the file is missing, is no safetensors file (a pickle is named as such and never opened), or its
            checksum is not the expected one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file at {path}", "check the path; weights are read from .safetensors files")
    content = path.read_bytes()
    # safetensors begins with the length of its JSON header in 8 bytes, and a length of 640 to 1408 looks like a pickle's first two
    pickled = content[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") and content[2:9] != bytes(6) + b"{"
    if pickled or content[:4] == b"PK\x03\x04":
        raise UserError(
            f"{path} is a pickle, not a safetensors file",
            "pickles can run code when opened, so they are never read; convert it with safetensors.torch.save_file",
        )
    if expected_sha256 is not None and sha256(content) != expected_sha256:
        raise UserError(f"{path} is torn or was altered: its checksum differs from the recorded one", "restore or remake it")
    try:
        return load(content)
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError, OverflowError) as error:  # the last five: of an odd header
        raise UserError(f"{path} is not a readable safetensors file: {error}", "restore or remake it") from None
