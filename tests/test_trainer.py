"""The training step against the reference values; epochs, checkpoints, resume, and how a run may end."""

import csv
import dataclasses
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from conftest import MACHINES, arguments, write_set

import train
from dataloader import ClipSet
from losses import MODES, Mix
from train import hold, load_newest
from trainer import HISTORY_COLUMNS, Trainer, build_model
from utils import (
    RunFiles,
    UserError,
    choose_compile,
    load_checkpoint,
    load_config,
    save_checkpoint,
    set_up_numerics,
)

ROOT = Path(__file__).parent.parent
VALUES = reference.VALUES
CPU = torch.device("cpu")


def reference_trainer(mode: str, **overrides) -> Trainer:
    """A trainer in the published configuration with the reference weights."""
    trainer = Trainer(load_config(mode=mode, device="cpu", **overrides), CPU)
    trainer.network.load_state_dict(reference.parameters())
    return trainer


def mixes(mode: str) -> list[Mix]:
    return [Mix(lam, partner) if MODES[mode].mixes else Mix() for lam, partner in reference.mixing()]


# ---- The step ----


@pytest.mark.parametrize("mode", ["arcface", "arcmix", "noisy_arcmix"])
def test_eight_steps_match_the_reference(mode):
    trainer, waveform, labels = reference_trainer(mode), reference.waveforms(), reference.labels()
    parameters = dict(trainer.network.named_parameters())
    trainer.model.train()
    losses = []
    for number, mix in enumerate(mixes(mode)):
        losses.append(trainer.step(waveform, labels, mix)[0].item())
        if number == 0:
            for name, expected in zip(VALUES[f"{mode}_grad_names"], VALUES[f"{mode}_grad_norms"], strict=True):
                gradient = parameters[str(name)].grad
                assert (gradient is None) == math.isnan(expected), name
                if gradient is not None:
                    assert abs(gradient.norm().item() - expected) <= 3e-2 * expected + 1e-4, name
    assert losses == pytest.approx(VALUES[f"{mode}_losses"].tolist(), rel=1e-2)
    trainer.model.eval()
    with torch.no_grad():
        similarity, embedding = trainer.network(**trainer.front_end(waveform))
    score = trainer.objective.anomaly_score(similarity, labels)
    assert reference.distance(score, VALUES[f"{mode}_after_score"]) < 1e-2
    assert reference.distance(embedding, VALUES[f"{mode}_after_embedding"]) < 1e-2


def test_score_before_training_matches_the_reference():
    trainer, waveform = reference_trainer("noisy_arcmix"), reference.waveforms()
    with torch.no_grad():
        similarity, _ = trainer.network.eval()(**trainer.front_end(waveform))
    score = trainer.objective.anomaly_score(similarity, reference.labels())
    assert reference.distance(score, VALUES["eval_score"]) < 1e-4


def test_cross_entropy_trains_the_linear_head_and_leaves_the_centres():
    trainer = reference_trainer("cross_entropy")
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    trainer.model.train()
    trainer.step(reference.waveforms(), reference.labels(), Mix())
    after = trainer.network.state_dict()
    assert not torch.equal(after["mobilefacenet.fc_out.weight"], before["mobilefacenet.fc_out.weight"])
    assert torch.equal(after["arcface.weight"], before["arcface.weight"])


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])  # slow on a CPU
def test_half_precision_stays_near_the_reference(precision):
    trainer, mix = reference_trainer("noisy_arcmix", precision=precision), mixes("noisy_arcmix")[0]
    trainer.model.train()
    loss = trainer.step(reference.waveforms(), reference.labels(), mix)[0].item()
    assert loss == pytest.approx(VALUES["noisy_arcmix_losses"][0], rel=0.05)
    assert trainer.scaler.is_enabled() == (precision == "fp16")
    before = reference.parameters()["arcface.weight"]
    while trainer.scaler.is_enabled() and torch.equal(trainer.network.arcface.weight, before):
        scale = (
            trainer.scaler.get_scale()
        )  # a step whose gradients overflow is passed over, at half the scale next time
        assert scale >= 256
        trainer.step(reference.waveforms(), reference.labels(), mix)
        assert trainer.scaler.get_scale() in (scale / 2, scale)
    assert all(torch.isfinite(parameter).all() for parameter in trainer.network.parameters())
    assert not torch.equal(trainer.network.arcface.weight, before)


