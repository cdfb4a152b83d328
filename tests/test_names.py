"""The names of recordings in later years: what they say, and those that contradict each other."""

from pathlib import Path

import pytest
from conftest import touch

from errors import UserError
from names import (
    ANOMALOUS,
    NORMAL,
    SECTION_FORM,
    UNLABELLED,
    Recording,
    list_files,
    parse_name,
    parse_path,
)


@pytest.mark.parametrize(
    ("path", "machine_id", "condition", "domain", "attributes"),
    [
        ("fan/train/section_00_source_train_normal_0000_strength_1_far.wav",
         "00", NORMAL, "source", "strength_1_far"),
        ("gear/train/section_00_target_train_normal_0001_0_g_25_mm_none.wav",
         "00", NORMAL, "target", "0_g_25_mm_none"),
        ("ToyTrain/source_test/section_02_source_test_anomaly_0090.wav",
         "02", ANOMALOUS, "source", ""),
        ("ToyTrain/target_test/section_05_target_test_0162.wav",
         "05", UNLABELLED, "target", ""),
        ("ToyTrain/target_test/section_05_0162.wav",
         "05", UNLABELLED, "target", ""),
        ("bearing/train/section_01_target_train_normal_0009_vel_16_loc_E.wav",
         "01", NORMAL, "target", "vel_16_loc_E"),
        ("fan/test/section_00_source_test_anomaly_0000_m-n_W.wav",
         "00", ANOMALOUS, "source", "m-n_W"),
        ("fan/test/SECTION_00_Source_TEST_Normal_0000_m-n_W.FLAC",
         "00", NORMAL, "source", "m-n_W"),
        ("gear/test/section_00_source_test_normal_0001_volt_1.5_wt_200.wav",
         "00", NORMAL, "source", "volt_1.5_wt_200"),
        ("ToothBrush/train/section_00_target_train_normal_0007_noAttribute.wav",
         "00", NORMAL, "target", "noAttribute"),
        ("ToyTank/test/section_00_0000.wav",
         "00", UNLABELLED, "", ""),
    ],
)  # fmt: skip
def test_names_of_2021_to_2026(path, machine_id, condition, domain, attributes):
    machine_type, folder, _ = path.split("/")
    assert parse_path(Path(path)) == Recording(
        Path(path),
        SECTION_FORM,
        machine_type,
        machine_id,
        condition,
        part=f"section_{machine_id}_{folder}",
        domain=domain,
        attributes=attributes,
    )


@pytest.mark.parametrize(
    ("liar", "message"),
    [
        (
            "train/section_0_source_train_normal_0009_pat_00.wav",
            "starts with section_ but does not have the form section_XX_",
        ),
        ("train/section_0a_source_train_normal_0009_pat_00.wav", "starts with section_ but"),
        ("train/section_000_source_train_normal_0009_pat_00.wav", "starts with section_ but"),
        ("train/section_00_train_normal_0009_pat_00.wav", "starts with section_ but"),
        ("train/section_00_source_train_normal_9_pat_00.wav", "starts with section_ but"),
        ("train/section_00_source_train_normal_0009_pat__00.wav", "starts with section_ but"),
        (
            "train/section_00_source_target_train_normal_0009_pat_00.wav",
            "starts with section_ but",
        ),
        (
            "train/section_00_source_train_normal_0009_target_00.wav",
            "contain both source and target",
        ),
        (
            "train/section_00_source_test_normal_0009_pat_00.wav",
            "its name says test, but it is in the folder train",
        ),
        (
            "train/section_00_source_train_normal_0009_pat.wav",
            "has 1 attribute words and .* has 2, so they cannot both consist of pairs",
        ),
        (
            "train/section_00_source_train_normal_0000_pat_00_x.wav",
            "has 2 attribute words and .* has 3, so they cannot both consist of pairs",
        ),
        (
            "train/normal_id_00_00000000.wav",
            "follow the naming of different years",
        ),
        (
            "test/section_00_source_train_normal_0009_pat_00.wav",
            "its name says train, but it is in the folder test",
        ),
        (
            "source_test/section_00_target_test_normal_0009.wav",
            "contain both source and target",
        ),
        (
            "test/anomaly_id_00_00000000.wav",
            "follow the naming of different years",
        ),
        (
            "evaluation/section_00_0000.wav",
            "named like this must be in one of the folders train, test, source_test, target_test; "
            "move",
        ),
        (
            "source_test/section_00_source_test_normal_0001_pat_01.wav",
            "is in .*/valve/test too; remove one of them",
        ),
    ],
)
def test_names_that_lie(tmp_path, liar, message):
    """The error names the file; for mixed forms and mixed attributes, it names two files."""
    split = "train" if liar.startswith("train") else "test"
    other_split = "test" if split == "train" else "train"
    honest = [
        f"section_00_{domain}_{split}_normal_000{i}_pat_0{i}.wav"
        for i, domain in ((1, "source"), (2, "target"))
    ]
    for machine_type in ("fan", "valve"):
        touch(*(tmp_path / machine_type / split / name for name in honest))
    list_files(tmp_path, ["fan", "valve"], split)
    touch(tmp_path / "valve" / liar)
    with pytest.raises(UserError, match=message) as error:
        list_files(tmp_path, ["fan", "valve"], split)
    assert Path(liar).name in str(error.value)
    assert f"{tmp_path}/valve/" in str(error.value)
    if "different years" in message:
        with pytest.raises(UserError, match=message):
            list_files(tmp_path, ["fan", "valve"], other_split)
        assert f"{tmp_path}/fan/{split}/{honest[0]}" in str(error.value)
    elif "attribute words" in message:
        assert honest[0] in str(error.value)


