"""Train recipes with many seeds in one process, to test whether they differ significantly.

    python benchmarks/seeds.py --config docs/real_recordings.yaml --data_root FOLDER --seeds 30
    # continue for at most ten minutes
    python benchmarks/seeds.py --config docs/real_recordings.yaml --data_root FOLDER --minutes 10
    # other recipes than those of the four modes
    python benchmarks/seeds.py --config docs/real_recordings.yaml --data_root FOLDER \\
        --recipes recipes/noisy_arcmix.yaml docs/real_os_scl.yaml

The values in the files of --config replace those of the recipes. The recordings are read once and
stay in the memory of the device. A run trains as train.py does, but writes no checkpoints; the
weights of the lowest validation loss are evaluated as eval.py does. OUTPUT/seeds.csv gets a row
after each run: recipe, seed, epoch of the weights, validation loss, and AUC and pAUC of each
machine ID for each kind of score, as fractions. OUTPUT/seeds.md has means and the differences
between the recipes, whose intervals cover other seeds but not other test clips. When started again,
the script continues with the missing runs; recipes can be added. Several processes may share the
work: give each other recipes and another folder. Then append the rows of their seeds.csv to that of
one of them, and start the script there with all recipes. A run with the 285 recordings of
docs/real_recordings.md takes a quarter of an hour on two cores.

To copy the recordings to another machine in parts:

1. Here, convert them to FLAC, which is half as large, in a folder for each part:

       import pathlib, soundfile
       for wav in pathlib.Path("FOLDER/slider/train").glob("*.wav"):
           flac = pathlib.Path("part_1/slider/train", wav.stem + ".flac")
           flac.parent.mkdir(parents=True, exist_ok=True)
           soundfile.write(flac, *soundfile.read(wav, dtype="int16"))

   The recordings of docs/real_recordings.md take 42 MB (slider/train), 30 MB (slider/test) and
   18 MB (valve).
2. There, copy each part to a folder that persists:
   `mkdir -p ~/recordings && cp -r part_1/* ~/recordings/`.
3. After the last part, run `python3 benchmarks/seeds.py --config docs/real_recordings.yaml
   --data_root ~/recordings --minutes 5 --output DIR`. If a part is missing, the error names its
   folder. To continue in another call, copy OUTPUT/seeds.csv and OUTPUT/seeds.json to DIR.
"""

import copy
import itertools
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import Checkpoint, check_configuration
from classes import Classes
from command_line import OneLineParser
from config import Config, make_config, parse_command_line
from dataloader import ClipSet, check_clips, load_clips
from detector import Detector
from errors import UserError
from evaluation.metrics import COVERAGE
from evaluation.result import evaluate
from evaluation.scores import KINDS
from evaluation.tables import markdown_header, markdown_row
from inference import Model
from names import SUMMARY_ROWS
from recordings import find_classes
from reproduce import add_recipes, load_recipe, name_recipes
from trainer import Trainer
from utils import check_writable, run_script, use_device, write_csv, write_text

METRICS = ("AUC", "pAUC")


def main() -> None:
    parser = OneLineParser(description=__doc__)
    add_recipes(parser)
    text = "of each recipe, from 1 on (default: %(default)s)"
    parser.add_argument("--seeds", type=int, default=30, help=text)
    text = "after which no run begins (default: no limit)"
    parser.add_argument("--minutes", type=float, default=np.inf, help=text)
    folder = Path("check_points/seeds")
    parser.add_argument("--output", type=Path, default=folder, help="default: %(default)s")
    config, options = parse_command_line(parser)
    end = time.monotonic() + 60 * options.minutes
    recipes = {
        name: load_recipe(file, config, options, tensorboard=False)
        for name, file in name_recipes(config, options).items()
    }
    for name, recipe in recipes.items():
        if recipe.init_from:
            raise UserError(f"{name}: init_from is not supported here: every run begins anew")
    classes = find_classes(config)
    device = use_device(config.device)
    clips, test_clips = (
        load_clips(config, classes, split, config.windows(split)) for split in ("train", "test")
    )
    rows = find_rows(options.output, recipes, classes, describe_clips(clips, test_clips))
    clips.keep_on(device)
    test_clips.keep_on(device)
    finished = {(row["recipe"], row["seed"]) for row in rows}
    for seed, name in itertools.product(range(1, options.seeds + 1), recipes):
        if (name, seed) in finished:
            continue
        if time.monotonic() > end:
            print(f"{options.minutes:g} minutes are over; run the same command again to continue")
            break
        run = recipes[name].model_copy(update={"seed": seed})
        row = {"recipe": name} | measure_run(run, classes, device, clips, test_clips)
        rows.append(row)
        write_csv(options.output / "seeds.csv", pd.DataFrame(rows))
        aucs = [value for name, value in row.items() if re.fullmatch("published/.*/AUC", name)]
        line = f"{name}, seed {seed}: mean AUC {100 * np.mean(aucs):.2f}, {row['seconds']:.1f} s"
        print(line, flush=True)
    if rows:
        text = "\n".join(summarise(pd.DataFrame(rows)))
        print("\n" + text)
        write_text(options.output / "seeds.md", text + "\n")


def describe_clips(clips: ClipSet, test_clips: ClipSet) -> dict[str, Any]:
    """Return which clips are used, in plain values."""
    names = [f"{row.machine_type}/{row.path.name}" for row in test_clips.recordings.itertuples()]
    return {"train": clips.fingerprint(), "test": names}