@pytest.mark.slow  # the compiler takes a minute or two
@pytest.mark.parametrize("mode", ["arcface", "noisy_arcmix"])
def test_eight_compiled_steps_match_the_reference(mode, capsys):
    trainer, waveform, labels = (
        reference_trainer(mode, compile="true", batch_size=4),
        reference.waveforms(),
        reference.labels(),
    )
    trainer.model.train()
    losses = [trainer.step(waveform, labels, mix)[0].item() for mix in mixes(mode)]
    assert trainer.is_compiled
    assert "torch.compile" not in capsys.readouterr().err
    assert losses == pytest.approx(VALUES[f"{mode}_losses"].tolist(), rel=1e-2)
    trainer.step(waveform[:3], labels[:3], Mix())  # a shorter batch goes past the compiled model
    trainer.model.eval()


def test_where_nothing_can_be_compiled_the_step_is_the_same(monkeypatch, capsys):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-compiler-of-this-name",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    results = []
    for switch in ("true", "false"):
        trainer = reference_trainer("noisy_arcmix", compile=switch, batch_size=4)
        trainer.model.train()
        losses = [
            trainer.step(reference.waveforms(), reference.labels(), mix).tolist() for mix in mixes("noisy_arcmix")[:2]
        ]
        results.append((losses, trainer.network.state_dict()))
    assert "torch.compile does not work here, so the steps run uncompiled (" in capsys.readouterr().err
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], value) for name, value in results[1][1].items())


def test_what_auto_compiles(monkeypatch):
    gpu = torch.device("cuda", 0)
    assert [choose_compile(name, CPU) for name in ("true", "false", "auto")] == [True, False, False]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert choose_compile("auto", gpu)
    monkeypatch.setattr("utils.world_size", lambda: 2)
    assert not choose_compile("auto", gpu)
    monkeypatch.setattr("utils.world_size", lambda: 1)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not choose_compile("auto", gpu)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_step_on_the_gpu_does_not_wait_for_it(tmp_path, data_root):
    """From the plan to the optimiser: nothing in a step makes the host wait for the device."""
    device = torch.device("cuda", 0)
    config = load_config(data_root=str(data_root), store_path=str(tmp_path), machines=MACHINES, batch_size=4)
    clips, trainer = ClipSet.load(config, "train").copy_to(device), Trainer(config, device)
    trainer.model.train()

    def step() -> None:
        waveform, labels = clips.batch(np.arange(4), device)
        mix = trainer.objective.draw_mix(np.random.default_rng(0), np.random.default_rng(1), 4, device)
        trainer.step(waveform, labels, mix)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("switch", ["true", "false"])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-2), ("bf16", 0.05), ("fp16", 0.05)])
def test_a_step_on_the_gpu_matches_the_reference(precision, bound, switch):
    device = torch.device("cuda", 0)
    trainer = Trainer(load_config(precision=precision, compile=switch, batch_size=4), device)
    trainer.network.load_state_dict(reference.parameters())
    lam, partner = reference.mixing()[0]
    trainer.model.train()
    waveform, labels = reference.waveforms().to(device), reference.labels().to(device)
    loss = trainer.step(waveform, labels, Mix(lam, partner.to(device)))[0].item()
    assert loss == pytest.approx(VALUES["noisy_arcmix_losses"][0], rel=bound)


# ---- The schedule ----


def test_the_learning_rate_falls_on_a_cosine_to_a_tenth():
    trainer = Trainer(load_config(epoch=10, lr=1e-3, input=["sgram"], machines={"fan": [0, 1]}), CPU)
    rates = []
    for _ in range(10):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.scheduler.step()
    expected = [1e-4 + 9e-4 * (1 + math.cos(math.pi * epoch / 10)) / 2 for epoch in range(10)]
    assert rates == pytest.approx(expected, rel=1e-9)
    assert trainer.scheduler.get_last_lr() == pytest.approx([1e-4])


def test_initial_weights_depend_on_the_seed_alone():
    one, other, another = (build_model(load_config(seed=seed)).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["arcface.weight"], another["arcface.weight"])


