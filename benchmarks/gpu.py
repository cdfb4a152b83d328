"""Does everything work on this GPU, how fast is it, and what is to be changed?

    python3 benchmarks/gpu.py --minutes 8 --output DIR
    python3 benchmarks/gpu.py --only "step, default" tests       # some of the measurements
    # on a CPU: the losses to compare with, anew
    python3 benchmarks/gpu.py --reference

DIR/gpu.md is the page, DIR/gpu.json has the same figures, DIR/gpu.log what the programs printed.
All are written again after each figure, so that whatever ends this program costs the measurement
that is running, and no more. Measurements run one after the other, what would be missed most first,
each in a process of its own: one that fails is a row with its reason. Notices of the program are
rows too. What does not fit into --minutes is left out.

It takes no data set: clips are random. Beside torch, torchaudio and what they bring: numpy, pandas,
scipy, PyYAML, tqdm, pytest, filelock, pydantic (with pydantic-core, annotated-types,
typing-inspection), soundfile (with cffi and pycparser). Without a GPU everything runs in a small
form, to show that it works; its figures mean nothing.
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
import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import acceleration
from acceleration import find_reason
from benchmarks.processes import stop_and_resume
from benchmarks.throughput import CLASSES, machine, random_clips, seconds, train_epochs
from checkpoint import TrainedModel
from config import load_config
from dataloader import ClipSet
from evaluation.scoring import anomaly_scores, run_model
from model.tastgram import N_SAMPLES, SAMPLE_RATE
from trainer import Run, Trainer
from utils import OneLineParser, UserError, run_script, use_device, write_text

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = Path(__file__).with_name(
    "gpu_losses.json"
)  # of the first steps on a CPU, by batch size and precision
OUTPUT = Path("check_points/gpu")
RECIPE = (34_468, 1_815, 300)  # clips to train on, clips to validate, epochs
AIM = 9900  # clips/s: 300 epochs in 20 minutes
COMPARED = {4: 4, 64: 20, 256: 5}  # how many steps are compared, by batch size
MARK = "ROW "  # of the lines in which a measurement reports
# How far losses of the first steps and scores may be from those of a CPU, as a fraction of the
# largest. On a CPU, bf16 is off fp32 by 0.003 in the losses and 0.011 in the embeddings.
BOUNDS = {"fp32": 2e-3, "bf16": 2e-2, "fp16": 2e-2}
GRAPHS = {"triton.cudagraphs": True}
BYTES = {"float": 4, "c10::BFloat16": 2, "c10::Half": 2, "double": 8, "long int": 8, "int": 4, "short int": 2,
         "c10::complex<float>": 8, "unsigned char": 1, "bool": 1, "TensorList": 4}  # fmt: skip


class Place(NamedTuple):
    """Where a measurement runs."""

    device: torch.device
    is_small: bool  # on a CPU
    folder: Path  # for its files

    @property
    def batch(self) -> int:
        return 4 if self.is_small else 64

    def usable(self, *precisions: str) -> list[str]:
        """Those of the precisions that this place is fast enough for."""
        return ["fp32"] if self.is_small else list(precisions)

    def trainer(self, **keys: Any) -> Trainer:
        """A trainer as it is by default on a GPU, but for some keys of the configuration."""
        values = {"batch_size": self.batch, "compile": False if self.is_small else "auto"} | keys
        return Trainer(load_config(device=self.device.type, **values), self.device)


def emit(name: str, **values: Any) -> None:
    """Report a figure, from the process of a measurement."""
    print("\n" + MARK + json.dumps({"name": name} | values), flush=True)


# ---- Measurements ----


def describe_machine(place: Place) -> None:
    emit("versions", **machine())
    if place.is_small:
        return
    emit("libraries", cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), capability=str(
        torch.cuda.get_device_capability()))  # fmt: skip
    fields = (
        "driver_version,memory.total,memory.free,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    )
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    values = (
        subprocess.check_output(command, text=True)
        .splitlines()[place.device.index or 0]
        .split(", ")
    )
    emit("nvidia-smi", **dict(zip(fields.split(","), values, strict=True)))
    emit("copy", **{"GB/s": copy_speed(place) / 1e9})


def copy_speed(place: Place) -> float:
    """Bytes read and written a second, in a copy within the device."""
    count = 2**22 if place.is_small else 2**29
    source, target = (torch.zeros(count, device=place.device) for _ in range(2))
    return 2 * 4 * count / seconds(lambda: target.copy_(source), place.device, 5)


def measure_step(
    place: Place, precision: str = "bf16", options: dict[str, Any] | None = None, batch: int = 64
) -> None:
    """A compiled training step: the losses of the first ones beside those of a CPU, then its speed."""
    batch, (precision,) = place.batch if place.is_small else batch, place.usable(precision)
    acceleration.OPTIONS = acceleration.OPTIONS if options is None else options
    trainer = place.trainer(batch_size=batch, precision=precision)
    start = time.perf_counter()
    losses = first_losses(trainer, batch)
    skips = torch._dynamo.utils.counters["inductor"][
        "cudagraph_skips"
    ]  # for which the compiler makes no graph
    emit(
        "compiling and first steps",
        seconds=time.perf_counter() - start,
        **({"skips": skips} if options else {}),
    )
    compare_losses(losses, batch, precision)
    clips = random_clips(batch * (2 if place.is_small else 6400 // batch), place.device)
    each = seconds(train_epochs(trainer, clips), place.device, 1 if place.is_small else 5) / len(
        clips
    )
    emit("speed", **{"clips/s": 1 / each, "ms": 1000 * each * batch, "GB": reserved_memory(place)})


def measure_uncompiled_step(place: Place) -> None:
    """The same losses without a compiler, which differ least."""
    for precision in place.usable("fp32", "bf16"):
        trainer = place.trainer(precision=precision, compile=False)
        compare_losses(first_losses(trainer, place.batch), place.batch, precision)
    clips = random_clips(place.batch * (2 if place.is_small else 50), place.device)
    each = seconds(train_epochs(trainer, clips), place.device, 1 if place.is_small else 3) / len(
        clips
    )
    emit(f"speed in {precision}", **{"clips/s": 1 / each})


def compare_losses(losses: list[float], batch: int, precision: str) -> None:
    references = json.loads(REFERENCE.read_text()).get(str(batch), {})
    emit(f"{precision}: loss", first=losses[0], last=losses[-1], steps=len(losses))
    for kind in sorted({"fp32", precision} & set(references)):
        compare(f"{precision}: loss, and the CPU's in {kind}", losses, references[kind], precision)


def first_losses(trainer: Trainer, batch: int) -> list[float]:
    """The losses of the first steps on random clips."""
    clips = random_clips(batch * COMPARED[batch], trainer.device)
    # From the usual scale, fp16 would pass over the first steps.
    trainer.scaler = torch.amp.GradScaler(
        trainer.device.type, init_scale=256.0, enabled=trainer.scaler.is_enabled()
    )
    plan = trainer.plan(len(clips), 0)
    trainer.model.train()
    batches = zip(clips.batches(plan.shares, trainer.device), plan.mixes, strict=True)
    return [trainer.step(samples, labels, mix)[0].item() for (samples, labels), mix in batches]


def compare(name: str, values: Any, expected: Any, precision: str) -> None:
    """The largest difference, as a fraction of the largest value."""
    expected = np.asarray(expected, dtype=float)
    largest = np.abs(np.asarray(values, dtype=float) - expected).max() / np.abs(expected).max()
    emit(
        name,
        difference=float(largest) if np.isfinite(largest) else "not finite",
        bound=BOUNDS[precision],
    )


def reserved_memory(place: Place) -> float | None:
    return None if place.is_small else torch.cuda.max_memory_reserved() / 1e9


def run_tests(place: Place) -> None:
    """The tests that need a GPU, each as it ends."""
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
    status = pytest.main(
        ["-q", "-m", "gpu", "-p", "no:cacheprovider", *files], plugins=[Reporter()]
    )
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with status {int(status)}")


def measure_recipe(place: Place) -> None:
    """Three epochs of the published recipe on as many random clips, kept on the device."""
    n_train, n_valid, n_epochs = (16, 8, RECIPE[2]) if place.is_small else RECIPE
    config = load_config(
        device=place.device.type, save_path=str(place.folder / "run.pth"), epoch=n_epochs, tensorboard=False,
        batch_size=place.batch, compile=False if place.is_small else "auto",
    )  # fmt: skip
    run = Run(
        config, place.device, *(stand_ins(count, place.device) for count in (n_train, n_valid))
    )
    run.config = config.model_copy(update={"epoch": 3})
    spent: dict[str, float] = {}
    for name, owner, method in (
        ("training", run.trainer, "train_epoch"),
        ("validation", run.trainer, "validate"),
        ("saving", run, "save"),
    ):
        setattr(owner, method, partial(timed, getattr(owner, method), name, spent))
    report = run.report

    def report_and_emit(is_best: bool, log: Any) -> None:
        report(is_best, log)
        whole = sum(spent.values()) * RECIPE[2] / 60 * RECIPE[0] / n_train
        speed = {
            "clips/s": n_train / spent["training"],
            "minutes of 300 epochs": whole,
            "GB": reserved_memory(place),
        }
        emit(
            f"epoch {run.epoch}", **{f"{name}, s": value for name, value in spent.items()}, **speed
        )

    run.report = report_and_emit  # type: ignore[method-assign]
    run.fit()


def timed(function: Callable[..., Any], name: str, spent: dict[str, float], *arguments: Any) -> Any:
    start = time.perf_counter()
    result = function(*arguments)  # each of them ends with a value that the host waits for
    spent[name] = time.perf_counter() - start
    return result


def stand_ins(count: int, device: torch.device) -> ClipSet:
    """Random clips in the memory of the device."""
    rows = {
        "path": [Path(f"{i}.wav") for i in range(count)],
        "machine_type": "fan",
        "machine_id": "00",
    }
    clips = ClipSet(
        pd.DataFrame(rows | {"label": np.arange(count) % CLASSES, "condition": "normal"}),
        num_workers=1,
    )
    clips.samples = torch.empty((count, N_SAMPLES), dtype=torch.int16, device=device)
    for part in clips.samples.split(256):
        part.random_(-300, 300)
    return clips


def measure_scoring(place: Place) -> None:
    """Scores of the network as it is initialised, beside those of the CPU."""
    n_compared, n_clips = (4, 8) if place.is_small else (64, 6400)
    few = random_clips(n_compared, torch.device("cpu"))
    trainer = Trainer(load_config(device="cpu", compile=False), torch.device("cpu"))

    def score(
        device: torch.device, clips: ClipSet, precision: str
    ) -> tuple[np.ndarray, np.ndarray]:
        config = load_config(eval_precision=precision)
        trained = TrainedModel(Path("random.pth"), trainer.network, config, {})
        outputs = run_model(trained, clips, device)
        return anomaly_scores(trained, outputs, clips.labels), outputs.embedding.numpy()

    expected = score(torch.device("cpu"), few, "fp32")
    for precision in place.usable("fp32", "bf16"):
        found = score(place.device, random_clips(n_compared, place.device), precision)
        for name, *pair in zip(("scores", "embeddings"), found, expected, strict=True):
            compare(f"{precision}: {name} and the CPU's in fp32", *pair, precision)
        many = random_clips(n_clips, place.device)
        each = seconds(
            partial(score, place.device, many, precision), place.device, 1 if place.is_small else 3
        )
        emit(f"{precision}: speed", **{"clips/s": n_clips / each})


def measure_kernels(place: Place) -> None:
    """The ten kernels of a compiled step that cost most, with the bytes of what they read and
    write, and how near they come to the speed of a copy.
    """
    steps = 2 if place.is_small else 10
    speed = copy_speed(place)
    trainer = place.trainer()
    clips = random_clips(place.batch * steps, place.device)
    train_epoch = train_epochs(trainer, clips)
    train_epoch()
    kinds = [ProfilerActivity.CPU] + ([] if place.is_small else [ProfilerActivity.CUDA])
    with profile(activities=kinds, record_shapes=True) as recording:
        train_epoch()
    trace = place.folder / "trace.json"
    recording.export_chrome_trace(str(trace))
    table = sum_kernels(json.loads(trace.read_text())["traceEvents"], steps)
    whole = sum(row["ms"] for row in table)
    emit("all", **{"ms a step": whole, "kernels a step": sum(row["calls"] for row in table),
                   "GB a step": sum(row["GB"] or 0 for row in table), "copy, GB/s": speed / 1e9})  # fmt: skip
    for row in sorted(table, key=lambda row: row["ms"], reverse=True)[:10]:
        share = row["GB"] * 1e9 / (row["ms"] / 1e3) / speed if row["GB"] and row["ms"] else None
        emit(row["kernel"], **{name: row[name] for name in ("ms", "calls", "GB")}, **{
            "of the step": row["ms"] / whole, "of copy speed": share})  # fmt: skip


def sum_kernels(events: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Milliseconds, calls and bytes of a step, for each kernel in a trace of the profiler. Where
    there are none, as on a CPU, the operations stand for them.
    """
    operations = {
        event["args"]["External id"]: event for event in events if event.get("cat") == "cpu_op"
    }
    convolutions = [
        event for event in operations.values() if event["name"].startswith("aten::convolution")
    ]
    kernels = [event for event in events if event.get("cat") == "kernel"] or list(
        operations.values()
    )
    # Kernels that the same operation has launched share its bytes.
    launched = Counter(kernel["args"].get("External id") for kernel in kernels)
    rows: dict[str, dict[str, Any]] = defaultdict(lambda: {"ms": 0.0, "calls": 0.0, "GB": 0.0})
    for kernel in kernels:
        operation = operations.get(kernel["args"].get("External id"))
        row = rows[kernel["name"]]
        row["ms"] += kernel["dur"] / 1e3 / steps
        row["calls"] += 1 / steps
        if operation:
            share = (
                count_bytes(enclosing(operation, convolutions))
                / launched[operation["args"]["External id"]]
            )
            row["GB"] += share / 1e9 / steps
    return [{"kernel": name, **row, "GB": row["GB"] or None} for name, row in rows.items()]


