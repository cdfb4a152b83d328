"""Which clips there are, what is said about odd files, and refused; batches of samples from files and from memory."""

import os
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import MACHINES, arguments, clips_of, tone, write_clip, write_set
from mutations import BROKEN, NOT_A_CLIP, broken, each_damage_and_200, spoilt_recordings

import dataloader
import train
from config import load_config
from dataloader import (
    ANOMALOUS,
    COLUMNS,
    LABEL_LIST,
    NAMES_SHOWN,
    NORMAL,
    UNLABELLED,
    ClipSet,
    batches,
    class_labels,
    find_clips,
    find_machines,
    keep_on_gpu,
    read_label_list,
    settle_machines,
    shuffled_batches,
)
from model.tastgram import N_SAMPLES
from utils import UserError, one_line

NAME = "normal_id_00_00000000.wav"
CPU = torch.device("cpu")
PUBLISHED_LABELS = Path(__file__).with_name("data") / LABEL_LIST


# ---- Which clips ----


def test_labels_follow_the_order_of_the_table():
    assert class_labels({"pump": [4, 0], "fan": [1]}) == {("pump", "04"): 0, ("pump", "00"): 1, ("fan", "01"): 2}
    labels = class_labels(load_config().machines)
    assert (labels["fan", "00"], labels["pump", "00"], labels["slider", "00"]) == (0, 7, 14)
    assert (labels["ToyCar", "01"], labels["ToyConveyor", "01"], labels["valve", "06"]) == (21, 28, 40)


def test_find_clips(tmp_path, capsys):
    root = write_set(tmp_path / "id_09_raid" / "data")  # the ID is in the file's name only
    write_clip(root / "fan/train/normal_id_07_00000000.wav", tone(1, 0.1))
    write_clip(root / "fan/train/anomaly_id_00_00000000.wav", tone(1, 0.1))
    (root / "fan/train/._normal_id_00_00000000.wav").touch()
    (root / "fan/train/notes.txt").touch()
    shutil.move(root / "valve/test/normal_id_01_00000000.wav", root / "valve/test/NORMAL_ID_01_extra.WAV")
    clips = find_clips(root, MACHINES, "train")
    assert list(clips.columns) == COLUMNS
    assert list(zip(clips["machine_type"], clips["machine_id"], clips["label"], strict=True)) == [
        *[("fan", "00", 0)] * 4, *[("fan", "02", 1)] * 4, *[("valve", "01", 2)] * 4
    ]  # fmt: skip
    assert set(clips["condition"]) == {NORMAL}
    assert clips["path"][5] == root / "fan/train/normal_id_02_00000001.wav"
    said = capsys.readouterr().err
    assert "skipped 2 files not named normal_id_XX_*.wav or .flac: ._normal_id_00_00000000.wav, notes.txt\n" in said
    assert "skipped 1 file of IDs outside the table of machines: normal_id_07_00000000.wav" in said
    assert "skipped 1 file named anomaly: training takes normal ones only: anomaly_id_00_00000000.wav" in said
    clips = find_clips(root, MACHINES, "test")
    conditions = clips["condition"][clips["machine_type"] == "valve"]
    assert conditions.tolist() == [NORMAL, ANOMALOUS, ANOMALOUS, NORMAL]


def test_of_many_files_passed_over_some_are_named(tmp_path, capsys):
    root = write_set(tmp_path)
    for index in range(NAMES_SHOWN + 2):
        (root / f"fan/train/note_{index}.txt").touch()
    find_clips(root, MACHINES, "train")
    said = capsys.readouterr().err
    assert f"skipped {NAMES_SHOWN + 2} files not named" in said
    assert f", note_{NAMES_SHOWN - 1}.txt and 2 more\n" in said


def test_ids_without_clips_are_named(data_root, capsys):
    find_clips(data_root, {"fan": [0, 1, 2], "valve": [1, 3]}, "train")
    assert "train: 2 of 5 machine IDs have no clips: fan 01, valve 03" in capsys.readouterr().err
    find_clips(data_root, {"fan": [0, 1], "valve": [1]}, "test")
    assert "test: 1 of 3 machine IDs have no clips: fan 01" in capsys.readouterr().err


