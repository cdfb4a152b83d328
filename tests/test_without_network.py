"""score.py --normal: one machine, without a network."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_bank, tone, write_clip

import score as score_script
from checkpoint import Checkpoint
from classes import Classes
from config import load_config
from dataloader import ClipSet
from evaluation.scores import Outputs
from evaluation.thresholds import fit_thresholds
from evaluation.without_network import load_folder, score_against_others
from inference import Model
from recordings import MACHINE_COLUMNS

CPU = torch.device("cpu")
MACHINE = ("press", "a")
CLASSES = Classes.from_machines({"press": ["a"]})


def hum(seed: int, seconds: float = 10.0) -> np.ndarray:
    """The sound of one machine: a tone whose level varies, and noise."""
    rng = np.random.default_rng(seed)
    return rng.uniform(0.8, 1.2) * tone(0, seconds) + rng.normal(0, 0.001, round(seconds * 16_000))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve normal recordings in two folders, one of 25 s, and an anomalous one."""
    root = tmp_path_factory.mktemp("normal") / "press3"
    for number in range(11):
        write_clip(root / f"{number:02d}.wav", hum(number))
    write_clip(root / "tuesday" / "long.wav", hum(11, 25.0))
    write_clip(root / "anomaly_id_00_1.wav", tone(1))
    return root


def score(call, *words):
    return call(score_script.main, *words, "--device", "cpu")


def test_a_folder_of_normal_recordings_takes_the_place_of_a_checkpoint(folder, tmp_path, call):
    normal = write_clip(tmp_path / "normal.wav", hum(50))
    noise = np.random.default_rng(0).normal(0, 0.003, 16_000 * 4)
    samples = hum(51)
    samples[48_000:112_000] += np.convolve(noise, [1, -1], mode="same")
    faulty = write_clip(tmp_path / "faulty.wav", samples)
    status, output, errors = score(call, "--normal", folder, normal, faulty)
    assert status == 0
    assert f"notice: {folder}: skipped 1 files that are named anomalous\n" in errors
    lines = output.splitlines()
    file, machine, value, threshold, decision = lines[0].split("\t")
    assert (file, machine, decision) == (str(normal), "machine press3", "normal")
    assert float(value) <= float(threshold)
    assert lines[1].split("; ")[0].startswith("\tno band unusual")
    assert lines[1].split("; ")[1].startswith("level as usual (")
    assert lines[2].split("\t")[4] == "anomalous"
    assert " kHz " in lines[3]
    assert " above normal, from 3 to 7 s; " in lines[3]
    assert "; most similar normal recording: " in lines[3]
    names = ("--machine_type", "press", "--machine_id", "3")
    _, output, _ = score(call, "--normal", folder, faulty, *names, "--json")
    (row,) = json.loads(output)
    assert (row["machine_type"], row["machine_id"]) == ("press", 3)
    assert f"{row['score']:.6g}" == lines[2].split("\t")[2]
    difference = row["difference"]
    assert difference["text"] == lines[3].strip()
    assert difference["band"]["is_unusual"]
    assert (difference["band"]["start"], difference["band"]["end"]) == (3, 7)
    assert difference["similar"]["file"].startswith("press3/")
    assert (folder.parent / difference["similar"]["file"]).is_file()


def test_a_gain_is_said(folder, tmp_path, call):
    clip = write_clip(tmp_path / "a.wav", 2 * hum(52))
    _, output, _ = score(call, "--normal", folder, clip)
    assert (
        "; the whole 6 dB louder than normal (has microphone, gain or place changed?); " in output
    )


