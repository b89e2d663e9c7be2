"""Removing channels, attention heads and whole layers from a network, which stays a plain, smaller network of the same class.

`find_groups` says what can go (and why the rest cannot), scores say what matters least, thresholds choose, `removed` cuts.
"""

from limbeck.structure.pruning.groups import Group, Slice, removed
from limbeck.structure.pruning.inherit import fold_means, mean_inputs
from limbeck.structure.pruning.layers import block_influence, without_layers
from limbeck.structure.pruning.scores import magnitude, scales, taylor
from limbeck.structure.pruning.search import smallest_ratio
from limbeck.structure.pruning.sparse import SparseTraining
from limbeck.structure.pruning.thresholds import floors, global_threshold, group_thresholds
from limbeck.structure.pruning.tracing import Groups, find_groups

__all__ = [
    "Group",
    "Groups",
    "Slice",
    "SparseTraining",
    "block_influence",
    "find_groups",
    "floors",
    "fold_means",
    "global_threshold",
    "group_thresholds",
    "magnitude",
    "mean_inputs",
    "removed",
    "scales",
    "smallest_ratio",
    "taylor",
    "without_layers",
]
