"""Compare the scores that a network can give: the study of docs/scores.md.

    python benchmarks/scores.py --config docs/real_recordings.yaml --data_root FOLDER

The four modes are trained with each seed, as by reproduce.py, and the states after the epochs of
the last third are stored. The test clips are then scored with three sets of weights: those of the
lowest validation loss, the last ones, and the mean of the stored states. The scores are the
published one, the angle, and the distance to the nearest training clips, either of the same machine
ID or of the machine type. In the latter case a penalty is added to the distance to other IDs.

OUTPUT/scores.csv has a row for each run, weights and score. OUTPUT/scores.md has the means over all
modes, and the differences to the published score with the best weights. Their 95 % intervals cover
other seeds and other test clips. The runs of a seed share their validation clips and count as one
observation, the mean over the modes. Finished runs are not trained again.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import Checkpoint, RunFiles
from classes import Classes, Machine
from command_line import OneLineParser
from config import Config, parse_command_line
from dataloader import load_clips
from errors import UserError
from evaluation.comparison import difference
from evaluation.metrics import Metrics, measure
from evaluation.scores import Outputs, StoredClips, cosine_similarity, over_windows
from evaluation.tables import markdown_header, markdown_row
from inference import Model, embed, load_model, make_bank, run_model
from names import MEAN, MIN
from reproduce import RECIPES, add_seeds, plan_runs
from train import train
from trainer import Trainer
from utils import run_script, use_device, write_csv, write_text

NEIGHBOURS = (1, 2, 4, 8)
PENALTIES = (0.0, 0.1, 0.3)  # cosine distance added to clips of other IDs
BASE = ("best", "published")  # the baseline of all differences
ROWS = {"mean AUC": MEAN, "lowest AUC": MIN}  # of the metrics of a machine type
RunMetrics = dict[tuple[str, str], Metrics]  # of one run, by (weights, score)
Weights = dict[str, Tensor]


def main() -> None:
    parser = OneLineParser(description=__doc__)
    add_seeds(parser)
    folder = Path("check_points/scores")
    parser.add_argument("--output", type=Path, default=folder, help="default: %(default)s")
    parser.set_defaults(recipes=RECIPES)
    config, options = parse_command_line(parser)
    by_seed: dict[int, list[RunMetrics]] = {}
    tables = []
    for _, run in plan_runs(config, options):
        train_and_store(run)
        metrics = dict(measure_run(run))
        by_seed.setdefault(run.seed, []).append(metrics)
        tables.append(auc_table(run.weights_path.stem, metrics))
    seeds = list(by_seed.values())
    text = "\n".join(["## All modes, in percent", "", *difference_table(seeds), ""])
    print(text)
    write_text(options.output / "scores.md", text)
    write_csv(options.output / "scores.csv", pd.concat(tables))


# ---- Training ----


class StoringTrainer(Trainer):
    """A trainer that stores the states after the epochs of the last third."""

    def save(self, scores: np.ndarray, is_best: bool) -> None:
        super().save(scores, is_best)
        store_state(self.config)


def train_and_store(run: Config) -> None:
    """Train or resume a run; store the states after the epochs of the last third."""
    if RunFiles(run.weights_path).last.exists():
        store_state(run)  # an interruption may have come between saving and storing
    with mock.patch("train.Trainer", StoringTrainer):
        train(run, resume=True)


def store_state(run: Config) -> None:
    """Store the last checkpoint of a run, if its epoch is in the last third."""
    last = RunFiles(run.weights_path).last
    epoch = Checkpoint.load(last).epoch
    assert epoch
    path = states_folder(run) / f"{epoch:03d}.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    if epoch > run.epoch * 2 / 3 and not path.exists():
        os.link(last, path)


def states_folder(run: Config) -> Path:
    return RunFiles(run.weights_path).folder / "states"


# ---- Scores ----


def measure_run(run: Config) -> Iterator[tuple[tuple[str, str], Metrics]]:
    """Yield each pair (weights, score) with its metrics."""
    device, files = use_device(run.device), RunFiles(run.weights_path)
    model = load_model(files.best, run)
    clips = load_clips(run, model.classes, "train", run.windows("train"))
    train_clips, _ = clips.split(run.split_ratio, run.seed)
    test_clips = load_clips(run, model.classes, "test", run.windows("test"))
    recordings = test_clips.recordings
    all_weights = {
        "best": model.checkpoint.weights,
        "last": Checkpoint.load(files.last).weights,
        "mean": average_weights(load_states(run)),
    }
    for name, weights in all_weights.items():
        model.network.load_state_dict(weights)
        outputs = embed(model, train_clips, run, device)
        bank = make_bank(outputs, train_clips, model.classes, Path(run.data_root))
        with_bank = replace(model, checkpoint=replace(model.checkpoint, bank=bank))
        outputs = run_model(with_bank, test_clips, run, device)
        for score, values in all_scores(with_bank, outputs, test_clips.machines):
            combined = over_windows(values.numpy(), test_clips.clip_recordings, run.over_windows)
            yield (name, score), measure(recordings.assign(score=combined))


def load_states(run: Config) -> list[Weights]:
    """Load the weights of the stored states. Raises `UserError` if their number is wrong."""
    folder, expected = states_folder(run), run.epoch - run.epoch * 2 // 3
    paths = sorted(folder.glob("*.pth"))
    if len(paths) != expected:
        raise UserError(
            f"{folder}: {len(paths)} states, not the {expected} of the last third; remove the run, "
            "and it is trained again"
        )
    return [Checkpoint.load(path).weights for path in paths]


def average_weights(states: Sequence[Weights]) -> Weights:
    """Return the mean of the weights and of the batch norm statistics."""
    mean = {}
    for name, value in states[0].items():
        values = torch.stack([state[name].double() for state in states])
        mean[name] = values.mean(dim=0).to(value.dtype)
    return mean


def all_scores(
    model: Model, outputs: Outputs, machines: Sequence[Machine]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the values `(n,)` of each score of clips of these machines `(n,)`."""
    yield "published", model.scorer("published").score_clips(outputs, machines)
    yield "angle", model.scorer("angle").score_clips(outputs, machines)
    for count in NEIGHBOURS:
        scorer = model.scorer("nearest", count)
        yield f"nearest {count}", scorer.score_clips(outputs, machines)
    bank = model.checkpoint.bank
    assert bank
    for penalty in PENALTIES:
        distances = type_distances(bank.clips, model.classes, outputs.embedding, machines, penalty)
        yield f"nearest 2 of the type, penalty {penalty}", distances


