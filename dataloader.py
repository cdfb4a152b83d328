"""From a folder of recordings to batches of waveforms.

    <data_root>/<machine type>/{train,test}/{normal,anomaly}_id_XX_*.wav    (or .flac)
    <data_root>/<machine type>/evaluation/id_XX_*.wav                       labels in <data_root>/eval_data_list.csv

`find_clips` lists what the class table asks for, `WaveformStore` decodes each recording once into one file of
int16 samples that every later run and every process maps into memory, and `ClipSet` gathers batches from it.
"""

import contextlib
import csv
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import struct
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import torch
from torch import Tensor
from tqdm import tqdm

from model.tastgram import N_SAMPLES, SAMPLE_RATE, SECONDS
from utils import ORDER, SPLIT, Config, UserError, barrier, local_rank, notice, random_stream, replace_file

CLIP_NAME = re.compile(r"(?:(?P<condition>normal|anomaly)_)?id_(?P<machine_id>[0-9]+)_.*\.(?:wav|flac)", re.IGNORECASE)
CLIP_FORMS = {  # how a split's recordings are named
    "train": "normal_id_XX_*.wav",
    "test": "{normal,anomaly}_id_XX_*.wav",
    "evaluation": "id_XX_*.wav",
}
LABEL_LIST = "eval_data_list.csv"
HOW_TO_GET_DATA = (
    "`python datasets/download.py` fetches DCASE 2020 Task 2, `python datasets/synthesize.py` makes a small set"
)
HOW_TO_GET_EVALUATION = "`python datasets/download.py --parts evaluation` fetches those of DCASE 2020 Task 2"
NAMES_SHOWN = 5  # of files that are passed over

# ---------------------------------------------------------------------------------------------------------------
# Which recordings
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """One recording: where it lies, which machine it is of, its class, and its condition (None: not known)."""

    path: Path
    machine_type: str
    machine_id: int
    label: int
    is_anomaly: bool | None


def class_labels(machines: Mapping[str, Sequence[int]]) -> dict[tuple[str, int], int]:
    """The class of each (machine type, machine ID), numbered in the order of the table."""
    pairs = [(machine_type, machine_id) for machine_type, ids in machines.items() for machine_id in ids]
    return {pair: label for label, pair in enumerate(pairs)}


def find_clips(data_root: str | Path, machines: Mapping[str, Sequence[int]], split: str) -> list[Clip]:
    """The clips of a split, ordered by type and file name: "train" (normal only), "test" (normal and anomalous), or
    "evaluation" (the file's name does not tell; the label list does, where there is one).

    The ID is read from the file name. What is passed over, and what is missing from the table, is said in notices.
    Raises `UserError` where there is nothing to read: for training any missing folder of a machine type, otherwise
    only if all are missing.
    """
    root, labels = Path(data_root), class_labels(machines)
    answers = read_label_list(root / LABEL_LIST) if split == "evaluation" else {}
    clips, skipped, absent = [], defaultdict(list), []
    for machine_type in machines:
        folder = root / machine_type / split
        if not folder.is_dir():
            absent.append(machine_type)
            continue
        for name in sorted(entry.name for entry in folder.iterdir()):
            match = CLIP_NAME.fullmatch(name)
            if not match or (match["condition"] is None) != (split == "evaluation"):
                skipped["named otherwise"].append(name)
                continue
            machine = (machine_type, int(match["machine_id"]))
            if split == "evaluation":
                is_anomaly = answers.get((machine_type, Path(name).stem))
            else:
                is_anomaly = match["condition"].lower() == "anomaly"
            if machine not in labels:
                skipped["of IDs outside the table of machines"].append(name)
            elif is_anomaly and split == "train":
                skipped["named anomaly: training takes normal ones only"].append(name)
            else:
                clips.append(Clip(folder / name, *machine, labels[machine], is_anomaly))

    remedy = HOW_TO_GET_EVALUATION if split == "evaluation" else HOW_TO_GET_DATA
    looked_for = f"{root}/<machine type>/{split}/{CLIP_FORMS[split]}"
    if absent and (split == "train" or len(absent) == len(machines)):
        folder = root / absent[0] / split if root.is_dir() else root
        raise UserError(
            f"no folder {folder} (looked for {looked_for}); {remedy}; "
            f"--data_root names another place{', --machines other machine types' if split == 'train' else ''}"
        )
    if not clips:
        raise UserError(f"no clips found: looked for {looked_for} of the IDs in machines; {remedy}")
    present = {(clip.machine_type, clip.machine_id) for clip in clips}
    if split == "train" and len(present) < 2:
        raise UserError(f"{root}: training clips of one machine ID only, and the method learns by telling IDs apart")

    if strange := skipped.pop("named otherwise", []):
        more = f" and {len(strange) - NAMES_SHOWN} more" if len(strange) > NAMES_SHOWN else ""
        form = f"{CLIP_FORMS[split]} or .flac"
        notice(f"{root}, {split}: skipped {plural(strange)} not named {form}: {', '.join(strange[:NAMES_SHOWN])}{more}")
    for what, names in skipped.items():
        notice(f"{root}, {split}: skipped {plural(names)} {what}")
    if absent:
        notice(f"{root}: no {split} folder for {', '.join(absent)}")
    missing = [f"{t} {i:02d}" for t, i in labels if (t, i) not in present and t not in absent]
    if missing:
        notice(f"{root}, {split}: {len(missing)} of {len(labels)} machine IDs have no clips: {', '.join(missing)}")
    return clips


