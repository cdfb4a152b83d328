"""The classes that the network distinguishes, in the order of its outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

Machine = tuple[str, str]  # machine type and machine ID, as in ("fan", "02")


class MachineClass(NamedTuple):
    """A class: the recordings of a machine that have these attributes. A class with the attributes
    "" takes all recordings of the machine that have no class with their attributes.
    """

    machine_type: str
    machine_id: str
    attributes: str = ""

    @property
    def machine(self) -> Machine:
        return self.machine_type, self.machine_id


@dataclass(frozen=True)
class Classes:
    """The classes of a network; the position of an entry is the number of the class."""

    entries: tuple[MachineClass, ...]

    @classmethod
    def from_machines(cls, machines: Mapping[str, Sequence[str]]) -> "Classes":
        """Make one class for each machine ID of a table, in its order."""
        entries: list[MachineClass] = []
        for machine_type, ids in machines.items():
            entries += [MachineClass(machine_type, machine_id) for machine_id in ids]
        return cls(tuple(entries))

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def machines(self) -> list[Machine]:
        """The machines, each once, in the order of their first classes."""
        return list(dict.fromkeys(entry.machine for entry in self.entries))

    @cached_property
    def machine_types(self) -> list[str]:
        """The machine types, each once, in the order of their first classes."""
        return list(dict.fromkeys(entry.machine_type for entry in self.entries))

    def of_machine(self, machine: Machine) -> list[int]:
        """Return the numbers of the classes of a machine; none for an unknown machine."""
        return [number for number, entry in enumerate(self.entries) if entry.machine == machine]

    def of_recording(self, machine: Machine, attributes: str) -> int | None:
        """Return the class of a normal recording of a machine; None if no class takes it."""
        exact = self._numbers.get(MachineClass(*machine, attributes))
        return self._numbers.get(MachineClass(*machine)) if exact is None else exact

    @cached_property
    def _numbers(self) -> dict[MachineClass, int]:
        return {entry: number for number, entry in enumerate(self.entries)}

    def describe_machines(self) -> str:
        """Return the IDs of each machine type, as in "fan 00, 02; press line-3"."""
        ids: dict[str, list[str]] = {}
        for machine_type, machine_id in self.machines:
            ids.setdefault(machine_type, []).append(machine_id)
        return "; ".join(
            f"{machine_type} {', '.join(names)}" for machine_type, names in ids.items()
        )

    def describe_counts(self) -> str:
        """Return how many classes each machine has, as in "fan 00 (2), fan 02 (1)"."""
        counts = {machine: len(self.of_machine(machine)) for machine in self.machines}
        return ", ".join(f"{' '.join(machine)} ({count})" for machine, count in counts.items())