def find_rows(
    folder: Path, recipes: dict[str, Config], classes: Classes, clips: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the rows of the finished runs, and write the recipes and clips beside them.

    Raises:
        UserError: If they had other clips, or other values in a recipe of the same name.
    """
    about, table = folder / "seeds.json", folder / "seeds.csv"
    check_writable(about, "choose another folder with --output")
    now = {name: recipe.model_dump() for name, recipe in recipes.items()}
    if not table.exists():
        write_text(about, json.dumps({"recipes": now, "clips": clips}))
        return []
    try:
        before = json.loads(about.read_text())
        former_clips, former_recipes = before["clips"], before["recipes"]
        rows: list[Any] = pd.read_csv(table, dtype={"recipe": str}).to_dict("records")
    except (OSError, ValueError, KeyError):
        message = f"{folder}: seeds.csv and seeds.json are not both readable; remove them"
        raise UserError(message) from None
    if former_clips != clips:
        message = f"{about}: the finished runs had other clips; choose another folder with --output"
        raise UserError(message)
    for name in recipes.keys() & former_recipes.keys():
        values = make_config((str(about), former_recipes[name]))
        checkpoint = Checkpoint(about, {}, values, classes)
        remedy = "use the same, or choose another folder with --output"
        check_configuration(recipes[name], checkpoint, remedy)
    write_text(about, json.dumps({"recipes": former_recipes | now, "clips": clips}))
    return rows


def measure_run(
    config: Config, classes: Classes, device: torch.device, clips: ClipSet, test_clips: ClipSet
) -> dict[str, Any]:
    """Train and evaluate a run; return its row of the table."""
    start = time.monotonic()
    trainer = train_run(config, classes, device, clips)
    row: dict[str, Any] = {
        "seed": config.seed,
        "epoch": trainer.best.epoch,
        "loss": trainer.best_loss,
    }
    detector = Detector((trainer.best_model(),))
    outputs = detector.run(test_clips, config, device)
    for result in evaluate(detector, test_clips, outputs, config, "test", list(KINDS)):
        assert result.metrics  # the clips of the folder `test` have a condition
        table = result.metrics.table
        for machine_type, name in table.index[~table.index.isin(SUMMARY_ROWS, level=1)]:
            for metric in METRICS:
                column = f"{result.kind}/{machine_type}/{name}/{metric}"
                row[column] = table.loc[(machine_type, name), metric]
    return row | {"seconds": time.monotonic() - start}


def train_run(
    config: Config, classes: Classes, device: torch.device, clips: ClipSet
) -> "TrainerInMemory":
    """Train to the last epoch."""
    train_clips, valid_clips = clips.split(config.split_ratio, config.seed)
    check_clips(config, train_clips, valid_clips)
    trainer = TrainerInMemory(config, classes, device, train_clips, valid_clips)
    trainer.fit()
    return trainer


class TrainerInMemory(Trainer):
    """A trainer that writes no files, and prints no lines about epochs.

    Attributes:
        best: The checkpoint of the lowest validation loss.
    """

    best: Checkpoint

    def save(self, scores: np.ndarray, is_best: bool) -> None:
        if is_best:
            self.best = copy.deepcopy(self.make_checkpoint(scores))

    def report(self, is_best: bool, log: Any) -> None:
        pass

    def best_model(self) -> Model:
        """Return the model of the best checkpoint, with the embeddings of all clips."""
        checkpoint = self.complete(self.best)
        return Model(self.scored_network.eval(), self.config, self.classes, checkpoint)


# ---- The summary ----


def summarise(table: pd.DataFrame) -> Iterator[str]:
    """Yield the lines of two tables for each score: mean AUC by recipe, and their differences.

    The AUC is averaged over the machine IDs of a type. The first table has the mean and standard
    deviation over the seeds. The second one has the differences between runs of the same seed.
    """
    values = table.melt(
        ["recipe", "seed"], [name for name in table.columns if name.endswith("/AUC")]
    )
    values[["score", "type", "id", "metric"]] = values["variable"].str.split("/", expand=True)
    auc = 100 * values.groupby(["score", "type", "recipe", "seed"])["value"].mean()
    types, recipes = values["type"].unique().tolist(), table["recipe"].unique().tolist()
    for score in KINDS:
        yield from ("", f"## {score}: mean AUC of the machine IDs, in percent", "")
        yield from markdown_header("recipe", types)
        for name in recipes:
            runs = [auc[score, machine_type, name] for machine_type in types]
            yield markdown_row(f"{name} (n = {len(runs[0])})", [spread(run) for run in runs])
        yield ""
        yield from markdown_header(f"difference ({COVERAGE:.0%} interval)", types)
        for one, other in itertools.combinations(recipes, 2):
            pairs = [(auc[score, name, one] - auc[score, name, other]).dropna() for name in types]
            yield markdown_row(f"{one} minus {other}", [interval(pair) for pair in pairs])


def spread(values: pd.Series) -> str:
    """Format the mean of some values and, of several, their standard deviation."""
    mean = f"{values.mean():.2f}"
    return f"{mean} ± {values.std():.2f}" if len(values) > 1 else mean


def interval(differences: pd.Series) -> str:
    """Format the mean of the differences and its interval by Student's t."""
    count = len(differences)
    if count < 2:
        return "-"
    half = scipy.stats.t.ppf((1 + COVERAGE) / 2, count - 1) * differences.std() / np.sqrt(count)
    mean = differences.mean()
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


if __name__ == "__main__":
    run_script(main)
