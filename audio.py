"""Read the samples of one recording, and check whether it can be used.

A recording is a WAV or FLAC file. It is read in windows of 10 s of one channel, as int16 samples at
16 kHz; a recording shorter than a window is repeated. Only one window at a time is in memory.
"""

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import soundfile

from model.tastgram import N_SAMPLES, SAMPLE_RATE, SECONDS
from utils import UserError

# A recording may be this many seconds longer than a window without a notice: the ToyCar recordings
# of DCASE 2020 are 1 s longer.
TOLERATED_SECONDS = 2
BLOCK_SIZE = 2**20  # samples of all channels together that are read at once
UNKNOWN_LENGTH = 2**63 - 1  # libsndfile's number of frames for a FLAC file written to a pipe

# The WAV format.
MAX_AUDIO_BYTES = 2**32 - 1
UNKNOWN_BYTES = 0xFFFFFFFF  # size of the audio in a file written to a pipe
UNCOMPRESSED = (1, 3, 0xFFFE)  # encodings: PCM, float, extensible


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


def check_recording(path: Path, windows: Windows = FIRST_WINDOW) -> CheckedRecording:
    """Check that the windows of a recording can be used.

    The header of a 16-bit PCM WAV file is compared with its size. Other files are decoded.

    Raises:
        UserError: with the reason, if the file is unreadable, empty, truncated or damaged, lacks
            the channel, or holds samples that are not finite.
    """
    with open_audio(path) as file:
        check_properties(file, windows)
        changes = list_changes(file, windows)
        is_checked_by_header = (file.format, file.subtype) == ("WAV", "PCM_16")
        if not is_checked_by_header and decode_all(file, windows):
            changes.append("exceed full scale and are clipped")
        return CheckedRecording(find_starts(file, windows.hop), changes)


def read_recording(path: Path, out: np.ndarray, start: float = 0.0, channel: int = 0) -> None:
    """Fill `out`, int16 `(N_SAMPLES,)`, with the window that starts at second `start`.

    Raises:
        UserError: With the file and the reason, as in `check_recording`, or if the recording has
            become too short for the window.
    """
    try:
        with open_audio(path) as file:
            check_properties(file, Windows(channel=channel))
            decode(file, out, start, channel)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def find_starts(file: soundfile.SoundFile, hop: float | None) -> list[float]:
    """Return the seconds at which the windows start. The last window ends with the recording."""
    last = file.frames - SECONDS * file.samplerate
    if hop is None or last <= 0:
        return [0.0]
    starts = [*range(0, last, round(hop * file.samplerate)), last]
    return [start / file.samplerate for start in starts]


# ---- Checks ----


@contextlib.contextmanager
def open_audio(path: Path) -> Iterator[soundfile.SoundFile]:
    """Open a WAV or FLAC file for reading, a WAV file after a check of its header.

    Raises `UserError` for errors of the file, including those that occur while it is open.
    """
    try:
        if not path.is_file():
            raise UserError("unreadable: not a file")
        with path.open("rb", buffering=0) as raw:  # unbuffered: libsndfile shares its position
            check_wav(raw)
            raw.seek(0)
            with soundfile.SoundFile(raw.fileno(), closefd=False) as file:
                if file.format not in ("WAV", "WAVEX", "FLAC"):
                    raise UserError(
                        f"unreadable: it is {file.format}, neither WAV nor FLAC; convert it to FLAC"
                    )
                yield file
    except soundfile.SoundFileError as error:
        reason = getattr(error, "error_string", None) or str(error)
        raise UserError(f"unreadable: {reason.strip().rstrip('.')}") from None
    except OSError as error:
        raise UserError(f"unreadable: {error.strerror}") from None


def check_wav(file: BinaryIO) -> None:
    """Check the header of a WAV file against itself and against the size of the file.

    libsndfile reads a truncated or contradictory WAV file without an error: as sound at another
    speed or pitch, or as noise. Files of other formats pass; FLAC has checksums.
    """
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise UserError("empty")
    file.seek(0)
    byte_order = {b"RIFF": "<", b"RIFX": ">"}.get(file.read(12)[:4])
    if byte_order is None:
        return
    while len(header := file.read(8)) == 8:
        name, length = struct.unpack(f"{byte_order}4sI", header)
        start = file.tell()
        if name == b"data":
            check_audio_size(size - start, length)
            return
        if name == b"fmt ":
            check_format(file.read(16), byte_order)
        file.seek(start + length + length % 2)  # chunks are padded to even lengths
    raise UserError("damaged: no audio follows its header")


