"""Encoders of the BERT family made smaller by slices: leading layers, heads, channels and feed-forward neurons."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.zoo.cut import mark_cut
from limbeck.zoo.quantised.origin import origin_of

_LAYER = re.compile(r"encoder\.layer\.(\d+)\.")
_ROWS = ("intermediate.dense.weight", "intermediate.dense.bias")


@dataclass(frozen=True, order=True)
class Shape:
    """The sizes of an encoder.

    Attributes:
        layers: L.
        heads: A of each layer.
        hidden: H, width of the states; a multiple of the number of heads that a whole layer has.
        inner: F, width inside the feed-forward layers.
    """

    layers: int
    heads: int
    hidden: int
    inner: int

    def as_dict(self) -> dict[str, int]:
        """Plain data."""
        return asdict(self)


def bert_of(network: nn.Module) -> nn.Module:
    """The encoder inside a network: the module whose children are `embeddings` and `encoder.layer`.

    Raises:
        UserError: there is none.
    """
    for module in network.modules():
        if hasattr(module, "embeddings") and isinstance(getattr(getattr(module, "encoder", None), "layer", None), nn.ModuleList):
            return module
    raise UserError(f"{type(network).__name__} is no encoder of the BERT family", "use bert, or hf:<folder> of such a model")


def shape_of(network: nn.Module) -> Shape:
    """The sizes that a network has."""
    layers = bert_of(network).encoder.layer
    own = layers[0].attention.self
    return Shape(len(layers), own.num_attention_heads, own.query.in_features, layers[0].intermediate.dense.out_features)


def head_size(network: nn.Module) -> int:
    """Channels of one head."""
    return int(bert_of(network).encoder.layer[0].attention.self.attention_head_size)


def _heads(tensor: Tensor, axis: int, whole: tuple[int, int], kept: tuple[int, int]) -> Tensor:
    """The leading heads and of each the leading channels; `whole` and `kept` are (heads, channels)."""
    split = tensor.unflatten(axis, whole)
    return split.narrow(axis, 0, kept[0]).narrow(axis + 1, 0, kept[1]).flatten(axis, axis + 1)


def sliced(name: str, tensor: Tensor, whole: tuple[int, int], full: Shape, shape: Shape) -> Tensor | None:
    """The slice of one parameter of an encoder that a smaller one has; None for layers that are left out. Gradients pass through.

    Args:
        name: in the whole network's `named_parameters`.
        whole: (heads, channels of a head) of the whole network.
        full, shape: sizes of the whole and of the smaller network.

    Raises:
        UserError: a parameter that no rule covers.
    """
    layer = _LAYER.search(name)
    if layer is not None and int(layer[1]) >= shape.layers:
        return None
    h, kept = shape.hidden, (shape.heads, shape.hidden // full.heads)
    if re.search(r"attention\.self\.(query|key|value)\.", name):
        rows = _heads(tensor, 0, whole, kept)
        return rows if tensor.ndim == 1 else rows[:, :h]
    if name.endswith("attention.output.dense.weight"):
        return _heads(tensor[:h], 1, whole, kept)
    if name.endswith(_ROWS):
        return tensor[: shape.inner] if tensor.ndim == 1 else tensor[: shape.inner, :h]
    if layer is not None and name.endswith("output.dense.weight"):
        return tensor[:h, : shape.inner]
    if name.endswith("pooler.dense.weight"):
        return tensor[:h, :h]
    if re.search(r"embeddings\.\w+_embeddings\.weight$", name):
        return tensor[:, :h]
    if re.search(r"(LayerNorm\.(weight|bias)|dense\.bias)$", name):
        return tensor[:h]
    if name.endswith("classifier.weight"):
        return tensor[:, :h]
    if name.endswith("classifier.bias"):
        return tensor
    raise UserError(f"no rule says how {name} of shape {tuple(tensor.shape)} is sliced", "use an encoder of the BERT family")


def slices(network: nn.Module, full: Shape, shape: Shape) -> dict[str, Tensor]:
    """Every parameter of the smaller network as a slice of the whole network's, by name."""
    whole = (full.heads, head_size(network))
    found = {name: sliced(name, tensor, whole, full, shape) for name, tensor in network.named_parameters()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def check_shape(full: Shape, shape: Shape) -> None:
    """Refuse sizes that are no slice.

    Raises:
        UserError: larger than the whole, or a width that the heads of a whole layer do not divide.
    """
    for name, most in full.as_dict().items():
        if not 1 <= getattr(shape, name) <= most:
            raise UserError(f"{name} is {getattr(shape, name)}, and the whole encoder has {most}", f"give 1 to {most}")
    if shape.hidden % full.heads:
        raise UserError(f"a width of {shape.hidden} is not a multiple of the {full.heads} heads of a whole layer", "round it to one")


def extract(network: nn.Module, shape: Shape) -> nn.Module:
    """A stand-alone encoder of that shape with the leading slices of a network's weights, and the same outputs as the slices have.

    With all heads it is a plain model of transformers with a changed configuration; with fewer, no configuration describes it (their
    heads would be wider), and it is saved as a cut network.

    Raises:
        UserError: sizes that are no slice.
    """
    full = shape_of(network)
    check_shape(full, shape)
    plain = _resized(network, full, Shape(shape.layers, full.heads, shape.hidden, shape.inner))
    if shape.heads == full.heads:
        return plain
    plain.limbeck_config = origin_of(plain)
    small = _resized(plain, shape_of(plain), shape)
    del small.limbeck_config
    return mark_cut(plain, small)


def _resized(network: nn.Module, full: Shape, shape: Shape) -> nn.Module:
    """A copy with sliced parameters; attributes that tell sizes follow, and the configuration where it can."""
    weights = slices(network, full, shape)
    made = copy.deepcopy(network)
    encoder = bert_of(made)
    del encoder.encoder.layer[shape.layers :]
    for name, tensor in weights.items():
        path, _, attribute = name.rpartition(".")
        owner = made.get_submodule(path)
        learns = getattr(owner, attribute).requires_grad
        setattr(owner, attribute, nn.Parameter(tensor.detach().clone().contiguous(), requires_grad=learns))
    for module in made.modules():
        _tell_sizes(module)
    for layer in encoder.encoder.layer:
        own = layer.attention.self
        own.num_attention_heads = shape.heads
        own.attention_head_size = shape.hidden // full.heads
        own.all_head_size = shape.heads * own.attention_head_size
        own.scaling = own.attention_head_size**-0.5
    if shape.heads == full.heads:
        for config in {id(m.config): m.config for m in made.modules() if hasattr(m, "config")}.values():
            config.num_hidden_layers, config.hidden_size, config.intermediate_size = shape.layers, shape.hidden, shape.inner
    return made


def _tell_sizes(module: nn.Module) -> None:
    """The attributes of a layer that repeat its weight's shape."""
    weight: Any = module._parameters.get("weight")
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(weight.shape)


def skeleton(network: nn.Module, shape: Shape) -> nn.Module:
    """An encoder of that shape whose parameters hold no numbers: to be called with slices (`torch.func.functional_call`)."""
    made = extract(network, shape)
    for module in made.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    return made


def encoder_parameters(shape: Shape, whole_heads: int, rows: int) -> int:
    """Parameters of an encoder: embeddings, their norm and the layers; no pooling layer, no head.

        rows * H + 2 H + L (3 H w + 3 w + w H + H + 2 H F + F + H + 4 H),   w = A H / A_whole

    Args:
        shape: L, A, H, F.
        whole_heads: A_whole: heads of the layer that it was cut from; a head has H / A_whole channels.
        rows: of the embeddings together: tokens, positions and types.

    >>> encoder_parameters(Shape(12, 12, 768, 3072), 12, 30522 + 512 + 2)  # BERT-base without its pooling layer
    108891648
    """
    h, f = shape.hidden, shape.inner
    w = shape.heads * h // whole_heads
    return rows * h + 2 * h + shape.layers * (3 * h * w + 3 * w + w * h + h + 2 * h * f + f + h + 4 * h)


def from_dict(entries: Mapping[str, int]) -> Shape:
    """Back from `Shape.as_dict`."""
    return Shape(**entries)
