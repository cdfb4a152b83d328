"""From clips to the anomaly scores of a trained network, of the three kinds that `scoring` names.

- published: cross-entropy with margin against the own machine ID (Choi & Choi, ICASSP 2024)
- angle: between the embedding and the centre of the own ID, in degrees
- nearest: cosine distance between the embedding and those of the nearest training clips of the own ID, the bank

Where an ID has several classes, the own one is the one with the lowest score.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import State, TrainedModel
from config import Config
from corpus import MACHINE, alternatives, machines_of_classes
from dataloader import ClipSet, fingerprint, load_clips
from inference import Outputs, pack_embeddings, run_network, score_classes
from losses import Objective
from model import FrontEnd, TASTgramMFN
from utils import UserError, choose_precision, keep_freed_memory, notice, set_up_numerics


def run_model(
    trained: TrainedModel, clips: ClipSet, device: torch.device, title: str = "scoring"
) -> Outputs:
    """What the network gives for clips, on the CPU. The title is that of the progress bar.

    The network runs in `eval_precision`, everything before and after it in float32.
    """
    set_up_numerics()
    keep_freed_memory()
    config = trained.config
    precision = choose_precision(config.eval_precision, device)
    network, front_end = trained.network.move_to(device), FrontEnd(config.input).to(device)
    numbers = np.arange(len(clips))
    outputs = run_network(
        network, front_end, clips, numbers, config.batch_size, device, precision, title
    )
    return Outputs(outputs.similarity.cpu(), outputs.embedding.cpu())


# ---- Scores: one of each clip against the machine of the class `labels` `(n,)`; higher is more anomalous ----


def anomaly_scores(
    trained: TrainedModel, outputs: Outputs, labels: Tensor, dtype: str = "float64"
) -> np.ndarray:
    """The scores of the kind that the configuration names."""
    config = trained.config
    if config.scoring != "published":
        return embedding_scores(trained, outputs.embedding, labels).astype(dtype)
    objective = Objective(config.mode, config.m, config.s)
    score = partial(objective.anomaly_score, outputs.similarity, dtype=getattr(torch, dtype))
    return lowest(config, labels, score).numpy()


def scores_against(trained: TrainedModel, outputs: Outputs, classes: Iterable[int]) -> np.ndarray:
    """The scores of all clips against each of these classes `(n, classes)`; float64."""
    labels = [torch.full((len(outputs.embedding),), label) for label in classes]
    return np.stack([anomaly_scores(trained, outputs, against) for against in labels], axis=1)


def lowest(config: Config, labels: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """The lowest score `(n,)` over all classes of the machine."""
    return score_classes(torch.from_numpy(alternatives(config))[labels], score).amin(dim=1)


def embedding_scores(trained: TrainedModel, embedding: Tensor, labels: Tensor) -> np.ndarray:
    """Those of the kinds that an embedding `(n, E)` is enough for, whatever its length; float64."""
    if trained.config.scoring == "angle":
        return angles(trained, embedding, labels)
    bank, neighbours = trained.state["embeddings"]["bank"], trained.config.neighbours
    return lowest(
        trained.config, labels, lambda own: nearest_distances(embedding, own, bank, neighbours)
    ).numpy()


def angles(trained: TrainedModel, embedding: Tensor, labels: Tensor) -> np.ndarray:
    """Degrees to the closest centre of the machine; of a plain linear head, which has no centres,
    to the weights of its classes.
    """
    angle = torch.rad2deg(torch.acos(class_cosines(trained.network, embedding)))
    return lowest(trained.config, labels, lambda own: angle.gather(1, own[:, None])[:, 0]).numpy()


@torch.no_grad()
def class_cosines(network: TASTgramMFN, embedding: Tensor) -> Tensor:
    """Cosine to the closest centre of each class `(n, C)`, float64."""
    weight, sub_centers = network.mobilefacenet.fc_out.weight, 1
    if network.head == "arcface":
        weight, sub_centers = network.arcface.weight, network.arcface.sub_centers
    cosine = (
        F.normalize(embedding.double()) @ F.normalize(weight.to(embedding.device, torch.float64)).T
    )
    return cosine.unflatten(1, (-1, sub_centers)).amax(dim=2).clamp(-1.0, 1.0)


def nearest_distances(
    embedding: Tensor, labels: Tensor, bank: Mapping[str, Tensor], neighbours: int
) -> Tensor:
    """The mean cosine distance (0 to 2) to the nearest embeddings of the class in the bank, of
    which it takes as many as there are where the class has fewer; infinite where it has none.
    """
    distances = torch.full((len(labels),), torch.inf, dtype=torch.float64)
    for label in labels.unique():
        of_class, own = labels == label, bank["embedding"][bank["label"] == label]
        if len(own):
            distances[of_class] = mean_distance(embedding[of_class], own, neighbours)
    return distances


def mean_distance(embedding: Tensor, bank: Tensor, neighbours: int) -> Tensor:
    """The mean cosine distance of each embedding to the nearest ones of a bank that is not empty;
    float64.
    """
    cosine = F.normalize(embedding.double()) @ F.normalize(bank.double()).T
    return 1.0 - cosine.topk(min(neighbours, len(bank))).values.mean(dim=1)


def held_out_scores(trained: TrainedModel) -> pd.DataFrame:
    """The `score` of each clip that was held out of the training, with MACHINE; no rows where they
    are not known.
    """
    if trained.config.scoring == "published":
        return pd.DataFrame(trained.state.get("held_out", {}), columns=[*MACHINE, "score"])
    held_out = trained.state.get("embeddings", {}).get("held_out")
    if held_out is None:
        return pd.DataFrame(columns=[*MACHINE, "score"])
    machines = machines_of_classes(trained.config)
    table = pd.DataFrame([machines[label] for label in held_out["label"].tolist()], columns=MACHINE)
    scores = embedding_scores(trained, held_out["embedding"], held_out["label"])
    return table.assign(score=scores)[
        np.isfinite(scores)
    ]  # nothing is near a clip of an ID that has no others


# ---- The embeddings of the training clips ----


def with_embeddings(
    trained: TrainedModel, kinds: Sequence[str], device: torch.device
) -> TrainedModel:
    """The model with the embeddings that `nearest` needs, if it is among these kinds: those of the
    training clips (the bank) and of the held-out clips (for the thresholds).

    A finished training has left them in the checkpoint. For other weights they are computed from
    data_root. Raises `UserError` where there are no training clips, or others than those of the
    run.
    """
    if "nearest" not in kinds or "embeddings" in trained.state:
        return trained
    root = trained.config.data_root
    notice(
        f"{trained.path} holds no embeddings of its training clips; they are computed from {root}"
    )
    return dataclasses.replace(
        trained, state=trained.state | {"embeddings": embed_training_clips(trained, device)}
    )


def embed_training_clips(trained: TrainedModel, device: torch.device) -> State:
    """The embeddings of all training clips; for a run, those of its held-out clips separately.
    Windows and channel are those of the training, whatever is evaluated.
    """
    run = trained.state.get("config", trained.config.model_dump())
    config = trained.config.model_copy(
        update={key: run[key] for key in ("window", "hop", "channel")}
    )
    clips = load_clips(config, "train")
    parts = {"bank": clips}
    if "clips" in trained.state:
        parts = dict(
            zip(("bank", "held_out"), clips.split(run["split_ratio"], run["seed"]), strict=True)
        )
        if fingerprint(parts.values()) != trained.state["clips"]:
            raise UserError(
                f"the clips under {config.data_root} are not those that {trained.path} was trained on; give the folder "
                f"of that run (--data_root), or take another score (--scoring)"
            )
    exact = dataclasses.replace(
        trained, config=config.model_copy(update={"eval_precision": "fp32"})
    )
    return {
        name: pack_embeddings(run_model(exact, part, device, "embeddings").embedding, part.labels)
        for name, part in parts.items()
    }