# ---- A run ----


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_what_a_run_leaves(trained):
    best, last = load_checkpoint(trained / "run.pth"), load_checkpoint(trained / "run.last.pth")
    assert set(best) == {
        "model", "optimizer", "scheduler", "scaler", "epoch", "best_loss", "history", "clips", "clip_counts", "config",
        "versions", "held_out",
    }  # fmt: skip
    assert set(last) == set(best) - {"held_out"}
    assert best["clip_counts"] == {"training": 11, "validation": 1}
    assert best["config"]["machines"] == last["config"]["machines"] == MACHINES
    assert list(best["model"]) == list(build_model(load_config(machines=MACHINES)).state_dict())
    history = rows(trained / "run" / "history.csv")
    assert list(history[0]) == list(HISTORY_COLUMNS)
    assert [row["epoch"] for row in history] == ["1"]
    assert float(history[0]["valid_loss"]) == best["best_loss"]
    assert not list(trained.glob(".*.tmp"))


def test_an_existing_run_is_not_overwritten_by_accident(trained_copy, data_root, fails, call):
    options = arguments(trained_copy, data_root)
    before = (trained_copy / "run.pth").read_bytes()
    fails(
        train.main, *options, match=r"run.last.pth is there: --resume goes on .*, --overwrite replaces it, --save_path"
    )
    assert (trained_copy / "run.pth").read_bytes() == before
    status, output, _ = call(train.main, *options, "--resume")  # nothing left to do
    assert status == 0
    assert "epoch" not in output
    assert (trained_copy / "run.pth").read_bytes() == before


def test_a_resumed_run_must_have_the_same_configuration(trained, data_root, fails):
    options = arguments(trained, data_root, epoch=2, lr=1e-3)
    differing = r"another configuration: epoch \(was 1, is 2\); lr \(was 0.0001, is 0.001\)"
    fails(train.main, *options, "--resume", match=differing)


def test_a_resumed_run_must_see_the_same_clips(trained, tmp_path, fails):
    other = write_set(tmp_path / "data", train_clips=5)
    options = arguments(trained, other, store_path=tmp_path / "store")
    fails(train.main, *options, "--resume", match="the clips under .* are not those the run began with")


def test_resuming_where_nothing_is(tmp_path, data_root, call, fails):
    status, output, errors = call(train.main, *arguments(tmp_path, data_root), "--resume")
    assert status == 0
    assert "run.last.pth: nothing to resume, so the run starts from the beginning" in errors
    assert "epoch 1/1" in output


def test_overwriting_replaces_the_run_and_nothing_else(tmp_path, data_root, call):
    files = RunFiles(tmp_path / "run.pth")
    results = files.results("test")
    of_eval = [
        results / name for name in ("metrics.csv", "report.html", "decision_result_fan_id_00.csv", "figures/roc.png")
    ]
    for path in (*files.states, *of_eval, files.folder / "mine.txt", results / "mine.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    status, output, _ = call(train.main, *arguments(tmp_path, data_root, tensorboard="true"), "--overwrite")
    assert status == 0
    assert "valid loss" in output
    assert load_checkpoint(files.best)["epoch"] == 1
    assert sorted(path.name for path in files.folder.iterdir()) == [
        "eval", "history.csv", "mine.txt", "tensorboard"
    ]  # fmt: skip
    assert [path.name for path in files.results("test").iterdir()] == ["mine.txt"]


def test_a_failing_start_leaves_the_old_run(trained_copy, tmp_path, fails):
    before = (trained_copy / "run.pth").read_bytes()
    fails(
        train.main,
        *arguments(trained_copy, tmp_path / "nowhere"),
        "--overwrite",
        match=r"no folder \S*nowhere \(looked for",
    )
    one_clip = write_set(tmp_path / "one", {"fan": [0, 1]}, train_clips=1, test_clips=0)
    options = arguments(trained_copy, one_clip, machines="{fan: [0, 1]}")
    fails(train.main, *options, "--overwrite", match="1 clips to train on")
    assert (trained_copy / "run.pth").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, data_root, fails):
    options = arguments(tmp_path, data_root, lr=1e30, epoch=3)
    fails(
        train.main,
        *options,
        match=r"loss is (nan|inf) (at step|after epoch) .*learning rate 1e\+30\): try a lower --lr",
    )
    assert not list(tmp_path.glob("*.pth"))


