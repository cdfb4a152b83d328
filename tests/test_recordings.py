"""The recordings of a split, and the classes they make."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import MACHINES, tone, touch, write_clip, write_set

from classes import MachineClass
from config import load_config
from errors import UserError
from names import ANOMALOUS, LABEL_LIST, NORMAL, UNLABELLED
from recordings import COLUMNS, NAMES_SHOWN, find_classes, find_recordings


def listed(root: Path, machines, split: str, **keys) -> pd.DataFrame:
    config = load_config(data_root=str(root), machines=machines, **keys)
    return find_recordings(config, find_classes(config), split)


# ---- Which clips ----


def test_find_clips(tmp_path, capsys):
    root = write_set(tmp_path / "id_09_raid" / "data")  # the ID is in the file's name only
    write_clip(root / "fan/train/normal_id_07_00000000.wav", tone(1, 0.1))
    write_clip(root / "fan/train/anomaly_id_00_00000000.wav", tone(1, 0.1))
    (root / "fan/train/._normal_id_00_00000000.wav").touch()
    (root / "fan/train/notes.txt").touch()
    valve = root / "valve/test"
    shutil.move(valve / "normal_id_01_00000000.wav", valve / "NORMAL_ID_01_extra.WAV")
    clips = listed(root, MACHINES, "train")
    assert list(clips.columns) == [*COLUMNS, "label"]
    assert list(zip(clips["machine_type"], clips["machine_id"], clips["label"], strict=True)) == [
        *[("fan", "00", 0)] * 4, *[("fan", "02", 1)] * 4, *[("valve", "01", 2)] * 4
    ]  # fmt: skip
    assert set(clips["condition"]) == {NORMAL}
    assert clips["path"][5] == root / "fan/train/normal_id_02_00000001.wav"
    errors = capsys.readouterr().err
    for notice in (
        "skipped 1 file not named normal_id_XX_*.wav or .flac: notes.txt\n",
        "skipped 1 file whose machine ID is not in machines: normal_id_07_00000000.wav",
        "skipped 1 file named anomaly (training uses normal recordings only): "
        "anomaly_id_00_00000000.wav",
    ):
        assert notice in errors
    clips = listed(root, MACHINES, "test")
    conditions = clips["condition"][clips["machine_type"] == "valve"]
    assert conditions.tolist() == [NORMAL, ANOMALOUS, ANOMALOUS, NORMAL]


def test_of_many_files_passed_over_some_are_named(tmp_path, capsys):
    root = write_set(tmp_path)
    for index in range(NAMES_SHOWN + 2):
        (root / f"fan/train/note_{index}.txt").touch()
    listed(root, MACHINES, "train")
    errors = capsys.readouterr().err
    assert f"skipped {NAMES_SHOWN + 2} files not named" in errors
    assert f", note_{NAMES_SHOWN - 1}.txt and 2 more\n" in errors


def test_ids_without_clips_are_named(data_root, capsys):
    listed(data_root, {"fan": [0, 1, 2], "valve": [1, 3]}, "train")
    assert (
        "train: 2 of 5 machine IDs have no recordings: fan 01, valve 03" in capsys.readouterr().err
    )
    listed(data_root, {"fan": [0, 1], "valve": [1]}, "test")
    assert "test: 1 of 3 machine IDs have no recordings: fan 01" in capsys.readouterr().err


def test_missing_folders(data_root, capsys):
    machines = {"fan": [0], "pump": [0]}
    message = r"no folder .*pump/train .*datasets/download.py.*datasets/synthesize.py"
    with pytest.raises(UserError, match=message):
        listed(data_root, machines, "train")
    assert len(listed(data_root, machines, "test")) == 4
    assert "no test folder for pump" in capsys.readouterr().err
    with pytest.raises(UserError, match="no folder"):
        listed(data_root, {"pump": [0]}, "test")
    message = r"no recordings found: looked for .*normal_id_XX.*datasets/download.py"
    with pytest.raises(UserError, match=message):
        listed(data_root, {"fan": [5]}, "train")
    with pytest.raises(UserError, match="all training recordings are of one class"):
        listed(data_root, {"fan": [0, 5]}, "train")
    message = r"no folder \S*nowhere \(looked for .*datasets/download.py"
    with pytest.raises(UserError, match=message):
        listed(data_root / "nowhere", {"fan": [0]}, "train")


# ---- Machines as the folders have them ----


def test_machines_are_found_in_the_training_folders(tmp_path, monkeypatch, capsys):
    """Their order does not depend on that of the file system; an ID is a number or a word."""
    names = [
        "press/train/normal_id_line-3_1.wav", "press/train/normal_id_10_1.flac",
        "press/train/NORMAL_ID_2_1.WAV", "press/train/normal_id_002_2.wav",
        "press/train/anomaly_id_7_1.wav", "press/train/id_8_1.wav",
        "press/test/normal_id_9_1.wav", "Fan/train/normal_id_00_1.wav", "notes/train/readme.txt",
    ]  # fmt: skip
    touch(*(tmp_path / name for name in names), tmp_path / "valve" / "train")
    touch(tmp_path / ".Trash" / "train" / "normal_id_00_1.wav")
    iterdir = Path.iterdir
    for order in (sorted, lambda paths: sorted(paths, reverse=True)):
        monkeypatch.setattr(Path, "iterdir", lambda self, order=order: iter(order(iterdir(self))))
        classes = find_classes(load_config(data_root=str(tmp_path), machines="auto"))
        assert classes.machines == [
            ("Fan", "00"), ("press", "02"), ("press", "10"), ("press", "line-3")
        ]  # fmt: skip
    errors = capsys.readouterr().err
    assert f"notice: {tmp_path}: 4 machine IDs: Fan 00; press 02, 10, line-3\n" in errors
    assert "no recordings named normal_id_XX_*.wav or section_XX_" in errors
    assert "in the train folder of notes\n" in errors


def test_folders_without_machines(tmp_path):
    message = r"no machines found: looked for .*/<machine type>/train/normal_id_XX_\*.wav"
    with pytest.raises(UserError, match=message):
        listed(tmp_path, "auto", "train")
    message = r"no folder \S*/nowhere: looked for .*docs/years.md lists the data"
    with pytest.raises(UserError, match=message):
        listed(tmp_path / "nowhere", "auto", "train")
    touch(tmp_path / "fan" / "train" / "normal_id_00_1.wav")
    message = "all training recordings are of one class, but the method learns by"
    with pytest.raises(UserError, match=message):
        listed(tmp_path, "auto", "train")
    touch(tmp_path / "fan" / "train" / "normal_id_mean_1.wav")
    message = "fan/train: a machine ID cannot be named mean, which is reserved or invalid; "
    message += "rename its recordings"
    with pytest.raises(UserError, match=message):
        listed(tmp_path, "auto", "train")
    touch(tmp_path / "average" / "train" / "normal_id_00_1.wav")
    message = "/average: a machine type cannot have this name, which is reserved or invalid; "
    message += "rename it"
    with pytest.raises(UserError, match=message):
        listed(tmp_path, "auto", "train")


def test_ids_may_be_words(tmp_path, capsys):
    touch(*(tmp_path / f"press/train/normal_id_{name}_1.wav" for name in ("line-3", "line-4", "3")))
    clips = listed(tmp_path, {"press": ["line-4", "line-3"]}, "train")
    assert clips["machine_id"].tolist() == ["line-3", "line-4"]
    assert clips["label"].tolist() == [1, 0]
    notice = "skipped 1 file whose machine ID is not in machines: normal_id_3_1.wav"
    assert notice in capsys.readouterr().err


# ---- Evaluation clips, whose names do not tell their condition ----


def test_evaluation_clips_take_their_condition_from_the_list(tmp_path, capsys):
    for name in (
        "id_00_00000000.wav", "id_00_00000001.wav",
        "id_02_00000000.flac", "normal_id_00_00000000.wav",
    ):  # fmt: skip
        write_clip(tmp_path / "fan/evaluation" / name, tone(0, 0.1))
    machines = {"fan": [0, 2], "valve": [1]}
    clips = listed(tmp_path, machines, "evaluation")
    assert clips["machine_id"].tolist() == ["00", "00", "02"]
    assert set(clips["condition"]) == {UNLABELLED}
    errors = capsys.readouterr().err
    assert "skipped 1 file not named id_XX_*.wav or .flac: normal_id_00_00000000.wav" in errors
    assert "no evaluation folder for valve" in errors
    assert "3 of 3 recordings are not listed in eval_data_list.csv and are left out" in errors
    (tmp_path / LABEL_LIST).write_text(
        "valve\nid_00_00000000.wav,anomaly_id_00_00000000.wav,1\n"
        "fan\r\nid_00_00000000.wav,normal_id_00_00000007.wav,0\r\n"
        "id_02_00000000.wav,anomaly_id_02_00000001.wav,1\n\n"
    )
    conditions = listed(tmp_path, machines, "evaluation")["condition"]
    assert conditions.tolist() == [NORMAL, UNLABELLED, ANOMALOUS]
    message = r"no folder .*valve/evaluation .*id_XX_.*download.py --parts evaluation"
    with pytest.raises(UserError, match=message):
        listed(tmp_path, {"valve": [1]}, "evaluation")


# ---- Later years ----


def test_the_splits_of_2021(tmp_path, capsys):
    """Each domain has a folder of test clips, which also holds its evaluation clips."""
    names = (
        "train/section_00_source_train_normal_0000_strength_1_ambient.wav",
        "train/section_03_target_train_normal_0000_strength_1_ambient.wav",
        "source_test/section_00_source_test_normal_0000.wav",
        "source_test/section_00_source_test_anomaly_0000.wav",
        "source_test/section_03_source_test_0000.wav",
        "target_test/section_00_target_test_normal_0000.wav",
        "target_test/section_03_target_test_0000.wav",
    )
    touch(*(tmp_path / "fan" / name for name in names))
    machines = {"fan": [0, 3]}
    assert listed(tmp_path, machines, "train")["domain"].tolist() == ["source", "target"]
    clips = listed(tmp_path, machines, "test")
    assert clips["condition"].tolist() == [ANOMALOUS, NORMAL, NORMAL]
    assert clips["domain"].tolist() == ["source", "source", "target"]
    parts = ["section_00_source_test", "section_00_source_test", "section_00_target_test"]
    assert clips["part"].tolist() == parts
    capsys.readouterr()
    clips = listed(tmp_path, machines, "evaluation")
    assert clips["domain"].tolist() == ["source", "target"]
    assert set(clips["condition"]) == {UNLABELLED}
    errors = capsys.readouterr().err
    assert "skipped" not in errors, "the others belong to another split"
    assert "1 of 2 machine IDs have no recordings: fan 00" in errors
    labels = tmp_path / "ground_truth_data/ground_truth_fan_section_03_target_test.csv"
    touch(labels)
    labels.write_text("section_03_target_test_0000.wav,1\n")
    assert listed(tmp_path, machines, "evaluation")["condition"].tolist() == [UNLABELLED, ANOMALOUS]


def test_evaluation_clips_of_later_years_have_their_labels_in_lists(tmp_path):
    touch(
        *(tmp_path / "ToyTank/test" / f"section_00_000{i}.wav" for i in range(4)),
        tmp_path / "fan/test/section_00_0000.wav",
    )
    lists = [
        tmp_path / f"ground_truth_{kind}" / "ground_truth_ToyTank_section_00_test.csv"
        for kind in ("data", "domain")
    ]
    touch(*lists)
    lists[0].write_text("section_00_0000.wav,0\nsection_00_0001.wav,1\r\n\nsection_00_0002.wav,1\n")
    lists[1].write_text(
        "\ufeffsection_00_0000.wav,1\nsection_00_0001.wav,0\nsection_00_0002.wav,1\n"
    )
    clips = listed(tmp_path, {"ToyTank": [0], "fan": [0]}, "evaluation")
    assert clips["condition"].tolist() == [NORMAL, ANOMALOUS, ANOMALOUS, UNLABELLED, UNLABELLED]
    assert clips["domain"].tolist() == ["target", "source", "target", "", ""]
    for lines, message in (
        (
            "section_01_0000.wav,1",
            "line 1: section_01_0000.wav is not a recording of section_00",
        ),
        ("section_00_0000.wav,2", "line 1: expected `<file name>,<0 or 1>`"),
        (
            "section_00_0000.wav,1\nsection_00_0000.wav,0",
            "line 2: .* appears twice",
        ),
        ("section_00_0000.wav", "line 1: expected `<file name>,<0 or 1>`"),
    ):
        lists[1].write_text(f"{lines}\n")
        file = "ground_truth_domain/ground_truth_ToyTank_section_00_test.csv"
        with pytest.raises(UserError, match=f"{file}, {message}"):
            listed(tmp_path, {"ToyTank": [0]}, "evaluation")


def test_no_clips_of_a_section(tmp_path, capsys):
    touch(
        tmp_path / "fan/test/section_00_source_test_normal_0000.wav",
        tmp_path / "fan/test/section_01_0000.wav",
    )
    listed(tmp_path, {"fan": [0], "pump": [0]}, "test")
    assert "no test folder for pump" in capsys.readouterr().err
    message = r"looked for .*/test/section_XX_.*; the recordings in .* are for --split evaluation"
    with pytest.raises(UserError, match=message):
        listed(tmp_path, {"fan": [1]}, "test")
    message = (
        r"looked for .*/test/section_XX_XXXX.wav .*; the recordings in .* are for --split test"
    )
    with pytest.raises(UserError, match=message):
        listed(tmp_path, {"fan": [0]}, "evaluation")
    message = r"looked for .*; docs/years.md lists the data of each year"
    with pytest.raises(UserError, match=message):
        listed(tmp_path, {"fan": [7]}, "test")
    touch(
        tmp_path / "fan/train/section_00_source_train_0000.wav",
        tmp_path / "fan/train/section_00_0000.wav",
    )
    message = r"looked for .*/train/section_XX_\{source,target\}_train_normal_XXXX"
    with pytest.raises(UserError, match=message):
        listed(tmp_path, {"fan": [0]}, "train")


# ---- Classes ----


def test_the_attributes_of_an_id_make_its_classes(tmp_path, capsys):
    for name in (
        "valve/train/section_00_source_train_normal_0000_pat_01.wav",
        "valve/train/section_00_source_train_normal_0001_pat_00.wav",
        "valve/train/section_00_source_train_normal_0002_pat_01.wav",
        "fan/train/section_01_source_train_normal_0000_noAttribute.wav",
        "fan/train/section_00_source_train_normal_0000_m-n_W.wav",
        "fan/train/section_00_source_train_normal_0001_m-n_X.wav",
        "valve/test/section_00_source_test_anomaly_0000_pat_07.wav",
    ):
        touch(tmp_path / name)
    config = load_config(data_root=str(tmp_path), machines="auto", classes="attributes")
    classes = find_classes(config)
    assert classes.entries == (
        ("fan", "00", "m-n_W"), ("fan", "00", "m-n_X"), ("fan", "01", "noAttribute"),
        ("valve", "00", "pat_00"), ("valve", "00", "pat_01"),
    )  # fmt: skip
    errors = capsys.readouterr().err
    assert "3 machine IDs: fan 00, 01; valve 00\n" in errors
    assert "5 classes by attributes: fan 00 (2), fan 01 (1), valve 00 (2)\n" in errors
    assert find_recordings(config, classes, "train")["label"].tolist() == [0, 1, 2, 4, 3, 4]
    test = find_recordings(config, classes, "test")
    assert test["attributes"].tolist() == ["pat_07"], "a test clip may have other attributes"
    touch(tmp_path / "valve/train/section_00_source_train_normal_0003_pat_02.wav")
    assert len(find_recordings(config, classes, "train")) == 6
    notice = "skipped 1 file whose attributes belong to no class: section_00_source"
    assert notice in capsys.readouterr().err


def test_attributes_of_one_id_are_classes_enough(tmp_path):
    for pattern in ("pat_00", "pat_01"):
        touch(tmp_path / f"valve/train/section_00_source_train_normal_0000_{pattern}.wav")
    with pytest.raises(UserError, match="all training recordings are of one class"):
        listed(tmp_path, {"valve": [0]}, "train")
    clips = listed(tmp_path, {"valve": [0]}, "train", classes="attributes")
    assert clips["label"].tolist() == [0, 1]


def test_without_attributes_the_classes_are_the_ids(data_root):
    by_section, by_attributes = (
        find_classes(load_config(data_root=str(data_root), machines=MACHINES, classes=classes))
        for classes in ("section", "attributes")
    )
    assert by_section == by_attributes


def test_a_machine_without_recordings_has_a_class(tmp_path):
    touch(tmp_path / "valve/train/section_00_source_train_normal_0000_pat_01.wav")
    machines = {"valve": [0, 1]}
    config = load_config(data_root=str(tmp_path), machines=machines, classes="attributes")
    entries = find_classes(config).entries
    assert entries == (MachineClass("valve", "00", "pat_01"), MachineClass("valve", "01", ""))


def test_machine_types_that_lie_too_deep_are_named(tmp_path, capsys):
    root = write_set(tmp_path / "data")
    shutil.move(root / "valve", tmp_path / "valve")
    for folder in (root / "extra", root / ".hidden"):
        folder.mkdir()
        shutil.copytree(tmp_path / "valve", folder / "valve")
    find_classes(load_config(data_root=str(root), machines="auto"))
    notices = capsys.readouterr().err
    assert f"{root}: passed over {root / 'extra' / 'valve'}, one folder too deep; move" in notices
    assert ".hidden" not in notices
    shutil.rmtree(root / "fan")
    with pytest.raises(UserError, match="no machines found"):
        find_classes(load_config(data_root=str(root), machines="auto"))
    assert "one folder too deep" in capsys.readouterr().err
