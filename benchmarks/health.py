"""Train healthy and sick runs on the synthetic set: the figure and the table of
docs/training_health.md.

    python datasets/synthesize.py --output datasets/synthetic
    OMP_NUM_THREADS=1 python benchmarks/health.py

Each run is `train.py` and `eval.py` with the options that are printed. They are those of `make
demo`, except for the keys of the run in RUNS. Two runs have data that is made first: recordings of
noise alone, and training recordings whose names have the IDs of other recordings of their machine
type. OUTPUT/training_health.png has a line for each run, OUTPUT/training_health.md a row with the
numbers of the last epoch, and the mean AUC of the weights with the lowest validation loss. Its
column "settled" is the validation accuracy of the last weights with the batch-norm statistics of
the training clips. When started again, the script continues where it was stopped. It takes 40
minutes on one core.
"""

import math
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import soundfile
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from audio import N_SAMPLES, SAMPLE_RATE
from checkpoint import Checkpoint, RunFiles, read_history
from command_line import OneLineParser
from dataloader import load_clips
from errors import UserError
from evaluation.figures import COLOURS, LINES, PAGE, figure
from evaluation.tables import markdown_header, markdown_row
from names import AVERAGE, MEAN
from trainer import Trainer, Validation
from utils import make_folder, run_script, write_text

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SILENT, WRONG_IDS = "silent", "wrong_ids"  # folders of data in OUTPUT
PANELS = {
    "train_loss": "training loss",
    "train_accuracy": "training accuracy",
    "valid_loss": "validation loss",
    "valid_accuracy": "validation accuracy",
}


class Run(NamedTuple):
    """A run: its name in the figure, and the keys that differ from those of the demo."""

    title: str
    keys: Mapping[str, str] = {}


DEMO = {"machines": "auto", "epoch": "8", "batch_size": "16", "lr": "1e-3", "split_ratio": "0.8"}
TWO_IDS = {"machines": "{fan: [0, 2]}", "batch_size": "4"}
RUNS = {  # by the name of their files
    "healthy": Run("healthy"),
    "cross_entropy": Run("healthy, cross_entropy", {"mode": "cross_entropy"}),
    "high_lr": Run("learning rate 0.1", {"lr": "0.1"}),
    "silent": Run("noise of one bit", {"data_root": SILENT}),
    "wrong_ids": Run("wrong IDs", {"data_root": WRONG_IDS}),
    "two_ids": Run("two IDs", TWO_IDS | {"epoch": "20"}),
    "few_steps": Run("two IDs, 48 steps", TWO_IDS),
}


def main() -> None:
    parser = OneLineParser(description=__doc__)
    text = "the synthetic set (default: %(default)s)"
    parser.add_argument("--data_root", type=Path, default=Path("datasets/synthetic"), help=text)
    text = "folder for data and runs (default: %(default)s)"
    parser.add_argument("--output", type=Path, default=Path("check_points/health"), help=text)
    options = parser.parse_args()
    data_root, output = options.data_root.absolute(), options.output.absolute()
    if not list_recordings(data_root):
        raise UserError(f"{data_root}: no recordings; write them with datasets/synthesize.py")
    write_silent(data_root, output / SILENT)
    link_with_wrong_ids(data_root, output / WRONG_IDS)
    for name in RUNS:
        train_and_evaluate(name, data_root, output)
    histories = {name: read_run(output / f"{name}.pth") for name in RUNS}
    draw(histories, output / "training_health.png")
    text = "\n".join(table_lines(histories, output))
    write_text(output / "training_health.md", f"{text}\n")
    print(text)


# ---- Data ----


def list_recordings(data_root: Path) -> list[Path]:
    return sorted(data_root.glob("*/*/*.wav"))


def write_silent(data_root: Path, folder: Path) -> None:
    """Write noise of the samples -1, 0 and 1 under the name of each recording."""
    rng = np.random.default_rng(0)
    for path in list_recordings(data_root):
        file = folder / path.relative_to(data_root)
        make_folder(file.parent)
        noise = rng.integers(-1, 2, N_SAMPLES).astype(np.int16)
        soundfile.write(file, noise, SAMPLE_RATE)


