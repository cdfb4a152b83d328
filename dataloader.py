"""Which clips there are, and batches of them.

    <data_root>/<machine type>/{train,test}/{normal,anomaly}_id_XX_*.wav    (or .flac)
    <data_root>/<machine type>/evaluation/id_XX_*.wav                       labels in <data_root>/eval_data_list.csv

`find_clips` lists what the machines of the configuration ask for, as a table with a row per recording. A clip is a
window of 10 s of a recording: its first one, or one of several. A `ClipSet` reads the clips of such a table in batches,
or keeps them in the memory of a GPU.
"""

import csv
import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from audio import Recording, check_recording, read_recording
from config import AUTO, Config, MachineID, Machines, make_config, name_id, parse_id
from distributed import from_main
from model.tastgram import N_SAMPLES
from utils import ORDER, SPLIT, UserError, notice, random_stream

NORMAL, ANOMALOUS, UNLABELLED = "normal", "anomalous", "unlabelled"  # conditions of a clip
MACHINE = ["machine_type", "machine_id"]  # the columns that name a machine
COLUMNS = ["path", *MACHINE, "label", "condition"]
CLIP_NAME = re.compile(r"(?:(?P<condition>normal|anomaly)_)?id_(?P<machine_id>[^_]+)_.*\.(?:wav|flac)", re.IGNORECASE)
CLIP_FORMS = {  # how the recordings of a split are named
    "train": "normal_id_XX_*.wav",
    "test": "{normal,anomaly}_id_XX_*.wav",
    "evaluation": "id_XX_*.wav",
}
LABEL_LIST = "eval_data_list.csv"
GET_DATA = "`python datasets/download.py` fetches DCASE 2020 Task 2, `python datasets/synthesize.py` makes a small set"
GET_EVALUATION = "`python datasets/download.py --parts evaluation` fetches those of DCASE 2020 Task 2"
ONE_ID = "training clips of one machine ID only, and the method learns by telling IDs apart"
NAMES_SHOWN = 5  # of files that are passed over

# ---- Which machines, and which recordings of them ----


def class_labels(machines: Machines) -> dict[tuple[str, str], int]:
    """The class of each (machine type, machine ID as in file names, "02"), numbered in the order of the table."""
    pairs = [(machine_type, name_id(machine_id)) for machine_type, ids in machines.items() for machine_id in ids]
    return {pair: label for label, pair in enumerate(pairs)}


def settle_machines(config: Config) -> Config:
    """The configuration with a table of machines: for `machines: auto`, of those in its training folders, and said."""
    if config.machines != AUTO:
        return config
    machines = from_main(lambda: find_machines(Path(config.data_root)))
    found = make_config(("configuration", config.model_dump()), (config.data_root, {"machines": machines}))
    ids = [f"{machine_type} {', '.join(map(name_id, ids))}" for machine_type, ids in machines.items()]
    notice(f"{config.data_root}: {sum(map(len, machines.values()))} machine IDs: {'; '.join(ids)}")
    return found


def find_machines(root: Path) -> dict[str, list[MachineID]]:
    """The types and IDs of the training recordings, in alphabetical order, of numbers in their own, whatever the order
    on the disk.
    """
    machines: dict[str, list[MachineID]] = {}
    folders = [path for path in (root.iterdir() if root.is_dir() else ()) if not path.name.startswith(".")]
    types = [path.name for path in folders if (path / "train").is_dir()]
    for machine_type in sorted(types, key=lambda name: (name.casefold(), name)):
        files = (root / machine_type / "train").iterdir()
        matches = [match for path in files if (match := CLIP_NAME.fullmatch(path.name))]
        ids = {parse_id(match["machine_id"]) for match in matches if (match["condition"] or "").lower() == NORMAL}
        machines[machine_type] = sorted(ids, key=lambda machine_id: (isinstance(machine_id, str), machine_id))
    found = {machine_type: ids for machine_type, ids in machines.items() if ids}
    if not found:
        raise UserError(f"no machines found: looked for {root}/<machine type>/train/{CLIP_FORMS['train']}; {GET_DATA}")
    if sum(map(len, found.values())) == 1:
        raise UserError(f"{root}: {ONE_ID}")
    if passed_over := [machine_type for machine_type in machines if machine_type not in found]:
        notice(f"{root}: no recordings named {CLIP_FORMS['train']} in the train folder of {', '.join(passed_over)}")
    return found


