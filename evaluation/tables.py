"""The metrics as text and files: the table on the terminal, metrics.csv, metrics.json, results.md,
score files.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from checkpoint import RESULT_FILES, clear
from config import Config
from corpus import SOURCE, TARGET, part_name
from evaluation.decisions import count_decisions, explain_thresholds
from evaluation.metrics import (
    AVERAGE,
    COVERAGE,
    DRAWS,
    NO_DOMAINS,
    OFFICIAL,
    SEED,
    SUMMARY_ROWS,
    Metrics,
    Rule,
)
from evaluation.result import Result
from model import PUBLISHED_CHANNELS
from utils import notice, write_csv, write_text

# AUC, pAUC, mAUC (the first three of SUMMARY) in percent on the development test set: the table in
# the authors' README
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
# of that test set; AUC and pAUC are pooled over the IDs, so that those of others cannot be compared
MIMII_IDS = {"00", "02", "04", "06"}
PUBLISHED_IDS = {
    "fan": MIMII_IDS,
    "pump": MIMII_IDS,
    "slider": MIMII_IDS,
    "valve": MIMII_IDS,
    "ToyCar": {"01", "02", "03", "04"},
    "ToyConveyor": {"01", "02", "03"},
}
Published = dict[str, tuple[float, float, float]]
# What a machine type is summed up in: the row of the metrics, the column, and its title
SUMMARY = (("pooled", "AUC", "AUC, pooled"), ("pooled", "pAUC", "pAUC, pooled"), ("min", "AUC", "mAUC"),
           ("mean", "AUC", "AUC, mean over IDs"), ("mean", "pAUC", "pAUC, mean over IDs"))  # fmt: skip


def summary(rule: Rule) -> list[tuple[str, str, str]]:
    """SUMMARY, and what the official score consists of where clips have domains."""
    of_domains = [
        ("hmean", column, f"{column.replace('_', ' ')}, harmonic mean") for column in rule.official
    ]
    return [
        *SUMMARY,
        *of_domains,
        *([("hmean", OFFICIAL, "official score")] if rule.official else []),
    ]


def titles(rule: Rule) -> list[str]:
    return [title for *_, title in summary(rule)]


def published_rows(config: Config, split: str, metrics: Metrics) -> Published:
    """The published rows for what was evaluated: the development test set of 2020, the published
    channels, windows and score, the machine types of the metrics, all with the published IDs. The
    average is among them if all its types are.
    """
    is_published = (config.input, config.window, config.scoring) == (
        list(PUBLISHED_CHANNELS),
        "first",
        "published",
    )
    rows = (
        PUBLISHED.get(config.mode, {})
        if is_published and split == "test" and metrics.rule is NO_DOMAINS
        else {}
    )
    measured = metrics.table.index.to_frame(index=False)
    ids = (
        measured[~measured["machine_id"].isin(SUMMARY_ROWS)]
        .groupby("machine_type")["machine_id"]
        .agg(set)
        .to_dict()
    )
    if any(ids[name] != own for name, own in PUBLISHED_IDS.items() if name in ids):
        return {}
    types = set(measured["machine_type"])
    return {
        name: row
        for name, row in rows.items()
        if name in types and (name != AVERAGE or set(rows) <= types)
    }


def percent(value: float) -> str:
    return "-" if pd.isna(value) else f"{100 * value:.2f}"


def format_table(metrics: Metrics, published: Published) -> str:
    """The metrics in percent: pooled over IDs as published, as mean over IDs as DCASE rules, and
    the published row, if any; or, where clips have domains, what the official score consists of.
    """
    table, rule = metrics.table, metrics.rule
    types = table.index.unique("machine_type")
    first = max(12, *map(len, types))
    names = (
        [*rule.official, OFFICIAL]
        if rule.official
        else ["AUC", "pAUC", "mAUC"]
        if published
        else []
    )
    widths = [max(8, len(name)) for name in names]
    title = (
        "harmonic mean over IDs" if rule.official else "published, DCASE 2020" if published else ""
    )
    lines = [
        f"{'':{first}} | {'pooled over IDs':^17} | {'lowest':^8} | {'mean over IDs':^17} | {title:^26}",
        f"{'in percent':{first}} |{'AUC':>8} {'pAUC':>8}  |{'mAUC':>8}  |{'AUC':>8} {'pAUC':>8}  |"
        + in_columns([name.replace("_", " ") for name in names], widths),
    ]
    for machine_type in types:
        values = [
            percent(table.loc[(machine_type, row), column]) for row, column, _ in summary(rule)
        ]
        last = values[len(SUMMARY) :] or [
            f"{value:.2f}" for value in published.get(machine_type, ())
        ]
        blocks = [
            in_columns(part, [8] * len(part)) for part in (values[:2], values[2:3], values[3:5])
        ]
        lines.append(
            f"{machine_type:{first}} |{'  |'.join(blocks)}  |{in_columns(last or ['-'] * len(names), widths)}"
        )
    return "\n".join(
        [*(line.rstrip() for line in lines), *([f"Domains: {rule.text}"] if rule.text else [])]
    )


def in_columns(values: Sequence[str], widths: Sequence[int]) -> str:
    return " ".join(f"{value:>{width}}" for value, width in zip(values, widths, strict=True))


def markdown_header(title: str, columns: Sequence[str]) -> list[str]:
    return [markdown_row(title, columns), "| --- |" + " ---: |" * len(columns)]


def markdown_row(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def markdown_table(metrics: Metrics) -> str:
    """The metrics of each machine type in Markdown, in percent, each with its interval."""
    table, columns = metrics.table, summary(metrics.rule)
    lines = markdown_header("machine type", titles(metrics.rule))
    for machine_type in table.index.unique("machine_type"):
        cells = [
            with_interval(table.loc[(machine_type, row)], column) for row, column, _ in columns
        ]
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
    if value is None:
        return "not known"
    return str(value) or "none"


# ---- Files ----


def write_result(result: Result, folder: Path, split: str) -> None:
    """Write the tables in place of everything that an earlier evaluation wrote, and print the
    metrics.
    """
    clear(folder, RESULT_FILES)
    write_per_machine(folder, "anomaly_score", result.clips, "score")
    n_unknown, n_clips = len(result.clips) - len(result.known), len(result.clips)
    if n_unknown:
        form = result.form
        notice(
            f"{n_unknown} of {n_clips} clips are not in {form.labels} and count in no metric ({form.get_labels})"
        )
    if result.metrics:
        about = result.about
        title = f"{about['mode']}, input {in_words(about['input'])}, {about['scoring']} score"
        published = published_rows(result.trained.config, split, result.metrics)
        show_metrics(result.metrics, title, about, folder, published)
    explain_thresholds(result.thresholds, result.trained.config.machines, result.trained.path)
    write_per_machine(
        folder, "decision_result", result.clips[result.clips["decision"].notna()], "decision"
    )
    if len(result.thresholds):
        write_csv(
            folder / "decisions.csv", count_decisions(result.clips, result.thresholds).reset_index()
        )
    print(f"{n_clips} scores{' and metrics' if result.metrics else ''}: {folder}")


def show_metrics(
    metrics: Metrics, title: str, about: dict[str, Any], folder: Path, published: Published
) -> None:
    """Say what cannot be measured, write the files and print the table."""
    report_gaps(metrics)
    write_metrics(metrics, title, about, folder)
    print(format_table(metrics, published))


def report_gaps(metrics: Metrics) -> None:
    """Say what cannot be measured."""
    table, reason = metrics.table, "because normal or anomalous clips are missing"
    is_missing = table["AUC"].isna()
    if is_missing.any():
        gaps = ", ".join(map(" ".join, table.index[is_missing]))
        notice(f"no AUC, and left out of the averages, {reason}: {gaps}")
    of_ids = table[~is_missing & ~table.index.isin(SUMMARY_ROWS, level="machine_id")]
    for domain in (SOURCE, TARGET) if metrics.rule.official else ():
        gaps = ", ".join(map(" ".join, of_ids.index[of_ids[f"AUC_{domain}"].isna()]))
        if gaps:
            notice(
                f"no AUC of the {domain} domain, and so harmonic means and official score without it, {reason}: {gaps}"
            )


def write_metrics(metrics: Metrics, title: str, about: dict[str, Any], folder: Path) -> None:
    """results.md, metrics.json and metrics.csv."""
    table, rule = metrics.table, metrics.rule
    strata = "machine ID, domain and condition" if rule.official else "machine ID and condition"
    text = [
        f"# {title}\n",
        markdown_table(metrics) + "\n",
        f"In percent, with {COVERAGE:.0%} bootstrap intervals ({DRAWS} draws of the test clips within {strata}). "
        "Pooled: one AUC over all clips of a machine type. mAUC: the lowest AUC of an ID. pAUC: false positive rates "
        "up to 0.1, standardised.\n",
        *(
            [f"Harmonic means over IDs, of the average over the IDs of all types; {rule.text}.\n"]
            if rule.text
            else []
        ),
        *(f"- {name}: {in_words(value)}" for name, value in about.items()),
    ]
    write_text(folder / "results.md", "\n".join(text) + "\n")
    rows = table.astype(object).where(table.notna(), None)
    by_type = {
        machine_type: rows.loc[machine_type].to_dict("index")
        for machine_type in rows.index.unique("machine_type")
    }
    about = about | ({"domains": rule.text} if rule.text else {})
    content = {
        "about": about,
        "interval": {"coverage": COVERAGE, "draws": DRAWS, "seed": SEED},
        "metrics": by_type,
    }
    write_text(folder / "metrics.json", json.dumps(content, indent=2) + "\n")
    write_csv(folder / "metrics.csv", table.reset_index())


def write_per_machine(folder: Path, name: str, clips: pd.DataFrame, column: str) -> None:
    """`<name>_<type>_id_<XX>.csv` or `<name>_<type>_section_<XX>_test.csv`, as the challenge names
    them, with `<file name>,<value>` lines, without header.
    """
    parts = [
        part_name(path, machine_id)
        for path, machine_id in zip(clips["path"], clips["machine_id"], strict=True)
    ]
    for (machine_type, part), group in clips.groupby(
        ["machine_type", pd.Series(parts, clips.index, dtype=object)]
    ):
        values = group[column].astype(float if column == "score" else int)
        rows = pd.DataFrame({"file": [path.name for path in group["path"]], "value": values})
        write_csv(folder / f"{name}_{machine_type}_{part}.csv", rows, header=False)
