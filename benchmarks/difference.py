"""Measure how often the line that says what differs is right.

    python benchmarks/difference.py --data_root FOLDER

FOLDER holds recordings of several machines: training clips, and normal test clips. The training
clips of a machine are what its test clips are compared with; there is no network. A test clip is
changed in one of these ways:

- noise is added in one of the 16 bands, from 2 to 8 s long, at a random start (half seconds
  included): 6, 10 or 15 dB above the mean level of the band in the clip, twice for each clip. It
  is right if an unusual range is named that lies within one band of it, and starts and ends within
  one second of it.
- a gain of -6, -3, 3 or 6 dB. It is right if the level is called unusual, in its direction. Beside
  it is how often a band is named as well.
- unchanged. It is right if neither level nor band nor fluctuation is called unusual.

Anomalous test clips are not changed; "right" is how often one of the three is called unusual.
Printed are percentages for each machine type.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from audio import FIRST_WINDOW, N_SAMPLES, SAMPLE_RATE, SECONDS
from classes import Machine
from command_line import OneLineParser
from config import parse_command_line
from dataloader import ClipSet, load_clips
from evaluation.difference import Difference, NormalClips, find_difference, measure_spread
from model import FrontEnd, levels_of, spectrum_of
from model.tastgram import N_BANDS, band_edges
from names import ANOMALOUS, NORMAL
from recordings import MACHINE_COLUMNS, find_classes
from utils import run_script

NOISES = (6, 10, 15)  # dB above the level of the band
GAINS = (-6, -3, 3, 6)  # dB
LENGTHS = (2, 3, 4, 5, 6, 8)  # seconds of noise
REPEATS = 2  # noises for each clip
NAMES = ("level", "band", "fluctuation")
FRONT_END = FrontEnd(["sgram"])


class Noise(NamedTuple):
    """A noise in a band, from a second to another one."""

    band: int
    start: float
    end: float


def main() -> None:
    parser = OneLineParser(description=__doc__)
    config, _ = parse_command_line(parser, keys=("data_root", "num_workers"))
    config = config.model_copy(update={"machines": "auto"})
    classes = find_classes(config)
    train_clips = load_clips(config, classes, "train", FIRST_WINDOW)
    test_clips = load_clips(config, classes, "test", FIRST_WINDOW)
    rng = np.random.default_rng(0)
    rows = []
    for machine in classes.machines:
        normal = learn(select(train_clips, machine))
        for samples in read(select(test_clips, machine)):
            rows += [(machine[0], *row) for row in measure_clip(samples, normal, rng)]
        for samples in read(select(test_clips, machine, ANOMALOUS)):
            found = unusual(find(samples.numpy().astype(float), normal))
            rows.append((machine[0], "anomalous", any(found), *found))
    table = pd.DataFrame(rows, columns=["machine type", "change", "right", *NAMES])
    groups = table.groupby(["machine type", "change"], sort=False)
    percent = 100 * groups.mean()
    percent.insert(0, "clips", groups.size())
    print(percent.to_string(float_format="%.1f"))


def select(clips: ClipSet, machine: Machine, condition: str = NORMAL) -> ClipSet:
    """Return the clips of a machine in this condition."""
    wanted = dict(zip([*MACHINE_COLUMNS, "condition"], [*machine, condition], strict=True))
    return clips.select(
        (clips.recordings[list(wanted)] == pd.Series(wanted)).all(axis=1).to_numpy()
    )


def read(clips: ClipSet) -> torch.Tensor:
    """Return the samples of all clips, int16 `(n, T)`."""
    (samples,) = clips.read([np.arange(len(clips))], torch.device("cpu"))
    return samples


def learn(clips: ClipSet) -> NormalClips:
    """Return training clips to compare others with."""
    spectrum, levels = describe(read(clips))
    files = [str(path) for path in clips.paths]
    return NormalClips(spectrum, files, [0.0] * len(clips), measure_spread(spectrum, levels))


def describe(samples: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return spectra and levels of samples int16 `(n, T)`."""
    log_mel = FRONT_END(samples)["log_mel"]
    return spectrum_of(log_mel).double().numpy(), levels_of(log_mel).double().numpy()


def find(samples: np.ndarray, normal: NormalClips) -> Difference:
    """Compare a clip `(T,)`, float, with normal clips."""
    rounded = np.clip(np.round(samples), -32_768, 32_767).astype(np.int16)
    spectrum, levels = describe(torch.from_numpy(rounded)[None])
    return find_difference(spectrum[0], levels[0], normal)


def measure_clip(
    samples: torch.Tensor, normal: NormalClips, rng: np.random.Generator
) -> list[tuple[str | bool, ...]]:
    """Return for each change of a clip its name, whether the line is right, and what is called
    unusual, in the order of NAMES.
    """
    clip = samples.numpy().astype(float)
    found = unusual(find(clip, normal))
    rows: list[tuple[str | bool, ...]] = [("none", not any(found), *found)]
    for decibels in NOISES:
        for _ in range(REPEATS):
            noise = draw_noise(rng)
            difference = find(add_noise(clip, noise, decibels, rng), normal)
            is_right = names_noise(difference, noise)
            rows.append((f"noise {decibels} dB", is_right, *unusual(difference)))
    for decibels in GAINS:
        difference = find(clip * 10 ** (decibels / 20), normal)
        level = difference.level
        assert level
        is_right = level.is_unusual and (level.decibels > 0) == (decibels > 0)
        rows.append((f"gain {decibels:+d} dB", is_right, *unusual(difference)))
    return rows


def unusual(difference: Difference) -> list[bool]:
    """Return which of NAMES are called unusual."""
    return [getattr(difference, name).is_unusual for name in NAMES]


def names_noise(difference: Difference, noise: Noise) -> bool:
    """Return whether band and seconds are named."""
    band = difference.band
    assert band
    in_bands = noise.band - 1 <= band.first_band <= band.end_band - 1 <= noise.band + 1
    in_time = abs(band.start - noise.start) <= 1 and abs(band.end - noise.end) <= 1
    return band.is_unusual and band.decibels > 0 and in_bands and in_time


def draw_noise(rng: np.random.Generator) -> Noise:
    """Draw band, start and end."""
    length = int(rng.choice(LENGTHS))
    start = rng.integers(2 * (SECONDS - length) + 1) / 2
    return Noise(int(rng.integers(N_BANDS)), start, start + length)


def add_noise(
    clip: np.ndarray, noise: Noise, decibels: float, rng: np.random.Generator
) -> np.ndarray:
    """Add noise to a clip `(T,)`, so many dB above the mean power of the band in the clip."""
    frequencies = np.fft.rfftfreq(N_SAMPLES, 1 / SAMPLE_RATE)
    low, high = band_edges()[noise.band : noise.band + 2]
    is_in = (frequencies >= low) & (frequencies < high)
    in_band = np.fft.irfft(np.fft.rfft(clip) * is_in, N_SAMPLES)
    white = np.fft.irfft(np.fft.rfft(rng.normal(size=N_SAMPLES)) * is_in, N_SAMPLES)
    white *= np.sqrt((in_band**2).mean() / (white**2).mean() * 10 ** (decibels / 10))
    seconds = np.arange(N_SAMPLES) / SAMPLE_RATE
    return clip + np.where((seconds >= noise.start) & (seconds < noise.end), white, 0)


if __name__ == "__main__":
    run_script(main)