def link_with_wrong_ids(data_root: Path, folder: Path) -> None:
    """Link the test recordings, and each training recording under a name whose ID is that of a
    random one of its machine type.
    """
    rng = np.random.default_rng(0)
    for train in sorted(data_root.glob("*/train")):
        paths = sorted(train.glob("*.wav"))
        ids = rng.permutation([path.stem.split("_")[2] for path in paths])
        target = folder / train.parent.name
        for number, (path, machine_id) in enumerate(zip(paths, ids, strict=True)):
            link(target / "train" / f"normal_id_{machine_id}_{number:08d}.wav", path)
        link(target / "test", train.with_name("test"))


def link(file: Path, target: Path) -> None:
    """Make a symbolic link, in place of one that exists."""
    make_folder(file.parent)
    file.unlink(missing_ok=True)
    file.symlink_to(target)


# ---- Runs ----


def train_and_evaluate(name: str, data_root: Path, output: Path) -> None:
    keys = {"data_root": str(data_root)} | DEMO | RUNS[name].keys
    if keys["data_root"] in (SILENT, WRONG_IDS):
        keys["data_root"] = str(output / keys["data_root"])
    weights = str(output / f"{name}.pth")
    words = [word for key, value in keys.items() for word in (f"--{key}", value)]
    call("train.py", *words, "--save_path", weights, "--resume")
    call("eval.py", weights, "--data_root", keys["data_root"])


def call(*words: str) -> None:
    """Print and run a command of the project; it prints its own errors."""
    print(f"\npython {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, *words], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)


def read_run(weights: Path) -> pd.DataFrame:
    """Return the history of a run, with the number of steps at the end of each epoch."""
    checkpoint = Checkpoint.load(weights)
    assert checkpoint.config
    n_steps = math.ceil(checkpoint.n_training / checkpoint.config.batch_size)
    history = read_history(checkpoint)
    return history.assign(step=n_steps * history["epoch"])


def validate_settled(weights: Path) -> Validation:
    """Validate the last weights of a run with the batch-norm statistics of its training clips under
    these weights.
    """
    checkpoint = Checkpoint.load(RunFiles(weights).last)
    config, classes = checkpoint.config, checkpoint.classes
    assert config
    clips = load_clips(config, classes, "train", config.windows("train"))
    train_clips, valid_clips = clips.split(config.split_ratio, config.seed)
    trainer = Trainer(config, classes, CPU, train_clips, valid_clips)
    trainer.network.load_state_dict(checkpoint.weights)
    for module in trainer.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches
    trainer.network.train()
    with torch.no_grad():
        for samples, _ in train_clips.batches(trainer.sampler.shuffle(epoch=0), CPU):
            trainer.network(**trainer.front_end(samples))
    return trainer.validate(valid_clips)


# ---- Results ----


def draw(histories: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Draw a panel for each column of PANELS, with a line for each run."""
    with figure(path, PAGE, 4.4) as drawn:
        axes = drawn.subplots(2, 2).ravel()
        for axis, (column, title) in zip(axes, PANELS.items(), strict=True):
            for number, (name, history) in enumerate(histories.items()):
                style = {"color": COLOURS[number], "linestyle": LINES[number % len(LINES)]}
                axis.plot(history["step"], history[column], label=RUNS[name].title, **style)
            axis.set(xlabel="step", ylabel=title, ylim=(0, None))
        legend = axes[0].get_legend_handles_labels()
        drawn.legend(*legend, loc="outside upper center", ncols=4)


def table_lines(histories: Mapping[str, pd.DataFrame], output: Path) -> list[str]:
    """Return the lines of the table: the last epoch of each run, and its mean AUC."""
    lines = markdown_header("run", ["steps", *PANELS.values(), "settled", "mean AUC"])
    for name, history in histories.items():
        last = history.iloc[-1]
        metrics = pd.read_csv(output / name / "test" / "metrics.csv")
        row = metrics.set_index(["machine_type", "machine_id"]).loc[(AVERAGE, MEAN)]
        values = [*last[list(PANELS)], validate_settled(output / f"{name}.pth").accuracy]
        cells = [f"{last['step']:.0f}", *(f"{value:.2f}" for value in values)]
        lines.append(markdown_row(RUNS[name].title, [*cells, f"{100 * row['AUC']:.1f}"]))
    return lines


if __name__ == "__main__":
    run_script(main)
