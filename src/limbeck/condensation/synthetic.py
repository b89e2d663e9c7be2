"""The artifact of this wing: a few synthetic samples, their labels, how students train on them, and how many bytes that takes.

Shapes: n stored images (canvases) of `(C, H, W)`, N training samples decoded from them, K classes, E epochs of stored labels.
Pixels are held in standardised units, `(pixel - mean) / std` for each channel of the real training data.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck import storage
from limbeck.condensation import mixing
from limbeck.data.augment import Augment
from limbeck.data.batches import own_randomness
from limbeck.errors import MISFITS, UserError, unknown
from limbeck.outcome import Artifact

FORMATS = ("uint8", "float16", "float32")
"""How a pixel may be stored: one byte (256 levels between the set's smallest and largest value), two or four."""

LOSSES = ("ce", "soft_ce", "kl", "mse")
"""What students minimise: cross-entropy, cross-entropy to soft labels, KL at a temperature (no T^2), squared error to logits or targets."""

HOW = {"loss": "ce", "temperature": 1.0, "mix": None, "alpha": 0.8}


class SyntheticSet(Artifact, nn.Module):
    """A condensed data set; what may be learnt is a parameter.

    Args:
        images: `(n, C, H, W)` (or `(n, F)` for tables), standardised.
        labels: `(n,)` int64, class after class.
        classes: their names.
        mean, std: `(C, 1, 1)` of the real data (`(F,)` for tables), to come back to pixels.
        logits: `(N, K)` soft labels, or None.
        lr: learnt learning rate of the students, or None.
        factor: 1, or f: each canvas is cut into f * f parts, each enlarged to full size.
        patterns: `(m, C, H, W)` that are added to images, with `compose` `(N, 2)`: image and pattern (-1 for none) of each training sample.
        targets: `(n, d)` learnt representations instead of classes.
        format: how pixels are stored, one of FORMATS.

    Attributes:
        how: how students train: "loss" (one of LOSSES), "temperature", "mix" (None, "mixup", "cutmix"), "alpha" of the mix.
        views: None, or `{"seed", "mix", "alpha", "augment"}` of the epochs whose labels are stored in `view_logits` `(E, N, K)`.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: Sequence[str],
        *,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        logits: Tensor | None = None,
        lr: float | None = None,
        factor: int = 1,
        patterns: Tensor | None = None,
        compose: Tensor | None = None,
        targets: Tensor | None = None,
        format: str = "uint8",
    ) -> None:
        super().__init__()
        if format not in FORMATS:
            raise unknown("storage format", format, FORMATS)
        if len(images) != len(labels):
            raise UserError(f"{len(images)} synthetic images have {len(labels)} labels", "give one label an image")
        if factor > 1 and (images.ndim != 4 or any(side % factor for side in images.shape[-2:])):
            raise UserError(
                f"canvases of shape {tuple(images.shape[1:])} cannot be cut into {factor} x {factor} parts", "choose a factor that divides"
            )
        if (patterns is None) != (compose is None):
            raise UserError("patterns and compose belong together", "give both or neither")
        parameter = lambda value: None if value is None else nn.Parameter(value.detach().clone().float())  # noqa: E731
        self.images = parameter(images)
        self.register_buffer("labels", labels.long().clone())
        self.classes, self.factor, self.format = tuple(classes), factor, format
        wide = (images.shape[1],) + (1,) * (images.ndim - 2) if images.ndim > 2 else tuple(images.shape[1:])
        self.register_buffer("mean", torch.zeros(wide, device=images.device) if mean is None else mean.detach().clone())
        self.register_buffer("std", torch.ones(wide, device=images.device) if std is None else std.detach().clone())
        self.logits, self.targets, self.patterns = parameter(logits), parameter(targets), parameter(patterns)
        self.lr = None if lr is None else nn.Parameter(torch.tensor(float(lr), device=images.device))
        self.register_buffer("compose", None if compose is None else compose.long().clone())
        self.register_buffer("view_logits", None)
        self.views: dict[str, Any] | None = None
        self.how: dict[str, Any] = dict(HOW)

    # ---- what students see ----

    def decode(self, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Training samples `(N, C, H, W)` and their classes `(N,)`, differentiable in images and patterns.

        Args:
            index: only these stored images; not with patterns.
        """
        if self.patterns is not None:
            image, pattern = self.compose.unbind(1)
            x = self.images[image]
            added = torch.where(pattern >= 0, 1.0, 0.0).view(-1, *[1] * (x.ndim - 1))
            return x + added * self.patterns[pattern.clamp(min=0)], self.labels[image]
        x = self.images if index is None else self.images[index]
        y = self.labels if index is None else self.labels[index]
        if self.factor == 1:
            return x, y
        f, (height, width) = self.factor, x.shape[-2:]
        parts = x.unflatten(3, (f, width // f)).unflatten(2, (f, height // f)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        return F.interpolate(parts, size=(height, width), mode="bilinear", align_corners=False), y.repeat_interleave(f * f)

    def samples(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """`(x, y, z)`: decoded samples, classes, and soft labels as logits `(N, K)` or None."""
        return *self.decode(), self.logits

    def of_class(self, c: int) -> Tensor:
        """Decoded samples of one class."""
        if self.patterns is not None:
            x, y = self.decode()
            return x[y == c]
        return self.decode((self.labels == c).nonzero()[:, 0])[0]

    def __len__(self) -> int:
        """N, how many training samples come out."""
        return len(self.compose) if self.compose is not None else len(self.images) * self.factor**2

    # ---- labels stored for each epoch ----

    def view(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The samples of one stored epoch: shuffled, augmented and mixed; a pure function of the stored seed and the epoch.

        Returns:
            `(N, C, H, W)` and the order `(N,)` in which the samples stand.
        """
        assert self.views is not None
        with torch.no_grad(), own_randomness(self.views["seed"], epoch):
            x, _ = self.decode()
            order = torch.randperm(len(x)).to(x.device)
            x = x[order]
            if self.views["augment"]:
                x = Augment(self.views["augment"])(x)
            if self.views["mix"]:
                x = mixing.mix(self.views["mix"], x, self.views["alpha"])[0]
        return x, order

    def with_views(self, *, seed: int, mix: str | None = "cutmix", alpha: float = 1.0, augment: Sequence[str] = ()) -> SyntheticSet:
        """The same set whose epochs are fixed by a seed, so that labels can be stored for them with `store_views`."""
        other = self.copy()
        other.views = {"seed": int(seed), "mix": mix, "alpha": float(alpha), "augment": list(augment)}
        return other

    def store_views(self, logits: Tensor, temperature: float = 20.0) -> None:
        """Keep the soft labels `(E, N, K)` of the first E views (in the order of each view), in half precision.

        Students replay the views in turn and minimise KL(softmax(z / T) || student at T) without T^2.
        """
        if self.views is None:
            raise UserError("labels of views were given before the views", "call with_views first")
        if logits.ndim != 3 or logits.shape[1:] != (len(self), len(self.classes)):
            raise UserError(
                f"stored labels have shape {tuple(logits.shape)}", f"give (epochs, {len(self)} samples, {len(self.classes)} classes)"
            )
        self.view_logits = logits.detach().half()
        self.how = {**self.how, "loss": "kl", "temperature": float(temperature)}

    # ---- copies and sizes ----

    def copy(self) -> SyntheticSet:
        """An independent copy."""
        return copy.deepcopy(self)

    def hard(self) -> SyntheticSet:
        """The same images under hard labels alone."""
        other = self.copy()
        other.logits = other.view_logits = other.views = None
        other.how = dict(HOW)
        return other

    @property
    def soft(self) -> bool:
        """Whether students are given more than a class for each sample."""
        return self.logits is not None or self.view_logits is not None

    def encoded(self) -> dict[str, Tensor]:
        """The tensors of the file, in the types in which they are stored."""
        small = torch.uint8 if len(self.classes) <= 256 else torch.int32
        tensors: dict[str, Tensor] = {}
        for name in ("images", "patterns"):
            value = getattr(self, name)
            if value is None:
                continue
            value = value.detach()
            if self.format == "uint8":
                low, high = value.min(), value.max()
                step = (high - low).clamp(min=1e-12) / 255
                tensors[name] = ((value - low) / step).round().clamp(0, 255).to(torch.uint8)
                tensors[f"{name}.range"] = torch.stack([low, step]).float()
            else:
                tensors[name] = value.to(getattr(torch, self.format))
        if self.targets is None:
            tensors["labels"] = self.labels.to(small)
        for name in ("logits", "view_logits", "targets"):
            if getattr(self, name) is not None:
                tensors[name] = getattr(self, name).detach().half()
        if self.compose is not None:
            tensors["compose"] = self.compose.to(torch.int16 if len(self.images) < 2**15 else torch.int32)
        if self.lr is not None:
            tensors["lr"] = self.lr.detach().float().reshape(1)
        return tensors

    def bytes(self) -> dict[str, int]:
        """Bytes that are stored, by part: pixels, hard labels, soft labels, the rest. The file's header is not counted."""
        parts = {"images": 0, "labels": 0, "soft labels": 0, "other": 0}
        names = {"images": "images", "patterns": "images", "labels": "labels"}
        names |= {"logits": "soft labels", "view_logits": "soft labels", "targets": "soft labels"}
        for name, tensor in self.encoded().items():
            parts[names.get(name, "other")] += tensor.numel() * tensor.element_size()
        return {name: size for name, size in parts.items() if size}

    def size(self) -> int:
        """All stored bytes."""
        return sum(self.bytes().values())

    def as_stored(self) -> SyntheticSet:
        """What a reader of the file gets: this set after its pixels and labels went through their storage types."""
        return self._take(self.copy(), {name: value.clone() for name, value in self.encoded().items()})

    @staticmethod
    def _take(into: SyntheticSet, tensors: dict[str, Tensor]) -> SyntheticSet:
        for name in ("images", "patterns", "logits", "targets"):
            if name in tensors:
                value = tensors[name].float()
                if f"{name}.range" in tensors:
                    low, step = tensors[f"{name}.range"].to(value.device)
                    value = low + step * value
                setattr(into, name, nn.Parameter(value))
        if "lr" in tensors:
            into.lr = nn.Parameter(tensors["lr"][0].float())
        return into

    # ---- files ----

    def note(self) -> dict[str, Any]:
        """What `set.json` says beside the tensors."""
        return {
            "kind": "limbeck synthetic set",
            "version": 1,
            "classes": list(self.classes),
            "shape": list(self.images.shape[1:]),
            "samples": len(self),
            "factor": self.factor,
            "format": self.format,
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
            "how": self.how,
            "views": self.views,
            "bytes": self.bytes(),
        }

    def save(self, folder: str | Path, card: str = "", extra: dict[str, Any] | None = None) -> None:
        """Write `set.safetensors`, `set.json`, a picture sheet `sheet.png` (pictures only) and `README.md` into a folder."""
        folder = Path(folder)
        checksum = storage.save_tensors(folder / "set.safetensors", self.encoded())
        if self.images.ndim == 4 and self.images.shape[1] in (1, 3):
            from limbeck.condensation.sheet import sheet_png

            storage.write_bytes(folder / "sheet.png", sheet_png(self))
        if card:
            storage.write_text(folder / "README.md", card)
        storage.write_json(folder / "set.json", {**self.note(), **(extra or {}), "sha256": checksum})

    @classmethod
    def load(cls, folder: str | Path) -> SyntheticSet:
        """Open what `save` wrote.

        Raises:
            UserError: it is no such folder, or a file is missing, torn or altered.
        """
        folder = Path(folder)
        if (folder / "dataset" / "set.json").is_file():
            folder = folder / "dataset"
        if not (folder / "set.json").is_file():
            raise UserError(f"there is no synthetic set in {folder}", "name the folder of a run, or its dataset/ folder")
        try:
            note = json.loads((folder / "set.json").read_text("utf-8"))
            tensors = storage.load_tensors(folder / "set.safetensors", note["sha256"])
            shape = [len(note["mean"])] + [1] * (len(note["shape"]) - 1)
            images = tensors["images"].float()
            labels = tensors["labels"].long() if "labels" in tensors else torch.zeros(len(images), dtype=torch.long)
            made = cls(
                images,
                labels,
                note["classes"],
                mean=torch.tensor(note["mean"]).view(shape),
                std=torch.tensor(note["std"]).view(shape),
                logits=tensors.get("logits"),
                lr=1.0 if "lr" in tensors else None,
                factor=note["factor"],
                patterns=tensors.get("patterns"),
                compose=tensors.get("compose"),
                targets=tensors.get("targets"),
                format=note["format"],
            )
            made.how, made.views = {**HOW, **note["how"]}, note["views"]
        except MISFITS as error:
            raise UserError(f"{folder / 'set.json'} is damaged: {error!r}", "restore it, or run the recipe again") from None
        made.view_logits = tensors.get("view_logits")
        return cls._take(made, tensors)

    # ---- for other people's loops ----

    def pixels(self) -> Tensor:
        """Decoded samples `(N, C, H, W)` in the units of the real data (pictures: [0, 1] where the data was; not clamped)."""
        return (self.decode()[0] * self.std + self.mean).detach()

    def torch_dataset(self) -> torch.utils.data.TensorDataset:
        """`(x, label)` items in the units of the real data; with soft labels `(x, label, logits)`."""
        _, y, z = self.samples()
        tensors = [self.pixels(), y] + ([] if z is None else [z.detach()])
        return torch.utils.data.TensorDataset(*tensors)

    def hf_dataset(self) -> Any:
        """The same as a `datasets.Dataset` with columns "image" (nested lists of floats), "label" and, if there are any, "logits".

        Raises:
            UserError: the package `datasets` is not installed.
        """
        try:
            import datasets
        except ImportError:
            raise UserError("the package datasets is not installed", "`pip install 'limbeck[hf]'`") from None
        _, y, z = self.samples()
        columns: dict[str, Any] = {"image": self.pixels().cpu().numpy(), "label": y.cpu().numpy()}
        if z is not None:
            columns["logits"] = z.detach().cpu().numpy()
        made = datasets.Dataset.from_dict({k: list(v) for k, v in columns.items()})
        return made.cast_column("label", datasets.ClassLabel(names=list(self.classes)))
