"""Finding, decoding and batching recordings; what is said about odd files, and refused."""

import json
import os
import shutil
import struct
import threading

import numpy as np
import pytest
import soundfile
import torch
from conftest import MACHINES, arguments, tone, write_clip, write_set

import train
from dataloader import (
    N_SAMPLES,
    ClipSet,
    WaveformStore,
    batches,
    class_labels,
    find_clips,
    read_clip,
    shuffled_batches,
)
from utils import UserError, load_config

NAME = "normal_id_00_00000000.wav"


def test_labels_follow_the_order_of_the_table():
    assert class_labels({"pump": [4, 0], "fan": [1]}) == {("pump", 4): 0, ("pump", 0): 1, ("fan", 1): 2}
    labels = class_labels(load_config().machines)
    assert (labels["fan", 0], labels["pump", 0], labels["slider", 0]) == (0, 7, 14)
    assert (labels["ToyCar", 1], labels["ToyConveyor", 1], labels["valve", 6]) == (21, 28, 40)


def test_find_clips(tmp_path, capsys):
    root = write_set(tmp_path / "id_09_raid" / "data")  # the ID is in the file's name only
    write_clip(root / "fan/train/normal_id_07_00000000.wav", tone(1, 0.1))
    write_clip(root / "fan/train/anomaly_id_00_00000000.wav", tone(1, 0.1))
    (root / "fan/train/._normal_id_00_00000000.wav").touch()
    (root / "fan/train/notes.txt").touch()
    shutil.move(root / "valve/test/normal_id_01_00000000.wav", root / "valve/test/NORMAL_ID_01_extra.WAV")
    clips = find_clips(root, MACHINES, "train")
    assert [(c.machine_type, c.machine_id, c.label) for c in clips] == [
        *[("fan", 0, 0)] * 4, *[("fan", 2, 1)] * 4, *[("valve", 1, 2)] * 4
    ]  # fmt: skip
    assert not any(clip.is_anomaly for clip in clips)
    said = capsys.readouterr().err
    assert "skipped 2 files with names other than" in said
    assert "skipped 1 file of IDs outside the table" in said
    assert "skipped 1 file named anomaly" in said
    test_clips = find_clips(root, MACHINES, "test")
    assert [clip.is_anomaly for clip in test_clips if clip.machine_type == "valve"] == [False, True, True, False]


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


# ---- One recording ----


def test_16_bit_pcm_comes_through_exactly(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, N_SAMPLES + 16_000).astype(np.int16)
    for name in ("a.wav", "a.flac"):
        soundfile.write(tmp_path / name, samples, 16_000)
        decoded, changes = read_clip(tmp_path / name)
        assert np.array_equal(decoded, samples[:N_SAMPLES])
        assert changes == []


def test_a_short_clip_is_repeated(tmp_path):
    decoded, changes = read_clip(write_clip(tmp_path / "a.wav", tone(0, 3.0)))
    assert np.array_equal(decoded[48_000:96_000], decoded[:48_000])
    assert len(decoded) == N_SAMPLES
    assert changes == ["are shorter than 10 s and were repeated"]


def test_the_first_of_several_channels_is_used(tmp_path):
    left, right = tone(0), tone(1)
    mono, _ = read_clip(write_clip(tmp_path / "mono.wav", left))
    decoded, changes = read_clip(write_clip(tmp_path / "a.wav", np.stack([left, right], axis=1)))
    assert np.array_equal(decoded, mono)
    assert changes == ["have several channels: the first is used"]


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_another_sample_rate_is_resampled(tmp_path, rate):
    time = np.arange(10 * rate) / rate
    decoded, changes = read_clip(write_clip(tmp_path / "a.wav", 0.1 * np.sin(2 * np.pi * 1000 * time), rate))
    expected = 0.1 * np.sin(2 * np.pi * 1000 * np.arange(N_SAMPLES) / 16_000)
    assert changes == ["were resampled to 16000 Hz"]
    assert np.abs(decoded / 32768 - expected)[800:-800].max() < 1e-3


@pytest.mark.parametrize("subtype", ["PCM_24", "FLOAT", "DOUBLE"])
def test_finer_samples_are_rounded(tmp_path, subtype):
    samples = tone(0)
    decoded, changes = read_clip(write_clip(tmp_path / "a.wav", samples, subtype=subtype))
    assert np.abs(decoded - samples * 32768).max() <= 0.51
    assert changes == ["were rounded to 16 bits"]


