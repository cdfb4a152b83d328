"""Draw the figures of README.md, each for light and for dark pages: docs/NAME.png and
docs/NAME_dark.png.

    # after make demo
    python docs/figures.py method check_points/demo.pth --data_root datasets/synthetic
    python docs/figures.py angles check_points/real/{cross_entropy,arcface,arcmix,noisy_arcmix}_{2023,1,2}.pth \\
        # see real_recordings.md
        --data_root FOLDER

method follows a normal clip of MACHINE from the waveform to the embedding, and shows the angles and
scores of all test clips of this machine. angles compares configurations over all of their seeds and
clips.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import load_model
from config import parse_command_line
from corpus import ANOMALOUS, NORMAL
from dataloader import load_clips
from evaluation.comparison import group_by_configuration
from evaluation.figures import CONDITIONS, draw_angles, figure, read_samples
from evaluation.result import Result, evaluate
from model import PUBLISHED_CHANNELS, FrontEnd
from model.tastgram import SAMPLE_RATE, SECONDS
from utils import OneLineParser, UserError, run_script, use_device

DOCS = Path(__file__).resolve().parent
WIDTH = 4.2  # inches: letters of 8 points can then be read at the width of a phone
TEXT, PAGE = "#e6edf3", "#0d1117"  # of a dark page
THEMES = {
    "": {},
    "_dark": {
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT
        ),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor"), PAGE),
    },
}
MACHINE = ("slider", "00")  # of the synthetic set, which the method is shown with
BOX = {"boxstyle": "round", "facecolor": "none", "edgecolor": "0.5"}
TITLES = {
    "tgram": "Tgram\nlearned convolution",
    "sgram": "Sgram\nlog-mel",
    "tagram": "TAgram\nattended log-mel",
}


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("figure", choices=("method", "angles"))
    parser.add_argument(
        "checkpoint", nargs="+", type=Path, help="files of trained weights, one for method"
    )
    config, options, given = parse_command_line(parser)
    if options.figure == "method" and len(options.checkpoint) > 1:
        raise UserError("method takes one checkpoint")
    device = use_device(config.device)
    results: list[Result] = []
    for path in options.checkpoint:
        trained = load_model(path, config, given)
        results += evaluate(
            trained, load_clips(trained.config, "test"), "test", device, ["published"]
        ).values()
    for suffix, theme in THEMES.items():
        path = DOCS / f"{options.figure}{suffix}.png"
        with matplotlib.rc_context(theme):
            if options.figure == "method":
                draw_method(results[0], path)
            else:
                draw_angles(group_by_configuration(results), path)


def draw_method(result: Result, path: Path) -> None:
    """A clip on its way from the waveform to the embedding; angle and score of all test clips of
    its machine.
    """
    clips = result.known.set_index(["machine_type", "machine_id"]).sort_index()
    if MACHINE not in clips.index or result.trained.config.input != list(PUBLISHED_CHANNELS):
        raise UserError(
            f"{result.trained.path}: method shows {' '.join(MACHINE)} and the three published channels"
        )
    clips = clips.loc[[MACHINE]]
    with figure(path, WIDTH, 4.6) as drawn:
        drawn.set_layout_engine("none")
        waveform = drawn.add_axes((0.04, 0.89, 0.92, 0.07))
        channels = [drawn.add_axes((left, 0.58, 0.28, 0.19)) for left in (0.04, 0.36, 0.68)]
        angle = drawn.add_axes((0.08, 0.05, 0.3, 0.25), projection="polar")
        score = drawn.add_axes((0.6, 0.1, 0.37, 0.24))
        normal = clips[clips["condition"] == NORMAL]
        draw_inputs(result, normal["path"].iloc[0], waveform, channels)
        drawn.text(
            0.5, 0.49, "MobileFaceNet: embedding of 128 numbers", ha="center", va="center", bbox=BOX
        )
        drawn.text(0.22, 0.39, "angle to the centre\nof its machine ID", ha="center", va="center")
        draw_machine_angles(clips, angle)
        draw_machine_scores(clips, score)
        for x in (0.18, 0.5, 0.82):
            draw_arrow(drawn, (x, 0.885), (x, 0.845))
            draw_arrow(drawn, (x, 0.57), (x, 0.525))
        draw_arrow(drawn, (0.22, 0.455), (0.22, 0.425))
        draw_arrow(drawn, (0.42, 0.22), (0.48, 0.22))


def draw_arrow(drawn: Figure, start: tuple[float, float], end: tuple[float, float]) -> None:
    colour = matplotlib.rcParams["text.color"]
    arrow = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=8, shrinkA=0, shrinkB=0, color=colour
    )
    drawn.add_artist(arrow)


@torch.no_grad()
def draw_inputs(result: Result, path: Path, waveform: Axes, channels: Sequence[Axes]) -> None:
    """The waveform of a recording, and the channels that are made of it, each with colours of its
    own.
    """
    network, samples = (
        result.trained.network.cpu(),
        read_samples(path, 0.0, result.trained.config.channel),
    )
    inputs = FrontEnd(PUBLISHED_CHANNELS)(samples)
    waveform.plot(
        np.arange(samples.shape[1]) / SAMPLE_RATE, inputs["waveform"][0], lw=0.2, color="0.5"
    )
    waveform.set(title="waveform, 10 s", xlim=(0, SECONDS))
    waveform.set_axis_off()
    for axis, name, image in zip(
        channels, PUBLISHED_CHANNELS, network.features(**inputs)[0].numpy(), strict=True
    ):
        axis.imshow(image, origin="lower", aspect="auto", cmap="viridis")
        axis.set(title=TITLES[name], xticks=[], yticks=[])


def draw_machine_angles(clips: pd.DataFrame, axis: Axes) -> None:
    """A line for each clip, at its angle to the centre of the machine, which lies at 0."""
    for condition, (colour, line) in CONDITIONS.items():
        for degrees in clips.loc[clips["condition"] == condition, "angle"]:
            axis.plot([0, np.radians(degrees)], [0, 1], line, color=colour, lw=0.8)
    axis.plot([0, 0], [0, 1], color=matplotlib.rcParams["text.color"], lw=2)
    axis.set(thetamin=0, thetamax=90, yticks=[], ylim=(0, 1))
    axis.set(xticks=np.radians((0, 30, 60, 90)), xticklabels=("centre", "30°", "60°", "90°"))
    axis.grid(False)


def draw_machine_scores(clips: pd.DataFrame, axis: Axes) -> None:
    for condition, marker in ((NORMAL, "o"), (ANOMALOUS, "x")):
        chosen = clips[clips["condition"] == condition]
        axis.plot(
            chosen["angle"],
            chosen["score"],
            marker,
            ms=3,
            color=CONDITIONS[condition][0],
            label=condition,
        )
    axis.axhline(clips["threshold"].iloc[0], color="0.5", linestyle=":", label="threshold")
    axis.set(title="anomaly score", xlabel="angle (°)")
    axis.legend()


if __name__ == "__main__":
    run_script(main)