def plural(files: Sequence[str]) -> str:
    return f"{len(files)} file{'s' if len(files) > 1 else ''}"


def read_label_list(path: Path) -> dict[tuple[str, str], bool]:
    """Whether the evaluation clip of (machine type, file name without its ending) is an anomaly; empty without a list.

    The list, published as eval_data_list.csv, names a machine type on a line of its own and then its clips:
    `<file name>,<file name with the condition>,<0 or 1>`. Raises `UserError` for any other line.
    """
    answers, machine_type = {}, None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return answers
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a list of labels; remove it, and {HOW_TO_GET_EVALUATION}") from None
    for number, row in enumerate(csv.reader(lines), start=1):
        if len(row) == 1:
            machine_type = row[0].strip()
        elif len(row) == 3 and machine_type and row[2].strip() in ("0", "1"):
            answers[machine_type, Path(row[0].strip()).stem] = row[2].strip() == "1"
        elif row:
            raise UserError(f"{path}, line {number}: not `<file name>,<name with the condition>,<0 or 1>`")
    return answers


def find_recordings(place: Path) -> list[Path]:
    """A file itself, whatever it is; of a folder the WAV and FLAC files in it, by name."""
    if not place.is_dir():
        return [place]
    found = sorted(path for path in place.iterdir() if path.suffix.lower() in (".wav", ".flac"))
    if not found:
        raise UserError(f"{place}: no WAV or FLAC files in this folder")
    return found


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
        check_header(path)
        with soundfile.SoundFile(os.fsencode(path)) as file:
            return decode(file)
    except soundfile.SoundFileError as error:
        reason = getattr(error, "error_string", None) or str(error)
        raise UserError(f"unreadable: {reason.strip().rstrip('.')}") from None
    except OSError as error:
        raise UserError(f"unreadable: {error.strerror}") from None


def check_header(path: Path) -> None:
    """Hold the header of a WAV file against itself and against the file's size: where they contradict each other the
    decoder would return something without a word. FLAC guards its audio with checksums of its own.
    """
    if not path.is_file():
        raise UserError("unreadable: not a file")
    size = path.stat().st_size
    if size == 0:
        raise UserError("empty")
    with path.open("rb") as file:
        riff, _, wave = struct.unpack("<4sI4s", file.read(12).ljust(12))
        if riff in (b"RIFF", b"RIFX") and wave == b"WAVE":
            check_chunks(file, size, "<" if riff == b"RIFF" else ">")


def check_chunks(file: BinaryIO, size: int, order: str) -> None:
    """Walk through the chunks of a WAV file, which must follow each other from here to its end."""
    seen = set()
    while len(header := file.read(8)) == 8:
        name, length = struct.unpack(f"{order}4sI", header)
        present = size - file.tell()
        if not all(0x20 <= byte < 0x7F for byte in name):
            where = f"{present + 8} bytes follow the audio that" if b"data" in seen else "something in its header"
            raise UserError(f"damaged: {where} cannot be part of a WAV file")
        seen.add(name)
        if name == b"data":
            if length == 0xFFFFFFFF:  # a program that wrote to a pipe could not know the length
                return
            if present < length:
                raise UserError(f"truncated: {present} of {length} bytes of audio are there")
        elif name == b"fmt ":
            check_format(file.read(16), order)
            length -= 16
        file.seek(length + length % 2, os.SEEK_CUR)  # chunks are padded to even lengths
    if b"data" not in seen:
        raise UserError("damaged: there is no audio behind its header")


