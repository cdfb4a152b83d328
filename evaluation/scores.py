"""Anomaly scores of a trained network. A higher score is more anomalous.

A clip is scored against a class, in one of these ways (KINDS):

- published: cross-entropy with the margin on the class (Choi & Choi, ICASSP 2024); without a margin
  for a network that was trained in the mode cross_entropy
- angle: between the embedding and the closest centre of the class, in degrees
- nearest: mean cosine distance between the embedding and the closest embeddings of the training
  clips of the class (the bank)
- spectrum: without a network, mean distance between mean and standard deviation of the log-mel over
  time and those of the closest training clips of the machine

Its score against a machine is the lowest over the classes of the machine, and the score of a
recording with several windows is the mean or the maximum of theirs. Validation, eval.py, score.py
and the ONNX file all compute their scores here, with the margin of losses.py. The ONNX file scores
single windows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from classes import Classes, Machine
from errors import UserError
from losses import Objective


class Outputs(NamedTuple):
    """What scores of B clips are computed from: similarity to each class `(B, C)`, embedding
    `(B, E)`, spectrum `(B, 2 M)`; and `levels` `(B, N_BANDS, SECONDS)`, for what differs in their
    sound (None where this is not asked for).
    """

    similarity: Tensor
    embedding: Tensor
    spectrum: Tensor
    levels: Tensor | None = None

    def apply(self, function: Callable[[Tensor], Tensor]) -> "Outputs":
        """Apply a function to each tensor."""
        levels = None if self.levels is None else function(self.levels)
        similarity, embedding = function(self.similarity), function(self.embedding)
        return Outputs(similarity, embedding, function(self.spectrum), levels)

    def select(self, rows: Tensor) -> "Outputs":
        """Return the outputs for the clips with these numbers."""
        return self.apply(lambda values: values[rows])


LEAST_SPREAD = 0.1  # dB; a mel bin may be constant in all training clips, as in digital silence


class StoredClips(NamedTuple):
    """Clips as a checkpoint keeps them: embedding `(n, E)` of length 1 and spectrum `(n, 2 M)` in
    dB, both in float16, and class `(n,)`.
    """

    embedding: Tensor
    spectrum: Tensor
    labels: Tensor

    @classmethod
    def from_outputs(cls, outputs: Outputs, labels: Tensor) -> "StoredClips":
        """Keep the outputs for n clips of these classes."""
        embedding = F.normalize(outputs.embedding).half().cpu()
        return cls(embedding, outputs.spectrum.half().cpu(), labels)

    def by_class(self, n_classes: int) -> list["StoredClips"]:
        """Return the clips of each class."""
        members = [self.labels == label for label in range(n_classes)]
        return [StoredClips(*(values[chosen] for values in self)) for chosen in members]


@dataclass(frozen=True)
class Scorer:
    """A kind of score, and what it compares clips with. Embeddings of outputs are not normalised.

    Attributes:
        kind: A name in KINDS.
        classes: The classes of the network.
        objective: The loss that the network was trained with; for "published".
        centres: The centres `(C, K, E)` of each class; for "angle".
        bank: The training clips of each class; for "nearest" and "spectrum".
        neighbours: The number of training clips that these two take the mean over.
        dtype: The precision of the scores. In float32, as published, very normal clips tie at
            exactly 0; float64 orders them. The other kinds are computed in float64.
    """

    kind: str
    classes: Classes
    objective: Objective
    centres: Tensor | None = None
    bank: Sequence[StoredClips] | None = None
    neighbours: int = 1
    dtype: torch.dtype = torch.float64

    @property
    def name(self) -> str:
        """The kind with the keys that have an effect on it, as in "nearest, neighbours 2"."""
        keys = [f"{key} {getattr(self, key)}" for key in KINDS[self.kind].keys]
        return ", ".join([self.kind, *keys])

    def score_against_class(self, outputs: Outputs, label: int) -> Tensor:
        """Score clips against a class `(n,)`."""
        return KINDS[self.kind].score(self, outputs, label)

    def score_against_machine(self, outputs: Outputs, machine: Machine) -> Tensor:
        """Score clips against a machine `(n,)`: the lowest score over its classes."""
        labels = self.classes.of_machine(machine)
        return torch.stack([self.score_against_class(outputs, label) for label in labels]).amin(
            dim=0
        )

    def score_against_machines(self, outputs: Outputs, machines: Sequence[Machine]) -> Tensor:
        """Score clips against each of several machines `(n, machines)`."""
        return torch.stack(
            [self.score_against_machine(outputs, machine) for machine in machines], dim=1
        )

    def score_clips(self, outputs: Outputs, machines: Sequence[Machine]) -> Tensor:
        """Score each clip against its machine `(n,)`; `machines` has the machine of each clip."""
        device = outputs.embedding.device
        clips_of: dict[Machine, list[int]] = {}
        for clip, machine in enumerate(machines):
            clips_of.setdefault(machine, []).append(clip)
        scores = torch.empty(len(machines), dtype=self.dtype, device=device)
        for machine, clips in clips_of.items():
            rows = torch.tensor(clips, device=device)
            of_machine = self.score_against_machine(outputs.select(rows), machine)
            scores[rows] = of_machine.to(self.dtype)
        return scores


# ---- The kinds of score: of clips against a class, `(n,)` ----


def published(scorer: Scorer, outputs: Outputs, label: int) -> Tensor:
    """Cross-entropy with the margin on the class. Averaged over the held-out clips, each against
    its own class, it is the validation loss.
    """
    similarity = outputs.similarity.to(scorer.dtype)
    labels = torch.full_like(similarity[:, 0], label, dtype=torch.int64)
    return -F.log_softmax(scorer.objective.logits(similarity, labels), dim=1)[:, label]


def angle(scorer: Scorer, outputs: Outputs, label: int) -> Tensor:
    """Angle between embedding and closest centre of the class, in degrees; float64."""
    assert scorer.centres is not None
    cosine = cosine_similarity(outputs.embedding, scorer.centres[label])
    return torch.rad2deg(torch.acos(cosine.amax(dim=1).clamp(-1.0, 1.0)))


def nearest(scorer: Scorer, outputs: Outputs, label: int) -> Tensor:
    """Mean cosine distance, 0 to 2, to the closest training clips of the class; float64. Where the
    class has fewer clips than `neighbours`, all of them count; where it has none, the distance is
    infinite.
    """
    assert scorer.bank is not None
    cosine = cosine_similarity(outputs.embedding, scorer.bank[label].embedding)
    return 1.0 - mean_of_largest(cosine, scorer.neighbours)


def spectrum(scorer: Scorer, outputs: Outputs, label: int) -> Tensor:
    """Distance between the spectrum and those of the closest training clips of the machine, the
    mean over `neighbours`; float64, infinite without such clips. It uses no network.

    Each value is standardised by its mean and standard deviation over these training clips; the
    distance is the root of the mean square over the values.
    """
    assert scorer.bank is not None
    labels = scorer.classes.of_machine(scorer.classes.entries[label].machine)
    members = torch.cat([scorer.bank[number].spectrum for number in labels])
    members = members.to(outputs.spectrum.device, torch.float64)
    mean = members.mean(dim=0)
    scale = (members - mean).square().mean(dim=0).sqrt().clamp(min=LEAST_SPREAD)
    ours, theirs = (outputs.spectrum.double() - mean) / scale, (members - mean) / scale
    # The square of a difference, as torch.cdist is not part of ONNX
    squares = ours.square().mean(dim=1, keepdim=True) + theirs.square().mean(dim=1)
    squares = squares - 2 * ours @ theirs.T / ours.shape[1]
    return -mean_of_largest(-squares.clamp(min=0).sqrt(), scorer.neighbours)


def mean_of_largest(values: Tensor, count: int) -> Tensor:
    """Return the mean of the largest `count` of the m values `(n, m)` of each clip `(n,)`, or of
    all if there are fewer; minus infinity if there are none.
    """
    n_largest = min(count, values.shape[1])
    if n_largest == 0:
        return torch.full_like(values.sum(dim=1), -torch.inf)
    return values.topk(n_largest).values.mean(dim=1)


def cosine_similarity(embedding: Tensor, others: Tensor) -> Tensor:
    """Cosine of the angles between embeddings `(n, E)` and others `(m, E)`: `(n, m)`, float64."""
    others = others.to(embedding.device, torch.float64)
    return F.normalize(embedding.double()) @ F.normalize(others).T


@dataclass(frozen=True)
class Kind:
    """A kind of score.

    Attributes:
        score: Compute the scores `(n,)` of the outputs for n clips against a class.
        unit: What the score measures, for the axes of figures.
        uses_bank: Whether it compares clips with the training clips.
        keys: The keys of the configuration that have an effect on this kind alone.
        is_logarithmic: Whether figures show it on a logarithmic axis.
    """

    score: Callable[[Scorer, Outputs, int], Tensor]
    unit: str
    uses_bank: bool = False
    keys: tuple[str, ...] = ()
    is_logarithmic: bool = False


# The published kind comes first: the others are compared with it.
KINDS = {
    "published": Kind(published, "cross-entropy", is_logarithmic=True),
    "angle": Kind(angle, "degrees to centre of ID"),
    "nearest": Kind(
        nearest,
        "cosine distance to the nearest training clips",
        uses_bank=True,
        keys=("neighbours",),
    ),
    "spectrum": Kind(
        spectrum,
        "standard deviations from the nearest training clips",
        uses_bank=True,
        keys=("neighbours",),
    ),
}


def check_scores(scores: np.ndarray, machines: Sequence[Machine], kind: str, source: str) -> None:
    """Check that scores `(n,)` are finite. `machines` has the machine of each, and `source` names
    the checkpoint.

    Raises:
        UserError: If a score is not finite, because the weights are not finite or the bank has no
            clips of the machine.
    """
    is_bad = ~np.isfinite(scores)
    if not is_bad.any():
        return
    bad_machines = dict.fromkeys(machines[number] for number in np.flatnonzero(is_bad).tolist())
    names = ", ".join(map(" ".join, bad_machines))
    if KINDS[kind].uses_bank and np.isposinf(scores[is_bad]).all():
        raise UserError(
            f"{source}: the checkpoint has no training clips of {names}, which "
            f"{kind} needs; choose another --scoring"
        )
    raise UserError(
        f"{source}: {is_bad.sum()} of {len(scores)} scores are not finite numbers ({names}); "
        "choose another checkpoint"
    )


# ---- Over the windows of a recording ----


def over_windows(values: np.ndarray, clip_recordings: np.ndarray, rule: str) -> np.ndarray:
    """Combine values `(n, ...)` of clips to the "mean" or "max" of each recording.

    `clip_recordings` `(n,)` is the number of the recording of each clip, in ascending order.
    """
    first = find_first_clips(clip_recordings)
    if rule == "max":
        return np.maximum.reduceat(values, first)
    counts = np.diff(first, append=len(values)).astype(values.dtype)
    return (np.add.reduceat(values, first).T / counts).T


def split_by_recording(values: np.ndarray, clip_recordings: np.ndarray) -> list[np.ndarray]:
    """Return the values `(n, ...)` of the clips of each recording; see `over_windows`."""
    return np.split(values, find_first_clips(clip_recordings)[1:])


def find_worst(values: np.ndarray, clip_recordings: np.ndarray) -> np.ndarray:
    """Return the number of the clip with the highest value `(n,)` of each recording."""
    descending = np.lexsort((-values, clip_recordings))  # within each recording
    return descending[find_first_clips(clip_recordings)]


def find_first_clips(clip_recordings: np.ndarray) -> np.ndarray:
    """Return the number of the first clip of each recording."""
    return np.flatnonzero(np.diff(clip_recordings, prepend=-1))
