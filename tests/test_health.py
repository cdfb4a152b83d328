"""benchmarks/health.py: the data of its sick runs, its figure and its table, without training."""

import re
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import soundfile
from conftest import MACHINES, change_checkpoint, clips_of
from matplotlib.figure import Figure

from benchmarks import health
from checkpoint import Checkpoint, EpochResult
from utils import write_csv


def test_noise_of_one_bit_has_the_names_of_the_recordings(data_root, tmp_path):
    health.write_silent(data_root, tmp_path)
    names = [path.relative_to(data_root) for path in health.list_recordings(data_root)]
    assert [path.relative_to(tmp_path) for path in health.list_recordings(tmp_path)] == names
    samples = [soundfile.read(tmp_path / name, dtype="int16")[0] for name in names[:2]]
    assert all(set(noise) == {-1, 0, 1} for noise in samples)
    assert not np.array_equal(*samples)
    assert len(clips_of(tmp_path, "train")) == len(clips_of(data_root, "train")), "not refused"


def test_wrong_ids_stay_within_the_machine_type(data_root, tmp_path):
    for _ in range(2):  # links of an earlier call are replaced
        health.link_with_wrong_ids(data_root, tmp_path)
    for machine_type in MACHINES:
        train, linked = data_root / machine_type / "train", tmp_path / machine_type / "train"
        before = {path: path.name.split("_")[2] for path in train.iterdir()}
        after = {path.resolve(): path.name.split("_")[2] for path in linked.iterdir()}
        assert before.keys() == after.keys()
        assert Counter(before.values()) == Counter(after.values())
        assert (before != after) == (len(MACHINES[machine_type]) > 1)
    assert len(clips_of(tmp_path, "train")) == len(clips_of(data_root, "train"))
    assert len(clips_of(tmp_path, "test")) == len(clips_of(data_root, "test"))


@pytest.fixture
def output(tmp_path, trained, monkeypatch):
    """Two finished runs of the study, whose script trains and evaluates nothing."""
    runs = {name: health.RUNS[name] for name in ("healthy", "wrong_ids")}
    monkeypatch.setattr(health, "RUNS", runs)
    for number, name in enumerate(runs):
        history = [EpochResult(epoch, 1e-3, 9.0, 0.5, 8.0 + number, 0.25, 1) for epoch in (1, 2)]
        write_csv(tmp_path / name / "history.csv", pd.DataFrame(history))
        for copy in (f"{name}.pth", f"{name}.last.pth"):
            (tmp_path / copy).symlink_to(trained / "run.last.pth")
        row = {"machine_type": "average", "machine_id": "mean", "AUC": 0.9 - 0.1 * number}
        write_csv(tmp_path / name / "test" / "metrics.csv", pd.DataFrame([row]))
    return tmp_path


def test_a_run_is_a_line_of_each_panel_and_a_row(output, data_root, call, monkeypatch):
    called, drawn = [], []
    monkeypatch.setattr(health, "call", lambda *words: called.append(words))
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: save(figure, path, drawn))
    words = ("--data_root", data_root, "--output", output)
    status, text, errors = call(health.main, *words)
    assert status == 0, errors
    assert re.search(
        r"\| healthy \| 6 \| 9.00 \| 0.50 \| 8.00 \| 0.25 \| \d.\d\d \| 90.0 \|\n", text
    )
    assert re.search(r"\| wrong IDs \| 6 \| 9.00 \| 0.50 \| 9.00 \| .* \| 80.0 \|\n", text)
    assert (output / "training_health.md").read_text() in text
    (figure,) = drawn
    lines = [[list(line.get_ydata()) for line in axis.lines] for axis in figure.axes]
    assert lines == [[[y, y], [z, z]] for y, z in ((9, 9), (0.5, 0.5), (8, 9), (0.25, 0.25))]
    assert all(list(line.get_xdata()) == [3, 6] for line in figure.axes[0].lines)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["healthy", "wrong IDs"]
    scripts = [words[0] for words in called]
    assert scripts == ["train.py", "eval.py"] * 2
    assert str(data_root) in called[0]
    assert str(output / "wrong_ids") in called[2]


def save(figure, path, drawn):
    drawn.append(figure)
    path.touch()


def test_settled_statistics_are_not_those_of_the_last_steps(lively):
    last = lively / "run.last.pth"
    change_checkpoint(lively / "run.pth", last)
    before = health.validate_settled(lively / "run.pth")
    weights = Checkpoint.load(last).weights
    for name in weights:
        if name.endswith("running_mean"):
            weights[name] = weights[name] + 1
    change_checkpoint(last, weights=weights)
    assert health.validate_settled(lively / "run.pth").loss == before.loss


def test_a_folder_without_the_set_is_an_error(tmp_path, fails):
    words = ("--data_root", tmp_path, "--output", tmp_path)
    fails(health.main, *words, match=r"no recordings; write them with datasets/synthesize\.py")
