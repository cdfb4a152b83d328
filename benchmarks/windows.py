"""What long recordings and machines of unknown ID cost: AUC of joined recordings, a fault within an
hour.

    python benchmarks/windows.py check_points/real/noisy_arcmix_{2023,1,2}.pth --data_root FOLDER

FOLDER holds training and test clips of 10 s. Of each checkpoint, in percent and for each machine
type:

- the mean AUC of the IDs of the test clips one by one; of recordings of three test clips each of one ID and condition,
  joined in the order of their names, with windows 10 s and 5 s apart; and what averaging alone does: the AUC of the
  means of the scores of three clips, over 1000 random ways to form threes. With windows 10 s apart the windows are the
  clips themselves, and the AUC is that of one such way: "off by" is the largest difference between the score of a
  recording and the mean of those of its clips.
- how many of the normal ones are called anomalous.
- the AUC against the own ID, and against the best-fitting ID of the machine type, as where the ID is not known.

Then `score.py --timeline --plots` of ten minutes and of an hour: normal test clips of the first ID,
over and over, and from 40:00 to 41:00 (9:00 to 10:00) anomalous ones. It prints when the window
with the highest score starts, which minutes have the highest mean score of the windows that lie in
them, the time, and the highest anonymous memory of the process.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import torch
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import TrainedModel, load_model
from config import parse_command_line
from corpus import ANOMALOUS, MACHINE, NORMAL, machines_of_classes
from dataloader import ClipSet, load_clips
from evaluation.recordings import clock
from evaluation.result import evaluate
from evaluation.scoring import anomaly_scores, run_model
from model.tastgram import SAMPLE_RATE, SECONDS
from utils import OneLineParser, run_script, use_device

ROOT = Path(__file__).resolve().parent.parent
JOINED, WAYS = 3, 1000
MINUTE = 60 // SECONDS  # clips


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="files of trained weights")
    parser.add_argument("--output", type=Path, help="keep the recordings here")
    config, options, given = parse_command_line(parser)
    device = use_device(config.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output or Path(temporary)
        rows = []
        for path in options.checkpoints:
            trained = load_model(path, config, given)
            clips = load_clips(trained.config, "test")
            joined = join_recordings(clips.recordings, folder / "joined")
            rows += [
                {"checkpoint": path.stem, **row} for row in measure(trained, clips, joined, device)
            ]
        table = pd.DataFrame(rows)
        print(table.to_string(index=False, float_format="%.2f"))
        print(table.groupby("machine_type").mean(numeric_only=True).to_string(float_format="%.2f"))
        for minutes, fault in ((10, 9), (60, 40)):
            recording = join_with_fault(
                clips.recordings, folder / f"{minutes}_minutes.wav", minutes, fault
            )
            for path in options.checkpoints:
                print(listen(path, recording, clips.recordings.iloc[0]), flush=True)


def measure(
    trained: TrainedModel, clips: ClipSet, joined: Path, device: torch.device
) -> Iterator[dict[str, object]]:
    """For each machine type what the head of this file lists."""
    single = score(trained, clips, device)
    recordings = {}
    for hop in (10.0, 5.0):
        keys = {"data_root": str(joined), "window": "all", "hop": hop}
        config = trained.config.model_copy(update=keys)
        model = TrainedModel(trained.path, trained.network, config, trained.state)
        recordings[hop] = score(model, load_clips(config, "test"), device)
    unknown = score_best_id(trained, clips, device)
    for machine_type, of_type in single.groupby("machine_type", sort=False):
        shuffled = (of_type.sample(frac=1, random_state=seed) for seed in range(WAYS))
        drawn = np.array([mean_auc(means_of_threes(clips)) for clips in shuffled])
        expected, joined_scores = (
            means_of_threes(of_type),
            of(recordings[10.0], machine_type)["exact_score"],
        )
        yield {
            "machine_type": machine_type,
            "single": mean_auc(of_type),
            "threes": drawn.mean(),
            "from": np.percentile(drawn, 2.5),
            "to": np.percentile(drawn, 97.5),
            **{
                f"joined, {hop:g} s": mean_auc(of(table, machine_type))
                for hop, table in recordings.items()
            },
            "off by": f"{np.abs(np.sort(expected['exact_score']) - np.sort(joined_scores)).max():.0e}",
            "called, single": called(of_type),
            **{
                f"called, {hop:g} s": called(of(table, machine_type))
                for hop, table in recordings.items()
            },
            "best ID": mean_auc(of(unknown, machine_type)),
        }


def of(table: pd.DataFrame, machine_type: object) -> pd.DataFrame:
    return table[table["machine_type"] == machine_type]


def score(trained: TrainedModel, clips: ClipSet, device: torch.device) -> pd.DataFrame:
    kind = trained.config.scoring
    return evaluate(trained, clips, "test", device, [kind])[kind].clips


def score_best_id(trained: TrainedModel, clips: ClipSet, device: torch.device) -> pd.DataFrame:
    """The lowest score of each clip over the IDs of its machine type."""
    outputs, machines = run_model(trained, clips, device), machines_of_classes(trained.config)
    table = clips.recordings.assign(exact_score=np.inf)
    for label, (machine_type, _) in enumerate(machines):
        scores = clips.over_windows(
            anomaly_scores(trained, outputs, torch.full((len(clips),), label)), "mean"
        )
        is_type = table["machine_type"] == machine_type
        table.loc[is_type, "exact_score"] = np.minimum(table["exact_score"], scores)[is_type]
    return table


def mean_auc(table: pd.DataFrame) -> float:
    groups = [group for _, group in table.groupby("machine_id")]
    return 100 * float(
        np.mean(
            [
                roc_auc_score(group["condition"] == ANOMALOUS, group["exact_score"])
                for group in groups
            ]
        )
    )


def called(table: pd.DataFrame) -> float:
    """The percentage of the normal ones that are called anomalous."""
    return 100 * float(table["decision"][table["condition"] == NORMAL].mean())


def means_of_threes(table: pd.DataFrame) -> pd.DataFrame:
    """The means of the scores of three clips of one ID and condition that follow each other."""
    rows = []
    for machine, group in table.groupby([*MACHINE, "condition"]):
        scores = group["exact_score"].to_numpy()
        threes = scores[: len(scores) // JOINED * JOINED].reshape(-1, JOINED)
        rows += [(*machine, value) for value in threes.mean(axis=1)]
    return pd.DataFrame(rows, columns=[*MACHINE, "condition", "exact_score"])


# ---- Recordings ----


def join(paths: Sequence[Path], file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with soundfile.SoundFile(file, "w", SAMPLE_RATE, 1, "PCM_16") as joined:
        for path in paths:
            joined.write(soundfile.read(path, dtype="int16")[0])
    return file


def join_recordings(clips: pd.DataFrame, root: Path) -> Path:
    """A data folder with the test clips of each ID and condition joined; what is left over is left
    out.
    """
    for (machine_type, machine_id, condition), group in clips.groupby([*MACHINE, "condition"]):
        paths, prefix = group["path"].tolist(), "normal" if condition == NORMAL else "anomaly"
        for number in range(len(paths) // JOINED):
            chosen = paths[JOINED * number : JOINED * (number + 1)]
            join(
                chosen, root / machine_type / "test" / f"{prefix}_id_{machine_id}_{number:04d}.wav"
            )
    return root


def join_with_fault(clips: pd.DataFrame, file: Path, minutes: int, fault: int) -> Path:
    """So many minutes of the first machine, normal but for the minute after that of the fault."""
    own = clips[(clips[MACHINE] == clips[MACHINE].iloc[0]).all(axis=1)]
    normal, anomalous = (
        own["path"][own["condition"] == condition].tolist() for condition in (NORMAL, ANOMALOUS)
    )
    paths = list(itertools.islice(itertools.cycle(normal), minutes * MINUTE))
    paths[fault * MINUTE : (fault + 1) * MINUTE] = anomalous[:MINUTE]
    return join(paths, file)


def listen(checkpoint: Path, recording: Path, clip: pd.Series) -> str:
    """What score.py says of a recording, how long it takes, and how much memory."""
    machine = ("--machine_type", clip["machine_type"], "--machine_id", clip["machine_id"])
    options = (str(recording), *machine, "--timeline", "--plots", "--json")
    began, highest, said = time.monotonic(), 0.0, recording.with_suffix(".json")
    with said.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, ROOT / "score.py", checkpoint, *options], stdout=file
        )
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            found = [
                line.split()[1]
                for line in status.read_text().splitlines()
                if line.startswith("RssAnon")
            ]
            highest = max(highest, *(int(kilobytes) / 1e3 for kilobytes in found), 0.0)
            time.sleep(0.05)
    seconds = time.monotonic() - began
    if process.returncode:
        sys.exit(process.returncode)  # it has said why
    (row,) = json.loads(said.read_text())
    windows = pd.DataFrame(row["windows"])
    whole = windows[windows["start"] % 60 <= 60 - SECONDS]
    minutes = whole.groupby(whole["start"] // 60 + 1)["score"].mean().nlargest(3)
    highest_minutes = ", ".join(f"{minute:.0f} ({score:.2f})" for minute, score in minutes.items())
    return (
        f"{checkpoint.stem}, {recording.name}: score {row['score']:.2f}, threshold {row['threshold']:.2f}; "
        f"{row['n_anomalous']} of {row['n_windows']} windows anomalous; worst at {clock(row['worst']['start'])}; "
        f"highest minutes: {highest_minutes}; {seconds:.1f} s, RssAnon {highest:.0f} MB; {row['picture']}"
    )


if __name__ == "__main__":
    run_script(main)
