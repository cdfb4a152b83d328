"""Clips of recordings, and batches of them.

A clip is ten seconds of a recording: its first window, or one of several. A `ClipSet` reads the
clips of a table of recordings in batches, or keeps them in the memory of a GPU.
"""

import hashlib
import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from audio import (
    FIRST_WINDOW,
    N_SAMPLES,
    CheckedRecording,
    Windows,
    check_recording,
    read_recording,
)
from classes import Classes, Machine
from config import Config
from distributed import from_main, world_size
from errors import UserError
from recordings import MACHINE_COLUMNS, find_recordings
from utils import SPLIT, notice, random_stream

CALLS = 10_000  # of a thread pool at once


class ClipSet:
    """The clips of recordings, for training, validation and test alike.

    They are read at each use, by threads, while the batch before is computed; or once, into the
    memory of a GPU.

    Attributes:
        recordings: The table, a row for each recording.
        windows: Which windows of the recordings are clips.
        starts: For each recording the seconds at which its clips start.
        clip_recordings: The number of the recording of each clip `(n,)`, in ascending order.
        clip_starts: The start of each clip in its recording, in seconds `(n,)`.
        labels: The class of each clip `(n,)`; only where the table has the column `label`.
        samples: The clips, int16 `(n, T)`, once they are kept on a GPU.
        unreadable: Why recordings that were checked cannot be read after all, by path: their clips
            are zeros then. None where such a recording is an error.
    """

    labels: Tensor

    def __init__(
        self,
        recordings: pd.DataFrame,
        num_workers: int,
        windows: Windows = FIRST_WINDOW,
        starts: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """`starts` are the seconds at which the clips of each recording start, as `windows` says;
        None is a single clip from the beginning of each.
        """
        self.recordings = recordings.reset_index(drop=True)
        self.num_workers, self.windows = num_workers, windows
        self.starts = [[0.0]] * len(recordings) if starts is None else list(starts)
        counts = [len(seconds) for seconds in self.starts]
        self.clip_recordings = np.repeat(np.arange(len(recordings)), counts)
        self.clip_starts = np.array([second for seconds in self.starts for second in seconds])
        self.samples: Tensor | None = None
        self.unreadable: dict[Path, UserError] | None = None
        if "label" in recordings:
            labels = self.recordings["label"].to_numpy(np.int64)
            self.labels = torch.from_numpy(labels[self.clip_recordings])

    def __len__(self) -> int:
        return len(self.clip_recordings)

    @property
    def paths(self) -> pd.Series:
        """The file of each clip `(n,)`."""
        return self.recordings["path"].iloc[self.clip_recordings]

    def files_in(self, root: Path) -> list[str]:
        """Return the file of each clip, as seen from a folder."""
        return [path.relative_to(root).as_posix() for path in self.paths]

    @property
    def machines(self) -> list[Machine]:
        """The machine of each clip."""
        columns = (self.recordings["machine_type"], self.recordings["machine_id"])
        machines = list(zip(*columns, strict=True))
        return [machines[number] for number in self.clip_recordings]

    def split(self, ratio: float, seed: int) -> tuple["ClipSet", "ClipSet"]:
        """Draw `int(ratio * n)` of the n recordings of each machine at random, for training; the
        others are for validation. Each class keeps a recording to train on, and the classes of a
        machine are held out in proportion to their sizes.
        """
        order = random_stream(seed, SPLIT).permutation(len(self.recordings))
        shuffled = self.recordings.iloc[order]
        of_class = shuffled.groupby("label")["label"]
        number = of_class.cumcount()  # the first recording of a class stays in training
        quantile = (number + 0.5) / of_class.transform("size")
        in_turn = shuffled.assign(quantile=quantile)[number > 0]
        in_turn = in_turn.sort_values("quantile", ascending=False, kind="stable")
        place = in_turn.groupby(MACHINE_COLUMNS).cumcount()
        size = shuffled.groupby(MACHINE_COLUMNS)["label"].transform("size")
        n_held_out = size - (ratio * size).astype(int)
        is_held_out = self.recordings.index.isin(in_turn.index[place < n_held_out[in_turn.index]])
        return self.select(~is_held_out), self.select(is_held_out)

    def select(self, is_chosen: np.ndarray) -> "ClipSet":
        """Return the clips of the recordings for which `is_chosen` `(recordings,)` is true."""
        starts = [self.starts[number] for number in np.flatnonzero(is_chosen)]
        part = ClipSet(self.recordings[is_chosen], self.num_workers, self.windows, starts)
        if self.samples is not None:
            part.samples = self.samples[np.flatnonzero(is_chosen[self.clip_recordings])]
        return part

    def fingerprint(self) -> str:
        """Return a hash of the names, classes and starts of the clips, which have to be the same
        when a run is resumed. The sound itself is not compared.
        """
        digest = hashlib.sha256()
        columns = [self.recordings[name] for name in ("machine_type", "path", "label")]
        for machine_type, path, label, starts in zip(*columns, self.starts, strict=True):
            line = f"{machine_type}/{path.name} {label} from {starts}\n"
            digest.update(os.fsencode(line))
        return digest.hexdigest()

    # ---- Reading ----

    def batches(
        self, plan: Sequence[np.ndarray], device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield samples int16 `(B, T)` and labels `(B,)` of each batch of a plan, on the device.

        `plan` has the numbers of the clips of each batch. A batch is valid until the next one is
        asked for.
        """
        sizes = [len(numbers) for numbers in plan]
        if plan:
            labels = self.labels[np.concatenate(plan)].to(device).split(sizes)
            yield from zip(self.read(plan, device), labels, strict=True)

    def read(self, plan: Sequence[np.ndarray], device: torch.device) -> Iterator[Tensor]:
        """Yield the samples int16 `(B, T)` of each batch of a plan, as `batches` does."""
        if self.samples is None:
            return self.read_files(plan, device)
        return (self.samples[torch.from_numpy(numbers).to(device)] for numbers in plan)

    def read_files(self, plan: Sequence[np.ndarray], device: torch.device) -> Iterator[Tensor]:
        """Read batches from the recordings into two buffers in turn: while one batch is computed,
        the next one is read. Samples are copied to a GPU on a stream beside the computation.
        """
        is_cuda = device.type == "cuda"
        size = max(map(len, plan), default=0)
        buffers = [
            torch.empty((size, N_SAMPLES), dtype=torch.int16, pin_memory=is_cuda) for _ in range(2)
        ]
        upload = Upload(device) if is_cuda else None
        paths = self.paths.tolist()

        def start_reading(step: int) -> list[Future[None]]:
            if upload:
                upload.wait(step % 2)  # the buffer may still be on its way to the GPU
            rows = buffers[step % 2].numpy()
            return [
                pool.submit(self.read_clip, paths[clip], self.clip_starts[clip], row)
                for row, clip in zip(rows, plan[step], strict=False)
            ]

        with ThreadPoolExecutor(self.num_workers) as pool:
            pending = start_reading(0) if plan else []
            for step, clips in enumerate(plan):
                for future in pending:
                    future.result()
                samples = buffers[step % 2][: len(clips)]
                if upload:
                    samples = upload.copy(samples, step % 2)
                pending = start_reading(step + 1) if step + 1 < len(plan) else []
                yield samples

    def read_clip(self, path: Path, start: float, out: np.ndarray) -> None:
        """Read the clip that starts at a second of a recording into `out`, int16 `(T,)`."""
        try:
            read_recording(path, out, start, self.windows.channel)
        except UserError as error:
            if self.unreadable is None:
                raise
            self.unreadable[path] = error
            out.fill(0)

    def keep_on(self, device: torch.device) -> None:
        """Read all clips into the memory of a GPU."""
        samples = torch.empty((len(self), N_SAMPLES), dtype=torch.int16, device=device)
        plan = cut_into_batches(np.arange(len(self)), 64)
        for numbers, part in zip(plan, self.read_files(plan, device), strict=True):
            samples[numbers[0] : numbers[-1] + 1] = part
        self.samples = samples


class Upload:
    """Copies of two pinned buffers to a GPU, on a stream beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.ends = [torch.cuda.Event() for _ in range(2)]

    def copy(self, samples: Tensor, buffer: int) -> Tensor:
        """Copy samples; the computation that is enqueued after this call waits for them."""
        with torch.cuda.stream(self.stream):
            uploaded = samples.to(self.device, non_blocking=True)
            self.ends[buffer].record()
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self.ends[buffer])
        uploaded.record_stream(current)  # its memory is reused only after the computation
        return uploaded

    def wait(self, buffer: int) -> None:
        """Wait until a buffer has been copied."""
        self.ends[buffer].synchronize()


def keep_on_gpu(
    parts: Sequence[ClipSet], data_device: str, device: torch.device, reserved: int
) -> None:
    """Keep clips in the memory of the GPU, where `data_device` asks for it: "cuda", or "auto" where
    they fit beside the `reserved` bytes that training takes there.

    Raises:
        UserError: If "cuda" is not possible.
    """
    if data_device == "cpu" or (data_device == "auto" and device.type != "cuda"):
        return
    if device.type != "cuda":
        raise UserError(
            f"data_device: cuda needs a GPU to train on, and device is {device}; use auto or cpu"
        )
    needed = 2 * N_SAMPLES * sum(map(len, parts))
    free = torch.cuda.mem_get_info(device)[0]
    sizes = f"the samples take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of {device} are free"
    if data_device == "cuda" and needed > free:
        raise UserError(f"data_device: cuda: {sizes}; use auto or cpu")
    if data_device == "auto" and needed + reserved > free:
        notice(
            f"{sizes}, of which training needs about {reserved / 1e9:.1f} GB, so the recordings "
            "are read from their files in every epoch; lower batch_size to keep them on the GPU, "
            "or raise num_workers if the GPU has to wait for them"
        )
        return
    for part in parts:
        part.keep_on(device)


# ---- The clips of a split ----


def load_clips(config: Config, classes: Classes, split: str, windows: Windows) -> ClipSet:
    """Return the clips of a split, as `make_clips` does."""
    return make_clips(find_recordings(config, classes, split), windows, config.num_workers)


def make_clips(recordings: pd.DataFrame, windows: Windows, num_workers: int) -> ClipSet:
    """Return the clips of a table of recordings. Notices say what is changed in recordings.

    Raises:
        UserError: If recordings cannot be used; it names all of them.
    """
    checked = check_recordings(recordings["path"].tolist(), windows, num_workers)
    problems = []
    for path, result in checked.items():
        if isinstance(result, UserError):
            problems.append(f"{path} ({result})")
    if problems:
        raise UserError(
            f"{len(problems)} of {len(checked)} recordings cannot be used; replace or remove them: "
            f"{'; '.join(problems)}"
        )
    starts = [recording.starts for recording in select_usable(checked).values()]
    return ClipSet(recordings, num_workers, windows, starts)


def check_recordings(
    paths: Sequence[Path], windows: Windows, num_workers: int
) -> dict[Path, CheckedRecording | UserError]:
    """Check recordings: the windows of each, or why it cannot be used."""

    def check(path: Path) -> CheckedRecording | UserError:
        try:
            return check_recording(path, windows)
        except UserError as error:
            return error

    def check_in_parts() -> Iterator[CheckedRecording | UserError]:
        # What the pool keeps of a call takes five times the memory of its result.
        for start in range(0, len(paths), CALLS):
            yield from pool.map(check, paths[start : start + CALLS])

    with ThreadPoolExecutor(num_workers) as pool:
        shown = tqdm(
            check_in_parts(), "checking", len(paths), unit="file", leave=False, disable=None
        )
        return dict(zip(paths, shown, strict=True))


def select_usable(
    checked: Mapping[Path, CheckedRecording | UserError],
) -> dict[Path, CheckedRecording]:
    """Return the recordings that can be used. Notices list how their samples are changed."""
    recordings = {}
    for path, result in checked.items():
        if isinstance(result, CheckedRecording):
            recordings[path] = result
    counts = Counter(change for recording in recordings.values() for change in recording.changes)
    for change, count in counts.items():
        notice(f"{count} of {len(recordings)} recordings {change}")
    clipped = [x.n_clipped for x in recordings.values() if x.n_clipped]
    if clipped:
        notice(
            f"{len(clipped)} of {len(recordings)} recordings exceed full scale: {sum(clipped)} "
            "samples are clipped"
        )
    return recordings


# ---- Whether the clips can be trained on ----


def check_clips(config: Config, train_clips: ClipSet, valid_clips: ClipSet) -> None:
    """Check that a run can be trained on these clips.

    Raises:
        UserError: If there are too few clips for a step or none to validate, or if the processes
            have different clips.
    """
    least = max(2, world_size())
    reason = (
        f"{world_size()} processes need one each" if world_size() > 1 else "batch norm needs two"
    )
    if len(train_clips) < least:
        raise UserError(
            f"too few training clips ({len(train_clips)}): {reason}; add recordings or raise "
            "split_ratio"
        )
    if len(valid_clips) == 0:
        raise UserError(
            f"{config.data_root}: each class has a single recording, so none can be held out for "
            "validation; add more (a long one can be cut into several)"
        )
    if config.batch_size < least:
        raise UserError(
            f"batch_size: {config.batch_size} clips per step are too few: {reason}; raise it"
        )

    fingerprint = fingerprint_of(train_clips, valid_clips)
    if from_main(lambda: fingerprint) != fingerprint:
        raise UserError(
            f"{config.data_root} on {platform.node()}: the recordings differ from those of the "
            "first process; give every computer the same recordings"
        )


def fingerprint_of(train_clips: ClipSet, valid_clips: ClipSet) -> str:
    """Return a hash of the clips of a run, see `ClipSet.fingerprint`."""
    return f"{train_clips.fingerprint()}/{valid_clips.fingerprint()}"


# ---- Batches ----


def cut_into_batches(order: np.ndarray, batch_size: int, least: int = 1) -> list[np.ndarray]:
    """Cut `order` into batches; the last one is shorter, or longer where it would have fewer than
    `least` clips.
    """
    starts = list(range(0, len(order), batch_size))
    if len(starts) > 1 and len(order) - starts[-1] < least:
        starts.pop()
    return np.split(order, starts[1:]) if starts else []
