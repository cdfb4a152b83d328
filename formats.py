"""Open a WAV or FLAC file, and read its samples.

Uncompressed WAV files are read here, after a comparison of their header with the file: libsndfile
reads a truncated or contradictory one without an error, as sound at another speed or pitch, or as
noise. It decodes the others: FLAC, which has checksums, and compressed WAV files. Needs numpy and
soundfile.
"""

import contextlib
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import soundfile

from errors import LFS_POINTER, UserError, give_reason

BLOCK_SIZE = 2**20  # samples of all channels together that are read at once

# ---- An open recording ----


class Audio:
    """A recording that is open for reading.

    Attributes:
        rate: The sample rate in Hz.
        channels: The number of channels.
        n_frames: The number of samples of each channel; None where only decoding shows it.
        states_length: Whether the header states this number.
        has_excess: Whether what seems to be more sound follows these samples.
        is_int16: Whether the samples have 16 bits.
        is_checked: Whether header and size show that all samples can be read and are finite.
    """

    rate: int
    channels: int
    n_frames: int | None
    states_length: bool
    has_excess: bool = False
    is_int16: bool
    is_checked: bool

    def skip(self, count: int) -> None:
        """Move forward by a number of frames; to the end, if there are fewer."""
        raise NotImplementedError

    def read(self, count: int) -> np.ndarray:
        """Read up to `count` frames `(n, channels)`: int16, or float64 in [-1, 1)."""
        raise NotImplementedError

    def read_blocks(self, count: int | None, first: int = BLOCK_SIZE) -> Iterator[np.ndarray]:
        """Yield the next `count` frames (None: all) block by block, since all channels together may
        not fit into memory. The first block has at most `first` frames.
        """
        largest = max(1, BLOCK_SIZE // self.channels)
        size, done = min(first, largest), 0
        while count is None or done < count:
            block = self.read(size if count is None else min(size, count - done))
            if len(block) == 0:
                return
            yield block
            done, size = done + len(block), largest

    def read_channel(self, count: int, channel: int) -> np.ndarray:
        """Read up to `count` samples of one channel."""
        blocks = [np.ascontiguousarray(x[:, channel]) for x in self.read_blocks(count)]
        return blocks[0] if len(blocks) == 1 else np.concatenate([*blocks, np.zeros(0, np.int16)])


@contextlib.contextmanager
def open_audio(path: Path) -> Iterator[Audio]:
    """Open a WAV or FLAC file for reading, a WAV file after a check of its header.

    Raises `UserError` for errors of the file, including those that occur while it is open.
    """
    try:
        if not path.is_file():
            raise UserError("unreadable: not a file")
        with path.open("rb") as file:
            header = read_wav_header(file)
            if header and header.format.dtype:
                yield Wav(file, header)
            else:
                with open_decoder(path, file, header) as decoder:
                    yield Decoded(decoder, header, file)
    except soundfile.SoundFileError as error:
        raise UserError(f"damaged: {name_reason(error)}; replace it") from None
    except OSError as error:
        raise UserError(f"unreadable: {give_reason(error)}") from None


# ---- WAV files ----

MAX_AUDIO_BYTES = 2**32 - 1
PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE  # encodings
# Dtypes of samples, by encoding and number of bytes; those of three bytes are put together.
DTYPES = {
    (PCM, 1): "u1", (PCM, 2): "i2", (PCM, 3): "u1", (PCM, 4): "i4", (FLOAT, 4): "f4",
    (FLOAT, 8): "f8",
}  # fmt: skip


class Format(NamedTuple):
    """The chunk "fmt " of a WAV file."""

    encoding: int
    channels: int
    rate: int  # Hz
    bytes_per_second: int
    frame_size: int  # bytes of one sample of all channels
    bits: int  # per sample

    @property
    def sample_size(self) -> int:
        """The bytes of a sample."""
        return self.frame_size // max(1, self.channels)

    @property
    def dtype(self) -> str | None:
        """The dtype of the samples; None if they are compressed."""
        return DTYPES.get((self.encoding, self.sample_size))


class WavHeader(NamedTuple):
    """The header of a WAV file, compared with the size of the file."""

    format: Format
    byte_order: str  # "<" or ">"
    start: int  # of the audio, in bytes
    size: int  # of the audio, in bytes
    states_size: bool
    has_excess: bool  # whether more than a second follows that is no further chunk


class Wav(Audio):
    """A WAV file with uncompressed samples."""

    def __init__(self, file: BinaryIO, header: WavHeader) -> None:
        self.file, self.format, self.byte_order = file, header.format, header.byte_order
        self.rate, self.channels = header.format.rate, header.format.channels
        self.n_frames = self.n_left = header.size // header.format.frame_size
        self.states_length, self.has_excess = header.states_size, header.has_excess
        self.is_int16 = header.format.dtype == "i2"
        self.is_checked = header.format.encoding == PCM
        file.seek(header.start)

    def skip(self, count: int) -> None:
        count = min(count, self.n_left)
        self.n_left -= count
        self.file.seek(count * self.format.frame_size, os.SEEK_CUR)

    def read(self, count: int) -> np.ndarray:
        count, frame_size = min(count, self.n_left), self.format.frame_size
        self.n_left -= count
        return convert(self.file.read(count * frame_size), self.format, self.byte_order)


def convert(data: bytes, form: Format, byte_order: str = "<") -> np.ndarray:
    """Convert the bytes of uncompressed samples to samples `(n, channels)`: int16, or float64 in
    [-1, 1). An incomplete sample at their end is left out.
    """
    values = np.frombuffer(data, "u1", len(data) // form.frame_size * form.frame_size)
    dtype = f"{byte_order}{form.dtype}"
    samples: np.ndarray
    if form.dtype == "i2":
        samples = values.view(dtype).astype(np.int16, copy=False)
    elif form.sample_size == 1:
        samples = values / 128.0 - 1.0
    elif form.encoding == FLOAT:
        samples = values.view(dtype).astype(np.float64)
    else:
        if form.sample_size == 3:
            wide = np.zeros((len(values) // 3, 4), dtype=np.uint8)
            place = slice(1, 4) if byte_order == "<" else slice(0, 3)
            wide[:, place] = values.reshape(-1, 3)
            values = wide.ravel()
        samples = values.view(f"{byte_order}i4") / 2.0**31
    return samples.reshape(-1, form.channels)


def read_wav_header(file: BinaryIO) -> WavHeader | None:
    """Read the header of a WAV file; None for a file of another format.

    Raises:
        UserError: If the file is empty or truncated, or if the header contradicts itself.
    """
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        raise UserError("empty")
    skip_tags(file)
    riff = file.read(12)
    byte_order = {b"RIFF": "<", b"RIFX": ">"}.get(riff[:4])
    if byte_order is None or riff[8:] != b"WAVE":
        return None
    form = None
    while len(header := file.read(8)) == 8:
        name, stated = struct.unpack(f"{byte_order}4sI", header)
        start = file.tell()
        if name == b"fmt ":
            form = parse_format(file.read(min(stated, 40)), byte_order)
        elif name == b"data" and form:
            size = find_audio_size(file, start, end, stated, byte_order)
            rest = start + size + size % 2
            is_long = end - rest > form.bytes_per_second
            has_excess = is_long and not has_chunks(file, rest, end, byte_order)
            return WavHeader(form, byte_order, start, size, size == stated, has_excess)
        file.seek(start + stated + stated % 2)  # chunks are padded to even lengths
    raise UserError("damaged: no audio follows its header; replace it")


def skip_tags(file: BinaryIO) -> None:
    """Move behind the ID3 tags that some programs write in front of a file."""
    start = 0
    file.seek(start)
    while (tag := file.read(10))[:3] == b"ID3" and len(tag) == 10:
        size = 0
        for byte in tag[6:]:
            size = size << 7 | byte & 0x7F
        start += 10 + size
        file.seek(start)
    file.seek(start)


def parse_format(chunk: bytes, byte_order: str) -> Format | None:
    """Parse the format chunk of a WAV file; None if it is too short.

    Raises:
        UserError: If the numbers of an uncompressed encoding contradict each other.
    """
    if len(chunk) < 16:
        return None
    form = Format(*struct.unpack(f"{byte_order}HHIIHH", chunk[:16]))
    if form.encoding == EXTENSIBLE and len(chunk) >= 26:
        form = form._replace(encoding=struct.unpack(f"{byte_order}H", chunk[24:26])[0])
    if form.encoding not in (PCM, FLOAT, EXTENSIBLE):
        return form
    if form.encoding == PCM and form.bits == 24 and form.frame_size == 4 * form.channels:
        raise UserError(
            "unreadable: 24 bits in four bytes per sample, as arecord -f S24_LE writes them; other "
            "programs put them into the upper three bytes; record with -f S16_LE or -f S32_LE, and "
            f"convert this file with `tail -c +45 IN.wav | sox -t raw -r {form.rate} -e signed "
            f"-b 32 -c {form.channels} - -b 24 OUT.flac vol 256`"
        )
    has_frame_size = form.frame_size == form.channels * ((form.bits + 7) // 8) > 0
    if not has_frame_size or form.bytes_per_second != form.rate * form.frame_size:
        raise UserError(
            f"damaged: the header contradicts itself ({form.rate} Hz, {form.channels} channels of "
            f"{form.bits} bits, {form.frame_size} bytes per frame, {form.bytes_per_second} bytes "
            "per second)"
        )
    return form


def find_audio_size(file: BinaryIO, start: int, end: int, stated: int, byte_order: str) -> int:
    """Return the number of bytes of audio from `start`: the stated one or, if the writer of the
    file did not know it, all up to its `end`.

    Raises:
        UserError: If there are fewer than a believable header states, or too many for a header.
    """
    available = end - start
    if available > MAX_AUDIO_BYTES:
        raise UserError(
            "unreadable: more audio than a WAV header can describe (4 GiB); convert it to FLAC"
        )
    if stated == 0:
        return 0 if has_chunks(file, start, end, byte_order) else available
    if stated <= available:
        return stated
    if is_unknown_size(stated):
        return available
    raise UserError(f"truncated: it has {available} of {stated} bytes of audio")


def is_unknown_size(stated: int) -> bool:
    """Whether a stated number of bytes of audio is that of a program that writes to a pipe: 0, or
    one near the largest that 31 or 32 bits hold.
    """
    return stated == 0 or min(abs(stated - 2**31), 2**32 - stated) < 2**16


def has_chunks(file: BinaryIO, start: int, end: int, byte_order: str) -> bool:
    """Whether a file consists of chunks from byte `start` to its `end`; true where nothing but the
    padding of a chunk follows.
    """
    while start + 8 <= end:
        file.seek(start)
        name, length = struct.unpack(f"{byte_order}4sI", file.read(8))
        if not all(32 <= character < 127 for character in name):
            return False
        start += 8 + length + length % 2
    return end - 1 <= start <= end + 1


# ---- Other files, which libsndfile decodes ----

# Encodings of which it counts the samples; of others it estimates their number
COUNTED = ("PCM_S8", "PCM_16", "PCM_24", "ALAW", "ULAW")
UNKNOWN_LENGTH = 2**63 - 1  # its number of samples of a FLAC file that was written to a pipe
# Frames that are read at once of a file of unknown length; encoders have blocks of multiples of it.
STEP = 128
MPEG = (0x50, 0x55)  # its estimates of the number of samples may be too low
CODECS = {
    PCM: "PCM", 0x02: "Microsoft ADPCM", FLOAT: "float", 0x06: "A-law", 0x07: "mu-law",
    0x11: "IMA ADPCM", 0x20: "Yamaha ADPCM", 0x31: "GSM 6.10", 0x40: "G.721", 0x45: "G.726",
    0x50: "MPEG audio", 0x55: "MP3", 0x64: "G.726", 0xFF: "AAC", 0x160: "WMA", 0x161: "WMA",
    0x162: "WMA", 0x163: "WMA", 0x2000: "AC-3", 0x566F: "Vorbis", 0x674F: "Vorbis",
    0xF1AC: "FLAC",
}  # fmt: skip
# Formats that it does not know, by the first bytes of a file; a full stop is any byte
SIGNATURES = {
    b"BW64": "BW64", b"OggS": "Ogg", b"....ftyp": "MP4 (such as M4A)",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": "WMA",
    b"\x1a\x45\xdf\xa3": "Matroska or WebM", b"#!AMR": "AMR", b"MAC ": "Monkey's Audio",
    b"wvpk": "WavPack", b"DSD ": "DSD", b"FRM8": "DSD",
}  # fmt: skip


class Decoder(soundfile.SoundFile):
    """A file that libsndfile decodes."""

    @property
    def is_counted(self) -> bool:
        """Whether the number of its samples is known."""
        return self.subtype in COUNTED and self.frames != UNKNOWN_LENGTH

    def seekable(self) -> bool:
        """Whether to move within the file. soundfile does so after each block, which fails at the
        end of a file of unknown length.
        """
        return self.is_counted and super().seekable()


class Decoded(Audio):
    """A recording that libsndfile decodes."""

    is_checked = False

    def __init__(self, file: Decoder, header: WavHeader | None, source: BinaryIO) -> None:
        self.file, self.source, self.position = file, source, 0
        self.rate, self.channels = file.samplerate, file.channels
        self.n_frames = file.frames if file.is_counted else None
        self.states_length = file.is_counted and (header is None or header.states_size)
        self.is_int16 = file.subtype == "PCM_16"
        self.dtype = "int16" if self.is_int16 else "float64"
        self.is_at_end = False

    def skip(self, count: int) -> None:
        if self.file.seekable():
            self.file.seek(min(count, self.file.frames))
            return
        for _ in self.read_blocks(count):
            pass

    def read(self, count: int) -> np.ndarray:
        if self.n_frames is not None:
            return self.decode(count)
        blocks: list[np.ndarray] = []
        end = self.position + count
        while self.position < end and not self.is_at_end:
            # The same blocks wherever reading starts: of a block that is cut short nothing is read.
            size = min(end - self.position, STEP - self.position % STEP)
            try:
                block = self.decode(size)
            except soundfile.SoundFileError:
                if self.source.read(1):  # it is damaged before its end
                    raise
                self.is_at_end = True
                break
            self.is_at_end = len(block) < size
            self.position += len(block)
            blocks.append(block)
        return np.concatenate([np.zeros((0, self.channels), self.dtype), *blocks])

    def decode(self, count: int) -> np.ndarray:
        return self.file.read(count, self.dtype, always_2d=True)


def open_decoder(path: Path, file: BinaryIO, header: WavHeader | None) -> Decoder:
    """Open a recording with libsndfile. `file` is the open file, `header` its header if it is WAV.

    Raises:
        UserError: If the file is neither WAV nor FLAC, or libsndfile cannot decode it.
    """
    if header and header.format.encoding in MPEG:
        raise UserError(name_codec(header.format))
    # soundfile opens any name as bytes or, on Windows, as text.
    name = str(path) if os.name == "nt" else os.fsencode(path)
    try:
        decoder = Decoder(name)
    except soundfile.SoundFileError as error:
        raise UserError(explain_unreadable(file, header, error)) from None
    if decoder.format in ("WAV", "WAVEX", "FLAC"):
        if header and header.size and decoder.frames == 0:  # the header states a length of 0
            raise UserError(name_codec(header.format))
        if decoder.is_counted:
            return decoder
        decoder.close()
        file.seek(0)
        return Decoder(file)  # its position shows how far libsndfile has come
    decoder.close()
    raise UserError(f"unreadable: it is {decoder.format}, neither WAV nor FLAC; convert it to FLAC")


def name_codec(form: Format) -> str:
    codec = CODECS.get(form.encoding, f"number 0x{form.encoding:04X}")
    if form.encoding in (PCM, FLOAT):
        codec = f"{codec} of {form.bits} bits"
    return f"unreadable: WAV with the codec {codec}; convert it to FLAC"


def name_reason(error: soundfile.SoundFileError) -> str:
    """Return the reason that libsndfile gives for an error."""
    reason = getattr(error, "error_string", None) or str(error)
    return f"libsndfile cannot decode it ({reason.strip().rstrip('.')})"


def explain_unreadable(
    file: BinaryIO, header: WavHeader | None, error: soundfile.SoundFileError
) -> str:
    """Return why libsndfile cannot open a file, and what to do."""
    if header:
        return name_codec(header.format)
    skip_tags(file)
    start = file.read(64)
    if start.startswith(LFS_POINTER):
        return "unreadable: a pointer of Git LFS; fetch the recording with `git lfs pull`"
    if start.startswith(b"fLaC") and len(start) > 21:
        bits = ((start[20] & 1) << 4 | start[21] >> 4) + 1  # in the block STREAMINFO
        if bits not in (8, 16, 24):
            return f"unreadable: FLAC with {bits} bits; convert it to FLAC with 16 or 24 bits"
    name = find_signature(start)
    if name:
        return f"unreadable: it is {name}, neither WAV nor FLAC; convert it to FLAC"
    return (
        f"unreadable: neither WAV nor FLAC, or damaged: {name_reason(error)}; replace it, or "
        "convert it to FLAC"
    )


def find_signature(start: bytes) -> str | None:
    """Return the name of the format of SIGNATURES that a file with these first bytes has."""
    for signature, name in SIGNATURES.items():
        if re.match(re.escape(signature).replace(rb"\.", b"."), start, re.DOTALL):
            return name
    return None