def test_missing_folders(data_root, capsys):
    machines = {"fan": [0], "pump": [0]}
    with pytest.raises(UserError, match=r"no folder .*pump/train .*datasets/download.py.*datasets/synthesize.py"):
        find_clips(data_root, machines, "train")
    assert len(find_clips(data_root, machines, "test")) == 4
    assert "no test folder for pump" in capsys.readouterr().err
    with pytest.raises(UserError, match="no folder"):
        find_clips(data_root, {"pump": [0]}, "test")
    with pytest.raises(UserError, match=r"no clips found: looked for .*normal_id_XX.*datasets/download.py"):
        find_clips(data_root, {"fan": [5]}, "train")
    with pytest.raises(UserError, match="training clips of one machine ID only"):
        find_clips(data_root, {"fan": [0, 5]}, "train")
    with pytest.raises(UserError, match=r"no folder \S*nowhere \(looked for .*datasets/download.py"):
        find_clips(data_root / "nowhere", {"fan": [0]}, "train")


# ---- Machines as the folders have them ----


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_machines_are_found_in_the_training_folders(tmp_path, monkeypatch, capsys):
    """In an order of their own, whatever that of the disk; an ID is a number or a word."""
    names = ["press/train/normal_id_line-3_1.wav", "press/train/normal_id_10_1.flac", "press/train/NORMAL_ID_2_1.WAV",
             "press/train/normal_id_002_2.wav", "press/train/anomaly_id_7_1.wav", "press/train/id_8_1.wav",
             "press/test/normal_id_9_1.wav", "Fan/train/normal_id_00_1.wav", "notes/train/readme.txt"]  # fmt: skip
    touch(*(tmp_path / name for name in names), tmp_path / "valve" / "train")
    touch(tmp_path / ".Trash" / "train" / "normal_id_00_1.wav")
    iterdir = Path.iterdir
    for order in (sorted, lambda found: sorted(found, reverse=True)):
        monkeypatch.setattr(Path, "iterdir", lambda self, order=order: iter(order(iterdir(self))))
        assert find_machines(tmp_path) == {"Fan": [0], "press": [2, 10, "line-3"]}
        assert list(find_machines(tmp_path)) == ["Fan", "press"]
    config = settle_machines(load_config(data_root=str(tmp_path), machines="auto"))
    assert class_labels(config.machines) == {
        ("Fan", "00"): 0, ("press", "02"): 1, ("press", "10"): 2, ("press", "line-3"): 3
    }  # fmt: skip
    said = capsys.readouterr().err
    assert f"notice: {tmp_path}: 4 machine IDs: Fan 00; press 02, 10, line-3\n" in said
    assert "no recordings named normal_id_XX_*.wav in the train folder of notes\n" in said
    assert settle_machines(config) is config


def test_folders_without_machines(tmp_path):
    with pytest.raises(UserError, match=r"no machines found: looked for .*/<machine type>/train/normal_id_XX_\*.wav"):
        find_machines(tmp_path)
    config = load_config(data_root=str(tmp_path), machines="auto")
    touch(tmp_path / "fan" / "train" / "normal_id_00_1.wav")
    with pytest.raises(UserError, match="training clips of one machine ID only, and the method learns by"):
        settle_machines(config)
    touch(tmp_path / "fan" / "train" / "normal_id_mean_1.wav")
    with pytest.raises(UserError, match=r"machines: {'fan': \[0, 'mean'\]} is not .*, not pooled, mean or min"):
        settle_machines(config)


def test_ids_may_be_words(tmp_path, capsys):
    touch(*(tmp_path / f"press/train/normal_id_{name}_1.wav" for name in ("line-3", "line-4", "3")))
    clips = find_clips(tmp_path, {"press": ["line-4", "line-3"]}, "train")
    assert clips["machine_id"].tolist() == ["line-3", "line-4"]
    assert clips["label"].tolist() == [1, 0]
    assert "skipped 1 file of IDs outside the table of machines: normal_id_3_1.wav" in capsys.readouterr().err


# ---- Evaluation clips, whose names do not tell ----


def test_published_label_list():
    """The list as published: 7,103 clips of the IDs that the challenge kept back."""
    conditions = read_label_list(PUBLISHED_LABELS)
    assert len(conditions) == 7103
    machines = {(machine_type, int(name.split("_")[1])) for machine_type, name in conditions}
    table = {
        "fan": [1, 3, 5], "pump": [1, 3, 5], "slider": [1, 3, 5], "valve": [1, 3, 5],
        "ToyCar": [5, 6, 7], "ToyConveyor": [4, 5, 6],
    }  # fmt: skip
    assert machines == {(machine_type, machine_id) for machine_type, ids in table.items() for machine_id in ids}
    lines = PUBLISHED_LABELS.read_text().splitlines()
    assert list(conditions.values()).count(ANOMALOUS) == sum(",anomaly_id_" in line for line in lines)
    assert conditions["fan", "id_01_00000000"] == NORMAL
    assert conditions["fan", "id_01_00000001"] == ANOMALOUS


