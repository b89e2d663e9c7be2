"""Who reads which tokens: a teacher may have a tokenizer of its own, a student reads the data's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from limbeck import recipe as schema
from limbeck.data import Data
from limbeck.data.text import check_tokenizers
from limbeck.errors import UserError
from limbeck.models import open_recipe_data
from limbeck.places import user_path
from limbeck.schema import Text as TextBlock


def in_own_tokens(spec: schema.Model, recipe: schema.Recipe, data: Data, given: Any = None) -> tuple[schema.Recipe, Data]:
    """The recipe and the data as a model sees them that reads other tokens: `text` of its block, or a tokenizer in its folder.

    Both are returned as they are where the model reads the data's own tokens.

    Raises:
        UserError: a `text` block for data that are no texts, or that were given as an object.
    """
    if data.text is None or data.kind not in ("causal-lm", "seq2seq"):
        if spec.text:
            raise UserError(f"a model's text block is for language models, and {data.name} is a {data.kind} task", "leave `text` out")
        return recipe, data
    changes: dict[str, Any] = dict(spec.text)
    if not changes and (foreign := _foreign(spec, data)) is not None:
        changes = {"tokenizer": foreign[0]}
    if not changes:
        return recipe, data
    if isinstance(given, Data):
        raise UserError(
            "a teacher with another tokenizer needs the texts themselves, and the data were given as an object",
            "name the data in the recipe (data.source)",
        )
    text = TextBlock.model_validate({**(recipe.text or TextBlock()).model_dump(), **changes})
    own = recipe.model_copy(update={"text": text})
    return own, open_recipe_data(recipe.data, given, own)


def _foreign(spec: schema.Model, data: Data) -> tuple[str, UserError] | None:
    """The reference of the tokenizer in a model's folder and how it differs from the data's; None where none is there or they agree."""
    from limbeck.data.text.tokens import load_tokenizer

    folder = user_path(spec.model.removeprefix("hf:").removeprefix("folder:"))
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        check_tokenizers(load_tokenizer(f"hf:{folder}", None, "eos"), data.text)  # type: ignore[arg-type]
    except UserError as error:
        return f"hf:{folder}", error
    return None


def check_tokens(networks: Mapping[str, nn.Module], data: Data) -> None:
    """Every network reads the tokens of the data.

    Raises:
        UserError: one has a tokenizer of its own; names where they differ and the methods that can do with it.
    """
    for network in networks.values():
        if (text := getattr(network, "limbeck_text", None)) is not None and data.text is not None:
            check_tokenizers(text, data.text)


def check_student_tokens(spec: schema.Model, data: Data) -> None:
    """A student with weights reads the tokens that it was trained on.

    Raises:
        UserError: its folder has a tokenizer that differs from the data's; tells how to bridge it.
    """
    if data.text is None or spec.args.get("config_only") or (foreign := _foreign(spec, data)) is None:
        return
    own, error = foreign
    raise UserError(
        f"the student reads other tokens than the data are made of: {error.message}",
        f"set text.tokenizer={own} and method=universal-logit, or start from random weights (args.config_only)",
    )