def enclosing(operation: dict[str, Any], convolutions: list[dict[str, Any]]) -> dict[str, Any]:
    """The convolution that an operation is a part of, which says its parameters; else the operation
    itself.
    """
    for outer in convolutions:
        is_within = (
            outer["ts"] <= operation["ts"]
            and operation["ts"] + operation["dur"] <= outer["ts"] + outer["dur"]
        )
        if is_within and outer["tid"] == operation["tid"]:
            return outer
    return operation


def count_bytes(operation: dict[str, Any]) -> int:
    """Bytes of the tensors that an operation takes, each once, and of those that a convolution
    returns. A kernel that the compiler makes takes what it writes, too.
    """
    arguments = operation["args"]
    shapes, kinds = arguments.get("Input Dims", []), arguments.get("Input type", [])
    counted = [
        count_elements(shape) * BYTES.get(kind, 0)
        for shape, kind in zip(shapes, kinds, strict=False)
    ]
    if operation["name"] == "aten::convolution_backward":
        return sum(counted) + counted[1] + counted[2]  # the gradients of input and weight
    if operation["name"] == "aten::convolution":
        inputs = [torch.empty(shape, device="meta") for shape in shapes[:2]]
        parameters = [ast.literal_eval(text.title()) for text in arguments["Concrete Inputs"][3:]]
        output = torch.ops.aten.convolution(*inputs, None, *parameters)
        return sum(counted) + output.numel() * BYTES.get(kinds[0], 0)
    return sum(counted)


