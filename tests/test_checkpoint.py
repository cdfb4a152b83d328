"""Checkpoint files: writing, safe reading and finding them; locking and clearing a run."""

import argparse
import os
import random
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from conftest import CLASSES, MACHINES, arguments, change_checkpoint, touch

import locks
import train
from audio import Windows
from checkpoint import Checkpoint, RunFiles, find_checkpoint, load_newest, lock_run
from classes import Classes
from config import KEYS, Config, load_config
from errors import UserError
from inference import build_network, load_model
from model import HEAD_WEIGHTS

# ---- Writing ----


def test_what_is_written_is_read_back(trained, tmp_path):
    checkpoint = Checkpoint.load(trained / "run.pth")
    trained_weights = {name: value + 1 for name, value in checkpoint.weights.items()}
    checkpoint = replace(checkpoint, trained_weights=trained_weights)
    checkpoint.save(tmp_path / "copy.pth")
    copy = Checkpoint.load(tmp_path / "copy.pth")
    assert copy.path == tmp_path / "copy.pth"
    for name in ("config", "classes", "history", "n_training", "fingerprint", "versions"):
        assert getattr(copy, name) == getattr(checkpoint, name), name
        assert getattr(copy, name), name
    for name, value in checkpoint.weights.items():
        assert torch.equal(copy.weights[name], value), name
        assert torch.equal(copy.trained_weights[name], value + 1), name
    for name in ("bank", "held_out", "optimizer", "scaler"):
        assert str(getattr(copy, name)) == str(getattr(checkpoint, name)), name
    assert len(fields(Checkpoint)) == 13, "all fields are compared here"


def test_a_full_disk_leaves_the_checkpoint_before(trained_copy, monkeypatch, fails):
    path = trained_copy / "run.pth"
    before = path.read_bytes()
    other = replace(Checkpoint.load(path), n_training=3)

    def no_space(self, data):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", no_space)
    fails(lambda: other.save(path), match="No space left on device")
    assert path.read_bytes() == before
    assert not list(trained_copy.glob("*.tmp"))


# ---- Reading ----


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, fails):
    class Harm:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'harm'}",)

    torch.save({"model": Harm(), "config": {}}, tmp_path / "a.pth")
    fails(
        lambda: Checkpoint.load(tmp_path / "a.pth"),
        match="holds a Python object .*system.*, which could run code and is not read; save",
    )
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"weights": {"a": torch.zeros(1)}, "epoch": 3},
        {"model": {"a": torch.zeros(1)}, "config": {"n_layer": 1}},
        {"model": {"a": torch.zeros(1)}, "config": load_config().model_dump()},
        [1, 2],
        {},
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    message = "neither a checkpoint of this version nor a state dict"
    with pytest.raises(UserError, match=message):
        Checkpoint.load(tmp_path / "a.pth")


def test_a_checkpoint_whose_configuration_was_spoilt_is_refused(trained_copy):
    path = trained_copy / "run.pth"
    content = torch.load(path, weights_only=True)
    content["config"]["mode"] = "arcmx"
    torch.save(content, path)
    with pytest.raises(UserError, match=r"run.pth: mode: 'arcmx' is not one of"):
        load_model(path, load_config())


