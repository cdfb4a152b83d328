"""What several processes cost and give: a step's time and loss beside those of one process, the end after a fault.

    python benchmarks/processes.py                      # all GPUs, or on the CPU two processes of one thread each
    python benchmarks/processes.py --processes 2 --batch_size 256

Cost: epochs on the same random clips in one process, which on the CPU has as many threads as the processes together,
and in several, by turns, of one global batch. Fault: the last process of a run is stopped in its second epoch, and the
run is resumed.

Expected, also of several GPUs: a few milliseconds more for each step; losses equal within 1e-3 (in float32; rounding
grows from step to step); the job ends within 40 s with a status other than 0, most of it torchrun's patience with a
process that waits for the stopped one on its GPU; the history of the resumed run holds every epoch once.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.gpu import stop_and_resume, torchrun
from benchmarks.throughput import machine, random_clips, run_worker, seconds
from config import load_config
from distributed import is_main, join, leave
from trainer import Trainer
from utils import OneLineParser, run_script, use_device


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--device", default="auto", help="cuda or cpu (default: auto)")
    parser.add_argument("--processes", type=int, help="default: the number of GPUs, two on the CPU")
    parser.add_argument("--batch_size", type=int, default=16, help="of all processes together (default: %(default)s)")
    parser.add_argument("--precision", default="fp32", help="default: %(default)s")
    parser.add_argument("--compile", choices=("true", "false"), default="false", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=4, help="of an epoch that is timed (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="each measures both (default: %(default)s)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    device = use_device(options.device).type
    processes = options.processes or (torch.cuda.device_count() if device == "cuda" else 2)
    print(compare(device, processes, options.rounds), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, value in stop_and_resume(device, processes, Path(folder), is_small=device == "cpu").items():
            print(f"{name}: {value}")
    print(", ".join(f"{name} {value}" for name, value in machine().items()))


def compare(device: str, processes: int, rounds: int) -> str:
    """The time of a step and the losses of one process and of several."""
    measured: dict[int, list[dict[str, Any]]] = {1: [], processes: []}
    for _ in range(rounds):
        for count, results in measured.items():
            threads = str(processes // count) if device == "cpu" else "1"
            command = torchrun(count, __file__, *sys.argv[1:], "--worker")
            results.append(run_worker(f"a step of {count} processes", command, OMP_NUM_THREADS=threads))
    one, several = (statistics.median(result["seconds"] for result in results) for results in measured.values())
    losses, expected = measured[processes][0]["losses"], measured[1][0]["losses"]
    difference = max(abs(loss / other - 1.0) for loss, other in zip(losses, expected, strict=True))
    return (
        f"a step of one process: {1000 * one:.1f} ms; of {processes} processes: {1000 * several:.1f} ms, "
        f"{several / one:.2f} of it\nlargest difference of the losses of {len(losses)} epochs: {difference:.1e}"
    )


def work(options: argparse.Namespace) -> None:
    """What each process does: epochs on the same random clips, the first to warm up."""
    device = use_device(options.device)
    join(device)
    config = load_config(
        device=device.type, batch_size=options.batch_size, precision=options.precision, lr=1e-5,
        compile=options.compile == "true", cuda_graph=False,
    )  # fmt: skip
    trainer, clips, losses = Trainer(config, device), random_clips(options.batch_size * options.steps, device), []
    each = seconds(lambda: losses.append(trainer.train_epoch(clips, len(losses))[0]), device, repeats=5)
    if is_main():
        print(json.dumps({"seconds": each / options.steps, "losses": losses}))
    leave()


if __name__ == "__main__":
    run_script(main)
