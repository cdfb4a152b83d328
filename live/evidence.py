"""The sound of alarms, kept in a folder as FLAC files."""

import os
import re
import time
from collections import deque
from pathlib import Path

import numpy as np
import soundfile

from alarms import Alarm
from errors import UserError, explain
from live.lock import lock_file
from live.log import Log
from live.stream import Block

LEAD = 30  # seconds before an alarm
CHECKED = 10  # seconds of sound after which the size of the files is compared with the limit
TIME = "%Y-%m-%dT%H-%M-%S"  # in the names of files


class Evidence:
    """Keeps the sound of alarms, one file for each, from LEAD seconds before the alarm until it is
    known to be over. If the files of the machine become larger than the limit, the oldest are
    removed. What fails is printed, and tried again with the next alarm.
    """

    def __init__(
        self, folder: Path, machine: tuple[str, str], limit: float, delay: float, log: Log
    ) -> None:
        """Use a folder for a machine. `limit` is in bytes. `delay` is the longest time, in seconds,
        from the beginning of an alarm until it is found.

        Raises:
            UserError: If the folder cannot be written, or if another process uses it.
        """
        self.folder, self.limit, self.log = folder, limit, log
        self.prefix = "_".join(machine) + "_"
        self.memory = LEAD + delay  # seconds of sound in front of a block
        self.recent: deque[Block] = deque()
        self.n_recent = 0  # samples
        self.alarm_start: float | None = None
        self.file: soundfile.SoundFile | None = None
        self.path = folder
        self.n_unchecked = 0  # samples
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(explain(error, folder)) from None
        self.lock = lock_file(
            folder / f".{self.prefix}lock",
            f"another monitor keeps the sound of {' '.join(machine)} there",
            "choose another folder with --evidence",
        )

    def add(self, block: Block) -> None:
        """Add the next sound."""
        enough = self.memory * block.rate
        while self.recent and self.n_recent - len(self.recent[0].samples) >= enough:
            self.n_recent -= len(self.recent.popleft().samples)
        self.recent.append(block)
        self.n_recent += len(block.samples)
        self.write(block)

    def follow(self, alarm: Alarm | None, began: float) -> None:
        """Begin a file if there is a new alarm, and end it if there is none. `began` is when the
        input began, in seconds since 1970.
        """
        if alarm is None:
            self.close()
            self.alarm_start = None
        elif alarm.start != self.alarm_start:
            self.alarm_start = alarm.start
            self.open(began + alarm.start)
            for block in self.recent:
                first = round((alarm.start - LEAD) * block.rate) - block.start
                self.write(block._replace(samples=block.samples[max(0, first) :]))

    def open(self, moment: float) -> None:
        """Begin a file, named after the machine and a moment."""
        name = self.prefix + time.strftime(TIME, time.localtime(moment))
        self.path, number = self.folder / f"{name}.flac", 2
        while self.path.exists():
            self.path, number = self.folder / f"{name}_{number}.flac", number + 1
        block = self.recent[-1]
        subtype = "PCM_16" if block.samples.dtype == np.int16 else "PCM_24"
        path = os.fsencode(self.path)
        try:
            self.file = soundfile.SoundFile(path, "w", block.rate, 1, subtype, format="FLAC")
        except soundfile.SoundFileError as error:
            self.give_up(error)
            return
        self.log.write("evidence", "the sound of the alarm is kept here", file=str(self.path))

    def write(self, block: Block) -> None:
        """Write sound to the file of the alarm, if there is one."""
        if not self.file:
            return
        samples = block.samples
        if samples.dtype != np.int16:
            samples = np.nan_to_num(samples, posinf=1.0, neginf=-1.0)
        try:
            self.file.write(samples)
            self.n_unchecked += len(samples)
            if self.n_unchecked >= CHECKED * block.rate:
                self.n_unchecked = 0
                self.make_room()
        except (OSError, soundfile.SoundFileError) as error:
            self.give_up(error)

    def make_room(self) -> None:
        """Remove the oldest files of the machine while all together are larger than the limit. If
        the file of this alarm alone is larger, end it.
        """
        files = {}
        for path in self.folder.iterdir():
            if re.match(rf"{re.escape(self.prefix)}\d{{4}}-.*\.flac$", path.name):
                files[path] = path.stat()
        size = sum(status.st_size for status in files.values())
        for path in sorted(files.keys() - {self.path}, key=lambda path: files[path].st_mtime):
            if size <= self.limit:
                return
            path.unlink(missing_ok=True)
            size -= files[path].st_size
            text = "removed, since all files together have reached the limit"
            self.log.write("evidence_removed", text, file=str(path))
        if size > self.limit:
            self.end("it has reached the limit")

    def give_up(self, error: Exception) -> None:
        """Say that the sound of this alarm cannot be kept."""
        reason = explain(error) if isinstance(error, OSError) else "its disk may be full"
        self.end(f"it cannot be written: {reason}")

    def end(self, reason: str) -> None:
        """End the file before the alarm is over, and print why."""
        self.close()
        text = f"no more of this alarm is kept: {reason}"
        self.log.write("evidence_end", text, file=str(self.path), reason=reason)

    def close(self) -> None:
        """Close the file of the alarm, if there is one."""
        file, self.file = self.file, None
        try:
            if file:
                file.close()
        except soundfile.SoundFileError as error:
            self.give_up(error)