def check_format(chunk: bytes, byte_order: str) -> None:
    """Check that the numbers in the format chunk of an uncompressed WAV file agree."""
    if len(chunk) < 16:
        return
    encoding, channels, rate, bytes_per_second, bytes_per_frame, bits = struct.unpack(
        f"{byte_order}HHIIHH", chunk
    )
    if encoding not in UNCOMPRESSED:
        return
    has_frame_size = bytes_per_frame == channels * ((bits + 7) // 8)
    if not has_frame_size or bytes_per_second != rate * bytes_per_frame:
        raise UserError(
            f"damaged: the header contradicts itself ({rate} Hz, {channels} channels of {bits} "
            f"bits, {bytes_per_frame} bytes per frame, {bytes_per_second} bytes per second)"
        )


def check_audio_size(available: int, stated: int) -> None:
    """Check that a WAV file has as many bytes of audio available as its header states."""
    if available > MAX_AUDIO_BYTES:
        raise UserError(
            "unreadable: more audio than a WAV header can describe (4 GiB); convert it to FLAC"
        )
    if available < stated < UNKNOWN_BYTES:
        raise UserError(f"truncated: it has {available} of {stated} bytes of audio")


def check_properties(file: soundfile.SoundFile, windows: Windows) -> None:
    """Raise `UserError` if the windows cannot be read from the open file."""
    if not 1_000 <= file.samplerate <= 1_000_000:
        raise UserError(f"unreadable: the header gives a sample rate of {file.samplerate} Hz")
    if file.frames == 0:
        raise UserError("empty: no samples")
    if windows.channel >= file.channels:
        count = f"{file.channels} channels, counted from 0"
        if file.channels == 1:
            count = "a single channel"
        raise UserError(f"no channel {windows.channel}: it has {count}")
    if windows.hop is not None and file.frames == UNKNOWN_LENGTH:
        raise UserError(
            "unreadable: its header does not contain its length; encode it again (flac --decode, "
            "then flac)"
        )


def list_changes(file: soundfile.SoundFile, windows: Windows) -> list[str]:
    """List how the samples of the windows differ from those in the file."""
    rate, frames = file.samplerate, file.frames
    changes = []
    if file.channels > 1:
        changes.append(f"have several channels, of which channel {windows.channel} is used")
    if rate != SAMPLE_RATE:
        changes.append(
            f"are resampled to {SAMPLE_RATE} Hz each time they are read; to do it only once, use "
            f"`sox IN.wav -r {SAMPLE_RATE} OUT.wav`"
        )
    if file.subtype != "PCM_16":
        changes.append("are rounded to 16 bits")
    if frames < SECONDS * rate:
        changes.append(f"are shorter than {SECONDS} s and are repeated")
    longest = SECONDS + TOLERATED_SECONDS
    if windows.hop is None and longest * rate < frames < UNKNOWN_LENGTH:
        changes.append(
            f"are longer than {longest} s, and only their first {SECONDS} s are used; to use the "
            "rest as well, add --window all"
        )
    return changes


# ---- Samples ----


def decode_all(file: soundfile.SoundFile, windows: Windows) -> bool:
    """Decode each sample of the windows once, as a check. Returns whether any was clipped."""
    hop = None if windows.hop is None else SECONDS
    samples = np.empty(N_SAMPLES, dtype=np.int16)
    is_clipped = False
    for start in find_starts(file, hop):
        is_clipped |= decode(file, samples, start, windows.channel)
    return is_clipped


def decode(file: soundfile.SoundFile, out: np.ndarray, start: float, channel: int) -> bool:
    """Fill `out`, int16 `(N_SAMPLES,)`, with the window that starts at second `start`.

    Returns whether any sample was clipped. Raises `UserError` if the file has fewer samples than
    its header states, or samples that are not finite.
    """
    seek_window(file, start)
    expected = min(file.frames, SECONDS * file.samplerate)
    is_exact = file.subtype == "PCM_16" and file.samplerate == SAMPLE_RATE
    if is_exact and file.channels == 1 and expected == N_SAMPLES:
        samples = file.read(out=out)  # twice as fast as through another array
    else:
        samples = read_channel(file, channel, expected, "int16" if is_exact else "float64")
    if len(samples) < expected:
        raise UserError(f"truncated: {len(samples)} of {expected} samples can be read")
    is_clipped = False
    if not is_exact:
        if not np.isfinite(samples).all():
            raise UserError("not finite: it holds NaN or infinite samples")
        samples, is_clipped = round_to_int16(resample(samples, file.samplerate))
    if samples is not out:
        out[:] = np.resize(samples, N_SAMPLES)
    return is_clipped


def seek_window(file: soundfile.SoundFile, start: float) -> None:
    """Move to the first sample of the window that starts at second `start`."""
    first = round(start * file.samplerate)
    if first == 0:
        return
    if first + SECONDS * file.samplerate > file.frames:
        raise UserError(
            f"truncated: it ends before second {start + SECONDS:g}; it was longer when it was "
            "checked"
        )
    file.seek(first)


def read_channel(file: soundfile.SoundFile, channel: int, count: int, dtype: str) -> np.ndarray:
    """Read up to `count` samples of one channel.

    All channels are read block by block, since together they may not fit into memory.
    """
    size = max(1, BLOCK_SIZE // file.channels)
    blocks = []
    for start in range(0, count, size):
        block = file.read(min(size, count - start), dtype, always_2d=True)
        blocks.append(block[:, channel].copy())
    return np.concatenate(blocks)


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Resample from `rate` in Hz to SAMPLE_RATE."""
    if rate == SAMPLE_RATE:
        return samples
    import librosa  # slow to import, and most data sets do not need it

    return librosa.resample(samples, orig_sr=rate, target_sr=SAMPLE_RATE)


def round_to_int16(samples: np.ndarray) -> tuple[np.ndarray, bool]:
    """Round samples in [-1, 1] to int16. Returns them, and whether any was clipped.

    Full scale, 1.0, becomes 32767 and does not count as clipped.
    """
    scaled = np.round(samples * 32768.0)
    is_clipped = bool((np.abs(scaled) > 32768).any())
    return np.clip(scaled, -32768, 32767).astype(np.int16), is_clipped
