"""The clips of recordings, and batches of them.

A clip is a window of 10 s of a recording: its first one, or one of several. A `ClipSet` reads the
clips of a table in batches, or keeps them in the memory of a GPU.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from audio import Recording, check_recording, read_recording
from config import Config
from corpus import find_clips
from model.tastgram import N_SAMPLES
from utils import ORDER, SPLIT, UserError, notice, random_stream

# ---- Which clips ----


def check_recordings(
    paths: Sequence[Path], config: Config, split: str
) -> dict[Path, Recording | UserError]:
    """What there is of each recording, or why it cannot be used."""
    hop = config.hop_of(split)

    def check(path: Path) -> Recording | UserError:
        try:
            return check_recording(path, config.channel, hop)
        except UserError as error:
            return error

    with ThreadPoolExecutor(config.num_workers) as pool:
        checks = tqdm(
            pool.map(check, paths),
            total=len(paths),
            desc="checking",
            unit="clip",
            leave=False,
            disable=None,
        )
        return dict(zip(paths, checks, strict=True))


# ---- Batches ----


class ClipSet:
    """The clips of a table, for training, validation and test alike. The windows of a recording
    follow each other: `start` says at which second each of them starts, at 0 the first one; without
    that column each clip is one.

    They are read at each use, by threads, while the batch before is computed; or once, into the
    memory of a GPU.
    """

    def __init__(self, clips: pd.DataFrame, num_workers: int, channel: int = 0) -> None:
        self.clips, self.num_workers, self.channel = (
            clips.reset_index(drop=True),
            num_workers,
            channel,
        )
        if "start" not in clips:
            self.clips["start"] = 0.0
        is_first = self.clips["start"].to_numpy() == 0
        self.firsts = np.flatnonzero(is_first)  # the clips that begin a recording
        self.recording = np.cumsum(is_first) - 1  # its number, for each clip
        self.labels = torch.tensor(clips["label"].to_numpy(np.int64))
        self.samples: Tensor | None = None  # int16 (n, T), once they are kept on a GPU

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def machines(self) -> list[str]:
        """Machine types and IDs, as in "fan 02"."""
        return (
            self.clips["machine_type"].str.cat(self.clips["machine_id"], sep=" ").unique().tolist()
        )

    @property
    def recordings(self) -> pd.DataFrame:
        """The rows of the table, one for each recording."""
        return self.clips.iloc[self.firsts].drop(columns="start").reset_index(drop=True)

    def over_windows(self, values: np.ndarray, rule: str) -> np.ndarray:
        """The "mean" or "max" of the values `(n, ...)` of all clips over the windows of each
        recording.
        """
        if rule == "max":
            return np.maximum.reduceat(values, self.firsts)
        counts = np.diff(self.firsts, append=len(self)).astype(values.dtype)
        return (np.add.reduceat(values, self.firsts).T / counts).T

    def worst_starts(self, values: np.ndarray) -> np.ndarray:
        """At which second the window with the highest value `(n,)` of each recording starts."""
        order = np.lexsort((-values, self.recording))
        return self.clips["start"].to_numpy()[order[self.firsts]]

    def split(self, ratio: float, seed: int) -> tuple["ClipSet", "ClipSet"]:
        """A random share of `int(ratio * n)` of the n recordings, for training, and the rest, for
        validation.
        """
        order, count = (
            random_stream(seed, SPLIT).permutation(len(self.firsts)),
            int(ratio * len(self.firsts)),
        )
        is_training = np.isin(self.recording, order[:count])
        return self.select(is_training), self.select(~is_training)

    def select(self, chosen: np.ndarray) -> "ClipSet":
        """The clips for which `chosen` `(n,)` is true, with their samples where these are in
        memory.
        """
        part = ClipSet(self.clips[chosen], self.num_workers, self.channel)
        if self.samples is not None:
            part.samples = self.samples[
                torch.from_numpy(np.flatnonzero(chosen)).to(self.samples.device)
            ]
        return part

    def fingerprint(self) -> str:
        """Which clips these are, in which order: a resumed run must see the same."""
        rows = self.clips[["machine_type", "path", "label", "start"]].itertuples(index=False)
        names = "\n".join(
            f"{machine_type}/{path.name} {label}{f' from {start}' if start else ''}"
            for machine_type, path, label, start in rows
        )
        return hashlib.sha256(os.fsencode(names)).hexdigest()

    def read_all(self, device: torch.device) -> Tensor:
        samples = torch.empty((len(self), N_SAMPLES), dtype=torch.int16, device=device)
        plan = batches(np.arange(len(self)), 64)
        for indices, part in zip(plan, self.read_batches(plan, device), strict=True):
            samples[indices[0] : indices[-1] + 1] = part
        return samples

    def batches(
        self, plan: Sequence[np.ndarray], device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a plan, each a list of clips by number: samples int16 `(B, T)` and labels
        `(B,)` on the device. A batch is valid until the next one is asked for.
        """
        if not plan:
            return
        order, sizes = torch.from_numpy(np.concatenate(plan)), [len(indices) for indices in plan]
        labels = self.labels[order].to(device).split(sizes)
        samples = (
            self.read_batches(plan, device)
            if self.samples is None
            else self.select_batches(order, sizes)
        )
        yield from zip(samples, labels, strict=True)

    def select_batches(self, order: Tensor, sizes: list[int]) -> Iterator[Tensor]:
        assert self.samples is not None
        return (self.samples[indices] for indices in order.to(self.samples.device).split(sizes))

    def read_batches(self, plan: Sequence[np.ndarray], device: torch.device) -> Iterator[Tensor]:
        """Two buffers alternate: while one batch is computed the next one is read into the other.

        To a GPU the samples travel on a stream of their own, beside the computation.
        """
        is_cuda, windows = (
            device.type == "cuda",
            list(zip(self.clips["path"], self.clips["start"], strict=True)),
        )
        size = max(map(len, plan), default=0)
        buffers = [
            torch.empty((size, N_SAMPLES), dtype=torch.int16, pin_memory=is_cuda) for _ in range(2)
        ]
        stream = torch.cuda.Stream(device) if is_cuda else None
        copies = [torch.cuda.Event() for _ in range(2)] if is_cuda else []

        def start(number: int) -> list[Future[None]]:
            if stream:
                copies[
                    number % 2
                ].synchronize()  # the samples read before may still be on their way to the GPU
            rows = buffers[number % 2].numpy()
            chosen = zip(rows, plan[number], strict=False)
            return [pool.submit(read, row, self.channel, *windows[index]) for row, index in chosen]

        with ThreadPoolExecutor(self.num_workers) as pool:
            reading = start(0) if plan else []
            for number, indices in enumerate(plan):
                for future in reading:
                    future.result()
                samples = buffers[number % 2][: len(indices)]
                if stream:
                    samples = upload(samples, device, stream, copies[number % 2])
                reading = start(number + 1) if number + 1 < len(plan) else []
                yield samples


