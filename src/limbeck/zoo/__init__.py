"""Networks: small embedded ones, and the doors to transformers, timm and a user's own; saving and loading."""

from limbeck.zoo.build import NETWORKS, build, listing, parameters
from limbeck.zoo.files import load_model, read_note, save_model
from limbeck.zoo.language import Tokens
from limbeck.zoo.lora import adapt
from limbeck.zoo.network import Network

__all__ = ["NETWORKS", "Network", "Tokens", "adapt", "build", "listing", "load_model", "parameters", "read_note", "save_model"]