def test_each_normal_recording_is_scored_against_the_others(folder, tmp_path):
    """As a new recording is against a folder without it."""
    config = load_config(scoring="spectrum")
    model = load_folder(folder, MACHINE, "all", config, CPU)
    held_out = model.checkpoint.held_out
    long = f"{folder.name}/tuesday/long.wav"
    names = [f"{folder.name}/{number:02d}.wav" for number in range(11)]
    assert held_out.files == [*names, *[long] * 3]
    for left_out, name in ((4, "04.wav"), (11, "tuesday/long.wav")):
        other = tmp_path / str(left_out)
        for path in folder.rglob("*.wav"):
            if path != folder / name and not path.name.startswith("anomaly"):
                (other / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
                (other / path.relative_to(folder)).symlink_to(path)
        without = load_folder(other, MACHINE, "all", config, CPU)
        rows = torch.tensor([file == f"{folder.name}/{name}" for file in held_out.files])
        spectrum = model.checkpoint.bank.clips.spectrum[rows]
        nothing = torch.zeros(int(rows.sum()), 0)
        scorer = without.scorer("spectrum", config.neighbours)
        scores = scorer.score_against_class(Outputs(nothing, nothing, spectrum), 0)
        assert torch.allclose(held_out.scores[rows], scores, rtol=2e-3)


@pytest.mark.parametrize("n_windows", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_thresholds_hold_the_rate_of_false_alarms(n_windows):
    """Over 100 folders of 19 recordings with normally distributed spectra, which vary from one
    recording to another more than from window to window.
    """
    rng = np.random.default_rng(0)
    n_recordings, n_new, rates = 19, 20, []
    recordings = pd.DataFrame({"path": [Path("a.wav")] * n_recordings, "label": 0})
    recordings[MACHINE_COLUMNS] = MACHINE
    clips = ClipSet(recordings, 1, starts=[[0.0] * n_windows] * n_recordings)
    for _ in range(100):
        spectra = rng.normal(size=(n_recordings + n_new, 1, 6))
        spectra = spectra + 0.5 * rng.normal(size=(n_recordings + n_new, n_windows, 6))
        spectra = torch.from_numpy(spectra)
        known, new = (x.flatten(0, 1) for x in (spectra[:n_recordings], spectra[n_recordings:]))
        empty = torch.zeros(len(known), 0)
        outputs = Outputs(empty, empty, known)
        bank = make_bank(outputs, clips.labels)
        model = Model(None, load_config(), CLASSES, Checkpoint(Path("a"), {}, bank=bank))
        normal = pd.DataFrame({"recording": clips.clip_recordings, "origin": "normal"})
        normal[MACHINE_COLUMNS] = MACHINE
        normal["score"] = score_against_others(model, outputs, clips, neighbours=2).numpy()
        threshold = fit_thresholds([MACHINE], normal, "conformal", 0.2)["threshold"].item()
        empty = torch.zeros(len(new), 0)
        scores = model.scorer("spectrum", 2).score_against_class(Outputs(empty, empty, new), 0)
        rates.append(float((scores > threshold).double().mean()))
    error = np.std(rates) / np.sqrt(len(rates))
    assert np.mean(rates) < 0.2 + 2 * error
    assert np.mean(rates) > 0.1, "and the threshold is not far too high"


def test_what_a_folder_has_too_little_of_is_said(tmp_path, call, fails):
    empty = tmp_path / "empty"
    empty.mkdir()
    clip = write_clip(tmp_path / "a.wav", hum(0))
    fails(score_script.main, "--normal", empty, clip, match="empty: no normal recordings")
    fails(score_script.main, "--normal", tmp_path / "no", clip, match="no: not a folder")
    few = tmp_path / "few"
    for number in range(3):
        write_clip(few / f"{number}.wav", hum(number))
    status, output, errors = score(call, "--normal", few, clip)
    assert status == 0
    assert output.splitlines()[0].split("\t")[3:] == ["-", "-"]
    remedy = f"machine few (3); add recordings to {few}, or ask for another rate"
    assert remedy in errors
    status, output, _ = score(call, "--normal", few, clip, "--threshold", "3")
    assert output.splitlines()[0].split("\t")[4] == "normal"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "the recordings to score are missing; name them beside --normal"),
        (("a.pth", "a.wav"), "a.pth: --normal needs no checkpoint; leave it out"),
        (("a.wav", "--calibrate", "b"), "--calibrate needs a checkpoint; with --normal, add the"),
        (("a.wav", "--scoring", "nearest"), "scoring has no effect with --normal"),
        (("a.wav", "--mode", "arcface"), "mode has no effect with --normal"),
    ],
)
def test_options_without_effect_are_refused(words, message, fails):
    fails(score_script.main, "--normal", "normal", *words, match=message)


def test_pictures_go_to_check_points(folder, tmp_path, call, monkeypatch):
    clip = write_clip(tmp_path / "a.wav", hum(53))
    monkeypatch.chdir(tmp_path)
    _, output, _ = score(call, "--normal", folder, clip, "--plots")
    assert output.splitlines()[-1] == "pictures: check_points/press3/pictures"
    name = f"press3_{tmp_path.name}_a.wav.png"
    assert Path(f"check_points/press3/pictures/{name}").is_file()
