"""Reference values of the method, and the inputs they were computed on.

`data/reference_values.npz` holds numbers computed once with the published PyTorch implementation
(float32, CPU, torch 2.11): log-mel, Tgram, TAgram, embedding, logits, score, the margin head alone,
gradient norms of the first step and losses of eight steps in three modes. The inputs are made here
from a seed, with numpy's frozen legacy generator: the same bits with every numpy release.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from losses import Mix

SEED, BATCH, STEPS, NUM_CLASSES = 20200, 4, 8, 41
SAMPLE_RATE, SECONDS = 16_000, 10
LEVELS = (1.0, 0.6, 0.5, 0.1)

Shapes = Mapping[str, tuple[int, ...]]


def shapes_in(values: dict[str, np.ndarray], prefix: str = "") -> Shapes:
    """Return names and shapes of a state dict that is described in a file of reference values."""
    names, shapes = values[f"{prefix}state_dict_names"], values[f"{prefix}state_dict_shapes"]
    pairs = zip(names, shapes, strict=True)
    return {str(name): tuple(json.loads(str(shape))) for name, shape in pairs}


def shapes_of(network: nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


VALUES = dict(np.load(Path(__file__).parent / "data" / "reference_values.npz"))
SHAPES = shapes_in(VALUES)


def waveforms() -> torch.Tensor:
    """(4, 160000) float32, exact multiples of 1/32768: sines, slow modulation, clicks and noise.

    The rows differ in level, so that the temporal attention is open in some and shut in the
    quietest.
    """
    rng = np.random.RandomState(SEED)
    t = np.arange(SAMPLE_RATE * SECONDS, dtype=np.float64) / SAMPLE_RATE
    rows = []
    for row in range(BATCH):
        f0 = rng.uniform(40, 400)
        x = sum(
            rng.uniform(0.01, 0.1) * np.sin(2 * np.pi * f0 * (k + 1) * t + rng.uniform(0, 6))
            for k in range(5)
        )
        x = x * (1 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.2, 3) * t))
        clicks = np.zeros_like(t)
        clicks[rng.randint(0, t.size, 40)] = rng.uniform(-0.5, 0.5, 40)
        noise = rng.uniform(0.005, 0.05) * rng.standard_normal(t.size)
        x = LEVELS[row % len(LEVELS)] * (x + clicks + noise)
        rows.append(np.clip(np.round(x * 32768), -32768, 32767) / 32768)
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def samples() -> torch.Tensor:
    """The waveforms as int16 samples (4, 160000), exactly."""
    return (waveforms() * 32768).to(torch.int16)


def labels() -> torch.Tensor:
    rng = np.random.RandomState(SEED + 1)
    return torch.from_numpy(rng.randint(0, NUM_CLASSES, BATCH).astype(np.int64))


def parameters(shapes: Shapes = SHAPES, seed: int = SEED + 3) -> dict[str, torch.Tensor]:
    """Return a full state dict, by default with the published names, filled in the sorted order of
    names.
    """
    rng = np.random.RandomState(seed)
    state = {}
    for name in sorted(shapes):
        shape = shapes[name]
        if name.endswith("num_batches_tracked"):
            value = np.zeros(shape, np.int64)
        elif name.endswith("running_var"):
            value = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        elif name.endswith(("running_mean", "bias")):
            value = (0.1 * rng.standard_normal(shape)).astype(np.float32)
        elif len(shape) == 1:
            value = rng.uniform(0.2, 1.2, shape).astype(np.float32)
        elif name == "arcface.weight":
            value = rng.standard_normal(shape).astype(np.float32)
        else:
            spread = np.sqrt(2.0 / np.prod(shape[1:]))
            value = (spread * rng.standard_normal(shape)).astype(np.float32)
        state[name] = torch.from_numpy(np.asarray(value))
    return state


def mixing() -> list[Mix]:
    """Mixup of each of the eight steps."""
    rng = np.random.RandomState(SEED + 2)
    draws = [(rng.beta(0.5, 0.5), rng.permutation(BATCH)) for _ in range(STEPS)]
    return [
        Mix(torch.tensor(lam, dtype=torch.float32), torch.from_numpy(partner))
        for lam, partner in draws
    ]


def distance(value: torch.Tensor | np.ndarray, reference: np.ndarray) -> float:
    """Relative L2 distance over a whole array."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
    value = np.asarray(value, np.float64)
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))
