"""Trained networks: loaded from checkpoints, and run on clips for validation and for scoring."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.mkldnn import to_mkldnn
from tqdm import tqdm

from audio import SECONDS, Windows, choose_windows
from checkpoint import Checkpoint
from classes import Classes
from config import MODEL_KEYS, RECORDING_KEYS, Config
from dataloader import ClipSet, cut_into_batches, fingerprint_of, load_clips
from errors import UserError
from evaluation.bank import Bank
from evaluation.scores import KINDS, Outputs, Scorer, StoredClips
from losses import MODES, Objective
from model import (
    CHANNELS,
    EMBEDDING_SIZE,
    FrontEnd,
    MobileFaceNet,
    TASTgramMFN,
    fold_batch_norm,
    levels_of,
    spectrum_of,
)
from model.tastgram import N_BANDS, N_MELS
from utils import autocast, choose_precision, keep_freed_memory, notice, set_up_numerics

CPU_BATCH = 16  # larger batches are no faster, and 64 clips take 3 GB

# ---- Models ----


@dataclass(frozen=True)
class Model:
    """A trained network, in evaluation mode. It is loaded onto the CPU; scoring moves it.

    Attributes:
        network: The network with the weights of the checkpoint; None to score without a network.
        config: The configuration it was trained with.
        classes: The classes that it distinguishes.
        checkpoint: The checkpoint it comes from.
    """

    network: TASTgramMFN | None
    config: Config
    classes: Classes
    checkpoint: Checkpoint

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def weights_sha256(self) -> str:
        """A hash of the weights."""
        assert self.network
        digest = hashlib.sha256()
        for tensor in self.network.state_dict().values():
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def windows(self, config: Config, split: str, window: str = "") -> Windows:
        """Return which windows of recordings to score. `window` and `channel` are those of the
        training, unless given on the command line; the argument `window` takes precedence.
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
            centres=None if self.network is None else self.network.centres().cpu(),
            bank=None if bank is None else bank.clips.by_class(len(self.classes)),
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
        keys = ", ".join(MODEL_KEYS)
        notice(f"{path} is a bare state dict: {keys} are those of the configuration")
        classes = classes_of_weights(path, config)
    else:
        check_agreement(config, checkpoint)
        config, classes = checkpoint.config, checkpoint.classes
    network = build_network(config, classes)
    checkpoint.fill(network)
    return Model(network.eval(), config, classes, checkpoint)


def classes_of_weights(path: Path, config: Config) -> Classes:
    """Return the classes of a bare state dict. Raises `UserError` where only folders have them."""
    if isinstance(config.machines, str) or config.classes == "attributes":
        raise UserError(
            f"{path} is a bare state dict, which does not contain its classes; set machines to a "
            "table and classes to section"
        )
    return Classes.from_machines(config.machines)


def check_agreement(config: Config, checkpoint: Checkpoint) -> None:
    """Raise `UserError` where a key of the command line contradicts the model of a checkpoint."""
    keys = [key for key in MODEL_KEYS if key in config.given]
    for key in checkpoint.differences(config, keys):
        value: Any = getattr(checkpoint.config, key)
        if key == "machines":
            value = checkpoint.classes.describe_machines()
        raise UserError(
            f"command line: {key} is {getattr(config, key)!r}, but the checkpoint "
            f"{checkpoint.path} has {value!r}; leave it out"
        )


def build_network(config: Config, classes: Classes) -> TASTgramMFN:
    """Build the network of a configuration; its initial weights depend on the seed alone."""
    torch.manual_seed(config.seed)
    head = MODES[config.mode].head
    return TASTgramMFN(len(classes), config.input, head, config.sub_centers)


# ---- The bank: the training clips, to compare others with ----


def with_bank(model: Model, config: Config, kinds: Iterable[str], device: torch.device) -> Model:
    """Return a model whose checkpoint has the bank and the embeddings of the held-out clips, if one
    of these kinds of score needs them.

    The checkpoint of a finished run has both. For other weights they are computed from the training
    recordings in `data_root`, with the windows and the channel of the training; for a bare state
    dict the bank alone, since it does not say which clips were held out.

    Raises:
        UserError: If there are no training clips, or if they are not those of the run.
    """
    if model.checkpoint.bank is not None or not any(KINDS[kind].uses_bank for kind in kinds):
        return model
    notice(
        f"{model.path} holds no embeddings of its training clips; they are computed from "
        f"{config.data_root}"
    )
    data_root = Path(config.data_root)
    clips = load_clips(config, model.classes, "train", model.config.windows("train"))
    if model.checkpoint.config is None:
        bank = make_bank(embed(model, clips, config, device), clips, model.classes, data_root)
        return replace(model, checkpoint=replace(model.checkpoint, bank=bank))
    train_clips, valid_clips = clips.split(model.config.split_ratio, model.config.seed)
    if fingerprint_of(train_clips, valid_clips) != model.checkpoint.fingerprint:
        raise UserError(
            f"the recordings under {config.data_root} are not those that {model.path} was trained "
            "on; set --data_root to the folder of that run, or choose another --scoring"
        )
    outputs = embed(model, train_clips, config, device)
    bank = make_bank(outputs, train_clips, model.classes, data_root)
    assert model.checkpoint.held_out
    stored = StoredClips.from_outputs(embed(model, valid_clips, config, device), valid_clips.labels)
    held_out = model.checkpoint.held_out.with_outputs(stored)
    return replace(model, checkpoint=replace(model.checkpoint, bank=bank, held_out=held_out))


