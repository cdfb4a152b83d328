"""The files of a run: their names, the lock, and the checkpoints; the model of a checkpoint."""

import contextlib
import io
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import pandas as pd
import torch
from torch import Tensor

from audio import Windows
from classes import Classes, MachineClass
from config import (
    COMPUTATION_KEYS,
    KEYS,
    MODEL_KEYS,
    RECORDING_KEYS,
    Config,
    choose_windows,
    make_config,
)
from distributed import from_main
from evaluation.scores import KINDS, Embeddings, Scorer
from losses import MODES, Objective
from model import CENTRES, TASTgramMFN
from utils import UserError, check_writable, notice, replace_file

# ---- The names of the files ----


class RunFiles:
    """The files of a run. `best` is `save_path`, the others derive from it."""

    def __init__(self, best: Path) -> None:
        if not best.suffix:
            raise UserError(
                f"{best}: its results go to a folder of its name without the ending, and it has "
                f"none; rename it to {best}.pth"
            )
        self.best = best
        self.last = best.with_name(f"{best.stem}.last.pth")  # after the last epoch, for resuming
        self.lock = best.with_name(f".{best.stem}.lock")
        self.folder = best.with_suffix("")
        self.history = self.folder / "history.csv"
        self.tensorboard = self.folder / "tensorboard"
        self.timelines = self.folder / "timelines"  # pictures of recordings that score.py draws

    def results(self, split: str) -> Path:
        """Return the folder of what eval.py writes for a split, "test" or "evaluation"."""
        return self.folder / split


@contextlib.contextmanager
def lock_run(files: RunFiles) -> Iterator[None]:
    """Keep other processes from training under the same `save_path`.

    Raises:
        UserError: If another process does, or if the files cannot be written.
    """
    lock = filelock.FileLock(files.lock, timeout=0)

    def acquire() -> None:
        check_writable(files.best, "--save_path names another file")
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"{files.best}: another process is training this run; wait for its end, or "
                f"--save_path names another"
            ) from None

    from_main(acquire)
    try:
        yield
    finally:
        lock.release()  # does nothing in a process that does not hold it


def clear_run(files: RunFiles) -> None:
    """Remove what an earlier training under this name has written, and pictures of its scores."""
    for file in (files.best, files.last, files.history):
        file.unlink(missing_ok=True)
    remove_files(files.tensorboard, ["events.out.tfevents.*"])
    remove_files(files.timelines, ["*.png"])


def remove_files(folder: Path, patterns: Sequence[str]) -> None:
    """Remove the files whose names match, and the folder if it is empty then."""
    for pattern in patterns:
        for file in list(folder.glob(pattern)):
            file.unlink()
    with contextlib.suppress(OSError):  # it holds other files, or does not exist
        folder.rmdir()


# ---- The checkpoint ----


