"""benchmarks/gpu.py without a GPU: its page after an interruption, and its summary."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

ROOT = Path(__file__).parent.parent


def read_rows(folder: Path) -> list[dict]:
    return json.loads((folder / "gpu.json").read_text())["rows"]


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# A measurement that reports twice and starts a process that does not end by itself.
STUB = """
import subprocess, sys, time
print('dots...', end='')
print('\\nROW {"name": "one", "ms": 3.14159}', flush=True)
print('notice: compile: compiling fails on a computer', file=sys.stderr, flush=True)
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
print('ROW {"name": "child", "pid": %d}' % child.pid, flush=True)
{ending}
"""


@pytest.mark.parametrize(
    ("ending", "problem"),
    [
        pytest.param("time.sleep(600)", "ended after 5 s", marks=pytest.mark.slow),
        ("import os; os.kill(os.getpid(), 11)", "killed by signal 11"),
        ("sys.exit(3)", "ended with status 3"),
        ("", None),
    ],
)
def test_a_measurement_that_is_stopped_leaves_its_rows_and_no_process(
    ending, problem, tmp_path, monkeypatch
):
    stub = tmp_path / "stub.py"
    stub.write_text(STUB.replace("{ending}", ending))
    monkeypatch.setattr(gpu, "__file__", str(stub))
    page = gpu.Page(tmp_path)
    gpu.run_measurement("stub", 5, page, [])
    one, *others = rows = read_rows(tmp_path)
    assert (one["measurement"], one["name"], one["ms"]) == ("stub", "one", 3.14159)
    notices = [row["notice"] for row in others if "notice" in row]
    assert notices == ["compile: compiling fails on a computer"]
    assert [row["problem"] for row in rows if "problem" in row] == ([problem] if problem else [])
    child = next(row["pid"] for row in rows if row["name"] == "child")
    wait_until(lambda: not is_running(child), 10)
    text = (tmp_path / "gpu.md").read_text()
    assert "| stub | one | ms 3.142 |" in text
    assert "- Notice: stub, notice: compile: compiling fails on a computer" in text
    assert (f"- Problem: stub, not finished: {problem}" in text) == bool(problem)
    assert "dots..." in (tmp_path / "gpu.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_it_leaves_the_page_and_no_process(number, tmp_path):
    options = ("--device", "cpu", "--only", "machine", "recipe", "--output", tmp_path)
    command = [sys.executable, "benchmarks/gpu.py", *options]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: "recipe ..." in process.stderr.readline())
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: children.read_text())
    (child,) = children.read_text().split()
    time.sleep(1)
    process.send_signal(number)
    assert process.wait(20) == (-9 if number == signal.SIGKILL else 143)
    wait_until(lambda: not is_running(int(child)), 20)
    (row,) = read_rows(tmp_path)
    assert (row["measurement"], row["name"]) == ("machine", "versions")


@pytest.mark.slow  # it starts two processes
def test_what_does_not_work_is_a_row(tmp_path):
    options = ("--device", "cuda:77", "--only", "machine", "--output", tmp_path)
    command = [sys.executable, "benchmarks/gpu.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: not everything went well; ")
    (row,) = read_rows(tmp_path)
    assert re.match("device: cuda:77 ", row["problem"])


def test_measurements_that_there_is_no_time_for(tmp_path, fails):
    fails(gpu.main, "--minutes", "0.1", "--output", tmp_path, match="not everything went well")
    rows = read_rows(tmp_path)
    assert len(rows) == len(gpu.MEASUREMENTS)
    assert {row["problem"] for row in rows} == {"no time left of 0.1 minutes"}


# ---- The summary and the kernels ----


def test_the_summary_names_the_fastest_setting_and_what_is_far_from_the_cpu():
    speeds = {
        "step, default": 7000.0,
        "step, graphs of the compiler": 7500.0,
        "step, batch 256": 9000.0,
    }
    rows = []
    for name, rate in speeds.items():
        rows.append({"measurement": name, "name": "speed", "clips/s": rate})
    for name, value, bound in (
        ("fp32", 0.002, 0.01),
        ("fp32", 0.02, 0.01),
        ("bf16", "not finite", 0.1),
    ):
        comparison = {"name": name, "difference": value, "bound": bound}
        rows.append({"measurement": "scoring", **comparison})
    assert gpu.summary(rows) == [
        "- Fastest step of batch 64: step, graphs of the compiler, 7,500 clips/s; "
        "the aim is 9,900.",
        "- Not the default, which makes 7,000 clips/s: "
        "acceleration.OPTIONS with {'triton.cudagraphs': True}.",
        "- Differs from the CPU by more than its bound: scoring, fp32, 0.02 > 0.01.",
        "- Differs from the CPU by more than its bound: scoring, bf16, not finite > 0.1.",
    ]
    assert gpu.summary(rows[:1])[1] == "- That is the default."


def event(kind: str, name: str, number: int, start: float, length: float, **arguments) -> dict:
    return {"cat": kind, "name": name, "ts": start, "dur": length, "tid": 1,
            "args": {"External id": number, **arguments}}  # fmt: skip


def test_bytes_of_kernels():
    """In a trace of the profiler, a kernel has the number of the operation that launched it.

    Of nested operations it is the innermost.
    """
    half, image, weight = "c10::BFloat16", [2, 3, 8, 8], [4, 3, 3, 3]
    parameters = ["[2, 2]", "[1, 1]", "[1, 1]", "False", "[0, 0]", "1"]
    output = 2 * 4 * 4 * 4
    inputs = {"Input type": [half, half, ""], "Input Dims": [image, weight, []]}
    outer = inputs | {"Concrete Inputs": ["", "", "", *parameters]}
    pointwise = {"Input type": ["float", half, "Scalar"], "Input Dims": [[10, 10], [10], []]}
    events = [
        event("cpu_op", "triton_poi_fused_add_0", 1, 0, 5, **pointwise),
        event("kernel", "triton_poi_fused_add_0", 1, 100, 50.0),
        event("cpu_op", "triton_poi_fused_add_0", 6, 5, 5, **pointwise),
        event("kernel", "triton_poi_fused_add_0", 6, 200, 70.0),
        event("cpu_op", "aten::convolution", 2, 10, 9, **outer),
        event("cpu_op", "aten::cudnn_convolution", 3, 11, 5, **inputs),
        event("kernel", "sm90_fprop", 3, 300, 400.0),
        event("cpu_op", "aten::convolution_backward", 4, 30, 9, **{
            "Input type": [half] * 3, "Input Dims": [[2, 4, 4, 4], image, weight]}),
        event("kernel", "sm90_dgrad", 4, 700, 60.0),
        event("kernel", "sm90_wgrad", 4, 800, 100.0),
        event("cpu_op", "aten::_fused_adamw_", 5, 50, 9, **{
            "Input type": ["TensorList", "double"], "Input Dims": [[[4, 3], [5]], []]}),
        event("kernel", "adamw", 5, 900, 20.0),
        event("kernel", "memset", 99, 950, 2.0),
        {"ph": "f", "name": "ac2g"},
    ]  # fmt: skip
    rows = {row.pop("kernel"): row for row in gpu.sum_kernels(events, steps=2)}
    count = math.prod(image) + math.prod(weight)
    expected = {
        "triton_poi_fused_add_0": {"ms": 0.06, "calls": 1.0, "GB": 420e-9},
        "sm90_fprop": {"ms": 0.2, "calls": 0.5, "GB": 2 * (count + output) / 2e9},
        "sm90_dgrad": {"ms": 0.03, "calls": 0.5, "GB": (2 * count + output) / 2e9},
        "sm90_wgrad": {"ms": 0.05, "calls": 0.5, "GB": (2 * count + output) / 2e9},
        "adamw": {"ms": 0.01, "calls": 0.5, "GB": 17 * 4 / 2e9},
        "memset": {"ms": 0.001, "calls": 0.5, "GB": None},
    }
    assert rows == {name: pytest.approx(row) for name, row in expected.items()}


@pytest.mark.slow
def test_the_losses_to_compare_with_are_those_of_this_code():
    place = gpu.Place(torch.device("cpu"), is_small=True, folder=Path())
    clips = gpu.clips_of_first_steps(4, place.device)
    losses = gpu.first_losses(place.trainer(clips, precision="fp32"))
    reference = json.loads(gpu.REFERENCE.read_text())
    assert losses == pytest.approx(reference["4"]["fp32"], rel=1e-2)
    for batch, n_steps in (("4", 4), ("64", 20)):
        assert len(reference[batch]["fp32"]) == len(reference[batch]["bf16"]) == n_steps
