"""A detector as one PyTorch module, from the waveform to the scores, for export to ONNX."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from detector import Detector, DetectorOutputs
from evaluation.scores import Outputs
from model import CHANNELS, FrontEnd, fold_batch_norm, spectrum_of


class ScoringGraph(nn.Module):
    """Waveform `(N, T)` in [-1, 1) -> anomaly scores `(N, M)`, one for each machine in the order of
    the classes, and embedding `(N, E)`, of several members side by side and empty without a
    network; float32.

    The scores are of the kind that `scoring` names, computed in float64 as those that the decisions
    of `eval.py` rest on. Batch norms are folded into the convolutions before them.
    """

    def __init__(self, detector: Detector, config: Config) -> None:
        super().__init__()
        self.front_end = FrontEnd(CHANNELS)
        self.networks = nn.ModuleList()
        for model in detector.members:
            if model.network:
                network = fold_batch_norm(model.network).cpu()
                self.networks.append(
                    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
                )
        replace_prelus(self.networks)
        self.scorer = detector.scorer(config.scoring, config.neighbours)
        self.machines = detector.classes.machines

    def forward(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        inputs = self.front_end.inputs(samples)
        spectrum = spectrum_of(inputs["log_mel"])
        members = []
        for network in self.networks:
            similarity, embedding = network(**inputs)
            members.append(Outputs(similarity, embedding, spectrum))
        if not members:
            nothing = spectrum[:, :0]  # a tensor of its own would fix N
            members.append(Outputs(nothing, nothing, spectrum))
        outputs = DetectorOutputs(tuple(members))
        scores = self.scorer.score_against_machines(outputs, self.machines)
        return scores.float(), outputs.embedding


class SumOfProductsPReLU(nn.Module):
    """PReLU `(B, C, H, W)` as sum and products, which ONNX Runtime computes faster than PReLU."""

    def __init__(self, slope: Tensor) -> None:
        super().__init__()
        self.slope = nn.Parameter(slope.detach().view(-1, 1, 1))
        self.complement = nn.Parameter(1.0 - self.slope.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * x + self.complement * F.relu(x)


def replace_prelus(network: nn.Module) -> None:
    """Replace each PReLU of a network by the faster form, in place."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.PReLU):
                setattr(parent, name, SumOfProductsPReLU(child.weight))
