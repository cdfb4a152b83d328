"""The published table: trains the four modes with several seeds, evaluates the runs, and compares them.

    make paper                                                # the published recipe, seeds 2023, 1 and 2
    make paper SEEDS="2023 7" INPUTS=all                      # other seeds; the ablation of the input channels as well
    make paper DATA=/data/dcase2020                           # recordings that are already there
    make paper DATA=datasets/synthetic EPOCH=2 SEEDS="1 2"    # a rehearsal on synthetic machines
    python benchmarks/paper.py --seeds 1 2 --batch_size 128   # the same without make, and with keys of config.yaml

It says first what it takes: device, disk, and a time estimated from a short measurement on random clips. Then it calls
datasets/download.py (where data_root is the project's own folder), train.py for one seed after the other, and eval.py.
OUTPUT/comparison.md is the report: mean and deviation over the seeds beside the published table, differences of the
modes with intervals, and every run; angles.png is in it, a panel for each mode.

Start the same command again after an interruption: finished runs are not trained again, and the one that was
interrupted goes on after its last finished epoch. Seeds can be added in the same way. An error in a run ends it all.
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
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.throughput import CLASSES, random_clips, seconds
from checkpoint import RunFiles, check_configuration, load_newest
from config import Config, load_config, parse_command_line
from corpus import find_clips, number_classes, settle_classes
from losses import MODES
from model import PUBLISHED_CHANNELS
from trainer import Trainer
from utils import OneLineParser, UserError, check_writable, run_script, use_device

ROOT = Path(__file__).resolve().parent.parent
DOWNLOADED = ROOT / "datasets"
CLIPS = {"train": 36_283, "test": 10_868}  # of all CLASSES of the published set
SEEDS = (2023, 1, 2)
PATIENCE = 60.0  # seconds that a script may take to end after a Ctrl-C
RUN_BYTES = 80_000_000  # checkpoints of 23 and 14 MB, a third while it is written, logs, results, figures
CHOSEN_HERE = {
    "mode": "all are trained",
    "seed": "--seeds chooses",
    "input": "--inputs chooses",
    "save_path": "--output chooses",
}


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="of the runs (default: 2023 1 2)")
    help_text = "channels of the network; all: noisy_arcmix with every other combination of them as well"
    parser.add_argument("--inputs", choices=("published", "all"), default="published", help=help_text)
    parser.add_argument("--output", type=Path, default=Path("check_points/paper"), help="default: %(default)s")
    config, options, given = parse_command_line(parser)
    settled = settle_classes(config)
    given |= {key: getattr(settled, key) for key in config.differences(settled.model_dump(), ["machines", "classes"])}
    config = settled
    runs = plan(options, given)
    check_writable(options.output / "comparison.md", "--output names another folder")
    downloads = is_to_download(config)
    say_what_it_takes(runs, published_counts(config) if downloads else count_clips(config), options.output)

    common = ["--config", str(options.config), *as_options(given)]
    if downloads:
        call("datasets/download.py", "--types", *config.machines)
    for run in runs:
        call("train.py", "--resume", *common, *as_options({key: getattr(run, key) for key in CHOSEN_HERE}))
    call("eval.py", *(str(run.checkpoint) for run in runs), "--plots", "--output", str(options.output), *common)


def plan(options: argparse.Namespace, given: dict[str, Any]) -> list[Config]:
    """The configurations of the runs, one seed after the other. Raises `UserError` for a key that is chosen here."""
    for key in CHOSEN_HERE.keys() & given.keys():
        raise UserError(f"command line: {key}: {CHOSEN_HERE[key]}")
    channels = list(PUBLISHED_CHANNELS)
    variants: dict[str, dict[str, Any]] = {mode: {"mode": mode, "input": channels} for mode in MODES}
    if options.inputs == "all":
        subsets = [list(chosen) for n in range(1, len(channels)) for chosen in itertools.combinations(channels, n)]
        variants |= {"+".join(subset): {"mode": "noisy_arcmix", "input": subset} for subset in subsets}
    return [
        load_config(
            options.config, **given | keys | {"seed": seed, "save_path": str(options.output / f"{name}_{seed}.pth")}
        )
        for seed in dict.fromkeys(options.seeds)
        for name, keys in variants.items()
    ]


def as_options(keys: Mapping[str, Any]) -> list[str]:
    """Keys of the configuration as the command line takes them."""
    words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in keys.items()}
    return [word for key, value in words.items() for word in (f"--{key}", value)]


def call(script: str, *words: str) -> None:
    """Run a script of the project, and end with its status if that is not 0; it has said why."""
    process = subprocess.Popen([sys.executable, str(ROOT / script), *words])
    try:
        status = process.wait()
    except BaseException as stop:
        with contextlib.suppress(subprocess.TimeoutExpired):
            if isinstance(stop, KeyboardInterrupt):  # which has reached the script too, if it came from the terminal
                process.wait(PATIENCE)
        process.terminate()
        process.wait()
        raise
    if status < 0:
        raise UserError(f"{script} was killed (signal {-status}); start the same command again, it goes on")
    if status:
        sys.exit(status)


# ---- What it takes ----


def is_to_download(config: Config) -> bool:
    """Whether the recordings are, or will be, those that download.py puts into the project's own folder."""
    root = Path(config.data_root)
    is_filled_by_hand = any((root / name).exists() for name in config.machines) and not (root / ".download").exists()
    return root.resolve() == DOWNLOADED and not is_filled_by_hand


