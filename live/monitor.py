"""A monitor of a machine: from sound to lines about windows, conditions and alarms."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alarms import Alarm, AlarmTracker, format_time
from audio import N_SAMPLES, SAMPLE_RATE, SECONDS, check_recording, make_window, read_recording
from errors import UserError, explain
from live.evidence import Evidence
from live.folder import Folder, Version, find_version
from live.log import Log
from live.model import OnnxModel
from live.stream import Block, Stream
from live.windows import (
    CLIPPED,
    NO_INPUT,
    NOT_FINITE,
    SILENT,
    SOUND,
    Cut,
    Cutter,
    find_condition,
)

POLL = 2  # seconds between two looks into a folder
FOLDER_PATIENCE = 3600  # seconds without a recording after which there is no input
ADVICE = {
    SOUND: "sound again",
    SILENT: "silent: the samples do not change; check plug, gain and noise suppression",
    CLIPPED: "clipped: listen to the machine; if it is as usual, lower the gain",
    NOT_FINITE: "not finite: samples are NaN or infinite; check the program that records",
    NO_INPUT: "no input: check the program that records",
}


class Window(NamedTuple):
    """A window of sound that was scored, or why it was not."""

    moment: float  # at which it starts, in seconds since 1970
    file: str | None  # None: standard input
    start: float  # second of the file or of standard input at which it starts
    condition: str
    score: float  # NaN unless the condition is SOUND


class Monitor:
    """Scores windows of a machine one after another, and prints what it finds."""

    def __init__(self, model: OnnxModel, machine: int, log: Log) -> None:
        """Monitor the machine with this number in the model.

        Raises:
            UserError: If the machine has no threshold.
        """
        self.model, self.machine, self.log = model, machine, log
        self.name = " ".join(model.machines[machine])
        threshold = model.thresholds[machine]
        if threshold is None:
            raise UserError(
                f"{model.path}: no threshold for {self.name}, which takes more normal recordings; "
                "hold out more, use score.py --calibrate or add them to the folder of --normal, "
                "and export again"
            )
        self.threshold = threshold
        # Times of alarms are seconds of standard input or, in a folder, seconds since 1970.
        self.tracker = AlarmTracker(model.rule, threshold)
        self.condition, self.reason = SOUND, ""
        self.last: Window | None = None

    @property
    def hop(self) -> float:
        """The seconds between the starts of windows."""
        assert self.model.windows.hop is not None, "a file from export.py has all windows"
        return self.model.windows.hop

    def begin(self, moment: float | None = None) -> None:
        """Print what is monitored, from a moment on, in seconds since 1970 (None: now)."""
        rule = self.model.rule
        self.log.write(
            "start",
            f"{self.name}: an alarm is {rule.n_above} of {rule.span} windows above "
            f"{self.threshold:.6g}",
            moment,
            machine=self.name,
            threshold=self.threshold,
            hop=self.hop,
            alarm_windows=rule.n_above,
            alarm_span=rule.span,
            model=self.model.path,
        )

    def score(self, samples: np.ndarray, rate: int) -> tuple[str, float]:
        """Return condition and score of a window, int16 or in [-1, 1) `(n,)`, at `rate` in Hz."""
        condition = find_condition(samples, rate)
        if condition != SOUND:
            return condition, math.nan
        return condition, float(self.model.score(make_window(samples, rate))[self.machine])

    def report(self, window: Window) -> None:
        """Print the next window, and an alarm that begins or is over with it."""
        moment, file, start = window.moment, window.file, window.start
        self.set_condition(window.condition, moment=moment, file=file, start=start)
        score, decision, shown = None, window.condition, "-"
        if window.condition == SOUND:
            score, shown = window.score, f"{window.score:.6g}"
            decision = "anomalous" if score > self.threshold else "normal"
        text = f"{shown}\t{decision}"
        self.log.write(
            "window", text, moment, file=file, start=start, score=score, decision=decision
        )
        self.last = window
        before = self.tracker.alarm
        ended = self.tracker.add(start if file is None else moment, window.score)
        if ended:
            self.end_alarm(ended)
        elif self.tracker.alarm and not before:
            self.begin_alarm(self.tracker.alarm)

    def set_condition(
        self,
        condition: str,
        reason: str = "",
        moment: float | None = None,
        file: str | None = None,
        start: float | None = None,
    ) -> None:
        """Print the condition of the sound, if it or its reason has changed."""
        if (condition, reason) != (self.condition, self.reason):
            text = f"{ADVICE[condition]} ({reason})" if reason else ADVICE[condition]
            self.log.write(
                "condition",
                text,
                moment,
                file=file,
                start=start,
                condition=condition,
                reason=reason or None,
            )
        self.condition, self.reason = condition, reason

    # ---- Alarms ----

    def begin_alarm(self, alarm: Alarm) -> None:
        rule = self.model.rule
        text = (
            f"ALARM: {rule.n_above} of {rule.span} windows lie above {self.threshold:.6g}, the "
            f"highest with {alarm.score:.6g}"
        )
        moment, start = self.find_moment(alarm.start)
        self.log.write("alarm", text, moment, start=start, score=alarm.score)

    def end_alarm(self, alarm: Alarm) -> None:
        seconds = alarm.end - alarm.start
        text = f"the alarm of {format_time(seconds)} is over, highest score {alarm.score:.6g}"
        moment, start = self.find_moment(alarm.end)
        self.log.write("alarm_end", text, moment, start=start, seconds=seconds, score=alarm.score)

    def find_moment(self, second: float) -> tuple[float, float | None]:
        """Return a time of an alarm in seconds since 1970, and as second of standard input (None:
        in a folder).
        """
        assert self.last, "an alarm consists of windows"
        if self.last.file is not None:
            return second, None
        return second + self.last.moment - self.last.start, second

    def end(self, reason: str, notes: list[str]) -> None:
        """Print the end of an alarm that is not over, and that of the monitor."""
        if self.tracker.alarm:
            self.end_alarm(self.tracker.alarm)
        self.log.write("end", "; ".join([reason, *notes]), reason=reason, notes=notes)


# ---- Standard input ----


class Listener:
    """Takes the blocks of a stream to a monitor."""

    def __init__(self, monitor: Monitor, evidence: Evidence | None, began: float | None) -> None:
        """`began` is when the input began, in seconds since 1970; None if it is live, so that sound
        was recorded just before it arrives.
        """
        self.monitor, self.evidence, self.known_beginning = monitor, evidence, began
        self.began = 0.0
        self.cutter: Cutter | None = None  # of the sound since something was dropped
        self.rate = SAMPLE_RATE

    def listen(self, stream: Stream, channel: int, is_stopped: Callable[[], bool]) -> None:
        """Monitor a stream until its end, or until `is_stopped` says so.

        Raises:
            UserError: If there is no sound, or reading fails.
        """
        for block in stream.blocks(channel, is_stopped):
            if block is None:
                self.monitor.set_condition(NO_INPUT)
            else:
                self.add(block)
        error = stream.error
        if self.cutter and self.cutter.end:
            self.end_stretch()
        elif not is_stopped():
            error = error or UserError("standard input: no sound; check the program that records")
        reason = "stopped" if is_stopped() else "end of the input"
        self.monitor.end(str(error or reason), stream.notes)
        if error:
            raise error

    def add(self, block: Block) -> None:
        """Add the next sound, and report the windows that are complete with it."""
        self.rate, self.began = block.rate, block.arrived - block.end / block.rate
        if self.known_beginning is not None:
            self.began = self.known_beginning
        if not self.cutter:
            self.cutter = Cutter(0, block.rate, self.monitor.hop)
        if block.start != self.cutter.end:
            self.end_stretch()
            start = self.cutter.end / block.rate
            seconds = block.start / block.rate - start
            text = f"{seconds:.1f} s of sound dropped: scoring is slower than the sound"
            self.monitor.log.write(
                "dropped", text, self.began + start, start=start, seconds=seconds
            )
            self.cutter = Cutter(block.start, block.rate, self.monitor.hop)
        if self.evidence:
            self.evidence.add(block)
        self.report(self.cutter.add(block.samples))

    def end_stretch(self) -> None:
        """Report the last window of continuous sound, or that it is too short for one."""
        assert self.cutter
        self.report(self.cutter.cut_last())
        start = self.cutter.first / self.rate
        seconds = self.cutter.end / self.rate - start
        if 0 < seconds < SECONDS:
            reason = f"{seconds:.1f} s of sound are too short for a window"
            moment = self.began + start
            self.monitor.log.write("not_scored", reason, moment, start=start, reason=reason)

    def report(self, cuts: list[Cut]) -> None:
        """Score windows and report them."""
        for cut in cuts:
            condition, score = self.monitor.score(cut.samples, self.rate)
            start = cut.start / self.rate
            self.monitor.report(Window(self.began + start, None, start, condition, score))
            if self.evidence:
                self.evidence.follow(self.monitor.tracker.alarm, self.began)


# ---- A folder ----


def watch(folder: Folder, monitor: Monitor, is_stopped: Callable[[], bool]) -> None:
    """Monitor the recordings that appear in a folder, until `is_stopped` says so."""
    last = time.monotonic()
    while not is_stopped():
        try:
            recordings = folder.find_complete()
        except UserError as error:
            monitor.set_condition(NO_INPUT, str(error))
            recordings = []
        for path, version in recordings:
            if is_stopped():
                break
            monitor_file(folder, path, version, monitor, is_stopped)
            last = time.monotonic()
        if time.monotonic() - last > FOLDER_PATIENCE and monitor.condition != NO_INPUT:
            monitor.set_condition(NO_INPUT)
        time.sleep(POLL)
    monitor.end("stopped", [])


def monitor_file(
    folder: Folder,
    path: Path,
    version: Version,
    monitor: Monitor,
    is_stopped: Callable[[], bool],
) -> None:
    """Score a recording, and report its windows. Nothing is reported if the monitor is stopped, or
    if the recording changes meanwhile; then it will be found again.
    """
    windows, problem = [], ""
    try:
        for window in score_file(path, version, monitor):
            windows.append(window)
            if is_stopped():
                return
    except UserError as error:
        problem = str(error).removeprefix(f"{path}: ")
    has_changed = find_version(path) != version
    if has_changed:
        problem = "has changed while it was scored, and is scored again when it is complete"
    if problem:
        monitor.log.write("not_scored", problem, file=str(path), reason=problem)
        if not has_changed:
            folder.remember(path, version)  # a new start tries it again
        return
    for window in windows:
        monitor.report(window)
    try:
        folder.add(path, version)
    except OSError as error:
        reason = explain(error, folder.list)
        text = f"{reason}; after a new start the file is scored again"
        monitor.log.write("list_failed", text, file=str(path), reason=reason)


def score_file(path: Path, version: Version, monitor: Monitor) -> Iterator[Window]:
    """Score the windows of a recording, whose last change was its end."""
    windows = monitor.model.windows
    starts = check_recording(path, windows).starts
    began = version.changed / 1e9 - starts[-1] - SECONDS
    samples = np.empty(N_SAMPLES, dtype=np.int16)
    for start in starts:
        read_recording(path, samples, start, windows.channel)
        condition, score = monitor.score(samples, SAMPLE_RATE)
        yield Window(began + start, str(path), start, condition, score)
