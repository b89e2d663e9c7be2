"""A decoder's attention becomes Mamba blocks, by way of linear attention that has learned to imitate it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from limbeck.method import Card, setting
from limbeck.structure.attention_to_mamba import MambaConversion, train_maps
from limbeck.structure.shaper import Making
from limbeck.zoo.recurrent_decoder import RecurrentDecoder


@dataclass
class HedgeMamba(MambaConversion):
    """Stage 1: feature maps learn to make linear attention give what softmax attention gives. Stage 2: the same, embedded exactly in Mamba
    blocks, trains on the text.

    phi(x) = softmax([W x + b; -(W x + b)]) over features; stage 1: mean 1 - cos(o, o') layer by layer on the teacher's hidden states, phi
    alone learns; stage 2: see `limbeck.zoo.recurrent_decoder.MambaMixer`, cross-entropy, token embeddings frozen.
    """

    card = Card(
        id="hedge-mamba",
        title="Attention to Mamba: A Recipe for Cross-Architecture Distillation",
        year=2026,
        arxiv="2604.14191",
        wing="structure",
        family="conversion",
        claim="A Mamba made of Pythia-1B reaches a perplexity of 14.11 with 10B tokens; the Transformer has 13.86.",
        equation="1 - cos(o, o'), then CE with h_t = exp(dt A) h_{t-1} + dt phi(k) [v; 1]^T, y = gate * num / |den|",
        baseline="naive-mamba",
        certainty="paper-text",
        deviations=(
            "For decoders of the Llama kind; the paper's Pythia joins query, key and value in one matrix. A group of heads has one step dt "
            "and one decay for each feature, so that one channel of ones normalises a whole head. Rotary positions come before phi."
        ),
    )

    split: float = setting(
        0.1, "share of all steps that stage 1 gets; the stage's training block counts those of stage 2", above=0, at_most=0.9
    )
    maps_lr: float = setting(0.01, "learning rate of stage 1; Hedgehog's, recalled", above=0)

    def imitated(self, linear: RecurrentDecoder, reference: nn.Module, making: Making) -> RecurrentDecoder:
        """Stage 1."""
        return train_maps(linear, reference, making, self.split, self.maps_lr)
