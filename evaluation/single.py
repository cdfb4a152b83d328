"""Single recordings: score, threshold and decision of each, and of each of its windows."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from alarms import Alarm, AlarmRule, describe_windows, find_alarms, format_time
from audio import SECONDS, CheckedRecording, Windows
from classes import Machine
from config import Config
from dataloader import ClipSet, check_recordings, select_usable
from detector import Detector
from errors import UserError, give_reason
from evaluation.difference import Deviation, Difference, describe_difference, find_difference
from evaluation.scores import (
    Outputs,
    check_scores,
    find_worst,
    over_windows,
    split_by_recording,
)
from evaluation.thresholds import explain_thresholds, find_thresholds, threshold_of
from names import ANOMALOUS, NORMAL, format_id, list_audio
from utils import notice, one_line


def find_files(paths: Sequence[Path]) -> tuple[list[Path], dict[Path, str]]:
    """Return the files among the paths, and the WAV and FLAC files in folders, except for hidden
    ones; each once. Also returns the folders of which none is returned, with the reason.
    """
    files: list[Path] = []
    problems: dict[Path, str] = {}
    for path in paths:
        try:
            inside = [path]
            if path.is_dir():
                inside = list_audio(path)
        except OSError as error:
            problems[path] = give_reason(error)
            continue
        if not inside:
            problems[path] = "no WAV or FLAC files in this folder"
        files += inside
    return list(dict.fromkeys(files)), problems


def find_candidates(detector: Detector, machine_type: str, machine_id: str | None) -> list[Machine]:
    """Return the machine of this type and ID, or without an ID all of the type. Raises `UserError`
    if the detector knows none.
    """
    wanted = None if machine_id is None else format_id(machine_id)
    candidates = [
        machine
        for machine in detector.classes.machines
        if machine[0] == machine_type and wanted in (None, machine[1])
    ]
    if not candidates:
        asked = machine_type if machine_id is None else f"{machine_type} {machine_id}"
        raise UserError(
            f"{detector.name} was not trained on {asked}; choose one of its machines: "
            f"{detector.classes.describe_machines()}"
        )
    return candidates


def score_recordings(
    detector: Detector,
    paths: Sequence[Path],
    candidates: Sequence[Machine],
    config: Config,
    windows: Windows,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Score recordings against the one of the candidates that each fits best.

    Returns:
        A dictionary of plain values for each recording: `file`, and either `error` or
        `machine_type`, `machine_id`, `score`, `threshold`, `decision`, `alarms` (`start` and `end`
        in seconds and highest `score` of each), `n_windows`, `n_anomalous` (the number of anomalous
        windows), `worst` (the window with the highest score), `windows` (`start`, `score` and
        `decision` of each) and `difference` (of the worst window, see `plain_difference`). Without
        a threshold, `threshold`, the decisions, `alarms` and `n_anomalous` are None; without
        training clips to compare with, `difference` is.
    """
    detector = detector.with_bank(config, [config.scoring], device)
    checked = check_recordings(paths, windows, config.num_workers)
    usable = select_usable(checked)
    results = score_usable(detector, usable, candidates, config, windows, device) if usable else {}
    rows = []
    for path, check in checked.items():
        rows.append({"file": str(path)} | results.get(path, {"error": str(check)}))
    return rows


