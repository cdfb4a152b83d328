"""AUC, pAUC and mAUC of anomaly scores, those of each domain and the official score; with bootstrap
intervals.

The rows of a set of clips: for each machine type those of its IDs (`00`, ...), then `pooled` (all
its clips together), `mean` and `min` over its IDs; and for the type `average` the means of these
three over the types. Where clips have domains, `hmean` too: the harmonic mean over the IDs of a
type, and for `average` over the IDs of all types.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from corpus import ANOMALOUS, MACHINE, SOURCE, TARGET, TEST_FOLDERS

MAX_FPR = 0.1  # pAUC covers false positive rates up to here
AVERAGE = "average"  # the machine type of the rows that average over types
OFFICIAL = "official"  # the column of the official score
SUMMARY_ROWS = ("pooled", "mean", "min", "hmean")  # of a machine type, beside those of its IDs
COUNTS = ("n_normal", "n_anomaly")
DRAWS, COVERAGE, SEED = 2000, 0.95, 0  # of the bootstrap


def area(false: np.ndarray, true: np.ndarray) -> np.ndarray:
    """The area under ROC curves, `(draws, points)` -> `(draws,)`; rates go from (0, 0) to (1, 1)."""
    return np.sum(np.diff(false) * (true[:, 1:] + true[:, :-1]) / 2, axis=1)


def partial_area(false: np.ndarray, true: np.ndarray) -> np.ndarray:
    """The area up to a false positive rate of MAX_FPR, standardised as in scikit-learn: 0.5 for
    chance, 1 at best.
    """
    width = np.diff(false)
    inside = np.clip(
        MAX_FPR - false[:, :-1], 0.0, width
    )  # the part of each step that lies below MAX_FPR
    slope = np.divide(np.diff(true), width, out=np.zeros_like(width), where=width > 0)
    partial = np.sum(inside * (true[:, :-1] + slope * inside / 2), axis=1)
    chance = MAX_FPR**2 / 2
    return (1 + (partial - chance) / (MAX_FPR - chance)) / 2


class Measure(NamedTuple):
    """A metric of the normal clips of one domain and the anomalous ones of another; "" stands for
    all clips.
    """

    metric: Callable[[np.ndarray, np.ndarray], np.ndarray]
    normal: str = ""
    anomalous: str = ""


@dataclass(frozen=True)
class Rule:
    """What is measured, by column, and which columns the official score is the harmonic mean of."""

    measures: dict[str, Measure]
    official: tuple[str, ...] = ()
    text: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.measures, *((OFFICIAL,) if self.official else ()), *COUNTS)

    @property
    def rates(self) -> tuple[str, ...]:
        """The columns but for the counts."""
        return self.columns[: -len(COUNTS)]


ALL = {"AUC": Measure(area), "pAUC": Measure(partial_area)}
NO_DOMAINS = Rule(ALL)
SHARED_ANOMALIES = Rule(
    ALL | {"AUC_source": Measure(area, SOURCE), "AUC_target": Measure(area, TARGET)},
    ("AUC_source", "AUC_target", "pAUC"),
    "rule of DCASE 2022 and later: the AUC of a domain takes its normal clips and the anomalous ones of both domains, "
    "pAUC all clips",
)
OWN_ANOMALIES = Rule(
    ALL
    | {f"AUC_{domain}": Measure(area, domain, domain) for domain in (SOURCE, TARGET)}
    | {f"pAUC_{domain}": Measure(partial_area, domain, domain) for domain in (SOURCE, TARGET)},
    ("AUC_source", "AUC_target", "pAUC_source", "pAUC_target"),
    "rule of DCASE 2021: AUC and pAUC of a domain take its clips alone",
)

# By (machine type, row) the columns of the rule `(1 + DRAWS, columns)`: first of the clips
# themselves, then of resampled ones. A metric is NaN where it has no normal or no anomalous clips.
Draws = dict[tuple[str, str], np.ndarray]


@dataclass(frozen=True)
class Metrics:
    """The columns of each (machine type, row), with the bounds of their intervals, and the draws
    behind them.
    """

    rule: Rule
    table: pd.DataFrame
    draws: Draws


class Group(NamedTuple):
    """Clips that are measured together `(n,)`, and how often each counts `(1 + draws, n)`."""

    is_anomaly: np.ndarray
    domain: np.ndarray
    scores: np.ndarray
    counts: np.ndarray


def find_rule(clips: pd.DataFrame) -> Rule:
    """By the domains of the clips, and the folders they are in: those of 2021 have a domain each."""
    if not clips["domain"].any():
        return NO_DOMAINS
    folders = {path.parent.name for path in clips["path"]}
    return (
        OWN_ANOMALIES if any(TEST_FOLDERS.get(folder) for folder in folders) else SHARED_ANOMALIES
    )


def measure(
    clips: pd.DataFrame, rule: Rule = NO_DOMAINS, draws: int = DRAWS, seed: int = SEED
) -> Metrics:
    """The metrics of clips with the columns `machine_type`, `machine_id`, `condition` and `score`,
    and `domain` where the rule has domains.

    Clips are resampled with replacement within machine ID, condition and domain. For the same seed
    the same clips are drawn whatever the scores, so that two models can be compared draw by draw.
    """
    rng, result, of_ids = np.random.default_rng(seed), Draws(), []
    types = clips["machine_type"].unique().tolist()
    for machine_type in types:
        groups = {}
        for machine_id, own in clips[clips["machine_type"] == machine_type].groupby("machine_id"):
            is_anomaly = (own["condition"] == ANOMALOUS).to_numpy()
            domain = own["domain"].to_numpy(str) if rule.official else np.full(len(own), "")
            counts = resample(is_anomaly, domain, draws, rng)
            groups[str(machine_id)] = Group(
                is_anomaly, domain, own["score"].to_numpy(float), counts
            )
        rows = {machine_id: compute(group, rule) for machine_id, group in groups.items()}
        per_id = list(rows.values())
        rows["pooled"] = compute(
            Group(*(np.concatenate(x, axis=-1) for x in zip(*groups.values(), strict=True))), rule
        )
        rows["mean"], rows["min"] = combine(per_id, np.mean), combine(per_id, np.min)
        if rule.official:
            rows["hmean"] = combine_harmonically(per_id, rule)
        result |= {(machine_type, name): row for name, row in rows.items()}
        of_ids += per_id
    for name in ("pooled", "mean", "min"):
        result[AVERAGE, name] = combine(
            [result[machine_type, name] for machine_type in types], np.mean
        )
    if rule.official:
        result[AVERAGE, "hmean"] = combine_harmonically(of_ids, rule)
    return Metrics(rule, make_table(result, rule), result)


def resample(
    is_anomaly: np.ndarray, domain: np.ndarray, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """How often each clip counts `(1 + draws, n)`: once, then as drawn among those of its condition
    and domain.
    """
    counts = np.ones((1 + draws, len(is_anomaly)), dtype=np.float32)
    for condition in (False, True):
        for of_domain in np.unique(domain):
            chosen = np.flatnonzero((is_anomaly == condition) & (domain == of_domain))
            size = len(chosen)
            if size:
                drawn = rng.integers(size, size=(draws, size)) + np.arange(draws)[:, None] * size
                counts[1:, chosen] = np.bincount(drawn.ravel(), minlength=draws * size).reshape(
                    draws, size
                )
    return counts


def compute(group: Group, rule: Rule) -> np.ndarray:
    """The columns of the rule `(draws, columns)`."""
    result = np.full((len(group.counts), len(rule.columns)), np.nan)
    result[:, -len(COUNTS) :] = (~group.is_anomaly).sum(), group.is_anomaly.sum()
    rates: dict[tuple[str, str], tuple[np.ndarray, np.ndarray] | None] = {}
    for column, (metric, normal, anomalous) in enumerate(rule.measures.values()):
        if (normal, anomalous) not in rates:
            rates[normal, anomalous] = roc_curves(select(group, normal, anomalous))
        if curves := rates[normal, anomalous]:
            result[:, column] = metric(*curves)
    if rule.official:
        result[:, rule.columns.index(OFFICIAL)] = official_score([result], rule)
    return result


def select(group: Group, normal: str, anomalous: str) -> Group:
    """The normal clips of one domain and the anomalous ones of another."""
    if not normal and not anomalous:
        return group
    wanted = np.where(group.is_anomaly, anomalous, normal)
    chosen = (wanted == "") | (group.domain == wanted)
    return Group(*(values[..., chosen] for values in group))


def roc_curves(group: Group) -> tuple[np.ndarray, np.ndarray] | None:
    """False and true positive rates `(draws, points)` after each group of equal scores, from the
    highest down; None where all clips are normal, or all anomalous.
    """
    if group.is_anomaly.all() or not group.is_anomaly.any():
        return None
    order = np.argsort(-group.scores, kind="stable")
    starts = np.flatnonzero(np.diff(group.scores[order], prepend=np.nan))  # of the groups
    rates = []
    for condition in (False, True):
        counted = group.counts[:, order] * (group.is_anomaly[order] == condition)
        cumulative = np.cumsum(np.add.reduceat(counted, starts, axis=1, dtype=np.float64), axis=1)
        rates.append(np.pad(cumulative / cumulative[:, -1:], ((0, 0), (1, 0))))
    return rates[0], rates[1]


def combine(rows: Sequence[np.ndarray], function: Callable[..., np.ndarray]) -> np.ndarray:
    """Each column of several rows combined draw by draw, leaving out rows without AUC, and values
    that are missing.
    """
    rated = [row for row in rows if not np.isnan(row[0, 0])]
    result = np.full_like(rows[0], np.nan)
    for column in range(result.shape[1]):
        if values := [row[:, column] for row in rated if not np.isnan(row[0, column])]:
            result[:, column] = function(values, axis=0)
    return result


def combine_harmonically(rows: Sequence[np.ndarray], rule: Rule) -> np.ndarray:
    """The same with the harmonic mean; the official score is that of all values it consists of, in
    all rows.
    """
    result = combine(rows, harmonic_mean)
    result[:, -len(COUNTS) :] = combine(rows, np.mean)[:, -len(COUNTS) :]
    result[:, rule.columns.index(OFFICIAL)] = official_score(rows, rule)
    return result


def official_score(rows: Sequence[np.ndarray], rule: Rule) -> np.ndarray:
    """`(draws,)`, leaving out what is missing; NaN where everything is."""
    columns = [rule.columns.index(name) for name in rule.official]
    values = [row[:, column] for row in rows for column in columns if not np.isnan(row[0, column])]
    return harmonic_mean(values) if values else np.full(len(rows[0]), np.nan)


def harmonic_mean(values: Sequence[np.ndarray], axis: int = 0) -> np.ndarray:
    """As the organisers compute it: of values raised to the spacing of floating-point numbers at 1."""
    return 1 / np.mean(1 / np.maximum(values, sys.float_info.epsilon), axis=axis)


def interval(drawn: np.ndarray) -> list[float]:
    """The bounds of the middle 95 % of the draws."""
    tail = 100 * (1 - COVERAGE) / 2
    return np.percentile(drawn, (tail, 100 - tail)).tolist()


def make_table(draws: Draws, rule: Rule) -> pd.DataFrame:
    rows = []
    for key, drawn in draws.items():
        row = dict(zip((*MACHINE, *rule.columns), (*key, *drawn[0]), strict=True))
        for name, column in zip(rule.rates, drawn[1:].T, strict=False):
            row[f"{name}_low"], row[f"{name}_high"] = interval(column)
        rows.append(row)
    table = pd.DataFrame(rows).set_index(MACHINE)
    for name in COUNTS:  # whole numbers, but for means
        counts = [int(x) if x.is_integer() else x for x in table[name]]
        table[name] = pd.Series(counts, table.index, dtype=object)
    return table
