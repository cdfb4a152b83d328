"""train_ddp.py under torchrun, with gloo on the CPU."""

import csv
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import arguments, change_checkpoint, remove_bank

import train
import train_ddp
from checkpoint import Checkpoint
from config import load_config
from model import TASTgramMFN

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.ddp


def torchrun(
    processes: int,
    *words: str,
    script: Path = ROOT / "train_ddp.py",
    options=("--standalone",),
    **environment,
) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", *options]
    command = [*launcher, f"--nproc_per_node={processes}", script, *map(str, words)]
    defaults = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    environment = os.environ | defaults | environment
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


def errors(result: subprocess.CompletedProcess) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


def test_it_takes_the_options_of_train_and_says_how_it_is_started(fails):
    usage = "torchrun --standalone --nproc_per_node=N train_ddp.py"
    fails(train_ddp.main, "--lr", "1", match=usage)


def test_a_restart_may_not_overwrite(fails, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_MAX_RESTARTS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("utils.distributed.end_process", sys.exit)
    message = "--overwrite would replace the run after every restart; remove the old run"
    fails(train_ddp.main, "--overwrite", match=message)


# Leaves the run after the given number of epochs, as if it had been stopped there.
STOPPED = """
import sys
import trainer, train_ddp, utils

last, set_learning_rate = int(sys.argv.pop(1)), trainer.Trainer.set_learning_rate

def stop_or_continue(self, epoch):
    return sys.exit(0) if epoch == last else set_learning_rate(self, epoch)

trainer.Trainer.set_learning_rate = stop_or_continue
utils.run_script(train_ddp.main)
"""


def column(folder: Path, name: str) -> list[str]:
    """Return a column of history.csv."""
    with (folder / "run" / "history.csv").open(newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def epochs(folder: Path) -> list[str]:
    return column(folder, "epoch")


def test_two_processes_write_one_run_that_one_process_goes_on_with(tmp_path, data_root, call):
    """The losses of two processes equal those of one process."""
    (tmp_path / "stopped.py").write_text(STOPPED)
    torch.save(TASTgramMFN(2, ["sgram"]).state_dict(), tmp_path / "initial.pth")
    keys = {"epoch": 2, "input": "[sgram]", "split_ratio": 0.8, "lr": 1e-5, "machines": "auto",
            "init_from": tmp_path / "initial.pth"}  # fmt: skip
    options = arguments(tmp_path, data_root, **keys)
    result = torchrun(2, 1, *options, script=tmp_path / "stopped.py")
    assert result.returncode == 0, result.stderr
    progress = [line for line in result.stdout.splitlines() if line.startswith("epoch ")]
    assert len(progress) == 1, "only rank 0 prints"
    last = Checkpoint.load(tmp_path / "run.last.pth")
    assert last.epoch == 1
    assert not any(name.startswith("module.") for name in last.weights)
    assert len(last.held_out.scores) == len(last.held_out.labels) == 3
    assert epochs(tmp_path) == ["1"]
    status, _, errors = call(train.main, *options, "--resume")
    assert status == 0, errors
    assert epochs(tmp_path) == ["1", "2"]
    assert call(train.main, *arguments(tmp_path / "one", data_root, **keys))[0] == 0
    for name in ("train_loss", "valid_loss"):
        one = np.array(column(tmp_path / "one", name), dtype=float)
        several = np.array(column(tmp_path, name), dtype=float)
        # Rounding errors grow from step to step, to 2e-4 after six.
        assert several == pytest.approx(one, rel=1e-3)


@pytest.mark.slow
def test_two_processes_go_on_with_a_run_of_one(trained_copy, data_root):
    """The checkpoint of the tiny run is edited so that one of two planned epochs is done."""
    change_checkpoint(trained_copy / "run.last.pth", keys={"epoch": 2})
    result = torchrun(2, *arguments(trained_copy, data_root, epoch=2), "--resume")
    assert result.returncode == 0, result.stderr
    assert epochs(trained_copy) == ["1", "2"]


@pytest.mark.slow
def test_two_processes_make_the_embeddings_that_one_makes(trained_copy, data_root):
    """Two processes finish the tiny run, from which the embeddings have been removed."""
    whole = remove_bank(trained_copy / "run.pth")
    result = torchrun(2, *arguments(trained_copy, data_root), "--resume")
    assert result.returncode == 0, result.stderr
    again = Checkpoint.load(trained_copy / "run.pth")
    assert torch.equal(again.bank.clips.labels, whole.bank.clips.labels)
    assert again.bank.files == whole.bank.files
    pairs = (again.bank.clips, whole.bank.clips), (again.held_out, whole.held_out)
    for ours, expected in pairs:
        assert torch.allclose(ours.embedding, expected.embedding, rtol=0, atol=2**-11)


INPUTS = {  # words and options of ddp_worker.py
    "reference": (["--reference"], {"batch_size": 4, "machines": load_config().machines}),
    "recordings": ([], {"batch_size": 8, "machines": {"fan": [0, 2], "valve": [1]}}),
}
# Rounding errors grow too fast to compare it in single precision.
OS_SCL = {
    "batch_size": 8, "machines": {"fan": [0, 2], "valve": [1]}, "mode": "os_scl",
    "input": "[sgram, tfgram, specnet]", "weight_average": 0.05,
}  # fmt: skip
IN_DOUBLE = INPUTS | {"os_scl": ([], OS_SCL)}


def worker_results(
    processes: int, folder: Path, data_root: Path, *words: str, **options
) -> dict[str, torch.Tensor]:
    words = (*arguments(folder, data_root, **options), *words)
    result = torchrun(processes, *words, script=ROOT / "tests/ddp_worker.py")
    assert result.returncode == 0, result.stderr
    return torch.load(folder / "run.pth")


def weights(results: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in results["state"].values()])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("inputs", IN_DOUBLE)
def test_a_run_does_not_depend_on_the_number_of_processes(inputs, processes, tmp_path, data_root):
    """Compare eight mixed steps with batch norm in one process and in several with unequal shares.

    Some batches are short. The network computes in float64; epochs sum their losses in float32.
    """
    words, options = IN_DOUBLE[inputs]
    one, several = (
        worker_results(number, tmp_path, data_root, "--double", *words, lr=1e-4, **options)
        for number in (1, processes)
    )
    tolerance = 1e-9 if inputs == "reference" else 1e-6
    assert several["losses"].tolist() == pytest.approx(one["losses"].tolist(), rel=tolerance)
    assert (weights(several) - weights(one)).norm() <= 1e-7 * weights(one).norm()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("inputs", INPUTS)
def test_in_single_precision_it_differs_by_rounding(inputs, processes, tmp_path, data_root):
    """The learning rate is a tenth of the default, because rounding errors grow from step to step.

    AdamW divides each gradient by its magnitude. At 1e-4, the eighth loss of a single process
    already differs by 1e-4 between one thread and two.
    """
    words, options = INPUTS[inputs]
    one, several = (
        worker_results(number, tmp_path, data_root, *words, lr=1e-5, **options)
        for number in (1, processes)
    )
    assert several["losses"].tolist() == pytest.approx(one["losses"].tolist(), rel=1e-4)
    if inputs == "recordings":
        expected = pytest.approx(one["first_scores"].tolist(), rel=1e-5)
        assert several["first_scores"].tolist() == expected
        assert several["accuracy"] == one["accuracy"]
        assert (several["scores"] - one["scores"]).norm() <= 1e-2 * one["scores"].norm()
    assert (weights(several) - weights(one)).norm() <= 1e-2 * weights(one).norm()


@pytest.mark.slow  # the compiler takes a minute or two
def test_compiled_steps_of_two_processes_are_those_of_one(tmp_path, data_root):
    words, options = INPUTS["reference"]
    one, two = (
        worker_results(number, tmp_path, data_root, *words, lr=1e-5, compile=is_compiled, **options)
        for number, is_compiled in ((1, "false"), (2, "true"))
    )
    assert two["losses"].tolist() == pytest.approx(one["losses"].tolist(), rel=1e-4)


# The compiler works only in the first process.
NOT_COMPILING = """
import os
import acceleration, torch, train_ddp, utils
from test_acceleration import compile_quickly, fail

acceleration.BREAK_EVEN = 0
torch._inductor.compile = compile_quickly if os.environ["RANK"] == "0" else fail
utils.run_script(train_ddp.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["auto", "true"])
def test_where_one_process_cannot_compile(switch, tmp_path, data_root):
    """All processes run uncompiled, or the job ends with a single error message."""
    (tmp_path / "not_compiling.py").write_text(NOT_COMPILING)
    options = arguments(tmp_path, data_root, input="[sgram]", split_ratio=0.7, compile=switch)
    result = torchrun(2, *options, script=tmp_path / "not_compiling.py")
    lines = [line for line in result.stderr.splitlines() if "no kernel image" in line]
    assert len(lines) == 1, result.stderr
    if switch == "auto":
        assert result.returncode == 0, result.stderr
        assert lines[0].startswith("notice: compile: compiling fails on ")
        assert epochs(tmp_path) == ["1"]
    else:
        assert result.returncode == 1
        assert errors(result) == lines
        assert lines[0].startswith("error: compile: true, but compiling fails on ")
        assert not (tmp_path / "run.pth").exists()


# One process fails. Closing the connections waits for all processes, as it does under NCCL.
FAULTY = """
import os, pathlib, signal, sys, time
import torch, torch.distributed as dist
import distributed, train, train_ddp, trainer, utils

kind, rank, moment = (sys.argv.pop(1) for _ in range(3))
failed = pathlib.Path(__file__).with_name("failed")

def destroy():
    distributed.attempt_store().add("destroyed", 1)
    while distributed.attempt_store().add("destroyed", 0) < 2:
        time.sleep(0.1)

def fail(*_):
    if os.environ["RANK"] != rank:
        return
    if not failed.exists():
        failed.touch()
    if kind in ("SIGINT", "SIGTERM"):
        os.kill(os.getpid(), getattr(signal, kind))
        time.sleep(0.1)
        return
    errors = {
        "UserError": utils.UserError,
        "OSError": OSError,
        "OutOfMemoryError": torch.OutOfMemoryError,
    }
    raise errors[kind]("the cause")

def before(owner, name):
    function = getattr(owner, name)
    setattr(owner, name, lambda *arguments: (fail(), function(*arguments))[1])

dist.destroy_process_group = destroy
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
if moment == "saving" and rank != "0":
    before(trainer, "barrier")
else:
    owner, name = {
        "start": (train, "load_clips"),
        "step": (trainer.Trainer, "step"),
        "validation": (trainer.Trainer, "validate"),
        "saving": (trainer.Checkpoint, "save"),
    }[moment]
    before(owner, name)
utils.run_script(train_ddp.main)
"""
KINDS = ("UserError", "OSError", "OutOfMemoryError", "SIGINT", "SIGTERM")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["start", "step", "validation", "saving"])
@pytest.mark.parametrize("rank", "01")
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_of_one_process_ends_the_job(kind, rank, moment, tmp_path, data_root):
    """The job ends within 30 s of the fault, with one line that names the cause."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    options = arguments(tmp_path, data_root, epoch=2, input="[sgram]", split_ratio=0.7)
    result = torchrun(2, kind, rank, moment, *options, script=tmp_path / "faulty.py")
    seconds = time.time() - (tmp_path / "failed").stat().st_mtime
    print(f"{kind} of process {rank}, {moment}: {seconds:.1f} s")
    assert seconds < 30
    assert result.returncode != 0
    causes = {"OutOfMemoryError": "out of memory", "SIGINT": "stopped", "SIGTERM": "stopped"}
    cause = causes.get(kind, "the cause")
    assert [cause in line for line in errors(result)] == [True], result.stderr


@pytest.mark.slow
def test_an_error_is_said_once(tmp_path):
    result = torchrun(2, *arguments(tmp_path, tmp_path / "nowhere"))
    assert result.returncode == 1
    assert len(errors(result)) == 1
    assert "error: no folder" in errors(result)[0]
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in result.stderr


@pytest.mark.slow
def test_too_few_clips_for_the_processes(tmp_path, data_root):
    result = torchrun(4, *arguments(tmp_path, data_root, batch_size=3))
    assert len(errors(result)) == 1
    assert (
        "error: batch_size: 3 clips per step are too few: 4 processes need one each"
        in errors(result)[0]
    )


# One process ends itself at the end of an epoch, the first time only. The main process does so
# before it has written the files of the epoch, another one afterwards.
DYING = """
import os, pathlib, signal, sys, time
import checkpoint, trainer, train_ddp, utils

way, rank, epoch = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
died, validate = pathlib.Path(__file__).with_name("died"), trainer.Trainer.validate

def saved_epoch(path):
    return checkpoint.Checkpoint.load(path).epoch if path.exists() else 0

def validate_and_die(self, clips):
    result = validate(self, clips)
    is_now = len(self.history) + 1 == epoch
    if is_now and os.environ["RANK"] == rank and not died.exists():
        died.touch()
        while rank != "0" and saved_epoch(self.files.last) < epoch:
            time.sleep(0.1)
        if way == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise utils.UserError("this process has had enough")
    return result

trainer.Trainer.validate = validate_and_die
utils.run_script(train_ddp.main)
"""


@pytest.fixture
def dying(tmp_path) -> Path:
    (tmp_path / "dying.py").write_text(DYING)
    return tmp_path / "dying.py"


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_dies_ends_the_job(rank, tmp_path, data_root, dying):
    options = arguments(tmp_path, data_root, epoch=3, input="[sgram]")
    result = torchrun(2, "kill", rank, 2, *options, script=dying)
    assert result.returncode == 1
    assert "Signal 9 (SIGKILL)" in result.stderr
    assert len(errors(result)) <= 1
    ended = "another process of the job has ended"
    stopped = f"process {1 - int(rank)} was stopped by a user or because another process has died"
    assert all(ended in line or stopped in line for line in errors(result))
    saved_epoch = Checkpoint.load(tmp_path / "run.last.pth").epoch
    assert saved_epoch == (2 if rank == "1" else 1), "rank 0 writes"


@pytest.mark.slow
def test_an_error_of_one_process_is_the_one_that_is_said(tmp_path, data_root, dying):
    options = arguments(tmp_path, data_root, input="[sgram]")
    result = torchrun(2, "raise", "1", 1, *options, script=dying)
    assert result.returncode == 1
    assert errors(result) == ["error: this process has had enough"]


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "epoch"), [("0", 1), ("1", 2)])  # without and with a checkpoint
def test_restarted_processes_resume(rank, epoch, tmp_path, data_root, dying):
    options = {"epoch": 3, "input": "[sgram]", "split_ratio": 0.7}
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert torchrun(2, *arguments(unbroken, data_root, **options)).returncode == 0
    words = ("kill", rank, epoch, *arguments(broken, data_root, **options), "--resume")
    result = torchrun(2, *words, script=dying, options=("--standalone", "--max-restarts=1"))
    assert result.returncode == 0, result.stderr
    ours, expected = (Checkpoint.load(folder / "run.last.pth") for folder in (broken, unbroken))
    for name, value in expected.weights.items():
        assert torch.equal(ours.weights[name], value), name
    histories = []
    for checkpoint in (ours, expected):
        histories.append([result._replace(seconds=0.0) for result in checkpoint.history])
    assert histories[0] == histories[1]


