"""Mixup, angular margin and loss of each training mode.

One formula serves all modes. Where `margin(y)` are the logits with the margin on class y, the loss
of a clip of class a that is mixed with a partner of class b is

    loss = lam * CE(margin(a), a) + (1 - lam) * CE(margin(b'), b)

ArcMix has b' = b, Noisy-ArcMix has b' = a (a deliberately inconsistent margin), ArcFace does not
mix (lam = 1), and cross_entropy has neither mixup nor margin. Choi & Choi, ICASSP 2024, section
2.2. OS-SCL adds to the loss of Noisy-ArcMix a contrastive term between the embeddings of a batch
(Huang et al., ICASSP 2025).

B batch, C classes, E embedding.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed import gather_rows, share_of_rows

# Of the contrastive term of OS-SCL, as published
TEMPERATURE, BASE_TEMPERATURE = 0.02, 0.07


@dataclass(frozen=True)
class Mode:
    """A training mode.

    Attributes:
        head: The head of the network that is trained.
        mixes: Whether clips are mixed.
        margin_on_partner: Whether the partner's term has the margin on the class of the partner.
        contrasts: Whether the loss has a contrastive term.
    """

    head: str
    mixes: bool = False
    margin_on_partner: bool = False
    contrasts: bool = False


MODES = {
    "noisy_arcmix": Mode(head="arcface", mixes=True),
    "arcmix": Mode(head="arcface", mixes=True, margin_on_partner=True),
    "arcface": Mode(head="arcface"),
    "cross_entropy": Mode(head="fc_out"),
    "os_scl": Mode(head="projected", mixes=True, contrasts=True),
}


class Mix(NamedTuple):
    """Mixup of a batch of B clips; the rows of the batch after the first B are partners only.

    Attributes:
        lam: The weight of each clip itself, a scalar.
        partner: The row that each clip is mixed with `(B,)`.
    """

    lam: Tensor
    partner: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return `lam * x + (1 - lam) * x[partner]` along the batch."""
        return self.lam * x[: len(self.partner)] + (1.0 - self.lam) * x[self.partner]


def margin_logits(cosine: Tensor, labels: Tensor, m: float, s: float) -> Tensor:
    """Compute ArcFace logits `(B, C)`: `s * cos(theta)`, and `s * cos(theta + m)` for the class in
    `labels`.

    Where `theta + m` exceeds pi, the margin continues linearly as `cos(theta) - m * sin(m)`; as in
    the ArcFace code, sin(m) is written `sin(pi - m)`. `cosine` is that of the angle theta to each
    class `(B, C)`, in float32 or float64, `labels` are `(B,)`, and `m` is in radians.
    """
    assert cosine.dtype in (torch.float32, torch.float64), cosine.dtype
    target = cosine.gather(1, labels.unsqueeze(1))  # (B, 1)
    # sqrt has an infinite gradient at 0. The floor lies below the spacing of float32 numbers at 1,
    # so it acts, and sets the gradient to 0, only where the cosine is +-1.
    sine = (1.0 - target.square()).clamp(min=1e-12).sqrt()
    with_margin = torch.where(
        target > math.cos(math.pi - m),
        target * math.cos(m) - sine * math.sin(m),
        target - math.sin(math.pi - m) * m,
    )
    return s * cosine.scatter(1, labels.unsqueeze(1), with_margin)


def contrastive_loss(embedding: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    """Compute the supervised contrastive loss (Khosla et al., NeurIPS 2020), the mean over clips.

    With the cosines of the angles between clips, divided by TEMPERATURE, as logits, the loss of a
    clip is the mean cross-entropy of picking one of the other clips of its class out of all other
    clips of the batch, times TEMPERATURE / BASE_TEMPERATURE; 0 where its class has no other clip.

    `embedding` `(B, E)` and `labels` `(B,)` are those of this process's share of a batch of
    `batch_size` clips, with which they are compared. The order of the clips has no effect.
    """
    directions = F.normalize(embedding)
    cosine = directions @ gather_rows(directions, batch_size).T  # (B, batch_size)
    numbers = torch.arange(batch_size, device=labels.device)
    is_itself = numbers[share_of_rows()].unsqueeze(1) == numbers
    logits = (cosine / TEMPERATURE).masked_fill(is_itself, -torch.inf)
    is_partner = (labels.unsqueeze(1) == gather_rows(labels, batch_size)) & ~is_itself
    losses = torch.where(is_partner, -F.log_softmax(logits, dim=1), 0.0).sum(dim=1)
    mean = losses / is_partner.sum(dim=1).clamp(min=1)
    return TEMPERATURE / BASE_TEMPERATURE * mean.mean()


class Objective:
    """Logits, loss and accuracy of a training mode, with a margin `m` in radians and a scale `s`.

    The similarities `(B, C)` and embeddings `(B, E)` are outputs of the network with the head of
    the mode.
    """

    def __init__(self, mode: str, m: float, s: float) -> None:
        self.mode, self.m, self.s = MODES[mode], m, s

    def logits(self, similarity: Tensor, margin_labels: Tensor) -> Tensor:
        """Return logits `(B, C)`; of the cosine head, with the margin on `margin_labels` `(B,)`."""
        if self.mode.head == "fc_out":
            return similarity
        return margin_logits(similarity, margin_labels, self.m, self.s)

    def cross_entropy(
        self, similarity: Tensor, labels: Tensor, margin_labels: Tensor, reduction: str = "mean"
    ) -> Tensor:
        """Return the cross-entropy against `labels` `(B,)`, with the margin on `margin_labels`
        `(B,)`; a scalar, or `(B,)` with `reduction="none"`.
        """
        return F.cross_entropy(self.logits(similarity, margin_labels), labels, reduction=reduction)

    def loss(
        self,
        similarity: Tensor,
        embedding: Tensor,
        labels: Tensor,
        mix: Mix | None,
        batch_size: int,
    ) -> Tensor:
        """Return the mean loss of B clips whose inputs were mixed with `mix`: the share of this
        process of a batch of `batch_size` clips.

        `labels` are the classes of the B clips, followed by those of rows that are partners only.
        """
        first_labels = labels[: len(similarity)]
        loss = self.cross_entropy(similarity, first_labels, first_labels)
        if mix is not None:
            partner_labels = labels[mix.partner]
            margin_labels = partner_labels if self.mode.margin_on_partner else first_labels
            partner_loss = self.cross_entropy(similarity, partner_labels, margin_labels)
            loss = mix.lam * loss + (1.0 - mix.lam) * partner_loss
        if self.mode.contrasts:
            loss = loss + contrastive_loss(embedding, first_labels, batch_size)
        return loss

    def accuracy(self, similarity: Tensor, labels: Tensor, mix: Mix | None = None) -> Tensor:
        """Return the fraction of clips whose most similar class is theirs. In a mixed batch, the
        class of the clip counts with weight lambda and that of its partner with 1 - lambda.

        `labels` as for `loss`.
        """
        predicted = similarity.argmax(dim=1)
        accuracy = (predicted == labels[: len(predicted)]).float().mean()
        if mix is None:
            return accuracy
        partner_accuracy = (predicted == labels[mix.partner]).float().mean()
        return mix.lam * accuracy + (1.0 - mix.lam) * partner_accuracy