def type_distances(
    bank: StoredClips,
    classes: Classes,
    embedding: Tensor,
    machines: Sequence[Machine],
    penalty: float,
) -> Tensor:
    """Return the mean of the two smallest distances `(n,)` from embeddings `(n, E)` of clips of
    these machines to training clips of the machine type. Clips of other IDs are farther by the
    penalty.
    """
    distances = 1.0 - cosine_similarity(embedding, bank.embedding)  # (n, clips of the bank)
    types, ids = np.array(machines).T
    bank_machines = [classes.entries[label].machine for label in bank.labels]
    bank_types, bank_ids = np.array(bank_machines).T
    distances += penalty * torch.from_numpy(ids[:, None] != bank_ids)
    distances[torch.from_numpy(types[:, None] != bank_types)] = torch.inf
    return distances.topk(2, largest=False).values.mean(dim=1)


# ---- Tables ----


def difference_table(seeds: Sequence[Sequence[RunMetrics]]) -> list[str]:
    """Make a table with a row for each pair (weights, score), from the metrics of the runs of each
    seed.

    It has the mean over all runs, the difference to BASE with its interval, and the number of runs
    in which it is higher.
    """
    first_run = seeds[0][0]
    machine_types = first_run[BASE].machine_types
    titles = [f"{machine_type}: {title}" for machine_type in machine_types for title in ROWS]
    lines = markdown_header("weights, score", titles)
    for pair in first_run:
        cells = []
        for machine_type in machine_types:
            for row in ROWS.values():
                aucs = all_aucs(seeds, pair, machine_type, row)
                base = all_aucs(seeds, BASE, machine_type, row)
                cells.append(format_mean(aucs) + ("" if pair == BASE else format_gain(aucs, base)))
        lines.append(markdown_row(", ".join(pair), cells))
    return lines


def all_aucs(
    seeds: Sequence[Sequence[RunMetrics]], pair: tuple[str, str], machine_type: str, row: str
) -> np.ndarray:
    """Return the AUC in percent in all runs `(seeds, modes, 1 + DRAWS)`: that of the clips
    themselves, then those of the bootstrap draws.
    """
    values = [[run[pair].rows[machine_type, row].values["AUC"] for run in runs] for runs in seeds]
    return 100 * np.array(values)


def format_mean(aucs: np.ndarray) -> str:
    return f"{aucs[:, :, 0].mean():.2f}"


def format_gain(aucs: np.ndarray, base: np.ndarray) -> str:
    """Format the difference of two scores with its interval, and in how many runs it is above 0."""
    gain = (aucs - base).mean(axis=1)  # of each seed
    value, half = difference(gain, np.zeros_like(gain))
    is_higher = aucs[:, :, 0] - base[:, :, 0] > 1e-9  # ties do not count
    return f", {value:+.2f} ± {half:.2f}, {is_higher.sum()} of {is_higher.size}"


def auc_table(run: str, metrics: RunMetrics) -> pd.DataFrame:
    """Make a table with a row for each weights and score of a run: all AUC values, in percent."""
    lines = []
    for (weights, score), pair_metrics in metrics.items():
        line: dict[str, str | float] = {"run": run, "weights": weights, "score": score}
        for (machine_type, machine), row in pair_metrics.rows.items():
            line[f"{machine_type} {machine}"] = round(100 * row.values["AUC"][0], 2)
        lines.append(line)
    return pd.DataFrame(lines)


if __name__ == "__main__":
    run_script(main)
