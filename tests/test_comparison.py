"""Comparisons of configurations over their seeds, and their intervals."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from evaluated import change_model, make_recordings, make_result, read_csv

from classes import Classes, MachineClass
from errors import UserError
from evaluation.comparison import (
    compare,
    difference,
    find_pairs,
    group_by_configuration,
    name_configurations,
)
from evaluation.metrics import NO_DOMAINS, Metric, area, measure
from evaluation.result import Result
from recordings import COLUMNS


@pytest.fixture
def recordings() -> pd.DataFrame:
    return make_recordings({("fan", 0): (5, 5), ("fan", 2): (5, 5), ("pump", 1): (5, 5)})


@pytest.fixture
def result(recordings) -> Result:
    return make_result(recordings, np.arange(30.0))


def at_path(result: Result, path: str) -> Result:
    """Make the same result of a checkpoint at another path."""
    return change_model(result, path=Path(path))


def make_runs(recordings: pd.DataFrame, scores: Sequence[np.ndarray], **keys) -> list[Result]:
    """Make a result of each seed from 0, with these scores."""
    runs = []
    for seed, scores_of_seed in enumerate(scores):
        result = make_result(recordings, scores_of_seed, seed=seed, **keys)
        runs.append(at_path(result, f"{seed}.pth"))
    return runs


def compare_in(folder: Path, results: list[Result]) -> list[list[str]]:
    """Compare results; return the cells of each line of comparison.md."""
    compare(group_by_configuration(results), folder)
    lines = (folder / "comparison.md").read_text().splitlines()
    return [line.strip("| ").split(" | ") for line in lines]


def rows_of(lines: list[list[str]], name: str) -> list[list[str]]:
    """Return the cells behind a name in each table that has a row of this name."""
    return [cells for first, *cells in lines if first == name]


def auc_of(runs: list[Result], machine_type: str) -> list[float]:
    """Return the pooled AUC of a machine type in percent, of each run."""
    return [100 * run.metrics.table.loc[(machine_type, "pooled"), "AUC"] for run in runs]


# ---- Configurations ----


def test_configurations_are_named_by_what_differs(recordings):
    results = []
    for mode in ("arcmix", "arcface"):
        for kind in ("nearest", "published"):
            result = make_result(recordings, np.arange(30.0), kind=kind, mode=mode)
            results.append(at_path(result, f"{mode}.pth"))
    names = [
        "mode arcmix, scoring nearest", "mode arcmix, scoring published",
        "mode arcface, scoring nearest", "mode arcface, scoring published",
    ]  # fmt: skip
    assert name_configurations(results) == names
    assert name_configurations(results[:2]) == ["scoring nearest", "scoring published"]
    assert name_configurations(results[1::2]) == ["mode arcmix", "mode arcface"]
    assert name_configurations(results[:1]) == ["mode arcmix"]
    assert find_pairs(group_by_configuration(results)) == [
        (names[0], names[1]),
        (names[0], names[2]),
        (names[1], names[3]),
        (names[2], names[3]),
    ]


def test_classes_are_named_by_their_number(result):
    config = result.detector.config.model_copy(update={"classes": "attributes"})
    classes = Classes((MachineClass("fan", "00", "vel_1"), MachineClass("fan", "00", "vel_2")))
    by_attributes = change_model(result, config=config, classes=classes)
    names = name_configurations([result, by_attributes])
    assert names[1] == "machines fan 00, classes attributes (2 classes)"


def test_machines_from_folders_are_those_of_a_table(result):
    config = result.detector.config.model_copy(update={"machines": "auto"})
    automatic = change_model(result, config=config)
    assert name_configurations([result, automatic]) == ["mode noisy_arcmix"] * 2


def test_each_file_without_configuration_is_a_group(recordings):
    def make(path: str, **keys) -> Result:
        return at_path(make_result(recordings, np.arange(30.0), **keys), path)

    bare = make("x.pth")
    bare = change_model(bare, config=None)
    results = [bare, make("a.pth"), make("b.pth", m=0.5), make("c.pth", seed=7)]
    names = name_configurations(results)
    assert names == ["file x.pth", "m 0.7", "m 0.5", "m 0.7"]
    assert name_configurations(results[::-1]) == names[::-1]


def test_what_cannot_be_compared(result):
    with pytest.raises(
        UserError, match="nothing to compare: no recording is labelled normal or anomalous"
    ):
        group_by_configuration([result, replace(result, metrics=None)])
    message = "not trained on the same machines in the same order, so their recordings differ"
    with pytest.raises(UserError, match=message):
        group_by_configuration([result, replace(result, recordings=result.recordings[1:])])
    with pytest.raises(
        UserError,
        match=r"run.pth and run.last.pth have the same configuration and seed; leave one out",
    ):
        group_by_configuration([result, at_path(result, "run.last.pth")])


# ---- Tables ----


def test_a_difference_beyond_its_interval(tmp_path):
    recordings = make_recordings({("fan", 0): (40, 40), ("pump", 1): (30, 20)})
    signal, rng = 1.0 * (recordings["condition"] == "anomalous"), np.random.default_rng(0)
    noise, other_noise = rng.normal(size=(2, 3, 130))
    good = make_runs(recordings, signal.to_numpy() * 3 + noise)
    bad = make_runs(recordings, signal.to_numpy() + noise, m=0.5)
    also_good = make_runs(recordings, signal.to_numpy() * 3 + other_noise, m=0.3)
    lines = compare_in(tmp_path, [*good, *bad, *also_good])
    assert len(rows_of(lines, "m 0.5 minus m 0.3")) == 3
    for table, machine_type in enumerate(("average", "fan", "pump")):
        better = rows_of(lines, "m 0.7 minus m 0.5")[table][0]
        same = rows_of(lines, "m 0.7 minus m 0.3")[table][0]
        assert re.fullmatch(r"\+\d+\.\d\d \(\+\d+\.\d\d to \+\d+\.\d\d\)", better)
        assert re.fullmatch(r"[+-]\d+\.\d\d \(-\d+\.\d\d to \+\d+\.\d\d\)", same)
        expected = np.mean(auc_of(good, machine_type)) - np.mean(auc_of(bad, machine_type))
        assert float(better.split()[0]) == pytest.approx(expected, abs=0.01)


@pytest.fixture(scope="module")
def fans_and_pumps() -> list[Result]:
    """Three runs on the machine IDs of the paper, of two of its machine types."""
    counts = dict.fromkeys(itertools.product(("fan", "pump"), (0, 2, 4, 6)), (5, 5))
    recordings = make_recordings(counts)
    signal = 3.0 * (recordings["condition"] == "anomalous")
    noise = np.random.default_rng(0).normal(size=(3, 80))
    return make_runs(recordings, signal.to_numpy() + noise)


def test_the_published_figures_below_the_measured_ones(fans_and_pumps, tmp_path):
    lines = compare_in(tmp_path, fans_and_pumps)
    assert rows_of(lines, "mode noisy_arcmix, published") == [
        ["98.32", "95.34", "92.67", "-", "-"],
        ["95.44", "85.99", "91.17", "-", "-"],
    ], "of fan and pump; the published average is of six types"
    _, fan, _ = rows_of(lines, "mode noisy_arcmix (n = 3)")
    auc = auc_of(fans_and_pumps, "fan")
    assert fan[0] == f"{np.mean(auc):.2f} ± {np.std(auc, ddof=1):.2f}"


def test_other_results_are_not_compared_with_the_published_figures(fans_and_pumps, tmp_path):
    run = fans_and_pumps[0]
    of_other_mode = make_result(run.recordings[COLUMNS], run.recordings["score"], mode="arcface")
    for result in (of_other_mode, replace(run, split="evaluation")):
        compare_in(tmp_path, [result])
        assert ", published" not in (tmp_path / "comparison.md").read_text()


def test_every_run_and_its_rows(fans_and_pumps, tmp_path):
    lines = compare_in(tmp_path, fans_and_pumps)
    assert rows_of(lines, "checkpoint")[0][-3:] == ["seed", "epoch of the weights", "scoring"]
    for seed, auc in enumerate(auc_of(fans_and_pumps, "average")):
        ((first, *_, last),) = rows_of(lines, f"{seed}.pth")
        assert (first, last) == (f"{auc:.2f}", "published")
    header, *rows = read_csv(tmp_path / "comparison.csv")
    assert header[:8] == [
        "checkpoint", "mode", "scoring", "seed", "machine_type", "machine_id", "AUC", "pAUC",
    ]  # fmt: skip
    size = len(fans_and_pumps[0].metrics.table)
    assert len(rows) == 3 * size
    assert rows[size][:6] == ["1.pth", "noisy_arcmix", "published", "1", "fan", "00"]


def test_a_new_metric_is_compared(recordings, tmp_path):
    rule = replace(NO_DOMAINS, metrics=(Metric("again", area, summaries=("mean",)),))
    results = []
    for mode, slope in (("arcmix", 1.0), ("arcface", -1.0)):
        result = make_result(recordings, slope * np.arange(30.0), mode=mode)
        metrics = measure(result.recordings, rule, draws=20)
        results.append(replace(result, metrics=metrics))
    lines = compare_in(tmp_path, results)
    assert lines[4] == ["configuration", "again, mean over IDs"]
    assert ["mode arcmix (n = 1)", "100.00"] in lines
    name = "mode arcmix minus mode arcface (test recordings alone)"
    assert [name, "+100.00 (+100.00 to +100.00)"] in lines
    assert read_csv(tmp_path / "comparison.csv")[0][-3:] == ["again", "again_low", "again_high"]


def test_the_figure_is_in_the_comparison(result, tmp_path):
    groups = {"x": [result], "y": [result]}
    compare(groups, tmp_path, "angles.png")
    assert "](angles.png)" in (tmp_path / "comparison.md").read_text()
    compare(groups, tmp_path)
    assert "angles.png" not in (tmp_path / "comparison.md").read_text()


def test_a_machine_type_without_known_clips_and_the_average_over_one_are_left_out(
    recordings, tmp_path
):
    is_pump = recordings["machine_type"] == "pump"
    recordings["condition"] = recordings["condition"].mask(is_pump, "unlabelled")
    lines = compare_in(tmp_path, make_runs(recordings, [np.arange(30.0)] * 2))
    titles = [line[0] for line in lines if line[0].startswith("## ")]
    assert titles == ["## fan, in percent", "## Runs, in percent"]


# ---- Intervals ----


def make_draws(values: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Make runs `(runs, 1 + draws)` with these values, and the same noise for all in each draw of
    the test clips.
    """
    return values[:, None] + np.concatenate([[0.0], noise])


