"""Several checkpoints side by side: configurations over their seeds, what they differ in, and the published table."""

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
    Published,
    in_words,
    markdown_header,
    markdown_row,
    percent,
    published_rows,
    summary,
    titles,
)
from utils import UserError, write_csv, write_text

N_PUBLISHED = 3  # of the columns of a summary, the first ones
EXPLANATION = f"""\
Configurations: mean ± standard deviation over the seeds.

Differences: of the means, with {COVERAGE:.0%} intervals that allow for other seeds and other test clips. The variance
is that of each mean over its seeds, which are taken as independent, plus that of the difference when the test clips are
drawn anew (bootstrap within machine ID, condition and domain, the same clips on both sides); Student's t with the
degrees of freedom of Welch and Satterthwaite. Two scores of the same runs are compared run by run. A star marks an
interval without 0. Where nothing differs, one in twenty gets one. A configuration of a single run tells nothing of its
seeds: then the interval allows for other test clips alone.
"""
EXPLANATION_OF_PUBLISHED = f"""
Published: a star marks a figure outside the interval in which one further run of the configuration lies with a
probability of {COVERAGE:.0%} (Student's t, the same test clips). With a single run there is no interval and no star.
With few runs it is wide: that there is no star does not mean that the figures agree.
"""


def group_by_configuration(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The runs of each configuration, which differ in their seed only, by what tells it from the others.

    Raises `UserError` where the checkpoints have not scored the same clips, none has a label, or two are of one run.
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


def compare(groups: dict[str, list[Result]], split: str, folder: Path, figure: str = "") -> None:
    """Write comparison.md, with the figure of this name in it, and comparison.csv; print the tables."""
    metrics = metrics_of(next(iter(groups.values()))[0])
    *types, _ = metrics.table.index.unique("machine_type")
    sections = {}
    for name, runs in groups.items():
        if published := published_rows(runs[0].trained.config, split, metrics):
            sections[f"{name}, and as published"] = published_table(runs, [*types, AVERAGE], published)
    explanation = EXPLANATION + (EXPLANATION_OF_PUBLISHED if sections else "")
    if metrics.rule.text:
        explanation += f"\nDomains: {metrics.rule.text}.\n"
    pairs = find_pairs(groups)
    for machine_type in (AVERAGE, *types):
        title = f"Average over {len(types)} machine types" if machine_type == AVERAGE else machine_type
        draws = {name: summary_draws(runs, machine_type) for name, runs in groups.items()}
        columns = titles(metrics.rule)
        sections[title] = [*configuration_table(draws, columns), "", *difference_table(draws, pairs, columns)]
    sections["Runs, average over machine types"] = run_table(groups)
    lines = [line for title, table in sections.items() for line in (f"## {title}, in percent", "", *table, "")]
    text = "\n".join([*lines, explanation])
    picture = f"\n![Angle to the centre of the own class]({figure})\n" if figure else ""
    print("\n" + text)
    write_text(folder / "comparison.md", f"# Comparison\n\n{text}{picture}")
    write_csv(folder / "comparison.csv", pd.concat([all_rows(run) for runs in groups.values() for run in runs]))
    print(f"{', '.join(['comparison.md', 'comparison.csv', *([figure] if figure else [])])}: {folder}")


def find_pairs(groups: dict[str, list[Result]]) -> dict[tuple[str, str], bool]:
    """Which configurations are compared, and whether their runs are the same. Where there are several scores, it is
    these that are compared, for each training.
    """
    paths = {name: [run.trained.path for run in runs] for name, runs in groups.items()}
    pairs = {(one, other): paths[one] == paths[other] for one, other in itertools.combinations(groups, 2)}
    return {pair: is_same for pair, is_same in pairs.items() if is_same} or pairs


def metrics_of(result: Result) -> Metrics:
    assert result.metrics  # `group_by_configuration` has made sure
    return result.metrics


def summary_draws(runs: Sequence[Result], machine_type: str) -> np.ndarray:
    """The summary of a machine type: of the clips themselves and of all draws `(runs, 1 + DRAWS, n)`."""
    rule, draws = metrics_of(runs[0]).rule, [metrics_of(run).draws for run in runs]
    places = [(row, rule.columns.index(column)) for row, column, _ in summary(rule)]
    each = [[drawn[machine_type, row][:, column] for row, column in places] for drawn in draws]
    return np.stack(each).transpose(0, 2, 1)


def name_configurations(results: Sequence[Result]) -> list[str]:
    """What tells the configuration of each result from the others: the keys of its training but seed and computation,
    or the file of a bare state dict; and the score.
    """
    settings = [settings_of(result) for result in results]
    known = [own for own in settings if own]
    keys = dict.fromkeys(key for own in known for key in own)
    differing = [key for key in keys if any(own.get(key) != known[0].get(key) for own in known)]
    trainings = [
        ", ".join(f"{key} {own.get(key)}" for key in differing or ["mode"]) if own else str(result.trained.path)
        for own, result in zip(settings, results, strict=True)
    ]
    scores = [f"scoring {result.trained.config.scoring}" for result in results]
    if len(set(scores)) == 1:
        return trainings
    if len(set(trainings)) == 1:
        return scores
    return [f"{training}, {score}" for training, score in zip(trainings, scores, strict=True)]


def settings_of(result: Result) -> dict[str, str]:
    """The keys of the training that are neither seed nor computation; none of a bare state dict."""
    config = result.trained.state.get("config", {})
    values = {key: value for key, value in config.items() if key not in (*COMPUTATION_KEYS, "seed")}
    if isinstance(values.get("classes"), dict):
        values["classes"] = show_value("classes", values["classes"])
    return {key: "nothing" if value == "" else in_words(value) for key, value in values.items()}


# ---- Tables ----


def configuration_table(draws: dict[str, np.ndarray], columns: Sequence[str]) -> list[str]:
    names = [f"{name} (n = {len(runs)})" for name, runs in draws.items()]
    rows = [markdown_row(name, spread(runs)) for name, runs in zip(names, draws.values(), strict=True)]
    return [*markdown_header("configuration", columns), *rows]


def difference_table(
    draws: dict[str, np.ndarray], pairs: dict[tuple[str, str], bool], columns: Sequence[str]
) -> list[str]:
    """The pairs of configurations, of which some have the same runs."""
    lines = markdown_header(f"difference ({COVERAGE:.0%} interval)", columns) if pairs else []
    for (one, other), has_same_runs in pairs.items():
        is_single = min(len(draws[one]), len(draws[other])) == 1
        value, half = difference(draws[one], draws[other], has_same_runs)
        cells = [
            "-"
            if np.isnan(x)
            else f"{100 * x:+.2f} ({100 * (x - h):+.2f} to {100 * (x + h):+.2f}){' *' if abs(x) > h else ''}"
            for x, h in zip(value, half, strict=True)
        ]
        lines.append(markdown_row(f"{one} minus {other}{' (test clips alone)' if is_single else ''}", cells))
    return lines


def published_table(runs: Sequence[Result], types: Sequence[str], published: Published) -> list[str]:
    """The runs of a configuration by machine type, and the published figures."""
    columns = titles(metrics_of(runs[0]).rule)
    lines = markdown_header("machine type", [*columns, *(f"{title}, published" for title in columns[:N_PUBLISHED])])
    for machine_type in types:
        draws, row = summary_draws(runs, machine_type), published.get(machine_type, ())
        low, high = 100 * prediction_interval(draws)
        marked = [f"{x:.2f}{' *' if x < low[column] or x > high[column] else ''}" for column, x in enumerate(row)]
        lines.append(markdown_row(machine_type, [*spread(draws), *(marked or ["-"] * N_PUBLISHED)]))
    return lines


def run_table(groups: dict[str, list[Result]]) -> list[str]:
    columns = ("seed", "epoch of the weights", "scoring")
    rule = metrics_of(next(iter(groups.values()))[0]).rule
    lines = markdown_header("checkpoint", [*titles(rule), *columns])
    for runs in groups.values():
        for run, drawn in zip(runs, summary_draws(runs, AVERAGE), strict=True):
            about = [in_words(run.about[name]) for name in columns]
            lines.append(markdown_row(str(run.trained.path), [*map(percent, drawn[0]), *about]))
    return lines


# ---- Statistics of runs `(runs, 1 + DRAWS, n)` ----


def spread(runs: np.ndarray) -> list[str]:
    """Mean and standard deviation of runs that differ in their seed."""
    values = runs[:, 0]
    deviations = [f" ± {percent(x)}" for x in values.std(axis=0, ddof=1)] if len(runs) > 1 else [""] * values.shape[1]
    return [percent(mean) + deviation for mean, deviation in zip(values.mean(axis=0), deviations, strict=True)]


def difference(one: np.ndarray, other: np.ndarray, has_same_runs: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The difference of the means of two configurations, and half the width of its interval `(n,)`.

    A part of the variance comes from the seeds of each side, and has their degrees of freedom; a part comes from the
    test clips, and has infinitely many. The effective number is that of Welch and Satterthwaite (JCGM 100:2008, G.4).
    Where a side is a single run, nothing is known of its seeds, and the part of the seeds is left out. Two scores of
    the same runs are compared run by run.
    """
    sides = [one - other] if has_same_runs else [one, other]
    drawn = one.mean(axis=0) - other.mean(axis=0)
    variance, variance_by_degrees = drawn[1:].var(axis=0), np.zeros(drawn.shape[1])
    for runs in sides if min(map(len, sides)) > 1 else ():
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
    table = metrics_of(result).table.drop(columns=list(COUNTS)).reset_index()
    for name in ("seed", "scoring", "mode"):
        table.insert(0, name, result.about[name])
    table.insert(0, "checkpoint", str(result.trained.path))
    return table
