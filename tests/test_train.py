"""train.py as a user runs it: the files of a run, errors, and stopped, killed and resumed runs."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import (
    CLASSES,
    arguments,
    change_checkpoint,
    remove_bank,
    write_sections,
    write_set,
)

import locks
import train
from checkpoint import Checkpoint, RunFiles, load_newest, lock_run
from config import load_config
from inference import build_network

ROOT = Path(__file__).parent.parent
HISTORY = ["epoch", "lr", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "seconds"]


# ---- A run ----


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_what_a_run_leaves(trained):
    best, last = (Checkpoint.load(trained / name) for name in ("run.pth", "run.last.pth"))
    assert last.bank is None
    assert len(best.bank.clips.labels) == best.n_training == 9  # of 12
    assert len(best.held_out.labels) == len(best.held_out.embedding) == 3
    assert best.classes == last.classes == CLASSES
    assert list(best.weights) == list(build_network(load_config(), CLASSES).state_dict())
    history = rows(trained / "run" / "history.csv")
    assert list(history[0]) == HISTORY
    assert [row["epoch"] for row in history] == ["1"]
    assert float(history[0]["valid_loss"]) == best.history[0].valid_loss
    names = {path.name for path in trained.iterdir() if path.suffix != ".lock"}
    assert names == {"run", "run.last.pth", "run.pth"}


def test_an_existing_run_is_not_overwritten_by_accident(trained_copy, data_root, fails, call):
    options = arguments(trained_copy, data_root)
    before = (trained_copy / "run.pth").read_bytes()
    message = (
        r"run.last.pth already exists; continue the run with --resume, replace it with --overwrite"
    )
    fails(train.main, *options, match=message)
    assert (trained_copy / "run.pth").read_bytes() == before
    status, output, _ = call(train.main, *options, "--resume")  # nothing left to do
    assert status == 0
    assert "epoch" not in output
    assert (trained_copy / "run.pth").read_bytes() == before


def test_embeddings_that_a_run_was_stopped_before_are_made_when_it_is_resumed(
    trained_copy, data_root, call, monkeypatch
):
    whole = remove_bank(trained_copy / "run.pth")
    last = (trained_copy / "run.last.pth").read_bytes()
    options = arguments(trained_copy, data_root)
    with monkeypatch.context() as patch:
        patch.setattr("trainer.Trainer.embed", Mock(side_effect=KeyboardInterrupt))
        status, _, errors = call(train.main, *options, "--resume")
    assert status == 130
    assert errors.splitlines()[-1] == "notice: stopped; --resume continues after epoch 1"
    status, output, _ = call(train.main, *options, "--resume")
    assert status == 0
    assert f"added the embeddings of the clips to {trained_copy / 'run.pth'}" in output
    again = Checkpoint.load(trained_copy / "run.pth")
    for one, other in zip(again.bank.clips, whole.bank.clips, strict=True):
        assert torch.equal(one, other)
    assert again.bank.files == whole.bank.files
    assert torch.equal(again.held_out.embedding, whole.held_out.embedding)
    assert (trained_copy / "run.last.pth").read_bytes() == last


def test_a_resumed_run_must_have_the_same_configuration(trained, data_root, fails):
    options = arguments(trained, data_root, epoch=2, lr=1e-3)
    message = r"another configuration: epoch \(was 1, is 2\); lr \(was 0.0001, is 0.001\)"
    fails(train.main, *options, "--resume", match=message)


def test_a_resumed_run_must_see_the_same_clips(trained, tmp_path, fails):
    other = write_set(tmp_path / "data", train_clips=5)
    options = arguments(trained, other)
    message = "the recordings under .* are not those that the run started with"
    fails(train.main, *options, "--resume", match=message)


@pytest.mark.slow
def test_a_run_may_begin_with_given_weights(trained, tmp_path, data_root, call, fails):
    keys = {"seed": 1, "lr": 1e-9, "weight_decay": 0, "init_from": trained / "run.pth"}
    options = arguments(tmp_path, data_root, **keys)
    status, _, errors = call(train.main, *options)
    assert status == 0
    notice = "run.pth, except for those of the classes (arcface.weight, mobilefacenet.fc_out"
    assert notice in errors
    weights = Checkpoint.load(tmp_path / "run.pth").weights
    given = Checkpoint.load(trained / "run.pth").weights
    name = "mobilefacenet.linear7.conv.weight"
    assert torch.allclose(weights[name], given[name], rtol=0, atol=1e-6)
    name = "arcface.weight"
    assert not torch.allclose(weights[name], given[name], rtol=0, atol=1e-3)
    options[-1] = "nowhere.pth"  # the value of init_from, which a resumed run ignores
    status, _, errors = call(train.main, *options, "--resume")
    assert status == 0
    assert errors == "notice: 12 of 12 recordings are shorter than 10 s and are repeated\n"
    fails(train.main, *options, "--overwrite", match="nowhere.pth: no such checkpoint")
    assert Checkpoint.load(tmp_path / "run.pth").config.init_from == str(trained / "run.pth")


def test_a_recording_must_be_left_to_validate(tmp_path, fails):
    root = write_sections(tmp_path / "data", train_clips=1)  # one of each class
    options = arguments(tmp_path, root, machines="auto", classes="attributes", split_ratio=0.5)
    message = r"each class has a single recording, so none can be held out .* add more"
    fails(train.main, *options, match=message)


@pytest.mark.slow
def test_resuming_where_nothing_is(tmp_path, data_root, call):
    status, output, errors = call(train.main, *arguments(tmp_path, data_root), "--resume")
    assert status == 0
    assert "run.last.pth: nothing to resume, so the run starts from the beginning" in errors
    assert "epoch 1/1" in output


def test_overwriting_replaces_the_run(trained_copy, data_root, call):
    files = RunFiles(trained_copy / "run.pth")
    (files.folder / "mine.txt").write_text("mine")
    files.results("test").mkdir(exist_ok=True)
    (files.results("test") / "metrics.csv").write_text("old")
    options = arguments(trained_copy, data_root, tensorboard="true", lr=2e-4)
    status, output, _ = call(train.main, *options, "--overwrite")
    assert status == 0
    assert "valid loss" in output
    assert Checkpoint.load(files.best).config.lr == 2e-4
    names = {path.name for path in files.folder.iterdir()}
    assert names == {"history.csv", "mine.txt", "tensorboard"}


def test_a_failing_start_leaves_the_old_run(trained_copy, tmp_path, fails):
    before = (trained_copy / "run.pth").read_bytes()
    options = arguments(trained_copy, tmp_path / "nowhere")
    fails(train.main, *options, "--overwrite", match=r"no folder \S*nowhere \(looked for")
    single = write_set(tmp_path / "single", {"fan": [0, 1]}, train_clips=1, test_clips=0)
    options = arguments(trained_copy, single, machines="{fan: [0, 1]}")
    fails(train.main, *options, "--overwrite", match="each class has a single recording")
    assert (trained_copy / "run.pth").read_bytes() == before


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_leaves_what_was_written(
    tmp_path, data_root, fails, monkeypatch
):
    """The files are written in the background of the next epoch, which raises the error."""
    write, written = Path.write_bytes, []

    def write_twice(path: Path, data: memoryview) -> int:
        written.append(path.name)
        if len(written) > 2:  # best and last of the first epoch
            raise OSError(28, "No space left on device", str(path))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_twice)
    options = arguments(tmp_path, data_root, epoch=4, input="[sgram]")
    fails(train.main, *options, match="No space left on device")
    files = RunFiles(tmp_path / "run.pth")
    assert [Checkpoint.load(path).epoch for path in (files.best, files.last)] == [1, 1]
    assert [row["epoch"] for row in rows(files.history)] == ["1"]
    assert not list(tmp_path.glob("*.tmp"))


# ---- Cut and resumed ----

SLOW = pytest.mark.slow
CUT = {"epoch": 2, "lr": 1e-3, "split_ratio": 0.8, "input": "[sgram]"}


def wait_for_epoch(process: subprocess.Popen) -> None:
    """Read the run's output until an epoch is finished, then let it go some way into the next."""
    for line in process.stdout:
        if line.startswith("epoch "):
            time.sleep(0.15)
            return
    raise AssertionError(f"ended before an epoch: {process.stderr.read()}")


