"""Data: embedded real sets, files, Hugging Face data sets and Python objects, as splits that give whole batches."""

from limbeck.data.augment import Augment
from limbeck.data.batch import UNLABELLED, Batch, move
from limbeck.data.batches import Batches
from limbeck.data.data import Data
from limbeck.data.embedded import listing
from limbeck.data.open import open_data
from limbeck.data.split import DatasetSplit, LoaderSplit, Split, TensorSplit, as_batch

__all__ = [
    "UNLABELLED",
    "Augment",
    "Batch",
    "Batches",
    "Data",
    "DatasetSplit",
    "LoaderSplit",
    "Split",
    "TensorSplit",
    "as_batch",
    "listing",
    "move",
    "open_data",
]
