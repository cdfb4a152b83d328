"""AUC and pAUC of machines, their combinations over machines, and bootstrap intervals."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import scipy.stats
from evaluated import make_recordings, make_sections, measured
from sklearn.metrics import roc_auc_score

from evaluation.metrics import (
    ALL_RECORDINGS,
    NO_DOMAINS,
    RULE_2021,
    RULE_2022,
    Metric,
    Rule,
    Sample,
    find_rule,
    measure,
    measure_sample,
    resample,
)


def test_auc_counts_pairs_and_half_of_the_ties():
    table = measured(make_recordings({("fan", 0): (3, 2)}), [0.1, 0.4, 0.3, 0.3, 0.9]).table
    row = table.loc["fan", "00"]
    assert row["AUC"] == pytest.approx((1 + 0 + 0.5 + 3) / 6)
    assert (row["n_normal"], row["n_anomaly"]) == (3, 2)


def test_partial_auc_is_standardised():
    recordings = make_recordings({("fan", 0): (2000, 2000)})
    is_anomaly, rng = np.repeat([False, True], 2000), np.random.default_rng(0)
    chance, separated = rng.normal(size=4000), rng.normal(size=4000) + is_anomaly

    def partial_auc(scores: np.ndarray) -> float:
        return measured(recordings, scores).table.loc[("fan", "00"), "pAUC"]

    assert partial_auc(chance) == pytest.approx(0.5, abs=0.02)
    assert partial_auc(is_anomaly * 1.0) == 1.0
    expected = roc_auc_score(is_anomaly, separated, max_fpr=0.1)
    assert partial_auc(separated) == pytest.approx(expected, abs=1e-12)


def expected_row(recordings: pd.DataFrame) -> list[float]:
    """Compute AUC, pAUC and counts with scikit-learn."""
    is_anomaly, scores = recordings["condition"] == "anomalous", recordings["score"]
    auc = roc_auc_score(is_anomaly, scores)
    partial_auc = roc_auc_score(is_anomaly, scores, max_fpr=0.1)
    return [auc, partial_auc, sum(~is_anomaly), sum(is_anomaly)]


def combined(rows: list[list[float]], function: Callable) -> list[float]:
    """Combine AUC and pAUC of rows by a function; add up their counts."""
    columns = np.transpose(rows)
    return [*function(columns[:2], axis=1), *columns[2:].sum(axis=1)]


def test_every_row_agrees_with_scikit_learn():
    """Random scores with many ties; the rows of several IDs combined by hand, with the numbers of
    their recordings added up.
    """
    recordings = make_recordings(
        {
            ("fan", 2): (30, 20),
            ("fan", 0): (7, 45),
            ("fan", 11): (50, 1),
            ("pump", 0): (1, 9),
            ("valve", 4): (40, 40),
        }
    )
    is_anomaly, rng = recordings["condition"] == "anomalous", np.random.default_rng(5)
    recordings["score"] = np.round(rng.normal(size=len(recordings)) + 0.5 * is_anomaly, 1)
    assert recordings["score"].nunique() < len(recordings) / 3
    expected = {}
    for machine_type, of_type in recordings.groupby("machine_type"):
        id_rows = []
        for machine_id, of_machine in of_type.groupby("machine_id"):
            expected[machine_type, machine_id] = expected_row(of_machine)
            id_rows.append(expected_row(of_machine))
        expected[machine_type, "pooled"] = expected_row(of_type)
        expected[machine_type, "mean"] = combined(id_rows, np.mean)
        expected[machine_type, "min"] = combined(id_rows, np.min)
    for name in ("pooled", "mean", "min"):
        rows = [expected[machine_type, name] for machine_type in ("fan", "pump", "valve")]
        expected["average", name] = combined(rows, np.mean)
    table = measure(recordings, draws=10).table
    assert list(table.index) == list(expected)
    for key, row in expected.items():
        values = table.loc[key, ["AUC", "pAUC", "n_normal", "n_anomaly"]].tolist()
        assert values == pytest.approx(list(row), abs=1e-12), key


def test_pooled_mean_and_lowest():
    """Each ID is separated perfectly or by half, on different scales: pooling sees the scales, the
    mean does not.
    """
    recordings = make_recordings({("fan", 0): (2, 2), ("fan", 2): (2, 2), ("pump", 0): (1, 3)})
    table = measured(recordings, [1, 2, 3, 4, 11, 12, 13, 10, 1, 2, 3, 0]).table
    assert list(table.index) == [
        ("fan", "00"), ("fan", "02"), ("fan", "pooled"), ("fan", "mean"), ("fan", "min"),
        ("pump", "00"), ("pump", "pooled"), ("pump", "mean"), ("pump", "min"),
        ("average", "pooled"), ("average", "mean"), ("average", "min"),
    ]  # fmt: skip
    auc = table["AUC"]
    assert auc["fan"].tolist() == [1.0, 0.5, (2 * 2 + 4 + 2) / 16, 0.75, 0.5]
    assert auc["pump", "00"] == pytest.approx(2 / 3)
    assert auc["average", "mean"] == pytest.approx((0.75 + 2 / 3) / 2)
    assert auc["average", "min"] == pytest.approx((0.5 + 2 / 3) / 2)
    assert auc["average", "pooled"] == pytest.approx((10 / 16 + 2 / 3) / 2)
    assert table.loc[("fan", "pooled"), "n_normal"] == 4


def test_the_lowest_is_taken_for_each_column_separately():
    """One ID has the lower AUC; the other, whose highest clip is a normal one, the lower pAUC."""
    recordings = make_recordings({("fan", 0): (3, 8), ("fan", 2): (5, 7)})
    scores = [9, 0, 0, *[5] * 8, *[5] * 5, *[9] * 4, *[0] * 3]
    table = measured(recordings, scores).table.loc["fan"]
    assert table.loc["00", "AUC"] > table.loc["02", "AUC"] == table.loc["min", "AUC"]
    assert table.loc["02", "pAUC"] > table.loc["00", "pAUC"] == table.loc["min", "pAUC"]


def test_machines_with_one_condition_are_left_out():
    recordings = make_recordings({("fan", 0): (2, 2), ("fan", 2): (2, 0), ("pump", 0): (0, 2)})
    table = measured(recordings, np.arange(8.0)).table
    auc = table["AUC"]
    assert math.isnan(auc["fan", "02"])
    assert auc["fan", "mean"] == auc["fan", "00"] == 1.0
    assert math.isnan(auc["pump", "pooled"])
    assert math.isnan(auc["pump", "mean"])
    assert auc["average", "mean"] == 1.0
    counts = table[["n_normal", "n_anomaly"]]
    assert counts.loc[("fan", "mean")].tolist() == counts.loc[("average", "min")].tolist() == [2, 2]
    assert counts.loc[("fan", "pooled")].tolist() == [4, 2]
    assert counts.loc[("pump", "mean")].tolist() == [0, 0]


# ---- Rules ----


def test_the_rule_of_the_year():
    sections = make_sections("fan", {"00": {"source": (1, 1), "target": (1, 1)}})
    in_folders = sections.assign(part="section_00_" + sections["domain"] + "_test")
    assert find_rule(make_recordings({("fan", 0): (1, 1)})) is NO_DOMAINS
    assert find_rule(sections) is RULE_2022
    assert find_rule(in_folders) is RULE_2021


def balanced_error(false: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Compute the lowest value of the larger of the two error rates, `(draws,)`."""
    return np.min(np.maximum(false, 1 - true), axis=1)


