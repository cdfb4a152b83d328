"""Measure what thresholds promise and keep: the study of docs/alarms.md.

    python benchmarks/false_alarms.py check_points/noisy_arcmix_{1,2,3}.pth --data_root FOLDER

The checkpoints are trainings of one configuration, which differ in their seeds; FOLDER holds
training and test clips. Printed are, as Markdown, means over trainings and over the machine IDs of
a type, in percent:

- rates: false alarms and detections among the test clips, for each kind of score, for conformal and
  gamma thresholds of three rates, and by machine ID for conformal ones; also with FEW held-out
  recordings of each ID, where the scores of the machine type make up for them
- scales: for so few recordings, the ways to make the scores of a machine type comparable
- calibration: false alarms among half of the normal test clips, with thresholds from the held-out
  recordings and from the other half
- hours: an hour of each ID, of normal test clips in random order, with faults of 10, 20, 30 and
  60 s of anomalous ones: false alarms an hour outside the faults, and the share of faults that an
  alarm overlaps

The first two take a minute for each checkpoint on two cores, the hours ten minutes; `--hours 0`
leaves them out. `--picture FILE` draws an hour.
"""

import contextlib
import io
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from alarms import AlarmRule, find_alarms
from audio import SAMPLE_RATE, SECONDS, Windows
from classes import Machine
from command_line import OneLineParser
from config import Config, parse_command_line
from dataloader import load_clips, make_clips
from detector import score_held_out
from evaluation.scores import KINDS
from evaluation.single import describe_recording
from evaluation.tables import markdown_header, markdown_row
from evaluation.thresholds import (
    conformal,
    fit_thresholds,
    least_recordings,
    threshold_of,
)
from inference import Model, load_model, run_model, with_bank
from names import ANOMALOUS, NORMAL
from recordings import MACHINE_COLUMNS
from utils import run_script, use_device

RATES = (0.2, 0.1, 0.05)
FEW, DRAWS = 4, 5  # held-out recordings of an ID, and how often they are drawn
SPLITS = 10  # of the normal test clips into halves
FAULTS = (10, 20, 30, 60) * 3  # seconds, in an hour
HOUR = 3600
# Scales, to and from scores, on which scores are moved to the mean of the machine; None: they stay
SCALES: dict[str, tuple[Callable, Callable] | None] = {
    "as they are": None,
    "ratio": (lambda scores: np.log(np.maximum(scores, 1e-16)), np.exp),
    "difference": (lambda scores: scores, lambda scores: scores),
    "log(1 + score)": (np.log1p, np.expm1),
}
SCALE_COUNTS, SCALE_DRAWS = (2, 3, 4, 8), 30
RULES = {"single windows": AlarmRule(1, 1), "3 of 5": AlarmRule(3, 5)}


@dataclass(frozen=True)
class Scores:
    """Scores of a training: of held-out recordings as `fit_thresholds` takes them, and of test
    clips with `condition` and `score`.
    """

    machines: Sequence[Machine]
    held_out: pd.DataFrame
    test: pd.DataFrame


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="files of trained weights")
    parser.add_argument("--hours", type=int, default=3, help="checkpoints to score hours with")
    parser.add_argument("--picture", type=Path, help="draw the first hour into this file")
    config, options = parse_command_line(parser)
    device = use_device(config.device)
    kinds = list(KINDS)
    models = []
    for path in options.checkpoints:
        models.append(with_bank(load_model(path, config), config, kinds, device))
    all_scores: dict[str, list[Scores]] = {kind: [] for kind in kinds}
    for model in models:
        for kind, scores in score_test_clips(model, config).items():
            all_scores[kind].append(scores)
    with contextlib.redirect_stderr(io.StringIO()):  # notices of thresholds
        print_table("rates", rate_rows(all_scores, None))
        print_table(f"rates, {FEW} held-out recordings of each ID", rate_rows(all_scores, FEW))
        print_table("rates of the published score by ID", id_rows(all_scores["published"]))
        print_table("calibration", calibration_rows(all_scores))
        print_table("scales", scale_rows(all_scores))
    if options.hours:
        rows = []
        for number, model in enumerate(models[: options.hours]):
            rows += hour_rows(model, config, number, options.picture)
        print_table("hours", summarise_hours(pd.DataFrame(rows)))


def print_table(title: str, rows: pd.DataFrame, digits: int = 1) -> None:
    """Print a table, whose first column is text, with so many digits behind the point."""
    print(f"\n## {title}\n")
    print("\n".join(markdown_header(rows.columns[0], list(rows.columns[1:]))))
    for row in rows.to_dict("split")["data"]:
        cells = [f"{cell:.{digits}f}" if isinstance(cell, float) else str(cell) for cell in row]
        print(markdown_row(cells[0], cells[1:]), flush=True)


