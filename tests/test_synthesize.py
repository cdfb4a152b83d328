"""datasets/synthesize.py: the sounds, and the folder they are written to."""

import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from config import load_config
from errors import UserError
from recordings import find_classes, find_recordings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "datasets"))

import synthesize
from synthesize import FAULTS, MACHINES, SAMPLES, Clip, machine_sound

FEW = {"fan": [0], "valve": [0]}  # machines of the quick runs


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def make(folder: Path, *options: str) -> dict[str, bytes]:
    counts = [] if "--train" in options else ["--train", "1"]
    counts += [] if "--test" in options else ["--test", "1"]
    synthesize.main(["--output", str(folder), *counts, *options])
    return contents(folder)


@pytest.fixture(scope="module")
def whole_set(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "set"
    make(folder)
    return folder


@pytest.fixture
def few(monkeypatch) -> None:
    monkeypatch.setattr(synthesize, "MACHINES", FEW)


# ---- The clips ----


def test_layout_and_counts(whole_set):
    expected = {"synthetic.json"}
    for machine_type, ids in MACHINES.items():
        for machine_id in ids:
            for kind in ("train/normal", "test/normal", "test/anomaly"):
                expected.add(f"{machine_type}/{kind}_id_{machine_id:02d}_00000000.wav")
    assert set(contents(whole_set)) == expected
    assert len(expected) == 1 + 18 * 3


def test_format_and_level(whole_set):
    for path in whole_set.rglob("*.wav"):
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.frames) == (16000, 1, 160000)
        assert (info.format, info.subtype) == ("WAV", "PCM_16")
        samples, _ = soundfile.read(path)
        assert 0.0049 < np.sqrt(np.mean(samples**2)) < 0.0201
        assert np.abs(samples).max() < 1


def test_file_holds_the_synthesized_samples(whole_set):
    samples, _ = soundfile.read(
        whole_set / "pump" / "test" / "anomaly_id_02_00000000.wav", dtype="int16"
    )
    clip = synthesize.synthesize(Clip("pump", 2, "test", "anomaly", 0), seed=2023)
    assert clip.shape == (SAMPLES,)
    np.testing.assert_array_equal(samples, np.round(32767 * clip))


@pytest.mark.usefixtures("few")
def test_more_clips_leave_the_earlier_ones_as_they_are(tmp_path, whole_set):
    larger = make(tmp_path / "larger", "--train", "2", "--test", "3")
    earlier = {name: data for name, data in larger.items() if name.endswith("00000000.wav")}
    assert len(larger) == 1 + 2 * (2 + 3 + 3)
    assert len(earlier) == 2 * 3
    assert earlier.items() <= contents(whole_set).items()


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        (Clip("fan", 2, "test", "normal", 3), [-9.3098, 6.5062, -6.1187, -4.3615]),
        (Clip("valve", 4, "test", "anomaly", 3), [-0.2705, -13.5556, -3.7386, -5.7399]),
    ],
)
def test_the_sounds_stay_the_same(clip, expected):
    """If they change, so does the table of the demo in the README."""
    assert 1000 * synthesize.synthesize(clip, 2023)[::40000] == pytest.approx(expected, abs=1e-3)


# ---- The form of 2023 ----


@pytest.mark.usefixtures("few")
def test_the_form_of_2023_can_be_trained_and_shifts_its_domain(tmp_path):
    """The target domain has a faster machine, in a louder factory."""
    options = ("--form", "2023", "--test", "2")
    make(tmp_path / "set", *options, "--train", "8")
    config = load_config(data_root=str(tmp_path / "set"), machines="auto", classes="attributes")
    classes = find_classes(config)
    speeds = ("spd_1", "spd_2", "spd_3")
    assert [tuple(entry) for entry in classes.entries] == [
        (machine_type, "00", speed) for machine_type in FEW for speed in speeds
    ]
    train, test = (find_recordings(config, classes, split) for split in ("train", "test"))
    assert train["domain"].value_counts().to_dict() == {"source": 16, "target": 2}
    assert train["label"].value_counts().sort_index().tolist() == [4, 4, 1] * 2
    kinds = test.groupby(["machine_type", "domain", "condition"]).size()
    assert kinds.tolist() == [2] * 8
    made = contents(tmp_path / "set")
    assert len(made) == 1 + 18 + 16
    assert make(tmp_path / "set", *options, "--train", "8") == made
    with pytest.raises(UserError, match="contains another set"):
        make(tmp_path / "set")
    make(tmp_path / "set", "--overwrite")
    assert not list((tmp_path / "set").rglob("section_*"))
    with pytest.raises(UserError, match=r"--train 10001 .*: file names of 2023 have four digits"):
        make(tmp_path / "set", *options, "--train", "10001")


# ---- The machines ----


