"""Several checkpoints side by side: configurations over their seeds, and what they differ in."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats

from config import COMPUTATION_KEYS, show_value
from evaluation.metrics import AVERAGE, COUNTS, COVERAGE, Metrics
from evaluation.result import Result
from evaluation.tables import (
    in_words,
    markdown_header,
    markdown_row,
    percent,
    published_rows,
    summary,
    titles,
)
from utils import UserError, write_csv, write_text

EXPLANATION = f"""\
Configurations: mean ± standard deviation over the seeds.

Differences: of the means, with {COVERAGE:.0%} intervals that allow for other seeds and other test clips. The variance
is that of each mean over its seeds, which are taken as independent, plus that of the difference when the test clips are
drawn anew (bootstrap within machine ID, condition and domain, the same clips on both sides); Student's t with the
degrees of freedom of Welch and Satterthwaite. Where nothing differs, one interval in twenty does not contain 0. Scores
of the same runs share their seeds, which makes their intervals wider than necessary. A configuration of a single run
tells nothing of its seeds: then the interval allows for other test clips alone.
"""


def group_by_configuration(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The runs of each configuration, which differ in their seed only, by what tells it from the
    others.

    Raises `UserError` where the checkpoints have not scored the same clips, none has a label, or
    two are of one run.
    """
    if any(result.metrics is None for result in results):
        raise UserError("nothing to compare: the condition of the clips is not known")
    if any(not result.clips["path"].equals(results[0].clips["path"]) for result in results):
        raise UserError(
            "the checkpoints were not trained on the same machines in the same order, so their clips differ"
        )
    groups: dict[str, list[Result]] = {}
    for name, result in zip(name_configurations(results), results, strict=True):
        for other in groups.setdefault(name, []):
            if other.about["seed"] == result.about["seed"]:
                both = f"{other.trained.path} and {result.trained.path}"
                raise UserError(f"{both} are of the same configuration and seed; leave one out")
        groups[name].append(result)
    return groups


def name_configurations(results: Sequence[Result]) -> list[str]:
    """What tells the configuration of each result from the others."""
    settings = [settings_of(result) for result in results]
    values: dict[str, set[str]] = {}
    for own in settings:
        for key, value in own.items():
            values.setdefault(key, set()).add(value)
    names = []
    for own in settings:
        differing = [key for key in own if key == "file" or len(values[key]) > 1]
        names.append(", ".join(f"{key} {own[key]}" for key in differing or ["mode"]))
    return names


def settings_of(result: Result) -> dict[str, str]:
    """The keys of the training that are neither seed nor computation, or the file of a bare state
    dict; and the kind of score.
    """
    scoring = {"scoring": result.trained.config.scoring}
    if "config" not in result.trained.state:
        return {"file": str(result.trained.path)} | scoring
    config = dict(result.trained.state["config"])
    if isinstance(config["classes"], dict):
        config["classes"] = show_value("classes", config["classes"])
    values = {key: value for key, value in config.items() if key not in (*COMPUTATION_KEYS, "seed")}
    return {key: in_words(value) for key, value in values.items()} | scoring


def compare(groups: dict[str, list[Result]], split: str, folder: Path, figure: str = "") -> None:
    """Write comparison.md, with the figure of this name in it, and comparison.csv; print the
    tables.
    """
    metrics = metrics_of(next(iter(groups.values()))[0])
    *types, _ = metrics.table.index.unique("machine_type")
    sections = {f"Average over {len(types)} machine types": tables_of(groups, AVERAGE, split)}
    sections |= {machine_type: tables_of(groups, machine_type, split) for machine_type in types}
    sections["Runs, average over machine types"] = run_table(groups)
    lines = [
        line
        for title, table in sections.items()
        for line in (f"## {title}, in percent", "", *table, "")
    ]
    text = "\n".join([*lines, EXPLANATION])
    if metrics.rule.text:
        text += f"\nDomains: {metrics.rule.text}.\n"
    print("\n" + text)
    picture = f"\n![Angle to the centre of the own class]({figure})\n" if figure else ""
    write_text(folder / "comparison.md", f"# Comparison\n\n{text}{picture}")
    write_csv(
        folder / "comparison.csv",
        pd.concat([all_rows(run) for runs in groups.values() for run in runs]),
    )
    print(
        f"{', '.join(['comparison.md', 'comparison.csv', *([figure] if figure else [])])}: {folder}"
    )


def metrics_of(result: Result) -> Metrics:
    assert result.metrics  # `group_by_configuration` has made sure
    return result.metrics


# ---- Tables ----