def embed(model: Model, clips: ClipSet, config: Config, device: torch.device) -> Outputs:
    """Compute the outputs for clips that a checkpoint is to keep, in float32."""
    return run_model(model, clips, config, device, "embeddings", precision="fp32")


def make_bank(outputs: Outputs, clips: ClipSet, classes: Classes, root: Path) -> Bank:
    """Keep the outputs for training clips, whose files are in the folder `root`."""
    starts = torch.from_numpy(clips.clip_starts)
    return Bank.from_outputs(outputs, clips.labels, clips.files_in(root), starts, classes)


# ---- Outputs for clips ----


def run_model(
    model: Model,
    clips: ClipSet,
    config: Config,
    device: torch.device,
    title: str = "scoring",
    precision: str = "",
) -> Outputs:
    """Run a model on clips, with the network in `precision`, or else in `eval_precision`, and the
    front end in float32. `title` is that of the progress bar. Returns the outputs on the CPU.
    """
    set_up_numerics()
    keep_freed_memory()
    outputs = run_network(
        None if model.network is None else model.network.move_to(device),
        clips,
        np.arange(len(clips)),
        config.batch_size,
        choose_precision(precision or config.eval_precision, device),
        title,
    )
    return outputs.apply(Tensor.cpu)


@torch.no_grad()
def run_network(
    network: TASTgramMFN | None,
    clips: ClipSet,
    numbers: np.ndarray,
    batch_size: int,
    precision: torch.dtype = torch.float32,
    title: str | None = None,
) -> Outputs:
    """Run a network on the clips of these numbers, with the running statistics of batch norm.
    Without a network, similarity and embedding are empty.

    The network runs in `precision`, the front end in float32, both on the device of the network.
    `batch_size` is one for training: without gradients a GPU has room for twice as many clips.
    `title` is that of a progress bar; None for no bar. Returns the outputs on the device, with
    levels.
    """
    device, n_classes, embedding_size, prepared = torch.device("cpu"), 0, 0, None
    if network is not None:
        device = next(network.parameters()).device
        n_classes, embedding_size = network.num_classes, EMBEDDING_SIZE
        prepared = optimise(network, device, precision)
    front_end = FrontEnd(CHANNELS).to(device)
    plan = cut_into_batches(
        numbers, min(batch_size, CPU_BATCH) if device.type == "cpu" else 2 * batch_size
    )
    # Allocated once: the results of each batch apart would fragment the memory that glibc keeps.
    similarity = torch.empty(len(numbers), n_classes, device=device)
    embedding = torch.empty(len(numbers), embedding_size, device=device)
    spectrum = torch.empty(len(numbers), 2 * N_MELS, device=device)
    levels = torch.empty(len(numbers), N_BANDS, SECONDS, device=device)
    data = clips.read(plan, device)
    bar = tqdm(data, title, len(plan), unit="batch", leave=False, disable=None if title else True)
    start = 0
    for samples in bar:
        rows = slice(start, start + len(samples))
        inputs = front_end(samples)
        if prepared is not None:
            with autocast(device, precision):
                similarity[rows], embedding[rows] = prepared(**inputs)
        spectrum[rows] = spectrum_of(inputs["log_mel"])
        levels[rows] = levels_of(inputs["log_mel"])
        start += len(samples)
    return Outputs(similarity, embedding, spectrum, levels)


def optimise(network: TASTgramMFN, device: torch.device, precision: torch.dtype) -> nn.Module:
    """Return a copy of a network that computes its outputs in evaluation mode faster."""
    prepared = fold_batch_norm(network)
    if device.type == "cpu" and precision == torch.float32 and torch.backends.mkldnn.is_available():
        prepared.add_module("mobilefacenet", BlockedLayout(prepared.mobilefacenet))
    return prepared


class BlockedLayout(nn.Module):
    """A backbone in the memory format that oneDNN, PyTorch's library of convolutions for CPUs,
    chooses for itself. The weights are converted to it once; only oneDNN can read the format.
    """

    def __init__(self, network: MobileFaceNet) -> None:
        super().__init__()
        self.fc_out = network.fc_out
        contiguous = network.to(  # type: ignore[call-overload]
            memory_format=torch.contiguous_format
        )
        self.network = to_mkldnn(contiguous)

    def forward(self, features: Tensor) -> Tensor:
        return self.network(features.to_mkldnn()).to_dense()
