"""Measure what several trainings score together: the study of docs/ensembles.md.

    # all triples of checkpoints, on the test clips
    python benchmarks/together.py check_points/noisy_arcmix_{1,2,3,4}.pth --data_root FOLDER
    # the choice of the scale, without test clips
    python benchmarks/together.py check_points/aside_{1,2,3,4}.pth --data_root FOLDER --altered

The checkpoints are trainings of one configuration, which differ in their seeds. Printed are, as
Markdown, means over all triples of them, in percent, for each machine type and kind of score:

- mean AUC, mean pAUC and lowest AUC of the machine IDs: of the members (their mean, and the best of
  each triple), and of the triple with its scores put on one scale and averaged in several ways
  (WAYS)
- false alarms and detections among the clips, with conformal thresholds from held-out recordings:
  of the members, of the triple as a detector, and of the triple with the mean of the scores
  themselves

With --altered, the folders `test` contain normal clips alone, which no checkpoint has been trained
on or held out: training clips that were set aside. The anomalous clips are these, altered in seven
ways (`alter`). Recordings are clips of 10 s, of two machine types or more.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from audio import N_SAMPLES, SAMPLE_RATE
from benchmarks.false_alarms import print_table
from command_line import OneLineParser
from config import Config, parse_command_line
from dataloader import ClipSet, load_clips
from detector import (
    LEAST_SCORE,
    Detector,
    DetectorOutputs,
    DetectorScorer,
    Scale,
    load_detector,
    normal_scores,
)
from errors import UserError
from evaluation.metrics import MAX_FPR
from evaluation.thresholds import decide, find_thresholds
from names import ANOMALOUS, NORMAL
from recordings import MACHINE_COLUMNS
from utils import run_script, use_device

SIZE = 3  # members scored together
RATES = (0.1, 0.2)  # of false alarms that are asked for
TOLD_KINDS = ("published", "angle", "nearest")
TIME = np.arange(N_SAMPLES) / SAMPLE_RATE
FREQUENCY = np.fft.rfftfreq(N_SAMPLES, 1 / SAMPLE_RATE)

# ---- Scales: from the normal scores of each member to a function for the scores of each ----

Functions = list[Callable[[np.ndarray], np.ndarray]]


def logs_of(scores: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(scores, LEAST_SCORE))


def by_mean(normal: Sequence[np.ndarray]) -> Functions:
    """Divide by the mean of the normal scores."""
    return [partial(np.multiply, 1 / scores.mean()) for scores in normal]


def by_scale(normal: Sequence[np.ndarray], has_spread: bool) -> Functions:
    """Move the logarithms to the average mean and, on request, standard deviation."""
    scales = [Scale.of_scores(x) for x in normal]
    if not has_spread:
        scales = [scale._replace(spread=1.0) for scale in scales]
    target = Scale(*np.mean(scales, axis=0).tolist())
    return [partial(convert, scale=scale, target=target) for scale in scales]


def convert(scores: np.ndarray, scale: Scale, target: Scale) -> np.ndarray:
    return scale.convert(torch.from_numpy(scores), target).numpy()


def by_quantiles(normal: Sequence[np.ndarray]) -> Functions:
    """Move the logarithms to the average quantiles, and beyond the last of them by a constant."""
    places = (np.arange(min(map(len, normal))) + 0.5) / min(map(len, normal))
    quantiles = [np.quantile(logs_of(x), places) for x in normal]
    target = np.mean(quantiles, axis=0)
    return [partial(move, own=own, target=target) for own in quantiles]


def move(scores: np.ndarray, own: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Move the logarithms of scores from quantiles to those of the target."""
    logs = logs_of(scores)
    beyond = logs - np.clip(logs, own[0], own[-1])
    return np.exp(np.interp(logs, own, target) + beyond)


SCALES: dict[str, Callable[[Sequence[np.ndarray]], Functions]] = {
    "as they are": lambda normal: [np.asarray] * len(normal),
    "divided by the mean": by_mean,
    "location": partial(by_scale, has_spread=False),
    "location and spread": partial(by_scale, has_spread=True),
    "quantiles": by_quantiles,
}

# ---- Means: from the scores of each member, on one scale, to that of the detector ----

MEANS: dict[str, Callable[[Sequence[np.ndarray]], np.ndarray]] = {
    "mean of log(1 + score)": lambda scores: np.expm1(np.mean(np.log1p(scores), axis=0)),
    "mean of scores": lambda scores: np.mean(scores, axis=0),
    "mean of logarithms": lambda scores: np.exp(np.mean([logs_of(x) for x in scores], axis=0)),
    "median": lambda scores: np.median(scores, axis=0),
}
MEAN, *OTHER_MEANS = MEANS
WAYS = [(scale, MEAN) for scale in SCALES]
WAYS += [("location and spread", mean) for mean in OTHER_MEANS]


