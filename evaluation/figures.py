"""Figures of an evaluation, as PNG files at the width of a paper's column or page.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart too; normal and
anomalous also differ in line or marker.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.metrics import roc_curve

from checkpoint import HISTORY, RunFiles, TrainedModel
from config import Config, name_id
from corpus import ANOMALOUS, MACHINE, NORMAL, UNLABELLED
from dataloader import read
from evaluation.metrics import AVERAGE, MAX_FPR
from evaluation.result import Result
from model import CHANNELS, FrontEnd
from model.tastgram import (
    HOP_LENGTH,
    N_FRAMES,
    N_MELS,
    N_SAMPLES,
    SAMPLE_RATE,
    SECONDS,
    temporal_gate,
)
from utils import UserError, replace_file

COLUMN, PAGE = 3.5, 7.2  # inches
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
BLUE, GREEN, RED = COLOURS[0], COLOURS[2], COLOURS[5]
CONDITIONS = {
    NORMAL: (BLUE, "-"),
    ANOMALOUS: (RED, "--"),
    UNLABELLED: ("0.6", "-"),
}  # colour and line
SCORES = {
    "published": "cross-entropy",
    "angle": "degrees to own centre",
    "nearest": "cosine distance to the nearest training clips",
}
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "legend.fontsize": 7, "figure.dpi": 200, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "lines.linewidth": 1.2,
}  # fmt: skip
MAX_POINTS = 5000  # of the embedding map
MAX_COLUMNS, COLUMNS_PER_SECOND = (
    1440,
    15,
)  # of the log-mel of a whole recording; a column has two frames or more
PANEL = COLUMN / 2  # inches: width of one of several panels
TITLE_LETTERS = 26  # in a line above a panel


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure (inches) that is written to `path` at the end, without a display."""
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(width, height), layout="constrained")
        yield drawn
        with replace_file(path) as temporary:
            drawn.savefig(temporary, format="png")