class EpochResult(NamedTuple):
    """An epoch in the history; a row of history.csv. `lr` is the learning rate, the losses are
    means over clips, the accuracies fractions, `seconds` the duration.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    valid_loss: float
    valid_accuracy: float
    seconds: float


@dataclass(frozen=True)
class HeldOut:
    """Normal clips that were held out of the training: class `(n,)`, published score `(n,)` in
    float64, and, once the training has ended, embedding `(n, E)` of length 1 in float16.
    """

    labels: Tensor
    scores: Tensor
    embedding: Tensor | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A state of a training, which eval.py can score with and train.py can resume.

    A file that is a bare state dict, as published weights are, is a checkpoint with `weights`
    alone.

    Attributes:
        path: The file it was read from.
        weights: The state dict of the network.
        config: The configuration of the training; None in a bare state dict.
        classes: The classes of the network.
        history: The finished epochs.
        n_training: The number of clips to train on.
        held_out: The clips that were held out, under these weights.
        bank: The clips to train on, under these weights; only once the training has ended.
        fingerprint: Which clips are trained on and held out, as a hash.
        optimizer: The state of the optimiser.
        scaler: The state of the gradient scaler; empty but for precision fp16.
        versions: What the training was computed with.
    """

    path: Path
    weights: dict[str, Tensor]
    config: Config | None = None
    classes: Classes = Classes(())
    history: list[EpochResult] = field(default_factory=list)
    n_training: int | None = None
    held_out: HeldOut | None = None
    bank: Embeddings | None = None
    fingerprint: str = ""
    optimizer: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] | None = None

    @property
    def epoch(self) -> int | None:
        """The epoch of the weights; None in a bare state dict."""
        return self.history[-1].epoch if self.history else None

    def save(self, *paths: Path) -> None:
        """Write the checkpoint to each of the paths in turn, whole or not at all.

        Raises:
            OSError: If a disk is full; the file that was there before stays.
        """
        buffer = io.BytesIO()  # torch reports a full disk as a bug of its own, Python as an OSError
        torch.save(self._to_plain(), buffer)
        for path in paths:
            with replace_file(path) as temporary:
                temporary.write_bytes(buffer.getbuffer())

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Read a checkpoint, or a bare state dict, onto the CPU.

        Raises:
            UserError: If the file is missing, is no checkpoint, or holds more than tensors and
                plain values; such a pickle could run code.
        """
        if not path.is_file():
            raise UserError(
                f"{path}: no such checkpoint; train one with `python train.py` or name another"
            )
        content = load_file(path)
        if is_state_dict(content):
            return cls(path, content)
        try:
            return cls._from_plain(path, content)
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path}: neither a checkpoint of this version nor a state dict of weights"
            ) from None

    def _to_plain(self) -> dict[str, Any]:
        """Return tensors and plain values, which can be read without running code."""
        assert self.config
        assert self.held_out
        bank = self.bank
        return {
            "model": self.weights,
            "config": self.config.model_dump(),
            "classes": [list(entry) for entry in self.classes.entries],
            "history": [list(result) for result in self.history],
            "n_training": self.n_training,
            "held_out": vars(self.held_out),
            "bank": None if bank is None else bank._asdict(),
            "fingerprint": self.fingerprint,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "versions": self.versions,
        }

    @classmethod
    def _from_plain(cls, path: Path, content: dict[str, Any]) -> "Checkpoint":
        values = dict(content)
        if set(values["config"]) != set(KEYS) or not is_state_dict(values["model"]):
            raise KeyError
        bank = values.pop("bank")
        return cls(
            path=path,
            weights=values.pop("model"),
            config=make_config((str(path), values.pop("config"))),
            classes=Classes(tuple(MachineClass(*entry) for entry in values.pop("classes"))),
            history=[EpochResult(*result) for result in values.pop("history")],
            held_out=HeldOut(**values.pop("held_out")),
            bank=None if bank is None else Embeddings(**bank),
            **values,
        )


def load_file(path: Path) -> Any:
    """Read a file that torch has written. Raises `UserError` for anything else."""
    try:
        if zipfile.is_zipfile(path):  # PyTorch before 1.6 wrote another format
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch does not compare the checksums
                    raise ValueError(damaged)
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises a dozen kinds for what is not a checkpoint
        raise UserError(
            f"{path}: not a readable checkpoint (it is something else, or damaged)"
        ) from None


def is_state_dict(value: Any) -> bool:
    """Whether a value is a dictionary of named tensors."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(name, str) and isinstance(x, Tensor) for name, x in value.items())


# ---- The checkpoint to resume from ----

RESTART = "start again with --overwrite"


def find_checkpoint(config: Config, resume: bool, overwrite: bool) -> Checkpoint | None:
    """Return the checkpoint to resume from; None where the run starts from the beginning.

    Raises:
        UserError: If that would replace a run without `overwrite`, if the best weights of the run
            are missing or damaged, or if it had another configuration.
    """
    files = RunFiles(config.checkpoint)
    if resume and overwrite:
        raise UserError("--resume continues a run, --overwrite replaces it: give one of them")
    existing = [file for file in (files.last, files.best, files.history) if file.exists()]
    if resume and not existing:
        notice(f"{files.last}: nothing to resume, so the run starts from the beginning")
        return None
    if resume:
        checkpoint = load_newest(files)
        check_configuration(config, checkpoint, f"give the same, or {RESTART}")
        return checkpoint
    if existing and not overwrite:
        raise UserError(
            f"{existing[0]} exists: --resume continues that run, --overwrite replaces it, "
            f"--save_path names another"
        )
    return None


