"""From clips to the anomaly scores of a trained network."""

import numpy as np
import torch
from torch import Tensor

from checkpoint import TrainedModel
from dataloader import ClipSet
from inference import Outputs, run_network
from losses import Objective
from model import FrontEnd
from utils import choose_precision, keep_freed_memory, set_up_numerics


def run_model(trained: TrainedModel, clips: ClipSet, device: torch.device) -> Outputs:
    """What the network gives for clips, on the CPU.

    The network runs in `eval_precision`, everything before and after it in float32.
    """
    set_up_numerics()
    keep_freed_memory()
    config = trained.config
    precision = choose_precision(config.eval_precision, device)
    network, front_end = trained.network.move_to(device), FrontEnd(config.input).to(device)
    numbers = np.arange(len(clips))
    outputs = run_network(network, front_end, clips, numbers, config.batch_size, device, precision, "scoring")
    return Outputs(outputs.similarity.cpu(), outputs.embedding.cpu())


def anomaly_scores(trained: TrainedModel, outputs: Outputs, labels: Tensor, dtype: str = "float64") -> np.ndarray:
    """The anomaly score of each clip against the class `labels` `(n,)`; higher is more anomalous."""
    objective = Objective(trained.config.mode, trained.config.m, trained.config.s)
    return objective.anomaly_score(outputs.similarity, labels, getattr(torch, dtype)).numpy()
