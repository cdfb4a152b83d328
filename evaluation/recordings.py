"""Single recordings: score, threshold and decision of each, and of each of its windows."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from audio import Recording
from checkpoint import TrainedModel
from config import name_id, parse_id
from corpus import ANOMALOUS, MACHINE, NORMAL, first_classes
from dataloader import check_recordings, cut_into_windows, report_changes
from evaluation.decisions import explain_thresholds
from evaluation.result import check_finite, find_thresholds
from evaluation.scoring import run_model, scores_against, with_embeddings
from utils import UserError


def find_recordings(paths: Sequence[Path]) -> list[Path]:
    """The files among the paths, whatever they are, and of folders the WAV and FLAC files in them;
    each once.
    """
    files: list[Path] = []
    for path in paths:
        found = [path]
        if path.is_dir():
            found = sorted(
                file for file in path.iterdir() if file.suffix.lower() in (".wav", ".flac")
            )
        if not found:
            raise UserError(f"{path}: no WAV or FLAC files in this folder")
        files += found
    return list(dict.fromkeys(files))


def score_recordings(
    trained: TrainedModel,
    paths: Sequence[Path],
    machine_type: str,
    machine_id: str | None,
    window: str,
    device: torch.device,
) -> list[dict[str, Any]]:
    """What the model says of recordings, in plain values: `file`, and either `error` or
    `machine_type`, `machine_id`, `score`, `threshold`, `decision` (None without a threshold),
    `n_windows`, how many of them are `n_anomalous`, and of the `worst` and of each of the `windows`
    the `start` in seconds, `score` and `decision`. Without a machine ID, that of the type with the
    lowest score counts.
    """
    candidates = find_candidates(trained, machine_type, machine_id)
    trained = with_embeddings(trained, [trained.config.scoring], device)
    config = trained.config.model_copy(
        update={"window": window}
    )  # of these recordings, not of those of the training
    trained = dataclasses.replace(trained, config=config)
    checked = check_recordings(paths, config, "test")
    good = {path: result for path, result in checked.items() if not isinstance(result, UserError)}
    report_changes(good)
    results = score_windows(trained, good, candidates, device) if good else {}
    return [
        {"file": str(path)} | results.get(path, {"error": str(result)})
        for path, result in checked.items()
    ]


def find_candidates(
    trained: TrainedModel, machine_type: str, machine_id: str | None
) -> dict[tuple[str, str], int]:
    """The machine of this ID, or all of the type, each with its first class."""
    wanted = None if machine_id is None else name_id(parse_id(machine_id))
    candidates = {
        pair: x
        for pair, x in first_classes(trained.config).items()
        if pair[0] == machine_type and wanted in (None, pair[1])
    }
    if not candidates:
        known = "; ".join(
            f"{name} {', '.join(map(str, ids))}" for name, ids in trained.config.machines.items()
        )
        which = machine_type if machine_id is None else f"{machine_type} {machine_id}"
        raise UserError(f"{trained.path} knows no machine {which}; it was trained on {known}")
    return candidates


def score_windows(
    trained: TrainedModel,
    recordings: Mapping[Path, Recording],
    candidates: Mapping[tuple[str, str], int],
    device: torch.device,
) -> dict[Path, dict[str, Any]]:
    """What `score_recordings` says of recordings that can be used."""
    clips = cut_into_windows(
        pd.DataFrame({"path": list(recordings), "label": 0}), recordings, trained.config
    )
    scores = scores_against(
        trained, run_model(trained, clips, device), candidates.values()
    )  # (windows, candidates)
    of_recordings = clips.over_windows(
        scores, trained.config.over_windows
    )  # (recordings, candidates)
    machines = list(candidates)
    best = of_recordings.argmin(axis=1)
    table = pd.DataFrame([machines[column] for column in best], columns=MACHINE)
    check_finite(trained, table.assign(score=of_recordings.min(axis=1)))
    thresholds = find_thresholds(trained)
    machine_type, ids = machines[0][0], [parse_id(machine_id) for _, machine_id in machines]
    explain_thresholds(thresholds, {machine_type: ids}, trained.path)
    of_machines, results = thresholds["threshold"].to_dict(), {}
    starts_of, scores_of = (
        np.split(values, clips.firsts[1:]) for values in (clips.clips["start"].to_numpy(), scores)
    )
    for number, (path, column) in enumerate(zip(recordings, best, strict=True)):
        threshold = of_machines.get(machines[column])
        starts, own = starts_of[number].tolist(), scores_of[number][:, column].tolist()
        windows = [
            {"start": start, "score": score, "decision": decide_one(score, threshold)}
            for start, score in zip(starts, own, strict=True)
        ]
        score = float(of_recordings[number, column])
        results[path] = {
            "machine_type": machine_type,
            "machine_id": ids[column],
            "score": score,
            "threshold": threshold,
            "decision": decide_one(score, threshold),
            "n_windows": len(windows),
            "n_anomalous": None
            if threshold is None
            else sum(window["decision"] == ANOMALOUS for window in windows),
            "worst": max(windows, key=lambda window: window["score"]),
            "windows": windows,
        }
    return results


def decide_one(score: float, threshold: float | None) -> str | None:
    if threshold is None:
        return None
    return ANOMALOUS if score > threshold else NORMAL


# ---- What is shown ----


def picture_files(
    results: Sequence[dict[str, Any]], folder: Path
) -> Iterator[tuple[dict[str, Any], Path]]:
    """Each recording that has a score, and the file of its picture; of several with one name they
    are numbered.
    """
    seen = Counter[str]()
    for row in results:
        if "error" not in row:
            name = Path(row["file"]).name
            seen[name] += 1
            yield row, folder / f"{name}{f' ({seen[name]})' if seen[name] > 1 else ''}.png"


def clock(seconds: float) -> str:
    """As in 0:41:05, or 0:41:05.50."""
    minutes, rest = divmod(round(seconds, 2), 60)
    hours, minutes = divmod(int(minutes), 60)
    return (
        f"{hours}:{minutes:02d}:{rest:02.0f}"
        if rest.is_integer()
        else f"{hours}:{minutes:02d}:{rest:05.2f}"
    )


def print_scores(results: Sequence[dict[str, Any]], has_timeline: bool) -> None:
    """A line for each recording: file, machine, score, threshold, decision; or file and error.
    Where it has several windows, when it is worst, and, for a timeline, a line for each of them:
    start, score, decision.
    """
    for row in results:
        if "error" in row:
            print(f"{row['file']}\terror: {row['error']}")
            continue
        threshold = "-" if row["threshold"] is None else f"{row['threshold']:.6g}"
        machine, decision = (
            f"{row['machine_type']} {name_id(row['machine_id'])}",
            row["decision"] or "-",
        )
        cells = [row["file"], machine, f"{row['score']:.6g}", threshold, decision]
        print("\t".join([*cells, *([describe_worst(row)] if row["n_windows"] > 1 else [])]))
        for window in row["windows"] if has_timeline else ():
            print(f"\t{clock(window['start'])}\t{window['score']:.6g}\t{window['decision'] or '-'}")


def describe_worst(row: Mapping[str, Any]) -> str:
    worst = row["worst"]
    count = (
        ""
        if row["n_anomalous"] is None
        else f", {row['n_anomalous']} of {row['n_windows']} windows anomalous"
    )
    return f"worst at {clock(worst['start'])} ({worst['score']:.6g}){count}"


def print_json(results: Sequence[dict[str, Any]], has_timeline: bool) -> None:
    """The same as JSON."""
    shown = [
        {name: value for name, value in row.items() if name != "windows" or has_timeline}
        for row in results
    ]
    print(json.dumps(shown, indent=2))
