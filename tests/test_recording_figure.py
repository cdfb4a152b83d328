"""The figure of a recording that was scored."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tone, write_clip
from test_figures import collect_figures

from audio import Windows, check_recording
from evaluation.recording_figure import MAX_COLUMNS, draw_recording
from model.tastgram import mel_frequencies

N_SECONDS = 133
DIFFERENCE = {
    "text": "1 to 2 kHz 9 dB above normal",
    "similar": {"file": "fan/train/b.wav", "start": 10.0},
    "named": "band",
    "level": {"decibels": 0.1, "is_unusual": False},
    "fluctuation": {"decibels": 0.1, "is_unusual": False},
    "band": {
        "decibels": 9.0, "is_unusual": True, "low": 1000.0, "high": 2000.0, "start": 23.0,
        "end": 26.0,
    },
}  # fmt: skip


def describe(path: Path, scores: list[float], **changes) -> dict[str, Any]:
    """Describe a recording as `score_recordings` does: windows above 3.5 are anomalous."""
    windows = []
    for start, score in zip(check_recording(path, Windows(hop=5)).starts, scores, strict=True):
        decision = "anomalous" if score > 3.5 else "normal"
        windows.append({"start": start, "score": score, "decision": decision})
    return {
        "file": str(path),
        "machine_type": "fan",
        "machine_id": "b",
        "score": 3.1,
        "threshold": 3.5,
        "decision": "normal",
        "n_windows": len(windows),
        "worst": max(windows, key=lambda window: window["score"]),
        "windows": windows,
        "alarms": [],
        "difference": None,
    } | changes


@pytest.fixture
def long_row(tmp_path) -> dict[str, Any]:
    """A recording that is loud from second 20 to 30."""
    samples = np.concatenate([tone(0, 20.0), 10 * tone(0, 10.0), tone(0, 103.0)])
    path = write_clip(tmp_path / "a.wav", samples)
    scores = [3.0] * 26
    scores[4] = 4.0
    return describe(path, scores, alarms=[{"start": 20.0, "end": 40.0, "score": 4.0}])


def draw(patch: pytest.MonkeyPatch, row: dict[str, Any], root: Path, kind: str = "published"):
    """Draw a recording; `root` has normal ones. Returns the figure, and its axes by label."""
    written = collect_figures(patch)
    draw_recording(row, kind, 0, root, root / "picture.png")
    (drawn,) = written
    return drawn, {axis.get_label(): axis for axis in drawn.axes}


def test_the_score_of_each_window_is_drawn(long_row, tmp_path, monkeypatch):
    drawn, axes = draw(monkeypatch, long_row, tmp_path)
    axis = axes["scores"]
    windows = long_row["windows"]
    line, normal, anomalous, threshold = axis.lines
    middles = [(window["start"] + 5) / 60 for window in windows]
    assert list(line.get_xdata()) == pytest.approx(middles)
    assert list(line.get_ydata()) == [window["score"] for window in windows]
    assert len(normal.get_xdata()) == len(windows) - 1
    assert anomalous.get_ydata() == [4.0]
    assert set(threshold.get_ydata()) == {3.5}
    (span,) = axis.patches
    ends = span.get_x(), span.get_x() + span.get_width()
    assert ends == pytest.approx((20 / 60, 40 / 60))
    labels = [text.get_text() for text in axes["beside scores"].get_legend().get_texts()]
    assert labels == ["alarm", "normal", "anomalous", "threshold"]
    assert drawn.get_suptitle() == "a.wav: fan b, score 3.1 (threshold 3.5), normal"


def test_the_label_of_the_scores_lies_within_the_figure(long_row, tmp_path, monkeypatch):
    """The longest one, of three lines, and beside no other text."""
    drawn, axes = draw(monkeypatch, long_row, tmp_path, "spectrum")
    boxes = [axes[name].yaxis.label.get_window_extent() for name in ("scores", "whole")]
    assert boxes[0].y0 > boxes[1].y1
    assert boxes[0].y1 < drawn.bbox.height
    assert boxes[0].x0 >= 0


def test_the_log_mel_of_the_whole_recording_is_drawn(long_row, tmp_path, monkeypatch):
    _, axes = draw(monkeypatch, long_row, tmp_path)
    axis = axes["whole"]
    log_mel = axis.images[0].get_array()
    assert log_mel.shape == (128, MAX_COLUMNS)
    level = log_mel.mean(axis=0)
    seconds = np.arange(len(level)) / len(level) * N_SECONDS
    is_loud = (seconds > 20.1) & (seconds < 29.8)
    is_soft = (seconds < 19.8) | (seconds > 30.2)
    assert level[is_loud].min() > level[is_soft].max() + 5, "dB"
    assert axis.get_xlabel() == "time (min)"
    ticks = dict(
        zip([text.get_text() for text in axis.get_yticklabels()], axis.get_yticks(), strict=True)
    )
    assert mel_frequencies()[round(ticks["2"] - 0.5)] == pytest.approx(2000, abs=40)


def test_without_a_threshold_there_are_no_decisions(long_row, tmp_path, monkeypatch):
    windows = [window | {"decision": None} for window in long_row["windows"]]
    row = long_row | {"threshold": None, "decision": None, "windows": windows, "alarms": None}
    drawn, axes = draw(monkeypatch, row, tmp_path, "angle")
    assert [len(line.get_xdata()) for line in axes["scores"].lines] == [len(windows)] * 2
    assert axes["beside scores"].get_legend().get_texts() == []
    assert drawn.get_suptitle() == "a.wav: fan b, score 3.1"


def test_the_window_with_the_highest_score_beside_a_normal_clip(long_row, tmp_path, monkeypatch):
    """The normal clip lies in a longer file; it is equal to the window, and 20 dB quieter."""
    samples = np.concatenate([tone(1), tone(0, 10.0)])
    write_clip(tmp_path / "fan" / "train" / "b.wav", samples)
    drawn, axes = draw(monkeypatch, long_row | {"difference": DIFFERENCE}, tmp_path)
    title = "window with the highest score, from 0:00:20"
    assert axes["worst"].get_title() == title
    assert axes["normal"].get_title() == "most similar normal recording: fan/train/b.wav"
    assert axes["worst"].images[0].get_extent() == [20, 30, 0, 128]
    assert axes["normal"].images[0].get_extent() == [10, 20, 0, 128]
    difference = np.asarray(axes["difference"].images[0].get_array())
    assert np.median(difference) == pytest.approx(20, abs=1)
    over_time, over_frequency = axes["beside difference"].lines[0], axes["time"].lines[0]
    assert over_time.get_xdata() == pytest.approx(difference.mean(axis=1))
    assert over_frequency.get_ydata() == pytest.approx(difference.mean(axis=0))
    (mark,) = axes["difference"].patches
    assert (mark.get_x(), mark.get_width(), mark.get_linestyle()) == (23, 3, "-")
    rows = mark.get_y(), mark.get_y() + mark.get_height()
    assert mel_frequencies()[[round(row - 0.5) for row in rows]] == pytest.approx(
        [1000, 2000], abs=40
    )
    assert drawn.get_suptitle().splitlines()[1] == DIFFERENCE["text"]


def test_a_short_recording_has_no_timeline(tmp_path, monkeypatch, capsys):
    path = write_clip(tmp_path / "a.wav", tone(0))
    row = describe(path, [4.0], difference=DIFFERENCE)
    _, axes = draw(monkeypatch, row, tmp_path)
    assert set(axes) - {"<colorbar>"} == {"worst", "beside worst"}
    assert axes["worst"].get_title() == "this recording"
    missing = tmp_path / "fan" / "train" / "b.wav"
    assert f"{missing}: no such recording" in capsys.readouterr().err
