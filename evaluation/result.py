"""The evaluation of a detector: scores, metrics and decisions for the recordings of a split."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from alarms import find_level
from audio import Windows
from config import Config
from dataloader import ClipSet
from detector import Detector, DetectorOutputs
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
from inference import Model
from names import ANOMALOUS, NORMAL, UNLABELLED
from recordings import MACHINE_COLUMNS, known_recordings
from utils import versions

BASELINE = "spectrum"  # the kind of score that needs no network


@dataclass(frozen=True)
class Result:
    """The evaluation of a detector with one kind of score.

    Attributes:
        detector: The detector.
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

    detector: Detector
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
    detector: Detector,
    clips: ClipSet,
    outputs: DetectorOutputs,
    config: Config,
    split: str,
    kinds: Sequence[str],
) -> list[Result]:
    """Evaluate a detector, which has the bank where a kind needs it, by its outputs for the clips
    of a split ("test" or "evaluation"). Returns a result for each kind of score.
    """
    results = [evaluate_kind(detector, clips, outputs, config, split, kind) for kind in kinds]
    if set(kinds) == {BASELINE}:
        return results
    baseline = measure_baseline(detector.first, clips, outputs.sound, config)
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
    detector: Detector,
    clips: ClipSet,
    outputs: DetectorOutputs,
    config: Config,
    split: str,
    kind: str,
) -> Result:
    """Compute scores, metrics and decisions from the outputs for clips."""
    recordings = add_scores(detector, clips, outputs, config, kind)
    thresholds = find_thresholds(detector, detector.scorer(kind, config.neighbours), config)
    recordings = recordings.join(thresholds["threshold"], on=MACHINE_COLUMNS)
    recordings["decision"] = decide(recordings["level"], recordings["threshold"])
    known = known_recordings(recordings)
    return Result(
        detector=detector,
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
        about=describe(detector, config, split, clips.windows, kind, recordings),
    )


def add_scores(
    detector: Detector, clips: ClipSet, outputs: DetectorOutputs, config: Config, kind: str
) -> pd.DataFrame:
    """Return the table of recordings with `score`, `level`, `angle` and `worst`.

    Raises:
        UserError: If a score is not finite.
    """
    machines = clips.machines

    def score(dtype: torch.dtype) -> np.ndarray:
        scorer = detector.scorer(kind, config.neighbours, dtype)
        return scorer.score_clips(outputs, machines).numpy()

    def combine(values: np.ndarray) -> np.ndarray:
        return over_windows(values, clips.clip_recordings, config.over_windows)

    exact = score(torch.float64)
    check_scores(exact, machines, kind, detector.name)
    windows = split_by_recording(exact, clips.clip_recordings)
    return clips.recordings.assign(
        score=combine(score(getattr(torch, config.score_dtype))),
        level=[find_level(scores, config.alarm_rule) for scores in windows],
        angle=combine(detector.angles(outputs, machines).numpy()),
        worst=clips.clip_starts[find_worst(exact, clips.clip_recordings)],
    )


def describe(
    detector: Detector,
    config: Config,
    split: str,
    windows: Windows,
    kind: str,
    recordings: pd.DataFrame,
) -> dict[str, Any]:
    """Return what was evaluated, for metrics.json, results.md and the report."""
    counts = recordings["condition"].value_counts()
    conditions = [name for name in (NORMAL, ANOMALOUS, UNLABELLED) if name in counts]
    about: dict[str, Any] = {
        "checkpoint": detector.name,
        "mode": of_members(detector, lambda model: model.config.mode),
        "scoring": kind,
    }
    for key in KINDS[kind].keys:
        about[key] = getattr(config, key)
    if windows.hop is not None:
        about["windows"] = f"all, {windows.hop:g} s apart, {config.over_windows} of their scores"
    if detector.config.classes == "attributes":
        about["classes"] = f"attributes ({len(detector.classes)} classes)"
    return about | {
        "input": of_members(detector, lambda model: model.config.input),
        "seed": of_members(detector, lambda model: of_run(model, "seed")),
        "epoch of the weights": of_members(detector, lambda model: model.checkpoint.epoch),
        "epochs": of_members(detector, lambda model: of_run(model, "epoch")),
        "clips trained on": of_members(detector, lambda model: model.checkpoint.n_training),
        f"recordings of {split}": ", ".join(f"{counts[name]} {name}" for name in conditions),
        "trained with": of_members(detector, lambda model: model.checkpoint.versions),
        "evaluated with": versions(),
    }


def of_members(detector: Detector, read: Callable[[Model], Any]) -> Any:
    """Return a value of the members: a single one if all have the same, else a list."""
    values = [read(model) for model in detector.members]
    return values[0] if all(value == values[0] for value in values) else values


def of_run(model: Model, key: str) -> Any:
    """Return a value of the configuration of a training; None for a bare state dict."""
    config = model.checkpoint.config
    return getattr(config, key) if config else None
