"""A plain convolutional network, small enough to train on the digits in seconds."""

from __future__ import annotations

from torch import nn

from limbeck.zoo.network import MeanPool, Network, pictures, positive


class CNN(Network):
    """Convolution-BatchNorm-ReLU stages and a global mean.

    Channels are `width` in stage 0 and double at stages 1, 3, 5, ..., where height and width are halved.

    Args:
        input_shape: `(C, H, W)`.
        classes: logits.
        width: channels of the first stage.
        depth: stages. On digits, width 8 and depth 3 make 3 778 parameters, width 30 and depth 4 make 115 k.
    """

    plain_start = True

    def __init__(self, input_shape: tuple[int, ...], classes: int, width: int = 8, depth: int = 3) -> None:
        channels = pictures(input_shape, "cnn")[0]
        positive("cnn", width=width, depth=depth)
        stages: list[nn.Module] = []
        for stage in range(depth):
            wide = width * 2 ** ((stage + 1) // 2)
            convolution = nn.Conv2d(channels, wide, 3, stride=1 + stage % 2, padding=1, bias=False)
            stages.append(nn.Sequential(convolution, nn.BatchNorm2d(wide), nn.ReLU()))
            channels = wide
        super().__init__(nn.Identity(), stages, MeanPool(), channels, classes)
