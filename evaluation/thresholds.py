"""Decisions: a threshold for each machine, from the scores of normal clips that were held out."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from classes import Machine
from config import Config
from evaluation.scores import Scorer
from inference import Model
from model import Outputs
from names import ANOMALOUS
from recordings import MACHINE_COLUMNS, known_recordings
from utils import notice

LEAST_CLIPS = 20  # of a machine; with fewer the scores of its machine type are pooled


def find_thresholds(model: Model, scorer: Scorer, config: Config) -> pd.DataFrame:
    """Return the threshold of each machine, for the kind of score of the scorer, as
    `fit_thresholds` does.
    """
    held_out = score_held_out(model, scorer)
    return fit_thresholds(
        model.classes.machines, held_out, config.threshold, config.threshold_percentile
    )


def score_held_out(model: Model, scorer: Scorer) -> pd.DataFrame:
    """Return machine type, machine ID and `score` of each clip that was held out of the training,
    without scores that are infinite; no rows where the checkpoint has no such clips.
    """
    held_out = model.checkpoint.held_out
    columns = [*MACHINE_COLUMNS, "score"]
    if held_out is None:
        return pd.DataFrame(columns=columns)
    machines = [model.classes.entries[label].machine for label in held_out.labels]
    if scorer.kind == "published":
        scores = held_out.scores
    elif held_out.embedding is None:
        return pd.DataFrame(columns=columns)
    else:
        no_similarity = torch.empty(len(machines), 0)
        outputs = Outputs(no_similarity, held_out.embedding)
        scores = scorer.score_clips(outputs, machines)
    table = pd.DataFrame(machines, columns=MACHINE_COLUMNS).assign(score=scores.numpy())
    return table[np.isfinite(table["score"])]


def fit_thresholds(
    machines: Sequence[Machine], held_out: pd.DataFrame, method: str, percentile: float
) -> pd.DataFrame:
    """Fit a threshold for each machine, above which a score counts as anomalous.

    `held_out` has `machine_type`, `machine_id` and `score` of normal clips; `percentile` percent of
    them should lie below. `method` is "gamma" (see `fit_gamma`) or "quantile", which also replaces
    a distribution that does not fit.

    Returns:
        For each (machine type, machine ID) the `threshold`; the `held_out` clips that it comes
        from, which are those of the machine, or of its type where the machine has fewer than 20;
        and the number `held_out_of_id` of the machine. A type without clips has no rows.
    """
    rows = []
    without_fit = []
    for machine_type, machine_id in machines:
        of_type = held_out[held_out["machine_type"] == machine_type]
        of_machine = of_type[of_type["machine_id"] == machine_id]
        if of_type.empty:
            continue
        chosen, source = (of_machine, "ID") if len(of_machine) >= LEAST_CLIPS else (of_type, "type")
        scores = np.maximum(chosen["score"].to_numpy(float), np.finfo(np.float64).eps)
        threshold = fit_gamma(scores, percentile) if method == "gamma" else None
        if threshold is None:
            threshold = float(np.percentile(scores, percentile))
            without_fit.append(f"{machine_type} {machine_id}")
        description = f"{len(chosen)} clips of the {source}"
        rows.append((machine_type, machine_id, threshold, description, len(of_machine)))
    if without_fit and method == "gamma":
        notice(
            "no gamma distribution fits the scores of the held-out clips, so the threshold is "
            f"their quantile: {', '.join(without_fit)}"
        )
    columns = [*MACHINE_COLUMNS, "threshold", "held_out", "held_out_of_id"]
    return (
        pd.DataFrame(rows, columns=columns).astype({"threshold": float}).set_index(MACHINE_COLUMNS)
    )


def fit_gamma(scores: np.ndarray, percentile: float) -> float | None:
    """Return the percentile of a gamma distribution fitted to scores above 0; None if none fits, as
    to scores that are nearly equal.

    The fit is that of the DCASE baselines, except that the location is fixed at 0, since no score
    is negative: with a free location the fit is worse and sometimes fails.
    """
    import scipy.stats  # takes half a second

    if np.ptp(scores) <= 1e-4 * scores.mean():
        return None
    try:
        with warnings.catch_warnings(action="ignore"):
            shape, _, scale = scipy.stats.gamma.fit(scores, floc=0)
            threshold = float(scipy.stats.gamma.ppf(percentile / 100, shape, scale=scale))
    except (ValueError, ArithmeticError, RuntimeError):
        return None
    return threshold if np.isfinite(threshold) else None


def explain_thresholds(thresholds: pd.DataFrame, machines: Sequence[Machine], path: Path) -> None:
    """Print notices of the machines that share the threshold of their type, and of those without
    one. `path` is that of the checkpoint.
    """
    if thresholds.empty:
        notice(f"{path}: no scores of held-out clips, so there are no decisions")
        return
    counts = thresholds["held_out_of_id"].to_dict()
    pooled, without = [], []
    for machine in machines:
        if machine not in counts:
            without.append(" ".join(machine))
        elif counts[machine] < LEAST_CLIPS:
            pooled.append(f"{' '.join(machine)} ({counts[machine]})")
    if pooled:
        notice(
            f"fewer than {LEAST_CLIPS} held-out clips, so the threshold is that of the whole "
            f"machine type: {', '.join(pooled)}"
        )
    if without:
        notice(
            f"no held-out clips of the machine type, so there is no threshold: {', '.join(without)}"
        )


def decide(scores: pd.Series, thresholds: pd.Series) -> pd.Series:
    """Return 1 for anomalous, above the threshold, else 0; missing where there is no threshold."""
    return (scores > thresholds).astype("Int64").where(thresholds.notna())


def count_decisions(recordings: pd.DataFrame, thresholds: pd.DataFrame) -> pd.DataFrame:
    """Return the thresholds with precision, recall and F1 of the decisions about recordings whose
    condition is known. Precision is missing if no recording is classified as anomalous, recall if
    none is anomalous, F1 if neither.
    """
    known = known_recordings(recordings[recordings["decision"].notna()])
    positive = known["decision"].astype(int)
    anomalous = (known["condition"] == ANOMALOUS).astype(int)
    table = known[MACHINE_COLUMNS].assign(
        hits=positive * anomalous, positive=positive, anomalous=anomalous
    )
    sums = table.groupby(MACHINE_COLUMNS).sum()
    counts = sums.reindex(thresholds.index, fill_value=0).astype(float)
    return thresholds.assign(
        precision=counts["hits"] / counts["positive"],
        recall=counts["hits"] / counts["anomalous"],
        F1=2 * counts["hits"] / (counts["positive"] + counts["anomalous"]),
    )
