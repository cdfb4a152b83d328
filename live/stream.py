"""Sound that arrives on standard input: raw samples, or a WAV file, whose header is read.

A thread reads it into a queue, so that reading does not wait for scoring: a microphone does not
wait either. If the queue is full, the sound in it is dropped. A recording does wait, and so does
any source that is faster than real time.
"""

import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from io import RawIOBase
from typing import NamedTuple

import numpy as np

from audio import check_format
from errors import UserError, give_reason
from formats import (
    FLOAT,
    PCM,
    Format,
    convert,
    find_signature,
    is_unknown_size,
    name_codec,
    parse_format,
)

QUEUE_SECONDS = 60  # of sound that may wait for scoring
PATIENCE = 10  # seconds without sound after which there is no input
WAIT = 1.0  # seconds until a monitor that waits for sound looks whether it is stopped
FASTER = 0.9  # a source is faster than real time if sound arrives in this part of its length
READ_SIZE = 2**16  # bytes that are read at once
LONGEST_CHUNK = 2**20  # bytes of a chunk in front of the audio of a WAV file
# Encodings and bytes per sample, by the names that arecord gives them
FORMATS = {"S16_LE": (PCM, 2), "S24_3LE": (PCM, 3), "S32_LE": (PCM, 4), "FLOAT_LE": (FLOAT, 4)}
# Formats that libsndfile knows, by their first four bytes
OTHERS = {b"fLaC": "FLAC", b"RF64": "RF64", b"FORM": "AIFF", b"ID3\x03": "MP3", b"ID3\x04": "MP3"}


class Block(NamedTuple):
    """Sound that was read at once.

    Its samples are int16, or float64 in [-1, 1): `(n, channels)` in the queue, `(n,)` behind it.
    """

    samples: np.ndarray
    rate: int  # Hz
    start: int  # number of the first sample in the input
    arrived: float  # seconds since 1970
    tick: float  # when it arrived, in seconds of a clock that nobody sets

    @property
    def end(self) -> int:
        """The number of the sample behind the last one."""
        return self.start + len(self.samples)


def make_format(name: str, rate: int, channels: int) -> Format:
    """Return the format of raw samples, whose name is one of FORMATS."""
    encoding, size = FORMATS[name]
    frame_size = size * channels
    return Format(encoding, channels, rate, rate * frame_size, frame_size, 8 * size)


