"""Run a trained network on clips, in evaluation mode: for validation and for scoring."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.mkldnn import to_mkldnn
from tqdm import tqdm

from config import Config
from dataloader import ClipSet, cut_into_batches
from model import EMBEDDING_SIZE, FrontEnd, MobileFaceNet, Outputs, TASTgramMFN, fold_batch_norm
from trained import Model
from utils import autocast, choose_precision, keep_freed_memory, set_up_numerics

CPU_BATCH = 16  # larger batches are no faster, and 64 clips take 3 GB


def run_model(
    model: Model,
    clips: ClipSet,
    config: Config,
    device: torch.device,
    title: str = "scoring",
    precision: str = "",
) -> Outputs:
    """Run a model on clips, with the network in `precision`, or else in `eval_precision`, and the
    front end in float32. `title` is that of the progress bar. Returns the outputs on the CPU.
    """
    set_up_numerics()
    keep_freed_memory()
    outputs = run_network(
        model.network.move_to(device),
        FrontEnd(model.config.input).to(device),
        clips,
        np.arange(len(clips)),
        config.batch_size,
        device,
        choose_precision(precision or config.eval_precision, device),
        title,
    )
    return Outputs(outputs.similarity.cpu(), outputs.embedding.cpu())


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
    """Run a network on the clips of these numbers, with the running statistics of batch norm.

    Args:
        network: The network, on the device.
        front_end: Computes its inputs, in float32, on the device.
        clips: The clips to choose from.
        numbers: The numbers of the clips.
        batch_size: The batch size of training. Without gradients a GPU has room for twice as many
            clips.
        device: Where to compute.
        precision: The precision of the network.
        title: The title of a progress bar; None for no bar.

    Returns:
        The outputs, on the device.
    """
    prepared = optimise(network, device, precision)
    plan = cut_into_batches(
        numbers, min(batch_size, CPU_BATCH) if device.type == "cpu" else 2 * batch_size
    )
    # Allocated once: the results of each batch apart would fragment the memory that glibc keeps.
    similarity = torch.empty(len(numbers), network.num_classes, device=device)
    embedding = torch.empty(len(numbers), EMBEDDING_SIZE, device=device)
    data = clips.read(plan, device)
    bar = tqdm(data, title, len(plan), unit="batch", leave=False, disable=None if title else True)
    start = 0
    for samples in bar:
        rows = slice(start, start + len(samples))
        inputs = front_end(samples)
        with autocast(device, precision):
            similarity[rows], embedding[rows] = prepared(**inputs)
        start += len(samples)
    return Outputs(similarity, embedding)


def optimise(network: TASTgramMFN, device: torch.device, precision: torch.dtype) -> nn.Module:
    """Return a copy of a network that computes its outputs in evaluation mode faster."""
    prepared = fold_batch_norm(network)
    if device.type == "cpu" and precision == torch.float32 and torch.backends.mkldnn.is_available():
        prepared.add_module("mobilefacenet", BlockedLayout(prepared.mobilefacenet))
    return prepared


class BlockedLayout(nn.Module):
    """A backbone in the memory format that oneDNN, PyTorch's library of convolutions for CPUs,
    chooses for itself. The weights are converted to it once; only oneDNN can read the format.
    """

    def __init__(self, network: MobileFaceNet) -> None:
        super().__init__()
        self.fc_out = network.fc_out
        contiguous = network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.network = to_mkldnn(contiguous)

    def forward(self, features: Tensor) -> Tensor:
        return self.network(features.to_mkldnn()).to_dense()
