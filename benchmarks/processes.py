"""Compare training in several processes with one process, and stop one of them.

    # all GPUs, or on the CPU two processes of one thread each
    python benchmarks/processes.py
    python benchmarks/processes.py --processes 2 --batch_size 256

Comparison: epochs on the same random clips with the same global batch, alternately in one process
and in several. On the CPU, the one process has as many threads as the several have together. Fault:
the last process of a run is stopped in its second epoch, and the run is resumed.

Expected results, also on several GPUs: each step takes a few milliseconds more. Losses are equal
within 1e-3 (in float32; rounding errors grow from step to step). After the fault the job ends
within 40 s with a status other than 0; most of the time torchrun waits for a process that waits for
the stopped one on its GPU. The history of the resumed run has every epoch once.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.throughput import (
    CLASSES,
    print_machine,
    random_clips,
    run_worker,
    seconds,
    train_epochs,
)
from command_line import OneLineParser
from config import load_config
from distributed import is_main, join, leave
from trainer import Trainer
from utils import run_script, use_device

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 8  # of the run that is stopped in its second epoch


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--device", default="auto", help="cuda or cpu (default: auto)")
    parser.add_argument("--processes", type=int, help="default: the number of GPUs, two on the CPU")
    text = "of all processes together (default: %(default)s)"
    parser.add_argument("--batch_size", type=int, default=16, help=text)
    text = "default: %(default)s"
    parser.add_argument("--precision", default="fp32", help=text)
    parser.add_argument("--compile", choices=("true", "false"), default="false", help=text)
    text = "of an epoch that is timed (default: %(default)s)"
    parser.add_argument("--steps", type=int, default=4, help=text)
    text = "each measures both (default: %(default)s)"
    parser.add_argument("--rounds", type=int, default=3, help=text)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        measure_in_process(options)
        return
    device = use_device(options.device).type
    processes = options.processes or (torch.cuda.device_count() if device == "cuda" else 2)
    print(compare(device, processes, options.rounds), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, value in stop_and_resume(device, processes, Path(folder)).items():
            print(f"{name}: {value}")
    print_machine()


def compare(device: str, processes: int, rounds: int) -> str:
    """Describe the time of a step and the losses in one process and in several."""
    measured: dict[int, list[dict[str, Any]]] = {1: [], processes: []}
    for _ in range(rounds):
        for count, results in measured.items():
            name = f"a step of {count} processes"
            threads = str(processes // count) if device == "cpu" else "1"
            command = torchrun(count, __file__, *sys.argv[1:], "--worker")
            results.append(run_worker(name, command, OMP_NUM_THREADS=threads))
    one = statistics.median(result["seconds"] for result in measured[1])
    several = statistics.median(result["seconds"] for result in measured[processes])
    losses, expected = measured[processes][0]["losses"], measured[1][0]["losses"]
    difference = max(abs(loss / other - 1.0) for loss, other in zip(losses, expected, strict=True))
    return (
        f"a step of one process: {1000 * one:.1f} ms; "
        f"of {processes} processes: {1000 * several:.1f} ms, {several / one:.2f} of it\n"
        f"largest difference of the losses of {len(losses)} epochs: {difference:.1e}"
    )


def torchrun(processes: int, *words: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc_per_node={processes}", *words]


def stop_and_resume(device: str, processes: int, folder: Path) -> dict[str, Any]:
    """Train, stop the last process in the second epoch, and resume the run.

    Raises `RuntimeError` if the job does not fail with one error, or if the resumed run lacks an
    epoch.
    """
    data, weights = folder / "data", folder / "run.pth"
    call("datasets/synthesize.py", "--output", str(data), "--test", "1")
    values = {
        "data_root": data, "machines": "{fan: [0, 2]}", "save_path": weights, "epoch": EPOCHS,
        "batch_size": 8, "compile": "false", "tensorboard": "false", "device": device,
    }  # fmt: skip
    keys = [f"--{key}={value}" for key, value in values.items()]
    command = torchrun(processes, "train_ddp.py", *keys)
    pipe = subprocess.PIPE
    job = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    assert job.stdout
    while (line := job.stdout.readline()) and not line.startswith("epoch "):
        pass
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGTERM)
    start = time.monotonic()
    _, errors = job.communicate()
    ended = time.monotonic() - start
    messages = [line for line in errors.splitlines() if line.startswith("error: ")]
    if job.returncode == 0 or len(messages) != 1:
        raise RuntimeError(f"status {job.returncode}: {errors[-3000:]}")
    call(*command[1:], "--resume")
    history = pd.read_csv(weights.with_suffix("") / "history.csv")
    if history["epoch"].tolist() != [*range(1, EPOCHS + 1)]:
        raise RuntimeError(f"the epochs of history.csv are {history['epoch'].tolist()}")
    losses = ", ".join(f"{loss:.4g}" for loss in history["train_loss"])
    return {
        "the last one stopped": messages[0],
        "seconds to the end": round(ended, 1),
        "train_loss": losses,
    }


def call(*words: str) -> None:
    """Run one of the project's scripts."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[:2])}: {done.stderr[-2000:]}")


def measure_in_process(options: argparse.Namespace) -> None:
    """Train epochs on the same random clips in this process; the first epoch is a warm-up."""
    device = use_device(options.device)
    join(device)
    config = load_config(
        device=device.type,
        batch_size=options.batch_size,
        precision=options.precision,
        lr=1e-5,
        compile=options.compile == "true",
    )
    clips = random_clips(options.batch_size * options.steps, device)
    train_epoch = train_epochs(Trainer(config, CLASSES, device, clips, clips))
    losses: list[float] = []
    epoch_time = seconds(lambda: losses.append(train_epoch()), device, repeats=5)
    if is_main():
        print(json.dumps({"seconds": epoch_time / options.steps, "losses": losses}))
    leave()


if __name__ == "__main__":
    run_script(main)
