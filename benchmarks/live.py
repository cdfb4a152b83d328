"""Run examples/monitor.py on a day of sound, and compare it with score.py.

    python export.py check_points/rates_2023.pth --scoring nearest
    python benchmarks/live.py check_points/rates_2023.nearest.onnx slider 00 --data_root FOLDER \\
        --output check_points/live --checkpoint check_points/rates_2023.pth --scoring nearest
    python benchmarks/live.py check_points/rates_2023.nearest.onnx slider 00 --data_root FOLDER \\
        --output check_points/live --hours 2 --real_time 60

The day consists of normal test clips of the machine in random order, with faults of FAULTS seconds
of anomalous ones. Written to the folder of --output are the day, day.wav, and the lines of the
monitor, day.jsonl. Printed are

- speed and memory of the monitor, which has one core, with the day in a pipe at full speed
- with --checkpoint, whether windows and alarms are those of score.py, and how scores differ
- alarms, and false alarms outside the faults, with the rule in the file and with others
- with --real_time, the same for so many minutes of the day at the speed of a microphone, and how
  long after its end a window was printed
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from alarms import Alarm, AlarmRule, AlarmTracker
from audio import N_SAMPLES, SAMPLE_RATE, SECONDS
from command_line import OneLineParser
from errors import UserError
from evaluation.tables import markdown_header, markdown_row
from names import format_id
from utils import run_script

ROOT = Path(__file__).resolve().parent.parent
FAULTS = (30, 60, 60, 90, 120)  # seconds; one in each fifth of the day
RULES = (AlarmRule(3, 5), AlarmRule(1, 1), AlarmRule(5, 8), AlarmRule(8, 12))
FACTORS = (1.0, 1.25)  # of the threshold
BLOCK = SAMPLE_RATE // 10  # samples that a microphone gives at once
DAY = "2026-11-29T00:00"  # any
Fault = tuple[int, int]  # start and end in seconds


def main() -> None:
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("model", help="file from export.py")
    add("machine_type", help="machine type")
    add("machine_id", help="machine ID")
    add("--checkpoint", help="file of trained weights, to compare with score.py")
    add("--config", help="configuration of score.py")
    add("--scoring", default="published", help="scoring of score.py")
    add("--data_root", type=Path, required=True, help="folder with test clips")
    add("--output", type=Path, required=True, help="folder for the day and the lines")
    add("--hours", type=float, default=24, help="length of the day (24)")
    add("--real_time", type=float, default=0, help="minutes at the speed of a microphone (0)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    day = options.output / "day.wav"
    faults = write_day(options, day)
    events = monitor_day(options, day)
    if options.checkpoint:
        compare(options, day, events)
    print_alarms(events, faults)
    if options.real_time:
        monitor_in_real_time(options, day, events)


def write_day(options: Namespace, file: Path) -> list[Fault]:
    """Write the day. Returns its faults."""
    rng = np.random.default_rng(0)
    n_clips = round(options.hours * 3600) // SECONDS
    is_fault = np.zeros(n_clips, dtype=bool)
    faults = []
    for number, seconds in enumerate(rng.permutation(FAULTS).tolist()):
        part = n_clips // len(FAULTS)
        length = seconds // SECONDS
        first = number * part + int(rng.integers(part - length))
        is_fault[first : first + length] = True
        faults.append((first * SECONDS, (first + length) * SECONDS))
    sounds = [read_clips(options, condition) for condition in ("normal", "anomaly")]
    with soundfile.SoundFile(file, "w", SAMPLE_RATE, 1, "PCM_16") as wav:
        for fault in is_fault:
            chosen = sounds[int(fault)]
            wav.write(chosen[rng.integers(len(chosen))])
    return faults


def read_clips(options: Namespace, condition: str) -> list[np.ndarray]:
    """Read the test clips of the machine of a condition, `(N_SAMPLES,)` each."""
    folder = options.data_root / options.machine_type / "test"
    paths = sorted(folder.glob(f"{condition}_id_{format_id(options.machine_id)}_*.wav"))
    if not paths:
        raise UserError(f"{folder}: no {condition} clips of {options.machine_id}")
    return [soundfile.read(path, frames=N_SAMPLES, dtype="int16")[0] for path in paths]


# ---- The monitor ----


def start_monitor(options: Namespace) -> subprocess.Popen:
    """Start the monitor on one core, the first of this process."""
    script = ROOT / "examples" / "monitor.py"
    words = [options.model, options.machine_type, options.machine_id, "--json", "--start", DAY]
    return subprocess.Popen(
        [sys.executable, script, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
    )


def monitor_day(options: Namespace, day: Path) -> list[dict]:
    """Monitor the day at full speed, and print speed and memory. Returns the events."""
    process = start_monitor(options)
    assert process.stdin
    assert process.stdout
    begin = time.perf_counter()
    memory: list[float] = []
    copying = threading.Thread(target=copy, args=(day, process, memory))
    copying.start()
    lines = process.stdout.readlines()
    seconds = time.perf_counter() - begin
    copying.join()
    status = process.wait()
    (options.output / "day.jsonl").write_bytes(b"".join(lines))
    events = [json.loads(line) for line in lines]
    windows = select(events, "window")
    hop = events[0]["hop"]
    speed = len(windows) / seconds
    print(f"status {status}, {len(windows)} windows in {seconds:.0f} s on one core: ", end="")
    print(f"{speed:.1f} a second, or {speed * hop:.0f} machines at a hop of {hop:g} s")
    print(f"memory: {memory[0]:.0f} MB at most")
    others = [event for event in events if event["event"] not in ("start", "window", "end")]
    print("other events:", dict(Counter(event["event"] for event in others)))
    return events


def copy(file: Path, process: subprocess.Popen, memory: list[float]) -> None:
    """Copy a file into the standard input of a process, read its memory, and end the input."""
    assert process.stdin
    with file.open("rb") as source, process.stdin as pipe:
        shutil.copyfileobj(source, pipe)
        memory.append(read_memory(process.pid, "VmHWM"))


def read_memory(process: int, field: str) -> float:
    """Return a field of the memory of a process, in MB."""
    status = Path(f"/proc/{process}/status").read_text()
    (kilobytes,) = re.findall(rf"{field}:\s+(\d+)", status)
    return int(kilobytes) / 1e3


def select(events: Sequence[dict], name: str) -> list[dict]:
    return [event for event in events if event["event"] == name]


# ---- Comparison ----


def compare(options: Namespace, day: Path, events: Sequence[dict]) -> None:
    """Compare the windows and alarms with those of score.py."""
    words = [options.checkpoint, str(day), "--machine_type", options.machine_type]
    words += ["--machine_id", options.machine_id, "--scoring", options.scoring]
    words += ["--config", options.config] if options.config else []
    result = subprocess.run(
        [sys.executable, ROOT / "score.py", *words, "--json", "--timeline"],
        stdout=subprocess.PIPE,
        check=True,
    )
    (row,) = json.loads(result.stdout)
    ours, theirs = pd.DataFrame(select(events, "window")), pd.DataFrame(row["windows"])
    print("the same windows as score.py:", ours["start"].equals(theirs["start"]))
    difference = (ours["score"] - theirs["score"]).abs() / theirs["score"].abs().clip(lower=1)
    n_other = (ours["decision"] != theirs["decision"]).sum()
    print(f"scores differ by at most {difference.max():.1e} (relative above 1), ", end="")
    print(f"{n_other} decisions differ")
    begins, ends = (
        [event["start"] for event in select(events, name)] for name in ("alarm", "alarm_end")
    )
    expected = [(alarm["start"], alarm["end"]) for alarm in row["alarms"]]
    print("the same alarms:", list(zip(begins, ends, strict=True)) == expected)


def print_alarms(events: Sequence[dict], faults: Sequence[Fault]) -> None:
    """Print a table of the alarms with the rule in the file and with others."""
    windows = pd.DataFrame(select(events, "window"))
    threshold = events[0]["threshold"]
    is_normal = np.ones(len(windows), dtype=bool)
    for start, end in faults:
        is_normal &= (windows["start"] >= end) | (windows["start"] + SECONDS <= start)
    share = (windows["score"][is_normal] > threshold).mean()
    print(f"windows of normal sound above the threshold: {share:.1%}")
    titles = ["threshold times", "faults found", "after seconds", "false alarms"]
    print("\n".join(markdown_header("rule", titles)))
    for rule in RULES:
        for factor in FACTORS:
            alarms = track(windows, factor * threshold, rule)
            delays = [find_delay(alarms, fault) for fault in faults]
            found = [f"{delay:g}" for delay in delays if delay is not None]
            n_false = sum(not any(overlaps(alarm, x) for x in faults) for alarm, _ in alarms)
            cells = [
                f"{factor:g}",
                f"{len(found)} of {len(faults)}",
                ", ".join(found),
                str(n_false),
            ]
            print(markdown_row(f"{rule.n_above} of {rule.span}", cells))


def track(windows: pd.DataFrame, threshold: float, rule: AlarmRule) -> list[tuple[Alarm, float]]:
    """Return the alarms of the windows, and the second at which each is found."""
    tracker = AlarmTracker(rule, threshold)
    alarms, found = [], 0.0
    for start, score in zip(windows["start"], windows["score"], strict=True):
        was_quiet = tracker.alarm is None
        ended = tracker.add(start, score)
        if ended:
            alarms.append((ended, found))
        elif was_quiet and tracker.alarm:
            found = start + SECONDS
    return alarms + ([(tracker.alarm, found)] if tracker.alarm else [])


def overlaps(alarm: Alarm, fault: Fault) -> bool:
    return alarm.start < fault[1] and fault[0] < alarm.end


def find_delay(alarms: Sequence[tuple[Alarm, float]], fault: Fault) -> float | None:
    """Return the seconds from the beginning of a fault until an alarm that overlaps it is found."""
    found = [second - fault[0] for alarm, second in alarms if overlaps(alarm, fault)]
    return min(found) if found else None


# ---- At the speed of a microphone ----


def monitor_in_real_time(options: Namespace, day: Path, expected: Sequence[dict]) -> None:
    """Monitor the first minutes of the day at their own speed."""
    process = start_monitor(options)
    assert process.stdin
    assert process.stdout
    begin = time.monotonic()
    n_blocks = round(options.real_time * 60 * SAMPLE_RATE / BLOCK)
    memory: list[float] = []
    playing = threading.Thread(target=play, args=(day, n_blocks, process, begin, memory))
    playing.start()
    delays, windows = [], []
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "window":
            delays.append(time.monotonic() - begin - event["start"] - SECONDS)
            windows.append(event)
        elif event["event"] not in ("start", "end", "alarm", "alarm_end"):
            print(event)
    playing.join()
    _, status, usage = os.wait4(process.pid, 0)
    ours = [(window["start"], window["score"]) for window in windows]
    theirs = [(window["start"], window["score"]) for window in select(expected, "window")]
    print(
        f"{options.real_time:g} minutes in real time: status {status}, {len(ours)} windows, ",
        end="",
    )
    print("the same scores:", ours == theirs[: len(ours)])
    middle, longest = np.median(delays), max(delays)
    print(f"printed {middle:.2f} s after their end (median), {longest:.2f} s (longest)")
    busy = (usage.ru_utime + usage.ru_stime) / (options.real_time * 60)
    print(
        f"processor {busy:.1%} of a core; memory each tenth:", " ".join(f"{x:.1f}" for x in memory)
    )


def play(
    day: Path, n_blocks: int, process: subprocess.Popen, begin: float, memory: list[float]
) -> None:
    """Write blocks of the day when a microphone would, and collect the memory of the process, in
    MB, ten times.
    """
    assert process.stdin
    with soundfile.SoundFile(day) as wav, process.stdin as pipe:
        for number in range(n_blocks):
            time.sleep(max(0, begin + (number + 1) * BLOCK / SAMPLE_RATE - time.monotonic()))
            pipe.write(wav.read(BLOCK, dtype="int16").tobytes())
            pipe.flush()
            if (number + 1) % (n_blocks // 10) == 0:
                memory.append(read_memory(process.pid, "RssAnon"))


if __name__ == "__main__":
    run_script(main)