def assert_same_run(folder: Path, unbroken: Path) -> None:
    """Check that two runs have the same weights, bit for bit, and histories but for the seconds."""
    for name in ("run.pth", "run.last.pth"):
        ours, expected = Checkpoint.load(folder / name), Checkpoint.load(unbroken / name)
        assert ours.epoch == expected.epoch
        for key, value in expected.weights.items():
            assert torch.equal(ours.weights[key], value), key
        for key, value in expected.trained_weights.items():
            assert torch.equal(ours.trained_weights[key], value), key
    ours, expected = (rows(folder / "run" / "history.csv") for folder in (folder, unbroken))
    for row in ours + expected:
        row.pop("seconds")
    assert ours == expected


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=SLOW)]
)
def test_a_stopped_run_resumes_to_the_same_bits(sent, status, tmp_path, data_root, call):
    """The run is stopped within an epoch. It has all that a run may have to restore."""
    machines = {"fan": [0], "valve": [1]}  # fewer machines save time
    keys = CUT | {"machines": machines, "mode": "os_scl", "weight_average": 0.2}
    stopped = arguments(tmp_path / "stopped", data_root, **keys)
    unbroken = arguments(tmp_path, data_root, **keys)
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *stopped],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        # A shell makes background jobs and their child processes ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for_epoch(process)
    process.send_signal(sent)
    errors = process.communicate()[1]
    assert process.returncode == status
    assert "Traceback" not in errors
    assert "stopped; --resume continues after epoch 1" in errors
    assert Checkpoint.load(tmp_path / "stopped" / "run.last.pth").epoch == 1
    for options in (unbroken, [*stopped, "--resume"]):
        assert call(train.main, *options)[0] == 0
    assert_same_run(tmp_path / "stopped", tmp_path)


