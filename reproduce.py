"""Reproduce published tables: train recipes with several seeds, evaluate the runs, and compare
them.

    # the four modes of the paper with the published configuration, seeds 2023, 1 and 2
    make paper
    # other recipes, which are configuration files; other seeds
    make paper RECIPES="recipes/noisy_arcmix.yaml recipes/os_scl.yaml" SEEDS="2023 7"
    make paper RECIPES="recipes/noisy_arcmix.yaml recipes/inputs/*.yaml"    # the input channels
    make paper DATA=/data/dcase2020                           # recordings that are already there
    make paper DATA=datasets/synthetic EPOCH=2 SEEDS="1 2"    # a trial run on synthetic machines
    # without make, and with keys of config.yaml, whose values replace those of all recipes
    python reproduce.py --seeds 1 2 --batch_size 128

Runs datasets/download.py (if data_root is the project's folder datasets, unless that holds
recordings from elsewhere), train.py for one seed after the other, and eval.py. Before each run it
prints how many epochs are left and, once an epoch has been timed, how long they will take.
OUTPUT/comparison.md is the report: mean and standard deviation over the seeds of each
configuration, named by the keys that differ, for Noisy-ArcMix beside the published table;
differences between the configurations with intervals, the results of every run, and angles.png with
a panel for each configuration.

After an interruption, run the same command again: finished runs are not trained again, and the
interrupted run continues after its last finished epoch. Recipes and seeds can be added in the same
way. An error in a run stops the script.
"""

import argparse
import contextlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from checkpoint import RunFiles, check_configuration, load_newest
from classes import Classes
from config import (
    EVALUATION_KEYS,
    TRAINING_KEYS,
    Config,
    check_effect,
    load_config,
    parse_command_line,
    read_yaml,
)
from errors import UserError
from recordings import find_classes, find_recordings
from utils import OneLineParser, check_writable, run_script

ROOT = Path(__file__).resolve().parent
MODES_OF_PAPER = ("noisy_arcmix", "arcmix", "arcface", "cross_entropy")
RECIPES = tuple(ROOT / "recipes" / f"{mode}.yaml" for mode in MODES_OF_PAPER)
SEEDS = (2023, 1, 2)
PATIENCE = 60.0  # seconds that a script may take to end after a Ctrl-C
# Checkpoints of 42 and 14 MB, a third while it is written, logs, results, figures
RUN_BYTES = 120_000_000
CHOSEN_HERE = {
    "mode": "the recipes choose it; leave it out",
    "input": "the recipes choose it; leave it out",
    "seed": "use --seeds instead",
    "save_path": "use --output instead",
}
# Keys of the recordings, which all recipes share
SHARED_KEYS = ("data_root", "machines", "classes", "window", "hop", "channel")


class Run(NamedTuple):
    """A run: the file of its recipe, and its configuration."""

    recipe: Path
    config: Config


def main() -> None:
    parser = OneLineParser(description=__doc__)
    add_recipes(parser)
    add_seeds(parser)
    folder = Path("check_points/paper")
    text = "folder to write to (default: %(default)s)"
    parser.add_argument("--output", type=Path, default=folder, help=text)
    config, options = parse_command_line(parser)
    check_effect(config, config.windows("train"), [config.scoring])
    classes = find_classes(config)
    runs = plan_runs(config, options)
    check_writable(options.output / "comparison.md", "choose another folder with --output")
    check_runs(runs, options.output)
    if should_download(config, classes):
        call("datasets/download.py", "--types", *classes.machine_types)
    for split in ("train", "test"):  # missing test recordings would only be noticed at the end
        find_recordings(config, classes, split)
    files = files_as_options(options.config)
    for number, (recipe, run) in enumerate(runs, start=1):
        name = run.weights_path.stem
        print(f"run {number} of {len(runs)}, {name}: {describe_rest(runs)}", flush=True)
        chosen = as_options({"seed": run.seed, "save_path": run.save_path})
        words = (*files_as_options([recipe]), *files, *given_options(config, TRAINING_KEYS))
        call("train.py", "--resume", *words, *chosen)
    weights = [str(run.weights_path) for _, run in runs]
    output = ("--plots", "--output", str(options.output))
    call("eval.py", *weights, *output, *files, *given_options(config, EVALUATION_KEYS))


def add_recipes(parser: argparse.ArgumentParser) -> None:
    """Add --recipes."""
    text = "configuration files of the runs (default: those of the four modes of the paper)"
    parser.add_argument("--recipes", nargs="+", type=Path, default=RECIPES, help=text)


def add_seeds(parser: argparse.ArgumentParser) -> None:
    """Add --seeds."""
    text = "seeds of the runs (default: 2023 1 2)"
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help=text)


