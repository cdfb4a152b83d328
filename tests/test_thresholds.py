"""Thresholds from held-out scores, and the decisions they make."""

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from evaluated import make_recordings

from evaluation.thresholds import (
    count_decisions,
    decide,
    explain_thresholds,
    fit_gamma,
    fit_thresholds,
)
from recordings import MACHINE_COLUMNS


def test_the_threshold_is_a_percentile_of_the_fitted_gamma():
    scores = scipy.stats.gamma.rvs(2.0, scale=3.0, size=5000, random_state=0)
    expected = scipy.stats.gamma.ppf(0.9, 2.0, scale=3.0)
    assert fit_gamma(scores, 90) == pytest.approx(expected, rel=0.03)


def held_out_of(scores: list[float]) -> pd.DataFrame:
    """The scores of held-out clips of the machine fan 00."""
    rows = [("fan", "00", score) for score in scores]
    return pd.DataFrame(rows, columns=[*MACHINE_COLUMNS, "score"])


@pytest.mark.parametrize(
    "scores",
    [[0.0] * 30, [5.0 + 1e-7 * x for x in range(30)], [0.0] * 29 + [5.0], [1e-300, 1e-9, 3.0] * 10],
)
def test_thresholds_of_odd_scores_are_finite(scores):
    thresholds = fit_thresholds([("fan", "00")], held_out_of(scores), "gamma", 90)
    assert np.isfinite(thresholds["threshold"].item())
    assert thresholds["threshold"].item() >= 0


@pytest.mark.parametrize("spread", [0.0, 1e-7, "a fit that fails"])
def test_a_fit_that_fails_is_replaced_by_the_quantile_and_said(spread, capsys, monkeypatch):
    scores = [2.0 + spread * x if isinstance(spread, float) else 2.0 + x for x in range(21)]
    if not isinstance(spread, float):
        error = ValueError("`f` must have different signs at the two ends of the bracket")
        monkeypatch.setattr(scipy.stats.gamma, "fit", Mock(side_effect=error))
    thresholds = fit_thresholds([("fan", "00")], held_out_of(scores), "gamma", 90)
    assert thresholds["threshold"].item() == np.percentile(scores, 90)
    notices = capsys.readouterr().err
    assert notices.count("\n") == 1
    assert "no gamma distribution fits the scores of the held-out clips" in notices
    assert "so the threshold is their quantile: fan 00" in notices
    fit_thresholds([("fan", "00")], held_out_of(scores), "quantile", 90)
    assert capsys.readouterr().err == ""


def test_few_held_out_clips_are_pooled_with_a_notice(capsys):
    rows = [("fan", "00", 1.0)] * 20 + [("fan", "02", 3.0)] * 5
    held_out = pd.DataFrame(rows, columns=[*MACHINE_COLUMNS, "score"])
    machines = [("fan", "00"), ("fan", "02"), ("fan", "04"), ("pump", "01")]
    thresholds = fit_thresholds(machines, held_out, "quantile", 90)
    assert thresholds.to_dict("index") == {
        ("fan", "00"): {"threshold": 1.0, "held_out": "20 clips of the ID", "held_out_of_id": 20},
        ("fan", "02"): {"threshold": 3.0, "held_out": "25 clips of the type", "held_out_of_id": 5},
        ("fan", "04"): {"threshold": 3.0, "held_out": "25 clips of the type", "held_out_of_id": 0},
    }
    explain_thresholds(thresholds, machines, Path("run.pth"))
    notices = capsys.readouterr().err
    assert "fewer than 20 held-out clips" in notices
    assert "that of the whole machine type: fan 02 (5), fan 04 (0)\n" in notices
    assert "no held-out clips of the machine type, so there is no threshold: pump 01" in notices


def test_decisions_and_their_precision_and_recall():
    thresholds = pd.Series([2.0] * 4 + [np.nan] + [9.0] * 2)
    decisions = decide(pd.Series([1.0, 3.0, 2.0, 9.0, 5.0, 1.0, 2.0]), thresholds)
    assert decisions[:4].tolist() == [0, 1, 0, 1], "a score equal to the threshold is normal"
    assert decisions.isna().tolist() == [False] * 4 + [True] + [False] * 2
    recordings = make_recordings({("fan", 0): (2, 2), ("fan", 2): (1, 0), ("pump", 0): (2, 0)})
    unlabelled = recordings[:1].assign(condition="unlabelled", decision=1)
    table = pd.concat([recordings.assign(decision=decisions), unlabelled])
    machines = [("fan", "00"), ("pump", "00"), ("valve", "01")]
    index = pd.MultiIndex.from_tuples(machines, names=MACHINE_COLUMNS)
    counted = count_decisions(table, pd.DataFrame({"threshold": [2.0, 9.0, 1.0]}, index))
    rates = counted[["precision", "recall", "F1"]]
    assert rates.loc["fan", "00"].tolist() == [0.5, 0.5, 0.5]
    assert rates.loc[["pump", "valve"]].isna().all(axis=None), "nothing to count"
