"""One HTML file with everything about an evaluation; it needs no server and no other file."""

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import matplotlib.image
import pandas as pd
import yaml
from torch import Tensor

from evaluation.figures import read_samples
from evaluation.metrics import COUNTS, Metrics
from evaluation.result import Result
from evaluation.tables import (
    DECISION_EXPLANATION,
    decision_table,
    explain_metrics,
    in_words,
    measured_ids,
    with_interval,
)
from model import FrontEnd
from names import ANOMALOUS, AVERAGE, MIN, NORMAL, POOLED, SUMMARY_ROWS
from utils import write_text

TEMPLATE = Path(__file__).with_name("report.html")
HARDEST = 3  # recordings of each condition and machine
MISTAKES = {(NORMAL, ANOMALOUS): "false alarm", (ANOMALOUS, NORMAL): "missed"}
SUMMARIES = "Mean, min: mean and lowest of each value over the IDs; average: mean over the types."


class Table(NamedTuple):
    """A table of the page: the titles of its columns behind the first, the cells of each row by its
    name, and a text below it.
    """

    titles: list[str]
    rows: dict[str, list[str]]
    text: str = ""


def write_report(result: Result, figures: Sequence[Path], path: Path) -> None:
    """Write tables, figures, configuration and the hardest recordings of a result into one file.
    `figures` are the files of the figures.
    """
    tables = {}
    if result.metrics:
        text = f"{explain_metrics(result.metrics.rule)} {SUMMARIES}"
        tables["Metrics (percent, 95 % intervals)"] = metric_table(result.metrics, text)
    if len(result.decisions):
        table = Table(*decision_table(result.decisions, result.asked), DECISION_EXPLANATION)
        tables[f"Decisions ({result.asked or 'threshold given'})"] = table
    if result.baseline:
        tables["Metrics without a network"] = metric_table(result.baseline)
    configs = [model.config.model_dump() for model in result.detector.members]
    page = load_template().render(
        title=f"{result.detector.title}: {in_words(result.about['mode'])}, {result.kind} score",
        about=result.about,
        tables=tables,
        figures=figures,
        level_name=result.level_name,
        has_decisions=len(result.decisions) > 0,
        hardest=draw_hardest(result),
        n_hardest=HARDEST,
        config=yaml.safe_dump_all(configs, sort_keys=False, default_flow_style=None),
    )
    write_text(path, page)


def load_template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["in_words"] = in_words
    environment.filters["in_base64"] = lambda png: base64.b64encode(png).decode()
    environment.filters["css_width"] = css_width
    environment.filters["pieces"] = lambda text: re.split(
        r" (?=\()", text
    )  # lines of a narrow cell
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def css_width(png: bytes) -> int:
    """Return the width at which a page shows a picture: half its pixels, which are sharp then on a
    dense screen.
    """
    return int.from_bytes(png[16:20], "big") // 2


def metric_table(metrics: Metrics, text: str = "") -> Table:
    """Return the table of metrics with their intervals and the numbers of recordings."""
    titles = [*(name.replace("_", " ") for name in metrics.rule.names), NORMAL, ANOMALOUS]
    rows = {}
    for machine in metrics.rows:
        if not repeats_others(machine, metrics):
            row = metrics.row(*machine)
            cells = [with_interval(row, name) for name in metrics.rule.names]
            rows[" ".join(machine)] = cells + [f"{row[name]:.0f}" for name in COUNTS]
    return Table(titles, rows, text)


def repeats_others(machine: tuple[str, str], metrics: Metrics) -> bool:
    """Whether a row of the table of metrics repeats other rows: summaries of a machine type with
    one ID, the average of one machine type, or its pooled and lowest values where each type has one
    ID.
    """
    machine_type, name = machine
    ids = measured_ids(metrics)
    if machine_type == AVERAGE:
        has_one_id = all(len(of_type) == 1 for of_type in ids.values())
        return len(ids) == 1 or (has_one_id and name in (POOLED, MIN))
    return len(ids[machine_type]) == 1 and name in SUMMARY_ROWS


def find_hardest(result: Result) -> pd.DataFrame:
    """Return the normal recordings with the highest scores and the anomalous ones with the lowest,
    HARDEST of each machine.
    """
    ordered = result.recordings.sort_values("level", kind="stable")
    parts = []
    for machine_type, machine_id in result.detector.classes.machines:
        is_type = ordered["machine_type"] == machine_type
        of_machine = ordered[is_type & (ordered["machine_id"] == machine_id)]
        parts.append(of_machine[of_machine["condition"] == NORMAL][::-1].head(HARDEST))
        parts.append(of_machine[of_machine["condition"] == ANOMALOUS].head(HARDEST))
    return pd.concat(parts)


def draw_hardest(result: Result) -> list[dict]:
    """Return the columns of each of the hardest recordings; its decision in words as `called`, "-"
    without one; what is wrong with it as `mistake`, or ""; and as `png` the log-mel of its window
    with the highest score.
    """
    front_end = FrontEnd(["sgram"])
    rows = find_hardest(result).to_dict("records")
    for row in rows:
        decided = pd.notna(row["decision"])
        row["called"] = (NORMAL, ANOMALOUS)[row["decision"]] if decided else "-"
        row["mistake"] = MISTAKES.get((row["condition"], row["called"]), "")
        samples = read_samples(row["path"], row["worst"], result.windows.channel)
        row["png"] = small_picture(front_end, samples)
    return rows


def small_picture(front_end: FrontEnd, samples: Tensor) -> bytes:
    """Draw a PNG of 157 x 64 pixels: every second frame and mel bin of the log-mel."""
    image = front_end(samples)["log_mel"][0, 0].numpy()[::2, ::2]
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, image, origin="lower", cmap="viridis", format="png")
    return buffer.getvalue()