def plan_runs(config: Config, options: argparse.Namespace) -> list[Run]:
    """Return the runs, one seed after the other."""
    files = name_recipes(config, options)
    runs = []
    for seed in dict.fromkeys(options.seeds):
        for name, file in files.items():
            chosen = {"seed": seed, "save_path": str(options.output / f"{name}_{seed}.pth")}
            runs.append(Run(file, load_recipe(file, config, options, **chosen)))
    return runs


def name_recipes(config: Config, options: argparse.Namespace) -> dict[str, Path]:
    """Return the files of --recipes by their names.

    Raises:
        UserError: If the command line or a file of --config has a key of CHOSEN_HERE, a recipe has
            a key of the recordings, or two recipes have the same name.
    """
    sources = {str(file): read_yaml(file).keys() for file in options.config}
    for source, keys in ({"command line": config.given} | sources).items():
        for key in CHOSEN_HERE.keys() & keys:
            raise UserError(f"{source}: {key}: {CHOSEN_HERE[key]}")
    files: dict[str, Path] = {}
    for file in options.recipes:
        for key in set(SHARED_KEYS) & read_yaml(file).keys():
            raise UserError(f"{file}: {key} is the same for all recipes; use --{key} or --config")
        if file.stem in files:
            raise UserError(f"--recipes: two files are called {file.stem}; rename one")
        files[file.stem] = file
    return files


def load_recipe(file: Path, config: Config, options: argparse.Namespace, **chosen: Any) -> Config:
    """Return the configuration of a recipe. The files of --config, the keys of the command line and
    the `chosen` ones replace values in it, in this order.
    """
    given = {key: getattr(config, key) for key in config.given}
    return load_config(file, *options.config, **given | chosen)


def should_download(config: Config, classes: Classes) -> bool:
    """Return whether to run download.py: if data_root is the project's folder datasets, unless it
    holds recordings from elsewhere.
    """
    root = Path(config.data_root)
    has_recordings = any((root / name).exists() for name in classes.machine_types)
    is_from_elsewhere = has_recordings and not (root / ".download").exists()
    return root.resolve() == ROOT / "datasets" and not is_from_elsewhere


def check_runs(runs: Sequence[Run], output: Path) -> None:
    """Raise `UserError` if an existing run had another configuration, or if the disk is too small
    for the runs that do not exist yet.
    """
    n_missing = 0
    for _, run in runs:
        if run.weights_path.exists():
            remedy = "use the same, remove the run, or choose another folder with --output"
            check_configuration(run, load_newest(RunFiles(run.weights_path)), remedy)
        else:
            n_missing += 1
    needed = RUN_BYTES * n_missing
    free = shutil.disk_usage(output).free
    if free < needed:
        raise UserError(
            f"{output}: the disk is too small ({needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB "
            "free); free some space, or choose another folder with --output"
        )


def describe_rest(runs: Sequence[Run]) -> str:
    """Return how many epochs are left and, from the histories, about how long they take."""
    seconds: list[float] = []
    for _, run in runs:
        history = RunFiles(run.weights_path).history
        if history.exists():
            seconds += pd.read_csv(history)["seconds"].tolist()
    n_left = sum(run.epoch for _, run in runs) - len(seconds)
    if not seconds:
        return f"{n_left} epochs left"
    rest = n_left * sum(seconds) / len(seconds)
    time = f"{rest / 3600:.1f} h" if rest >= 5400 else f"{math.ceil(rest / 60)} min"
    return f"{n_left} epochs left, about {time}"


# ---- Calling the other scripts ----


def given_options(config: Config, keys: Sequence[str]) -> list[str]:
    """Return those options of the command line that a script accepts as well."""
    return as_options({key: getattr(config, key) for key in keys if key in config.given})


def as_options(values: Mapping[str, Any]) -> list[str]:
    """Return keys of the configuration with their values as options of a command line."""
    words: list[str] = []
    for key, value in values.items():
        words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return words


def files_as_options(files: Sequence[Path]) -> list[str]:
    """Return configuration files as options of a command line."""
    return [word for file in files for word in ("--config", str(file))]


def call(script: str, *words: str) -> None:
    """Run a script of the project. If it fails, it prints the reason, and this script ends with its
    exit status.
    """
    process = subprocess.Popen([sys.executable, str(ROOT / script), *words])
    try:
        status = process.wait()
    except BaseException as stop:
        with contextlib.suppress(subprocess.TimeoutExpired):
            if isinstance(stop, KeyboardInterrupt):  # a terminal sends it to the script, too
                process.wait(PATIENCE)
        process.terminate()
        process.wait()
        raise
    if status < 0:
        raise UserError(
            f"{script} was killed (signal {-status}); run the same command again to continue"
        )
    if status:
        sys.exit(status)


if __name__ == "__main__":
    run_script(main)
