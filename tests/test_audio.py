"""Reading one recording: 16-bit samples come through exactly, others are changed as listed, and
damaged files are refused.
"""

import contextlib
import os
import struct

import numpy as np
import pytest
import soundfile
from conftest import tone, write_clip
from mutations import BROKEN, broken, each_damage_and_200, spoilt_recordings

from audio import N_SAMPLES, Windows, check_recording, read_recording
from errors import UserError
from formats import Wav

SHORTER = ["are shorter than 10 s and are repeated"]
EXCESS = "go on behind the length that their header states, where they are not read"
UNSTATED = ["do not state their exact length, and are read to their end"]


def read(path) -> tuple[np.ndarray, list[str]]:
    """The samples of the first window, and the changes that were made to them."""
    samples = np.full(N_SAMPLES, -12345, dtype=np.int16)
    read_recording(path, samples)
    return samples, check_recording(path).changes


# ---- Samples ----


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
@pytest.mark.parametrize("seconds", [10, 11])
def test_16_bit_pcm_comes_through_exactly(tmp_path, name, seconds):
    samples = np.random.default_rng(0).integers(-32768, 32768, seconds * 16_000).astype(np.int16)
    soundfile.write(tmp_path / name, samples, 16_000)
    decoded, changes = read(tmp_path / name)
    assert np.array_equal(decoded, samples[:N_SAMPLES])
    assert changes == []


def test_a_short_clip_is_repeated(tmp_path):
    decoded, changes = read(write_clip(tmp_path / "a.wav", tone(0, 3.0)))
    samples, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert np.array_equal(decoded, np.concatenate([samples, samples, samples, samples[:16_000]]))
    assert changes == SHORTER


def test_the_first_of_several_channels_is_used(tmp_path):
    left, right = tone(0), tone(1)
    mono, _ = read(write_clip(tmp_path / "mono.wav", left))
    decoded, changes = read(write_clip(tmp_path / "a.wav", np.stack([left, right], axis=1)))
    assert np.array_equal(decoded, mono)
    assert changes == ["have several channels, of which channel 0 is used"]


@pytest.mark.parametrize(
    "rate",
    [
        44_100,
        pytest.param(8_000, marks=pytest.mark.slow),
        pytest.param(48_000, marks=pytest.mark.slow),
    ],
)
def test_another_sample_rate_is_resampled(tmp_path, rate):
    time = np.arange(10 * rate) / rate
    decoded, changes = read(
        write_clip(tmp_path / "a.wav", 0.1 * np.sin(2 * np.pi * 1000 * time), rate)
    )
    expected = 0.1 * np.sin(2 * np.pi * 1000 * np.arange(N_SAMPLES) / 16_000)
    assert len(changes) == 1
    assert changes[0].startswith("are resampled to 16000 Hz each time they are read; ")
    assert np.abs(decoded / 32768 - expected)[800:-800].max() < 1e-3


@pytest.mark.parametrize("subtype", ["PCM_24", "FLOAT", "DOUBLE"])
def test_finer_samples_are_rounded(tmp_path, subtype):
    samples = tone(0)
    decoded, changes = read(write_clip(tmp_path / "a.wav", samples, subtype=subtype))
    assert np.abs(decoded - samples * 32768).max() <= 0.51
    assert changes == ["are rounded to 16 bits"]


def test_clipping_is_not_silent(tmp_path):
    samples = tone(0)
    samples[5] = 1.0  # full scale is 1/32768 beyond the largest int16, which needs no notice
    assert "exceed" not in str(read(write_clip(tmp_path / "a.wav", samples, subtype="FLOAT"))[1])
    samples[5:7] = -1.5, 1.5
    path = write_clip(tmp_path / "a.wav", samples, subtype="FLOAT")
    decoded, changes = read(path)
    assert decoded[5:7].tolist() == [-32768, 32767]
    assert changes == ["are rounded to 16 bits"]
    assert check_recording(path).n_clipped == 2


def test_a_wav_from_a_pipe_says_nothing_of_its_length(tmp_path):
    expected, _ = read(write_clip(tmp_path / "a.wav", tone(0)))
    content = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(content[:40] + b"\xff\xff\xff\xff" + content[44:])
    decoded, changes = read(tmp_path / "a.wav")
    assert np.array_equal(decoded, expected)
    assert changes == UNSTATED


@pytest.mark.parametrize("behind", [b"\0" * 512, b"TAG" + b" " * 125, bytes(range(256)), b"\x81"])
def test_foreign_bytes_behind_the_audio_do_no_harm(tmp_path, behind):
    expected, _ = read(write_clip(tmp_path / "a.wav", tone(0)))
    with (tmp_path / "a.wav").open("ab") as file:
        file.write(behind)
    assert np.array_equal(read(tmp_path / "a.wav")[0], expected)


