"""What a GPU makes of this project, in ten minutes: tests, speed, what bounds it, and what to set.

    python benchmarks/gpu.py                            # all sections
    python benchmarks/gpu.py --only epochs profile      # some of them

Without a GPU it runs in a small form, which shows that the sections themselves work; its figures mean nothing.

It prints a page of text and writes it to OUTPUT/gpu.txt, with all figures in OUTPUT/gpu.json. Each section runs in a
process of its own; one that fails is reported, the others go on, and the exit status is 1 in the end. What does not fit
into --minutes is left out, and said.

    throughput   clips a second of front end, training step, validation and scoring: eager, compiled, as a CUDA graph
    epochs       three epochs of the published recipe on as many random clips, with validation and saving
    tests        the tests that need a GPU
    profile      which operations of a step take longer than three times the time to move their bytes; which kernels the
                 recorded step spends its time in; whether a step makes the host wait
    variants     the step with one thing changed at a time: cudnn.benchmark, memory format, reformulated convolutions
    interrupted  a run that starts on the CPU, is stopped by SIGTERM within an epoch, and goes on on the GPU and back
    processes    a run under torchrun (NCCL), on all GPUs, that is stopped within its second epoch, and resumed
    demo         the training of `make demo` on both devices, and the AUC of each

Beside torch and torchaudio it takes numpy, pandas, scipy, PyYAML, tqdm, filelock, pydantic (with pydantic-core,
annotated-types and typing-inspection), soundfile (with cffi and pycparser), and pytest for the tests; no librosa,
matplotlib, tensorboard, scikit-learn, requests or Jinja2.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.throughput import STAGES, WAYS, machine, random_clips, seconds
from config import load_config
from dataloader import ClipSet
from model.mobilefacenet import WholeMapConv2d
from model.tastgram import N_SAMPLES, TgramNet
from trainer import Run, Trainer
from utils import OneLineParser, run_script, use_device

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = Path("check_points/gpu")
RECIPE = (34_468, 1_815, 300)  # clips to train on, clips to validate, epochs
AIM = 20.0  # minutes
SLOW = 3.0  # times the time to move the bytes of an operation, from which on it is flagged
DEMO_MACHINES = (
    "{fan: [0, 2, 4], pump: [0, 2, 4], slider: [0, 2, 4], valve: [0, 2, 4], ToyCar: [1, 2, 3], ToyConveyor: [1, 2, 3]}"
)
LEAST_SHARE = 0.01  # of a step, below which an operation is not flagged

# ---- Sections: each returns plain values for the JSON ----


def throughput(device: torch.device, is_small: bool, folder: Path) -> dict[str, Any]:
    """Clips a second."""
    ways = ("eager", "graph") if is_small else WAYS
    precision = "fp32" if device.type == "cpu" else "bf16"
    rates: dict[str, Any] = {}
    for batch in (4,) if is_small else (64, 256):
        for way in ways:
            setting = f"{device.type},{precision},{way},{batch}"
            words = ["benchmarks/throughput.py", "--worker", setting, "--repeats", "1" if is_small else "3"]
            each = json.loads(call(*words).splitlines()[-1])
            rates[setting] = {stage: 1 / each[stage] for stage in STAGES}
    return rates


def epochs(device: torch.device, is_small: bool, folder: Path) -> dict[str, Any]:
    """Seconds of each epoch, everything included, and minutes of the whole recipe from them."""
    n_train, n_valid, n_epochs = (48, 8, RECIPE[2]) if is_small else RECIPE
    config = load_config(
        device=device.type, save_path=str(folder / "epochs" / "run.pth"), epoch=n_epochs, tensorboard=False,
        batch_size=8 if is_small else 64,
    )  # fmt: skip
    clips = [stand_ins(count, device) for count in (n_train, n_valid)]
    run = Run(config.model_copy(update={"epoch": 3}), device, *clips)
    run.fit()
    first, *rest = [row["seconds"] for row in run.history]
    whole = first + sum(rest) / len(rest) * (RECIPE[2] - 1)
    memory = torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else None
    return {
        "seconds": [first, *rest],
        "training clips": n_train,
        "clips/s": n_train / rest[-1],
        "minutes of the recipe": whole / 60 * RECIPE[0] / n_train,
        "GPU memory, GB": memory,
    }


def stand_ins(count: int, device: torch.device) -> ClipSet:
    """Random clips in the memory of the device."""
    rows = {"path": [Path(f"{i}.wav") for i in range(count)], "machine_type": "fan", "machine_id": "00"}
    clips = ClipSet(pd.DataFrame(rows | {"label": np.arange(count) % 41, "condition": "normal"}), num_workers=1)
    clips.samples = torch.empty((count, N_SAMPLES), dtype=torch.int16, device=device)
    for part in clips.samples.split(256):
        part.random_(-300, 300)
    return clips


def tests(device: torch.device, is_small: bool, folder: Path) -> dict[str, Any]:
    """The last lines of pytest."""
    files = ["tests/test_trainer.py", "tests/test_dataloader.py"]
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    lines = [
        line for line in done.stdout.splitlines() if re.match(r"FAILED|ERROR|E  |.* (passed|failed|skipped)", line)
    ]
    if done.returncode:
        raise RuntimeError("\n".join(lines[-40:]) or done.stderr[-2000:])
    return {"result": lines[-1]}


def profiled(device: torch.device, is_small: bool, folder: Path) -> dict[str, Any]:
    """Operations by time and bytes, kernels of the step as it runs by default, and whether a step waits."""
    steps, batch = (1, 4) if is_small else (20, 64)
    clips, warm_up = random_clips(batch * steps, device), random_clips(batch * 6, device)
    speed = copy_speed(device, 2**22 if is_small else 2**29)
    results: dict[str, Any] = {"bytes/s": speed}
    for name, switch in (("eager", False), ("default", "auto")):
        trainer = Trainer(
            load_config(device=device.type, batch_size=batch, compile=switch, cuda_graph=bool(switch)), device
        )
        trainer.train_epoch(warm_up, 0)
        results[f"{name}: waits"] = find_wait(trainer, clips)
        results[f"{name}: kernels"] = kernels(recorded_epoch(trainer, clips), steps)
        if name == "eager":
            with CountedBytes() as counted:
                recording = recorded_epoch(trainer, clips)
            results["operations"] = operations(recording, counted.operations, device, steps, speed)
    return results


def recorded_epoch(trainer: Trainer, clips: ClipSet) -> profile:
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if trainer.device.type == "cuda" else [])
    with profile(activities=kinds, acc_events=True) as recording:
        trainer.train_epoch(clips, 0)
    return recording


def copy_speed(device: torch.device, count: int) -> float:
    """Bytes read and written a second, in a copy within the device."""
    source, target = torch.zeros(count, device=device), torch.zeros(count, device=device)
    return 2 * 4 * count / seconds(lambda: target.copy_(source), device, 5)


class CountedBytes(TorchDispatchMode):
    """Numbers the operations in a profile; `operations` has the name of each and the bytes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number = len(self.operations)
        self.operations.append((func.overloadpacket.__name__, 0))
        with record_function(f"operation {number}"):
            result = func(*args, **(kwargs or {}))
        read, written = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (args, result))
        count = 0 if func.is_view else sum(tensor.numel() * tensor.element_size() for tensor in (*read, *written))
        shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in read[:2])
        self.operations[number] = (f"{func.overloadpacket.__name__}({shapes})", count)
        return result


