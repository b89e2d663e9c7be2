"""What is read from a model: taps, anatomy, stored teacher outputs."""

from limbeck.signals.anatomy import Anatomy, anatomy
from limbeck.signals.inspection import Inspection, Pair, inspect
from limbeck.signals.outputs import call, first_tensor, logits_of, shape_of
from limbeck.signals.reader import Reader
from limbeck.signals.signals import Signals

__all__ = ["Anatomy", "Inspection", "Pair", "Reader", "Signals", "anatomy", "call", "first_tensor", "inspect", "logits_of", "shape_of"]
