"""AUC, pAUC and mAUC of anomaly scores, with bootstrap intervals.

The table of a set of clips: for each machine type the rows of its IDs (`00`, ...), then `pooled` (one AUC over all its
clips), `mean` and `min` over its IDs; and for the type `average` the means of these three over the types.
"""

from collections.abc import Callable, Sequence

import numpy as np
from sklearn.metrics import roc_auc_score

from dataloader import Clip
from utils import UserError

MAX_FPR = 0.1  # pAUC covers false positive rates up to here
COLUMNS = ("AUC", "pAUC", "n_normal", "n_anomaly")
BOUNDS = ("AUC_low", "AUC_high", "pAUC_low", "pAUC_high")
DRAWS, COVERAGE, SEED = 2000, 0.95, 0  # of the bootstrap

Metrics = dict[str, float | None]  # the COLUMNS and BOUNDS; None where there is nothing to compute it from
Table = dict[str, dict[str, Metrics]]


class Scores:
    """Anomaly scores `(n,)` of clips whose condition is known, in groups by machine.

    Raises `UserError` for scores that are not finite: they have no place in an order.
    """

    def __init__(self, clips: Sequence[Clip], scores: np.ndarray):
        if bad := int(np.sum(~np.isfinite(scores))):
            raise UserError(f"{bad} of {len(scores)} scores are not finite numbers")
        self.scores = np.asarray(scores, dtype=np.float64)
        self.is_anomaly = np.array([clip.is_anomaly for clip in clips], dtype=bool)
        types = np.array([clip.machine_type for clip in clips])
        ids = np.array([clip.machine_id for clip in clips])
        self.machines: dict[str, dict[str, np.ndarray]] = {}  # the indices of each type's IDs
        for machine_type in dict.fromkeys(types.tolist()):
            self.machines[machine_type] = {
                f"{machine_id:02d}": np.flatnonzero((types == machine_type) & (ids == machine_id))
                for machine_id in np.unique(ids[types == machine_type])
            }


# ---------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------


def rate(is_anomaly: np.ndarray, scores: np.ndarray) -> Metrics:
    """AUC and pAUC (up to a false positive rate of 0.1, standardised to 0.5 for chance), as fractions."""
    n_anomaly = int(is_anomaly.sum())
    counts = {"n_normal": len(is_anomaly) - n_anomaly, "n_anomaly": n_anomaly}
    if min(counts.values()) == 0:
        return {"AUC": None, "pAUC": None, **counts}
    return {
        "AUC": float(roc_auc_score(is_anomaly, scores)),
        "pAUC": float(roc_auc_score(is_anomaly, scores, max_fpr=MAX_FPR)),
        **counts,
    }


def combine(rows: Sequence[Metrics], how: Callable) -> Metrics:
    """Each column of several rows combined on its own, leaving out rows without AUC."""
    rated = [row for row in rows if row["AUC"] is not None]
    if not rated:
        return dict.fromkeys(COLUMNS)
    combined = {name: float(how([row[name] for row in rated])) for name in COLUMNS}
    return {name: int(x) if name.startswith("n_") and x.is_integer() else x for name, x in combined.items()}


def rate_all(clips: Sequence[Clip], scores: np.ndarray) -> Table:
    """The table of clips and their scores `(n,)`, without intervals."""
    of = Scores(clips, scores)
    table: Table = {}
    for machine_type, ids in of.machines.items():
        per_id = {name: rate(of.is_anomaly[chosen], of.scores[chosen]) for name, chosen in ids.items()}
        whole = np.concatenate(list(ids.values()))
        rows = list(per_id.values())
        table[machine_type] = per_id | {
            "pooled": rate(of.is_anomaly[whole], of.scores[whole]),
            "mean": combine(rows, np.mean),
            "min": combine(rows, np.min),
        }
    table["average"] = {
        row: combine([table[machine_type][row] for machine_type in table], np.mean) for row in ("pooled", "mean", "min")
    }
    return table


# ---------------------------------------------------------------------------------------------------------------
# How far the test clips decide it
# ---------------------------------------------------------------------------------------------------------------

# AUC and pAUC of the resampled clips, `(DRAWS,)` each, for the rows of a table that have them
Draws = dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]