def operations(
    recording: profile, counted: list[tuple[str, int]], device: torch.device, steps: int, speed: float
) -> list[dict[str, Any]]:
    """What takes the most time in a step, with its bytes, and its time as a multiple of that of moving them."""
    time_of: dict[tuple[str, int], float] = defaultdict(float)  # seconds of all steps
    calls: dict[tuple[str, int], int] = defaultdict(int)
    for event in recording.events():
        if event.device_type == DeviceType.CPU and (match := re.fullmatch(r"operation (\d+)", event.name)):
            operation = counted[int(match[1])]
            time_of[operation] += (event.device_time_total if device.type == "cuda" else event.cpu_time_total) / 1e6
            calls[operation] += 1
    whole = sum(time_of.values())
    rows = []
    for operation in sorted(time_of, key=time_of.__getitem__, reverse=True)[:40]:
        multiple = time_of[operation] / (calls[operation] * operation[1] / speed) if operation[1] else None
        share = time_of[operation] / whole
        is_slow = share >= LEAST_SHARE and multiple is not None and multiple > SLOW
        rows.append({"operation": operation[0], "calls": calls[operation] / steps, "MB": operation[1] / 1e6,
                     "ms": 1000 * time_of[operation] / steps, "share": share, "multiple": multiple,
                     "slow": is_slow})  # fmt: skip
    return rows