def test_flipped_bytes_are_noticed(trained_copy):
    path = trained_copy / "run.pth"
    content = bytearray(path.read_bytes())
    for offset in range(100):  # more than the padding between members of the archive
        content[len(content) // 2 + offset] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"run.pth: not a readable checkpoint: damaged"):
        Checkpoint.load(path)


def test_a_bare_state_dict_is_a_checkpoint_with_weights_alone(tmp_path):
    path = tmp_path / "a.pth"
    for is_zip in (True, False):  # as PyTorch writes it since 1.6, and before
        torch.save({"a": torch.zeros(1)}, path, _use_new_zipfile_serialization=is_zip)
        assert Checkpoint.load(path) == Checkpoint(path, {"a": torch.zeros(1)})


def test_published_weights_load_into_the_published_configuration(tmp_path, capsys):
    torch.save(reference.parameters(), tmp_path / "published.pth")
    network = load_model(tmp_path / "published.pth", load_config()).network
    notice = "published.pth is a bare state dict: machines, classes, mode, input"
    assert notice in capsys.readouterr().err
    weights = network.state_dict()
    for name, value in reference.parameters().items():
        assert torch.equal(weights[name], value), name


def test_windows_and_channel_are_those_of_the_training_unless_given(trained_copy):
    path = trained_copy / "run.pth"
    change_checkpoint(path, keys={"window": "all", "channel": 1})

    def windows(**keys) -> Windows:
        config = load_config(given=tuple(keys), **keys)
        return load_model(path, config).windows(config, "test")

    assert windows() == Windows(5.0, 1)
    assert windows(hop=2, channel=0) == Windows(2.0, 0)
    assert windows(window="first") == Windows(None, 1)


def test_machines_on_the_command_line_must_be_those_of_the_checkpoint(trained):
    def load(machines) -> None:
        load_model(trained / "run.pth", load_config(given=("machines",), machines=machines))

    load("auto")
    load(MACHINES)
    for machines in ({"fan": [0, 1]}, {"valve": [1], "fan": [0, 2]}):
        message = "command line: machines is .*, but the checkpoint .* has 'fan 00, 02; valve 01'"
        with pytest.raises(UserError, match=message):
            load(machines)


def test_loading_looks_at_no_recordings(trained, tmp_path):
    """The classes are in the checkpoint; for a bare state dict the configuration names them."""
    config = load_config(machines="auto", data_root=str(tmp_path / "nowhere"))
    assert load_model(trained / "run.pth", config).classes == CLASSES
    torch.save(Checkpoint.load(trained / "run.pth").weights, tmp_path / "bare.pth")
    message = "bare.pth is a bare state dict, which does not contain its classes; set machines to"
    for keys in ({"machines": "auto"}, {"machines": MACHINES, "classes": "attributes"}):
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / "bare.pth", load_config(**keys))
    assert load_model(tmp_path / "bare.pth", load_config(machines=MACHINES)).classes == CLASSES


def test_weights_are_loaded_but_for_the_omitted_ones(tmp_path):
    """The published weights are loaded into networks for other machines."""
    network = build_network(load_config(), CLASSES)
    published = Checkpoint(tmp_path / "published.pth", reference.parameters())
    initial = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    published.fill(network, omitted=HEAD_WEIGHTS)
    for name, tensor in network.state_dict().items():
        expected = initial if name in HEAD_WEIGHTS else published.weights
        assert torch.equal(tensor, expected[name]), name
    network = build_network(load_config(input="sgram"), CLASSES)
    misfit = r"published.pth does not fit the configuration \(mode, input\): mobilefacenet.conv1"
    with pytest.raises(UserError, match=misfit):
        published.fill(network, omitted=HEAD_WEIGHTS)
    keys = "machines, classes, mode, input, sub_centers"
    misfit = rf"fit the configuration \({keys}\): arcface.weight is"
    with pytest.raises(UserError, match=misfit):
        published.fill(network)
    network = build_network(load_config(mode="os_scl"), CLASSES)
    with pytest.raises(
        UserError, match=r"\(mode, input\): projection.0.bias is absent in the file"
    ):
        published.fill(network, omitted=HEAD_WEIGHTS)


def test_differences_see_the_order_of_the_machines(tmp_path):
    config = load_config(machines={"fan": [0], "pump": [0]})
    classes = Classes.from_machines(config.machines)
    checkpoint = Checkpoint(tmp_path / "run.pth", {}, config, classes)
    assert checkpoint.differences(config, KEYS) == []
    assert checkpoint.differences(load_config(machines="auto"), ["machines"]) == []
    other = load_config(machines={"pump": [0], "fan": [0]}, lr=1)
    assert checkpoint.differences(other, KEYS) == ["machines", "lr"]
    assert checkpoint.differences(other, ["lr", "seed"]) == ["lr"]


def test_initial_weights_depend_on_the_seed_alone():
    one, other, another = (
        build_network(load_config(seed=seed), CLASSES).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["arcface.weight"], another["arcface.weight"])


# ---- Finding ----


def spoil(path: Path, offset: int, is_cut: bool) -> None:
    content = bytearray(path.read_bytes())
    if is_cut:
        del content[offset:]
    else:
        content[offset] ^= 0x10
    path.write_bytes(content)


