"""Thresholds of the scores of windows, above which a window counts as anomalous: one for each
machine, from the scores of normal recordings that were not trained on.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd

from classes import Machine
from config import Config
from detector import Detector, DetectorScorer, score_held_out
from evaluation.calibration import read_calibration
from recordings import MACHINE_COLUMNS
from utils import notice

# Recordings of a machine; with fewer a gamma distribution or a quantile is that of the machine type
LEAST_RECORDINGS = 20
COLUMNS = [*MACHINE_COLUMNS, "threshold", "source", "n_recordings"]

# ---- The normal scores ----


def find_thresholds(detector: Detector, scorer: DetectorScorer, config: Config) -> pd.DataFrame:
    """Return the threshold of each machine, for the scores of the scorer, as `fit_thresholds` does.
    Recordings of `score.py --calibrate` replace those that were held out.
    """
    pairs = list(zip(detector.members, scorer.members, strict=True))
    held_out = scorer.average_tables([score_held_out(*pair) for pair in pairs])
    channel = detector.windows(config, "test").channel
    calibrated = [read_calibration(model, x.name, channel) for model, x in pairs]
    later = scorer.average_tables(drop_incomplete(calibrated))
    machines, replaced = (pd.MultiIndex.from_frame(x[MACHINE_COLUMNS]) for x in (held_out, later))
    held_out = held_out[~machines.isin(replaced)]
    origin = "held-out" if detector.has_network else "normal"
    parts = [held_out.assign(origin=origin), later.assign(origin="later")]
    normal = pd.concat([part for part in parts if len(part)] or parts[:1])
    return fit_thresholds(detector.classes.machines, normal, config.threshold, config.false_alarms)


def drop_incomplete(calibrated: Sequence[pd.DataFrame]) -> list[pd.DataFrame]:
    """Drop the later scores of machines of which the members have not scored the same recordings,
    and print a notice of these machines.
    """
    recordings = [group_recordings(table) for table in calibrated]
    machines = dict.fromkeys(machine for of_member in recordings for machine in of_member)
    incomplete = []
    for machine in machines:
        if any(x.get(machine) != recordings[0].get(machine) for x in recordings):
            incomplete.append(machine)
    if not incomplete:
        return list(calibrated)
    names = ", ".join(map(" ".join, incomplete))
    notice(
        f"the calibrations of {names} are not used: not all checkpoints have scored the same "
        "recordings; give all of them to score.py --calibrate"
    )
    kept = []
    for table in calibrated:
        kept.append(table[~pd.MultiIndex.from_frame(table[MACHINE_COLUMNS]).isin(incomplete)])
    return kept


def group_recordings(table: pd.DataFrame) -> dict[Machine, set[str]]:
    """Return the recordings of each machine in a table of scores."""
    recordings: dict[Machine, set[str]] = {}
    for machine_type, machine_id, name, *_ in table.itertuples(index=False):
        recordings.setdefault((machine_type, machine_id), set()).add(name)
    return recordings


# ---- The thresholds ----


def fit_thresholds(
    machines: Sequence[Machine], normal: pd.DataFrame, method: str | float, false_alarms: float
) -> pd.DataFrame:
    """Find a threshold for each machine, above which the share `false_alarms` of normal windows
    should lie.

    `normal` has `machine_type`, `machine_id`, `recording`, `score` and `origin` ("held-out" or
    "later") of windows of normal recordings; scores that are not finite are left out. `method` is a
    name in METHODS, or the threshold of all machines.

    Returns:
        For each (machine type, machine ID) the `threshold`, missing where there is none; its
        `source`, as in "15 held-out recordings of the ID"; and `n_recordings` of the machine.
    """
    normal = normal[np.isfinite(normal["score"].to_numpy(float))]
    rows: list[tuple[str, str, float | None, str, int]] = []
    without_fit = []
    for machine_type, machine_id in machines:
        of_type = normal[normal["machine_type"] == machine_type]
        of_machine = of_type[of_type["machine_id"] == machine_id]
        n_own = of_machine["recording"].nunique()
        if isinstance(method, float):
            rows.append((machine_type, machine_id, method, "given", n_own))
            continue
        chosen, level = of_machine, "ID"
        if n_own < least_recordings(method, false_alarms):
            chosen, level = make_comparable(of_type, of_machine), "type"
        threshold = METHODS[method](chosen, false_alarms) if len(chosen) else None
        if threshold is None and method == "gamma" and len(chosen):
            threshold = quantile(chosen, false_alarms)
            without_fit.append(f"{machine_type} {machine_id}")
        source = describe_source(chosen, level) if len(chosen) else ""
        rows.append((machine_type, machine_id, threshold, source, n_own))
    if without_fit:
        notice(
            "no gamma distribution fits the scores of the normal recordings, so the threshold is "
            f"their quantile: {', '.join(without_fit)}"
        )
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"threshold": float})
    return table.set_index(MACHINE_COLUMNS)


def least_recordings(method: str, false_alarms: float) -> int:
    """Return how many recordings a threshold takes: for "conformal" the smallest n for which
    ceil((n + 1) (1 - false_alarms)) is not above n; for the others LEAST_RECORDINGS.
    """
    if method != "conformal":
        return LEAST_RECORDINGS
    rate = Fraction(str(false_alarms))
    return math.ceil((1 - rate) / rate)


def make_comparable(of_type: pd.DataFrame, of_machine: pd.DataFrame) -> pd.DataFrame:
    """Return the scores of a machine type on the scale of `of_machine`: moved by as much as the
    mean of the machine lies above that of other recordings of their own machine, all as log(1 +
    score). A machine with a single recording has no others, and is left out.

    Each recording is compared with as many others as a new recording of `of_machine` is. Compared
    with all of its machine, itself included, it would be closer, and the threshold too low.
    """
    typical = np.log1p(of_machine.groupby("recording")["score"].mean())
    parts = [of_type[:0]]
    for _, group in of_type.groupby("machine_id"):
        others = group["recording"].map(mean_of_others(group, len(typical)))
        moved = np.expm1(np.log1p(group["score"]) - others + typical.mean())
        parts.append(group.assign(score=moved).dropna())
    return pd.concat(parts)


def mean_of_others(of_machine: pd.DataFrame, count: int) -> pd.Series:
    """Return for each recording of a machine the mean of log(1 + score) over `count` others, or all
    if there are fewer; missing if it is the only one. The score of a recording is the mean of its
    windows.
    """
    scores = of_machine.groupby("recording")["score"].mean().sample(frac=1, random_state=0)
    n_recordings = len(scores)
    steps = np.arange(1, min(count, n_recordings - 1) + 1)
    if len(steps) == 0:
        return pd.Series(np.nan, scores.index)
    others = (np.arange(n_recordings)[:, np.newaxis] + steps) % n_recordings
    return pd.Series(np.log1p(scores.to_numpy())[others].mean(axis=1), scores.index)


def describe_source(normal: pd.DataFrame, level: str) -> str:
    """Describe the recordings of a threshold, as in "15 held-out recordings of the ID"."""
    counts = normal.drop_duplicates([*MACHINE_COLUMNS, "recording"])["origin"].value_counts()
    parts = [f"{count} {origin}" for origin, count in counts.items()]
    return f"{' and '.join(parts)} recordings of the {level}"


# ---- The methods: from the `recording` and `score` of normal windows to a threshold ----


def conformal(normal: pd.DataFrame, false_alarms: float) -> float | None:
    """Return the threshold above which at most the share `false_alarms` of the windows of a new
    recording lie on average, if recordings are exchangeable; None where there are too few.

    Of n recordings with one window each it is the k-th smallest score, k = ceil((n + 1) (1 -
    false_alarms)) (Angelopoulos & Bates, arXiv 2107.07511, section 1). With several windows, each
    counts as its part of a recording (Lee, Barber & Willett, arXiv 2306.06342): the threshold is
    the smallest score up to which there are at least (n + 1) (1 - false_alarms) recordings.
    """
    ordered = normal.sort_values("score", kind="stable")
    recordings = ordered.groupby([*MACHINE_COLUMNS, "recording"])["score"]
    up_to = np.cumsum(1 / recordings.transform("size").to_numpy())
    needed = float((recordings.ngroups + 1) * (1 - Fraction(str(false_alarms))))
    place = np.searchsorted(up_to, needed - 1e-9)  # rounding errors must not move it
    return float(ordered["score"].iloc[place]) if place < len(ordered) else None


def quantile(normal: pd.DataFrame, false_alarms: float) -> float:
    """Return the quantile of the scores."""
    return float(np.percentile(normal["score"], 100 * (1 - false_alarms)))


def gamma(normal: pd.DataFrame, false_alarms: float) -> float | None:
    """Return the quantile of a gamma distribution fitted to the scores; None if none fits, as to
    scores that are nearly equal.

    The fit is that of the DCASE baselines, except that the location is fixed at 0, since no score
    is negative: with a free location the fit is worse and sometimes fails.
    """
    import scipy.stats  # takes half a second

    scores = np.maximum(normal["score"].to_numpy(float), np.finfo(np.float64).eps)
    if np.ptp(scores) <= 1e-4 * scores.mean():
        return None
    try:
        with warnings.catch_warnings(action="ignore"):
            shape, _, scale = scipy.stats.gamma.fit(scores, floc=0)
            threshold = float(scipy.stats.gamma.ppf(1 - false_alarms, shape, scale=scale))
    except (ValueError, ArithmeticError, RuntimeError):
        return None
    return threshold if np.isfinite(threshold) else None


METHODS: dict[str, Callable[[pd.DataFrame, float], float | None]] = {
    "conformal": conformal,
    "gamma": gamma,
    "quantile": quantile,
}

# ---- What is missing ----


def explain_thresholds(thresholds: pd.DataFrame, config: Config, path: Path) -> None:
    """Print notices of the machines that share the threshold of their type, and of those without
    one. `path` is that of the checkpoint, of several that of the first.
    """
    if isinstance(config.threshold, float):
        return
    counts = thresholds["n_recordings"]
    if not counts.any():
        notice(
            f"{path}: no scores of held-out recordings, so there are no decisions; set thresholds "
            "with score.py --calibrate or --threshold"
        )
        return
    least = least_recordings(config.threshold, config.false_alarms)
    is_missing = thresholds["threshold"].isna()
    pooled = thresholds[~is_missing & (counts < least)]
    if len(pooled):
        notice(
            f"fewer than {least} normal recordings of a machine, so its threshold also rests on "
            f"those of other machines of the type: {name_counts(pooled)}"
        )
    if is_missing.any():
        needed = least if config.threshold == "conformal" else 2
        remedy = "hold out more, ask for another rate, or use score.py --calibrate"
        if path.is_dir():  # of normal recordings, without a network
            remedy = f"add recordings to {path}, or ask for another rate"
        notice(
            f"no threshold, which takes {needed} normal recordings of the machine (threshold: "
            f"{config.threshold}, false_alarms: {config.false_alarms:g}): "
            f"{name_counts(thresholds[is_missing])}; {remedy}"
        )


def name_counts(thresholds: pd.DataFrame) -> str:
    """Name machines with the number of their normal recordings, as in "fan 02 (5)"."""
    names, counts = map(" ".join, thresholds.index), thresholds["n_recordings"]
    return ", ".join(f"{name} ({count})" for name, count in zip(names, counts, strict=True))


# ---- Decisions ----


def threshold_of(thresholds: pd.DataFrame, machine: Machine) -> float | None:
    """Return the threshold of a machine; None if it has none."""
    value = thresholds["threshold"].to_dict()[machine]
    return None if math.isnan(value) else value


def decide(levels: pd.Series, thresholds: pd.Series) -> pd.Series:
    """Return 1 for anomalous, above the threshold, else 0; missing where there is no threshold."""
    return (levels > thresholds).astype("Int64").where(thresholds.notna())