def test_clipping_is_not_silent(tmp_path):
    samples = tone(0)
    samples[5] = 1.0  # full scale is 1/32768 beyond the largest int16, which is not worth a word
    assert "exceed" not in str(read_clip(write_clip(tmp_path / "a.wav", samples, subtype="FLOAT"))[1])
    samples[5] = -1.5
    decoded, changes = read_clip(write_clip(tmp_path / "a.wav", samples, subtype="FLOAT"))
    assert decoded[5] == -32768
    assert "exceed full scale and were clipped" in changes


def broken(kind: str, path) -> None:
    """Make `path` a recording that cannot be used."""
    write_clip(path, tone(0, 2.0))
    content = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "no samples":
        write_clip(path, np.zeros(0))
    elif kind == "cut in half":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "header only":
        path.write_bytes(content[:30])
    elif kind == "text":
        path.write_text("not audio\n")
    elif kind == "nan":
        samples = tone(0, 2.0)
        samples[100] = np.nan
        write_clip(path, samples, subtype="FLOAT")
    elif kind == "infinite, resampled":
        samples = tone(0, 2.0)
        samples[100] = np.inf
        write_clip(path, samples, rate=22_050, subtype="FLOAT")
    elif kind == "ogg":
        soundfile.write(path, tone(0, 2.0), 16_000, format="OGG")
    elif kind == "absurd rate":
        path.write_bytes(content[:24] + struct.pack("<I", 3) + content[28:])
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "flac cut":
        soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 32_000), 16_000, format="FLAC")
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif kind == "big-endian, cut":
        soundfile.write(path, tone(0, 2.0), 16_000, endian="BIG")
        path.write_bytes(path.read_bytes()[:20_000])
    elif kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        raise AssertionError(kind)


BROKEN = {
    "empty": "empty", "no samples": "empty", "cut in half": "truncated", "header only": "unreadable|truncated",
    "text": "unreadable", "nan": "not finite", "infinite, resampled": "not finite", "ogg": "it is OGG",
    "absurd rate": "sample rate of 3 Hz", "folder": "unreadable: not a file", "flac cut": "truncated|unreadable",
    "big-endian, cut": "truncated", "pipe": "not a file",
}  # fmt: skip


def test_a_wav_from_a_pipe_says_nothing_of_its_length(tmp_path):
    expected, _ = read_clip(write_clip(tmp_path / "a.wav", tone(0)))
    content = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(content[:40] + b"\xff\xff\xff\xff" + content[44:])
    assert np.array_equal(read_clip(tmp_path / "a.wav")[0], expected)


@pytest.mark.parametrize(("kind", "reason"), BROKEN.items())
def test_a_broken_recording_is_refused(tmp_path, kind, reason):
    broken(kind, tmp_path / NAME)
    with pytest.raises(UserError, match=reason):
        read_clip(tmp_path / NAME)


def test_all_broken_recordings_are_named_before_training(tmp_path, fails):
    root = write_set(tmp_path / "data")
    paths = [root / f"fan/train/normal_id_02_{index:08d}.wav" for index in range(10, 10 + len(BROKEN))]
    for kind, path in zip(BROKEN, paths, strict=True):
        broken(kind, path)
    said = fails(train.main, *arguments(tmp_path, root), match=f"{len(BROKEN)} of .* recordings cannot be used")
    assert all(path.name in said for path in paths)
    assert not (tmp_path / "run.pth").exists()


# ---- The store ----


def gather(store_path, root, split="train"):
    return WaveformStore(store_path, root).gather([clip.path for clip in find_clips(root, MACHINES, split)], 2)


def test_the_store_decodes_once(tmp_path, data_root, monkeypatch):
    waveforms, rows = gather(tmp_path, data_root)
    assert waveforms.dtype == np.int16
    assert isinstance(waveforms, np.memmap)
    monkeypatch.setattr("dataloader.read_clip", None)  # decoding again would fail
    again, same_rows = gather(tmp_path, data_root)
    assert np.array_equal(again[same_rows], waveforms[rows])


def test_the_store_grows_and_notices_changes(tmp_path, capsys):
    root = write_set(tmp_path / "data", test_clips=1)
    before, rows = gather(tmp_path, root)
    before = before[rows].copy()
    gather(tmp_path, root, "test")
    changed = write_clip(root / "fan/train" / NAME, tone(77, 1.5))
    write_clip(root / "fan/train/normal_id_00_00000099.wav", tone(78, 1.0))
    capsys.readouterr()
    waveforms, rows = gather(tmp_path, root)
    assert np.array_equal(waveforms[rows[0]], read_clip(changed)[0])
    assert np.array_equal(np.delete(waveforms[rows], [0, 4], axis=0), before[1:])
    assert len(waveforms) == 12 + 6 + 2
    assert "13 of 13 clips are shorter than 10 s and were repeated" in capsys.readouterr().err


