"""The scripts for Slurm in examples/, run by stand-ins for its commands on one computer."""

import csv
import os
import socket
import subprocess
from pathlib import Path

import pytest
from conftest import MACHINES, write_set

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
# Starts a script for each number of the array at once, in an environment of its own.
SBATCH = """#!/bin/bash
array=${1#--array=}; script=$2; shift 2
for task in $(seq ${array%-*} ${array#*-}); do
    SLURM_SUBMIT_DIR=$PWD SLURM_ARRAY_TASK_ID=$task bash $script "$@" > $LOGS/$task.log 2>&1 &
    jobs="$jobs $!"
done
for job in $jobs; do wait $job || status=1; done
exit ${status:-0}
"""
# Starts a command for each node at once.
SRUN = """#!/bin/bash
while [[ $1 = --* ]]; do shift; done
for node in $(seq $SLURM_JOB_NUM_NODES); do "$@" > $LOGS/$node.log 2>&1 & jobs="$jobs $!"; done
for job in $jobs; do wait $job || status=1; done
exit ${status:-0}
"""
SCONTROL = """#!/bin/bash
echo localhost
"""


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """An environment with stand-ins for Slurm's commands; the logs are in the folder logs."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "logs").mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}.items():
        command = tmp_path / "bin" / name
        command.write_text(text)
        command.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "LOGS": str(tmp_path / "logs"), "OMP_NUM_THREADS": "1"}


def read_logs(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("logs/*")))


def epochs(file: Path) -> list[str]:
    with file.open(newline="") as lines:
        return [row["epoch"] for row in csv.DictReader(lines)]


@pytest.mark.slow
def test_the_jobs_of_an_array_share_the_runs(tmp_path, environment):
    data_root = write_set(tmp_path / "data", train_clips=20, test_clips=4)
    command = [
        "sbatch", "--array=1-2", EXAMPLES / "paper.sbatch",
        "--recipes", "recipes/arcface.yaml", "--seeds", 1, 2, "--output", tmp_path / "paper",
        "--data_root", data_root, "--machines", MACHINES, "--epoch", 1, "--batch_size", 4,
        "--device", "cpu",
    ]  # fmt: skip
    result = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, timeout=600)
    logs = read_logs(tmp_path)
    assert result.returncode == 0, logs
    assert [logs.count(f"arcface_{seed}: ") for seed in (1, 2)] == [1, 1]
    assert (tmp_path / "paper" / "comparison.md").read_text().count(".pth |") == 2


@pytest.mark.slow
@pytest.mark.ddp
def test_a_training_on_two_computers(tmp_path, environment):
    data_root = write_set(tmp_path / "data", train_clips=20, test_clips=4)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = tmp_path / "train_hosts.sbatch"
    script.write_text((EXAMPLES / script.name).read_text().replace(":29400", f":{port}"))
    environment |= {
        "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "1",
    }  # fmt: skip
    command = [
        "bash", script, "--save_path", tmp_path / "run.pth", "--data_root", data_root,
        "--machines", MACHINES, "--epoch", 2, "--batch_size", 8, "--device", "cpu",
    ]  # fmt: skip
    result = subprocess.run(list(map(str, command)), env=environment, timeout=600)
    assert result.returncode == 0, read_logs(tmp_path)
    assert epochs(tmp_path / "run" / "history.csv") == ["1", "2"]
