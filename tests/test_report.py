"""The report: one HTML file with tables, pictures and configuration."""

import html.parser
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from conftest import MACHINES
from evaluated import make_held_out, make_recordings, make_result

from classes import Classes
from config import load_config
from evaluation.decisions import format_rate
from evaluation.metrics import NO_DOMAINS, Metric, area, measure
from evaluation.report import find_hardest, write_report
from evaluation.result import Result
from evaluation.tables import with_interval
from recordings import find_recordings

FIGURES = ("angles", "roc", "scores", "tastgram", "embedding", "history")


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
        if tag not in ("img", "meta"):
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
    assert format_rate(row, "false_alarm_rate") in reader.text
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
    assert "Hardest clips" not in reader.text


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
