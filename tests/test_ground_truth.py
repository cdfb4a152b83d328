"""The published lists of the conditions of evaluation clips."""

from pathlib import Path

import pytest

from errors import UserError
from ground_truth import read_label_list
from names import ANOMALOUS, LABEL_LIST, NORMAL

PUBLISHED_LABELS = Path(__file__).with_name("data") / LABEL_LIST


def test_published_label_list():
    """The published list has 7,103 clips of the IDs that the challenge withheld."""
    conditions = read_label_list(PUBLISHED_LABELS)
    assert len(conditions) == 7103
    ids: dict[str, set[int]] = {}
    for machine_type, name in conditions:
        ids.setdefault(machine_type, set()).add(int(name.split("_")[1]))
    assert ids == {
        "fan": {1, 3, 5}, "pump": {1, 3, 5}, "slider": {1, 3, 5}, "valve": {1, 3, 5},
        "ToyCar": {5, 6, 7}, "ToyConveyor": {4, 5, 6},
    }  # fmt: skip
    n_anomalous = PUBLISHED_LABELS.read_text().count(",anomaly_id_")
    assert list(conditions.values()).count(ANOMALOUS) == n_anomalous
    assert conditions["fan", "id_01_00000000"] == NORMAL
    assert conditions["fan", "id_01_00000001"] == ANOMALOUS


@pytest.mark.parametrize(
    "line", ["id_00_00000000.wav,1", "id_00_00000000.wav,normal_id_00_00000000.wav,2"]
)
def test_a_label_list_with_something_else_in_it(tmp_path, line):
    (tmp_path / LABEL_LIST).write_text(f"fan\n{line}\n")
    with pytest.raises(UserError, match=r"eval_data_list.csv, line 2: expected `<file name>,"):
        read_label_list(tmp_path / LABEL_LIST)
    (tmp_path / LABEL_LIST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"eval_data_list.csv: not a list of labels"):
        read_label_list(tmp_path / LABEL_LIST)
