"""Check that everything works on this GPU, and measure how fast it is.

    python3 benchmarks/gpu.py --minutes 8 --output DIR
    python3 benchmarks/gpu.py --only "step, default" tests       # some of the measurements
    # on a CPU: compute the reference losses again
    python3 benchmarks/gpu.py --reference

DIR/gpu.md is the page, DIR/gpu.json has the same figures, and DIR/gpu.log the output of the
measurements. All are written again after each figure, so an interruption costs only the current
measurement. Measurements run one after the other, the most important ones first, each in a separate
process. A measurement that fails gives a row with the reason, and a notice of the program gives a
row too. Measurements that do not fit into --minutes are left out.

No data set is needed: the clips are random. Required packages beside torch and torchaudio with
their dependencies: numpy, pandas, scipy, PyYAML, tqdm, pytest, filelock, pydantic (with
pydantic-core, annotated-types, typing-inspection) and soundfile (with cffi and pycparser). Without
a GPU everything runs in a small form as a check, and the figures have no meaning.
"""

import argparse
import ast
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import acceleration
from acceleration import find_reason
from audio import N_SAMPLES, SAMPLE_RATE
from benchmarks.processes import stop_and_resume
from benchmarks.throughput import (
    CLASSES,
    clips_without_samples,
    describe_machine,
    random_clips,
    seconds,
    train_epochs,
    untrained_model,
)
from command_line import OneLineParser
from config import Config, load_config
from dataloader import ClipSet
from errors import UserError
from inference import Model, run_model
from sampling import Sampler
from trainer import Trainer, Validation
from utils import run_script, use_device, write_text

ROOT = Path(__file__).resolve().parent.parent
# Losses of the first steps on a CPU, by batch size and precision
REFERENCE = Path(__file__).with_name("gpu_losses.json")
OUTPUT = Path("check_points/gpu")
RECIPE = (34_468, 1_815, 300)  # clips to train on, clips to validate, epochs
AIM = 9900  # clips/s: 300 epochs in 20 minutes
COMPARED = {4: 4, 64: 20, 256: 5}  # how many steps are compared, by batch size
MARK = "ROW "  # of the lines in which a measurement reports
# How far losses of the first steps and scores may be from those of a CPU, as a fraction of the
# largest. On a CPU, bf16 is off fp32 by 0.003 in the losses and 0.011 in the embeddings.
BOUNDS = {"fp32": 2e-3, "bf16": 2e-2, "fp16": 2e-2}
GRAPHS = {"triton.cudagraphs": True}
BYTES = {
    "float": 4, "c10::BFloat16": 2, "c10::Half": 2, "double": 8, "long int": 8, "int": 4,
    "short int": 2, "c10::complex<float>": 8, "unsigned char": 1, "bool": 1, "TensorList": 4,
}  # fmt: skip


class Place(NamedTuple):
    """Where a measurement runs."""

    device: torch.device
    is_small: bool  # on a CPU
    folder: Path  # for its files

    @property
    def batch(self) -> int:
        return 4 if self.is_small else 64

    def usable(self, *precisions: str) -> list[str]:
        """Return the precisions that this place is fast enough for."""
        return ["fp32"] if self.is_small else list(precisions)

    def config(self, **keys: Any) -> Config:
        """Return the configuration of a training on a GPU, in which `keys` replace others."""
        values = {"batch_size": self.batch, "compile": False if self.is_small else "auto"} | keys
        return load_config(device=self.device.type, **values)

    def trainer(self, clips: ClipSet, **keys: Any) -> Trainer:
        """Return a trainer on clips, with `config` of these keys."""
        return Trainer(self.config(**keys), CLASSES, self.device, clips, clips)


def emit(name: str, **values: Any) -> None:
    """Report a figure, from the process of a measurement."""
    print("\n" + MARK + json.dumps({"name": name} | values), flush=True)


# ---- Measurements ----


