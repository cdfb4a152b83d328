"""Small recordings, a small trained model, and a way to call the scripts as a user would."""

import re
import shutil
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import reference
import soundfile
import torch

from checkpoint import Checkpoint, HeldOut
from classes import Classes
from config import load_config, make_config, parse_yaml
from dataloader import ClipSet, load_clips
from evaluation.bank import Bank
from evaluation.scores import Outputs, StoredClips
from recordings import find_classes
from train import train
from utils import run_script

MACHINES = {"fan": [0, 2], "valve": [1]}
CLASSES = Classes.from_machines({"fan": ["00", "02"], "valve": ["01"]})


def tone(seed: int, seconds: float = 10.0, rate: int = 16_000) -> np.ndarray:
    """A tone with harmonics and noise at the level of real recordings, float64."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    pitch = rng.uniform(60, 600)
    harmonics = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in (1, 2, 3))
    return 0.005 * harmonics + rng.normal(0, 0.003, len(time))


def write_clip(
    path: Path, samples: np.ndarray, rate: int = 16_000, subtype: str = "PCM_16"
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


def make_bank(outputs: Outputs, labels: torch.Tensor) -> Bank:
    """Keep outputs for training clips whose files do not matter."""
    clips = StoredClips.from_outputs(outputs, labels)
    return Bank(clips, [""] * len(labels), torch.zeros(len(labels)), [])


def touch(*paths: Path) -> None:
    """Make empty files, with their folders."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def write_set(root: Path, machines=MACHINES, train_clips: int = 4, test_clips: int = 2) -> Path:
    """Write a data folder in the published layout; its clips last one second."""
    seed = 0
    for machine_type, ids in machines.items():
        for machine_id in ids:
            for split, condition, count in (
                ("train", "normal", train_clips),
                ("test", "normal", test_clips),
                ("test", "anomaly", test_clips),
            ):
                for index in range(count):
                    name = f"{condition}_id_{machine_id:02d}_{index:08d}.wav"
                    write_clip(root / machine_type / split / name, tone(seed, seconds=1.0))
                    seed += 1
    return root


def write_sections(root: Path, train_clips: int = 4) -> Path:
    """Write a data folder in the layout of 2023: two machine types with one section each.

    A section has two attributes in the source domain and one in the target domain. Each attribute
    has a normal and an anomalous test clip.
    """
    for seed, machine_type in enumerate(("bearing", "fan")):
        folder = root / machine_type
        for number in range(train_clips):
            for domain, speed in (("source", 1 + number % 2), ("target", 3)):
                name = f"section_00_{domain}_train_normal_{number:04d}_vel_{speed}.wav"
                samples = tone(100 * seed + 10 * speed + number, seconds=1.0)
                write_clip(folder / "train" / name, samples)
        for speed, domain in ((1, "source"), (2, "source"), (3, "target")):
            for condition in ("normal", "anomaly"):
                name = f"section_00_{domain}_test_{condition}_{speed:04d}_vel_{speed}.wav"
                samples = tone(100 * seed + 10 * speed + len(condition), seconds=1.0)
                write_clip(folder / "test" / name, samples)
    return root


def clips_of(data_root: Path, split: str = "train", **keys) -> ClipSet:
    """Load the clips of a split; `keys` overrides the configuration."""
    config = load_config(**{"data_root": str(data_root), "machines": MACHINES} | keys)
    return load_clips(config, find_classes(config), split, config.windows(split))


def clips_in_memory(samples: torch.Tensor, labels: torch.Tensor) -> ClipSet:
    """Return clips of no recordings: samples int16 `(n, T)`, labels `(n,)`."""
    file = Path("datasets/fan/train/normal_id_00_0.wav")  # in the folder of config.yaml
    table = pd.DataFrame({"path": file, "machine_type": "fan", "label": labels.tolist()})
    clips = ClipSet(table, num_workers=1)
    clips.samples = samples
    return clips


def copy_test_clips(data_root: Path, root: Path, machines=MACHINES) -> None:
    """Copy a data folder without its training clips."""
    for machine_type in machines:
        shutil.copytree(data_root / machine_type / "test", root / machine_type / "test")


def change_checkpoint(path: Path, to: Path | None = None, keys=(), **fields) -> Checkpoint:
    """Replace fields of a checkpoint file, and keys of the configuration in it, in place or in a
    copy `to`; return the checkpoint as it was before.
    """
    before = Checkpoint.load(path)
    if keys:
        fields["config"] = make_config((str(path), before.config.model_dump() | keys))
    replace(before, **fields).save(to or path)
    return before