class PlainScorer(DetectorScorer):
    """A scorer of a detector that averages the scores themselves."""

    def convert(self, scores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.expm1(values) for values in super().convert(scores)]

    def restore(self, means: torch.Tensor) -> torch.Tensor:
        return means


# ---- Altered clips ----


def alter(clip: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield a clip with seven alterations: slower, faster, with knocks, with a tone, with more
    treble, with a machine of another type, with a varying level.
    """
    rms = np.sqrt(np.mean(clip**2))
    for speed in (0.96, 1.04):
        yield np.interp(np.arange(N_SAMPLES) * speed % (N_SAMPLES - 1), np.arange(N_SAMPLES), clip)
    knocks = np.zeros(N_SAMPLES)
    for start in rng.integers(0, N_SAMPLES - 1600, 10):
        noise = rng.normal(0, 3 * rms, 800)
        knocks[start : start + 800] += noise * np.exp(-np.arange(800) / 150)
    yield clip + knocks
    tone = np.sin(2 * np.pi * rng.uniform(1000, 6000) * TIME)
    yield clip + 0.25 * rms * tone * (1 + np.sin(2 * np.pi * 3 * TIME))
    yield np.fft.irfft(np.fft.rfft(clip) * np.where(FREQUENCY > 2000, 2.0, 1.0), N_SAMPLES)
    yield clip + 0.25 * rms * other / np.sqrt(np.mean(other**2))
    yield clip * (1 + 0.5 * np.sin(2 * np.pi * 3 * TIME))


def alter_clips(clips: ClipSet) -> ClipSet:
    """Return clips with their altered versions, whose condition is anomalous."""
    clips.keep_on(torch.device("cpu"))
    assert clips.samples is not None
    samples, rng = clips.samples.numpy().astype(float), np.random.default_rng(0)
    types = clips.recordings["machine_type"].to_numpy()
    tables, rows = [clips.recordings.assign(condition=NORMAL)], [samples]
    for number, clip in enumerate(samples):
        others = np.flatnonzero(types != types[number])
        altered = np.stack(list(alter(clip, samples[rng.choice(others)], rng)))
        table = clips.recordings.iloc[[number] * len(altered)]
        tables.append(table.assign(condition=ANOMALOUS))
        rows.append(altered)
    both = ClipSet(pd.concat(tables), clips.num_workers, clips.windows)
    both.samples = torch.from_numpy(np.concatenate(rows).round().clip(-32768, 32767)).short()
    return both


# ---- Tables ----


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="files of trained weights")
    text = "the test clips are normal; compare them with altered versions"
    parser.add_argument("--altered", action="store_true", help=text)
    config, options = parse_command_line(parser)
    device = use_device(config.device)
    if len(options.checkpoints) < SIZE:
        raise UserError(
            f"{len(options.checkpoints)} checkpoints are no triple; name {SIZE} or more"
        )
    detector = load_detector(options.checkpoints, config).with_bank(config, TOLD_KINDS, device)
    clips = load_clips(config, detector.classes, "test", detector.windows(config, "test"))
    if options.altered:
        clips = alter_clips(clips)
    outputs = detector.run(clips, config, device)
    rates = {}
    for kind in TOLD_KINDS:
        scores = score_members(detector, outputs, clips, config, kind)
        for machine_type in detector.classes.machine_types:
            rows = accuracy_rows(*scores, clips.recordings, machine_type)
            print_table(f"{kind}, {machine_type}", pd.DataFrame(rows), digits=2)
        for rate in RATES:
            asked = config.model_copy(update={"false_alarms": rate})
            name = f"{kind}, asked: {100 * rate:g} %"
            rates[name] = average_rates(detector, outputs, clips, asked, kind)
    for machine_type in detector.classes.machine_types:
        rows = [
            {"score": name} | (100 * x.loc[machine_type]).to_dict() for name, x in rates.items()
        ]
        print_table(f"false alarms and detections, {machine_type}", pd.DataFrame(rows), digits=2)


def score_members(
    detector: Detector, outputs: DetectorOutputs, clips: ClipSet, config: Config, kind: str
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return for each member the scores of the clips, and its normal scores."""
    scores, normal = [], []
    for model, of_model in zip(detector.members, outputs.members, strict=True):
        scorer = model.scorer(kind, config.neighbours)
        scores.append(scorer.score_clips(of_model, clips.machines).numpy())
        normal.append(normal_scores(model, scorer))
    return scores, normal


def accuracy_rows(
    scores: Sequence[np.ndarray],
    normal: Sequence[np.ndarray],
    recordings: pd.DataFrame,
    machine_type: str,
) -> list[dict[str, object]]:
    """Return the rows of a machine type, from the scores of each member."""
    is_type = (recordings["machine_type"] == machine_type).to_numpy()
    of_type = recordings[is_type]
    alone = np.array([accuracies(of_type, x[is_type]) for x in scores])  # (members, 3)
    triples = [list(x) for x in itertools.combinations(range(len(scores)), SIZE)]
    means = np.array([alone[triple].mean(axis=0) for triple in triples])
    best = np.array([alone[triple].max(axis=0) for triple in triples])
    rows = [row_of("members", means.mean(axis=0)), row_of("best member", best.mean(axis=0))]
    for scale, mean in WAYS:
        together = []
        for triple in triples:
            functions = SCALES[scale]([normal[number] for number in triple])
            pairs = zip(functions, triple, strict=True)
            combined = MEANS[mean]([function(scores[number]) for function, number in pairs])
            together.append(accuracies(of_type, combined[is_type]))
        values = np.array(together)
        row = row_of(f"{scale}, {mean}", values.mean(axis=0))
        row["above members"] = f"{(values[:, 0] > means[:, 0]).sum()} of {len(triples)}"
        row["above best"] = f"{(values[:, 0] >= best[:, 0]).sum()} of {len(triples)}"
        rows.append(row)
    return rows


def row_of(name: str, values: np.ndarray) -> dict[str, object]:
    names = ("score", "mean AUC", "mean pAUC", "lowest AUC", "above members", "above best")
    return dict(zip(names, [name, *(100 * values).tolist(), "", ""], strict=True))


def accuracies(recordings: pd.DataFrame, scores: np.ndarray) -> tuple[float, float, float]:
    """Return mean AUC, mean pAUC and lowest AUC over the machine IDs of a type."""
    aucs, paucs = [], []
    for _, group in recordings.assign(score=scores).groupby("machine_id"):
        pair = group["condition"] == ANOMALOUS, group["score"]
        aucs.append(roc_auc_score(*pair))
        paucs.append(roc_auc_score(*pair, max_fpr=MAX_FPR))
    return float(np.mean(aucs)), float(np.mean(paucs)), min(aucs)


def average_rates(
    detector: Detector, outputs: DetectorOutputs, clips: ClipSet, config: Config, kind: str
) -> pd.DataFrame:
    """Return for each machine type what `measure_rates` does, for a kind of score: the mean over
    the members and, with two ways to average the scores, over the triples.
    """
    ways = {"members": (1, DetectorScorer), "together": (SIZE, DetectorScorer)}
    ways["mean of scores"] = (SIZE, PlainScorer)
    averages = []
    for name, (size, scorer_class) in ways.items():
        rates = []
        for chosen in itertools.combinations(range(len(detector.members)), size):
            part = Detector(tuple(detector.members[number] for number in chosen))
            of_part = DetectorOutputs(tuple(outputs.members[number] for number in chosen))
            scorer = part.scorer(kind, config.neighbours)
            scorer = scorer_class(scorer.members, scorer.scales)
            rates.append(measure_rates(part, of_part, clips, config, scorer))
        average = pd.concat(rates).groupby(level="machine_type").mean()
        averages.append(average.add_prefix(f"{name}: "))
    return pd.concat(averages, axis=1)


def measure_rates(
    detector: Detector,
    outputs: DetectorOutputs,
    clips: ClipSet,
    config: Config,
    scorer: DetectorScorer,
) -> pd.DataFrame:
    """Return for each machine type the share of normal and of anomalous clips that are called
    anomalous, means over the IDs with a threshold, and the share of these IDs.
    """
    thresholds = find_thresholds(detector, scorer, config)["threshold"]
    scores = scorer.score_clips(outputs, clips.machines).numpy()
    table = clips.recordings.assign(score=scores).join(thresholds, on=MACHINE_COLUMNS)
    table["decision"] = decide(table["score"], table["threshold"]).astype("Float64")
    rates = table.groupby([*MACHINE_COLUMNS, "condition"])["decision"].mean()
    shares = rates.groupby(["machine_type", "condition"]).mean().unstack().astype(float)
    shares = shares.rename(columns={NORMAL: "false alarms", ANOMALOUS: "detections"})
    has_threshold = thresholds.notna().groupby("machine_type").mean()
    return shares.assign(**{"IDs with threshold": has_threshold})


if __name__ == "__main__":
    run_script(main)
