"""Opening recordings: headers that do not state their length, codecs, and what a message says."""

import errno
import struct
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
from conftest import tone, write_clip
from mutations import wav, without_length

from audio import N_SAMPLES, CheckedRecording, Windows, check_recording, read_recording
from errors import UserError
from formats import STEP, open_audio

EXCESS = "go on behind the length that their header states, where they are not read"
UNSTATED = "do not state their exact length, and are read to their end"
ALL = Windows(hop=5.0)


def refuses(path: Path, match: str, windows: Windows = ALL) -> None:
    with pytest.raises(UserError, match=match):
        check_recording(path, windows)


def read_all(path: Path, checked: CheckedRecording) -> list[np.ndarray]:
    """Return the samples of each window."""
    parts = []
    for start in checked.starts:
        parts.append(np.empty(N_SAMPLES, dtype=np.int16))
        read_recording(path, parts[-1], start)
    return parts


@pytest.fixture
def samples() -> np.ndarray:
    """23 s of sound."""
    return np.round(20_000 * tone(0, 23.0)).astype(np.int16)


def assert_windows(path: Path, expected: np.ndarray) -> None:
    """Check that the windows cover the expected samples, of which the header has no number."""
    checked = check_recording(path, ALL)
    assert UNSTATED in checked.changes
    assert checked.starts[-1] == (len(expected) - N_SAMPLES) / 16_000
    for start, part in zip(checked.starts, read_all(path, checked), strict=True):
        first = round(16_000 * start)
        assert np.array_equal(part, expected[first : first + N_SAMPLES])


# ---- Length ----


PLACEHOLDERS = {
    "lost power": 0,
    "sox": 0x7FFF_F000,
    "arecord": 0x7FFF_FF00,
    "lame": 0x7FFF_FFFF,
    "older arecord": 0x8000_0000,
    "ffmpeg": 0xFFFF_FFFF,
    "less the header": 0xFFFF_FFFF - 36,
}


@pytest.mark.parametrize("size", PLACEHOLDERS.values(), ids=PLACEHOLDERS.keys())
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_writer_that_did_not_know_the_length(tmp_path, samples, size, order):
    content = bytearray(wav(samples.astype(f"{order}i2"), kind=1, bits=16, order=order))
    content[40:44] = struct.pack(f"{order}I", size)
    path = tmp_path / "a.wav"
    path.write_bytes(content + b"\1")  # the last sample is incomplete
    assert_windows(path, samples)


def test_no_samples_and_a_note_are_an_empty_recording(tmp_path):
    note = b"LIST" + struct.pack("<I", 4) + b"INFO"
    content = wav(np.zeros(0, "<i2"), kind=1, bits=16)
    (tmp_path / "a.wav").write_bytes(content + note)
    refuses(tmp_path / "a.wav", "empty: no samples")


@pytest.mark.parametrize("size", [2**30, 2**31 - 2**17, 3 * 2**30, 2**32 - 2**17])
def test_a_believable_length_is_believed(tmp_path, samples, size):
    content = bytearray(wav(samples, kind=1, bits=16))
    content[40:44] = struct.pack("<I", size)
    (tmp_path / "a.wav").write_bytes(content)
    refuses(tmp_path / "a.wav", f"truncated: it has {2 * len(samples)} of {size} bytes of audio")


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_flac_from_a_pipe_is_read_to_its_end(tmp_path, samples, subtype):
    path = tmp_path / "a.flac"
    soundfile.write(path, samples, 16_000, subtype=subtype)
    path.write_bytes(without_length(path.read_bytes()))
    assert_windows(path, samples)
    first = check_recording(path).changes
    assert first[-1].startswith("are longer than 12 s")
    path.write_bytes(path.read_bytes()[:-5000])  # the power was lost
    checked = check_recording(path, ALL)
    n_frames = round(16_000 * checked.starts[-1]) + N_SAMPLES
    assert n_frames > 20 * 16_000
    assert n_frames % STEP == 0
    assert_windows(path, samples[:n_frames])


def test_short_flac_from_a_pipe(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, tone(0, 3.0), 16_000)
    expected, _ = soundfile.read(path, dtype="int16")
    path.write_bytes(without_length(path.read_bytes()))
    checked = check_recording(path, ALL)
    assert checked.changes == [UNSTATED, "are shorter than 10 s and are repeated"]
    assert np.array_equal(read_all(path, checked)[0], np.resize(expected, N_SAMPLES))
    path.write_bytes(path.read_bytes()[:100])
    refuses(path, "empty: no samples")


@pytest.mark.parametrize("tail", [b"TAG" + bytes(125), bytes(1000)])
def test_what_follows_flac_from_a_pipe_costs_no_samples(tmp_path, samples, tail):
    path = tmp_path / "a.flac"
    soundfile.write(path, samples, 16_000)
    path.write_bytes(without_length(path.read_bytes()) + tail)
    assert_windows(path, samples)


