"""The decisions about recordings whose condition is known: false alarms and detections of each
machine, beside the rate of false alarms that was asked for.
"""

import math
from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

from config import Config
from evaluation.metrics import TAIL
from names import ANOMALOUS, NORMAL
from recordings import MACHINE_COLUMNS, known_recordings

Row = Mapping[Hashable, Any]  # of the table of decisions
RATES = {"false_alarm_rate": ("n_false_alarms", "n_normal"), "recall": ("n_detected", "n_anomaly")}
COUNTED = [name for pair in RATES.values() for name in pair]


def count_decisions(recordings: pd.DataFrame, thresholds: pd.DataFrame) -> pd.DataFrame:
    """Count the decisions about recordings whose condition is known.

    Returns:
        For each machine with a threshold: `threshold`, `source`; `n_normal` recordings, of which
        `n_false_alarms` were called anomalous, their `false_alarm_rate`; `n_anomaly` recordings, of
        which `n_detected` were, the `recall`; bounds of the 95 % intervals of both rates, with the
        endings _low and _high; `precision` and `F1`. Rates without recordings are missing.
    """
    known = known_recordings(recordings[recordings["decision"].notna()])
    called = known["decision"].astype(int)
    is_normal, is_anomaly = known["condition"] == NORMAL, known["condition"] == ANOMALOUS
    counted = known[MACHINE_COLUMNS].assign(
        n_normal=is_normal.astype(int),
        n_false_alarms=called * is_normal,
        n_anomaly=is_anomaly.astype(int),
        n_detected=called * is_anomaly,
    )
    with_threshold = thresholds[thresholds["threshold"].notna()]
    counts = counted.groupby(MACHINE_COLUMNS).sum().reindex(with_threshold.index, fill_value=0)
    return add_rates(with_threshold[["threshold", "source"]].join(counts.astype(int)))


def add_rates(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of counts with rates, their intervals, precision and F1 beside them."""
    table = table.copy()
    n_called = table["n_false_alarms"] + table["n_detected"]
    for rate, (part, whole) in RATES.items():
        table[rate] = table[part] / table[whole]
        bounds = [binomial_interval(*pair) for pair in zip(table[part], table[whole], strict=True)]
        table[[f"{rate}_low", f"{rate}_high"]] = bounds or None
    table["precision"] = table["n_detected"] / n_called
    table["F1"] = 2 * table["n_detected"] / (n_called + table["n_anomaly"])
    return table


def binomial_interval(count: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of Clopper and Pearson for a rate, of which `count` of n were seen;
    from 0 to 1 without any.
    """
    import scipy.stats  # takes half a second

    low = scipy.stats.beta.ppf(TAIL, count, n - count + 1) if count else 0.0
    high = scipy.stats.beta.ppf(1 - TAIL, count + 1, n - count) if count < n else 1.0
    return float(low), float(high)


# ---- In words ----


def asked_rate(config: Config) -> str:
    """Return the rate of false alarms that was asked for, as in "asked: 10 %"; "" where the
    threshold is a given number.
    """
    if isinstance(config.threshold, float):
        return ""
    return f"asked: {100 * config.false_alarms:g} %"


def describe_decisions(decisions: pd.DataFrame, asked: str) -> str:
    """Describe the decisions in a line for each machine with known recordings, and a line for all:
    "of 16 normal 2 called anomalous, 12.5 % (1.6 to 38.3; asked: 10 %), of 24 anomalous 22, ...".
    """
    counted = decisions[decisions["n_normal"] + decisions["n_anomaly"] > 0]
    lines = {name: describe_row(row, asked) for name, row in named_rows(counted).items()}
    width = max(map(len, lines), default=0)
    return "\n".join(f"{name:{width}} | {text}" for name, text in lines.items())


def named_rows(decisions: pd.DataFrame) -> dict[str, Row]:
    """Return the row of each machine by its name and, if several have known recordings, the row
    "all": the sums of the counts, with rates, precision and F1.
    """
    names = map(" ".join, decisions.index)
    rows: dict[str, Row] = dict(zip(names, decisions.to_dict("records"), strict=True))
    if (decisions["n_normal"] + decisions["n_anomaly"] > 0).sum() > 1:
        sums = decisions[COUNTED].sum().to_frame("all").T
        (rows["all"],) = add_rates(sums).to_dict("records")
    return rows


def describe_row(row: Row, asked: str) -> str:
    parts = []
    if row["n_normal"]:
        rate = format_rate(row, "false_alarm_rate", asked)
        called = f"of {row['n_normal']} normal {row['n_false_alarms']} called anomalous"
        parts.append(f"{called}, {rate}")
    if row["n_anomaly"]:
        called = f"of {row['n_anomaly']} anomalous {row['n_detected']}"
        parts.append(f"{called}, {format_rate(row, 'recall')}")
    return ", ".join(parts)


def format_rate(row: Row, rate: str, note: str = "") -> str:
    """Format a rate with its interval in percent, as in "12.5 % (1.6 to 38.3)"; "-" if it is
    missing.
    """
    if math.isnan(row[rate]):
        return "-"
    low, high = 100 * row[f"{rate}_low"], 100 * row[f"{rate}_high"]
    inside = f"{low:.1f} to {high:.1f}" + (f"; {note}" if note else "")
    return f"{100 * row[rate]:.1f} % ({inside})"
