"""Group channel pruning with a threshold for each kind of layers, and attention maps of the unpruned network."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from limbeck.method import Card
from limbeck.structure import pruning
from limbeck.structure.pruning import Groups
from limbeck.structure.pruning.thresholds import Drops
from limbeck.structure.shaper import Making
from limbeck.structure.slimming import Slimming, feature_scales


@dataclass
class GCPSAD(Slimming):
    """Sparse training of batch-norm scales, then a cut with one threshold for each kind of layers, so that no kind is wiped out.

    A kind is the size of the feature maps and whether a shortcut ties the layers: keep channel c of a layer of kind k if
    |gamma_c| > t_k = quantile(ratio) of the scales of kind k; tied layers share one mask, the union of theirs. Every layer keeps `floor` of
    its channels. Recovery: labels, and attention maps of the teacher (see `Slimming`).
    """

    card = Card(
        id="gcp-sad",
        title="Group channel pruning and spatial attention distilling for object detection",
        year=2022,
        wing="structure",
        family="pruning",
        claim="A YOLOv4 on PASCAL VOC with 64.7 % fewer parameters and 34.9 % fewer operations.",
        equation="keep c if |gamma_c| > t_kind; CE + (beta / 2) sum_j mean (Q_t - Q_s)^2",
        baseline="global-pruning",
        certainty="inferred-from-abstract",
        deviations=(
            "For classification here; the paper's task is detection. Kinds of layers are feature sizes and shortcuts, found by a dry pass. "
            "The map loss is the mean of squares (the one for which attention transfer's weight of 1000 is meant), not the plain length; "
            "its weight is 10 here. The fewest channels of a layer are a share, not 8."
        ),
    )

    def choose(self, student: nn.Module, groups: Groups, scores: dict[str, Tensor], ratio: float, making: Making) -> Drops:
        """A threshold for each kind of layers."""
        if not hasattr(self, "_kinds") or self._kinds[0] is not student:
            sizes = feature_scales(student, groups, making.example.inputs)
            self._kinds = (student, {group.name: (sizes[group.name], group.tied) for group in groups})
        return pruning.group_thresholds(scores, ratio, pruning.floors(scores, self.floor), self._kinds[1])
