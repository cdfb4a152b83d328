"""From how many clips on does compiling the training step pay on this CPU?

    python benchmarks/compiling.py                  # batches of 16
    python benchmarks/compiling.py --batch_size 64

Times the first compiled step, less a later one, with an empty cache of the compiler, and then
epochs of eager and compiled steps in turn, on random clips.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.throughput import machine, random_clips, train_epochs
from config import load_config
from trainer import Trainer
from utils import OneLineParser, run_script

ROUNDS = 5


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=16, help="default: %(default)s")
    options = parser.parse_args()
    cpu, size = torch.device("cpu"), options.batch_size
    clips = random_clips(size * max(1, 32 // size), cpu)
    first, epochs, times = {}, {}, {"eager": list[float](), "compiled": list[float]()}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for way in times:
            trainer = Trainer(
                load_config(device="cpu", batch_size=size, compile=way == "compiled"), cpu
            )
            start = time.perf_counter()
            trainer.train_epoch(random_clips(size, cpu), 0)
            first[way], epochs[way] = time.perf_counter() - start, train_epochs(trainer, clips)
        for _ in range(ROUNDS):
            for way, train_epoch in epochs.items():
                start = time.perf_counter()
                train_epoch()
                times[way].append((time.perf_counter() - start) / len(clips))
    eager, compiled = (statistics.median(each) for each in times.values())
    compiling, saved = first["compiled"] - compiled * size, eager - compiled
    pays = f"pays from {compiling / saved:,.0f} clips on" if saved > 0 else "does not pay"
    print(
        f"eager {1 / eager:.1f} clips/s, compiled {1 / compiled:.1f} clips/s, {eager / compiled:.2f} times as fast"
    )
    print(f"saved {1000 * saved:.1f} ms a clip; compiling takes {compiling:.0f} s and {pays}")
    print(", ".join(f"{name} {value}" for name, value in machine().items()))


if __name__ == "__main__":
    run_script(main)