# ---- Single clips ----


def score_test_clips(model: Model, config: Config) -> dict[str, Scores]:
    """Score the test clips of a training with each kind of score."""
    clips = load_clips(config, model.classes, "test", model.windows(config, "test"))
    outputs = run_model(model, clips, config, use_device(config.device))
    by_kind = {}
    for kind in KINDS:
        scorer = model.scorer(kind, config.neighbours)
        held_out = score_held_out(model, scorer).assign(origin="held-out")
        values = scorer.score_clips(outputs, clips.machines).numpy()
        test = clips.recordings.assign(score=values)
        by_kind[kind] = Scores(model.classes.machines, held_out, test)
    return by_kind


def measure_rates(scores: Scores, held_out: pd.DataFrame, method: str, rate: float) -> pd.Series:
    """Return the share of test clips above the threshold, by condition, machine type and ID, in
    percent; without machines that have none.
    """
    thresholds = fit_thresholds(scores.machines, held_out, method, rate)["threshold"].dropna()
    test = scores.test.join(thresholds, on=MACHINE_COLUMNS, how="inner")
    is_above = 100.0 * (test["score"] > test["threshold"])
    return is_above.groupby([test["condition"], test["machine_type"], test["machine_id"]]).mean()


def draw_few(held_out: pd.DataFrame, count: int | None) -> Iterator[pd.DataFrame]:
    """Yield the held-out recordings, or DRAWS times `count` of each machine."""
    if count is None:
        yield held_out
        return
    for seed in range(DRAWS):
        shuffled = held_out.sample(frac=1, random_state=seed)
        yield shuffled.groupby(MACHINE_COLUMNS).head(count)


def rate_rows(all_scores: dict[str, list[Scores]], count: int | None) -> pd.DataFrame:
    rows = []
    for kind, trainings in all_scores.items():
        for method in ("conformal", "gamma"):
            for rate in RATES:
                found = [
                    measure_rates(scores, held_out, method, rate)
                    for scores in trainings
                    for held_out in draw_few(scores.held_out, count)
                ]
                rows.append({"score": kind, "threshold": method, "asked": 100 * rate})
                rows[-1] |= summarise_rates(found)
    return pd.DataFrame(rows).fillna("-")


def summarise_rates(found: Sequence[pd.Series]) -> dict[str, float]:
    """Return the mean over the IDs of each type, and over trainings, of the shares."""
    means = pd.DataFrame([rates.groupby(level=[1, 0]).mean() for rates in found]).mean()
    cells = {}
    for machine_type in means.index.unique(0):
        for title, condition in (("false alarms", NORMAL), ("detections", ANOMALOUS)):
            if (machine_type, condition) in means:
                cells[f"{machine_type}: {title}"] = means[machine_type, condition]
    return cells


def id_rows(trainings: Sequence[Scores]) -> pd.DataFrame:
    """Return a row for each machine ID: false alarms of each rate, over trainings."""
    columns = {}
    for rate in RATES:
        found = [measure_rates(x, x.held_out, "conformal", rate) for x in trainings]
        shares = pd.DataFrame(found)[NORMAL]
        columns[f"asked {100 * rate:g}"] = shares.apply(
            lambda of_id: f"{of_id.mean():.1f} ({of_id.min():.0f} to {of_id.max():.0f})"
        )
    table = pd.DataFrame(columns).fillna("-")
    table.insert(0, "machine", [" ".join(machine) for machine in table.index])
    return table


def calibration_rows(all_scores: dict[str, list[Scores]]) -> pd.DataFrame:
    """Return false alarms among one half of the normal test clips, with thresholds from held-out
    recordings and from the other half.
    """
    rows = []
    for kind, trainings in all_scores.items():
        for rate in RATES:
            before, after = [], []
            for scores in trainings:
                for seed in range(SPLITS):
                    test = scores.test.sample(frac=1, random_state=seed)
                    test = test[test["condition"] == NORMAL]
                    place = test.groupby(MACHINE_COLUMNS).cumcount()
                    size = test.groupby(MACHINE_COLUMNS)["score"].transform("size")
                    is_first = place < size // 2
                    later = test[is_first].assign(recording=place, origin="later")
                    half = Scores(scores.machines, scores.held_out, test[~is_first])
                    before.append(measure_rates(half, scores.held_out, "conformal", rate))
                    after.append(measure_rates(half, later, "conformal", rate))
            row = {"score": kind, "asked": 100 * rate}
            for name, found in (("held-out", before), ("later", after)):
                for title, mean in summarise_rates(found).items():
                    row[f"{title}, {name}"] = mean
            rows.append(row)
    return pd.DataFrame(rows).fillna("-")


