"""A decoder's attention becomes Mamba blocks at once, and the text alone must mend it (a baseline)."""

from __future__ import annotations

from dataclasses import dataclass

from limbeck.method import Card
from limbeck.structure.attention_to_mamba import MambaConversion


@dataclass
class NaiveMamba(MambaConversion):
    """The same blocks as hedge-mamba with queries, keys, values and output of the teacher, feature maps as they begin, and all steps on the
    text.
    """

    card = Card(
        id="naive-mamba",
        title="Attention to Mamba: A Recipe for Cross-Architecture Distillation (its conversion without stage 1)",
        year=2026,
        arxiv="2604.14191",
        wing="structure",
        family="conversion",
        claim="None: this is what the two stages are compared with.",
        equation="CE with h_t = exp(dt A) h_{t-1} + dt phi(k) [v; 1]^T, y = gate * num / |den|",
        baseline="alone",
        certainty="paper-text",
    )
