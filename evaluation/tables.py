"""The metrics as text and files: the table on the terminal, metrics.csv, metrics.json, results.md, score files."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataloader import Clip
from evaluation.metrics import BOUNDS, COLUMNS, COVERAGE, DRAWS, SEED, Table
from utils import Config, notice, replace_file

# AUC, pAUC, mAUC in percent on the development test set: the table in the authors' README
PUBLISHED = {
    "noisy_arcmix": {
        "fan": (98.32, 95.34, 92.67),
        "pump": (95.44, 85.99, 91.17),
        "slider": (99.53, 97.50, 97.96),
        "valve": (99.95, 99.74, 99.89),
        "ToyCar": (96.76, 90.11, 88.81),
        "ToyConveyor": (77.90, 67.15, 68.18),
        "average": (94.65, 89.31, 89.78),
    }
}
Published = dict[str, tuple[float, float, float]]


def published_rows(config: Config, part: str) -> Published:
    """The published rows for what was evaluated: the development test set, all three channels as published."""
    is_published = part == "test" and len(config.input) == 3 and config.attention == "published"
    return PUBLISHED.get(config.mode, {}) if is_published else {}


def name_gaps(table: Table) -> None:
    """Say which rows have no AUC because all their test clips are of one class."""
    gaps = [f"{t} {row}" for t, rows in table.items() for row, metrics in rows.items() if metrics["AUC"] is None]
    if gaps:
        notice(f"no AUC, and left out of the averages, for want of normal or anomalous test clips: {', '.join(gaps)}")


def percent(value: float | None) -> str:
    return f"{'-' if value is None else format(100 * value, '.2f'):>8}"


def format_table(table: Table, published: Published) -> str:
    """The table in percent: pooled over IDs as published, as mean over IDs as DCASE rules, and the published row."""
    has_all = set(published) <= set(table)
    lines = [
        f"{'':12} | {'pooled over IDs':^17} | {'lowest':^8} | {'mean over IDs':^17} | {'published, DCASE 2020':^26}",
        f"{'in percent':12} |{'AUC':>8} {'pAUC':>8}  |{'mAUC':>8}  |{'AUC':>8} {'pAUC':>8}  "
        f"|{'AUC':>8} {'pAUC':>8} {'mAUC':>8}",
    ]
    for machine_type, rows in table.items():
        pooled, mean, least = rows["pooled"], rows["mean"], rows["min"]
        row = published.get(machine_type) if machine_type != "average" or has_all else None
        shown = " ".join(f"{value:8.2f}" for value in row) if row else f"{'-':>8} {'-':>8} {'-':>8}"
        lines.append(
            f"{machine_type:12} |{percent(pooled['AUC'])} {percent(pooled['pAUC'])}  |{percent(least['AUC'])}  "
            f"|{percent(mean['AUC'])} {percent(mean['pAUC'])}  |{shown}"
        )
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(table: Table) -> str:
    """The table in Markdown, in percent, each figure with its interval."""
    lines = [
        "| | AUC, pooled | pAUC, pooled | mAUC | AUC, mean over IDs | pAUC, mean over IDs |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for machine_type, rows in table.items():
        cells = [(rows["pooled"], "AUC"), (rows["pooled"], "pAUC"), (rows["min"], "AUC"),
                 (rows["mean"], "AUC"), (rows["mean"], "pAUC")]  # fmt: skip
        lines.append(f"| {machine_type} | " + " | ".join(with_interval(*cell) for cell in cells) + " |")
    return "\n".join(lines)


def with_interval(row: dict[str, Any], column: str) -> str:
    if row[column] is None:
        return "-"
    low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
    interval = "" if low is None else f" ({100 * low:.2f} to {100 * high:.2f})"
    return f"{100 * row[column]:.2f}{interval}"


def write_results(folder: Path, table: Table, about: dict[str, Any]) -> None:
    """results.md, metrics.json and metrics.csv of a table; `about` says what was evaluated, by name."""
    text = [
        f"# {about['mode']}, input {' + '.join(about['input'])}\n",
        markdown_table(table) + "\n",
        f"In percent, with {COVERAGE:.0%} bootstrap intervals ({DRAWS} draws of the test clips within machine ID and "
        "condition). Pooled: one AUC over all clips of a machine type. mAUC: the lowest AUC of an ID. pAUC: false "
        "positive rates up to 0.1, standardised.\n",
        *(f"- {name}: {in_words(value)}" for name, value in about.items()),
    ]
    with replace_file(folder / "results.md") as temporary:
        temporary.write_text("\n".join(text) + "\n", encoding="utf-8")
    content = {"about": about, "interval": {"coverage": COVERAGE, "draws": DRAWS, "seed": SEED}, "metrics": table}
    with replace_file(folder / "metrics.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
    columns = (*COLUMNS, *BOUNDS)
    rows = [[t, name, *(row.get(column) for column in columns)] for t, of in table.items() for name, row in of.items()]
    write_csv(folder / "metrics.csv", [["machine_type", "machine_id", *columns], *rows])


def in_words(value: Any) -> str:
    """A value of `about` for people."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {x}" for name, x in value.items())
    if isinstance(value, list):
        return " + ".join(map(str, value))
    return "not known" if value in (None, "") else str(value)


def write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Fields with commas are quoted; names that are not UTF-8 and digits of numbers come back as they were."""
    with (
        replace_file(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        csv.writer(file, lineterminator="\n").writerows(rows)


def write_per_machine(folder: Path, name: str, clips: Sequence[Clip], values: np.ndarray) -> None:
    """`<name>_<type>_id_<XX>.csv` with `<file name>,<value>` lines, without header; those of before are removed."""
    files: dict[Path, list[tuple[str, Any]]] = {}
    for clip, value in zip(clips, values.tolist(), strict=True):
        path = folder / f"{name}_{clip.machine_type}_id_{clip.machine_id:02d}.csv"
        files.setdefault(path, []).append((clip.path.name, value))
    for path, rows in files.items():
        write_csv(path, rows)
    for old in set(folder.glob(f"{name}_*.csv")) - set(files):
        old.unlink()  # of an ID that has no clips any more
