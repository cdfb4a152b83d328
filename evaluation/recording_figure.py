"""The figure of a recording that was scored: the scores of its windows, and the window with the
highest score beside the most similar normal clip.
"""

import functools
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from alarms import format_time
from audio import SAMPLE_RATE, SECONDS
from evaluation.figures import (
    BLUE,
    CONDITIONS,
    PAGE,
    RED,
    draw_image,
    escape,
    figure,
    read_samples,
    set_frequencies,
)
from evaluation.scores import KINDS
from model import FrontEnd
from model.tastgram import HOP_LENGTH, N_FRAMES, N_MELS, mel_frequencies
from names import UNLABELLED
from utils import notice

# Heights in inches
HEIGHTS = {"scores": 1.5, "whole": 1.2, "worst": 1.3, "normal": 1.3, "difference": 1.3, "time": 0.9}
UNIT_LENGTH = 24  # characters in a line beside the scores
FRAME_TIMES = np.arange(N_FRAMES) * HOP_LENGTH / SAMPLE_RATE  # seconds
LEAST_RANGE = 6  # dB; smaller differences are pale
# Columns of the log-mel of a whole recording. Each has two frames or more.
MAX_COLUMNS = 1440
COLUMNS_PER_SECOND = 15


def draw_recording(
    row: Mapping[str, Any], kind: str, channel: int, normal_root: Path, path: Path
) -> None:
    """Draw a recording: of several windows the scores, above the log-mel; then the window with the
    highest score. If the most similar normal clip is in the folder `normal_root`, it follows, with
    the difference of both and the means of the difference over time and over frequency.

    `row` is as `score_recordings` returns it, `kind` the kind of its scores.
    """
    has_windows = row["n_windows"] > 1
    worst = read_log_mel(Path(row["file"]), row["worst"]["start"], channel)
    normal = read_similar(row, channel, normal_root)
    names = ["scores", "whole"] if has_windows else []
    names += ["worst"] if normal is None else ["worst", "normal", "difference", "time"]
    heights = [HEIGHTS[name] for name in names]
    with figure(path, PAGE, sum(heights) + 0.5) as drawn:
        layout = [[name, f"beside {name}"] for name in names]
        axes: dict[str, Axes] = drawn.subplot_mosaic(
            layout, height_ratios=heights, width_ratios=[5, 1]
        )
        for name in ("scores", "whole", "time"):
            if name in names:
                axes[f"beside {name}"].set_axis_off()
        if has_windows:
            draw_timeline(axes["scores"], axes["whole"], row, kind, channel)
            legend = axes["scores"].get_legend_handles_labels()
            axes["beside scores"].legend(*legend, loc="center left")
        draw_clips(drawn, axes, row, worst, normal)
        drawn.suptitle(escape(name_recording(row)), fontsize=8)


def name_recording(row: Mapping[str, Any]) -> str:
    """Return the title of a figure, and below it the difference in words."""
    title = f"{Path(row['file']).name}: {row['machine_type']} {row['machine_id']}"
    title += f", score {row['score']:.3g}"
    if row["threshold"] is not None:
        title += f" (threshold {row['threshold']:.3g}), {row['decision']}"
    if row["difference"]:
        title += "\n" + row["difference"]["text"].replace("; ", "\n")
    return title


# ---- A clip and the most similar normal one ----


@torch.no_grad()
def read_log_mel(path: Path, start: float, channel: int) -> np.ndarray:
    """Compute the log-mel `(M, F)` in dB of the clip that starts at a second of a recording."""
    return make_front_end()(read_samples(path, start, channel))["log_mel"][0, 0].numpy()


@functools.cache
def make_front_end() -> FrontEnd:
    """Make the front end once: a recording of an hour has hundreds of clips."""
    return FrontEnd(["sgram"])


def read_similar(row: Mapping[str, Any], channel: int, normal_root: Path) -> np.ndarray | None:
    """Compute the log-mel of the most similar normal clip; None if it is not known, or its file not
    in `normal_root`.
    """
    if row["difference"] is None:
        return None
    similar = row["difference"]["similar"]
    path = normal_root / similar["file"]
    if not path.is_file():
        notice(f"{path}: no such recording, so figures lack the most similar normal one")
        return None
    return read_log_mel(path, similar["start"], channel)


def draw_clips(
    drawn: Figure,
    axes: Mapping[str, Axes],
    row: Mapping[str, Any],
    worst: np.ndarray,
    normal: np.ndarray | None,
) -> None:
    """Draw the clip with the highest score, and the normal clip beside it; both `(M, F)`."""
    clips = {"worst": (worst, row["worst"]["start"], RED)}
    if normal is not None:
        clips["normal"] = (normal, row["difference"]["similar"]["start"], BLUE)
    values = [clip for clip, _, _ in clips.values()]
    scale = {"vmin": np.percentile(values, 1), "vmax": np.max(values)}
    for name, (clip, start, colour) in clips.items():
        shown = draw_image(axes[name], clip, (start, start + SECONDS), **scale)
        set_frequencies(axes[name])
        draw_spectrum(axes[f"beside {name}"], clip, colour)
    sides = [axes[f"beside {name}"] for name in clips]
    for side in sides:
        side.set_xlim(min(clip.mean(axis=1).min() for clip in values) - 2, scale["vmax"])
    drawn.colorbar(shown, ax=sides, label="dB")
    title = "this recording"
    if row["n_windows"] > 1:
        title = f"window with the highest score, from {format_time(row['worst']['start'])}"
    axes["worst"].set_title(title)
    if normal is not None:
        file = row["difference"]["similar"]["file"]
        axes["normal"].set_title(escape(f"most similar normal recording: {file}"))
        draw_difference(drawn, axes, row, worst - normal)
    if row["difference"]:
        mark(axes["worst"], row["difference"])


