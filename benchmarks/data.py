"""Measure the time and memory that it takes to turn recordings into batches.

    python benchmarks/data.py --data_root FOLDER --machines '{slider: [0, 2], valve: [0, 2]}'
    # fewer than the 36,283 training clips of the full set
    python benchmarks/data.py --full_size 1000
    # a million clips, until the first batch (at least 16 recordings: a file has up to 65,000 links)
    python benchmarks/data.py --data_root FOLDER --machines auto --full_size 1000000 --only_start

There are two sets of clips, each read in a new process: the training and test clips in data_root,
and as many training clips as the full set has. The latter are hard links to the former, in a
temporary folder beside the project's data. The recordings are in the page cache. Measured are the
time from the end of the imports to the first batch of 64, as at the start of a training; shuffled
batches of 64 over an epoch, with every row compared with its recording; and anonymous memory. With
--only_start, it is the first batch of the second set alone, in parts, with the memory after each.

Each set is also read with PyTorch's DataLoader, with one worker process for each CPU core. The
first set is also read by a plain implementation: one file after the other, with librosa, and its
log-mel with torchaudio. Compare ratios: times depend on the computer and its load.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from audio import N_SAMPLES, SAMPLE_RATE, read_recording
from command_line import OneLineParser
from config import Config, load_config, parse_command_line
from dataloader import ClipSet, check_clips, make_clips
from model import FrontEnd, LogMel
from model.tastgram import POWER_FLOOR
from recordings import find_classes, find_recordings
from trainer import Trainer
from utils import run_script, versions

FULL_SIZE = 36_283  # training clips of DCASE 2020 Task 2, development and additional
BATCH = 64
CPU = torch.device("cpu")


def read_file_by_file(paths: list[Path]) -> float:
    """Return the seconds that a plain implementation takes for the log-mel of all recordings."""
    import librosa

    power = LogMel().mel
    start = time.perf_counter()
    for path in tqdm(paths, desc="file by file", leave=False, disable=None):
        samples, _ = librosa.load(path, sr=SAMPLE_RATE)
        10 * torch.log10(power(torch.from_numpy(np.resize(samples, N_SAMPLES))) + POWER_FLOOR)
    return time.perf_counter() - start


def find_paths(config: Config, split: str) -> list[Path]:
    """Return the recordings of a split."""
    return find_recordings(config, find_classes(config), split)["path"].tolist()


def link_published(paths: list[Path], root: Path, count: int) -> None:
    """Create `count` hard links to recordings, spread over the published machines."""
    machines = find_classes(load_config()).machines
    for number in range(count):
        machine_type, machine_id = machines[number % len(machines)]
        link = root / machine_type / "train" / f"normal_id_{machine_id}_{number:08d}.wav"
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(paths[number % len(paths)], link)


def link_for_training(paths: list[Path], root: Path) -> None:
    """Create hard links to training and test recordings, all as training recordings."""
    for path in paths:
        condition, _, rest = path.stem.partition("_")
        name = f"normal_{rest}_{path.parent.name}_{condition[0]}{path.suffix}"
        link = root / path.parents[1].name / "train" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, link)


class Start:
    """The start of a training up to its first batch."""

    def __init__(self, config: Config) -> None:
        self.parts: dict[str, float] = {}
        self.last = time.perf_counter()
        classes = find_classes(config)
        recordings = find_recordings(config, classes, "train")
        self.note("listing")
        clips = make_clips(recordings, config.windows("train"), config.num_workers)
        self.note("checking")
        self.train_clips, valid_clips = clips.split(config.split_ratio, config.seed)
        self.note("split")
        check_clips(config, self.train_clips, valid_clips)
        trainer = Trainer(config, classes, CPU, self.train_clips, valid_clips)
        self.plan = trainer.sampler.shuffle(epoch=0)
        next(iter(self.train_clips.batches(self.plan, CPU)))
        self.note("model and first batch")
        self.n_clips = len(clips)

    def note(self, part: str) -> None:
        """Note the duration of a part, and the memory after it."""
        now = time.perf_counter()
        self.parts |= {f"{part}, s": now - self.last, f"{part}, MB": anonymous_memory()}
        self.last = now

    @property
    def seconds(self) -> float:
        return sum(value for name, value in self.parts.items() if name.endswith(" s"))


def measure_start(config: Config) -> dict[str, float]:
    """Measure the start of a training in parts."""
    return Start(config).parts


def measure(config: Config) -> dict[str, float]:
    """Measure the start of a training up to its first batch, and one epoch of reading."""
    start = Start(config)
    train_clips, plan = start.train_clips, start.plan
    samples_speed = read_epoch(train_clips, plan, is_waveform=False)
    waveforms_speed = read_epoch(train_clips, plan, is_waveform=True)
    return {
        "clips": start.n_clips,
        "imports to the first batch, s": start.seconds,
        "shuffled batches, samples, clips/s": samples_speed,
        "shuffled batches, float32 waveforms, clips/s": waveforms_speed,
        "shuffled batches with a DataLoader, samples, clips/s": read_with_loader(train_clips, plan),
        "anonymous memory, MB": anonymous_memory(),
    }


def read_epoch(clips: ClipSet, plan: list[np.ndarray], is_waveform: bool) -> float:
    """Return clips per second; then compare some samples of every row with its recording."""
    front_end = FrontEnd(["tgram"])
    some_samples = np.empty((len(clips), 8), dtype=np.int16)
    start = time.perf_counter()
    for numbers, samples in zip(plan, clips.read(plan, CPU), strict=True):
        if is_waveform:
            front_end(samples)
        some_samples[numbers] = samples[:, 1000:1008]
    seconds = time.perf_counter() - start
    compare_with_recordings(clips, some_samples)
    return len(clips) / seconds


class ClipDataset(torch.utils.data.Dataset):
    """The clips of a `ClipSet`, one by one, as PyTorch's DataLoader reads them."""

    def __init__(self, clips: ClipSet) -> None:
        self.paths, self.start, self.labels = clips.paths.tolist(), clips.clip_starts, clips.labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, clip: int) -> tuple[torch.Tensor, torch.Tensor]:
        samples = np.empty(N_SAMPLES, dtype=np.int16)
        read_recording(self.paths[clip], samples, self.start[clip])
        return torch.from_numpy(samples), self.labels[clip]


