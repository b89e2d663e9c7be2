"""Pipelines of the diffusers library: opened as denoisers, and students written back as pipelines."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck import storage
from limbeck.diffusion import Denoiser
from limbeck.errors import UserError
from limbeck.places import user_path
from limbeck.sampling.adapters import has_lora, merge_lora
from limbeck.sampling.schedulers import SCHEDULERS, first_line, meaning, scheduler_for
from limbeck.zoo.diffusers_door import NEEDS, SUPPORTED, TEXT, DiffusersNetwork, kind_of, library

FOLDERS = ("unet", "transformer")


# ---- opening ----


class _Place:
    """A folder, or an id of the hub."""

    def __init__(self, name: str) -> None:
        local = user_path(name)
        self.local = local if local.is_dir() else None
        if self.local is None and (name.startswith((".", "/", "~")) or name.count("/") != 1):
            raise UserError(f"no folder at {local}", "give a pipeline's folder, or an id of the hub such as owner/name")
        self.name = str(local) if self.local else name

    def config(self, reader: Any, subfolder: str | None, what: str) -> dict[str, Any] | None:
        """A configuration, or None where there is none."""
        if self.local is not None and not (self.local / (subfolder or "") / reader.config_name).is_file():
            return None
        try:
            found = reader.load_config(self.name, **({} if subfolder is None else {"subfolder": subfolder}))
        except Exception as error:  # the hub may fail in any way; the message is all that helps
            asked: BaseException | None = error
            while asked is not None and type(asked).__name__ != "LocalEntryNotFoundError":  # the hub was not reached
                asked = asked.__context__
            if self.local is None and asked is not None:
                raise UserError(
                    f"{self.name} is no folder here, and the hub cannot be reached", "check the path, or the id and the network"
                ) from None
            if self.local is None and "does not appear to have a file named" in str(error):
                return None
            raise UserError(
                f"{what} of {self.name} cannot be read: {first_line(error)}", "check the folder, or the id and the network"
            ) from None
        return dict(found)


def _parts(place: _Place, subfolder: str | None) -> tuple[dict[str, Any], str | None]:
    """A pipeline's index ({} for a bare model), and the subfolder of its model."""
    diffusers = library()
    index = place.config(diffusers.DiffusionPipeline, None, "the index") or {}
    if subfolder is not None or not index:
        return index, subfolder
    for name in FOLDERS:
        if isinstance(index.get(name), (list, tuple)) and index[name][-1]:
            return index, name
    raise UserError(f"the pipeline {place.name} ({index.get('_class_name')}) has no unet or transformer", "name the model with subfolder")


def _scheduler(place: _Place, index: Mapping[str, Any], scheduler: Any) -> dict[str, Any]:
    diffusers = library()
    if scheduler is None:
        folder = "scheduler" if index or place.local is None or (place.local / "scheduler").is_dir() else None
        if folder is None and place.local is not None and (place.local.parent / "scheduler").is_dir():
            place, folder = _Place(str(place.local.parent)), "scheduler"  # the unet/ of a pipeline was named
        found = None if folder is None else place.config(diffusers.DDPMScheduler, folder, "the scheduler")
        if found is None:
            raise UserError(
                f"{place.name} has no scheduler, so that nothing says how it was noised",
                "give scheduler: a class name of diffusers, a configuration, or the folder of one",
            )
        return found
    if isinstance(scheduler, Mapping):
        return dict(scheduler)
    if hasattr(scheduler, "config"):
        return {**scheduler.config, "_class_name": type(scheduler).__name__}
    if user_path(str(scheduler)).is_dir():
        found = _Place(str(scheduler)).config(diffusers.DDPMScheduler, None, "the scheduler")
        if found is None:
            raise UserError(f"{scheduler} holds no scheduler_config.json", "give the folder of a scheduler")
        return found
    return {"_class_name": str(scheduler)}