def on_two_machines(
    *words: str, options=(), **torchrun_options
) -> list[subprocess.CompletedProcess]:
    """Run the multi-node form of torchrun, with one process on each of two local nodes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rendezvous = f"--rdzv-endpoint=127.0.0.1:{port}"
    options = ("--nnodes=2", "--rdzv-backend=c10d", rendezvous, "--rdzv-id=test", *options)

    def run_node(_: int) -> subprocess.CompletedProcess:
        return torchrun(1, *words, options=options, **torchrun_options)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run_node, range(2)))


@pytest.mark.slow
@pytest.mark.parametrize("dies", [False, True])
def test_two_machines_train_as_one(dies, tmp_path, data_root, dying):
    """The result is also the same where a process is killed and all are restarted."""
    options = {"epoch": 3, "input": "[sgram]", "split_ratio": 0.7}
    apart = arguments(tmp_path / "apart", data_root, **options)
    together = arguments(tmp_path, data_root, **options)
    assert torchrun(2, *together).returncode == 0
    if dies:
        words = ("kill", "1", 2, *apart, "--resume")
        results = on_two_machines(
            *words,
            options=("--max-restarts=3",),
            script=dying,
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )
        assert dying.with_name("died").exists()
    else:
        results = on_two_machines(*apart)
    assert [result.returncode for result in results] == [0, 0], results
    ours = Checkpoint.load(tmp_path / "apart" / "run.last.pth").weights
    expected = Checkpoint.load(tmp_path / "run.last.pth").weights
    assert all(torch.equal(ours[name], value) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["arcmix", "cross_entropy"])  # one for each head
def test_each_head_trains_without_unused_parameters(mode, tmp_path, data_root):
    options = arguments(tmp_path, data_root, input="[sgram]", mode=mode)
    result = torchrun(2, *options)
    assert result.returncode == 0, result.stderr
    weights = Checkpoint.load(tmp_path / "run.pth").weights
    assert all(torch.isfinite(value).all() for value in weights.values())
