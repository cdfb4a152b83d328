"""The bank: what the checkpoint of a finished run keeps of the training clips, to compare others
with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from classes import Classes, Machine
from evaluation.difference import NormalClips, Spread, measure_spread
from evaluation.scores import Outputs, StoredClips


@dataclass(frozen=True)
class Bank:
    """The training clips of a model.

    Attributes:
        clips: Embedding, spectrum and class of each clip.
        files: The file of each clip, as seen from the folder of all recordings.
        starts: The start of each clip in its file, in seconds `(n,)`.
        spreads: How the levels of each machine vary, in the order of the machines; None where there
            are too few clips.
    """

    clips: StoredClips
    files: Sequence[str]
    starts: Tensor
    spreads: Sequence[Spread | None]

    @classmethod
    def from_outputs(
        cls,
        outputs: Outputs,
        labels: Tensor,
        files: Sequence[str],
        starts: Tensor,
        classes: Classes,
    ) -> "Bank":
        """Keep the outputs, with levels, for n clips of these classes."""
        assert outputs.levels is not None
        clips = StoredClips.from_outputs(outputs, labels)
        levels = outputs.levels.double().cpu()
        spreads = []
        for machine in classes.machines:
            rows = rows_of(labels, classes, machine)
            spectrum = clips.spectrum[rows].double()
            spreads.append(measure_spread(spectrum.numpy(), levels[rows].numpy()))
        return cls(clips, files, starts, spreads)

    def of_machine(self, classes: Classes, machine: Machine) -> NormalClips:
        """Return the clips of a machine, to find differences from them."""
        rows = rows_of(self.clips.labels, classes, machine)
        return NormalClips(
            self.clips.spectrum[rows].double().numpy(),
            [self.files[row] for row in rows.tolist()],
            self.starts[rows].tolist(),
            self.spreads[classes.machines.index(machine)],
        )

    def to_plain(self) -> dict[str, Any]:
        """Return tensors and plain values."""
        return {
            "clips": self.clips._asdict(),
            "files": list(self.files),
            "starts": self.starts,
            "spreads": [None if spread is None else spread._asdict() for spread in self.spreads],
        }

    @classmethod
    def from_plain(cls, content: dict[str, Any]) -> "Bank":
        """Return the bank of these plain values."""
        spreads = [None if plain is None else Spread(**plain) for plain in content["spreads"]]
        clips = StoredClips(**content["clips"])
        return cls(clips, content["files"], content["starts"], spreads)


def rows_of(labels: Tensor, classes: Classes, machine: Machine) -> Tensor:
    """Return the numbers of the clips of a machine, among clips of these classes."""
    is_own = torch.isin(labels, torch.tensor(classes.of_machine(machine)))
    return is_own.nonzero().flatten()