def kernels(recording: profile, steps: int) -> list[dict[str, Any]]:
    """What takes the most time on the device by itself."""
    averages = recording.key_averages()
    on_device = [event for event in averages if event.device_type != DeviceType.CPU]
    times = {event.key: event.self_device_time_total for event in on_device} or {
        event.key: event.self_cpu_time_total for event in averages
    }
    names = sorted(times, key=times.__getitem__, reverse=True)[:25]
    return [{"kernel": name, "ms": times[name] / 1000 / steps} for name in names]


def find_wait(trainer: Trainer, clips: ClipSet) -> str:
    """What makes the host wait for the device between the first and the last step of an epoch, if anything does."""
    batch, device = trainer.config.batch_size, trainer.device
    if device.type != "cuda":
        return "nothing"
    shares, mixes = trainer.divide(0, [np.arange(batch)] * 3)
    steps = list(zip(clips.batches(shares, device), mixes, strict=True))
    try:
        torch.cuda.set_sync_debug_mode("error")
        for (samples, labels), mix in steps:
            trainer.step(samples, labels, mix)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "nothing"


def variants(device: torch.device, is_small: bool, folder: Path) -> dict[str, Any]:
    """Milliseconds of an uncompiled step, as it is and with one thing changed at a time."""
    steps, batch = (1, 4) if is_small else (50, 64)
    clips = random_clips(batch * steps, device)

    def as_published(network: TgramNet, waveform: Tensor) -> Tensor:
        return network.conv_encoder(network.conv_extrctor(waveform.unsqueeze(1)))

    changes: dict[str, Callable[[Trainer], Any]] = {
        "as it is": lambda trainer: nullcontext(),
        "without cudnn.benchmark": lambda trainer: torch.backends.cudnn.flags(True, False, allow_tf32=False),
        "contiguous": lambda trainer: nullcontext(trainer.network.to(memory_format=torch.contiguous_format)),
        "linear7 as a convolution": lambda trainer: mock.patch.object(WholeMapConv2d, "forward", nn.Conv2d.forward),
        "Tgram as a convolution": lambda trainer: mock.patch.object(TgramNet, "forward", as_published),
    }
    times = {}
    for name, change in changes.items():
        trainer = Trainer(load_config(device=device.type, batch_size=batch, compile=False), device)
        with change(trainer):
            trainer.train_epoch(random_clips(batch * 6, device), 0)  # warms up and records
            times[name] = 1000 / steps * seconds(partial(trainer.train_epoch, clips, 0), device, 1 if is_small else 3)
    return times


def interrupted(device: torch.device, is_small: bool, folder: Path) -> dict[str, Any]:
    """After which epoch a run was stopped on each device, and the losses of all its epochs."""
    weights = folder / "interrupted" / "run.pth"
    options = training_options(demo_data(folder, is_small), weights, is_small, epoch=8)
    stopped = {}
    for name in ("cpu", device.type):
        process = train_one_epoch([sys.executable, "train.py", *options, "--device", name, "--resume"])
        time.sleep(0.05)  # into the next epoch
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate()
        said = re.search(r"stopped; --resume continues after epoch (\d)", errors)
        if process.returncode != 143 or not said:
            raise RuntimeError(f"on {name}, status {process.returncode}: {output[-500:]} {errors[-1500:]}")
        stopped[f"{name}, stopped after epoch"] = int(said[1])
    call("train.py", *options, "--device", "cpu", "--resume")
    return stopped | {"train_loss": train_losses(weights, 8)}


def processes(device: torch.device, is_small: bool, folder: Path) -> dict[str, Any]:
    return stop_and_resume(device.type, 2 if is_small else torch.cuda.device_count(), folder / "processes", is_small)


