"""The contract of this wing: a method that makes a student of a trained network, and says how it recovers. Read it before writing one.

A method here is a `limbeck.knowledge.distiller.Distiller` with one thing more, `reshape`. All else (teachers, stages, losses, checkpoints,
measuring) is the knowledge wing's: this wing stands on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from limbeck.knowledge.distiller import Distiller, Models, Pair
from limbeck.knowledge.making import Making

if TYPE_CHECKING:
    from limbeck.data.data import Data

__all__ = ["Making", "Models", "Pair", "Shaper"]


@dataclass
class Shaper(Distiller):
    """Base of this wing's methods. A subclass is a dataclass with a `card`, a `reshape` and a `loss`.

    Class attributes:
        trains: False for methods that only make a network and train nothing.
        contract: settings with which the contract test is quick; its entry "recipe" holds keys of the recipe that it needs.

    What `reshape` gives must be a network that `limbeck.zoo.save_model` can write and `load_model` open again, at the latest after
    `finish`. What it decides by measuring or searching goes through `making.decided`, what it trains through `making.fit`: both are found
    again by a resumed run.
    """

    trains: ClassVar[bool] = True
    contract: ClassVar[Mapping[str, Any]] = {}

    def reshape(self, student: nn.Module, making: Making) -> nn.Module:
        """The network that is trained from here on; see `Distiller.reshape`.

        Raises:
            UserError: the network cannot be changed in this way (naming the layers), or the budget cannot be met.
        """
        raise NotImplementedError

    def finish(self, student: nn.Module, models: Models | None, data: Data | None) -> nn.Module:
        """The network that is kept. `models` and `data` are None for a network that was trained without the teacher."""
        return student