class Stream:
    """Sound that a thread reads from a file.

    Attributes:
        notes: At the end, what of the input was no sound or is missing.
        error: At the end, why reading failed, if it did.
    """

    def __init__(self, file: RawIOBase, raw: Format, is_recording: bool = False) -> None:
        """Begin to read. `raw` is the format if there is no WAV header. A recording waits for
        scoring, however slow this is.
        """
        self.file, self.raw, self.is_recording = file, raw, is_recording
        self.queue: deque[Block] = deque()
        self.n_queued = 0  # samples of each channel
        self.is_over = self.is_stopped = False
        self.notes: list[str] = []
        self.error: UserError | None = None
        self.changed = threading.Condition()  # notified when one of these has changed
        threading.Thread(target=self.run, daemon=True).start()

    def blocks(self, channel: int, is_stopped: Callable[[], bool]) -> Iterator[Block | None]:
        """Yield the blocks of a channel in order, the last one without samples, and None now and
        then while there is no input. Once `is_stopped` says so, nothing more is read, and what is
        in the queue is yielded.

        Raises:
            UserError: If the input lacks the channel.
        """
        last = time.monotonic()
        while True:
            block, is_last = self.take(is_stopped())
            if block:
                last = time.monotonic()
                check_channel(block, channel)
                yield block._replace(samples=block.samples[:, channel].copy())
            elif is_last:
                return
            elif time.monotonic() - last > PATIENCE:
                yield None

    def take(self, is_stopped: bool) -> tuple[Block | None, bool]:
        """Take a block from the queue, or wait a moment for one, unless reading stops. Returns the
        block and, without one, whether none will follow.
        """
        with self.changed:
            if not (self.queue or self.is_over or is_stopped):
                self.changed.wait(WAIT)
            self.is_stopped = is_stopped
            block = self.queue.popleft() if self.queue else None
            if block:
                self.n_queued -= len(block.samples)
            self.changed.notify()
            return block, self.is_over or is_stopped

    # ---- In the thread that reads ----

    def run(self) -> None:
        """Read the input to its end."""
        error = None
        try:
            self.read()
        except UserError as reason:
            error = UserError(f"standard input: {reason}")
        except OSError as reason:
            error = UserError(f"standard input: {give_reason(reason)}")
        with self.changed:
            self.error, self.is_over = error, True
            self.changed.notify()

    def read(self) -> None:
        """Put the samples of the input into the queue."""
        form, byte_order, size, begin = read_header(self.file, self.raw)
        check_format(form.rate, form.channels, 0)
        start, rest = 0, b""
        for data in self.read_audio(begin, size):
            rest += data
            samples = convert(rest, form, byte_order)
            rest = rest[len(samples) * form.frame_size :]
            self.put(samples, form.rate, start)
            start += len(samples)
        if rest:
            self.notes.append(f"it ends within a sample: bytes left out: {len(rest)}")
        # The end of the last block shows what was dropped before it.
        self.put(convert(b"", form, byte_order), form.rate, start)

    def read_audio(self, data: bytes, size: int | None) -> Iterator[bytes]:
        """Yield the bytes of the audio: `data`, and then what the file still has, together `size`
        bytes (None: to its end).
        """
        while size != 0 and (data or (data := self.file.read(READ_SIZE) or b"")):
            audio, data = data[:size], data[len(data) if size is None else size :]
            if size is not None:
                size -= len(audio)
            yield audio
        if size:
            self.notes.append(f"it is truncated: bytes missing: {size}")
        elif size == 0 and (data or self.file.read(READ_SIZE)):
            self.notes.append("more follows the audio of its WAV header, and was left out")

    def put(self, samples: np.ndarray, rate: int, start: int) -> None:
        """Put a block into the queue. If this is full, wait, or drop the sound in it."""
        with self.changed:
            while self.is_full(rate) and self.may_wait(rate) and not self.is_stopped:
                self.changed.wait(0.1)
            if self.is_stopped:
                return
            if self.is_full(rate) and len(samples):
                self.queue.clear()
                self.n_queued = 0
            self.queue.append(Block(samples, rate, start, time.time(), time.monotonic()))
            self.n_queued += len(samples)
            self.changed.notify()

    def is_full(self, rate: int) -> bool:
        return self.n_queued >= QUEUE_SECONDS * rate

    def may_wait(self, rate: int) -> bool:
        """Whether the source can wait: a recording, or one whose sound in the queue has arrived in
        less time than it lasts.
        """
        seconds = time.monotonic() - self.queue[0].tick
        return self.is_recording or seconds < FASTER * self.n_queued / rate


def check_channel(block: Block, channel: int) -> None:
    """Raise `UserError` if sound lacks the channel."""
    try:
        check_format(block.rate, block.samples.shape[1], channel)
    except UserError as error:
        raise UserError(f"standard input: {error}") from None


def read_header(file: RawIOBase, raw: Format) -> tuple[Format, str, int | None, bytes]:
    """Read the header of a WAV file, if there is one.

    Returns the format and the byte order of the samples, the bytes of audio (None: all), and those
    that were read.

    Raises:
        UserError: If the samples are compressed, or the file has another format.
    """
    start = read_exactly(file, 12)
    byte_order = {b"RIFF": "<", b"RIFX": ">"}.get(start[:4])
    if byte_order is None or start[8:] != b"WAVE":
        name = OTHERS.get(start[:4]) or find_signature(start)
        if name:
            raise UserError(f"it is {name}, neither raw samples nor WAV; decode it first")
        return raw, "<", None, start
    form = None
    while len(header := read_exactly(file, 8)) == 8:
        name, size = struct.unpack(f"{byte_order}4sI", header)
        if name == b"data" and form:
            return form, byte_order, None if is_unknown_size(size) else size, b""
        if size > LONGEST_CHUNK:
            break
        chunk = read_exactly(file, size + size % 2)  # chunks are padded to even lengths
        if name == b"fmt ":
            form = parse_format(chunk[:40], byte_order)
            if form and not form.dtype:
                raise UserError(name_codec(form))
    raise UserError("damaged: no audio follows its WAV header")


def read_exactly(file: RawIOBase, count: int) -> bytes:
    """Read a number of bytes, or all that are left if these are fewer."""
    data = b""
    while len(data) < count and (more := file.read(count - len(data))):
        data += more
    return data
