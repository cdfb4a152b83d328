"""Recordings damaged on purpose, as a folder of real recordings may hold after years on a disk.

`broken(kind, path)` makes one of the kinds in `BROKEN`. `spoilt_recordings(count)` damages `count`
recordings at random, with the `DAMAGES` in turn, and gives the samples that each must be read as.
It begins with intact 16-bit mono WAV files at 16 kHz. They are synthetic, unless the environment
variable RECORDINGS names a folder that holds real ones at any depth:

    RECORDINGS=/data/dcase2020 python -m pytest -m slow tests/test_audio.py tests/test_dataloader.py
"""

import contextlib
import faulthandler
import os
import random
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import tone, write_clip, write_set

NOBODY = 65534  # an ordinary user
HEADER = 44  # bytes before the samples, in a WAV file with the chunks "fmt " and "data" alone
NOT_A_CLIP = "passed over"  # its name is not that of a clip
HIDDEN = "passed over without a word"


@dataclass(frozen=True)
class Spoilt:
    """A damaged recording."""

    path: Path
    damage: str
    # the samples that must be read; None: it must be refused; NOT_A_CLIP, HIDDEN: it must be
    # passed over
    expected: np.ndarray | str | None


# The new content of a file, and the samples that must be read: None if it must be refused.
Made = tuple[bytes, np.ndarray | None]


def wav(samples: np.ndarray, kind: int, bits: int, rate: int = 16_000, order: str = "<") -> bytes:
    """Build the bytes of a WAV file by hand, without the checks of a library."""
    raw = samples.tobytes()
    frame = bits // 8
    form = struct.pack(f"{order}HHIIHH", kind, 1, rate, rate * frame, frame, bits)
    riff = b"RIFF" if order == "<" else b"RIFX"
    chunks = (
        b"fmt "
        + struct.pack(f"{order}I", 16)
        + form
        + b"data"
        + struct.pack(f"{order}I", len(raw))
        + raw
    )
    return riff + struct.pack(f"{order}I", 4 + len(chunks)) + b"WAVE" + chunks


