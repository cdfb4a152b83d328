"""Thresholds from normal scores, and what the conformal one promises."""

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from evaluated import NO_HELD_OUT

from config import load_config
from evaluation.thresholds import (
    conformal,
    decide,
    explain_thresholds,
    fit_thresholds,
    gamma,
    least_recordings,
    make_comparable,
    mean_of_others,
    threshold_of,
)


def normal_scores(
    scores: list[float], machine: tuple[str, str] = ("fan", "00"), windows: int = 1
) -> pd.DataFrame:
    """The scores of normal recordings of a machine, of so many windows each."""
    rows = []
    for number, score in enumerate(scores):
        rows.append((*machine, number // windows, score, "held-out"))
    return pd.DataFrame(rows, columns=NO_HELD_OUT.columns)


# ---- The conformal threshold ----


@pytest.mark.parametrize(
    ("n", "false_alarms", "k"),
    [
        (9, 0.1, 9), (10, 0.1, 10), (13, 0.1, 13), (18, 0.1, 18), (19, 0.1, 18), (20, 0.1, 19),
        (99, 0.1, 90), (100, 0.1, 91), (4, 0.2, 4), (9, 0.2, 8), (19, 0.05, 19), (39, 0.05, 38),
        (99, 0.01, 99), (99, 0.07, 93), (1, 0.5, 1), (29, 0.3, 21), (14, 0.93, 2), (99, 0.93, 7),
    ],
)  # fmt: skip
def test_the_conformal_threshold_is_the_kth_smallest_score(n, false_alarms, k):
    """k = ceil((n + 1) (1 - false_alarms)), computed without rounding errors."""
    scores = np.random.default_rng(n).permutation(np.arange(1.0, n + 1))
    assert conformal(normal_scores(scores.tolist()), false_alarms) == k


@pytest.mark.parametrize(
    ("false_alarms", "least"), [(0.1, 9), (0.2, 4), (0.05, 19), (0.01, 99), (0.5, 1), (0.3, 3)]
)
def test_fewer_recordings_than_the_rate_takes_give_no_threshold(false_alarms, least):
    assert least_recordings("conformal", false_alarms) == least
    scores = list(range(1, least + 1))
    assert conformal(normal_scores(scores), false_alarms) == least
    assert conformal(normal_scores(scores[1:]), false_alarms) is None


def test_ties_and_nearly_equal_scores():
    assert conformal(normal_scores([2.0] * 9), 0.1) == 2.0
    scores = [5.0 + 1e-12 * number for number in range(9)]
    assert conformal(normal_scores(scores), 0.1) == scores[-1]
    assert conformal(normal_scores([1.0, 3.0, 3.0, 3.0, 7.0]), 0.5) == 3.0
    assert conformal(normal_scores([0.0] * 9), 0.1) == 0.0


def test_recordings_count_and_not_their_windows():
    five = normal_scores([float(x) for x in range(20)], windows=4)
    assert conformal(five, 0.1) is None, "five recordings of four windows"
    # At 0.5 three of (five + 1) recordings must lie below: twelve windows
    assert conformal(five, 0.5) == 11.0
    long = normal_scores([10.0] * 90, windows=90)
    short = normal_scores([1.0] * 9).assign(recording=range(1, 10))
    both = pd.concat([long, short])
    # Ten recordings: nine lie at 1, and needed are 11 * 0.8 = 8.8
    assert conformal(both, 0.2) == 1.0
    assert conformal(both, 0.1) == 10.0


DISTRIBUTIONS = {
    "normal": lambda rng, size: rng.normal(size=size),
    "log-normal": lambda rng, size: np.exp(3 * rng.normal(size=size)),
    "two groups": lambda rng, size: rng.normal(size=size) + 9 * (rng.random(size) < 0.2),
    "few values": lambda rng, size: rng.integers(0, 5, size=size).astype(float),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize(("n", "false_alarms", "k"), [(13, 0.1, 13), (19, 0.05, 19), (9, 0.2, 8)])
def test_the_rate_of_false_alarms_is_not_above_what_was_asked(name, n, false_alarms, k):
    """On average over 150 thresholds; without ties it is 1 - k / (n + 1) exactly, and that of a
    single threshold has a beta distribution.
    """
    rng, draws = np.random.default_rng(0), 150
    normal, new = (DISTRIBUTIONS[name](rng, (draws, size)) for size in (n, 2000))
    rates = []
    for scores, later in zip(normal.tolist(), new, strict=True):
        rates.append((later > conformal(normal_scores(scores), false_alarms)).mean())
    exact = 1 - k / (n + 1)
    error = 3.5 * np.std(rates) / np.sqrt(draws)
    assert exact <= false_alarms + 1e-9
    assert np.mean(rates) <= exact + error
    if name != "few values":
        assert np.mean(rates) >= exact - error
        spread = scipy.stats.beta(n + 1 - k, k)
        assert np.std(rates) == pytest.approx(spread.std(), rel=0.3)


def test_the_rate_holds_for_the_windows_of_recordings():
    """Windows of a recording are alike, and some recordings have many."""
    rng, draws, shares = np.random.default_rng(0), 200, []
    for _ in range(draws):
        rows = []
        for number, count in enumerate(rng.choice([1, 2, 30], size=14)):
            for score in rng.normal() + 0.5 * rng.normal(size=count):
                rows.append(("fan", "00", number, score, "held-out"))
        table = pd.DataFrame(rows, columns=NO_HELD_OUT.columns)
        is_new = table["recording"] == 13
        shares.append((table["score"][is_new] > conformal(table[~is_new], 0.1)).mean())
    assert np.mean(shares) <= 0.1 + 3.5 * np.std(shares) / np.sqrt(draws)
    assert np.mean(shares) > 0.03, "it is not far below"


# ---- Gamma and quantile ----


def test_the_threshold_is_a_quantile_of_the_fitted_gamma():
    scores = scipy.stats.gamma.rvs(2.0, scale=3.0, size=5000, random_state=0)
    expected = scipy.stats.gamma.ppf(0.9, 2.0, scale=3.0)
    assert gamma(normal_scores(scores.tolist()), 0.1) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("method", ["conformal", "gamma", "quantile"])
@pytest.mark.parametrize(
    "scores",
    [[0.0] * 30, [5.0 + 1e-7 * x for x in range(30)], [0.0] * 29 + [5.0], [1e-300, 1e-9, 3.0] * 10],
)
def test_thresholds_of_odd_scores_are_finite(method, scores):
    thresholds = fit_thresholds([("fan", "00")], normal_scores(scores), method, 0.1)
    assert np.isfinite(thresholds["threshold"].item())
    assert thresholds["threshold"].item() >= 0


@pytest.mark.parametrize("spread", [0.0, 1e-7, "a fit that fails"])
def test_a_fit_that_fails_is_replaced_by_the_quantile_and_said(spread, capsys, monkeypatch):
    scores = [2.0 + spread * x if isinstance(spread, float) else 2.0 + x for x in range(21)]
    if not isinstance(spread, float):
        error = ValueError("`f` must have different signs at the two ends of the bracket")
        monkeypatch.setattr(scipy.stats.gamma, "fit", Mock(side_effect=error))
    thresholds = fit_thresholds([("fan", "00")], normal_scores(scores), "gamma", 0.1)
    assert thresholds["threshold"].item() == np.percentile(scores, 90)
    notices = capsys.readouterr().err
    assert notices.count("\n") == 1
    assert "no gamma distribution fits the scores of the normal recordings" in notices
    assert "so the threshold is their quantile: fan 00" in notices
    fit_thresholds([("fan", "00")], normal_scores(scores), "quantile", 0.1)
    assert capsys.readouterr().err == ""


# ---- Machines ----

MACHINES = [("fan", "00"), ("fan", "02"), ("fan", "04"), ("pump", "01"), ("pump", "03")]


def of_several_machines() -> pd.DataFrame:
    """Twelve recordings of fan 00, four of fan 02 with half their scores, three of pump 01."""
    scores = [float(x) for x in range(1, 13)]
    parts = [
        normal_scores(scores),
        normal_scores([2.0, 3.0, 3.5, 4.0], ("fan", "02")),
        normal_scores([1.0, 2.0, 3.0], ("pump", "01")),
    ]
    return pd.concat(parts)


def test_each_machine_has_its_threshold_or_that_of_its_type_made_comparable(capsys):
    normal = of_several_machines()
    thresholds = fit_thresholds(MACHINES, normal, "conformal", 0.1)
    assert thresholds["source"].tolist() == [
        "12 held-out recordings of the ID",
        "16 held-out recordings of the type",
        "",
        "3 held-out recordings of the type",
        "",
    ]
    assert thresholds["n_recordings"].tolist() == [12, 4, 0, 3, 0]
    assert threshold_of(thresholds, ("fan", "00")) == 12.0
    comparable = make_comparable(normal[normal["machine_type"] == "fan"], normal[12:16])
    assert len(comparable) == 16
    # The highest, as k = ceil(17 * 0.9) = 16
    assert threshold_of(thresholds, ("fan", "02")) == comparable["score"].max()
    for machine in MACHINES[2:]:
        assert threshold_of(thresholds, machine) is None
    explain_thresholds(thresholds, load_config(), Path("run.pth"))
    notices = capsys.readouterr().err.splitlines()
    assert notices[0].endswith("rests on those of other machines of the type: fan 02 (4)")
    assert notices[0].startswith("notice: fewer than 9 normal recordings of a machine")
    assert "no threshold, which takes 9 normal recordings of the machine" in notices[1]
    assert "fan 04 (0), pump 01 (3), pump 03 (0); hold out more" in notices[1]
    assert len(notices) == 2


def test_recordings_are_compared_with_as_many_others_as_the_machine_has():
    scores = [2.0, 3.0, 3.5, 4.0]
    logs = np.log1p(scores)
    all_others = [(logs.sum() - log) / 3 for log in logs]
    found = mean_of_others(normal_scores(scores), 9).sort_index()
    assert found.tolist() == pytest.approx(all_others)
    two = mean_of_others(normal_scores([float(x) for x in range(50)]), 2)
    assert two.notna().all()
    assert len(set(two)) > 40, "two of them, not all"
    assert mean_of_others(normal_scores([3.0]), 5).isna().all()
    windows = normal_scores([1.0, 3.0, 10.0, 20.0], windows=2)
    assert np.expm1(mean_of_others(windows, 3).sort_index()).tolist() == pytest.approx([15.0, 2.0])


def test_scores_are_moved_by_the_difference_of_their_logarithms():
    normal = pd.concat([normal_scores([1.0, 7.0]), normal_scores([0.0, 3.0], ("fan", "02"))])
    moved = make_comparable(normal, normal[2:])["score"]
    # log2(1 + score) is 1 and 3 on fan 00, 0 and 2 on fan 02, where the mean is 1
    assert np.log2(1 + moved).tolist() == pytest.approx(
        [1 - 3 + 1, 3 - 1 + 1, 0 - 2 + 1, 2 - 0 + 1]
    )


@pytest.mark.parametrize("count", [1, 3])
def test_the_rate_holds_where_machines_differ_in_scale(count):
    """Each machine has few recordings, and large scores of another scale."""
    rng, draws, rates = np.random.default_rng(count), 60, []
    machines = [("fan", f"{number:02d}") for number in range(6)]
    for _ in range(draws):
        scales = np.exp(rng.normal(size=len(machines)))
        parts = []
        for machine, scale in zip(machines, scales, strict=True):
            parts.append(normal_scores((100 * scale * rng.gamma(5, size=count)).tolist(), machine))
        thresholds = fit_thresholds(machines[:1], pd.concat(parts), "conformal", 0.1)
        threshold = threshold_of(thresholds, machines[0])
        if count == 1:
            assert threshold is None, "nothing to compare a single recording with"
            return
        rates.append((100 * scales[0] * rng.gamma(5, size=500) > threshold).mean())
    error = 3.5 * np.std(rates) / np.sqrt(draws)
    assert np.mean(rates) <= 0.1 + error
    assert np.mean(rates) >= 0.03


def test_other_methods_make_do_with_any_number(capsys):
    thresholds = fit_thresholds(MACHINES, of_several_machines(), "quantile", 0.1)
    pumps = normal_scores([1.0, 2.0, 3.0], ("pump", "01"))
    expected = np.percentile(make_comparable(pumps, pumps)["score"], 90)
    assert threshold_of(thresholds, ("pump", "01")) == pytest.approx(expected)
    assert threshold_of(thresholds, ("fan", "02")) is not None
    explain_thresholds(thresholds, load_config(threshold="quantile"), Path("run.pth"))
    assert "fewer than 20 normal recordings of a machine" in capsys.readouterr().err


def test_a_given_threshold_is_that_of_all_machines(capsys):
    thresholds = fit_thresholds(MACHINES, NO_HELD_OUT, 0.004, 0.1)
    assert thresholds["threshold"].tolist() == [0.004] * 5
    assert set(thresholds["source"]) == {"given"}
    explain_thresholds(thresholds, load_config(threshold=0.004), Path("run.pth"))
    assert capsys.readouterr().err == ""


def test_without_normal_scores_there_are_no_thresholds(capsys):
    thresholds = fit_thresholds(MACHINES, NO_HELD_OUT, "conformal", 0.1)
    assert thresholds["threshold"].isna().all()
    explain_thresholds(thresholds, load_config(), Path("run.pth"))
    message = "notice: run.pth: no scores of held-out recordings, so there are no decisions; "
    assert capsys.readouterr().err.startswith(message)


def test_later_recordings_are_named(capsys):
    normal = normal_scores([float(x) for x in range(10)]).assign(origin="later")
    thresholds = fit_thresholds(MACHINES[:1], normal, "conformal", 0.1)
    assert thresholds["source"].item() == "10 later recordings of the ID"


def test_what_lies_above_the_threshold_is_anomalous():
    thresholds = pd.Series([2.0] * 4 + [np.nan] + [9.0] * 2)
    decisions = decide(pd.Series([1.0, 3.0, 2.0, 9.0, 5.0, 1.0, 2.0]), thresholds)
    assert decisions[:4].tolist() == [0, 1, 0, 1], "a score equal to the threshold is normal"
    assert decisions.isna().tolist() == [False] * 4 + [True] + [False] * 2
