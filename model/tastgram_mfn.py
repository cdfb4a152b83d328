"""TASTgram-MFN: TASTgram input, MobileFaceNet backbone, a similarity to each class.

B batch, T samples, M mel bins, F frames, C classes, E embedding.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch_norm import BatchNorm
from model.channels import CHANNELS, PUBLISHED_CHANNELS
from model.mobilefacenet import EMBEDDING_SIZE, MobileFaceNet

HEADS = ("arcface", "projected", "fc_out")
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


class Projection(nn.Sequential):
    """Embedding -> feature, both `(B, E)`: the perturbation head of OS-SCL (Huang et al., ICASSP
    2025), whose batch norms come after the ReLUs.
    """

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(EMBEDDING_SIZE, EMBEDDING_SIZE // 2),
            nn.ReLU(),
            BatchNorm(EMBEDDING_SIZE // 2),
            nn.Linear(EMBEDDING_SIZE // 2, EMBEDDING_SIZE),
            nn.ReLU(),
            BatchNorm(EMBEDDING_SIZE),
        )


class TASTgramMFN(nn.Module):
    """The network: waveform `(B, T)` and log-mel `(B, 1, M, F)` in dB -> similarity `(B, C)` and
    embedding `(B, E)`.

    `FrontEnd` computes the inputs; an input that no channel needs may be left out.

    The similarity is the cosine to each class centre with `head="arcface"`, and the output of the
    linear layer with `head="fc_out"`. With `head="projected"` the embedding is that of the backbone
    after a `Projection`, and the similarity is its cosine to each class centre. Class centres and
    linear layer are always built, as in the published weight files, and the unused one is frozen.
    Only the input channels named in `channels` are built; they are stacked in the order of
    `CHANNELS`.
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
        self.channels = tuple(name for name in CHANNELS if name in channels)
        self.num_classes, self.head = num_classes, head
        for name in self.channels:
            self.add_module(CHANNELS[name].module_name, CHANNELS[name].build())
        self.mobilefacenet = MobileFaceNet(len(self.channels), num_classes)
        self.arcface = CosineHead(num_classes, sub_centers)
        self.projection = Projection() if head == "projected" else nn.Identity()
        # DistributedDataParallel stops at parameters that require a gradient and get none.
        unused = self.arcface if head == "fc_out" else self.mobilefacenet.fc_out
        unused.requires_grad_(False)

    def move_to(self, device: torch.device) -> "TASTgramMFN":
        """Move the network to a device, in the memory format with the fastest convolutions."""
        return self.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, waveform: Tensor | None = None, log_mel: Tensor | None = None) -> Tensor:
        """Return the input channels, stacked `(B, channels, M, F)`."""
        sources = {"waveform": waveform, "log_mel": None if log_mel is None else log_mel.squeeze(1)}
        stack = []
        for channel in (CHANNELS[name] for name in self.channels):
            module = self.get_submodule(channel.module_name)
            stack.append(module(sources[channel.source]))
        return torch.stack(stack, dim=1)

    def forward(
        self, waveform: Tensor | None = None, log_mel: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        embedding = self.mobilefacenet(self.features(waveform, log_mel))
        head = self.mobilefacenet.fc_out if self.head == "fc_out" else self.arcface
        with torch.autocast(embedding.device.type, enabled=False):  # angles need float32
            embedding = self.projection(embedding.to(head.weight.dtype))
            return head(embedding), embedding

    def centres(self) -> Tensor:
        """Return the K centres of each class `(C, K, E)`; with `head="fc_out"` these are the
        weights of the linear layer, and K = 1.
        """
        if self.head == "fc_out":
            return self.mobilefacenet.fc_out.weight.detach().unsqueeze(1)
        return self.arcface.weight.detach().unflatten(0, (-1, self.arcface.sub_centers))
