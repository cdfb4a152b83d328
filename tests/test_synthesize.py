"""datasets/synthesize.py: the sounds, and the folder they are written to."""

import itertools
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from utils import UserError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "datasets"))

import synthesize
from synthesize import FAMILIES, FAULTS, FAULTS_OF, MACHINES, RATE, SAMPLES, SIBLINGS, changed, machine_sound

FEW = {"fan": [0], "valve": [0]}  # machines of the quick runs


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make(folder: Path, *options: str) -> dict[str, bytes]:
    synthesize.main(["--output", str(folder), "--train", "1", "--test", "1", *options])
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
    samples, _ = soundfile.read(whole_set / "pump" / "test" / "anomaly_id_02_00000000.wav", dtype="int16")
    clip = synthesize.synthesize("pump", 2, "test", "anomaly", 0, seed=2023)
    assert clip.shape == (SAMPLES,)
    np.testing.assert_array_equal(samples, np.round(32767 * clip))


@pytest.mark.usefixtures("few")
def test_more_clips_leave_the_earlier_ones_as_they_are(tmp_path, whole_set):
    larger = make(tmp_path / "larger", "--train", "2", "--test", "3")
    earlier = {name: data for name, data in larger.items() if name.endswith("00000000.wav")}
    assert len(larger) == 1 + 2 * (2 + 3 + 3)
    assert len(earlier) == 2 * 3
    assert earlier.items() <= contents(whole_set).items()


