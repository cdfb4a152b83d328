"""The input channels of the network, and the front end that computes what they need.

B batch, T samples, M mel bins, F frames.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

from torch import Tensor, nn

from model.specnet import SpecNet
from model.tastgram import LogMel, TemporalAttention, TgramNet
from model.tfgram import TFgramNet


class Channel(NamedTuple):
    """An input channel of the network.

    Attributes:
        source: The input that it is computed from: waveform `(B, T)` or log_mel `(B, M, F)`. In the
            latter case its rows are mel bins, in dB.
        build: Make the module that computes the channel `(B, M, F)`.
        module_name: The name of this module in the state dict.
        columns: What the columns are, where they are not frames.
        activations: Bytes that a clip keeps for the gradients of this module, in half precision;
            0 for a published channel.
    """

    source: str
    build: Callable[[], nn.Module]
    module_name: str
    columns: str = ""
    activations: int = 0


# In the order in which they are stacked
CHANNELS = {
    "tgram": Channel("waveform", TgramNet, "tgramnet"),
    "sgram": Channel("log_mel", nn.Identity, "sgram"),
    "tagram": Channel("log_mel", TemporalAttention, "tagram"),
    "tfgram": Channel("waveform", TFgramNet, "tfgramnet", activations=40_000_000),
    "specnet": Channel(
        "waveform",
        SpecNet,
        "specnet",
        columns="frequencies, 0 to 8 kHz and back",
        activations=24_000_000,
    ),
}
PUBLISHED_CHANNELS = ("tgram", "sgram", "tagram")


class FrontEnd(nn.Module):
    """Inputs of the network by name: samples int16 `(B, T)` -> waveform `(B, T)` in [-1, 1) and
    log_mel `(B, 1, M, F)` in dB.

    Inputs that none of the `channels` needs are left out. Mixup is applied to each input
    separately.
    """

    def __init__(self, channels: Collection[str]) -> None:
        super().__init__()
        sources = {CHANNELS[name].source for name in channels}
        self.has_waveform = "waveform" in sources
        self.log_mel = LogMel() if "log_mel" in sources else None

    def forward(self, samples: Tensor) -> dict[str, Tensor]:
        return self.inputs(samples.float() / 32768.0)

    def inputs(self, waveform: Tensor) -> dict[str, Tensor]:
        """Return the inputs of the network for a waveform, float32 `(B, T)` in [-1, 1)."""
        inputs = {}
        if self.has_waveform:
            inputs["waveform"] = waveform
        if self.log_mel is not None:
            inputs["log_mel"] = self.log_mel(waveform)
        return inputs
