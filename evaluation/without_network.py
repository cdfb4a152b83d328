"""Scores without a network, for a machine of which there is only a folder of normal recordings.

The score is the kind "spectrum". The folder is also what thresholds come from: each recording is
scored against all others. This asks for no more than recordings that are set apart do: a new
recording is compared with one recording more, and a distance to the nearest ones of more can only
be smaller (apart from the scale of the distances, which all of them set). So the rate of false
alarms is at most the one asked for, on average.
"""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from checkpoint import Checkpoint, HeldOut
from classes import Classes, Machine
from config import MODEL_KEYS, Config
from dataloader import ClipSet, make_clips
from errors import UserError
from evaluation.calibration import walk_audio
from evaluation.scores import Outputs, StoredClips
from inference import Model, make_bank, run_model
from names import ANOMALOUS, format_id, parse_name
from recordings import MACHINE_COLUMNS
from utils import notice

CHECK_POINTS = Path("check_points")  # where files that are named after the folder are written


def load_folder(
    folder: Path, machine: Machine, window: str, config: Config, device: torch.device
) -> Model:
    """Make a model without a network from the normal recordings of a machine in a folder and the
    folders in it. `window` is "first" or "all". In its bank, files begin with the name of the
    folder.

    Raises:
        UserError: If there are no recordings, or if some cannot be used.
    """
    classes = Classes.from_machines({machine[0]: [machine[1]]})
    model = Model(None, config, classes, Checkpoint(folder, {}))
    recordings = pd.DataFrame({"path": list_normal(folder), "label": 0})
    recordings[MACHINE_COLUMNS] = machine
    clips = make_clips(recordings, model.windows(config, "train", window), config.num_workers)
    outputs = run_model(model, clips, config, device, "normal recordings")
    bank = make_bank(outputs, clips, classes, folder.parent)
    model = replace(model, checkpoint=replace(model.checkpoint, bank=bank))
    scores = score_against_others(model, outputs, clips, config.neighbours)
    held_out = HeldOut(clips.files_in(folder.parent), clips.labels, scores)
    return replace(model, checkpoint=replace(model.checkpoint, held_out=held_out))


def name_machine(folder: Path, machine_type: str | None, machine_id: str | None) -> Machine:
    """Return the name of the machine of a folder: as given, or that of the folder."""
    name = machine_id or folder.resolve().name
    return machine_type or "machine", format_id(name).replace("/", "_")


def check_keys(config: Config) -> None:
    """Raise `UserError` for a key on the command line that has no effect without a network."""
    names = sorted(config.given & {*MODEL_KEYS, "data_root", "eval_precision"})
    if "scoring" in config.given and config.scoring != "spectrum":
        names.append("scoring")
    if names:
        raise UserError(f"{names[0]} has no effect with --normal; leave it out")


def list_normal(folder: Path) -> list[Path]:
    """List the recordings in a folder and the folders in it, without those named anomalous."""
    paths = walk_audio(folder, set())
    normal = []
    for path in paths:
        _, condition = parse_name(path.name) or (None, None)
        if condition != ANOMALOUS:
            normal.append(path)
    if not normal:
        raise UserError(f"{folder}: no normal recordings (WAV or FLAC); name another folder")
    if len(normal) < len(paths):
        notice(f"{folder}: skipped {len(paths) - len(normal)} files that are named anomalous")
    return normal


def score_against_others(model: Model, outputs: Outputs, clips: ClipSet, neighbours: int) -> Tensor:
    """Score each clip `(n,)` against the clips of all other recordings; infinite without others."""
    scorer = model.scorer("spectrum", neighbours)
    assert scorer.bank
    stored = scorer.bank[0]
    scores = torch.empty(len(clips), dtype=torch.float64)
    for number in range(len(clips.recordings)):
        is_own = torch.from_numpy(clips.clip_recordings == number)
        others = StoredClips(*(values[~is_own] for values in stored))
        against_others = replace(scorer, bank=[others])
        scores[is_own] = against_others.score_against_class(outputs.select(is_own), 0)
    return scores
