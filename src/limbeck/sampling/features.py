"""The classifier in whose features generated pictures are measured; `limbeck.features` has it for every wing."""

from limbeck.features import Features, feature_network

__all__ = ["Features", "feature_network"]
