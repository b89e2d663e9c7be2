"""Decoding: writing text with language models, plainly or by speculation, and what speed to expect from a draft.

`ids` are tokens `(B, P)`; prompts of causal models are padded on the left. Random numbers come from the generator that is given, else from
torch's global one.
"""

from limbeck.decoding.acceptance import acceptance, block_efficiency, greedy_agreement, speedup
from limbeck.decoding.generate import Generated, generate
from limbeck.decoding.measure import BlockFigures, SpeculativeReport, speculative_report
from limbeck.decoding.sampling import draw, sample
from limbeck.decoding.speculative import Speculated, accept, accept_greedy, speculative

__all__ = [
    "BlockFigures",
    "Generated",
    "Speculated",
    "SpeculativeReport",
    "accept",
    "accept_greedy",
    "acceptance",
    "block_efficiency",
    "draw",
    "generate",
    "greedy_agreement",
    "sample",
    "speculative",
    "speculative_report",
    "speedup",
]
