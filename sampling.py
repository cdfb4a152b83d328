"""What is drawn at random for an epoch: the order of the clips, and how each batch is mixed.

All of it depends on the seed, the epoch and the step alone. With several processes each draws the
same, and takes its share of every batch; partners come from the whole batch.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import Config
from dataloader import ClipSet, shuffled_batches
from distributed import rank, world_size
from losses import Mix, Objective, divide_mix
from utils import MIXING, random_stream


class Batch(NamedTuple):
    """A batch, or the share of it that this process computes.

    Attributes:
        samples: int16 `(B, T)` on the device. Where it is a share of a mixed batch, the last rows
            are clips of other shares, which serve as partners only.
        labels: The classes `(B,)`.
        mix: How the clips are mixed; None where the mode does not mix.
        size: The number of clips of the whole batch.
    """

    samples: Tensor
    labels: Tensor
    mix: Mix | None
    size: int

    @property
    def share_size(self) -> int:
        """The number of clips that this process computes, without those that are only partners."""
        return len(self.labels if self.mix is None else self.mix.partner)


@dataclass(frozen=True)
class EpochPlan:
    """The batches of an epoch.

    Attributes:
        shares: The numbers of the clips that this process reads for each batch.
        mixes: How it mixes them, on the device.
        sizes: The number of clips of each whole batch.
    """

    shares: list[np.ndarray]
    mixes: Sequence[Mix | None]
    sizes: list[int]

    @property
    def n_steps(self) -> int:
        return len(self.sizes)

    def batches(self, clips: ClipSet, device: torch.device) -> Iterator[Batch]:
        """Yield the batches on the device; each is valid until the next one is asked for."""
        data = clips.batches(self.shares, device)
        for (samples, labels), mix, size in zip(data, self.mixes, self.sizes, strict=True):
            yield Batch(samples, labels, mix, size)


class Sampler:
    """Draws the plans of epochs over `n_clips` clips. While an epoch is trained, a thread draws the
    plan of the next one.
    """

    def __init__(self, config: Config, objective: Objective, n_clips: int, device: torch.device):
        self.config, self.objective = config, objective
        self.n_clips, self.device = n_clips, device
        self.thread = ThreadPoolExecutor(1)
        self.plans: dict[int, Future[EpochPlan]] = {}

    def plan(self, epoch: int) -> EpochPlan:
        """Return the plan of an epoch, counted from 0, and begin to draw that of the next one."""
        plan = self.plans.pop(epoch, None) or self.thread.submit(self.draw, epoch)
        self.plans = {epoch + 1: self.thread.submit(self.draw, epoch + 1)}
        return plan.result()

    def draw(self, epoch: int) -> EpochPlan:
        """Draw the plan of an epoch."""
        seed, n_processes = self.config.seed, world_size()
        least = max(2, n_processes)
        batches = shuffled_batches(self.n_clips, self.config.batch_size, seed, epoch, least)
        sizes = [len(batch) for batch in batches]
        shares: list[np.ndarray] = []
        mixes: list[Mix] = []
        for step, batch in enumerate(batches, start=epoch * len(batches)):
            stream = random_stream(seed, MIXING, step)
            mix = self.objective.draw_mix(self.config.alpha, stream, len(batch))
            if mix is None:
                shares.append(np.array_split(batch, n_processes)[rank()])
            else:
                rows, share = divide_mix(mix, rank(), n_processes)
                shares.append(batch[rows])
                mixes.append(share)
        if not mixes:
            return EpochPlan(shares, [None] * len(batches), sizes)
        return EpochPlan(shares, move_to_device(mixes, self.device), sizes)


def move_to_device(mixes: Sequence[Mix], device: torch.device) -> list[Mix]:
    """Copy the mixes of an epoch to the device, in two copies instead of two for each."""
    lams = torch.stack([mix.lam for mix in mixes]).to(device).unbind()
    partners = torch.cat([mix.partner for mix in mixes]).to(device)
    parts = partners.split([len(mix.partner) for mix in mixes])
    return [Mix(lam, partner) for lam, partner in zip(lams, parts, strict=True)]