@contextmanager
def panels(
    path: Path, count: int, width: float, row_height: float
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of `count` panels in rows."""
    across = min(round(width / PANEL), count)
    rows = -(-count // across)
    with figure(path, width, row_height * rows + 0.5) as drawn:
        axes = drawn.subplots(rows, across, squeeze=False).ravel()
        for empty in axes[count:]:
            empty.set_axis_off()
        yield drawn, list(axes[:count])


def as_it_is(text: str) -> str:
    """Text that matplotlib shows, whatever is in a file name: neither a formula nor bytes that are
    not UTF-8.
    """
    return text.encode(errors="backslashreplace").decode().replace("$", r"\$")


def draw_all(result: Result, folder: Path) -> list[Path]:
    """Every figure that the evaluation allows; returns their files."""
    history = read_history(result.trained)
    title = f"{result.trained.path.stem} ({result.trained.config.mode})"
    figures = {
        "angles": (lambda path: draw_angles({title: [result]}, path), result.metrics is not None),
        "roc": (lambda path: draw_roc(result, path), result.metrics is not None),
        "scores": (lambda path: draw_scores(result, path), True),
        "tastgram": (lambda path: draw_tastgram(result, path), True),
        "embedding": (lambda path: draw_embedding(result, path), len(result.clips) > 3),
        "history": (lambda path: draw_history(history, path), len(history) > 0),
    }
    files = [folder / f"{name}.png" for name, (_, is_possible) in figures.items() if is_possible]
    for file in files:
        figures[file.stem][0](file)
    return files


def draw_angles(groups: Mapping[str, Sequence[Result]], path: Path) -> None:
    """The angle between embedding and own class centre, normal and anomalous clips, a panel per
    group of results.
    """
    clips = {name: pd.concat([result.known for result in group]) for name, group in groups.items()}
    with panels(path, len(clips), COLUMN, 1.6) as (drawn, axes):
        bins = np.linspace(0, max(of_group["angle"].max() for of_group in clips.values()), 60)
        for axis, (name, of_group) in zip(axes, clips.items(), strict=True):
            draw_histograms(axis, of_group, "angle", bins)
            axis.set(
                title=as_it_is(textwrap.fill(name, TITLE_LETTERS)), xlabel="angle to own centre (°)"
            )
        axes[0].set_ylabel("density")
        drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)


def draw_histograms(axis: Axes, clips: pd.DataFrame, column: str, bins: Any) -> None:
    for condition, (colour, line) in CONDITIONS.items():
        values = clips.loc[clips["condition"] == condition, column]
        if len(values):
            axis.hist(values, bins, density=True, color=colour, alpha=0.3)
            axis.hist(
                values,
                bins,
                density=True,
                color=colour,
                histtype="step",
                linestyle=line,
                label=condition,
            )
    axis.set_yticks([])


def draw_roc(result: Result, path: Path) -> None:
    """The ROC curve of each machine type, pooled over its IDs, with the region of the pAUC."""
    assert result.metrics
    auc = result.metrics.table["AUC"].xs("pooled", level="machine_id").drop(AVERAGE).dropna()
    with figure(path, COLUMN, 3.2) as drawn:
        axis = drawn.subplots()
        axis.axvspan(0, MAX_FPR, color="0.9", lw=0, label=f"pAUC region (to {MAX_FPR:g})")
        for number, (machine_type, value) in enumerate(auc.items()):
            clips = result.known[result.known["machine_type"] == machine_type]
            false, true, _ = roc_curve(
                clips["condition"] == ANOMALOUS, clips["score"], drop_intermediate=False
            )
            line, colour = ("-", "--", "-.", ":")[number // 2 % 4], COLOURS[number % len(COLOURS)]
            axis.plot(
                false,
                true,
                line,
                color=colour,
                label=as_it_is(f"{machine_type}, AUC {100 * value:.1f} %"),
            )
        axis.plot([0, 1], [0, 1], color="0.6", lw=0.6)
        axis.set(
            xlabel="false positive rate",
            ylabel="true positive rate",
            xlim=(0, 1),
            ylim=(0, 1.01),
            aspect="equal",
        )
        axis.legend(loc="lower right")


def draw_scores(result: Result, path: Path) -> None:
    """The scores of each machine ID with its threshold; the cross-entropy on a logarithmic axis."""
    kind = result.trained.config.scoring
    is_log = kind == "published"

    def place(values: pd.Series | float) -> Any:
        return np.log10(np.maximum(values, 1e-12)) if is_log else values

    clips = result.clips.assign(place=place(result.clips["exact_score"]))
    groups = clips.groupby(MACHINE, sort=False)
    bins = np.histogram_bin_edges(clips["place"], 40)
    if is_log:
        bins = np.linspace(np.floor(bins[0]), np.ceil(bins[-1]), 40)
    with panels(path, groups.ngroups, PAGE, 1.4) as (drawn, axes):
        handles: dict[str, Any] = {}
        for axis, (machine, group) in zip(axes, groups, strict=True):
            draw_histograms(axis, group, "place", bins)
            threshold = group["threshold"].iloc[0]
            if not np.isnan(threshold):
                axis.axvline(place(threshold), color="black", linestyle=":", label="threshold")
            axis.set_title(as_it_is(f"{machine[0]} {machine[1]}"))
            if is_log:
                axis.xaxis.set_major_formatter(lambda x, _: f"$10^{{{x:.0f}}}$")
            handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        drawn.supxlabel(f"anomaly score ({SCORES[kind]})", fontsize=8)
        drawn.supylabel("density", fontsize=8)
        drawn.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)


def read_samples(path: Path, start: float, channel: int) -> torch.Tensor:
    """The samples of the window of a recording that starts at this second, as a batch of one, int16
    `(1, T)`.
    """
    samples = np.empty(N_SAMPLES, dtype=np.int16)
    read(samples, channel, path, start)
    return torch.from_numpy(samples).unsqueeze(0)


def draw_timeline(row: Mapping[str, Any], config: Config, path: Path) -> None:
    """The score of each window of a recording, at its middle, with the threshold, over the log-mel.
    The row is one of `recordings.score_recordings`.
    """
    starts, scores = (
        np.array([window[name] for window in row["windows"]]) for name in ("start", "score")
    )
    seconds = starts[-1] + SECONDS
    unit, name = (60, "min") if seconds > 120 else (1, "s")
    middles, worst = starts + SECONDS / 2, row["worst"]["start"]
    decisions = np.array([window["decision"] or UNLABELLED for window in row["windows"]])
    with figure(path, PAGE, 3.2) as drawn:
        score, image = drawn.subplots(2, 1, sharex=True)
        score.axvspan(
            worst / unit, (worst + SECONDS) / unit, color="0.85", lw=0, label="worst window"
        )
        score.plot(middles / unit, scores, color="0.6", lw=0.6)
        for decision in [name for name in CONDITIONS if name in decisions]:
            chosen, label = decisions == decision, decision if row["decision"] else None
            score.plot(
                middles[chosen] / unit,
                scores[chosen],
                ".",
                ms=3,
                color=CONDITIONS[decision][0],
                label=label,
            )
        if row["threshold"] is not None:
            score.axhline(row["threshold"], color="black", linestyle=":", label="threshold")
        score.set(ylabel=f"score\n({SCORES[config.scoring]})", ylim=(0, None))
        log_mel = whole_log_mel(Path(row["file"]), starts[-1], config.channel)
        image.imshow(
            log_mel,
            origin="lower",
            aspect="auto",
            extent=(0, seconds / unit, 0, N_MELS),
            cmap="viridis",
        )
        image.set(xlabel=f"time ({name})", ylabel="mel bin", xlim=(0, seconds / unit))
        machine = f"{row['machine_type']} {name_id(row['machine_id'])}"
        verdict = f", {row['decision']}" if row["decision"] else ""
        title = f"{Path(row['file']).name}: {machine}, score {row['score']:.3g}{verdict}"
        drawn.suptitle(as_it_is(title), fontsize=8)
        drawn.legend(*score.get_legend_handles_labels(), loc="outside lower center", ncols=4)


@torch.no_grad()
def whole_log_mel(path: Path, last: float, channel: int) -> np.ndarray:
    """The log-mel `(M, N)` in dB of a recording whose last window starts at this second: the mean
    over the frames in each of N stretches of equal length.
    """
    front_end, seconds = FrontEnd(["sgram"]), last + SECONDS
    count = min(MAX_COLUMNS, int(seconds * COLUMNS_PER_SECOND))
    sums, counts = np.zeros((count, N_MELS)), np.zeros((count, 1))
    for start in (*np.arange(0, last, SECONDS), last):
        log_mel = front_end(read_samples(path, start, channel))["log_mel"][0, 0].numpy()
        times = start + np.arange(N_FRAMES) * HOP_LENGTH / SAMPLE_RATE
        columns = np.minimum(times / seconds * count, count - 1).astype(int)
        np.add.at(sums, columns, log_mel.T)
        np.add.at(counts, columns, 1)
    return (sums / counts).T


@torch.no_grad()
def draw_tastgram(result: Result, path: Path) -> None:
    """The input channels of the first clip known to be normal (else the first), its first 10 s, and
    the gate of the attention.
    """
    normal = result.clips[result.clips["condition"] == NORMAL]
    clip = (normal if len(normal) else result.clips).iloc[0]
    network = result.trained.network.cpu()
    inputs = FrontEnd(CHANNELS)(read_samples(clip["path"], 0.0, result.trained.config.channel))
    images = dict(zip(network.channels, network.features(**inputs)[0].numpy(), strict=True))
    gate = temporal_gate(inputs["log_mel"])[0, 0, 0].numpy()
    with figure(path, COLUMN, 1.35 * (len(images) + 1)) as drawn:
        axes = drawn.subplots(len(images) + 1, 1, sharex=True)
        for axis, (name, image) in zip(axes, images.items(), strict=False):
            shown = axis.imshow(
                image, origin="lower", aspect="auto", extent=(0, SECONDS, 0, N_MELS), cmap="viridis"
            )
            axis.set(title=name if name == "tgram" else f"{name} (dB)", ylabel="row")
            drawn.colorbar(shown, ax=axis)
        axes[-1].plot(
            np.arange(len(gate)) * HOP_LENGTH / SAMPLE_RATE, np.maximum(gate, 1e-45), color=BLUE
        )
        if gate.max() < 0.01:
            axes[-1].set_yscale("log")
        else:
            axes[-1].set_ylim(0, 1)
        title = f"temporal attention, highest {gate.max():.2g}"
        axes[-1].set(title=title, xlabel="time (s)", ylabel="gate", xlim=(0, SECONDS))
        drawn.suptitle(as_it_is(f"{clip['machine_type']}, {clip['path'].name}"), fontsize=8)


def draw_embedding(result: Result, path: Path) -> None:
    """t-SNE of the embeddings (cosine distance), coloured by machine; anomalous clips are crosses."""
    chosen = np.unique(np.linspace(0, len(result.clips) - 1, MAX_POINTS).astype(int))
    clips, embedding = result.clips.iloc[chosen], result.embedding[chosen].astype(np.float64)
    perplexity = min(30.0, (len(chosen) - 1) / 3)
    x, y = (
        TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=0)
        .fit_transform(embedding)
        .T
    )
    is_anomaly = (clips["condition"] == ANOMALOUS).to_numpy()
    machines = clips["machine_type"].str.cat(clips["machine_id"], sep=" ").to_numpy()
    names, markers = (
        list(dict.fromkeys(machines)),
        "osD^v<>",
    )  # markers of the IDs that have the same colour
    with figure(path, PAGE, 4.2) as drawn:
        axis = drawn.subplots()
        for number, name in enumerate(names):
            colour, marker = (
                COLOURS[number % len(COLOURS)],
                markers[number // len(COLOURS) % len(markers)],
            )
            normal, anomalous = (
                (machines == name) & (is_anomaly == condition) for condition in (False, True)
            )
            axis.scatter(
                x[normal],
                y[normal],
                s=10,
                color=colour,
                marker=marker,
                label=as_it_is(name),
                linewidths=0,
            )
            axis.scatter(x[anomalous], y[anomalous], s=10, color=colour, marker="x", linewidths=0.7)
        axis.scatter([], [], s=10, color="0.4", marker="x", label="anomalous")
        axis.set(xlabel="t-SNE 1", ylabel="t-SNE 2", xticks=[], yticks=[])
        axis.legend(
            loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 + len(names) // 18, markerscale=1.5
        )


def read_history(trained: TrainedModel) -> pd.DataFrame:
    """The epochs of the whole run from history.csv; where that is gone, those up to the best, from
    the checkpoint.
    """
    path = RunFiles(trained.path).history
    if not path.exists():
        return pd.DataFrame(trained.state.get("history", []))
    try:
        return pd.read_csv(path)[list(HISTORY)].astype(float)
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{path}: not the history of a training; remove it, and the checkpoint's own is drawn"
        ) from None


def draw_history(history: pd.DataFrame, path: Path) -> None:
    """Loss, accuracy and learning rate over the epochs."""
    with figure(path, PAGE, 2.2) as drawn:
        loss, accuracy, lr = drawn.subplots(1, 3)
        for axis, name in ((loss, "loss"), (accuracy, "accuracy")):
            axis.plot(
                history["epoch"], history[f"train_{name}"], color=BLUE, label="training (mixed)"
            )
            axis.plot(
                history["epoch"], history[f"valid_{name}"], "--", color=RED, label="validation"
            )
            axis.set(xlabel="epoch", ylabel=name)
        drawn.legend(*loss.get_legend_handles_labels(), loc="outside upper center", ncols=2)
        lr.plot(history["epoch"], history["lr"], color=GREEN)
        lr.set(xlabel="epoch", ylabel="learning rate", ylim=(0, None))
