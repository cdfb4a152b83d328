"""Measure the clips per second of the front end, training, validation and scoring.

    # on the GPU, or on the CPU if there is none
    python benchmarks/throughput.py
    # device, precision, way, batch size
    python benchmarks/throughput.py --settings cpu,fp32,eager,16
    python benchmarks/throughput.py --settings cuda,bf16,compiled,64 --output throughput.json

A training step runs `eager` or `compiled`. Each setting runs in a new process, on random samples in
memory, as trainer.py and eval.py run it. It is compared with `plain`, a plain implementation on the
same device: the log-mel of one clip after the other, eager float32 in the contiguous memory format,
scoring one clip at a time. `plain, memory kept` adds `keep_freed_memory`, to measure its share.
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
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from audio import N_SAMPLES
from checkpoint import Checkpoint
from command_line import OneLineParser
from config import Config, load_config
from dataloader import ClipSet, cut_into_batches
from errors import UserError
from inference import Model, build_network, run_model
from losses import Objective
from model import LogMel
from model.tastgram import POWER_FLOOR
from recordings import MACHINE_COLUMNS, find_classes
from sampling import draw_mix
from trainer import Averages, Trainer
from utils import keep_freed_memory, run_script, set_up_numerics, versions

CLASSES = find_classes(load_config())  # the 41 machines of the published recipe
STAGES = ("front end", "training step", "validation", "scoring")
WAYS = ("eager", "compiled")
PRECISIONS = ("fp32", "bf16", "fp16", "plain", "plain-kept")


class Setting(NamedTuple):
    """A way to run the stages: an entry of --settings."""

    device: str
    precision: str
    way: str
    batch: int

    def __str__(self) -> str:
        names = {"plain": "plain", "plain-kept": "plain, memory kept"}
        kind = names.get(self.precision, f"{self.precision}, {self.way}")
        return f"{self.device}, {kind}, batch {self.batch}"


def main() -> None:
    parser = OneLineParser(description=__doc__)
    form = "DEVICE,PRECISION,WAY,BATCH"
    parser.add_argument("--settings", nargs="+", metavar=form, default=default_settings())
    text = "measurements of each stage; the median counts"
    parser.add_argument("--repeats", type=int, default=5, help=text)
    parser.add_argument("--output", type=Path, help="file for the figures as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure_stages(parse_setting(options.worker), options.repeats)))
        return
    settings = [parse_setting(text) for text in options.settings]
    results = []
    for setting in [*plain_settings(settings), *settings]:
        print(f"measuring {setting} ...", file=sys.stderr, flush=True)
        words = ("--worker", ",".join(map(str, setting)), "--repeats", str(options.repeats))
        times = run_worker(str(setting), [sys.executable, __file__, *words])
        results.append({"setting": setting, "seconds": times})
    print_table(results)
    if options.output:
        content = {"results": results, "machine": describe_machine()}
        options.output.write_text(json.dumps(content, indent=2) + "\n")


def run_worker(name: str, command: list[str], **environment: str) -> Any:
    """Run a process and return what it prints as JSON in its last line.

    Raises `UserError` if it fails.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    if done.returncode:
        raise UserError(f"{name} could not be measured; its message is above")
    return json.loads(done.stdout.splitlines()[-1])


def default_settings() -> list[str]:
    if torch.cuda.is_available():
        return [f"cuda,bf16,{way},{batch}" for batch in (64, 256) for way in WAYS]
    return ["cpu,fp32,eager,64", "cpu,fp32,compiled,64"]


def parse_setting(text: str) -> Setting:
    try:
        device, precision, way, batch = text.split(",")
        if device in ("cpu", "cuda") and precision in PRECISIONS and way in WAYS:
            return Setting(device, precision, way, int(batch))
    except ValueError:
        pass
    expected = "DEVICE,PRECISION,WAY,BATCH such as cpu,fp32,compiled,64"
    raise UserError(f"--settings {text}: not {expected}")


def plain_settings(settings: list[Setting]) -> list[Setting]:
    """Return the settings of the plain implementation that others are compared with."""
    plain = []
    for setting in settings:
        plain.append(Setting(setting.device, "plain", "eager", setting.batch))
        if setting.device == "cpu":
            plain.append(Setting(setting.device, "plain-kept", "eager", setting.batch))
    return list(dict.fromkeys(plain))


# ---- What is measured ----


