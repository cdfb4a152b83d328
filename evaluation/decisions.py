"""Yes or no: a threshold for each machine ID, from the scores of normal clips that were held out of the training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

from dataloader import Clip
from utils import notice

LEAST_CLIPS = 20  # of an ID; with fewer the scores of its machine type are pooled

HeldOut = Mapping[str, Mapping[str, Sequence[float]]]  # float64 anomaly scores by machine type and ID (`00`, ...)


@dataclass(frozen=True)
class Threshold:
    """The score above which a clip counts as anomalous, and the held-out clips it comes from."""

    value: float
    clips: int
    is_pooled: bool

    @property
    def source(self) -> str:
        return f"{self.clips} clips of the {'type' if self.is_pooled else 'ID'}"


def fit_threshold(scores: Sequence[float], method: str, percentile: float) -> float:
    """The percentile of a gamma distribution fitted to the scores ("gamma"), or of the scores themselves ("quantile").

    As in the DCASE baselines, but for a location fixed at 0, below which no cross-entropy lies: a free one fits less
    well and at times not at all. Where all scores are alike nothing can be fitted, and the quantile serves.
    """
    values = np.maximum(np.asarray(scores, dtype=np.float64), np.finfo(np.float64).eps)
    if method == "gamma" and np.ptp(values) > 0:
        shape, _, scale = scipy.stats.gamma.fit(values, floc=0)
        value = float(scipy.stats.gamma.ppf(percentile / 100, shape, scale=scale))
        if np.isfinite(value):
            return value
    return float(np.percentile(values, percentile))


def fit_thresholds(
    machines: Mapping[str, Sequence[int]], held_out: HeldOut, method: str, percentile: float
) -> dict[tuple[str, int], Threshold]:
    """The threshold of each (machine type, machine ID): from the scores of the ID, or of its whole type where the ID
    has fewer than 20. A type without held-out clips has none. Notices say which.
    """
    thresholds, pooled, without = {}, [], []
    for machine_type, ids in machines.items():
        of_type = held_out.get(machine_type, {})
        whole = [score for scores in of_type.values() for score in scores]
        for machine_id in ids:
            name = f"{machine_id:02d}"
            scores = of_type.get(name, [])
            is_pooled = len(scores) < LEAST_CLIPS
            if not whole:
                without.append(f"{machine_type} {name}")
                continue
            if is_pooled:
                pooled.append(f"{machine_type} {name} ({len(scores)} of {len(whole)})")
                scores = whole
            value = fit_threshold(scores, method, percentile)
            thresholds[machine_type, machine_id] = Threshold(value, len(scores), is_pooled)
    if pooled:
        notice(
            f"fewer than {LEAST_CLIPS} held-out clips, so the threshold is that of the whole machine type: "
            f"{', '.join(pooled)}"
        )
    if without:
        notice(f"no held-out clips of the machine type, so there is no threshold: {', '.join(without)}")
    return thresholds


def decide(
    clips: Sequence[Clip], scores: np.ndarray, thresholds: Mapping[tuple[str, int], Threshold]
) -> tuple[list[int], np.ndarray]:
    """The indices of the clips whose machine has a threshold, and for each of them 1 for anomalous, else 0."""
    index = [i for i, clip in enumerate(clips) if (clip.machine_type, clip.machine_id) in thresholds]
    bounds = [thresholds[clips[i].machine_type, clips[i].machine_id].value for i in index]
    return index, (scores[index] > np.array(bounds)).astype(np.int64)


def rate_decisions(is_anomaly: np.ndarray, decisions: np.ndarray) -> dict[str, float | None]:
    """Precision, recall and F1 of decisions; None where nothing was called, or is, anomalous."""
    hits, called, there = (int(np.sum(x)) for x in (decisions * is_anomaly, decisions, is_anomaly))
    return {
        "precision": hits / called if called else None,
        "recall": hits / there if there else None,
        "F1": 2 * hits / (called + there) if called + there else None,
    }
