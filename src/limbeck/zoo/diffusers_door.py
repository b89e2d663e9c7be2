"""Networks of the diffusers library under this package's contract of a denoising network, `network(x, level, label)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.errors import UserError

SUPPORTED = ("UNet2DModel", "DiTTransformer2DModel", "UNet2DConditionModel", "PixArtTransformer2DModel", "SD3Transformer2DModel")
"""Model classes of diffusers that can be read."""

TEXT = ("UNet2DConditionModel", "PixArtTransformer2DModel", "SD3Transformer2DModel")
"""Those that are told a text, here a row of a table of stored embeddings."""

NEEDS = {"UNet2DConditionModel": (), "PixArtTransformer2DModel": ("mask",), "SD3Transformer2DModel": ("pooled",)}


def library() -> Any:
    """The diffusers package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import diffusers
    except ImportError:
        raise UserError("diffusers is not installed", "`pip install 'limbeck[diffusers]'`") from None
    return diffusers


def kind_of(config: Mapping[str, Any]) -> str:
    """The supported class that a model's config.json names; the old name Transformer2DModel stands for two of them.

    Raises:
        UserError: it is none of `SUPPORTED`.
    """
    name = str(config.get("_class_name"))
    if name == "Transformer2DModel":  # DiT and PixArt as they were first published
        old = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
        name = old.get(str(config.get("norm_type")), name)
    if name not in SUPPORTED:
        raise UserError(f"a {name} of diffusers cannot be read as a denoiser", f"supported are {', '.join(SUPPORTED)}")
    return name