def score_usable(
    detector: Detector,
    recordings: Mapping[Path, CheckedRecording],
    candidates: Sequence[Machine],
    config: Config,
    windows: Windows,
    device: torch.device,
) -> dict[Path, dict[str, Any]]:
    """Score recordings that can be used, as `score_recordings` does. What cannot be read after all
    has an error.
    """
    table = pd.DataFrame({"path": list(recordings)})
    starts = [recording.starts for recording in recordings.values()]
    clips = ClipSet(table, config.num_workers, windows, starts)
    clips.unreadable = {}
    outputs = detector.run(clips, config, device)
    scorer = detector.scorer(config.scoring, config.neighbours)
    # (windows, candidates)
    window_scores = scorer.score_against_machines(outputs, candidates).numpy()
    scores = over_windows(window_scores, clips.clip_recordings, config.over_windows)
    best = scores.argmin(axis=1)  # the candidate that each recording fits best
    machines = [candidates[column] for column in best]
    check_scores(scores.min(axis=1), machines, config.scoring, detector.name)
    thresholds = find_thresholds(detector, scorer, config).loc[list(candidates)]
    explain_thresholds(thresholds, config, detector.path)
    own_scores = window_scores[np.arange(len(clips)), best[clips.clip_recordings]]
    parts = split_by_recording(own_scores, clips.clip_recordings)
    differences = find_differences(detector, clips, outputs.sound, machines, own_scores)
    results = {}
    for number, (path, machine) in enumerate(zip(recordings, machines, strict=True)):
        results[path] = describe_recording(
            machine,
            float(scores[number, best[number]]),
            threshold_of(thresholds, machine),
            starts[number],
            parts[number],
            config.alarm_rule,
            differences[number],
        )
    for path, error in clips.unreadable.items():
        results[path] = {"error": str(error).removeprefix(f"{path}: ")}
    return results


