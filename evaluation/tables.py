"""The metrics as text and files: the table on the terminal, metrics.csv, metrics.json, results.md,
score files.
"""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pandas as pd

from evaluation.decisions import RATES, Row, describe_decisions, format_rate, named_rows
from evaluation.metrics import COVERAGE, DRAWS, OFFICIAL, SEED, TAIL, Metrics, Rule
from evaluation.result import Result
from model import PUBLISHED_CHANNELS
from names import AVERAGE, HMEAN, MEAN, MIN, POOLED, SOURCE, SUMMARY_ROWS, TARGET
from utils import notice, remove_files, write_csv, write_text

# ---- The columns of tables for reading ----


class Column(NamedTuple):
    """A column of tables for reading: a metric in a summary row of each machine type."""

    summary: str
    metric: str

    @property
    def heading(self) -> str:
        """The name below the title of a block of columns, as in "AUC source" or "mAUC"."""
        name = self.metric.replace("_", " ")
        return f"m{name}" if self.summary == MIN else name

    @property
    def title(self) -> str:
        """The name without a block, as in "AUC, pooled" or "mAUC"."""
        if self.metric == OFFICIAL:
            return "official score"
        endings = {POOLED: ", pooled", MEAN: ", mean over IDs", MIN: "", HMEAN: ", harmonic mean"}
        return f"{self.heading}{endings[self.summary]}"


def columns_of(rule: Rule) -> list[Column]:
    """Return the columns of tables for reading."""
    columns = []
    for summary in (POOLED, MIN, MEAN, HMEAN):
        for name in rule.shown_in(summary):
            columns.append(Column(summary, name))
    return columns


def titles_of(columns: Sequence[Column]) -> list[str]:
    return [column.title for column in columns]


# ---- The published results ----


def published_row(auc: float, pauc: float, mauc: float) -> dict[Column, float]:
    return {Column(POOLED, "AUC"): auc, Column(POOLED, "pAUC"): pauc, Column(MIN, "AUC"): mauc}


# In percent on the development test set, by mode: the table in the authors' README
PUBLISHED = {
    "noisy_arcmix": {
        "fan": published_row(auc=98.32, pauc=95.34, mauc=92.67),
        "pump": published_row(auc=95.44, pauc=85.99, mauc=91.17),
        "slider": published_row(auc=99.53, pauc=97.50, mauc=97.96),
        "valve": published_row(auc=99.95, pauc=99.74, mauc=99.89),
        "ToyCar": published_row(auc=96.76, pauc=90.11, mauc=88.81),
        "ToyConveyor": published_row(auc=77.90, pauc=67.15, mauc=68.18),
        AVERAGE: published_row(auc=94.65, pauc=89.31, mauc=89.78),
    }
}
# The machine IDs of that test set: AUC and pAUC are pooled over them, so results of other IDs
# cannot be compared
MIMII_IDS = {"00", "02", "04", "06"}
PUBLISHED_IDS = {
    "fan": MIMII_IDS,
    "pump": MIMII_IDS,
    "slider": MIMII_IDS,
    "valve": MIMII_IDS,
    "ToyCar": {"01", "02", "03", "04"},
    "ToyConveyor": {"01", "02", "03"},
}
Published = Mapping[str, dict[Column, float]]  # by machine type


def published_rows(result: Result) -> Published:
    """Return the published results that a result can be compared with; none unless split, channels,
    windows, score and machine IDs are those of the paper, and none for the average unless all
    machine types were evaluated.
    """
    metrics = result.metrics
    if metrics is None or metrics.rule.official or not is_published_method(result):
        return {}
    ids = measured_ids(metrics)
    for machine_type, published_ids in PUBLISHED_IDS.items():
        if ids.get(machine_type, published_ids) != published_ids:
            return {}
    machine_types = set(ids)
    if machine_types >= PUBLISHED_IDS.keys():
        machine_types.add(AVERAGE)
    published = PUBLISHED.get(result.detector.config.mode, {})
    return {name: row for name, row in published.items() if name in machine_types}


def is_published_method(result: Result) -> bool:
    """Whether channels, windows, score and split are those of the paper."""
    return (
        not result.detector.is_ensemble
        and result.detector.config.input == list(PUBLISHED_CHANNELS)
        and result.windows.hop is None
        and result.kind == "published"
        and result.split == "test"
    )


