"""The three channels of the TASTgram: Tgram, log-mel spectrogram (Sgram) and temporally attended
log-mel (TAgram).

Choi & Choi, "Noisy-ArcMix: Additive Noisy Angular Margin Loss Combined With Mixup for Anomalous
Sound Detection", ICASSP 2024, section 2.1. B batch, T samples, M mel bins, F frames.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn

SAMPLE_RATE = 16_000  # Hz
SECONDS = 10  # of every clip, from its start
N_SAMPLES = SAMPLE_RATE * SECONDS
N_FFT = 2048  # samples, and the length of the window
HOP_LENGTH = 512  # samples
N_MELS = 128
N_FRAMES = N_SAMPLES // HOP_LENGTH + 1  # 313
POWER_FLOOR = 2.220446049250313e-16  # added to the mel power before the logarithm, as published


class LogMel(nn.Module):
    """Log-mel spectrogram in dB: waveform `(B, T)` -> `(B, 1, M, F)`, always in float32.

    Slaney mel scale and filter norm, power 2, frames centred on zero-padded ends; neither level nor
    statistics are normalised. It has no weights and is no part of the network: its buffers must not
    be in the state dict.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mel = torchaudio.transforms.MelSpectrogram(
            SAMPLE_RATE,
            N_FFT,
            hop_length=HOP_LENGTH,
            n_mels=N_MELS,
            pad_mode="constant",
            norm="slaney",
            mel_scale="slaney",
        )

    @torch.no_grad()
    def forward(self, waveform: Tensor) -> Tensor:
        with torch.autocast(
            waveform.device.type, enabled=False
        ):  # half precision is off by up to 0.3 dB
            power = self.mel(waveform.float())  # (B, M, F)
            return 10.0 * torch.log10(power + POWER_FLOOR).unsqueeze(1)


class FrontEnd(nn.Module):
    """What the network is fed with, by name: samples int16 `(B, T)` -> `{"waveform": (B, T),
    "log_mel": (B, 1, M, F)}`.

    The waveform lies in [-1, 1). Holds only what the channels need. Mixup works on these, each on
    its own.
    """

    def __init__(self, channels: Collection[str]) -> None:
        super().__init__()
        self.keeps_waveform = "tgram" in channels
        self.log_mel = LogMel() if set(channels) - {"tgram"} else None

    def forward(self, samples: Tensor) -> dict[str, Tensor]:
        return self.inputs(samples.float() / 32768.0)

    def inputs(self, waveform: Tensor) -> dict[str, Tensor]:
        """The same from a waveform float32 `(B, T)` in [-1, 1)."""
        inputs = {"waveform": waveform} if self.keeps_waveform else {}
        return inputs if self.log_mel is None else inputs | {"log_mel": self.log_mel(waveform)}


class TgramNet(nn.Module):
    """Tgram, a learned temporal representation: waveform `(B, T)` -> `(B, M, F)`.

    A strided convolution with the hop and as many filters as the log-mel has bins, so that both
    align frame by frame, then three blocks of layer norm over the frames, leaky ReLU and
    convolution. The attribute names, spelling included, are those of the published weight files.

    The first convolution is computed as one matrix product over overlapping frames: with one input
    channel and a thousand taps that is no slower anywhere, and convolution libraries may have no
    good kernel for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv_extrctor = nn.Conv1d(
            1, N_MELS, kernel_size=1024, stride=HOP_LENGTH, padding=512, bias=False
        )
        self.conv_encoder = nn.Sequential(
            *(
                nn.Sequential(
                    nn.LayerNorm(N_FRAMES),
                    nn.LeakyReLU(0.2),
                    nn.Conv1d(N_MELS, N_MELS, kernel_size=3, padding=1, bias=False),
                )
                for _ in range(3)
            )
        )

    def forward(self, waveform: Tensor) -> Tensor:
        conv = self.conv_extrctor
        size, hop, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        frames = F.pad(waveform, (padding, padding)).unfold(1, size, hop)  # (B, F, size)
        return self.conv_encoder(F.linear(frames, conv.weight.squeeze(1)).transpose(1, 2))


def temporal_gate(log_mel: Tensor) -> Tensor:
    """`sigmoid(max over mels + mean over mels)` of each frame: `(..., M, F)` -> `(..., 1, F)`."""
    return torch.sigmoid(log_mel.amax(dim=-2, keepdim=True) + log_mel.mean(dim=-2, keepdim=True))


def temporal_attention(log_mel: Tensor) -> Tensor:
    """TAgram: each frame of `log_mel` `(..., M, F)` in dB, weighted by its gate.

    As published the gate is that of the dB values themselves, so that it is all but shut on quiet
    recordings.
    """
    return temporal_gate(log_mel) * log_mel
