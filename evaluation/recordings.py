"""Single recordings: score, threshold and decision of each."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from checkpoint import TrainedModel
from dataloader import ANOMALOUS, MACHINE, NORMAL, ClipSet, check_recordings, class_labels
from evaluation.decisions import decide, explain_thresholds
from evaluation.result import check_finite, find_thresholds
from evaluation.scoring import anomaly_scores, run_model, with_embeddings
from utils import UserError


def find_recordings(paths: Sequence[Path]) -> list[Path]:
    """The files among the paths, whatever they are, and of folders the WAV and FLAC files in them; each once."""
    files: list[Path] = []
    for path in paths:
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in (".wav", ".flac"))
        if not found:
            raise UserError(f"{path}: no WAV or FLAC files in this folder")
        files += found
    return list(dict.fromkeys(files))


def score_recordings(
    trained: TrainedModel, paths: Sequence[Path], machine_type: str, machine_id: int | None, device: torch.device
) -> list[dict[str, Any]]:
    """What the model says of recordings: `file`, and either `error` or `machine_type`, `machine_id`, `score`,
    `threshold`, `decision`. Without a machine ID, that of the type with the lowest score counts.
    """
    labels = class_labels(trained.config.machines)
    of_type = [machine for machine in labels if machine[0] == machine_type]
    candidates = [machine for machine in of_type if machine_id is None or int(machine[1]) == machine_id]
    if not candidates:
        known = "; ".join(f"{name} {', '.join(map(str, ids))}" for name, ids in trained.config.machines.items())
        which = machine_type if machine_id is None else f"{machine_type} {machine_id}"
        raise UserError(f"{trained.path} knows no machine {which}; it was trained on {known}")
    trained = with_embeddings(trained, [trained.config.scoring], device)
    checked = check_recordings(paths, trained.config.num_workers)
    good = [path for path, result in checked.items() if not isinstance(result, UserError)]
    scores = score_files(trained, good, [labels[machine] for machine in candidates], device)
    rows = [(*candidates[index], score) for index, score in zip(scores.argmin(axis=1), scores.min(axis=1), strict=True)]
    scored = pd.DataFrame(rows, columns=[*MACHINE, "score"]).astype({"score": float})
    check_finite(trained, scored)
    thresholds = find_thresholds(trained)
    explain_thresholds(thresholds, {machine_type: [int(number) for _, number in candidates]}, trained.path)
    scored = scored.join(thresholds["threshold"], on=MACHINE)
    scored["decision"] = decide(scored["score"], scored["threshold"])
    results = dict(zip(good, scored.to_dict("records"), strict=True))
    return [
        describe(path, results[path]) if path in results else {"file": str(path), "error": str(result)}
        for path, result in checked.items()
    ]


def describe(path: Path, row: dict[Any, Any]) -> dict[str, Any]:
    """A scored recording in plain values; None where there is no threshold."""
    is_decided = not pd.isna(row["threshold"])
    return {
        "file": str(path),
        "machine_type": row["machine_type"],
        "machine_id": int(row["machine_id"]),
        "score": row["score"],
        "threshold": row["threshold"] if is_decided else None,
        "decision": (ANOMALOUS if row["decision"] else NORMAL) if is_decided else None,
    }


def score_files(trained: TrainedModel, paths: list[Path], labels: list[int], device: torch.device) -> np.ndarray:
    """Anomaly scores (float64) of recordings against several classes `(n, classes)`."""
    if not paths:
        return np.empty((0, len(labels)))
    clips = ClipSet(pd.DataFrame({"path": paths, "label": labels[0]}), trained.config.num_workers)
    outputs = run_model(trained, clips, device)
    return np.stack([anomaly_scores(trained, outputs, torch.full((len(paths),), label)) for label in labels], axis=1)


def print_scores(results: Sequence[dict[str, Any]], as_json: bool) -> None:
    """A line for each recording: file, machine, score, threshold, decision; or file and error."""
    if as_json:
        print(json.dumps(results, indent=2))
        return
    for row in results:
        if "error" in row:
            print(f"{row['file']}\terror: {row['error']}")
            continue
        threshold = "-" if row["threshold"] is None else f"{row['threshold']:.6g}"
        machine = f"{row['machine_type']} {row['machine_id']:02d}"
        print(f"{row['file']}\t{machine}\t{row['score']:.6g}\t{threshold}\t{row['decision'] or '-'}")
