"""Look back on the days of a monitor: windows above the threshold, and alarms.

    python monitor_days.py log.jsonl.1 log.jsonl
    python monitor_days.py log.jsonl --picture day.png --day 2026-11-28
    python monitor_days.py log.jsonl --threshold 0.9 --alarm_windows 5 --alarm_span 8

The logs are files of lines from `monitor.py --json`, the oldest first. Each day has a row:

    starts     of the monitor
    windows    that were scored
    share      of them above the threshold; if it grows over days, then machine, microphone or room
               have changed
    median     of the scores
    level      lowest threshold at which the day has no alarm, with this rule
    threshold
    rule       an alarm is so many of so many consecutive windows above the threshold
    alarms     that began on the day
    in alarm   time between the beginnings and the ends of these alarms
    unscored   windows that were silent, clipped or not finite, and recordings that were not scored
    dropped    seconds of sound

Alarms and levels follow from the scores, with the threshold and the rule of the monitor or with
those that are given, so that others can be tried out. The picture shows the scores of a day, with
their range and their median in parts of the day, those above the threshold, and the alarms.

Requires numpy, soundfile and, of this project, alarms.py, audio.py, command_line.py, errors.py and
formats.py, which may also lie beside this file; for the picture also matplotlib.
"""

import contextlib
import json
import math
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from alarms import Alarm, AlarmRule, AlarmTracker, find_level, format_time
from command_line import OneLineParser
from errors import UserError, explain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, RED = "#0072B2", "#D55E00"
COLUMNS = (
    *("starts", "windows", "share", "median", "level", "threshold", "rule"),
    *("alarms", "in alarm", "unscored", "dropped"),
)
WIDTH = 9  # characters of a column
PARTS = 96  # of a day in the picture


@dataclass
class Day:
    """What a monitor printed on a day.

    Attributes:
        moments: When each window starts.
        scores: Of the windows; NaN for one that was not scored.
        threshold, rule: The last ones.
        alarms: Those that begin on the day. Their times are in seconds since 1970.
        n_starts: How often the monitor was started.
        n_unscored: Recordings that were not scored.
        dropped: Seconds of sound.
    """

    moments: list[datetime] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    threshold: float = math.nan
    rule: AlarmRule = AlarmRule(1, 1)
    alarms: list[Alarm] = field(default_factory=list)
    n_starts: int = 0
    n_unscored: int = 0
    dropped: float = 0.0


class Days:
    """The days of a monitor by date, which grow with each event."""

    def __init__(self, options: Namespace) -> None:
        """Use threshold and rule of the options in place of those of the monitor."""
        self.options = options
        self.by_date: dict[str, Day] = {}
        self.tracker: AlarmTracker | None = None
        self.zone: tzinfo | None = None  # of the last window

    def add(self, event: dict[str, Any]) -> None:
        """Add an event."""
        name, date = event["event"], event["time"][:10]
        if name not in ("start", "window", "dropped", "not_scored"):
            return
        day = self.by_date.setdefault(date, Day())
        if name == "start":
            day.n_starts += 1
            self.start(event)
        elif name == "dropped":
            day.dropped += event["seconds"]
        elif name == "not_scored":
            day.n_unscored += 1
        else:
            self.add_window(day, event)
        if self.tracker:
            day.threshold, day.rule = self.tracker.threshold, self.tracker.rule

    def add_window(self, day: Day, event: dict[str, Any]) -> None:
        """Add a window to its day.

        Raises:
            UserError: If the start of the monitor, which has the threshold, is missing.
        """
        if not self.tracker:
            raise UserError(
                "the logs begin with a window, and the start of the monitor is missing, which has "
                "the threshold; give the log before them, too"
            )
        score = math.nan if event["score"] is None else event["score"]
        moment = datetime.fromisoformat(event["time"])
        self.zone = moment.tzinfo
        day.moments.append(moment)
        day.scores.append(score)
        self.add_alarm(self.tracker.add(moment.timestamp(), score))

    def start(self, event: dict[str, Any]) -> None:
        """Begin with a monitor that was started (again).

        Raises:
            UserError: If no windows can meet the rule.
        """
        given = self.options
        threshold = event["threshold"] if given.threshold is None else given.threshold
        n_above = event["alarm_windows"] if given.alarm_windows is None else given.alarm_windows
        span = event["alarm_span"] if given.alarm_span is None else given.alarm_span
        rule = AlarmRule(n_above, span)
        if not 1 <= rule.n_above <= rule.span:
            raise UserError(
                f"an alarm cannot be {rule.n_above} of {rule.span} windows; change --alarm_windows "
                "or --alarm_span"
            )
        self.finish()
        self.tracker = AlarmTracker(rule, threshold)

    def finish(self) -> None:
        """Add the alarm that is not over, if there is one."""
        self.add_alarm(self.tracker.alarm if self.tracker else None)

    def add_alarm(self, alarm: Alarm | None) -> None:
        """Add an alarm, if there is one, to the day on which it began."""
        if alarm:
            began = datetime.fromtimestamp(alarm.start, self.zone)
            self.by_date.setdefault(began.date().isoformat(), Day()).alarms.append(alarm)


