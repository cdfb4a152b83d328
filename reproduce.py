"""Reproduce the published table: train the four modes with several seeds, evaluate the runs, and
compare them.

    # the published recipe, seeds 2023, 1 and 2
    make paper
    # other seeds; the ablation of the input channels as well
    make paper SEEDS="2023 7" INPUTS=all
    make paper DATA=/data/dcase2020                           # recordings that are already there
    make paper DATA=datasets/synthetic EPOCH=2 SEEDS="1 2"    # a rehearsal on synthetic machines
    # the same without make, and with keys of config.yaml
    python reproduce.py --seeds 1 2 --batch_size 128

Calls datasets/download.py (where data_root is the project's own folder), train.py for one seed
after the other, and eval.py. Before each run it says how many epochs are left, and how long they
will take, once an epoch has been timed. OUTPUT/comparison.md is the report: mean and deviation over
the seeds with the published figures, differences of the modes with intervals, and every run;
angles.png is in it, a panel for each mode.

Start the same command again after an interruption: finished runs are not trained again, and the one
that was interrupted goes on after its last finished epoch. Seeds can be added in the same way. An
error in a run stops the script.
"""

import argparse
import contextlib
import itertools
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
)
from losses import MODES
from model import PUBLISHED_CHANNELS
from recordings import find_classes, find_recordings
from utils import OneLineParser, UserError, check_writable, run_script

ROOT = Path(__file__).resolve().parent
SEEDS = (2023, 1, 2)
PATIENCE = 60.0  # seconds that a script may take to end after a Ctrl-C
# Checkpoints of 23 and 14 MB, a third while it is written, logs, results, figures
RUN_BYTES = 80_000_000
CHOSEN_HERE = {
    "mode": "all are trained",
    "seed": "--seeds chooses",
    "input": "--inputs chooses",
    "save_path": "--output chooses",
}


def main() -> None:
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("--seeds", nargs="+", type=int, default=SEEDS, help="of the runs (default: 2023 1 2)")
    add(
        "--inputs",
        choices=("published", "all"),
        default="published",
        help="channels of the network; all: noisy_arcmix with every other combination of them too",
    )
    add("--output", type=Path, default=Path("check_points/paper"), help="default: %(default)s")
    config, options = parse_command_line(parser)
    check_effect(config, config.windows("train"), [config.scoring])
    classes = find_classes(config)
    runs = plan_runs(config, options)
    check_writable(options.output / "comparison.md", "--output names another folder")
    check_runs(runs, options.output)
    if is_to_download(config, classes):
        call("datasets/download.py", "--types", *classes.machine_types)
    for split in ("train", "test"):  # test clips that are missing would be noticed at the very end
        find_recordings(config, classes, split)
    file = ("--config", str(options.config))
    for number, run in enumerate(runs, start=1):
        name = run.checkpoint.stem
        print(f"run {number} of {len(runs)}, {name}: {describe_rest(runs)}", flush=True)
        chosen = as_options({key: getattr(run, key) for key in CHOSEN_HERE})
        call("train.py", "--resume", *file, *given_options(config, TRAINING_KEYS), *chosen)
    weights = [str(run.checkpoint) for run in runs]
    output = ("--plots", "--output", str(options.output))
    call("eval.py", *weights, *output, *file, *given_options(config, EVALUATION_KEYS))


def plan_runs(config: Config, options: argparse.Namespace) -> list[Config]:
    """Return the configurations of the runs, one seed after the other. Raises `UserError` for a key
    of the command line that is chosen here.
    """
    for key in CHOSEN_HERE.keys() & config.given:
        raise UserError(f"command line: {key}: {CHOSEN_HERE[key]}")
    given = {key: getattr(config, key) for key in config.given}
    runs = []
    for seed in dict.fromkeys(options.seeds):
        for name, mode, channels in list_variants(options.inputs):
            save_path = str(options.output / f"{name}_{seed}.pth")
            chosen = {"mode": mode, "input": channels, "seed": seed, "save_path": save_path}
            runs.append(load_config(options.config, **given | chosen))
    return runs


def list_variants(inputs: str) -> list[tuple[str, str, list[str]]]:
    """Return name, mode and input channels of each run of a seed."""
    channels = list(PUBLISHED_CHANNELS)
    variants = [(mode, mode, channels) for mode in MODES]
    if inputs == "all":
        for size in range(1, len(channels)):
            for subset in itertools.combinations(channels, size):
                variants.append(("+".join(subset), "noisy_arcmix", list(subset)))
    return variants


def is_to_download(config: Config, classes: Classes) -> bool:
    """Whether the recordings are, or will be, those that download.py puts into the project's folder
    datasets.
    """
    root = Path(config.data_root)
    has_recordings = any((root / name).exists() for name in classes.machine_types)
    is_filled_by_hand = has_recordings and not (root / ".download").exists()
    return root.resolve() == ROOT / "datasets" and not is_filled_by_hand


def check_runs(runs: Sequence[Config], output: Path) -> None:
    """Raise `UserError` where an existing run had another configuration, or the disk is too small
    for the runs that do not exist yet.
    """
    n_missing = 0
    for run in runs:
        if run.checkpoint.exists():
            remedy = "remove it, give the same, or --output names another folder"
            check_configuration(run, load_newest(RunFiles(run.checkpoint)), remedy)
        else:
            n_missing += 1
    needed = RUN_BYTES * n_missing
    free = shutil.disk_usage(output).free
    if free < needed:
        raise UserError(
            f"{output}: the disk is too small ({needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB "
            f"free); free some space, or --output names another folder"
        )


def describe_rest(runs: Sequence[Config]) -> str:
    """Return how many epochs are left, and about how long they take, by the histories."""
    seconds: list[float] = []
    for run in runs:
        history = RunFiles(run.checkpoint).history
        if history.exists():
            seconds += pd.read_csv(history)["seconds"].tolist()
    n_left = sum(run.epoch for run in runs) - len(seconds)
    if not seconds:
        return f"{n_left} epochs left"
    rest = n_left * sum(seconds) / len(seconds)
    time = f"{rest / 3600:.1f} h" if rest >= 5400 else f"{math.ceil(rest / 60)} min"
    return f"{n_left} epochs left, about {time}"


# ---- Calling the other scripts ----


def given_options(config: Config, keys: Sequence[str]) -> list[str]:
    """Return the options that stood on the command line and that a script takes, too."""
    return as_options({key: getattr(config, key) for key in keys if key in config.given})


def as_options(values: Mapping[str, Any]) -> list[str]:
    """Return keys of the configuration with their values as options of a command line."""
    words: list[str] = []
    for key, value in values.items():
        words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return words


def call(script: str, *words: str) -> None:
    """Run a script of the project, and end with its status if that is not 0; it has said why."""
    process = subprocess.Popen([sys.executable, str(ROOT / script), *words])
    try:
        status = process.wait()
    except BaseException as stop:
        with contextlib.suppress(subprocess.TimeoutExpired):
            if isinstance(
                stop, KeyboardInterrupt
            ):  # which has reached the script too, if it came from the terminal
                process.wait(PATIENCE)
        process.terminate()
        process.wait()
        raise
    if status < 0:
        raise UserError(
            f"{script} was killed (signal {-status}); start the same command again, it goes on"
        )
    if status:
        sys.exit(status)


if __name__ == "__main__":
    run_script(main)
