"""Thresholds from later recordings: scores of normal recordings of another day, which replace those
of the recordings that training held out. They are kept in NAME.calibration.json beside a checkpoint
NAME.pth, which also says what they were made from.
"""

from collections import defaultdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, Field, ValidationError

from audio import Windows
from checkpoint import RunFiles
from classes import Machine
from config import Config
from dataloader import ClipSet, make_clips
from detector import SCORE_COLUMNS, Detector
from errors import UserError
from evaluation.scores import KINDS, Outputs, check_scores, split_by_recording
from inference import Model
from locks import lock
from names import (
    ANOMALOUS,
    FOLDERS,
    UNLABELLED,
    check_copies,
    format_id,
    list_audio,
    list_folder,
    parse_name,
)
from recordings import MACHINE_COLUMNS
from utils import notice, write_text

# ---- The recordings ----


def find_normal(
    model: Model, folder: Path, machine_type: str | None, machine_id: str | None, data_root: Path
) -> pd.DataFrame:
    """List the recordings in a folder and the folders in it: `path`, `machine_type`, `machine_id`.

    The machine is the one that is given. Otherwise the ID is that of the file name
    (normal_id_<ID>_*.wav or section_<ID>_*_normal_*.wav), and the type that of `find_type`. Notices
    say what is left out.

    Raises:
        UserError: If the machine of a file is not clear, or if there are no recordings of machines
            of the model.
    """
    rows = []
    skipped: dict[str, list[str]] = defaultdict(list)
    for path in walk_audio(folder, set()):
        named_id, condition = parse_name(path.name) or (None, None)
        chosen_id = format_id(machine_id) if machine_id is not None else named_id
        chosen_type = machine_type or find_type(model, path)
        if chosen_id is None or chosen_type is None:
            raise UserError(
                f"{path}: its name and folder do not say the machine; name it with --machine_type "
                "and --machine_id, or rename the file to normal_id_<ID>_<anything>.wav"
            )
        reason = None
        if condition == ANOMALOUS or (condition == UNLABELLED and machine_id is None):
            reason = "not named normal"
        elif named_id not in (None, chosen_id):
            reason = f"named as of another ID than {chosen_id}"
        elif (chosen_type, chosen_id) not in model.classes.machines:
            reason = "of machines that the model was not trained on"
        elif path.resolve().parent == (data_root / chosen_type / "train").resolve():
            reason = "that are training recordings (data_root)"
        if reason:
            skipped[reason].append(path.name)
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


