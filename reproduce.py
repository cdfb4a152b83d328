"""Reproduce published tables: train recipes with several seeds, evaluate the runs, and compare
them.

    # the four modes of the paper with the published configuration, seeds 2023, 1 and 2
    make paper
    # other recipes, which are configuration files; other seeds
    make paper RECIPES="recipes/noisy_arcmix.yaml recipes/os_scl.yaml" SEEDS="2023 7"
    make paper RECIPES="recipes/noisy_arcmix.yaml recipes/inputs/*.yaml"    # the input channels
    make paper DATA=/data/dcase2020                           # recordings that are already there
    make paper DATA=datasets/synthetic EPOCH=2 SEEDS="1 2"    # a trial run on synthetic machines
    # on two GPUs at once; computers that share the folder can do the same
    CUDA_VISIBLE_DEVICES=0 make paper & CUDA_VISIBLE_DEVICES=1 make paper
    # without make, and with keys of config.yaml, whose values replace those of all recipes
    python reproduce.py --seeds 1 2 --batch_size 128

Runs datasets/download.py (if data_root is the project's folder datasets, unless that holds
recordings from elsewhere), train.py for one seed after the other, and eval.py. Before each run it
prints how many epochs are left and, once an epoch has been timed, how long they will take.
OUTPUT/comparison.md is the report of several runs: mean and standard deviation over the seeds of
each configuration, named by the keys that differ, for Noisy-ArcMix beside the published table;
differences between the configurations with intervals, the results of every run, and angles.png with
a panel for each configuration.

After an interruption, run the same command again: finished runs are not trained again, and the
interrupted run continues after its last finished epoch. Recipes and seeds can be added in the same
way. An error in a run stops the process that trains it.

The same command can be started several times, by processes on one or several computers that share
OUTPUT. Each trains the next run that is not finished and that no other one trains. One that finds
none waits until all are finished, and continues a run whose process has died: at once on the same
computer, after five minutes on another one. One of them writes the report.
"""

import argparse
import contextlib
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from checkpoint import Checkpoint, RunFiles, check_configuration, load_newest
from classes import Classes
from command_line import OneLineParser
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
from locks import Lock, lock
from recordings import find_classes, find_recordings
from utils import check_writable, notice, run_script

ROOT = Path(__file__).resolve().parent
MODES_OF_PAPER = ("noisy_arcmix", "arcmix", "arcface", "cross_entropy")
RECIPES = tuple(ROOT / "recipes" / f"{mode}.yaml" for mode in MODES_OF_PAPER)
SEEDS = (2023, 1, 2)
POLL = 5.0  # seconds after which to look for a free run again
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

    @property
    def files(self) -> RunFiles:
        return RunFiles(self.config.weights_path)

    @property
    def name(self) -> str:
        return self.config.weights_path.stem

    def is_finished(self) -> bool:
        """Whether all epochs are trained, and the best weights have the embeddings of the clips."""
        history = self.files.history
        if not history.exists() or len(pd.read_csv(history)) < self.config.epoch:
            return False
        return self.files.best.exists() and Checkpoint.load(self.files.best).bank is not None


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
    report = Report(options.output)
    files = files_as_options(options.config)
    words = (*files, *given_options(config, TRAINING_KEYS))

    def train(run: Run) -> None:
        number = f"run {runs.index(run) + 1} of {len(runs)}"
        print(f"{number}, {run.name}: {describe_rest(runs)}", flush=True)
        chosen = as_options({"seed": run.config.seed, "save_path": run.config.save_path})
        call("train.py", "--resume", *files_as_options([run.recipe]), *words, *chosen)

    train_all(runs, train)
    with lock(options.output / ".report.lock", waits=True):
        if report.is_written_by_another(runs):
            print(f"{report.path}: another process has written it")
            return
        weights = [str(run.files.best) for run in runs]
        output = ("--output", str(options.output)) if len(runs) > 1 else ()
        chosen = given_options(config, EVALUATION_KEYS)
        call("eval.py", *weights, "--plots", *output, *files, *chosen)


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
    for run in runs:
        if run.files.best.exists():
            remedy = "use the same, remove the run, or choose another folder with --output"
            check_configuration(run.config, load_newest(run.files), remedy)
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
    """Return how many epochs are left and, from the histories, about how long a single process
    takes for them.
    """
    seconds: list[float] = []
    for run in runs:
        if run.files.history.exists():
            seconds += pd.read_csv(run.files.history)["seconds"].tolist()
    n_left = sum(run.config.epoch for run in runs) - len(seconds)
    if not seconds:
        return f"{n_left} epochs left"
    rest = n_left * sum(seconds) / len(seconds)
    time = f"{rest / 3600:.1f} h" if rest >= 5400 else f"{math.ceil(rest / 60)} min"
    return f"{n_left} epochs left, about {time}"


# ---- Several processes ----


class Job:
    """A run that is to be trained by one process at a time, which holds its claim. train.py holds
    the lock of the run: it may go on after its caller has died, or have another caller.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.claim, self.lock = Lock(run.files.claim), Lock(run.files.lock)

    def train_if_free(self, train: Callable[[Run], None]) -> bool:
        """Train the run, if it is not finished and no other process trains it. Returns whether it
        was.
        """
        # First, since the time without a refresh counts from the first attempt
        is_free = self.lock.clear()
        if not self.claim.take():
            return False
        with self.claim.hold():
            if not is_free or self.run.is_finished():
                return False
            train(self.run)
            return True

    @property
    def holder(self) -> str:
        """The process that trains the run, as in "process 17 on host"."""
        return (self.lock if self.lock.is_held() else self.claim).holder


def train_all(runs: Sequence[Run], train: Callable[[Run], None]) -> None:
    """Train each run that is not finished and that no other process trains, until all are
    finished.
    """
    jobs = [Job(run) for run in runs]
    left = jobs
    waits_for: list[str] = []
    while left := [job for job in left if not job.run.is_finished()]:
        trained = next((job for job in left if job.train_if_free(train)), None)
        if trained:
            left.remove(trained)
            continue
        names = [job.run.name for job in left]
        if names != waits_for:
            holders = ", ".join(f"{job.run.name} ({job.holder})" for job in left)
            notice(
                f"no run is left to begin; waiting for {holders}, to continue a run whose process "
                "dies and to write the report. If this device is needed elsewhere, stop this "
                "process; the others go on"
            )
        waits_for = names
        time.sleep(POLL)
    for job in jobs:
        if job.claim.is_held():  # by a process that died while its train.py finished the run
            job.claim.clear()


class Report:
    """The report in a folder, and whether another process writes it in the meantime."""

    def __init__(self, folder: Path) -> None:
        self.path, self.table = folder / "comparison.md", folder / "comparison.csv"
        self.before = self.last_change()

    def last_change(self) -> int:
        return self.table.stat().st_mtime_ns if self.table.exists() else 0

    def is_written_by_another(self, runs: Sequence[Run]) -> bool:
        """Whether another process has written the report of these runs since this one began."""
        if self.last_change() == self.before:
            return False
        names = {Path(path).name for path in pd.read_csv(self.table)["checkpoint"]}
        return names == {run.files.best.name for run in runs}


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
