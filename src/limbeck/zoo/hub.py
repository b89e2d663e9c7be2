"""Classifiers of the transformers library, from a local folder or the hub, weights in safetensors only."""

from __future__ import annotations

from typing import Any

from torch import nn

from limbeck.errors import UserError
from limbeck.zoo.language import library, open_config, quiet


def _class_of(config: Any) -> Any:
    """The transformers class that a configuration names, or the classifier registered for its model type."""
    transformers = library()
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for auto in (transformers.AutoModelForImageClassification, transformers.AutoModelForSequenceClassification):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise UserError(f"transformers has no classifier for model type {config.model_type!r}", "give a model with a classification head")


def build_hub(name: str, classes: int | None = None, config_only: bool = False, new_head: bool = False, **overrides: Any) -> nn.Module:
    """A transformers model by folder or hub id.

    Args:
        name: a folder with config.json (and weights), or an id of the hub (needs the network, or a filled cache).
        classes: number of classes of the data; None takes the model's own.
        config_only: random weights, with as many classes as the data.
        new_head: pretrained weights, but a fresh head when the number of classes differs.
        overrides: entries of the configuration to change.

    Raises:
        UserError: transformers is missing, the folder is none of its models, weights are pickled or damaged, the number of
            classes differs, or an override that the configuration does not have.
    """
    place, config = open_config(name, overrides)
    kind = _class_of(config)
    own = config.num_labels
    if classes is not None and own != classes:
        if not config_only and not new_head:
            raise UserError(f"{name} has {own} classes, but the data has {classes}", "set new_head: true to train a fresh head")
        config.num_labels = classes
    if config_only:
        return kind(config)
    try:
        with quiet():
            return kind.from_pretrained(
                place, config=config, use_safetensors=True, ignore_mismatched_sizes=new_head, trust_remote_code=False
            )
    except Exception as error:
        hint = "weights are read from safetensors only; config_only: true starts from random ones"
        raise UserError(f"the weights of {name} cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}", hint) from None