def remove_bank(path: Path) -> Checkpoint:
    """Remove the embeddings from a checkpoint file; return the checkpoint as it was before."""
    held_out = replace(Checkpoint.load(path).held_out, embedding=None)
    return change_checkpoint(path, bank=None, held_out=held_out)


def make_lively(folder: Path) -> None:
    """Give run.pth weights that tell clips apart, and held-out scores of every machine.

    One epoch on a few clips does not give such weights. The scores of fan 02 are too few for a
    threshold from them alone.
    """
    rng = np.random.default_rng(0)
    labels, scores = [], []
    for label, (shape, scale, count) in enumerate(((20, 1, 25), (20, 1, 5), (45, 0.43, 30))):
        labels += [label] * count
        scores += rng.gamma(shape, scale, count).tolist()
    path = folder / "run.pth"
    shapes = Checkpoint.load(path).weights
    weights = reference.parameters()
    for name, value in weights.items():
        if value.ndim:  # the heads have three classes here
            weights[name] = value[: len(shapes[name])]
    files = [f"held_out/{number:02d}.wav" for number in range(len(labels))]
    held_out = HeldOut(files, torch.tensor(labels), torch.tensor(scores, dtype=torch.float64))
    change_checkpoint(path, weights=weights, held_out=held_out, bank=None)


def arguments(folder: Path, data_root: Path, **overrides) -> list[str]:
    """Options of a tiny run that keeps all its files in `folder`."""
    options = {
        "data_root": data_root,
        "save_path": folder / "run.pth",
        "machines": MACHINES,
        "epoch": 1,
        "batch_size": 4,
        "device": "cpu",
        "tensorboard": "false",
    } | overrides
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def count_pairs(normal: list[float], anomalous: list[float]) -> Fraction:
    """Return the AUC: the share of pairs whose anomalous clip scores higher; a tie counts half."""
    halves = sum(2 * (a > n) + (a == n) for a in anomalous for n in normal)
    return Fraction(halves, 2 * len(normal) * len(anomalous))


def count_first_pairs(normal: list[float], anomalous: list[float]) -> Fraction:
    """Return the pAUC: the standardised area up to a false positive rate of 0.1.

    The ROC curve is linear between two thresholds.
    """
    limit, area, x0, y0 = Fraction(1, 10), Fraction(0), Fraction(0), Fraction(0)
    for threshold in sorted({*normal, *anomalous}, reverse=True):
        x1 = Fraction(sum(n >= threshold for n in normal), len(normal))
        y1 = Fraction(sum(a >= threshold for a in anomalous), len(anomalous))
        end = min(x1, limit)
        if end > x0:
            area += (end - x0) * (y0 + (y0 + (y1 - y0) * (end - x0) / (x1 - x0))) / 2
        x0, y0 = x1, y1
    chance = limit**2 / 2
    return (1 + (area - chance) / (limit - chance)) / 2


def train_in(folder: Path, data_root: Path, **overrides) -> None:
    """Train with the options of `arguments`."""
    words = iter(arguments(folder, data_root, **overrides))
    options = {option.removeprefix("--"): value for option, value in zip(words, words, strict=True)}
    paths = {name: options.pop(name) for name in ("data_root", "save_path")}
    keys = {name: parse_yaml(value, name) for name, value in options.items()}
    train(load_config(**paths, **keys))


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("data"))


@pytest.fixture
def call(monkeypatch, capfd):
    """Call a script's `main` in this process; returns exit status, standard output and error."""

    def call_script(main, *words: str):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            run_script(main)
        output, errors = capfd.readouterr()
        return end.value.code, output, errors

    return call_script


@pytest.fixture
def fails(call):
    """Call a script that must end in one line on standard error that matches, and status 2."""

    def call_failing(main, *words: str, match: str) -> str:
        status, _, errors = call(main, *words)
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert status == 2
        assert len(lines) == 1, errors
        assert errors.splitlines()[-1] == lines[0], "the error is the last line"
        assert "Traceback" not in errors
        assert re.search(match, lines[0]), lines[0]
        return errors

    return call_failing


@pytest.fixture
def trained_copy(trained, tmp_path) -> Path:
    """A copy of the tiny run that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "trained"))


@pytest.fixture(scope="session")
def lively_run(trained, tmp_path_factory) -> Path:
    """The tiny run with weights that tell clips apart, and held-out scores of every machine."""
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("lively") / "trained"))
    make_lively(folder)
    return folder


@pytest.fixture
def lively(lively_run, tmp_path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(lively_run, tmp_path / "trained"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, data_root) -> Path:
    """Folder of a finished tiny run: `run.pth`, `run.last.pth`, `run/`."""
    folder = tmp_path_factory.mktemp("trained")
    train_in(folder, data_root)
    return folder
