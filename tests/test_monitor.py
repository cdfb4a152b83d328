"""live/ and examples/monitor.py: sound from a pipe or a folder, alarms, evidence, conditions."""

import io
import json
import os
import resource
import struct
import sys
import threading
import time
from argparse import Namespace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import write_clip
from mutations import wav

from alarms import AlarmRule, find_alarms
from audio import SAMPLE_RATE, Windows, find_starts
from errors import UserError
from examples import monitor as script
from live import folder as folder_module
from live import monitor as monitor_module
from live import stream as stream_module
from live.evidence import Evidence
from live.folder import Folder
from live.log import Log
from live.model import OnnxModel
from live.monitor import Listener, Monitor, monitor_file, watch
from live.stream import Block, Stream, make_format
from live.windows import CLIPPED, NOT_FINITE, SILENT, SOUND, Cutter, find_condition

THRESHOLD = 0.1
MACHINE = ("press", "line-3")
RAW = make_format("S16_LE", SAMPLE_RATE, 1)


class LoudnessSession:
    """In place of ONNX Runtime: the score of a window is its standard deviation."""

    def run(self, outputs, inputs):
        assert outputs == ["scores"]
        samples = inputs["samples"]
        assert samples.shape == (1, 160_000)
        assert samples.dtype == np.float32
        return [np.stack([samples.std(axis=1), 0 * samples[:, 0]], axis=1)]


