"""Draw the figures of README.md, each for light and for dark pages: docs/NAME.png and
docs/NAME_dark.png.

    # after `make demo`
    python docs/figures.py method check_points/demo.pth --data_root datasets/synthetic
    # docs/real_recordings.md describes the runs; the names need bash
    python docs/figures.py angles --data_root FOLDER \\
        check_points/real/{cross_entropy,arcface,arcmix,noisy_arcmix}_{2023,1,2}.pth

method follows a normal clip of MACHINE from the waveform to the embedding, and shows the angles and
scores of all test recordings of this machine. angles compares configurations over all of their
seeds and test recordings.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from audio import SAMPLE_RATE, SECONDS
from command_line import OneLineParser
from config import EVALUATION_KEYS, Config, parse_command_line
from dataloader import load_clips
from detector import load_detector
from errors import UserError
from evaluation.comparison import group_by_configuration
from evaluation.figures import CONDITIONS, STYLE, draw_angles, figure, read_samples
from evaluation.result import Result, evaluate
from model import PUBLISHED_CHANNELS, FrontEnd
from names import ANOMALOUS, NORMAL
from utils import run_script, use_device

DOCS = Path(__file__).resolve().parent
MACHINE = ("slider", "00")  # of the synthetic set
WIDTH = 4.2  # inches: letters of 8 points can then be read at the width of a phone

# The colours of a dark page.
LETTERS = "#e6edf3"
BACKGROUND = "#0d1117"
THEMES = {
    "": {},
    "_dark": {
        "text.color": LETTERS,
        "axes.labelcolor": LETTERS,
        "axes.edgecolor": LETTERS,
        "xtick.color": LETTERS,
        "ytick.color": LETTERS,
        "figure.facecolor": BACKGROUND,
        "axes.facecolor": BACKGROUND,
    },
}

BOX = {"boxstyle": "round", "facecolor": "none", "edgecolor": "0.5"}
TITLES = {
    "tgram": "Tgram\nlearned convolution",
    "sgram": "Sgram\nlog-mel",
    "tagram": "TAgram\nattended log-mel",
}
MARKERS = {NORMAL: "o", ANOMALOUS: "x"}


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("figure", choices=("method", "angles"))
    parser.add_argument(
        "checkpoint", nargs="+", type=Path, help="files of trained weights, one for method"
    )
    config, options = parse_command_line(parser, keys=EVALUATION_KEYS)
    if options.figure == "method" and len(options.checkpoint) > 1:
        raise UserError("method takes one checkpoint")
    device = use_device(config.device)
    results = [evaluate_published(path, config, device) for path in options.checkpoint]
    for suffix, theme in THEMES.items():
        path = DOCS / f"{options.figure}{suffix}.png"
        with mock.patch.dict(STYLE, theme):
            if options.figure == "method":
                draw_method(results[0], path)
            else:
                draw_angles(group_by_configuration(results), path)


def evaluate_published(path: Path, config: Config, device: torch.device) -> Result:
    """Evaluate a checkpoint on the test recordings, with the published score."""
    detector = load_detector([path], config)
    clips = load_clips(config, detector.classes, "test", detector.windows(config, "test"))
    outputs = detector.run(clips, config, device)
    (result,) = evaluate(detector, clips, outputs, config, "test", ["published"])
    return result


def draw_method(result: Result, path: Path) -> None:
    """Draw the way of a clip from the waveform to the embedding, and angle and score of all test
    recordings of its machine.

    Raises:
        UserError: If the model does not have the machine, or has other channels.
    """
    recordings = recordings_of_machine(result)
    with figure(path, WIDTH, 4.6) as drawn:
        drawn.set_layout_engine("none")
        waveform = drawn.add_axes((0.04, 0.89, 0.92, 0.07))
        channels = [drawn.add_axes((left, 0.58, 0.28, 0.19)) for left in (0.04, 0.36, 0.68)]
        angle = drawn.add_axes((0.08, 0.05, 0.3, 0.25), projection="polar")
        score = drawn.add_axes((0.6, 0.1, 0.37, 0.24))
        normal = recordings[recordings["condition"] == NORMAL]
        draw_inputs(result, normal["path"].iloc[0], waveform, channels)
        draw_text(drawn, 0.5, 0.49, "MobileFaceNet: embedding of 128 numbers", bbox=BOX)
        draw_text(drawn, 0.22, 0.39, "angle to the centre\nof its machine ID")
        draw_machine_angles(recordings, angle)
        draw_machine_scores(recordings, score)
        for x in (0.18, 0.5, 0.82):
            draw_arrow(drawn, (x, 0.885), (x, 0.845))
            draw_arrow(drawn, (x, 0.57), (x, 0.525))
        draw_arrow(drawn, (0.22, 0.455), (0.22, 0.425))
        draw_arrow(drawn, (0.42, 0.22), (0.48, 0.22))


def recordings_of_machine(result: Result) -> pd.DataFrame:
    """Return the recordings of MACHINE whose condition is known.

    Raises:
        UserError: If there are none, or if the model has other channels than the published ones.
    """
    known = result.known
    machine_type, machine_id = MACHINE
    is_machine = (known["machine_type"] == machine_type) & (known["machine_id"] == machine_id)
    has_published_channels = result.detector.config.input == list(PUBLISHED_CHANNELS)
    if not is_machine.any() or not has_published_channels:
        raise UserError(
            f"{result.detector.path}: method shows {machine_type} {machine_id} and the three "
            "published channels"
        )
    return known[is_machine]


def draw_text(drawn: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Draw a text centred at a place in the figure."""
    drawn.text(x, y, text, ha="center", va="center", **style)


