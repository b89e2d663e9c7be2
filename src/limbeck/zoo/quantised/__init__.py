"""Quantised networks: fake-quantised ones that train, and packed ones that are saved.

`scheme.py` says what can be chosen, `grid.py` holds the mathematics, `fake.py` the networks that train, `packed.py` the packed ones,
`packing.py` codes in bytes, `size.py` what they take.
"""

from limbeck.zoo.quantised.fake import ENDS, FakeQuantised, clip_ranges, fake_of, fakes, full_weight, quantisable, quantise
from limbeck.zoo.quantised.grid import best_clip, fake, fake_activations
from limbeck.zoo.quantised.origin import SENTENCE, TRANSFORMERS, origin_of, rebuild_sentence, rebuild_transformers
from limbeck.zoo.quantised.packed import REFERENCE, CodedWeight, code_like, coded_layers, fold, is_coded, rebuild_quantised, unfold
from limbeck.zoo.quantised.packing import pack, packed_bytes, unpack
from limbeck.zoo.quantised.scheme import BACKWARDS, ROUNDINGS, Scheme
from limbeck.zoo.quantised.size import Size, compute_bits, describe, huffman_length, share_levels, size_of

REBUILDERS = {REFERENCE: rebuild_quantised, TRANSFORMERS: rebuild_transformers, SENTENCE: rebuild_sentence}
"""How `limbeck.zoo.build` makes the networks of this package's references."""

__all__ = [
    "BACKWARDS",
    "ENDS",
    "REBUILDERS",
    "ROUNDINGS",
    "CodedWeight",
    "FakeQuantised",
    "Scheme",
    "Size",
    "best_clip",
    "clip_ranges",
    "code_like",
    "coded_layers",
    "compute_bits",
    "describe",
    "fake",
    "fake_activations",
    "fake_of",
    "fakes",
    "fold",
    "full_weight",
    "huffman_length",
    "is_coded",
    "origin_of",
    "pack",
    "packed_bytes",
    "quantisable",
    "quantise",
    "rebuild_quantised",
    "share_levels",
    "size_of",
    "unfold",
    "unpack",
]