@pytest.mark.parametrize("codec", ["ULAW", "ALAW", "IMA_ADPCM", "GSM610"])
def test_a_codec_with_a_length_of_0(tmp_path, samples, codec):
    path = tmp_path / "a.wav"
    soundfile.write(path, samples, 16_000, subtype=codec)
    content = path.read_bytes()
    place = content.index(b"data") + 4
    path.write_bytes(content[:place] + bytes(4) + content[place + 4 :])
    refuses(path, "unreadable: WAV with the codec .*; convert it to FLAC")


@pytest.mark.parametrize("order", ["<", ">"])
def test_sound_behind_the_stated_length_is_noticed(tmp_path, samples, order):
    """As of a recorder that updates the header from time to time, and lost its power."""
    content = bytearray(wav(samples.astype(f"{order}i2"), kind=1, bits=16, order=order))
    content[40:44] = struct.pack(f"{order}I", 2 * 12 * 16_000)
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    checked = check_recording(path, ALL)
    assert checked.changes == [EXCESS]
    assert checked.starts == [0, 2]
    content[40:44] = struct.pack(f"{order}I", 2 * 22 * 16_000 + 2)
    path.write_bytes(content)
    assert check_recording(path, ALL).changes == [], "less than a second more"
    note = b"bext" + struct.pack("<I", 50_000) + bytes(50_000)
    path.write_bytes(wav(samples, kind=1, bits=16) + note)
    assert check_recording(path, ALL).changes == [], "a chunk"


def test_damage_in_the_middle_of_flac_without_a_length_is_an_error(tmp_path, samples):
    path = tmp_path / "a.flac"
    soundfile.write(path, samples, 16_000)
    content = bytearray(without_length(path.read_bytes()))
    middle = len(content) // 2
    content[middle : middle + 50] = bytes(50)
    path.write_bytes(content)
    refuses(path, "damaged: libsndfile cannot decode it .*; replace it")


# ---- Codecs ----


CODECS = ["ALAW", "ULAW", "IMA_ADPCM", "MS_ADPCM", "GSM610", "G721_32", "NMS_ADPCM_16"]


@pytest.mark.parametrize("codec", CODECS)
def test_each_window_of_a_codec_is_part_of_its_whole(tmp_path, samples, codec):
    """Also of codecs whose length libsndfile estimates, or in which it cannot move."""
    path = tmp_path / "a.wav"
    soundfile.write(path, samples, 16_000, subtype=codec)
    with open_audio(path) as audio:
        whole = np.round(32768 * audio.read_channel(2 * len(samples), 0))
    assert len(whole) >= len(samples)
    checked = check_recording(path, ALL)
    assert (UNSTATED in checked.changes) == (codec not in ("ALAW", "ULAW"))
    for start, part in zip(checked.starts, read_all(path, checked), strict=True):
        first = round(16_000 * start)
        assert np.array_equal(part, np.clip(whole[first : first + N_SAMPLES], -32768, 32767))


@pytest.mark.slow  # librosa is compiled for 20 s when it is used for the first time
@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("seconds", [10, 3.21])
def test_samples_are_resampled_as_librosa_does(tmp_path, rate, seconds):
    path = write_clip(tmp_path / "a.wav", tone(0, seconds, rate=rate), rate=rate)
    values, _ = soundfile.read(path)
    expected = librosa.resample(values, orig_sr=rate, target_sr=16_000)
    rounded = np.clip(np.round(32768 * expected), -32768, 32767).astype(np.int16)
    assert np.array_equal(read_all(path, check_recording(path))[0], np.resize(rounded, N_SAMPLES))


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("form", ["WAV", "WAVEX"])
@pytest.mark.parametrize("order", ["LITTLE", "BIG"])
def test_uncompressed_samples_are_those_of_libsndfile(tmp_path, subtype, form, order):
    if form == "WAVEX":
        order = "FILE"
    values = np.random.default_rng(0).uniform(-1, 1, (1001, 3))
    path = tmp_path / "a.wav"
    soundfile.write(path, values, 16_000, subtype, order, form)
    expected, _ = soundfile.read(path)
    with open_audio(path) as audio:
        assert (audio.rate, audio.channels, audio.n_frames) == (16_000, 3, 1001)
        audio.skip(100)
        decoded = audio.read(2000)
    if subtype == "PCM_16":
        decoded = decoded / 32768
    assert np.array_equal(decoded, expected[100:])


