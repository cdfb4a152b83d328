"""A trained model as one PyTorch module, from the waveform to the scores, made of operations that
ONNX has too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import TrainedModel
from corpus import alternatives, first_classes
from evaluation.scoring import class_cosines, mean_distance
from losses import Objective
from model import FrontEnd, fold_batch_norm


class ScoringGraph(nn.Module):
    """Waveform `(N, T)` in [-1, 1) -> anomaly scores `(N, M)`, one for each machine ID in the order
    of the classes, and embedding `(N, E)`; float32.

    The scores are those of the kind that `scoring` names, the lowest over the classes of an ID.
    They are computed in float64, as those that the decisions of `eval.py` rest on: in float32,
    scores of very normal clips tie at 0. Batch norms are folded into the convolutions before them.
    """

    own_classes: Tensor  # (M, most classes of an ID)

    def __init__(self, trained: TrainedModel) -> None:
        super().__init__()
        config = trained.config
        self.front_end = FrontEnd(config.input)
        self.network = (
            fold_batch_norm(trained.network).cpu().to(memory_format=torch.contiguous_format)
        )  # type: ignore[call-overload]
        replace_prelus(self.network)
        self.objective, self.neighbours = (
            Objective(config.mode, config.m, config.s),
            config.neighbours,
        )
        self.banks = nn.ParameterList(divide_bank(trained) if config.scoring == "nearest" else [])
        self.score = {"published": self.published, "angle": self.angles, "nearest": self.distances}[
            config.scoring
        ]
        classes = alternatives(config)[list(first_classes(config).values())]
        self.register_buffer("own_classes", torch.from_numpy(classes))

    def forward(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        similarity, embedding = self.network(**self.front_end.inputs(samples))
        of_classes = self.score(similarity, embedding)
        return of_classes[:, self.own_classes].amin(dim=2).float(), embedding

    # The scores against every class `(N, C)` in float64, from similarity `(N, C)` and embedding
    # `(N, E)`

    def published(self, similarity: Tensor, embedding: Tensor) -> Tensor:
        n_clips, n_classes = similarity.shape
        labels = torch.arange(n_classes).expand(n_clips, -1).flatten()
        rows = (
            similarity.unsqueeze(1).expand(-1, n_classes, -1).flatten(0, 1)
        )  # each clip once for each class
        logits = self.objective.logits(rows.double(), labels)
        own = -F.log_softmax(logits, dim=1).gather(1, labels.unsqueeze(1))  # cross-entropy
        return own.unflatten(0, (-1, n_classes)).squeeze(2)

    def angles(self, similarity: Tensor, embedding: Tensor) -> Tensor:
        """From the sine of half the angle. ONNX Runtime has inverse trigonometric functions for
        float32 only, in which a cosine says little of a small angle.
        """
        half_sine = torch.sqrt((1.0 - class_cosines(self.network, embedding)) / 2.0)
        return torch.rad2deg(2.0 * torch.asin(half_sine.float())).double()

    def distances(self, similarity: Tensor, embedding: Tensor) -> Tensor:
        nothing_near = torch.full_like(embedding[:, 0], torch.inf, dtype=torch.float64)
        distances = [
            mean_distance(embedding, own, self.neighbours) if len(own) else nothing_near
            for own in self.banks
        ]
        return torch.stack(distances, dim=1)


class SumOfProductsPReLU(nn.Module):
    """PReLU `(B, C, H, W)` as sum and products, which ONNX Runtime computes faster than its own
    PReLU.
    """

    def __init__(self, slope: Tensor) -> None:
        super().__init__()
        self.slope = nn.Parameter(slope.detach().view(-1, 1, 1))
        self.complement = nn.Parameter(1.0 - self.slope.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * x + self.complement * F.relu(x)


def replace_prelus(network: nn.Module) -> None:
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.PReLU):
                setattr(parent, name, SumOfProductsPReLU(child.weight))


def divide_bank(trained: TrainedModel) -> list[nn.Parameter]:
    """The embeddings of each class, in half precision as in the checkpoint."""
    bank, n_classes = trained.state["embeddings"]["bank"], trained.network.num_classes
    banks = [bank["embedding"][bank["label"] == label] for label in range(n_classes)]
    return [nn.Parameter(own, requires_grad=False) for own in banks]
