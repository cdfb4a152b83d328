"""The report: one HTML file with tables, pictures and configuration."""

import html.parser
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from conftest import MACHINES
from evaluated import (
    make_held_out,
    make_recordings,
    make_result,
    make_sections,
    measured,
)

from audio import Windows
from classes import Classes
from config import load_config
from evaluation.decisions import format_rate
from evaluation.metrics import NO_DOMAINS, RULE_2022, Metric, area, measure
from evaluation.report import find_hardest, metric_table, write_report
from evaluation.result import Result
from evaluation.tables import with_interval
from recordings import find_recordings

FIGURES = ("scores", "roc", "angles", "tastgram", "embedding", "history")


class Reader(html.parser.HTMLParser):
    """A reader of a page: its text, its images and what it refers to. Raises `AssertionError` where
    a tag is not closed in order.
    """

    def __init__(self):
        super().__init__()
        self.open, self.references, self.images, self.text = [], [], 0, ""

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href")]
        self.images += tag == "img"
        if tag not in ("br", "img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def result(data_root) -> Result:
    """Two normal and two anomalous recordings of each of three machines."""
    config = load_config(data_root=str(data_root), machines=MACHINES)
    recordings = find_recordings(config, Classes.from_machines(config.machines), "test")
    held_out = make_held_out({("fan", 0): 25, ("fan", 2): 5, ("valve", 1): 30})
    scores = np.random.default_rng(0).gamma(20, size=len(recordings))
    return make_result(recordings, scores, held_out, epoch=1)


@pytest.fixture
def figures(tmp_path) -> list[Path]:
    """Small pictures with the names of the figures."""
    files = [tmp_path / f"{name}.png" for name in FIGURES]
    for file in files:
        matplotlib.image.imsave(file, np.zeros((4, 4)))
    return files


def read_report(result: Result, figures: list[Path], path: Path) -> Reader:
    write_report(result, figures, path)
    reader = Reader()
    reader.feed(path.read_text())
    assert reader.open == []
    return reader


def test_the_report_holds_everything(result, figures, tmp_path):
    reader = read_report(result, figures, tmp_path / "report.html")
    assert reader.images == len(FIGURES) + len(result.recordings), "all recordings are the hardest"
    assert all(reference.startswith("data:image/png;base64,") for reference in reader.references)
    assert "anomaly_id_02_00000001.wav" in reader.text
    assert "epoch: 1\n" in reader.text, "the training's configuration"
    assert with_interval(result.metrics.table.loc["fan", "pooled"], "AUC") in reader.text
    assert "30 held-out recordings of the type" in reader.text
    assert "Decisions (asked: 20 %)" in reader.text
    row = result.decisions.to_dict("records")[0]
    false_alarms = f"{row['n_false_alarms']} of 2, {format_rate(row, 'false_alarm_rate')}"
    assert false_alarms in reader.text
    parts = [reader.text.index(name) for name in ("Metrics", "Decisions", "Figures", "Hardest")]
    assert parts == sorted(parts)
    assert "tgram + sgram + tagram" in reader.text


def test_names_are_shown_whatever_they_mean_in_html(result, figures, tmp_path):
    odd = tmp_path / "normal_id_00_<i>&amp;.wav"
    odd.symlink_to(result.recordings["path"][3])
    paths = [odd, *result.recordings["path"][1:]]
    odd_result = replace(result, recordings=result.recordings.assign(path=paths))
    reader = read_report(odd_result, figures, tmp_path / "report.html")
    assert odd.name in reader.text


def test_without_conditions_there_are_no_metrics(result, figures, tmp_path):
    recordings = result.recordings.assign(condition="unlabelled")
    unlabelled = replace(result, recordings=recordings, metrics=None)
    reader = read_report(unlabelled, [], tmp_path / "report.html")
    assert "Metrics" not in reader.text
    assert "Decisions" in reader.text
    assert "Hardest recordings" not in reader.text


@pytest.mark.parametrize(
    ("counts", "rows"),
    [
        (
            {("fan", 0): (2, 2), ("fan", 2): (3, 1), ("pump", 1): (2, 2)},
            "fan 00, fan 02, fan pooled, fan mean, fan min, pump 01, "
            "average pooled, average mean, average min",
        ),
        ({("fan", 0): (2, 2), ("pump", 1): (2, 2)}, "fan 00, pump 01, average mean"),
        (
            {("fan", 0): (2, 2), ("fan", 2): (3, 1)},
            "fan 00, fan 02, fan pooled, fan mean, fan min",
        ),
        ({("fan", 0): (2, 2)}, "fan 00"),
    ],
)
def test_rows_that_repeat_others_are_left_out(counts, rows):
    recordings = make_recordings(counts)
    table = metric_table(measured(recordings, np.arange(float(len(recordings)))))
    assert ", ".join(table.rows) == rows
    for name, cells in table.rows.items():
        if name == "fan mean":
            assert cells[2:] == ["5", "3"]


def test_rows_of_domains_that_repeat_others_are_left_out():
    recordings = pd.concat(
        [
            make_sections(name, {"00": {"source": (2, 2), "target": (2, 2)}})
            for name in ("bearing", "fan")
        ]
    )
    scored = recordings.assign(score=np.arange(16.0))
    table = metric_table(measure(scored, RULE_2022, draws=10))
    assert list(table.rows) == ["bearing 00", "fan 00", "average mean", "average hmean"]
    assert table.titles == [
        "AUC", "pAUC", "AUC source", "AUC target", "official", "normal", "anomalous",
    ]  # fmt: skip


def test_wrong_decisions_are_marked_in_words(result, figures, tmp_path):
    """One false alarm, one missed recording, and no others; without a threshold "-"."""
    is_anomaly = result.recordings["condition"] == "anomalous"
    decision = pd.Series(is_anomaly.astype("Int64"))
    decision[is_anomaly.idxmax()], decision[(~is_anomaly).idxmax()] = 0, 1
    recordings = result.recordings.assign(decision=decision)
    reader = read_report(replace(result, recordings=recordings), figures, tmp_path / "a.html")
    table = reader.text[reader.text.index("anomaly score\n") :]
    assert table.count("false alarm") == table.count("missed") == 1
    recordings = result.recordings.assign(decision=pd.NA)
    bare = replace(result, recordings=recordings, decisions=result.decisions[:0])
    reader = read_report(bare, figures, tmp_path / "b.html")
    for word in ("Decisions", "threshold", "false alarm", "missed"):
        assert word not in reader.text.split("Configuration")[0]
    table = reader.text[reader.text.index("anomaly score\n") :]
    assert table.count("-\n") >= len(recordings)


def test_levels_of_several_windows_are_called_so(result, figures, tmp_path):
    pages = []
    for windows in (Windows(), Windows(hop=5.0)):
        several = replace(result, windows=windows)
        pages.append(read_report(several, figures, tmp_path / "report.html").text)
    assert "Anomaly scores of each machine ID" in pages[0]
    assert "Alarm level" not in pages[0]
    assert "Alarm levels of each machine ID" in pages[1]
    assert "highest alarm levels" in pages[1]


def test_a_new_metric_is_in_the_report(result, tmp_path):
    rule = replace(NO_DOMAINS, metrics=(*NO_DOMAINS.metrics, Metric("again", area)))
    metrics = measure(result.recordings, rule, draws=10)
    reader = read_report(replace(result, metrics=metrics), [], tmp_path / "report.html")
    assert "again" in reader.text


def test_the_hardest_recordings_are_high_normal_and_low_anomalous_ones():
    recordings = make_recordings({("pump", 3): (5, 4), ("fan", 0): (1, 2)})
    scores = [3.0, 9.0, 1.0, 5.0, 7.0, 4.0, 2.0, 8.0, 6.0, 1.0, 2.0, 1.0]
    hardest = find_hardest(make_result(recordings, scores))
    assert hardest["level"].tolist() == [9.0, 7.0, 5.0, 2.0, 4.0, 6.0, 1.0, 1.0, 2.0]
    assert hardest["machine_id"].tolist() == ["03"] * 6 + ["00"] * 3
