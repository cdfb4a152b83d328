"""What the way from recordings to batches costs in time and memory.

    python benchmarks/data.py                       # the training and test clips in data_root
    python benchmarks/data.py --data_root /data/dcase2020 --machines '{slider: [0, 2], valve: [0, 2]}'
    python benchmarks/data.py --full_size           # 36,283 stand-ins, in 11.6 GB of disk that it frees again

The first form compares, on recordings that the system has in memory and in one process, the way to the first batch
of 64 with what a first implementation does: read each file with librosa and compute its log-mel with torchaudio, one
by one. The second measures the start, the memory and the speed of gathering shuffled batches at the full size. Its
recordings are empty files of the right names and sizes, and the store is written directly, each row marked with its
number; so everything but the decoding is as in a training. Times are those of this machine at this moment, after
imports: compare ratios.
"""

import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import librosa
import numpy as np
import torch
import torchaudio
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dataloader import ROW_BYTES, ClipSet, Index, WaveformStore, find_clips, shuffled_batches, stamp
from model.tastgram import HOP_LENGTH, N_FFT, N_MELS, N_SAMPLES, POWER_FLOOR, SAMPLE_RATE, LogMel
from trainer import Trainer
from utils import Config, OneLineParser, keep_freed_memory, load_config, parse_command_line, run_script, versions

FULL_SIZE = 36_283  # training clips of DCASE 2020 Task 2, development and additional
BATCH = 64
CPU = torch.device("cpu")