def find_clips(data_root: str | Path, machines: Machines, split: str) -> pd.DataFrame:
    """The recordings of a split, ordered by type and file name: "train" (normal only), "test" (normal and anomalous),
    or "evaluation" (the file's name does not tell; the label list does, where there is one).

    Columns: `path`, `machine_type`, `machine_id` ("02", read from the file name), `label` (the class), `condition`
    (NORMAL, ANOMALOUS or UNLABELLED). Notices report what is passed over and what is missing. Raises `UserError`
    where there is nothing to read: for training any missing folder of a machine type, otherwise only if all are.
    """
    root, labels = Path(data_root), class_labels(machines)
    remedy = GET_EVALUATION if split == "evaluation" else GET_DATA
    looked_for = f"{root}/<machine type>/{split}/{CLIP_FORMS[split]}"
    absent = [machine_type for machine_type in machines if not (root / machine_type / split).is_dir()]
    if absent and (split == "train" or len(absent) == len(machines)):
        folder = root / absent[0] / split if root.is_dir() else root
        raise UserError(
            f"no folder {folder} (looked for {looked_for}); {remedy}; "
            f"--data_root names another folder{', --machines other machine types' if split == 'train' else ''}"
        )
    conditions = read_label_list(root / LABEL_LIST) if split == "evaluation" else {}
    rows, skipped = [], defaultdict(list)
    for machine_type in [name for name in machines if name not in absent]:
        folder = root / machine_type / split
        for name in sorted(entry.name for entry in os.scandir(folder)):
            match = CLIP_NAME.fullmatch(name)
            if not match or (match["condition"] is None) != (split == "evaluation"):
                skipped[f"not named {CLIP_FORMS[split]} or .flac"].append(name)
                continue
            machine = (machine_type, name_id(parse_id(match["machine_id"])))
            condition = conditions.get((machine_type, Path(name).stem), UNLABELLED)
            if match["condition"]:
                condition = NORMAL if match["condition"].lower() == "normal" else ANOMALOUS
            if machine not in labels:
                skipped["of IDs outside the table of machines"].append(name)
            elif condition == ANOMALOUS and split == "train":
                skipped["named anomaly: training takes normal ones only"].append(name)
            else:
                rows.append((folder / name, *machine, labels[machine], condition))
    if not rows:
        raise UserError(f"no clips found: looked for {looked_for} of the IDs in machines; {remedy}")
    clips = pd.DataFrame(rows, columns=COLUMNS, dtype=object)
    present = set(clips["label"])
    if split == "train" and len(present) < 2:
        raise UserError(f"{root}: {ONE_ID}")

    for what, names in skipped.items():
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        files = f"{len(names)} file{'s' if len(names) > 1 else ''}"
        notice(f"{root}, {split}: skipped {files} {what}: {', '.join(names[:NAMES_SHOWN])}{more}")
    if absent:
        notice(f"{root}: no {split} folder for {', '.join(absent)}")
    missing = [f"{t} {i}" for (t, i), label in labels.items() if label not in present and t not in absent]
    if missing:
        notice(f"{root}, {split}: {len(missing)} of {len(labels)} machine IDs have no clips: {', '.join(missing)}")
    return clips


def known_clips(clips: pd.DataFrame) -> pd.DataFrame:
    """The clips whose condition is known."""
    return clips[clips["condition"] != UNLABELLED]