def _encoded(place: _Place, index: Mapping[str, Any], kind: str, prompts: Sequence[str], device: Any) -> dict[str, Tensor]:
    """Prompts through the pipeline's own encoders, and in the last row what it takes for no prompt."""
    diffusers = library()
    pipeline = getattr(diffusers, str(index.get("_class_name")), None)
    encoders = [n for n, v in index.items() if n.startswith("text_encoder") and isinstance(v, (list, tuple)) and v[-1]]
    if not encoders or pipeline is None or not hasattr(pipeline, "encode_prompt"):
        raise UserError(
            f"{place.name} has no text encoder to read the prompts with",
            "give a whole pipeline, or as prompts stored embeddings {table, mask, pooled} or a safetensors file of them",
        )
    for name in encoders:
        if place.local is not None and not (place.local / name).is_dir():
            raise UserError(f"{place.name} names the text encoder {name}, and has no such folder", "restore it, or give stored embeddings")
    asked = inspect.signature(pipeline.__init__).parameters
    out = {name: None for name in (*FOLDERS, "vae", "safety_checker", "feature_extractor", "image_encoder") if name in asked}
    for name, value in index.items():  # older versions of diffusers would import such a file
        library_name = value[0] if isinstance(value, (list, tuple)) and value else None
        if name in out or library_name in (None, "transformers", "diffusers") or hasattr(diffusers.pipelines, str(library_name)):
            continue
        hint = "give stored embeddings as prompts: {table, mask, pooled} or a safetensors file of them"
        raise UserError(f"{place.name} names code of its own for its {name}, and limbeck runs no code of a model's folder", hint)
    try:
        made = pipeline.from_pretrained(place.name, **out, use_safetensors=True).to(device)
    except Exception as error:  # loading may fail in any way; the message is all that helps
        raise UserError(f"the text encoders of {place.name} cannot be opened: {first_line(error)}", "check the folder") from None
    given = {"prompt": list(prompts), "prompt_2": None, "prompt_3": None, "device": device, "num_images_per_prompt": 1}
    given["do_classifier_free_guidance"] = True
    takes = inspect.signature(made.encode_prompt).parameters
    with torch.no_grad():
        found = made.encode_prompt(**{k: v for k, v in given.items() if k in takes})
    if kind == "PixArtTransformer2DModel":
        pairs = {"table": (found[0], found[2]), "mask": (found[1], found[3])}
    else:
        pairs = {"table": (found[0], found[1]), **({"pooled": (found[2], found[3])} if len(found) > 2 else {})}
    return {name: torch.cat([yes, no[:1]]).float().cpu() for name, (yes, no) in pairs.items()}


def _condition(place: _Place, index: Mapping[str, Any], kind: str, prompts: Any, device: Any) -> dict[str, Tensor] | None:
    if kind not in TEXT:
        if prompts is not None:
            raise UserError(f"a {kind} is told no text, and prompts were given", "leave the prompts out")
        return None
    if prompts is None:
        raise UserError(f"a {kind} is told a text, and no prompts were given", "give prompts: one text for each class")
    if isinstance(prompts, (str, Path)):
        if not str(prompts).endswith(".safetensors"):
            raise UserError("prompts is one text", "give a list of texts, one for each class, or a safetensors file of embeddings")
        return storage.load_tensors(user_path(prompts))
    if isinstance(prompts, Mapping):
        return {name: torch.as_tensor(value) for name, value in prompts.items() if name in ("table", "pooled", *NEEDS[kind])}
    prompts = list(prompts)
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise UserError("prompts is no list of texts", "give one text for each class")
    return _encoded(place, index, kind, prompts, device)


def open_pipeline(
    folder_or_hub_id: str | Path,
    *,
    device: torch.device | str = "cpu",
    prompts: Any = None,
    subfolder: str | None = None,
    scheduler: Any = None,
    null: bool = True,
) -> Denoiser:
    """A diffusion or flow model of diffusers as a denoiser. No code of the folder is run, and no pickle is read.

    Args:
        folder_or_hub_id: a pipeline's folder (`model_index.json`, `unet/` or `transformer/`, `scheduler/`), a bare model's folder, or an
            id of the hub (which downloads).
        device: where the network goes.
        prompts: for text-conditional models: texts, one for each class, encoded once by the pipeline's own encoders, with what the
            pipeline takes for no prompt as the last row; or stored embeddings `{"table": (classes + 1, L, D), "mask": (classes + 1, L),
            "pooled": (classes + 1, P)}`, or a safetensors file of them.
        subfolder: of the model; None looks for unet/ and transformer/.
        scheduler: instead of the folder's: an object, a configuration, its folder, or a class name of diffusers with its defaults.
        null: whether the last class of a class-conditional UNet2DModel means no class.

    Returns:
        It holds a `DiffusersNetwork` in evaluation mode.

    Raises:
        UserError: diffusers is missing; no such folder; missing or pickled weights; a model or a scheduler that is not supported;
            prompts that are missing, or nothing to encode them with.
    """
    diffusers = library()
    place = _Place(str(folder_or_hub_id))
    index, inner = _parts(place, subfolder)
    config = place.config(diffusers.UNet2DModel, inner, "the model's configuration")
    if config is None:
        where = place.name if inner is None else f"{place.name}/{inner}"
        raise UserError(f"{where} holds no model of diffusers: it has no config.json", "give a pipeline's folder, or a model's")
    kind = kind_of(config)
    said = meaning(_scheduler(place, index, scheduler))
    condition = _condition(place, index, kind, prompts, device)
    try:
        model = getattr(diffusers, kind).from_pretrained(
            place.name, use_safetensors=True, low_cpu_mem_usage=False, **({} if inner is None else {"subfolder": inner})
        )
    except Exception as error:  # reading weights may fail in any way; the message is all that helps
        raise UserError(
            f"the weights of {place.name} cannot be read: {first_line(error)}", "restore the safetensors file; pickled weights are not read"
        ) from None
    scale = said.pop("time_scale")
    network = DiffusersNetwork(kind, dict(model.config), condition=condition, time_scale=scale, null=null, model=model)
    network.source = place.name if index else ""
    return Denoiser(network.to(device).eval(), said.pop("process"), said.pop("prediction"), classes=network.classes, **said)


