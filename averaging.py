"""The moving average of the weights over the steps of a training."""

import copy
import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from errors import UserError
from model.tastgram_mfn import TASTgramMFN

# Share of the initial weights that the average may contain at the end of a training
LEFT_OVER = 0.01
# Fraction of the trained weights, statistics included, that is subtracted at each step
WEIGHT_DECAY = 2e-6


class MovingAverage:
    """Exponential moving average of the weights of a network, the statistics of batch norm
    included: at each step, average = decay * average + (1 - decay) * weights.

    As in the published code of OS-SCL, it starts from the initial weights, and at each step the
    trained weights are multiplied by 1 - WEIGHT_DECAY, beside the weight decay of the optimiser.

    Attributes:
        network: A network with the averaged weights.
    """

    def __init__(self, trained: TASTgramMFN, decay: float) -> None:
        self.network = copy.deepcopy(trained)
        self.averaged_values, self.trained_values = real_values(self.network), real_values(trained)
        self.update_values = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights after a step."""
        self.update_values(self.averaged_values, self.trained_values, 0)
        torch._foreach_mul_(self.trained_values, 1.0 - WEIGHT_DECAY)


def real_values(network: nn.Module) -> list[Tensor]:
    """Return all weights and statistics, but no counts."""
    return [value for value in network.state_dict().values() if value.is_floating_point()]


def check_decay(decay: float, n_steps: int) -> None:
    """Raise `UserError` if a training is too short for an average with this decay."""
    left_over = decay**n_steps
    if left_over > LEFT_OVER:
        highest = math.floor(1e4 * LEFT_OVER ** (1.0 / n_steps)) / 1e4
        raise UserError(
            f"weight_average: {decay:g} averages over about {1.0 / (1.0 - decay):.0f} steps, and "
            f"the training has {n_steps}: its result would contain {left_over:.0%} of the initial "
            f"weights; use at most {highest:g}, or 0 for no average"
        )
