"""Windows of continuous sound, and whether they can be scored."""

from typing import NamedTuple

import numpy as np

from audio import FULL_SCALE, MOST_CLIPPED, SECONDS, scale

# The condition of a window; only one of SOUND is scored.
SOUND, SILENT, CLIPPED, NOT_FINITE = "sound", "silent", "clipped", "not finite"
NO_INPUT = "no input"
SILENT_SECONDS = 1  # for which the samples do not change; no microphone is that quiet


class Cut(NamedTuple):
    """A window of a stream."""

    start: int  # number of its first sample
    samples: np.ndarray  # (n,) int16, or float64 in [-1, 1)


class Cutter:
    """Cuts continuous sound into the windows that `audio.find_starts` finds in a recording of it.

    Attributes:
        first: The number of the first sample.
        end: The number of the sample behind the last one.
    """

    def __init__(self, first: int, rate: int, hop: float) -> None:
        """Begin with sample number `first`. `rate` is in Hz, `hop` in seconds."""
        self.first = self.next = self.end = first
        self.size, self.step = SECONDS * rate, round(hop * rate)
        self.samples = np.zeros(0, np.int16)  # the last ones, no more than a window

    def add(self, samples: np.ndarray) -> list[Cut]:
        """Add samples `(n,)`, and return the windows that are complete."""
        begin = self.end - len(self.samples)
        self.end += len(samples)
        if len(self.samples):
            samples = np.concatenate([self.samples, samples])
        cuts = []
        while self.next + self.size <= self.end:
            start = self.next - begin
            cuts.append(Cut(self.next, samples[start : start + self.size]))
            self.next += self.step
        self.samples = samples[-self.size :]
        return cuts

    def cut_last(self) -> list[Cut]:
        """Return the window that ends with the last sample, unless `add` has returned it or the
        sound is shorter than a window.
        """
        start = self.end - self.size
        is_cut = start == self.next - self.step
        return [] if start < self.first or is_cut else [Cut(start, self.samples)]


def find_condition(samples: np.ndarray, rate: int) -> str:
    """Return the condition of a window, int16 or float64 `(n,)`, at `rate` in Hz."""
    if not np.isfinite(samples).all():
        return NOT_FINITE
    changes = np.flatnonzero(samples[1:] != samples[:-1])
    unchanged = np.diff(changes, prepend=-1, append=len(samples) - 1)
    if unchanged.max() >= SILENT_SECONDS * rate:
        return SILENT
    samples = scale(samples)
    is_clipped = (samples >= FULL_SCALE - 1) | (samples <= 1 - FULL_SCALE)
    return CLIPPED if is_clipped.mean() > MOST_CLIPPED else SOUND
