"""Critics of generators: discriminator heads on a network's features, and random networks that embed pictures."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from limbeck.diffusion import Denoiser
from limbeck.sampling.few_step import Pair
from limbeck.zoo import build


def as_tokens(features: Tensor) -> Tensor:
    """`(B, D)`, `(B, C, H, W)` or `(B, L, D)` as tokens `(B, L, D)`."""
    if features.ndim == 2:
        return features[:, None]
    return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features


class Heads(nn.Module):
    """A small network on the tokens of each stage; its logits `(B, heads * tokens)` are averaged by the adversarial losses.

    With classes the logit has a projection term <h, e_c> / sqrt(hidden) (Miyato & Koyama 2018, arXiv:1802.05637).

    Args:
        widths: D of each stage. classes: 0 for none; the null label has a row of its own. hidden: width. spectral: spectral normalisation.
    """

    def __init__(self, widths: Sequence[int], classes: int = 0, hidden: int = 64, spectral: bool = False) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm if spectral else (lambda layer: layer)
        self.bodies = nn.ModuleList(nn.Sequential(norm(nn.Linear(width, hidden)), nn.LeakyReLU(0.2)) for width in widths)
        self.last = nn.ModuleList(nn.Linear(hidden, 1) for _ in widths)
        self.classes = nn.ModuleList(nn.Embedding(classes + 1, hidden) for _ in widths) if classes else None

    def forward(self, features: Sequence[Tensor], label: Tensor | None = None) -> Tensor:
        """Logits of features, one tensor a stage."""
        said = []
        for number, feature in enumerate(features):
            hidden = self.bodies[number](as_tokens(feature))
            logit = self.last[number](hidden)[..., 0]
            if self.classes is not None and label is not None:
                logit = logit + (hidden * self.classes[number](label)[:, None]).sum(-1) / hidden.shape[-1] ** 0.5
            said.append(logit)
        return torch.cat(said, 1)


def widths_of(denoiser: Denoiser, pair: Pair, paths: Sequence[str] | None = None) -> list[int]:
    """D of the features that a denoiser gives at its stages, found by a dry pass."""
    x = torch.zeros(2, *pair.pictures.shape, device=pair.device)
    t = denoiser.process.at(torch.full((2,), 0.5, device=pair.device))
    label = torch.zeros(2, dtype=torch.long, device=pair.device) if denoiser.classes else None
    with torch.no_grad():
        return [as_tokens(f).shape[-1] for f in denoiser.features(x, t, label, paths)[0]]


def middle_of(denoiser: Denoiser) -> tuple[str, ...]:
    """The bottleneck stage of a network: what it calls `middle`, else the one in the middle of its stages."""
    named = getattr(denoiser.network, "middle", None)
    taps = denoiser.taps()
    return (named,) if named else (taps[len(taps) // 2],)


class RandomEmbeddings:
    """Embeddings of pictures by networks with random weights, drawn anew at every call (a fixed one would be overfitted).

    Args:
        shape: `(C, H, W)`. kinds: networks to draw from. dim: width of the embedding.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device, kinds: Sequence[str] = ("convnet", "mlp"), dim: int = 64) -> None:
        self.networks = []
        sizes = {"convnet": {"width": 32, "depth": 2}, "mlp": {"widths": [128]}}
        for kind in kinds:
            network = build(kind, input_shape=shape, classes=dim, **sizes[kind])
            self.networks.append(network.to(device).requires_grad_(False))

    def draw(self) -> nn.Module:
        """One of the networks with fresh weights, from torch's global generator."""
        # a copy: the graph of an earlier draw may still need the weights that it was made with
        network = copy.deepcopy(self.networks[int(torch.randint(len(self.networks), (1,)))])
        with torch.no_grad():
            for module in network.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        return network
