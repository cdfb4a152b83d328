"""Checkpoint files: written whole, read safely, found again; the lock of a run and what clears it."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from conftest import MACHINES

from checkpoint import (
    RunFiles,
    build_network,
    clear_run,
    find_state,
    load_checkpoint,
    load_model,
    load_newest,
    lock_run,
    save_checkpoint,
    take_weights,
)
from config import load_config, make_config
from utils import UserError

# ---- Writing ----


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch, fails):
    path = tmp_path / "a.pth"
    config = load_config().model_dump()
    weights = {"a": torch.zeros(1)}
    save_checkpoint({"model": weights, "config": config, "epoch": 1}, path)

    def no_space(self, data):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", no_space)
    fails(
        lambda: save_checkpoint({"model": weights, "config": config, "epoch": 2}, path),
        match="No space left on device",
    )
    assert load_checkpoint(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


# ---- Reading ----


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
        with pytest.raises(
            UserError, match="neither a checkpoint of this version nor a state dict"
        ):
            load_checkpoint(tmp_path / name)


def test_a_checkpoint_whose_configuration_was_spoilt_is_refused(trained_copy):
    state = load_checkpoint(trained_copy / "run.pth")
    state["config"]["mode"] = "arcmx"
    torch.save(state, trained_copy / "run.pth")
    with pytest.raises(UserError, match=r"run.pth: mode: 'arcmx' is not one of"):
        load_model(trained_copy / "run.pth", load_config(), {})


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
    state = load_checkpoint(trained / "run.pth")
    assert make_config(("checkpoint", state["config"])).model_dump() == state["config"]
    assert np.isfinite(state["best_loss"])


def test_published_weights_load_into_the_published_configuration(tmp_path, capsys):
    torch.save(reference.parameters(), tmp_path / "published.pth")
    network = load_model(tmp_path / "published.pth", load_config(), {}).network
    assert (
        "published.pth is a bare state dict: machines, classes, mode, input"
        in capsys.readouterr().err
    )
    assert all(
        torch.equal(network.state_dict()[name], value)
        for name, value in reference.parameters().items()
    )


def test_windows_and_channel_are_those_of_the_training_unless_given(trained_copy):
    path = trained_copy / "run.pth"
    state = load_checkpoint(path)
    state["config"] |= {"window": "all", "channel": 1}
    save_checkpoint(state, path)
    config = load_model(path, load_config(), {}).config
    assert (config.window, config.channel, config.hop) == ("all", 1, "auto")
    config = load_model(path, load_config(channel=0), {"channel": 0}).config
    assert (config.window, config.channel) == ("all", 0)


def test_any_table_of_a_checkpoint_is_what_the_folders_had(trained):
    given = {"machines": "auto"}
    assert load_model(trained / "run.pth", load_config(**given), given).config.machines == MACHINES
    given = {"machines": {"fan": [0, 1]}}
    with pytest.raises(UserError, match=r"command line: machines .* is not the checkpoint's"):
        load_model(trained / "run.pth", load_config(**given), given)


def test_bare_weights_take_the_machines_of_the_folders(trained, data_root, tmp_path):
    torch.save(load_checkpoint(trained / "run.pth")["model"], tmp_path / "bare.pth")
    config = load_config(machines="auto", data_root=str(data_root))
    assert load_model(tmp_path / "bare.pth", config, {}).config.machines == MACHINES


def test_a_training_begins_with_all_given_weights_but_the_centres(tmp_path, capsys):
    """Of the published weights, for other machines."""
    network, published = build_network(load_config(machines=MACHINES)), reference.parameters()
    own = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    take_weights(network, published, tmp_path / "published.pth")
    centres = {"arcface.weight", "mobilefacenet.fc_out.weight", "mobilefacenet.fc_out.bias"}
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, own[name] if name in centres else published[name]), name
    said = "notice: init_from: the weights of {} are taken, but for the class centres (arcface.weight, "
    assert said.format(tmp_path / "published.pth") in capsys.readouterr().err
    network = build_network(load_config(machines=MACHINES, input="sgram"))
    with pytest.raises(
        UserError,
        match=r"published.pth does not fit the configuration \(input\): mobilefacenet.conv1",
    ):
        take_weights(network, published, tmp_path / "published.pth")


def test_initial_weights_depend_on_the_seed_alone():
    one, other, another = (build_network(load_config(seed=seed)).state_dict() for seed in (1, 1, 2))
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
    """Truncated at, or with a byte flipped at, seeded random offsets: never silently another state."""
    files = RunFiles(trained_copy / "run.pth")
    best = load_checkpoint(files.best)
    save_checkpoint(best | {"epoch": 2}, files.last)
    whole, rng, fallen_back = files.last.read_bytes(), random.Random(11), 0
    for number in range(12):
        spoil(files.last, rng.randrange(len(whole)), is_cut=number % 2 == 0)
        state = load_newest(files)
        if state["epoch"] == 2:  # the byte was one between the members, which nobody reads
            assert all(
                torch.equal(state["model"][name], value) for name, value in best["model"].items()
            )
            assert str(state["optimizer"]) == str(best["optimizer"])
        else:
            assert state["epoch"] == 1
            fallen_back += 1
        files.last.write_bytes(whole)
    assert fallen_back > 8
    said = "not a readable checkpoint (it is something else, or damaged); continuing from the best weights, of epoch 1"
    assert capsys.readouterr().err.count(f"{files.last}: {said}") == fallen_back
    spoil(files.best, 1000, is_cut=True)
    with pytest.raises(
        UserError,
        match=r"run.pth: not a readable .*; bring it back, or start again with --overwrite",
    ):
        load_newest(files)


def test_what_resume_and_overwrite_find(trained_copy, tmp_path):
    files, nothing = RunFiles(trained_copy / "run.pth"), RunFiles(tmp_path / "nothing.pth")
    assert find_state(nothing, resume=False, overwrite=False) is None
    assert find_state(nothing, resume=True, overwrite=False) is None
    assert find_state(files, resume=False, overwrite=True) is None
    assert find_state(files, resume=True, overwrite=False)["epoch"] == 1
    with pytest.raises(UserError, match="is there"):
        find_state(files, resume=False, overwrite=False)
    with pytest.raises(UserError, match="give one of them"):
        find_state(nothing, resume=True, overwrite=True)


# ---- The lock, and clearing ----


def test_a_locked_run_is_refused_until_it_ends(tmp_path):
    files = RunFiles(tmp_path / "run.pth")
    with (
        lock_run(files),
        pytest.raises(UserError, match=r"run.pth: another process is training this run"),
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
    written += [
        folder / name for name in names for folder in (results, files.results("evaluation"))
    ]
    others = [files.folder / "mine.txt", results / "mine.txt", tmp_path / "run.other.pth"]
    for path in (*written, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    clear_run(files)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(others)
    assert not files.results("evaluation").exists()