def test_a_metric_needs_one_entry():
    """It is in each row, combined and with an interval, in its domains."""
    recordings = make_sections(
        "fan",
        {
            "00": {"source": (10, 10), "target": (10, 10)},
            "01": {"source": (10, 10), "target": (10, 10)},
        },
    )
    is_anomaly, rng = recordings["condition"] == "anomalous", np.random.default_rng(0)
    recordings["score"] = rng.normal(size=len(recordings)) + is_anomaly
    entry = Metric("balance_source", balanced_error, normal="source", summaries=("mean",))
    rule = replace(RULE_2022, metrics=(*RULE_2022.metrics, entry))
    metrics = measure(recordings, rule, draws=20)
    assert rule.shown_in("mean") == ["AUC", "pAUC", "balance_source"]
    chosen = recordings[is_anomaly | (recordings["domain"] == "source")]
    alone = Rule((*ALL_RECORDINGS, Metric("balance", balanced_error)))
    expected = measure(chosen, alone, draws=20).table["balance"]
    for row in ("00", "01", "pooled", "mean", "min"):
        assert metrics.table.loc[("fan", row), "balance_source"] == expected["fan", row]
    low, high = metrics.table.loc[("fan", "mean"), ["balance_source_low", "balance_source_high"]]
    assert 0 < low < high < 1
    before = measure(recordings, RULE_2022, draws=20).table
    pd.testing.assert_frame_equal(metrics.table[before.columns], before)


# ---- Intervals ----


