"""train_ddp.py under torchrun, with gloo on the CPU."""

import csv
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import arguments

from utils import load_checkpoint

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.ddp


def torchrun(
    processes: int, *words: str, script: Path = ROOT / "train_ddp.py", options=("--standalone",), **environment
) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [*launcher, script, *map(str, words)], capture_output=True, text=True, env=environment, timeout=300
    )


def errors(result: subprocess.CompletedProcess) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


def test_two_processes_write_one_run_that_one_process_reads(tmp_path, data_root):
    options = arguments(tmp_path, data_root, epoch=2, input="[sgram]", split_ratio=0.7)
    result = torchrun(2, *options)
    assert result.returncode == 0, result.stderr
    assert sum(line.startswith("epoch ") for line in result.stdout.splitlines()) == 2, "rank 0 alone speaks"
    state = load_checkpoint(tmp_path / "run.last.pth")
    assert state["epoch"] == 2
    assert not any(name.startswith("module.") for name in state["model"])
    with (tmp_path / "run" / "history.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    result = subprocess.run([sys.executable, ROOT / "eval.py", tmp_path / "run.pth", "--data_root", data_root,
                             "--store_path", tmp_path / "store"], capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_validation_and_steps_do_not_depend_on_the_processes(tmp_path, data_root):
    """12 clips to validate and three steps, over 1, 2 and 3 processes.

    Validation and gradients are equal up to the order of float32 sums. AdamW divides each gradient by its own size,
    so that where that is all but zero the order of a sum decides the sign of a full step: of the way that the
    parameters have gone, a hundredth may differ.
    """
    results = []
    for processes in (1, 2, 3):
        options = arguments(tmp_path, data_root, input="[sgram]", mode="arcface")
        result = torchrun(processes, *options, script=ROOT / "tests" / "ddp_worker.py")
        assert result.returncode == 0, result.stderr
        results.append(torch.load(tmp_path / "run.pth"))
    one, *others = results
    for other in others:
        assert other["validation"] == pytest.approx(one["validation"], rel=1e-5)
        for name, expected in one["gradients"].items():
            assert torch.linalg.vector_norm(other["gradients"][name] - expected) <= 1e-4 * expected.norm() + 1e-6, name
        ours, expected = (torch.cat([way.flatten() for way in x["changes"].values()]) for x in (other, one))
        print("share of the way that differs:", ((ours - expected).norm() / expected.norm()).item())
        assert (ours - expected).norm() <= 1e-2 * expected.norm()