def median_seconds(action: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def published_mel_power() -> torch.nn.Module:
    return torchaudio.transforms.MelSpectrogram(
        SAMPLE_RATE, N_FFT, hop_length=HOP_LENGTH, n_mels=N_MELS, pad_mode="constant", norm="slaney", mel_scale="slaney"
    )


def compare(config: Config, scratch: Path) -> dict[str, float]:
    """File by file against the store, cold (not there yet) and warm."""
    splits = ("train", "test")
    paths = [clip.path for split in splits for clip in find_clips(config.data_root, config.machines, split)]
    log_mel, mel_power = LogMel(), published_mel_power()
    config = load_config(**{**vars(config), "store_path": str(scratch)})

    def file_by_file() -> None:
        for path in paths:
            samples, _ = librosa.load(path, sr=SAMPLE_RATE)
            20 / 2 * torch.log10(mel_power(torch.from_numpy(np.resize(samples, N_SAMPLES))) + POWER_FLOOR)

    def first_batch() -> torch.Tensor:
        clips, _ = (ClipSet.load(config, split) for split in splits)
        return clips.batch(np.arange(min(BATCH, len(clips))), CPU)[0]

    def cold() -> torch.Tensor:
        shutil.rmtree(scratch, ignore_errors=True)
        return first_batch()

    file_by_file()  # the files come into memory, the FFT makes its plans
    log_mel(first_batch())
    baseline = median_seconds(file_by_file, 3)
    figures = {"clips": len(paths), "file by file, all clips, s": baseline}
    for name, action, repeats in (
        ("cold, waveforms", cold, 3),
        ("cold, log-mel", lambda: log_mel(cold()), 3),
        ("warm, waveforms", first_batch, 9),
        ("warm, log-mel", lambda: log_mel(first_batch()), 9),
    ):
        seconds = median_seconds(action, repeats)
        figures |= {f"{name} of the first batch, s": seconds, f"{name}: times faster": baseline / seconds}
    return figures


def training_names(config: Config, count: int) -> list[str]:
    """Names of training clips below the data folder, spread evenly over the machine IDs."""
    machines = [(machine_type, machine_id) for machine_type, ids in config.machines.items() for machine_id in ids]
    return [
        "{}/train/normal_id_{:02d}_{:08d}.wav".format(*machines[number % len(machines)], number)
        for number in range(count)
    ]


def write_stand_ins(config: Config, names: Sequence[str]) -> None:
    """Files of these names below the data folder, of the right size without content, and the store as if they had been
    decoded.
    """
    for name in names:
        path = Path(config.data_root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(44 + ROW_BYTES)

    store, index = WaveformStore(config.store_path, config.data_root), Index.new()
    store.folder.mkdir(parents=True)
    row = np.random.default_rng(0).integers(-300, 300, N_SAMPLES, dtype=np.int16)
    with (store.folder / index.samples).open("wb") as file:
        for name in tqdm(names, desc="writing", disable=None):
            row[:2] = np.array([index.rows], dtype=np.int32).view(np.int16)
            file.write(row.tobytes())
            index.clips[name] = {"row": index.rows, "stamp": stamp(Path(config.data_root, name)), "changes": []}
            index.rows += 1
    index.write(store.folder)


def gather_all(clips: ClipSet, epoch: int) -> float:
    """Clips per second of an epoch's shuffled batches, float32 on the host."""
    start = time.perf_counter()
    for indices in shuffled_batches(len(clips), BATCH, seed=0, epoch=epoch):
        waveform, _ = clips.batch(indices, CPU)
        marks = (waveform[:, :2] * 32768).to(torch.int16).numpy().copy().view(np.int32)[:, 0]
        assert np.array_equal(marks, clips.rows[indices]), "a row is not where the index says"
    return len(clips) / (time.perf_counter() - start)


def memory(process: str = "self") -> dict[str, float]:
    """Anonymous memory of a process; of its mappings of the store the resident and the proportional size. In MB."""
    status = Path(f"/proc/{process}/status").read_text().splitlines()
    figures = {"RssAnon": next(int(line.split()[1]) / 1e3 for line in status if line.startswith("RssAnon"))}
    is_store = False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            is_store = line.endswith(".int16")
        elif is_store and line.startswith(("Rss:", "Pss:")):
            name = f"{line[:3]} of the store"
            figures[name] = figures.get(name, 0) + int(line.split()[1]) / 1e3
    return figures


def share(config: Config, pipe) -> None:
    """A second process that reads everything, says what it holds, and stays until it is told to end."""
    clips = ClipSet.load(config, "train")
    gather_all(clips, epoch=2)
    pipe.send("ready")
    pipe.recv()


def measure_full_size(config: Config, scratch: Path, count: int) -> dict[str, float]:
    config = load_config(
        **{**vars(config), "data_root": str(scratch / "data"), "store_path": str(scratch / "store"), "device": "cpu",
           "save_path": str(scratch / "run.pth")}
    )  # fmt: skip
    write_stand_ins(config, training_names(config, count))
    start = time.perf_counter()
    train_clips, valid_clips = ClipSet.load(config, "train").split(config.split_ratio, config.seed)
    trainer = Trainer(config, CPU)
    trainer.take(train_clips, valid_clips)
    first = shuffled_batches(len(train_clips), BATCH, config.seed, epoch=0)[0]
    trainer.front_end(train_clips.batch(first, CPU)[0])
    figures = {"clips": count, "start to the first log-mel batch, s": time.perf_counter() - start}
    clips = ClipSet.load(config, "train")
    figures["gathered, first pass, clips/s"] = gather_all(clips, epoch=0)
    figures["gathered, page cache warm, clips/s"] = gather_all(clips, epoch=1)
    figures |= {f"{name}, one process, MB": value for name, value in memory().items()}
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    second = context.Process(target=share, args=(config, there))
    second.start()
    here.recv()
    for name, process in (("first", "self"), ("second", str(second.pid))):
        figures |= {f"{key}, {name} of two processes, MB": value for key, value in memory(process).items()}
    here.send("end")
    second.join()
    return figures


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--full_size", action="store_true", help="measure with stand-ins for the whole data set")
    parser.add_argument("--clips", type=int, default=FULL_SIZE, help=f"how many stand-ins (default: {FULL_SIZE})")
    parser.add_argument(
        "--scratch", type=Path, help="folder on a disk with room (default: the system's for such files)"
    )
    config, options, _ = parse_command_line(parser)
    keep_freed_memory()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        scratch = Path(folder)
        figures = measure_full_size(config, scratch, options.clips) if options.full_size else compare(config, scratch)
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "sample rate, Hz": SAMPLE_RATE, **versions()}
    for name, value in figures.items():
        print(f"{name:50} {value:12,.3f}")
    print(json.dumps({"figures": figures, "machine": machine}))


if __name__ == "__main__":
    run_script(main)
