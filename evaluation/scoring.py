"""From clips to what a trained network says of them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataloader import Clip, ClipSet, batches
from losses import Objective
from model import FrontEnd, TASTgramMFN
from utils import Config, choose_precision, keep_freed_memory, set_up_numerics

CPU_BATCH = 16  # larger ones score no faster, and 64 clips take 3 GB


@dataclass(frozen=True)
class Outputs:
    """What a network gives for n clips, on the CPU: similarity to each class `(n, C)`, embedding `(n, E)`; float32."""

    similarity: Tensor
    embedding: Tensor

    def scores(self, objective: Objective, labels: np.ndarray, dtype: torch.dtype = torch.float64) -> np.ndarray:
        """The anomaly score of each clip against the class `labels` `(n,)`; higher is more anomalous."""
        return objective.anomaly_score(self.similarity, torch.from_numpy(labels), dtype).numpy()


@torch.no_grad()
def run_model(model: TASTgramMFN, config: Config, clips: ClipSet, device: torch.device) -> Outputs:
    """What the model gives for clips, in evaluation mode and batches of `config.batch_size`, smaller on a CPU.

    The network runs in `config.eval_precision`, everything before and after it in float32.
    """
    set_up_numerics()
    keep_freed_memory()
    precision = choose_precision(config.eval_precision, device)
    front_end = FrontEnd(config.input).to(device)
    model = model.to(device, memory_format=torch.channels_last).eval()
    size = min(config.batch_size, CPU_BATCH) if device.type == "cpu" else config.batch_size
    similarities, embeddings = [], []
    for indices in tqdm(batches(np.arange(len(clips)), size), desc="scoring", unit="batch", leave=False, disable=None):
        inputs = front_end(clips.batch(indices, device)[0])
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            similarity, embedding = model(**inputs)
        similarities.append(similarity)
        embeddings.append(embedding)
    return Outputs(torch.cat(similarities).cpu(), torch.cat(embeddings).cpu())


def by_machine(clips: list[Clip], scores: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """Scores in lists by machine type and ID (`00`, ...)."""
    result: dict[str, dict[str, list[float]]] = {}
    for clip, score in zip(clips, scores, strict=True):
        result.setdefault(clip.machine_type, {}).setdefault(f"{clip.machine_id:02d}", []).append(float(score))
    return result
