"""The evaluation of a checkpoint: scores, metrics and decisions for the recordings of a split."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from alarms import find_level
from audio import Windows
from config import Config
from dataloader import ClipSet
from evaluation.decisions import asked_rate, count_decisions
from evaluation.metrics import Metrics, find_rule, measure
from evaluation.scores import (
    KINDS,
    Outputs,
    check_scores,
    find_worst,
    over_windows,
    split_by_recording,
)
from evaluation.thresholds import decide, find_thresholds
from inference import Model, run_model, with_bank
from names import ANOMALOUS, NORMAL, UNLABELLED
from recordings import MACHINE_COLUMNS, known_recordings
from utils import versions

BASELINE = "spectrum"  # the kind of score that needs no network


@dataclass(frozen=True)
class Result:
    """The evaluation of a model with one kind of score.

    Attributes:
        model: The model.
        kind: The kind of score.
        split: "test" or "evaluation".
        windows: Which windows of the recordings were scored.
        recordings: The table of recordings, with what scoring adds: the `score` in `score_dtype`,
            the `level` that decisions rest on (float64, see `find_level`), the `angle` to the
            nearest centre of its machine in degrees, `worst` (the start of the window with the
            highest score, in seconds), the `threshold`, and the `decision` (1 for anomalous,
            missing without a threshold). Over several windows scores and angle are combined as
            `over_windows` says.
        embedding: The mean embedding of each recording `(recordings, E)`.
        thresholds: See `fit_thresholds`.
        metrics: The metrics of the recordings whose condition is known; None if there are none.
        baseline: Their metrics with the score that needs no network, "spectrum"; None if `kind` is
            that, or if the checkpoint has no training clips to compare with.
        decisions: See `count_decisions`.
        asked: The rate of false alarms that was asked for, see `asked_rate`.
        about: What was evaluated, by name.
    """

    model: Model
    kind: str
    split: str
    windows: Windows
    recordings: pd.DataFrame
    embedding: np.ndarray
    thresholds: pd.DataFrame
    metrics: Metrics | None
    baseline: Metrics | None
    decisions: pd.DataFrame
    asked: str
    about: dict[str, Any]

    @property
    def known(self) -> pd.DataFrame:
        """The recordings whose condition is known."""
        return known_recordings(self.recordings)

    @property
    def level_name(self) -> str:
        """The name of the `level` for axes and captions."""
        return "anomaly score" if self.windows.hop is None else "alarm level"


def evaluate(
    model: Model,
    clips: ClipSet,
    config: Config,
    split: str,
    kinds: Sequence[str],
    device: torch.device,
) -> list[Result]:
    """Evaluate a model on the clips of a split ("test" or "evaluation"). Returns a result for each
    kind of score.
    """
    model = with_bank(model, config, kinds, device)
    outputs = run_model(model, clips, config, device)
    results = [evaluate_kind(model, clips, outputs, config, split, kind) for kind in kinds]
    if set(kinds) == {BASELINE}:
        return results
    baseline = measure_baseline(model, clips, outputs, config)
    return [x if x.kind == BASELINE else replace(x, baseline=baseline) for x in results]


def measure_baseline(
    model: Model, clips: ClipSet, outputs: Outputs, config: Config
) -> Metrics | None:
    """Compute the metrics of the score that needs no network; None without training clips of all
    machines to compare with, or without recordings whose condition is known.
    """
    if model.checkpoint.bank is None:
        return None
    scorer = model.scorer(BASELINE, config.neighbours)
    scores = scorer.score_clips(outputs, clips.machines).numpy()
    combined = over_windows(scores, clips.clip_recordings, config.over_windows)
    known = known_recordings(clips.recordings.assign(score=combined))
    if known.empty or not np.isfinite(scores).all():
        return None
    return measure(known, find_rule(known))


def evaluate_kind(
    model: Model, clips: ClipSet, outputs: Outputs, config: Config, split: str, kind: str
) -> Result:
    """Compute scores, metrics and decisions from the outputs of the network for clips."""
    recordings = add_scores(model, clips, outputs, config, kind)
    thresholds = find_thresholds(model, model.scorer(kind, config.neighbours), config)
    recordings = recordings.join(thresholds["threshold"], on=MACHINE_COLUMNS)
    recordings["decision"] = decide(recordings["level"], recordings["threshold"])
    known = known_recordings(recordings)
    return Result(
        model=model,
        kind=kind,
        split=split,
        windows=clips.windows,
        recordings=recordings,
        embedding=over_windows(outputs.embedding.numpy(), clips.clip_recordings, "mean"),
        thresholds=thresholds,
        metrics=None if known.empty else measure(known, find_rule(known)),
        baseline=None,
        decisions=count_decisions(recordings, thresholds),
        asked=asked_rate(config),
        about=describe(model, config, split, clips.windows, kind, recordings),
    )


def add_scores(
    model: Model, clips: ClipSet, outputs: Outputs, config: Config, kind: str
) -> pd.DataFrame:
    """Return the table of recordings with `score`, `level`, `angle` and `worst`.

    Raises:
        UserError: If a score is not finite.
    """
    machines = clips.machines

    def score(kind: str, dtype: torch.dtype = torch.float64) -> np.ndarray:
        scorer = model.scorer(kind, config.neighbours, dtype)
        return scorer.score_clips(outputs, machines).numpy()

    def combine(values: np.ndarray) -> np.ndarray:
        return over_windows(values, clips.clip_recordings, config.over_windows)

    exact = score(kind)
    check_scores(exact, machines, kind, model.path)
    windows = split_by_recording(exact, clips.clip_recordings)
    return clips.recordings.assign(
        score=combine(score(kind, getattr(torch, config.score_dtype))),
        level=[find_level(scores, config.alarm_rule) for scores in windows],
        angle=combine(score("angle")),
        worst=clips.clip_starts[find_worst(exact, clips.clip_recordings)],
    )


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
        f"recordings of {split}": ", ".join(f"{counts[name]} {name}" for name in conditions),
        "trained with": checkpoint.versions,
        "evaluated with": versions(),
    }
