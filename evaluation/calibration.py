"""Thresholds from later recordings: scores of normal recordings of another day, which replace those
of the recordings that training held out. They are kept in NAME.calibration.json beside a checkpoint
NAME.pth, which also says what they were made from.
"""

import json
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from audio import Windows
from checkpoint import RunFiles
from classes import Machine
from config import Config
from dataloader import ClipSet, make_clips
from errors import UserError
from evaluation.scores import KINDS, check_scores
from inference import Model, run_model, with_bank
from names import ANOMALOUS, AUDIO_ENDINGS, format_id, list_folder, parse_name
from recordings import MACHINE_COLUMNS
from utils import lock, notice, write_text

COLUMNS = [*MACHINE_COLUMNS, "recording", "score"]

# ---- The recordings ----


def find_normal(
    model: Model, folder: Path, machine_type: str | None, machine_id: str | None
) -> pd.DataFrame:
    """List the recordings in a folder and the folders in it: `path`, `machine_type`, `machine_id`.

    The machine is the one that is given. Otherwise the ID is that of the file name
    (normal_id_<ID>_*.wav or section_<ID>_*.wav), and the type is the next folder above that is
    named like one, or the only one of the model. Notices say what is left out.

    Raises:
        UserError: If the machine of a file is not clear, or if there are no recordings of machines
            of the model.
    """
    rows = []
    skipped: dict[str, list[str]] = defaultdict(list)
    for path in list_audio(folder):
        named_id, condition = parse_name(path.name) or (None, None)
        chosen_id = format_id(machine_id) if machine_id is not None else named_id
        chosen_type = machine_type or find_type(model, path)
        if condition == ANOMALOUS:
            skipped["named anomaly (thresholds come from normal recordings)"].append(path.name)
        elif chosen_id is None or chosen_type is None:
            raise UserError(
                f"{path}: its name and folder do not say the machine; name it with --machine_type "
                "and --machine_id, or rename the file to normal_id_<ID>_<anything>.wav"
            )
        elif named_id not in (None, chosen_id):
            skipped[f"named as of another ID than {chosen_id}"].append(path.name)
        elif (chosen_type, chosen_id) not in model.classes.machines:
            skipped["of machines that the model was not trained on"].append(path.name)
        else:
            rows.append((path, chosen_type, chosen_id))
    for reason, names in skipped.items():
        notice(f"{folder}: skipped {len(names)} files {reason}, such as {names[0]}")
    if not rows:
        raise UserError(
            f"{folder}: no normal recordings of {model.classes.describe_machines()}; name another "
            "folder, or the machine with --machine_type and --machine_id"
        )
    return pd.DataFrame(rows, columns=["path", *MACHINE_COLUMNS])


def list_audio(folder: Path) -> list[Path]:
    """Return the WAV and FLAC files in a folder and the folders in it, except for hidden ones."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name one with normal recordings")
    paths = []
    for path in list_folder(folder):
        if path.is_dir():
            paths += list_audio(path)
        elif path.suffix.lower() in AUDIO_ENDINGS:
            paths.append(path)
    return paths


def find_type(model: Model, path: Path) -> str | None:
    """Return the machine type that the folders above a file say, or the only one of the model."""
    types = model.classes.machine_types
    for folder in path.resolve().parents:
        if folder.name in types:
            return folder.name
    return types[0] if len(types) == 1 else None


# ---- The file ----


def calibrate(
    model: Model, recordings: pd.DataFrame, config: Config, windows: Windows, device: torch.device
) -> Path:
    """Score recordings from `find_normal`, each against its machine, and write the scores into the
    file, in place of earlier ones of the same machines. Returns the file.

    Raises:
        UserError: If a recording cannot be used or a score is not finite; then nothing is written.
    """
    model = with_bank(model, config, [config.scoring], device)
    clips = make_clips(recordings, windows, config.num_workers)
    outputs = run_model(model, clips, config, device)
    scores = {}
    for kind in KINDS:
        if KINDS[kind].uses_bank and model.checkpoint.bank is None:
            continue
        scorer = model.scorer(kind, config.neighbours)
        scores[scorer.name] = scorer.score_clips(outputs, clips.machines).numpy()
        if kind == config.scoring:
            check_scores(scores[scorer.name], clips.machines, kind, model.path)
    path = RunFiles(model.path).calibration
    with lock(path.with_name(f".{path.stem}.lock"), waits=True):
        entries = read_entries(model) | describe_scores(clips, scores)
        content = {"weights_sha256": model.weights_sha256, "machines": list(entries.values())}
        write_text(path, json.dumps(content, indent=1) + "\n")
    return path


def describe_scores(clips: ClipSet, scores: dict[str, np.ndarray]) -> dict[Machine, dict[str, Any]]:
    """Return the entry of each machine in the file; `scores` `(clips,)` are by kind."""
    entries: dict[Machine, dict[str, Any]] = {}
    date = datetime.now().astimezone().isoformat(timespec="seconds")
    for number, row in enumerate(clips.recordings.to_dict("records")):
        machine = row["machine_type"], row["machine_id"]
        entry = dict(zip(MACHINE_COLUMNS, machine, strict=True)) | {"date": date, "recordings": []}
        is_own = clips.clip_recordings == number
        of_recording = {
            name: [x if np.isfinite(x) else None for x in values[is_own].tolist()]
            for name, values in scores.items()
        }
        recording = {"file": str(row["path"].resolve()), "scores": of_recording}
        entries.setdefault(machine, entry)["recordings"].append(recording)
    return entries


def read_entries(model: Model) -> dict[Machine, dict[str, Any]]:
    """Read the entry of each machine; none without the file, or if it is of other weights, which a
    notice says.

    Raises:
        UserError: If the file is no calibration.
    """
    path = RunFiles(model.path).calibration
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["weights_sha256"] != model.weights_sha256:
            notice(f"{path} is not used: it was made with other weights; calibrate again")
            return {}
        return {(x["machine_type"], x["machine_id"]): x for x in content["machines"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a calibration; remove it, and calibrate again") from None


def read_calibration(model: Model, score_name: str) -> pd.DataFrame:
    """Read the scores of later recordings: machine type, machine ID, number of the `recording` and
    `score` of each window; no rows without the file. `score_name` is as in `Scorer.name`.

    A notice names the machines whose recordings have no such score.
    """
    rows = []
    without = []
    path = RunFiles(model.path).calibration
    for machine, entry in read_entries(model).items():
        try:
            scores = [recording["scores"].get(score_name) for recording in entry["recordings"]]
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: not a calibration; remove it, and calibrate again") from None
        if None in scores:
            without.append(" ".join(machine))
            continue
        for number, values in enumerate(scores):
            rows += [(*machine, number, score) for score in values if score is not None]
    if without:
        notice(
            f"{path} has no scores of the kind {score_name} for {', '.join(without)}; calibrate "
            "again with it"
        )
    return pd.DataFrame(rows, columns=COLUMNS)
