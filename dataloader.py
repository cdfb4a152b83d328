"""From a folder of recordings to batches of waveforms.

    <data_root>/<machine type>/{train,test}/{normal,anomaly}_id_XX_*.wav    (or .flac)

`find_clips` lists what the class table asks for, `WaveformStore` decodes each recording once into one file of
int16 samples that every later run and every process maps into memory, and `ClipSet` gathers batches from it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import torch
from torch import Tensor
from tqdm import tqdm

from model.tastgram import N_SAMPLES, SAMPLE_RATE, SECONDS
from utils import ORDER, SPLIT, Config, UserError, notice, random_stream, replace_file

CLIP_NAME = re.compile(r"(?P<condition>normal|anomaly)_id_(?P<machine_id>[0-9]+)_.*\.(wav|flac)", re.IGNORECASE)
HOW_TO_GET_DATA = (
    "`python datasets/download.py` fetches DCASE 2020 Task 2, `python datasets/synthesize.py` makes a small set"
)

# ---------------------------------------------------------------------------------------------------------------
# Which recordings
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """One recording: where it lies, which machine it is of, and its class."""

    path: Path
    machine_type: str
    machine_id: int
    label: int
    is_anomaly: bool


def class_labels(machines: Mapping[str, Sequence[int]]) -> dict[tuple[str, int], int]:
    """The class of each (machine type, machine ID), numbered in the order of the table."""
    pairs = [(machine_type, machine_id) for machine_type, ids in machines.items() for machine_id in ids]
    return {pair: label for label, pair in enumerate(pairs)}


def find_clips(data_root: str | Path, machines: Mapping[str, Sequence[int]], split: str) -> list[Clip]:
    """The clips of `split` ("train": normal only, "test": normal and anomalous), ordered by type and file name.

    The ID is read from the file name. What is passed over, and what is missing from the table, is said in notices.
    Raises `UserError` where there is nothing to read: for training any missing folder of a machine type, for
    testing only if all are missing.
    """
    root, labels = Path(data_root), class_labels(machines)
    clips, skipped, absent = [], Counter(), []
    for machine_type in machines:
        folder = root / machine_type / split
        if not folder.is_dir():
            absent.append(machine_type)
            continue
        for name in sorted(entry.name for entry in folder.iterdir()):
            match = CLIP_NAME.fullmatch(name)
            if not match:
                skipped["with names other than {normal,anomaly}_id_XX_*.wav or .flac"] += 1
                continue
            machine = (machine_type, int(match["machine_id"]))
            is_anomaly = match["condition"].lower() == "anomaly"
            if machine not in labels:
                skipped["of IDs outside the table of machines"] += 1
            elif is_anomaly and split == "train":
                skipped["named anomaly: training takes normal ones only"] += 1
            else:
                clips.append(Clip(folder / name, *machine, labels[machine], is_anomaly))

    looked_for = f"{root}/<machine type>/{split}/{'normal' if split == 'train' else '{normal,anomaly}'}_id_XX_*.wav"
    if absent and (split == "train" or len(absent) == len(machines)):
        folder = root / absent[0] / split if root.is_dir() else root
        raise UserError(
            f"no folder {folder} (looked for {looked_for}); {HOW_TO_GET_DATA}; "
            f"--data_root names another place{', --machines other machine types' if split == 'train' else ''}"
        )
    if not clips:
        raise UserError(f"no clips found: looked for {looked_for} of the IDs in machines; {HOW_TO_GET_DATA}")
    for what, count in skipped.items():
        notice(f"{root}, {split}: skipped {count} file{'s' if count > 1 else ''} {what}")
    if absent:
        notice(f"{root}: no {split} folder for {', '.join(absent)}")
    present = {(clip.machine_type, clip.machine_id) for clip in clips}
    missing = [f"{t} {i:02d}" for t, i in labels if (t, i) not in present and t not in absent]
    if split == "train" and len(present) < 2:
        raise UserError(f"{root}: training clips of one machine ID only, and the method learns by telling IDs apart")
    if missing:
        notice(f"{root}, {split}: {len(missing)} of {len(labels)} machine IDs have no clips: {', '.join(missing)}")
    return clips


# ---------------------------------------------------------------------------------------------------------------
# One recording
# ---------------------------------------------------------------------------------------------------------------


def read_clip(path: Path) -> tuple[np.ndarray, list[str]]:
    """The first 10 s of a WAV or FLAC file as int16 `(N_SAMPLES,)`, and what had to be changed for that.

    16-bit PCM comes through as it is. Of several channels the first is taken; another sample rate is resampled;
    24-bit and float samples are rounded to 16 bits; a shorter clip is repeated. Raises `UserError` with the reason
    for a file that is unreadable, empty, cut short or not finite.
    """
    try:
        check_complete(path)
        with soundfile.SoundFile(os.fsencode(path)) as file:
            return decode(file)
    except soundfile.SoundFileError as error:
        reason = getattr(error, "error_string", None) or str(error)
        raise UserError(f"unreadable: {reason.strip().rstrip('.')}") from None
    except OSError as error:
        raise UserError(f"unreadable: {error.strerror}") from None


def check_complete(path: Path) -> None:
    """Compare the audio that a WAV header announces with the file's size: the decoder would not say a word."""
    if not path.is_file():
        raise UserError("unreadable: not a file")
    size = path.stat().st_size
    if size == 0:
        raise UserError("empty")
    with path.open("rb") as file:
        riff, _, wave = struct.unpack("<4sI4s", file.read(12).ljust(12))
        if riff not in (b"RIFF", b"RIFX") or wave != b"WAVE":
            return
        while len(header := file.read(8)) == 8:
            name, length = struct.unpack("<4sI" if riff == b"RIFF" else ">4sI", header)
            if name == b"data":
                present = size - file.tell()
                if present < length < 0xFFFFFFFF:  # a program that wrote to a pipe could not know the length
                    raise UserError(f"truncated: {present} of {length} bytes of audio are there")
                return
            file.seek(length + length % 2, os.SEEK_CUR)  # chunks are padded to even lengths