# ---- Few recordings ----


def scale_rows(all_scores: dict[str, list[Scores]]) -> pd.DataFrame:
    """Return for each scale false alarms, those of the worst ID, and detections, of the first
    machine type, where an ID has few recordings.
    """
    rows = []
    for kind, trainings in all_scores.items():
        for rate in RATES[:2]:
            for count in SCALE_COUNTS:
                if count >= least_recordings("conformal", rate):
                    continue
                for name in SCALES:
                    shares = [measure_scale(name, x, count, rate) for x in trainings]
                    titles = ("false alarms", "worst ID", "detections")
                    cells = dict(zip(titles, np.mean(shares, axis=0).tolist(), strict=True))
                    rows.append({"score": kind, "asked": 100 * rate, "recordings": count})
                    rows[-1] |= {"scale": name} | cells
    return pd.DataFrame(rows).dropna()


def measure_scale(name: str, scores: Scores, count: int, rate: float) -> np.ndarray:
    """Return the three shares of `scale_rows` of a training `(3,)`, in percent."""
    machine_type = scores.machines[0][0]
    held_out, test = (
        table[table["machine_type"] == machine_type] for table in (scores.held_out, scores.test)
    )
    by_id: dict[str, Any] = {}
    for machine_id, group in test.groupby("machine_id"):
        of_id = held_out.loc[held_out["machine_id"] == machine_id, "score"].to_numpy()
        conditions = group.groupby("condition")["score"]
        by_id[str(machine_id)] = (of_id, *(conditions.get_group(x) for x in (NORMAL, ANOMALOUS)))
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(SCALE_DRAWS):
        drawn = {key: rng.permutation(of_id)[:count] for key, (of_id, *_) in by_id.items()}
        above = []
        for machine_id, (_, normal, anomalous) in by_id.items():
            threshold = scaled_threshold(SCALES[name], drawn, machine_id, rate)
            if threshold is not None:
                above.append(((normal > threshold).mean(), (anomalous > threshold).mean()))
        if above:
            false_alarms, detections = np.transpose(above)
            shares.append((false_alarms.mean(), false_alarms.max(), detections.mean()))
    return 100 * np.mean(shares, axis=0) if shares else np.full(3, np.nan)


def scaled_threshold(
    scale: tuple[Callable, Callable] | None,
    drawn: dict[str, np.ndarray],
    machine_id: str,
    rate: float,
) -> float | None:
    """Return the conformal threshold of a machine from the scores `(n,)` of all IDs."""
    to_scale, from_scale = scale or (lambda scores: scores, lambda scores: scores)
    parts = []
    for scores in drawn.values():
        scaled = to_scale(scores)
        others = (scaled.sum() - scaled) / (len(scaled) - 1) if scale else 0.0
        parts.append(scaled - others)
    pooled = np.concatenate(parts)
    table = pd.DataFrame({"recording": range(len(pooled)), "score": pooled})
    highest = conformal(table.assign(machine_type="", machine_id=""), rate)
    if highest is None:
        return None
    return float(from_scale(highest + (to_scale(drawn[machine_id]).mean() if scale else 0.0)))


# ---- Hours ----


def hour_rows(model: Model, config: Config, seed: int, picture: Path | None) -> list[dict]:
    """Score an hour of each machine, and return false alarms and detections for each rate and
    rule.
    """
    clips = load_clips(config, model.classes, "test", model.windows(config, "test"))
    scorer = model.scorer(config.scoring, config.neighbours)
    held_out = score_held_out(model, scorer).assign(origin="held-out")
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for (machine_type, machine_id), recordings in clips.recordings.groupby(MACHINE_COLUMNS):
            machine = (str(machine_type), str(machine_id))
            file = Path(folder) / f"{'_'.join(machine)}.wav"
            faults = write_hour(recordings, file, rng)
            table = pd.DataFrame([(file, *machine)], columns=["path", *MACHINE_COLUMNS])
            hour = make_clips(table, Windows(5.0, config.channel), config.num_workers)
            outputs = run_model(model, hour, config, use_device(config.device))
            scores = scorer.score_clips(outputs, hour.machines).numpy()
            for rate in RATES:
                thresholds = fit_thresholds(model.classes.machines, held_out, "conformal", rate)
                threshold = threshold_of(thresholds, machine)
                if threshold is None:
                    continue
                starts = hour.clip_starts.tolist()
                for name, rule in RULES.items():
                    row = count_alarms(starts, scores, threshold, rule, faults)
                    rows.append({"type": machine[0], "asked": 100 * rate, "rule": name} | row)
                rows.append(mean_row(machine, rate, hour.clip_starts, scores, threshold, faults))
                if picture and rate == 0.1:
                    draw_hour(file, machine, starts, scores, threshold, config, picture)
                    picture = None
    return rows


