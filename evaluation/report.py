"""One HTML file with everything about an evaluation; it needs no server and no other file."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import jinja2
import matplotlib.image
import pandas as pd
import yaml
from torch import Tensor

from evaluation.figures import read_samples
from evaluation.metrics import COUNTS, Metrics
from evaluation.result import HARDEST, Result
from evaluation.tables import in_words, with_interval
from model import FrontEnd
from utils import write_text

TEMPLATE = Path(__file__).with_name("report.html")


def write_report(result: Result, figures: Sequence[Path], path: Path) -> None:
    """Write tables, figures, configuration and the hardest clips of a result into one file.

    `figures` are the files of the pictures.
    """
    tables = {}
    if result.metrics:
        tables["Metrics (percent, 95 % intervals)"] = metric_table(result.metrics)
    if len(result.thresholds):
        tables["Thresholds"] = result.thresholds.reset_index()
    config = result.model.config.model_dump()
    page = load_template().render(
        title=f"{result.model.path.name}: {result.about['mode']}, {result.kind} score",
        about=result.about,
        tables=tables,
        figures=figures,
        hardest=hardest_clips(result),
        n_hardest=HARDEST,
        config=yaml.safe_dump(config, sort_keys=False, default_flow_style=None),
    )
    write_text(path, page)


def load_template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["in_words"] = in_words
    environment.filters["in_base64"] = in_base64
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def in_base64(png: bytes) -> str:
    return base64.b64encode(png).decode()


def metric_table(metrics: Metrics) -> pd.DataFrame:
    """Return the table of metrics with text in its cells: metrics with intervals, and counts."""
    text = metrics.table.index.to_frame(index=False)
    for name in metrics.rule.names:
        text[name] = [with_interval(row, name) for _, row in metrics.table.iterrows()]
    for name in COUNTS:
        text[name] = [format_count(count) for count in metrics.table[name]]
    return text


def format_count(count: float) -> str:
    return "-" if pd.isna(count) else f"{count:g}"


def hardest_clips(result: Result) -> list[dict]:
    """Return the columns of each of the hardest recordings, and as `png` a picture of its window
    with the highest score.
    """
    front_end = FrontEnd(["sgram"])
    clips = result.hardest.to_dict("records")
    for clip in clips:
        samples = read_samples(clip["path"], clip["worst"], result.windows.channel)
        clip["png"] = small_picture(front_end, samples)
    return clips


def small_picture(front_end: FrontEnd, samples: Tensor) -> bytes:
    """Draw a PNG of 157 x 64 pixels: every second frame and mel bin of the log-mel."""
    image = front_end(samples)["log_mel"][0, 0].numpy()[::2, ::2]
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, image, origin="lower", cmap="viridis", format="png")
    return buffer.getvalue()