def describe_recording(
    machine: Machine,
    score: float,
    threshold: float | None,
    starts: Sequence[float],
    scores: np.ndarray,
    rule: AlarmRule,
    difference: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the entry of a recording in the results of `score_recordings`; `starts` and `scores`
    are those of its windows.
    """
    windows = [
        {"start": start, "score": value, "decision": name_decision(value, threshold)}
        for start, value in zip(starts, scores.tolist(), strict=True)
    ]
    alarms, n_anomalous, decision = None, None, None
    if threshold is not None:
        alarms = [alarm._asdict() for alarm in find_alarms(starts, scores, threshold, rule)]
        n_anomalous = int((scores > threshold).sum())
        decision = ANOMALOUS if alarms else NORMAL
    machine_type, machine_id = machine
    return {
        "machine_type": machine_type,
        "machine_id": machine_id,
        "score": score,
        "threshold": threshold,
        "decision": decision,
        "alarms": alarms,
        "n_windows": len(windows),
        "n_anomalous": n_anomalous,
        "worst": windows[int(np.argmax(scores))],
        "windows": windows,
        "difference": difference,
    }


def find_differences(
    detector: Detector,
    clips: ClipSet,
    outputs: Outputs,
    machines: Sequence[Machine],
    window_scores: np.ndarray,
) -> list[dict[str, Any] | None]:
    """Find how the window with the highest score of each recording differs from normal clips of its
    machine, as `plain_difference` returns it; None where the checkpoint has no training clips of
    the machine.
    """
    bank = detector.bank
    if bank is None or outputs.levels is None:
        return [None] * len(machines)
    normal = {name: bank.of_machine(detector.classes, name) for name in set(machines)}
    differences: list[dict[str, Any] | None] = []
    worst = find_worst(window_scores, clips.clip_recordings)
    for clip, machine in zip(worst.tolist(), machines, strict=True):
        if not normal[machine].files:
            differences.append(None)
            continue
        spectrum, levels = outputs.spectrum[clip].double(), outputs.levels[clip].double()
        difference = find_difference(spectrum.numpy(), levels.numpy(), normal[machine])
        differences.append(plain_difference(difference, float(clips.clip_starts[clip])))
    return differences


def plain_difference(difference: Difference, clip_start: float) -> dict[str, Any]:
    """Return a difference in plain values. `clip_start` is that of the clip in its recording.

    `text` describes it; `similar` is the most similar normal clip (`file` and `start` in seconds).
    `level`, `band` and `fluctuation` have `decibels` and `is_unusual`, `low` and `high` in Hz,
    `start` and `end` in seconds of the recording; they are None where too few normal clips are
    known. `named` is which of the last two the text names.
    """
    plain: dict[str, Any] = {
        "text": describe_difference(difference, clip_start),
        "similar": {"file": difference.file, "start": difference.start},
        "named": difference.named,
    }
    for name in ("level", "band", "fluctuation"):
        deviation = getattr(difference, name)
        plain[name] = deviation and plain_deviation(deviation, clip_start)
    return plain


def plain_deviation(deviation: Deviation, clip_start: float) -> dict[str, Any]:
    low, high = deviation.hertz
    return {
        "decibels": deviation.decibels,
        "is_unusual": deviation.is_unusual,
        "low": low,
        "high": high,
        "start": clip_start + deviation.start,
        "end": clip_start + deviation.end,
    }


def name_decision(score: float, threshold: float | None) -> str | None:
    """Return ANOMALOUS for a score above the threshold, else NORMAL; None without a threshold."""
    if threshold is None:
        return None
    return ANOMALOUS if score > threshold else NORMAL


# ---- What is printed ----


def name_figures(results: Sequence[dict[str, Any]], folder: Path) -> None:
    """Add the file of a figure, `picture`, to each recording that has a score: named after machine
    ID, folder and recording. Figures with the same name are numbered.
    """
    seen = Counter[str]()
    for row in results:
        if "error" in row:
            continue
        path = Path(row["file"])
        name = "_".join([row["machine_id"], path.absolute().parent.name, path.name])
        seen[name] += 1
        suffix = f" ({seen[name]})" if seen[name] > 1 else ""
        row["picture"] = str(folder / f"{name}{suffix}.png")


def print_scores(results: Sequence[Mapping[str, Any]], has_timeline: bool) -> None:
    """Print a line for each recording: file, machine, score, threshold, decision; or file and
    error. A second line has the difference.

    Of several windows the line has the alarms and the worst window, and with a timeline each window
    has a line: start, score, decision.
    """
    for row in results:
        file = one_line(row["file"])  # a tab or line break in its name would end the cell
        if "error" in row:
            print(f"{file}\terror: {one_line(row['error'])}")
            continue
        threshold = "-" if row["threshold"] is None else f"{row['threshold']:.6g}"
        machine = f"{row['machine_type']} {row['machine_id']}"
        cells = [file, machine, f"{row['score']:.6g}", threshold, row["decision"] or "-"]
        if row["n_windows"] > 1:
            starts = [window["start"] for window in row["windows"]]
            scores = np.array([window["score"] for window in row["windows"]])
            alarms = [Alarm(**alarm) for alarm in row["alarms"] or ()]
            cells.append(describe_windows(starts, scores, row["threshold"], alarms))
        print("\t".join(cells))
        if row["difference"]:
            print(f"\t{one_line(row['difference']['text'])}")
        for window in row["windows"] if has_timeline else ():
            cells = [
                format_time(window["start"]),
                f"{window['score']:.6g}",
                window["decision"] or "-",
            ]
            print("\t" + "\t".join(cells))


def report_rate(results: Sequence[Mapping[str, Any]], config: Config) -> None:
    """Print a notice of what the rate of false alarms means, if it decided about a recording."""
    decided = [row for row in results if row.get("decision")]
    if not decided or isinstance(config.threshold, float):
        return
    per_day = 24 * config.false_alarms
    if per_day >= 1.5:
        pace = f"{per_day:.0f} false alarms a day"
    elif per_day > 1 / 1.5:
        pace = "one false alarm a day"
    else:
        pace = f"one false alarm in {1 / per_day:.0f} days"
    text = (
        f"asked for {100 * config.false_alarms:g} % of normal windows above the threshold: at one "
        f"recording of {SECONDS} s an hour, about {pace}"
    )
    if any(row["n_windows"] > 1 for row in decided):
        n_above, span = config.alarm_rule
        text += (
            f"; longer recordings alarm only if {n_above} of {span} windows lie above it, and the "
            "more often, the longer they are"
        )
    notice(text)


def print_json(results: Sequence[Mapping[str, Any]], has_timeline: bool) -> None:
    """Print the results as JSON; the windows only with a timeline. IDs of up to nine digits are
    printed as numbers.
    """
    shown = []
    for row in results:
        cells = dict(row)
        if re.fullmatch("[0-9]{1,9}", row.get("machine_id", "")):
            cells["machine_id"] = int(row["machine_id"])
        if not has_timeline:
            cells.pop("windows", None)
        shown.append(cells)
    print(json.dumps(shown, indent=2))
