"""MobileFaceNet (Chen et al., CCBR 2018) as the method uses it: spectrogram channels -> 128-d embedding.

Attribute names and layer order are those of the published weight files.
"""

import math

from torch import Tensor, nn

EMBEDDING_SIZE = 128
# expansion, width, repeats, stride of the first repeat
BOTTLENECKS = ((2, 128, 2, 2), (4, 128, 2, 2), (4, 128, 2, 2))


class ConvBlock(nn.Module):
    """Convolution, batch norm and, unless `linear`, PReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.prelu = nn.Identity() if linear else nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, linear 1x1 projection; residual where the shape allows it."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.has_residual = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.PReLU(width),
            nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.PReLU(width),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.has_residual else self.conv(x)


class MobileFaceNet(nn.Module):
    """Features `(B, channels, 128, 313)` -> embedding `(B, 128)`.

    `fc_out` is the plain linear classifier of the cross-entropy baseline. It is always there, since the published
    weight files hold it, but the embedding does not pass through it.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = ConvBlock(channels, 64, 3, stride=2, padding=1)  # (B, 64, 64, 157)
        self.dw_conv1 = ConvBlock(64, 64, 3, padding=1, groups=64)
        blocks, width = [], 64
        for expansion, outputs, repeats, first_stride in BOTTLENECKS:
            for repeat in range(repeats):
                blocks.append(Bottleneck(width, outputs, first_stride if repeat == 0 else 1, expansion))
                width = outputs
        self.blocks = nn.Sequential(*blocks)  # (B, 128, 8, 20)
        self.conv2 = ConvBlock(width, 512, 1)
        self.linear7 = ConvBlock(512, 512, (8, 20), groups=512, linear=True)  # (B, 512, 1, 1)
        self.linear1 = ConvBlock(512, EMBEDDING_SIZE, 1, linear=True)
        self.fc_out = nn.Linear(EMBEDDING_SIZE, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                height, length = module.kernel_size
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / (height * length * module.out_channels)))

    def forward(self, features: Tensor) -> Tensor:
        x = self.blocks(self.dw_conv1(self.conv1(features)))
        return self.linear1(self.linear7(self.conv2(x))).flatten(1)