# train.py in a process group that kills itself at the given step, file operation or write of a
# checkpoint. In the last case half of the file is written.
KILLED = """
import os, pathlib, signal, sys
import train, trainer, utils

kind, moment, folder = sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1)
moments = iter(range(1, moment))

def is_now():
    return next(moments, None) is None

def die():
    os.killpg(0, signal.SIGKILL)

def hook(event, arguments):
    if event in ("open", "os.rename", "os.remove") and folder in str(arguments[0]) and is_now():
        die()

def write_half(path, data):
    if is_now():
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        die()
    return write(path, data)

def step(*arguments, **options):
    result = take(*arguments, **options)
    if is_now():
        die()
    return result

write, take = pathlib.Path.write_bytes, trainer.Trainer.step
if kind == "file":
    sys.addaudithook(hook)
elif kind == "write":
    pathlib.Path.write_bytes = write_half
elif kind == "step":
    trainer.Trainer.step = step
utils.run_script(train.main)
"""


KILLS = 20


@pytest.mark.slow
def test_a_run_killed_again_and_again_is_the_unbroken_run(tmp_path, data_root):
    """The process group gets SIGKILL at seeded random moments, and the run is resumed each time."""
    (tmp_path / "killed.py").write_text(KILLED)
    options = CUT | {"epoch": 2 * KILLS, "mode": "os_scl", "weight_average": 0.9}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def run(folder: Path, kind: str = "never", moment: int = 1) -> int:
        words = [kind, moment, folder / "run", *arguments(folder, data_root, **options), "--resume"]
        command = [sys.executable, tmp_path / "killed.py", *map(str, words)]
        result = subprocess.run(
            command, env=environment, start_new_session=True, capture_output=True, text=True
        )
        assert result.returncode in (0, -signal.SIGKILL), result.stderr
        return result.returncode

    rng = random.Random(3)
    moments = {"file": 25, "write": 3, "step": 6}  # in about two epochs
    for number in range(KILLS):
        kind = ("file", "write", "step")[number % 3]
        moment = rng.randint(1, moments[kind])
        assert run(tmp_path / "killed", kind, moment) == -signal.SIGKILL
        files = RunFiles(tmp_path / "killed" / "run.pth")
        epoch = load_newest(files).epoch if files.best.exists() else 0
        print(f"kill {number + 1}: {kind} {moment}, epoch {epoch}")
    assert run(tmp_path / "killed") == 0
    assert run(tmp_path / "unbroken") == 0
    assert_same_run(tmp_path / "killed", tmp_path / "unbroken")


