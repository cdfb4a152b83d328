"""How many clips a second the front end, a training step, validation and scoring take, against a floor and a plain one.

    python benchmarks/throughput.py                                     # on the CPU and, where there is one, the GPU
    python benchmarks/throughput.py --settings cpu,fp32,false,16        # device, precision, compile, batch size
    python benchmarks/throughput.py --settings cuda,bf16,true,64 cuda,bf16,true,256 --output throughput.json

Each setting runs in a process of its own, on random waveforms that are decoded already, as trainer.py and eval.py run
it. `plain` is a first implementation on the same device: the log-mel of each clip by itself, eager float32 in the
contiguous memory format, scoring one clip at a time. `plain, memory kept` is the same with `keep_freed_memory`, to
tell that part apart.

The floor of a stage is the longer of two times: its floating-point operations at the speed of a large matrix product,
and its bytes at the speed of a large copy, both measured here in the same run. The bytes are those of every operation
by itself, inputs and outputs; a compiler that fuses operations moves fewer, and may pass that floor.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.data import published_mel_power
from dataloader import Clip, ClipSet
from evaluation.scoring import run_model
from losses import Mix, Objective
from model.tastgram import N_FFT, N_FRAMES, N_SAMPLES, POWER_FLOOR
from trainer import Trainer, build_model
from utils import (
    OneLineParser,
    UserError,
    choose_precision,
    keep_freed_memory,
    load_config,
    run_script,
    set_up_numerics,
    versions,
)

STAGES = ("front end", "training step", "validation", "scoring")
CLASSES = 41
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--settings", nargs="+", metavar="DEVICE,PRECISION,COMPILE,BATCH", default=default_settings())
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each stage; the median counts")
    parser.add_argument("--output", type=Path, help="file for the figures as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(parse_setting(options.worker), options.repeats)))
        return
    settings = [parse_setting(text) for text in options.settings]
    plain = [
        (device, kind, "false", batch)
        for device, batch in dict.fromkeys((device, batch) for device, _, _, batch in settings)
        for kind in (("plain", "plain-kept") if device == "cpu" else ("plain",))
    ]
    results = []
    for setting in [*plain, *settings]:
        print(f"measuring {name_of(setting)} ...", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--worker", ",".join(map(str, setting)), "--repeats", str(options.repeats)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise UserError(f"{name_of(setting)} could not be measured; its message is above")
        results.append({"setting": setting, "seconds": json.loads(done.stdout.splitlines()[-1])})
    precisions = dict.fromkeys((device, name) for device, precision, _, _ in settings for name in ("fp32", precision))
    peaks = {key: measure_peaks(*key) for key in precisions}
    print_tables(results, peaks)
    if options.output:
        figures = {"results": results, "peaks": {",".join(key): peak for key, peak in peaks.items()},
                   "clip": cost_of_a_clip(), "machine": machine()}  # fmt: skip
        options.output.write_text(json.dumps(figures, indent=2) + "\n")


def default_settings() -> list[str]:
    if torch.cuda.is_available():
        return ["cuda,fp32,false,64", "cuda,bf16,false,64", "cuda,bf16,true,64", "cuda,bf16,true,256"]
    return ["cpu,fp32,false,64", "cpu,fp32,true,64"]


def parse_setting(text: str) -> tuple[str, str, str, int]:
    try:
        device, precision, switch, batch = text.split(",")
        if device in ("cpu", "cuda") and precision in (*DTYPES, "plain", "plain-kept") and switch in ("true", "false"):
            return device, precision, switch, int(batch)
    except ValueError:
        pass
    raise UserError(f"--settings {text}: not DEVICE,PRECISION,COMPILE,BATCH such as cpu,fp32,true,64")


def name_of(setting: tuple[str, str, str, int]) -> str:
    device, precision, switch, batch = setting
    kind = {"plain": "plain", "plain-kept": "plain, memory kept"}.get(precision)
    return f"{device}, {kind or precision + (', compiled' if switch == 'true' else '')}, batch {batch}"


# ---- What is measured ----


def work(setting: tuple[str, str, str, int], repeats: int) -> dict[str, float]:
    """Seconds per clip of each stage."""
    device_name, precision, switch, batch = setting
    device = torch.device(device_name)
    steps = 1 if device_name == "cpu" else 100  # between two looks at the clock, for which a GPU has to be waited for
    clips = random_clips(batch * steps, device)
    if precision.startswith("plain"):
        if precision == "plain-kept":
            keep_freed_memory()
        stages = plain_stages(clips, device, batch)
    else:
        config = load_config(device=device_name, precision=precision, compile=switch, batch_size=batch)
        trainer = Trainer(config, device)

        def front_end() -> None:
            for start in range(0, len(clips), batch):
                trainer.front_end(clips.batch(np.arange(start, start + batch), device)[0])

        stages = {
            "front end": front_end,
            "training step": lambda: trainer.train_epoch(clips),
            "validation": lambda: trainer.validate(clips),
            "scoring": lambda: run_model(trainer.network, config, clips, device),
        }
    return {name: seconds(action, device, repeats) / len(clips) for name, action in stages.items()}


def random_clips(count: int, device: torch.device) -> ClipSet:
    rng = np.random.default_rng(0)
    samples = torch.from_numpy(rng.integers(-300, 300, (min(count, 256), N_SAMPLES), dtype=np.int16)).to(device)
    clips = [Clip(Path(f"{index}.wav"), "fan", 0, index % CLASSES, None) for index in range(count)]
    return ClipSet(clips, samples, np.arange(count) % len(samples))


def plain_stages(clips: ClipSet, device: torch.device, batch: int) -> dict[str, Callable[[], Any]]:
    """The same method without anything that this project does for speed."""
    config = load_config(batch_size=batch)
    set_up_numerics()
    network, objective = build_model(config).to(device), Objective.of(config)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=config.lr)
    mel_power = published_mel_power().to(device)
    rng = np.random.default_rng(0)

    def inputs(size: int) -> list[tuple[dict[str, Tensor], Tensor]]:
        result = []
        for start in range(0, len(clips), size):
            waveform, labels = clips.batch(np.arange(start, start + size), device)
            log_mel = torch.stack([10.0 * torch.log10(mel_power(one) + POWER_FLOOR) for one in waveform])
            result.append(({"waveform": waveform, "log_mel": log_mel.unsqueeze(1)}, labels))
        return result

    def train() -> None:
        network.train()
        for features, labels in inputs(batch):
            mix: Mix = objective.draw_mix(rng, rng, len(labels), device)
            similarity, _ = network(**{name: mix(x) for name, x in features.items()})
            loss = objective.loss(similarity, labels, mix)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    @torch.no_grad()
    def score(size: int) -> None:
        network.eval()
        for features, labels in inputs(size):
            objective.anomaly_score(network(**features)[0], labels).tolist()

    return {
        "front end": lambda: inputs(batch),
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


# ---- The floor ----


class ByteCounter(TorchDispatchMode):
    """Counts the bytes that each operation reads and writes if it runs by itself; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if not function.is_view:
            for value in torch.utils._pytree.tree_leaves((arguments, result)):
                self.total += value.numel() * value.element_size() if isinstance(value, Tensor) else 0
        return result


