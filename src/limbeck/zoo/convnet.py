"""The plain convolutional network of the data-set condensation papers."""

from __future__ import annotations

from torch import Tensor, nn

from limbeck.errors import UserError, unknown
from limbeck.zoo.network import MeanPool, Network, pictures, positive

NORMS = ("instance", "batch", "group", "none")
POOLS = ("avg", "max")


class Flatten(nn.Module):
    """`(B, C, H, W)` to `(B, C * H * W)`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def _norm(kind: str, width: int) -> list[nn.Module]:
    if kind == "instance":  # one group a channel, with affine weights: what this literature calls instance norm
        return [nn.GroupNorm(width, width)]
    if kind == "batch":
        return [nn.BatchNorm2d(width)]
    return [nn.GroupNorm(min(4, width), width)] if kind == "group" else []


class ConvNet(Network):
    """Blocks of convolution, norm, ReLU and 2x2 pooling; flattened features; a linear head.

    "The ConvNet" of gradient, distribution and trajectory matching (`depth` 3, `width` 128, instance norm, average pooling for pictures
    of 32 pixels). A picture of 8 pixels takes depth 2 or 3.

    Args:
        input_shape: `(C, H, W)`.
        classes: logits.
        width: channels of every block (a multiple of 4 for `norm="group"`).
        depth: blocks; each halves height and width.
        norm: "instance", "batch", "group" (4 groups) or "none".
        pool: "avg" or "max".
        kernel: side of the convolutions, odd.
        out: channels of a last 1x1 convolution (with norm and ReLU) whose global mean is the embedding, so that networks of all sizes
            have one width there; 0 for flattened features.
    """

    plain_start = True

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int,
        width: int = 128,
        depth: int = 3,
        norm: str = "instance",
        pool: str = "avg",
        kernel: int = 3,
        out: int = 0,
    ) -> None:
        channels, height, rows = pictures(input_shape, "convnet")
        positive("convnet", width=width, depth=depth)
        if norm not in NORMS:
            raise unknown("norm of convnet", norm, NORMS)
        if pool not in POOLS:
            raise unknown("pool of convnet", pool, POOLS)
        if min(height, rows) < 2**depth:
            raise UserError(f"network 'convnet': {depth} blocks halve {height} x {rows} pixels to nothing", "give a smaller depth")
        positive("convnet", kernel=kernel)
        if kernel % 2 == 0 or out < 0:
            raise UserError(f"network 'convnet': kernel {kernel}, out {out}", "give an odd kernel and out of at least 0")
        if norm == "group" and width % min(4, width):
            raise UserError(f"network 'convnet': width {width} does not divide into 4 groups", "give a multiple of 4")
        blocks: list[nn.Module] = []
        for _ in range(depth):
            pooling = nn.AvgPool2d(2) if pool == "avg" else nn.MaxPool2d(2)
            blocks.append(nn.Sequential(nn.Conv2d(channels, width, kernel, padding=kernel // 2), *_norm(norm, width), nn.ReLU(), pooling))
            channels, height, rows = width, height // 2, rows // 2
        if out:
            blocks.append(nn.Sequential(nn.Conv2d(channels, out, 1), *_norm(norm, out), nn.ReLU()))
            super().__init__(nn.Identity(), blocks, MeanPool(), out, classes)
        else:
            super().__init__(nn.Identity(), blocks, Flatten(), channels * height * rows, classes)
