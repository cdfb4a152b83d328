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


def test_validation_counts_every_clip_once(tmp_path, data_root):
    """12 clips over 1 and 5 processes, whose shards differ in size: the same mean, up to the order of the sum."""
    results = []
    for processes in (1, 5):
        options = arguments(tmp_path, data_root, input="[sgram]")
        result = torchrun(processes, *options, script=ROOT / "tests" / "ddp_worker.py")
        assert result.returncode == 0, result.stderr
        (line,) = (line for line in result.stdout.splitlines() if line.startswith("validated "))
        results.append([float(value) for value in line.split()[1:]])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


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