def measured_ids(metrics: Metrics) -> dict[str, set[str]]:
    """Return the machine IDs in the table by machine type."""
    ids: dict[str, set[str]] = defaultdict(set)
    for machine_type, machine_id in metrics.table.index:
        if machine_id not in SUMMARY_ROWS:
            ids[machine_type].add(machine_id)
    return ids


# ---- What tables show ----

WITHOUT_NETWORK = "without a network"  # the name of the row of `Result.baseline`


class ShownMetrics(NamedTuple):
    """The metrics of a table for reading, with what stands beside them.

    Attributes:
        metrics: The metrics.
        published: The published results.
        baseline: The metrics of the score without a network, see `Result`.
    """

    metrics: Metrics
    published: Published = MappingProxyType({})
    baseline: Metrics | None = None

    def rows(self, summary: str) -> dict[str, pd.Series]:
        """Return a summary row of each machine type by name; the last is the average without a
        network, if it is known.
        """
        types = self.metrics.machine_types
        if len(types) == 2:  # the average would repeat the row of the only machine type
            types.remove(AVERAGE)
        rows = {name: self.metrics.row(name, summary) for name in types}
        if self.baseline:
            rows[WITHOUT_NETWORK] = self.baseline.row(AVERAGE, summary)
        return rows


# ---- The table on the terminal ----


def format_table(shown: ShownMetrics) -> str:
    """Format the metrics of each machine type in percent.

    They are pooled over the IDs, as published, and means over the IDs, as in the challenge. The
    last columns have what the official score consists of, or else the published results. The last
    row is the average without a network.
    """
    rule = shown.metrics.rule
    titles = {POOLED: "pooled over IDs", MIN: "lowest", MEAN: "mean over IDs"}
    if rule.official:
        titles[HMEAN] = "harmonic mean over IDs"
    blocks = []
    for summary, title in titles.items():
        columns = [Column(summary, name) for name in rule.shown_in(summary)]
        rows = []
        for row in shown.rows(summary).values():
            rows.append([percent(row[column.metric]) for column in columns])
        blocks.append(format_block(title, columns, rows))
    names = list(shown.rows(MEAN))
    if not rule.official:
        published = shown.published
        columns = list(next(iter(published.values()), {}))
        rows = [published_cells(published.get(name, {}), columns) for name in names]
        title = "published, DCASE 2020" if published else ""
        blocks.append(format_block(title, columns, rows))
    width = max(12, *map(len, names))
    lines = []
    for name, *cells in zip(["", "in percent", *names], *blocks, strict=True):
        lines.append(f"{name:{width}} |{'|'.join(cells)}".rstrip())
    if rule.text:
        lines.append(f"Domains: {rule.text}")
    return "\n".join(lines)