def test_evaluation_clips_take_their_condition_from_the_list(tmp_path, capsys):
    for name in ("id_00_00000000.wav", "id_00_00000001.wav", "id_02_00000000.flac", "normal_id_00_00000000.wav"):
        write_clip(tmp_path / "fan/evaluation" / name, tone(0, 0.1))
    machines = {"fan": [0, 2], "valve": [1]}
    clips = find_clips(tmp_path, machines, "evaluation")
    assert clips["machine_id"].tolist() == ["00", "00", "02"]
    assert clips["label"].tolist() == [0, 0, 1]
    assert set(clips["condition"]) == {UNLABELLED}
    said = capsys.readouterr().err
    assert "skipped 1 file not named id_XX_*.wav or .flac: normal_id_00_00000000.wav" in said
    assert "no evaluation folder for valve" in said
    (tmp_path / LABEL_LIST).write_text(
        "valve\nid_00_00000000.wav,anomaly_id_00_00000000.wav,1\n"
        "fan\r\nid_00_00000000.wav,normal_id_00_00000007.wav,0\r\nid_02_00000000.wav,anomaly_id_02_00000001.wav,1\n\n"
    )
    conditions = find_clips(tmp_path, machines, "evaluation")["condition"]
    assert conditions.tolist() == [NORMAL, UNLABELLED, ANOMALOUS]
    with pytest.raises(UserError, match=r"no folder .*valve/evaluation .*id_XX_.*download.py --parts evaluation"):
        find_clips(tmp_path, {"valve": [1]}, "evaluation")


@pytest.mark.parametrize("line", ["id_00_00000000.wav,1", "id_00_00000000.wav,normal_id_00_00000000.wav,2"])
def test_a_label_list_with_something_else_in_it(tmp_path, line):
    (tmp_path / LABEL_LIST).write_text(f"fan\n{line}\n")
    with pytest.raises(UserError, match=r"eval_data_list.csv, line 2: not `<file name>,"):
        read_label_list(tmp_path / LABEL_LIST)
    (tmp_path / LABEL_LIST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"eval_data_list.csv: not a list of labels"):
        read_label_list(tmp_path / LABEL_LIST)


# ---- Which of them can be used ----


def samples_of(path) -> np.ndarray:
    """What a 16-bit mono recording at 16 kHz must give."""
    return np.resize(soundfile.read(path, dtype="int16")[0], N_SAMPLES)


def test_what_has_to_be_changed_is_said(tmp_path, capsys):
    root = write_set(tmp_path, test_clips=0)
    write_clip(root / "fan/train/normal_id_00_00000098.wav", tone(77, 10.0))
    write_clip(root / "fan/train/normal_id_00_00000099.flac", tone(78, 10.0), subtype="PCM_24")
    clips_of(root)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "notice: 12 of 14 recordings are shorter than 10 s and are repeated",
        "notice: 1 of 14 recordings are rounded to 16 bits",
    ]


def test_file_names_need_not_be_utf_8(tmp_path):
    root = write_set(tmp_path)
    odd = os.fsdecode(os.fsencode(root / "fan/train/normal_id_00_") + b"\xff.wav")
    shutil.copy(root / "fan/train" / NAME, odd)
    clips = clips_of(root)
    assert len(clips) == 13
    (index,) = clips.clips.index[clips.clips["path"] == Path(odd)]
    ((samples, _),) = clips.batches([np.array([index])], CPU)
    assert np.array_equal(samples[0].numpy(), samples_of(root / "fan/train" / NAME))
    assert clips.fingerprint()


def test_all_broken_recordings_are_named_before_training(tmp_path, fails):
    root = write_set(tmp_path / "data")
    paths = [root / f"fan/train/normal_id_02_{index:08d}.wav" for index in range(10, 10 + len(BROKEN))]
    for kind, path in zip(BROKEN, paths, strict=True):
        broken(kind, path)
    total = 12 + len(BROKEN)
    said = fails(
        train.main, *arguments(tmp_path, root), match=f"{len(BROKEN)} of {total} recordings cannot be used, replace"
    )
    assert all(f"{path} (" in said for path in paths)
    assert not (tmp_path / "run.pth").exists()


