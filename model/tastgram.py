"""The three channels of the TASTgram: Tgram, Sgram (log-mel spectrogram) and TAgram (log-mel
spectrogram with temporal attention).

Choi & Choi, "Noisy-ArcMix: Additive Noisy Angular Margin Loss Combined With Mixup for Anomalous
Sound Detection", ICASSP 2024, section 2.1. B batch, T samples, M mel bins, F frames.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn

from audio import N_SAMPLES, SAMPLE_RATE, SECONDS

N_FFT = 2048  # samples; also the length of the window
HOP_LENGTH = 512  # samples
N_MELS = 128
N_BANDS = 16  # of equally many mel bins, in which sounds are compared
N_FRAMES = N_SAMPLES // HOP_LENGTH + 1  # 313
POWER_FLOOR = 2.220446049250313e-16  # added to the mel power before the logarithm, as published


class LogMel(nn.Module):
    """Log-mel spectrogram in dB: waveform `(B, T)` -> `(B, 1, M, F)`, always in float32.

    Slaney mel scale and filter norm, power 2, centred frames with zero padding. Neither the level
    of the clip nor its statistics are normalised. It has no weights, and is not a submodule of the
    network: its buffers must not be in the state dict.
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
        # In half precision the result is off by up to 0.3 dB.
        with torch.autocast(waveform.device.type, enabled=False):
            power = self.mel(waveform.float())  # (B, M, F)
            return 10.0 * torch.log10(power + POWER_FLOOR).unsqueeze(1)


def spectrum_of(log_mel: Tensor) -> Tensor:
    """Mean and standard deviation over time of each mel bin, in dB: log-mel `(B, 1, M, F)` ->
    `(B, 2 M)`.
    """
    bins = log_mel.squeeze(1)
    return torch.cat([bins.mean(dim=2), bins.std(dim=2, correction=0)], dim=1)


def levels_of(log_mel: Tensor) -> Tensor:
    """Mean level of each of N_BANDS bands of mel bins in each second, in dB: log-mel `(B, 1, M, F)`
    -> `(B, N_BANDS, SECONDS)`.
    """
    bands = log_mel.squeeze(1).unflatten(1, (N_BANDS, -1)).mean(dim=2)
    second = torch.arange(N_FRAMES, device=log_mel.device) * HOP_LENGTH // SAMPLE_RATE
    is_in = F.one_hot(second.clamp(max=SECONDS - 1), SECONDS).to(bands.dtype)  # (F, SECONDS)
    return bands @ (is_in / is_in.sum(dim=0))


@functools.cache
def mel_frequencies() -> np.ndarray:
    """Return the centre of each mel bin in Hz `(M,)`, to 1 Hz."""
    nyquist = SAMPLE_RATE // 2
    filters = torchaudio.functional.melscale_fbanks(
        nyquist + 1, 0, nyquist, N_MELS, SAMPLE_RATE, mel_scale="slaney"
    )
    return filters.argmax(dim=0).numpy().astype(float)


def band_edges() -> np.ndarray:
    """Return the limits of the N_BANDS bands of mel bins in Hz `(N_BANDS + 1,)`."""
    centres = mel_frequencies()
    width = N_MELS // N_BANDS
    inner = (centres[width - 1 : -1 : width] + centres[width::width]) / 2
    return np.array([0, *inner, SAMPLE_RATE / 2])


class TgramNet(nn.Module):
    """Tgram, a learned temporal representation: waveform `(B, T)` -> `(B, M, F)`.

    A strided convolution, then three blocks of layer norm over the frames, leaky ReLU and
    convolution. The strided convolution has the hop of the log-mel and a filter for each mel bin,
    so that both have the same shape. The attribute names, spelling included, are those of the
    published weight files.

    The first convolution is computed as a matrix product over overlapping frames: with one input
    channel and a kernel of 1024 samples this is never slower, and convolution libraries may have no
    fast kernel for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv_extrctor = nn.Conv1d(
            1, N_MELS, kernel_size=1024, stride=HOP_LENGTH, padding=512, bias=False
        )
        self.conv_encoder = nn.Sequential(
            self.encoder_block(), self.encoder_block(), self.encoder_block()
        )

    @staticmethod
    def encoder_block() -> nn.Module:
        return nn.Sequential(
            nn.LayerNorm(N_FRAMES),
            nn.LeakyReLU(0.2),
            nn.Conv1d(N_MELS, N_MELS, kernel_size=3, padding=1, bias=False),
        )

    def forward(self, waveform: Tensor) -> Tensor:
        conv = self.conv_extrctor
        size, hop, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        frames = F.pad(waveform, (padding, padding)).unfold(1, size, hop)  # (B, F, size)
        tgram = F.linear(frames, conv.weight.squeeze(1)).transpose(1, 2)  # (B, M, F)
        return self.conv_encoder(tgram)


def temporal_gate(log_mel: Tensor) -> Tensor:
    """Weight of each frame, `sigmoid(max over mels + mean over mels)`: `(..., M, F)` ->
    `(..., 1, F)`.
    """
    return torch.sigmoid(log_mel.amax(dim=-2, keepdim=True) + log_mel.mean(dim=-2, keepdim=True))


class TemporalAttention(nn.Module):
    """TAgram: each frame of a log-mel `(..., M, F)` in dB, multiplied by its `temporal_gate`.

    As published, the gate is computed from the dB values themselves, which are negative in quiet
    recordings: there it is close to 0. It has no weights.
    """

    def forward(self, log_mel: Tensor) -> Tensor:
        return temporal_gate(log_mel) * log_mel
