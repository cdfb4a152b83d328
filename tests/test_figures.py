"""The figures of an evaluation and of a recording, read back from matplotlib's objects."""

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import clips_of
from evaluated import change_model
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from audio import Windows
from checkpoint import RunFiles, read_history
from config import load_config
from detector import load_detector
from errors import UserError
from evaluation.figures import (
    FONT,
    draw_all,
    draw_angles,
    draw_history,
    draw_scores,
    escape,
    figure,
    find_font,
    letters_of,
    read_samples,
)
from evaluation.result import Result, evaluate
from evaluation.scores import KINDS
from inference import load_model
from model import LogMel
from recordings import MACHINE_COLUMNS

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def result(lively_run, data_root) -> Result:
    """An evaluation of the tiny run with lively weights and held-out scores."""
    config = load_config(score_dtype="float64", threshold="quantile", false_alarms=0.2)
    detector = load_detector([lively_run / "run.pth"], config)
    clips = clips_of(data_root, "test")
    outputs = detector.run(clips, config, CPU)
    (result,) = evaluate(detector, clips, outputs, config, "test", ["published"])
    return result


def collect_figures(patch: pytest.MonkeyPatch) -> list[Figure]:
    """Return a list that each figure is added to when it is written."""
    written: list[Figure] = []
    save = Figure.savefig

    def collect_and_save(figure, *arguments, **options):
        written.append(figure)
        save(figure, *arguments, **options)

    patch.setattr(Figure, "savefig", collect_and_save)
    return written


@pytest.fixture(scope="module")
def figures(result, tmp_path_factory) -> dict[Path, Figure]:
    """All figures of an evaluation, by their files."""
    with pytest.MonkeyPatch.context() as patch:
        written = collect_figures(patch)
        files = draw_all(result, tmp_path_factory.mktemp("figures") / "figures")
    return dict(zip(files, written, strict=True))


@pytest.fixture
def axes(figures) -> dict[str, list[Axes]]:
    """The axes of each figure, by its name."""
    return {file.stem: figure.axes for file, figure in figures.items()}


def has_histograms(axis: Axes, recordings: pd.DataFrame, values: pd.Series) -> bool:
    """Whether the axis has density histograms of the values of normal and of anomalous recordings,
    to the width of a bar.
    """
    for bars, condition in zip(axis.containers, ("normal", "anomalous"), strict=True):
        shares = [bar.get_height() * bar.get_width() for bar in bars]
        centres = [bar.get_x() + bar.get_width() / 2 for bar in bars]
        mean = values[recordings["condition"] == condition].mean()
        if abs(sum(shares) - 1) > 1e-6 or abs(np.dot(shares, centres) - mean) > bars[0].get_width():
            return False
    return True


# ---- An evaluation ----


def test_every_figure_is_a_picture(figures):
    names = [file.stem for file in figures]
    assert names == ["scores", "roc", "angles", "tastgram", "embedding", "history"]
    assert all(matplotlib.image.imread(file).ndim == 3 for file in figures)


def test_angles_are_drawn_of_scores_that_rest_on_them(result, tmp_path, monkeypatch):
    for name in ("draw_scores", "draw_roc", "draw_tastgram", "draw_embedding", "draw_history"):
        monkeypatch.setattr(f"evaluation.figures.{name}", lambda *_: None)
    for kind in KINDS:
        files = draw_all(replace(result, kind=kind), tmp_path / kind)
        names = {file.stem for file in files}
        assert ("angles" in names) == (kind in ("published", "angle")), kind


def test_figures_that_an_evaluation_does_not_allow_are_left_out(result, tmp_path):
    """Without known conditions, with few recordings, and with weights that have no history."""
    result = change_model(result, path=tmp_path / "other.pth", history=[])
    table = result.recordings[:3].assign(condition="unlabelled")
    bare = replace(
        result,
        recordings=table,
        embedding=result.embedding[:3],
        metrics=None,
    )
    files = draw_all(bare, tmp_path)
    assert files == [tmp_path / "scores.png", tmp_path / "tastgram.png"]
    assert sorted(tmp_path.glob("*.png")) == files


def test_angles_and_scores_are_drawn_as_histograms(result, axes):
    (axis,) = axes["angles"]
    assert has_histograms(axis, result.recordings, result.recordings["angle"])
    names = [text.get_text() for text in axis.figure.legends[0].get_texts()]
    assert names == ["normal", "anomalous"]
    assert [axis.get_title() for axis in axes["scores"]] == ["fan 00", "fan 02", "valve 01"]
    machines = result.recordings.groupby(MACHINE_COLUMNS)
    for axis, (_, recordings) in zip(axes["scores"], machines, strict=True):
        assert has_histograms(axis, recordings, recordings["level"])
        (line,) = axis.lines
        assert line.get_xdata()[0] == pytest.approx(recordings["threshold"].iloc[0])