def stop_and_resume(device: str, processes: int, folder: Path, is_small: bool) -> dict[str, Any]:
    """Train with the last of the processes stopped in the second epoch, then resume. Raises where the job does not fail
    with one error, or where the resumed run is not whole.
    """
    weights = folder / "run.pth"
    options = training_options(demo_data(folder, is_small), weights, is_small, epoch=8)
    command = torchrun(processes, "train_ddp.py", *options, "--device", device)
    job = train_one_epoch(command)
    os.kill(children(job.pid)[-1], signal.SIGTERM)
    start = time.monotonic()
    _, errors = job.communicate()
    ended = time.monotonic() - start
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    if job.returncode == 0 or len(said) != 1:
        raise RuntimeError(f"status {job.returncode}: {errors[-3000:]}")
    call(*command[1:], "--resume")
    losses = train_losses(weights, 8)
    return {f"a process of {processes} stopped": said[0], "seconds to the end": round(ended, 1), "train_loss": losses}


def torchrun(processes: int, *words: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, *words]


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def train_one_epoch(command: list[str]) -> subprocess.Popen[str]:
    """Start a training, and wait for the line of its first epoch: it is in a later one then."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    while (line := process.stdout.readline()) and not line.startswith("epoch "):
        pass
    return process


def train_losses(weights: Path, epochs: int) -> list[float]:
    """Of a run that must have each of its epochs once."""
    history = pd.read_csv(weights.with_suffix("") / "history.csv")
    if history["epoch"].tolist() != [*range(1, epochs + 1)]:
        raise RuntimeError(f"the epochs of history.csv are {history['epoch'].tolist()}")
    return history["train_loss"].tolist()


def demo(device: torch.device, is_small: bool, folder: Path) -> dict[str, Any]:
    """Mean AUC over machine IDs and types, and seconds of training, on each device."""
    data, results = demo_data(folder, is_small), {}
    for name in dict.fromkeys((device.type, "cpu")):
        weights = folder / f"demo_{name}.pth"
        options = [*training_options(data, weights, is_small, epoch=1 if is_small else 8), "--device", name]
        start = time.perf_counter()
        call("train.py", *options, "--overwrite")
        spent = time.perf_counter() - start
        call("eval.py", str(weights), "--data_root", str(data), "--device", name)
        metrics = json.loads((weights.with_suffix("") / "test" / "metrics.json").read_text())["metrics"]
        results[name] = {"mean AUC": metrics["average"]["mean"]["AUC"], "seconds": spent}
    return results


def demo_data(folder: Path, is_small: bool) -> Path:
    data = folder / "demo"
    call("datasets/synthesize.py", "--output", str(data), *(["--train", "3", "--test", "1"] if is_small else []))
    return data


def training_options(data: Path, weights: Path, is_small: bool, epoch: int) -> list[str]:
    """As in `make demo`, but for the compilation, which would take longer than the training."""
    machines, batch = ("{fan: [0, 2]}", 4) if is_small else (DEMO_MACHINES, 16)
    values = {"data_root": data, "machines": machines, "save_path": weights, "epoch": epoch, "lr": "1e-3",
              "batch_size": batch, "split_ratio": 0.8, "compile": "false", "tensorboard": "false"}  # fmt: skip
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def call(*words: str) -> str:
    """Run one of the project's scripts; its standard output."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[:2])}: {done.stderr[-2000:]}")
    return done.stdout


SECTIONS = {
    "throughput": throughput,
    "epochs": epochs,
    "tests": tests,
    "profile": profiled,
    "variants": variants,
    "interrupted": interrupted,
    "processes": processes,
    "demo": demo,
}

# ---- The page ----


def describe(name: str, values: dict[str, Any]) -> Iterator[str]:
    """The lines of a section."""
    if name == "throughput":
        yield f"{'clips/s':28}" + "".join(f"{stage:>15}" for stage in STAGES)
        for setting, rates in values.items():
            yield f"{setting:28}" + "".join(f"{rates[stage]:15,.0f}" for stage in STAGES)
    elif name == "profile":
        yield f"a copy moves {values['bytes/s'] / 1e9:,.0f} GB/s, read and written"
        for way in ("eager", "default"):
            yield f"{way}: the host waits for {values[f'{way}: waits']}"
        yield f"{'operation, eager':70} {'calls':>6} {'MB':>8} {'ms/step':>8} {'share':>6} {'x bytes':>8}"
        for row in values["operations"]:
            multiple = "-" if row["multiple"] is None else f"{row['multiple']:.1f}"
            yield (
                f"{row['operation'][:70]:70} {row['calls']:6.0f} {row['MB']:8.1f} {row['ms']:8.3f} {row['share']:6.1%} "
                f"{multiple:>8}{'  slow' if row['slow'] else ''}"
            )
        yield f"{'kernel, default':100} {'ms/step':>8}"
        for row in values["default: kernels"]:
            yield f"{row['kernel'][:100]:100} {row['ms']:8.3f}"
    elif name == "variants":
        for change, each in values.items():
            yield f"{change:28} {each:8.2f} ms/step, {each / values['as it is']:.2f} of the step as it is"
    else:
        for key, value in values.items():
            yield f"{key:28} {show(value)}"


