"""How many clips a second the front end, a training step, validation and scoring take, against a
plain implementation.

    # on the CPU or, where there is one, the GPU
    python benchmarks/throughput.py
    # device, precision, way, batch size
    python benchmarks/throughput.py --settings cpu,fp32,eager,16
    python benchmarks/throughput.py --settings cuda,bf16,compiled,64 cuda,bf16,compiled,256 --output throughput.json

A training step runs `eager` or `compiled`. Each setting runs in a process of its own, on random
samples in memory, as trainer.py and eval.py run it. `plain` is a first implementation on the same
device: the log-mel of each clip by itself, eager float32 in the contiguous memory format, scoring
one clip at a time. `plain, memory kept` is the same with `keep_freed_memory`, to tell that part
apart.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import TrainedModel, build_network
from config import load_config
from dataloader import ClipSet, batches
from evaluation.scoring import run_model
from losses import Objective
from model import LogMel
from model.tastgram import N_SAMPLES, POWER_FLOOR
from trainer import Trainer
from utils import OneLineParser, UserError, keep_freed_memory, run_script, set_up_numerics, versions

STAGES = ("front end", "training step", "validation", "scoring")
CLASSES = 41
WAYS = ("eager", "compiled")
PRECISIONS = ("fp32", "bf16", "fp16", "plain", "plain-kept")


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument(
        "--settings", nargs="+", metavar="DEVICE,PRECISION,WAY,BATCH", default=default_settings()
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="measurements of each stage; the median counts"
    )
    parser.add_argument("--output", type=Path, help="file for the figures as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(parse_setting(options.worker), options.repeats)))
        return
    settings = [parse_setting(text) for text in options.settings]
    plain = [
        (device, kind, "eager", batch)
        for device, batch in dict.fromkeys((device, batch) for device, _, _, batch in settings)
        for kind in (("plain", "plain-kept") if device == "cpu" else ("plain",))
    ]
    results = []
    for setting in [*plain, *settings]:
        print(f"measuring {name_of(setting)} ...", file=sys.stderr, flush=True)
        command = [
            sys.executable,
            __file__,
            "--worker",
            ",".join(map(str, setting)),
            "--repeats",
            str(options.repeats),
        ]
        results.append({"setting": setting, "seconds": run_worker(name_of(setting), command)})
    print_table(results)
    if options.output:
        options.output.write_text(
            json.dumps({"results": results, "machine": machine()}, indent=2) + "\n"
        )


def run_worker(name: str, command: list[str], **environment: str) -> Any:
    """What a process prints as JSON in its last line. `UserError` where it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    if done.returncode:
        raise UserError(f"{name} could not be measured; its message is above")
    return json.loads(done.stdout.splitlines()[-1])


def default_settings() -> list[str]:
    if torch.cuda.is_available():
        return [f"cuda,bf16,{way},{batch}" for batch in (64, 256) for way in WAYS]
    return ["cpu,fp32,eager,64", "cpu,fp32,compiled,64"]


def parse_setting(text: str) -> tuple[str, str, str, int]:
    try:
        device, precision, way, batch = text.split(",")
        if device in ("cpu", "cuda") and precision in PRECISIONS and way in WAYS:
            return device, precision, way, int(batch)
    except ValueError:
        pass
    raise UserError(
        f"--settings {text}: not DEVICE,PRECISION,WAY,BATCH such as cpu,fp32,compiled,64"
    )


def name_of(setting: tuple[str, str, str, int]) -> str:
    device, precision, way, batch = setting
    kind = {"plain": "plain", "plain-kept": "plain, memory kept"}.get(
        precision, f"{precision}, {way}"
    )
    return f"{device}, {kind}, batch {batch}"


# ---- What is measured ----