@pytest.mark.parametrize("ties", [False, True])
def test_weighted_areas_are_those_of_repeated_clips(ties):
    rng = np.random.default_rng(1)
    is_anomaly = np.repeat([False, True], [60, 40])
    scores = rng.normal(size=100) + is_anomaly
    if ties:
        scores = np.round(scores)
    weights = resample(is_anomaly, 20, rng)
    assert (weights[0] == 1).all(), "first the clips themselves"
    assert (weights[:, :60].sum(axis=1) == 60).all()
    assert (weights[:, 60:].sum(axis=1) == 40).all()
    sample = Sample(is_anomaly, np.full(100, ""), scores, weights)
    values = measure_sample(sample, NO_DOMAINS).values
    for draw, counts in enumerate(weights.astype(int)):
        repeated = np.repeat(is_anomaly, counts), np.repeat(scores, counts)
        auc, partial_auc = roc_auc_score(*repeated), roc_auc_score(*repeated, max_fpr=0.1)
        assert values["AUC"][draw] == pytest.approx(auc, abs=1e-12)
        assert values["pAUC"][draw] == pytest.approx(partial_auc, abs=1e-12)


@pytest.fixture(scope="module")
def recordings() -> pd.DataFrame:
    counts = {("fan", 0): (30, 30), ("fan", 2): (30, 30), ("pump", 0): (3, 0)}
    table = make_recordings(counts)
    noise = np.random.default_rng(0).normal(size=len(table))
    return table.assign(score=noise + (table["condition"] == "anomalous"))


def test_draws_are_combined_like_values(recordings):
    metrics = measure(recordings, draws=200, seed=3)
    assert set(metrics.rows) == set(metrics.table.index)
    for name in ("AUC", "pAUC"):
        draws = {key: row.values[name] for key, row in metrics.rows.items()}
        assert {len(values) for values in draws.values()} == {201}
        first = [values[0] for values in draws.values()]
        assert first == pytest.approx(metrics.table[name].tolist(), nan_ok=True)
        assert np.allclose(draws["fan", "mean"], (draws["fan", "00"] + draws["fan", "02"]) / 2)
        lowest = np.minimum(draws["fan", "00"], draws["fan", "02"])
        assert np.array_equal(draws["fan", "min"], lowest)
        assert np.array_equal(draws["average", "min"], draws["fan", "min"])
        bounds = metrics.table.loc[("fan", "pooled"), [f"{name}_low", f"{name}_high"]].tolist()
        assert bounds == pytest.approx(np.percentile(draws["fan", "pooled"][1:], [2.5, 97.5]))


def test_the_same_clips_are_drawn_whatever_the_scores(recordings):
    def draw_auc(table: pd.DataFrame) -> np.ndarray:
        return measure(table, draws=200, seed=3).rows["fan", "pooled"].values["AUC"]

    auc = draw_auc(recordings)
    assert np.array_equal(draw_auc(recordings), auc)
    assert np.allclose(draw_auc(recordings.assign(score=-recordings["score"])), 1 - auc)


def test_the_spread_of_an_auc_is_that_of_hanley_and_mcneil(recordings):
    """Their standard error, with 60 normal and 60 anomalous clips."""
    auc, *draws = measure(recordings, draws=200, seed=3).rows["fan", "pooled"].values["AUC"]
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    error = np.sqrt((auc * (1 - auc) + 59 * (q1 - auc**2) + 59 * (q2 - auc**2)) / 3600)
    assert np.mean(draws) == pytest.approx(auc, abs=0.02)
    assert np.std(draws) == pytest.approx(error, rel=0.25)


# ---- Perfect separation ----

# Two machine IDs, of normal and anomalous recordings
COUNTS_OF_IDS = [(60, 70), (60, 64)]
# For each row the recordings that are separated, and in how many of them the separation is in doubt
SEPARATIONS = {
    "00": ([(60, 70)], 1),
    "pooled": ([(120, 134)], 1),
    "mean": (COUNTS_OF_IDS, 2),
    "min": (COUNTS_OF_IDS, 1),
}


