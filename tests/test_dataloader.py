"""Finding, decoding and batching recordings; what is said about odd files, and refused."""

import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import MACHINES, arguments, tone, write_clip, write_set

import eval as eval_script
import train
from dataloader import (
    LABEL_LIST,
    N_SAMPLES,
    ClipSet,
    Index,
    WaveformStore,
    batches,
    class_labels,
    find_clips,
    read_clip,
    read_label_list,
    shuffled_batches,
)
from utils import UserError, load_config

NAME = "normal_id_00_00000000.wav"
ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
PUBLISHED_LABELS = Path(__file__).with_name("data") / LABEL_LIST


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
    assert "skipped 2 files not named normal_id_XX_*.wav or .flac: ._normal_id_00_00000000.wav, notes.txt" in said
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


# ---- Evaluation clips, whose names do not tell ----


def test_published_label_list():
    """The list as published: 7,103 clips of the IDs that the challenge kept back."""
    answers = read_label_list(PUBLISHED_LABELS)
    assert len(answers) == 7103
    machines = {(machine_type, int(name.split("_")[1])) for machine_type, name in answers}
    table = {
        "fan": [1, 3, 5], "pump": [1, 3, 5], "slider": [1, 3, 5], "valve": [1, 3, 5],
        "ToyCar": [5, 6, 7], "ToyConveyor": [4, 5, 6],
    }  # fmt: skip
    assert machines == {(machine_type, machine_id) for machine_type, ids in table.items() for machine_id in ids}
    lines = PUBLISHED_LABELS.read_text().splitlines()
    assert sum(answers.values()) == sum(",anomaly_id_" in line for line in lines)
    assert answers["fan", "id_01_00000000"] is False
    assert answers["fan", "id_01_00000001"] is True


def test_evaluation_clips_take_their_condition_from_the_list(tmp_path, capsys):
    for name in ("id_00_00000000.wav", "id_00_00000001.wav", "id_02_00000000.flac", "normal_id_00_00000000.wav"):
        write_clip(tmp_path / "fan/evaluation" / name, tone(0, 0.1))
    machines = {"fan": [0, 2], "valve": [1]}
    clips = find_clips(tmp_path, machines, "evaluation")
    assert [(clip.machine_id, clip.label, clip.is_anomaly) for clip in clips] == [
        (0, 0, None), (0, 0, None), (2, 1, None)
    ]  # fmt: skip
    said = capsys.readouterr().err
    assert "skipped 1 file not named id_XX_*.wav or .flac: normal_id_00_00000000.wav" in said
    assert "no evaluation folder for valve" in said
    (tmp_path / LABEL_LIST).write_text(
        "valve\nid_00_00000000.wav,anomaly_id_00_00000000.wav,1\n"
        "fan\r\nid_00_00000000.wav,normal_id_00_00000007.wav,0\r\nid_02_00000000.wav,anomaly_id_02_00000001.wav,1\n\n"
    )
    assert [clip.is_anomaly for clip in find_clips(tmp_path, machines, "evaluation")] == [False, None, True]
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
        path.write_bytes(content[:24] + struct.pack("<II", 3, 6) + content[32:])
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
    folder = WaveformStore(tmp_path, data_root).folder
    index = Index.read(folder)
    samples_file, whole = folder / index.samples, (folder / "index.json").read_text()

    def is_repaired() -> bool:
        waveforms, rows = gather(tmp_path, data_root)
        return np.array_equal(waveforms[rows], expected)

    index.clips.popitem()  # as if the last row had been written, but not yet entered
    index.rows -= 1
    index.write(folder)
    with samples_file.open("ab") as file:
        file.write(b"half a row")
    assert is_repaired()
    assert samples_file.stat().st_size == 12 * N_SAMPLES * 2
    with samples_file.open("ab") as file:
        file.write(b"half a row")  # beyond an index that is complete
    assert is_repaired()
    with samples_file.open("r+b") as file:
        file.truncate(1000)  # samples lost under an index that speaks of them
    assert is_repaired()
    assert len(list(folder.glob("*.int16"))) == 1
    for text in ("{", "[1]", '{"x": 5}', '{"samples": "x", "clips": {"x": {"row": -3}}}', "null", whole):
        (folder / "index.json").write_text(text)
        assert is_repaired()


def test_a_store_outlives_kill_9(tmp_path, data_root):
    """Killed after each of its writes, in a process of its own, a build leaves what the next one completes."""
    build = (
        "import os, signal, sys, dataloader\n"
        "from pathlib import Path\n"
        "store_path, root, moment = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])\n"
        "dataloader.ROWS_BETWEEN_ENTRIES = 3\n"
        "seen = 0\n"
        "def counted(function):\n"
        "    def call(*arguments, **options):\n"
        "        global seen\n"
        "        result, seen = function(*arguments, **options), seen + 1\n"
        "        if seen == moment:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return result\n"
        "    return call\n"
        "dataloader.read_clip, os.fsync, os.replace = map(counted, (dataloader.read_clip, os.fsync, os.replace))\n"
        "dataloader.stamp = counted(dataloader.stamp)\n"
        "paths = sorted(root.glob('*/train/*.wav'))\n"
        "dataloader.WaveformStore(store_path, root).gather(paths)\n"
        "print(seen)\n"
    )

    def run(moment: int, folder) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", build, str(folder), str(data_root), str(moment)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    total = int(run(0, tmp_path / "whole").stdout)
    moments = random.Random(5).sample(range(1, total + 1), 4)
    for moment in moments:
        assert run(moment, tmp_path / "store").returncode == -signal.SIGKILL
        waveforms, rows = gather(tmp_path / "store", data_root)
        paths = [clip.path for clip in find_clips(data_root, MACHINES, "train")]
        assert np.array_equal(waveforms[rows], np.stack([read_clip(path)[0] for path in paths]))
        shutil.rmtree(tmp_path / "store")