def show(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {show(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(show, value))
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def recommend(results: dict[str, Any]) -> Iterator[str]:
    """What to set, or to look at, by these figures."""
    rates = {setting: stages["training step"] for setting, stages in results.get("throughput", {}).items()}
    for batch in dict.fromkeys(setting.rpartition(",")[2] for setting in rates):
        of_batch = {setting: rate for setting, rate in rates.items() if setting.endswith(f",{batch}")}
        best = max(of_batch, key=of_batch.__getitem__)
        way = best.split(",")[2]
        switches = f"compile: {str(way != 'eager').lower()}, cuda_graph: {str(way == 'graph').lower()}"
        yield f"batch_size {batch}: {way} is the fastest, {of_batch[best]:,.0f} clips/s ({switches})"
    for change, each in results.get("variants", {}).items():
        if each < 0.97 * results["variants"]["as it is"]:
            yield f"{change}: {results['variants']['as it is'] / each:.2f} times as fast; make it the default"
    if "epochs" in results:
        minutes = results["epochs"]["minutes of the recipe"]
        yield f"the recipe takes {minutes:.1f} minutes; the aim of {AIM:.0f} is {'met' if minutes <= AIM else 'missed'}"
    slow = [row for row in results.get("profile", {}).get("operations", []) if row["slow"]]
    for row in slow[:5]:
        yield f"slow: {row['operation']}, {row['share']:.0%} of an eager step, {row['multiple']:.1f} times its bytes"
    for way in ("eager", "default"):
        if (wait := results.get("profile", {}).get(f"{way}: waits", "nothing")) != "nothing":
            yield f"the {way} step makes the host wait: {wait}"


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--device", default="auto", help="cuda, cuda:N, or cpu for the small form (default: auto)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--minutes", type=float, default=9.5, help="after which no section runs (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help=f"folder for gpu.json and gpu.txt (default: {OUTPUT})"
    )
    parser.add_argument("--section", nargs=2, help=argparse.SUPPRESS)  # its name and a folder for its files
    options = parser.parse_args()
    device = use_device(options.device)
    if options.section:
        name, folder = options.section
        print(json.dumps(SECTIONS[name](device, device.type == "cpu", Path(folder))))
        return
    results, problems, spent = run_sections(options)
    page = [", ".join(f"{name} {value}" for name, value in machine().items())]
    for name, values in results.items():
        page += ["", f"{name} ({spent[name]:.0f} s)", *(f"  {line}" for line in describe(name, values))]
    page += ["", "recommendations", *(f"  {line}" for line in recommend(results))]
    page += [f"\n{name} FAILED\n  {problem}" for name, problem in problems.items()]
    text = "\n".join(page) + "\n"
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "gpu.txt").write_text(text)
    content = {"machine": machine(), "results": results, "problems": problems, "seconds": spent}
    (options.output / "gpu.json").write_text(json.dumps(content, indent=2) + "\n")
    sys.exit(1 if problems else 0)


def run_sections(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str], dict[str, float]]:
    """What each section gives, what went wrong, and seconds."""
    end = time.monotonic() + 60 * options.minutes
    results, problems, spent = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            print(f"{name} ...", file=sys.stderr, flush=True)
            words = [sys.executable, __file__, "--device", options.device, "--section", name, folder]
            start = time.monotonic()
            process = subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
            )
            try:
                output, errors = process.communicate(timeout=max(end - start, 0.1))
                if process.returncode:
                    problems[name] = errors[-3000:]
                else:
                    results[name] = json.loads(output.splitlines()[-1])
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                problems[name] = f"not done within {options.minutes:g} minutes"
            spent[name] = time.monotonic() - start
    return results, problems, spent


if __name__ == "__main__":
    run_script(main)