def decode(file: soundfile.SoundFile) -> tuple[np.ndarray, list[str]]:
    if file.format not in ("WAV", "WAVEX", "FLAC"):
        raise UserError(f"unreadable: it is {file.format}, neither WAV nor FLAC")
    rate = file.samplerate
    if not 1_000 <= rate <= 1_000_000:
        raise UserError(f"unreadable: the header gives a sample rate of {rate} Hz")
    expected = min(file.frames, SECONDS * rate)
    is_exact = file.subtype == "PCM_16" and rate == SAMPLE_RATE
    samples = file.read(expected, dtype="int16" if is_exact else "float64", always_2d=True)[:, 0]
    if len(samples) == 0:
        raise UserError("empty: no samples")
    if len(samples) < expected:
        raise UserError(f"truncated: {len(samples)} of {expected} samples can be read")

    changes = []
    if file.channels > 1:
        changes.append("have several channels: the first is used")
    if rate != SAMPLE_RATE:
        changes.append(f"were resampled to {SAMPLE_RATE} Hz")
        check_finite(samples)
        samples = resample(samples, rate)
    if not is_exact:
        check_finite(samples)
        samples, is_clipped = round_to_int16(samples)
        if file.subtype != "PCM_16":
            changes.append("were rounded to 16 bits")
        if is_clipped:
            changes.append("exceed full scale and were clipped")
    if len(samples) < N_SAMPLES:
        changes.append(f"are shorter than {SECONDS} s and were repeated")
    return np.resize(samples, N_SAMPLES), changes


def check_finite(samples: np.ndarray) -> None:
    if not np.isfinite(samples).all():
        raise UserError("not finite: it holds NaN or infinite samples")


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    import librosa  # slow to import, and most data sets do not need it

    return librosa.resample(samples, orig_sr=rate, target_sr=SAMPLE_RATE)


def round_to_int16(samples: np.ndarray) -> tuple[np.ndarray, bool]:
    """Samples in [-1, 1] to int16, and whether any had to be clipped (full scale itself, 1.0, does not count)."""
    scaled = np.round(samples * 32768.0)
    return np.clip(scaled, -32768, 32767).astype(np.int16), bool((np.abs(scaled) > 32768).any())


# ---------------------------------------------------------------------------------------------------------------
# All recordings, decoded once
# ---------------------------------------------------------------------------------------------------------------

