"""Yes or no: a threshold for each machine ID, from the scores of normal clips that were held out of
the training.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from config import Machines, name_id
from corpus import ANOMALOUS, MACHINE, known_clips, name_machines
from utils import notice

LEAST_CLIPS = 20  # of an ID; with fewer the scores of its machine type are pooled


def fit_threshold(scores: np.ndarray, method: str, percentile: float) -> float:
    """The percentile of a gamma distribution fitted to the scores ("gamma"), or of the scores
    themselves ("quantile").

    As in the DCASE baselines, but for a location fixed at 0, below which no score lies: a free one
    fits less well and at times not at all. Where all scores are alike up to rounding, nothing can
    be fitted, and the quantile serves.
    """
    values = np.maximum(scores, np.finfo(np.float64).eps)
    if method == "gamma" and np.ptp(values) > 1e-4 * values.mean():
        import scipy.stats  # takes half a second

        shape, _, scale = scipy.stats.gamma.fit(values, floc=0)
        value = float(scipy.stats.gamma.ppf(percentile / 100, shape, scale=scale))
        if np.isfinite(value):
            return value
    return float(np.percentile(values, percentile))


def fit_thresholds(
    machines: Machines, held_out: pd.DataFrame, method: str, percentile: float
) -> pd.DataFrame:
    """For each machine type and ID the `threshold`, above which a score counts as anomalous, the
    `held_out` clips it comes from: those of the ID, or of its whole type where the ID has fewer
    than 20; and how many are `held_out_of_id`.

    `held_out` has the columns `machine_type`, `machine_id` and `score`. A type without clips has no
    thresholds.
    """
    rows = []
    for machine_type, ids in machines.items():
        of_type = held_out[held_out["machine_type"] == machine_type]
        for machine_id in [name_id(machine_id) for machine_id in ids if len(of_type)]:
            of_id = of_type[of_type["machine_id"] == machine_id]
            chosen, source = (of_type, "type") if len(of_id) < LEAST_CLIPS else (of_id, "ID")
            threshold = fit_threshold(chosen["score"].to_numpy(float), method, percentile)
            rows.append(
                (
                    machine_type,
                    machine_id,
                    threshold,
                    f"{len(chosen)} clips of the {source}",
                    len(of_id),
                )
            )
    table = pd.DataFrame(rows, columns=[*MACHINE, "threshold", "held_out", "held_out_of_id"])
    return table.astype({"threshold": float}).set_index(MACHINE)


def explain_thresholds(thresholds: pd.DataFrame, machines: Machines, path: Path) -> None:
    """Say of which machines the threshold is that of the type, or is missing. The path is that of
    the checkpoint.
    """
    if thresholds.empty:
        notice(f"{path}: no scores of held-out clips, so there are no decisions")
        return
    counts = thresholds["held_out_of_id"].reindex(name_machines(machines))
    counts.index = counts.index.map(" ".join)
    pooled = [f"{machine} ({count:.0f})" for machine, count in counts[counts < LEAST_CLIPS].items()]
    without = counts.index[counts.isna()].tolist()
    if pooled:
        notice(
            f"fewer than {LEAST_CLIPS} held-out clips, so the threshold is that of the whole machine type: "
            f"{', '.join(pooled)}"
        )
    if without:
        notice(
            f"no held-out clips of the machine type, so there is no threshold: {', '.join(without)}"
        )


def decide(scores: pd.Series, thresholds: pd.Series) -> pd.Series:
    """1 for anomalous, above the threshold, else 0; missing where there is no threshold."""
    return (scores > thresholds).astype("Int64").where(thresholds.notna())


def count_decisions(clips: pd.DataFrame, thresholds: pd.DataFrame) -> pd.DataFrame:
    """The thresholds with precision, recall and F1 of the decisions about clips whose condition is
    known; missing where nothing was called, or is, anomalous.
    """
    known = known_clips(clips[clips["decision"].notna()])
    called, there = known["decision"].astype(int), (known["condition"] == ANOMALOUS).astype(int)
    counts = (
        known[MACHINE]
        .assign(hits=called * there, called=called, there=there)
        .groupby(MACHINE)
        .sum()
    )
    counts = counts.reindex(thresholds.index, fill_value=0).astype(float)
    return thresholds.assign(
        precision=counts["hits"] / counts["called"],
        recall=counts["hits"] / counts["there"],
        F1=2 * counts["hits"] / (counts["called"] + counts["there"]),
    )
