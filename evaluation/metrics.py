"""AUC, pAUC and mAUC of anomaly scores, with bootstrap intervals.

The rows of a set of clips: for each machine type those of its IDs (`00`, ...), then `pooled` (all its clips together),
`mean` and `min` over its IDs; and for the type `average` the means of these three over the types.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dataloader import ANOMALOUS, MACHINE

MAX_FPR = 0.1  # pAUC covers false positive rates up to here
AVERAGE = "average"  # the machine type of the rows that average over types
DRAWS, COVERAGE, SEED = 2000, 0.95, 0  # of the bootstrap


def area(false: np.ndarray, true: np.ndarray) -> np.ndarray:
    """The area under ROC curves."""
    return np.sum(np.diff(false) * (true[:, 1:] + true[:, :-1]) / 2, axis=1)


def partial_area(false: np.ndarray, true: np.ndarray) -> np.ndarray:
    """The area up to a false positive rate of MAX_FPR, standardised as in scikit-learn: 0.5 for chance, 1 at best."""
    width = np.diff(false)
    inside = np.clip(MAX_FPR - false[:, :-1], 0.0, width)  # the part of each step that lies below MAX_FPR
    slope = np.divide(np.diff(true), width, out=np.zeros_like(width), where=width > 0)
    partial = np.sum(inside * (true[:, :-1] + slope * inside / 2), axis=1)
    chance = MAX_FPR**2 / 2
    return (1 + (partial - chance) / (MAX_FPR - chance)) / 2


# Each takes false and true positive rates `(draws, points)`, from (0, 0) to (1, 1), and gives `(draws,)`.
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"AUC": area, "pAUC": partial_area}
COUNTS = ("n_normal", "n_anomaly")
COLUMNS = (*METRICS, *COUNTS)

# By (machine type, row) the COLUMNS `(1 + DRAWS, len(COLUMNS))`: first of the clips themselves, then of resampled ones.
# The metrics are NaN where all clips are normal, or all anomalous.
Draws = dict[tuple[str, str], np.ndarray]


@dataclass(frozen=True)
class Metrics:
    """The COLUMNS of each (machine type, row), with the bounds of their intervals, and the draws behind them."""

    table: pd.DataFrame
    draws: Draws


def measure(clips: pd.DataFrame, draws: int = DRAWS, seed: int = SEED) -> Metrics:
    """The metrics of clips with the columns `machine_type`, `machine_id`, `condition` and `score`.

    Clips are resampled with replacement within machine ID and condition. For the same seed the same clips are drawn
    whatever the scores, so that two models can be compared draw by draw.
    """
    rng, result = np.random.default_rng(seed), Draws()
    types = clips["machine_type"].unique().tolist()
    for machine_type in types:
        groups = {}
        for machine_id, group in clips[clips["machine_type"] == machine_type].groupby("machine_id"):
            is_anomaly = (group["condition"] == ANOMALOUS).to_numpy()
            groups[str(machine_id)] = (is_anomaly, group["score"].to_numpy(float), resample(is_anomaly, draws, rng))
        rows = {machine_id: compute(*group) for machine_id, group in groups.items()}
        per_id = list(rows.values())
        rows["pooled"] = compute(*(np.concatenate(parts, axis=-1) for parts in zip(*groups.values(), strict=True)))
        rows["mean"], rows["min"] = combine(per_id, np.mean), combine(per_id, np.min)
        result |= {(machine_type, name): row for name, row in rows.items()}
    for name in ("pooled", "mean", "min"):
        result[AVERAGE, name] = combine([result[machine_type, name] for machine_type in types], np.mean)
    return Metrics(make_table(result), result)


def resample(is_anomaly: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """How often each clip counts `(1 + draws, n)`: once, then as drawn among the normal or the anomalous ones."""
    counts = np.ones((1 + draws, len(is_anomaly)), dtype=np.float32)
    for condition in (False, True):
        chosen = np.flatnonzero(is_anomaly == condition)
        size = len(chosen)
        if size:
            drawn = rng.integers(size, size=(draws, size)) + np.arange(draws)[:, None] * size
            counts[1:, chosen] = np.bincount(drawn.ravel(), minlength=draws * size).reshape(draws, size)
    return counts


def compute(is_anomaly: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The COLUMNS `(draws, len(COLUMNS))` of clips `(n,)` that count so often `(draws, n)`."""
    result = np.full((len(counts), len(COLUMNS)), np.nan)
    result[:, len(METRICS) :] = (~is_anomaly).sum(), is_anomaly.sum()
    if is_anomaly.any() and not is_anomaly.all():
        rates = roc_curves(is_anomaly, scores, counts)
        result[:, : len(METRICS)] = np.stack([metric(*rates) for metric in METRICS.values()], axis=1)
    return result


def roc_curves(is_anomaly: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates `(draws, points)` after each group of equal scores, from the highest down."""
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan))  # of the groups
    rates = []
    for condition in (False, True):
        counted = counts[:, order] * (is_anomaly[order] == condition)
        cumulative = np.cumsum(np.add.reduceat(counted, starts, axis=1, dtype=np.float64), axis=1)
        rates.append(np.pad(cumulative / cumulative[:, -1:], ((0, 0), (1, 0))))
    return rates[0], rates[1]


def combine(rows: Sequence[np.ndarray], function: Callable[..., np.ndarray]) -> np.ndarray:
    """Each column of several rows combined draw by draw, leaving out rows without AUC."""
    rated = [row for row in rows if not np.isnan(row[0, 0])]
    return function(rated, axis=0) if rated else np.full_like(rows[0], np.nan)


def interval(drawn: np.ndarray) -> list[float]:
    """The bounds of the middle 95 % of the draws."""
    tail = 100 * (1 - COVERAGE) / 2
    return np.percentile(drawn, (tail, 100 - tail)).tolist()


def make_table(draws: Draws) -> pd.DataFrame:
    rows = []
    for key, drawn in draws.items():
        row = dict(zip((*MACHINE, *COLUMNS), (*key, *drawn[0]), strict=True))
        for name, column in zip(METRICS, drawn[1:].T, strict=False):
            row[f"{name}_low"], row[f"{name}_high"] = interval(column)
        rows.append(row)
    table = pd.DataFrame(rows).set_index(MACHINE)
    for name in COUNTS:  # whole numbers, but for means
        counts = [int(x) if x.is_integer() else x for x in table[name]]
        table[name] = pd.Series(counts, table.index, dtype=object)
    return table
