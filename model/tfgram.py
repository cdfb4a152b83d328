"""TFgram, a channel that is learned from the waveform in short steps.

Huang et al., "Noise Supervised Contrastive Learning and Feature-Perturbed for Anomalous Sound
Detection" (OS-SCL), ICASSP 2025. B batch, T samples, M mel bins, F frames.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch_norm import BatchNorm
from model.tastgram import N_FRAMES, N_MELS


class TFgramNet(nn.Module):
    """TFgram: waveform `(B, T)` -> `(B, M, F)`.

    A convolution with a stride of 5 samples, then three blocks, each with a pooling, that lead to
    the frames of the log-mel. As published, the weights of the convolutions are initialised by
    Xavier's rule.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(1, 64, kernel_size=11, stride=5, padding=5, bias=False),
            BatchNorm(64),
            nn.ReLU(),
            # (B, 64, 32000)
            convolutions(64, 64),
            nn.MaxPool1d(4),
            # (B, 64, 8000)
            convolutions(64, N_MELS),
            AdaptiveMaxPool(2 * N_FRAMES),
            convolutions(N_MELS, N_MELS),
            AdaptiveMaxPool(N_FRAMES),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, waveform: Tensor) -> Tensor:
        return self.layers(waveform.unsqueeze(1))


def convolutions(inputs: int, outputs: int) -> nn.Module:
    """Make two convolutions over time, the second one dilated: `(B, inputs, L)` -> `(B, outputs,
    L)`.
    """
    return nn.Sequential(
        nn.Conv1d(inputs, outputs, kernel_size=3, padding=1, bias=False),
        BatchNorm(outputs),
        nn.ReLU(),
        nn.Conv1d(outputs, outputs, kernel_size=3, padding=2, dilation=2, bias=False),
        BatchNorm(outputs),
        nn.ReLU(),
    )


class AdaptiveMaxPool(nn.Module):
    """Maxima over `size` windows that cover the time evenly: `(B, C, L)` -> `(B, C, size)`.

    PyTorch's exporter to ONNX has no translation of this pooling: there, the windows are read by
    their indices.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            return F.adaptive_max_pool1d(x, self.size)
        length, number = x.shape[2], torch.arange(self.size)
        start, end = number * length // self.size, -(-(number + 1) * length // self.size)
        longest = length // self.size + 2
        window = start.unsqueeze(1) + torch.arange(longest)  # (size, longest)
        # A shorter window repeats its last element.
        return x[:, :, window.minimum(end.unsqueeze(1) - 1)].amax(dim=3)