def features(machine_type: str, machine_id: int, seed: int, fault: str = "") -> np.ndarray:
    """Mean and standard deviation over time of the level in 80 bands of 100 Hz, in dB: `(160,)`."""
    severity = {name: float(name == fault) for name in FAULTS}
    clip = Clip(machine_type, machine_id, "train", "normal", 0)
    frames = machine_sound(clip, severity, np.random.default_rng(seed)).reshape(-1, 1600)
    power = np.abs(np.fft.rfft(frames * np.hanning(1600)))[:, :800] ** 2
    level = 10 * np.log10(power.reshape(len(frames), 80, 10).sum(axis=2))
    return np.concatenate((level.mean(axis=0), level.std(axis=0)))


@pytest.mark.slow
@pytest.mark.parametrize("machine_type", MACHINES)
def test_other_ids_and_faults_are_out_of_the_ordinary(machine_type):
    machine_id, *others = MACHINES[machine_type]
    reference = np.stack([features(machine_type, machine_id, seed) for seed in range(6)])
    centre, scale = reference.mean(axis=0), reference.std(axis=0) + 0.5

    def distance(machine_id: int, fault: str = "") -> float:
        clips = np.stack([features(machine_type, machine_id, seed, fault) for seed in (10, 11)])
        return np.sqrt(np.mean(((clips - centre) / scale) ** 2))

    unusual = [distance(other) for other in others] + [
        distance(machine_id, fault) for fault in FAULTS
    ]
    assert min(unusual) > 1.2 * distance(machine_id)


def test_only_anomalous_clips_have_a_fault_and_each_fault_takes_its_turn(monkeypatch):
    severities = []

    def record(clip: Clip, severity: dict[str, float], rng: np.random.Generator) -> np.ndarray:
        severities.append(severity)
        return np.zeros(SAMPLES)

    monkeypatch.setattr(synthesize, "machine_sound", record)
    for index in range(len(FAULTS)):
        synthesize.synthesize(Clip("fan", 0, "test", "normal", index), seed=1)
        assert not any(severities.pop().values())
        synthesize.synthesize(Clip("fan", 0, "test", "anomaly", index), seed=1)
        severity = severities.pop()
        assert [fault for fault in FAULTS if severity[fault]] == [FAULTS[index]]
        assert 0.3 <= severity[FAULTS[index]] <= 1


# ---- The folder ----


def test_prints_the_command_to_train(whole_set, capsys):
    before = contents(whole_set)
    assert make(whole_set) == before
    line, command = capsys.readouterr().out.splitlines()[0].split("; next: ")
    assert line == f"{whole_set}: 54 recordings, already complete"
    assert shlex.split(command) == [
        "python",
        "train.py",
        "--data_root",
        str(whole_set),
        "--machines",
        "auto",
    ]


@pytest.mark.usefixtures("few")
def test_a_complete_set_is_left_alone_and_another_one_refused(tmp_path):
    clips = make(tmp_path)
    clip = tmp_path / "fan" / "train" / "normal_id_00_00000000.wav"
    clip.write_bytes(b"not touched")
    assert make(tmp_path)["fan/train/normal_id_00_00000000.wav"] == b"not touched"
    with pytest.raises(UserError, match="--overwrite"):
        make(tmp_path, "--seed", "7")
    clip.unlink()
    assert make(tmp_path) == clips


@pytest.mark.usefixtures("few")
def test_overwrite_replaces_the_clips_and_nothing_else(tmp_path):
    make(tmp_path, "--train", "2")
    others = {
        "notes.txt": b"mine",
        "fan/train/section_00_mine.wav": b"mine",
        "fan/train/normal_id_06_00000000.wav": b"mine",
    }
    for name, data in others.items():
        (tmp_path / name).write_bytes(data)
    made = make(tmp_path, "--seed", "7", "--overwrite")
    assert others.items() <= made.items()
    assert made == make(tmp_path / "fresh", "--seed", "7") | others


def full_disk(clip, output, seed):
    raise OSError("no space left")


@pytest.mark.usefixtures("few")
def test_an_interrupted_set_is_made_again(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(synthesize, "write_clip", full_disk)
        with pytest.raises(OSError, match="no space left"):
            make(tmp_path)
    assert len(make(tmp_path, "--seed", "7")) == 1 + 2 * 3
    assert "already complete" not in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", ["fan/train/normal_id_00_00000123.wav", "notes.txt"])
def test_a_folder_of_something_else_is_never_touched(tmp_path, name, options):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"real")
    with pytest.raises(UserError, match="that this script did not write"):
        make(tmp_path, *options)
    assert contents(tmp_path) == {name: b"real"}


@pytest.mark.parametrize(
    "options",
    [["--train", "0"], ["--test", "-1"], ["--train", "1.5"], ["--seed", "x"], ["--tr", "1"]],
)
def test_bad_arguments(tmp_path, options):
    with pytest.raises(UserError) as error:
        make(tmp_path / "set", *options)
    assert options[0] in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "set").exists()


def test_a_user_sees_one_line(tmp_path, fails):
    (tmp_path / "file").touch()
    fails(
        synthesize.main,
        "--output",
        tmp_path / "file",
        match="file is not a folder; choose another --output$",
    )
