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

from evaluation.decisions import RATES
from evaluation.figures import read_samples
from evaluation.metrics import COUNTS, Metrics
from evaluation.result import Result
from evaluation.tables import decision_cells, in_words, with_interval
from model import FrontEnd
from names import ANOMALOUS, NORMAL
from utils import write_text

TEMPLATE = Path(__file__).with_name("report.html")
HARDEST = 3  # recordings of each condition and machine


def write_report(result: Result, figures: Sequence[Path], path: Path) -> None:
    """Write tables, figures, configuration and the hardest recordings of a result into one file.
    `figures` are the files of the figures.
    """
    tables = {}
    if result.metrics:
        tables["Metrics (percent, 95 % intervals)"] = metric_table(result.metrics)
    if len(result.decisions):
        tables[f"Decisions ({result.asked or 'threshold given'})"] = decision_table(result)
    if result.baseline:
        tables["Metrics without a network"] = metric_table(result.baseline)
    config = result.model.config.model_dump()
    page = load_template().render(
        title=f"{result.model.path.name}: {result.about['mode']}, {result.kind} score",
        about=result.about,
        tables=tables,
        figures=figures,
        hardest=draw_hardest(result),
        n_hardest=HARDEST,
        config=yaml.safe_dump(config, sort_keys=False, default_flow_style=None),
    )
    write_text(path, page)


def load_template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["in_words"] = in_words
    environment.filters["in_base64"] = lambda png: base64.b64encode(png).decode()
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def metric_table(metrics: Metrics) -> pd.DataFrame:
    """Return the table of metrics with text in its cells: metrics with intervals, and counts."""
    text = metrics.table.index.to_frame(index=False)
    for name in metrics.rule.names:
        text[name] = [with_interval(row, name) for _, row in metrics.table.iterrows()]
    for name in COUNTS:
        text[name] = metrics.table[name].to_numpy()
    return text


def decision_table(result: Result) -> pd.DataFrame:
    """Return the table of decisions, with rates and intervals in percent as text."""
    names = ["threshold", "source"]
    for rate, (part, whole) in RATES.items():
        names += [whole, part, rate]
    cells = pd.DataFrame(decision_cells(result.decisions), columns=[*names, "precision", "F1"])
    return pd.concat([result.decisions.index.to_frame(index=False), cells], axis=1)


def find_hardest(result: Result) -> pd.DataFrame:
    """Return the normal recordings with the highest scores and the anomalous ones with the lowest,
    HARDEST of each machine.
    """
    ordered = result.recordings.sort_values("level", kind="stable")
    parts = []
    for machine_type, machine_id in result.model.classes.machines:
        is_type = ordered["machine_type"] == machine_type
        of_machine = ordered[is_type & (ordered["machine_id"] == machine_id)]
        parts.append(of_machine[of_machine["condition"] == NORMAL][::-1].head(HARDEST))
        parts.append(of_machine[of_machine["condition"] == ANOMALOUS].head(HARDEST))
    return pd.concat(parts)


def draw_hardest(result: Result) -> list[dict]:
    """Return the columns of each of the hardest recordings, and as `png` the log-mel of its window
    with the highest score.
    """
    front_end = FrontEnd(["sgram"])
    rows = find_hardest(result).to_dict("records")
    for row in rows:
        samples = read_samples(row["path"], row["worst"], result.windows.channel)
        row["png"] = small_picture(front_end, samples)
    return rows


def small_picture(front_end: FrontEnd, samples: Tensor) -> bytes:
    """Draw a PNG of 157 x 64 pixels: every second frame and mel bin of the log-mel."""
    image = front_end(samples)["log_mel"][0, 0].numpy()[::2, ::2]
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, image, origin="lower", cmap="viridis", format="png")
    return buffer.getvalue()
