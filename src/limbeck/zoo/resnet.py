"""Residual networks of the CIFAR kind, 6n+2 layers deep (He et al. 2015, arXiv:1512.03385, section 4.2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.zoo.network import MeanPool, Network, pictures, positive


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut, `(B, C, H, W)` to `(B, D, H / stride, W / stride)`."""

    def __init__(self, channels: int, wide: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, wide, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(wide)
        same = stride == 1 and channels == wide
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(channels, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class ResNet(Network):
    """Three stages of residual blocks with 16, 32 and 64 channels times `width`.

    Args:
        input_shape: `(C, H, W)`.
        classes: logits.
        depth: 8, 14, 20, 32, ... (6n+2).
        width: multiplies the channels. The stem has 16 channels, 32 for widths above 1, as in the distillation literature,
            where depth 32 and width 4 is "resnet32x4" (7.43 M parameters on CIFAR-100) and depth 8 "resnet8x4" (1.23 M).

    Raises:
        UserError: a depth that is not 6n+2.
    """

    def __init__(self, input_shape: tuple[int, ...], classes: int, depth: int = 20, width: int = 1) -> None:
        channels = pictures(input_shape, "resnet")[0]
        positive("resnet", width=width)
        if depth < 8 or (depth - 2) % 6:
            raise UserError(f"network 'resnet': depth {depth} is not 6n+2", "give 8, 14, 20, 26, 32, 44, 56 or 110")
        now = 16 if width == 1 else 32
        stem = nn.Sequential(nn.Conv2d(channels, now, 3, 1, 1, bias=False), nn.BatchNorm2d(now), nn.ReLU())
        stages: list[nn.Module] = []
        for stage in range(3):
            wide = 16 * width * 2**stage
            strides = [1 if stage == 0 else 2] + [1] * ((depth - 2) // 6 - 1)
            blocks = [Block(now if number == 0 else wide, wide, stride) for number, stride in enumerate(strides)]
            stages.append(nn.Sequential(*blocks))
            now = wide
        super().__init__(stem, stages, MeanPool(), now, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
