"""Several checkpoints side by side: their configurations over the seeds, and the differences."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats

from config import COMPUTATION_KEYS
from errors import UserError
from evaluation.metrics import COUNTS, COVERAGE, Metrics
from evaluation.result import Result
from evaluation.tables import (
    Column,
    columns_of,
    escape_markdown,
    in_words,
    markdown_header,
    markdown_row,
    percent,
    published_cells,
    published_rows,
    titles_of,
)
from inference import Model
from names import AVERAGE
from utils import write_csv, write_text

EXPLANATION = f"""\
Configurations: mean ± standard deviation over the seeds.

Differences: of the means, with {COVERAGE:.0%} intervals that allow for other seeds and other test
recordings. The variance is the sum of three: of each of the two means over its seeds, which are
assumed to be independent, and of the difference over bootstrap samples of the test recordings
(within machine ID, condition and domain, the same sample for both configurations). The interval is
that of Student's t with the degrees of freedom of Welch and Satterthwaite. If there is no true
difference, one interval in twenty excludes 0. Scores of the same runs share their seeds, which
makes their intervals wider than necessary. A single run says nothing about other seeds; the
interval then allows only for other test recordings.
"""

Groups = dict[str, list[Result]]  # the runs of each configuration, which differ in their seeds

# ---- Configurations ----


def group_by_configuration(results: Sequence[Result]) -> Groups:
    """Group results by their configuration, named by what tells it from the others.

    Raises:
        UserError: If the results are of different recordings, if no condition is known, or if two
            results are of the same run.
    """
    for result in results:
        if result.metrics is None:
            raise UserError("nothing to compare: no recording is labelled normal or anomalous")
        if not result.recordings["path"].equals(results[0].recordings["path"]):
            raise UserError(
                "the checkpoints were not trained on the same machines in the same order, so their "
                "recordings differ; compare checkpoints with the same machines"
            )
    groups: Groups = {}
    for name, result in zip(name_configurations(results), results, strict=True):
        runs = groups.setdefault(name, [])
        for run in runs:
            if run.about["seed"] == result.about["seed"]:
                raise UserError(
                    f"{run.detector.name} and {result.detector.name} have the same configuration "
                    "and seed; leave one out"
                )
        runs.append(result)
    return groups


def name_configurations(results: Sequence[Result]) -> list[str]:
    """Name the configuration of each result by the settings that differ between the results."""
    all_settings = [settings_of(result) for result in results]
    values: dict[str, set[str]] = {}
    for settings in all_settings:
        for key, value in settings.items():
            values.setdefault(key, set()).add(value)
    names = []
    for settings in all_settings:
        keys = [key for key in settings if key == "file" or len(values[key]) > 1]
        names.append(", ".join(f"{key} {settings[key]}" for key in keys or ["mode"]))
    return names


def settings_of(result: Result) -> dict[str, str]:
    """Return the settings that make a configuration, as text: the kind of score, the number of
    checkpoints that score together, and the keys of the training without the seed and
    COMPUTATION_KEYS.
    """
    values: dict[str, list[str]] = {}
    for model in result.detector.members:
        for key, value in settings_of_model(model).items():
            values.setdefault(key, []).append(value)
    settings = {key: " + ".join(dict.fromkeys(texts)) for key, texts in values.items()}
    return settings | {"detector": f"of {len(result.detector.members)}", "scoring": result.kind}


def settings_of_model(model: Model) -> dict[str, str]:
    """Return the settings of a training; for a bare state dict, its file."""
    config = model.checkpoint.config
    if config is None:
        return {"file": str(model.path)}
    settings = {}
    for key, value in config.model_dump().items():
        if key != "seed" and key not in COMPUTATION_KEYS:
            settings[key] = in_words(value)
    settings["machines"] = model.classes.describe_machines()
    if config.classes == "attributes":
        settings["classes"] = f"attributes ({len(model.classes)} classes)"
    return settings


def find_pairs(groups: Groups) -> list[tuple[str, str]]:
    """Return the pairs of configurations to compare: those that share the kind of score or the
    checkpoints.
    """
    kinds = {name: runs[0].kind for name, runs in groups.items()}
    paths = {name: [run.detector.name for run in runs] for name, runs in groups.items()}
    pairs = []
    for one, other in itertools.combinations(groups, 2):
        if kinds[one] == kinds[other] or paths[one] == paths[other]:
            pairs.append((one, other))
    return pairs


# ---- Tables ----


def compare(groups: Groups, folder: Path, figure: str = "") -> None:
    """Write comparison.md and comparison.csv, and print the tables.

    `figure` is the name of a figure in the folder that comparison.md shows.
    """
    results = list(itertools.chain(*groups.values()))
    metrics = metrics_of(results[0])
    columns = columns_of(metrics.rule)
    machine_types = [name for name in metrics.machine_types if name != AVERAGE]
    lines, of_runs = [], "Runs"
    if len(machine_types) > 1:
        title = f"Average over {len(machine_types)} machine types"
        lines += section(title, comparison_table(groups, AVERAGE, columns))
        of_runs += ", average over machine types"
    for machine_type in machine_types:
        title = escape_markdown(machine_type)
        lines += section(title, comparison_table(groups, machine_type, columns))
    lines += section(of_runs, run_table(results, columns))
    text = "\n".join([*lines, EXPLANATION])
    if metrics.rule.text:
        text += f"\nDomains: {metrics.rule.text}.\n"
    print("\n" + text)
    image = f"\n![Angle to the closest centre of the machine ID]({figure})\n" if figure else ""
    write_text(folder / "comparison.md", f"# Comparison\n\n{text}{image}")
    write_csv(folder / "comparison.csv", pd.concat(map(all_rows, results)))
    files = ["comparison.md", "comparison.csv"]
    if figure:
        files.append(figure)
    print(f"{', '.join(files)}: {folder}")


def section(title: str, table: Sequence[str]) -> list[str]:
    return [f"## {title}, in percent", "", *table, ""]


def metrics_of(result: Result) -> Metrics:
    assert result.metrics  # checked by `group_by_configuration`
    return result.metrics


def comparison_table(groups: Groups, machine_type: str, columns: Sequence[Column]) -> list[str]:
    """Return the lines of two tables on a machine type: the configurations, with the published
    results if there are any, and their differences.
    """
    lines = markdown_header("configuration", titles_of(columns))
    for name, runs in groups.items():
        cells = [spread(draws_of(runs, machine_type, column)) for column in columns]
        lines.append(markdown_row(f"{name} (n = {len(runs)})", cells))
        published = published_rows(runs[0]).get(machine_type)
        if published:
            cells = published_cells(published, columns)
            lines.append(markdown_row(f"{name}, published", cells))
    if len(groups) == 1:
        return lines
    lines.append("")
    lines += markdown_header(f"difference ({COVERAGE:.0%} interval)", titles_of(columns))
    for one, other in find_pairs(groups):
        cells = []
        for column in columns:
            minuend = draws_of(groups[one], machine_type, column)
            subtrahend = draws_of(groups[other], machine_type, column)
            cells.append(format_difference(minuend, subtrahend))
        is_single = len(groups[one]) == 1 or len(groups[other]) == 1
        name = f"{one} minus {other}{' (test recordings alone)' if is_single else ''}"
        lines.append(markdown_row(name, cells))
    return lines


def run_table(results: Sequence[Result], columns: Sequence[Column]) -> list[str]:
    """Return the lines of a table of all runs, averaged over the machine types."""
    about = ["seed", "epoch of the weights", "scoring"]
    lines = markdown_header("checkpoint", [*titles_of(columns), *about])
    for run in results:
        cells = [spread(draws_of([run], AVERAGE, column)) for column in columns]
        cells += [in_words(run.about[name]) for name in about]
        lines.append(markdown_row(run.detector.name, cells))
    return lines


def all_rows(result: Result) -> pd.DataFrame:
    """Return all rows of the metrics of a result, as fractions."""
    table = metrics_of(result).table.drop(columns=list(COUNTS)).reset_index()
    table.insert(0, "checkpoint", result.detector.name)
    for position, name in enumerate(("mode", "scoring", "seed"), 1):
        value = result.about[name]
        table.insert(position, name, in_words(value) if isinstance(value, list) else value)
    return table


# ---- Statistics of runs that differ in their seeds ----


def draws_of(runs: Sequence[Result], machine_type: str, column: Column) -> np.ndarray:
    """Return a metric of a machine type in several runs `(runs, 1 + draws)`: the values of the
    recordings themselves, then those of the bootstrap draws.
    """
    rows = [metrics_of(run).rows[machine_type, column.summary] for run in runs]
    return np.stack([row.values[column.metric] for row in rows])


def spread(runs: np.ndarray) -> str:
    """Format the mean of runs `(runs, 1 + draws)`, and their standard deviation if there are
    several.
    """
    values = runs[:, 0]
    if len(values) == 1:
        return percent(values[0])
    return f"{percent(values.mean())} ± {percent(values.std(ddof=1))}"


def format_difference(one: np.ndarray, other: np.ndarray) -> str:
    """Format the difference of two configurations `(runs, 1 + draws)` in percent, with its
    interval.
    """
    value, half = difference(one, other)
    if np.isnan(value):
        return "-"
    value, half = 100 * value, 100 * half
    return f"{value:+.2f} ({value - half:+.2f} to {value + half:+.2f})"


def difference(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Compute the difference of the means of two configurations `(runs, 1 + draws)`, and half the
    width of its interval.

    The variance over the seeds has the degrees of freedom of each side, that over the test
    recordings infinitely many. The effective number is that of Welch and Satterthwaite (JCGM
    100:2008, G.4). If a configuration has a single run, its variance over the seeds is unknown, and
    the variances over the seeds of both are left out.
    """
    draws = one.mean(axis=0) - other.mean(axis=0)
    variance = draws[1:].var()
    if len(one) == 1 or len(other) == 1:
        quantile = scipy.stats.norm.ppf((1 + COVERAGE) / 2)
        return draws[0], quantile * np.sqrt(variance)
    by_degrees = 0.0
    for runs in (one, other):
        of_mean = runs[:, 0].var(ddof=1) / len(runs)
        variance = variance + of_mean
        by_degrees += of_mean**2 / (len(runs) - 1)
    degrees = max(1.0, variance**2 / max(by_degrees, np.finfo(float).tiny))
    return draws[0], scipy.stats.t.ppf((1 + COVERAGE) / 2, degrees) * np.sqrt(variance)
