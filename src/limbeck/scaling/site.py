"""What every worker must find on its machine: the same versions, the same folders, the same number of threads."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from limbeck import __version__, places
from limbeck.errors import UserError


def machine() -> str:
    """The name of this machine."""
    return socket.gethostname()


def _versions() -> dict[str, str]:
    import torch

    return {"limbeck": __version__, "torch": torch.__version__}


@dataclass(frozen=True)
class Site:
    """Where the command was typed, as workers need it. Plain data: it travels.

    Attributes:
        shared: the folder that everybody writes to.
        token: in the names of this command's own files in it; see `own`.
        here: the working folder, from which a recipe's relative paths are read.
        imports: whether modules in it can be imported (`python:module:name`), as under `python -m limbeck`.
        environment: the variables `LIMBECK_...`.
        versions: of limbeck and torch.
        threads: with which everybody computes, because the last bits of a sum depend on it.
    """

    shared: str
    token: str
    here: str
    imports: bool
    environment: dict[str, str]
    versions: dict[str, str]
    threads: int

    def own(self, name: str) -> Path:
        """The path of a passing file of this command in the shared folder; it is removed when the command ends."""
        return Path(self.shared) / f".{self.token}.{name}.tmp"

    def enter(self) -> None:
        """Make this process a worker of that command.

        Raises:
            UserError: other versions, or a folder that this machine does not share with the others.
        """
        import torch

        for name, version in _versions().items():
            if version != self.versions[name]:
                raise UserError(
                    f"{machine()} has {name} {version}, the command runs with {self.versions[name]}",
                    "install the same versions on all machines",
                )
        if not self.own("mark").is_file():
            raise UserError(
                f"{machine()} does not see what was written to {self.shared}", "name a folder with --out that all machines share"
            )
        try:
            os.chdir(self.here)
        except OSError as error:
            raise UserError(
                f"the folder {self.here}, from which paths are read, cannot be entered on {machine()}: {error.strerror}",
                "run the command in a folder that all machines share",
            ) from None
        if self.imports and self.here not in sys.path:
            sys.path.insert(0, self.here)
        os.environ.update(self.environment)
        torch.set_num_threads(self.threads)


@contextmanager
def shared_site(folder: Path, threads: int) -> Iterator[Site]:
    """A site of this process, with its mark in `folder` for as long as it is open; everything of its own is removed at the end.

    Args:
        folder: that exists, and that all workers share.
        threads: see `Site`.
    """
    environment = {name: value for name, value in os.environ.items() if name.startswith("LIMBECK_")}
    environment["LIMBECK_CACHE"] = str(places.cache_folder().absolute())
    here = str(Path.cwd())
    imports = any(os.path.abspath(path) == here for path in sys.path)
    site = Site(str(folder.absolute()), secrets.token_hex(8), here, imports, environment, _versions(), threads)
    site.own("mark").touch()
    try:
        yield site
    finally:
        for left in folder.glob(f".*{site.token}*"):
            left.unlink(missing_ok=True)
