"""Losses: pure functions of tensors. They know no model, no method and no configuration.

The rules they all keep:

- No loss detaches. A teacher's signals carry no gradient already; whoever wants to stop another gradient writes `.detach()` at the call.
- The student comes first, the teacher second.
- float16 and bfloat16 are computed and returned in float32; float64 stays float64.
- The last axis holds classes or features, the axes before it are rows. `mask` (true = scored) and `weight` have one entry a row.
  The mean is over scored rows: sum of weight * value / number of scored rows. No scored row gives zero, still in the graph.
- What stands in a hidden row (padding, NaN) reaches neither value nor gradient of a loss that takes a `mask`.
- Nothing waits for the device: no `.item()`.
"""

from limbeck.losses.contrastive import info_nce, supervised_contrastive
from limbeck.losses.cross_entropy import binary_cross_entropy, cross_entropy, soft_cross_entropy, target_enhanced_cross_entropy
from limbeck.losses.divergences import (
    alpha_divergence,
    bernoulli_kl,
    decoupled_kd,
    entropy,
    forward_kl,
    jeffreys,
    jensen_shannon,
    kl,
    reverse_kl,
    skew_kl,
    split_divergence,
    total_variation,
)
from limbeck.losses.features import (
    attention_map,
    attention_transfer,
    cosine_distance,
    l1,
    mse,
    norm_and_direction,
    normalized_l1,
    normalized_mse,
)
from limbeck.losses.generation import (
    critic_loss,
    field_loss,
    fooling_loss,
    gaussian_mmd,
    gradient_penalty,
    matching_direction,
    pixel_distance,
    pseudo_huber,
    score_identity,
)
from limbeck.losses.inversion import image_variation, statistics_distance
from limbeck.losses.kernel import barlow_twins, kernel_ridge_prediction
from limbeck.losses.matching import characteristic_discrepancy, gradient_distance, mean_distance
from limbeck.losses.ranking import list_mle, plackett_luce
from limbeck.losses.relational import (
    channel_correlation,
    cka,
    correlation,
    pearson,
    rkd_angle,
    rkd_distance,
    self_relation,
    similarity_preserving,
)
from limbeck.losses.score import (
    annealed,
    entropic_prediction,
    guided_prediction,
    later_place,
    least_norm,
    level_weight,
    score_surrogate,
)
from limbeck.losses.transport import batch_transport, sinkhorn, sinkhorn_distance

__all__ = [
    "alpha_divergence",
    "annealed",
    "attention_map",
    "attention_transfer",
    "barlow_twins",
    "batch_transport",
    "bernoulli_kl",
    "binary_cross_entropy",
    "channel_correlation",
    "characteristic_discrepancy",
    "cka",
    "correlation",
    "cosine_distance",
    "critic_loss",
    "cross_entropy",
    "decoupled_kd",
    "entropic_prediction",
    "entropy",
    "field_loss",
    "fooling_loss",
    "forward_kl",
    "gaussian_mmd",
    "gradient_distance",
    "gradient_penalty",
    "guided_prediction",
    "image_variation",
    "info_nce",
    "jeffreys",
    "jensen_shannon",
    "kernel_ridge_prediction",
    "kl",
    "l1",
    "later_place",
    "least_norm",
    "level_weight",
    "list_mle",
    "matching_direction",
    "mean_distance",
    "mse",
    "norm_and_direction",
    "normalized_l1",
    "normalized_mse",
    "pearson",
    "pixel_distance",
    "plackett_luce",
    "pseudo_huber",
    "reverse_kl",
    "rkd_angle",
    "rkd_distance",
    "score_identity",
    "score_surrogate",
    "self_relation",
    "similarity_preserving",
    "sinkhorn",
    "sinkhorn_distance",
    "skew_kl",
    "soft_cross_entropy",
    "split_divergence",
    "statistics_distance",
    "supervised_contrastive",
    "target_enhanced_cross_entropy",
    "total_variation",
]