def read_logs(paths: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the events of logs, each with its place. Lines that are not JSON, such as the last one
    of a monitor that was killed, are left out.
    """
    for path in paths:
        try:
            with path.open() as file:
                for number, line in enumerate(file, 1):
                    with contextlib.suppress(json.JSONDecodeError):
                        yield f"{path}, line {number}", json.loads(line)
        except OSError as error:
            raise UserError(explain(error, path)) from None
        except UnicodeError:
            raise UserError(f"{path}: not a log; give the lines of monitor.py --json") from None


def print_days(days: dict[str, Day]) -> None:
    """Print a row for each day."""
    print("day       ", *(column.rjust(WIDTH) for column in COLUMNS))
    for date, day in days.items():
        print(date, *(cell.rjust(WIDTH) for cell in describe(day)))


def describe(day: Day) -> list[str]:
    """Return the cells of a day, for COLUMNS."""
    scores = np.array(day.scores)
    scored = scores[~np.isnan(scores)]
    share = median = level = "-"
    if len(scored):
        share = f"{(scored > day.threshold).mean():.2%}"
        median = f"{np.median(scored):.4g}"
        level = round_up(find_level(np.nan_to_num(scores, nan=-np.inf), day.rule))
    seconds = sum(alarm.end - alarm.start for alarm in day.alarms)
    return [
        str(day.n_starts),
        str(len(scored)),
        share,
        median,
        level,
        f"{day.threshold:.4g}",
        f"{day.rule.n_above}/{day.rule.span}",
        str(len(day.alarms)),
        format_time(round(seconds)),
        str(len(scores) - len(scored) + day.n_unscored),
        f"{day.dropped:.0f}",
    ]


def round_up(level: float) -> str:
    """Format a level with four digits, rounded up: with a lower threshold there is an alarm."""
    if level <= 0:
        return f"{level:.4g}"
    unit = 10.0 ** (math.floor(math.log10(level)) - 3)
    return f"{math.ceil(level / unit - 1e-9) * unit:.4g}"


def draw_day(date: str, days: dict[str, Day], path: Path) -> None:
    """Draw the scores of a day, its threshold, and the alarms of all days that reach into it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"--picture needs matplotlib ({error}); pip install matplotlib") from None
    day = days[date]
    first = day.moments[0]
    midnight = first.timestamp() - 3600 * first.hour - 60 * first.minute - first.second
    hours = (np.array([moment.timestamp() for moment in day.moments]) - midnight) / 3600
    scores = np.array(day.scores)
    drawn = Figure(figsize=(7.2, 2.4), dpi=130, layout="constrained")
    axis = drawn.subplots()
    for number, alarm in enumerate(x for other in days.values() for x in other.alarms):
        begin, end = ((second - midnight) / 3600 for second in (alarm.start, alarm.end))
        axis.axvspan(begin, end, color=RED, alpha=0.3, label=None if number else "alarm")
    axis.axhline(day.threshold, color="black", linewidth=0.8, linestyle="--", label="threshold")
    is_scored, is_above = ~np.isnan(scores), scores > day.threshold
    draw_ranges(axis, hours[is_scored], scores[is_scored])
    axis.scatter(hours[is_above], scores[is_above], s=3, color=RED, linewidths=0, label="above it")
    axis.set(ylabel="score")
    axis.set_title(date, loc="left", fontsize=9)
    axis.set_xlim(hours[0], hours[-1])
    if hours[-1] - hours[0] > 12:
        axis.set(xlim=(0, 24), xticks=range(0, 25, 3))
    axis.xaxis.set_major_formatter(lambda hour, _: f"{hour // 1:.0f}:{hour % 1 * 60:02.0f}")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False, fontsize=7)
    try:
        drawn.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None


def draw_ranges(axis: "Axes", hours: np.ndarray, scores: np.ndarray) -> None:
    """Draw the range of the scores, and their median, in up to PARTS parts of a day."""
    parts = [part for part in np.array_split(np.arange(len(hours)), PARTS) if len(part)]
    if not parts:
        return
    middles = [hours[part].mean() for part in parts]
    lowest, median, highest = np.transpose([np.quantile(scores[x], (0, 0.5, 1)) for x in parts])
    axis.fill_between(middles, lowest, highest, color=BLUE, alpha=0.3, linewidth=0)
    axis.plot(middles, median, color=BLUE, linewidth=0.8, label="median")


def number(text: str) -> float:
    """Convert an option that is a number."""
    if not math.isfinite(float(text)):
        raise ValueError
    return float(text)


def main() -> None:
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("logs", nargs="+", type=Path, metavar="LOG", help="lines from monitor.py --json")
    add("--threshold", type=number, help="another threshold (default: that of the monitor)")
    add(
        "--alarm_windows",
        type=int,
        help="windows above the threshold that make an alarm (default: as in the monitor)",
    )
    add(
        "--alarm_span",
        type=int,
        help="consecutive windows among which they are (default: as in the monitor)",
    )
    add("--picture", metavar="FILE.png", type=Path, help="draw a day")
    add("--day", metavar="DATE", help="day to draw, such as 2026-11-28 (default: the last)")
    options = parser.parse_args()
    if options.day and not options.picture:
        raise UserError("--day has no effect without --picture; leave it out")
    days = Days(options)
    for place, event in read_logs(options.logs):
        try:
            days.add(event)
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{place}: not a line from monitor.py --json") from None
    days.finish()
    if not days.by_date:
        raise UserError(f"{options.logs[0]}: no lines of monitor.py --json; name another file")
    print_days(days.by_date)
    if options.picture:
        dates = [date for date, day in days.by_date.items() if day.moments]
        date = options.day or max(dates, default="")
        if date not in dates:
            raise UserError(f"--day {date}: no windows; days are {', '.join(dates) or 'missing'}")
        draw_day(date, days.by_date, options.picture)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