def test_each_machine_has_an_axis_for_its_scores(result, tmp_path, monkeypatch):
    """Small scores on a linear axis, and scores over many powers of ten, one of them 0, on
    logarithmic ones.
    """
    small, wide, with_zero = [2.1e-4, 3e-4, 4e-4, 8.7e-4], [2e-5, 0.1, 5.0, 90.0], [0, 0.1, 3, 8]
    recordings = result.recordings.sort_values(MACHINE_COLUMNS).assign(
        level=np.array([*small, *wide, *with_zero]),
        threshold=np.repeat([9.9e-4, 40.0, 2.0], 4),
    )
    written = collect_figures(monkeypatch)
    draw_scores(replace(result, recordings=recordings), tmp_path / "scores.png")
    one, other, last = written[0].axes
    for axis, levels in ((one, small), (other, np.log10(wide)), (last, np.log10([1e-12, 8]))):
        width = max(levels) - min(levels)
        (threshold,) = axis.lines[0].get_xdata()[:1]
        left, right = axis.get_xlim()
        assert min(levels) - 0.2 * width < left < min(levels)
        assert max(*levels, threshold) < right < max(*levels, threshold) + 0.2 * width
        ticks = [tick for tick in axis.get_xticks() if left <= tick <= right]
        assert len(ticks) >= 2
        boxes = [label.get_window_extent() for label in axis.get_xticklabels()]
        assert not any(box.overlaps(after) for box, after in itertools.pairwise(boxes))
        if axis is not one:
            assert all(float(tick).is_integer() for tick in ticks)
            assert "10^" in axis.get_xticklabels()[1].get_text()
    assert one.lines[0].get_xdata()[0] == 9.9e-4
    assert other.lines[0].get_xdata()[0] == pytest.approx(np.log10(40))


def test_scores_that_differ_little_have_ticks_in_full(result, tmp_path, monkeypatch):
    recordings = result.recordings.assign(level=18.861 + np.arange(12) / 1e5, threshold=np.nan)
    written = collect_figures(monkeypatch)
    draw_scores(replace(result, recordings=recordings), tmp_path / "scores.png")
    for axis in written[0].axes:
        assert axis.xaxis.get_offset_text().get_text() == ""
        assert axis.get_xticklabels()[1].get_text().startswith("18.86")


@pytest.mark.parametrize(
    ("windows", "name"), [(Windows(), "anomaly score"), (Windows(hop=5), "alarm level")]
)
def test_scores_over_windows_are_alarm_levels(result, windows, name, tmp_path, monkeypatch):
    written = collect_figures(monkeypatch)
    draw_scores(replace(result, windows=windows), tmp_path / "scores.png")
    assert written[0].get_supxlabel() == f"{name} (cross-entropy)"


def test_the_area_under_each_curve_is_its_auc(result, axes):
    (axis,) = axes["roc"]
    *curves, diagonal = axis.lines
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]
    for machine_type, curve in zip(("fan", "valve"), curves, strict=True):
        auc = result.metrics.table.loc[(machine_type, "pooled"), "AUC"]
        false, true = (np.array(values) for values in curve.get_data())
        assert np.sum(np.diff(false) * (true[1:] + true[:-1]) / 2) == pytest.approx(auc)
        assert curve.get_label() == f"{machine_type}, AUC {100 * auc:.1f} %"


def test_the_channels_are_those_of_a_normal_clip(result, axes):
    *channels, gate = axes["tastgram"][:4]  # the rest are colour bars
    recording = result.recordings[result.recordings["condition"] == "normal"].iloc[0]
    assert [axis.get_title() for axis in channels] == ["tgram", "sgram (dB)", "tagram (dB)"]
    images = [axis.images[0].get_array() for axis in channels]
    assert all(image.shape == (128, 313) for image in images)
    assert np.std(images[0]) > 0.01
    waveform = read_samples(recording["path"], 0.0, channel=0) / 32768.0
    assert np.allclose(images[1], LogMel()(waveform)[0, 0], atol=1e-3)
    assert len(gate.lines[0].get_ydata()) == 313
    assert gate.figure.get_suptitle() == f"fan, {recording['path'].name}"


def test_the_map_has_a_point_for_each_recording(axes):
    (axis,) = axes["embedding"]
    points = np.concatenate([collection.get_offsets() for collection in axis.collections])
    assert len(np.unique(points, axis=0)) == 12
    assert [len(collection.get_offsets()) for collection in axis.collections] == [2] * 6 + [0]
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names == ["fan 00", "fan 02", "valve 01", "anomalous"]


def test_the_history_is_drawn(result, axes):
    history = pd.read_csv(RunFiles(result.detector.path).history)
    columns = [["train_loss", "valid_loss"], ["train_accuracy", "valid_accuracy"], ["lr"]]
    for axis, names in zip(axes["history"], columns, strict=True):
        for line, name in zip(axis.lines, names, strict=True):
            assert list(line.get_ydata()) == list(history[name])