@each_damage_and_200
def test_training_names_each_spoilt_recording_that_cannot_be_used(count, fails):
    with spoilt_recordings(count) as (folder, spoilt):
        refused = [one for one in spoilt if one.expected is None]
        said = fails(train.main, *arguments(folder, folder / "data"), match=f"{len(refused)} of .* cannot be used")
        for one in refused:
            assert f"{one.path.name} (" in said, one
        names = sorted(one_line(one.path.name) for one in spoilt if one.expected is NOT_A_CLIP)
        assert all(name in said for name in names[:NAMES_SHOWN])
        assert f"skipped {len(names)} files not named" in said


# ---- Batches ----


def train_clips(data_root, num_workers: int = 2) -> ClipSet:
    return clips_of(data_root, num_workers=num_workers)


def test_a_batch_is_the_int16_samples_and_labels_of_its_clips(data_root):
    clips = train_clips(data_root)
    ((samples, labels),) = clips.batches([np.array([0, 11])], CPU)
    assert samples.dtype == torch.int16
    assert samples.shape == (2, N_SAMPLES)
    assert labels.tolist() == [0, 2]
    assert np.array_equal(samples[1].numpy(), samples_of(clips.clips["path"][11]))
    assert list(clips.batches([], CPU)) == []


@pytest.mark.parametrize("num_workers", [1, 2, 5])
@pytest.mark.parametrize("epoch", [0, 1])
def test_batches_follow_the_plan(data_root, num_workers, epoch):
    clips = train_clips(data_root, num_workers)
    plan = shuffled_batches(12, 5, seed=3, epoch=epoch)
    assert [len(indices) for indices in plan] == [5, 5, 2]
    seen = 0
    for indices, (samples, labels) in zip(plan, clips.batches(plan, CPU), strict=True):
        expected = np.stack([samples_of(clips.clips["path"][index]) for index in indices])
        assert np.array_equal(samples.numpy(), expected)
        assert labels.tolist() == [clips.clips["label"][index] for index in indices]
        seen += len(indices)
    assert seen == 12


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_batch_stays_as_it_is_until_the_next_one_is_asked_for(data_root, monkeypatch, num_workers):
    """However slow the consumer is: it waits here until all that is read ahead has been read."""
    clips, is_read = train_clips(data_root, num_workers), threading.Semaphore(0)
    read_recording = dataloader.read_recording

    def counted(path, out, *place):
        read_recording(path, out)
        is_read.release()

    monkeypatch.setattr(dataloader, "read_recording", counted)
    plan = shuffled_batches(12, 5, seed=0, epoch=0)
    for indices, due, (samples, labels) in zip(plan, (5 + 5, 2, 0), clips.batches(plan, CPU), strict=True):
        for _ in range(due):
            assert is_read.acquire(timeout=60), "the next batch is read meanwhile"
        while is_read.acquire(timeout=0.05):
            pass  # whatever is read further ahead
        expected = np.stack([samples_of(clips.clips["path"][index]) for index in indices])
        assert np.array_equal(samples.numpy(), expected)
        assert labels.tolist() == [clips.clips["label"][index] for index in indices]


def test_recordings_that_vanished_are_one_error_that_names_a_file(tmp_path):
    clips, before = train_clips(write_set(tmp_path)), set(threading.enumerate())
    gone = clips.clips["path"].tolist()[4:6]
    for path in gone:
        path.unlink()
    iterator = clips.batches(batches(np.arange(12), 3), CPU)
    assert len(next(iterator)[1]) == 3
    with pytest.raises(UserError, match=f"^{re.escape(str(gone[0]))}: unreadable"):
        next(iterator)
    assert list(iterator) == []
    assert set(threading.enumerate()) == before


def test_an_abandoned_iterator_leaves_no_thread_behind(data_root):
    clips, plan = train_clips(data_root), batches(np.arange(12), 3)
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
    path = clips.clips["path"][2]
    for seed in (77, 78):
        write_clip(path, tone(seed, 1.5))
        ((samples, _),) = clips.batches(plan, CPU)
        assert np.array_equal(samples[0].numpy(), samples_of(path))


