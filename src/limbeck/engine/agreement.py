"""What several processes must decide alike though each has its own clock and its own signals: to stop, and to save."""

from __future__ import annotations

import torch

from limbeck import processes


class Agreement:
    """Wishes that any process may have and that all then follow at the same step.

    A wish travels while the next step is computed, so nobody waits for it: it is granted one step later. Alone it is granted at once.
    """

    def __init__(self) -> None:
        self._alone = processes.world() == 1
        self._under_way: tuple[torch.Tensor, object] | None = None

    def __call__(self, stop: bool, save: bool) -> tuple[bool, bool]:
        """Say what this process wishes after a step; returns (stop, save) as all of them decided."""
        if self._alone:
            return stop, save
        decided = (False, False)
        if self._under_way is not None:
            wishes, work = self._under_way
            work.wait()  # type: ignore[attr-defined]
            decided = bool(wishes[0]), bool(wishes[1])
        wishes = torch.tensor([stop, save and not decided[1]], dtype=torch.int32)  # what is granted now is not wished for once more
        self._under_way = wishes, processes.wish(wishes)
        return decided

    def close(self) -> bool:
        """Take in the wishes of the last step; whether somebody wished to stop (a save is made there anyway)."""
        if self._under_way is None:
            return False
        wishes, work = self._under_way
        work.wait()  # type: ignore[attr-defined]
        self._under_way = None
        return bool(wishes[0])
