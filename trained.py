"""Networks: built from a configuration, and loaded from checkpoints as models."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audio import Windows, choose_windows
from checkpoint import Checkpoint, has_machines
from classes import Classes
from config import MODEL_KEYS, RECORDING_KEYS, Config
from evaluation.scores import KINDS, Scorer
from losses import MODES, Objective
from model import CENTRES, TASTgramMFN
from utils import UserError, notice


@dataclass(frozen=True)
class Model:
    """A trained network, in evaluation mode. It is loaded onto the CPU; scoring moves it.

    Attributes:
        network: The network with the weights of the checkpoint.
        config: The configuration it was trained with.
        classes: What it tells apart.
        checkpoint: The checkpoint it comes from.
    """

    network: TASTgramMFN
    config: Config
    classes: Classes
    checkpoint: Checkpoint

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    def windows(self, config: Config, split: str, window: str = "") -> Windows:
        """Return which windows of recordings to score. `window` and `channel` are those of the
        training, unless they stood on the command line; the argument `window` takes precedence.
        """
        values = self.config.model_dump(include=set(RECORDING_KEYS))
        for key in config.given.intersection(RECORDING_KEYS):
            values[key] = getattr(config, key)
        return choose_windows(window or values["window"], config.hop, values["channel"], split)

    def scorer(self, kind: str, neighbours: int = 1, dtype: torch.dtype = torch.float64) -> Scorer:
        """Return the scorer of a kind. Where it uses the bank, the checkpoint has to have it."""
        bank = self.checkpoint.bank if KINDS[kind].uses_bank else None
        return Scorer(
            kind=kind,
            classes=self.classes,
            objective=Objective(self.config.mode, self.config.m, self.config.s),
            centres=self.network.centres().cpu(),
            bank=None if bank is None else bank.by_class(len(self.classes)),
            neighbours=neighbours,
            dtype=dtype,
        )


def load_model(path: Path, config: Config) -> Model:
    """Load the model of a checkpoint. For a bare state dict `config` says how it was trained.

    Raises:
        UserError: If a key of the command line contradicts the checkpoint, or the weights do not
            fit the configuration.
    """
    checkpoint = Checkpoint.load(path)
    if checkpoint.config is None:
        notice(f"{path} is a bare state dict: {', '.join(MODEL_KEYS)} are those of config.yaml")
        classes = classes_of_weights(path, config)
    else:
        check_agreement(config, checkpoint)
        config, classes = checkpoint.config, checkpoint.classes
    network = build_network(config, classes)
    keys = "machines, classes, input, sub_centers"
    check_fit(checkpoint.weights, network.state_dict(), path, keys)
    network.load_state_dict(checkpoint.weights)
    return Model(network.eval(), config, classes, checkpoint)


def classes_of_weights(path: Path, config: Config) -> Classes:
    """Return the classes of a bare state dict. Raises `UserError` where only folders have them."""
    if isinstance(config.machines, str) or config.classes == "attributes":
        raise UserError(
            f"{path} is a bare state dict, which does not contain its classes; set machines to a "
            f"table and classes to section"
        )
    return Classes.from_machines(config.machines)


def check_agreement(config: Config, checkpoint: Checkpoint) -> None:
    """Raise `UserError` where a key of the command line contradicts the model of a checkpoint."""
    assert checkpoint.config
    keys = [key for key in MODEL_KEYS if key in config.given]
    if "machines" in keys and has_machines(config, checkpoint.classes):
        keys.remove("machines")
    for key in config.differences(checkpoint.config, keys):
        value: Any = getattr(checkpoint.config, key)
        if key == "machines":
            value = checkpoint.classes.describe_machines()
        raise UserError(
            f"command line: {key} is {getattr(config, key)!r}, but the checkpoint "
            f"{checkpoint.path} "
            f"has {value!r}; leave it out"
        )


def build_network(config: Config, classes: Classes) -> TASTgramMFN:
    """Build the network of a configuration; its initial weights depend on the seed alone."""
    torch.manual_seed(config.seed)
    head = MODES[config.mode].head
    return TASTgramMFN(len(classes), config.input, head, config.sub_centers)


def take_weights(network: TASTgramMFN, checkpoint: Checkpoint) -> None:
    """Give a network the weights of a checkpoint, but for the class centres, which are those of
    other machines.

    Raises:
        UserError: If the weights do not fit the network.
    """
    initial = network.state_dict()
    taken = {name: x for name, x in checkpoint.weights.items() if name not in CENTRES}
    replaced = {name: x for name, x in initial.items() if name not in CENTRES}
    check_fit(taken, replaced, checkpoint.path, "input")
    network.load_state_dict(initial | taken)
    notice(
        f"init_from: starting from the weights of {checkpoint.path}, except for the class centres "
        f"({', '.join(CENTRES)})"
    )


def check_fit(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, keys: str
) -> None:
    """Raise `UserError` where the weights of a file have other names or shapes than expected;
    `keys` are the keys of the configuration that may be the reason.
    """
    for name in sorted(weights.keys() | expected.keys()):
        in_file, in_model = shape_of(weights, name), shape_of(expected, name)
        if in_file != in_model:
            raise UserError(
                f"{path} does not fit the configuration ({keys}): {name} is {in_file} in the file "
                f"and {in_model} in the model"
            )


def shape_of(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...] | str:
    return tuple(weights[name].shape) if name in weights else "absent"