def bootstrap(clips: Sequence[Clip], scores: np.ndarray, draws: int = DRAWS, seed: int = SEED) -> Draws:
    """AUC and pAUC of clips resampled with replacement within machine ID and condition, for every row of the table.

    The same clips are drawn for the same seed whatever the scores, so that two models can be compared draw by draw.
    """
    of, rng = Scores(clips, scores), np.random.default_rng(seed)
    result: Draws = {}
    for machine_type, ids in of.machines.items():
        counts = {name: resample(of.is_anomaly[chosen], draws, rng) for name, chosen in ids.items()}
        groups = {name: (chosen, counts[name]) for name, chosen in ids.items()}
        groups["pooled"] = (np.concatenate(list(ids.values())), np.concatenate(list(counts.values()), axis=1))
        for name, (chosen, weights) in groups.items():
            if 0 < of.is_anomaly[chosen].sum() < len(chosen):
                result[machine_type, name] = weighted_areas(of.is_anomaly[chosen], of.scores[chosen], weights)
        rows = [result[machine_type, name] for name in ids if (machine_type, name) in result]
        if rows:
            result[machine_type, "mean"] = combine_draws(rows, np.mean)
            result[machine_type, "min"] = combine_draws(rows, np.min)
    for name in ("pooled", "mean", "min"):
        rows = [result[machine_type, name] for machine_type in of.machines if (machine_type, name) in result]
        if rows:
            result["average", name] = combine_draws(rows, np.mean)
    return result


def combine_draws(rows: Sequence[tuple[np.ndarray, np.ndarray]], how: Callable) -> tuple[np.ndarray, np.ndarray]:
    """AUC and pAUC of several rows combined draw by draw."""
    auc, pauc = (how(column, axis=0) for column in zip(*rows, strict=True))
    return auc, pauc


def resample(is_anomaly: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """How often each clip is drawn `(draws, n)`, normal and anomalous ones in their present numbers."""
    counts = np.empty((draws, len(is_anomaly)), dtype=np.float32)
    for condition in (False, True):
        chosen = np.flatnonzero(is_anomaly == condition)
        if len(chosen):
            places = rng.integers(len(chosen), size=(draws, len(chosen))) + np.arange(draws)[:, None] * len(chosen)
            counts[:, chosen] = np.bincount(places.ravel(), minlength=draws * len(chosen)).reshape(draws, -1)
    return counts


def weighted_areas(is_anomaly: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUC and standardised pAUC of clips that count `weights` `(draws, n)` times, as `rate` computes them once."""
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan))  # of clips with equal scores
    rates = []
    for condition in (False, True):  # false and true positive rate after each group of equal scores
        counted = weights[:, order] * (is_anomaly[order] == condition)
        cumulative = np.cumsum(np.add.reduceat(counted, starts, axis=1, dtype=np.float64), axis=1)
        rates.append(np.pad(cumulative / cumulative[:, -1:], ((0, 0), (1, 0))))
    false, true = rates
    full = np.sum(np.diff(false) * (true[:, 1:] + true[:, :-1]) / 2, axis=1)

    width = np.diff(false)
    inside = np.clip(MAX_FPR - false[:, :-1], 0.0, width)  # the part of each step that lies below MAX_FPR
    slope = np.divide(np.diff(true), width, out=np.zeros_like(width), where=width > 0)
    partial = np.sum(inside * (true[:, :-1] + slope * inside / 2), axis=1)
    least = MAX_FPR**2 / 2
    return full, (1 + (partial - least) / (MAX_FPR - least)) / 2


def interval(drawn: np.ndarray) -> list[float]:
    """The bounds of the middle 95 % of the draws."""
    tail = 100 * (1 - COVERAGE) / 2
    return np.percentile(drawn, (tail, 100 - tail)).tolist()


def add_intervals(table: Table, draws: Draws) -> None:
    """Enter the intervals of the draws into the rows of the table; None where there are none."""
    for machine_type, rows in table.items():
        for name, row in rows.items():
            bounds = [None] * 4
            if (machine_type, name) in draws:
                bounds = [bound for column in draws[machine_type, name] for bound in interval(column)]
            row |= dict(zip(BOUNDS, bounds, strict=True))