def test_a_damaged_last_state_goes_on_from_the_best_weights(trained_copy, data_root, call):
    files = RunFiles(trained_copy / "run.pth")
    history = files.history.read_text()
    files.last.write_bytes(files.last.read_bytes()[:1000])
    status, _, errors = call(train.main, *arguments(trained_copy, data_root), "--resume")
    assert status == 0
    notice = (
        "run.last.pth: not a readable checkpoint: damaged or cut short; copy it again; continuing "
        "from the"
    )
    assert notice in errors
    assert files.history.read_text() == history


def test_two_runs_of_one_name_at_once_are_refused(trained_copy, data_root, fails, monkeypatch):
    monkeypatch.setattr(locks, "REFRESH", 0.1)
    with lock_run(RunFiles(trained_copy / "run.pth")):
        message = "run.pth: process [0-9]+ on .+ is training this run"
        fails(train.main, *arguments(trained_copy, data_root), "--overwrite", match=message)
    assert (trained_copy / "run.pth").exists()


def test_a_crash_between_checkpoint_and_history_is_repaired(trained_copy, data_root, call):
    history = trained_copy / "run" / "history.csv"
    expected = history.read_text()
    history.unlink()
    assert call(train.main, *arguments(trained_copy, data_root), "--resume")[0] == 0
    assert history.read_text() == expected


def test_a_cut_before_the_first_last_state_resumes_from_the_best(trained_copy, data_root, call):
    last = trained_copy / "run.last.pth"
    expected = Checkpoint.load(last)
    last.unlink()
    options = arguments(trained_copy, data_root)
    assert call(train.main, *options, "--resume")[0] == 0
    assert Checkpoint.load(trained_copy / "run.pth").epoch == expected.epoch


def test_resuming_without_the_best_weights_is_an_error(trained_copy, data_root, fails):
    (trained_copy / "run.pth").unlink()
    options = arguments(trained_copy, data_root)
    fails(train.main, *options, "--resume", match="run.pth, the best weights .* is missing")


def test_weights_alone_cannot_be_resumed(trained_copy, data_root, fails):
    (trained_copy / "run.last.pth").unlink()
    path = trained_copy / "run.pth"
    torch.save(Checkpoint.load(path).weights, path)
    message = "run.pth contains only weights, so there is no run to resume; use the same"
    fails(train.main, *arguments(trained_copy, data_root), "--resume", match=message)


def test_the_later_state_is_resumed(trained_copy, data_root, call):
    """A run stopped between writing best weights and last state repeats no epoch."""
    best = trained_copy / "run.pth"
    later = Checkpoint.load(best)
    later.history.append(later.history[0]._replace(epoch=2))
    change_checkpoint(best, keys={"epoch": 2}, history=later.history)
    change_checkpoint(trained_copy / "run.last.pth", keys={"epoch": 2})
    options = arguments(trained_copy, data_root, epoch=2)
    status, output, _ = call(train.main, *options, "--resume")
    assert status == 0
    assert "epoch 2/2" not in output


def test_a_resumed_run_must_number_the_classes_alike(trained, data_root, fails):
    options = arguments(trained, data_root, machines="{valve: [1], fan: [0, 2]}")
    fails(train.main, *options, "--resume", match="another configuration: machines")


def test_a_history_without_weights_is_not_overwritten(trained_copy, data_root, fails):
    for name in ("run.pth", "run.last.pth"):
        (trained_copy / name).unlink()
    options = arguments(trained_copy, data_root)
    fails(train.main, *options, match="history.csv already exists")
    fails(train.main, *options, "--resume", match="run.pth, the best weights .* is missing")
    assert (trained_copy / "run" / "history.csv").exists()


def test_a_state_that_does_not_fit_is_refused(trained_copy, data_root, fails):
    change_checkpoint(trained_copy / "run.last.pth", optimizer={})
    options = arguments(trained_copy, data_root)
    fails(train.main, *options, "--resume", match="run.last.pth: .* do not match this model")


def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path, data_root, fails):
    (tmp_path / "file").touch()
    options = arguments(tmp_path, data_root, save_path=tmp_path / "file" / "run.pth")
    message = r"file/run.pth cannot be written \((Not a directory|File exists)\); choose another"
    fails(train.main, *options, match=message)


def test_train_is_one_process(fails, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails(train.main, match="with torchrun, start train_ddp.py")