def read_label_list(path: Path) -> dict[tuple[str, str], str]:
    """The condition of the evaluation clip of (machine type, file name without its ending); empty without a list.

    The list, published as eval_data_list.csv, names a machine type on a line of its own and then its clips:
    `<file name>,<file name with the condition>,<0 or 1>`. Raises `UserError` for any other line.
    """
    conditions: dict[tuple[str, str], str] = {}
    machine_type = ""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return conditions
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a list of labels; remove it, and {GET_EVALUATION}") from None
    for number, row in enumerate(csv.reader(lines), start=1):
        cells = [cell.strip() for cell in row]
        if len(cells) == 1:
            machine_type = cells[0]
        elif len(cells) == 3 and machine_type and cells[2] in ("0", "1"):
            conditions[machine_type, Path(cells[0]).stem] = ANOMALOUS if cells[2] == "1" else NORMAL
        elif cells:
            raise UserError(f"{path}, line {number}: not `<file name>,<name with the condition>,<0 or 1>`")
    return conditions


def check_recordings(paths: Sequence[Path], config: Config, split: str) -> dict[Path, Recording | UserError]:
    """What there is of each recording, or why it cannot be used."""
    hop = config.hop_of(split)

    def check(path: Path) -> Recording | UserError:
        try:
            return check_recording(path, config.channel, hop)
        except UserError as error:
            return error

    with ThreadPoolExecutor(config.num_workers) as pool:
        checks = tqdm(pool.map(check, paths), total=len(paths), desc="checking", unit="clip", leave=False, disable=None)
        return dict(zip(paths, checks, strict=True))


# ---- Batches ----


