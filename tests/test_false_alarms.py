"""The study of false alarms: benchmarks/false_alarms.py."""

import numpy as np
import pandas as pd
import pytest
import soundfile
from conftest import write_clip

from alarms import AlarmRule
from benchmarks import false_alarms
from evaluation.thresholds import make_comparable
from recordings import MACHINE_COLUMNS


def test_an_hour_has_faults_where_it_says(tmp_path):
    rows = []
    for condition, level in (("normal", 0.1), ("anomalous", 0.5)):
        path = write_clip(tmp_path / f"{condition}.wav", np.full(160_000, level))
        rows.append((path, condition))
    table = pd.DataFrame(rows, columns=["path", "condition"])
    faults = false_alarms.write_hour(table, tmp_path / "hour.wav", np.random.default_rng(0))
    samples, rate = soundfile.read(tmp_path / "hour.wav")
    assert len(samples) == 3600 * rate
    assert sorted(end - start for start, end in faults) == sorted(false_alarms.FAULTS)
    is_fault = np.zeros(3600, dtype=bool)
    for start, end in faults:
        is_fault[start:end] = True
    assert ((samples[::rate] > 0.3) == is_fault).all()


def test_alarms_are_false_or_find_faults():
    starts = np.arange(0.0, 300.0, 5.0)
    scores = np.zeros(len(starts))
    scores[10:14] = 1.0  # from 50 to 75 s
    scores[40:43] = 1.0  # from 200 to 220 s
    faults = [(60, 70), (100, 110), (130, 150), (180, 210), (250, 310)]
    row = false_alarms.count_alarms(starts.tolist(), scores, 0.5, AlarmRule(3, 5), faults)
    assert row == {"false alarms an hour": 0, "10 s": 50, "20 s": 0, "30 s": 100, "60 s": 0}
    row = false_alarms.count_alarms(starts.tolist(), scores, 0.5, AlarmRule(3, 5), faults[1:])
    assert row["false alarms an hour"] == 1


def test_the_scale_of_the_study_is_that_of_the_thresholds():
    rng = np.random.default_rng(0)
    drawn = {"00": rng.gamma(5, size=4), "02": 9 * rng.gamma(5, size=4)}
    rows = []
    for machine_id, scores in drawn.items():
        rows += [("fan", machine_id, number, score) for number, score in enumerate(scores)]
    table = pd.DataFrame(rows, columns=[*MACHINE_COLUMNS, "recording", "score"])
    of_machine = table[table["machine_id"] == "02"]
    expected = make_comparable(table, of_machine)["score"].max()
    scale = false_alarms.SCALES["log(1 + score)"]
    found = false_alarms.scaled_threshold(scale, drawn, "02", 0.12)
    assert found == pytest.approx(expected)