def test_what_a_crash_left_behind_is_not_believed(tmp_path, data_root):
    waveforms, rows = gather(tmp_path, data_root)
    expected = waveforms[rows].copy()
    store = WaveformStore(tmp_path, data_root)
    index = json.loads(store.index_file.read_text())
    index.pop(next(reversed(index)))  # as if the last row had been written, but not yet entered
    store.index_file.write_text(json.dumps(index))
    with store.samples_file.open("ab") as file:
        file.write(b"half a row")
    waveforms, rows = gather(tmp_path, data_root)
    assert np.array_equal(waveforms[rows], expected)
    with store.samples_file.open("r+b") as file:
        file.truncate(1000)  # samples lost under an index that speaks of them
    waveforms, rows = gather(tmp_path, data_root)
    assert np.array_equal(waveforms[rows], expected)
    with store.samples_file.open("ab") as file:
        file.write(b"half a row")  # beyond an index that is complete
    waveforms, rows = gather(tmp_path, data_root)
    assert np.array_equal(waveforms[rows], expected)
    for text in ("{", "[1]", '{"x": 5}', '{"x": {"row": -3}}', "null"):
        store.index_file.write_text(text)
        waveforms, rows = gather(tmp_path, data_root)
        assert np.array_equal(waveforms[rows], expected)


def test_a_store_that_cannot_be_written(tmp_path, data_root):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"waveforms cannot be kept there \(Not a directory\); .*--store_path"):
        gather(tmp_path / "file", data_root)


def test_what_was_decoded_before_an_interruption_counts(tmp_path, data_root, monkeypatch):
    def interrupted(path):
        if path.name == "normal_id_02_00000001.wav":
            raise KeyboardInterrupt
        return read_clip(path)

    monkeypatch.setattr("dataloader.read_clip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gather(tmp_path, data_root)
    assert len(WaveformStore(tmp_path, data_root).read_index()) == 5
    decoded = []
    monkeypatch.setattr("dataloader.read_clip", lambda path: decoded.append(path) or read_clip(path))
    gather(tmp_path, data_root)
    assert len(decoded) == 7


def test_two_builders_decode_each_clip_once(tmp_path, data_root, monkeypatch):
    decoded = []
    monkeypatch.setattr("dataloader.read_clip", lambda path: decoded.append(path) or read_clip(path))
    threads = [threading.Thread(target=gather, args=(tmp_path, data_root)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(decoded) == 12


def test_a_disk_too_small_is_noticed_first(tmp_path, data_root, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(UserError, match=r"12 waveforms need 4 MB and 1 MB are free; .*--store_path"):
        gather(tmp_path, data_root)


def test_file_names_need_not_be_utf_8(tmp_path):
    root = write_set(tmp_path / "data")
    odd = os.fsdecode(os.fsencode(root / "fan/train/normal_id_00_") + b"\xff.wav")
    shutil.copy(root / "fan/train" / NAME, odd)
    _, rows = gather(tmp_path, root)
    assert len(rows) == 13


# ---- Batches ----


def test_a_batch_is_float32_of_the_int16_samples(tmp_path, data_root):
    config = load_config(data_root=str(data_root), store_path=str(tmp_path), machines=MACHINES)
    clips = ClipSet.load(config, "train")
    waveform, labels = clips.batch(np.array([0, 11]), torch.device("cpu"))
    assert waveform.dtype == torch.float32
    assert waveform.shape == (2, N_SAMPLES)
    assert labels.tolist() == [0, 2]
    assert np.array_equal(waveform[1].numpy() * 32768, read_clip(clips.clips[11].path)[0])


def test_the_split_is_random_complete_and_seeded(tmp_path, data_root):
    config = load_config(data_root=str(data_root), store_path=str(tmp_path), machines=MACHINES)
    clips = ClipSet.load(config, "train")
    train_clips, valid_clips = clips.split(0.8, seed=1)
    assert (len(train_clips), len(valid_clips)) == (9, 3)  # int(0.8 * 12) to train on
    assert {clip.path for clip in train_clips.clips} | {clip.path for clip in valid_clips.clips} == {
        clip.path for clip in clips.clips
    }
    assert clips.split(0.8, seed=1)[1].fingerprint() == valid_clips.fingerprint()
    assert clips.split(0.8, seed=2)[1].fingerprint() != valid_clips.fingerprint()
    for clip, label in zip(valid_clips.clips, valid_clips.labels, strict=True):
        assert clip.label == label


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
