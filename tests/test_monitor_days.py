"""examples/monitor_days.py: what a monitor printed, day by day."""

import json
import sys
from datetime import datetime, timedelta
from pathlib import Path

import matplotlib.image
import pytest

from errors import UserError
from examples import monitor_days

RULE = {"alarm_windows": 3, "alarm_span": 5}
MIDNIGHT = datetime.fromisoformat("2026-11-28T00:00:00+01:00")


def write_log(path: Path, *events: dict) -> Path:
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def start(threshold: float = 1.0, day: int = 28) -> dict:
    moment = MIDNIGHT.replace(day=day).isoformat()
    return {"time": moment, "event": "start", "threshold": threshold, **RULE}


def windows(seconds: float, *scores: float | None) -> list[dict]:
    """Return windows that follow midnight by some seconds."""
    rows = []
    for number, score in enumerate(scores):
        moment = MIDNIGHT + timedelta(seconds=seconds + 5 * number)
        rows.append({"time": moment.isoformat("T", "milliseconds"), "event": "window"})
        rows[-1] |= {"start": 0.0, "score": score, "decision": ""}
    return rows


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*words) -> list[list[str]]:
        monkeypatch.setattr(sys, "argv", ["monitor_days.py", *map(str, words)])
        monitor_days.main()
        return [line.split() for line in capsys.readouterr().out.splitlines()[1:]]

    return call


def test_a_row_for_each_day(tmp_path, run):
    before_midnight = 24 * 3600 - 10
    log = write_log(
        tmp_path / "log.jsonl",
        start(),
        *windows(0, 0, 2, 3, None, 4, 0, 0, 0, 0),
        {"time": "2026-11-28T09:00:00+01:00", "event": "dropped", "seconds": 12.4},
        {"time": "2026-11-30T09:00:00+01:00", "event": "condition", "condition": "silent"},
        {"time": "2026-11-28T09:00:00+01:00", "event": "not_scored", "reason": "empty"},
        *windows(before_midnight, 5, 6, 7, 0.5),
        start(2.0, day=29),
        *windows(before_midnight + 100, 3, 1),
    )
    with log.open("a") as file:
        file.write('{"time": "2026-')
    assert run(log) == [
        ["2026-11-28", "1", "10", "50.00%", "1", "2", "1", "3/5", "2", "0:00:45", "2", "12"],
        ["2026-11-29", "1", "4", "50.00%", "2", "1", "2", "3/5", "0", "0:00:00", "0", "0"],
    ]
    assert run(log, "--threshold", "3")[0][8:10] == ["1", "0:00:20"]
    assert run(log, "--alarm_windows", "1", "--alarm_span", "1")[1][8:10] == ["1", "0:00:10"]


def test_there_is_no_alarm_at_the_level_of_a_day(tmp_path, run):
    scores = [0.3, 0.9, 0.8, 0.1, 0.7, 0.2, 0.75, 0.72, 0.1, 0.6]
    log = write_log(tmp_path / "log.jsonl", start(), *windows(0, *scores))
    level = run(log)[0][5]
    assert run(log, "--threshold", level)[0][8] == "0"
    assert run(log, "--threshold", float(level) - 0.001)[0][8] == "1"


def test_a_picture(tmp_path, run):
    log = write_log(tmp_path / "log.jsonl", start(), *windows(0, 0, 2, 3, 4, None, 0))
    run(log, "--picture", tmp_path / "day.png", "--day", "2026-11-28")
    height, width, _ = matplotlib.image.imread(tmp_path / "day.png").shape
    assert (width, height) == (936, 312)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["none.jsonl"], "none.jsonl: No such file or directory; check the path"),
        (["empty.jsonl"], "empty.jsonl: no lines of monitor.py --json; name another file"),
        (["bytes.jsonl"], "bytes.jsonl: not a log; give the lines of monitor.py --json"),
        (["tail.jsonl"], "the logs begin with a window, and the start of the monitor is missing"),
        (["other.jsonl"], "other.jsonl, line 1: not a line from monitor.py --json"),
        (["log.jsonl", "--alarm_windows", "0"], "an alarm cannot be 0 of 5 windows; change"),
        (["log.jsonl", "--threshold", "nan"], "argument --threshold: invalid number value: 'nan'"),
        (["log.jsonl", "--day", "2026-11-28"], "--day has no effect without --picture"),
        (["log.jsonl", "--alarm_windows", "6"], "an alarm cannot be 6 of 5 windows; change"),
        (
            ["log.jsonl", "--picture", "x.png", "--day", "1"],
            "--day 1: no windows; days are 2026",
        ),
        (["log.jsonl", "--picture", "x.doc"], "x.doc: Format 'doc' is not supported"),
    ],
)
def test_errors(words, reason, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    write_log(Path("tail.jsonl"), *windows(0, 1.0))
    Path("other.jsonl").write_text("5")
    Path("bytes.jsonl").write_bytes(b"\xff")
    write_log(Path("log.jsonl"), start(), *windows(0, 1.0, 2.0))
    with pytest.raises(UserError, match=f"^{reason}"):
        run(*words)