def test_a_damaged_last_state_falls_back_to_the_best_weights(trained_copy, capsys):
    """Whether the file is cut or has a flipped byte, no other state is loaded silently."""
    files = RunFiles(trained_copy / "run.pth")
    best = Checkpoint.load(files.best)
    replace(best, n_training=2).save(files.last)
    whole, rng, fallen_back = files.last.read_bytes(), random.Random(11), 0
    for number in range(12):
        spoil(files.last, rng.randrange(len(whole)), is_cut=number % 2 == 0)
        loaded = load_newest(files)
        if loaded.n_training == 2:  # the byte is between the members of the archive and not read
            for name, value in best.weights.items():
                assert torch.equal(loaded.weights[name], value), name
            assert str(loaded.optimizer) == str(best.optimizer)
        else:
            assert loaded.path == files.best
            fallen_back += 1
        files.last.write_bytes(whole)
    assert fallen_back > 8
    notice = (
        f"{files.last}: not a readable checkpoint: damaged or cut short; copy it again; continuing "
        "from the best weights, of epoch 1"
    )
    assert capsys.readouterr().err.count(notice) == fallen_back
    spoil(files.best, 1000, is_cut=True)
    message = r"run.pth: not a readable .*; restore it, or start again with --overwrite"
    with pytest.raises(UserError, match=message):
        load_newest(files)


def test_what_resume_and_overwrite_find(trained_copy, tmp_path):
    config = Checkpoint.load(trained_copy / "run.pth").config.model_dump()
    existing = load_config(**config | {"save_path": str(trained_copy / "run.pth")})
    missing = load_config(save_path=str(tmp_path / "nothing.pth"))

    def find(config: Config, resume: bool, overwrite: bool) -> Checkpoint | None:
        return find_checkpoint(RunFiles(config.weights_path), config, resume, overwrite)

    assert find(missing, resume=False, overwrite=False) is None
    assert find(missing, resume=True, overwrite=False) is None
    assert find(existing, resume=False, overwrite=True) is None
    found = find(existing, resume=True, overwrite=False)
    assert (found.path, found.epoch) == (trained_copy / "run.last.pth", 1)
    with pytest.raises(UserError, match=r"run.last.pth already exists; continue the run with"):
        find(existing, resume=False, overwrite=False)


def test_an_error_names_the_file_that_was_read(trained_copy, data_root, fails):
    """Where the last state is missing, the best weights."""
    (trained_copy / "run.last.pth").unlink()
    options = arguments(trained_copy, data_root, lr=1)
    fails(train.main, *options, "--resume", match="/run.pth: the run to resume had another")


# ---- The lock, and clearing ----


def test_a_locked_run_is_refused_until_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "REFRESH", 0.1)
    files = RunFiles(tmp_path / "run.pth")
    with (
        lock_run(files),
        pytest.raises(UserError, match=r"run.pth: process [0-9]+ on .+ is training this run"),
        lock_run(files),
    ):
        pass
    with lock_run(files):
        pass
    assert list(tmp_path.glob("*.pth*")) == []


def test_clearing_removes_the_run_and_nothing_else(tmp_path):
    files = RunFiles(tmp_path / "run.pth")
    results = files.results("test")
    names = ("metrics.csv", "report.html", "decision_result_fan_id_00.csv", "figures/roc.png")
    written = [files.best, files.last, files.history, files.tensorboard / "events.out.tfevents.1"]
    written.append(files.pictures / "a.wav.png")
    for folder in (results, files.results("evaluation")):
        written += [folder / name for name in names]
    others = [files.folder / "mine.txt", results / "mine.txt", tmp_path / "run.other.pth"]
    for path in (*written, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    train.clear(files)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(others)
    assert not files.results("evaluation").exists()


# ---- Weights of other programs ----


def save_as(names: Callable[[str], str], to: Path) -> dict[str, torch.Tensor]:
    """Save weights under other names; return them under those of the network."""
    weights = build_network(load_config(), CLASSES).state_dict()
    torch.save({names(name): weight for name, weight in weights.items()}, to)
    return weights


@pytest.mark.parametrize(
    "names",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"model.net.{name}",
        lambda name: name.replace("mobilefacenet.", "mobilefacenet._orig_mod."),
    ],
    ids=["parallel", "compiled", "both", "another program", "compiled in part"],
)
def test_names_of_weights_without_those_of_wrappers(tmp_path, names, capsys):
    weights = save_as(names, tmp_path / "a.pth")
    network = build_network(load_config(seed=1), CLASSES)
    Checkpoint.load(tmp_path / "a.pth").fill(network)
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    notice = capsys.readouterr().err
    before = f"notice: {tmp_path / 'a.pth'}: names of weights without prefixes: "
    assert re.fullmatch(f"{re.escape(before)}(\\S+) is read as (\\S+)\n", notice)
    assert notice.count("\n") == 1