def measure_stages(setting: Setting, repeats: int) -> dict[str, float]:
    """Return the seconds per clip of each stage."""
    device, batch = torch.device(setting.device), setting.batch
    # Reading the clock makes the host wait for a GPU, so many steps are timed together. On a CPU,
    # scoring takes a quarter of the time of a training step.
    train_steps, other_steps = (1, 4) if device.type == "cpu" else (6400 // batch, 6400 // batch)
    train_clips = random_clips(batch * train_steps, device)
    clips = random_clips(batch * other_steps, device)
    if setting.precision == "plain-kept":
        keep_freed_memory()
    if setting.precision.startswith("plain"):
        stages = plain_stages(train_clips, clips, device, batch)
    else:
        stages = project_stages(setting, train_clips, clips, device)
    counts = dict.fromkeys(STAGES, len(clips)) | {"training step": len(train_clips)}
    return {
        name: seconds(action, device, repeats) / counts[name] for name, action in stages.items()
    }


def project_stages(
    setting: Setting, train_clips: ClipSet, clips: ClipSet, device: torch.device
) -> dict[str, Callable[[], Any]]:
    """Return the stages as this project computes them."""
    config = load_config(
        device=setting.device,
        precision=setting.precision,
        batch_size=setting.batch,
        compile=setting.way == "compiled",
    )
    trainer = Trainer(config, CLASSES, device, train_clips, clips)
    model = untrained_model(config)

    def front_end() -> None:
        for samples in clips.read(cut_into_batches(np.arange(len(clips)), setting.batch), device):
            trainer.front_end(samples)

    return {
        "front end": front_end,
        "training step": train_epochs(trainer),
        "validation": lambda: trainer.validate(clips),
        "scoring": lambda: run_model(model, clips, config, device),
    }


def plain_stages(
    train_clips: ClipSet, clips: ClipSet, device: torch.device, batch: int
) -> dict[str, Callable[[], Any]]:
    """Return the stages of the method without the optimisations of this project."""
    config = load_config(batch_size=batch)
    set_up_numerics()
    network = build_network(config, CLASSES).to(device)
    objective = Objective(config.mode, config.m, config.s)
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.lr)
    power = LogMel().mel.to(device)
    rng = np.random.default_rng(0)

    def inputs(clips: ClipSet, size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for samples, labels in clips.batches(cut_into_batches(np.arange(len(clips)), size), device):
            waveform = samples.float() / 32768.0
            rows = [10.0 * torch.log10(power(row) + POWER_FLOOR) for row in waveform]
            log_mel = torch.stack(rows)
            yield {"waveform": waveform, "log_mel": log_mel.unsqueeze(1)}, labels

    def front_end() -> None:
        for _ in inputs(clips, batch):
            pass

    def train() -> None:
        network.train()
        for features, labels in inputs(train_clips, batch):
            mix = draw_mix(config.alpha, rng, len(labels))
            similarity, embedding = network(**{name: mix(x) for name, x in features.items()})
            loss = objective.loss(similarity, embedding, labels, mix, len(labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    @torch.no_grad()
    def score(size: int) -> None:
        network.eval()
        for features, labels in inputs(clips, size):
            similarity, _ = network(**features)
            objective.cross_entropy(similarity, labels, labels, reduction="none").tolist()

    return {
        "front end": front_end,
        "training step": train,
        "validation": lambda: score(batch),
        "scoring": lambda: score(1),
    }


def train_epochs(trainer: Trainer) -> Callable[[], float]:
    """Return an action that trains the next epoch at each call, as `Trainer.fit` does but without
    validation and checkpoint, and returns the mean loss.
    """
    epochs = itertools.count()

    def train_epoch() -> float:
        epoch = next(epochs)
        trainer.set_learning_rate(epoch)
        trainer.parallel_loss.train()
        averages = Averages(trainer.sampler.n_steps)
        for batch in trainer.sampler.batches(epoch):
            averages.add(trainer.step(batch), batch)
            averages.new_losses()
        loss, _ = averages.means()
        return loss

    return train_epoch


def untrained_model(config: Config) -> Model:
    """Return a model with initial weights."""
    network = build_network(config, CLASSES).eval()
    return Model(network, config, CLASSES, Checkpoint(Path("random.pth"), network.state_dict()))


def random_clips(count: int, device: torch.device) -> ClipSet:
    """Return clips whose random samples are in memory; they repeat after 256 clips."""
    clips = clips_without_samples(count)
    rng, shape = np.random.default_rng(0), (min(count, 256), N_SAMPLES)
    samples = rng.integers(-300, 300, shape, dtype=np.int16)
    clips.samples = torch.from_numpy(np.resize(samples, (count, N_SAMPLES))).to(device)
    return clips


def clips_without_samples(count: int) -> ClipSet:
    """Return clips of the classes in turn, without files; the caller gives them samples."""
    labels = np.arange(count) % len(CLASSES)
    table = pd.DataFrame([CLASSES.machines[label] for label in labels], columns=MACHINE_COLUMNS)
    paths = np.full(count, Path("random.wav"), dtype=object)
    return ClipSet(table.assign(label=labels, path=paths), num_workers=1)


def seconds(action: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the median time of an action, after a first call for warming up and compiling."""
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
    plain = {}
    for result in results:
        setting = result["setting"]
        if setting.precision == "plain":
            plain[setting.device, setting.batch] = result["seconds"]
    print(f"{'':14} {'clips/s':>9} {'ms/batch':>9} {'x plain':>8}")
    for result in results:
        setting = result["setting"]
        print(setting)
        for stage in STAGES:
            clip_time = result["seconds"][stage]
            ratio = plain[setting.device, setting.batch][stage] / clip_time
            speed, batch_time = 1 / clip_time, 1000 * clip_time * setting.batch
            print(f"  {stage:12} {speed:9.1f} {batch_time:9.1f} {ratio:8.2f}")
    print_machine()


def print_machine() -> None:
    """Print the CPU, the GPU and the versions of the packages."""
    print(", ".join(f"{name} {value}" for name, value in describe_machine().items()))


def describe_machine() -> dict[str, Any]:
    """Return the CPU, the GPU and the versions of the packages."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.machine()
    gpu = {"GPU": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"CPU": f"{os.cpu_count()} x {cpu}", **gpu, **versions()}


if __name__ == "__main__":
    run_script(main)
