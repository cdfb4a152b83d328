"""Alarms in a recording of several windows: stretches of windows above the threshold.

Requires what audio.py requires.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from audio import SECONDS

ALARMS_SHOWN = 5  # in a line


class AlarmRule(NamedTuple):
    """An alarm is a stretch in which at least `n_above` of `span` consecutive windows lie above the
    threshold; in a recording of fewer than `n_above` windows, all of them.
    """

    n_above: int
    span: int


class Alarm(NamedTuple):
    """A stretch from its first window above the threshold to the end of its last, in seconds, and
    the highest score in it.
    """

    start: float
    end: float
    score: float


def find_level(scores: np.ndarray, rule: AlarmRule) -> float:
    """Return the alarm level of a recording whose windows have these scores `(windows,)`: the
    highest one that enough windows of some span reach. There is an alarm if and only if it lies
    above the threshold.
    """
    spans = cut_into_spans(scores, rule)
    n_above = min(rule.n_above, len(scores))
    return float(np.sort(spans, axis=1)[:, -n_above].max())


def find_alarms(
    starts: Sequence[float], scores: np.ndarray, threshold: float, rule: AlarmRule
) -> list[Alarm]:
    """Return the alarms of a recording whose windows start at these seconds and have these scores
    `(windows,)`, from first to last.
    """
    tracker = AlarmTracker(rule._replace(n_above=min(rule.n_above, len(scores))), threshold)
    alarms = []
    for start, score in zip(starts, scores.tolist(), strict=True):
        ended = tracker.add(start, score)
        if ended:
            alarms.append(ended)
    return alarms + ([tracker.alarm] if tracker.alarm else [])


class AlarmTracker:
    """Finds alarms while the windows arrive.

    Attributes:
        alarm: The alarm that the windows so far have raised; None without one, or once it is over.
    """

    def __init__(self, rule: AlarmRule, threshold: float) -> None:
        self.rule, self.threshold = rule, threshold
        self.alarm: Alarm | None = None
        self.span: deque[tuple[float, float]] = deque(maxlen=rule.span)  # starts and scores
        self.n_after = 0  # windows after the last one of the alarm

    def add(self, start: float, score: float) -> Alarm | None:
        """Add the next window. Returns the alarm that is over with it, if one is: no later span
        includes its last window. A score of NaN counts as one below the threshold.
        """
        self.span.append((start, score))
        self.n_after += 1
        above = [number for number, (_, score) in enumerate(self.span) if score > self.threshold]
        if len(above) >= self.rule.n_above:
            self.extend_alarm([self.span[number] for number in above])
            self.n_after = len(self.span) - 1 - above[-1]
        if self.alarm and self.n_after >= max(1, self.rule.span - 1):
            ended, self.alarm = self.alarm, None
            return ended
        return None

    def extend_alarm(self, above: Sequence[tuple[float, float]]) -> None:
        """Begin an alarm, or continue it, with the windows of a span above the threshold."""
        scores = [score for _, score in above]
        first = above[0][0]
        if self.alarm:
            first = self.alarm.start
            scores.append(self.alarm.score)
        self.alarm = Alarm(first, above[-1][0] + SECONDS, max(scores))


def cut_into_spans(values: np.ndarray, rule: AlarmRule) -> np.ndarray:
    """Return each span of consecutive windows: values `(windows,)` -> `(spans, span)`. A shorter
    recording is one span.
    """
    return np.lib.stride_tricks.sliding_window_view(values, min(rule.span, len(values)))


# ---- In words ----


def describe_windows(
    starts: Sequence[float], scores: np.ndarray, threshold: float | None, alarms: Sequence[Alarm]
) -> str:
    """Describe the windows of a recording: its alarms, the window with the highest score, and how
    many lie above the threshold.
    """
    worst = int(scores.argmax())
    highest = f"worst at {format_time(starts[worst])} ({scores[worst]:.6g})"
    if threshold is None:
        return highest
    count = f"{(scores > threshold).sum()} of {len(scores)} windows anomalous"
    return ", ".join([describe_alarms(alarms), highest, count])


def describe_alarms(alarms: Sequence[Alarm]) -> str:
    """Describe alarms, as in "alarm from 0:40:00 to 0:41:05 (8.2)"."""
    if not alarms:
        return "no alarm"
    texts = []
    for alarm in alarms[:ALARMS_SHOWN]:
        times = f"from {format_time(alarm.start)} to {format_time(alarm.end)}"
        texts.append(f"alarm {times} ({alarm.score:.6g})")
    if len(alarms) > ALARMS_SHOWN:
        texts.append(f"{len(alarms) - ALARMS_SHOWN} more alarms")
    return ", ".join(texts)


def format_time(seconds: float) -> str:
    """Format seconds as in 0:41:05 or, with hundredths, 0:41:05.50."""
    minutes, rest = divmod(round(float(seconds), 2), 60)
    hours, minutes = divmod(int(minutes), 60)
    digits = f"{rest:02.0f}" if rest.is_integer() else f"{rest:05.2f}"
    return f"{hours}:{minutes:02d}:{digits}"