def count_elements(shape: list[Any]) -> int:
    """Of a tensor, or of a list of them; 0 for a number."""
    if shape and isinstance(shape[0], list):
        return sum(map(count_elements, shape))
    return math.prod(shape) if shape else 0


def measure_files(place: Place) -> None:
    """An epoch whose recordings are read from files by 16 threads."""
    import soundfile

    n_files, n_clips, n_threads = (8, 8, 2) if place.is_small else (1024, 6400, 16)
    rng = np.random.default_rng(0)
    paths = [place.folder / f"{number}.wav" for number in range(n_files)]
    for path in paths:
        soundfile.write(path, rng.integers(-300, 300, N_SAMPLES, dtype=np.int16), SAMPLE_RATE)
    table = pd.DataFrame({"path": np.resize(paths, n_clips), "label": np.arange(n_clips) % CLASSES})
    clips = ClipSet(table, n_threads)
    trainer = place.trainer()
    each = seconds(train_epochs(trainer, clips), place.device, 1 if place.is_small else 3) / n_clips
    emit("training", **{"clips/s": 1 / each, "threads": n_threads})
    plan = trainer.plan(n_clips, 0).shares
    each = (
        seconds(lambda: [None for _ in clips.batches(plan, place.device)], place.device, 1)
        / n_clips
    )
    emit("reading alone", **{"clips/s": 1 / each, "threads": n_threads})


