"""Notices and errors about unusual recordings; batches of samples from files and from memory."""

import os
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import CLASSES, arguments, clips_of, tone, write_clip, write_set
from mutations import BROKEN, NOT_A_CLIP, broken, each_damage_and_200, spoilt_recordings

import dataloader
import train
from audio import N_SAMPLES
from dataloader import ClipSet, cut_into_batches, keep_on_gpu
from errors import UserError
from recordings import COLUMNS, MACHINE_COLUMNS, NAMES_SHOWN
from utils import one_line

NAME = "normal_id_00_00000000.wav"
CPU = torch.device("cpu")


def shuffled_batches(count: int, size: int, seed: int = 0) -> list[np.ndarray]:
    """Return the numbers of the clips of each batch."""
    return cut_into_batches(np.random.default_rng(seed).permutation(count), size)


# ---- Which recordings can be used ----


def samples_of(path) -> np.ndarray:
    """Return the samples that the loader must give for a 16-bit mono recording at 16 kHz."""
    return np.resize(soundfile.read(path, dtype="int16")[0], N_SAMPLES)


def test_what_has_to_be_changed_is_said(tmp_path, capsys):
    root = write_set(tmp_path, test_clips=0)
    write_clip(root / "fan/train/normal_id_00_00000098.wav", tone(77, 10.0))
    write_clip(root / "fan/train/normal_id_00_00000099.flac", tone(78, 10.0), subtype="PCM_24")
    clips_of(root)
    assert capsys.readouterr().err.splitlines() == [
        "notice: 12 of 14 recordings are shorter than 10 s and are repeated",
        "notice: 1 of 14 recordings are rounded to 16 bits",
    ]


def test_file_names_need_not_be_utf_8(tmp_path):
    root = write_set(tmp_path)
    odd = os.fsdecode(os.fsencode(root / "fan/train/normal_id_00_") + b"\xff.wav")
    shutil.copy(root / "fan/train" / NAME, odd)
    clips = clips_of(root)
    assert len(clips) == 13
    index = clips.paths.tolist().index(Path(odd))
    ((samples, _),) = clips.batches([np.array([index])], CPU)
    assert np.array_equal(samples[0].numpy(), samples_of(root / "fan/train" / NAME))
    assert clips.fingerprint()


def test_all_broken_recordings_are_named_before_training(tmp_path, fails):
    root = write_set(tmp_path / "data")
    paths = [
        root / f"fan/train/normal_id_02_{index:08d}.wav" for index in range(10, 10 + len(BROKEN))
    ]
    for kind, path in zip(BROKEN, paths, strict=True):
        broken(kind, path)
    message = f"{len(BROKEN)} of {12 + len(BROKEN)} recordings cannot be used; replace"
    errors = fails(train.main, *arguments(tmp_path, root), match=message)
    assert all(f"{path} (" in errors for path in paths)
    assert not (tmp_path / "run.pth").exists()


@each_damage_and_200
def test_training_names_each_spoilt_recording_that_cannot_be_used(count, fails):
    with spoilt_recordings(count) as (folder, spoilt):
        refused = [one for one in spoilt if one.expected is None]
        message = f"{len(refused)} of .* cannot be used"
        errors = fails(train.main, *arguments(folder, folder / "data"), match=message)
        for one in refused:
            assert f"{one.path.name} (" in errors, one
        names = sorted(one_line(one.path.name) for one in spoilt if one.expected is NOT_A_CLIP)
        assert all(name in errors for name in names[:NAMES_SHOWN])
        assert f"skipped {len(names)} files not named" in errors
        assert "._normal" not in errors, "hidden files are passed over without a word"


# ---- Batches ----


def train_clips(data_root, num_workers: int = 2) -> ClipSet:
    return clips_of(data_root, num_workers=num_workers)


def test_a_batch_is_the_int16_samples_and_labels_of_its_clips(data_root):
    clips = train_clips(data_root)
    ((samples, labels),) = clips.batches([np.array([0, 11])], CPU)
    assert samples.dtype == torch.int16
    assert samples.shape == (2, N_SAMPLES)
    assert labels.tolist() == [0, 2]
    assert np.array_equal(samples[1].numpy(), samples_of(clips.paths.iloc[11]))
    assert list(clips.batches([], CPU)) == []