class Pieces(io.RawIOBase):
    """A pipe that gives these bytes, piece by piece."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)

    def read(self, size: int = -1) -> bytes:
        if not self.pieces:
            return b""
        piece = self.pieces.pop(0)
        if len(piece) > size:
            self.pieces.insert(0, piece[size:])
        return piece[:size]


def make_monitor() -> Monitor:
    machines, thresholds = [MACHINE, ("fan", "00")], [THRESHOLD, None]
    windows, rule = Windows(5.0, 0), AlarmRule(3, 5)
    model = OnnxModel("m.onnx", LoudnessSession(), machines, thresholds, windows, rule, "mean")
    return Monitor(model, 0, Log(as_json=True))


def noise(seconds: float, level: float = 0.05, seed: int = 0) -> np.ndarray:
    """Noise as int16 samples; above a level of 0.1 it is anomalous."""
    rng = np.random.default_rng(seed)
    samples = rng.normal(0, level * 32768, round(seconds * SAMPLE_RATE))
    return np.clip(np.round(samples), -32768, 32767).astype(np.int16)


def listen(
    *pieces: bytes, monitor: Monitor | None = None, evidence: Evidence | None = None, raw=RAW
) -> None:
    listener = Listener(monitor or make_monitor(), evidence, began=0.0)
    listener.listen(Stream(Pieces(*pieces), raw), 0, lambda: False)


def events(capsys, *names: str) -> list[dict]:
    """Return the events that were printed, without their times."""
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [row for row in rows if not names or row["event"] in names]


# ---- Windows ----


def test_windows_of_a_stream_are_those_of_a_recording():
    rng = np.random.default_rng(0)
    for seconds, hop, rate in ((10, 5, 1000), (12.3, 5, 1000), (47.7, 2.5, 1000), (60, 12, 1100),
                               (30, 0.7, 1000), (20, 5, 1000), (9.9, 5, 1000)):  # fmt: skip
        samples = rng.integers(-9, 9, round(seconds * rate)).astype(np.int16)
        cutter, cuts, begin = Cutter(0, rate, hop), [], 0
        while begin < len(samples):
            size = int(rng.integers(1, 3 * rate))
            cuts += cutter.add(samples[begin : begin + size])
            begin += size
        cuts += cutter.cut_last()
        expected = find_starts(len(samples), rate, hop) if seconds >= 10 else []
        assert [cut.start / rate for cut in cuts] == expected
        for cut in cuts:
            assert cut.samples.tolist() == samples[cut.start : cut.start + 10 * rate].tolist()


def test_conditions():
    sound = noise(10)
    assert find_condition(sound, SAMPLE_RATE) == SOUND
    assert find_condition(np.zeros(160_000, np.int16), SAMPLE_RATE) == SILENT
    part = sound.copy()
    part[50_000:65_999] = 7
    assert find_condition(part, SAMPLE_RATE) == SOUND, "one sample less than a second"
    part[50_000:66_000] = 7
    assert find_condition(part, SAMPLE_RATE) == SILENT
    for extreme in (32767, -32767, -32768):
        loud = sound.copy()
        loud[: 160_000 * 2 // 100 : 2] = extreme
        assert find_condition(loud, SAMPLE_RATE) == SOUND, "1 percent"
        loud[-1] = extreme
        assert find_condition(loud, SAMPLE_RATE) == CLIPPED
    exact = sound / 32768
    assert find_condition(exact, SAMPLE_RATE) == SOUND
    assert find_condition(np.clip(30 * exact, -1, 1), SAMPLE_RATE) == CLIPPED
    assert find_condition(np.where(exact == exact[9], np.nan, exact), SAMPLE_RATE) == NOT_FINITE
    assert find_condition(np.append(exact, np.inf), SAMPLE_RATE) == NOT_FINITE


# ---- The stream ----


def read_all(*pieces: bytes, raw=RAW, channel: int = 0) -> tuple[np.ndarray, list[str]]:
    """Return the samples of a stream, and its notes."""
    stream = Stream(Pieces(*pieces), raw)
    blocks = [block.samples for block in stream.blocks(channel, lambda: False)]
    return np.concatenate(blocks), stream.notes


@pytest.mark.parametrize(
    ("name", "subtype"),
    [("S16_LE", "PCM_16"), ("S24_3LE", "PCM_24"), ("S32_LE", "PCM_32"), ("FLOAT_LE", "FLOAT")],
)
def test_raw_samples(name, subtype, tmp_path):
    sound = np.stack([noise(0.1), noise(0.1, seed=1)], axis=1)
    file = tmp_path / "sound.raw"
    soundfile.write(file, sound / 32768, 48_000, subtype, "LITTLE", "RAW")
    data = file.read_bytes()
    pieces = [data[begin : begin + 999] for begin in range(0, len(data), 999)]
    for channel in (0, 1):
        samples, notes = read_all(*pieces, raw=make_format(name, 48_000, 2), channel=channel)
        expected = sound[:, channel] / (1 if name == "S16_LE" else 32768)
        assert samples.tolist() == expected.tolist()
        assert notes == []


def test_half_a_sample_at_the_end_is_left_out():
    sound = noise(0.1)
    samples, notes = read_all(sound.tobytes(), b"x")
    assert samples.tolist() == sound.tolist()
    assert notes == ["it ends within a sample: bytes left out: 1"]
    assert read_all(b"x")[0].tolist() == []


def riff(data: bytes, stated: int, between: bytes = b"") -> bytes:
    """Return a WAV file whose header states a number of bytes of audio."""
    form = struct.pack("<HHIIHH", 1, 1, 8000, 16_000, 2, 16)
    chunks = b"fmt " + struct.pack("<I", 16) + form + between + b"data" + struct.pack("<I", stated)
    return b"RIFF" + struct.pack("<I", 99) + b"WAVE" + chunks + data


def test_a_wav_header_is_read():
    sound = noise(0.1)
    data = sound.tobytes()
    extra = b"LIST" + struct.pack("<I", 3) + b"abc\0"
    for file, notes in (
        (riff(data, len(data)), []),
        (riff(data, len(data), extra), []),
        (riff(data, 0), []),
        (riff(data, 2**32 - 1), []),
        (riff(data, 2**31 - 36), []),
        (riff(data + extra, len(data)),
            ["more follows the audio of its WAV header, and was left out"]),
        (riff(data, len(data) + 10), ["it is truncated: bytes missing: 10"]),
        (wav(sound.astype(">i2"), 1, 16, order=">"), []),
    ):  # fmt: skip
        samples, found = read_all(*(file[place : place + 7] for place in range(0, len(file), 7)))
        assert samples.tolist() == sound.tolist()
        assert found == notes


def test_the_rate_is_that_of_the_wav_header():
    stream = Stream(Pieces(riff(noise(1).tobytes(), 0)), RAW)
    assert {block.rate for block in stream.blocks(0, lambda: False)} == {8000}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"fLaC" + bytes(40), "it is FLAC, neither raw samples nor WAV; decode it first"),
        (b"OggS" + bytes(40), "it is Ogg"),
        (b"RF64" + bytes(40), "it is RF64"),
        (wav(noise(0.1), 2, 16), "unreadable: WAV with the codec Microsoft ADPCM"),
        (riff(b"", 0)[:30], "damaged: no audio follows its WAV header"),
        (riff(b"", 0, b"LIST" + b"\xff" * 4), "damaged: no audio follows its WAV header"),
        (b"", "no sound; check the program that records"),
        (b"x", "no sound; check the program that records"),
    ],
)
def test_input_that_is_no_sound(data, reason):
    with pytest.raises(UserError, match=rf"^standard input: {reason}"):
        listen(data)


def test_a_channel_that_is_missing():
    stream = Stream(Pieces(noise(1).tobytes()), RAW)
    with pytest.raises(UserError, match=r"^standard input: no channel 1: it has a single"):
        list(stream.blocks(1, lambda: False))


def test_an_error_of_the_system(capsys):
    class Broken(Pieces):
        def read(self, size: int = -1) -> bytes:
            if self.pieces:
                return super().read(size)
            raise OSError(5, "Input/output error")

    stream = Stream(Broken(noise(42, 0.2).tobytes()), RAW)
    with pytest.raises(UserError, match=r"^standard input: Input/output error; check the disk"):
        Listener(make_monitor(), None, 0.0).listen(stream, 0, lambda: False)
    rows = events(capsys)
    assert [row["start"] for row in rows if row["event"] == "window"] == [*range(0, 31, 5), 32]
    assert [row["event"] for row in rows[-2:]] == ["alarm_end", "end"]
    assert rows[-1]["reason"].startswith("standard input: Input/output error")


# ---- The queue ----


def test_a_source_faster_than_real_time_waits(capsys, monkeypatch):
    monkeypatch.setattr(stream_module, "QUEUE_SECONDS", 2)
    sound = noise(60)
    listen(sound.tobytes())
    found = events(capsys)
    assert [row["event"] for row in found] == 11 * ["window"] + ["end"]


def test_a_recording_waits_however_slow_scoring_is(capsys, monkeypatch):
    monkeypatch.setattr(stream_module, "QUEUE_SECONDS", 2)
    monkeypatch.setattr(stream_module, "FASTER", 0.0)
    stream = Stream(Pieces(noise(60).tobytes()), RAW, is_recording=True)
    Listener(make_monitor(), None, 0.0).listen(stream, 0, lambda: False)
    assert [row["event"] for row in events(capsys)] == 11 * ["window"] + ["end"]


class Microphone(Pieces):
    """A pipe that takes as long as the sound lasts, on a clock of its own."""

    now = 0.0

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        self.now += len(data) / 2 / SAMPLE_RATE
        return data


def test_a_microphone_does_not_wait(capsys, monkeypatch):
    microphone = Microphone(noise(75).tobytes())
    monkeypatch.setattr(stream_module, "QUEUE_SECONDS", 30)
    monkeypatch.setattr(stream_module.time, "monotonic", lambda: microphone.now)
    stream = Stream(microphone, RAW)
    while not stream.is_over:
        time.sleep(0.01)
    Listener(make_monitor(), None, 0.0).listen(stream, 0, lambda: False)
    found = events(capsys, "dropped", "window")
    assert found[0]["event"] == "dropped"
    assert found[0]["start"] == 0
    # Twice more than 30 s were in the queue when a block came. The first 12 bytes are a block.
    seconds = (6 + 2 * 15 * 32_768) / SAMPLE_RATE
    assert found[0]["seconds"] == seconds
    assert [row["start"] for row in found[1:]] == [seconds, 65.0]


def test_the_end_of_the_input_drops_nothing(capsys, monkeypatch):
    microphone = Microphone(noise(60).tobytes()[: 12 + 15 * 65_536])
    monkeypatch.setattr(stream_module, "QUEUE_SECONDS", 30)
    monkeypatch.setattr(stream_module.time, "monotonic", lambda: microphone.now)
    stream = Stream(microphone, RAW)
    while not stream.is_over:
        time.sleep(0.01)
    assert stream.n_queued > 30 * SAMPLE_RATE
    Listener(make_monitor(), None, 0.0).listen(stream, 0, lambda: False)
    assert [row["event"] for row in events(capsys)] == 6 * ["window"] + ["end"]


def test_a_monitor_that_is_stopped_takes_no_more_sound(capsys):
    stops = iter([False] * 50)
    stream = Stream(Pieces(*(1000 * [noise(1).tobytes()])), RAW)
    Listener(make_monitor(), None, 0.0).listen(stream, 0, lambda: next(stops, True))
    rows = events(capsys)
    assert rows[-1]["reason"] == "stopped"
    assert len(rows) < 50
    stream.queue.clear()
    stream.put(np.zeros((9, 1), np.int16), SAMPLE_RATE, 0)
    assert not stream.queue


def test_what_is_dropped_divides_the_sound(capsys):
    sound = noise(100)
    listener = Listener(make_monitor(), None, 0.0)
    for begin, end in ((0, 23), (23, 24), (40, 47), (60, 71)):
        part = sound[begin * SAMPLE_RATE : end * SAMPLE_RATE]
        listener.add(Block(part, SAMPLE_RATE, begin * SAMPLE_RATE, 0.0, 0.0))
    listener.end_stretch()
    expected = [
        ("window", 0, None), ("window", 5, None), ("window", 10, None), ("window", 14, None),
        ("dropped", 24, 16), ("not_scored", 40, None), ("dropped", 47, 13), ("window", 60, None),
        ("window", 61, None),
    ]  # fmt: skip
    found = events(capsys)
    assert [(row["event"], row["start"], row.get("seconds")) for row in found] == expected


def test_after_a_stop_the_sound_that_has_arrived_is_scored(capsys):
    read, write = os.pipe()
    stream = Stream(io.FileIO(read), RAW)
    data = noise(12).tobytes()
    thread = threading.Thread(target=os.write, args=(write, data))
    thread.start()
    thread.join()
    while stream.n_queued < 12 * SAMPLE_RATE:
        time.sleep(0.01)
    Listener(make_monitor(), None, 0.0).listen(stream, 0, lambda: True)
    found = events(capsys)
    assert [row["start"] for row in found[:-1]] == [0, 2]
    assert found[-1]["event"] == "end"
    assert found[-1]["reason"] == "stopped"
    os.close(write)


def test_a_pipe_that_stalls(capsys, monkeypatch):
    monkeypatch.setattr(stream_module, "PATIENCE", 0.0)
    monkeypatch.setattr(stream_module, "WAIT", 0.01)
    go = threading.Event()

    class Stalling(Pieces):
        def read(self, size: int = -1) -> bytes:
            if len(self.pieces) == 1:
                go.wait()
            return super().read(size)

    sound = noise(20).tobytes()
    stream = Stream(Stalling(sound[:400_000], sound[400_000:]), RAW)
    monitor = make_monitor()
    set_condition = monitor.set_condition

    def notice(condition, *place, **fields):
        set_condition(condition, *place, **fields)
        if condition == "no input":
            go.set()

    monitor.set_condition = notice
    Listener(monitor, None, 0.0).listen(stream, 0, lambda: False)
    names = [(row["event"], row.get("condition"), row.get("start")) for row in events(capsys)]
    assert names == [
        ("window", None, 0), ("condition", "no input", None), ("condition", "sound", 5),
        ("window", None, 5), ("window", None, 10), ("end", None, None),
    ]  # fmt: skip


def moment(row: dict) -> float:
    """Return the time of an event in seconds since 1970."""
    return datetime.fromisoformat(row["time"]).timestamp()


def test_sound_was_recorded_just_before_it_arrives(capsys):
    """The sound card is fast by 100 s a day; then the computer sleeps; then its clock is set."""
    listener = Listener(make_monitor(), None, None)
    expected = []
    for number in range(40):
        arrived = 1e9 + 5 * number / (1 + 100 / 86_400) + 700 * (number > 10) - 1e6 * (number > 20)
        sound = noise(5, seed=number)
        listener.add(Block(sound, SAMPLE_RATE, number * len(sound), arrived, 0.0))
        expected.append(arrived - 10)
    times = [moment(row) for row in events(capsys, "window")]
    assert times == pytest.approx(expected[1:], abs=1e-3)


# ---- Windows, conditions, alarms ----


def test_a_day_in_events(capsys):
    quiet, loud = noise(60), noise(40, 0.2)
    gap, clip = np.zeros(20 * SAMPLE_RATE, np.int16), noise(20, 2)
    sound = np.concatenate([quiet, loud, quiet, gap, quiet, clip, quiet])
    listen(sound.tobytes())
    found = events(capsys)
    windows = [row for row in found if row["event"] == "window"]
    starts = find_starts(len(sound), SAMPLE_RATE, 5.0)
    assert [row["start"] for row in windows] == starts
    scored = [row["score"] for row in windows]
    scores = np.array([np.nan if score is None else score for score in scored])
    expected = [(sound[round(start * SAMPLE_RATE) :][:160_000] / 32768).std() for start in starts]
    is_scored = ~np.isnan(scores)
    assert scores[is_scored] == pytest.approx(np.array(expected)[is_scored], rel=1e-5)
    for row in windows:
        kind = {155: "silent", 160: "silent", 165: "silent", 170: "silent", 175: "silent"}
        kind |= dict.fromkeys((235, 240, 245, 250, 255), "clipped")
        by_score = "anomalous" if (row["score"] or 0) > THRESHOLD else "normal"
        assert row["decision"] == kind.get(row["start"], by_score)
    (alarm,) = find_alarms(starts, scores, THRESHOLD, AlarmRule(3, 5))
    others = [row for row in found if row["event"] != "window"]
    assert [{"event": row["event"], "start": row.get("start")} for row in others] == [
        {"event": "alarm", "start": 55}, {"event": "alarm_end", "start": 105},
        {"event": "condition", "start": 155}, {"event": "condition", "start": 180},
        {"event": "condition", "start": 235}, {"event": "condition", "start": 260},
        {"event": "end", "start": None},
    ]  # fmt: skip
    assert others[1]["score"] == alarm.score
    assert others[1]["seconds"] == 50
    conditions = [row["condition"] for row in others if row["event"] == "condition"]
    assert conditions == ["silent", "sound", "clipped", "sound"]
    place = found.index(others[0])
    assert found[place - 1]["start"] == 65, "it is known with the third window"
    assert [moment(row) for row in others[:2]] == [55, 105]


def test_an_alarm_at_the_end_of_the_input(capsys):
    listen(noise(40, 0.2).tobytes())
    names = [row["event"] for row in events(capsys)]
    assert names == 3 * ["window"] + ["alarm"] + 4 * ["window"] + ["alarm_end", "end"]


def test_lines_for_people(capsys):
    monitor = make_monitor()
    monitor.log.as_json = False
    monitor.begin(0.0)
    listen(np.concatenate([noise(30, 0.2), np.zeros(160_000, np.int16)]).tobytes(), monitor=monitor)
    lines = capsys.readouterr().out.splitlines()
    assert datetime.fromisoformat(lines[0].split("\t")[0]).timestamp() == 0
    lines = [line.split("\t")[1:] for line in lines]
    assert lines[0] == ["-", "press line-3: an alarm is 3 of 5 windows above 0.1"]
    assert [line[0] for line in lines[1:4]] == ["0:00:00", "0:00:05", "0:00:10"]
    assert [line[2] for line in lines[1:4]] == 3 * ["anomalous"]
    assert lines[4][0] == "0:00:00"
    assert lines[4][1].startswith("ALARM: 3 of 5 windows lie above 0.1, the highest with 0.2")
    assert ["0:00:25", "-", "silent"] in lines
    assert lines[-2][1].startswith("the alarm of 0:00:30 is over, highest score 0.2")
    assert lines[-1] == ["-", "end of the input"]


def test_the_machines_of_a_model():
    model = make_monitor().model
    assert model.find_machines("press", "line-3") == [0]
    assert model.find_machines("fan", "0") == [1]
    with pytest.raises(UserError, match=r"^m.onnx has no machine fan line-3; use one of press"):
        model.find_machines("fan", "line-3")


def test_a_machine_without_a_threshold():
    model = make_monitor().model
    with pytest.raises(UserError, match=r"^m.onnx: no threshold for fan 00, which takes more"):
        Monitor(model, 1, Log(as_json=True))


def test_output_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115, PTH123
    with pytest.raises(UserError, match=r"^standard output: No space left on device; free some"):
        make_monitor().begin()
    monkeypatch.undo()


# ---- Evidence ----


def make_evidence(folder: Path, megabytes: float = 100) -> Evidence:
    return Evidence(folder, MACHINE, megabytes * 1e6, 35, Log(as_json=True))


def test_evidence_is_the_sound_from_thirty_seconds_before_an_alarm(tmp_path, capsys):
    sound = np.concatenate([noise(100), noise(60, 0.2), noise(100), noise(30, 0.2), noise(60)])
    listen(sound.tobytes(), evidence=make_evidence(tmp_path / "new" / "folder"))
    rows = events(capsys, "evidence", "alarm", "alarm_end")
    alarms = [row["start"] for row in rows if row["event"] == "alarm"]
    assert alarms == [95, 255]
    files = [Path(row["file"]) for row in rows if row["event"] == "evidence"]
    assert len(files) == len(list((tmp_path / "new" / "folder").glob("*.flac"))) == 2
    for file, alarm, end in zip(files, alarms, (165, 295), strict=True):
        kept, rate = soundfile.read(file, dtype="int16")
        assert rate == SAMPLE_RATE
        begin = round((alarm - 30) * SAMPLE_RATE)
        assert np.array_equal(kept, sound[begin : begin + len(kept)])
        assert (end + 20) * SAMPLE_RATE <= begin + len(kept) < (end + 30) * SAMPLE_RATE
        assert file.name.startswith("press_line-3_19")


def test_evidence_of_an_alarm_at_the_beginning(tmp_path, capsys):
    sound = noise(40, 0.2)
    evidence = make_evidence(tmp_path)
    listen(sound.tobytes(), evidence=evidence)
    evidence.close()
    (row,) = events(capsys, "evidence")
    assert np.array_equal(soundfile.read(row["file"], dtype="int16")[0], sound)


def test_evidence_of_samples_of_more_than_16_bits(tmp_path, capsys):
    sound = noise(40, 0.2) / 32768 + 2.0**-20
    sound[-3:] = np.nan, np.inf, -np.inf
    evidence = make_evidence(tmp_path)
    raw = make_format("FLOAT_LE", SAMPLE_RATE, 1)
    listen(sound.astype("<f4").tobytes(), evidence=evidence, raw=raw)
    evidence.close()
    (row,) = events(capsys, "evidence")
    kept = soundfile.read(row["file"])[0]
    assert np.abs(kept[:-3] - sound[:-3]).max() <= 2.0**-23
    assert np.abs(kept[-3:] - [0, 1, -1]).max() <= 2.0**-22


def test_the_oldest_evidence_is_removed(tmp_path, capsys):
    other = tmp_path / "press_line-3_2_2026-01-01T00-00-00.flac"  # of a machine type press_line-3
    old = [tmp_path / f"press_line-3_2026-01-0{day}T00-00-00.flac" for day in (1, 2, 3)]
    for age, path in enumerate([other, *old]):
        path.write_bytes(bytes(1_000_000))
        os.utime(path, (age, age))
    listen(noise(60, 0.2).tobytes(), evidence=make_evidence(tmp_path, 3.5))
    rows = events(capsys, "evidence_removed", "evidence_end")
    assert [row["file"] for row in rows] == [str(path) for path in old[:2]]
    assert sum(path.stat().st_size for path in tmp_path.glob("*.flac")) < 4.5e6
    assert other.exists()


def test_an_alarm_that_is_larger_than_the_limit(tmp_path, capsys):
    listen(noise(120, 0.2).tobytes(), evidence=make_evidence(tmp_path, 1))
    rows = events(capsys, "evidence_end", "window")
    (full,) = [row for row in rows if row["event"] == "evidence_end"]
    assert full["reason"] == "it has reached the limit"
    assert len(rows) == 24, "monitoring goes on"
    kept = soundfile.read(full["file"])[0]
    assert 1e6 <= Path(full["file"]).stat().st_size < 1.6e6
    assert len(kept) > 20 * SAMPLE_RATE


def test_a_full_disk_for_evidence(tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    sound = np.concatenate([noise(40, 0.2), noise(60), noise(40, 0.2), noise(60)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        listen(sound.tobytes(), evidence=make_evidence(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    rows = events(capsys)
    assert [row["event"] for row in rows].count("window") == 39
    failed = [row["reason"] for row in rows if row["event"] == "evidence_end"]
    assert failed == 2 * ["it cannot be written: its disk may be full"], "once for each alarm"


def test_alarms_of_the_same_time_have_different_files(tmp_path, capsys):
    for _ in range(2):
        evidence = make_evidence(tmp_path)
        listen(noise(40, 0.2).tobytes(), evidence=evidence)
        evidence.close()
        evidence.lock.close()
    first, second = (Path(row["file"]) for row in events(capsys, "evidence"))
    assert second.name == f"{first.stem}_2.flac"
    assert first.read_bytes() == second.read_bytes()


def test_evidence_when_sound_was_dropped(tmp_path, capsys):
    sound = np.concatenate([noise(40), noise(10, 0.2), noise(120), noise(40, 0.2)])
    listener = Listener(make_monitor(), make_evidence(tmp_path), 0.0)
    for second in (*range(50), *range(170, 210)):
        part = sound[second * SAMPLE_RATE : (second + 1) * SAMPLE_RATE]
        listener.add(Block(part, SAMPLE_RATE, second * SAMPLE_RATE, 0.0, 0.0))
    listener.evidence.close()
    alarm, file = events(capsys, "alarm", "evidence")
    assert alarm["start"] == 35
    kept = soundfile.read(file["file"], dtype="int16")[0]
    assert np.array_equal(
        kept,
        np.concatenate([sound[5 * SAMPLE_RATE : 50 * SAMPLE_RATE], sound[170 * SAMPLE_RATE :]]),
    )


def test_the_evidence_of_the_program(tmp_path, capsys):
    """The longest delay until an alarm is found, with blocks as a microphone gives them."""
    sound = noise(300)
    for start in (200, 215, 220):  # windows 0, 3 and 4 of a span
        sound[start * SAMPLE_RATE :][:16_000] *= 12
    data = sound.tobytes()
    pieces = [data[place : place + 3200] for place in range(0, len(data), 3200)]
    options = Namespace(evidence=tmp_path, megabytes=100, start=0.0)
    script.listen(Stream(Pieces(*pieces), RAW), make_monitor(), options, lambda: False)
    alarm, file = events(capsys, "alarm", "evidence")
    kept = soundfile.read(file["file"], dtype="int16")[0]
    begin = round((alarm["start"] - 30) * SAMPLE_RATE)
    assert np.array_equal(kept, sound[begin : begin + len(kept)])


def test_a_folder_for_evidence_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Not a directory; a part of the path is a file"):
        make_evidence(tmp_path / "file" / "folder")


def test_two_monitors_with_one_folder_for_evidence(tmp_path):
    first = make_evidence(tmp_path)
    with pytest.raises(UserError, match="another monitor keeps the sound of press line-3 there; c"):
        make_evidence(tmp_path)
    Evidence(tmp_path, ("press", "line-4"), 1e6, 60, Log(True))
    first.lock.close()
    make_evidence(tmp_path)


# ---- A folder ----


@pytest.fixture
def settled(monkeypatch):
    """Let files be complete as soon as they are seen twice."""
    monkeypatch.setattr(folder_module, "SETTLED", 0)


def find(folder: Folder) -> list[str]:
    return [path.name for path, _ in folder.find_complete()]


def test_files_are_found_when_they_no_longer_change(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(folder_module.time, "monotonic", lambda: now)
    folder = Folder(tmp_path, MACHINE, None)
    (tmp_path / "b.wav").write_bytes(b"1")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "._b.wav").touch()
    (tmp_path / "folder.wav").mkdir()
    assert find(folder) == []
    now += 9
    (tmp_path / "b.wav").write_bytes(b"12")
    assert find(folder) == []
    now += 9
    (tmp_path / "a.flac").write_bytes(b"1")
    os.utime(tmp_path / "a.flac", (10**10, 10**10))
    assert find(folder) == []
    now += 1
    assert find(folder) == ["b.wav"]
    now += 9
    assert find(folder) == ["b.wav", "a.flac"], "by the time of the last change"
    for path, version in folder.find_complete():
        folder.add(path, version)
    assert find(folder) == []
    (tmp_path / "b.wav").write_bytes(b"replaced")
    assert find(folder) == []
    now += 10
    assert find(folder) == ["b.wav"]
    (tmp_path / "b.wav").unlink()
    assert find(folder) == []


def test_the_list_outlives_the_monitor(tmp_path, settled):
    names = ["a.wav", "b.wav", 'c"\n\udcff.wav']
    for name in names:
        (tmp_path / name).touch()
    first = Folder(tmp_path, MACHINE, None)
    for path, version in first.find_complete()[:2]:
        first.add(path, version)
    with first.list.open("a") as file:
        file.write('\n["c\\"')  # killed while it wrote
    first.lock.close()
    second = Folder(tmp_path, MACHINE, None)
    assert find(second) == names[2:]
    second.add(*second.find_complete()[0])
    second.lock.close()
    assert find(Folder(tmp_path, MACHINE, None)) == []
    assert find(Folder(tmp_path, ("press", "line-4"), None)) == names, "another machine"


def test_a_share_that_is_empty_for_a_while(tmp_path, settled):
    folder = Folder(tmp_path, MACHINE, None)
    (tmp_path / "a.wav").touch()
    folder.add(*folder.find_complete()[0])
    (tmp_path / "a.wav").rename(tmp_path / "elsewhere")
    assert find(folder) == []
    (tmp_path / "elsewhere").rename(tmp_path / "a.wav")
    assert find(folder) == []


def test_the_list_forgets_files_that_are_gone(tmp_path, settled, monkeypatch):
    monkeypatch.setattr(folder_module, "SPARE_LINES", 3)
    folder = Folder(tmp_path, MACHINE, tmp_path / "list")
    for number in range(50):
        path = tmp_path / f"{number}.wav"
        path.touch()
        folder.add(*folder.find_complete()[0])
        if number:
            path.unlink()
    assert len(folder.list.read_text().splitlines()) < 8
    folder.lock.close()
    assert find(Folder(tmp_path, MACHINE, tmp_path / "list")) == []


def test_a_folder_that_cannot_be_watched(tmp_path):
    with pytest.raises(UserError, match="not a folder; name the one that fills"):
        Folder(tmp_path / "missing", MACHINE, None)
    Folder(tmp_path, MACHINE, tmp_path / "list").lock.close()
    first = Folder(tmp_path, MACHINE, None)
    with pytest.raises(UserError, match="another monitor watches it for press line-3; end that"):
        Folder(tmp_path, MACHINE, None)
    first.lock.close()
    with pytest.raises(UserError, match=r"list.lock: No such file or directory; check the path"):
        Folder(tmp_path, MACHINE, tmp_path / "missing" / "list")
    (tmp_path / "list").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"list cannot be read .*; remove it, or choose another"):
        Folder(tmp_path, MACHINE, tmp_path / "list")


def watch_twice(folder: Folder, monitor: Monitor, monkeypatch) -> None:
    """Watch a folder until it was looked at twice."""
    looks = []
    monkeypatch.setattr(monitor_module.time, "sleep", looks.append)
    watch(folder, monitor, lambda: len(looks) == 2)


def test_recordings_of_a_folder(tmp_path, settled, capsys, monkeypatch):
    for number, level in enumerate((0.05, 0.2, 0.2, 0.2, 0.05)):
        file = write_clip(tmp_path / f"{9 - number}.wav", noise(10, level))
        os.utime(file, (number, number))
    os.utime(write_clip(tmp_path / "long.flac", noise(22)), (1000, 1000))
    os.utime(write_clip(tmp_path / "short.wav", noise(4), 8000), (1001, 1001))
    for name, content in (("empty.wav", b""), ("text.flac", b"text")):
        (tmp_path / name).write_bytes(content)
    cut = write_clip(tmp_path / "cut.wav", noise(10))
    os.truncate(cut, 1000)
    write_clip(tmp_path / "silent.wav", np.zeros(160_000))
    folder, monitor = Folder(tmp_path, MACHINE, None), make_monitor()
    watch_twice(folder, monitor, monkeypatch)
    rows = events(capsys)
    windows = [row for row in rows if row["event"] == "window"]
    assert [(Path(row["file"]).name, row["start"], row["decision"]) for row in windows] == [
        ("9.wav", 0, "normal"), ("8.wav", 0, "anomalous"), ("7.wav", 0, "anomalous"),
        ("6.wav", 0, "anomalous"), ("5.wav", 0, "normal"), ("long.flac", 0, "normal"),
        ("long.flac", 5, "normal"), ("long.flac", 10, "normal"), ("long.flac", 12, "normal"),
        ("short.wav", 0, "normal"),
    ]  # fmt: skip
    bad = {Path(row["file"]).name: row["reason"] for row in rows if row["event"] == "not_scored"}
    assert bad.keys() == {"cut.wav", "empty.wav", "silent.wav", "text.flac"}
    assert bad["cut.wav"].startswith("truncated: it has 956 of 320000 bytes of audio")
    assert bad["silent.wav"].startswith("silent: all samples of channel 0 are 0 at 16 bits")
    assert [moment(row) for row in windows[:6]] == [-10, -9, -8, -7, -6, 978]
    alarms = [(row["event"], moment(row)) for row in rows if row["event"].startswith("alarm")]
    assert alarms == [("alarm", -9), ("alarm_end", 3)]
    assert not [row for row in rows if row["event"] == "condition"], "an hour has not passed"
    assert rows[-1]["event"] == "end"
    watch_twice(folder, monitor, monkeypatch)
    assert events(capsys, "window", "not_scored") == [], "each is scored once"
    write_clip(cut, noise(10))
    watch_twice(folder, monitor, monkeypatch)
    assert [row["file"] for row in events(capsys, "window", "not_scored")] == [str(cut)]
    folder.lock.close()
    watch_twice(Folder(tmp_path, MACHINE, None), monitor, monkeypatch)
    again = {Path(row["file"]).name for row in events(capsys, "window", "not_scored")}
    assert again == bad.keys() - {"cut.wav"}, "a new start tries what could not be scored"


def test_a_stop_leaves_recordings_that_wait(tmp_path, settled, capsys, monkeypatch):
    for number in range(5):
        write_clip(tmp_path / f"{number}.wav", noise(10 if number < 2 else 0))
    folder, monitor = Folder(tmp_path, MACHINE, None), make_monitor()
    monkeypatch.setattr(monitor_module.time, "sleep", lambda seconds: None)
    watch(folder, monitor, lambda: len(folder.scored) == 2)
    assert [row["event"] for row in events(capsys)] == ["window", "window", "end"]


def find_one(path: Path) -> tuple[Folder, Path, folder_module.Version]:
    """Return the folder of a recording, and the recording as `find_complete` finds it."""
    folder = Folder(path.parent, MACHINE, None)
    ((found, version),) = folder.find_complete()
    return folder, found, version


def test_a_recording_that_changes_while_it_is_scored(tmp_path, settled, capsys):
    file = write_clip(tmp_path / "a.wav", noise(30))
    folder, path, version = find_one(file)
    monitor = make_monitor()

    def score(samples, rate):
        write_clip(file, noise(20))
        return SOUND, 0.01

    monitor.score = score
    monitor_file(folder, path, version, monitor, lambda: False)
    (row,) = events(capsys)
    assert row["event"] == "not_scored"
    assert row["reason"].startswith("has changed while it was scored, and is scored again")
    assert find(folder) == ["a.wav"]


def test_a_recording_is_left_when_the_monitor_is_stopped(tmp_path, settled, capsys):
    folder, path, version = find_one(write_clip(tmp_path / "a.wav", noise(30)))
    monitor_file(folder, path, version, make_monitor(), lambda: True)
    assert events(capsys) == []
    assert find(folder) == ["a.wav"]


def test_a_list_that_cannot_be_written(tmp_path, settled, capsys):
    folder, path, version = find_one(write_clip(tmp_path / "a.wav", noise(10)))
    folder.list = Path("/dev/full")
    monitor_file(folder, path, version, make_monitor(), lambda: False)
    rows = events(capsys)
    assert [row["event"] for row in rows] == ["window", "list_failed"]
    reason = "/dev/full: No space left on device; free some space, or choose another disk"
    assert rows[1]["reason"] == reason
    assert find(folder) == [], "this process remembers it"


def test_a_folder_that_disappears_and_one_that_stays_empty(tmp_path, capsys, monkeypatch):
    shared = tmp_path / "shared"
    shared.mkdir()
    folder, monitor = Folder(shared, MACHINE, tmp_path / "list"), make_monitor()
    monkeypatch.setattr(monitor_module, "FOLDER_PATIENCE", -1)
    watch_twice(folder, monitor, monkeypatch)
    assert [row.get("condition") for row in events(capsys)] == ["no input", None]
    monitor.set_condition(SOUND)
    shared.rmdir()
    monitor.log.as_json = False
    watch_twice(folder, monitor, monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    reason = f"{shared}: the folder is gone; check the connection to it"
    assert lines[1].endswith(f"\tno input: check the program that records ({reason})")


# ---- The command line ----


def parse(*words: str, monkeypatch) -> dict:
    monkeypatch.setattr(sys, "argv", ["monitor.py", "m.onnx", "press", "3", *words])
    return vars(script.parse_options())


def test_options(monkeypatch):
    options = parse(monkeypatch=monkeypatch)
    found = [options[name] for name in ("rate", "channels", "format", "megabytes", "start")]
    assert found == [16_000, 1, "S16_LE", 500, None]
    options = parse("--start", "1971-01-01T00:00+00:00", monkeypatch=monkeypatch)
    assert options["start"] == 365 * 86_400
    options = parse("--watch", "x", "--scored", "y", monkeypatch=monkeypatch)
    assert (options["watch"], options["scored"]) == (Path("x"), Path("y"))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--watch", "x", "--rate", "8000"), "--rate has no effect with --watch; leave it out"),
        (("--watch", "x", "--evidence", "y"), "--evidence has no effect with --watch"),
        (("--scored", "x"), "--scored has no effect without --watch"),
        (("--megabytes", "5"), "--megabytes has no effect without --evidence"),
        (("--rate", "0"), "argument --rate: 0 is not a positive whole number"),
        (("--megabytes", "1" + 400 * "0"), "argument --megabytes: 1000"),
        (("--start", "9999-12-31T23:59:55"), "argument --start: 9999-12-31T23:59:55 is not a time"),
        (("--start", "noon"), "argument --start: noon is not a time; write it as 2026"),
        (("--format", "S24_LE"), "argument --format: invalid choice"),
    ],
)
def test_wrong_options(words, reason, monkeypatch):
    with pytest.raises(UserError, match=f"^{reason}"):
        parse(*words, monkeypatch=monkeypatch)
