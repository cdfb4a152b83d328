"""How far the temporal attention opens on recordings: the highest gate of each clip, by machine
type.

    python benchmarks/gate.py --data_root /data/dcase2020 --machines '{slider: [0, 2, 4, 6], valve: [0, 2, 4, 6]}'

The gate is `sigmoid(max over mels + mean over mels)` of the log-mel in dB, as published. Training
and test clips are read.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import parse_command_line
from corpus import settle_classes
from dataloader import batches, load_clips
from model import FrontEnd
from model.tastgram import temporal_gate
from utils import OneLineParser, run_script


def main() -> None:
    config, _, _ = parse_command_line(OneLineParser(description=__doc__))
    config = settle_classes(config)
    front_end, peaks = FrontEnd(["tagram"]), dict[str, list[float]]()
    for split in ("train", "test"):
        clips = load_clips(config, split)
        plan = batches(np.arange(len(clips)), 16)
        for indices, (samples, _) in zip(
            plan, clips.batches(plan, torch.device("cpu")), strict=True
        ):
            highest = temporal_gate(front_end(samples)["log_mel"]).flatten(1).amax(dim=1).tolist()
            for index, gate in zip(indices, highest, strict=True):
                peaks.setdefault(clips.clips["machine_type"][index], []).append(gate)
    for machine_type, gates in peaks.items():
        print(
            f"{machine_type}: {len(gates)} clips, median {np.median(gates):.1e}, highest {max(gates):.1e}"
        )


if __name__ == "__main__":
    run_script(main)