# ---- writing ----


def _components(like: str) -> Path | None:
    """The folder of a pipeline whose other components can be copied."""
    if not like:
        return None
    folder = user_path(like)
    if not folder.is_dir() and like.count("/") == 1:
        try:
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(like, local_files_only=True))
        except Exception:  # not in the cache: nothing to copy
            return None
    return folder if (folder / "model_index.json").is_file() else None


def save_pipeline(denoiser: Denoiser, folder: str | Path, like: str | Path | None = None, sampler: str = "renoise") -> Path:
    """Write a denoiser of diffusers as a folder that `DiffusionPipeline.from_pretrained` opens.

    The scheduler is `scheduler_for(denoiser, sampler)`: LCMScheduler for re-noising generators, see there. The other components
    (autoencoder, text encoders, tokenizers) are copied from `like`. Without `like` a UNet2DModel becomes a DDPMPipeline; another
    model cannot be a pipeline by itself and is written as its folder and scheduler/ only, as is any whose `like` lacks a component.
    A DDPMPipeline gives no class to its network: a class-conditional UNet2DModel is opened by it, but must be called by hand. Adapters
    are merged.

    Args:
        denoiser: its network is a `DiffusersNetwork`.
        folder: made if needed; files of the same names are replaced.
        like: the teacher's pipeline; None for the one that the network was opened from.
        sampler: of `limbeck.diffusion.SAMPLERS`, how the generator is sampled.

    Returns:
        The folder.

    Raises:
        UserError: another network, or a process that diffusers has no scheduler for.
    """
    network = denoiser.network
    if not isinstance(network, DiffusersNetwork):
        raise UserError(f"a {type(network).__name__} is no network of diffusers", "only what open_pipeline opened is written as a pipeline")
    scheduler = scheduler_for(denoiser, sampler)
    if has_lora(network):
        network = merge_lora(network)  # type: ignore[assignment]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    part = "unet" if network.kind.startswith("UNet") else "transformer"
    network.model.save_pretrained(folder / part)
    scheduler.save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {}
    source = _components(network.source if like is None else str(like))
    if like is not None and source is None:
        raise UserError(f"{like} is no pipeline's folder to copy components from", "give a folder with a model_index.json")
    if source is not None:
        index = _read(source)
        if not _copied(source, folder, index, part):
            index = {}
    if not index and network.kind == "UNet2DModel":
        index = {"_class_name": "DDPMPipeline"}
    if index:
        index |= {"_diffusers_version": library().__version__, part: ["diffusers", network.kind]}
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
        if network.kind == "UNet2DModel":  # DDIMPipeline would make every scheduler a DDIMScheduler
            index["_class_name"] = "DDPMPipeline"
        storage.write_json(folder / "model_index.json", index)
    else:
        (folder / "model_index.json").unlink(missing_ok=True)
    return folder


def _read(source: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((source / "model_index.json").read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{source / 'model_index.json'} is not readable: {error}", "restore it") from None


def _copied(source: Path, folder: Path, index: Mapping[str, Any], part: str) -> bool:
    """Copy every component that is neither the model nor the scheduler; whether all were there."""
    names = [n for n, v in index.items() if isinstance(v, (list, tuple)) and v and v[-1] and n not in (part, "scheduler")]
    for name in names:
        if Path(name).name != name or name in (".", ".."):
            raise UserError(f"{source} names a component {name!r} outside its folder", "restore its model_index.json")
    if any(not (source / name).is_dir() for name in names):
        return False
    for name in names:
        if (source / name).resolve() != (folder / name).resolve():
            shutil.copytree(source / name, folder / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", "*.bin", "*.pt"))
    return True


__all__ = ["SCHEDULERS", "SUPPORTED", "meaning", "open_pipeline", "save_pipeline", "scheduler_for"]
