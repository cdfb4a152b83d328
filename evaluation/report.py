"""One HTML file with everything about an evaluation, that needs no server and no other file."""

import base64
import dataclasses
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.image
import numpy as np
import yaml

from dataloader import ClipSet
from evaluation.decisions import Threshold
from evaluation.tables import in_words, with_interval
from model.tastgram import LogMel
from utils import replace_file

if TYPE_CHECKING:
    from eval import Evaluated

HARDEST = 3  # clips of each kind and ID
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
th, td { padding: 0.15rem 0.7rem; text-align: right; border-bottom: 1px solid #e4e4e4; vertical-align: middle; }
th:first-child, td:first-child { text-align: left; } td img { margin-left: auto; } th { background: #f5f5f5; }
td small { color: #555; white-space: nowrap; } td.text { text-align: left; overflow-wrap: anywhere; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; } td img { display: block; }
figcaption { color: #444; font-size: 0.9rem; } pre { background: #f5f5f5; padding: 0.8rem; overflow-x: auto; }
"""
CAPTIONS = {
    "angles": "Angle between the embedding of each clip and the centre of its own class.",
    "roc": "ROC curve of each machine type, pooled over its IDs; grey: the region of the pAUC.",
    "scores": "Anomaly scores of each machine ID, with its threshold.",
    "tastgram": "The channels that the network hears of one clip, and the gate of the temporal attention.",
    "embedding": "t-SNE map of the embeddings: colour and marker by machine ID, crosses are anomalous clips.",
    "history": "The training: loss, accuracy, learning rate.",
}


def write_report(
    result: "Evaluated", clips: ClipSet, about: Mapping[str, Any], figures: Sequence[Path], path: Path
) -> None:
    """Tables, figures, configuration and the hardest clips, in one file."""
    trained = result.trained
    title = f"{trained.path.name}: {about['mode']}"
    parts = [f"<h1>{text(title)}</h1>", definition_table(about)]
    if result.table is not None:
        parts += ["<h2>Metrics (percent, 95 % intervals)</h2>", metrics_table(result.table)]
    if result.thresholds:
        parts += ["<h2>Thresholds</h2>", threshold_table(result.thresholds)]
    parts.append("<h2>Figures</h2>")
    parts += [f"<figure>{picture(file.read_bytes(), CAPTIONS[file.stem])}<figcaption>{CAPTIONS[file.stem]}</figcaption>"
              "</figure>" for file in figures]  # fmt: skip
    if result.table is not None:
        parts += ["<h2>Hardest clips</h2>", HARDEST_TEXT, hardest_table(result, clips)]
    settings = trained.state.get("config", dataclasses.asdict(trained.config))
    settings = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None)
    parts += ["<h2>Configuration of the training</h2>", f"<pre>{text(settings)}</pre>"]
    page = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{text(title)}</title>\n'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )
    with replace_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


HARDEST_TEXT = (
    f"<p>Of each machine ID the {HARDEST} normal clips with the highest scores and the {HARDEST} anomalous ones with "
    "the lowest. The pictures are log-mel spectrograms, 10 s across and 8 kHz high, each on its own scale.</p>"
)


def text(value: Any) -> str:
    return html.escape(str(value))


def picture(png: bytes, description: str) -> str:
    return f'<img alt="{text(description)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def definition_table(about: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f'<tr><td>{text(name)}</td><td class="text">{text(in_words(value))}</td></tr>' for name, value in about.items()
    )
    return f"<table>{rows}</table>"


def metrics_table(metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    rows = [
        [text(machine_type), text(name), *(cell(row, column) for column in ("AUC", "pAUC")),
         *(text("-" if row[column] is None else f"{row[column]:g}") for column in ("n_normal", "n_anomaly"))]
        for machine_type, of in metrics.items()
        for name, row in of.items()
    ]  # fmt: skip
    return table(["machine type", "ID", "AUC", "pAUC", "normal clips", "anomalous clips"], rows)


def cell(row: Mapping[str, Any], column: str) -> str:
    value, _, interval = with_interval(dict(row), column).partition(" ")
    return f"{value} <small>{text(interval)}</small>"


def threshold_table(thresholds: Mapping[tuple[str, int], Threshold]) -> str:
    rows = [
        [text(f"{machine_type} {machine_id:02d}"), f"{of.value:.4g}", of.source]
        for (machine_type, machine_id), of in thresholds.items()
    ]
    return table(["machine", "threshold", "from held-out"], rows)


def hardest_table(result: "Evaluated", clips: ClipSet) -> str:
    rows, log_mel = [], LogMel().to(clips.waveforms.device)
    for index in hardest(result):
        clip = result.clips[index]
        rows.append([text(f"{clip.machine_type} {clip.machine_id:02d}"), text(clip.path.name),
                     "anomalous" if clip.is_anomaly else "normal", f"{result.exact_scores[index]:.4g}",
                     picture(small_picture(log_mel, clips, index), f"log-mel of {clip.path.name}")])  # fmt: skip
    return table(["machine", "clip", "condition", "score", "log-mel"], rows)


def hardest(result: "Evaluated") -> list[int]:
    """The indices of the normal clips with the highest and the anomalous ones with the lowest scores of each ID."""
    groups: dict[tuple[str, int, bool], list[int]] = {}
    for index in result.known:
        clip = result.clips[index]
        groups.setdefault((clip.machine_type, clip.machine_id, bool(clip.is_anomaly)), []).append(index)
    chosen = []
    for machine_type, machine_id in dict.fromkeys(key[:2] for key in groups):
        for is_anomaly in (False, True):
            order = sorted(
                groups.get((machine_type, machine_id, is_anomaly), []),
                key=lambda index: result.exact_scores[index] * (1 if is_anomaly else -1),
            )
            chosen += order[:HARDEST]
    return chosen


def small_picture(log_mel: LogMel, clips: ClipSet, index: int) -> bytes:
    """A PNG of 157 x 64 pixels: every second frame and mel bin."""
    waveform, _ = clips.batch(np.array([index]), clips.waveforms.device)
    image = log_mel(waveform)[0, 0].cpu().numpy()[::2, ::2]
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, image, origin="lower", cmap="viridis", format="png")
    return buffer.getvalue()