def test_attributes_need_not_be_pairs_where_all_clips_have_as_many(tmp_path):
    names = [
        "00_source_train_normal_0000_strength_1_ambient",
        "00_target_train_normal_0000_strength_2_ambient",
        "01_source_train_normal_0000_serial_no_000_water",
        "01_source_train_normal_0001_noAttribute",
        "01_source_train_normal_0002",
    ]
    touch(*(tmp_path / "pump/train" / f"section_{name}.wav" for name in names))
    assert len(list_files(tmp_path, ["pump"], "train")[1]) == 5


def test_hidden_files_are_passed_over(tmp_path):
    folder = tmp_path / "fan" / "train"
    names = ["normal_id_00_1.wav", "._normal_id_00_1.wav", ".DS_Store", ".normal_id_00_2.wav"]
    touch(*(folder / name for name in names))
    _, recordings, others = list_files(tmp_path, ["fan"], "train")
    assert [recording.path.name for recording in recordings] == ["normal_id_00_1.wav"]
    assert others == []


@pytest.mark.parametrize("other", ["normal_id_00_1.flac", "normal_id_00_1.WAV"])
def test_a_recording_in_two_formats_is_an_error(tmp_path, other):
    folder = tmp_path / "fan" / "train"
    touch(folder / "normal_id_00_1.wav", folder / other, folder / "normal_id_00_2.flac")
    message = f"{other}.* are the same recording in two formats; remove one of them"
    with pytest.raises(UserError, match=message) as error:
        list_files(tmp_path, ["fan"], "train")
    assert "normal_id_00_1.wav" in str(error.value)


def test_recordings_of_two_folders_may_have_the_same_name(tmp_path):
    for split, ending in (("train", "wav"), ("test", "flac")):
        touch(tmp_path / "fan" / split / f"normal_id_00_1.{ending}")
    assert len(list_files(tmp_path, ["fan"], "train")[1]) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("normal_id_2_a.wav", ("02", "normal")),
        ("anomaly_id_line-3_0001.FLAC", ("line-3", "anomalous")),
        ("id_02_0001.wav", ("02", "unlabelled")),
        ("section_00_source_train_normal_0001_vel_12.wav", ("00", "normal")),
        ("section_03_target_test_anomaly_0001.wav", ("03", "anomalous")),
        ("section_03_0001.wav", ("03", "unlabelled")),
        ("monday.wav", None),
        ("normal_id_02.wav", None),
    ],
)
def test_what_a_name_alone_says(name, expected):
    assert parse_name(name) == expected
