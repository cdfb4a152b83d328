"""Anomaly scores of a trained network. A higher score is more anomalous.

A clip is scored against a class, in one of these ways (KINDS):

- published: cross-entropy with the margin on the class (Choi & Choi, ICASSP 2024); without a margin
  for a network that was trained in the mode cross_entropy
- angle: between the embedding and the closest centre of the class, in degrees
- nearest: mean cosine distance between the embedding and the closest embeddings of the training
  clips of the class (the bank)

Its score against a machine is the lowest over the classes of the machine, and the score of a
recording with several windows is the mean or the maximum of theirs. Validation, eval.py, score.py
and the ONNX file all compute their scores here, with the margin of losses.py. The ONNX file scores
single windows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from classes import Classes, Machine
from errors import UserError
from losses import Objective
from model import Outputs


class Embeddings(NamedTuple):
    """Clips as a checkpoint keeps them: embedding `(n, E)` of length 1 in float16, class `(n,)`."""

    embedding: Tensor
    labels: Tensor

    @classmethod
    def from_outputs(cls, embedding: Tensor, labels: Tensor) -> "Embeddings":
        """Keep the embeddings `(n, E)` that the network computes for clips of these classes."""
        return cls(F.normalize(embedding).half().cpu(), labels)

    def by_class(self, n_classes: int) -> list[Tensor]:
        """Return the embeddings of the clips of each class."""
        return [self.embedding[self.labels == label] for label in range(n_classes)]


@dataclass(frozen=True)
class Scorer:
    """A kind of score, and what it compares clips with. Embeddings of outputs are not normalised.

    Attributes:
        kind: A name in KINDS.
        classes: The classes of the network.
        objective: The loss that the network was trained with; for "published".
        centres: The centres `(C, K, E)` of each class; for "angle".
        bank: The embeddings `(n, E)` of the training clips of each class; for "nearest".
        neighbours: The number of training clips that "nearest" takes the mean over.
        dtype: The precision of the scores. In float32, as published, very normal clips tie at
            exactly 0; float64 orders them. "angle" and "nearest" are computed in float64.
    """

    kind: str
    classes: Classes
    objective: Objective
    centres: Tensor | None = None
    bank: Sequence[Tensor] | None = None
    neighbours: int = 1
    dtype: torch.dtype = torch.float64

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
            chosen = Outputs(outputs.similarity[rows], outputs.embedding[rows])
            scores[rows] = self.score_against_machine(chosen, machine).to(self.dtype)
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
    members = scorer.bank[label]
    if len(members) == 0:
        return torch.full_like(outputs.embedding[:, 0], torch.inf, dtype=torch.float64)
    cosine = cosine_similarity(outputs.embedding, members)
    return 1.0 - cosine.topk(min(scorer.neighbours, len(members))).values.mean(dim=1)


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
        uses_bank: Whether it needs the embeddings of the training clips.
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
}


def check_scores(scores: np.ndarray, machines: Sequence[Machine], kind: str, path: Path) -> None:
    """Check that scores `(n,)` are finite. `machines` has the machine of each, and `path` is the
    checkpoint.

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
            f"{path}: the checkpoint has no embeddings of training clips of {names}, which "
            f"{kind} needs; choose another --scoring"
        )
    raise UserError(
        f"{path}: {is_bad.sum()} of {len(scores)} scores are not finite numbers ({names}); choose "
        "another checkpoint"
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


def find_worst(values: np.ndarray, clip_recordings: np.ndarray) -> np.ndarray:
    """Return the number of the clip with the highest value `(n,)` of each recording."""
    descending = np.lexsort((-values, clip_recordings))  # within each recording
    return descending[find_first_clips(clip_recordings)]


def find_first_clips(clip_recordings: np.ndarray) -> np.ndarray:
    """Return the number of the first clip of each recording."""
    return np.flatnonzero(np.diff(clip_recordings, prepend=-1))
