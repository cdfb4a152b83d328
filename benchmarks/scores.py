"""Which score detects more with the same network: the study of docs/scores.md.

    python benchmarks/scores.py --config docs/real_recordings.yaml --data_root FOLDER

Trains the four modes with each seed, as reproduce.py does, and keeps the state after each epoch of
the last third. Then it scores the test clips under the weights of the lowest validation loss, the
last ones, and the mean of those that were kept; with the published score, the angle, and the
distance to the nearest training clips: of the own ID, or of the whole machine type, where clips of
other IDs are farther by a penalty. OUTPUT/scores.csv has a row for each run, weights and score;
OUTPUT/scores.md the means over all modes, and the differences to the published score under the best
weights, with 95 % intervals that allow for other seeds and other test clips. Runs of one seed,
which share their validation clips, count as one observation, the mean over the modes. Finished runs
are not trained again.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import trainer
from checkpoint import RunFiles, State, TrainedModel, load_checkpoint, load_model, save_checkpoint
from config import Config, parse_command_line
from corpus import machines_of_classes
from dataloader import ClipSet, load_clips
from evaluation.comparison import difference
from evaluation.metrics import NO_DOMAINS, Draws, measure
from evaluation.scoring import anomaly_scores, run_model
from evaluation.tables import markdown_header, markdown_row
from inference import Outputs, pack_embeddings
from reproduce import SEEDS, plan
from train import train
from utils import OneLineParser, UserError, run_script, use_device, write_csv, write_text

NEIGHBOURS = (1, 2, 4, 8)
PENALTIES = (0.0, 0.1, 0.3)  # cosine distance added to clips of other IDs
BASE = ("best", "published")  # what all others are compared with
Pairs = dict[tuple[str, str], Draws]  # what one run gives, by (weights, score)
Measured = dict[str, Pairs]  # by run
ROWS = {"mean AUC": "mean", "lowest AUC": "min"}  # of the metrics of a machine type


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=SEEDS, help="of the runs (default: 2023 1 2)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("check_points/scores"), help="default: %(default)s"
    )
    _, options, given = parse_command_line(parser)
    runs = plan(argparse.Namespace(**vars(options), inputs="published"), given)
    measured: Measured = {}
    for run in runs:
        train_and_keep(run)
        measured[run.checkpoint.stem] = dict(measure_run(run))
    seeds = [[measured[run.checkpoint.stem] for run in runs if run.seed == seed]
             for seed in dict.fromkeys(options.seeds)]  # fmt: skip
    text = "\n".join(["## All modes, in percent", "", *difference_table(seeds), ""])
    print(text)
    write_text(options.output / "scores.md", text)
    write_csv(options.output / "scores.csv", all_rows(measured))


# ---- Training ----


def states_folder(run: Config) -> Path:
    return RunFiles(run.checkpoint).folder / "states"


def train_and_keep(run: Config) -> None:
    """Train, or go on after an interruption; the last state of each epoch of the last third stays
    in `states`.
    """
    last, folder = RunFiles(run.checkpoint).last, states_folder(run)
    folder.mkdir(parents=True, exist_ok=True)

    def keep(epoch: int) -> None:
        kept = folder / f"{epoch:03d}.pth"
        if epoch > run.epoch * 2 / 3 and not kept.exists():
            os.link(last, kept)

    def save_and_keep(state: State, *paths: Path) -> None:
        save_checkpoint(state, *paths)
        if last in paths:
            keep(state["epoch"])

    if last.exists():  # the interruption may have come between the two
        keep(load_checkpoint(last)["epoch"])
    trainer.save_checkpoint = save_and_keep
    train(run, resume=True)


# ---- Scores ----


def measure_run(run: Config) -> Iterator[tuple[tuple[str, str], Draws]]:
    """The metrics of each pair (weights, score)."""
    device, files = use_device(run.device), RunFiles(run.checkpoint)
    training, _ = load_clips(run, "train").split(run.split_ratio, run.seed)
    test = load_clips(run, "test")
    best = load_model(files.best, run, {})
    last = load_checkpoint(files.last)["model"]
    states = [load_checkpoint(path)["model"] for path in sorted(states_folder(run).glob("*.pth"))]
    if len(states) != (expected := run.epoch - run.epoch * 2 // 3):
        raise UserError(
            f"{states_folder(run)}: {len(states)} states, not the {expected} of the last third; remove the run, and it "
            f"is trained again"
        )
    for weights, model in {
        "best": best.state["model"],
        "last": last,
        "mean": mean_of(states),
    }.items():
        best.network.load_state_dict(model)
        bank = pack_embeddings(run_model(best, training, device).embedding, training.labels)
        trained = replace(best, state={"embeddings": {"bank": bank}})
        for name, scores in all_scores(trained, run_model(best, test, device), test):
            yield (weights, name), measure(test.clips.assign(score=scores)).draws


def mean_of(states: list[State]) -> State:
    """The mean of weights and of the statistics of batch norm."""
    return {
        name: torch.stack([state[name].double() for state in states]).mean(dim=0).to(value.dtype)
        for name, value in states[0].items()
    }


def all_scores(
    trained: TrainedModel, outputs: Outputs, clips: ClipSet
) -> Iterator[tuple[str, np.ndarray]]:
    def scores(**keys) -> np.ndarray:
        return anomaly_scores(
            replace(trained, config=trained.config.model_copy(update=keys)), outputs, clips.labels
        )

    yield "published", scores(scoring="published")
    yield "angle", scores(scoring="angle")
    for count in NEIGHBOURS:
        yield f"nearest {count}", scores(scoring="nearest", neighbours=count)
    for penalty in PENALTIES:
        distances = type_distances(trained, outputs.embedding, clips.labels, penalty)
        yield f"nearest 2 of the type, penalty {penalty}", distances


def type_distances(
    trained: TrainedModel, embedding: Tensor, labels: Tensor, penalty: float
) -> np.ndarray:
    """The mean of the two smallest distances to clips of the machine type, those of other IDs
    larger by the penalty.
    """
    bank, normalise = trained.state["embeddings"]["bank"], torch.nn.functional.normalize
    distances = 1.0 - normalise(embedding.double()) @ normalise(bank["embedding"].double()).T
    types, ids = np.array(machines_of_classes(trained.config)).T
    own, other = labels.numpy()[:, None], bank["label"].numpy()[None]
    distances += penalty * torch.from_numpy(ids[own] != ids[other])
    distances[torch.from_numpy(types[own] != types[other])] = torch.inf
    return distances.topk(2, largest=False).values.mean(dim=1).numpy()


# ---- Tables ----


def machine_types(pairs: Pairs) -> list[str]:
    return list(dict.fromkeys(machine_type for machine_type, _ in next(iter(pairs.values()))))


def auc(draws: Draws, machine_type: str, row: str) -> np.ndarray:
    """In percent, of the clips themselves and of all draws `(1 + DRAWS, 1)`."""
    return 100 * draws[machine_type, row][:, [NO_DOMAINS.columns.index("AUC")]]


def difference_table(seeds: Sequence[Sequence[Pairs]]) -> list[str]:
    """For each pair (weights, score) the mean over the runs of each seed, the difference to BASE
    with its interval, and in how many runs it is higher.
    """
    one_run = seeds[0][0]
    lines = markdown_header(
        "weights, score", [f"{name}: {title}" for name in machine_types(one_run) for title in ROWS]
    )
    for pair in one_run:
        cells = []
        for machine_type, row in itertools.product(machine_types(one_run), ROWS.values()):
            one, base = (
                np.array([[auc(run[key], machine_type, row) for run in runs] for runs in seeds])
                for key in (pair, BASE)
            )  # (seeds, modes, 1 + DRAWS, 1)
            cell = f"{one[:, :, 0].mean():.2f}"
            if pair != BASE:
                gain = (one - base).mean(axis=1)  # of the same runs
                value, half = difference(gain, np.zeros_like(gain))
                higher = one[:, :, 0] - base[:, :, 0] > 1e-9  # ties do not count
                cell += f", {value[0]:+.2f} ± {half[0]:.2f}, {higher.sum()} of {higher.size}"
            cells.append(cell)
        lines.append(markdown_row(", ".join(pair), cells))
    return lines


def all_rows(measured: Measured) -> pd.DataFrame:
    """Each run, weights and score: the AUC of every row of the metrics, in percent."""
    return pd.DataFrame(
        {"run": name, "weights": weights, "score": score}
        | {
            f"{machine_type} {row}": round(100 * drawn[0, 0], 2)
            for (machine_type, row), drawn in draws.items()
        }
        for name, pairs in measured.items()
        for (weights, score), draws in pairs.items()
    )


if __name__ == "__main__":
    run_script(main)