def walk_audio(folder: Path, visited: set[Path]) -> list[Path]:
    """Return the WAV and FLAC files in a folder and the folders in it, except for hidden ones.
    Links may lead to folders that were `visited`.

    Raises:
        UserError: If there is no such folder, or if a recording is there in two formats.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; name one with normal recordings")
    if folder.resolve() in visited:
        return []
    visited.add(folder.resolve())
    paths = list_audio(folder)
    check_copies(paths)
    for path in list_folder(folder):
        if path.is_dir():
            paths += walk_audio(path, visited)
    return paths


def find_type(model: Model, path: Path) -> str | None:
    """Return the machine type of a file: in a folder such as test, the name of the folder above, as
    in data_root; else the next folder above that is named like a type of the model, or the only
    type. None if it is not clear.
    """
    types = model.classes.machine_types
    parents = path.absolute().parents
    if path.parent.name in FOLDERS:
        return parents[1].name
    for folder in parents:
        if folder.name in types:
            return folder.name
    return types[0] if len(types) == 1 else None


# ---- The content of the file ----


class CalibrationRecording(BaseModel):
    """A recording: its file, and for each kind of score (`Scorer.name`) the scores of its windows;
    null for a score that is not finite.
    """

    file: str
    scores: dict[str, list[Annotated[float, Field(allow_inf_nan=False)] | None]]


class CalibrationEntry(BaseModel):
    """The recordings of a machine, of one channel, and when they were scored."""

    machine_type: str
    machine_id: str
    date: str
    channel: int
    recordings: list[CalibrationRecording]

    @property
    def machine(self) -> Machine:
        return self.machine_type, self.machine_id


class Calibration(BaseModel):
    """The content of the file: what identifies the model, and an entry for each machine."""

    model: dict[str, Any]
    machines: list[CalibrationEntry]


def identify(model: Model) -> dict[str, Any]:
    """Return what the scores of a model depend on: a hash of its weights, and its settings."""
    config = model.config
    return {
        "weights_sha256": model.weights_sha256,
        "classes": [list(entry) for entry in model.classes.entries],
        "mode": config.mode,
        "input": config.input,
        "m": config.m,
        "s": config.s,
        "sub_centers": config.sub_centers,
    }


# ---- Writing and reading ----


def calibrate(
    detector: Detector,
    recordings: pd.DataFrame,
    config: Config,
    windows: Windows,
    device: torch.device,
) -> list[Path]:
    """Score recordings from `find_normal`, each against its machine, and write the scores into the
    file of each member, in place of earlier ones of the same machines. Returns the files.

    Raises:
        UserError: If a recording cannot be used or a score is not finite; then nothing is written.
    """
    clips = make_clips(recordings, windows, config.num_workers)
    outputs = detector.run(clips, config, device)
    pairs = list(zip(detector.members, outputs.members, strict=True))
    scores = [score_kinds(model, x, clips, config) for model, x in pairs]
    return [write_scores(*pair, clips) for pair in zip(detector.members, scores, strict=True)]


def score_kinds(
    model: Model, outputs: Outputs, clips: ClipSet, config: Config
) -> dict[str, np.ndarray]:
    """Return the scores `(clips,)` of each kind that is possible, by `Scorer.name`."""
    scores = {}
    for kind in KINDS:
        if KINDS[kind].uses_bank and model.checkpoint.bank is None:
            continue
        scorer = model.scorer(kind, config.neighbours)
        scores[scorer.name] = scorer.score_clips(outputs, clips.machines).numpy()
        if kind == config.scoring:
            check_scores(scores[scorer.name], clips.machines, kind, str(model.path))
    return scores


def write_scores(model: Model, scores: dict[str, np.ndarray], clips: ClipSet) -> Path:
    """Write scores into the file of a model, and return it."""
    path = RunFiles(model.path).calibration
    with lock(path.with_name(f".{path.stem}.lock"), waits=True):
        entries = read_entries(model) | make_entries(clips, scores)
        content = Calibration(model=identify(model), machines=list(entries.values()))
        write_text(path, content.model_dump_json(indent=1) + "\n")
    return path


def make_entries(clips: ClipSet, scores: dict[str, np.ndarray]) -> dict[Machine, CalibrationEntry]:
    """Return the entry of each machine; `scores` `(clips,)` are by `Scorer.name`."""
    entries: dict[Machine, CalibrationEntry] = {}
    date = datetime.now().astimezone().isoformat(timespec="seconds")
    parts = {name: split_by_recording(x, clips.clip_recordings) for name, x in scores.items()}
    for number, row in enumerate(clips.recordings.to_dict("records")):
        of_recording = {
            name: [x if np.isfinite(x) else None for x in values[number].tolist()]
            for name, values in parts.items()
        }
        machine = row["machine_type"], row["machine_id"]
        if machine not in entries:
            entries[machine] = CalibrationEntry(
                machine_type=machine[0],
                machine_id=machine[1],
                date=date,
                channel=clips.windows.channel,
                recordings=[],
            )
        recording = CalibrationRecording(file=str(row["path"].resolve()), scores=of_recording)
        entries[machine].recordings.append(recording)
    return entries


def read_entries(model: Model) -> dict[Machine, CalibrationEntry]:
    """Read the entry of each machine; none without a network or without the file, or if it is of
    another model, which a notice says.

    Raises:
        UserError: If the file is no calibration.
    """
    if model.network is None:
        return {}
    path = RunFiles(model.path).calibration
    if not path.exists():
        return {}
    try:
        content = Calibration.model_validate_json(path.read_bytes())
    except ValidationError:
        raise UserError(f"{path}: not a calibration; remove it, and calibrate again") from None
    if content.model != identify(model):
        notice(f"{path} is not used: it is of other weights or settings of the model")
        return {}
    return {entry.machine: entry for entry in content.machines}


def read_calibration(model: Model, score_name: str, channel: int) -> pd.DataFrame:
    """Read the scores of later recordings: machine type, machine ID, `recording` (its file) and
    `score` of each window; no rows without the file. `score_name` is as in `Scorer.name`.

    A notice names the machines whose recordings have no such score, or are of another channel.
    """
    rows = []
    without = []
    for machine, entry in read_entries(model).items():
        scores = [recording.scores.get(score_name) for recording in entry.recordings]
        if entry.channel != channel or None in scores:
            without.append(" ".join(machine))
            continue
        for recording, values in zip(entry.recordings, scores, strict=True):
            rows += [(*machine, recording.file, score) for score in values or ()]
    if without:
        path = RunFiles(model.path).calibration
        notice(
            f"{path} has no scores of the kind {score_name} on channel {channel} for "
            f"{', '.join(without)}; calibrate again with them"
        )
    return pd.DataFrame(rows, columns=SCORE_COLUMNS)
