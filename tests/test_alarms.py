"""Alarms: stretches of windows above the threshold."""

import itertools

import numpy as np
import pytest

from alarms import AlarmRule, cut_into_spans, describe_windows, find_alarms, find_level, format_time

RULE = AlarmRule(3, 5)


def stretches(pattern: str, rule: AlarmRule = RULE) -> list[tuple[int, int]]:
    """Return first and last window of each alarm; windows marked x lie above the threshold."""
    scores = np.array([1.0 if mark == "x" else 0.0 for mark in pattern])
    starts = [5.0 * number for number in range(len(pattern))]
    alarms = find_alarms(starts, scores, 0.5, rule)
    return [(int(alarm.start / 5), int((alarm.end - 10) / 5)) for alarm in alarms]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("..........", []),
        ("xx........", []),
        ("x..x..x..x", []),
        ("xx..x.....", [(0, 4)]),
        (".x.x.x....", [(1, 5)]),
        ("xxx....xxx", [(0, 2), (7, 9)]),
        ("xxx..x...xxx", [(0, 5), (9, 11)]),  # spans that share a window above it are one stretch
        ("xxx..x..xxx", [(0, 10)]),
        ("xxxxxxxxxx", [(0, 9)]),
        ("xx.x.x.x.xx", [(0, 10)]),
        (".......xxx", [(7, 9)]),
        ("x", [(0, 0)]),
        ("xx", [(0, 1)]),
        (".x", []),
        ("xx.", []),
        ("xxx", [(0, 2)]),
        ("x.xx", [(0, 3)]),
        ("xx..", []),
    ],
)
def test_alarms_of_three_of_five_windows(pattern, expected):
    assert stretches(pattern) == expected


def find_alarms_at_once(scores: np.ndarray, threshold: float, rule: AlarmRule) -> list[tuple]:
    """Find the stretches of alarms from all windows at once, as first and last window."""
    is_above = scores > threshold
    n_above = min(rule.n_above, len(scores))
    stretches: list[list[int]] = []
    for first, span in enumerate(cut_into_spans(is_above, rule)):
        if span.sum() < n_above:
            continue
        above = first + np.flatnonzero(span)
        if stretches and above[0] <= stretches[-1][1] + 1:  # they share a window, or adjoin
            stretches[-1][1] = int(above[-1])
        else:
            stretches.append([int(above[0]), int(above[-1])])
    return [(first, last + 10, scores[first : last + 1].max()) for first, last in stretches]


def test_alarms_window_by_window_are_those_of_all_windows_at_once():
    rng = np.random.default_rng(0)
    for span in range(1, 8):
        for n_above in range(1, span + 1):
            rule = AlarmRule(n_above, span)
            for length in (1, 2, 5, 9, 30, 60):
                scores = rng.random(length)
                threshold = rng.choice([0.3, 0.5, 0.7])
                alarms = find_alarms(list(range(length)), scores, threshold, rule)
                assert alarms == find_alarms_at_once(scores, threshold, rule)


def test_other_rules():
    assert stretches("..x....", AlarmRule(1, 1)) == [(2, 2)]
    assert stretches("..xx.x.", AlarmRule(1, 1)) == [(2, 3), (5, 5)]
    assert stretches("xx.....", AlarmRule(2, 2)) == [(0, 1)]
    assert stretches("x.x....", AlarmRule(2, 2)) == []
    assert stretches("xxxx", AlarmRule(5, 8)) == [(0, 3)], "all of a shorter recording"


def test_there_is_an_alarm_if_and_only_if_the_level_lies_above_the_threshold():
    rng = np.random.default_rng(0)
    for length, rule in itertools.product((1, 2, 3, 4, 5, 6, 9, 20), (RULE, AlarmRule(2, 7))):
        for _ in range(20):
            scores = rng.integers(0, 9, size=length).astype(float)
            level = find_level(scores, rule)
            assert level in scores
            for threshold in range(9):
                alarms = find_alarms(list(range(length)), scores, threshold, rule)
                assert bool(alarms) == (level > threshold)


def test_the_level_of_a_single_window_is_its_score():
    assert find_level(np.array([0.1234567890123]), RULE) == 0.1234567890123


def test_an_alarm_has_its_highest_score_and_ends_with_its_last_window():
    scores = np.array([0.0, 3.0, 9.0, 4.0, 0.0, 0.0])
    (alarm,) = find_alarms([0.0, 5.0, 10.0, 15.0, 20.0, 22.5], scores, 2.0, RULE)
    assert alarm == (5.0, 25.0, 9.0)


def in_words(starts: list[float], scores: np.ndarray, threshold: float | None) -> str:
    alarms = [] if threshold is None else find_alarms(starts, scores, threshold, RULE)
    return describe_windows(starts, scores, threshold, alarms)


def test_the_windows_in_words():
    starts = [5.0 * number for number in range(80)]
    scores = np.zeros(80)
    assert in_words(starts, scores, 0.5) == (
        "no alarm, worst at 0:00:00 (0), 0 of 80 windows anomalous"
    )
    assert in_words(starts, scores, None) == "worst at 0:00:00 (0)"
    scores[10:13] = 2.5
    assert in_words(starts, scores, 0.5) == (
        "alarm from 0:00:50 to 0:01:10 (2.5), worst at 0:00:50 (2.5), 3 of 80 windows anomalous"
    )
    for first in range(0, 80, 10):
        scores[first : first + 3] = 1.0
    text = in_words(starts, scores, 0.5)
    assert text.count("alarm from") == 5
    assert "(1), 3 more alarms, worst at 0:00:00 (1), 24 of 80" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (2465.0, "0:41:05"), (2465.5, "0:41:05.50"), (36_000, "10:00:00"),
     (59.999, "0:01:00")],
)  # fmt: skip
def test_times(seconds, text):
    assert format_time(seconds) == text