def test_samples_are_kept_on_the_gpu_where_training_leaves_room(data_root, monkeypatch, capsys):
    """What `keep_on_gpu` decides, with a GPU that reports its memory and is not there."""
    table, gpu = train_clips(data_root).clips, torch.device("cuda", 0)
    needed, others = 12 * N_SAMPLES * 2, 10_000_000
    monkeypatch.setattr(ClipSet, "read_all", lambda self, device: f"{len(self)} on {device}")

    def kept(data_device: str, device: torch.device, free: int) -> list[str | None]:
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (free, 10**12))
        parts = [ClipSet(table[:9], 2), ClipSet(table[9:], 2)]
        keep_on_gpu(parts, data_device, device, others)
        return [part.samples for part in parts]

    capsys.readouterr()
    both, none = ["9 on cuda:0", "3 on cuda:0"], [None, None]
    assert kept("auto", gpu, needed + others) == both
    assert capsys.readouterr().err == ""
    assert kept("auto", gpu, needed + others - 1) == none
    said = (
        "notice: the samples take 0.0 GB, and 0.0 GB of cuda:0 are free, of which training takes about 0.0: the "
        "recordings are read from their files in every epoch, by num_workers threads"
    )
    assert capsys.readouterr().err.startswith(said)
    assert kept("cuda", gpu, needed) == both
    assert kept("cpu", gpu, needed + others) == none
    with pytest.raises(UserError, match=r"data_device: cuda: the samples take .* GB, and .* GB of cuda:0 are free"):
        kept("cuda", gpu, needed - 1)
    assert kept("auto", CPU, needed) == none
    assert kept("cpu", CPU, needed) == none
    with pytest.raises(UserError, match="data_device: cuda needs a GPU"):
        kept("cuda", CPU, needed)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_samples_kept_in_memory_give_the_same_batches(data_root, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device, table = torch.device(device), train_clips(data_root).clips
    part = ClipSet(table.iloc[np.arange(150) % 12], 2).split(0.9, seed=0)[0]  # read in more than one batch
    plan, before = shuffled_batches(135, 50, seed=0, epoch=0), part.fingerprint()
    from_files = [(samples.cpu().clone(), labels.cpu()) for samples, labels in part.batches(plan, device)]
    if device.type == "cuda":
        keep_on_gpu([part], "cuda", device, 0)
    else:
        part.samples = part.read_all(device)
    assert part.samples.device.type == device.type
    assert part.samples.dtype == torch.int16
    for index, path in enumerate(part.clips["path"][:12]):
        assert np.array_equal(part.samples[index].cpu().numpy(), samples_of(path))
    kept = list(part.batches(plan, device))
    assert [len(labels) for _, labels in kept] == [50, 50, 35]
    for one, other in zip(from_files, kept, strict=True):
        assert other[0].device.type == other[1].device.type == device.type
        assert torch.equal(one[0], other[0].cpu())
        assert torch.equal(one[1], other[1].cpu())
    assert part.fingerprint() == before


# ---- Windows ----


def write_long_set(root: Path) -> Path:
    """Of each of two machines, four recordings for training; of 25 s and, every second one, of 8 s."""
    for number, machine in enumerate(("fan/train/normal_id_00", "fan/train/normal_id_02")):
        for index in range(4):
            write_clip(root / f"{machine}_{index}.wav", tone(10 * number + index, (25.0, 8.0)[index % 2]))
    return root


LONG = {"machines": {"fan": [0, 2]}, "window": "all"}


def test_each_window_of_a_recording_is_a_clip(tmp_path, capsys):
    clips = clips_of(write_long_set(tmp_path), **LONG)
    assert clips.clips["start"].tolist() == [0, 10, 15, 0, 0, 10, 15, 0] * 2
    assert len(clips.recordings) == 8
    assert list(clips.recordings.columns) == COLUMNS
    assert "4 of 8 recordings are shorter than 10 s and are repeated" in capsys.readouterr().err
    ((samples, labels),) = clips.batches([np.array([0, 1, 2, 3, 14])], CPU)
    assert labels.tolist() == [0, 0, 0, 0, 1]
    for row, index in zip(samples, [0, 1, 2, 3, 14], strict=True):
        path, start = clips.clips.loc[index, ["path", "start"]]
        whole = soundfile.read(path, dtype="int16")[0][int(start * 16_000) :]
        assert np.array_equal(row.numpy(), np.resize(whole[:N_SAMPLES], N_SAMPLES))
    assert clips_of(tmp_path, **LONG, hop=5).clips["start"][:4].tolist() == [0, 5, 10, 15]
    first = clips_of(tmp_path, machines=LONG["machines"])
    assert first.clips["start"].tolist() == [0] * 8
    assert "4 of 8 recordings are longer than 12 s, and only their first 10 s count" in capsys.readouterr().err


def test_the_windows_of_a_recording_stay_together(tmp_path):
    clips = clips_of(write_long_set(tmp_path), **LONG)
    whole = clips.clips.groupby("path").size()
    for seed in range(5):
        parts = clips.split(0.6, seed)
        assert [len(part.recordings) for part in parts] == [4, 4]  # int(0.6 * 8) to train on
        for part in parts:
            sizes = part.clips.groupby("path").size()
            assert sizes.to_dict() == whole[sizes.index].to_dict()
            assert part.clips["start"].diff().dropna().isin([10, 5, -15, 0]).all(), "in their order"


def test_values_of_windows_are_combined(tmp_path):
    clips = clips_of(write_long_set(tmp_path), **LONG)
    values = np.arange(16, dtype=np.float32)[::-1].copy()
    means, highest = clips.over_windows(values, "mean"), clips.over_windows(values, "max")
    assert means.dtype == np.float32
    assert means.tolist() == [14, 12, 10, 8, 6, 4, 2, 0]
    assert highest.tolist() == [15, 12, 11, 8, 7, 4, 3, 0]
    assert clips.over_windows(np.stack([values, -values], axis=1), "mean")[:2].tolist() == [[14, -14], [12, -12]]
    assert clips.worst_starts(values).tolist() == [0] * 8
    assert clips.worst_starts(-values).tolist() == [15, 0] * 4


def test_the_fingerprint_tells_windows(tmp_path):
    root = write_long_set(tmp_path)
    prints = {clips_of(root, machines=LONG["machines"], **keys).fingerprint()
              for keys in ({}, {"window": "all"}, {"window": "all", "hop": 5})}  # fmt: skip
    assert len(prints) == 3


# ---- Split and plans ----


def test_the_split_is_random_complete_and_seeded(data_root):
    clips = train_clips(data_root)
    training, validation = clips.split(0.8, seed=1)
    assert (len(training), len(validation)) == (9, 3)  # int(0.8 * 12) to train on
    paths = [*training.clips["path"], *validation.clips["path"]]
    assert len(paths) == 12
    assert set(paths) == set(clips.clips["path"])
    assert clips.split(0.8, seed=1)[1].fingerprint() == validation.fingerprint()
    assert clips.split(0.8, seed=2)[1].fingerprint() != validation.fingerprint()
    classes = class_labels(MACHINES)
    for part in (training, validation):
        machines = zip(part.clips["machine_type"], part.clips["machine_id"], strict=True)
        assert part.labels.tolist() == [classes[machine] for machine in machines]
    ((samples, labels),) = validation.batches([np.arange(3)], CPU)
    expected = np.stack([samples_of(validation.clips["path"][index]) for index in range(3)])
    assert np.array_equal(samples.numpy(), expected)
    assert labels.tolist() == validation.labels.tolist()


def test_the_fingerprint_tells_clips_their_order_and_their_classes(data_root, tmp_path):
    table = train_clips(data_root).clips
    copy = Path(shutil.copytree(data_root, tmp_path / "elsewhere"))
    same = train_clips(copy).fingerprint()  # wherever they lie
    assert ClipSet(table, 2).fingerprint() == same
    relabelled = table.assign(label=[*table["label"][:11], 0])
    for other in (table[::-1], table[:11], relabelled):
        assert ClipSet(other, 2).fingerprint() != same


def test_an_epoch_has_every_clip_once_in_an_order_of_its_own():
    first, second = (shuffled_batches(38, 8, seed=0, epoch=epoch) for epoch in (0, 1))
    assert [len(batch) for batch in first] == [8, 8, 8, 8, 6]
    assert sorted(np.concatenate(first)) == list(range(38))
    assert not np.array_equal(np.concatenate(first), np.concatenate(second))
    assert np.array_equal(first[0], shuffled_batches(38, 8, seed=0, epoch=0)[0])


@pytest.mark.parametrize(
    ("count", "size", "least", "sizes"),
    [(9, 4, 2, [4, 5]), (3, 2, 2, [3]), (10, 4, 2, [4, 4, 2]), (11, 8, 4, [11]), (1, 4, 1, [1]), (0, 4, 1, [])],
)
def test_a_last_batch_that_is_too_small_joins_the_one_before(count, size, least, sizes):
    assert [len(batch) for batch in batches(np.arange(count), size, least)] == sizes