def format_block(title: str, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of columns with a common title: title, headings and rows."""
    headings = [column.heading for column in columns]
    widths = [max(8, len(heading)) for heading in headings]
    lines = []
    for cells in (headings, *rows):
        lines.append(" ".join(map(str.rjust, cells, widths)) + "  ")
    return [f" {title:^{len(lines[0]) - 2}} ", *lines]


def published_cells(row: dict[Column, float], columns: Sequence[Column]) -> list[str]:
    """Format the published results of a machine type, "-" where there is none."""
    return [f"{row[column]:.2f}" if column in row else "-" for column in columns]


def percent(value: float) -> str:
    return "-" if pd.isna(value) else f"{100 * value:.2f}"


# ---- Markdown ----


def markdown_header(title: str, columns: Sequence[str]) -> list[str]:
    return [markdown_row(title, columns), "| --- |" + " ---: |" * len(columns)]


def markdown_row(name: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(escape_markdown, (name, *cells)))} |"


def escape_markdown(text: str) -> str:
    """Escape the characters with a meaning in Markdown or HTML. A "_" within a word has none."""
    return re.sub(r"[\\`*\[\]<>|~$&]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


def markdown_table(shown: ShownMetrics) -> str:
    """Format the metrics of each machine type in percent, each with its interval."""
    columns = columns_of(shown.metrics.rule)
    lines = markdown_header("machine type", titles_of(columns))
    for name in shown.rows(MEAN):
        cells = [with_interval(shown.rows(summary)[name], metric) for summary, metric in columns]
        lines.append(markdown_row(name, cells))
    return "\n".join(lines)


def with_interval(row: pd.Series, metric: str) -> str:
    """Format a metric of a row of the table in percent, as in "91.20 (88.15 to 93.80)"."""
    if pd.isna(row[metric]):
        return "-"
    low, high = percent(row[f"{metric}_low"]), percent(row[f"{metric}_high"])
    return f"{percent(row[metric])} ({low} to {high})"


def in_words(value: Any) -> str:
    """Format a value of a configuration or of `Result.about`."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    if isinstance(value, list):
        return " + ".join(map(in_words, value))
    if value is None:
        return "not known"
    return str(value) or "none"


# ---- Files ----

RESULT_FILES = (
    "metrics.csv",
    "metrics.json",
    "results.md",
    "decisions.csv",
    "report.html",
    "anomaly_score_*.csv",
    "decision_result_*.csv",
)


def clear_results(folder: Path) -> None:
    """Remove the files of an earlier evaluation, and the folder if nothing else is in it."""
    remove_files(folder / "figures", ["*.png"])
    remove_files(folder, RESULT_FILES)


def write_result(result: Result, folder: Path) -> None:
    """Write the tables of a result in place of all files of an earlier evaluation, and print the
    metrics.
    """
    clear_results(folder)
    recordings, decisions = result.recordings, result.decisions
    write_per_machine(folder, "anomaly_score", recordings, "score")
    if result.metrics:
        about = result.about
        mode, channels = in_words(about["mode"]), in_words(about["input"])
        title = f"{mode}, input {channels}, {about['scoring']} score"
        shown = ShownMetrics(result.metrics, published_rows(result), result.baseline)
        show_metrics(shown, title, about, folder, decision_section(decisions, result.asked))
        if described := describe_decisions(decisions, result.asked):
            print(described)
    decided = recordings[recordings["decision"].notna()]
    write_per_machine(folder, "decision_result", decided, "decision")
    if len(decisions):
        write_csv(folder / "decisions.csv", decisions.reset_index())
    scores = "1 score" if len(recordings) == 1 else f"{len(recordings)} scores"
    print(f"{scores}{' and metrics' if result.metrics else ''}: {folder}")


def show_metrics(
    shown: ShownMetrics, title: str, about: dict[str, Any], folder: Path, decisions: str = ""
) -> None:
    """Write metrics into files and print them, with a notice of what cannot be measured.

    `about` says by name what was evaluated, `decisions` is a section of results.md.
    """
    metrics = shown.metrics
    report_gaps(metrics)
    write_text(folder / "results.md", format_results(shown, title, about, decisions))
    write_text(folder / "metrics.json", format_json(shown, about))
    write_csv(folder / "metrics.csv", metrics.table.reset_index())
    print(format_table(shown))


def report_gaps(metrics: Metrics) -> None:
    """Print notices of the rows without an AUC, and of the machine IDs without that of a domain."""
    table, reason = metrics.table, "because normal or anomalous clips are missing"
    is_missing = table["AUC"].isna()
    if is_missing.any():
        gaps = name_rows(table[is_missing])
        notice(f"no AUC {reason}; left out of the averages: {gaps}")
    if not metrics.rule.official:
        return
    is_summary = table.index.isin(SUMMARY_ROWS, level="machine_id")
    for domain in (SOURCE, TARGET):
        gaps = name_rows(table[~is_missing & ~is_summary & table[f"AUC_{domain}"].isna()])
        if gaps:
            notice(
                f"no AUC of the {domain} domain {reason}; harmonic means and official score are "
                f"computed without it: {gaps}"
            )


def name_rows(table: pd.DataFrame) -> str:
    return ", ".join(map(" ".join, table.index))


def format_results(
    shown: ShownMetrics, title: str, about: dict[str, Any], decisions: str = ""
) -> str:
    """Return the content of results.md."""
    rule = shown.metrics.rule
    paragraphs = [
        f"# {escape_markdown(title)}",
        markdown_table(shown),
        f"{explain_metrics(rule)} mAUC: the lowest AUC of an ID.",
    ]
    if rule.text:
        paragraphs.append(
            f"Harmonic means: over the IDs of a type, for `average` over all IDs; {rule.text}."
        )
    if decisions:
        paragraphs.append(decisions)
    lines = [f"- {name}: {escape_markdown(in_words(value))}" for name, value in about.items()]
    paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs) + "\n"


