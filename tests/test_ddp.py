"""train_ddp.py under torchrun, with gloo on the CPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import arguments

from utils import load_checkpoint

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.ddp


def torchrun(processes: int, *words: str, script: Path = ROOT / "train_ddp.py") -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*launcher, script, *map(str, words)], capture_output=True, text=True, env=environment, timeout=300
    )


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


def test_validation_and_gradient_do_not_depend_on_the_processes(tmp_path, data_root):
    """12 clips to validate and 5 to step on, over 1 and 2 processes: equal up to the order of float32 sums."""
    results = []
    for processes in (1, 2):
        options = arguments(tmp_path, data_root, input="[sgram]", mode="arcface")
        result = torchrun(processes, *options, script=ROOT / "tests" / "ddp_worker.py")
        assert result.returncode == 0, result.stderr
        results.append(torch.load(tmp_path / "run.pth"))
    one, two = results
    assert two["validation"] == pytest.approx(one["validation"], rel=1e-5)
    for name, expected in one["gradients"].items():
        assert torch.linalg.vector_norm(two["gradients"][name] - expected) <= 1e-4 * expected.norm() + 1e-6, name


def test_an_error_ends_all_processes(tmp_path, data_root):
    result = torchrun(2, *arguments(tmp_path, tmp_path / "nowhere"))
    assert result.returncode != 0
    assert "error: no folder" in result.stderr
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in result.stderr


def test_a_batch_too_small_to_divide(tmp_path, data_root):
    result = torchrun(2, *arguments(tmp_path, data_root, batch_size=3))
    assert result.returncode != 0
    assert "error: batch_size: 3 clips a step: each of 2 processes needs two" in result.stderr


@pytest.mark.parametrize("mode", ["arcmix", "cross_entropy"])  # one for each head
def test_each_head_trains_without_unused_parameters(mode, tmp_path, data_root):
    options = arguments(tmp_path, data_root, input="[sgram]", mode=mode)
    result = torchrun(2, *options)
    assert result.returncode == 0, result.stderr
    assert all(torch.isfinite(value).all() for value in load_checkpoint(tmp_path / "run.pth")["model"].values())