def test_the_interval_of_seeds_alone_is_that_of_welch():
    rng, no_noise = np.random.default_rng(0), np.zeros(100)
    for one_size, other_size in ((3, 3), (2, 7)):
        one, other = rng.normal(0.9, 0.01, one_size), rng.normal(0.9, 0.04, other_size)
        value, half = difference(make_draws(one, no_noise), make_draws(other, no_noise))
        welch = scipy.stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
        assert (value - half, value + half) == pytest.approx(tuple(welch))


def test_the_interval_of_clips_alone_is_that_of_the_same_draws():
    one, other = np.random.default_rng(0).normal(0, 0.02, (2, 500))
    same = difference(make_draws(np.full(3, 0.9), one), make_draws(np.full(3, 0.8), one))
    assert np.allclose(same, [0.1, 0]), "what both sides have in common is no difference"
    single = make_draws(np.array([0.8]), other)
    for values in (np.array([0.9]), np.array([0.8, 0.9, 1.0])):
        value, half = difference(make_draws(values, one), single)
        assert value == pytest.approx(0.1)
        assert half == pytest.approx(1.96 * np.std(one - other), rel=1e-3)


def test_intervals_of_seeds_and_clips_contain_the_truth():
    """2,000 comparisons of two configurations that do not differ, with two and four seeds."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(2000):
        sides = []
        for seeds in (2, 4):
            values = rng.normal(0, 0.01) + rng.normal(0, 0.01, seeds)
            sides.append(make_draws(values, rng.normal(0, 0.01, 400)))
        value, half = difference(*sides)
        hits += abs(value) <= half
    assert 0.93 < hits / 2000 < 0.985
