"""What a network gives for clips in evaluation mode: for validation and for scoring."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.mkldnn import to_mkldnn
from tqdm import tqdm

from dataloader import ClipSet, batches
from model import EMBEDDING_SIZE, FrontEnd, MobileFaceNet, TASTgramMFN, fold_batch_norm
from utils import autocast

CPU_BATCH = 16  # larger ones are no faster, and 64 clips take 3 GB


@dataclass(frozen=True)
class Outputs:
    """What a network gives for n clips: similarity to each class `(n, C)`, embedding `(n, E)`;
    float32.
    """

    similarity: Tensor
    embedding: Tensor


@torch.no_grad()
def run_network(
    network: TASTgramMFN,
    front_end: FrontEnd,
    clips: ClipSet,
    numbers: np.ndarray,
    batch_size: int,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    title: str | None = None,
) -> Outputs:
    """The outputs, on the device, for the clips of these numbers, with the running statistics of
    batch norm.

    `batch_size` is that of training: without gradients a GPU has room for twice as many. Network
    and front end are on the device; the front end computes in float32, the network in `precision`.
    A title is that of a progress bar.
    """
    prepared = prepare(network, device, precision)
    plan = batches(numbers, min(batch_size, CPU_BATCH) if device.type == "cpu" else 2 * batch_size)
    # Allocated once: results of each batch by itself would fragment the memory that glibc keeps.
    similarity = torch.empty(len(numbers), network.num_classes, device=device)
    embedding = torch.empty(len(numbers), EMBEDDING_SIZE, device=device)
    data = clips.batches(plan, device)
    progress = tqdm(
        data, title, len(plan), unit="batch", leave=False, disable=None if title else True
    )
    start = 0
    for samples, _ in progress:
        rows = slice(start, start + len(samples))
        inputs = front_end(samples)
        with autocast(device, precision):
            similarity[rows], embedding[rows] = prepared(**inputs)
        start += len(samples)
    return Outputs(similarity, embedding)


def score_classes(classes: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """The scores `(n, C)` of clips against classes `(n, C)`; `score` takes one class for each clip
    `(n,)`.
    """
    return torch.stack([score(column) for column in classes.T], dim=1)


def pack_embeddings(embedding: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What is kept of clips: their `embedding` `(n, E)`, of length 1 and in half precision, and
    `label` `(n,)`.
    """
    return {"embedding": F.normalize(embedding).half().cpu(), "label": labels}


def prepare(network: TASTgramMFN, device: torch.device, precision: torch.dtype) -> nn.Module:
    """A copy of the network that computes the same in evaluation mode, faster."""
    prepared = fold_batch_norm(network)
    if device.type == "cpu" and precision == torch.float32 and torch.backends.mkldnn.is_available():
        prepared.add_module("mobilefacenet", BlockedLayout(prepared.mobilefacenet))
    return prepared


class BlockedLayout(nn.Module):
    """A backbone in the memory format that oneDNN, PyTorch's library of convolutions for CPUs,
    chooses for itself. Its weights are brought into it once; what is in it only oneDNN can read.
    """

    def __init__(self, network: MobileFaceNet) -> None:
        super().__init__()
        self.fc_out = network.fc_out
        self.network = to_mkldnn(network.to(memory_format=torch.contiguous_format))  # type: ignore[call-overload]

    def forward(self, features: Tensor) -> Tensor:
        return self.network(features.to_mkldnn()).to_dense()
