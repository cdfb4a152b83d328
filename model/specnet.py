"""SpecNet, a channel that is learned from the spectrum of the whole clip.

From the course projects github.com/mgklee/anomalous-sound-detection and
github.com/enicole0164/ee488_DCASE2020-Task2 (2025). B batch, T samples, M mel bins, F frames.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio import N_SAMPLES
from model.tastgram import N_MELS

KERNEL = 8  # also the stride; three of them give T / 512 columns, as many as the log-mel has


class SpecNet(nn.Module):
    """SpecNet: waveform `(B, T)` -> `(B, M, F)`. Its columns are frequencies, not frames.

    Three convolutions over the magnitude of the Fourier transform of the whole clip, which has T
    values. These are symmetric: the columns lead from 0 to half the sample rate, and back. As
    published, the magnitude is neither scaled nor compressed; that of a loud clip exceeds the range
    of float16, so that it is computed outside autocast.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(1, N_MELS, KERNEL, KERNEL)
        self.conv2 = nn.Conv1d(N_MELS, N_MELS, KERNEL, KERNEL)
        self.conv3 = nn.Conv1d(N_MELS, N_MELS, KERNEL, KERNEL, padding=2)

    def forward(self, waveform: Tensor) -> Tensor:
        with torch.autocast(waveform.device.type, enabled=False):
            x = magnitude(waveform).unsqueeze(2)  # (B, T, 1)
            for conv in (self.conv1, self.conv2, self.conv3):
                x = convolve_blocks(conv, x)
        return x.transpose(1, 2)


def convolve_blocks(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """Convolve and apply a ReLU: `(B, L, C)` -> `(B, L / KERNEL, M)`.

    With a stride of the length of the kernel, a convolution is a matrix product over blocks of x.
    In this layout no value has to be moved, and training is faster than with `conv` itself.
    """
    padding = int(conv.padding[0])
    blocks = F.pad(x, (0, 0, padding, padding)).unflatten(1, (-1, KERNEL)).flatten(2)
    return F.relu(F.linear(blocks, conv.weight.transpose(1, 2).flatten(1), conv.bias))


def magnitude(waveform: Tensor) -> Tensor:
    """Return the magnitude of the Fourier transform `(B, T)`, in the precision of the waveform."""
    if torch.compiler.is_exporting():
        return magnitude_by_products(waveform)
    return torch.fft.fft(waveform).abs()


def magnitude_by_products(waveform: Tensor) -> Tensor:
    """Return the magnitude of the Fourier transform `(B, T)` in the form for ONNX: two transforms
    of length sqrt(T), which are matrix products, with phase factors between them.

    ONNX Runtime (1.32) computes a transform of length T with an error of 1 percent, in thirty times
    the time of these products.
    """
    size = math.isqrt(N_SAMPLES)  # 400
    index = torch.arange(size, dtype=torch.float64)
    angle = -2.0 * math.pi * torch.outer(index, index)
    cos, sin = (angle / size).cos().float(), (angle / size).sin().float()
    cos_between, sin_between = (angle / N_SAMPLES).cos().float(), (angle / N_SAMPLES).sin().float()
    rows = waveform.unflatten(1, (size, size))
    real, imaginary = cos @ rows, sin @ rows
    real, imaginary = (
        real * cos_between - imaginary * sin_between,
        real * sin_between + imaginary * cos_between,
    )
    real, imaginary = real @ cos - imaginary @ sin, real @ sin + imaginary @ cos
    return (real.square() + imaginary.square()).sqrt().transpose(1, 2).flatten(1)