def measure_processes(place: Place) -> None:
    """A run under torchrun, on all GPUs, one process of which is stopped; and the run resumed."""
    count = 2 if place.is_small else torch.cuda.device_count()
    emit(f"{count} processes", **stop_and_resume(place.device.type, count, place.folder))


class Measurement(NamedTuple):
    function: Callable[[Place], None]
    limit: float  # seconds


MEASUREMENTS = {  # what would be missed most comes first
    "machine": Measurement(describe_machine, 40),
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
    """All figures so far, in files that are replaced after each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.start = folder, time.monotonic()
        self.rows: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.log = (folder / "gpu.log").open("w", buffering=1)

    def add(self, measurement: str, **row: Any) -> None:
        self.rows.append(
            {"measurement": measurement, "at": round(time.monotonic() - self.start, 1), **row}
        )
        write_text(self.folder / "gpu.json", json.dumps({"rows": self.rows}, indent=1) + "\n")
        write_text(self.folder / "gpu.md", self.text())

    def take(self, measurement: str, line: str) -> None:
        """A line that a measurement has printed."""
        if line.startswith(MARK):
            self.add(measurement, **json.loads(line.removeprefix(MARK)))
            return
        self.log.write(line)
        if line.startswith("notice: "):
            self.add(measurement, name="notice", notice=line.removeprefix("notice: ").strip())

    def text(self) -> str:
        lines = ["# What a GPU makes of it", "", *summary(self.rows), "", "| at, s | measurement | what | result |",
                 "| ---: | --- | --- | --- |"]  # fmt: skip
        for row in self.rows:
            values = {
                name: value
                for name, value in row.items()
                if name not in ("measurement", "at", "name")
            }
            cells = (row["at"], row["measurement"], row["name"], show(values))
            lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
        return "\n".join(lines) + "\n"


def show(values: dict[str, Any]) -> str:
    words = {
        name: f"{value:,.4g}" if isinstance(value, float) else str(value)
        for name, value in values.items()
    }
    return ", ".join(f"{name} {word}" for name, word in words.items())


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """The fastest setting, whether it is the default, what is far from the CPU, and what failed."""
    lines, speeds = [], {
        row["measurement"]: row["clips/s"] for row in rows if row["measurement"] in SETTINGS and row["name"] == "speed"
    }  # fmt: skip
    if speeds:
        best = max(speeds, key=speeds.__getitem__)
        lines.append(
            f"- Fastest step of batch 64: {best}, {speeds[best]:,.0f} clips/s; the aim is {AIM:,}."
        )
        default = speeds.get("step, default")
        if best == "step, default":
            lines.append("- That is the default.")
        elif default:
            lines.append(
                f"- Not the default, which makes {default:,.0f} clips/s: {SETTINGS[best]}."
            )
    for row in rows:
        where = f"{row['measurement']}, {row['name']}"
        if "difference" in row and not (
            isinstance(row["difference"], float) and row["difference"] <= row["bound"]
        ):
            lines.append(
                f"- Differs from the CPU by more than its bound: {where}, {row['difference']} > {row['bound']}."
            )
        lines += [
            f"- {kind.capitalize()}: {where}: {row[kind]}"
            for kind in ("problem", "notice")
            if kind in row
        ]
    return lines


SETTINGS = {  # of a step of batch 64 in bf16: what they differ in from the default
    "step, default": "",
    "step, threshold 4": "acceleration.OPTIONS without realize_reads_threshold",
    "step, graphs of the compiler": f"acceleration.OPTIONS with {GRAPHS}",
}


# ---- Running ----


def run_measurement(name: str, limit: float, page: Page, words: list[str]) -> None:
    """Run a measurement in a process of its own, which is ended with all that it has started after
    `limit` seconds.
    """
    process = subprocess.Popen(
        [sys.executable, __file__, *words, "--measurement", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    assert process.stdout
    lines = process.stdout
    reader = threading.Thread(target=lambda: [page.take(name, line) for line in lines], daemon=True)
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
    with contextlib.suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(leader, signal.SIGKILL)


def end_with_parent() -> None:
    """End this process and all that it has started when the one that started it is gone, however it
    ended.
    """

    def wait() -> None:
        sys.stdin.read()
        kill_group(0)

    threading.Thread(target=wait, daemon=True).start()


def measure(name: str, device_name: str) -> None:
    """One measurement, in its own process."""
    end_with_parent()
    with tempfile.TemporaryDirectory() as folder:
        try:
            device = use_device(device_name)
            MEASUREMENTS[name].function(Place(device, device.type == "cpu", Path(folder)))
        except Exception as error:
            traceback.print_exception(error)
            emit("failed", problem=find_reason(error))


def write_reference() -> None:
    """The losses of the first steps on a CPU."""
    losses: dict[int, dict[str, list[float]]] = {}
    for batch in (4, 64):
        place = Place(torch.device("cpu"), is_small=True, folder=OUTPUT)
        losses[batch] = {
            precision: first_losses(place.trainer(batch_size=batch, precision=precision), batch)
            for precision in ("fp32", "bf16")
        }
        write_text(REFERENCE, json.dumps(losses, indent=1) + "\n")


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument(
        "--device", default="auto", help="cuda, cuda:N, or cpu for the small form (default: auto)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS), metavar="MEASUREMENT"
    )
    parser.add_argument(
        "--minutes", type=float, default=8, help="for all of it (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help=f"folder of the page (default: {OUTPUT})"
    )
    parser.add_argument(
        "--reference", action="store_true", help=f"write {REFERENCE.name} anew, on the CPU"
    )
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
        run_measurement(
            name, min(left, MEASUREMENTS[name].limit), page, ["--device", options.device]
        )
    print(page.text())
    if any("problem" in row for row in page.rows):
        raise UserError(
            f"not everything went well; {options.output / 'gpu.md'} says what, gpu.log why"
        )


if __name__ == "__main__":
    run_script(main)
