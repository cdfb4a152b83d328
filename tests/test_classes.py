"""The classes of a network, and the questions asked of them."""

from classes import Classes, MachineClass
from config import load_config

BY_ATTRIBUTES = Classes(
    (
        MachineClass("valve", "00", "pat_00"),
        MachineClass("valve", "00", "pat_01"),
        MachineClass("fan", "02"),
        MachineClass("valve", "00"),
    )
)


def test_classes_follow_the_order_of_the_table():
    classes = Classes.from_machines({"pump": ["04", "00"], "fan": ["01"]})
    assert classes.entries == (("pump", "04", ""), ("pump", "00", ""), ("fan", "01", ""))
    published = Classes.from_machines(load_config().machines)
    assert len(published) == 41
    for machine, number in (
        (("fan", "00"), 0), (("pump", "00"), 7), (("slider", "00"), 14),
        (("ToyCar", "01"), 21), (("ToyConveyor", "01"), 28), (("valve", "06"), 40),
    ):  # fmt: skip
        assert published.of_machine(machine) == [number]
        assert published.of_recording(machine, "any") == number


def test_the_class_without_attributes_takes_all_other_recordings():
    valve = ("valve", "00")
    found = [BY_ATTRIBUTES.of_recording(valve, name) for name in ("pat_01", "pat_00", "pat_07", "")]
    assert found == [1, 0, 3, 3]
    assert BY_ATTRIBUTES.of_recording(("valve", "01"), "pat_00") is None
    only = Classes(BY_ATTRIBUTES.entries[:2])
    assert only.of_recording(valve, "pat_07") is None


def test_the_machines_and_their_classes():
    assert BY_ATTRIBUTES.machines == [("valve", "00"), ("fan", "02")]
    assert BY_ATTRIBUTES.machine_types == ["valve", "fan"]
    assert BY_ATTRIBUTES.of_machine(("valve", "00")) == [0, 1, 3]
    assert BY_ATTRIBUTES.of_machine(("valve", "02")) == []
    assert BY_ATTRIBUTES.describe_machines() == "valve 00; fan 02"
    assert BY_ATTRIBUTES.describe_counts() == "valve 00 (3), fan 02 (1)"