class DiffusersNetwork(nn.Module):
    """A network of diffusers, called as `network(x, level, label)`.

    Classes: a UNet2DModel has `num_class_embeds` rows of which the last means no class (`null=False`: all are classes, and there is no such
    row); a DiT has `num_embeds_ada_norm` classes and one more row for none; the others are told a text, the label being the row of a
    table of prompt embeddings, the last row the empty prompt. DiT's own random dropping of labels in training mode is switched off, for
    here the caller hides labels. Of a network that also gives a variance (twice the channels), the first half is the prediction.

    Args:
        kind: one of `SUPPORTED`.
        config: arguments of that class, as `config.json` has them.
        condition: for text-conditional networks the stored embeddings, or their shapes (lists; then zeros): "table" `(classes + 1, L, D)`,
            for PixArt also "mask" `(classes + 1, L)`, for SD3 and SDXL also "pooled" `(classes + 1, P)`.
        time_scale: what the level is multiplied by before the network is told it (1000 for flows).
        null: whether the last class of a UNet2DModel means none.
        model: the network, where it exists already; None makes one with random weights.

    Attributes:
        model: the network of diffusers.
        kind, config, time_scale: as given.
        classes, null_label: number of labels, and the one that means none (equal); 0 and None for unconditional networks.
        input_shape: `(C, H, W)`, or None where the configuration does not say.
        taps, middle: paths of the blocks in order of depth, and the one in the middle.
        source: the folder or hub id that it was opened from, or "".

    Raises:
        UserError: diffusers is missing, a class or a form of conditioning that is not supported, a configuration that the class does not
            take, stored embeddings that are missing or do not fit.
    """

    denoises = True

    def __init__(
        self,
        kind: str,
        config: Mapping[str, Any],
        *,
        condition: Mapping[str, Any] | None = None,
        time_scale: float = 1.0,
        null: bool = True,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__()
        kind = kind_of({**config, "_class_name": kind})
        plain = {key: value for key, value in config.items() if not key.startswith("_")}
        if model is None:
            try:
                model = getattr(library(), kind).from_config(plain)
            except (TypeError, ValueError, NotImplementedError, KeyError, RuntimeError) as error:
                raise UserError(f"diffusers cannot make this {kind}: {error}", "check its configuration") from None
        self.model: Any = model
        own = self.model.config
        self.kind, self.config, self.time_scale, self.null, self.source = kind, plain, float(time_scale), bool(null), ""
        if kind.startswith("UNet") and own.get("class_embed_type") is not None:
            raise UserError(f"a {kind} with class_embed_type {own.class_embed_type!r} is not supported", "only num_class_embeds is")
        self._widths(own)
        self.input_shape = self._shape(own)
        self.sizes = self._condition(condition)
        self.classes = self._classes(own)
        self.null_label = self.classes if self.classes else None
        if kind == "DiTTransformer2DModel":
            for part in self.model.modules():
                if hasattr(part, "dropout_prob") and hasattr(part, "embedding_table"):
                    part.dropout_prob = 0.0
        self.taps, self.middle = self._taps()
        args = {"config": plain, "condition": self.sizes or None, "time_scale": self.time_scale, "null": self.null}
        self.limbeck_config = {"ref": f"diffusers:{kind}", "args": args}

    # ---- what the configuration says ----

    def _widths(self, own: Any) -> None:
        given, made = int(own.in_channels), int(own.get("out_channels") or own.in_channels)
        if made not in (given, 2 * given):
            raise UserError(
                f"this {self.kind} reads {given} channels and gives {made}",
                "a denoiser gives as many as it reads, or twice as many with a variance",
            )
        self.channels = given

    def _shape(self, own: Any) -> tuple[int, int, int] | None:
        size = own.get("sample_size")
        if size is None:
            return None
        height, width = (int(size), int(size)) if isinstance(size, int) else (int(n) for n in size)
        return (self.channels, height, width)

    def _condition(self, condition: Mapping[str, Any] | None) -> dict[str, list[int]]:
        """Register the stored embeddings; gives their shapes."""
        if self.kind not in TEXT:
            if condition:
                raise UserError(f"a {self.kind} is told no text", "leave the prompts out")
            return {}
        added = self.model.config.get("addition_embed_type")
        if self.kind == "UNet2DConditionModel" and added not in (None, "text_time"):
            raise UserError(f"a {self.kind} with addition_embed_type {added!r} is not supported", "None and 'text_time' are")
        if self.kind == "UNet2DConditionModel" and self.model.config.get("num_class_embeds") is not None:
            raise UserError(f"a {self.kind} with num_class_embeds is told class and text", "give a network that is told one of them")
        names = ("table", *NEEDS[self.kind], *(("pooled",) if added == "text_time" else ()))
        condition = condition or {}
        lacking = [name for name in names if condition.get(name) is None]
        if lacking:
            raise UserError(
                f"a {self.kind} is told a text, and the embeddings {', '.join(lacking)} are missing",
                "give prompts, one for each class, to open_pipeline",
            )
        rows, sizes = set(), {}
        for name in names:
            value = condition[name]
            value = value.detach().clone().float() if isinstance(value, Tensor) else torch.zeros(*value)
            if value.ndim != (3 if name == "table" else 2) or len(value) < 2:
                raise UserError(f"stored embeddings {name!r} are {tuple(value.shape)}", "one row for each class and a last one for none")
            self.register_buffer(name, value)
            rows.add(len(value))
            sizes[name] = list(value.shape)
        if len(rows) != 1:
            raise UserError(f"stored embeddings have different numbers of rows: {sizes}", "one row for each class and a last one for none")
        return sizes

    def _classes(self, own: Any) -> int:
        if self.kind == "UNet2DModel":
            return max(0, int(own.get("num_class_embeds") or 0) - int(self.null and bool(own.get("num_class_embeds"))))
        if self.kind == "DiTTransformer2DModel":
            return int(own.num_embeds_ada_norm)
        return self.sizes["table"][0] - 1

    def _taps(self) -> tuple[tuple[str, ...], str]:
        if self.kind.startswith("UNet"):
            down = [f"model.down_blocks.{i}" for i in range(len(self.model.down_blocks))]
            middle = ["model.mid_block"] if self.model.mid_block is not None else []
            up = [f"model.up_blocks.{i}" for i in range(len(self.model.up_blocks))]
            return (*down, *middle, *up), (middle or down)[-1]
        # a block of SD3 gives (text, picture), and the picture's stream is what a critic wants: its last layers' output
        end = ".ff" if self.kind == "SD3Transformer2DModel" else ""
        blocks = tuple(f"model.transformer_blocks.{i}{end}" for i in range(len(self.model.transformer_blocks)))
        return blocks, blocks[(len(blocks) - 1) // 2]

    # ---- the contract ----

    def forward(self, x: Tensor, level: Tensor, label: Tensor | None = None) -> Tensor:
        """A tensor like `x`.

        Args:
            x: `(B, C, H, W)`.
            level: `(B,)` noise level; the network of diffusers is told `time_scale` times it.
            label: `(B,)` int64 in 0..classes, of which `classes` means none; None for none throughout.

        Raises:
            UserError: no class was asked for, and the network has no row that means that.
        """
        time = level * self.time_scale
        if self.classes and label is None:
            label = torch.full((len(x),), self.classes, dtype=torch.long, device=x.device)
        if self.kind == "UNet2DModel":
            if self.classes and not self.null and int(label.max()) >= self.classes:  # type: ignore[union-attr]
                raise UserError("this UNet2DModel has no label that means no class", "always give classes, and set guidance to 1")
            out = self.model(x, time, class_labels=label if self.classes else None)
        elif self.kind == "DiTTransformer2DModel":
            out = self.model(x, timestep=time, class_labels=label)
        else:
            out = self._told(x, time, label)
        return out.sample[:, : self.channels]

    def _told(self, x: Tensor, time: Tensor, row: Tensor) -> Any:
        text = self.table[row].to(x.dtype)
        if self.kind == "SD3Transformer2DModel":
            return self.model(x, encoder_hidden_states=text, pooled_projections=self.pooled[row].to(x.dtype), timestep=time)
        height, width = (8.0 * n for n in x.shape[-2:])  # in pixels: an autoencoder halves three times
        if self.kind == "PixArtTransformer2DModel":
            more: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
            if self.model.use_additional_conditions:
                more = {"resolution": x.new_tensor([[height, width]] * len(x)), "aspect_ratio": x.new_tensor([[height / width]] * len(x))}
            mask = self.mask[row]
            return self.model(x, encoder_hidden_states=text, timestep=time, added_cond_kwargs=more, encoder_attention_mask=mask)
        more = {}
        if "pooled" in self.sizes:
            size = x.new_tensor([[height, width, 0.0, 0.0, height, width]] * len(x))
            more = {"text_embeds": self.pooled[row].to(x.dtype), "time_ids": size}
        return self.model(x, time, encoder_hidden_states=text, added_cond_kwargs=more or None)