def header_cut(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    return content[: rng.randrange(1, HEADER)], None


def start_lost(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    return content[rng.randrange(1, HEADER + 100) :], None


def audio_cut(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    return content[: rng.randrange(HEADER, len(content))], None


def data_size_too_large(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    excess = rng.choice([1, 2, 1000, 2**20, 2**31 - 2**19, 2**32 - 2**19])
    size = len(content) - HEADER + excess
    return content[:40] + struct.pack("<I", size) + content[44:], None


def data_size_too_small(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    """Looks like a shorter clip with something else behind it."""
    size = rng.choice([40, 1000, 1001, rng.randrange(40, len(content) - HEADER - 100)])
    return content[:40] + struct.pack("<I", size) + content[44:], samples[: size // 2]


def data_size_unknown(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    """A recorder that lost its power leaves 0, a program that writes to a pipe a number near the
    largest that 31 or 32 bits hold; the last sample may be incomplete.
    """
    size = rng.choice([0, 0x7FFF_F000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFD0, 0xFFFF_FFFF])
    lost = rng.choice([0, 1, 2, 999, len(samples)])
    audio = content[HEADER : len(content) - lost]
    return content[:40] + struct.pack("<I", size) + audio, samples[: len(audio) // 2]


def riff_size_lies(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    """A program that was killed leaves 0 as the size in the RIFF header. No reader needs it."""
    size = rng.choice([0, 1, 36, 2**31, 2**32 - 1])
    return content[:4] + struct.pack("<I", size) + content[8:], samples


def format_size_lies(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    size = rng.choice([0, 2, 15, 17, 18, 40, 1000, 2**32 - 1])
    return content[:16] + struct.pack("<I", size) + content[20:], None


def format_changed(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    """Change one of: encoding, channels, rate, bytes per second, bytes per frame, bits."""
    offset, width = rng.choice([(20, 2), (22, 2), (24, 4), (28, 4), (32, 2), (34, 2)])
    old = int.from_bytes(content[offset : offset + width], "little")
    new = old ^ (1 << rng.randrange(8 * width))
    return content[:offset] + new.to_bytes(width, "little") + content[offset + width :], None


def chunk_name_changed(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    offset = rng.choice([0, 8, 12, 36])
    return content[:offset] + rng.randbytes(4) + content[offset + 4 :], None


def not_finite(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    floats = samples.astype(np.float32) / 32768
    floats[rng.randrange(len(floats))] = rng.choice([np.nan, np.inf, -np.inf])
    return wav(floats, kind=3, bits=32), None


def digital_silence(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    """A microphone that is not connected, or whose converter has an offset."""
    return wav(np.full_like(samples, rng.choice([0, 0, -8, 32767])), kind=1, bits=16), None


def without_scaling(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    """16-bit values that were saved as floating-point numbers."""
    return wav(samples.astype(np.float32), kind=3, bits=32), None


def tag_in_front(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    tag = b"ID3\3\0\0" + bytes([0, 0, 1, 4]) + rng.randbytes(132)
    return tag + content, samples


def tag_in_front_and_cut(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    whole, _ = tag_in_front(content, samples, rng)
    return whole[: rng.randrange(len(whole) // 2, len(whole))], None


def four_bytes_for_24_bits(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    """As `arecord -f S24_LE` writes them."""
    made = bytearray(wav(samples.astype("<i4") << 8, kind=1, bits=32))
    made[34:36] = struct.pack("<H", 24)
    return bytes(made), None


def empty(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    return b"", None


def no_samples(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    return wav(samples[:0], kind=1, bits=16), None


def noise(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    return rng.randbytes(rng.choice([1, 44, 4096, 320_044])), None


def zeros(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    """Some file systems leave zeros of a file that was being written when the power failed."""
    return bytes(len(content)), None


def header_alone(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    return content[:HEADER], None


def web_page(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    return b"<!DOCTYPE html><html><body>403 Forbidden</body></html>\n", None


def further_chunks(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    """Add notes of a recorder, of odd or even length, before and behind the audio."""
    note = rng.randbytes(rng.randrange(1, 300))
    chunk = b"bext" + struct.pack("<I", len(note)) + note + b"\0" * (len(note) % 2)
    return content[:12] + chunk + content[12:] + chunk, samples


def foreign_bytes_behind(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    return content + rng.randbytes(rng.randrange(1, 300)), samples


def other_encoding(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    encodings = [
        wav(samples.astype(">i2"), kind=1, bits=16, order=">"),
        wav(samples.astype(np.int32) << 16, kind=1, bits=32),
        wav(samples / np.float64(32768), kind=3, bits=64),
    ]
    return rng.choice(encodings), samples


def fewer_samples(content: bytes, samples: np.ndarray, rng: random.Random) -> Made:
    shorter = samples[: rng.randrange(20, len(samples))]
    return wav(shorter, kind=1, bits=16), shorter


def without_length(content: bytes) -> bytes:
    """Set the number of samples of a FLAC file to 0, as encoders do that write to a pipe."""
    return content[:21] + bytes([content[21] & 0xF0, 0, 0, 0, 0]) + content[26:]


def flac(path: Path, samples: np.ndarray) -> bytes:
    soundfile.write(path, samples, 16_000, format="FLAC")
    return path.read_bytes()


CONTENT: list[Callable[[bytes, np.ndarray, random.Random], Made]] = [
    header_cut, start_lost, audio_cut, data_size_too_large, data_size_too_small,
    data_size_unknown, riff_size_lies, format_size_lies, format_changed, chunk_name_changed,
    not_finite, digital_silence, without_scaling, tag_in_front, tag_in_front_and_cut,
    four_bytes_for_24_bits, empty, no_samples, noise, zeros, header_alone, web_page,
    further_chunks, foreign_bytes_behind, other_encoding, fewer_samples,
]  # fmt: skip
FILES = [
    "flac named wav", "flac cut", "flac flipped", "flac without length", "flac with 20 bits",
    "ogg named wav", "mp4 named wav", "folder", "link to nothing", "link to itself", "pipe",
    "unreadable", "name not UTF-8", "line break in the name", "wrong ending", "hidden",
]  # fmt: skip
DAMAGES = [*CONTENT, *FILES]


def mutate(folder: Path, sources: Sequence[Path], count: int, seed: int) -> list[Spoilt]:
    """Make `count` damaged recordings `normal_id_00_NNNNNNNN.wav` in the folder. They depend on
    the sources and the seed alone.
    """
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    spoilt = []
    for number in range(count):
        path, damage = folder / f"normal_id_00_{number:08d}.wav", DAMAGES[number % len(DAMAGES)]
        shutil.copyfile(rng.choice(list(sources)), path)
        content = path.read_bytes()
        samples = np.frombuffer(content[HEADER:], dtype="<i2")
        if callable(damage):
            content, expected = damage(content, samples, rng)
            path.write_bytes(content)
            spoilt.append(Spoilt(path, damage.__name__, expected))
        else:
            spoilt.append(spoil_file(path, damage, samples, rng))
    return spoilt


def spoil_file(path: Path, damage: str, samples: np.ndarray, rng: random.Random) -> Spoilt:
    """Damage a file as a whole: its format, its type, its permissions or its name."""
    expected: np.ndarray | str | None = None
    if damage == "flac named wav":
        path.write_bytes(flac(path, samples))
        expected = samples
    elif damage == "flac cut":
        content = flac(path, samples)
        path.write_bytes(content[: rng.randrange(1, len(content) - 1)])
    elif damage == "flac flipped":
        content = bytearray(flac(path, samples))
        content[rng.randrange(9000, len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif damage == "flac without length":
        path.write_bytes(without_length(flac(path, samples)))
        expected = samples
    elif damage == "flac with 20 bits":
        content = bytearray(flac(path, samples))
        content[20:22] = content[20] | 1, content[21] & 0x0F | 0x30  # in STREAMINFO: less one
        path.write_bytes(content)
    elif damage == "ogg named wav":
        soundfile.write(path, samples, 16_000, format="OGG")
    elif damage == "mp4 named wav":
        path.write_bytes(b"\0\0\0\x20ftypM4A " + rng.randbytes(5000))
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage in ("link to nothing", "link to itself"):
        path.unlink()
        path.symlink_to(path if damage == "link to itself" else path.with_name("nothing.wav"))
    elif damage == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif damage == "unreadable":
        path.chmod(0)
    elif damage == "name not UTF-8":
        path = path.rename(os.fsdecode(os.fsencode(path.with_suffix("")) + b"_\xff\xfe.wav"))
        expected = samples
    elif damage == "line break in the name":
        path, expected = path.rename(path.with_name(f"{path.stem}_\n.wav")), NOT_A_CLIP
    elif damage == "wrong ending":
        path = path.rename(path.with_suffix(rng.choice([".mp3", ".wav.part", ".wav~", ".txt", ""])))
        expected = NOT_A_CLIP
    elif damage == "hidden":
        path, expected = path.rename(path.with_name(f"._{path.name}")), HIDDEN
    return Spoilt(path, damage, expected)


@contextlib.contextmanager
def spoilt_recordings(count: int) -> Iterator[tuple[Path, list[Spoilt]]]:
    """Make a folder with a data set in `data`, in which the machine type fan has damaged recordings
    among intact ones. The caller continues as an ordinary user, so that file permissions apply, and
    has five minutes.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        write_set(folder / "data")
        if given := os.environ.get("RECORDINGS"):
            sources = sorted(Path(given).rglob("*.wav"))
        else:
            sources = [write_clip(folder / f"{index}.wav", tone(index)) for index in range(5)]
        spoilt = mutate(folder / "data" / "fan" / "train", sources, count, seed=20)
        # A reader that hangs in C code does not react to signals.
        faulthandler.dump_traceback_later(300, exit=True)
        user = os.geteuid()
        if user == 0:
            os.seteuid(NOBODY)
        try:
            yield folder, spoilt
        finally:
            os.seteuid(user)
            faulthandler.cancel_dump_traceback_later()


each_damage_and_200 = pytest.mark.parametrize(
    "count",
    [pytest.param(len(DAMAGES), id="each"), pytest.param(200, id="200", marks=pytest.mark.slow)],
)

# ---- One unusable recording ----

BROKEN = {  # kind of damage: reason that is to be given
    "empty": "empty",
    "no samples": "empty",
    "cut in half": "truncated",
    "header only": "damaged|truncated",
    "no audio": "unreadable|damaged",
    "wrong speed": "damaged",
    "text": "unreadable",
    "nan": "not finite",
    "infinite, resampled": "not finite",
    "ogg": "it is OGG",
    "absurd rate": "sample rate of 3 Hz",
    "folder": "unreadable: not a file",
    "flac cut": "truncated|damaged: libsndfile cannot decode it",
    "silent": "silent: all samples of channel 0 are 0 at 16 bits; record it again",
    "not scaled": "beyond full scale: 1?[0-9]+% of its samples are, up to [0-9.]+, and full",
    "24 bits in 4 bytes": "unreadable: 24 bits in four bytes per sample, as arecord -f S24_LE",
    "mp4": r"it is MP4 \(such as M4A\), neither WAV nor FLAC; convert it to FLAC",
    "mp3 in wav": "WAV with the codec MP3; convert it to FLAC",
    "big-endian, cut": "truncated",
    "float, cut": "truncated",
    "pipe": "unreadable: not a file",
    "missing": "unreadable: not a file",
}


def broken(kind: str, path: Path) -> None:
    """Make `path` a recording that cannot be used."""
    write_clip(path, tone(0, 2.0))
    content = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "no samples":
        write_clip(path, np.zeros(0))
    elif kind == "cut in half":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "header only":
        path.write_bytes(content[:30])
    elif kind == "no audio":
        path.write_bytes(content[:36])
    elif kind == "wrong speed":
        path.write_bytes(content[:24] + struct.pack("<I", 32_000) + content[28:])
    elif kind == "text":
        path.write_text("not audio\n")
    elif kind == "nan":
        samples = tone(0, 2.0)
        samples[100] = np.nan
        write_clip(path, samples, subtype="FLOAT")
    elif kind == "infinite, resampled":
        samples = tone(0, 2.0)
        samples[100] = np.inf
        write_clip(path, samples, rate=22_050, subtype="FLOAT")
    elif kind == "ogg":
        soundfile.write(path, tone(0, 2.0), 16_000, format="OGG")
    elif kind == "absurd rate":
        path.write_bytes(content[:24] + struct.pack("<II", 3, 6) + content[32:])
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "flac cut":
        soundfile.write(
            path, np.random.default_rng(0).normal(0, 0.1, 32_000), 16_000, format="FLAC"
        )
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif kind == "big-endian, cut":
        soundfile.write(path, tone(0, 2.0), 16_000, endian="BIG")
        path.write_bytes(path.read_bytes()[:20_000])
    elif kind == "float, cut":
        write_clip(path, tone(0, 2.0), subtype="FLOAT")
        path.write_bytes(path.read_bytes()[:20_000])
    elif kind == "silent":
        write_clip(path, np.zeros(32_000))
    elif kind == "not scaled":
        path.write_bytes(wav(np.float32(32768 * tone(0, 2.0)), kind=3, bits=32))
    elif kind == "24 bits in 4 bytes":
        made = bytearray(wav(np.arange(32_000, dtype="<i4"), kind=1, bits=32))
        made[34] = 24
        path.write_bytes(made)
    elif kind == "mp4":
        path.write_bytes(b"\0\0\0\x20ftypM4A " + content)
    elif kind == "mp3 in wav":
        path.write_bytes(wav(np.zeros(32_000, np.uint8), kind=0x55, bits=8))
    elif kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif kind == "missing":
        path.unlink()
        path.symlink_to(path.with_name("nothing.wav"))  # listed in its folder all the same
    else:
        raise AssertionError(kind)
