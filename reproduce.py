"""Reproduce the published table: train the four modes with several seeds, evaluate the runs, and
compare them.

    # the published recipe, seeds 2023, 1 and 2
    make paper
    # other seeds; also the ablation of the input channels
    make paper SEEDS="2023 7" INPUTS=all
    make paper DATA=/data/dcase2020                           # recordings that are already there
    make paper DATA=datasets/synthetic EPOCH=2 SEEDS="1 2"    # a trial run on synthetic machines
    # without make, and with keys of config.yaml
    python reproduce.py --seeds 1 2 --batch_size 128

Runs datasets/download.py (if data_root is the project's folder datasets, unless that holds
recordings from elsewhere), train.py for one seed after the other, and eval.py. Before each run it
prints how many epochs are left and, once an epoch has been timed, how long they will take.
OUTPUT/comparison.md is the report: mean and standard deviation over the seeds beside the published
table, differences between the modes with intervals, the results of every run, and angles.png with
one panel per mode.

After an interruption, run the same command again: finished runs are not trained again, and the
interrupted run continues after its last finished epoch. Seeds can be added in the same way. An
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
from errors import UserError
from losses import MODES
from model import PUBLISHED_CHANNELS
from recordings import find_classes, find_recordings
from utils import OneLineParser, check_writable, run_script

ROOT = Path(__file__).resolve().parent
SEEDS = (2023, 1, 2)
PATIENCE = 60.0  # seconds that a script may take to end after a Ctrl-C
# Checkpoints of 42 and 14 MB, a third while it is written, logs, results, figures
RUN_BYTES = 120_000_000
CHOSEN_HERE = {
    "mode": "all modes are trained; leave it out",
    "seed": "use --seeds instead",
    "input": "use --inputs instead",
    "save_path": "use --output instead",
}


def main() -> None:
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("--seeds", nargs="+", type=int, default=SEEDS, help="seeds of the runs (default: 2023 1 2)")
    add(
        "--inputs",
        choices=("published", "all"),
        default="published",
        help="input channels; all: also noisy_arcmix with every other combination of channels",
    )
    folder = Path("check_points/paper")
    add("--output", type=Path, default=folder, help="folder to write to (default: %(default)s)")
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
    file = ("--config", str(options.config))
    for number, run in enumerate(runs, start=1):
        name = run.weights_path.stem
        print(f"run {number} of {len(runs)}, {name}: {describe_rest(runs)}", flush=True)
        chosen = as_options({key: getattr(run, key) for key in CHOSEN_HERE})
        call("train.py", "--resume", *file, *given_options(config, TRAINING_KEYS), *chosen)
    weights = [str(run.weights_path) for run in runs]
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


def should_download(config: Config, classes: Classes) -> bool:
    """Return whether to run download.py: if data_root is the project's folder datasets, unless it
    holds recordings from elsewhere.
    """
    root = Path(config.data_root)
    has_recordings = any((root / name).exists() for name in classes.machine_types)
    is_from_elsewhere = has_recordings and not (root / ".download").exists()
    return root.resolve() == ROOT / "datasets" and not is_from_elsewhere


def check_runs(runs: Sequence[Config], output: Path) -> None:
    """Raise `UserError` if an existing run had another configuration, or if the disk is too small
    for the runs that do not exist yet.
    """
    n_missing = 0
    for run in runs:
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


def describe_rest(runs: Sequence[Config]) -> str:
    """Return how many epochs are left and, from the histories, about how long they take."""
    seconds: list[float] = []
    for run in runs:
        history = RunFiles(run.weights_path).history
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
    """Return those options of the command line that a script accepts as well."""
    return as_options({key: getattr(config, key) for key in keys if key in config.given})


def as_options(values: Mapping[str, Any]) -> list[str]:
    """Return keys of the configuration with their values as options of a command line."""
    words: list[str] = []
    for key, value in values.items():
        words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return words


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
