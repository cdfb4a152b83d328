"""Measure how well long recordings and machines of unknown ID are scored.

    python benchmarks/windows.py check_points/real/noisy_arcmix_{2023,1,2}.pth --data_root FOLDER

FOLDER holds training and test clips of 10 s. For each checkpoint and machine type, in percent:

- the mean AUC of the machine IDs for single test clips, and for recordings of three joined test
  clips of the same ID and condition, in the order of their names, with windows 10 s and 5 s apart.
  To show the effect of averaging alone, there is the AUC of the mean scores of three clips, over
  1000 random groupings. Windows 10 s apart are the clips themselves, so their AUC belongs to one
  such grouping: "off by" is the largest difference between the score of a recording and the mean
  score of its clips.
- the share of normal clips or recordings that are called anomalous.
- the AUC against the best-fitting ID of the machine type, as for a machine of unknown ID.

Then `score.py --timeline --plots` scores ten minutes and an hour of normal test clips of the first
ID, repeated, with anomalous ones from 9:00 to 10:00 or from 40:00 to 41:00. Printed are the start
of the window with the highest score, the minutes whose windows have the highest mean scores, the
time, and the peak anonymous memory of the process.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import torch
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from alarms import format_time
from audio import SAMPLE_RATE, SECONDS, Windows
from command_line import OneLineParser
from config import Config, parse_command_line
from dataloader import ClipSet, load_clips
from detector import Detector, load_detector
from evaluation.result import evaluate
from evaluation.scores import over_windows
from names import ANOMALOUS, NORMAL
from recordings import MACHINE_COLUMNS, find_recordings
from utils import run_script, use_device

ROOT = Path(__file__).resolve().parent.parent
JOINED, GROUPINGS = 3, 1000
MINUTE = 60 // SECONDS  # clips


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="files of trained weights")
    parser.add_argument("--output", type=Path, help="keep the recordings here")
    config, options = parse_command_line(parser)
    config = config.model_copy(update={"score_dtype": "float64"})
    device = use_device(config.device)
    detectors = [load_detector([path], config) for path in options.checkpoints]
    recordings = find_recordings(config, detectors[0].classes, "test")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output or Path(temporary)
        joined = join_recordings(recordings, folder / "joined")
        rows = []
        for detector in detectors:
            rows += measure(detector, joined, config, device)
        table = pd.DataFrame(rows)
        print(table.to_string(index=False, float_format="%.2f"))
        print(table.groupby("machine_type").mean(numeric_only=True).to_string(float_format="%.2f"))
        for minutes, fault in ((10, 9), (60, 40)):
            file = folder / f"{minutes}_minutes.wav"
            long_recording = join_with_fault(recordings, file, minutes, fault)
            for path in options.checkpoints:
                print(score_long(path, long_recording, recordings.iloc[0]), flush=True)


def measure(
    detector: Detector, joined: Path, config: Config, device: torch.device
) -> list[dict[str, object]]:
    """Return a row of figures for each machine type; `joined` is the folder of joined clips."""
    detector = detector.with_bank(config, [config.scoring], device)
    clips = load_clips(config, detector.classes, "test", detector.windows(config, "test"))
    tables = {
        "single": score(detector, clips, config, device),
        "best ID": score_best_id(detector, clips, config, device),
    }
    joined_config = config.model_copy(update={"data_root": str(joined)})
    for hop in (10, 5):
        windows = Windows(hop, clips.windows.channel)
        joined_clips = load_clips(joined_config, detector.classes, "test", windows)
        tables[f"joined, {hop} s"] = score(detector, joined_clips, config, device)
    rows = []
    for machine_type in detector.classes.machine_types:
        row: dict[str, object] = {"checkpoint": detector.path.stem, "machine_type": machine_type}
        rows.append(row | compare(tables, machine_type))
    return rows


def score(detector: Detector, clips: ClipSet, config: Config, device: torch.device) -> pd.DataFrame:
    """Return the table of recordings with scores and decisions."""
    outputs = detector.run(clips, config, device)
    (result,) = evaluate(detector, clips, outputs, config, "test", [config.scoring])
    return result.recordings


def score_best_id(
    detector: Detector, clips: ClipSet, config: Config, device: torch.device
) -> pd.DataFrame:
    """Return the table of recordings with the lowest score over the IDs of the machine type."""
    machines = detector.classes.machines
    outputs = detector.run(clips, config, device)
    scorer = detector.scorer(config.scoring, config.neighbours)
    window_scores = scorer.score_against_machines(outputs, machines).numpy()
    scores = over_windows(window_scores, clips.clip_recordings, "mean")  # (recordings, machines)
    types = np.array([machine_type for machine_type, _ in machines])
    is_other_type = clips.recordings["machine_type"].to_numpy()[:, None] != types
    lowest = np.where(is_other_type, np.inf, scores).min(axis=1)
    return clips.recordings.assign(score=lowest)


def compare(tables: dict[str, pd.DataFrame], machine_type: str) -> dict[str, object]:
    """Return the figures of a machine type, as listed at the top of this file."""
    chosen = {name: table[table["machine_type"] == machine_type] for name, table in tables.items()}
    single, ten, five = chosen["single"], chosen["joined, 10 s"], chosen["joined, 5 s"]
    drawn = []
    for seed in range(GROUPINGS):
        shuffled = single.sample(frac=1, random_state=seed)
        drawn.append(mean_auc(average_threes(shuffled)))
    expected = np.sort(average_threes(single)["score"])
    return {
        "single": mean_auc(single),
        "threes": np.mean(drawn),
        "from": np.percentile(drawn, 2.5),
        "to": np.percentile(drawn, 97.5),
        "joined, 10 s": mean_auc(ten),
        "joined, 5 s": mean_auc(five),
        "off by": f"{np.abs(expected - np.sort(ten['score'])).max():.0e}",
        "called, single": share_called_anomalous(single),
        "called, 10 s": share_called_anomalous(ten),
        "called, 5 s": share_called_anomalous(five),
        "best ID": mean_auc(chosen["best ID"]),
    }


def mean_auc(table: pd.DataFrame) -> float:
    """Return the mean AUC of the machine IDs in percent."""
    aucs = []
    for _, group in table.groupby("machine_id"):
        aucs.append(roc_auc_score(group["condition"] == ANOMALOUS, group["score"]))
    return 100 * float(np.mean(aucs))


def share_called_anomalous(table: pd.DataFrame) -> float:
    """Return the percentage of normal recordings that are called anomalous."""
    return 100 * float(table["decision"][table["condition"] == NORMAL].mean())


def average_threes(table: pd.DataFrame) -> pd.DataFrame:
    """Return the mean scores of three consecutive clips of the same ID and condition."""
    rows = []
    for machine, group in table.groupby([*MACHINE_COLUMNS, "condition"]):
        scores = group["score"].to_numpy()
        threes = scores[: len(scores) // JOINED * JOINED].reshape(-1, JOINED)
        rows += [(*machine, value) for value in threes.mean(axis=1)]
    return pd.DataFrame(rows, columns=[*MACHINE_COLUMNS, "condition", "score"])


# ---- Recordings ----


def join(paths: Sequence[Path], file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with soundfile.SoundFile(file, "w", SAMPLE_RATE, 1, "PCM_16") as joined:
        for path in paths:
            joined.write(soundfile.read(path, dtype="int16")[0])
    return file


def join_recordings(clips: pd.DataFrame, root: Path) -> Path:
    """Write a data folder with joined test clips of the same ID and condition; return it.

    A remainder of fewer than three clips is left out.
    """
    for (machine_type, machine_id, condition), group in clips.groupby(
        [*MACHINE_COLUMNS, "condition"]
    ):
        paths, prefix = group["path"].tolist(), "normal" if condition == NORMAL else "anomaly"
        for number in range(len(paths) // JOINED):
            chosen = paths[JOINED * number : JOINED * (number + 1)]
            name = f"{prefix}_id_{machine_id}_{number:04d}.wav"
            join(chosen, root / machine_type / "test" / name)
    return root


def join_with_fault(clips: pd.DataFrame, file: Path, minutes: int, fault: int) -> Path:
    """Write a recording of the first machine, with one anomalous minute from `fault` minutes on."""
    clips = clips[(clips[MACHINE_COLUMNS] == clips[MACHINE_COLUMNS].iloc[0]).all(axis=1)]
    normal = clips["path"][clips["condition"] == NORMAL].tolist()
    anomalous = clips["path"][clips["condition"] == ANOMALOUS].tolist()
    paths = list(itertools.islice(itertools.cycle(normal), minutes * MINUTE))
    paths[fault * MINUTE : (fault + 1) * MINUTE] = anomalous[:MINUTE]
    return join(paths, file)


def score_long(checkpoint: Path, recording: Path, clip: pd.Series) -> str:
    """Score a recording with score.py; describe the result, the time and the peak memory."""
    machine = ("--machine_type", clip["machine_type"], "--machine_id", clip["machine_id"])
    options = (str(recording), *machine, "--timeline", "--plots", "--json")
    command = [sys.executable, ROOT / "score.py", checkpoint, *options]
    start, peak_memory, output = time.monotonic(), 0.0, recording.with_suffix(".json")
    with output.open("w") as file:
        process = subprocess.Popen(command, stdout=file)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            for line in status.read_text().splitlines():
                if line.startswith("RssAnon"):
                    peak_memory = max(peak_memory, int(line.split()[1]) / 1e3)
            time.sleep(0.05)
    seconds = time.monotonic() - start
    if process.returncode:
        sys.exit(process.returncode)  # score.py has printed the reason
    (row,) = json.loads(output.read_text())
    windows = pd.DataFrame(row["windows"])
    whole = windows[windows["start"] % 60 <= 60 - SECONDS]
    minutes = whole.groupby(whole["start"] // 60 + 1)["score"].mean().nlargest(3)
    highest_minutes = ", ".join(f"{minute:.0f} ({score:.2f})" for minute, score in minutes.items())
    return (
        f"{checkpoint.stem}, {recording.name}: score {row['score']:.2f}, threshold "
        f"{row['threshold']:.2f}; {row['n_anomalous']} of {row['n_windows']} windows anomalous; "
        f"worst at {format_time(row['worst']['start'])}; highest minutes: {highest_minutes}; "
        f"{seconds:.1f} s, RssAnon {peak_memory:.0f} MB; {row['picture']}"
    )


if __name__ == "__main__":
    run_script(main)