def published_counts(config: Config) -> dict[str, int]:
    """About as many clips as download.py fetches for the machines."""
    share = len(number_classes(config)) / CLASSES
    return {split: round(count * share) for split, count in CLIPS.items()}


def count_clips(config: Config) -> dict[str, int]:
    return {split: len(find_clips(config, split)) for split in CLIPS}


def say_what_it_takes(runs: Sequence[Config], counts: Mapping[str, int], output: Path) -> None:
    """Print device, disk and time. Raises `UserError` where the disk is too small, or a run has another
    configuration.
    """
    config, begun = runs[0], [run for run in runs if run.checkpoint.exists()]
    left = len(runs) * config.epoch - sum(epochs_done(run) for run in begun)
    n_train = math.ceil(counts["train"] * config.split_ratio)
    print(f"{len(runs)} runs of {config.epoch} epochs, with {counts['train']} clips, and {counts['test']} to test on")
    device, training, validation = measure_apart(config, n_train * config.epoch)
    epoch = n_train * training + (counts["train"] - n_train) * validation
    total = left * epoch + len(runs) * (counts["train"] + counts["test"]) * validation  # embeddings and evaluation
    needed, free = (len(runs) - len(begun)) * RUN_BYTES, shutil.disk_usage(output).free
    print(f"device: {device}, {1 / training:,.0f} clips a second in training")
    print(f"disk: {needed / 1e9:.1f} GB in {output}, {free / 1e9:.1f} GB free; recordings not counted")
    print(f"time: about {duration(total)}, for {left} epochs and the evaluation; reading not counted", flush=True)
    if free < needed:
        raise UserError(f"{output}: the disk is too small; free some space, or --output names another folder")


def epochs_done(run: Config) -> int:
    files = RunFiles(run.checkpoint)
    state = load_newest(files)
    check_configuration(run, state, files.last, "remove it, give the same, or --output names another folder")
    return state.get("epoch", 0)


def measure_apart(config: Config, n_clips: int) -> tuple[str, float, float]:
    """`measure` in a process of its own, which leaves nothing on the GPU."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        try:
            return process.submit(measure, config, n_clips).result()
        except BrokenProcessPool:
            raise UserError("the measurement was killed, perhaps for want of memory: lower batch_size") from None


def measure(config: Config, n_clips: int) -> tuple[str, float, float]:
    """The name of the device, and seconds per clip of a training step and of validation, with random clips. `n_clips`
    is the number of clips that a run trains on in all epochs, on which it depends whether steps are compiled.
    """
    device = use_device(config.device)
    machines = {"random": list(range(CLASSES))}  # random clips have labels of as many
    trainer = Trainer(config.model_copy(update={"machines": machines}), device, n_clips)
    n_steps = 1 if device.type == "cpu" else max(1, 3200 // config.batch_size)
    clips = random_clips(config.batch_size * n_steps, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    actions = (lambda: trainer.train_epoch(clips, epoch=0), lambda: trainer.validate(clips))
    training, validation = (seconds(action, device, repeats=1) / len(clips) for action in actions)
    return name, training, validation


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{math.ceil(seconds / 60)} min"


if __name__ == "__main__":
    run_script(main)