def load_newest(files: RunFiles) -> Checkpoint:
    """Load the checkpoint of the last epoch; the best weights where it is damaged or missing."""
    remedy = f"restore it, or {RESTART}"
    if not files.best.exists():
        raise UserError(f"{files.best}, the best weights of the run, is missing; {remedy}")
    try:
        best = Checkpoint.load(files.best)
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from None
    if not files.last.exists():
        return best
    try:
        return Checkpoint.load(files.last)
    except UserError as error:
        notice(f"{error}; continuing from the best weights, of epoch {best.epoch}")
        return best


def check_configuration(config: Config, checkpoint: Checkpoint, remedy: str) -> None:
    """Check that a run can be resumed with a configuration. The keys of the computation may differ,
    and `init_from`, which a resumed run does not read.

    Raises:
        UserError: If the checkpoint is a bare state dict, or its run had another configuration.
    """
    if checkpoint.config is None:
        raise UserError(f"{checkpoint.path}: only weights, no run to resume; {remedy}")
    keys = [key for key in KEYS if key not in (*COMPUTATION_KEYS, "init_from")]
    if has_machines(config, checkpoint.classes):
        keys.remove("machines")
    changes = []
    for key in config.differences(checkpoint.config, keys):
        before, now = getattr(checkpoint.config, key), getattr(config, key)
        changes.append(f"{key} (was {before!r}, is {now!r})")
    if changes:
        raise UserError(
            f"{checkpoint.path}: the run to resume had another configuration: "
            f"{'; '.join(changes)}; {remedy}"
        )


def has_machines(config: Config, classes: Classes) -> bool:
    """Whether the key `machines` means the machines of these classes; auto means any."""
    if config.machines == "auto":
        return True
    return Classes.from_machines(config.machines).machines == classes.machines


# ---- The model of a checkpoint ----


@dataclass(frozen=True)
class Model:
    """A trained network, in evaluation mode on the CPU.

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
        """Return the scorer of a kind; of "nearest" the checkpoint has to have the bank."""
        bank = self.checkpoint.bank if KINDS[kind].uses_bank else None
        return Scorer(
            kind,
            self.classes,
            Objective(self.config.mode, self.config.m, self.config.s),
            self.network.centres().cpu(),
            None if bank is None else bank.by_class(len(self.classes)),
            neighbours,
            dtype,
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
            f"{path} is a bare state dict, which does not say its classes: give machines as a "
            f"table, and classes: section"
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
            f"command line: {key} {getattr(config, key)!r} is not the checkpoint's, {value!r} "
            f"({checkpoint.path}); leave it out"
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
        f"init_from: the weights of {checkpoint.path} are taken, but for the class centres "
        f"({', '.join(CENTRES)})"
    )


def check_fit(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, keys: str
) -> None:
    """Raise `UserError` where the weights of a file have other names or shapes than expected;
    `keys` are the keys of the configuration that may be the reason.
    """
    for name in sorted(weights.keys() | expected.keys()):
        in_file, in_model = (
            tuple(part[name].shape) if name in part else "absent" for part in (weights, expected)
        )
        if in_file != in_model:
            raise UserError(
                f"{path} does not fit the configuration ({keys}): {name} is {in_file} in the file "
                f"and {in_model} in the model"
            )


def read_history(model: Model) -> pd.DataFrame:
    """Read the epochs of the whole run from history.csv; where it is missing, those up to the
    checkpoint.

    Returns:
        A row for each epoch, with the columns of `EpochResult`.

    Raises:
        UserError: If the file is no history.
    """
    path = RunFiles(model.path).history
    columns = list(EpochResult._fields)
    if not path.exists():
        return pd.DataFrame(model.checkpoint.history, columns=columns)
    try:
        return pd.read_csv(path)[columns].astype(float)
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{path}: not the history of a training; remove it, and the one in the checkpoint is "
            f"drawn"
        ) from None