@pytest.mark.parametrize("size", [4, 1001, 32_000, 319_998])
def test_a_header_that_gives_fewer_bytes_is_believed(tmp_path, size):
    whole, _ = read(write_clip(tmp_path / "a.wav", tone(0)))
    content = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(content[:40] + struct.pack("<I", size) + content[44:])
    decoded, changes = read(tmp_path / "a.wav")
    assert np.array_equal(decoded, np.resize(whole[: size // 2], N_SAMPLES))
    assert changes == ([EXCESS, *SHORTER] if size < 319_998 else SHORTER)


@pytest.mark.parametrize(
    ("text", "count"),
    [(b"this should be pump 3", 1), (b"\ndata : 5 (should be 3)", 1), (b"bearing", 500)],
)
def test_notes_of_a_recorder_do_no_harm(tmp_path, text, count):
    """Notes of any content and number neither spoil a recording nor hide that it is cut short."""
    expected, _ = read(write_clip(tmp_path / "a.wav", tone(0)))
    content, text = (tmp_path / "a.wav").read_bytes(), text.ljust(40, b"\0")
    notes = count * (struct.pack("<4sI8sI", b"LIST", 12 + len(text), b"INFOICMT", len(text)) + text)
    for whole in (content[:36] + notes + content[36:], content + notes):
        (tmp_path / "a.wav").write_bytes(whole[:4] + struct.pack("<I", len(whole) - 8) + whole[8:])
        assert np.array_equal(read(tmp_path / "a.wav")[0], expected)
    (tmp_path / "a.wav").write_bytes((content[:36] + notes + content[36:])[:-1000])
    with pytest.raises(UserError, match="truncated: it has 319000 of 320000 bytes"):
        check_recording(tmp_path / "a.wav")


# ---- Windows and channels ----


@pytest.mark.parametrize(
    ("seconds", "hop", "starts"),
    [
        (25, None, [0]),
        (3, 5, [0]),
        (10, 5, [0]),
        (11, 10, [0, 1]),
        (20, 10, [0, 10]),
        (25, 10, [0, 10, 15]),
        (25, 5, [0, 5, 10, 15]),
        (12.5, 0.75, [0, 0.75, 1.5, 2.25, 2.5]),
    ],
)
def test_windows_cover_a_recording_and_the_last_one_ends_with_it(tmp_path, seconds, hop, starts):
    path = write_clip(tmp_path / "a.wav", tone(0, seconds, rate=8000), rate=8000)
    assert check_recording(path, Windows(hop)).starts == starts


@pytest.mark.parametrize(
    ("name", "subtype"), [("a.wav", "PCM_16"), ("a.wav", "FLOAT"), ("a.flac", "PCM_16")]
)
def test_a_window_is_read_where_it_is(tmp_path, name, subtype):
    """The second of two channels, also at a start that is no whole number of seconds."""
    samples = (
        np.random.default_rng(0).integers(-32768, 32768, (23 * 16_000 + 5, 2)).astype(np.int16)
    )
    path = write_clip(tmp_path / name, samples / 32768, subtype=subtype)
    decoded = np.empty(N_SAMPLES, dtype=np.int16)
    starts = check_recording(path, Windows(hop=7.5, channel=1)).starts
    assert starts == [0, 7.5, (13 * 16_000 + 5) / 16_000]
    for start in starts:
        read_recording(path, decoded, start, channel=1)
        first = round(start * 16_000)
        assert np.array_equal(decoded, samples[first : first + N_SAMPLES, 1])


def test_a_window_is_resampled_by_itself(tmp_path):
    time = np.arange(25 * 44_100) / 44_100
    path = write_clip(tmp_path / "a.wav", 0.1 * np.sin(2 * np.pi * 1000 * time), rate=44_100)
    decoded = np.empty(N_SAMPLES, dtype=np.int16)
    read_recording(path, decoded, start=15.0)
    expected = 0.1 * np.sin(2 * np.pi * 1000 * (15 + np.arange(N_SAMPLES) / 16_000))
    assert np.abs(decoded / 32768 - expected)[800:-800].max() < 1e-3


def test_channels_are_read_in_blocks_that_fit_into_memory(tmp_path, monkeypatch):
    samples = np.random.default_rng(0).integers(-32768, 32768, (N_SAMPLES, 3)).astype(np.int16)
    path = write_clip(tmp_path / "a.wav", samples / 32768)
    sizes, read_frames = [], Wav.read
    monkeypatch.setattr("formats.BLOCK_SIZE", 10_000)
    monkeypatch.setattr(
        Wav, "read", lambda self, count: sizes.append(count) or read_frames(self, count)
    )
    decoded = np.empty(N_SAMPLES, dtype=np.int16)
    read_recording(path, decoded, channel=2)
    assert max(sizes) == 3333
    assert np.array_equal(decoded, samples[:, 2])


def test_a_missing_channel_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no channel 1: it has a single channel"):
        check_recording(write_clip(tmp_path / "a.wav", tone(0, 1.0)), Windows(channel=1))
    path = write_clip(tmp_path / "b.wav", np.stack([tone(0, 1.0)] * 2, axis=1))
    changes = check_recording(path, Windows(channel=1)).changes
    assert changes[0] == "have several channels, of which channel 1 is used"
    with pytest.raises(UserError, match="no channel 2: it has 2 channels, counted from 0"):
        check_recording(path, Windows(channel=2))


def test_a_notice_says_if_the_first_window_leaves_out_more_than_two_seconds(tmp_path):
    published, longer = (
        write_clip(tmp_path / f"{n}.wav", tone(0, 13.0)[: 16_000 * 12 + n]) for n in (0, 1)
    )
    assert check_recording(published).changes == []
    assert check_recording(longer).changes == [
        "are longer than 12 s, and only their first 10 s are used; to use the rest as well, add "
        "--window all"
    ]
    assert check_recording(longer, Windows(hop=10)).changes == []


def test_a_recording_is_checked_where_it_is_used(tmp_path):
    samples = tone(0, 25.0)
    samples[[20 * 16_000, 21 * 16_000]] = np.nan, 1.5
    path = write_clip(tmp_path / "a.wav", samples, subtype="FLOAT")
    assert check_recording(path).starts == [0]
    with pytest.raises(UserError, match="not finite"):
        check_recording(path, Windows(hop=10))
    samples[20 * 16_000] = 0
    write_clip(path, samples, subtype="FLOAT")
    checked = check_recording(path, Windows(hop=10))
    assert (checked.changes, checked.n_clipped) == (["are rounded to 16 bits"], 1)
    assert check_recording(path).n_clipped == 0


@pytest.mark.parametrize("length", [2**30, 2**32 - 1], ids=["wrapped", "from a pipe"])
def test_a_wav_file_that_is_too_large_for_its_header_is_refused(tmp_path, length):
    path = write_clip(tmp_path / "a.wav", tone(0, 1.0))
    content = path.read_bytes()
    path.write_bytes(content[:40] + struct.pack("<I", length) + content[44:])
    os.truncate(path, 5 * 2**30)
    with pytest.raises(
        UserError, match=r"more audio than a WAV header can describe \(4 GiB\); convert it to FLAC"
    ):
        check_recording(path, Windows(hop=10))


def test_a_recording_that_ends_while_it_is_used_is_an_error(tmp_path):
    path = write_clip(tmp_path / "a.wav", tone(0, 25.0))
    start = check_recording(path, Windows(hop=10)).starts[-1]
    write_clip(path, tone(0, 24.0))
    with pytest.raises(
        UserError, match="truncated: it ends before second 25; it was longer when it was checked"
    ):
        read_recording(path, np.empty(N_SAMPLES, dtype=np.int16), start)


# ---- Refused recordings ----


def is_refused(path) -> bool:
    """Whether the check refuses a recording. If so, reading it may raise only a `UserError`, since
    a file may also be damaged after the check.
    """
    try:
        check_recording(path)
    except UserError:
        with contextlib.suppress(UserError):
            read_recording(path, np.empty(N_SAMPLES, dtype=np.int16))
        return True
    return False


@pytest.mark.parametrize(("kind", "reason"), BROKEN.items())
def test_a_broken_recording_is_refused(tmp_path, kind, reason):
    broken(kind, tmp_path / "a.wav")
    assert is_refused(tmp_path / "a.wav")
    with pytest.raises(UserError, match=reason):
        check_recording(tmp_path / "a.wav")


@each_damage_and_200
def test_each_spoilt_recording_is_refused_or_read_correctly(count):
    with spoilt_recordings(count) as (_, spoilt):
        for one in spoilt:
            if one.expected is None:
                assert is_refused(one.path), one
            elif isinstance(one.expected, np.ndarray):
                assert not is_refused(one.path), one
                samples, changes = read(one.path)
                assert np.array_equal(samples, np.resize(one.expected, N_SAMPLES)), one
                assert (SHORTER[0] in changes) == (len(one.expected) < N_SAMPLES), one
