"""False alarms and detections, and how they are said."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from evaluated import make_recordings

from config import load_config
from evaluation.decisions import (
    COUNTED,
    asked_rate,
    binomial_interval,
    count_decisions,
    describe_decisions,
    named_rows,
)
from recordings import MACHINE_COLUMNS


def decided() -> pd.DataFrame:
    """Decisions about recordings of fan 00 (4 normal, 2 anomalous), fan 02 (1 normal), pump 00
    (2 normal, without a threshold) and valve 01 (none).
    """
    recordings = make_recordings({("fan", 0): (4, 2), ("fan", 2): (1, 0), ("pump", 0): (2, 0)})
    decisions = pd.array([0, 1, 0, 0, 1, 0, 0, pd.NA, pd.NA], dtype="Int64")
    unlabelled = recordings[:1].assign(condition="unlabelled", decision=1)
    table = pd.concat([recordings.assign(decision=decisions), unlabelled])
    machines = [("fan", "00"), ("fan", "02"), ("pump", "00"), ("valve", "01")]
    index = pd.MultiIndex.from_tuples(machines, names=MACHINE_COLUMNS)
    columns = {"threshold": [2.0, 9.0, np.nan, 1.0], "source": "given", "n_recordings": 0}
    return count_decisions(table, pd.DataFrame(columns, index))


def test_false_alarms_and_detections_are_counted():
    counted = decided()
    assert counted.index.tolist() == [("fan", "00"), ("fan", "02"), ("valve", "01")]
    names = ["n_normal", "n_false_alarms", "n_anomaly", "n_detected"]
    assert counted[names].to_numpy().tolist() == [[4, 1, 2, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    first = counted.loc["fan", "00"]
    assert (first["false_alarm_rate"], first["recall"]) == (0.25, 0.5)
    assert (first["precision"], first["F1"]) == (0.5, 0.5)
    assert counted[["precision", "recall", "F1"]].iloc[1:].isna().all(axis=None)
    assert np.isnan(counted["false_alarm_rate"].iloc[2])
    assert "n_recordings" not in counted


def test_the_decisions_in_words():
    lines = describe_decisions(decided(), "asked: 10 %").splitlines()
    assert lines == [
        "fan 00 | of 4 normal 1 called anomalous, 25.0 % (0.6 to 80.6; asked: 10 %), "
        "of 2 anomalous 1, 50.0 % (1.3 to 98.7)",
        "fan 02 | of 1 normal 0 called anomalous, 0.0 % (0.0 to 97.5; asked: 10 %)",
        "all    | of 5 normal 1 called anomalous, 20.0 % (0.5 to 71.6; asked: 10 %), "
        "of 2 anomalous 1, 50.0 % (1.3 to 98.7)",
    ]
    assert describe_decisions(decided()[2:], "") == ""


def test_the_row_of_all_machines_is_computed_from_the_sums():
    rows = named_rows(decided())
    assert list(rows) == ["fan 00", "fan 02", "valve 01", "all"]
    row = rows["all"]
    assert [row[name] for name in COUNTED] == [1, 5, 1, 2]
    assert [row[name] for name in ("false_alarm_rate", "recall")] == [0.2, 0.5]
    assert [row[name] for name in ("precision", "F1")] == [0.5, 0.5]
    assert (row["recall_low"], row["recall_high"]) == binomial_interval(1, 2)
    assert "threshold" not in row
    assert list(named_rows(decided()[1:])) == ["fan 02", "valve 01"], "one with recordings"


def test_the_rate_that_was_asked_for():
    assert asked_rate(load_config(false_alarms=0.05)) == "asked: 5 %"
    assert asked_rate(load_config(threshold=0.3)) == ""


@pytest.mark.parametrize(("count", "n"), [(0, 16), (2, 16), (16, 16), (7, 350)])
def test_the_interval_is_that_of_clopper_and_pearson(count, n):
    expected = scipy.stats.binomtest(count, n).proportion_ci(0.95, "exact")
    assert binomial_interval(count, n) == pytest.approx((expected.low, expected.high))


def test_the_interval_of_nothing():
    assert binomial_interval(0, 0) == (0.0, 1.0)