def check_format(chunk: bytes, order: str) -> None:
    """The numbers of the format must agree: one that is wrong would change speed or pitch, or make noise of sound."""
    if len(chunk) < 16:
        raise UserError("truncated: it ends within its header")
    kind, channels, rate, byte_rate, frame, bits = struct.unpack(f"{order}HHIIHH", chunk)
    uncompressed = (1, 3, 0xFFFE)  # PCM, float, extensible
    if kind in uncompressed and (frame != channels * ((bits + 7) // 8) or byte_rate != rate * frame):
        raise UserError(
            f"damaged: the header contradicts itself ({rate} Hz, {channels} channels of {bits} bits, {frame} bytes at "
            f"a time, {byte_rate} bytes a second)"
        )


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
STORE_VERSION = 2  # raise it with any change of how recordings are decoded or kept
ROWS_BETWEEN_ENTRIES = 4096  # what a crash while decoding costs at most


@dataclass
class Index:
    """What a store holds: the file of its samples, how many of its rows count, and for each recording (path below
    the data folder) its `row`, the `stamp` of the file it was decoded from, and the `changes` that it took.

    The class of a recording is not kept: it follows from the path and the configuration's table of machines.
    """

    samples: str
    rows: int = 0
    clips: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def new(cls) -> "Index":
        return cls(f"waveforms-{secrets.token_hex(4)}.int16")

    @classmethod
    def read(cls, folder: Path) -> "Index":
        """The index of a store; a new one where there is none, or where what it speaks of is not all there."""
        try:
            index = cls(**json.loads((folder / "index.json").read_text()))
            size = (folder / index.samples).stat().st_size
            is_whole = index.rows * ROW_BYTES <= size and all(
                0 <= entry["row"] < index.rows and {"stamp", "changes"} <= set(entry) for entry in index.clips.values()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls.new()
        return index if is_whole else cls.new()

    def write(self, folder: Path) -> None:
        with replace_file(folder / "index.json") as temporary:
            temporary.write_text(json.dumps(vars(self)))


class WaveformStore:
    """Decoded recordings of one data folder: `waveforms-*.int16`, a row of `N_SAMPLES` for each, and `index.json`.

    Rows are only ever appended, and count once the index names them, so that processes which map the file are
    never disturbed, and what a crash left behind is overwritten by the next build. A recording that changed
    (size or time) is decoded again into a new row. A lock lets one process build at a time; the others wait and
    then find everything there. Sample rate, length and version are in the folder's name: others are other stores.
    """

    def __init__(self, store_path: str | Path, data_root: str | Path):
        self.root = Path(data_root)
        place = self.root.resolve()
        digest = hashlib.sha256(os.fsencode(place)).hexdigest()[:12]
        name = f"{place.name or 'root'}-{digest}-{SAMPLE_RATE}Hz-{SECONDS}s-v{STORE_VERSION}"
        self.folder = Path(store_path) / name

    def gather(self, paths: Sequence[Path], num_workers: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """All waveforms `(rows, N_SAMPLES)`, memory-mapped, and the row of each path; decodes what is not there yet.

        Raises `UserError` that names every file that cannot be used.
        """
        keys = [path.relative_to(self.root).as_posix() for path in paths]
        index = Index.read(self.folder)
        if self.stale(index, keys):
            with self.lock():
                index = Index.read(self.folder)  # another process may have built it in the meantime
                index = self.add(index, self.stale(index, keys), num_workers)
        entries = [index.clips[key] for key in keys]
        for change, count in Counter(change for entry in entries for change in entry["changes"]).items():
            notice(f"{count} of {len(paths)} clips {change}")
        waveforms = np.memmap(self.folder / index.samples, np.int16, mode="r", shape=(index.rows, N_SAMPLES))
        return waveforms, np.array([entry["row"] for entry in entries])

    def rebuild(self) -> None:
        """Forget everything, so that it is decoded anew. Processes that read the present rows keep them."""
        if self.folder.is_dir():
            with self.lock():
                (self.folder / "index.json").unlink(missing_ok=True)

    def stale(self, index: Index, keys: Sequence[str]) -> list[str]:
        """The recordings that the index does not know, or knows in another state than their files are in now."""
        return [key for key in keys if key not in index.clips or index.clips[key]["stamp"] != stamp(self.root / key)]

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold off other processes that build, and turn trouble with the folder into a `UserError`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "lock").open("w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    notice(f"{self.folder}: waiting for another process that decodes recordings")
                    fcntl.flock(file, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise UserError(
                f"{self.folder}: decoded waveforms cannot be kept there ({error.strerror}); "
                f"name another folder with --store_path"
            ) from None

    def add(self, index: Index, keys: Sequence[str], num_workers: int) -> Index:
        """Decode recordings, append them to the samples, enter them into the index, and return that."""
        if not keys:
            return index
        live = len(index.clips) - len(self.stale(index, list(index.clips)))
        if live == 0:
            index = Index.new()
        for file in set(self.folder.glob("waveforms-*.int16")) - {self.folder / index.samples}:
            file.unlink()  # of before, or left by a crash; who has mapped it keeps it
        self.check_space(len(keys))
        problems = []
        with (self.folder / index.samples).open("ab") as file:
            file.truncate(index.rows * ROW_BYTES)
            try:
                for key, result in decode_all(self.root, keys, num_workers):
                    if isinstance(result, UserError):
                        problems.append(f"{self.root / key} ({result})")
                        continue
                    samples, changes, read_stamp = result
                    file.write(samples.tobytes())
                    index.clips[key] = {"row": index.rows, "stamp": read_stamp, "changes": changes}
                    index.rows += 1
                    if index.rows % ROWS_BETWEEN_ENTRIES == 0:
                        self.enter(file, index)
            finally:
                self.enter(file, index)
        if problems:
            raise UserError(
                f"{len(problems)} of {len(keys)} recordings cannot be used, replace or remove them: "
                + "; ".join(problems)
            )
        dead = index.rows - live - len(keys)
        if dead > index.rows / 10:
            size = f"{dead * ROW_BYTES / 1e9:.1f} GB"
            notice(f"{self.folder}: {size} are of recordings that changed or are gone; --rebuild_store frees them")
        return index

    def check_space(self, rows: int) -> None:
        needed, free = rows * ROW_BYTES, shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"{self.folder}: {rows} waveforms need {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free; "
                f"make room or name another folder with --store_path"
            )

    def enter(self, file: BinaryIO, index: Index) -> None:
        """Let the rows that have been written count, once they are on the disk."""
        file.flush()
        os.fsync(file.fileno())
        index.write(self.folder)


def stamp(path: Path) -> list[int] | None:
    """What tells one version of a file from the next: size in bytes and time of change in ns."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def decode_all(root: Path, keys: Sequence[str], num_workers: int) -> Iterator[tuple[str, Any]]:
    """Each key with (samples, changes, stamp), or with the `UserError` that says why it cannot be read."""

    def decode_one(key: str) -> Any:
        path = root / key
        before = stamp(path)
        try:
            return *read_clip(path), before
        except UserError as error:
            return error

    chunk = 64 * num_workers  # bounds how many decoded clips wait to be written
    with (
        ThreadPoolExecutor(num_workers) as pool,
        tqdm(total=len(keys), desc="decoding", unit="clip", leave=False, disable=None) as progress,
    ):
        for start in range(0, len(keys), chunk):
            part = keys[start : start + chunk]
            for key, result in zip(part, pool.map(decode_one, part), strict=True):
                yield key, result
                progress.update()


# ---------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------


class ClipSet:
    """Clips and their waveforms (int16 rows, on the host or on a GPU), for training, validation and test alike."""

    def __init__(self, clips: Sequence[Clip], waveforms: Tensor, rows: np.ndarray):
        self.clips, self.waveforms, self.rows = list(clips), waveforms, rows
        self.labels = np.array([clip.label for clip in clips], dtype=np.int64)

    @classmethod
    def load(cls, config: Config, split: str, rebuild: bool = False) -> "ClipSet":
        """The clips of a split as the configuration describes them, decoded if they are not in the store yet, or
        all decoded anew with `rebuild`.
        """
        clips = find_clips(config.data_root, config.machines, split)
        store = WaveformStore(config.store_path, config.data_root)
        if rebuild and local_rank() == 0:
            store.rebuild()
        if rebuild:
            barrier()
        waveforms, rows = store.gather([clip.path for clip in clips], config.num_workers)
        with warnings.catch_warnings(action="ignore"):  # of a tensor that must not be written to: nobody does
            return cls(clips, torch.from_numpy(waveforms), rows)

    def place(self, store_device: str, device: torch.device) -> "ClipSet":
        """The same clips with their samples in the memory of a GPU, if `store_device` says so: "cuda", or "auto"
        where they take half of the free memory at most. Raises `UserError` where "cuda" is not possible.
        """
        if store_device == "cpu" or (store_device == "auto" and device.type != "cuda"):
            return self
        if device.type != "cuda":
            raise UserError(f"store_device: cuda needs a GPU to train on, and device is {device}; use auto or cpu")
        needed, free = len(self) * ROW_BYTES, torch.cuda.mem_get_info(device)[0]
        if store_device == "auto" and needed > free / 2:
            return self
        if needed > free:
            raise UserError(
                f"store_device: cuda: the waveforms take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of {device} "
                f"are free; use auto or cpu"
            )
        return self.copy_to(device)

    def copy_to(self, device: torch.device) -> "ClipSet":
        waveforms = torch.empty((len(self), N_SAMPLES), dtype=torch.int16, device=device)
        for some in batches(np.arange(len(self)), 1024):
            waveforms[some[0] : some[-1] + 1] = self.waveforms[torch.from_numpy(self.rows[some])].to(device)
        return ClipSet(self.clips, waveforms, np.arange(len(self)))

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
        rows = torch.from_numpy(self.rows[indices]).to(self.waveforms.device, non_blocking=True)
        samples = self.waveforms[rows]  # int16: half the way to the device, where they are not there already
        labels = torch.from_numpy(self.labels[indices])
        return samples.to(device, non_blocking=True).float() / 32768.0, labels.to(device, non_blocking=True)

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
