"""A trained model as one PyTorch module, from the waveform to the scores, made of operations that ONNX has too."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import TrainedModel
from corpus import alternatives, first_classes
from evaluation.scoring import class_cosines, mean_distance
from losses import Objective
from model import FrontEnd, TASTgramMFN, fold_batch_norm


class ScoringGraph(nn.Module):
    """Waveform `(N, T)` in [-1, 1) -> anomaly scores `(N, M)`, one for each machine ID in the order of the classes, and
    embedding `(N, E)`; float32.

    The scores are those of the kind that `scoring` names, the lowest over the classes of an ID. They are computed in
    float64, as those that the decisions of `eval.py` rest on: in float32, scores of very normal clips tie at 0. Batch
    norms are folded into the convolutions before them, and PReLUs replaced unless `has_prelu`.
    """

    own_classes: Tensor  # (M, most classes of an ID)

    def __init__(self, trained: TrainedModel, has_prelu: bool = False) -> None:
        super().__init__()
        config = trained.config
        network = fold_batch_norm(trained.network).cpu().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        kinds = {"published": PublishedScores, "angle": Angles, "nearest": Distances}
        self.front_end, self.network = FrontEnd(config.input), network
        self.score = kinds[config.scoring](trained, network)
        if not has_prelu:
            replace_prelus(network)
        classes = alternatives(config)[list(first_classes(config).values())]
        self.register_buffer("own_classes", torch.from_numpy(classes))

    def forward(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        similarity, embedding = self.network(**self.front_end.inputs(samples))
        of_classes = self.score(similarity, embedding)
        return of_classes[:, self.own_classes].amin(dim=2).float(), embedding


# ---- Scores against every class: similarity `(N, C)`, embedding `(N, E)` -> `(N, C)` in float64 ----


class PublishedScores(nn.Module):
    def __init__(self, trained: TrainedModel, network: TASTgramMFN) -> None:
        super().__init__()
        config = trained.config
        self.objective = Objective(config.mode, config.m, config.s)

    def forward(self, similarity: Tensor, embedding: Tensor) -> Tensor:
        n_clips, n_classes = similarity.shape
        labels = torch.arange(n_classes).expand(n_clips, -1).flatten()
        rows = similarity.unsqueeze(1).expand(-1, n_classes, -1).flatten(0, 1)  # each clip once for each class
        logits = self.objective.logits(rows.double(), labels)
        own = -F.log_softmax(logits, dim=1).gather(1, labels.unsqueeze(1))  # cross-entropy
        return own.unflatten(0, (-1, n_classes)).squeeze(2)


class Angles(nn.Module):
    """From the sine of half the angle: ONNX Runtime has arcus functions for float32 only, in which a cosine says
    little of a small angle.
    """

    def __init__(self, trained: TrainedModel, network: TASTgramMFN) -> None:
        super().__init__()
        self.network = network

    def forward(self, similarity: Tensor, embedding: Tensor) -> Tensor:
        half_sine = torch.sqrt((1.0 - class_cosines(self.network, embedding)) / 2.0)
        return torch.rad2deg(2.0 * torch.asin(half_sine.float())).double()


class Distances(nn.Module):
    """The bank of each class is kept in half precision, as in the checkpoint."""

    def __init__(self, trained: TrainedModel, network: TASTgramMFN) -> None:
        super().__init__()
        bank, self.neighbours = trained.state["embeddings"]["bank"], trained.config.neighbours
        banks = [bank["embedding"][bank["label"] == label] for label in range(network.num_classes)]
        self.banks = nn.ParameterList([nn.Parameter(own, requires_grad=False) for own in banks])

    def forward(self, similarity: Tensor, embedding: Tensor) -> Tensor:
        nothing_near = torch.full_like(embedding[:, 0], torch.inf, dtype=torch.float64)
        distances = [mean_distance(embedding, own, self.neighbours) if len(own) else nothing_near for own in self.banks]
        return torch.stack(distances, dim=1)


# ---- PReLU ----


class PReLU(nn.Module):
    """`relu(x) * (1 - slope) + x * slope`, `(B, C, H, W)`, the products as depthwise convolutions.

    ONNX Runtime keeps these in the memory layout of its convolutions. Around a PReLU it changes the layout twice, and
    the PReLU itself takes longer than all convolutions.
    """

    def __init__(self, slope: Tensor) -> None:
        super().__init__()
        self.slope = nn.Parameter(slope.detach().view(-1, 1, 1, 1))
        self.rest = nn.Parameter(1.0 - self.slope.detach())

    def forward(self, x: Tensor) -> Tensor:
        channels = len(self.slope)
        return F.conv2d(x, self.slope, groups=channels) + F.conv2d(F.relu(x), self.rest, groups=channels)


def replace_prelus(network: nn.Module) -> None:
    for name, child in network.named_children():
        if isinstance(child, nn.PReLU):
            setattr(network, name, PReLU(child.weight))
        else:
            replace_prelus(child)
