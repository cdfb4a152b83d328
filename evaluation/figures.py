"""Figures of an evaluation, as PNG files at the width of a paper's column or page.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; normal and anomalous
also differ in line or marker.
"""

import functools
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font
from matplotlib.image import AxesImage
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from sklearn.manifold import TSNE
from sklearn.metrics import roc_curve
from torch import Tensor

from audio import N_SAMPLES, SAMPLE_RATE, SECONDS, read_recording
from checkpoint import read_history
from evaluation.metrics import MAX_FPR
from evaluation.result import Result
from evaluation.scores import KINDS, Kind
from model import CHANNELS, FrontEnd
from model.tastgram import HOP_LENGTH, N_MELS, mel_frequencies, temporal_gate
from names import ANOMALOUS, AVERAGE, NORMAL, POOLED, UNLABELLED
from recordings import MACHINE_COLUMNS
from utils import replace_file

# Widths in inches.
COLUMN = 3.5
PAGE = 7.2
PANEL = COLUMN / 2

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY_BLUE, RED, YELLOW, BLACK = "#56B4E9", "#D55E00", "#F0E442", "#000000"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY_BLUE, RED, YELLOW, BLACK)
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^v<>"
# The colour and line of each condition.
CONDITIONS = {NORMAL: (BLUE, "-"), ANOMALOUS: (RED, "--"), UNLABELLED: ("0.6", "-")}
FONT = "DejaVu Sans"  # matplotlib's
STYLE = {
    "font.family": [FONT],
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "figure.dpi": 200,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
}

TITLE_LENGTH = 26  # characters in a line above a panel
TICKS = (0.5, 1, 2, 4, 8)  # kHz, of the frequencies of a log-mel
N_BINS = 30  # of the scores of a machine
MAX_INTERVALS = 3  # between the ticks of a small panel
LEAST_SHOWN = 1e-12  # the position of a score of 0 on a logarithmic axis
MAX_POINTS = 5000  # of the map of embeddings


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Yield a figure of this size (inches), and write it to `path` at the end. Needs no display."""
    with matplotlib.style.context(["default", STYLE]):  # whatever the user's settings are
        drawn = Figure(figsize=(width, height), layout="constrained")
        yield drawn
        choose_fonts(drawn)
        with replace_file(path) as temporary:
            drawn.savefig(temporary, format="png")


@contextmanager
def panels(
    path: Path, count: int, width: float, row_height: float
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yield a figure with `count` panels in rows, and write it to `path` at the end. Sizes are in
    inches.
    """
    n_columns = min(round(width / PANEL), count)
    n_rows = -(-count // n_columns)
    with figure(path, width, row_height * n_rows + 0.5) as drawn:
        axes = drawn.subplots(n_rows, n_columns, squeeze=False).ravel()
        for empty in axes[count:]:
            empty.set_axis_off()
        yield drawn, list(axes[:count])


def escape(text: str) -> str:
    """Escape a text for matplotlib: "$" would begin a formula, "_" hide the entry of a legend."""
    escaped = text.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def choose_fonts(drawn: Figure) -> None:
    """Draw letters that FONT lacks with other fonts that are installed; spell out those that no
    font has, and bytes of a file name that are not UTF-8.
    """
    for text in drawn.findobj(Text):
        content = text.get_text()
        fonts = {letter: find_font(letter) for letter in content if letter != "\n"}
        for letter, font in fonts.items():
            if font is None:
                content = content.replace(letter, letter.encode("unicode_escape").decode())
        families = [FONT, *sorted({font for font in fonts.values() if font} - {FONT})]
        if len(families) > 1:
            text.set_fontfamily(families)
        if content != text.get_text():
            text.set_text(content)


@functools.cache
def find_font(letter: str) -> str | None:
    """Return the name of an installed font that has a letter, or None: FONT, or else the first in
    alphabetical order.
    """
    for name in font_names():
        if ord(letter) in letters_of(name):
            return name
    return None


@functools.cache
def font_names() -> list[str]:
    """Return the names of the installed fonts, FONT first, without one that draws boxes."""
    names = {font.name for font in fontManager.ttflist}
    return [FONT, *sorted(name for name in names - {FONT} if "Last Resort" not in name)]


@functools.cache
def letters_of(font: str) -> Collection[int]:
    """Return the letters, as numbers of Unicode, of the regular face of a font."""
    try:
        return get_font(fontManager.findfont(font, fallback_to_default=False)).get_charmap().keys()
    except (ValueError, OSError, RuntimeError):  # removed since matplotlib listed it, or damaged
        return ()


def read_samples(path: Path, start: float, channel: int) -> Tensor:
    """Read the clip that starts at a second of a recording, as a batch of one, int16 `(1, T)`."""
    samples = np.empty(N_SAMPLES, dtype=np.int16)
    read_recording(path, samples, start, channel)
    return torch.from_numpy(samples).unsqueeze(0)


# ---- An evaluation ----


def draw_all(result: Result, folder: Path) -> list[Path]:
    """Draw the figures that an evaluation allows into a folder, and return their files."""
    draws: dict[str, Callable[[Result, Path], None]] = {"scores": draw_scores}
    if result.metrics is not None:
        draws["roc"] = draw_roc
        if not KINDS[result.kind].uses_bank:  # a score without centres says nothing about angles
            draws["angles"] = draw_result_angles
    is_ensemble = result.detector.is_ensemble
    if not is_ensemble:
        draws["tastgram"] = draw_tastgram
    if len(result.recordings) > 3:  # t-SNE needs a few
        draws["embedding"] = draw_embedding
    if not is_ensemble and len(history := read_history(result.detector.first.checkpoint)):
        draws["history"] = lambda _, path: draw_history(history, path)
    files = []
    for name, draw in draws.items():
        files.append(folder / f"{name}.png")
        draw(result, files[-1])
    return files


def draw_result_angles(result: Result, path: Path) -> None:
    title = f"{result.detector.title} ({result.detector.mode})"
    draw_angles({title: [result]}, path)


def draw_angles(groups: Mapping[str, Sequence[Result]], path: Path) -> None:
    """Draw histograms of the angle between the embedding and the closest centre of the machine, of
    normal and of anomalous recordings: a panel for each group of results.
    """
    tables = {name: pd.concat([result.known for result in runs]) for name, runs in groups.items()}
    largest = max(recordings["angle"].max() for recordings in tables.values())
    bins = np.linspace(0, largest, 60)
    with panels(path, len(tables), COLUMN, 1.6) as (drawn, axes):
        for axis, (name, recordings) in zip(axes, tables.items(), strict=True):
            draw_histograms(axis, recordings, "angle", bins)
            title = textwrap.fill(name, TITLE_LENGTH)
            axis.set(title=escape(title), xlabel="angle to centre of ID (°)")
        axes[0].set_ylabel("density")
        drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)


