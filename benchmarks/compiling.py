"""Measure from how many clips on compiling the training step pays off on this CPU.

    python benchmarks/compiling.py                  # batches of 16
    python benchmarks/compiling.py --batch_size 64

The cost of compiling is the time of the first compiled step, with an empty compiler cache, minus
that of a later step. Then epochs of eager and compiled steps are timed in turn, on random clips.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.throughput import CLASSES, print_machine, random_clips, train_epochs
from command_line import OneLineParser
from config import load_config
from trainer import Trainer
from utils import run_script

CPU = torch.device("cpu")
ROUNDS = 5


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=16, help="default: %(default)s")
    batch_size = parser.parse_args().batch_size
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        eager_trainer = make_trainer(batch_size, is_compiled=False)
        time_first_step(eager_trainer)
        compiled_trainer = make_trainer(batch_size, is_compiled=True)
        first_step = time_first_step(compiled_trainer)
        eager, compiled = time_clips([eager_trainer, compiled_trainer])
    compiling, saved = first_step - compiled * batch_size, eager - compiled
    pays = f"pays from {compiling / saved:,.0f} clips on" if saved > 0 else "does not pay"
    print(
        f"eager {1 / eager:.1f} clips/s, compiled {1 / compiled:.1f} clips/s, "
        f"{eager / compiled:.2f} times as fast"
    )
    print(f"saved {1000 * saved:.1f} ms a clip; compiling takes {compiling:.0f} s and {pays}")
    print_machine()


def make_trainer(batch_size: int, is_compiled: bool) -> Trainer:
    clips = random_clips(batch_size * max(1, 32 // batch_size), CPU)
    config = load_config(device="cpu", batch_size=batch_size, compile=is_compiled)
    return Trainer(config, CLASSES, CPU, clips, clips)


def time_first_step(trainer: Trainer) -> float:
    """Return the seconds of the first step, which includes compiling."""
    start = time.perf_counter()
    trainer.parallel_loss.train()
    batches = trainer.sampler.batches(0)
    trainer.step(next(batches))
    return time.perf_counter() - start


def time_clips(trainers: list[Trainer]) -> list[float]:
    """Return the seconds per clip of each trainer, the median over epochs that take turns."""
    actions = [train_epochs(trainer) for trainer in trainers]
    times: list[list[float]] = [[] for _ in trainers]
    for _ in range(ROUNDS):
        for trainer, train_epoch, trainer_times in zip(trainers, actions, times, strict=True):
            start = time.perf_counter()
            train_epoch()
            trainer_times.append((time.perf_counter() - start) / len(trainer.train_clips))
    return [statistics.median(trainer_times) for trainer_times in times]


if __name__ == "__main__":
    run_script(main)