ROW_BYTES = N_SAMPLES * 2
STORE_VERSION = 1  # raise it with any change of how recordings are decoded
ROWS_BETWEEN_ENTRIES = 4096  # what a crash while decoding costs at most


class WaveformStore:
    """Decoded recordings of one data folder: `waveforms.int16`, a row of `N_SAMPLES` for each, and `index.json`.

    Rows are only ever appended, and count once the index names them, so that processes which map the file are
    never disturbed, and what a crash left behind is overwritten by the next build. A recording that changed
    (size or time) is decoded again into a new row. A lock lets one process build at a time; the others wait and
    then find everything there.
    """

    def __init__(self, store_path: str | Path, data_root: str | Path):
        self.root = Path(data_root).resolve()
        digest = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:12]
        name = self.root.name or "root"
        self.folder = Path(store_path) / f"{name}-{digest}-{SAMPLE_RATE}Hz-{SECONDS}s-v{STORE_VERSION}"
        self.samples_file, self.index_file = self.folder / "waveforms.int16", self.folder / "index.json"

    def gather(self, paths: Sequence[Path], num_workers: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """All waveforms `(rows, N_SAMPLES)`, memory-mapped, and the row of each path; decodes what is not there yet.

        Raises `UserError` that names every file that cannot be used.
        """
        index = self.read_index()
        if any(self.is_stale(index, path) for path in paths):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with self.lock():
                    index = self.read_index()  # another process may have built it in the meantime
                    self.add(index, [path for path in paths if self.is_stale(index, path)], num_workers)
            except OSError as error:
                raise UserError(
                    f"{self.folder}: decoded waveforms cannot be kept there ({error.strerror}); "
                    f"name another folder with --store_path"
                ) from None
        entries = [index[self.key(path)] for path in paths]
        for change, count in Counter(change for entry in entries for change in entry["changes"]).items():
            notice(f"{count} of {len(paths)} clips {change}")
        shape = (self.samples_file.stat().st_size // ROW_BYTES, N_SAMPLES)  # a builder may be at half a row
        waveforms = np.memmap(self.samples_file, dtype=np.int16, mode="r", shape=shape)
        return waveforms, np.array([entry["row"] for entry in entries])

    def key(self, path: Path) -> str:
        return os.path.relpath(path.absolute(), self.root)

    def is_stale(self, index: Mapping[str, Any], path: Path) -> bool:
        entry = index.get(self.key(path))
        return entry is None or entry["stamp"] != stamp(path)

    def read_index(self) -> dict[str, Any]:
        """The index; empty where there is none, or where the samples it speaks of are not all there."""
        try:
            index = json.loads(self.index_file.read_text())
            rows = self.samples_file.stat().st_size // ROW_BYTES
            is_whole = all(0 <= entry["row"] < rows and {"stamp", "changes"} <= set(entry) for entry in index.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return index if is_whole else {}

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def add(self, index: dict[str, Any], paths: Sequence[Path], num_workers: int) -> None:
        """Decode `paths`, append them to the samples and enter them into the index."""
        if not paths:
            return
        free = shutil.disk_usage(self.folder).free
        if free < len(paths) * ROW_BYTES:
            raise UserError(
                f"{self.folder}: {len(paths)} waveforms need {len(paths) * ROW_BYTES / 1e6:.0f} MB and "
                f"{free / 1e6:.0f} MB are free; make room or name another folder with --store_path"
            )
        row = max((entry["row"] + 1 for entry in index.values()), default=0)
        if row == 0:
            self.samples_file.unlink(missing_ok=True)  # not truncated: another process may have mapped it
            self.samples_file.touch()
        problems = []
        with self.samples_file.open("r+b") as file:
            file.truncate(row * ROW_BYTES)
            file.seek(0, os.SEEK_END)
            try:
                for path, result in decode_all(paths, num_workers):
                    if isinstance(result, UserError):
                        problems.append(f"{path} ({result})")
                        continue
                    samples, changes, read_stamp = result
                    file.write(samples.tobytes())
                    index[self.key(path)] = {"row": row, "stamp": read_stamp, "changes": changes}
                    row += 1
                    if row % ROWS_BETWEEN_ENTRIES == 0:
                        self.enter(file, index)
            finally:
                self.enter(file, index)
        if problems:
            raise UserError(
                f"{len(problems)} of {len(paths)} recordings cannot be used, replace or remove them: "
                + "; ".join(problems)
            )

    def enter(self, file: BinaryIO, index: Mapping[str, Any]) -> None:
        """Let the rows that have been written count, once they are on the disk."""
        file.flush()
        os.fsync(file.fileno())
        with replace_file(self.index_file) as temporary:
            temporary.write_text(json.dumps(index))


def stamp(path: Path) -> list[int] | None:
    """What tells one version of a file from the next: size in bytes and time of change in ns."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def decode_all(paths: Sequence[Path], num_workers: int) -> Iterator[tuple[Path, Any]]:
    """Each path with (samples, changes, stamp), or with the `UserError` that says why it cannot be read."""

    def decode_one(path: Path) -> Any:
        before = stamp(path)
        try:
            return *read_clip(path), before
        except UserError as error:
            return error

    chunk = 64 * num_workers  # bounds how many decoded clips wait to be written
    with (
        ThreadPoolExecutor(num_workers) as pool,
        tqdm(total=len(paths), desc="decoding", unit="clip", leave=False, disable=None) as progress,
    ):
        for start in range(0, len(paths), chunk):
            part = paths[start : start + chunk]
            for path, result in zip(part, pool.map(decode_one, part), strict=True):
                yield path, result
                progress.update()


# ---------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------


class ClipSet:
    """Clips and their waveforms, for training, validation and test alike."""

    def __init__(self, clips: Sequence[Clip], waveforms: np.ndarray, rows: np.ndarray):
        self.clips, self.waveforms, self.rows = list(clips), waveforms, rows
        self.labels = np.array([clip.label for clip in clips], dtype=np.int64)

    @classmethod
    def load(cls, config: Config, split: str) -> "ClipSet":
        """The clips of a split as the configuration describes them, decoded if they are not in the store yet."""
        clips = find_clips(config.data_root, config.machines, split)
        store = WaveformStore(config.store_path, config.data_root)
        return cls(clips, *store.gather([clip.path for clip in clips], config.num_workers))

    def __len__(self) -> int:
        return len(self.clips)

    def subset(self, indices: np.ndarray) -> "ClipSet":
        return ClipSet([self.clips[i] for i in indices], self.waveforms, self.rows[indices])

    def split(self, ratio: float, seed: int) -> tuple["ClipSet", "ClipSet"]:
        """A random share of `int(ratio * n)` clips, for training, and the rest, for validation."""
        order = random_stream(seed, SPLIT).permutation(len(self))
        count = int(ratio * len(self))
        return self.subset(np.sort(order[:count])), self.subset(np.sort(order[count:]))

    def batch(self, indices: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Waveforms `(B, T)` float32 in [-1, 1) and labels `(B,)` on the device."""
        samples = torch.from_numpy(self.waveforms[self.rows[indices]])  # int16: half the way to the device
        labels = torch.from_numpy(self.labels[indices])
        return samples.to(device).float() / 32768.0, labels.to(device)

    def fingerprint(self) -> str:
        """Which clips these are, in which order: a resumed run must see the same."""
        names = "\n".join(f"{clip.machine_type}/{clip.path.name} {clip.label}" for clip in self.clips)
        return hashlib.sha256(os.fsencode(names)).hexdigest()


def shuffled_batches(count: int, batch_size: int, seed: int, epoch: int, least: int = 2) -> list[np.ndarray]:
    """The batches of an epoch as indices, every clip once, in an order that depends on seed and epoch.

    A last batch of fewer than `least` clips, which batch norm cannot take, joins the one before it.
    """
    return batches(random_stream(seed, ORDER, epoch).permutation(count), batch_size, least)


def batches(order: np.ndarray, batch_size: int, least: int = 1) -> list[np.ndarray]:
    """`order` cut into batches, the last one shorter, or longer where it would have fewer than `least` clips."""
    starts = list(range(0, len(order), batch_size))
    if len(starts) > 1 and len(order) - starts[-1] < least:
        starts.pop()
    return np.split(order, starts[1:]) if starts else []