def draw_histograms(axis: Axes, recordings: pd.DataFrame, column: str, bins: np.ndarray) -> None:
    """Draw a histogram of a column for each condition of the recordings."""
    for condition, (colour, line) in CONDITIONS.items():
        values = recordings.loc[recordings["condition"] == condition, column]
        if len(values) == 0:
            continue
        style: dict[str, Any] = {"bins": bins, "density": True, "color": colour}
        axis.hist(values, alpha=0.3, **style)
        axis.hist(values, histtype="step", linestyle=line, label=condition, **style)
    axis.set_yticks([])


def draw_roc(result: Result, path: Path) -> None:
    """Draw the ROC curve of each machine type, pooled over its IDs, and the region of the pAUC."""
    assert result.metrics
    aucs = result.metrics.table["AUC"].xs(POOLED, level="machine_id").drop(AVERAGE).dropna()
    with figure(path, COLUMN, 3.2) as drawn:
        axis = drawn.subplots()
        axis.axvspan(0, MAX_FPR, color="0.9", lw=0, label=f"pAUC region (to {MAX_FPR:g})")
        for number, (machine_type, auc) in enumerate(aucs.items()):
            of_type = result.known[result.known["machine_type"] == machine_type]
            is_anomaly = of_type["condition"] == ANOMALOUS
            fpr, tpr, _ = roc_curve(is_anomaly, of_type["score"], drop_intermediate=False)
            line = LINES[number // 2 % len(LINES)]
            colour = COLOURS[number % len(COLOURS)]
            label = escape(f"{machine_type}, AUC {100 * auc:.1f} %")
            axis.plot(fpr, tpr, line, color=colour, label=label)
        axis.plot([0, 1], [0, 1], color="0.6", lw=0.6)
        axis.set(xlabel="false positive rate", ylabel="true positive rate")
        axis.set(xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
        axis.legend(loc="lower right")


def draw_scores(result: Result, path: Path) -> None:
    """Draw histograms of the scores of each machine on an axis for itself, with its threshold."""
    kind = KINDS[result.kind]
    machines = result.recordings.groupby(MACHINE_COLUMNS, sort=False)
    with panels(path, machines.ngroups, PAGE, 1.4) as (drawn, axes):
        handles: dict[str, Any] = {}  # by label
        for axis, (machine, of_machine) in zip(axes, machines, strict=True):
            draw_machine_scores(axis, of_machine, kind)
            axis.set_title(escape(f"{machine[0]} {machine[1]}"))
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                handles[label] = handle
        drawn.supxlabel(f"{result.level_name} ({kind.unit})", fontsize=8)
        drawn.supylabel("density", fontsize=8)
        drawn.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)


def draw_machine_scores(axis: Axes, recordings: pd.DataFrame, kind: Kind) -> None:
    """Draw histograms of the scores of a machine, and its threshold if it has one. The axis is
    logarithmic if the kind may be shown so and two powers of ten lie between the values.
    """
    threshold = recordings["threshold"].iloc[:1].dropna()
    values = np.maximum([*recordings["level"], *threshold], LEAST_SHOWN)
    is_logarithmic = kind.is_logarithmic and values.max() >= 100 * values.min()
    positions = np.log10(values) if is_logarithmic else values
    of_recordings = recordings.assign(position=positions[: len(recordings)])
    draw_histograms(axis, of_recordings, "position", np.histogram_bin_edges(positions, N_BINS))
    for position in positions[len(recordings) :]:
        axis.axvline(position, color="black", linestyle=":", label="threshold")
    ticks = MaxNLocator(MAX_INTERVALS, steps=[1, 2, 2.5, 5, 10], integer=is_logarithmic)
    axis.xaxis.set_major_locator(ticks)
    if is_logarithmic:
        axis.xaxis.set_major_formatter(format_power)
    else:
        axis.ticklabel_format(axis="x", useOffset=False)


def format_power(exponent: float, _: float) -> str:
    """Format a tick of a logarithmic axis, as a formula for matplotlib."""
    return f"$10^{{{exponent:.0f}}}$"


@torch.no_grad()
def draw_tastgram(result: Result, path: Path) -> None:
    """Draw the input channels of the first clip of a normal recording (without one, of the first
    recording), and the gate of the temporal attention.
    """
    normal = result.recordings[result.recordings["condition"] == NORMAL]
    recording = (normal if len(normal) else result.recordings).iloc[0]
    network = result.detector.first.network
    assert network
    network = network.cpu()
    samples = read_samples(recording["path"], 0.0, result.windows.channel)
    inputs = FrontEnd(CHANNELS)(samples)
    images = network.features(**inputs)[0].numpy()
    gate = temporal_gate(inputs["log_mel"])[0, 0, 0].numpy()
    with figure(path, COLUMN, 1.35 * (len(images) + 1)) as drawn:
        *channel_axes, gate_axis = drawn.subplots(len(images) + 1, 1, sharex=True)
        for axis, name, image in zip(channel_axes, network.channels, images, strict=True):
            shown = draw_image(axis, image, (0, SECONDS))
            channel = CHANNELS[name]
            axis.set(title=name, ylabel="filter")
            if channel.source == "log_mel":
                axis.set(title=f"{name} (dB)")
                set_frequencies(axis)
            elif channel.columns:
                axis.set(title=f"{name} (columns are {channel.columns})")
                axis.tick_params(bottom=False)
            drawn.colorbar(shown, ax=axis)
        draw_gate(gate_axis, gate)
        title = f"{recording['machine_type']}, {recording['path'].name}"
        drawn.suptitle(escape(title), fontsize=8)


def draw_image(
    axis: Axes, image: np.ndarray, times: tuple[float, float], **style: Any
) -> AxesImage:
    """Draw an image with a row for each mel bin over a time axis, which begins and ends at `times`.
    Returns it, for a colour bar.
    """
    extent = (*times, 0, N_MELS)
    style = {"cmap": "viridis"} | style
    return axis.imshow(image, origin="lower", aspect="auto", extent=extent, **style)


def set_frequencies(axis: Axes) -> None:
    """Label the rows of a log-mel with their frequencies."""
    rows = np.interp(np.array(TICKS) * 1000, mel_frequencies(), np.arange(N_MELS) + 0.5)
    axis.set_yticks(rows, [f"{tick:g}" for tick in TICKS])
    axis.set_ylabel("kHz")


def draw_gate(axis: Axes, gate: np.ndarray) -> None:
    """Draw the gate `(F,)` of a clip; on a logarithmic axis where it is almost closed."""
    times = np.arange(len(gate)) * HOP_LENGTH / SAMPLE_RATE
    axis.plot(times, np.maximum(gate, 1e-45), color=BLUE)
    if gate.max() < 0.01:
        axis.set_yscale("log")
    else:
        axis.set_ylim(0, 1)
    title = f"temporal attention, highest {gate.max():.2g}"
    axis.set(title=title, xlabel="time (s)", ylabel="gate", xlim=(0, SECONDS))


def draw_embedding(result: Result, path: Path) -> None:
    """Draw a t-SNE map of the embeddings (cosine distance): a colour or marker for each machine,
    and crosses for anomalous recordings.
    """
    n_recordings = len(result.recordings)
    chosen = np.unique(np.linspace(0, n_recordings - 1, MAX_POINTS).astype(int))
    points = project(result.embedding[chosen])
    recordings = result.recordings.iloc[chosen]
    is_anomaly = (recordings["condition"] == ANOMALOUS).to_numpy()
    machines = recordings["machine_type"].str.cat(recordings["machine_id"], sep=" ").to_numpy()
    names = list(dict.fromkeys(machines))
    with figure(path, PAGE, 4.2) as drawn:
        axis = drawn.subplots()
        for number, name in enumerate(names):
            is_machine = machines == name
            colour = COLOURS[number % len(COLOURS)]
            marker = MARKERS[number // len(COLOURS) % len(MARKERS)]
            normal, anomalous = points[is_machine & ~is_anomaly], points[is_machine & is_anomaly]
            style: dict[str, Any] = {"s": 10, "color": colour}
            axis.scatter(*normal.T, marker=marker, label=escape(name), linewidths=0, **style)
            axis.scatter(*anomalous.T, marker="x", linewidths=0.7, **style)
        axis.scatter([], [], s=10, color="0.4", marker="x", label="anomalous")
        axis.set(xlabel="t-SNE 1", ylabel="t-SNE 2", xticks=[], yticks=[])
        n_columns = 1 + len(names) // 18
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), ncols=n_columns, markerscale=1.5)