def test_a_store_is_of_one_rate_length_and_data_folder(tmp_path, data_root, monkeypatch):
    here = WaveformStore(tmp_path, data_root).folder
    assert WaveformStore(tmp_path, data_root / "fan" / "..").folder == here
    others = {WaveformStore(tmp_path, data_root / "fan").folder}
    for name, value in (("SAMPLE_RATE", 8_000), ("SECONDS", 5), ("STORE_VERSION", 0)):
        with monkeypatch.context() as changed:
            changed.setattr(f"dataloader.{name}", value)
            others.add(WaveformStore(tmp_path, data_root).folder)
    assert len(others - {here}) == 4


def test_rebuilding_leaves_readers_alone(tmp_path, data_root):
    waveforms, rows = gather(tmp_path, data_root)
    expected = waveforms[rows].copy()
    store = WaveformStore(tmp_path, data_root)
    before = Index.read(store.folder).samples
    store.rebuild()
    again, same_rows = gather(tmp_path, data_root)
    assert Index.read(store.folder).samples != before
    assert [file.name for file in store.folder.glob("*.int16")] == [Index.read(store.folder).samples]
    assert np.array_equal(again[same_rows], expected)
    assert np.array_equal(waveforms[rows], expected)
    WaveformStore(tmp_path / "none", data_root).rebuild()
    assert not (tmp_path / "none").exists()


def test_rebuild_store_is_an_option(trained_copy, data_root, call):
    store = WaveformStore(trained_copy / "store", data_root)
    before = Index.read(store.folder).samples
    options = ("--data_root", data_root, "--store_path", trained_copy / "store", "--device", "cpu")
    assert call(eval_script.main, trained_copy / "run.pth", *options)[0] == 0
    assert Index.read(store.folder).samples == before
    assert call(eval_script.main, trained_copy / "run.pth", *options, "--rebuild_store")[0] == 0
    assert Index.read(store.folder).samples != before
    words = arguments(trained_copy, data_root)
    before = Index.read(store.folder).samples
    assert call(train.main, *words, "--overwrite", "--rebuild_store")[0] == 0
    assert Index.read(store.folder).samples != before


def test_rows_of_files_that_are_gone(tmp_path, capsys):
    root = write_set(tmp_path / "data", test_clips=1)
    gather(tmp_path, root)
    for path in sorted((root / "fan" / "train").glob("*_00_*.wav"))[:2]:
        path.unlink()
    gather(tmp_path, root)  # nothing to decode
    assert "--rebuild_store" not in capsys.readouterr().err
    gather(tmp_path, root, "test")
    assert "GB are of recordings that changed or are gone; --rebuild_store" in capsys.readouterr().err
    for path in root.glob("*/*/*.wav"):
        os.utime(path, (0, 0))  # as when all is copied to another disk
    gather(tmp_path, root)
    (samples_file,) = WaveformStore(tmp_path, root).folder.glob("*.int16")
    assert samples_file.stat().st_size == 10 * N_SAMPLES * 2


def test_waiting_for_another_builder_is_said(tmp_path, data_root, capsys):
    store = WaveformStore(tmp_path, data_root)
    with store.lock():
        thread = threading.Thread(target=gather, args=(tmp_path, data_root))
        thread.start()
        deadline = time.monotonic() + 60
        said = ""
        while "waiting for another process" not in said and time.monotonic() < deadline:
            time.sleep(0.01)
            said += capsys.readouterr().err
    thread.join()
    assert "waiting for another process" in said
    assert len(Index.read(store.folder).clips) == 12


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
    assert len(Index.read(WaveformStore(tmp_path, data_root).folder).clips) == 5
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


def test_waveforms_go_to_the_gpu_where_half_of_its_memory_holds_them(tmp_path, data_root, monkeypatch):
    """What `place` decides, with a GPU that reports its memory and is not there."""
    config = load_config(data_root=str(data_root), store_path=str(tmp_path), machines=MACHINES)
    clips = ClipSet.load(config, "train")
    gpu, needed = torch.device("cuda", 0), 12 * N_SAMPLES * 2
    monkeypatch.setattr(ClipSet, "copy_to", lambda self, device: f"on {device}")
    for free, auto in ((2 * needed, "on cuda:0"), (2 * needed - 1, clips)):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda _, free=free: (free, 10**12))
        assert clips.place("auto", gpu) == auto
        assert clips.place("cuda", gpu) == "on cuda:0"
        assert clips.place("cpu", gpu) is clips
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (needed - 1, 10**12))
    with pytest.raises(UserError, match=r"store_device: cuda: the waveforms take .* GB, and .* GB of cuda:0 are free"):
        clips.place("cuda", gpu)
    assert clips.place("auto", CPU) is clips
    with pytest.raises(UserError, match="store_device: cuda needs a GPU"):
        clips.place("cuda", CPU)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_copied_waveforms_give_the_same_batches(tmp_path, data_root, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    config = load_config(data_root=str(data_root), store_path=str(tmp_path), machines=MACHINES)
    clips = ClipSet.load(config, "train")
    part, indices = clips.split(0.7, seed=0)[0], np.array([5, 0, 3])
    copied = part.copy_to(torch.device(device))
    assert len(copied.waveforms) == len(part) == 8
    for one, other in zip(part.batch(indices, CPU), copied.batch(indices, CPU), strict=True):
        assert torch.equal(one, other)
    assert copied.fingerprint() == part.fingerprint()


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