def draw_arrow(drawn: Figure, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow between two places in the figure."""
    colour = matplotlib.rcParams["text.color"]
    arrow = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=8, shrinkA=0, shrinkB=0, color=colour
    )
    drawn.add_artist(arrow)


@torch.no_grad()
def draw_inputs(result: Result, path: Path, waveform: Axes, channels: Sequence[Axes]) -> None:
    """Draw the waveform of a recording and the input channels computed from it, each channel on a
    colour scale from its minimum to its maximum.
    """
    samples = read_samples(path, 0.0, result.windows.channel)
    inputs = FrontEnd(PUBLISHED_CHANNELS)(samples)
    network = result.detector.first.network
    assert network
    images = network.cpu().features(**inputs)[0].numpy()
    seconds = np.arange(samples.shape[1]) / SAMPLE_RATE
    waveform.plot(seconds, inputs["waveform"][0], lw=0.2, color="0.5")
    waveform.set(title="waveform, 10 s", xlim=(0, SECONDS))
    waveform.set_axis_off()
    for axis, name, image in zip(channels, PUBLISHED_CHANNELS, images, strict=True):
        axis.imshow(image, origin="lower", aspect="auto", cmap="viridis")
        axis.set(title=TITLES[name], xticks=[], yticks=[])


def draw_machine_angles(recordings: pd.DataFrame, axis: Axes) -> None:
    """Draw a line for each recording, at its angle to the centre of the machine, which is at 0°."""
    for condition, (colour, line) in CONDITIONS.items():
        for degrees in recordings.loc[recordings["condition"] == condition, "angle"]:
            axis.plot([0, np.radians(degrees)], [0, 1], line, color=colour, lw=0.8)
    axis.plot([0, 0], [0, 1], color=matplotlib.rcParams["text.color"], lw=2)
    axis.set(thetamin=0, thetamax=90, yticks=[], ylim=(0, 1))
    axis.set(xticks=np.radians((0, 30, 60, 90)), xticklabels=("centre", "30°", "60°", "90°"))
    axis.grid(False)


def draw_machine_scores(recordings: pd.DataFrame, axis: Axes) -> None:
    """Draw the score of each recording over its angle, and the threshold of the machine."""
    for condition, marker in MARKERS.items():
        chosen = recordings[recordings["condition"] == condition]
        colour, _ = CONDITIONS[condition]
        axis.plot(chosen["angle"], chosen["score"], marker, ms=3, color=colour, label=condition)
    threshold = recordings["threshold"].iloc[0]
    axis.axhline(threshold, color="0.5", linestyle=":", label="threshold")
    axis.set(title="anomaly score", xlabel="angle (°)")
    axis.legend()


if __name__ == "__main__":
    run_script(main)