def write_hour(
    recordings: pd.DataFrame, file: Path, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Write an hour of normal clips of a machine in random order, with faults of anomalous ones,
    one in each twelfth. Returns start and end of each fault in seconds.
    """
    sounds = {}
    for condition, group in recordings.groupby("condition"):
        sounds[condition] = [soundfile.read(path, dtype="int16")[0] for path in group["path"]]
    n_clips = HOUR // SECONDS
    is_fault = np.zeros(n_clips, dtype=bool)
    faults = []
    part = n_clips // len(FAULTS)
    for number, seconds in enumerate(rng.permutation(FAULTS)):
        length = seconds // SECONDS
        first = number * part + int(rng.integers(2, part - length - 2))
        is_fault[first : first + length] = True
        faults.append((first * SECONDS, (first + length) * SECONDS))
    parts = []
    for fault in is_fault:
        chosen = sounds[ANOMALOUS if fault else NORMAL]
        parts.append(chosen[rng.integers(len(chosen))][: SECONDS * SAMPLE_RATE])
    soundfile.write(file, np.concatenate(parts), SAMPLE_RATE, subtype="PCM_16")
    return faults


def count_alarms(
    starts: Sequence[float],
    scores: np.ndarray,
    threshold: float,
    rule: AlarmRule,
    faults: Sequence[tuple[int, int]],
) -> dict[str, float]:
    """Count the alarms that overlap no fault, and the share of faults of each length that an alarm
    overlaps, in percent.
    """
    alarms = find_alarms(starts, scores, threshold, rule)
    is_false = [
        not any(alarm.start < end and start < alarm.end for start, end in faults)
        for alarm in alarms
    ]
    row: dict[str, float] = {"false alarms an hour": float(sum(is_false))}
    for seconds in sorted(set(FAULTS)):
        of_length = [fault for fault in faults if fault[1] - fault[0] == seconds]
        found = [
            any(alarm.start < end and start < alarm.end for alarm in alarms)
            for start, end in of_length
        ]
        row[f"{seconds} s"] = 100 * float(np.mean(found))
    return row


def mean_row(
    machine: Machine,
    rate: float,
    starts: np.ndarray,
    scores: np.ndarray,
    threshold: float,
    faults: Sequence[tuple[int, int]],
) -> dict[str, float | str]:
    """Return whether the mean of the windows outside faults lies above the threshold, as a number
    of false alarms, and in percent whether that of an hour with one fault of each length does.
    """
    overlaps = [(starts < end) & (starts + SECONDS > start) for start, end in faults]
    normal = scores[~np.any(overlaps, axis=0)]
    row: dict[str, float | str] = {"type": machine[0], "asked": 100 * rate, "rule": "the mean"}
    row["false alarms an hour"] = float(normal.mean() > threshold)
    for seconds in sorted(set(FAULTS)):
        chosen = [
            np.concatenate([normal, scores[inside]]).mean() > threshold
            for (start, end), inside in zip(faults, overlaps, strict=True)
            if end - start == seconds
        ]
        row[f"{seconds} s"] = 100 * float(np.mean(chosen))
    return row


def summarise_hours(rows: pd.DataFrame) -> pd.DataFrame:
    table = rows.groupby(["type", "rule", "asked"], sort=False).mean().reset_index()
    counts = rows.groupby(["type", "rule", "asked"], sort=False).size().to_list()
    table.insert(3, "hours", counts)
    return table


def draw_hour(
    file: Path,
    machine: Machine,
    starts: Sequence[float],
    scores: np.ndarray,
    threshold: float,
    config: Config,
    picture: Path,
) -> None:
    from evaluation.recording_figure import draw_recording

    mean = float(scores.mean())
    row = describe_recording(machine, mean, threshold, starts, scores, config.alarm_rule)
    row["file"] = str(file)
    draw_recording(row, config.scoring, config.channel, file.parent, picture)


if __name__ == "__main__":
    run_script(main)
