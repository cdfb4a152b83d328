"""The random batches of an epoch: the order of the clips, and the mixup of each batch.

They depend on seed, epoch and step alone. With several processes each draws whole batches, and
computes its share of them; partners come from the whole batch.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import Config
from dataloader import ClipSet, cut_into_batches
from distributed import rank, world_size
from losses import MODES, Mix
from utils import MIXING, ORDER, random_stream


class Batch(NamedTuple):
    """A batch, or the share of it that this process computes.

    Attributes:
        samples: int16 `(R, T)` on the device. The share of a mixed batch ends with two more rows,
            which are partners only.
        labels: The classes of the rows `(R,)`.
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


class EpochPlan(NamedTuple):
    """The batches of an epoch, as drawn for this process.

    Attributes:
        shares: The numbers of the clips that this process reads for each batch.
        mixes: How it mixes them, on the device.
        sizes: The number of clips of each whole batch.
    """

    shares: list[np.ndarray]
    mixes: Sequence[Mix | None]
    sizes: list[int]


class Sampler:
    """The batches of epochs over some clips. While an epoch is trained, a thread draws the plan of
    the next one.

    Attributes:
        n_steps: The number of batches of an epoch.
    """

    def __init__(self, config: Config, clips: ClipSet, device: torch.device) -> None:
        self.config, self.clips, self.device = config, clips, device
        self.n_steps = len(self.shuffle(epoch=0))
        self.thread = ThreadPoolExecutor(1)
        self.plans: dict[int, Future[EpochPlan]] = {}

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch, counted from 0, on the device; each is valid until the
        next one is asked for.
        """
        plan = self.plans.pop(epoch, None) or self.thread.submit(self.draw, epoch)
        self.plans = {epoch + 1: self.thread.submit(self.draw, epoch + 1)}
        shares, mixes, sizes = plan.result()
        data = self.clips.batches(shares, self.device)
        for (samples, labels), mix, size in zip(data, mixes, sizes, strict=True):
            yield Batch(samples, labels, mix, size)

    def draw(self, epoch: int) -> EpochPlan:
        """Draw the plan of an epoch."""
        batches = self.shuffle(epoch)
        sizes = [len(batch) for batch in batches]
        if not MODES[self.config.mode].mixes:
            shares = [np.array_split(batch, world_size())[rank()] for batch in batches]
            return EpochPlan(shares, [None] * len(batches), sizes)
        shares, mixes = [], []
        for step, batch in enumerate(batches, start=epoch * len(batches)):
            stream = random_stream(self.config.seed, MIXING, step)
            whole = draw_mix(self.config.alpha, stream, len(batch))
            rows, mix = divide_mix(whole, rank(), world_size())
            shares.append(batch[rows])
            mixes.append(mix)
        return EpochPlan(shares, move_to_device(mixes, self.device), sizes)

    def shuffle(self, epoch: int) -> list[np.ndarray]:
        """Return the numbers of the clips of each batch of an epoch, in random order. A last batch
        that cannot be batch-normalised, or divided among the processes, joins the one before.
        """
        order = random_stream(self.config.seed, ORDER, epoch).permutation(len(self.clips))
        return cut_into_batches(order, self.config.batch_size, least=max(2, world_size()))


def draw_mix(alpha: float, stream: np.random.Generator, size: int) -> Mix:
    """Draw the mixup of a batch of `size` clips, on the CPU: lambda ~ Beta(alpha, alpha), and the
    partners.
    """
    lam = torch.tensor(stream.beta(alpha, alpha), dtype=torch.float32)
    return Mix(lam, torch.from_numpy(stream.permutation(size)))


def divide_mix(mix: Mix, share: int, n_shares: int) -> tuple[np.ndarray, Mix]:
    """Return the share of a mixed batch that one of several processes computes: the rows of the
    batch that it reads, and how it mixes them.

    The clips are divided in the order of the cycles of the permutation, in which each clip is
    followed by its partner. Cutting this order separates at most two pairs of a share: its last
    clip from the next one, and the end of a cycle from its beginning. The missing partners are read
    as extra rows. There are always two, so that shares of one size have one shape.
    """
    partner = mix.partner.numpy()
    clips = np.array_split(order_by_cycles(partner), n_shares)[share]
    rows = clips
    if n_shares > 1:
        lacking = np.setdiff1d(partner[clips], clips)
        rows = np.concatenate([clips, np.resize(lacking, 2)])  # repeats one, or takes row 0
    position = np.empty(len(partner), dtype=np.int64)  # of each clip of the batch among the rows
    position[rows[::-1]] = np.arange(len(rows))[::-1]  # of a repeated row, the first counts
    return rows, Mix(mix.lam, torch.from_numpy(position[partner[clips]]))


def order_by_cycles(permutation: np.ndarray) -> np.ndarray:
    """Return the elements of a permutation cycle by cycle, each followed by its image."""
    order: dict[int, None] = {}
    for start in permutation.tolist():
        element = start
        while element not in order:
            order[element] = None
            element = int(permutation[element])
    return np.array(list(order))


def move_to_device(mixes: Sequence[Mix], device: torch.device) -> list[Mix]:
    """Copy the mixes of an epoch to the device, in two copies instead of two for each."""
    lams = torch.stack([mix.lam for mix in mixes]).to(device).unbind()
    partners = torch.cat([mix.partner for mix in mixes]).to(device)
    parts = partners.split([len(mix.partner) for mix in mixes])
    return [Mix(lam, partner) for lam, partner in zip(lams, parts, strict=True)]