def test_a_last_batch_of_one_clip_is_trained(tmp_path, data_root, call):
    # 12 clips, int(0.8 * 12) = 9 to train on: two batches of 4 and one clip
    status, _, _ = call(train.main, *arguments(tmp_path, data_root, split_ratio=0.8))
    assert status == 0


def test_too_few_clips_to_train_on(tmp_path, fails):
    root = write_set(tmp_path / "data", {"fan": [0, 1]}, train_clips=1, test_clips=0)
    options = arguments(tmp_path, root, machines="{fan: [0, 1]}")
    fails(train.main, *options, match="1 clips to train on: each of 1 processes needs two, for batch norm")


def test_cuda_is_refused_where_there_is_none(tmp_path, data_root, fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fails(train.main, *arguments(tmp_path, data_root, device="cuda:1"), match="device: cuda:1 asks for a GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    fails(train.main, *arguments(tmp_path, data_root, device="cuda:1"), match="device: cuda:1 is not there")


def test_a_gpu_out_of_memory_is_one_line(fails):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...\nmore")

    fails(main, match="GPU is out of memory: lower batch_size")


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch, fails):
    path = tmp_path / "a.pth"
    config = dataclasses.asdict(load_config())
    weights = {"a": torch.zeros(1)}
    save_checkpoint(path, {"model": weights, "config": config, "epoch": 1})

    def no_space(self, data):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", no_space)
    fails(
        lambda: save_checkpoint(path, {"model": weights, "config": config, "epoch": 2}), match="No space left on device"
    )
    assert load_checkpoint(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


# ---- Cut and resumed ----

CUT = {"epoch": 4, "lr": 1e-3, "split_ratio": 0.8, "input": "[sgram]"}


def start(folder: Path, data_root: Path, *options: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", *arguments(folder, data_root, **CUT), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for_epoch(process: subprocess.Popen, number: int) -> None:
    """Read the run's output until this epoch is finished, then let it go some way into the next."""
    for line in process.stdout:
        if line.startswith(f"epoch {number}/"):
            time.sleep(0.15)
            return
    raise AssertionError(f"ended before epoch {number}: {process.stderr.read()}")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, data_root) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert start(folder, data_root).wait() == 0
    return folder


def assert_same_run(folder: Path, unbroken: Path) -> None:
    """Weights and states equal bit for bit, and the history but for the seconds."""
    for name in ("run.pth", "run.last.pth"):
        ours, expected = load_checkpoint(folder / name), load_checkpoint(unbroken / name)
        assert ours["epoch"] == expected["epoch"]
        assert all(torch.equal(ours["model"][key], value) for key, value in expected["model"].items())
    ours, expected = (rows(folder / "run" / "history.csv") for folder in (folder, unbroken))
    for row in ours + expected:
        row.pop("seconds")
    assert ours == expected


@pytest.mark.parametrize(("sent", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_run_resumes_to_the_same_bits(sent, status, unbroken, tmp_path, data_root):
    process = start(tmp_path, data_root)
    wait_for_epoch(process, 1)
    process.send_signal(getattr(signal, sent))
    errors = process.communicate()[1]
    assert process.returncode == status
    assert "Traceback" not in errors
    assert "stopped; --resume goes on after epoch" in errors
    assert load_checkpoint(tmp_path / "run.last.pth")["epoch"] < CUT["epoch"]

    resumed = start(tmp_path, data_root, "--resume")
    assert resumed.wait() == 0, resumed.stderr.read()
    assert_same_run(tmp_path, unbroken)


# train.py in a process group that kills itself at the so many-th step, file operation, or write of a checkpoint, of
# which then half is on the disk.
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


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_again_and_again_is_the_unbroken_run(kills, tmp_path, data_root):
    """SIGKILL at seeded random moments, the whole process group, resumed each time."""
    (tmp_path / "killed.py").write_text(KILLED)
    options = CUT | {"epoch": 2 * kills + 2}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def run(folder: Path, kind: str = "never", moment: int = 1) -> int:
        words = [kind, moment, folder / "run", *arguments(folder, data_root, **options), "--resume"]
        command = [sys.executable, tmp_path / "killed.py", *map(str, words)]
        result = subprocess.run(command, env=environment, start_new_session=True, capture_output=True, text=True)
        assert result.returncode in (0, -signal.SIGKILL), result.stderr
        return result.returncode

    rng = random.Random(3)
    for number in range(kills):
        kind = ("file", "write", "step")[number % 3]
        moment = rng.randint(1, {"file": 25, "write": 3, "step": 6}[kind])  # within about two epochs
        assert run(tmp_path / "killed", kind, moment) == -signal.SIGKILL
        states = [path.name for path in (tmp_path / "killed").glob("run.*pth")]
        epoch = load_newest([p for p in RunFiles(tmp_path / "killed/run.pth").states if p.exists()]) if states else None
        print(f"kill {number + 1}: {kind} {moment}, epoch {epoch['epoch'] if epoch else 0}")
    assert run(tmp_path / "killed") == 0
    assert run(tmp_path / "unbroken") == 0
    assert_same_run(tmp_path / "killed", tmp_path / "unbroken")


def spoil(path: Path, offset: int, is_cut: bool) -> None:
    content = bytearray(path.read_bytes())
    if is_cut:
        del content[offset:]
    else:
        content[offset] ^= 0x10
    path.write_bytes(content)


def test_a_damaged_last_state_falls_back_to_the_one_before(tmp_path, data_root, call, fails):
    """Truncated at, or with a byte flipped at, seeded random offsets: never silently another state."""
    options = arguments(tmp_path, data_root, epoch=3, input="[sgram]")
    files = RunFiles(tmp_path / "run.pth")
    assert call(train.main, *options)[0] == 0
    whole = files.last.read_bytes()
    expected, before = load_checkpoint(files.last), load_checkpoint(files.previous)
    assert (expected["epoch"], before["epoch"]) == (3, 2)
    rng, fallen_back = random.Random(11), 0
    for number in range(40):
        spoil(files.last, rng.randrange(len(whole)), is_cut=number % 2 == 0)
        state = load_newest(files.states)
        if state["epoch"] == 3:  # the byte was one between the members, which nobody reads
            assert all(torch.equal(state["model"][name], value) for name, value in expected["model"].items())
            assert str(state["optimizer"]) == str(expected["optimizer"])
        else:
            assert state["epoch"] == 2
            fallen_back += 1
        files.last.write_bytes(whole)
    assert fallen_back > 30

    spoil(files.last, 1000, is_cut=True)
    status, output, errors = call(train.main, *options, "--resume")
    assert status == 0
    assert "run.last.pth: not a readable checkpoint (it is something else, or damaged); going on from the" in errors
    assert "epoch 3/3" in output
    ours = load_checkpoint(files.last)
    assert all(torch.equal(ours["model"][name], value) for name, value in expected["model"].items())
    for file in files.states:
        spoil(file, 1000, is_cut=True)
    fails(
        train.main, *options, "--resume", match=r"run.pth: not a readable .*; bring it back, or start again with --ov"
    )


def test_two_runs_of_one_name_at_once_are_refused(trained_copy, data_root, fails):
    with hold(RunFiles(trained_copy / "run.pth")):
        said = "run.pth: another process is training this run"
        fails(train.main, *arguments(trained_copy, data_root), "--overwrite", match=said)
    assert (trained_copy / "run.pth").exists()


def test_a_crash_between_checkpoint_and_history_is_mended(trained_copy, data_root, call):
    history = trained_copy / "run" / "history.csv"
    expected = history.read_text()
    history.unlink()
    assert call(train.main, *arguments(trained_copy, data_root), "--resume")[0] == 0
    assert history.read_text() == expected


def test_a_cut_before_the_first_last_state_resumes_from_the_best(trained_copy, data_root, call):
    last = trained_copy / "run.last.pth"
    expected = load_checkpoint(last)
    last.unlink()
    options = arguments(trained_copy, data_root)
    assert call(train.main, *options, "--resume")[0] == 0
    assert load_checkpoint(trained_copy / "run.pth")["epoch"] == expected["epoch"]


def test_resuming_without_the_best_weights_is_an_error(trained_copy, data_root, fails):
    (trained_copy / "run.pth").unlink()
    fails(train.main, *arguments(trained_copy, data_root), "--resume", match="run.pth, the best weights .* is missing")


def test_weights_alone_cannot_be_resumed(trained_copy, data_root, fails):
    for name in ("run.pth", "run.last.pth"):
        torch.save(load_checkpoint(trained_copy / name)["model"], trained_copy / name)
    fails(
        train.main, *arguments(trained_copy, data_root), "--resume", match="no run to resume: best_loss, clips, epoch"
    )


def test_a_resumed_run_must_number_the_classes_alike(trained, data_root, fails):
    options = arguments(trained, data_root, machines="{valve: [1], fan: [0, 2]}")
    fails(train.main, *options, "--resume", match="another configuration: machines")


def test_float32_means_no_tf32():
    set_up_numerics()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    with torch.backends.cudnn.flags(deterministic=True):  # still usable by whoever wants it
        pass


def test_a_history_without_weights_is_not_overwritten(trained_copy, data_root, fails):
    for name in ("run.pth", "run.last.pth"):
        (trained_copy / name).unlink()
    options = arguments(trained_copy, data_root)
    fails(train.main, *options, match="history.csv is there")
    fails(train.main, *options, "--resume", match="run.pth, the best weights .* is missing")
    assert (trained_copy / "run" / "history.csv").exists()


def test_a_state_that_does_not_fit_is_refused(trained_copy, data_root, fails):
    state = load_checkpoint(trained_copy / "run.last.pth")
    torch.save(state | {"optimizer": {}}, trained_copy / "run.last.pth")
    fails(train.main, *arguments(trained_copy, data_root), "--resume", match="run.last.pth: .* do not fit")


def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path, data_root, fails):
    (tmp_path / "file").touch()
    options = arguments(tmp_path, data_root, save_path=tmp_path / "file" / "run.pth")
    said = r"file/run.pth cannot be written \((Not a directory|File exists)\); --save_path"
    fails(train.main, *options, match=said)


def test_train_is_one_process(fails, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails(train.main, match="with torchrun, start train_ddp.py")


# ---- Checkpoint files ----


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, fails):
    class Harm:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'harm'}",)

    torch.save({"model": Harm(), "config": {}}, tmp_path / "a.pth")
    fails(lambda: load_checkpoint(tmp_path / "a.pth"), match="a.pth: not a readable checkpoint")
    assert not (tmp_path / "harm").exists()


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    torch.save({"weights": {"a": torch.zeros(1)}, "epoch": 3}, tmp_path / "a.pth")
    torch.save({"model": {"a": torch.zeros(1)}, "config": {"n_layer": 1}}, tmp_path / "b.pth")
    for name in ("a.pth", "b.pth"):
        with pytest.raises(UserError, match="neither a checkpoint of this project nor a state dict"):
            load_checkpoint(tmp_path / name)


def test_a_checkpoint_whose_configuration_was_spoilt_is_refused(trained_copy):
    state = load_checkpoint(trained_copy / "run.pth")
    state["config"]["mode"] = "arcmx"
    torch.save(state, trained_copy / "run.pth")
    with pytest.raises(UserError, match=r"run.pth: mode: 'arcmx' is not one of"):
        load_checkpoint(trained_copy / "run.pth")


def test_flipped_bytes_are_noticed(trained_copy):
    path = trained_copy / "run.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"run.pth: not a readable checkpoint .*damaged"):
        load_checkpoint(path)


def test_a_bare_state_dict_is_taken_as_weights(tmp_path):
    for is_zip in (True, False):  # as PyTorch writes it since 1.6, and before
        torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
        assert load_checkpoint(tmp_path / "a.pth") == {"model": {"a": torch.zeros(1)}}


def test_the_configuration_in_a_checkpoint_is_plain(trained):
    config = load_checkpoint(trained / "run.pth")["config"]
    assert dataclasses.asdict(load_config(**config)) == config
    assert np.isfinite(load_checkpoint(trained / "run.pth")["best_loss"])