def test_a_run_goes_on_with_another_number_of_processes(tmp_path, data_root):
    """Two processes, one, two: an interrupted epoch apart, the run is one run."""
    options = arguments(tmp_path, data_root, epoch=3, input="[sgram]", split_ratio=0.7)
    stop_after = "import sys, trainer; end = int(sys.argv.pop(1)); fit = trainer.Trainer.run_epoch\n"
    stop_after += "def run_epoch(self):\n    fit(self)\n    if self.epoch == end: sys.exit(0)\n"
    stop_after += "trainer.Trainer.run_epoch = run_epoch\n"
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    for script, module in ((one, "train"), (two, "train_ddp")):
        script.write_text(f"{stop_after}import {module}, utils\nutils.run_script({module}.main)\n")
    assert torchrun(2, 1, *options, script=two).returncode == 0
    command = [sys.executable, one, "2", *options, "--resume"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
    result = torchrun(2, 3, *options, "--resume", script=two)
    assert result.returncode == 0, result.stderr
    with (tmp_path / "run" / "history.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3"]


def test_an_error_is_said_once(tmp_path, data_root):
    result = torchrun(2, *arguments(tmp_path, tmp_path / "nowhere"))
    assert result.returncode == 1
    assert len(errors(result)) == 1
    assert "error: no folder" in errors(result)[0]
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in result.stderr
    result = torchrun(2, *arguments(tmp_path, data_root, batch_size=3))
    assert len(errors(result)) == 1
    assert "error: batch_size: 3 clips a step: each of 2 processes needs two" in errors(result)[0]


# A process that does something to itself at the end of an epoch, in the first attempt only.
DYING = """
import os, signal, sys, time
import trainer, train_ddp, utils

deed, rank, epoch = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
report = trainer.Trainer.validate

def validate(self, clips):
    result = report(self, clips)
    if self.epoch + 1 == epoch and os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if deed == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise utils.UserError("this process has had enough")
    return result

trainer.Trainer.validate = validate
utils.run_script(train_ddp.main)
"""


@pytest.fixture
def dying(tmp_path) -> Path:
    (tmp_path / "dying.py").write_text(DYING)
    return tmp_path / "dying.py"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_dies_ends_the_job(rank, tmp_path, data_root, dying):
    result = torchrun(2, "kill", rank, 2, *arguments(tmp_path, data_root, epoch=3, input="[sgram]"), script=dying)
    assert result.returncode == 1
    assert "Signal 9 (SIGKILL)" in result.stderr
    assert len(errors(result)) <= 1
    assert all("another process of the job has ended" in line for line in errors(result))
    assert load_checkpoint(tmp_path / "run.last.pth")["epoch"] == (2 if rank == "1" else 1), "rank 0 writes"


def test_an_error_of_one_process_is_the_one_that_is_said(tmp_path, data_root, dying):
    result = torchrun(2, "raise", "1", 1, *arguments(tmp_path, data_root, input="[sgram]"), script=dying)
    assert result.returncode == 1
    assert errors(result) == ["error: this process has had enough"]


@pytest.mark.parametrize("epoch", [1, 2])  # before and after there is a checkpoint
def test_restarted_processes_go_on_by_themselves(epoch, tmp_path, data_root, dying):
    options = {"epoch": 3, "input": "[sgram]", "split_ratio": 0.7}
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert torchrun(2, *arguments(unbroken, data_root, **options)).returncode == 0
    result = torchrun(2, "kill", "1", epoch, *arguments(broken, data_root, **options), script=dying,
                      options=("--standalone", "--max-restarts=1"))  # fmt: skip
    assert result.returncode == 0, result.stderr
    ours, expected = (load_checkpoint(folder / "run.last.pth") for folder in (broken, unbroken))
    assert all(torch.equal(ours["model"][name], value) for name, value in expected["model"].items())
    keys = [{key: value for key, value in row.items() if key != "seconds"} for row in ours["history"]]
    assert keys == [{key: row[key] for key in keys[0]} for row in expected["history"]]


def test_a_restart_leaves_the_run_of_another_job_alone(trained_copy, data_root):
    before = (trained_copy / "run.last.pth").read_bytes()
    result = torchrun(2, *arguments(trained_copy, data_root), options=("--standalone", "--max-restarts=1"))
    assert result.returncode == 1
    assert [line.split(" is there")[0] for line in errors(result)] == [f"error: {trained_copy / 'run.last.pth'}"] * 2
    assert (trained_copy / "run.last.pth").read_bytes() == before


@pytest.mark.slow
def test_two_agents_as_two_machines(tmp_path, data_root):
    """The multi-node form, both nodes here, against the same processes under one agent."""
    options = {"epoch": 2, "input": "[sgram]", "split_ratio": 0.7}
    apart, together = tmp_path / "apart", tmp_path / "together"
    assert torchrun(2, *arguments(together, data_root, **options)).returncode == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test")
    with ThreadPoolExecutor(2) as pool:
        words = arguments(apart, data_root, **options)
        results = list(pool.map(lambda _: torchrun(1, *words, options=nodes), range(2)))
    assert [result.returncode for result in results] == [0, 0], results
    ours, expected = (load_checkpoint(folder / "run.last.pth")["model"] for folder in (apart, together))
    assert all(torch.equal(ours[name], value) for name, value in expected.items())


@pytest.mark.parametrize("mode", ["arcmix", "cross_entropy"])  # one for each head
def test_each_head_trains_without_unused_parameters(mode, tmp_path, data_root):
    options = arguments(tmp_path, data_root, input="[sgram]", mode=mode)
    result = torchrun(2, *options)
    assert result.returncode == 0, result.stderr
    assert all(torch.isfinite(value).all() for value in load_checkpoint(tmp_path / "run.pth")["model"].values())