def population_curve(shape: str, auc: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the ROC curve of a population with this AUC: two normal distributions, or anomalous
    recordings above all but some normal ones, which lie above all of them.
    """
    if shape == "some above all":
        return np.array([[0, 1 - auc, 1 - auc, 1]]), np.array([[0.0, 0, 1, 1]])
    fpr = np.linspace(0, 1, 20_001)
    return fpr[None], scipy.stats.norm.cdf(scipy.stats.norm.ppf(fpr) + distance_of(auc))[None]


def distance_of(auc: float) -> float:
    """Return the distance of two standard normal distributions with this AUC."""
    return np.sqrt(2) * scipy.stats.norm.ppf(auc)


def draw_perfect(shape: str, auc: float, counts: tuple[int, int], rng) -> np.ndarray:
    """Draw recordings 20,000 times; return whether all anomalous ones have higher scores."""
    normal, anomalous = (rng.normal(size=(20_000, count)) for count in counts)
    if shape == "some above all":
        normal = np.where(rng.random(normal.shape) < auc, normal - 100, normal + 100)
    else:
        anomalous = anomalous + distance_of(auc)
    return normal.max(axis=1) < anomalous.min(axis=1)


@pytest.mark.parametrize("shape", ["some above all", "two normal distributions"])
@pytest.mark.parametrize("metric", NO_DOMAINS.metrics, ids=lambda metric: metric.name)
@pytest.mark.parametrize("row", SEPARATIONS)
def test_where_the_bound_is_true_a_perfect_separation_has_2_5_percent(shape, metric, row):
    """The lower bound of a value of 1 is the value of a population of which a fortieth or less is
    separated perfectly: a fortieth of the least favourable population.
    """
    recordings = make_recordings(dict(zip([("fan", 0), ("fan", 2)], COUNTS_OF_IDS, strict=True)))
    table = measured(recordings, recordings["condition"] == "anomalous").table.loc["fan"]
    low, high = table.loc[row, [f"{metric.name}_low", f"{metric.name}_high"]]
    assert high == pytest.approx(1)

    def excess(auc: float) -> float:
        return metric.compute(*population_curve(shape, auc)).item() - low

    auc = scipy.optimize.brentq(excess, 0.6, 0.9999)
    rng = np.random.default_rng(0)
    counts_of_separations, n_doubtful = SEPARATIONS[row]
    perfect = [draw_perfect(shape, auc, counts, rng) for counts in counts_of_separations]
    share = np.mean(np.logical_and.reduce(perfect[:n_doubtful]))
    if shape == "some above all":
        assert share == pytest.approx(0.025, abs=0.004)
    else:
        assert share < 0.025


def test_draws_of_a_perfect_separation_are_perfect_and_its_interval_is_not():
    recordings = make_recordings({("fan", 0): (15, 24), ("fan", 2): (40, 1), ("pump", 0): (3, 0)})
    metrics = measured(recordings, recordings["condition"] == "anomalous", draws=50)
    values = metrics.rows["fan", "00"].values
    assert (values["AUC"] == 1).all()
    assert np.allclose(values["pAUC"], 1)
    n_pairs = {"00": 15, "02": 1, "pooled": 25, "mean": 2, "min": 1}
    for name, count in n_pairs.items():
        row = metrics.table.loc[("fan", name)]
        assert row[["AUC_low", "AUC_high"]].tolist() == pytest.approx([0.025 ** (1 / count), 1])
        assert row[["pAUC_low", "pAUC_high"]].tolist() == pytest.approx([9 / 19, 1])
    for name in ("pooled", "mean", "min"):
        average, of_fan = metrics.table.loc["average", name], metrics.table.loc["fan", name]
        assert average.equals(of_fan), "pump has no anomalous recordings"


def test_the_bounds_of_domains_and_of_the_official_score():
    """An AUC of a domain has the pairs of its recordings, and the official score as few as the
    domain with the fewest, and the bound of its lowest term.
    """
    counts = {"source": (90, 50), "target": (60, 50)}
    recordings = make_sections("fan", {"00": counts, "01": counts})
    recordings["score"] = recordings["condition"] == "anomalous"
    table = measure(recordings, RULE_2022, draws=10).table.loc["fan"]
    area_low = [0.025 ** (1 / count) for count in (100, 90, 60)]
    pauc_low = [(1 + ((a - 0.9) - 0.005) / 0.095) / 2 for a in area_low]
    names = ["AUC_low", "AUC_source_low", "AUC_target_low", "pAUC_low", "official_low"]
    assert table.loc["00", names].tolist() == pytest.approx([*area_low, pauc_low[0], pauc_low[2]])
    assert table.loc["hmean", names].tolist() == pytest.approx(table.loc["00", names].tolist())
    no_target = recordings[(recordings["domain"] == "source") | (recordings["score"] == 1)]
    table = measure(no_target, RULE_2022, draws=10).table.loc["fan"]
    assert table.loc["00", "official_low"] == pytest.approx(table.loc["00", "pAUC_low"])
    assert math.isnan(table.loc["00", "AUC_target_low"])


def test_the_interval_of_an_almost_perfect_separation_is_that_of_the_bootstrap():
    recordings = make_recordings({("fan", 0): (30, 30)})
    scores = np.arange(60.0)
    scores[[29, 30]] = scores[[30, 29]]
    metrics = measured(recordings, scores, draws=200)
    draws = metrics.rows["fan", "00"].values["AUC"][1:]
    assert metrics.table.loc[("fan", "00"), "AUC_low"] == np.quantile(draws, 0.025)
