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
from config import (
    EVALUATION_KEYS,
    TRAINING_KEYS,
    Config,
    check_effect,
    load_config,
    parse_command_line,
)
from corpus import find_clips, settle_classes
from losses import MODES
from model import PUBLISHED_CHANNELS
from utils import OneLineParser, UserError, check_writable, run_script

ROOT = Path(__file__).resolve().parent
SEEDS = (2023, 1, 2)
PATIENCE = 60.0  # seconds that a script may take to end after a Ctrl-C
RUN_BYTES = (
    80_000_000  # checkpoints of 23 and 14 MB, a third while it is written, logs, results, figures
)
CHOSEN_HERE = {
    "mode": "all are trained",
    "seed": "--seeds chooses",
    "input": "--inputs chooses",
    "save_path": "--output chooses",
}


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=SEEDS, help="of the runs (default: 2023 1 2)"
    )
    help_text = (
        "channels of the network; all: noisy_arcmix with every other combination of them as well"
    )
    parser.add_argument(
        "--inputs", choices=("published", "all"), default="published", help=help_text
    )
    parser.add_argument(
        "--output", type=Path, default=Path("check_points/paper"), help="default: %(default)s"
    )
    config, options, given = parse_command_line(parser)
    check_effect(config, given, [config.scoring])
    settled = settle_classes(config)
    given |= {
        key: getattr(settled, key)
        for key in config.differences(settled.model_dump(), ["machines", "classes"])
    }
    runs = plan(options, given)
    check_writable(options.output / "comparison.md", "--output names another folder")
    check_runs(runs, options.output)

    def words(keys: Sequence[str]) -> list[str]:
        return [
            "--config",
            str(options.config),
            *as_options({key: given[key] for key in keys if key in given}),
        ]

    if is_to_download(settled):
        call("datasets/download.py", "--types", *settled.machines)
    for split in ("train", "test"):  # test clips that are missing would be noticed at the very end
        find_clips(settled, split)
    for number, run in enumerate(runs, start=1):
        print(
            f"run {number} of {len(runs)}, {run.checkpoint.stem}: {describe_rest(runs)}", flush=True
        )
        chosen = as_options({key: getattr(run, key) for key in CHOSEN_HERE})
        call("train.py", "--resume", *words(TRAINING_KEYS), *chosen)
    weights = [str(run.checkpoint) for run in runs]
    call("eval.py", *weights, "--plots", "--output", str(options.output), *words(EVALUATION_KEYS))


def plan(options: argparse.Namespace, given: dict[str, Any]) -> list[Config]:
    """The configurations of the runs, one seed after the other. Raises `UserError` for a key that
    is chosen here.
    """
    for key in CHOSEN_HERE.keys() & given.keys():
        raise UserError(f"command line: {key}: {CHOSEN_HERE[key]}")
    channels = list(PUBLISHED_CHANNELS)
    variants: dict[str, dict[str, Any]] = {
        mode: {"mode": mode, "input": channels} for mode in MODES
    }
    if options.inputs == "all":
        subsets = [
            list(chosen)
            for n in range(1, len(channels))
            for chosen in itertools.combinations(channels, n)
        ]
        variants |= {
            "+".join(subset): {"mode": "noisy_arcmix", "input": subset} for subset in subsets
        }
    return [
        load_config(
            options.config,
            **given
            | keys
            | {"seed": seed, "save_path": str(options.output / f"{name}_{seed}.pth")},
        )
        for seed in dict.fromkeys(options.seeds)
        for name, keys in variants.items()
    ]


def is_to_download(config: Config) -> bool:
    """Whether the recordings are, or will be, those that download.py puts into the project's own
    folder.
    """
    root = Path(config.data_root)
    is_filled_by_hand = (
        any((root / name).exists() for name in config.machines)
        and not (root / ".download").exists()
    )
    return root.resolve() == ROOT / "datasets" and not is_filled_by_hand


def check_runs(runs: Sequence[Config], output: Path) -> None:
    """Raise `UserError` where a run had another configuration, or the disk is too small for those
    not begun.
    """
    for files, run in [(RunFiles(run.checkpoint), run) for run in runs if run.checkpoint.exists()]:
        remedy = "remove it, give the same, or --output names another folder"
        check_configuration(run, load_newest(files), files.last, remedy)
    needed = RUN_BYTES * sum(not run.checkpoint.exists() for run in runs)
    free = shutil.disk_usage(output).free
    if free < needed:
        sizes = f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"
        raise UserError(
            f"{output}: the disk is too small ({sizes}); free some space, or --output names another folder"
        )


def describe_rest(runs: Sequence[Config]) -> str:
    """How many epochs are left, and about how long they take, by the seconds of those in the
    histories.
    """
    histories = [RunFiles(run.checkpoint).history for run in runs]
    seconds = [
        value for file in histories if file.exists() for value in pd.read_csv(file)["seconds"]
    ]
    left = sum(run.epoch for run in runs) - len(seconds)
    if not seconds:
        return f"{left} epochs left"
    rest = left * sum(seconds) / len(seconds)
    time = f"{rest / 3600:.1f} h" if rest >= 5400 else f"{math.ceil(rest / 60)} min"
    return f"{left} epochs left, about {time}"


# ---- Calling the other scripts ----


def as_options(keys: Mapping[str, Any]) -> list[str]:
    """Keys of the configuration as the command line takes them."""
    words = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in keys.items()
    }
    return [word for key, value in words.items() for word in (f"--{key}", value)]


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
