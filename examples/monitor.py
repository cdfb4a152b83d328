"""Listen to a machine, and say when it sounds wrong.

    arecord -q -t raw -f S16_LE -r 16000 -c 1 | python monitor.py MODEL.onnx MACHINE_TYPE MACHINE_ID
    python monitor.py press.onnx press line-3 --watch recordings/ --json >> log.jsonl
    python monitor.py press.onnx press line-3 --start "2026-11-28 06:00" < saturday.wav

The sound arrives on standard input, as raw samples or as a WAV file, or in the recordings of a
folder. It is scored in windows of 10 s, as by score.py. A line is printed for each window: the time
and the second of the input at which it starts, score, decision. An alarm begins when 3 of 5
consecutive windows lie above the threshold (or what the rule in the model's file says). Its line is
printed with the third of them, and has the time of the first. The alarm is over when the four
windows behind its last one have not extended it. An input of fewer than three windows has no alarm.

A window is not scored if it is silent (its samples do not change for a second), clipped (more than
1 percent of its samples are at full scale) or not finite. For alarms it counts as one that does not
lie above the threshold. A line says when this begins and when there is sound again, and also when
no sound arrives for 10 s.

Reading does not wait for scoring. If a minute of sound waits, it is dropped, and a line says how
much; windows before and behind it still count as consecutive. A file waits, and so does a pipe that
is faster than real time. Times are those at which sound arrives, unless --start says when the input
began; a file begins when it is read.

--watch scores the recordings in a folder, without the folders in it, once each, when they have not
changed for 10 s. A replaced file is scored again. All windows are one sequence: of recordings of
10 s, 3 of 5 make an alarm. A recording that cannot be scored is named with the reason, and again
after a new start. A hidden file in the folder lists what was scored, so that a monitor that is
started again goes on where it was.

--evidence keeps the sound of each alarm from standard input as a FLAC file, from 30 s before the
alarm until it is known to be over.

With --json, each line is an object with `time`, `event` and, where they apply, `start` (seconds)
and `file`. The events are

    start, end          of the monitor, with the threshold and the rule, and with the reason
    window              with `score` and `decision`: normal, anomalous or, without a score, the
                        condition
    condition           has changed to sound, silent, clipped, not finite or no input
    alarm, alarm_end    with the highest score so far
    dropped             `seconds` of sound
    not_scored          a recording, or sound that is too short, with the `reason`
    list_failed         the list of recordings cannot be written
    evidence            the `file` of an alarm; evidence_end: it ends before the alarm;
                        evidence_removed: it was removed

SIGTERM and Ctrl-C end the monitor once the sound that has arrived is scored; a second one ends it
at once. The exit status is 0 then and at the end of the input, and 2 after an error. Requires Linux
or macOS, onnxruntime, numpy, soundfile and, for other sample rates than 16 kHz, soxr; and of this
project the folder live and alarms.py, audio.py, command_line.py, errors.py, formats.py and
names.py, which may also lie beside this file.
"""

import argparse
import io
import os
import re
import signal
import stat
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from audio import SAMPLE_RATE, SECONDS
from command_line import OneLineParser
from errors import UserError
from live.evidence import Evidence
from live.folder import Folder
from live.log import Log
from live.model import load_onnx
from live.monitor import Listener, Monitor, watch
from live.stream import FORMATS, Stream, make_format

MEGABYTES = 500
STREAM_OPTIONS = ("rate", "channels", "format", "start", "evidence", "megabytes")  # and not --watch


def main() -> None:
    options = parse_options()
    signals: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        if signals:
            os._exit(128 + number)
        signals.append(number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    # Reading begins first: a microphone does not wait until the model is loaded.
    stream = None if options.watch else open_stream(options)
    model = load_onnx(options.model, n_threads=1)
    (number,) = model.find_machines(options.machine_type, options.machine_id)
    monitor = Monitor(model, number, Log(options.json))
    if stream:
        listen(stream, monitor, options, lambda: bool(signals))
    else:
        folder = Folder(options.watch, model.machines[number], options.scored)
        monitor.begin()
        watch(folder, monitor, lambda: bool(signals))


def open_stream(options: Namespace) -> Stream:
    """Begin to read standard input. A file begins now, unless --start is given."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("standard input: no sound; give it with | or <, or use --watch FOLDER")
    os.set_blocking(0, True)  # a pipe from another program may be set otherwise
    is_recording = stat.S_ISREG(os.fstat(0).st_mode)
    if is_recording and options.start is None:
        options.start = time.time()
    raw = make_format(options.format, options.rate, options.channels)
    return Stream(io.FileIO(0, closefd=False), raw, is_recording)


def listen(
    stream: Stream, monitor: Monitor, options: Namespace, is_stopped: Callable[[], bool]
) -> None:
    """Monitor standard input."""
    evidence = None
    if options.evidence:
        rule, machine = monitor.model.rule, monitor.model.machines[monitor.machine]
        delay = SECONDS + monitor.hop * rule.span
        limit = options.megabytes * 1e6
        evidence = Evidence(options.evidence, machine, limit, delay, monitor.log)
    monitor.begin(options.start)
    try:
        Listener(monitor, evidence, options.start).listen(
            stream, monitor.model.windows.channel, is_stopped
        )
    finally:
        if evidence:
            evidence.close()


def parse_options() -> Namespace:
    """Parse the command line.

    Raises:
        UserError: For options that are wrong, or have no effect.
    """
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL.onnx", help="file from export.py")
    add("machine_type", help="machine type")
    add("machine_id", help="machine ID")
    add("--rate", type=positive, help=f"sample rate of raw samples in Hz (default: {SAMPLE_RATE})")
    add("--channels", type=positive, help="number of channels of raw samples (default: 1)")
    add("--format", choices=FORMATS, help="format of raw samples (default: S16_LE)")
    add("--start", type=moment, help="time at which the input began, if it is a recording")
    add("--watch", metavar="FOLDER", type=Path, help="score the recordings in this folder")
    add(
        "--scored",
        metavar="FILE",
        type=Path,
        help="list of scored recordings (default: a hidden file in the folder)",
    )
    add("--json", action="store_true", help="print JSON")
    add("--evidence", metavar="FOLDER", type=Path, help="keep the sound of alarms in this folder")
    add(
        "--megabytes",
        type=positive,
        help=f"limit of the evidence of the machine; the oldest is removed (default: {MEGABYTES})",
    )
    options = parser.parse_args()
    if not options.machine_id:
        raise UserError("the machine ID is empty; name one")
    unused = STREAM_OPTIONS if options.watch else ("scored",)
    reason = "with --watch" if options.watch else "without --watch"
    for name in unused:
        if getattr(options, name) is not None:
            raise UserError(f"--{name} has no effect {reason}; leave it out")
    if options.megabytes and not options.evidence:
        raise UserError("--megabytes has no effect without --evidence; leave it out")
    defaults = {"rate": SAMPLE_RATE, "channels": 1, "format": "S16_LE", "megabytes": MEGABYTES}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def positive(text: str) -> int:
    """Convert an option that is a whole number from 1 to a billion."""
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def moment(text: str) -> float:
    """Convert an option that is a time to seconds since 1970."""
    try:
        given = datetime.fromisoformat(text)
        if not 1970 < given.year < 9000:
            raise ValueError
        return given.timestamp()
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text} is not a time; write it as 2026-11-28T06:00"
        ) from None


if __name__ == "__main__":
    status = 0
    try:
        if sys.stdout is None:
            raise UserError("standard output is closed; give a place for the lines")
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        main()
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        status = 2
    os._exit(status)  # lines are printed already, and a thread may still wait for sound