# ---- Samples without a meaning ----


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
@pytest.mark.parametrize("value", [0.0, -8 / 32768, 1e-6])
def test_a_silent_channel_cannot_be_used(tmp_path, subtype, value):
    silent = np.full(32_000, value)
    path = write_clip(tmp_path / "a.wav", np.stack([silent, tone(0, 2.0)], axis=1), subtype=subtype)
    refuses(
        path,
        f"silent: all samples of channel 0 are {round(32768 * value)} at 16 bits; channel 1 has "
        "sound: choose it with --channel 1",
    )
    assert check_recording(path, Windows(channel=1)).starts == [0]
    write_clip(path, silent, subtype=subtype)
    refuses(path, "silent: .*; record it again")


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_silence_before_the_sound(tmp_path, name):
    path = write_clip(tmp_path / name, np.concatenate([np.zeros(200_000), tone(0, 1.0)]))
    refuses(
        path,
        "silent: all samples of channel 0 in the first 10 s are 0 at 16 bits; use more of the "
        "recording with --window all",
        windows=Windows(),
    )
    assert check_recording(path, ALL).starts == [0, 3.5]


@pytest.mark.parametrize(("count", "is_refused"), [(320, False), (321, True)])
def test_more_than_a_hundredth_beyond_full_scale(tmp_path, count, is_refused):
    samples = tone(0, 2.0)
    samples[:count] = -3.0
    path = write_clip(tmp_path / "a.wav", samples, subtype="FLOAT")
    if is_refused:
        refuses(path, "beyond full scale: 1% of its samples are, up to 3, and full scale is 1; div")
    else:
        assert check_recording(path).n_clipped == count


def test_a_peak_beyond_full_scale_does_not_spread(tmp_path):
    samples = tone(0, 10.0, rate=48_000)
    expected = read_all(*checked_as_float(tmp_path / "a.wav", samples))[0].astype(int)
    samples[100_000] = 1e30
    decoded = read_all(*checked_as_float(tmp_path / "a.wav", samples))[0].astype(int)
    assert (np.abs(decoded - expected) > 1000).sum() < 10


def checked_as_float(path: Path, samples: np.ndarray) -> tuple[Path, CheckedRecording]:
    write_clip(path, samples, rate=48_000, subtype="DOUBLE")
    return path, check_recording(path)


def test_resampling_may_exceed_full_scale(tmp_path):
    """A recording at its limits is no recording on another scale."""
    path = write_clip(tmp_path / "a.wav", np.sign(tone(0, 2.0, rate=44_100)), rate=44_100)
    assert check_recording(path).n_clipped == 0


# ---- Messages ----


def test_what_cannot_be_read_is_named_with_what_to_do(tmp_path):
    path = tmp_path / "a.wav"
    flac = tmp_path / "a.flac"
    soundfile.write(flac, tone(0, 1.0), 16_000)
    content = bytearray(flac.read_bytes())
    content[20:22] = content[20] & 0xFE, content[21] & 0x0F | 0xB0
    cases = {
        bytes(content): r"FLAC with 12 bits; convert it to FLAC with 16 or 24 bits",
        b"BW64" + bytes(60): "it is BW64, neither WAV nor FLAC; convert it to FLAC",
        b"\x30\x26\xb2\x75\x8e\x66\xcf\x11" + bytes(99): "it is WMA, .*; convert it to FLAC",
        wav(np.zeros(99, np.uint8), kind=0x161, bits=8): "WAV with the codec WMA; convert it to FL",
        wav(np.zeros(99, np.uint8), kind=0x999, bits=8): "codec number 0x0999; convert it to FLAC",
        wav(np.zeros(99, "<i8"), kind=1, bits=64): "WAV with the codec PCM of 64 bits; convert it",
        b"version https://git-lfs.github.com/spec/v1\n": "a pointer of Git LFS; fetch the recordi",
        b"nothing that is known": "neither WAV nor FLAC, or damaged: .*; replace it, or convert",
    }
    for file_content, match in cases.items():
        path.write_bytes(file_content)
        refuses(path, f"unreadable: .*{match}")


@pytest.mark.filterwarnings("error")
def test_samples_of_any_size(tmp_path):
    """The largest numbers, and those that signal that they are none."""
    path = tmp_path / "a.wav"
    for value in (1.7e308, -1e305):
        path.write_bytes(wav(np.full(99, value), kind=3, bits=64))
        refuses(path, "beyond full scale: 100% of its samples are, up to inf, and full scale is 1")
    path.write_bytes(wav(np.full(99, 0x7F800001, "<u4"), kind=3, bits=32))
    refuses(path, "not finite: it holds NaN or infinite samples")


def test_no_channels(tmp_path):
    content = bytearray(wav(np.zeros(99, "<i2"), kind=1, bits=16))
    content[22:24] = content[32:34] = bytes(2)
    content[28:32] = bytes(4)
    (tmp_path / "a.wav").write_bytes(content)
    refuses(tmp_path / "a.wav", "damaged: the header contradicts itself .*, 0 channels")


def test_too_many_open_files(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.wav", tone(0, 1.0))
    error = OSError(errno.EMFILE, "Too many open files", str(path))

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Path, "open", fail)
    refuses(path, r"unreadable: Too many open files; lower num_workers, or raise the limit")