def project(embedding: np.ndarray) -> np.ndarray:
    """Project embeddings `(n, E)` onto a plane with t-SNE: `(n, 2)`."""
    perplexity = min(30.0, (len(embedding) - 1) / 3)
    tsne = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=0)
    return tsne.fit_transform(embedding.astype(np.float64))


def draw_history(history: pd.DataFrame, path: Path) -> None:
    """Draw loss, accuracy and learning rate over the epochs: lines, or the points of one epoch."""
    epochs = history["epoch"]
    style: dict[str, Any] = {"marker": "." if len(epochs) == 1 else ""}
    with figure(path, PAGE, 2.2) as drawn:
        loss, accuracy, lr = drawn.subplots(1, 3)
        for axis, name in ((loss, "loss"), (accuracy, "accuracy")):
            training, validation = history[f"train_{name}"], history[f"valid_{name}"]
            axis.plot(epochs, training, color=BLUE, label="training (mixed)", **style)
            axis.plot(epochs, validation, "--", color=RED, label="validation", **style)
            axis.set(ylabel=name)
        drawn.legend(*loss.get_legend_handles_labels(), loc="outside upper center", ncols=2)
        lr.plot(epochs, history["lr"], color=GREEN, **style)
        lr.set(ylabel="learning rate", ylim=(0, None))
        for axis in (loss, accuracy, lr):
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
