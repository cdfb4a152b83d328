"""The metrics as text and files: the table on the terminal, metrics.csv, metrics.json, results.md, score files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from checkpoint import RESULT_FILES, clear
from config import Config
from dataloader import LABEL_LIST, MACHINE
from evaluation.decisions import count_decisions, explain_thresholds
from evaluation.metrics import AVERAGE, COVERAGE, DRAWS, SEED
from evaluation.result import Result
from utils import notice, write_csv, write_text

# AUC, pAUC, mAUC (the first three of SUMMARY) in percent on the development test set: the table in the authors' README
PUBLISHED = {
    "noisy_arcmix": {
        "fan": (98.32, 95.34, 92.67),
        "pump": (95.44, 85.99, 91.17),
        "slider": (99.53, 97.50, 97.96),
        "valve": (99.95, 99.74, 99.89),
        "ToyCar": (96.76, 90.11, 88.81),
        "ToyConveyor": (77.90, 67.15, 68.18),
        AVERAGE: (94.65, 89.31, 89.78),
    }
}
PUBLISHED_INPUT = ["tgram", "sgram", "tagram"]
Published = dict[str, tuple[float, float, float]]
# What a machine type is summed up in: the row of the metrics, the column, and its title
SUMMARY = (("pooled", "AUC", "AUC, pooled"), ("pooled", "pAUC", "pAUC, pooled"), ("min", "AUC", "mAUC"),
           ("mean", "AUC", "AUC, mean over IDs"), ("mean", "pAUC", "pAUC, mean over IDs"))  # fmt: skip
TITLES = [title for *_, title in SUMMARY]


def published_rows(config: Config, split: str, table: pd.DataFrame) -> Published:
    """The published rows for what was evaluated: the development test set, the published channels, windows and score,
    the machine types of the metrics. The average is among them if all its types are.
    """
    is_published = (config.input, config.window, config.scoring) == (PUBLISHED_INPUT, "first", "published")
    rows = PUBLISHED.get(config.mode, {}) if is_published and split == "test" else {}
    types = set(table.index.unique("machine_type"))
    return {name: row for name, row in rows.items() if name in types and (name != AVERAGE or set(rows) <= types)}


def percent(value: float) -> str:
    return "-" if pd.isna(value) else f"{100 * value:.2f}"


def format_table(table: pd.DataFrame, published: Published) -> str:
    """The metrics in percent: pooled over IDs as published, as mean over IDs as DCASE rules, and the published row."""
    types = table.index.unique("machine_type")
    lines = [
        f"{'':12} | {'pooled over IDs':^17} | {'lowest':^8} | {'mean over IDs':^17} | {'published, DCASE 2020':^26}",
        f"{'in percent':12} |{'AUC':>8} {'pAUC':>8}  |{'mAUC':>8}  |{'AUC':>8} {'pAUC':>8}  "
        f"|{'AUC':>8} {'pAUC':>8} {'mAUC':>8}",
    ]
    for machine_type in types:
        values = [f"{percent(table.loc[(machine_type, row), column]):>8}" for row, column, _ in SUMMARY]
        shown = [f"{value:8.2f}" for value in published.get(machine_type, ())] or [f"{'-':>8}"] * 3
        lines.append(
            f"{machine_type:12} |{values[0]} {values[1]}  |{values[2]}  |{values[3]} {values[4]}  |{' '.join(shown)}"
        )
    return "\n".join(line.rstrip() for line in lines)


def markdown_header(title: str, columns: Sequence[str] = TITLES) -> list[str]:
    return [markdown_row(title, columns), "| --- |" + " ---: |" * len(columns)]


def markdown_row(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def markdown_table(table: pd.DataFrame) -> str:
    """The metrics of each machine type in Markdown, in percent, each with its interval."""
    lines = markdown_header("machine type")
    for machine_type in table.index.unique("machine_type"):
        cells = [with_interval(table.loc[(machine_type, row)], column) for row, column, _ in SUMMARY]
        lines.append(markdown_row(machine_type, cells))
    return "\n".join(lines)


def with_interval(row: pd.Series, column: str) -> str:
    if pd.isna(row[column]):
        return "-"
    return f"{percent(row[column])} ({percent(row[f'{column}_low'])} to {percent(row[f'{column}_high'])})"


def in_words(value: Any) -> str:
    """A value of `Result.about` as text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {x}" for name, x in value.items())
    if isinstance(value, list):
        return " + ".join(map(str, value))
    return "not known" if value in (None, "") else str(value)


# ---- Files ----


def write_result(result: Result, folder: Path, split: str) -> None:
    """Write the tables in place of everything that an earlier evaluation wrote, and print the metrics."""
    clear(folder, RESULT_FILES)
    write_per_machine(folder, "anomaly_score", result.clips, "score")
    n_unknown, n_clips = len(result.clips) - len(result.known), len(result.clips)
    if n_unknown:
        notice(
            f"{n_unknown} of {n_clips} clips are not in {LABEL_LIST} and count in no metric "
            f"(`python datasets/download.py --parts evaluation` fetches it into data_root)"
        )
    if result.metrics:
        table = result.metrics.table
        if gaps := [f"{machine_type} {row}" for machine_type, row in table.index[table["AUC"].isna()]]:
            reason = "because normal or anomalous clips are missing"
            notice(f"no AUC, and left out of the averages, {reason}: {', '.join(gaps)}")
        write_metrics(table, result.about, folder)
        print(format_table(table, published_rows(result.trained.config, split, table)))
    explain_thresholds(result.thresholds, result.trained.config.machines, result.trained.path)
    write_per_machine(folder, "decision_result", result.clips[result.clips["decision"].notna()], "decision")
    if len(result.thresholds):
        write_csv(folder / "decisions.csv", count_decisions(result.clips, result.thresholds).reset_index())
    print(f"{n_clips} scores{' and metrics' if result.metrics else ''}: {folder}")


def write_metrics(table: pd.DataFrame, about: dict[str, Any], folder: Path) -> None:
    """results.md, metrics.json and metrics.csv."""
    text = [
        f"# {about['mode']}, input {in_words(about['input'])}, {about['scoring']} score\n",
        markdown_table(table) + "\n",
        f"In percent, with {COVERAGE:.0%} bootstrap intervals ({DRAWS} draws of the test clips within machine ID and "
        "condition). Pooled: one AUC over all clips of a machine type. mAUC: the lowest AUC of an ID. pAUC: false "
        "positive rates up to 0.1, standardised.\n",
        *(f"- {name}: {in_words(value)}" for name, value in about.items()),
    ]
    write_text(folder / "results.md", "\n".join(text) + "\n")
    rows = table.astype(object).where(table.notna(), None)
    metrics = {
        machine_type: rows.loc[machine_type].to_dict("index") for machine_type in rows.index.unique("machine_type")
    }
    content = {"about": about, "interval": {"coverage": COVERAGE, "draws": DRAWS, "seed": SEED}, "metrics": metrics}
    write_text(folder / "metrics.json", json.dumps(content, indent=2) + "\n")
    write_csv(folder / "metrics.csv", table.reset_index())


def write_per_machine(folder: Path, name: str, clips: pd.DataFrame, column: str) -> None:
    """`<name>_<type>_id_<XX>.csv` with `<file name>,<value>` lines, without header."""
    for (machine_type, machine_id), group in clips.groupby(MACHINE):
        values = group[column].astype(float if column == "score" else int)
        rows = pd.DataFrame({"file": [path.name for path in group["path"]], "value": values})
        write_csv(folder / f"{name}_{machine_type}_id_{machine_id}.csv", rows, header=False)
