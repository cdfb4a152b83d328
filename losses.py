"""Mixup, angular margin, mixed loss and anomaly score: what each mode makes of the class
similarities.

One formula serves all modes. With `margin(y)` the logits that carry the margin on class y,

    loss = lam * CE(margin(a), a) + (1 - lam) * CE(margin(b'), b)

for a clip of class a mixed with a partner of class b: ArcMix has b' = b, Noisy-ArcMix b' = a (the
deliberately inconsistent margin), ArcFace does not mix (lam = 1). Choi & Choi, ICASSP 2024, section
2.2.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Mode:
    """A training objective: the head it trains, whether it mixes, and whose margin the partner's
    term carries.
    """

    head: str
    mixes: bool = False
    margin_on_partner: bool = False


MODES = {
    "noisy_arcmix": Mode(head="arcface", mixes=True),
    "arcmix": Mode(head="arcface", mixes=True, margin_on_partner=True),
    "arcface": Mode(head="arcface"),
    "cross_entropy": Mode(head="fc_out"),
}


class Mix(NamedTuple):
    """One mixup of a batch: the weight `lam` (a scalar tensor) of each clip itself, and `partner`
    `(B,)`, the row it is mixed with. Rows after the first B serve as partners only.
    """

    lam: Tensor
    partner: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """`lam * x + (1 - lam) * x[partner]` along the batch."""
        return self.lam * x[: len(self.partner)] + (1.0 - self.lam) * x[self.partner]


def divide_mix(mix: Mix, part: int, parts: int) -> tuple[np.ndarray, Mix]:
    """The part of a mixed batch that one of several processes computes: the rows it reads, and how
    it mixes them.

    The batch is divided along the cycles of the permutation, in which the partner of a clip follows
    it. So a part lacks two partners at most: that of its last clip, and the beginning of a cycle of
    which it has the end. Where there are several parts two rows are always added, so that all parts
    of a size have the same shapes.
    """
    partner = mix.partner.numpy()
    rows = own = np.array_split(cycles(partner), parts)[part]
    if parts > 1:
        rows = np.concatenate([own, np.resize(np.setdiff1d(partner[own], own), 2)])
    place = np.empty(len(partner), dtype=np.int64)  # of each clip of the batch among the rows
    place[rows[::-1]] = np.arange(len(rows))[::-1]
    return rows, Mix(mix.lam, torch.from_numpy(place[partner[own]]))


def cycles(permutation: np.ndarray) -> np.ndarray:
    """The elements of a permutation, cycle by cycle: each is followed by the one it is sent to."""
    order: dict[int, None] = {}
    for start in permutation.tolist():
        element = start
        while element not in order:
            order[element] = None
            element = int(permutation[element])
    return np.array(list(order))


def margin_logits(cosine: Tensor, labels: Tensor, m: float, s: float) -> Tensor:
    """ArcFace logits `s * cos(theta)`, with `s * cos(theta + m)` for the labelled class. `m` in
    radians.

    Where `theta + m` would pass pi, the margin continues linearly as `cos(theta) - m * sin(m)` (the
    literal of the ArcFace code: `sin(pi - m) * m`). `cosine` `(B, C)` in float32 or float64,
    `labels` `(B,)`.
    """
    assert cosine.dtype in (torch.float32, torch.float64), cosine.dtype
    target = cosine.gather(1, labels.unsqueeze(1))  # (B, 1)
    # sqrt has an infinite gradient at 0. The floor lies below the spacing of float32 numbers at 1,
    # so it acts (and stops the gradient) at cosine +-1 only.
    sine = (1.0 - target.square()).clamp(min=1e-12).sqrt()
    with_margin = torch.where(
        target > math.cos(math.pi - m),
        target * math.cos(m) - sine * math.sin(m),
        target - math.sin(math.pi - m) * m,
    )
    return s * cosine.scatter(1, labels.unsqueeze(1), with_margin)


class Objective:
    """Loss, accuracy and anomaly score of a mode; m in radians. The similarity it judges is that of
    its `head`.
    """

    def __init__(self, mode: str, m: float, s: float) -> None:
        self.mode, self.m, self.s = MODES[mode], m, s

    def draw_mix(self, alpha: float, stream: np.random.Generator, size: int) -> Mix | None:
        """Draw lambda ~ Beta(alpha, alpha) and partners, on the CPU; None where the mode does not
        mix.
        """
        if not self.mode.mixes:
            return None
        lam, partner = (
            torch.tensor(stream.beta(alpha, alpha), dtype=torch.float32),
            stream.permutation(size),
        )
        return Mix(lam, torch.from_numpy(partner))

    def logits(self, similarity: Tensor, margin_labels: Tensor) -> Tensor:
        """Class logits `(B, C)`; on the cosine head with the margin on `margin_labels` `(B,)`."""
        if self.mode.head == "fc_out":
            return similarity
        return margin_logits(similarity, margin_labels, self.m, self.s)

    def loss(self, similarity: Tensor, labels: Tensor, mix: Mix | None = None) -> Tensor:
        """Mean training loss of a batch whose inputs went through `mix`; `labels` also of the rows
        it takes.
        """
        own_labels = labels[: len(similarity)]
        loss = F.cross_entropy(self.logits(similarity, own_labels), own_labels)
        if mix is None:
            return loss
        partner_labels = labels[mix.partner]
        margin_labels = partner_labels if self.mode.margin_on_partner else own_labels
        partner_loss = F.cross_entropy(self.logits(similarity, margin_labels), partner_labels)
        return mix.lam * loss + (1.0 - mix.lam) * partner_loss

    def accuracy(self, similarity: Tensor, labels: Tensor, mix: Mix | None = None) -> Tensor:
        """Fraction of clips whose most similar class is their own; a partner's class counts with
        weight 1 - lambda.
        """
        predicted = similarity.argmax(dim=1)
        own = (predicted == labels[: len(predicted)]).float().mean()
        if mix is None:
            return own
        return mix.lam * own + (1.0 - mix.lam) * (predicted == labels[mix.partner]).float().mean()

    def anomaly_score(
        self, similarity: Tensor, labels: Tensor, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Cross-entropy of each clip against the class `labels` `(B,)`; higher is more anomalous.

        Its mean against the own class is the validation loss. In float32, as published, very normal
        clips tie at exactly 0; float64 orders them.
        """
        return F.cross_entropy(self.logits(similarity.to(dtype), labels), labels, reduction="none")