class ClipSet:
    """The clips of a table, for training, validation and test alike. The windows of a recording follow each other:
    `start` says at which second each of them starts, at 0 the first one; without that column each clip is one.

    They are read at each use, by threads, while the batch before is computed; or once, into the memory of a GPU.
    """

    def __init__(self, clips: pd.DataFrame, num_workers: int, channel: int = 0) -> None:
        self.clips, self.num_workers, self.channel = clips.reset_index(drop=True), num_workers, channel
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
        return self.clips["machine_type"].str.cat(self.clips["machine_id"], sep=" ").unique().tolist()

    @property
    def recordings(self) -> pd.DataFrame:
        """The rows of the table, one for each recording."""
        return self.clips.iloc[self.firsts].drop(columns="start").reset_index(drop=True)

    def over_windows(self, values: np.ndarray, rule: str) -> np.ndarray:
        """The "mean" or "max" of the values `(n, ...)` of all clips over the windows of each recording."""
        if rule == "max":
            return np.maximum.reduceat(values, self.firsts)
        counts = np.diff(self.firsts, append=len(self)).astype(values.dtype)
        return (np.add.reduceat(values, self.firsts).T / counts).T

    def worst_starts(self, values: np.ndarray) -> np.ndarray:
        """At which second the window with the highest value `(n,)` of each recording starts."""
        order = np.lexsort((-values, self.recording))
        return self.clips["start"].to_numpy()[order[self.firsts]]

    def split(self, ratio: float, seed: int) -> tuple["ClipSet", "ClipSet"]:
        """A random share of `int(ratio * n)` of the n recordings, for training, and the rest, for validation."""
        order, count = random_stream(seed, SPLIT).permutation(len(self.firsts)), int(ratio * len(self.firsts))
        is_training = np.isin(self.recording, order[:count])
        training, validation = (
            ClipSet(self.clips[chosen], self.num_workers, self.channel) for chosen in (is_training, ~is_training)
        )
        return training, validation

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

    def batches(self, plan: Sequence[np.ndarray], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a plan, each a list of clips by number: samples int16 `(B, T)` and labels `(B,)` on the
        device. A batch is valid until the next one is asked for.
        """
        if not plan:
            return
        order, sizes = torch.from_numpy(np.concatenate(plan)), [len(indices) for indices in plan]
        labels = self.labels[order].to(device).split(sizes)
        samples = self.read_batches(plan, device) if self.samples is None else self.select_batches(order, sizes)
        yield from zip(samples, labels, strict=True)

    def select_batches(self, order: Tensor, sizes: list[int]) -> Iterator[Tensor]:
        assert self.samples is not None
        return (self.samples[indices] for indices in order.to(self.samples.device).split(sizes))

    def read_batches(self, plan: Sequence[np.ndarray], device: torch.device) -> Iterator[Tensor]:
        """Two buffers alternate: while one batch is computed the next one is read into the other.

        To a GPU the samples travel on a stream of their own, beside the computation.
        """
        is_cuda, windows = device.type == "cuda", list(zip(self.clips["path"], self.clips["start"], strict=True))
        size = max(map(len, plan), default=0)
        buffers = [torch.empty((size, N_SAMPLES), dtype=torch.int16, pin_memory=is_cuda) for _ in range(2)]
        stream = torch.cuda.Stream(device) if is_cuda else None
        copies = [torch.cuda.Event() for _ in range(2)] if is_cuda else []

        def start(number: int) -> list[Future[None]]:
            if stream:
                copies[number % 2].synchronize()  # the samples read before may still be on their way to the GPU
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


def upload(samples: Tensor, device: torch.device, stream: torch.cuda.Stream, end: torch.cuda.Event) -> Tensor:
    """Copy pinned samples to the GPU on this stream; the current one waits for the event at the end of the copy."""
    with torch.cuda.stream(stream):
        uploaded = samples.to(device, non_blocking=True)
        end.record()
    current = torch.cuda.current_stream(device)
    current.wait_event(end)
    uploaded.record_stream(current)  # its memory is free for other copies after the computation only
    return uploaded


def keep_on_gpu(parts: Sequence[ClipSet], data_device: str, device: torch.device, others: int) -> None:
    """Keep the samples of the clip sets in the memory of the GPU, where `data_device` says so: "cuda", or "auto" where
    they fit beside the `others` bytes that training takes there. Raises `UserError` where "cuda" is not possible.
    """
    if data_device == "cpu" or (data_device == "auto" and device.type != "cuda"):
        return
    if device.type != "cuda":
        raise UserError(f"data_device: cuda needs a GPU to train on, and device is {device}; use auto or cpu")
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
    """The clips of a split. Raises `UserError` that names all recordings that cannot be used; notices report what has
    to be changed in the others.
    """
    recordings = find_clips(config.data_root, config.machines, split)
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
    for change, count in Counter(change for result in recordings.values() for change in result.changes).items():
        notice(f"{count} of {len(recordings)} recordings {change}")


def cut_into_windows(recordings: pd.DataFrame, checked: Mapping[Path, Recording], config: Config) -> ClipSet:
    """A clip for each window of each recording."""
    starts = [checked[path].starts for path in recordings["path"]]
    windows = recordings.loc[recordings.index.repeat(list(map(len, starts)))]
    return ClipSet(windows.assign(start=np.concatenate(starts)), config.num_workers, config.channel)


def shuffled_batches(count: int, batch_size: int, seed: int, epoch: int, least: int = 2) -> list[np.ndarray]:
    """The batches of an epoch, every clip once, in an order that depends on seed and epoch.

    A last batch of fewer than `least` clips, which batch norm cannot take, joins the one before it.
    """
    return batches(random_stream(seed, ORDER, epoch).permutation(count), batch_size, least)


def batches(order: np.ndarray, batch_size: int, least: int = 1) -> list[np.ndarray]:
    """`order` cut into batches, the last one shorter, or longer where it would have fewer than `least` clips."""
    starts = list(range(0, len(order), batch_size))
    if len(starts) > 1 and len(order) - starts[-1] < least:
        starts.pop()
    return np.split(order, starts[1:]) if starts else []