def test_every_part_of_the_name_and_the_seed_make_another_clip():
    names = [
        ("fan", 0, "train", "normal", 0, 1),
        ("pump", 0, "train", "normal", 0, 1),
        ("fan", 2, "train", "normal", 0, 1),
        ("fan", 0, "test", "normal", 0, 1),
        ("fan", 0, "test", "anomaly", 0, 1),
        ("fan", 0, "train", "normal", 1, 1),
        ("fan", 0, "train", "normal", 0, 2),
    ]
    for one, other in itertools.combinations([synthesize.synthesize(*name) for name in names], 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.5


# ---- The machines ----


def features(machine: synthesize.Machine, seed: int) -> np.ndarray:
    """Mean and standard deviation over time of the level in 80 bands of 100 Hz, dB."""
    frames = machine_sound(machine, np.random.default_rng(seed)).reshape(-1, 1600)
    power = np.abs(np.fft.rfft(frames * np.hanning(1600)))[:, :800] ** 2
    level = 10 * np.log10(power.reshape(len(frames), 80, 10).sum(axis=2))
    return np.concatenate((level.mean(axis=0), level.std(axis=0)))


@pytest.mark.parametrize("machine_type", MACHINES)
def test_other_ids_and_faults_are_out_of_the_ordinary(machine_type):
    machine, *others = [changed(FAMILIES[machine_type], sibling) for sibling in SIBLINGS]
    reference = np.stack([features(machine, seed) for seed in range(6)])
    centre, scale = reference.mean(axis=0), reference.std(axis=0) + 0.5

    def distance(unusual: synthesize.Machine) -> float:
        clips = np.stack([features(unusual, seed) for seed in (10, 11, 12)])
        return np.sqrt(np.mean(((clips - centre) / scale) ** 2))

    faulty = [changed(machine, FAULTS[fault]) for fault in FAULTS_OF[machine_type]]
    assert min(map(distance, others + faulty)) > 1.2 * distance(machine)


def test_severity_grades_a_change():
    machine = FAMILIES["fan"]
    change = {"speed": 0.81, "hiss": 2.0}
    assert changed(machine, change, severity=0.0) == machine
    half = changed(machine, change, severity=0.5)
    assert (half.speed, half.hiss) == (pytest.approx(0.9), 1.0)


def test_harmonics_lie_at_the_orders_of_the_shaft():
    machine = FAMILIES["fan"]
    turns = 25 * np.arange(SAMPLES) / RATE
    tones = synthesize.harmonics(machine, turns, np.random.default_rng(0))
    spectrum = np.abs(np.fft.rfft(tones))  # bins of 0.1 Hz
    assert spectrum.argmax() == 10 * 25 * machine.mesh
    assert 0.5 < tones.std() < 2
    assert np.sum(spectrum[::250] ** 2) > 0.999 * np.sum(spectrum**2)


# ---- The folder ----


def test_prints_the_command_to_train(whole_set, capsys):
    before = contents(whole_set)
    assert make(whole_set) == before
    line, command = capsys.readouterr().out.splitlines()[0].split("; next: ")
    assert line == f"{whole_set}: 54 clips, complete already"
    python, script, root, folder, machines, table = shlex.split(command)
    assert (python, script, root, folder) == ("python", "train.py", "--data_root", str(whole_set))
    assert (machines, yaml.safe_load(table)) == ("--machines", MACHINES)


@pytest.mark.usefixtures("few")
def test_a_complete_set_is_left_alone_and_another_one_refused(tmp_path):
    make(tmp_path)
    clip = tmp_path / "fan" / "train" / "normal_id_00_00000000.wav"
    clip.write_bytes(b"not touched")
    assert make(tmp_path)["fan/train/normal_id_00_00000000.wav"] == b"not touched"
    with pytest.raises(UserError, match="--overwrite"):
        make(tmp_path, "--seed", "7")
    clip.unlink()
    with pytest.raises(UserError, match="--overwrite"):
        make(tmp_path)


@pytest.mark.usefixtures("few")
def test_overwrite_replaces_the_clips_and_nothing_else(tmp_path):
    make(tmp_path, "--train", "2")
    kept = {
        "notes.txt": b"mine",
        "fan/train/section_00_mine.wav": b"mine",
        "fan/train/normal_id_06_00000000.wav": b"mine",
    }
    for name, data in kept.items():
        (tmp_path / name).write_bytes(data)
    made = make(tmp_path, "--seed", "7", "--overwrite")
    assert kept.items() <= made.items()
    assert made == make(tmp_path / "fresh", "--seed", "7") | kept


def full_disk(clip, output, seed):
    raise OSError("no space left")


@pytest.mark.usefixtures("few")
def test_a_set_that_was_broken_off_is_not_complete(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(synthesize, "write", full_disk)
        with pytest.raises(OSError, match="no space left"):
            make(tmp_path)
    assert not (tmp_path / "synthetic.json").exists()
    assert len(make(tmp_path)) == 1 + 2 * 3


@pytest.mark.usefixtures("few")
def test_a_set_of_earlier_sounds_is_made_again(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(synthesize, "FORMAT", synthesize.FORMAT - 1)
        make(tmp_path)
    make(tmp_path)
    assert "complete already" not in capsys.readouterr().out
    make(tmp_path)
    assert "complete already" in capsys.readouterr().out


def test_recordings_of_the_same_names_are_never_replaced(tmp_path):
    recording = tmp_path / "fan" / "train" / "normal_id_00_00000123.wav"
    recording.parent.mkdir(parents=True)
    recording.write_bytes(b"real")
    with pytest.raises(UserError, match="was not made by this script"):
        make(tmp_path, "--overwrite")
    assert contents(tmp_path) == {"fan/train/normal_id_00_00000123.wav": b"real"}


@pytest.mark.parametrize(
    "options", [["--train", "0"], ["--test", "-1"], ["--train", "1.5"], ["--seed", "x"], ["--tr", "1"]]
)
def test_bad_arguments(tmp_path, options):
    with pytest.raises(UserError) as error:
        make(tmp_path / "set", *options)
    assert options[0] in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "set").exists()


def test_a_user_sees_one_line(tmp_path):
    file = tmp_path / "file"
    file.touch()
    process = subprocess.run([sys.executable, synthesize.__file__, "--output", file], capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr == f"error: {file} is not a folder: choose another --output\n"
