"""One HTML file with everything about an evaluation, that needs no server and no other file."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import jinja2
import matplotlib.image
import pandas as pd
import yaml
from torch import Tensor

from corpus import MACHINE
from evaluation.figures import read_samples
from evaluation.metrics import COUNTS, Metrics
from evaluation.result import HARDEST, Result
from evaluation.tables import in_words, with_interval
from model import FrontEnd
from utils import write_text

TEMPLATE = Path(__file__).with_name("report.html")


def write_report(result: Result, figures: Sequence[Path], path: Path) -> None:
    """Tables, figures, configuration and the hardest clips, in one file."""
    tables = {}
    if result.metrics:
        tables["Metrics (percent, 95 % intervals)"] = metric_table(result.metrics)
    if len(result.thresholds):
        tables["Thresholds"] = result.thresholds.reset_index()
    config = result.trained.state.get("config", result.trained.config.model_dump())
    content = {
        "title": f"{result.trained.path.name}: {result.about['mode']}, {result.about['scoring']} score",
        "about": {name: in_words(value) for name, value in result.about.items()},
        "tables": {title: table.to_html(index=False, border=0) for title, table in tables.items()},
        "figures": {file.stem: in_base64(file.read_bytes()) for file in figures},
        "hardest": hardest_clips(result),
        "n_hardest": HARDEST,
        "config": yaml.safe_dump(config, sort_keys=False, default_flow_style=None),
    }
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    write_text(path, template.from_string(TEMPLATE.read_text(encoding="utf-8")).render(content))


def metric_table(metrics: Metrics) -> pd.DataFrame:
    """The metrics as text."""
    table = metrics.table
    cells = {
        name: [with_interval(row, name) for _, row in table.iterrows()]
        for name in metrics.rule.rates
    }
    counts = {
        name: table[name].map(lambda count: "-" if pd.isna(count) else f"{count:g}")
        for name in COUNTS
    }
    return table.index.to_frame(index=False).assign(
        **cells, **{name: text.to_numpy() for name, text in counts.items()}
    )


def hardest_clips(result: Result) -> list[dict]:
    clips = result.hardest[["path", "worst", *MACHINE, "condition", "exact_score"]].to_dict(
        "records"
    )
    front_end, channel = FrontEnd(["sgram"]), result.trained.config.channel
    return [
        clip
        | {
            "png": in_base64(
                small_picture(front_end, read_samples(clip["path"], clip["worst"], channel))
            )
        }
        for clip in clips
    ]


def in_base64(png: bytes) -> str:
    return base64.b64encode(png).decode()


def small_picture(front_end: FrontEnd, samples: Tensor) -> bytes:
    """A PNG of 157 x 64 pixels: every second frame and mel bin of the log-mel."""
    image = front_end(samples)["log_mel"][0, 0].numpy()[::2, ::2]
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, image, origin="lower", cmap="viridis", format="png")
    return buffer.getvalue()