def report_machine(place: Place) -> None:
    emit("versions", **describe_machine())
    if place.is_small:
        return
    emit(
        "libraries",
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        capability=str(torch.cuda.get_device_capability()),
    )
    fields = (
        "driver_version,memory.total,memory.free,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    )
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    lines = subprocess.check_output(command, text=True).splitlines()
    values = lines[place.device.index or 0].split(", ")
    emit("nvidia-smi", **dict(zip(fields.split(","), values, strict=True)))
    emit("copy", **{"GB/s": copy_speed(place) / 1e9})


def copy_speed(place: Place) -> float:
    """Measure the bytes per second that a copy within the device reads and writes."""
    count = 2**22 if place.is_small else 2**29
    source, target = (torch.zeros(count, device=place.device) for _ in range(2))
    return 2 * 4 * count / seconds(lambda: target.copy_(source), place.device, 5)


def measure_step(
    place: Place, precision: str = "bf16", options: dict[str, Any] | None = None, batch: int = 64
) -> None:
    """Measure a compiled step: its first losses beside those of a CPU, then its speed."""
    if place.is_small:
        batch = place.batch
    (precision,) = place.usable(precision)
    if options is not None:
        acceleration.OPTIONS = options
    clips = clips_of_first_steps(batch, place.device)
    trainer = place.trainer(clips, batch_size=batch, precision=precision)
    start = time.perf_counter()
    losses = first_losses(trainer)
    figures = {"seconds": time.perf_counter() - start}
    if options:  # how often the compiler made no graph of the device's operations
        figures["skips"] = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    emit("compiling and first steps", **figures)
    compare_losses(losses, batch, precision)
    n_steps, repeats = (2, 1) if place.is_small else (6400 // batch, 5)
    clip_time = time_per_clip(trainer, n_steps * batch, repeats)
    figures = {"clips/s": 1 / clip_time, "ms": 1000 * clip_time * batch}
    emit("speed", **figures, GB=reserved_memory(place.device))


def time_per_clip(trainer: Trainer, count: int, repeats: int) -> float:
    """Return the seconds that an epoch on `count` random clips takes for each of them."""
    trainer.train_clips = random_clips(count, trainer.device)
    trainer.sampler = Sampler(trainer.config, trainer.train_clips, trainer.device)
    return seconds(train_epochs(trainer), trainer.device, repeats) / count


def measure_uncompiled_step(place: Place) -> None:
    """Compare the losses of uncompiled steps, which differ least from those of a CPU."""
    clips = clips_of_first_steps(place.batch, place.device)
    for precision in place.usable("fp32", "bf16"):
        trainer = place.trainer(clips, precision=precision, compile=False)
        compare_losses(first_losses(trainer), place.batch, precision)
    n_steps, repeats = (2, 1) if place.is_small else (50, 3)
    clip_time = time_per_clip(trainer, n_steps * place.batch, repeats)
    emit(f"speed in {precision}", **{"clips/s": 1 / clip_time})


def compare_losses(losses: list[float], batch: int, precision: str) -> None:
    references = json.loads(REFERENCE.read_text()).get(str(batch), {})
    emit(f"{precision}: loss", first=losses[0], last=losses[-1], steps=len(losses))
    for kind in sorted({"fp32", precision} & set(references)):
        compare(f"{precision}: loss, and the CPU's in {kind}", losses, references[kind], precision)


def clips_of_first_steps(batch: int, device: torch.device) -> ClipSet:
    """Return random clips for the steps whose losses are compared."""
    return random_clips(batch * COMPARED[batch], device)


def first_losses(trainer: Trainer) -> list[float]:
    """Return the losses of the first epoch."""
    # With the usual scale, fp16 would skip the first steps.
    is_fp16 = trainer.scaler.is_enabled()
    trainer.scaler = torch.amp.GradScaler(trainer.device.type, init_scale=256.0, enabled=is_fp16)
    trainer.parallel_loss.train()
    losses = []
    for batch in trainer.sampler.batches(0):
        loss, _ = trainer.step(batch)
        losses.append(loss.item())
    return losses


def compare(name: str, values: Any, expected: Any, precision: str) -> None:
    """Report the largest difference, as a fraction of the largest expected value."""
    expected = np.asarray(expected, dtype=float)
    largest = np.abs(np.asarray(values, dtype=float) - expected).max() / np.abs(expected).max()
    difference = float(largest) if np.isfinite(largest) else "not finite"
    emit(name, difference=difference, bound=BOUNDS[precision])


def reserved_memory(device: torch.device) -> float | None:
    """Return the GB of a GPU that PyTorch has reserved at most; None for a CPU."""
    return torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else None


def run_tests(place: Place) -> None:
    """Run the tests that need a GPU; report each result as soon as the test ends."""
    import pytest

    class Reporter:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message.splitlines()[0] if crash else str(report.longrepr or "")
            if report.when == "call" or not report.passed:
                result = {"problem": reason} if report.failed else {"result": report.outcome}
                emit(report.nodeid.rpartition("::")[2], **result, seconds=report.duration)

    os.chdir(ROOT)
    files = ["tests/test_dataloader.py", "tests/test_trainer.py"]
    words = ["-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    status = pytest.main(words, plugins=[Reporter()])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with status {int(status)}")


def measure_recipe(place: Place) -> None:
    """Train three epochs of the published recipe, on as many random clips on the device."""
    n_train, n_valid = (16, 8) if place.is_small else RECIPE[:2]
    save_path = str(place.folder / "run.pth")
    config = place.config(save_path=save_path, epoch=3, tensorboard=False)
    clips = [clips_on(place.device, count) for count in (n_train, n_valid)]
    TimedTrainer(config, CLASSES, place.device, *clips).fit()


class TimedTrainer(Trainer):
    """A trainer that reports the seconds of training, validation and saving in each epoch."""

    def validate(self, clips: ClipSet) -> Validation:
        start = time.monotonic()
        validation = super().validate(clips)
        self.validation_time = time.monotonic() - start
        return validation

    def save(self, scores: np.ndarray, is_best: bool) -> None:
        start = time.monotonic()
        super().save(scores, is_best)
        self.saving_time = time.monotonic() - start

    def report(self, is_best: bool, log: Any) -> None:
        super().report(is_best, log)
        result = self.history[-1]
        training_time = result.seconds - self.validation_time
        epoch_time = result.seconds + self.saving_time
        n_train, _, n_epochs = RECIPE
        figures = {
            "training, s": training_time,
            "validation, s": self.validation_time,
            "saving, s": self.saving_time,
            "clips/s": len(self.train_clips) / training_time,
            "minutes of 300 epochs": epoch_time * n_epochs / 60 * n_train / len(self.train_clips),
        }
        emit(f"epoch {result.epoch}", **figures, GB=reserved_memory(self.device))


def clips_on(device: torch.device, count: int) -> ClipSet:
    """Return random clips in the memory of the device."""
    clips = clips_without_samples(count)
    clips.samples = torch.empty((count, N_SAMPLES), dtype=torch.int16, device=device)
    for part in clips.samples.split(256):
        part.random_(-300, 300)
    return clips


def measure_scoring(place: Place) -> None:
    """Compare the scores of an initialised network with those of the CPU."""
    n_compared, n_clips = (4, 8) if place.is_small else (64, 6400)
    model, cpu = untrained_model(load_config()), torch.device("cpu")
    expected_scores, expected_embeddings = score(model, random_clips(n_compared, cpu), cpu, "fp32")
    for precision in place.usable("fp32", "bf16"):
        clips = random_clips(n_compared, place.device)
        scores, embeddings = score(model, clips, place.device, precision)
        suffix = "and the CPU's in fp32"
        compare(f"{precision}: scores {suffix}", scores, expected_scores, precision)
        compare(f"{precision}: embeddings {suffix}", embeddings, expected_embeddings, precision)
        many = random_clips(n_clips, place.device)
        repeats = 1 if place.is_small else 3
        action = partial(score, model, many, place.device, precision)
        elapsed = seconds(action, place.device, repeats)
        emit(f"{precision}: speed", **{"clips/s": n_clips / elapsed})


def score(
    model: Model, clips: ClipSet, device: torch.device, precision: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores `(n,)` of clips against their machines, and their embeddings `(n, E)`."""
    outputs = run_model(model, clips, load_config(eval_precision=precision), device)
    machines = [CLASSES.machines[label] for label in clips.labels]
    scores = model.scorer("published").score_clips(outputs, machines)
    return scores.numpy(), outputs.embedding.numpy()


def measure_kernels(place: Place) -> None:
    """Report the ten most expensive kernels of a compiled step.

    Each has the bytes that it reads and writes, and its speed as a fraction of that of a copy.
    """
    steps = 2 if place.is_small else 10
    speed = copy_speed(place)
    trainer = place.trainer(random_clips(place.batch * steps, place.device))
    train_epoch = train_epochs(trainer)
    train_epoch()
    kinds = [ProfilerActivity.CPU] + ([] if place.is_small else [ProfilerActivity.CUDA])
    with profile(activities=kinds, record_shapes=True) as recording:
        train_epoch()
    trace = place.folder / "trace.json"
    recording.export_chrome_trace(str(trace))
    table = sum_kernels(json.loads(trace.read_text())["traceEvents"], steps)
    whole = sum(row["ms"] for row in table)
    totals = {
        "ms a step": whole,
        "kernels a step": sum(row["calls"] for row in table),
        "GB a step": sum(row["GB"] or 0 for row in table),
        "copy, GB/s": speed / 1e9,
    }
    emit("all", **totals)
    for row in sorted(table, key=lambda row: row["ms"], reverse=True)[:10]:
        share = row["GB"] * 1e9 / (row["ms"] / 1e3) / speed if row["GB"] and row["ms"] else None
        figures = {name: row[name] for name in ("ms", "calls", "GB")}
        emit(row["kernel"], **figures, **{"of the step": row["ms"] / whole, "of copy speed": share})


def sum_kernels(events: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Return the milliseconds, calls and bytes per step of each kernel in a trace of the profiler.

    Where there are no kernels, as on a CPU, the operations take their place.
    """
    cpu_events = [event for event in events if event.get("cat") == "cpu_op"]
    operations = {event["args"]["External id"]: event for event in cpu_events}
    convolutions = [
        event for event in operations.values() if event["name"].startswith("aten::convolution")
    ]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    kernels = kernels or list(operations.values())
    # Kernels launched by the same operation share its bytes.
    launched = Counter(kernel["args"].get("External id") for kernel in kernels)
    rows: dict[str, dict[str, Any]] = defaultdict(lambda: {"ms": 0.0, "calls": 0.0, "GB": 0.0})
    for kernel in kernels:
        operation = operations.get(kernel["args"].get("External id"))
        row = rows[kernel["name"]]
        row["ms"] += kernel["dur"] / 1e3 / steps
        row["calls"] += 1 / steps
        if operation:
            n_bytes = count_bytes(enclosing(operation, convolutions))
            row["GB"] += n_bytes / launched[operation["args"]["External id"]] / 1e9 / steps
    return [{"kernel": name, **row, "GB": row["GB"] or None} for name, row in rows.items()]


def enclosing(operation: dict[str, Any], convolutions: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the convolution that an operation is a part of, or else the operation itself.

    Only the convolution has the parameters.
    """
    start, end = operation["ts"], operation["ts"] + operation["dur"]
    for outer in convolutions:
        is_within = outer["ts"] <= start and end <= outer["ts"] + outer["dur"]
        if is_within and outer["tid"] == operation["tid"]:
            return outer
    return operation


def count_bytes(operation: dict[str, Any]) -> int:
    """Count the bytes of an operation's tensor arguments, and of the results of a convolution.

    The arguments of a kernel made by the compiler include its results.
    """
    arguments = operation["args"]
    shapes, kinds = arguments.get("Input Dims", []), arguments.get("Input type", [])
    sizes = []
    for shape, kind in zip(shapes, kinds, strict=False):
        sizes.append(count_elements(shape) * BYTES.get(kind, 0))
    if operation["name"] == "aten::convolution_backward":
        return sum(sizes) + sizes[1] + sizes[2]  # the gradients of input and weight
    if operation["name"] == "aten::convolution":
        inputs = [torch.empty(shape, device="meta") for shape in shapes[:2]]
        parameters = [ast.literal_eval(text.title()) for text in arguments["Concrete Inputs"][3:]]
        output = torch.ops.aten.convolution(*inputs, None, *parameters)
        return sum(sizes) + output.numel() * BYTES.get(kinds[0], 0)
    return sum(sizes)


def count_elements(shape: list[Any]) -> int:
    """Count the elements of a tensor or of a list of tensors; 0 for a number."""
    if shape and isinstance(shape[0], list):
        return sum(map(count_elements, shape))
    return math.prod(shape) if shape else 0


def measure_files(place: Place) -> None:
    """Measure an epoch whose recordings are read from files by 16 threads."""
    import soundfile

    n_files, n_clips, n_threads = (8, 8, 2) if place.is_small else (1024, 6400, 16)
    rng = np.random.default_rng(0)
    paths = [place.folder / f"{number}.wav" for number in range(n_files)]
    for path in paths:
        soundfile.write(path, rng.integers(-300, 300, N_SAMPLES, dtype=np.int16), SAMPLE_RATE)
    table = clips_without_samples(n_clips).recordings.assign(
        path=np.resize(np.array(paths), n_clips)
    )
    clips = ClipSet(table, n_threads)
    trainer = place.trainer(clips)
    repeats = 1 if place.is_small else 3
    elapsed = seconds(train_epochs(trainer), place.device, repeats)
    emit("training", **{"clips/s": n_clips / elapsed, "threads": n_threads})

    def read() -> None:
        for _ in trainer.sampler.batches(0):
            pass

    elapsed = seconds(read, place.device, 1)
    emit("reading alone", **{"clips/s": n_clips / elapsed, "threads": n_threads})


def measure_processes(place: Place) -> None:
    """Train with torchrun on all GPUs, stop one of the processes, and resume the run."""
    count = 2 if place.is_small else torch.cuda.device_count()
    emit(f"{count} processes", **stop_and_resume(place.device.type, count, place.folder))


class Measurement(NamedTuple):
    function: Callable[[Place], None]
    limit: float  # seconds


MEASUREMENTS = {  # the most important ones come first
    "machine": Measurement(report_machine, 40),
    "step, default": Measurement(measure_step, 130),
    "step, threshold 4": Measurement(partial(measure_step, options={}), 110),
    "step, graphs of the compiler": Measurement(
        partial(measure_step, options=acceleration.OPTIONS | GRAPHS), 110
    ),
    "step, uncompiled": Measurement(measure_uncompiled_step, 60),
    "tests": Measurement(run_tests, 130),
    "recipe": Measurement(measure_recipe, 100),
    "scoring": Measurement(measure_scoring, 60),
    "kernels": Measurement(measure_kernels, 80),
    "step, fp32": Measurement(partial(measure_step, precision="fp32"), 110),
    "step, batch 256": Measurement(partial(measure_step, batch=256), 110),
    "step, fp16": Measurement(partial(measure_step, precision="fp16"), 110),
    "files": Measurement(measure_files, 80),
    "processes": Measurement(measure_processes, 120),
}


# ---- The page ----


class Page:
    """All figures so far, in files that are replaced after each figure."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.start = folder, time.monotonic()
        self.rows: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.log = (folder / "gpu.log").open("w", buffering=1)

    def add(self, measurement: str, **row: Any) -> None:
        elapsed = round(time.monotonic() - self.start, 1)
        self.rows.append({"measurement": measurement, "at": elapsed, **row})
        write_text(self.folder / "gpu.json", json.dumps({"rows": self.rows}, indent=1) + "\n")
        write_text(self.folder / "gpu.md", self.text())

    def take(self, measurement: str, line: str) -> None:
        """Add a line that a measurement has printed, as a row or to the log."""
        if line.startswith(MARK):
            self.add(measurement, **json.loads(line.removeprefix(MARK)))
            return
        self.log.write(line)
        if line.startswith("notice: "):
            self.add(measurement, name="notice", notice=line.removeprefix("notice: ").strip())

    def text(self) -> str:
        lines = [
            "# What a GPU makes of it",
            "",
            *summary(self.rows),
            "",
            "| at, s | measurement | what | result |",
            "| ---: | --- | --- | --- |",
        ]
        for row in self.rows:
            values = dict(row)
            labels = [values.pop(key) for key in ("at", "measurement", "name")]
            cells = (*labels, show(values))
            lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
        return "\n".join(lines) + "\n"


def show(values: dict[str, Any]) -> str:
    words = []
    for name, value in values.items():
        words.append(f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(words)


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Name the fastest setting, large differences from the CPU, problems and notices."""
    lines, speeds = [], {}
    for row in rows:
        if row["measurement"] in SETTINGS and row["name"] == "speed":
            speeds[row["measurement"]] = row["clips/s"]
    if speeds:
        best = max(speeds, key=speeds.__getitem__)
        speed = f"{speeds[best]:,.0f} clips/s"
        lines.append(f"- Fastest step of batch 64: {best}, {speed}; the aim is {AIM:,}.")
        default = speeds.get("step, default")
        if best == "step, default":
            lines.append("- That is the default.")
        elif default:
            speed = f"{default:,.0f} clips/s"
            lines.append(f"- Not the default, which makes {speed}: {SETTINGS[best]}.")
    for row in rows:
        where = f"{row['measurement']}, {row['name']}"
        if "difference" in row:
            difference, bound = row["difference"], row["bound"]
            if not isinstance(difference, float) or not difference <= bound:
                problem = "Differs from the CPU by more than its bound"
                lines.append(f"- {problem}: {where}, {difference} > {bound}.")
        for kind in ("problem", "notice"):
            if kind in row:
                lines.append(f"- {kind.capitalize()}: {where}: {row[kind]}")
    return lines


SETTINGS = {  # of a step of batch 64 in bf16: how they differ from the default
    "step, default": "",
    "step, threshold 4": "acceleration.OPTIONS without realize_reads_threshold",
    "step, graphs of the compiler": f"acceleration.OPTIONS with {GRAPHS}",
}


# ---- Running ----


def run_measurement(name: str, limit: float, page: Page, words: list[str]) -> None:
    """Run a measurement in a new process; kill it and its child processes after `limit` seconds."""
    process = subprocess.Popen(
        [sys.executable, __file__, *words, "--measurement", name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout
    lines = process.stdout

    def read_lines() -> None:
        for line in lines:
            page.take(name, line)

    reader = threading.Thread(target=read_lines, daemon=True)
    reader.start()
    status: int | None = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(limit)
    finally:
        kill_group(process.pid)
    reader.join(5)  # what it has printed
    if status is None:
        page.add(name, name="not finished", problem=f"ended after {limit:.0f} s")
    elif status:
        how = f"killed by signal {-status}" if status < 0 else f"ended with status {status}"
        page.add(name, name="not finished", problem=how)


def kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # all its processes have ended
        os.killpg(leader, signal.SIGKILL)


def end_with_parent() -> None:
    """End this process and its child processes as soon as the parent has ended for any reason."""

    def wait() -> None:
        sys.stdin.read()
        kill_group(0)

    threading.Thread(target=wait, daemon=True).start()


def measure(name: str, device_name: str) -> None:
    """Run one measurement in this process."""
    end_with_parent()
    with tempfile.TemporaryDirectory() as folder:
        try:
            device = use_device(device_name)
            MEASUREMENTS[name].function(Place(device, device.type == "cpu", Path(folder)))
        except Exception as error:
            traceback.print_exception(error)
            emit("failed", problem=find_reason(error))


def write_reference() -> None:
    """Write the losses of the first steps on a CPU."""
    losses: dict[int, dict[str, list[float]]] = {}
    place = Place(torch.device("cpu"), is_small=True, folder=OUTPUT)
    for batch in (4, 64):
        losses[batch] = {}
        for precision in ("fp32", "bf16"):
            clips = clips_of_first_steps(batch, place.device)
            trainer = place.trainer(clips, batch_size=batch, precision=precision)
            losses[batch][precision] = first_losses(trainer)
        write_text(REFERENCE, json.dumps(losses, indent=1) + "\n")


def main() -> None:
    parser = OneLineParser(description=__doc__)
    text = "cuda, cuda:N, or cpu for the small form (default: auto)"
    parser.add_argument("--device", default="auto", help=text)
    names = list(MEASUREMENTS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="MEASUREMENT")
    text = "for all measurements (default: %(default)s)"
    parser.add_argument("--minutes", type=float, default=8, help=text)
    text = f"folder of the page (default: {OUTPUT})"
    parser.add_argument("--output", type=Path, default=OUTPUT, help=text)
    text = f"write {REFERENCE.name} again, on the CPU"
    parser.add_argument("--reference", action="store_true", help=text)
    parser.add_argument("--measurement", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reference:
        write_reference()
        return
    if options.measurement:
        measure(options.measurement, options.device)
        return
    page = Page(options.output)
    for name in options.only:
        left = 60 * options.minutes - (time.monotonic() - page.start)
        if left < 10:
            page.add(name, name="not begun", problem=f"no time left of {options.minutes:g} minutes")
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        limit = min(left, MEASUREMENTS[name].limit)
        run_measurement(name, limit, page, ["--device", options.device])
    print(page.text())
    if any("problem" in row for row in page.rows):
        path = options.output / "gpu.md"
        raise UserError(f"not everything went well; {path} says what, gpu.log why")


if __name__ == "__main__":
    run_script(main)
