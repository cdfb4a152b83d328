"""From clips to what a trained network says of them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import TrainedModel
from dataloader import ClipSet, batches, class_labels
from losses import Objective
from model import EMBEDDING_SIZE, FrontEnd
from utils import autocast, choose_precision, keep_freed_memory, set_up_numerics

CPU_BATCH = 16  # larger ones score no faster, and 64 clips take 3 GB


@dataclass(frozen=True)
class Outputs:
    """What a network gives for n clips, on the CPU: similarity to each class `(n, C)`, embedding `(n, E)`; float32."""

    similarity: Tensor
    embedding: Tensor


@torch.no_grad()
def run_model(trained: TrainedModel, clips: ClipSet, device: torch.device) -> Outputs:
    """What the network gives for clips in evaluation mode, in batches of `batch_size`, smaller on a CPU.

    The network runs in `eval_precision`, everything before and after it in float32.
    """
    set_up_numerics()
    keep_freed_memory()
    config = trained.config
    precision = choose_precision(config.eval_precision, device)
    front_end = FrontEnd(config.input).to(device)
    network = trained.network.move_to(device).eval()
    size = min(config.batch_size, CPU_BATCH) if device.type == "cpu" else config.batch_size
    plan = batches(np.arange(len(clips)), size)
    # Allocated once: results of each batch by itself would fragment the memory that glibc keeps.
    similarity = torch.empty(len(clips), len(class_labels(config.machines)))
    embedding = torch.empty(len(clips), EMBEDDING_SIZE)
    progress = tqdm(clips.batches(plan, device), "scoring", len(plan), unit="batch", leave=False, disable=None)
    for indices, (samples, _) in zip(plan, progress, strict=True):
        inputs = front_end(samples)
        with autocast(device, precision):
            similarity[indices], embedding[indices] = (output.cpu() for output in network(**inputs))
    return Outputs(similarity, embedding)


def anomaly_scores(trained: TrainedModel, outputs: Outputs, labels: Tensor, dtype: str = "float64") -> np.ndarray:
    """The anomaly score of each clip against the class `labels` `(n,)`; higher is more anomalous."""
    objective = Objective(trained.config.mode, trained.config.m, trained.config.s)
    return objective.anomaly_score(outputs.similarity, labels, getattr(torch, dtype)).numpy()