def draw_difference(
    drawn: Figure, axes: Mapping[str, Axes], row: Mapping[str, Any], difference: np.ndarray
) -> None:
    """Draw the difference of two clips `(M, F)` in dB, with its means over time and frequency."""
    axis, below, beside = axes["difference"], axes["time"], axes["beside difference"]
    start = row["worst"]["start"]
    span = (start, start + SECONDS)
    largest = max(LEAST_RANGE, np.percentile(np.abs(difference), 99))
    style = {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}
    shown = draw_image(axis, difference, span, **style)
    axis.set_title("difference between both: red is louder than this normal recording")
    set_frequencies(axis)
    drawn.colorbar(shown, ax=beside, label="dB")
    mark(axis, row["difference"])
    draw_spectrum(beside, difference, "black")
    beside.axvline(0, color="0.6", lw=0.6)
    beside.set_xlabel("mean over time")
    below.plot(start + FRAME_TIMES, difference.mean(axis=0), color="black")
    below.axhline(0, color="0.6", lw=0.6)
    below.set(xlabel="time (s)", ylabel="mean over\nfrequency (dB)", xlim=span)


def draw_spectrum(axis: Axes, image: np.ndarray, colour: str) -> None:
    """Draw the mean over time of an image `(M, F)`, beside it."""
    axis.plot(image.mean(axis=1), np.arange(N_MELS) + 0.5, color=colour)
    axis.set(ylim=(0, N_MELS), yticks=[])


def mark(axis: Axes, difference: Mapping[str, Any]) -> None:
    """Mark the frequencies and seconds that the text of a difference names; dotted if they are not
    unusual.
    """
    named = difference[difference["named"]]
    if named is None:
        return
    ends = named["low"], named["high"]
    low, high = np.interp(ends, mel_frequencies(), np.arange(N_MELS) + 0.5)
    line = "-" if named["is_unusual"] else ":"
    style: dict[str, Any] = {"fill": False, "edgecolor": "black", "linestyle": line}
    width = named["end"] - named["start"]
    axis.add_patch(Rectangle((named["start"], low), width, high - low, **style))


# ---- The windows of a recording ----


def draw_timeline(
    score_axis: Axes, image_axis: Axes, row: Mapping[str, Any], kind: str, channel: int
) -> None:
    """Draw the score of each window of a recording over time, above the log-mel."""
    last_start = row["windows"][-1]["start"]
    duration = last_start + SECONDS
    unit, unit_name = (60, "min") if duration > 120 else (1, "s")
    draw_window_scores(score_axis, row, unit)
    label = textwrap.fill(f"score ({KINDS[kind].unit})", UNIT_LENGTH)
    score_axis.set(ylabel=label, ylim=(0, None), xlim=(0, duration / unit))
    score_axis.tick_params(labelbottom=False)
    log_mel = average_log_mel(Path(row["file"]), last_start, channel)
    draw_image(image_axis, log_mel, (0, duration / unit))
    set_frequencies(image_axis)
    image_axis.set(xlabel=f"time ({unit_name})")


def draw_window_scores(axis: Axes, row: Mapping[str, Any], unit: float) -> None:
    """Draw the score of each window at its middle, coloured by its decision; the threshold, and the
    alarms.

    `row` is a recording as `score_recordings` returns it, `unit` the seconds in a unit of the axis.
    """
    windows = row["windows"]
    middles = np.array([window["start"] for window in windows]) + SECONDS / 2
    scores = np.array([window["score"] for window in windows])
    decisions = np.array([window["decision"] or UNLABELLED for window in windows])
    for number, alarm in enumerate(row["alarms"] or ()):
        label = None if number else "alarm"
        axis.axvspan(alarm["start"] / unit, alarm["end"] / unit, color="0.85", lw=0, label=label)
    axis.plot(middles / unit, scores, color="0.6", lw=0.6)
    for decision, (colour, _) in CONDITIONS.items():
        chosen = decisions == decision
        if chosen.any():
            label = decision if row["decision"] else None
            axis.plot(middles[chosen] / unit, scores[chosen], ".", ms=3, color=colour, label=label)
    if row["threshold"] is not None:
        axis.axhline(row["threshold"], color="black", linestyle=":", label="threshold")


def average_log_mel(path: Path, last_start: float, channel: int) -> np.ndarray:
    """Compute the log-mel `(M, columns)` in dB of a whole recording, averaged over the frames of
    each column. `last_start` is the second at which the last window of the recording starts.
    """
    duration = last_start + SECONDS
    n_columns = min(MAX_COLUMNS, int(duration * COLUMNS_PER_SECOND))
    sums = np.zeros((n_columns, N_MELS))
    counts = np.zeros((n_columns, 1))
    for start in (*np.arange(0, last_start, SECONDS), last_start):
        shares = (start + FRAME_TIMES) / duration
        columns = np.minimum(shares * n_columns, n_columns - 1).astype(int)
        np.add.at(sums, columns, read_log_mel(path, start, channel).T)
        np.add.at(counts, columns, 1)
    return (sums / counts).T
