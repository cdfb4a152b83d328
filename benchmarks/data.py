"""What the way from recordings to batches costs in time and memory.

    python benchmarks/data.py --data_root /data/dcase2020 --machines '{slider: [0, 2, 4, 6], valve: [0, 2, 4, 6]}'
    # fewer than the 36,283 training clips of the full set
    python benchmarks/data.py --full_size 1000

Two sets of clips, each in a process of its own that has not seen them before: the training and test
clips in data_root, and as many training clips as the full set has, hard links to the former in a
folder beside the project's data that is removed again. The system has the recordings in memory.
Measured: from the end of the imports to the first batch of 64, as a training starts; shuffled
batches of 64 over an epoch, every row compared with its recording; anonymous memory.

The first set is also read as a first implementation does: each file with librosa, its log-mel with
torchaudio, one by one. Times are those of this machine at this moment: compare ratios.
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
from audio import read_recording
from config import Config, load_config, parse_command_line
from corpus import find_clips
from dataloader import ClipSet, load_clips, shuffled_batches
from model import FrontEnd, LogMel
from model.tastgram import N_SAMPLES, POWER_FLOOR, SAMPLE_RATE
from trainer import Run
from utils import OneLineParser, keep_freed_memory, run_script, versions

FULL_SIZE = 36_283  # training clips of DCASE 2020 Task 2, development and additional
BATCH = 64
CPU = torch.device("cpu")


def read_file_by_file(paths: list[Path]) -> float:
    """Seconds that a first implementation takes for the log-mel of all recordings."""
    import librosa

    power = LogMel().mel
    start = time.perf_counter()
    for path in tqdm(paths, desc="file by file", leave=False, disable=None):
        samples, _ = librosa.load(path, sr=SAMPLE_RATE)
        10 * torch.log10(power(torch.from_numpy(np.resize(samples, N_SAMPLES))) + POWER_FLOOR)
    return time.perf_counter() - start


def link_clips(config: Config, root: Path, count: int) -> None:
    """Hard links to the training clips under the names of training clips, spread over the published
    machine IDs.
    """
    sources = find_clips(config, "train")["path"].tolist()
    machines = [
        (machine_type, i) for machine_type, ids in load_config().machines.items() for i in ids
    ]
    for number in range(count):
        machine_type, machine_id = machines[number % len(machines)]
        path = root / machine_type / "train" / f"normal_id_{machine_id:02d}_{number:08d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(sources[number % len(sources)], path)


def measure(config: Config) -> dict[str, float]:
    """What a training does before its first step, and one epoch of reading."""
    start = time.perf_counter()
    clips = load_clips(config, "train")
    train_clips, valid_clips = clips.split(config.split_ratio, config.seed)
    run = Run(config, CPU, train_clips, valid_clips)
    plan = shuffled_batches(len(train_clips), BATCH, config.seed, epoch=0)
    next(iter(train_clips.batches(plan, CPU)))
    first_batch = time.perf_counter() - start
    del run
    keep_freed_memory()
    return {
        "clips": len(clips),
        "imports to the first batch, s": first_batch,
        "shuffled batches, samples, clips/s": read_epoch(train_clips, plan, is_waveform=False),
        "shuffled batches, float32 waveforms, clips/s": read_epoch(
            train_clips, plan, is_waveform=True
        ),
        "anonymous memory, MB": anonymous_memory(),
    }


def read_epoch(clips: ClipSet, plan: list[np.ndarray], is_waveform: bool) -> float:
    """Clips per second; the first samples of every row are compared with the recording afterwards."""
    front_end = FrontEnd(["tgram"])
    starts = np.empty((len(clips), 8), dtype=np.int16)
    begin = time.perf_counter()
    for indices, (samples, _) in zip(plan, clips.batches(plan, CPU), strict=True):
        if is_waveform:
            front_end(samples)
        starts[indices] = samples[:, 1000:1008]
    seconds = time.perf_counter() - begin
    row = np.empty(N_SAMPLES, dtype=np.int16)
    expected: dict[int, np.ndarray] = {}  # by inode: hard links are the same recording
    for index in np.concatenate(plan):
        path = clips.clips["path"][index]
        inode = path.stat().st_ino
        if inode not in expected:
            read_recording(path, row)
            expected[inode] = row[1000:1008].copy()
        assert np.array_equal(starts[index], expected[inode]), (
            f"{path}: a row is not where the plan says"
        )
    return len(clips) / seconds


def anonymous_memory() -> float:
    """Of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon"))


def measure_apart(config: Config, **changes: Any) -> dict[str, float]:
    """`measure` in a new process, whose imports do not count."""
    values = config.model_dump() | changes
    command = [sys.executable, __file__, "--child", json.dumps(values)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument(
        "--full_size",
        type=int,
        default=FULL_SIZE,
        help="clips of the second set (default: %(default)s)",
    )
    parser.add_argument(
        "--scratch", type=Path, help="folder for the links, on the disk of the recordings"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    config, options, _ = parse_command_line(parser)
    if options.child:
        print(json.dumps(measure(load_config(**json.loads(options.child)))))
        return
    splits = ("train", "test")
    paths = [path for split in splits for path in find_clips(config, split)["path"]]
    read_file_by_file(paths)  # the files come into memory, the FFT makes its plans
    baseline = read_file_by_file(paths)
    with tempfile.TemporaryDirectory(
        dir=options.scratch or Path(__file__).parents[1] / "datasets"
    ) as folder:
        root = Path(folder)
        save_path = str(root / "run.pth")
        for path in paths:  # those of both splits as training clips
            _, _, rest = path.name.partition("_")  # without the condition
            name = f"normal_{rest.removesuffix(path.suffix)}_{path.parent.name}_{path.name[0]}{path.suffix}"
            target = root / "real" / path.parents[1].name / "train" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)
        small = measure_apart(config, data_root=str(root / "real"), save_path=save_path)
        link_clips(config, root / "full", options.full_size)
        machines = load_config().machines
        full = measure_apart(
            config, data_root=str(root / "full"), save_path=save_path, machines=machines
        )
    print(f"{'file by file, all real clips, s':50} {baseline:12,.2f}")
    for name in small:
        print(f"{name:50} {small[name]:12,.2f} {full[name]:12,.2f}")
    print(
        json.dumps(
            {"file by file, s": baseline, "real": small, "full size": full, "with": versions()}
        )
    )


if __name__ == "__main__":
    run_script(main)
