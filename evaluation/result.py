"""What a checkpoint says of the clips of a split: what tables, figures, report and comparison are
made of.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from checkpoint import TrainedModel
from config import Config, show_value
from corpus import ANOMALOUS, MACHINE, NORMAL, UNLABELLED, Form, known_clips, parse_name
from dataloader import ClipSet
from evaluation.decisions import decide, fit_thresholds
from evaluation.metrics import Metrics, find_rule, measure
from evaluation.scoring import angles, anomaly_scores, held_out_scores, run_model, with_embeddings
from inference import Outputs
from utils import UserError, versions

HARDEST = 3  # clips of each condition and machine ID


@dataclass(frozen=True)
class Result:
    """`clips` has a row per recording: what `find_clips` gives, the `score` in `score_dtype`, the
    `exact_score` (float64) that decisions rest on, the `angle` to the nearest centre of its ID in
    degrees, the second `worst` at which the window with the highest score starts, `threshold`, and
    `decision` (1 for anomalous, missing without a threshold). Over several windows scores and angle
    are combined as `over_windows` says, and the `embedding` `(n, E)`, which belongs to these rows,
    is the mean. `metrics` are of the recordings whose condition is known; None without any. `about`
    says by name what was evaluated.
    """

    trained: TrainedModel
    clips: pd.DataFrame
    embedding: np.ndarray
    thresholds: pd.DataFrame
    metrics: Metrics | None
    about: dict[str, Any]

    @property
    def form(self) -> Form:
        """How its recordings are named."""
        name = parse_name(self.clips["path"].iloc[0])
        assert name
        return name.form

    @property
    def known(self) -> pd.DataFrame:
        return known_clips(self.clips)

    @property
    def hardest(self) -> pd.DataFrame:
        """Of each machine ID the normal clips with the highest and the anomalous ones with the
        lowest scores.
        """
        ordered = self.clips.sort_values("exact_score", kind="stable")
        normal, anomalous = (
            ordered[ordered["condition"] == condition] for condition in (NORMAL, ANOMALOUS)
        )
        chosen = [
            clips.groupby(MACHINE, sort=False).head(HARDEST) for clips in (normal[::-1], anomalous)
        ]
        return pd.concat(chosen).sort_values("label", kind="stable")


def evaluate(
    trained: TrainedModel, clip_set: ClipSet, split: str, device: torch.device, kinds: Sequence[str]
) -> dict[str, Result]:
    """Score the clips of a split ("test" or "evaluation"), measure and decide, for each of these
    kinds of score.
    """
    trained = with_embeddings(trained, kinds, device)
    outputs = run_model(trained, clip_set, device)
    configs = {kind: trained.config.model_copy(update={"scoring": kind}) for kind in kinds}
    return {
        kind: judge(replace(trained, config=own), outputs, clip_set, split)
        for kind, own in configs.items()
    }


def judge(trained: TrainedModel, outputs: Outputs, clip_set: ClipSet, split: str) -> Result:
    exact_scores = anomaly_scores(trained, outputs, clip_set.labels)
    of_windows = {
        "score": anomaly_scores(trained, outputs, clip_set.labels, trained.config.score_dtype),
        "exact_score": exact_scores,
        "angle": angles(trained, outputs.embedding, clip_set.labels),
    }
    rule = trained.config.over_windows
    of_recordings = {
        name: clip_set.over_windows(values, rule) for name, values in of_windows.items()
    }
    clips = clip_set.recordings.assign(**of_recordings, worst=clip_set.worst_starts(exact_scores))
    check_finite(trained, clips)
    thresholds = find_thresholds(trained)
    clips = clips.join(thresholds["threshold"], on=MACHINE)
    clips["decision"] = decide(clips["exact_score"], clips["threshold"])
    known = known_clips(clips)
    metrics = None if known.empty else measure(known, find_rule(known))
    embedding = clip_set.over_windows(outputs.embedding.numpy(), "mean")
    return Result(trained, clips, embedding, thresholds, metrics, describe(trained, clips, split))


def check_finite(trained: TrainedModel, clips: pd.DataFrame) -> None:
    """Raise `UserError` where a `score` is not finite: the weights are not, or nothing is near."""
    bad = clips[~np.isfinite(clips["score"])]
    if bad.empty:
        return
    machines = ", ".join(dict.fromkeys(bad["machine_type"].str.cat(bad["machine_id"], sep=" ")))
    if trained.config.scoring == "nearest" and np.isposinf(bad["score"]).all():
        raise UserError(
            f"{trained.path}: it has no embeddings of training clips of {machines}, so nothing is near them"
        )
    raise UserError(
        f"{trained.path}: {len(bad)} of {len(clips)} scores are not finite numbers ({machines})"
    )


def describe_windows(config: Config, split: str) -> str:
    return f"all, {config.hop_of(split):g} s apart, {config.over_windows} of their scores"


def find_thresholds(trained: TrainedModel) -> pd.DataFrame:
    """The threshold of each machine of which there are held-out clips."""
    config = trained.config
    return fit_thresholds(
        config.machines, held_out_scores(trained), config.threshold, config.threshold_percentile
    )


def describe(trained: TrainedModel, clips: pd.DataFrame, split: str) -> dict[str, Any]:
    training, counts = trained.state.get("config", {}), clips["condition"].value_counts()
    conditions = [name for name in (NORMAL, ANOMALOUS, UNLABELLED) if name in counts]
    return {
        "checkpoint": str(trained.path),
        "mode": trained.config.mode,
        "scoring": trained.config.scoring,
        **(
            {"neighbours": trained.config.neighbours} if trained.config.scoring == "nearest" else {}
        ),
        **(
            {"windows": describe_windows(trained.config, split)}
            if trained.config.window == "all"
            else {}
        ),
        **(
            {"classes": show_value("classes", classes)}
            if isinstance(classes := trained.config.classes, dict)
            else {}
        ),
        "input": trained.config.input,
        "seed": training.get("seed"),
        "epoch of the weights": trained.state.get("epoch"),
        "epochs": training.get("epoch"),
        "clips trained on": trained.state.get("clip_counts", {}).get("training"),
        f"clips of {split}": ", ".join(f"{counts[name]} {name}" for name in conditions),
        "trained with": trained.state.get("versions"),
        "evaluated with": versions(),
    }
