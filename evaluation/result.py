"""The evaluation of a checkpoint: scores, metrics and decisions for the recordings of a split."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from audio import Windows
from config import Config
from dataloader import ClipSet
from evaluation.metrics import Metrics, find_rule, measure
from evaluation.scores import KINDS, check_scores, find_worst, over_windows
from evaluation.thresholds import decide, find_thresholds
from inference import Model, run_model, with_bank
from model import Outputs
from names import ANOMALOUS, NORMAL, UNLABELLED
from recordings import MACHINE, known_recordings
from utils import versions

HARDEST = 3  # recordings of each condition and machine


@dataclass(frozen=True)
class Result:
    """The evaluation of a model with one kind of score.

    Attributes:
        model: The model.
        config: The configuration of the evaluation.
        kind: The kind of score.
        split: "test" or "evaluation".
        windows: Which windows of the recordings were scored.
        recordings: The table of recordings, with what scoring adds: the `score` in `score_dtype`,
            the `exact_score` (float64) that decisions rest on, the `angle` to the nearest centre of
            its machine in degrees, `worst` (the start of the window with the highest score, in
            seconds), the `threshold`, and the `decision` (1 for anomalous, missing without a
            threshold). Over several windows scores and angle are combined as `over_windows` says.
        embedding: The mean embedding of each recording `(recordings, E)`.
        thresholds: See `fit_thresholds`.
        metrics: Those of the recordings whose condition is known; None without any.
        about: What was evaluated, by name.
    """

    model: Model
    config: Config
    kind: str
    split: str
    windows: Windows
    recordings: pd.DataFrame
    embedding: np.ndarray
    thresholds: pd.DataFrame
    metrics: Metrics | None
    about: dict[str, Any]

    @property
    def known(self) -> pd.DataFrame:
        """The recordings whose condition is known."""
        return known_recordings(self.recordings)

    @property
    def hardest(self) -> pd.DataFrame:
        """The normal recordings with the highest scores and the anomalous ones with the lowest, a
        few of each machine.
        """
        ordered = self.recordings.sort_values("exact_score", kind="stable")
        parts = []
        for machine_type, machine_id in self.model.classes.machines:
            is_type = ordered["machine_type"] == machine_type
            of_machine = ordered[is_type & (ordered["machine_id"] == machine_id)]
            parts.append(of_machine[of_machine["condition"] == NORMAL][::-1].head(HARDEST))
            parts.append(of_machine[of_machine["condition"] == ANOMALOUS].head(HARDEST))
        return pd.concat(parts)


def evaluate(
    model: Model,
    clips: ClipSet,
    config: Config,
    split: str,
    kinds: Sequence[str],
    device: torch.device,
) -> list[Result]:
    """Score the clips of a split ("test" or "evaluation"), measure and decide, with each of these
    kinds of score.
    """
    model = with_bank(model, config, kinds, device)
    outputs = run_model(model, clips, config, device)
    return [evaluate_kind(model, clips, outputs, config, split, kind) for kind in kinds]


def evaluate_kind(
    model: Model, clips: ClipSet, outputs: Outputs, config: Config, split: str, kind: str
) -> Result:
    """Score the outputs of the network for clips, measure and decide, with one kind of score."""
    recordings = add_scores(model, clips, outputs, config, kind)
    thresholds = find_thresholds(model, model.scorer(kind, config.neighbours), config)
    recordings = recordings.join(thresholds["threshold"], on=MACHINE)
    recordings["decision"] = decide(recordings["exact_score"], recordings["threshold"])
    known = known_recordings(recordings)
    return Result(
        model=model,
        config=config,
        kind=kind,
        split=split,
        windows=clips.windows,
        recordings=recordings,
        embedding=over_windows(outputs.embedding.numpy(), clips.recording, "mean"),
        thresholds=thresholds,
        metrics=None if known.empty else measure(known, find_rule(known)),
        about=describe(model, config, split, clips.windows, kind, recordings),
    )


def add_scores(
    model: Model, clips: ClipSet, outputs: Outputs, config: Config, kind: str
) -> pd.DataFrame:
    """Return the table of recordings with `score`, `exact_score`, `angle` and `worst`.

    Raises:
        UserError: If a score is not finite.
    """
    recordings = clips.recordings.copy()
    machines = clips.machines

    def score(kind: str, dtype: torch.dtype = torch.float64) -> np.ndarray:
        scorer = model.scorer(kind, config.neighbours, dtype)
        return scorer.against_own_machine(outputs, machines).numpy()

    def combine(values: np.ndarray) -> np.ndarray:
        return over_windows(values, clips.recording, config.over_windows)

    exact = score(kind)
    recordings["score"] = combine(score(kind, getattr(torch, config.score_dtype)))
    recordings["exact_score"] = combine(exact)
    recordings["angle"] = combine(score("angle"))
    recordings["worst"] = clips.start[find_worst(exact, clips.recording)]
    check_scores(exact, machines, kind, model.path)
    return recordings


def describe(
    model: Model, config: Config, split: str, windows: Windows, kind: str, recordings: pd.DataFrame
) -> dict[str, Any]:
    """Return what was evaluated, for metrics.json, results.md and the report."""
    checkpoint = model.checkpoint
    counts = recordings["condition"].value_counts()
    conditions = [name for name in (NORMAL, ANOMALOUS, UNLABELLED) if name in counts]
    about: dict[str, Any] = {
        "checkpoint": str(model.path),
        "mode": model.config.mode,
        "scoring": kind,
    }
    for key in KINDS[kind].keys:
        about[key] = getattr(config, key)
    if windows.hop is not None:
        about["windows"] = f"all, {windows.hop:g} s apart, {config.over_windows} of their scores"
    if model.config.classes == "attributes":
        about["classes"] = f"attributes ({len(model.classes)} classes)"
    return about | {
        "input": model.config.input,
        "seed": checkpoint.config.seed if checkpoint.config else None,
        "epoch of the weights": checkpoint.epoch,
        "epochs": checkpoint.config.epoch if checkpoint.config else None,
        "clips trained on": checkpoint.n_training,
        f"clips of {split}": ", ".join(f"{counts[name]} {name}" for name in conditions),
        "trained with": checkpoint.versions,
        "evaluated with": versions(),
    }