def work(setting: tuple[str, str, str, int], repeats: int) -> dict[str, float]:
    """Seconds per clip of each stage."""
    device_name, precision, way, batch = setting
    device = torch.device(device_name)
    # On a GPU many steps between two looks at the clock, for which it has to be waited for; on a
    # CPU scoring takes a quarter of the time of a training step.
    train_steps, other_steps = (1, 4) if device_name == "cpu" else (6400 // batch, 6400 // batch)
    trained_on, clips = (
        random_clips(batch * train_steps, device),
        random_clips(batch * other_steps, device),
    )
    if precision.startswith("plain"):
        if precision == "plain-kept":
            keep_freed_memory()
        stages = plain_stages(trained_on, clips, device, batch)
    else:
        config = load_config(
            device=device_name, precision=precision, batch_size=batch, compile=way == "compiled"
        )
        trainer = Trainer(config, device)
        trained = TrainedModel(Path("random.pth"), trainer.network, config, {})

        def front_end() -> None:
            for samples, _ in clips.batches(batches(np.arange(len(clips)), batch), device):
                trainer.front_end(samples)

        stages = {
            "front end": front_end,
            "training step": train_epochs(trainer, trained_on),
            "validation": lambda: trainer.validate(clips),
            "scoring": lambda: run_model(trained, clips, device),
        }
    counts = dict.fromkeys(STAGES, len(clips)) | {"training step": len(trained_on)}
    return {
        name: seconds(action, device, repeats) / counts[name] for name, action in stages.items()
    }


def train_epochs(trainer: Trainer, clips: ClipSet) -> Callable[[], Any]:
    """An action that trains the next epoch at each call: the plan of an epoch is drawn during the
    one before it.
    """
    epochs = itertools.count()
    return lambda: trainer.train_epoch(clips, next(epochs))


def random_clips(count: int, device: torch.device) -> ClipSet:
    """Clips whose random samples are in memory; beyond 256 they repeat."""
    clips = ClipSet(
        pd.DataFrame({"path": Path(), "label": np.arange(count) % CLASSES}), num_workers=1
    )
    samples = np.random.default_rng(0).integers(
        -300, 300, (min(count, 256), N_SAMPLES), dtype=np.int16
    )
    clips.samples = torch.from_numpy(np.resize(samples, (count, N_SAMPLES))).to(device)
    return clips


def plain_stages(
    trained_on: ClipSet, clips: ClipSet, device: torch.device, batch: int
) -> dict[str, Callable[[], Any]]:
    """The same method without anything that this project does for speed."""
    config = load_config(batch_size=batch)
    set_up_numerics()
    network, objective = (
        build_network(config).to(device),
        Objective(config.mode, config.m, config.s),
    )
    optimizer = torch.optim.AdamW(
        [p for p in network.parameters() if p.requires_grad], lr=config.lr
    )
    power = LogMel().mel.to(device)
    rng = np.random.default_rng(0)

    def inputs(clips: ClipSet, size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for samples, labels in clips.batches(batches(np.arange(len(clips)), size), device):
            waveform = samples.float() / 32768.0
            log_mel = torch.stack(
                [10.0 * torch.log10(power(one) + POWER_FLOOR) for one in waveform]
            )
            yield {"waveform": waveform, "log_mel": log_mel.unsqueeze(1)}, labels

    def front_end() -> None:
        for _ in inputs(clips, batch):
            pass

    def train() -> None:
        network.train()
        for features, labels in inputs(trained_on, batch):
            mix = objective.draw_mix(config.alpha, rng, len(labels))
            assert mix
            similarity, _ = network(**{name: mix(x) for name, x in features.items()})
            loss = objective.loss(similarity, labels, mix)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    @torch.no_grad()
    def score(size: int) -> None:
        network.eval()
        for features, labels in inputs(clips, size):
            objective.anomaly_score(network(**features)[0], labels).tolist()

    return {
        "front end": front_end,
        "training step": train,
        "validation": lambda: score(batch),
        "scoring": lambda: score(1),
    }


def seconds(action: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median time of an action, after one that warms up and compiles."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


# ---- The table ----


def print_table(results: list[dict]) -> None:
    plain = {
        (r["setting"][0], r["setting"][3]): r["seconds"]
        for r in results
        if r["setting"][1] == "plain"
    }
    print(f"{'':14} {'clips/s':>9} {'ms/batch':>9} {'x plain':>8}")
    for result in results:
        device, _, _, batch = setting = tuple(result["setting"])
        print(name_of(setting))
        for stage in STAGES:
            each = result["seconds"][stage]
            print(
                f"  {stage:12} {1 / each:9.1f} {1000 * each * batch:9.1f} {plain[device, batch][stage] / each:8.2f}"
            )
    print(", ".join(f"{name} {value}" for name, value in machine().items()))


def machine() -> dict[str, Any]:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.machine())  # fmt: skip
    gpu = {"GPU": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"CPU": f"{os.cpu_count()} x {cpu}", **gpu, **versions()}


if __name__ == "__main__":
    run_script(main)
