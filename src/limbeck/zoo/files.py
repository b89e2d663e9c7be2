"""Networks on disk: safetensors and JSON, checked by checksum, never a pickle, never code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.storage import fingerprint, load_tensors, read_json, save_tensors, sha256, write_json, write_text
from limbeck.zoo.cut import REFERENCE as CUT
from limbeck.zoo.cut import resize
from limbeck.zoo.hub import build_hub
from limbeck.zoo.language import quiet
from limbeck.zoo.lora import BASE, is_adapted, load_adapter, save_adapter
from limbeck.zoo.quantised import REBUILDERS as QUANTISED
from limbeck.zoo.quantised import REFERENCE as CODED
from limbeck.zoo.quantised import code_like, is_coded
from limbeck.zoo.sentence import SentenceEncoder, is_sentence_folder, load_sentence

FORMAT = "limbeck-model/1"
WEIGHTS, CONFIG, NOTE = "model.safetensors", "config.json", "limbeck.json"
DIGEST = "digest"
"""The last key of a note: the fingerprint of all others. A note without it is refused: nobody can tell whether it was altered."""


def _untie(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors to store, {name: name of the tensor that it shares}). Views of one storage are stored as copies."""
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor = tensor.detach()
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in seen:
            tied[name] = seen[key]
            continue
        seen[key] = name
        stored[name] = tensor.cpu().contiguous().clone()
    return stored, tied


def _is_transformers(model: nn.Module) -> bool:
    return any(kind.__module__.startswith("transformers.") and kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)


def save_model(model: nn.Module, folder: str | Path, *, card: str = "", extra: dict[str, Any] | None = None) -> Path:
    """Write a network to a folder, so that `load_model`, or transformers for its own models, opens it again.

    Args:
        model: any network. One of transformers is written as that library does, plus `limbeck.json`; others as
            `model.safetensors` and `config.json`.
        folder: made if needed; files of the same names are replaced.
        card: text of README.md; "" for a line that says what this is.
        extra: more for the note (metrics, class names, ...); JSON must hold it.

    Returns:
        The folder.
    """
    from limbeck.zoo.build import parameters

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind = f"{type(model).__module__}:{type(model).__qualname__}"
    note: dict[str, Any] = {
        "format": FORMAT,
        "class": kind,
        "parameters": parameters(model),
        "extra": extra or {},
    }
    if is_adapted(model):
        with quiet():
            note["base"] = save_adapter(model, folder)
        note["files"] = {p.name: sha256(p) for p in sorted(folder.glob("*.safetensors"))}
        if note["base"] == BASE:
            note["base_files"] = {p.name: sha256(p) for p in sorted((folder / BASE).glob("*.safetensors"))}
        _write_note(folder / NOTE, note)
    elif is_coded(model) or (getattr(model, "limbeck_config", None) or {}).get("ref") == CUT:
        _write_plain(model, folder, note)  # transformers could not open it
    elif isinstance(model, SentenceEncoder):
        with quiet():
            note["files"] = model.save(folder)
        _write_note(folder / NOTE, note)
    elif _is_transformers(model):
        with quiet():
            model.save_pretrained(folder)  # type: ignore[operator]
        note["files"] = {p.name: sha256(p) for p in sorted(folder.glob("*.safetensors"))}
        _write_note(folder / NOTE, note)
    else:
        _write_plain(model, folder, note)
    write_text(folder / "README.md", card or f"# A network saved by limbeck\n\n`{kind}`, {note['parameters']} parameters.\n")
    return folder


def _write_plain(model: nn.Module, folder: Path, note: dict[str, Any]) -> None:
    """Weights and note of a network that transformers does not know, or whose weights are codes."""
    stored, tied = _untie(model)
    note |= getattr(model, "limbeck_config", None) or {}
    note["tied"] = tied
    note["files"] = {WEIGHTS: save_tensors(folder / WEIGHTS, stored)}
    _write_note(folder / CONFIG, note)


