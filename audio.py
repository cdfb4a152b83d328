"""Read the samples of one recording, and check whether it can be used.

A recording is a WAV or FLAC file. It is read in windows of 10 s of one channel, as int16 samples at
16 kHz; a recording shorter than a window is repeated. Only one window at a time is in memory.

Needs numpy and soundfile and, for recordings with another sample rate, soxr.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from errors import UserError
from formats import BLOCK_SIZE, Audio, open_audio

SAMPLE_RATE = 16_000  # Hz
SECONDS = 10  # of a window
N_SAMPLES = SAMPLE_RATE * SECONDS

# A recording may be this many seconds longer than a window without a notice: the ToyCar recordings
# of DCASE 2020 are 1 s longer.
TOLERATED_SECONDS = 2
FULL_SCALE = 32768  # of int16 samples; 1.0 of others
MOST_CLIPPED = 0.01  # fraction of samples beyond full scale; with more the scale must be wrong
FIRST_BLOCK = 4096  # frames; enough to find sound


class Windows(NamedTuple):
    """The windows of a recording that are used: of one channel, all windows or only the first."""

    hop: float | None = None  # seconds between the starts of windows; None: only the first window
    channel: int = 0  # counted from 0


FIRST_WINDOW = Windows()
AUTO_HOPS = {"train": 10.0, "test": 5.0, "evaluation": 5.0}  # seconds, by split


def choose_windows(window: str, hop: float | str, channel: int, split: str) -> Windows:
    """Return the windows of a recording that the keys window, hop and channel select."""
    if window == "first":
        return Windows(None, channel)
    return Windows(AUTO_HOPS[split] if isinstance(hop, str) else hop, channel)


class CheckedRecording(NamedTuple):
    """The result of checking a recording that can be used."""

    starts: list[float]  # seconds at which its windows start
    changes: list[str]  # to its samples, as the end of a sentence: "are rounded to 16 bits"
    n_clipped: int = 0  # samples beyond full scale


def check_recording(path: Path, windows: Windows = FIRST_WINDOW) -> CheckedRecording:
    """Check that the windows of a recording can be used.

    The header of a WAV file with integer samples is compared with its size, and the file is decoded
    up to its first sound. Of other files, all that is used is decoded.

    Raises:
        UserError: with the reason, if the file is unreadable, empty, truncated or damaged, lacks
            the channel, is silent, or holds samples that are not finite or too often beyond full
            scale.
    """
    with open_audio(path) as audio, np.errstate(over="ignore", invalid="ignore"):
        check_properties(audio, windows.channel)
        content = scan(audio, windows)
        n_frames = content.n_frames if audio.n_frames is None else audio.n_frames
        changes = list_changes(audio, windows, n_frames)
        starts = find_starts(n_frames, audio.rate, windows.hop)
        return CheckedRecording(starts, changes, content.n_clipped)


def read_recording(path: Path, out: np.ndarray, start: float = 0.0, channel: int = 0) -> None:
    """Fill `out`, int16 `(N_SAMPLES,)`, with the window that starts at second `start`.

    Raises:
        UserError: With the file and the reason, as in `check_recording`, or if the recording has
            become too short for the window.
    """
    try:
        with open_audio(path) as audio, np.errstate(over="ignore", invalid="ignore"):
            check_properties(audio, channel)
            decode(audio, out, start, channel)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def find_starts(n_frames: int, rate: int, hop: float | None) -> list[float]:
    """Return the seconds at which the windows start. The last window ends with the recording."""
    last = n_frames - SECONDS * rate
    if hop is None or last <= 0:
        return [0.0]
    starts = [*range(0, last, round(hop * rate)), last]
    return [start / rate for start in starts]


# ---- Checks ----


def check_properties(audio: Audio, channel: int) -> None:
    """Raise `UserError` if no window of the channel can be read from an open recording."""
    check_format(audio.rate, audio.channels, channel)
    if audio.n_frames == 0:
        raise UserError("empty: no samples")


def check_format(rate: int, channels: int, channel: int) -> None:
    """Raise `UserError` for an impossible sample rate, or for a channel that is missing."""
    if not 1_000 <= rate <= 1_000_000:
        raise UserError(f"unreadable: a sample rate of {rate} Hz is not in 1,000 to 1,000,000")
    if channel >= channels:
        count = f"{channels} channels, counted from 0" if channels > 1 else "a single channel"
        raise UserError(f"no channel {channel}: it has {count}")


class Content(NamedTuple):
    """What was found in the samples of a recording."""

    n_frames: int  # decoded
    n_clipped: int  # samples beyond full scale


def scan(audio: Audio, windows: Windows) -> Content:
    """Decode the samples that are used once, as a check; of a file that is checked by its header,
    those up to the first sound.

    Raises:
        UserError: If there are fewer samples than the header states, or if those of the channel
            are not finite, all equal, or too often beyond full scale.
    """
    channel, count = windows.channel, None
    if windows.hop is None:
        is_known = audio.n_frames is not None
        count = (SECONDS if is_known else SECONDS + TOLERATED_SECONDS + 1) * audio.rate
    n_frames = n_clipped = 0
    lowest, highest = np.full(audio.channels, np.inf), np.full(audio.channels, -np.inf)
    for block in audio.read_blocks(count, FIRST_BLOCK if audio.is_checked else BLOCK_SIZE):
        if not np.isfinite(block[:, channel]).all():
            raise UserError("not finite: it holds NaN or infinite samples")
        samples = scale(block)
        lowest = np.minimum(lowest, samples.min(axis=0))
        highest = np.maximum(highest, samples.max(axis=0))
        if audio.is_checked and lowest[channel] < highest[channel]:
            return Content(len(block), 0)
        n_frames += len(block)
        if not audio.is_int16:
            n_clipped += int((np.abs(samples[:, channel]) > FULL_SCALE).sum())
    check_length(audio, n_frames, count)
    if n_clipped > MOST_CLIPPED * n_frames:
        peak = max(-lowest[channel], highest[channel]) / FULL_SCALE
        raise UserError(
            f"beyond full scale: {n_clipped / n_frames:.0%} of its samples are, up to {peak:.6g}, "
            "and full scale is 1; divide the samples by the largest value of their scale (32768 "
            "for 16 bits)"
        )
    has_more = count is not None and (audio.n_frames or n_frames) > count
    check_range(lowest, highest, channel, has_more)
    return Content(n_frames, n_clipped)


def check_length(audio: Audio, n_read: int, wanted: int | None) -> None:
    """Raise `UserError` if an open recording has no samples, or fewer than its header states."""
    if audio.n_frames is None:
        if n_read == 0:
            raise UserError("empty: no samples")
        return
    expected = audio.n_frames if wanted is None else min(audio.n_frames, wanted)
    if n_read < expected:
        raise UserError(f"truncated: {n_read} of {expected} samples can be read")


def check_range(lowest: np.ndarray, highest: np.ndarray, channel: int, has_more: bool) -> None:
    """Raise `UserError` if a channel is silent: if all its samples, of which `lowest` and `highest`
    are the extremes of each channel, are 0 or have another constant value. `has_more` says whether
    more samples follow.
    """
    if lowest[channel] < highest[channel]:
        return
    others = np.flatnonzero(lowest < highest)
    if len(others):
        remedy = f"channel {others[0]} has sound: choose it with --channel {others[0]}"
    elif has_more:
        remedy = "use more of the recording with --window all"
    else:
        remedy = "record it again"
    value = int(lowest[channel])
    seconds = f" in the first {SECONDS} s" if has_more else ""
    raise UserError(
        f"silent: all samples of channel {channel}{seconds} are {value} at 16 bits; {remedy}"
    )


def list_changes(audio: Audio, windows: Windows, n_frames: int) -> list[str]:
    """List how the samples of the windows differ from those in the file, which has `n_frames`."""
    rate = audio.rate
    changes = []
    if audio.channels > 1:
        changes.append(f"have several channels, of which channel {windows.channel} is used")
    if rate != SAMPLE_RATE:
        changes.append(
            f"are resampled to {SAMPLE_RATE} Hz each time they are read; to do it only once, use "
            f"`sox IN.wav -r {SAMPLE_RATE} OUT.wav`"
        )
    if not audio.is_int16:
        changes.append("are rounded to 16 bits")
    if not audio.states_length:
        changes.append("do not state their exact length, and are read to their end")
    if audio.has_excess:
        changes.append("go on behind the length that their header states, where they are not read")
    if n_frames < SECONDS * rate:
        changes.append(f"are shorter than {SECONDS} s and are repeated")
    longest = SECONDS + TOLERATED_SECONDS
    if windows.hop is None and longest * rate < n_frames:
        changes.append(
            f"are longer than {longest} s, and only their first {SECONDS} s are used; to use the "
            "rest as well, add --window all"
        )
    return changes


# ---- Samples ----


def decode(audio: Audio, out: np.ndarray, start: float, channel: int) -> None:
    """Fill `out`, int16 `(N_SAMPLES,)`, with the window that starts at second `start`.

    Raises `UserError` if the file has become shorter than it was when it was checked, or has
    samples that are not finite.
    """
    count = SECONDS * audio.rate
    first = round(start * audio.rate)
    if first:
        audio.skip(first)
    elif audio.n_frames is not None:
        count = min(count, audio.n_frames)
    samples = audio.read_channel(count, channel)
    may_be_short = first == 0 and audio.n_frames is None
    if len(samples) < count and not (may_be_short and len(samples)):
        raise UserError(
            f"truncated: it ends before second {start + count / audio.rate:g}; it was longer "
            "when it was checked"
        )
    if not audio.is_checked and not np.isfinite(samples).all():
        raise UserError("not finite: it holds NaN or infinite samples")
    out[:] = make_window(samples, audio.rate)


def make_window(samples: np.ndarray, rate: int) -> np.ndarray:
    """Return the window that consists of up to 10 s of samples at `rate` in Hz, int16 or in
    [-1, 1): int16 `(N_SAMPLES,)`. Fewer samples are repeated.
    """
    if rate != SAMPLE_RATE:
        samples = resample(samples, rate)
    if samples.dtype != np.int16:
        samples = np.clip(scale(samples), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)
    return samples if len(samples) == N_SAMPLES else np.resize(samples, N_SAMPLES)


def scale(samples: np.ndarray) -> np.ndarray:
    """Return samples in units of int16 samples: of float64 ones in [-1, 1), the rounded values."""
    return samples if samples.dtype == np.int16 else np.round(samples * FULL_SCALE)


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Resample from `rate` in Hz to SAMPLE_RATE, as librosa.resample does. Returns float64."""
    try:
        import soxr  # most data sets do not need it
    except ImportError as error:
        raise UserError(f"soxr is missing, which resamples ({error}); pip install soxr") from None
    if samples.dtype == np.int16:
        samples = samples / FULL_SCALE
    samples = np.clip(samples, -1.0, 1.0)  # or a peak beyond would spread to the samples around it
    result = np.zeros(math.ceil(len(samples) * (SAMPLE_RATE / rate)))
    resampled = soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ")[: len(result)]
    result[: len(resampled)] = resampled
    return result