def tables_of(groups: dict[str, list[Result]], machine_type: str, split: str) -> list[str]:
    """The configurations, each with the published figures where there are any, and their
    differences.
    """
    columns = titles(metrics_of(next(iter(groups.values()))[0]).rule)
    draws = {name: summary_draws(runs, machine_type) for name, runs in groups.items()}
    lines = markdown_header("configuration", columns)
    for name, runs in groups.items():
        lines.append(markdown_row(f"{name} (n = {len(runs)})", spread(draws[name])))
        published = published_rows(runs[0].trained.config, split, metrics_of(runs[0])).get(
            machine_type
        )
        if published:
            cells = [f"{value:.2f}" for value in published]
            lines.append(
                markdown_row(f"{name}, published", [*cells, *["-"] * (len(columns) - len(cells))])
            )
    if len(groups) > 1:
        lines += ["", *markdown_header(f"difference ({COVERAGE:.0%} interval)", columns)]
    for one, other in find_pairs(groups):
        is_single = len(groups[one]) == 1 or len(groups[other]) == 1
        name = f"{one} minus {other}{' (test clips alone)' if is_single else ''}"
        lines.append(markdown_row(name, show_difference(draws[one], draws[other])))
    return lines


def find_pairs(groups: dict[str, list[Result]]) -> list[tuple[str, str]]:
    """The configurations to compare: all, but not two that differ in the training and in the kind
    of score.
    """
    trainings = {name: [run.trained.path for run in runs] for name, runs in groups.items()}
    scorings = {name: runs[0].trained.config.scoring for name, runs in groups.items()}
    return [
        (one, other)
        for one, other in itertools.combinations(groups, 2)
        if trainings[one] == trainings[other] or scorings[one] == scorings[other]
    ]


def show_difference(one: np.ndarray, other: np.ndarray) -> list[str]:
    cells = []
    for value, half in 100 * np.transpose(difference(one, other)):
        is_missing = np.isnan(value)
        cells.append(
            "-" if is_missing else f"{value:+.2f} ({value - half:+.2f} to {value + half:+.2f})"
        )
    return cells


def run_table(groups: dict[str, list[Result]]) -> list[str]:
    columns = ("seed", "epoch of the weights", "scoring")
    rule = metrics_of(next(iter(groups.values()))[0]).rule
    lines = markdown_header("checkpoint", [*titles(rule), *columns])
    for runs in groups.values():
        for run, drawn in zip(runs, summary_draws(runs, AVERAGE), strict=True):
            about = [in_words(run.about[name]) for name in columns]
            lines.append(markdown_row(str(run.trained.path), [*map(percent, drawn[0]), *about]))
    return lines


def all_rows(result: Result) -> pd.DataFrame:
    """Every row of the metrics, as fractions."""
    table = metrics_of(result).table.drop(columns=list(COUNTS)).reset_index()
    for name in ("seed", "scoring", "mode"):
        table.insert(0, name, result.about[name])
    table.insert(0, "checkpoint", str(result.trained.path))
    return table


# ---- Statistics of runs that differ in their seed `(runs, 1 + DRAWS, n)` ----


def summary_draws(runs: Sequence[Result], machine_type: str) -> np.ndarray:
    """The summary of a machine type: of the clips themselves and of all draws."""
    rule, draws = metrics_of(runs[0]).rule, [metrics_of(run).draws for run in runs]
    places = [(row, rule.columns.index(column)) for row, column, _ in summary(rule)]
    each = [[drawn[machine_type, row][:, column] for row, column in places] for drawn in draws]
    return np.stack(each).transpose(0, 2, 1)


def spread(runs: np.ndarray) -> list[str]:
    """Mean and standard deviation."""
    means = runs[:, 0].mean(axis=0)
    if len(runs) == 1:
        return [percent(mean) for mean in means]
    deviations = runs[:, 0].std(axis=0, ddof=1)
    return [
        f"{percent(mean)} ± {percent(deviation)}"
        for mean, deviation in zip(means, deviations, strict=True)
    ]


def difference(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The difference of the means of two configurations, and half the width of its interval `(n,)`.

    The variance of the seeds has the degrees of freedom of each side, that of the test clips
    infinitely many. The effective number is that of Welch and Satterthwaite (JCGM 100:2008, G.4).
    Where a side is a single run, nothing is known of its seeds, and their variance is left out.
    """
    drawn = one.mean(axis=0) - other.mean(axis=0)
    variance = drawn[1:].var(axis=0)
    if len(one) == 1 or len(other) == 1:
        return drawn[0], scipy.stats.norm.ppf((1 + COVERAGE) / 2) * np.sqrt(variance)
    by_degrees = np.zeros_like(variance)
    for runs in (one, other):
        of_mean = runs[:, 0].var(axis=0, ddof=1) / len(runs)
        variance = variance + of_mean
        by_degrees += of_mean**2 / (len(runs) - 1)
    degrees = np.maximum(1, variance**2 / np.maximum(by_degrees, np.finfo(float).tiny))
    return drawn[0], scipy.stats.t.ppf((1 + COVERAGE) / 2, degrees) * np.sqrt(variance)