def explain_metrics(rule: Rule) -> str:
    """Say what a table of metrics with intervals shows."""
    strata = "machine ID, domain and condition" if rule.official else "machine ID and condition"
    texts = [f"{metric.name}: {metric.text}." for metric in rule.metrics if metric.text]
    explanation = (
        f"In percent, with {100 * COVERAGE:g} % bootstrap intervals ({DRAWS} draws of the test "
        f"recordings within {strata}). The resamples of a value of 100 are all 100; its lower "
        f"bound is the value at which as many recordings give 100 in {100 * TAIL:.1f} % of cases "
        "at most. Pooled: one ROC curve over all recordings of a machine type."
    )
    return " ".join([explanation, *texts])


def format_json(shown: ShownMetrics, about: dict[str, Any]) -> str:
    """Return the content of metrics.json."""
    rule = shown.metrics.rule
    content = {
        "about": about | {"domains": rule.text} if rule.text else about,
        "interval": {"coverage": COVERAGE, "draws": DRAWS, "seed": SEED},
        "metrics": rows_by_type(shown.metrics),
    }
    if shown.baseline:
        content[WITHOUT_NETWORK] = rows_by_type(shown.baseline)
    return json.dumps(content, indent=2) + "\n"


def rows_by_type(metrics: Metrics) -> dict[str, dict]:
    """Return the rows of the table by machine type, with None for missing values."""
    rows = metrics.table.astype(object).where(metrics.table.notna(), None)
    types = rows.index.unique("machine_type")
    return {machine_type: rows.loc[machine_type].to_dict("index") for machine_type in types}


def decision_section(decisions: pd.DataFrame, asked: str) -> str:
    """Return the section of results.md about decisions; "" if there are none."""
    if decisions.empty:
        return ""
    titles, rows = decision_table(decisions, asked)
    lines = markdown_header("machine", titles)
    lines += [markdown_row(name, cells) for name, cells in rows.items()]
    return "\n".join([*lines, "", DECISION_EXPLANATION])


DECISION_EXPLANATION = (
    "False alarms: normal recordings that were called anomalous; detected: anomalous ones; with "
    f"exact intervals of {100 * COVERAGE:g} %. Precision and F1 are in percent."
)


def decision_table(decisions: pd.DataFrame, asked: str) -> tuple[list[str], dict[str, list[str]]]:
    """Return the titles of the columns of a table of decisions, and the cells of each machine by
    its name, and of all.
    """
    false_alarms = f"false alarms ({asked})" if asked else "false alarms"
    titles = [false_alarms, "detected", "threshold", "from", "precision", "F1"]
    cells = {}
    for name, row in named_rows(decisions).items():
        rates = [count_and_rate(row, rate) for rate in RATES]
        threshold = f"{row['threshold']:.6g}" if "threshold" in row else "-"
        source = row.get("source", "-")
        ratios = [percent(row[ratio]) for ratio in ("precision", "F1")]
        cells[name] = [*rates, threshold, source, *ratios]
    return titles, cells


def count_and_rate(row: Row, rate: str) -> str:
    """Format a rate of decisions, as in "3 of 16, 18.8 % (4.0 to 45.6)"; "-" if it is missing."""
    part, whole = RATES[rate]
    return f"{row[part]} of {row[whole]}, {format_rate(row, rate)}" if row[whole] else "-"


def write_per_machine(folder: Path, name: str, recordings: pd.DataFrame, column: str) -> None:
    """Write a column of recordings into files that are named as in the challenge:
    `<name>_<machine type>_<part>.csv`, such as anomaly_score_fan_id_02.csv.

    A line is `<file name>,<value>`; there is no header.
    """
    for (machine_type, part), group in recordings.groupby(["machine_type", "part"]):
        file_names = [path.name for path in group["path"]]
        values = group[column].astype(float if column == "score" else int)
        rows = pd.DataFrame({"file": file_names, "value": values})
        write_csv(folder / f"{name}_{machine_type}_{part}.csv", rows, header=False)