def cost_of_a_clip() -> dict[str, tuple[float, float]]:
    """Floating-point operations and bytes of each stage for one clip in float32."""
    batch = 4
    trainer = Trainer(load_config(device="cpu", batch_size=batch), torch.device("cpu"))
    waveform, labels = random_clips(batch, trainer.device).batch(np.arange(batch), trainer.device)
    inputs = trainer.front_end(waveform)
    mix = Mix(0.5, torch.arange(batch))
    fft = 2.5 * N_FFT * math.log2(N_FFT) * N_FRAMES  # the counter does not know it

    def count(action: Callable[[], Any]) -> tuple[float, float]:
        with ByteCounter() as moved, FlopCounterMode(display=False) as done:
            action()
        return done.get_total_flops() / batch, moved.total / batch

    front = count(lambda: trainer.front_end(waveform))
    training = count(lambda: trainer.compute_gradient(trainer.network.train(), inputs, labels, mix, 1.0))
    with torch.no_grad():
        forward = count(lambda: trainer.network.eval()(**inputs))
    training = (3 * forward[0], training[1])  # a backward pass is two products of the forward one's size
    front = (front[0] + fft, front[1])
    forward, training = ((x[0] + front[0], x[1] + front[1]) for x in (forward, training))
    return {"front end": front, "training step": training, "validation": forward, "scoring": forward}


def measure_peaks(device_name: str, precision: str) -> tuple[float, float]:
    """Operations a second of a large matrix product in this precision, and bytes a second of a large copy."""
    set_up_numerics()
    device = torch.device(device_name)
    dtype = choose_precision(precision, device)
    size = 2048 if device_name == "cpu" else 8192
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = seconds(lambda: one @ other, device, 9)
    block = torch.zeros(2**27 if device_name == "cpu" else 2**30, device=device, dtype=torch.uint8)
    target = torch.empty_like(block)
    copy = seconds(lambda: target.copy_(block), device, 9)
    return 2 * size**3 / product, 2 * block.numel() / copy


# ---- The tables ----


def print_tables(results: list[dict], peaks: dict[tuple[str, str], tuple[float, float]]) -> None:
    costs = cost_of_a_clip()
    plain = {(r["setting"][0], r["setting"][3]): r["seconds"] for r in results if r["setting"][1] == "plain"}
    print(f"{'':14} {'clips/s':>9} {'ms/batch':>9} {'x plain':>8} {'floor, ms':>10} {'of floor':>9}")
    for result in results:
        device, precision, _, batch = setting = tuple(result["setting"])
        print(name_of(setting))
        for stage in STAGES:
            each = result["seconds"][stage]
            line = f"  {stage:12} {1 / each:9.1f} {1000 * each * batch:9.1f} {plain[device, batch][stage] / each:8.2f}"
            if precision in DTYPES:
                line += "{:10.1f} {:9.0%}".format(*floor(costs[stage], peaks, setting, stage, each))
            print(line)
    print("\npeaks")
    for (device, precision), (flops, moved) in peaks.items():
        print(f"  {device}, {precision}: matrix product {flops / 1e9:,.0f} GFLOP/s, copy {moved / 1e9:,.0f} GB/s")
    print("one clip, every operation by itself, float32")
    for stage in STAGES[:3]:
        print(f"  {stage:14} {costs[stage][0] / 1e9:7.2f} GFLOP {costs[stage][1] / 1e6:8.0f} MB")
    print(", ".join(f"{name} {value}" for name, value in machine().items()))


def floor(cost, peaks, setting, stage: str, each: float) -> tuple[float, float]:
    """The floor of a stage in ms a batch, and its share of the time of `each` clip. Only training is in half precision,
    and then moves half of the bytes.
    """
    device, precision, _, batch = setting
    is_half = stage == "training step" and precision != "fp32"
    flops, moved = peaks[device, precision if is_half else "fp32"]
    longest = max(cost[0] / flops, cost[1] / moved / (2 if is_half else 1))
    return 1000 * longest * batch, longest / each


def machine() -> dict[str, Any]:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.machine())  # fmt: skip
    gpu = {"GPU": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"CPU": f"{os.cpu_count()} x {cpu}", **gpu, **versions()}


if __name__ == "__main__":
    run_script(main)