def test_a_moving_average_of_the_weights(tmp_path):
    weights = save_as(lambda name: f"module.{name}", tmp_path / "a.pth")
    stored = torch.load(tmp_path / "a.pth") | {"n_averaged": torch.tensor(7)}
    torch.save(stored, tmp_path / "a.pth")
    network = build_network(load_config(seed=1), CLASSES)
    Checkpoint.load(tmp_path / "a.pth").fill(network)
    assert network.state_dict().keys() == weights.keys()


def test_weights_that_cannot_be_copied(tmp_path):
    weights = save_as(str, tmp_path / "a.pth")
    torch.save({name: weight.to_sparse() for name, weight in weights.items()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a.pth: weights of a kind that cannot be copied \(quant"):
        Checkpoint.load(tmp_path / "a.pth").fill(build_network(load_config(), CLASSES))
    torch.save({"n_averaged": torch.tensor(1)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="the weights of another network: none of its 0 names"):
        Checkpoint.load(tmp_path / "a.pth").fill(build_network(load_config(), CLASSES))


def test_the_name_of_a_last_state_is_no_name_for_a_run(tmp_path):
    files = RunFiles(tmp_path / "a.last.pth")
    message = "names that end in .last.pth are those of the last states of runs"
    with pytest.raises(UserError, match=message), lock_run(files):
        pass


def test_a_bare_state_dict_needs_no_notice(tmp_path, capsys):
    save_as(str, tmp_path / "a.pth")
    Checkpoint.load(tmp_path / "a.pth").fill(build_network(load_config(), CLASSES))
    assert capsys.readouterr().err == ""


def test_the_weights_of_another_network(tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "a.pth")
    checkpoint = Checkpoint.load(tmp_path / "a.pth")
    message = "a.pth: the weights of another network: none of its 2 names .such as weight. is known"
    with pytest.raises(UserError, match=message):
        checkpoint.fill(build_network(load_config(), CLASSES))


WEIGHTS = {"a.weight": torch.zeros(2)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"state_dict": WEIGHTS, "options": argparse.Namespace()},
            r"it holds a Python object \(argparse.Namespace\), which could run code and is not read"
            "; save the weights alone: torch.save",
        ),
        ({"best": np.float64(1), **WEIGHTS}, r"Python object \(numpy\._core\.multiarray\.scalar\)"),
        (torch.nn.Linear(2, 2), r"Python object \(torch.nn.modules.linear.Linear\)"),
        (
            {"epoch": 3, "weights": WEIGHTS},
            r"but it holds weights as 'weights'; save these alone: torch.save\(torch.load\('.*a.pt"
            r"h'\)\['weights'\], 'weights.pth'\)",
        ),
        ([1, 2], "neither a checkpoint of this version nor a state dict of weights; name another"),
    ],
    ids=["object", "scalar", "network", "weights inside", "list"],
)
def test_what_else_a_file_may_hold(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=f"a.pth: .*{message}"):
        Checkpoint.load(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file; copy it again"),
        (b"PK\x03\x04 and no more", "damaged or cut short; copy it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS; fetch the file"),
        (b"<html>", "another kind of file, or damaged; name a file that train.py has written"),
    ],
)
def test_files_that_torch_has_not_written(tmp_path, content, message):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match=f"a.pth: not a readable checkpoint: {message}"):
        Checkpoint.load(tmp_path / "a.pth")


def test_an_archive_of_another_kind_is_not_damaged(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    with pytest.raises(UserError, match="not a readable checkpoint: another kind of file"):
        Checkpoint.load(tmp_path / "a.npz")


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="is a folder; name a checkpoint, which is a file"):
        Checkpoint.load(tmp_path)


def test_a_run_removes_what_a_killed_one_has_left(tmp_path):
    files = RunFiles(tmp_path / "run.pth")
    left = [tmp_path / f".{file.name}.0123abcd.tmp" for file in (files.best, files.last)]
    touch(*left, tmp_path / ".run.pth.keep")
    with lock_run(files):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".run.pth.keep"}
