"""TASTgram-MFN: TASTgram input, MobileFaceNet backbone, a similarity to each class.

B batch, T samples, M mel bins, F frames, C classes, E embedding.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.mobilefacenet import EMBEDDING_SIZE, MobileFaceNet
from model.tastgram import TgramNet, temporal_attention

PUBLISHED_CHANNELS = ("tgram", "sgram", "tagram")
CHANNELS = (*PUBLISHED_CHANNELS,)  # all channels, in the order in which they are stacked
HEADS = ("arcface", "fc_out")
# Names in the state dict
HEAD_WEIGHTS = ("arcface.weight", "mobilefacenet.fc_out.weight", "mobilefacenet.fc_out.bias")


class CosineHead(nn.Module):
    """Cosine of the angle between an embedding and the centre of each class: `(B, E)` -> `(B, C)`.

    With `sub_centers` > 1 (sub-centre ArcFace, Deng et al., ECCV 2020) a class has several centres,
    in neighbouring rows of `weight`, and the closest one counts. The loss, which knows the labels,
    adds the angular margin.
    """

    def __init__(self, num_classes: int, sub_centers: int = 1) -> None:
        super().__init__()
        self.sub_centers = sub_centers
        self.weight = nn.Parameter(torch.empty(num_classes * sub_centers, EMBEDDING_SIZE))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, embedding: Tensor) -> Tensor:
        cosine = F.linear(F.normalize(embedding), F.normalize(self.weight))  # (B, C * sub_centers)
        return cosine.unflatten(1, (-1, self.sub_centers)).amax(dim=2)


class TASTgramMFN(nn.Module):
    """The network: waveform `(B, T)` and log-mel `(B, 1, M, F)` in dB -> similarity `(B, C)` and
    embedding `(B, E)`.

    `FrontEnd` computes the inputs; an input that no channel needs may be left out.

    The similarity is the cosine to each class centre with `head="arcface"`, and the output of the
    linear layer with `head="fc_out"`. Both heads are always built, as in the published weight
    files, and the unused one is frozen. Only the input channels named in `channels` are built; they
    are stacked in the order of `CHANNELS`.
    """

    def __init__(
        self,
        num_classes: int,
        channels: Sequence[str] = PUBLISHED_CHANNELS,
        head: str = "arcface",
        sub_centers: int = 1,
    ) -> None:
        super().__init__()
        assert channels
        assert set(channels) <= set(CHANNELS), channels
        assert head in HEADS, head
        self.channels = tuple(channel for channel in CHANNELS if channel in channels)
        self.num_classes, self.head = num_classes, head
        if "tgram" in self.channels:
            self.tgramnet = TgramNet()
        self.mobilefacenet = MobileFaceNet(len(self.channels), num_classes)
        self.arcface = CosineHead(num_classes, sub_centers)
        # DistributedDataParallel stops at parameters that require a gradient and get none.
        unused = self.mobilefacenet.fc_out if head == "arcface" else self.arcface
        unused.requires_grad_(False)

    def move_to(self, device: torch.device) -> "TASTgramMFN":
        """Move the network to a device, in the memory format with the fastest convolutions."""
        return self.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, waveform: Tensor | None = None, log_mel: Tensor | None = None) -> Tensor:
        """Return the TASTgram `(B, channels, M, F)`."""
        stack = []
        if "tgram" in self.channels:
            stack.append(self.tgramnet(waveform).unsqueeze(1))
        if "sgram" in self.channels:
            assert log_mel is not None
            stack.append(log_mel)
        if "tagram" in self.channels:
            assert log_mel is not None
            stack.append(temporal_attention(log_mel))
        return torch.cat(stack, dim=1)

    def forward(
        self, waveform: Tensor | None = None, log_mel: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        embedding = self.mobilefacenet(self.features(waveform, log_mel))
        head = self.arcface if self.head == "arcface" else self.mobilefacenet.fc_out
        with torch.autocast(embedding.device.type, enabled=False):  # angles need float32
            embedding = embedding.to(head.weight.dtype)
            return head(embedding), embedding

    def centres(self) -> Tensor:
        """Return the K centres of each class `(C, K, E)`; with `head="fc_out"` these are the
        weights of the linear layer, and K = 1.
        """
        if self.head == "fc_out":
            return self.mobilefacenet.fc_out.weight.detach().unsqueeze(1)
        return self.arcface.weight.detach().unflatten(0, (-1, self.arcface.sub_centers))
