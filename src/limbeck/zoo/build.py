"""From a reference to a network: the embedded ones, transformers, timm, a Python factory, a saved folder."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from limbeck.data.arguments import check_arguments
from limbeck.errors import MISFITS, UserError, nearest, unknown
from limbeck.zoo.cnn import CNN
from limbeck.zoo.convnet import ConvNet
from limbeck.zoo.cut import REFERENCE as CUT
from limbeck.zoo.cut import rebuild_cut
from limbeck.zoo.denoising import DenoisingMLP
from limbeck.zoo.dit import DiT
from limbeck.zoo.dual_head import DualHeaded
from limbeck.zoo.efficientnet import EfficientNetLite0
from limbeck.zoo.fields import FIELDS
from limbeck.zoo.graph import GCN, GIN, SAGE
from limbeck.zoo.guided import Guided
from limbeck.zoo.language import LANGUAGE, Tokens, build_language, open_language
from limbeck.zoo.language import listing as language_listing
from limbeck.zoo.linear import Linear
from limbeck.zoo.mixer import Mixer
from limbeck.zoo.mlp import MLP
from limbeck.zoo.quantised import REBUILDERS as QUANTISED
from limbeck.zoo.recurrent_decoder import REFERENCE as RECURRENT
from limbeck.zoo.recurrent_decoder import rebuild_recurrent
from limbeck.zoo.renderers import RENDERERS
from limbeck.zoo.resnet import ResNet
from limbeck.zoo.rotated_decoder import REFERENCE as ROTATED
from limbeck.zoo.rotated_decoder import rebuild_rotated
from limbeck.zoo.sentence import SentenceEncoder, minilm
from limbeck.zoo.unet import UNet
from limbeck.zoo.vit import ViT

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "linear": Linear,
    "mlp": MLP,
    "cnn": CNN,
    "convnet": ConvNet,
    "resnet": ResNet,
    "vit": ViT,
    "mixer": Mixer,
    "efficientnet-lite0": EfficientNetLite0,
    "dual-head": DualHeaded,
    "gin": GIN,
    "gcn": GCN,
    "sage": SAGE,
    "denoising-mlp": DenoisingMLP,
    "unet": UNet,
    "dit": DiT,
    "guided": Guided,
    **FIELDS,
}
"""Embedded networks by name; those with `denoises = True` read `(x, level, label)`, see `zoo.denoising`, and fields read places and
directions, see `zoo.fields`; both are no classifiers."""

_KINDS = ("zoo", "hf", "timm", "diffusers", "python", "folder")


def parameters(model: nn.Module) -> int:
    """How many weights the model has; shared ones count once.

    Layers that hold weights as codes say how many in an attribute `coded_weights`.
    """
    return sum(p.numel() for p in model.parameters()) + sum(getattr(module, "coded_weights", 0) for module in model.modules())


def listing() -> list[dict[str, Any]]:
    """One row for each embedded network: name, what it is, its arguments with defaults."""
    import inspect

    rows = []
    for name, maker in NETWORKS.items():
        arguments = {n: p.default for n, p in inspect.signature(maker).parameters.items() if n not in ("input_shape", "classes")}
        rows.append({"name": name, "about": (maker.__doc__ or "").strip().splitlines()[0], "arguments": arguments})
    return rows + language_listing()


DEEPEST = 4096
"""Layers of an embedded network; with more it would be built until the memory is full."""


def _embedded(name: str, args: dict[str, Any]) -> nn.Module:
    short = re.fullmatch(r"resnet(\d+)(?:x(\d+))?", name)
    if short:
        name, args = "resnet", {"depth": int(short[1]), "width": int(short[2] or 1), **args}
    if name in RENDERERS:
        taken = {**args} if name != "path-vae" else {key: value for key, value in args.items() if key not in ("input_shape", "classes")}
        check_arguments(RENDERERS[name], taken, f"{name!r}")
        return RENDERERS[name](**taken)
    if name not in NETWORKS:
        raise unknown("network", name, [*NETWORKS, *RENDERERS, *LANGUAGE])
    if isinstance(args.get("depth"), int) and args["depth"] > DEEPEST:
        raise UserError(f"network {name!r} cannot be {args['depth']:.3g} layers deep", f"give a depth of at most {DEEPEST}")
    alone = getattr(NETWORKS[name], "stands_alone", False)  # its own arguments say everything
    if alone:
        args = {key: value for key, value in args.items() if key not in ("input_shape", "classes")}
    for needed in ("input_shape", "classes"):
        if needed not in args and name != "efficientnet-lite0" and not alone:
            raise UserError(f"network {name!r} needs {needed}", "it is told by the data; in Python give it to build()")
    check_arguments(NETWORKS[name], args, f"network {name!r}")
    return NETWORKS[name](**args)


def _timm(name: str, args: dict[str, Any], input_shape: tuple[int, ...] | None, classes: int | None) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise UserError("timm is not installed", "`pip install 'limbeck[timm]'`") from None
    if not timm.is_model(name.split(".")[0].split("/")[-1]) and not name.startswith("hf"):
        raise unknown("timm model", name, timm.list_models())
    given = {**({"num_classes": classes} if classes else {}), **({"in_chans": input_shape[0]} if input_shape else {}), **args}
    try:
        return timm.create_model(name, **given)
    except (TypeError, RuntimeError, OSError) as error:
        raise UserError(f"timm cannot make {name!r}: {error}", "check its arguments; pretrained weights need the network once") from None


def _python(path: str, args: dict[str, Any], input_shape: tuple[int, ...] | None, classes: int | None) -> nn.Module:
    import inspect

    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute:
        raise UserError(f"python:{path} names no factory", "write python:package.module:factory")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"cannot import {module_name!r}: {error}", f"it is looked for in {here} and among installed packages") from None
    except Exception as error:
        raise UserError(f"importing {module_name!r} failed: {type(error).__name__}: {error}", "mend that module") from error
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
    factory = getattr(module, attribute, None)
    if not callable(factory):
        offer = nearest(attribute, [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")])
        raise UserError(f"{module_name} has no callable {attribute!r}", f"did you mean {' or '.join(map(repr, offer))}?" if offer else "")
    # Shape and classes go only to factories that ask for them: a user's own network usually knows its own.
    takes = inspect.signature(factory).parameters
    known = {"input_shape": input_shape, "classes": classes}
    given = {**{n: v for n, v in known.items() if v is not None and n in takes}, **args}
    check_arguments(factory, given, f"python:{path}")
    model = factory(**given)
    if not isinstance(model, nn.Module):
        raise UserError(f"python:{path} returned a {type(model).__name__}, not a torch.nn.Module", "return the network")
    return model


def _language(name: str, tokens: Tokens | None, args: dict[str, Any]) -> nn.Module:
    if tokens is None:
        raise UserError(f"network {name!r} needs a tokenizer", "it is told by text data; in Python give tokens=limbeck.zoo.Tokens(...)")
    if name == "minilm":
        check_arguments(minilm, {"tokens": tokens, **args}, "network 'minilm'")
        return minilm(tokens, **args).train()
    return wrapped(build_language(name, tokens, **args), tokens).train()


def wrapped(model: nn.Module, tokens: Tokens) -> nn.Module:
    """An encoder of tokens as an encoder of sentences, where the task is embedding; else the model itself."""
    if tokens.kind != "embedding":
        return model
    return SentenceEncoder(model)


def _json_able(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def build(
    ref: str, *, input_shape: tuple[int, ...] | None = None, classes: int | None = None, tokens: Tokens | None = None, **args: Any
) -> nn.Module:
    """Make a network.

    Args:
        ref: an embedded name (`listing()`; "zoo:" before it is allowed; "resnet8x4" is resnet with depth 8 and width 4);
            `hf:<folder or hub id>`; `timm:<name>`; `diffusers:<class>` with its `config` (random weights);
            `python:package.module:factory` (looked for in the working folder too); `folder:<path>` or the path itself for what
            `save_model` wrote.
        input_shape: of one sample; embedded networks need it, a factory gets it if it has such an argument.
        classes: number of logits, likewise; for a denoiser the number of labels, 0 for none. For `hf:` it must match the model's own,
            unless `new_head: true`.
        tokens: facts of the tokenizer, where samples are texts: "llama", "gpt2", "t5" and "bert" are built from them, and `hf:` opens the
            class that the kind of task needs.
        args: what the network itself takes. `hf:` takes `config_only: true` (random weights) and `new_head: true`; the rest
            overrides its configuration.

    Returns:
        The network, in training mode, with `limbeck_config = {"ref", "args"}` when JSON can hold what it was made from.

    Raises:
        UserError: unknown names, wrong arguments, missing files or packages.
    """
    if not isinstance(ref, str) or not ref:
        raise UserError(f"a network's name is a string, not {ref!r}", "name an embedded network such as cnn")
    try:
        return _made(ref, input_shape, classes, tokens, args)
    except MISFITS as error:
        if ref.startswith("python:"):
            raise  # the user's own code, whose traceback is what helps
        why = (str(error) or type(error).__name__).splitlines()[0][:300]
        shown = ", ".join(f"{name}={value!r}" for name, value in args.items())[:300]
        raise UserError(
            f"{ref} cannot be made with {shown or 'these sizes'}: {why}", "`limbeck inspect --list` tells what it takes"
        ) from error


def _made(ref: str, input_shape: tuple[int, ...] | None, classes: int | None, tokens: Tokens | None, args: dict[str, Any]) -> nn.Module:
    """As `build`; wrong sizes raise whatever the constructor raises."""
    shape = None if input_shape is None else tuple(int(n) for n in input_shape)
    kind, colon, name = ref.partition(":")
    if not colon:
        kind, name = ("folder", ref) if Path(ref).is_dir() and ref not in NETWORKS else ("zoo", ref)
    if kind not in _KINDS and ref != CUT and ref not in QUANTISED:
        raise unknown("kind of network", kind, _KINDS)
    known = {k: v for k, v in (("input_shape", shape), ("classes", classes)) if v is not None}
    if ref == CUT:
        check_arguments(rebuild_cut, args, ref)
        return rebuild_cut(**args)
    if ref in QUANTISED:
        check_arguments(QUANTISED[ref], args, ref)
        return QUANTISED[ref](**args)
    if kind == "folder":
        from limbeck.zoo.files import load_model

        check_arguments(load_model, {"folder": name, **args}, f"folder:{name}")
        return load_model(name, **args)
    if f"{kind}:{name}" == ROTATED:
        check_arguments(rebuild_rotated, args, name)
        return rebuild_rotated(**args)
    if f"{kind}:{name}" == RECURRENT:
        check_arguments(rebuild_recurrent, args, name)
        return rebuild_recurrent(**args)
    if kind == "zoo" and (name in LANGUAGE or (name == "minilm" and tokens is not None)):
        return _language(name, tokens, args)
    if kind == "hf" and tokens is not None:
        return wrapped(open_language(name, tokens, **args), tokens).train()
    if kind == "zoo":
        model = _embedded(name, {**known, **args})
    elif kind == "hf":
        from limbeck.zoo.hub import build_hub

        model = build_hub(name, classes, **args)
    elif kind == "timm":
        model = _timm(name, args, shape, classes)
    elif kind == "diffusers":
        from limbeck.zoo.diffusers_door import DiffusersNetwork

        check_arguments(DiffusersNetwork, {"kind": name, **args}, f"diffusers:{name}")
        model, known = DiffusersNetwork(name, **args), {}  # its configuration knows shape and classes
    else:
        model = _python(name, args, shape, classes)
    made_from = {**({k: list(v) if isinstance(v, tuple) else v for k, v in known.items()}), **args}
    if _json_able(made_from):
        model.limbeck_config = {"ref": f"{kind}:{name}", "args": made_from}  # type: ignore[assignment]
    return model.train()
