"""score.py as a user calls it: recordings of any length, its output and pictures, its errors."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MACHINES, arguments, change_checkpoint, tone, write_clip, write_set
from evaluated import read_csv
from test_eval import evaluate

import eval as eval_script
import score as score_script
import train as train_script
from audio import N_SAMPLES, read_recording
from checkpoint import Checkpoint, HeldOut
from errors import UserError

FAN = ("--machine_type", "fan", "--machine_id", "0")


def score(call, folder: Path, *words):
    return call(score_script.main, folder / "run.pth", *words, "--device", "cpu")


def test_single_recordings_score_as_in_an_evaluation(lively, data_root, call):
    assert evaluate(call, lively, data_root, "--score_dtype", "float64")[0] == 0
    expected = dict(read_csv(lively / "run" / "test" / "anomaly_score_fan_id_00.csv"))
    decisions = dict(read_csv(lively / "run" / "test" / "decision_result_fan_id_00.csv"))
    folder = data_root / "fan" / "test"
    status, output, errors = score(call, lively, folder, *FAN, "--json")
    assert status == 0
    assert "fan 02" not in errors, "the threshold of fan 02 does not matter here"
    rate = "asked for 10 % of normal windows above the threshold: at one recording of 10 s an hour"
    assert f"notice: {rate}, about 2 false alarms a day\n" in errors
    rows = {Path(row["file"]).name: row for row in json.loads(output)}
    assert set(rows) == {path.name for path in folder.iterdir()}
    for name, value in expected.items():
        row = rows[name]
        assert row["score"] == pytest.approx(float(value), rel=1e-4, abs=1e-6)
        assert row["decision"] == {"0": "normal", "1": "anomalous"}[decisions[name]]
        assert (row["decision"] == "anomalous") == (row["score"] > row["threshold"])


def test_the_best_fitting_id_is_named(lively, data_root, call):
    clip = data_root / "fan" / "test" / "normal_id_02_00000000.wav"
    scores = {}
    for machine_id in (0, 2):
        machine = ("--machine_type", "fan", "--machine_id", machine_id)
        _, output, _ = score(call, lively, clip, *machine, "--json")
        scores[machine_id] = json.loads(output)[0]["score"]
    status, output, _ = score(call, lively, clip, "--machine_type", "fan")
    assert status == 0
    file, machine, value, threshold, decision = output.splitlines()[0].split("\t")
    best = min(scores, key=scores.get)
    assert (file, machine) == (str(clip), f"fan {best:02d}")
    assert float(value) == pytest.approx(scores[best], rel=1e-4)
    assert decision == ("anomalous" if float(value) > float(threshold) else "normal")


def test_a_bad_recording_is_named_in_its_line_and_the_rest_scored(lively, tmp_path, fails, call):
    good = write_clip(tmp_path / "folder" / "b.wav", tone(5, 2.0), rate=44_100)
    (tmp_path / "folder" / "a.wav").write_text("not audio")
    machine = ("--machine_type", "fan", "--machine_id", "2")
    status, output, errors = score(
        call, lively, tmp_path / "folder", tmp_path / "nowhere.wav", *machine
    )
    assert status == 2
    lines = output.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'folder' / 'a.wav'}\terror: unreadable")
    assert lines[1].split("\t")[:2] == [str(good), "fan 02"]
    assert lines[2] == f"{tmp_path / 'nowhere.wav'}\terror: unreadable: not a file"
    message = "error: 2 of 3 recordings could not be scored; see the reasons above"
    assert errors.splitlines()[-1] == message
    words = (lively / "run.pth", good, "--machine_type", "fan", "--machine_id", "7")
    message = r"run.pth was not trained on fan 7; choose one of its machines: fan 00, 02; valve 01"
    fails(score_script.main, *words, match=message)
    message = "--machine_type is missing: the type of the machine in the recordings"
    fails(score_script.main, lively / "run.pth", good, match=message)
    message = "the checkpoint is missing; name it first, or give --normal FOLDER"
    fails(score_script.main, good, *machine, match=message)
    (tmp_path / "empty").mkdir()
    status, output, errors = score(call, lively, tmp_path / "empty", good, *machine)
    assert status == 2
    lines = output.splitlines()
    assert lines[0].split("\t")[:2] == [str(good), "fan 02"]
    assert lines[1] == f"{tmp_path / 'empty'}\terror: no WAV or FLAC files in this folder"


def test_the_most_similar_normal_recording_is_named(trained, data_root, tmp_path, call):
    name = "fan/train/normal_id_00_00000001.wav"
    samples = np.empty(N_SAMPLES, dtype=np.int16)
    read_recording(data_root / name, samples, 0.0, 0)
    clip = write_clip(tmp_path / "new.wav", samples)
    status, output, _ = score(call, trained, clip, *FAN, "--json")
    assert status == 0
    (row,) = json.loads(output)
    text = f"most similar normal recording: {name}"
    assert row["difference"]["text"] == text
    assert row["difference"]["similar"] == {"file": name, "start": 0.0}
    assert row["difference"]["band"] is None, "four clips are too few"
    _, output, _ = score(call, trained, clip, *FAN)
    assert output.splitlines()[1] == f"\t{text}"


# ---- Recordings of any length ----


@pytest.fixture
def long_recording(tmp_path) -> Path:
    """A recording of three joined clips; the folder `parts` beside it has each of them."""
    parts = [tone(seed) for seed in (1, 2, 3)]
    for name, part in zip("abc", parts, strict=True):
        write_clip(tmp_path / "parts" / f"{name}.wav", part)
    return write_clip(tmp_path / "long.wav", np.concatenate(parts))


def test_a_long_recording_is_heard_to_its_end(lively, long_recording, tmp_path, call):
    _, output, _ = score(call, lively, tmp_path / "parts", *FAN, "--json", "--timeline")
    singles = json.loads(output)
    expected = [row["score"] for row in singles]
    assert len(set(expected)) == 3
    for row in singles:
        assert [window["score"] for window in row["windows"]] == [row["score"]]
    words = (long_recording, *FAN, "--hop", "10")
    _, output, _ = score(call, lively, *words, "--json", "--timeline")
    (row,) = json.loads(output)
    assert [window["start"] for window in row["windows"]] == [0, 10, 20]
    assert [window["score"] for window in row["windows"]] == pytest.approx(expected, rel=1e-4)
    decisions = [window["decision"] for window in row["windows"]]
    assert decisions == [single["decision"] for single in singles]
    assert row["score"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert row["worst"] == max(row["windows"], key=lambda window: window["score"])
    _, output, _ = score(call, lively, *words, "--json", "--over_windows", "max")
    (highest,) = json.loads(output)
    windows, worst = row.pop("windows"), row["worst"]
    assert highest == row | {"score": worst["score"]}, "the decision is that of the windows"
    is_alarm = decisions == ["anomalous"] * 3
    assert row["decision"] == ("anomalous" if is_alarm else "normal")

    _, output, _ = score(call, lively, *words, "--timeline")
    line, *timeline = output.splitlines()
    place = f"worst at 0:00:{worst['start']:02.0f} ({worst['score']:.6g})"
    count = f"{decisions.count('anomalous')} of 3 windows anomalous"
    assert line.split("\t")[4:] == [row["decision"], f"no alarm, {place}, {count}"]
    assert timeline == [
        f"\t0:00:{window['start']:02.0f}\t{window['score']:.6g}\t{window['decision']}"
        for window in windows
    ]
    assert score(call, lively, *words)[1].splitlines() == [line]
    _, output, _ = score(call, lively, long_recording, *FAN, "--window", "first", "--json")
    assert json.loads(output)[0]["score"] == pytest.approx(expected[0], rel=1e-4), "asked for"


def test_pictures_of_recordings(lively, long_recording, data_root, call):
    clip = data_root / "fan" / "test" / "normal_id_00_00000000.wav"
    other = long_recording.parent / "test" / clip.name
    write_clip(other, tone(5))
    status, output, _ = score(call, lively, long_recording, clip, other, *FAN, "--plots", "--json")
    assert status == 0
    folder = lively / "run" / "pictures"
    name = f"00_test_{clip.name}"
    names = f"00_{long_recording.parent.name}_long.wav", name, f"{name} (2)"
    files = [folder / f"{name}.png" for name in names]
    assert [row["picture"] for row in json.loads(output)] == list(map(str, files))
    assert sorted(folder.iterdir()) == sorted(files)
    _, output, _ = score(call, lively, clip, *FAN, "--plots")
    assert output.splitlines()[1:] == [f"pictures: {folder}"]


def test_what_is_drawn_of_odd_names_and_without_thresholds(lively, tmp_path, call):
    names = ["rec$1_$2.wav", os.fsdecode(b"\xff.wav")]
    for name in names:
        shutil.copy(write_clip(tmp_path / "a.wav", tone(1, 12.0)), tmp_path / name)
    nothing = HeldOut([], torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    change_checkpoint(lively / "run.pth", held_out=nothing)
    files = [tmp_path / name for name in names]
    status, output, _ = score(call, lively, *files, *FAN, "--plots", "--json")
    assert status == 0
    for row in json.loads(output):
        assert (row["decision"], row["n_windows"], row["n_anomalous"]) == (None, 2, None)
    assert len(list((lively / "run" / "pictures").iterdir())) == 2


def test_what_is_changed_in_single_recordings_is_said(lively, tmp_path, call):
    path = write_clip(tmp_path / "a.wav", np.stack([tone(1, 15.0)] * 2, axis=1))
    _, _, errors = score(call, lively, path, *FAN, "--window", "first")
    assert "notice: 1 of 1 recordings have several channels, of which channel 0 is used\n" in errors
    notice = "notice: 1 of 1 recordings are longer than 12 s, and only their first 10 s are used"
    assert notice in errors
    _, output, errors = score(call, lively, path, *FAN, "--timeline", "--hop", "0.5")
    assert "longer than 12 s" not in errors
    starts = [line.split("\t")[1] for line in output.splitlines()[1:4]]
    assert starts == ["0:00:00", "0:00:00.50", "0:00:01"]


@pytest.mark.slow
def test_the_windows_of_the_training_clips_are_those_of_the_training(trained_copy, tmp_path, call):
    """The windows of the scored recording do not change the bank of training clips."""
    torch.save(Checkpoint.load(trained_copy / "run.pth").weights, trained_copy / "bare.pth")
    root = write_set(tmp_path / "data")
    for path in root.rglob("*.wav"):
        write_clip(path, tone(hash(path.name) % 100, 11.0))
    words = (
        trained_copy / "bare.pth", root / "fan" / "train" / "normal_id_00_00000000.wav", *FAN,
        "--data_root", root, "--machines", MACHINES, "--scoring", "nearest", "--device", "cpu",
        "--json", "--timeline",
    )  # fmt: skip
    scores = {}
    for window in ("first", "all"):
        _, output, _ = call(score_script.main, *words, "--window", window)
        scores[window] = [row["score"] for row in json.loads(output)[0]["windows"]]
    assert len(scores["all"]) == 2
    assert scores["first"] == pytest.approx(scores["all"][:1], abs=1e-6), "the same bank"


def test_the_metrics_of_long_recordings_count_recordings(lively, tmp_path, call):
    """A recording of two joined clips has the mean or maximum of their scores."""
    stems = ("normal_id_00", "anomaly_id_00", "normal_id_02", "anomaly_id_02")
    for folder, joined in (("clips", 1), ("joined", 2)):
        for number, name in enumerate(stems):
            parts = [tone(4 * index + number) for index in range(4)]
            for index in range(0, 4, joined):
                path = tmp_path / folder / "fan" / "test" / f"{name}_{index:08d}.wav"
                write_clip(path, np.concatenate(parts[index : index + joined]))
    assert evaluate(call, lively, tmp_path / "clips")[0] == 0
    test = lively / "run" / "test"
    names = ("anomaly_score_fan_id_00.csv", "anomaly_score_fan_id_02.csv")
    single = {}
    for name in names:
        single[name] = np.array([float(value) for _, value in read_csv(test / name)])
    for rule, combine in (("mean", np.mean), ("max", np.max)):
        words = ("--window", "all", "--hop", "10", "--over_windows", rule)
        status, output, _ = evaluate(call, lively, tmp_path / "joined", *words)
        assert status == 0
        assert "8 scores and metrics" in output
        for name in names:
            scores = [float(value) for _, value in read_csv(test / name)]
            assert scores == pytest.approx(combine(single[name].reshape(-1, 2), axis=1), rel=1e-4)
        about = json.loads((test / "metrics.json").read_text())["about"]
        assert about["windows"] == f"all, 10 s apart, {rule} of their scores"
        # Two windows: both have to lie above the threshold
        lower = np.concatenate([single[name].reshape(-1, 2).min(axis=1) for name in names])
        header, *rows = read_csv(test / "decisions.csv")
        counts = [dict(zip(header, row, strict=True)) for row in rows if row[0] == "fan"]
        thresholds = np.repeat([float(row["threshold"]) for row in counts], 4)
        called = sum(int(row["n_false_alarms"]) + int(row["n_detected"]) for row in counts)
        assert called == (lower > thresholds).sum()
        assert about["recordings of test"] == "4 normal, 4 anomalous"


def test_own_machines_from_recordings_to_a_decision(tmp_path, call, fails):
    """The IDs are words, and only the second of two microphones records the machine."""
    root = tmp_path / "data"
    counts = (("train", "normal", 3), ("test", "normal", 1), ("test", "anomaly", 1))
    for number, name in enumerate(("line-3", "line-4")):
        for split, condition, count in counts:
            for index in range(count):
                path = root / "press" / split / f"{condition}_id_{name}_{index}.wav"
                sound = tone(number + 10 * index, 15.0)
                write_clip(path, np.stack([np.zeros_like(sound), sound], axis=1))
    words = arguments(tmp_path, root, machines="auto", window="all", channel=1, split_ratio=0.8)
    status, output, errors = call(train_script.main, *words)
    assert status == 0
    assert f"{root}: 2 machine IDs: press line-3, line-4\n" in errors
    assert "8 clips to train on, 4 to validate" in output, "two windows of each"
    classes = Checkpoint.load(tmp_path / "run.pth").classes
    assert classes.machines == [("press", "line-3"), ("press", "line-4")]
    assert evaluate(call, tmp_path, root)[0] == 0
    test = tmp_path / "run" / "test"
    (row, _) = read_csv(test / "anomaly_score_press_id_line-3.csv")
    machine = ("--machine_type", "press", "--machine_id")
    folder = root / "press" / "test"
    _, output, _ = score(call, tmp_path, folder, *machine, "line-3", "--json")
    (result,) = [result for result in json.loads(output) if Path(result["file"]).name == row[0]]
    assert result["machine_id"] == "line-3"
    assert result["score"] == pytest.approx(float(row[1]), rel=1e-4)
    assert "press line-3\t" in score(call, tmp_path, folder, *machine, "line-3")[1]
    message = "was not trained on press line-5; choose one of its machines: press line-3, line-4"
    words = (tmp_path / "run.pth", folder, *machine, "line-5")
    fails(score_script.main, *words, match=message)
    message = (
        r"4 of 4 recordings cannot be used.*"
        r"\(no channel 2: it has 2 channels, counted from 0\)"
    )
    words = (tmp_path / "run.pth", "--data_root", root, "--channel", "2")
    fails(eval_script.main, *words, match=message)


# ---- Files that are not as they seem ----


def test_each_recording_has_its_line_where_reading_fails_after_the_check(
    lively, tmp_path, call, monkeypatch
):
    """As if the recordings were on a disk whose connection is lost."""
    good = write_clip(tmp_path / "a.wav", tone(5, 2.0))
    bad = [write_clip(tmp_path / f"{name}.wav", tone(6, 22.0)) for name in "bc"]

    def read(path: Path, *rest: object) -> None:
        if path in bad:
            raise UserError(f"{path}: unreadable: Input/output error; check the disk")
        read_recording(path, *rest)

    expected = score(call, lively, good, *FAN)[1]
    monkeypatch.setattr("dataloader.read_recording", read)
    status, output, errors = score(call, lively, bad[0], good, bad[1], *FAN)
    assert status == 2
    reason = "error: unreadable: Input/output error; check the disk\n"
    assert output == f"{bad[0]}\t{reason}{expected}{bad[1]}\t{reason}"
    assert "error: 2 of 3 recordings could not be scored" in errors
    status, output, _ = score(call, lively, *bad, *FAN, "--json")
    assert [row["error"] for row in json.loads(output)] == [reason.strip()[7:]] * 2


def test_a_figure_that_cannot_be_drawn_does_not_end_the_others(lively, tmp_path, call, monkeypatch):
    paths = [write_clip(tmp_path / f"{name}.wav", tone(5, 2.0)) for name in "ab"]

    def read(path: Path, *rest: object) -> None:
        if path == paths[0]:
            raise UserError(f"{path}: unreadable: Input/output error")
        read_recording(path, *rest)

    monkeypatch.setattr("evaluation.figures.read_recording", read)
    status, output, errors = score(call, lively, *paths, *FAN, "--plots")
    assert status == 2
    assert output.count("fan 00") == 2
    assert f"1 of 2 recordings could not be drawn: {paths[0]}: unreadable" in errors
    drawn = [path.name for path in (lively / "run" / "pictures").iterdir()]
    assert drawn == [f"00_{tmp_path.name}_b.wav.png"]


def test_hidden_files_of_a_folder_are_passed_over(lively, tmp_path, call):
    write_clip(tmp_path / "folder" / "a.wav", tone(5, 2.0))
    (tmp_path / "folder" / "._a.wav").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(16))
    status, output, _ = score(call, lively, tmp_path / "folder", *FAN)
    assert status == 0
    assert output.count("\n") == 1


def test_a_name_does_not_break_its_line(lively, tmp_path, call):
    path = write_clip(tmp_path / "a\tb\n\x85.wav", tone(5, 2.0))
    _, output, _ = score(call, lively, path, tmp_path / "c\td.wav", *FAN)
    lines = output.splitlines()
    assert lines[0].startswith(f"{tmp_path}/a\\tb\\n\\x85.wav\tfan 00\t")
    assert lines[1] == f"{tmp_path}/c\\td.wav\terror: unreadable: not a file"


def test_a_folder_that_cannot_be_read(lively, tmp_path, call, monkeypatch):
    good = write_clip(tmp_path / "a.wav", tone(5, 2.0))
    folder = tmp_path / "locked"
    folder.mkdir()

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    status, output, _ = score(call, lively, folder, good, *FAN)
    assert status == 2
    assert output.splitlines()[1].startswith(f"{folder}\terror: Permission denied; change its perm")


def test_samples_that_are_clipped_are_counted(lively, tmp_path, call):
    paths = []
    for number in range(3):
        samples = tone(number, 2.0)
        samples[:number] = 2.0
        paths.append(write_clip(tmp_path / f"{number}.wav", samples, subtype="FLOAT"))
    _, _, errors = score(call, lively, *paths, *FAN)
    assert "notice: 2 of 3 recordings exceed full scale: 3 samples are clipped\n" in errors