def signed(note: dict[str, Any]) -> dict[str, Any]:
    """A note with the digest of all its other keys, as `read_note` wants it."""
    rest = {key: value for key, value in note.items() if key != DIGEST}
    return {**rest, DIGEST: fingerprint(json.loads(json.dumps(rest)))}


def _write_note(path: Path, note: dict[str, Any]) -> None:
    write_json(path, signed(note))


def read_note(folder: str | Path) -> dict[str, Any]:
    """What `save_model` noted beside the weights: format, class, ref, args, files, extra; {} for a folder of transformers alone.

    Raises:
        UserError: there is no such folder, it holds no model, or the note is not readable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder at {folder}", "give the folder of a saved model, such as runs/<run>/student")
    path = folder / NOTE if (folder / NOTE).is_file() else folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} holds no model: it has no {CONFIG}", "give the folder that save_model wrote")
    note = read_json(path, "restore or remake the folder")
    if not isinstance(note, dict):
        raise UserError(f"{path} is not the note of a model", "restore or remake the folder")
    digest = note.pop(DIGEST, None)
    if digest != (fingerprint(note) if digest is not None or note.get("format") == FORMAT else None):
        raise UserError(f"{path} was altered: its digest differs from its content", "restore or remake the folder")
    if any(not isinstance(note.get(key, {}), dict) for key in ("files", "base_files", "tied", "args", "extra")):
        raise UserError(f"{path} is not the note of a model", "restore or remake the folder")
    if note.get("format") != FORMAT:
        if "model_type" in note:
            return {}
        raise UserError(f"{path} says format {note.get('format')!r}, not {FORMAT!r}", "give a folder that save_model wrote")
    return note


def _retie(model: nn.Module, tied: dict[str, str]) -> None:
    """Make the names share their tensor again where the constructor did not."""
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, kept in tied.items():
        if name in own and kept in own and own[name] is not own[kept]:
            path, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(path), attribute, own[kept])


def load_model(folder: str | Path, *, model: nn.Module | None = None, trust_python: bool = False) -> nn.Module:
    """Make a network again from its folder.

    Args:
        folder: written by `save_model`, or by transformers.
        model: an instance to put the weights into, for networks that were not made by `build`.
        trust_python: allow a note to name a `python:` factory, which is imported and called. Without it nothing that the
            folder says is executed.

    Returns:
        The network, in training mode as `build` gives it; a `model` that was given keeps its mode.

    Raises:
        UserError: missing, torn, altered or pickled files; a network that cannot be rebuilt from its note; weights that do not fit.
    """
    folder = Path(folder)
    note = read_note(folder)
    _check_files(folder, note.get("files", {}))
    if (folder / "adapter_config.json").is_file():
        if model is None and not note.get("base"):
            raise UserError(
                f"{folder} holds an adapter, and does not say of which network", "name the network: teacher or student with `weights`"
            )
        if model is not None and is_adapted(model):
            return load_adapter(folder, model)
        return load_adapter(folder, model if model is not None else _base(note, folder)).train()
    if is_sentence_folder(folder):
        with quiet():
            return _into(model, load_sentence(folder, note.get("files", {})), folder)
    if not note or (folder / NOTE).is_file():
        with quiet():
            return _into(model, build_hub(str(folder.resolve())), folder)
    if model is None:
        model = _rebuild(note, folder, trust_python)
    elif note.get("ref") in (CODED, CUT):
        model = _shaped_like(note, model)
    tensors = load_tensors(folder / WEIGHTS, note.get("files", {}).get(WEIGHTS))
    tied = note.get("tied", {})
    tensors |= {name: tensors[kept] for name, kept in tied.items() if kept in tensors}
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise UserError(f"the weights in {folder} do not fit {type(model).__name__}: {error}", "give the network they came from") from None
    _retie(model, tied)
    return model


def _check_files(folder: Path, files: dict[str, str]) -> None:
    """The files of a note are there and whole; only names count, so that no note leads out of the folder."""
    for name, expected in files.items():
        path = folder / Path(name).name
        if not path.is_file():
            raise UserError(f"no file at {path}", "restore or remake the folder")
        if sha256(path) != expected:
            raise UserError(f"{path} is torn or was altered: its checksum differs from the recorded one", "restore or remake it")


def _base(note: dict[str, Any], folder: Path) -> nn.Module:
    """The network that an adapter belongs to: beside it, in a folder, or on the hub."""
    name = str(note["base"])
    place = folder / BASE if name == BASE else Path(name)
    if Path(name).is_absolute() and not place.is_dir():
        raise UserError(f"the adapter in {folder} belongs to the network in {name}, which is gone", "restore that folder")
    if name == BASE:
        _check_files(place, note.get("base_files", {}))
    with quiet():
        if is_sentence_folder(place):
            return load_sentence(place, note.get("base_files", {}))
        return build_hub(str(place.resolve()) if place.is_dir() else name)


def _into(model: nn.Module | None, loaded: nn.Module, folder: Path) -> nn.Module:
    """What was loaded; where an instance was given, that one with the loaded weights (it knows more, such as its kind of attention)."""
    if model is None:
        return loaded.train()
    try:
        model.load_state_dict(loaded.state_dict())
    except RuntimeError as error:
        raise UserError(f"the weights in {folder} do not fit {type(model).__name__}: {error}", "give the network they came from") from None
    return model


def _shaped_like(note: dict[str, Any], model: nn.Module) -> nn.Module:
    """The network before it was cut or before its weights became codes (or the one after), with the shapes of the one after."""
    ref, args = note["ref"], note.get("args", {})
    of = args.get("of")
    if isinstance(of, dict) and of.get("ref") == CUT:
        model = _shaped_like(of, model)
    model = resize(model, args.get("shapes", {})) if ref == CUT else code_like(model, args.get("layers", {}))
    model.limbeck_config = {"ref": ref, "args": args}  # type: ignore[assignment]
    return model


def _rebuild(note: dict[str, Any], folder: Path, trust_python: bool) -> nn.Module:
    from limbeck.zoo.build import build

    ref = note.get("ref")
    if not isinstance(ref, str):
        raise UserError(f"{folder} holds a {note.get('class')}, which limbeck cannot make by itself", "give load_model(folder, model=...)")
    args = _without_code(ref, dict(note.get("args", {})), folder, trust_python)
    try:
        return build(ref, **args)
    except UserError as error:
        raise UserError(f"the note of {folder} makes no network: {error.message}", error.hint) from None
    except TypeError as error:  # an argument of `build` itself among those of the network
        raise UserError(f"the note of {folder} makes no network: {error}", "restore or remake the folder") from None


def _without_code(ref: str, args: dict[str, Any], folder: Path, trust_python: bool) -> dict[str, Any]:
    """The arguments to make a network with: nothing is downloaded, and a factory that a file names is called only when it is trusted.

    A network inside another one (the `network` of a dual head or of a guided one) is held to the same rules.
    """
    from limbeck.zoo.build import NETWORKS

    kind, colon, name = ref.partition(":")
    if not colon:  # as `build` understands it
        kind, name = ("folder", ref) if Path(ref).is_dir() and ref not in NETWORKS else ("zoo", ref)
    if kind == "python" and not trust_python:
        raise UserError(
            f"{folder} names the Python factory {ref}, and loading runs no code that a file names",
            "if you trust the folder: trust_python: true, or load_model(folder, model=...)",
        )
    if kind == "folder":
        raise UserError(f"{folder} refers to another folder", "save the network itself")
    if "pretrained" in args or (kind, name) == ("zoo", "efficientnet-lite0"):
        args["pretrained"] = False  # The stored weights replace them anyway.
    if kind == "hf":
        args["config_only"] = True
    if (kind, name) in (("zoo", "dual-head"), ("zoo", "guided")) and isinstance(args.get("network"), str):
        args["args"] = _without_code(args["network"], dict(args.get("args") or {}), folder, trust_python)
    if (ref == CUT or ref in QUANTISED) and isinstance(of := args.get("of"), dict) and isinstance(of.get("ref"), str):
        args["of"] = {**of, "args": _without_code(of["ref"], dict(of.get("args") or {}), folder, trust_python)}
    return args
