"""Texts: embedded sources, files and Hugging Face data sets, as tokens that are written once and mapped from disk."""

from limbeck.data.text.notion import Text
from limbeck.data.text.open import is_text, open_text
from limbeck.data.text.pairs import PairSplit
from limbeck.data.text.ragged import Ragged
from limbeck.data.text.retrieval import RetrievalSplit
from limbeck.data.text.sources import EMBEDDED, FOREIGN, listing
from limbeck.data.text.tokens import check_tokenizers, mark_of
from limbeck.data.text.windows import WindowSplit

__all__ = [
    "EMBEDDED",
    "FOREIGN",
    "PairSplit",
    "Ragged",
    "RetrievalSplit",
    "Text",
    "WindowSplit",
    "check_tokenizers",
    "is_text",
    "listing",
    "mark_of",
    "open_text",
]