def test_the_history_of_one_epoch_is_points(tmp_path, monkeypatch):
    names = ["train_loss", "valid_loss", "train_accuracy", "valid_accuracy", "lr"]
    history = pd.DataFrame([{"epoch": 1} | dict.fromkeys(names, 0.5)])
    written = collect_figures(monkeypatch)
    draw_history(history, tmp_path / "history.png")
    draw_history(pd.concat([history, history.assign(epoch=2)]), tmp_path / "history.png")
    for drawn, marker in zip(written, (".", ""), strict=True):
        for axis in drawn.axes:
            assert {line.get_marker() for line in axis.lines} == {marker}
            assert all(float(tick).is_integer() for tick in axis.get_xticks())


def test_a_damaged_history_is_named_and_a_missing_one_is_in_the_checkpoint(trained_copy):
    model = load_model(trained_copy / "run.pth", load_config())
    file = trained_copy / "run" / "history.csv"
    history = read_history(model.checkpoint)
    for content in ("epoch,lr\n1,fast\n", "a,b\n1,2\n", ""):
        file.write_text(content)
        with pytest.raises(UserError, match=r"history.csv: not a readable training history"):
            read_history(model.checkpoint)
    file.unlink()
    pd.testing.assert_frame_equal(read_history(model.checkpoint), history, check_dtype=False)


def test_a_panel_has_the_runs_of_a_configuration(result, tmp_path, monkeypatch):
    written = collect_figures(monkeypatch)
    angles = result.recordings["angle"]
    reversed_result = replace(result, recordings=result.recordings.assign(angle=180 - angles))
    groups = {"mode arcface": [result, reversed_result], "mode arcmix": [reversed_result]}
    draw_angles(groups, tmp_path / "angles.png")
    both = pd.concat([result.recordings, reversed_result.recordings])
    one, other = written[0].axes
    assert [axis.get_title() for axis in (one, other)] == ["mode arcface", "mode arcmix"]
    assert has_histograms(one, both, both["angle"])
    table = reversed_result.recordings
    assert has_histograms(other, table, table["angle"])
    left, right = (axis.get_position() for axis in (one, other))
    assert left.x1 < right.x0
    assert left.y0 == pytest.approx(right.y0)


# ---- Text ----


def draw_text(path: Path, label: str, title: str) -> Figure:
    with figure(path, 3.5, 2.0) as drawn:
        axis = drawn.subplots()
        axis.plot([0, 1], label=escape(label))
        axis.set_title(escape(title))
        axis.legend()
    return drawn


def texts_of(drawn: Figure) -> dict[str, list[str]]:
    """Return the fonts of each text of a figure."""
    return {text.get_text(): text.get_fontfamily() for text in drawn.findobj(Text)}


@pytest.mark.filterwarnings("error")
def test_letters_that_no_font_has_are_spelt_out(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "evaluation.figures.find_font", lambda letter: FONT if letter < "\u0530" else None
    )
    texts = texts_of(draw_text(tmp_path / "a.png", "\u6a5f 1", "\udcff.wav \u00fc $5"))
    assert texts[r"\u6a5f 1"] == [FONT]
    assert r"\udcff.wav \u00fc \$5".replace(r"\u00fc", "\u00fc") in texts


@pytest.mark.filterwarnings("error")
def test_control_characters_are_spelt_out(tmp_path):
    assert r"a\tb" in texts_of(draw_text(tmp_path / "a.png", "a\tb", "title"))


@pytest.mark.filterwarnings("error")
def test_letters_that_another_font_has_are_drawn_with_it(tmp_path):
    """STIXGeneral, which comes with matplotlib, has a letter that FONT lacks."""
    letter = next(chr(number) for number in letters_of("STIXGeneral") if chr(number) not in known())
    assert find_font("a") == FONT
    assert find_font(letter) not in (FONT, None)
    texts = texts_of(draw_text(tmp_path / "a.png", "a", f"a {letter}"))
    assert texts["a"] == [FONT]
    assert texts[f"a {letter}"] == [FONT, find_font(letter)]


def known() -> set[str]:
    return {chr(number) for number in letters_of(FONT)}


def test_a_font_of_boxes_is_none():
    assert find_font(chr(0x10FFFD)) is None


def test_a_name_may_begin_with_an_underscore(tmp_path):
    assert " _press" in texts_of(draw_text(tmp_path / "a.png", "_press", "_press"))


def test_figures_need_no_backend_from_outside():
    """Notebooks set one that may not be installed."""
    environment = os.environ | {"MPLBACKEND": "nonsense", "PYTHONPATH": str(ROOT)}
    code = "import evaluation, matplotlib; print(matplotlib.get_backend())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("agg\n", "")


def test_figures_do_not_depend_on_the_settings_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30.0)
    drawn = draw_text(tmp_path / "a.png", "a", "b")
    assert {text.get_fontsize() for text in drawn.findobj(Text)} <= {7.0, 8.0}
    assert matplotlib.rcParams["font.size"] == 30.0