def read_with_loader(clips: ClipSet, plan: list[np.ndarray]) -> float:
    """Return the clips per second that a DataLoader reads."""
    loader = torch.utils.data.DataLoader(
        ClipDataset(clips),
        batch_sampler=[numbers.tolist() for numbers in plan],
        num_workers=os.cpu_count() or 1,
    )
    start = time.perf_counter()
    for _ in loader:
        pass
    return len(clips) / (time.perf_counter() - start)


def compare_with_recordings(clips: ClipSet, some_samples: np.ndarray) -> None:
    """Check that the samples 1000 to 1007 of each clip `(n, 8)` are those of its recording."""
    row = np.empty(N_SAMPLES, dtype=np.int16)
    expected: dict[int, np.ndarray] = {}  # by inode: hard links are the same recording
    for path, found in zip(clips.paths, some_samples, strict=True):
        inode = path.stat().st_ino
        if inode not in expected:
            read_recording(path, row)
            expected[inode] = row[1000:1008].copy()
        assert np.array_equal(found, expected[inode]), f"{path}: other samples were read"


def anonymous_memory() -> float:
    """Return the anonymous memory of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon"))


def measure_apart(config: Config, function: str = "measure", **changes: Any) -> dict[str, float]:
    """Call a function in a new process, whose imports do not count."""
    values = config.model_dump() | changes
    command = [sys.executable, __file__, "--child", function, json.dumps(values)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_links(config: Config, count: int, scratch: Path) -> None:
    """Measure the start of a training with so many hard links to the training recordings."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        link_published(find_paths(config, "train"), Path(folder), count)
        save_path, machines = str(Path(folder) / "run.pth"), load_config().machines
        parts = measure_apart(
            config, "measure_start", data_root=folder, save_path=save_path, machines=machines
        )
    for name, value in parts.items():
        print(f"{name:30} {value:12,.1f}")


def main() -> None:
    parser = OneLineParser(description=__doc__)
    text = "clips of the second set (default: %(default)s)"
    parser.add_argument("--full_size", type=int, default=FULL_SIZE, help=text)
    text = "folder for the links, on the disk of the recordings"
    parser.add_argument("--scratch", type=Path, help=text)
    text = "measure the first batch of the second set alone, in parts"
    parser.add_argument("--only_start", action="store_true", help=text)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    config, options = parse_command_line(parser)
    if options.child:
        function, values = options.child
        print(json.dumps(globals()[function](load_config(**json.loads(values)))))
        return
    scratch = options.scratch or Path(__file__).parents[1] / "datasets"
    if options.only_start:
        measure_links(config, options.full_size, scratch)
        return
    train_paths = find_paths(config, "train")
    paths = train_paths + find_paths(config, "test")
    read_file_by_file(paths)  # fills the page cache and plans the FFT
    baseline = read_file_by_file(paths)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        root = Path(folder)
        save_path = str(root / "run.pth")
        link_for_training(paths, root / "real")
        real = measure_apart(config, data_root=str(root / "real"), save_path=save_path)
        link_published(train_paths, root / "full", options.full_size)
        machines = load_config().machines
        full = measure_apart(
            config, data_root=str(root / "full"), save_path=save_path, machines=machines
        )
    print(f"{'file by file, all real clips, s':50} {baseline:12,.2f}")
    for name in real:
        print(f"{name:50} {real[name]:12,.2f} {full[name]:12,.2f}")
    figures = {"file by file, s": baseline, "real": real, "full size": full, "with": versions()}
    print(json.dumps(figures))


if __name__ == "__main__":
    run_script(main)
