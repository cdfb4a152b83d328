"""MobileFaceNet (Chen et al., CCBR 2018), the backbone: spectrogram channels -> embedding.

Attribute names and layer order are those of the published weight files. B clips, C channels,
H x W values in a feature map.
"""

import math

from torch import Tensor, nn

from model.batch_norm import BatchNorm

EMBEDDING_SIZE = 128
# Expansion, output channels, repeats, stride of the first repeat.
BOTTLENECKS = ((2, 128, 2, 2), (4, 128, 2, 2), (4, 128, 2, 2))


class WholeMapConv2d(nn.Conv2d):
    """Depthwise convolution with a kernel as large as its input: `(B, C, H, W)` -> `(B, C, 1, 1)`.

    It is computed as a product and a sum: convolution libraries have no fast kernel for the
    gradients at this size.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = (x * self.weight.squeeze(1)).sum(dim=(2, 3), keepdim=True)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)


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
        conv: type[nn.Conv2d] = nn.Conv2d,
    ) -> None:
        super().__init__()
        self.conv = conv(inputs, outputs, kernel_size, stride, padding, groups=groups, bias=False)
        self.bn = BatchNorm(outputs)
        self.prelu = nn.Identity() if linear else nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution and linear 1x1 projection, with a residual
    connection where input and output have the same shape.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.has_residual = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            BatchNorm(width),
            nn.PReLU(width),
            nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False),
            BatchNorm(width),
            nn.PReLU(width),
            nn.Conv2d(width, outputs, 1, bias=False),
            BatchNorm(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.has_residual else self.conv(x)


class MobileFaceNet(nn.Module):
    """Features `(B, channels, 128, 313)` -> embedding `(B, 128)`.

    `fc_out` is the linear classifier of the cross-entropy baseline. It is always built, since the
    published weight files contain it, and applied by `TASTgramMFN` alone.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = ConvBlock(channels, 64, 3, stride=2, padding=1)  # (B, 64, 64, 157)
        self.dw_conv1 = ConvBlock(64, 64, 3, padding=1, groups=64)
        blocks: list[nn.Module] = []
        width = 64
        for expansion, outputs, repeats, first_stride in BOTTLENECKS:
            for repeat in range(repeats):
                stride = first_stride if repeat == 0 else 1
                blocks.append(Bottleneck(width, outputs, stride, expansion))
                width = outputs
        self.blocks = nn.Sequential(*blocks)  # (B, 128, 8, 20)
        self.conv2 = ConvBlock(width, 512, 1)
        self.linear7 = ConvBlock(512, 512, (8, 20), groups=512, linear=True, conv=WholeMapConv2d)
        self.linear1 = ConvBlock(512, EMBEDDING_SIZE, 1, linear=True)
        self.fc_out = nn.Linear(EMBEDDING_SIZE, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                kernel_height, kernel_width = module.kernel_size
                fan_out = kernel_height * kernel_width * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))

    def forward(self, features: Tensor) -> Tensor:
        x = self.blocks(self.dw_conv1(self.conv1(features)))
        return self.linear1(self.linear7(self.conv2(x))).flatten(1)
