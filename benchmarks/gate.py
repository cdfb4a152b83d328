"""Measure how far the temporal attention opens on recordings: the highest gate of each clip.

    python benchmarks/gate.py --data_root FOLDER --machines auto

The gate is `sigmoid(max over mels + mean over mels)` of the log-mel in dB, as published. The
figures are by machine type, over training and test clips.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from command_line import OneLineParser
from config import parse_command_line
from dataloader import ClipSet, cut_into_batches, load_clips
from model import FrontEnd
from model.tastgram import temporal_gate
from recordings import find_classes
from utils import run_script

BATCH = 16


def main() -> None:
    config, _ = parse_command_line(OneLineParser(description=__doc__))
    classes = find_classes(config)
    tables = []
    for split in ("train", "test"):
        clips = load_clips(config, classes, split, config.windows(split))
        machine_types = clips.recordings["machine_type"].iloc[clips.clip_recordings]
        tables.append(pd.DataFrame({"machine_type": machine_types, "gate": highest_gates(clips)}))
    for machine_type, table in pd.concat(tables).groupby("machine_type", sort=False):
        gates = table["gate"]
        spread = f"median {gates.median():.1e}, highest {gates.max():.1e}"
        print(f"{machine_type}: {len(gates)} clips, {spread}")


def highest_gates(clips: ClipSet) -> np.ndarray:
    """Return the highest gate of each clip `(n,)`."""
    front_end = FrontEnd(["tagram"])
    gates = []
    for samples in clips.read(cut_into_batches(np.arange(len(clips)), BATCH), torch.device("cpu")):
        gates.append(temporal_gate(front_end(samples)["log_mel"]).flatten(1).amax(dim=1))
    return torch.cat(gates).numpy()


if __name__ == "__main__":
    run_script(main)