def fingerprint(parts: Iterable[ClipSet]) -> str:
    """That of training and validation clips together, which a checkpoint keeps."""
    return "/".join(part.fingerprint() for part in parts)


def upload(
    samples: Tensor, device: torch.device, stream: torch.cuda.Stream, end: torch.cuda.Event
) -> Tensor:
    """Copy pinned samples to the GPU on this stream; the current one waits for the event at the end
    of the copy.
    """
    with torch.cuda.stream(stream):
        uploaded = samples.to(device, non_blocking=True)
        end.record()
    current = torch.cuda.current_stream(device)
    current.wait_event(end)
    uploaded.record_stream(
        current
    )  # its memory is free for other copies after the computation only
    return uploaded


def keep_on_gpu(
    parts: Sequence[ClipSet], data_device: str, device: torch.device, others: int
) -> None:
    """Keep the samples of the clip sets in the memory of the GPU, where `data_device` says so:
    "cuda", or "auto" where they fit beside the `others` bytes that training takes there. Raises
    `UserError` where "cuda" is not possible.
    """
    if data_device == "cpu" or (data_device == "auto" and device.type != "cuda"):
        return
    if device.type != "cuda":
        raise UserError(
            f"data_device: cuda needs a GPU to train on, and device is {device}; use auto or cpu"
        )
    needed, free = 2 * N_SAMPLES * sum(map(len, parts)), torch.cuda.mem_get_info(device)[0]
    sizes = f"the samples take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of {device} are free"
    if data_device == "cuda" and needed > free:
        raise UserError(f"data_device: cuda: {sizes}; use auto or cpu")
    if data_device == "auto" and needed + others > free:
        notice(
            f"{sizes}, of which training takes about {others / 1e9:.1f}: the recordings are read from their files "
            f"in every epoch, by num_workers threads, which have to keep up with the GPU; a lower batch_size leaves "
            f"more room"
        )
        return
    for part in parts:
        part.samples = part.read_all(device)


def read(out: np.ndarray, channel: int, path: Path, start: float) -> None:
    try:
        read_recording(path, out, start, channel)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def load_clips(config: Config, split: str) -> ClipSet:
    """The clips of a split. Raises `UserError` that names all recordings that cannot be used;
    notices report what has to be changed in the others.
    """
    recordings = find_clips(config, split)
    checked = check_recordings(recordings["path"].tolist(), config, split)
    good = {path: result for path, result in checked.items() if not isinstance(result, UserError)}
    if problems := [f"{path} ({result})" for path, result in checked.items() if path not in good]:
        raise UserError(
            f"{len(problems)} of {len(checked)} recordings cannot be used, replace or remove them: "
            f"{'; '.join(problems)}"
        )
    report_changes(good)
    return cut_into_windows(recordings, good, config)


def report_changes(recordings: Mapping[Path, Recording]) -> None:
    """Say what has to be changed in recordings, each change once."""
    for change, count in Counter(
        change for result in recordings.values() for change in result.changes
    ).items():
        notice(f"{count} of {len(recordings)} recordings {change}")


def cut_into_windows(
    recordings: pd.DataFrame, checked: Mapping[Path, Recording], config: Config
) -> ClipSet:
    """A clip for each window of each recording."""
    starts = [checked[path].starts for path in recordings["path"]]
    windows = recordings.loc[recordings.index.repeat(list(map(len, starts)))]
    return ClipSet(windows.assign(start=np.concatenate(starts)), config.num_workers, config.channel)


def shuffled_batches(
    count: int, batch_size: int, seed: int, epoch: int, least: int = 2
) -> list[np.ndarray]:
    """The batches of an epoch, every clip once, in an order that depends on seed and epoch.

    A last batch of fewer than `least` clips, which batch norm cannot take, joins the one before it.
    """
    return batches(random_stream(seed, ORDER, epoch).permutation(count), batch_size, least)


def batches(order: np.ndarray, batch_size: int, least: int = 1) -> list[np.ndarray]:
    """`order` cut into batches, the last one shorter, or longer where it would have fewer than
    `least` clips.
    """
    starts = list(range(0, len(order), batch_size))
    if len(starts) > 1 and len(order) - starts[-1] < least:
        starts.pop()
    return np.split(order, starts[1:]) if starts else []
