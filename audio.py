"""One recording to samples, or the reason why it cannot be used.

Of a WAV or FLAC file windows of 10 s of one channel are read, as int16 at 16 kHz; a shorter
recording is repeated. No more than a window is in memory, however long the recording is.
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

# seconds that may be left over behind the first window without a word: published clips have one
TOLERATED = 2
BLOCK = 2**20  # samples of all channels that are read at once
MOST_BYTES = 2**32 - 1  # of the audio of a WAV file
UNKNOWN = (
    2**63 - 1
)  # what libsndfile gives for the frames of a FLAC file that was written to a pipe


class Recording(NamedTuple):
    """The seconds at which its windows start, and what has to be changed in it, as in "12
    recordings ...".
    """

    starts: list[float]
    changes: list[str]


def check_recording(path: Path, channel: int = 0, hop: float | None = None) -> Recording:
    """What there is of a channel, counted from 0, in windows that start `hop` seconds apart, the
    last one ending with the recording; or in the first window alone.

    Raises `UserError` with the reason for a file that is unreadable, empty, cut short, damaged, not
    finite, or without the channel. 16-bit PCM WAV is judged by its header against its size,
    anything else by reading the windows.
    """
    with open_audio(path) as file:
        changes = list_changes(file, channel, hop)
        if (file.format, file.subtype) != ("WAV", "PCM_16"):
            row, once = (
                np.empty(N_SAMPLES, dtype=np.int16),
                None if hop is None else SECONDS,
            )  # each sample once
            if sum(decode(file, row, start, channel) for start in find_windows(file, once)):
                changes.append("exceed full scale and were clipped")
        return Recording(find_windows(file, hop), changes)


def read_recording(path: Path, out: np.ndarray, start: float = 0.0, channel: int = 0) -> None:
    """Fill `out`, int16 `(N_SAMPLES,)`, with the samples of the window that starts at this second.
    Raises the same as `check_recording`, and if a later window than the first one is not there any
    more.
    """
    with open_audio(path) as file:
        list_changes(file, channel)
        decode(file, out, start, channel)


def find_windows(file: soundfile.SoundFile, hop: float | None) -> list[float]:
    last = file.frames - SECONDS * file.samplerate
    if hop is None or last <= 0:
        return [0.0]
    return [
        frame / file.samplerate for frame in (*range(0, last, round(hop * file.samplerate)), last)
    ]


@contextlib.contextmanager
def open_audio(path: Path) -> Iterator[soundfile.SoundFile]:
    """The open file; a WAV file's header agrees with itself and with the file's size."""
    try:
        if not path.is_file():
            raise UserError("unreadable: not a file")
        with path.open("rb", buffering=0) as raw:  # its position is that of the descriptor
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
    """Walk through the chunks of a WAV file to its audio. soundfile reads half a file, or one whose
    numbers contradict each other, without an error: sound at another speed or pitch, or noise. FLAC
    has checksums of its own.
    """
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise UserError("empty")
    file.seek(0)
    order = {b"RIFF": "<", b"RIFX": ">"}.get(file.read(12)[:4])
    if order is None:
        return
    while len(header := file.read(8)) == 8:
        name, length = struct.unpack(f"{order}4sI", header)
        start = file.tell()
        if name == b"fmt " and len(chunk := file.read(16)) == 16:
            kind, channels, rate, byte_rate, frame, bits = struct.unpack(f"{order}HHIIHH", chunk)
            is_uncompressed = kind in (1, 3, 0xFFFE)  # PCM, float, extensible
            if is_uncompressed and (
                frame != channels * ((bits + 7) // 8) or byte_rate != rate * frame
            ):
                raise UserError(
                    f"damaged: the header contradicts itself ({rate} Hz, {channels} channels of {bits} bits, {frame} "
                    f"bytes at a time, {byte_rate} bytes a second)"
                )
        if name == b"data":
            if size - start > MOST_BYTES:
                raise UserError(
                    "unreadable: more audio than a WAV file can say (4 GiB); convert it to FLAC"
                )
            if (
                size - start < length < 0xFFFFFFFF
            ):  # a program that wrote to a pipe could not know the length
                raise UserError(f"truncated: {size - start} of {length} bytes of audio are there")
            return
        file.seek(start + length + length % 2)  # chunks are padded to even lengths
    raise UserError("damaged: there is no audio behind its header")


def list_changes(file: soundfile.SoundFile, channel: int, hop: float | None = None) -> list[str]:
    if not 1_000 <= file.samplerate <= 1_000_000:
        raise UserError(f"unreadable: the header gives a sample rate of {file.samplerate} Hz")
    if file.frames == 0:
        raise UserError("empty: no samples")
    if channel >= file.channels:
        count = (
            "a single channel"
            if file.channels == 1
            else f"{file.channels} channels, counted from 0"
        )
        raise UserError(f"no channel {channel}: it has {count}")
    if hop is not None and file.frames == UNKNOWN:
        raise UserError(
            "unreadable: its header does not say how long it is; write it anew (flac --decode, then flac)"
        )
    changes = {
        f"have several channels: channel {channel} is used": file.channels > 1,
        f"are resampled to {SAMPLE_RATE} Hz at each reading; `sox IN.wav -r {SAMPLE_RATE} OUT.wav` does it once": (
            file.samplerate != SAMPLE_RATE
        ),
        "are rounded to 16 bits": file.subtype != "PCM_16",
        f"are shorter than {SECONDS} s and are repeated": file.frames < SECONDS * file.samplerate,
        f"are longer than {SECONDS + TOLERATED} s, and only their first {SECONDS} s count (--window all takes all)": (
            hop is None and (SECONDS + TOLERATED) * file.samplerate < file.frames < UNKNOWN
        ),
    }
    return [change for change, is_needed in changes.items() if is_needed]


def decode(file: soundfile.SoundFile, out: np.ndarray, start: float, channel: int) -> bool:
    """Fill `out` with the samples of a window; returns whether any had to be clipped."""
    first, length = round(start * file.samplerate), SECONDS * file.samplerate
    if first:
        if first + length > file.frames:
            raise UserError(
                f"truncated: it ends before second {start + SECONDS:g}; it was longer when it was checked"
            )
        file.seek(first)
    expected, is_clipped = min(file.frames, length), False
    is_exact = file.subtype == "PCM_16" and file.samplerate == SAMPLE_RATE
    if is_exact and file.channels == 1 and expected == N_SAMPLES:
        samples = file.read(out=out)  # twice as fast as through an array of its own
    else:
        samples = read_channel(file, channel, expected, "int16" if is_exact else "float64")
    if len(samples) < expected:
        raise UserError(f"truncated: {len(samples)} of {expected} samples can be read")
    if not is_exact:
        samples, is_clipped = round_to_int16(resample(samples, file.samplerate))
    if samples is not out:
        out[:] = np.resize(samples, N_SAMPLES)
    return is_clipped


def read_channel(file: soundfile.SoundFile, channel: int, count: int, dtype: str) -> np.ndarray:
    """Up to `count` samples of one channel, read in blocks: all channels together may not fit into
    the memory.
    """
    size = max(1, BLOCK // file.channels)
    sizes = [min(size, count - start) for start in range(0, count, size)]
    return np.concatenate(
        [file.read(size, dtype, always_2d=True)[:, channel].copy() for size in sizes]
    )


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    if not np.isfinite(samples).all():
        raise UserError("not finite: it holds NaN or infinite samples")
    if rate == SAMPLE_RATE:
        return samples
    import librosa  # slow to import, and most data sets do not need it

    return librosa.resample(samples, orig_sr=rate, target_sr=SAMPLE_RATE)


def round_to_int16(samples: np.ndarray) -> tuple[np.ndarray, bool]:
    """Samples in [-1, 1] as int16, and whether any had to be clipped (full scale itself, 1.0, does
    not count).
    """
    scaled = np.round(samples * 32768.0)
    return np.clip(scaled, -32768, 32767).astype(np.int16), bool((np.abs(scaled) > 32768).any())
