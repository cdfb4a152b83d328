"""Figures of an evaluation, as PNG files at the width of a paper's column or page.

Colours are those of Okabe and Ito, which tell apart for colour-blind readers too; normal and anomalous also differ in
line or marker.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.metrics import roc_curve

from dataloader import ClipSet
from evaluation.metrics import MAX_FPR
from model import FrontEnd
from model.tastgram import HOP_LENGTH, N_MELS, SAMPLE_RATE, SECONDS, temporal_attention, temporal_gate
from utils import replace_file

if TYPE_CHECKING:
    from eval import Evaluated

COLUMN, PAGE = 3.5, 7.2  # inches
NORMAL, ANOMALOUS, THRESHOLD = "#0072B2", "#D55E00", "#000000"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "legend.fontsize": 7, "figure.dpi": 200, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "lines.linewidth": 1.2,
}  # fmt: skip
MAX_POINTS = 5000  # of the embedding map
PANELS_ACROSS = 4


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure (inches) that is written to `path` at the end, without a display."""
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(width, height), layout="constrained")
        yield drawn
        with replace_file(path) as temporary:
            drawn.savefig(temporary, format="png")


def panels(drawn: Figure, count: int, across: int = PANELS_ACROSS) -> list[Axes]:
    """`count` panels in rows; places that are left over stay empty."""
    across = min(across, count)
    axes = drawn.subplots(-(-count // across), across, squeeze=False).ravel()
    for empty in axes[count:]:
        empty.set_axis_off()
    return list(axes[:count])


def rows_of(count: int, across: int = PANELS_ACROSS) -> int:
    return -(-count // min(across, count))


# ---- One evaluation ----


def draw_all(result: "Evaluated", clips: ClipSet, folder: Path, history: Sequence[Mapping[str, float]]) -> list[Path]:
    """Every figure that the evaluation allows; returns their files."""
    files = []

    def file(name: str) -> Path:
        files.append(folder / f"{name}.png")
        return files[-1]

    if result.known:
        draw_angles([result], file("angles"))
    if result.draws:
        draw_roc(result, file("roc"))
    draw_histograms(result, file("scores"))
    draw_tastgram(result, clips, file("tastgram"))
    if len(result.clips) > 3:
        draw_embedding(result, file("embedding"))
    if history:
        draw_history(history, file("history"))
    for old in set(folder.glob("*.png")) - set(files):
        old.unlink()  # of an evaluation that allowed more
    return files


def draw_angles(results: Sequence["Evaluated"], path: Path) -> None:
    """The angle between embedding and own class centre, normal and anomalous clips, a panel per checkpoint."""
    with figure(path, PAGE if len(results) > 1 else COLUMN, 2.2 * rows_of(len(results))) as drawn:
        axes = panels(drawn, len(results))
        angles = [result_angles(result)[result.known] for result in results]
        bins = np.linspace(0, max(values.max() for values in angles), 60)
        for axis, result, values in zip(axes, results, angles, strict=True):
            is_anomaly = np.array([result.clips[index].is_anomaly for index in result.known], dtype=bool)
            compare_histograms(axis, values[~is_anomaly], values[is_anomaly], bins)
            axis.set(
                title=f"{result.trained.path.stem} ({result.trained.config.mode})", xlabel="angle to own centre (°)"
            )
            axis.set_yticks([])
        axes[0].set_ylabel("density")
        axes[0].legend()


def result_angles(result: "Evaluated") -> np.ndarray:
    """Degrees; of a plain linear head, which has no centres, the angle to the weights of the class."""
    labels = torch.tensor([clip.label for clip in result.clips])
    if result.trained.model.head == "arcface":
        cosine = result.outputs.similarity.double().gather(1, labels[:, None])[:, 0]
    else:
        weights = result.trained.model.mobilefacenet.fc_out.weight.detach().cpu()[labels]
        cosine = torch.nn.functional.cosine_similarity(result.outputs.embedding.double(), weights.double())
    return torch.rad2deg(torch.acos(cosine.clamp(-1.0, 1.0))).numpy()


def compare_histograms(axis: Axes, normal: np.ndarray, anomalous: np.ndarray, bins: np.ndarray) -> None:
    for values, name, colour, line in ((normal, "normal", NORMAL, "-"), (anomalous, "anomalous", ANOMALOUS, "--")):
        if len(values):
            axis.hist(values, bins, density=True, color=colour, alpha=0.3)
            axis.hist(values, bins, density=True, color=colour, histtype="step", linestyle=line, label=name)


def draw_roc(result: "Evaluated", path: Path) -> None:
    """The ROC curve of each machine type, pooled over its IDs, with the region of the pAUC."""
    with figure(path, COLUMN, 3.2) as drawn:
        axis = drawn.subplots()
        axis.axvspan(0, MAX_FPR, color="0.9", lw=0, label=f"pAUC region (to {MAX_FPR:g})")
        types = np.array([result.clips[index].machine_type for index in result.known])
        is_anomaly = np.array([result.clips[index].is_anomaly for index in result.known], dtype=bool)
        scores = result.scores[result.known]
        rated = [name for name in dict.fromkeys(types.tolist()) if (name, "pooled") in result.draws]
        for number, machine_type in enumerate(rated):
            chosen = types == machine_type
            false, true, _ = roc_curve(is_anomaly[chosen], scores[chosen], drop_intermediate=False)
            auc = result.table[machine_type]["pooled"]["AUC"]
            line = ("-", "--", "-.", ":")[number // 2 % 4]
            axis.plot(
                false, true, line, color=COLOURS[number % len(COLOURS)], label=f"{machine_type}, AUC {100 * auc:.1f} %"
            )
        axis.plot([0, 1], [0, 1], color="0.6", lw=0.6)
        axis.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
        axis.legend(loc="lower right")


def draw_histograms(result: "Evaluated", path: Path) -> None:
    """The scores of each machine ID with its threshold, on a logarithmic axis."""
    groups: dict[tuple[str, int], list[int]] = {}
    for index, clip in enumerate(result.clips):
        groups.setdefault((clip.machine_type, clip.machine_id), []).append(index)
    scores = np.log10(np.maximum(result.exact_scores, 1e-12))
    bins = np.linspace(np.floor(scores.min()), np.ceil(scores.max()), 40)
    with figure(path, PAGE, 1.4 * rows_of(len(groups)) + 0.5) as drawn:
        axes = panels(drawn, len(groups))
        for axis, (machine, index) in zip(axes, groups.items(), strict=True):
            condition = np.array([result.clips[i].is_anomaly for i in index], dtype=object)
            of = scores[index]
            compare_histograms(axis, of[condition == False], of[condition == True], bins)  # noqa: E712 (may be None)
            if any(condition == None):  # noqa: E711
                axis.hist(of[condition == None], bins, density=True, color="0.6", label="unlabelled")  # noqa: E711
            if machine in result.thresholds:
                value = np.log10(max(result.thresholds[machine].value, 1e-12))
                axis.axvline(value, color=THRESHOLD, linestyle=":", label="threshold")
            axis.set(title=f"{machine[0]} {machine[1]:02d}")
            axis.set_yticks([])
            axis.xaxis.set_major_formatter(lambda x, _: f"$10^{{{x:.0f}}}$")
        drawn.supxlabel("anomaly score (cross-entropy)", fontsize=8)
        drawn.supylabel("density", fontsize=8)
        handles = {
            label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        drawn.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)


@torch.no_grad()
def draw_tastgram(result: "Evaluated", clips: ClipSet, path: Path) -> None:
    """The channels of the first clip that is known to be normal (else the first), and the gate of the attention."""
    index = next((i for i, clip in enumerate(result.clips) if clip.is_anomaly is False), 0)
    model, device = result.trained.model, next(result.trained.model.parameters()).device
    inputs = FrontEnd(("tgram", "sgram")).to(device)(clips.batch(np.array([index]), device)[0])
    log_mel = inputs["log_mel"]
    source = model.gate_source(log_mel)
    images = {"log-mel (dB)": log_mel[0, 0], "TAgram: gate × log-mel (dB)": temporal_attention(log_mel, source)[0, 0]}
    if "tgram" in model.channels:
        images = {"Tgram (learned)": model.tgramnet(inputs["waveform"])[0]} | images
    gate = temporal_gate(source)[0, 0, 0].cpu().numpy()
    with figure(path, COLUMN, 1.35 * (len(images) + 1)) as drawn:
        axes = drawn.subplots(len(images) + 1, 1, sharex=True)
        for axis, (name, image) in zip(axes, images.items(), strict=False):
            shown = axis.imshow(
                image.cpu().numpy(), origin="lower", aspect="auto", extent=(0, SECONDS, 0, N_MELS), cmap="viridis"
            )
            axis.set(title=name, ylabel="channel" if "Tgram" in name else "mel bin")
            drawn.colorbar(shown, ax=axis)
        seconds = np.arange(len(gate)) * HOP_LENGTH / SAMPLE_RATE
        axes[-1].plot(seconds, np.maximum(gate, 1e-45), color=NORMAL)
        if gate.max() < 0.01:
            axes[-1].set_yscale("log")
        else:
            axes[-1].set_ylim(0, 1)
        clip = result.clips[index]
        axes[-1].set(
            title=f"temporal attention ({result.trained.config.attention}), highest {gate.max():.2g}",
            xlabel="time (s)", ylabel="gate", xlim=(0, SECONDS),
        )  # fmt: skip
        drawn.suptitle(f"{clip.machine_type}, {clip.path.name}", fontsize=8)


def draw_embedding(result: "Evaluated", path: Path) -> None:
    """t-SNE of the embeddings (cosine distance), coloured by class; anomalous clips are crosses."""
    chosen = np.unique(np.linspace(0, len(result.clips) - 1, MAX_POINTS).astype(int))
    embedding = result.outputs.embedding[chosen].double().numpy()
    perplexity = min(30.0, (len(chosen) - 1) / 3)
    map_ = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=0).fit_transform(embedding)
    machines = [f"{result.clips[i].machine_type} {result.clips[i].machine_id:02d}" for i in chosen]
    is_anomaly = np.array([result.clips[i].is_anomaly is True for i in chosen])
    names = list(dict.fromkeys(machines))
    markers = "osD^v<>"  # of the IDs that share a colour
    with figure(path, PAGE, 4.2) as drawn:
        axis = drawn.subplots()
        for number, name in enumerate(names):
            of = np.array([machine == name for machine in machines])
            colour, marker = COLOURS[number % len(COLOURS)], markers[number // len(COLOURS) % len(markers)]
            normal, anomalous = map_[of & ~is_anomaly], map_[of & is_anomaly]
            axis.scatter(*normal.T, s=10, color=colour, marker=marker, label=name, linewidths=0)
            axis.scatter(*anomalous.T, s=10, color=colour, marker="x", linewidths=0.7)
        axis.scatter([], [], s=10, color="0.4", marker="x", label="anomalous")
        axis.set(xlabel="t-SNE 1", ylabel="t-SNE 2", xticks=[], yticks=[])
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 + len(names) // 18, markerscale=1.5)


def draw_history(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Loss, accuracy and learning rate over the epochs."""
    epochs = [row["epoch"] for row in history]
    with figure(path, PAGE, 2.2) as drawn:
        loss, accuracy, rate = drawn.subplots(1, 3)
        for axis, name in ((loss, "loss"), (accuracy, "accuracy")):
            axis.plot(epochs, [row[f"train_{name}"] for row in history], color=NORMAL, label="training (mixed)")
            axis.plot(epochs, [row[f"valid_{name}"] for row in history], "--", color=ANOMALOUS, label="validation")
            axis.set(xlabel="epoch", ylabel=name)
        drawn.legend(*loss.get_legend_handles_labels(), loc="outside upper center", ncols=2)
        rate.plot(epochs, [row["lr"] for row in history], color="#009E73")
        rate.set(xlabel="epoch", ylabel="learning rate", ylim=(0, None))
