"""What a checkpoint says of the clips of a split: what tables, figures, report and comparison are made of."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from checkpoint import TrainedModel
from dataloader import ANOMALOUS, MACHINE, NORMAL, UNLABELLED, ClipSet, known_clips
from evaluation.decisions import decide, fit_thresholds
from evaluation.metrics import Metrics, measure
from evaluation.scoring import Outputs, anomaly_scores, run_model
from utils import UserError, notice, versions

HARDEST = 3  # clips of each condition and machine ID


@dataclass(frozen=True)
class Result:
    """`clips` has a row per clip: what `find_clips` gives, the `score` in `score_dtype`, the `exact_score` (float64)
    that decisions rest on, the `angle` to the centre of its class in degrees, `threshold`, and `decision` (1 for
    anomalous, missing without a threshold). `embedding` `(n, E)` belongs to these rows. `metrics` are of the clips
    whose condition is known; None without any. `about` says by name what was evaluated.
    """

    trained: TrainedModel
    clips: pd.DataFrame
    embedding: np.ndarray
    thresholds: pd.DataFrame
    metrics: Metrics | None
    about: dict[str, Any]

    @property
    def known(self) -> pd.DataFrame:
        return known_clips(self.clips)

    @property
    def hardest(self) -> pd.DataFrame:
        """Of each machine ID the normal clips with the highest and the anomalous ones with the lowest scores."""
        ordered = self.clips.sort_values("exact_score", kind="stable")
        normal, anomalous = (ordered[ordered["condition"] == condition] for condition in (NORMAL, ANOMALOUS))
        chosen = [clips.groupby(MACHINE, sort=False).head(HARDEST) for clips in (normal[::-1], anomalous)]
        return pd.concat(chosen).sort_values("label", kind="stable")


def evaluate(trained: TrainedModel, clip_set: ClipSet, split: str, device: torch.device) -> Result:
    """Score the clips of a split ("test" or "evaluation"), measure and decide."""
    outputs = run_model(trained, clip_set, device)
    clips = clip_set.clips.assign(
        score=anomaly_scores(trained, outputs, clip_set.labels, trained.config.score_dtype),
        exact_score=anomaly_scores(trained, outputs, clip_set.labels),
        angle=angles(trained, outputs, clip_set.labels),
    )
    if bad := int((~np.isfinite(clips["score"])).sum()):
        raise UserError(f"{trained.path}: {bad} of {len(clips)} scores are not finite numbers")
    thresholds = find_thresholds(trained)
    clips = clips.join(thresholds["threshold"], on=MACHINE)
    clips["decision"] = decide(clips["exact_score"], clips["threshold"])
    known = known_clips(clips)
    metrics = None if known.empty else measure(known)
    return Result(trained, clips, outputs.embedding.numpy(), thresholds, metrics, describe(trained, clips, split))


def angles(trained: TrainedModel, outputs: Outputs, labels: Tensor) -> np.ndarray:
    """Degrees; of a plain linear head, which has no centres, the angle to the weights of the class."""
    if trained.network.head == "arcface":
        cosine = outputs.similarity.double().gather(1, labels[:, None])[:, 0]
    else:
        weights = trained.network.mobilefacenet.fc_out.weight.detach().cpu()[labels]
        cosine = torch.nn.functional.cosine_similarity(outputs.embedding.double(), weights.double())
    return torch.rad2deg(torch.acos(cosine.clamp(-1.0, 1.0))).numpy()


def find_thresholds(trained: TrainedModel) -> pd.DataFrame:
    """The threshold of each machine; none, with a notice, where no held-out scores are stored."""
    machines, held_out, config = trained.config.machines, trained.state.get("held_out"), trained.config
    if held_out is None:
        notice(f"{trained.path}: no scores of held-out clips, so there are no decisions")
        machines = {}
    return fit_thresholds(machines, pd.DataFrame(held_out), config.threshold, config.threshold_percentile)


def describe(trained: TrainedModel, clips: pd.DataFrame, split: str) -> dict[str, Any]:
    training, counts = trained.state.get("config", {}), clips["condition"].value_counts()
    conditions = [name for name in (NORMAL, ANOMALOUS, UNLABELLED) if name in counts]
    return {
        "checkpoint": str(trained.path),
        "mode": trained.config.mode,
        "input": trained.config.input,
        "seed": training.get("seed"),
        "epoch of the weights": trained.state.get("epoch"),
        "epochs": training.get("epoch"),
        "clips trained on": trained.state.get("clip_counts", {}).get("training"),
        f"clips of {split}": ", ".join(f"{counts[name]} {name}" for name in conditions),
        "trained with": trained.state.get("versions"),
        "evaluated with": versions(),
    }
