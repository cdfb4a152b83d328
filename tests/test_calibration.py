"""Thresholds from recordings of another day: `score.py --calibrate`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import change_checkpoint, remove_bank, tone, write_clip
from evaluated import read_csv
from test_eval import evaluate
from test_score import FAN, score

import score as score_script
import train as train_script
from checkpoint import Checkpoint, RunFiles
from config import load_config
from detector import load_detector
from evaluation import onnx_file


def write_later(folder: Path, count: int = 9, machine_id: str = "00", seconds: float = 2.0) -> Path:
    """Write normal recordings of another day."""
    for number in range(count):
        name = f"normal_id_{machine_id}_{number:04d}.wav"
        write_clip(folder / name, tone(700 + number, seconds))
    return folder


def calibrate(call, folder: Path, later: Path, *words):
    return score(call, folder, "--calibrate", later, *words)


def scores_of(call, folder: Path, recordings: Path, *words) -> list[float]:
    _, output, _ = score(call, folder, recordings, *words, "--json")
    return [row["score"] for row in json.loads(output)]


def threshold_of(call, folder: Path, clip: Path, *words) -> float:
    _, output, _ = score(call, folder, clip, *words, "--json")
    return json.loads(output)[0]["threshold"]


def test_later_recordings_set_the_threshold_of_their_machine(lively, data_root, tmp_path, call):
    later = write_later(tmp_path / "fan" / "later")
    clip = data_root / "fan" / "test" / "normal_id_00_00000000.wav"
    before = threshold_of(call, lively, clip, *FAN)
    other = ("--machine_type", "valve", "--machine_id", 1)
    other_before = threshold_of(call, lively, clip, *other)
    status, output, errors = calibrate(call, lively, later)
    assert status == 0
    expected = max(scores_of(call, lively, later, *FAN))
    assert expected != before
    path = lively / "run.calibration.json"
    assert output.splitlines() == [
        f"fan 00\t{expected:.6g}\t9 later recordings of the ID",
        f"the scores of 9 recordings: {path}",
    ]
    assert threshold_of(call, lively, clip, *FAN) == expected
    assert threshold_of(call, lively, clip, *other) == other_before
    (entry,) = json.loads(path.read_text())["machines"]
    assert (entry["machine_type"], entry["machine_id"]) == ("fan", "00")
    assert entry["date"].startswith("20")
    files = [recording["file"] for recording in entry["recordings"]]
    assert files == sorted(str(x.resolve()) for x in later.iterdir())
    assert "other machines of the type" not in errors

    # Other rates need no new run of the network; an export and an evaluation read the file, too
    config = load_config(device="cpu")
    about = onnx_file.describe(load_detector([lively / "run.pth"], config), config)
    assert json.loads(about["thresholds"])[0] == expected
    lower = threshold_of(call, lively, clip, *FAN, "--false_alarms", "0.5")
    assert lower == sorted(scores_of(call, lively, later, *FAN))[4]
    assert evaluate(call, lively, data_root)[0] == 0
    header, *rows = read_csv(lively / "run" / "test" / "decisions.csv")
    first = dict(zip(header, rows[0], strict=True))
    assert float(first["threshold"]) == expected
    assert first["source"] == "9 later recordings of the ID"


def test_each_machine_is_calibrated_by_itself(lively, tmp_path, call):
    write_later(tmp_path / "data" / "fan" / "test")
    write_later(tmp_path / "data" / "valve" / "test", machine_id="01")
    status, output, _ = calibrate(call, lively, tmp_path / "data")
    assert status == 0
    assert [line.split("\t")[0] for line in output.splitlines()[:-1]] == ["fan 00", "valve 01"]
    again = write_later(tmp_path / "again", machine_id="00")
    status, _, _ = calibrate(call, lively, again, "--machine_type", "fan")
    assert status == 0
    content = json.loads((lively / "run.calibration.json").read_text())
    machines = {entry["machine_type"]: entry for entry in content["machines"]}
    assert set(machines) == {"fan", "valve"}
    assert machines["fan"]["recordings"][0]["file"].startswith(str(again))


def test_the_machine_of_a_recording(lively, tmp_path, call, fails):
    any_name = write_clip(tmp_path / "sounds" / "monday.wav", tone(1, 2.0))
    words = (lively / "run.pth", "--calibrate", any_name.parent, "--device", "cpu")
    message = r"monday.wav: its name and folder do not say the machine; name it with --machine_type"
    fails(score_script.main, *words, match=message)
    status, output, errors = call(score_script.main, *words, *FAN)
    assert status == 0
    assert output.startswith("fan 00\t")
    write_clip(any_name.with_name("anomaly_id_00_1.wav"), tone(1, 2.0))
    write_clip(any_name.with_name("normal_id_02_1.wav"), tone(1, 2.0))
    _, output, errors = call(score_script.main, *words, *FAN)
    assert "skipped 1 files not named normal, such as anomaly_id_00_1.wav" in errors
    assert "skipped 1 files named as of another ID than 00, such as normal_id_02_1.wav" in errors
    assert "the scores of 1 recordings" in output
    unknown = write_later(tmp_path / "unknown", 1, "07")
    message = r"no normal recordings of fan 00, 02; valve 01; name another folder"
    other = (lively / "run.pth", "--calibrate", unknown, "--machine_type", "fan")
    fails(score_script.main, *other, match=message)
    other = (lively / "run.pth", "--calibrate", tmp_path / "nowhere")
    fails(score_script.main, *other, match="nowhere: not a folder; name one with normal recordings")


def test_what_is_not_a_later_normal_recording_is_left_out(lively, data_root, tmp_path, call):
    later = write_later(tmp_path / "fan" / "later", 9)
    shutil.copy(later / "normal_id_00_0000.wav", later / "id_00_0000.wav")  # as evaluation clips
    (later / "loop").symlink_to(later)
    write_later(tmp_path / "pump" / "test", 2)
    status, output, errors = calibrate(call, lively, tmp_path)
    assert status == 0
    assert output.splitlines()[0].endswith("\t9 later recordings of the ID")
    assert "skipped 1 files not named normal, such as id_00_0000.wav" in errors
    assert "skipped 2 files of machines that the model was not trained on" in errors
    words = ("--data_root", data_root, "--false_alarms", "0.5")
    _, output, errors = calibrate(call, lively, data_root, *words)
    assert "skipped 12 files that are training recordings (data_root), such as normal_id" in errors
    assert "the scores of 6 recordings" in output, "the normal ones of the test folders"


def test_a_recording_in_two_formats_counts_once(lively, tmp_path, fails):
    later = write_later(tmp_path / "fan", 2)
    write_clip(later / "normal_id_00_0001.flac", tone(1, 2.0))
    words = (lively / "run.pth", "--calibrate", later, "--device", "cpu")
    fails(score_script.main, *words, match="are the same recording in two formats; remove one")


def test_a_calibration_of_another_channel_is_not_used(lively, tmp_path, call):
    later = tmp_path / "fan"
    for number in range(9):
        sound = np.stack([tone(number, 2.0), tone(90 + number, 2.0)], axis=1)
        write_clip(later / f"normal_id_00_{number}.wav", sound)
    calibrate(call, lively, later, "--channel", "1")
    clip = later / "normal_id_00_0.wav"
    _, _, errors = score(call, lively, clip, *FAN)
    message = "no scores of the kind published on channel 0 for fan 00; calibrate again with them"
    assert message in errors
    _, _, errors = score(call, lively, clip, *FAN, "--channel", "1")
    assert "calibrate again" not in errors


def test_scores_that_compare_with_training_clips(trained_copy, data_root, tmp_path, call):
    """Without stored training clips they are computed once, for the scores and the thresholds."""
    remove_bank(trained_copy / "run.pth")
    later = write_later(tmp_path / "fan", 2)
    words = ("--scoring", "nearest", "--data_root", data_root, "--false_alarms", "0.4")
    status, output, errors = calibrate(call, trained_copy, later, *words)
    assert status == 0
    assert errors.count("holds no embeddings of its training clips") == 1
    printed = float(output.split("\t")[1])
    clip = later / "normal_id_00_0000.wav"
    assert threshold_of(call, trained_copy, clip, *FAN, *words) == pytest.approx(printed, rel=1e-5)
    content = json.loads((trained_copy / "run.calibration.json").read_text())
    kinds = list(content["machines"][0]["recordings"][0]["scores"])
    assert kinds == ["published", "angle", "nearest, neighbours 2", "spectrum, neighbours 2"]


def test_too_few_later_recordings_are_said(lively, tmp_path, call):
    later = write_later(tmp_path / "valve", 3, "01")
    status, output, errors = calibrate(call, lively, later)
    assert status == 0
    assert output.startswith("valve 01\t-\t3 later recordings of the type")
    assert "no threshold, which takes 9 normal recordings of the machine" in errors
    assert "valve 01 (3); hold out more" in errors


def test_all_windows_of_later_recordings_count(lively, tmp_path, call):
    later = write_later(tmp_path / "fan", 4, seconds=22.0)
    calibrate(call, lively, later, "--scoring", "angle")
    content = json.loads((lively / "run.calibration.json").read_text())
    scores = content["machines"][0]["recordings"][0]["scores"]
    assert list(scores) == ["published", "angle"], "no training clips for the others"
    assert [len(values) for values in scores.values()] == [4, 4]
    _, output, _ = score(call, lively, later, *FAN, "--json", "--timeline", "--false_alarms", "0.2")
    rows = json.loads(output)
    highest = max(window["score"] for row in rows for window in row["windows"])
    assert rows[0]["threshold"] == pytest.approx(highest), "4 of 4 + 1 recordings"


def test_a_calibration_of_other_weights_or_kinds_is_not_used(lively, data_root, tmp_path, call):
    later = write_later(tmp_path / "fan")
    clip = data_root / "fan" / "test" / "normal_id_00_00000000.wav"
    before = threshold_of(call, lively, clip, *FAN)
    calibrate(call, lively, later)
    path = lively / "run.calibration.json"
    content = json.loads(path.read_text())
    for recording in content["machines"][0]["recordings"]:
        del recording["scores"]["angle"]
    path.write_text(json.dumps(content))
    _, _, errors = score(call, lively, clip, *FAN, "--scoring", "angle")
    message = "has no scores of the kind angle on channel 0 for fan 00; calibrate again with them"
    assert message in errors
    weights = Checkpoint.load(lively / "run.pth").weights
    weights["arcface.weight"] = weights["arcface.weight"] + 1e-9
    change_checkpoint(lively / "run.pth", weights=weights)
    _, output, errors = score(call, lively, clip, *FAN, "--json")
    assert "run.calibration.json is not used: it is of other weights or settings" in errors
    assert json.loads(output)[0]["threshold"] == before


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", '{"model": ', '{"model": {}, "machines": 3}', b"\xff",
        '{"model": {}, "machines": [{"machine_type": 5}]}',
        '{"model": {}, "machines": [{"machine_type": "fan", "machine_id": "00", "date": "", '
        '"channel": 0, "recordings": [{"file": "a.wav", "scores": {"published": NaN}}]}]}',
    ],
)  # fmt: skip
def test_a_damaged_calibration_is_an_error(lively, data_root, content, fails):
    path = lively / "run.calibration.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    clip = data_root / "fan" / "test" / "normal_id_00_00000000.wav"
    words = (lively / "run.pth", clip, *FAN, "--device", "cpu")
    message = "run.calibration.json: not a calibration; remove it, and calibrate again"
    fails(score_script.main, *words, match=message)


def test_nothing_is_written_if_a_recording_cannot_be_used(lively, tmp_path, fails):
    later = write_later(tmp_path / "fan", 2)
    (later / "normal_id_00_9999.wav").write_text("not audio")
    words = (lively / "run.pth", "--calibrate", later, "--device", "cpu")
    fails(score_script.main, *words, match="1 of 3 recordings cannot be used; replace or remove")
    assert not (lively / "run.calibration.json").exists()


def test_weights_alone_can_be_calibrated(lively, tmp_path, call):
    torch.save(Checkpoint.load(lively / "run.pth").weights, lively / "bare.pth")
    later = write_later(tmp_path / "fan")
    machines = ("--machines", "{fan: [0, 2], valve: [1]}")
    words = (lively / "bare.pth", "--device", "cpu", *machines)
    status, output, _ = call(score_script.main, *words, "--calibrate", later)
    assert status == 0
    assert output.splitlines()[0].endswith("9 later recordings of the ID")
    _, output, _ = call(score_script.main, *words, later, *FAN, "--json")
    assert {row["decision"] for row in json.loads(output)} == {"normal"}


def test_a_new_run_removes_the_calibration(trained_copy):
    files = RunFiles(trained_copy / "run.pth")
    files.calibration.write_text("old")
    train_script.clear(files)
    assert not files.calibration.exists()


def test_options_without_effect_beside_calibrate(lively, tmp_path, fails):
    words = (lively / "run.pth", "--calibrate", tmp_path)
    fails(score_script.main, *words, "--json", match="json has no effect with --calibrate")
    fails(score_script.main, *words, "--plots", match="plots has no effect with --calibrate")
    fails(score_script.main, *words, "--threshold", "3", match="threshold has no effect with")
    fails(score_script.main, *words, "--alarm_span", "6", match="alarm_span has no effect with")
    message = "a.wav: --calibrate scores only the recordings in its folder; leave out others"
    fails(score_script.main, *words, tmp_path / "a.wav", match=message)
    message = "the recordings to score are missing; name them after the checkpoint"
    fails(score_script.main, lively / "run.pth", match=message)
    message = "--machine_type is missing"
    fails(score_script.main, lively / "run.pth", tmp_path / "a.wav", match=message)


def test_a_given_threshold_needs_no_normal_recordings(lively, data_root, tmp_path, call):
    clip = data_root / "fan" / "test" / "normal_id_00_00000000.wav"
    (value,) = scores_of(call, lively, clip, *FAN)
    for threshold, decision in ((value * 0.99, "anomalous"), (value * 1.01, "normal")):
        words = (clip, *FAN, "--threshold", threshold, "--json")
        _, output, errors = score(call, lively, *words)
        (row,) = json.loads(output)
        assert (row["threshold"], row["decision"]) == (threshold, decision)
        assert "asked for" not in errors


def test_scores_of_calibrations_are_those_of_single_recordings(lively, tmp_path, call):
    later = write_later(tmp_path / "fan", 3)
    calibrate(call, lively, later)
    content = json.loads((lively / "run.calibration.json").read_text())
    recordings = content["machines"][0]["recordings"]
    kept = [recording["scores"]["published"] for recording in recordings]
    assert np.concatenate(kept) == pytest.approx(scores_of(call, lively, later, *FAN), rel=1e-6)
