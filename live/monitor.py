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
from live.stream import Block, Clock, Stream
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
    """A window of sound that was looked at."""

    start: float  # seconds, in the order of the windows
    moment: float  # at which it starts, in seconds since 1970
    file: str | None  # None: standard input
    second: float  # of the input or the file, at which it starts
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
                f"{model.path}: no threshold for {self.name}; hold out more recordings or use "
                "score.py --calibrate, and export again"
            )
        self.threshold = threshold
        self.tracker = AlarmTracker(model.rule, threshold)
        self.condition = SOUND
        self.last: Window | None = None

    @property
    def hop(self) -> float:
        """The seconds between the starts of windows."""
        assert self.model.windows.hop is not None, "a file from export.py has all windows"
        return self.model.windows.hop

    def begin(self) -> None:
        """Print what is monitored."""
        rule = self.model.rule
        self.log.write(
            "start",
            f"{self.name}: an alarm is {rule.n_above} of {rule.span} windows above "
            f"{self.threshold:.6g}",
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
        place = window.moment, window.file, window.second
        self.set_condition(window.condition, *place)
        score, decision, shown = None, window.condition, "-"
        if window.condition == SOUND:
            score, shown = window.score, f"{window.score:.6g}"
            decision = "anomalous" if score > self.threshold else "normal"
        self.log.write("window", f"{shown}\t{decision}", *place, score=score, decision=decision)
        self.last = window
        before = self.tracker.alarm
        ended = self.tracker.add(window.start, window.score)
        if ended:
            self.end_alarm(ended)
        elif self.tracker.alarm and not before:
            self.begin_alarm(self.tracker.alarm)

    def set_condition(
        self,
        condition: str,
        moment: float | None = None,
        file: str | None = None,
        start: float | None = None,
        reason: str = "",
    ) -> None:
        """Print the condition of the sound if it has changed."""
        if condition != self.condition:
            text, fields = ADVICE[condition], {"condition": condition}
            if reason:
                text, fields = f"{text} ({reason})", fields | {"reason": reason}
            self.log.write("condition", text, moment, file, start, **fields)
        self.condition = condition

    # ---- Alarms ----

    def begin_alarm(self, alarm: Alarm) -> None:
        rule = self.model.rule
        self.log.write(
            "alarm",
            f"ALARM: {rule.n_above} of {rule.span} windows lie above {self.threshold:.6g}, the "
            f"highest with {alarm.score:.6g}",
            self.find_moment(alarm.start),
            start=self.find_second(alarm.start),
            score=alarm.score,
        )

    def end_alarm(self, alarm: Alarm) -> None:
        seconds = alarm.end - alarm.start
        self.log.write(
            "alarm_end",
            f"the alarm of {format_time(seconds)} is over, highest score {alarm.score:.6g}",
            self.find_moment(alarm.end),
            start=self.find_second(alarm.end),
            seconds=seconds,
            score=alarm.score,
        )

    def find_moment(self, start: float) -> float:
        """Return when a second in the order of the windows was, in seconds since 1970."""
        assert self.last
        return self.last.moment + start - self.last.start

    def find_second(self, start: float) -> float | None:
        """Return the second of standard input; None for recordings in a folder."""
        return start if self.last and self.last.file is None else None

    def end(self, reason: str, notes: list[str]) -> None:
        """Print the end of an alarm that is not over, and that of the monitor."""
        if self.tracker.alarm:
            self.end_alarm(self.tracker.alarm)
        self.log.write("end", "; ".join([reason, *notes]), reason=reason, notes=notes)


# ---- Standard input ----


class Listener:
    """Takes the blocks of a stream to a monitor."""

    def __init__(self, monitor: Monitor, evidence: Evidence | None, began: float | None) -> None:
        """`began` is when the input began, in seconds since 1970, if that is known."""
        self.monitor, self.evidence, self.clock = monitor, evidence, Clock(began)
        self.cutter: Cutter | None = None  # of the sound since something was dropped
        self.rate = SAMPLE_RATE

    def listen(self, stream: Stream, channel: int, is_stopped: Callable[[], bool]) -> None:
        """Monitor a stream until its end, or until `is_stopped` says so.

        Raises:
            UserError: If there is no sound.
        """
        for block in stream.blocks(channel, is_stopped):
            if block is None:
                self.monitor.set_condition(NO_INPUT)
            else:
                self.add(block)
        if self.cutter and self.cutter.end:
            self.finish()
        elif not is_stopped():
            raise UserError("standard input: no sound; check the program that records")
        self.monitor.end("stopped" if is_stopped() else "end of the input", stream.notes)

    def add(self, block: Block) -> None:
        """Add the next sound, and report the windows that are complete with it."""
        self.rate = block.rate
        self.clock.add(block)
        if not self.cutter:
            self.cutter = Cutter(0, block.rate, self.monitor.hop)
        if block.start != self.cutter.end:
            self.finish()
            start = self.cutter.end / block.rate
            seconds = block.start / block.rate - start
            self.monitor.log.write(
                "dropped",
                f"{seconds:.1f} s of sound dropped: scoring is slower than the sound",
                self.clock.find_moment(start),
                start=start,
                seconds=seconds,
            )
            self.cutter = Cutter(block.start, block.rate, self.monitor.hop)
        if self.evidence:
            self.evidence.add(block)
        self.report(self.cutter.add(block.samples))

    def finish(self) -> None:
        """Report the last window of continuous sound, or that it is too short for one."""
        assert self.cutter
        self.report(self.cutter.finish())
        start = self.cutter.first / self.rate
        seconds = self.cutter.end / self.rate - start
        if 0 < seconds < SECONDS:
            text = f"{seconds:.1f} s of sound are too short for a window"
            moment = self.clock.find_moment(start)
            self.monitor.log.write("too_short", text, moment, start=start, seconds=seconds)

    def report(self, cuts: list[Cut]) -> None:
        """Score windows and report them."""
        for cut in cuts:
            condition, score = self.monitor.score(cut.samples, self.rate)
            start = cut.start / self.rate
            moment = self.clock.find_moment(start)
            window = Window(start, moment, None, start, condition, score)
            self.monitor.report(window)
            if self.evidence:
                alarm = self.monitor.tracker.alarm
                moment = self.monitor.find_moment(alarm.start) if alarm else 0.0
                self.evidence.follow(alarm, moment)


# ---- A folder ----


def watch(folder: Folder, monitor: Monitor, is_stopped: Callable[[], bool]) -> None:
    """Monitor the recordings that appear in a folder, until `is_stopped` says so."""
    last = time.monotonic()
    while not is_stopped():
        recordings = []
        try:
            recordings = folder.find_complete()
        except UserError as error:
            monitor.set_condition(NO_INPUT, reason=str(error))
        for path, version in recordings:
            monitor_file(folder, path, version, monitor, is_stopped)
            last = time.monotonic()
        if time.monotonic() - last > FOLDER_PATIENCE:
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
    if find_version(path) != version:
        problem = "has changed while it was scored, and is scored again when it is complete"
        monitor.log.write("not_scored", problem, file=str(path), reason=problem)
        return
    for window in windows:
        monitor.report(window)
    if problem:
        monitor.log.write("not_scored", problem, file=str(path), reason=problem)
    try:
        folder.add(path, version)
    except OSError as error:
        text = f"{explain(error, folder.list)}; after a new start the file is scored again"
        monitor.log.write("list_failed", text, file=str(path), reason=str(error))


def score_file(path: Path, version: Version, monitor: Monitor) -> Iterator[Window]:
    """Score the windows of a recording. It was changed last when it ended."""
    windows = monitor.model.windows
    starts = check_recording(path, windows).starts
    began = version.changed / 1e9 - starts[-1] - SECONDS
    samples = np.empty(N_SAMPLES, dtype=np.int16)
    for start in starts:
        read_recording(path, samples, start, windows.channel)
        condition, score = monitor.score(samples, SAMPLE_RATE)
        moment = began + start
        yield Window(moment, moment, str(path), start, condition, score)
