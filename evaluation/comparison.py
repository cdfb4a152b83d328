"""Several checkpoints side by side: mean and deviation over seeds, and the difference of two configurations."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from config import COMPUTATION_KEYS
from evaluation.metrics import COLUMNS, COVERAGE, interval
from evaluation.result import Result
from evaluation.tables import SUMMARY, markdown_header, percent
from utils import UserError, write_csv, write_text


def compare(results: Sequence[Result], folder: Path) -> None:
    """Write comparison.md and comparison.csv: one row each, mean ± standard deviation of the runs that differ in their
    seed only, and, for each pair of configurations, the paired bootstrap of the difference of their means.

    Raises `UserError` where the checkpoints have not scored the same clips, or none has a label.
    """
    if any(result.metrics is None for result in results):
        raise UserError("nothing to compare: the condition of the clips is not known")
    if any(not result.clips["path"].equals(results[0].clips["path"]) for result in results):
        raise UserError(
            "the checkpoints were not trained on the same machines in the same order, so their clips differ"
        )
    draws = [average_draws(result) for result in results]
    names = name_configurations(results)
    groups = {name: [drawn for drawn, other in zip(draws, names, strict=True) if other == name] for name in names}

    lines = markdown_header("checkpoint")
    for result, drawn in zip(results, draws, strict=True):
        lines.append(f"| {result.trained.path} | {' | '.join(map(percent, drawn[0]))} |")
    lines += ["", *markdown_header("configuration (mean ± standard deviation over seeds)")]
    lines += [f"| {name} (n = {len(runs)}) | {' | '.join(spread(runs))} |" for name, runs in groups.items()]
    if len(groups) > 1:
        # These intervals come from the test clips alone; the deviations above show how the seeds differ.
        lines += ["", *markdown_header(f"difference ({COVERAGE:.0%} interval of the paired bootstrap over test clips)")]
        lines += [f"| {one} minus {other} | {' | '.join(difference(groups[one], groups[other]))} |"
                  for one, other in itertools.combinations(groups, 2)]  # fmt: skip
    n_types = results[0].clips["machine_type"].nunique()
    head = f"# Comparison\n\nAverages over {n_types} machine types, in percent.\n\n"
    write_text(folder / "comparison.md", head + "\n".join(lines) + "\n")
    write_csv(folder / "comparison.csv", pd.concat([all_rows(result) for result in results]))
    print("\n" + "\n".join(lines))
    print(f"comparison.md and comparison.csv: {folder}")


def average_draws(result: Result) -> np.ndarray:
    """The averages over machine types, those of SUMMARY, of the clips themselves and of all draws `(1 + DRAWS, n)`."""
    assert result.metrics
    rows = [result.metrics.draws["average", row][:, COLUMNS.index(column)] for row, column, _ in SUMMARY]
    return np.stack(rows, axis=1)


def name_configurations(results: Sequence[Result]) -> list[str]:
    """What tells the configuration of each result from the others: keys but seed and computation, or the file of a
    bare state dict.
    """
    settings = []
    for result in results:
        config = result.trained.state.get("config", {"mode": result.about["mode"], "file": result.trained.path})
        settings.append({key: str(x) for key, x in config.items() if key not in (*COMPUTATION_KEYS, "seed")})
    keys = dict.fromkeys(key for own in settings for key in own)
    differing = [key for key in keys if any(other.get(key) != settings[0].get(key) for other in settings)]
    return [", ".join(f"{key} {own.get(key)}" for key in differing) or f"mode {own['mode']}" for own in settings]


def spread(runs: Sequence[np.ndarray]) -> list[str]:
    """Mean and standard deviation of runs that differ in their seed."""
    values = np.stack([drawn[0] for drawn in runs])
    deviations = [f" ± {percent(x)}" for x in values.std(axis=0, ddof=1)] if len(runs) > 1 else [""] * len(SUMMARY)
    return [percent(mean) + deviation for mean, deviation in zip(values.mean(axis=0), deviations, strict=True)]


def difference(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> list[str]:
    """The difference of the means of two configurations, with the interval of the same resampled clips."""
    cells = []
    for drawn in (np.mean(one, axis=0) - np.mean(other, axis=0)).T:
        low, high = interval(drawn[1:])
        is_known = not np.isnan(drawn[0])
        cells.append(f"{100 * drawn[0]:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})" if is_known else "-")
    return cells


def all_rows(result: Result) -> pd.DataFrame:
    """Every row of the metrics, as fractions."""
    assert result.metrics
    table = result.metrics.table.drop(columns=["n_normal", "n_anomaly"]).reset_index()
    for name in ("seed", "mode"):
        table.insert(0, name, result.about[name])
    table.insert(0, "checkpoint", str(result.trained.path))
    return table
