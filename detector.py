"""One or several trained models as one detector, which has one score for each clip.

The score of a single model is that of the detector. The scores of several, its members, are put on
one scale and averaged: each score of a member is replaced by the one that lies at the same place
among the normal scores of an average member, and the mean is that of log(1 + score). The normal
scores are those of the recordings that a member held out of its training, so no test recording is
needed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from audio import Windows
from classes import Classes, Machine
from config import Config
from dataloader import ClipSet
from errors import UserError
from evaluation.bank import Bank
from evaluation.scores import Outputs, Scorer
from inference import Model, load_model, run_model, with_bank
from recordings import MACHINE_COLUMNS

SCORE_COLUMNS = [*MACHINE_COLUMNS, "recording", "score"]  # of the normal scores of windows
LEAST_SCORE = 1e-14  # for logarithms; published scores below are rounding errors
LEAST_FOR_SPREAD = 10  # normal scores; the spread of fewer is not used
MOST_RATIO = 10.0  # of two spreads; scores of a member would be stretched too far


class DetectorOutputs(NamedTuple):
    """The outputs of each member for n clips."""

    members: tuple[Outputs, ...]

    @property
    def embedding(self) -> Tensor:
        """The embeddings of all members side by side `(n, members E)`."""
        return torch.cat([outputs.embedding for outputs in self.members], dim=1)

    @property
    def sound(self) -> Outputs:
        """The outputs that no network is needed for, spectrum and levels, among those of the first
        member: they are the same in all.
        """
        return self.members[0]


class Scale(NamedTuple):
    """The logarithms of normal scores: their mean and standard deviation."""

    mean: float
    spread: float

    @classmethod
    def of_scores(cls, scores: np.ndarray) -> "Scale":
        """Measure the scale of normal scores `(n,)`."""
        logs = np.log(np.maximum(scores, LEAST_SCORE))
        return cls(float(logs.mean()), float(logs.std()))

    def convert(self, scores: Tensor, target: "Scale") -> Tensor:
        """Return the scores at the same places of another scale; float64."""
        logs = scores.double().clamp(min=LEAST_SCORE).log()
        return ((logs - self.mean) * (target.spread / self.spread) + target.mean).exp()


def find_scales(normal_scores: Sequence[np.ndarray]) -> list[Scale]:
    """Measure the scale of the normal scores of each member. The spreads count only if there are
    enough scores, and if they are similar: else all are 1.
    """
    scales = [Scale.of_scores(scores) for scores in normal_scores]
    spreads = [scale.spread for scale in scales]
    is_few = min(map(len, normal_scores)) < LEAST_FOR_SPREAD
    if is_few or min(spreads) * MOST_RATIO <= max(spreads):
        scales = [scale._replace(spread=1.0) for scale in scales]
    return scales


@dataclass(frozen=True)
class DetectorScorer:
    """The scores of a kind of a detector.

    Attributes:
        members: The scorer of each member.
        scales: The scale of the normal scores of each member; none where there is one member.
    """

    members: Sequence[Scorer]
    scales: Sequence[Scale] = ()

    def score_clips(self, outputs: DetectorOutputs, machines: Sequence[Machine]) -> Tensor:
        """Score each clip against its machine `(n,)`, as `Scorer.score_clips` does."""
        pairs = zip(self.members, outputs.members, strict=True)
        return self.average([scorer.score_clips(x, machines) for scorer, x in pairs])

    def score_against_machines(
        self, outputs: DetectorOutputs, machines: Sequence[Machine]
    ) -> Tensor:
        """Score clips against each of several machines `(n, machines)`."""
        pairs = zip(self.members, outputs.members, strict=True)
        return self.average([scorer.score_against_machines(x, machines) for scorer, x in pairs])

    def convert(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """Return the scores of each member on the scale of an average member, as log(1 + score): of
        published scores, nearly 0 or up to 40, no single one decides over the mean.
        """
        target = Scale(*np.mean(self.scales, axis=0).tolist())
        pairs = zip(self.scales, scores, strict=True)
        return [torch.log1p(scale.convert(values, target)) for scale, values in pairs]

    def restore(self, means: Tensor) -> Tensor:
        """Return the scores of means of what `convert` returns."""
        return torch.expm1(means)

    def average(self, scores: Sequence[Tensor]) -> Tensor:
        """Return the mean of the scores of each member, all of the same shape, on one scale."""
        if not self.scales:
            return scores[0]
        mean = torch.stack(self.convert(scores)).mean(dim=0)
        return self.restore(mean).to(self.members[0].dtype)

    def average_tables(self, tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
        """Average the normal scores of each window over the members that have scored its recording.
        Each table has the columns SCORE_COLUMNS, and the windows of a recording in the same order.
        """
        if not self.scales:
            return tables[0]
        columns = [*MACHINE_COLUMNS, "recording"]
        scores = self.convert([torch.tensor(x["score"].to_numpy(float)) for x in tables])
        parts = []
        for table, values in zip(tables, scores, strict=True):
            window = table.groupby(columns).cumcount()
            parts.append(table.assign(score=values.numpy(), window=window))
        windows = pd.concat(parts).groupby([*columns, "window"], sort=False)["score"]
        table = windows.mean(skipna=False).reset_index()[SCORE_COLUMNS]
        means = torch.tensor(table["score"].to_numpy(float))
        return table.assign(score=self.restore(means).numpy())


@dataclass(frozen=True)
class Detector:
    """Trained models of the same machines, on the CPU; scoring moves them.

    Attributes:
        members: The models, one or several.
    """

    members: tuple[Model, ...]

    @property
    def first(self) -> Model:
        """The first member. Where a detector has one of something, it is that of this member."""
        return self.members[0]

    @property
    def path(self) -> Path:
        return self.first.path

    @property
    def name(self) -> str:
        """The files of all members."""
        return ", ".join(str(model.path) for model in self.members)

    @property
    def title(self) -> str:
        """The names of the files of all members, without folders and extensions."""
        return ", ".join(model.path.stem for model in self.members)

    @property
    def is_ensemble(self) -> bool:
        return len(self.members) > 1

    @property
    def config(self) -> Config:
        return self.first.config

    @property
    def mode(self) -> str:
        """The modes of all members; empty without a network."""
        names = dict.fromkeys(model.config.mode for model in self.members if model.network)
        return ", ".join(names)

    @property
    def channels(self) -> list[str]:
        """The input channels of all members; none without a network."""
        names = (name for x in self.members if x.network for name in x.config.input)
        return list(dict.fromkeys(names))

    @property
    def classes(self) -> Classes:
        return self.first.classes

    @property
    def bank(self) -> Bank | None:
        return self.first.checkpoint.bank

    @property
    def has_network(self) -> bool:
        return self.first.network is not None

    def windows(self, config: Config, split: str, window: str = "") -> Windows:
        """Return which windows of recordings to score, as `Model.windows` does.

        Raises:
            UserError: If the members use different ones.
        """
        chosen = {model.windows(config, split, window): model.path for model in self.members}
        if len(chosen) > 1:
            one, other, *_ = chosen.values()
            raise UserError(
                f"{one} and {other} were trained on other windows or another channel; give "
                "--window and --channel, or leave one out"
            )
        return next(iter(chosen))

    def with_bank(self, config: Config, kinds: Iterable[str], device: torch.device) -> "Detector":
        """Return a detector whose members have the bank, if one of these kinds needs it."""
        wanted = list(kinds)
        return Detector(tuple(with_bank(x, config, wanted, device) for x in self.members))

    def run(
        self,
        clips: ClipSet,
        config: Config,
        device: torch.device,
        title: str = "scoring",
        precision: str = "",
    ) -> DetectorOutputs:
        """Run each member on clips, as `run_model` does."""
        return DetectorOutputs(
            tuple(run_model(x, clips, config, device, title, precision) for x in self.members)
        )

    def scorer(
        self, kind: str, neighbours: int = 1, dtype: torch.dtype = torch.float64
    ) -> DetectorScorer:
        """Return the scorer of a kind.

        Raises:
            UserError: If a member of several has no normal scores to find its scale with.
        """
        scorers = [model.scorer(kind, neighbours, dtype) for model in self.members]
        if not self.is_ensemble:
            return DetectorScorer(scorers)
        pairs = zip(self.members, scorers, strict=True)
        return DetectorScorer(scorers, find_scales([normal_scores(*pair) for pair in pairs]))

    def angles(self, outputs: DetectorOutputs, machines: Sequence[Machine]) -> Tensor:
        """Return the angle between the embedding of each clip and the closest centre of its machine
        in degrees `(n,)`, the mean over the members.
        """
        pairs = zip(self.members, outputs.members, strict=True)
        return torch.stack([m.scorer("angle").score_clips(x, machines) for m, x in pairs]).mean(0)


def load_detector(paths: Sequence[Path], config: Config) -> Detector:
    """Load the models of checkpoints, as `load_model` does, as one detector."""
    return join_models([load_model(path, config) for path in paths])


def join_models(models: Sequence[Model]) -> Detector:
    """Return a detector of these models.

    Raises:
        UserError: If a checkpoint is given twice, or knows other machines than the first.
    """
    first = models[0]
    for number, model in enumerate(models):
        if any(model.path.resolve() == other.path.resolve() for other in models[:number]):
            raise UserError(f"{model.path} is given twice; leave one out")
        if model.classes.machines != first.classes.machines:
            raise UserError(
                f"{model.path} knows other machines ({model.classes.describe_machines()}) than "
                f"{first.path} ({first.classes.describe_machines()}), so they cannot score "
                "together; leave one out"
            )
    return Detector(tuple(models))


def score_held_out(model: Model, scorer: Scorer) -> pd.DataFrame:
    """Return machine type, machine ID, `recording` (its file) and `score` of each window that was
    held out of the training; no rows where the checkpoint has no such windows.
    """
    held_out = model.checkpoint.held_out
    nothing = pd.DataFrame(columns=SCORE_COLUMNS)
    if held_out is None:
        return nothing
    machines = [model.classes.entries[label].machine for label in held_out.labels]
    if scorer.kind == "published" or model.network is None:
        scores = held_out.scores
    elif held_out.embedding is None or held_out.spectrum is None:
        return nothing
    else:
        no_similarity = torch.empty(len(machines), 0)
        outputs = Outputs(no_similarity, held_out.embedding, held_out.spectrum)
        scores = scorer.score_clips(outputs, machines)
    table = pd.DataFrame(machines, columns=MACHINE_COLUMNS)
    return table.assign(recording=list(held_out.files), score=scores.numpy())


def normal_scores(model: Model, scorer: Scorer) -> np.ndarray:
    """Return the normal scores of a member `(n,)`.

    Raises:
        UserError: If there are none.
    """
    scores = score_held_out(model, scorer)["score"].to_numpy(float)
    if not np.isfinite(scores).any():
        raise UserError(
            f"{model.path} has no {scorer.kind} scores of recordings that were held out of its "
            "training, which put the scores of several checkpoints on one scale; leave it out"
        )
    return scores[np.isfinite(scores)]
