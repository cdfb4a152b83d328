"""MobileFaceNet (Chen et al., CCBR 2018), the backbone: spectrogram channels -> embedding.

Attribute names and layer order are those of the published weight files. B clips, C channels,
H x W values in a feature map.
"""

import copy
import itertools
import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from distributed import sum_over_ranks, world_size

Network = TypeVar("Network", bound=nn.Module)
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


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm with the statistics of the whole batch, also where several processes share it.

    All processes then have the same running statistics. One collective runs in the forward pass
    and one in the backward pass. The moments of the processes are combined in float64, so that the
    variance does not suffer from cancellation.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        dtype = self.weight.dtype  # float32, also where x is in half precision
        local_var, local_mean = torch.var_mean(x.to(dtype), dim=(0, 2, 3), correction=0)
        local_var, local_mean = local_var.double(), local_mean.double()
        local_count = local_mean.new_full((1,), x.numel() // x.shape[1])
        local_sum = local_count * local_mean
        local_sum_of_squares = local_count * (local_var + local_mean.square())
        sums = sum_over_ranks(torch.cat([local_sum, local_sum_of_squares, local_count]))
        total, total_square, count = sums.split([self.num_features, self.num_features, 1])
        mean = total / count
        var = total_square / count - mean.square()
        with torch.no_grad():
            momentum = self.momentum or 0.0
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(dtype), momentum)
            self.running_var.lerp_((var * count / (count - 1)).to(dtype), momentum)
        scale = self.weight * torch.rsqrt(var + self.eps).to(dtype)
        shift = self.bias - mean.to(dtype) * scale
        return torch.addcmul(shift.view(1, -1, 1, 1), x, scale.view(1, -1, 1, 1)).to(x.dtype)


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
        self.bn = BatchNorm2d(outputs)
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
            BatchNorm2d(width),
            nn.PReLU(width),
            nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False),
            BatchNorm2d(width),
            nn.PReLU(width),
            nn.Conv2d(width, outputs, 1, bias=False),
            BatchNorm2d(outputs),
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


def fold_batch_norm(network: Network) -> Network:
    """Return a copy of a network for evaluation, with batch norms folded into the convolutions
    before them.

    Its outputs are equal up to rounding (about 3e-7 in a cosine). Each folded batch norm saves one
    pass over the memory.
    """
    folded = copy.deepcopy(network).eval()
    for parent in list(folded.modules()):
        children = list(parent.named_children())
        for (name, conv), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())
    return folded
