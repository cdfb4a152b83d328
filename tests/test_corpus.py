"""Which recordings there are, what their names say, and which classes they make."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import MACHINES, tone, write_clip, write_set

from config import AUTO, Machines, load_config
from corpus import (
    ANOMALOUS,
    COLUMNS,
    LABEL_LIST,
    NAMES_SHOWN,
    NORMAL,
    SECTION_FORM,
    UNLABELLED,
    alternatives,
    find_classes,
    find_clips,
    number_classes,
    parse_name,
    read_label_list,
    settle_classes,
)
from utils import UserError

PUBLISHED_LABELS = Path(__file__).with_name("data") / LABEL_LIST


def listed(root: Path, machines: Machines, split: str, **keys) -> pd.DataFrame:
    return find_clips(load_config(data_root=str(root), machines=machines, **keys), split)


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def labels_of(machines: Machines) -> dict[tuple[str, str], int]:
    """The class of each machine, with `classes: section`."""
    return {
        machine: own[""] for machine, own in number_classes(load_config(machines=machines)).items()
    }


# ---- Which clips ----


def test_labels_follow_the_order_of_the_table():
    assert labels_of({"pump": [4, 0], "fan": [1]}) == {
        ("pump", "04"): 0,
        ("pump", "00"): 1,
        ("fan", "01"): 2,
    }
    labels = labels_of(load_config().machines)
    assert (labels["fan", "00"], labels["pump", "00"], labels["slider", "00"]) == (0, 7, 14)
    assert (labels["ToyCar", "01"], labels["ToyConveyor", "01"], labels["valve", "06"]) == (
        21,
        28,
        40,
    )


def test_find_clips(tmp_path, capsys):
    root = write_set(tmp_path / "id_09_raid" / "data")  # the ID is in the file's name only
    write_clip(root / "fan/train/normal_id_07_00000000.wav", tone(1, 0.1))
    write_clip(root / "fan/train/anomaly_id_00_00000000.wav", tone(1, 0.1))
    (root / "fan/train/._normal_id_00_00000000.wav").touch()
    (root / "fan/train/notes.txt").touch()
    shutil.move(
        root / "valve/test/normal_id_01_00000000.wav", root / "valve/test/NORMAL_ID_01_extra.WAV"
    )
    clips = listed(root, MACHINES, "train")
    assert list(clips.columns) == COLUMNS
    assert list(zip(clips["machine_type"], clips["machine_id"], clips["label"], strict=True)) == [
        *[("fan", "00", 0)] * 4, *[("fan", "02", 1)] * 4, *[("valve", "01", 2)] * 4
    ]  # fmt: skip
    assert set(clips["condition"]) == {NORMAL}
    assert clips["path"][5] == root / "fan/train/normal_id_02_00000001.wav"
    said = capsys.readouterr().err
    assert (
        "skipped 2 files not named normal_id_XX_*.wav or .flac: ._normal_id_00_00000000.wav, notes.txt\n"
        in said
    )
    assert "skipped 1 file of IDs outside the table of machines: normal_id_07_00000000.wav" in said
    assert (
        "skipped 1 file named anomaly: training takes normal ones only: anomaly_id_00_00000000.wav"
        in said
    )
    clips = listed(root, MACHINES, "test")
    conditions = clips["condition"][clips["machine_type"] == "valve"]
    assert conditions.tolist() == [NORMAL, ANOMALOUS, ANOMALOUS, NORMAL]


def test_of_many_files_passed_over_some_are_named(tmp_path, capsys):
    root = write_set(tmp_path)
    for index in range(NAMES_SHOWN + 2):
        (root / f"fan/train/note_{index}.txt").touch()
    listed(root, MACHINES, "train")
    said = capsys.readouterr().err
    assert f"skipped {NAMES_SHOWN + 2} files not named" in said
    assert f", note_{NAMES_SHOWN - 1}.txt and 2 more\n" in said


def test_ids_without_clips_are_named(data_root, capsys):
    listed(data_root, {"fan": [0, 1, 2], "valve": [1, 3]}, "train")
    assert "train: 2 of 5 machine IDs have no clips: fan 01, valve 03" in capsys.readouterr().err
    listed(data_root, {"fan": [0, 1], "valve": [1]}, "test")
    assert "test: 1 of 3 machine IDs have no clips: fan 01" in capsys.readouterr().err


def test_missing_folders(data_root, capsys):
    machines = {"fan": [0], "pump": [0]}
    with pytest.raises(
        UserError, match=r"no folder .*pump/train .*datasets/download.py.*datasets/synthesize.py"
    ):
        listed(data_root, machines, "train")
    assert len(listed(data_root, machines, "test")) == 4
    assert "no test folder for pump" in capsys.readouterr().err
    with pytest.raises(UserError, match="no folder"):
        listed(data_root, {"pump": [0]}, "test")
    with pytest.raises(
        UserError, match=r"no clips found: looked for .*normal_id_XX.*datasets/download.py"
    ):
        listed(data_root, {"fan": [5]}, "train")
    with pytest.raises(UserError, match="training clips of one class only"):
        listed(data_root, {"fan": [0, 5]}, "train")
    with pytest.raises(
        UserError, match=r"no folder \S*nowhere \(looked for .*datasets/download.py"
    ):
        listed(data_root / "nowhere", {"fan": [0]}, "train")


# ---- Machines as the folders have them ----


def test_machines_are_found_in_the_training_folders(tmp_path, monkeypatch, capsys):
    """In an order of their own, whatever that of the disk; an ID is a number or a word."""
    names = ["press/train/normal_id_line-3_1.wav", "press/train/normal_id_10_1.flac", "press/train/NORMAL_ID_2_1.WAV",
             "press/train/normal_id_002_2.wav", "press/train/anomaly_id_7_1.wav", "press/train/id_8_1.wav",
             "press/test/normal_id_9_1.wav", "Fan/train/normal_id_00_1.wav", "notes/train/readme.txt"]  # fmt: skip
    touch(*(tmp_path / name for name in names), tmp_path / "valve" / "train")
    touch(tmp_path / ".Trash" / "train" / "normal_id_00_1.wav")
    iterdir = Path.iterdir
    for order in (sorted, lambda found: sorted(found, reverse=True)):
        monkeypatch.setattr(Path, "iterdir", lambda self, order=order: iter(order(iterdir(self))))
        assert find_classes(tmp_path, AUTO)[0] == {"Fan": [0], "press": [2, 10, "line-3"]}
        assert list(find_classes(tmp_path, AUTO)[0]) == ["Fan", "press"]
    config = settle_classes(load_config(data_root=str(tmp_path), machines="auto"))
    assert labels_of(config.machines) == {
        ("Fan", "00"): 0, ("press", "02"): 1, ("press", "10"): 2, ("press", "line-3"): 3
    }  # fmt: skip
    said = capsys.readouterr().err
    assert f"notice: {tmp_path}: 4 machine IDs: Fan 00; press 02, 10, line-3\n" in said
    assert "no recordings named normal_id_XX_*.wav or section_XX_" in said
    assert "in the train folder of notes\n" in said
    assert settle_classes(config) is config


def test_folders_without_machines(tmp_path):
    with pytest.raises(
        UserError,
        match=r"no machines found: looked for .*/<machine type>/train/normal_id_XX_\*.wav",
    ):
        find_classes(tmp_path, AUTO)[0]
    with pytest.raises(
        UserError, match=r"no folder \S*/nowhere: looked for .*docs/years.md names the data"
    ):
        find_classes(tmp_path / "nowhere", AUTO)
    config = load_config(data_root=str(tmp_path), machines="auto")
    touch(tmp_path / "fan" / "train" / "normal_id_00_1.wav")
    with pytest.raises(
        UserError, match="training clips of one class only, and the method learns by"
    ):
        find_clips(settle_classes(config), "train")
    touch(tmp_path / "fan" / "train" / "normal_id_mean_1.wav")
    with pytest.raises(
        UserError, match=r"machines: {'fan': \[0, 'mean'\]} is not .*, not pooled, mean or min"
    ):
        settle_classes(config)


def test_ids_may_be_words(tmp_path, capsys):
    touch(*(tmp_path / f"press/train/normal_id_{name}_1.wav" for name in ("line-3", "line-4", "3")))
    clips = listed(tmp_path, {"press": ["line-4", "line-3"]}, "train")
    assert clips["machine_id"].tolist() == ["line-3", "line-4"]
    assert clips["label"].tolist() == [1, 0]
    assert (
        "skipped 1 file of IDs outside the table of machines: normal_id_3_1.wav"
        in capsys.readouterr().err
    )


# ---- Evaluation clips, whose names do not tell ----


def test_published_label_list():
    """The list as published: 7,103 clips of the IDs that the challenge kept back."""
    conditions = read_label_list(PUBLISHED_LABELS)
    assert len(conditions) == 7103
    machines = {(machine_type, int(name.split("_")[1])) for machine_type, name in conditions}
    table = {
        "fan": [1, 3, 5], "pump": [1, 3, 5], "slider": [1, 3, 5], "valve": [1, 3, 5],
        "ToyCar": [5, 6, 7], "ToyConveyor": [4, 5, 6],
    }  # fmt: skip
    assert machines == {
        (machine_type, machine_id) for machine_type, ids in table.items() for machine_id in ids
    }
    lines = PUBLISHED_LABELS.read_text().splitlines()
    assert list(conditions.values()).count(ANOMALOUS) == sum(
        ",anomaly_id_" in line for line in lines
    )
    assert conditions["fan", "id_01_00000000"] == NORMAL
    assert conditions["fan", "id_01_00000001"] == ANOMALOUS


def test_evaluation_clips_take_their_condition_from_the_list(tmp_path, capsys):
    for name in (
        "id_00_00000000.wav",
        "id_00_00000001.wav",
        "id_02_00000000.flac",
        "normal_id_00_00000000.wav",
    ):
        write_clip(tmp_path / "fan/evaluation" / name, tone(0, 0.1))
    machines = {"fan": [0, 2], "valve": [1]}
    clips = listed(tmp_path, machines, "evaluation")
    assert clips["machine_id"].tolist() == ["00", "00", "02"]
    assert clips["label"].tolist() == [0, 0, 1]
    assert set(clips["condition"]) == {UNLABELLED}
    said = capsys.readouterr().err
    assert "skipped 1 file not named id_XX_*.wav or .flac: normal_id_00_00000000.wav" in said
    assert "no evaluation folder for valve" in said
    (tmp_path / LABEL_LIST).write_text(
        "valve\nid_00_00000000.wav,anomaly_id_00_00000000.wav,1\n"
        "fan\r\nid_00_00000000.wav,normal_id_00_00000007.wav,0\r\nid_02_00000000.wav,anomaly_id_02_00000001.wav,1\n\n"
    )
    conditions = listed(tmp_path, machines, "evaluation")["condition"]
    assert conditions.tolist() == [NORMAL, UNLABELLED, ANOMALOUS]
    with pytest.raises(
        UserError, match=r"no folder .*valve/evaluation .*id_XX_.*download.py --parts evaluation"
    ):
        listed(tmp_path, {"valve": [1]}, "evaluation")


@pytest.mark.parametrize(
    "line", ["id_00_00000000.wav,1", "id_00_00000000.wav,normal_id_00_00000000.wav,2"]
)
def test_a_label_list_with_something_else_in_it(tmp_path, line):
    (tmp_path / LABEL_LIST).write_text(f"fan\n{line}\n")
    with pytest.raises(UserError, match=r"eval_data_list.csv, line 2: not `<file name>,"):
        read_label_list(tmp_path / LABEL_LIST)
    (tmp_path / LABEL_LIST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"eval_data_list.csv: not a list of labels"):
        read_label_list(tmp_path / LABEL_LIST)


# ---- The names of later years ----


@pytest.mark.parametrize(
    ("path", "machine_id", "condition", "domain", "attributes"),
    [
        ("fan/train/section_00_source_train_normal_0000_strength_1_far.wav", "00", NORMAL, "source", "strength_1_far"),
        ("gear/train/section_00_target_train_normal_0001_0_g_25_mm_none.wav", "00", NORMAL, "target", "0_g_25_mm_none"),
        ("ToyTrain/source_test/section_02_source_test_anomaly_0090.wav", "02", ANOMALOUS, "source", ""),
        ("ToyTrain/target_test/section_05_target_test_0162.wav", "05", UNLABELLED, "target", ""),
        ("ToyTrain/target_test/section_05_0162.wav", "05", UNLABELLED, "target", ""),
        ("bearing/train/section_01_target_train_normal_0009_vel_16_loc_E.wav", "01", NORMAL, "target", "vel_16_loc_E"),
        ("fan/test/section_00_source_test_anomaly_0000_m-n_W.wav", "00", ANOMALOUS, "source", "m-n_W"),
        ("fan/test/SECTION_00_Source_TEST_Normal_0000_m-n_W.FLAC", "00", NORMAL, "source", "m-n_W"),
        ("gear/test/section_00_source_test_normal_0001_volt_1.5_wt_200.wav", "00", NORMAL, "source", "volt_1.5_wt_200"),
        ("ToothBrush/train/section_00_target_train_normal_0007_noAttribute.wav", "00", NORMAL, "target", "noAttribute"),
        ("ToyTank/test/section_00_0000.wav", "00", UNLABELLED, "", ""),
    ],
)  # fmt: skip
def test_names_of_2021_to_2026(path, machine_id, condition, domain, attributes):
    assert parse_name(Path(path)) == (SECTION_FORM, machine_id, condition, domain, attributes)


@pytest.mark.parametrize(
    ("liar", "message"),
    [
        (
            "train/section_0_source_train_normal_0009_pat_00.wav",
            "begins as that of a section and is not section_XX_",
        ),
        ("train/section_0a_source_train_normal_0009_pat_00.wav", "begins as that of a section"),
        ("train/section_000_source_train_normal_0009_pat_00.wav", "begins as that of a section"),
        ("train/section_00_train_normal_0009_pat_00.wav", "begins as that of a section"),
        ("train/section_00_source_train_normal_9_pat_00.wav", "begins as that of a section"),
        ("train/section_00_source_train_normal_0009_pat__00.wav", "begins as that of a section"),
        (
            "train/section_00_source_target_train_normal_0009_pat_00.wav",
            "begins as that of a section",
        ),
        ("train/section_00_source_train_normal_0009_target_00.wav", "speak of two domains"),
        (
            "train/section_00_source_test_normal_0009_pat_00.wav",
            "named as a clip of test, and in the folder train",
        ),
        (
            "train/section_00_source_train_normal_0009_pat.wav",
            "its attributes are 1 words and those of .* 2, which cannot be pairs",
        ),
        (
            "train/section_00_source_train_normal_0000_pat_00_x.wav",
            "its attributes are 2 words and those of .* 3, which cannot be pairs",
        ),
        ("train/normal_id_00_00000000.wav", "are named as in different years of the challenge"),
        (
            "test/section_00_source_train_normal_0009_pat_00.wav",
            "named as a clip of train, and in the folder test",
        ),
        (
            "source_test/section_00_target_test_normal_0009.wav",
            "name and folder speak of two domains",
        ),
        ("test/anomaly_id_00_00000000.wav", "are named as in different years of the challenge"),
        (
            "evaluation/section_00_0000.wav",
            "named like this belong into train, test, source_test, target_test; move it",
        ),
        (
            "source_test/section_00_source_test_normal_0001_pat_01.wav",
            "is in .*/valve/test too; remove one of them",
        ),
    ],
)
def test_names_that_lie(tmp_path, liar, message):
    """An error that names the file; of a mixture of forms, and of attributes, two of them."""
    split = "train" if liar.startswith("train") else "test"
    other_split = "test" if split == "train" else "train"
    honest = [
        f"section_00_{domain}_{split}_normal_000{i}_pat_0{i}.wav"
        for i, domain in ((1, "source"), (2, "target"))
    ]
    touch(
        *(
            tmp_path / machine_type / split / name
            for name in honest
            for machine_type in ("fan", "valve")
        )
    )
    listed(tmp_path, {"fan": [0], "valve": [0]}, split)
    touch(tmp_path / "valve" / liar)
    with pytest.raises(UserError, match=message) as error:
        listed(tmp_path, {"fan": [0], "valve": [0]}, split)
    assert Path(liar).name in str(error.value)
    assert f"{tmp_path}/valve/" in str(error.value)
    if "different years" in message:
        with pytest.raises(UserError, match=message):
            listed(tmp_path, {"fan": [0], "valve": [0]}, other_split)
        assert f"{tmp_path}/fan/{split}/{honest[0]}" in str(error.value)
    elif "its attributes" in message:
        assert honest[0] in str(error.value)


def test_attributes_need_not_be_pairs_where_all_clips_have_as_many(tmp_path):
    names = ["00_source_train_normal_0000_strength_1_ambient", "00_target_train_normal_0000_strength_2_ambient",
             "01_source_train_normal_0000_serial_no_000_water", "01_source_train_normal_0001_noAttribute",
             "01_source_train_normal_0002"]  # fmt: skip
    touch(*(tmp_path / "pump/train" / f"section_{name}.wav" for name in names))
    assert len(listed(tmp_path, {"pump": [0, 1]}, "train")) == 5


def test_the_splits_of_2021(tmp_path, capsys):
    """Test clips of each domain in a folder of its own, evaluation clips beside them."""
    touch(*(tmp_path / "fan" / name for name in (
        "train/section_00_source_train_normal_0000_strength_1_ambient.wav",
        "train/section_03_target_train_normal_0000_strength_1_ambient.wav",
        "source_test/section_00_source_test_normal_0000.wav", "source_test/section_00_source_test_anomaly_0000.wav",
        "source_test/section_03_source_test_0000.wav",
        "target_test/section_00_target_test_normal_0000.wav", "target_test/section_03_target_test_0000.wav",
    )))  # fmt: skip
    machines = {"fan": [0, 3]}
    assert listed(tmp_path, machines, "train")["domain"].tolist() == ["source", "target"]
    clips = listed(tmp_path, machines, "test")
    assert clips["condition"].tolist() == [ANOMALOUS, NORMAL, NORMAL]
    assert clips["domain"].tolist() == ["source", "source", "target"]
    capsys.readouterr()
    clips = listed(tmp_path, machines, "evaluation")
    assert clips["domain"].tolist() == ["source", "target"]
    assert set(clips["condition"]) == {UNLABELLED}
    said = capsys.readouterr().err
    assert "skipped" not in said, "the others are of another split"
    assert "1 of 2 machine IDs have no clips: fan 00" in said
    touch(tmp_path / "ground_truth_data/ground_truth_fan_section_03_target_test.csv")
    (tmp_path / "ground_truth_data/ground_truth_fan_section_03_target_test.csv").write_text(
        "section_03_target_test_0000.wav,1\n"
    )
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
    for line, message in (("section_01_0000.wav,1", "line 1: section_01_0000.wav is no clip of section_00_test"),
                          ("section_00_0000.wav,2", "line 1: not `<file name>,<0 or 1>`"),
                          ("section_00_0000.wav,1\nsection_00_0000.wav,0", "line 2: .* is given twice"),
                          ("section_00_0000.wav", "line 1: not `<file name>,<0 or 1>`")):  # fmt: skip
        lists[1].write_text(f"{line}\n")
        with pytest.raises(
            UserError,
            match=f"ground_truth_domain/ground_truth_ToyTank_section_00_test.csv, {message}",
        ):
            listed(tmp_path, {"ToyTank": [0]}, "evaluation")


def test_no_clips_of_a_section(tmp_path, capsys):
    touch(
        tmp_path / "fan/test/section_00_source_test_normal_0000.wav",
        tmp_path / "fan/test/section_01_0000.wav",
    )
    listed(tmp_path, {"fan": [0], "pump": [0]}, "test")
    assert "no test folder for pump" in capsys.readouterr().err
    with pytest.raises(
        UserError,
        match=r"looked for .*/test/section_XX_.*; what is there is for --split evaluation",
    ):
        listed(tmp_path, {"fan": [1]}, "test")
    with pytest.raises(
        UserError,
        match=r"looked for .*/test/section_XX_XXXX.wav .*; what is there is for --split test",
    ):
        listed(tmp_path, {"fan": [0]}, "evaluation")
    with pytest.raises(
        UserError, match=r"looked for .*; docs/years.md names the data of each year"
    ):
        listed(tmp_path, {"fan": [7]}, "test")
    touch(
        tmp_path / "fan/train/section_00_source_train_0000.wav",
        tmp_path / "fan/train/section_00_0000.wav",
    )
    with pytest.raises(
        UserError,
        match=r"no clips found: looked for .*/train/section_XX_\{source,target\}_train_normal_XXXX",
    ):
        listed(tmp_path, {"fan": [0]}, "train")


# ---- Classes ----


def test_the_attributes_of_an_id_make_its_classes(tmp_path, capsys):
    touch(*(tmp_path / machine_type / "train" / f"section_{section}_source_train_normal_{i:04d}_{attributes}.wav"
            for machine_type, section, i, attributes in (
                ("valve", "00", 0, "pat_01"), ("valve", "00", 1, "pat_00"), ("valve", "00", 2, "pat_01"),
                ("fan", "01", 0, "noAttribute"), ("fan", "00", 0, "m-n_W"), ("fan", "00", 1, "m-n_X"))),
          tmp_path / "valve/test/section_00_source_test_anomaly_0000_pat_07.wav")  # fmt: skip
    config = settle_classes(
        load_config(data_root=str(tmp_path), machines="auto", classes="attributes")
    )
    assert config.classes == {
        "fan": {"00": ["m-n_W", "m-n_X"], "01": ["noAttribute"]}, "valve": {"00": ["pat_00", "pat_01"]}
    }  # fmt: skip
    said = capsys.readouterr().err
    assert "3 machine IDs: fan 00, 01; valve 00\n" in said
    assert "5 classes by attributes: fan 00 (2), fan 01 (1), valve 00 (2)\n" in said
    assert settle_classes(config) is config
    assert find_clips(config, "train")["label"].tolist() == [0, 1, 2, 4, 3, 4]
    assert find_clips(config, "test")["label"].tolist() == [3], (
        "the first class, whatever the attributes"
    )
    assert alternatives(config).tolist() == [[0, 1], [1, 0], [2, 2], [3, 4], [4, 3]]
    touch(tmp_path / "valve/train/section_00_source_train_normal_0003_pat_02.wav")
    assert len(find_clips(config, "train")) == 6
    assert (
        "skipped 1 file with attributes outside the table of classes: section_00_source"
        in capsys.readouterr().err
    )


def test_attributes_of_one_id_are_classes_enough(tmp_path):
    touch(
        *(
            tmp_path / f"valve/train/section_00_source_train_normal_0000_pat_0{i}.wav"
            for i in range(2)
        )
    )
    with pytest.raises(UserError, match="training clips of one class only"):
        listed(tmp_path, {"valve": [0]}, "train")
    config = settle_classes(
        load_config(data_root=str(tmp_path), machines={"valve": [0]}, classes="attributes")
    )
    assert find_clips(config, "train")["label"].tolist() == [0, 1]


def test_without_attributes_the_classes_are_the_ids(data_root):
    by_section, by_attributes = (
        settle_classes(load_config(data_root=str(data_root), machines=MACHINES, classes=classes))
        for classes in ("section", "attributes")
    )
    assert number_classes(by_attributes) == number_classes(by_section)
    assert find_clips(by_attributes, "train").equals(find_clips(by_section, "train"))
    assert alternatives(load_config()).tolist() == [[label] for label in range(41)]
