"""Several checkpoints side by side: configurations over their seeds, what they differ in, and the published table."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats

from config import COMPUTATION_KEYS
from evaluation.metrics import COLUMNS, COVERAGE
from evaluation.result import Result
from evaluation.tables import (
    SUMMARY,
    TITLES,
    Published,
    in_words,
    markdown_header,
    markdown_row,
    percent,
    published_rows,
)
from utils import UserError, write_csv, write_text

AVERAGE = "average"  # the row of the metrics that averages over machine types
EXPLANATION = f"""\
Configurations: mean ± standard deviation over the seeds.

Differences: of the means, with {COVERAGE:.0%} intervals for other seeds and other test clips. The variance is that of
each mean over its seeds plus that of the difference when the test clips are drawn anew (bootstrap within machine ID and
condition, the same clips on both sides); Student's t with the degrees of freedom of Welch and Satterthwaite. A star
marks an interval without 0. Each interval stands for itself: of twenty differences that are none, one gets a star on
average. A configuration of a single run tells nothing of its seeds: then the interval is for other test clips alone.
"""
EXPLANATION_OF_PUBLISHED = f"""
Published: a star marks what lies outside the {COVERAGE:.0%} prediction interval of one further run of the
configuration (Student's t). The published table is of one run.
"""


def group_by_configuration(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The runs of each configuration, which differ in their seed only, by what tells it from the others.

    Raises `UserError` where the checkpoints have not scored the same clips, or none has a label.
    """
    if any(result.metrics is None for result in results):
        raise UserError("nothing to compare: the condition of the clips is not known")
    if any(not result.clips["path"].equals(results[0].clips["path"]) for result in results):
        raise UserError(
            "the checkpoints were not trained on the same machines in the same order, so their clips differ"
        )
    groups: dict[str, list[Result]] = {}
    for name, result in zip(name_configurations(results), results, strict=True):
        groups.setdefault(name, []).append(result)
    return groups


def compare(groups: dict[str, list[Result]], split: str, folder: Path, figure: str = "") -> None:
    """Write comparison.md, with the figure of this name in it, and comparison.csv; print the tables."""
    types = next(iter(groups.values()))[0].clips["machine_type"].unique().tolist()
    over_types = {name: summary_draws(runs, AVERAGE) for name, runs in groups.items()}
    published = {name: published_rows(runs[0].trained.config, split) for name, runs in groups.items()}
    sections = [f"## Averages over {len(types)} machine types, in percent", *configuration_table(over_types)]
    if len(groups) > 1:
        sections += ["", *difference_table(over_types)]
    for name, runs in groups.items():
        sections += ["", f"## {name}, by machine type", *type_table(runs, [*types, AVERAGE], published[name])]
    sections += ["", "## Runs, averages over machine types", *run_table(groups)]
    explanation = EXPLANATION + (EXPLANATION_OF_PUBLISHED if any(published.values()) else "")
    picture = f"\n![Angle to the centre of the own class]({figure})\n" if figure else ""
    write_text(folder / "comparison.md", "\n".join(["# Comparison\n", *sections, "", explanation + picture]))
    write_csv(folder / "comparison.csv", pd.concat([all_rows(run) for runs in groups.values() for run in runs]))
    print("\n" + "\n".join(sections))
    print(f"{', '.join(['comparison.md', 'comparison.csv', *([figure] if figure else [])])}: {folder}")


def summary_draws(runs: Sequence[Result], machine_type: str) -> np.ndarray:
    """What SUMMARY names of a machine type: of the clips themselves and of all draws `(runs, 1 + DRAWS, n)`."""
    draws = [run.metrics.draws for run in runs if run.metrics]
    each = [[drawn[machine_type, row][:, COLUMNS.index(column)] for row, column, _ in SUMMARY] for drawn in draws]
    return np.stack(each).transpose(0, 2, 1)


def name_configurations(results: Sequence[Result]) -> list[str]:
    """What tells the configuration of each result from the others: keys but seed and computation, or the file of a
    bare state dict.
    """
    settings: list[dict[str, Any]] = []
    for result in results:
        config = result.trained.state.get("config", {"mode": result.about["mode"], "file": str(result.trained.path)})
        settings.append({key: in_words(x) for key, x in config.items() if key not in (*COMPUTATION_KEYS, "seed")})
    keys = dict.fromkeys(key for own in settings for key in own)
    differing = [key for key in keys if any(other.get(key) != settings[0].get(key) for other in settings)]
    return [", ".join(f"{key} {own.get(key)}" for key in differing) or f"mode {own['mode']}" for own in settings]


# ---- Tables ----


def configuration_table(draws: dict[str, np.ndarray]) -> list[str]:
    names = [f"{name} (n = {len(runs)})" for name, runs in draws.items()]
    rows = [markdown_row(name, spread(runs)) for name, runs in zip(names, draws.values(), strict=True)]
    return [*markdown_header("configuration"), *rows]


def difference_table(draws: dict[str, np.ndarray]) -> list[str]:
    """Each pair of configurations."""
    lines = markdown_header(f"difference ({COVERAGE:.0%} interval)")
    for one, other in itertools.combinations(draws, 2):
        is_single = min(len(draws[one]), len(draws[other])) == 1
        value, half = difference(draws[one], draws[other])
        cells = [
            "-"
            if np.isnan(x)
            else f"{100 * x:+.2f} ({100 * (x - h):+.2f} to {100 * (x + h):+.2f}){' *' if abs(x) > h else ''}"
            for x, h in zip(value, half, strict=True)
        ]
        lines.append(markdown_row(f"{one} minus {other}{' (test clips alone)' if is_single else ''}", cells))
    return lines


def type_table(runs: Sequence[Result], types: Sequence[str], published: Published) -> list[str]:
    """The runs of a configuration by machine type, and the published figures if there are any."""
    count = len(next(iter(published.values()), ()))
    lines = markdown_header("machine type", [*TITLES, *(f"{title}, published" for title in TITLES[:count])])
    for machine_type in types:
        draws, row = summary_draws(runs, machine_type), published.get(machine_type, ())
        if machine_type == AVERAGE and not set(published) <= set(types):
            row = ()  # it averages over other types
        low, high = 100 * prediction_interval(draws)
        marked = [f"{x:.2f}{' *' if x < low[column] or x > high[column] else ''}" for column, x in enumerate(row)]
        lines.append(markdown_row(machine_type, [*spread(draws), *(marked or ["-"] * count)]))
    return lines


def run_table(groups: dict[str, list[Result]]) -> list[str]:
    lines = markdown_header("checkpoint", [*TITLES, "seed", "epoch of the weights"])
    for runs in groups.values():
        for run, drawn in zip(runs, summary_draws(runs, AVERAGE), strict=True):
            about = [in_words(run.about[name]) for name in ("seed", "epoch of the weights")]
            lines.append(markdown_row(str(run.trained.path), [*map(percent, drawn[0]), *about]))
    return lines


# ---- Statistics of runs `(runs, 1 + DRAWS, n)` ----


def spread(runs: np.ndarray) -> list[str]:
    """Mean and standard deviation of runs that differ in their seed."""
    values = runs[:, 0]
    deviations = [f" ± {percent(x)}" for x in values.std(axis=0, ddof=1)] if len(runs) > 1 else [""] * len(SUMMARY)
    return [percent(mean) + deviation for mean, deviation in zip(values.mean(axis=0), deviations, strict=True)]


def difference(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The difference of the means of two configurations, and half the width of its interval `(n,)`.

    A part of the variance comes from the seeds of each side, and has their degrees of freedom; a part comes from the
    test clips, and has infinitely many. The effective number is that of Welch and Satterthwaite (JCGM 100:2008, G.4).
    """
    drawn = one.mean(axis=0) - other.mean(axis=0)
    variance, variance_by_degrees = drawn[1:].var(axis=0), np.zeros(drawn.shape[1])
    for runs in (one, other):
        if len(runs) > 1:
            of_mean = runs[:, 0].var(axis=0, ddof=1) / len(runs)
            variance = variance + of_mean
            variance_by_degrees += of_mean**2 / (len(runs) - 1)
    degrees = np.divide(variance**2, variance_by_degrees, out=np.full_like(variance, np.inf),
                        where=variance_by_degrees > 0)  # fmt: skip
    return drawn[0], scipy.stats.t.ppf((1 + COVERAGE) / 2, degrees) * np.sqrt(variance)


def prediction_interval(runs: np.ndarray) -> np.ndarray:
    """The bounds within which one further run of the configuration is expected, on the same clips `(2, n)`; NaN for
    a single run.
    """
    values = runs[:, 0]
    if len(values) == 1:
        return np.full((2, values.shape[1]), np.nan)
    quantile = scipy.stats.t.ppf((1 + COVERAGE) / 2, len(values) - 1)
    half = quantile * values.std(axis=0, ddof=1) * np.sqrt(1 + 1 / len(values))
    return values.mean(axis=0) + np.stack([-half, half])


def all_rows(result: Result) -> pd.DataFrame:
    """Every row of the metrics, as fractions."""
    assert result.metrics
    table = result.metrics.table.drop(columns=["n_normal", "n_anomaly"]).reset_index()
    for name in ("seed", "mode"):
        table.insert(0, name, result.about[name])
    table.insert(0, "checkpoint", str(result.trained.path))
    return table