@pytest.mark.parametrize("num_workers", [1, 2, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_batches_follow_the_plan(data_root, num_workers, seed):
    clips = train_clips(data_root, num_workers)
    plan = shuffled_batches(12, 5, seed=seed)
    assert [len(indices) for indices in plan] == [5, 5, 2]
    seen = 0
    for indices, (samples, labels) in zip(plan, clips.batches(plan, CPU), strict=True):
        expected = np.stack([samples_of(clips.paths.iloc[index]) for index in indices])
        assert np.array_equal(samples.numpy(), expected)
        assert labels.tolist() == [clips.labels[index].item() for index in indices]
        seen += len(indices)
    assert seen == 12


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_batch_stays_as_it_is_until_the_next_one_is_asked_for(
    data_root, monkeypatch, num_workers
):
    """A slow consumer, simulated by waiting for all reads ahead, does not change a batch."""
    clips, is_read = train_clips(data_root, num_workers), threading.Semaphore(0)
    read_recording = dataloader.read_recording

    def counted(path, out, *place):
        read_recording(path, out)
        is_read.release()

    monkeypatch.setattr(dataloader, "read_recording", counted)
    plan = shuffled_batches(12, 5)
    for indices, due, (samples, labels) in zip(
        plan, (5 + 5, 2, 0), clips.batches(plan, CPU), strict=True
    ):
        for _ in range(due):
            assert is_read.acquire(timeout=60), "the next batch is read meanwhile"
        while is_read.acquire(timeout=0.05):
            pass  # whatever is read further ahead
        expected = np.stack([samples_of(clips.paths.iloc[index]) for index in indices])
        assert np.array_equal(samples.numpy(), expected)
        assert labels.tolist() == [clips.labels[index].item() for index in indices]


def test_recordings_that_vanished_are_one_error_that_names_a_file(tmp_path):
    clips, before = train_clips(write_set(tmp_path)), set(threading.enumerate())
    gone = clips.paths.tolist()[4:6]
    for path in gone:
        path.unlink()
    iterator = clips.batches(cut_into_batches(np.arange(12), 3), CPU)
    assert len(next(iterator)[1]) == 3
    with pytest.raises(UserError, match=f"^{re.escape(str(gone[0]))}: unreadable"):
        next(iterator)
    assert list(iterator) == []
    assert set(threading.enumerate()) == before


def test_an_abandoned_iterator_leaves_no_thread_behind(data_root):
    clips, plan = train_clips(data_root), cut_into_batches(np.arange(12), 3)
    before = set(threading.enumerate())

    def interrupted():
        for _ in clips.batches(plan, CPU):
            assert set(threading.enumerate()) > before
            raise KeyboardInterrupt

    iterator = clips.batches(plan, CPU)
    next(iterator)
    iterator.close()
    assert set(threading.enumerate()) == before
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert set(threading.enumerate()) == before


def test_a_changed_recording_is_read_anew(tmp_path):
    clips, plan = train_clips(write_set(tmp_path)), [np.array([2])]
    path = clips.paths.iloc[2]
    for seed in (77, 78):
        write_clip(path, tone(seed, 1.5))
        ((samples, _),) = clips.batches(plan, CPU)
        assert np.array_equal(samples[0].numpy(), samples_of(path))


def test_samples_are_kept_on_the_gpu_where_training_leaves_room(data_root, monkeypatch, capsys):
    """`keep_on_gpu` is tested with a GPU that does not exist and whose free memory is set here."""
    table, gpu = train_clips(data_root).recordings, torch.device("cuda", 0)
    needed, others = 12 * N_SAMPLES * 2, 10_000_000

    def keep_on(clips: ClipSet, device: torch.device) -> None:
        clips.samples = f"{len(clips)} on {device}"

    monkeypatch.setattr(ClipSet, "keep_on", keep_on)

    def samples_after(data_device: str, device: torch.device, free: int) -> list[str | None]:
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (free, 10**12))
        parts = [ClipSet(table[:9], 2), ClipSet(table[9:], 2)]
        keep_on_gpu(parts, data_device, device, others)
        return [part.samples for part in parts]

    capsys.readouterr()
    both, none = ["9 on cuda:0", "3 on cuda:0"], [None, None]
    assert samples_after("auto", gpu, needed + others) == both
    assert capsys.readouterr().err == ""
    assert samples_after("auto", gpu, needed + others - 1) == none
    notice = (
        "notice: the samples take 0.0 GB, and 0.0 GB of cuda:0 are free, of which training needs "
        "about 0.0 GB, so the recordings are read from their files in every epoch; lower batch_size"
    )
    assert capsys.readouterr().err.startswith(notice)
    assert samples_after("cuda", gpu, needed) == both
    assert samples_after("cpu", gpu, needed + others) == none
    message = r"data_device: cuda: the samples take .* GB, and .* GB of cuda:0 are free"
    with pytest.raises(UserError, match=message):
        samples_after("cuda", gpu, needed - 1)
    assert samples_after("auto", CPU, needed) == none
    assert samples_after("cpu", CPU, needed) == none
    with pytest.raises(UserError, match="data_device: cuda needs a GPU"):
        samples_after("cuda", CPU, needed)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_samples_kept_in_memory_give_the_same_batches(data_root, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device, table = torch.device(device), train_clips(data_root).recordings
    repeated = ClipSet(table.iloc[np.arange(150) % 12], 2)  # read in more than one batch
    part, _ = repeated.split(0.9, seed=0)
    plan, before = shuffled_batches(134, 50), part.fingerprint()
    from_files = [
        (samples.cpu().clone(), labels.cpu()) for samples, labels in part.batches(plan, device)
    ]
    if device.type == "cuda":
        keep_on_gpu([part], "cuda", device, 0)
    else:
        part.keep_on(device)
    assert part.samples.device.type == device.type
    assert part.samples.dtype == torch.int16
    for index, path in enumerate(part.paths[:12]):
        assert np.array_equal(part.samples[index].cpu().numpy(), samples_of(path))
    from_memory = list(part.batches(plan, device))
    assert [len(labels) for _, labels in from_memory] == [50, 50, 34]
    for one, other in zip(from_files, from_memory, strict=True):
        assert other[0].device.type == other[1].device.type == device.type
        assert torch.equal(one[0], other[0].cpu())
        assert torch.equal(one[1], other[1].cpu())
    assert part.fingerprint() == before


# ---- Windows ----


def write_long_set(root: Path) -> Path:
    """Write four training recordings of each of two machines, alternately of 25 s and 8 s."""
    for number, machine in enumerate(("fan/train/normal_id_00", "fan/train/normal_id_02")):
        for index, seconds in enumerate((25.0, 8.0, 25.0, 8.0)):
            write_clip(root / f"{machine}_{index}.wav", tone(10 * number + index, seconds))
    return root


LONG = {"machines": {"fan": [0, 2]}, "window": "all"}


def test_each_window_of_a_recording_is_a_clip(tmp_path, capsys):
    clips = clips_of(write_long_set(tmp_path), **LONG)
    assert clips.clip_starts.tolist() == [0, 10, 15, 0, 0, 10, 15, 0] * 2
    assert clips.clip_recordings.tolist() == [0, 0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5, 6, 6, 6, 7]
    assert list(clips.recordings.columns) == [*COLUMNS, "label"]
    assert "4 of 8 recordings are shorter than 10 s and are repeated" in capsys.readouterr().err
    ((samples, labels),) = clips.batches([np.array([0, 1, 2, 3, 14])], CPU)
    assert labels.tolist() == [0, 0, 0, 0, 1]
    for row, index in zip(samples, [0, 1, 2, 3, 14], strict=True):
        first = int(clips.clip_starts[index] * 16_000)
        whole = soundfile.read(clips.paths.iloc[index], dtype="int16")[0][first:]
        assert np.array_equal(row.numpy(), np.resize(whole[:N_SAMPLES], N_SAMPLES))
    assert clips_of(tmp_path, **LONG, hop=5).clip_starts[:4].tolist() == [0, 5, 10, 15]
    first = clips_of(tmp_path, machines=LONG["machines"])
    assert first.clip_starts.tolist() == [0] * 8
    notice = "4 of 8 recordings are longer than 12 s, and only their first 10 s are used"
    assert notice in capsys.readouterr().err


def test_the_windows_of_a_recording_stay_together(tmp_path):
    clips = clips_of(write_long_set(tmp_path), **LONG)
    windows = dict(zip(clips.recordings["path"], clips.starts, strict=True))
    for seed in range(5):
        parts = clips.split(0.6, seed)
        # int(0.6 * 4) of each machine to train on
        assert [len(part.recordings) for part in parts] == [4, 4]
        for part in parts:
            assert part.starts == [windows[path] for path in part.recordings["path"]]


def test_the_fingerprint_tells_windows(tmp_path):
    root = write_long_set(tmp_path)
    prints = set()
    for keys in ({}, {"window": "all"}, {"window": "all", "hop": 5}):
        prints.add(clips_of(root, machines=LONG["machines"], **keys).fingerprint())
    assert len(prints) == 3


# ---- Split and plans ----


def test_the_split_is_random_complete_and_seeded(data_root):
    clips = train_clips(data_root)
    training, validation = clips.split(0.8, seed=1)
    # int(0.8 * 4) of each of three machines to train on
    assert (len(training), len(validation)) == (9, 3)
    paths = [*training.paths, *validation.paths]
    assert len(paths) == 12
    assert set(paths) == set(clips.paths)
    assert clips.split(0.8, seed=1)[1].fingerprint() == validation.fingerprint()
    assert clips.split(0.8, seed=2)[1].fingerprint() != validation.fingerprint()
    for part in (training, validation):
        machines = part.recordings[MACHINE_COLUMNS].itertuples(index=False, name=None)
        assert part.labels.tolist() == [CLASSES.machines.index(machine) for machine in machines]
    ((samples, labels),) = validation.batches([np.arange(3)], CPU)
    expected = np.stack([samples_of(validation.paths.iloc[index]) for index in range(3)])
    assert np.array_equal(samples.numpy(), expected)
    assert labels.tolist() == validation.labels.tolist()


def labelled(sizes: list[list[int]]) -> ClipSet:
    """Clips of machines whose classes have so many recordings."""
    labels = [(machine, size) for machine, of_machine in enumerate(sizes) for size in of_machine]
    rows = []
    for label, (machine, size) in enumerate(labels):
        rows += [(Path(f"{label}_{x}.wav"), "fan", f"{machine:02d}", label) for x in range(size)]
    return ClipSet(pd.DataFrame(rows, columns=["path", *MACHINE_COLUMNS, "label"]), 1)


def held_out_counts(sizes: list[list[int]], ratio: float, seed: int) -> list[int]:
    """Of each class, how many recordings are held out."""
    training, validation = labelled(sizes).split(ratio, seed)
    n_classes = sum(map(len, sizes))
    counts = np.bincount(validation.labels, minlength=n_classes)
    total = counts + np.bincount(training.labels, minlength=n_classes)
    assert total.tolist() == [size for of_machine in sizes for size in of_machine]
    return counts.tolist()


@pytest.mark.parametrize(
    ("sizes", "ratio", "expected"),
    [
        ([[75], [50], [15], [2], [1]], 0.95, [4, 3, 1, 1, 0]),
        ([[1000], [20]], 0.95, [50, 1]),
        ([[10, 20, 30]], 0.9, [1, 2, 3]),  # in proportion
        ([[990, 10]], 0.95, [50, 0]),
        ([[100, 1, 1]], 0.5, [51, 0, 0]),  # each class keeps one
        ([[3, 3], [4]], 0.1, [2, 2, 3]),
    ],
)
def test_each_machine_has_its_share_of_the_split(sizes, ratio, expected):
    for seed in range(5):
        counts = held_out_counts(sizes, ratio, seed)
        assert sum(counts) == sum(expected)
        assert np.abs(np.subtract(counts, expected)).max() <= (sizes == [[990, 10]])


def test_any_recording_may_be_held_out():
    clips, held_out = labelled([[4, 4]]), set()
    for seed in range(40):
        held_out |= set(clips.split(0.75, seed)[1].paths)
    assert len(held_out) == 8


def test_the_fingerprint_tells_clips_their_order_and_their_classes(data_root, tmp_path):
    table = train_clips(data_root).recordings
    copy = Path(shutil.copytree(data_root, tmp_path / "elsewhere"))
    same = train_clips(copy).fingerprint()  # wherever they lie
    assert ClipSet(table, 2).fingerprint() == same
    relabelled = table.assign(label=[*table["label"][:11], 0])
    for other in (table[::-1], table[:11], relabelled):
        assert ClipSet(other, 2).fingerprint() != same


@pytest.mark.parametrize(
    ("count", "size", "least", "sizes"),
    [
        (9, 4, 2, [4, 5]), (3, 2, 2, [3]), (10, 4, 2, [4, 4, 2]), (11, 8, 4, [11]),
        (1, 4, 1, [1]), (0, 4, 1, []),
    ],
)  # fmt: skip
def test_a_last_batch_that_is_too_small_joins_the_one_before(count, size, least, sizes):
    assert [len(batch) for batch in cut_into_batches(np.arange(count), size, least)] == sizes
