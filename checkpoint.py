"""The files of a run: their names, the lock, and the checkpoints to score with or to resume."""

import contextlib
import io
import re
import warnings
import zipfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from classes import Classes, MachineClass
from config import COMPUTATION_KEYS, KEYS, Config, make_config
from distributed import from_main
from errors import LFS_POINTER, UserError
from evaluation.bank import Bank
from evaluation.scores import StoredClips
from locks import LockHeldError, lock
from utils import check_writable, notice, remove_temporary, replace_file

RESTART = "start again with --overwrite"
# What wrappers of PyTorch put into the names of weights: for several processes, for compiled code
WRAPPERS = ("module", "_orig_mod")
AVERAGED = "n_averaged"  # beside the weights of AveragedModel
SAVE_WEIGHTS = "torch.save(model.state_dict(), 'weights.pth')"

# ---- The files ----


class RunFiles:
    """The files of a run. `best` is `save_path`, the others derive from it."""

    def __init__(self, best: Path) -> None:
        if not best.suffix:
            raise UserError(
                f"{best}: the file name has no extension, but results go to a folder with the same "
                f"name without it; rename the file to {best}.pth"
            )
        self.best = best
        self.last = best.with_name(f"{best.stem}.last.pth")  # after the last epoch, for resuming
        self.lock = best.with_name(f".{best.stem}.lock")
        self.claim = best.with_name(f".{best.stem}.claim")  # of the reproduce.py that trains it
        self.folder = best.with_suffix("")
        self.history = self.folder / "history.csv"
        self.tensorboard = self.folder / "tensorboard"
        self.pictures = self.folder / "pictures"  # figures that score.py draws
        # Scores of later recordings, from score.py --calibrate
        self.calibration = best.with_name(f"{best.stem}.calibration.json")

    def results(self, split: str) -> Path:
        """Return the folder of what eval.py writes for a split, "test" or "evaluation"."""
        return self.folder / split


@contextlib.contextmanager
def lock_run(files: RunFiles) -> Iterator[None]:
    """Keep other processes from training under the same `save_path`.

    Raises:
        UserError: If another process does, or if the files cannot be written.
    """
    held = contextlib.ExitStack()

    def acquire() -> None:
        if files.best.name.endswith(".last.pth"):
            raise UserError(
                f"{files.best}: names that end in .last.pth are those of the last states of runs; "
                "choose another file with --save_path"
            )
        check_writable(files.best, "choose another file with --save_path")
        try:
            held.enter_context(lock(files.lock))
        except LockHeldError as holder:
            raise UserError(
                f"{files.best}: {holder} is training this run; wait until it ends, or choose "
                "another file with --save_path"
            ) from None
        remove_temporary(files.best, files.last)

    with held:
        from_main(acquire)
        yield


# ---- Checkpoints ----


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
    """Normal clips that were held out of the training: the file of each, as seen from the folder of
    all recordings; class `(n,)`, published score against the machine `(n,)` in float64 and, once
    the training has ended, embedding and spectrum as in `StoredClips`.
    """

    files: Sequence[str]
    labels: Tensor
    scores: Tensor
    embedding: Tensor | None = None
    spectrum: Tensor | None = None

    def with_outputs(self, clips: StoredClips) -> "HeldOut":
        """Return the clips with embedding and spectrum."""
        return replace(self, embedding=clips.embedding, spectrum=clips.spectrum)


@dataclass(frozen=True)
class Checkpoint:
    """A state of a training, which eval.py can score with and train.py can resume.

    A file that is a bare state dict, as published weights are, is a checkpoint with `weights`
    alone.

    Attributes:
        path: The file of the checkpoint.
        weights: The state dict of the network, with the weights to score with.
        config: The configuration of the training; None in a bare state dict.
        classes: The classes of the network.
        history: The finished epochs.
        n_training: The number of clips to train on.
        held_out: The held-out clips, with scores and embeddings of these weights.
        bank: The training clips, with embeddings of these weights; only once the training has
            ended.
        fingerprint: A hash of the clips of the run, from `dataloader.fingerprint_of`.
        trained_weights: The state dict to continue the training with, where `weights` is a moving
            average of it; otherwise empty.
        optimizer: The state of the optimiser.
        scaler: The state of the gradient scaler; empty unless the precision is fp16.
        versions: The versions of the software that the training ran with.
    """

    path: Path
    weights: dict[str, Tensor]
    config: Config | None = None
    classes: Classes = Classes(())
    history: list[EpochResult] = field(default_factory=list)
    n_training: int | None = None
    held_out: HeldOut | None = None
    bank: Bank | None = None
    fingerprint: str = ""
    trained_weights: dict[str, Tensor] = field(default_factory=dict)
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
            UserError: If a disk is full; the file that was there before stays.
        """
        buffer = io.BytesIO()  # for a full disk Python raises an OSError, torch another error
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
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a checkpoint, which is a file")
        if not path.exists():
            raise UserError(
                f"{path}: no such checkpoint; train one with `python train.py` or name another"
            )
        content = load_file(path)
        if is_state_dict(content):
            return cls(path, content)
        try:
            return cls._from_plain(path, content)
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: {explain_content(content, path)}") from None

    def fill(self, network: nn.Module, omitted: Collection[str] = ()) -> None:
        """Load the weights into a network, except for the omitted ones.

        Raises:
            UserError: If they do not have the names and shapes of those of the network.
        """
        weights = network.state_dict()
        stored = self._name_weights(weights)
        keys = "mode, input" if omitted else "machines, classes, mode, input, sub_centers"
        for name in sorted((weights.keys() | stored.keys()) - set(omitted)):
            in_file, in_network = shape_of(stored, name), shape_of(weights, name)
            if in_file != in_network:
                raise UserError(
                    f"{self.path} does not fit the configuration ({keys}): {name} is {in_file} in "
                    f"the file and {in_network} in the model"
                )
            weights[name] = stored[name]
        try:
            network.load_state_dict(weights)
        except RuntimeError:
            raise UserError(
                f"{self.path}: weights of a kind that cannot be copied (quantised, sparse, or "
                "without values); save them as ordinary tensors"
            ) from None

    def _name_weights(self, known: Collection[str]) -> dict[str, Tensor]:
        """Return the weights with names as in `known`, those of a network: without what wrappers of
        a network (such as DistributedDataParallel) and other programs put in front. A notice says
        so.

        Raises:
            UserError: If no name is known.
        """
        stored = {}
        for name, weight in self.weights.items():
            if name != AVERAGED:
                parts = [part for part in name.split(".") if part not in WRAPPERS]
                stored[".".join(parts)] = weight
        first = next(iter(stored), "")
        dots = [number for number, character in enumerate(first) if character == "."]
        for end in (0, *(dot + 1 for dot in dots)):
            prefix = first[:end]
            named = {name.removeprefix(prefix): weight for name, weight in stored.items()}
            if not named.keys().isdisjoint(known):
                before = [name for name in self.weights if name != AVERAGED]
                pairs = zip(before, named, strict=False)
                changed = [f"{old} is read as {new}" for old, new in pairs if old != new]
                if changed:
                    notice(f"{self.path}: names of weights without prefixes: {changed[0]}")
                return named
        raise UserError(
            f"{self.path}: the weights of another network: none of its {len(stored)} names (such "
            f"as {first}) is known; choose another file"
        )

    def differences(self, config: Config, keys: Iterable[str]) -> list[str]:
        """Return the keys that have other values in `config` than in the configuration of the run.
        For the machines it suffices that they are those of the classes.
        """
        different = []
        for key in keys:
            value = getattr(config, key)
            is_same = value == getattr(self.config, key)
            if key == "machines":
                is_auto = isinstance(value, str)
                is_same = is_auto or Classes.from_machines(value).machines == self.classes.machines
            if not is_same:
                different.append(key)
        return different

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
            "bank": None if bank is None else bank.to_plain(),
            "fingerprint": self.fingerprint,
            "trained_weights": self.trained_weights,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "versions": self.versions,
        }

    @classmethod
    def _from_plain(cls, path: Path, content: dict[str, Any]) -> "Checkpoint":
        if not isinstance(content, dict):
            raise TypeError
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
            bank=None if bank is None else Bank.from_plain(bank),
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
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch raises a dozen kinds for what is not a checkpoint
        reason = explain_unreadable(path, error)
        raise UserError(f"{path}: not a readable checkpoint: {reason}") from None


def explain_unreadable(path: Path, error: Exception) -> str:
    """Return why torch cannot read a file without running code, and what to do."""
    if match := re.search(r"GLOBAL (\S+)", str(error)):
        return (
            f"it holds a Python object ({match[1]}), which could run code and is not read; save "
            f"the weights alone: {SAVE_WEIGHTS}"
        )
    if "TorchScript" in str(error):
        return f"a TorchScript program and no checkpoint; save the weights alone: {SAVE_WEIGHTS}"
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return "an empty file; copy it again"
    if start.startswith(LFS_POINTER):
        return "a pointer of Git LFS; fetch the file with `git lfs pull`"
    if start.startswith(b"PK") and (isinstance(error, ValueError) or not zipfile.is_zipfile(path)):
        return "damaged or cut short; copy it again"
    return "another kind of file, or damaged; name a file that train.py has written"


def explain_content(content: Any, path: Path) -> str:
    """Return why the content of a file is neither a checkpoint nor weights, and what to do."""
    text = "neither a checkpoint of this version nor a state dict of weights"
    inside = []
    if isinstance(content, dict):
        inside = [name for name, value in content.items() if is_state_dict(value)]
    if not inside:
        return f"{text}; name another file"
    return (
        f"{text}, but it holds weights as {inside[0]!r}; save these alone: "
        f"torch.save(torch.load({str(path)!r})[{inside[0]!r}], 'weights.pth')"
    )


def is_state_dict(value: Any) -> bool:
    """Whether a value is a dictionary of named tensors."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(name, str) and isinstance(x, Tensor) for name, x in value.items())


def shape_of(weights: dict[str, Tensor], name: str) -> tuple[int, ...] | str:
    return tuple(weights[name].shape) if name in weights else "absent"


# ---- The checkpoint to resume from ----


def find_checkpoint(
    files: RunFiles, config: Config, resume: bool, overwrite: bool
) -> Checkpoint | None:
    """Return the checkpoint to resume from; None where the run starts from the beginning.

    Raises:
        UserError: If a run exists and is neither to be resumed nor to be replaced, if its best
            weights are missing or damaged, or if it had another configuration.
    """
    existing = [file for file in (files.last, files.best, files.history) if file.exists()]
    if resume and not existing:
        notice(f"{files.last}: nothing to resume, so the run starts from the beginning")
        return None
    if resume:
        checkpoint = load_newest(files)
        check_configuration(config, checkpoint, f"use the same configuration, or {RESTART}")
        return checkpoint
    if existing and not overwrite:
        raise UserError(
            f"{existing[0]} already exists; continue the run with --resume, replace it with "
            "--overwrite, or choose another file with --save_path"
        )
    return None


def load_newest(files: RunFiles) -> Checkpoint:
    """Load the later of the two checkpoints of a run. It is the one with the best weights if the
    run was stopped after writing that and before writing the other.
    """
    remedy = f"restore it, or {RESTART}"
    if not files.best.exists():
        raise UserError(f"{files.best}, the best weights of the run, is missing; {remedy}")
    try:
        best = Checkpoint.load(files.best)
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from None
    if not files.last.exists():
        notice(f"{files.last} is missing; continuing from the best weights, of epoch {best.epoch}")
        return best
    try:
        last = Checkpoint.load(files.last)
    except UserError as error:
        notice(f"{error}; continuing from the best weights, of epoch {best.epoch}")
        return best
    return max(last, best, key=lambda checkpoint: len(checkpoint.history))


def check_configuration(config: Config, checkpoint: Checkpoint, remedy: str) -> None:
    """Check that a run can be resumed with a configuration. The keys of the computation may differ,
    and `init_from`, which a resumed run does not read.

    Raises:
        UserError: If the checkpoint is a bare state dict, or its run had another configuration.
    """
    if checkpoint.config is None:
        raise UserError(
            f"{checkpoint.path} contains only weights, so there is no run to resume; {remedy}"
        )
    keys = [key for key in KEYS if key not in (*COMPUTATION_KEYS, "init_from")]
    changes = []
    for key in checkpoint.differences(config, keys):
        before, now = getattr(checkpoint.config, key), getattr(config, key)
        changes.append(f"{key} (was {before!r}, is {now!r})")
    if changes:
        raise UserError(
            f"{checkpoint.path}: the run to resume had another configuration: "
            f"{'; '.join(changes)}; {remedy}"
        )


def read_history(checkpoint: Checkpoint) -> pd.DataFrame:
    """Read the epochs of the whole run from history.csv; where it is missing, those up to the
    checkpoint.

    Returns:
        A row for each epoch, with the columns of `EpochResult`.

    Raises:
        UserError: If the file is no history.
    """
    path = RunFiles(checkpoint.path).history
    columns = list(EpochResult._fields)
    if not path.exists():
        return pd.DataFrame(checkpoint.history, columns=columns)
    try:
        return pd.read_csv(path)[columns].astype(float)
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{path}: not a readable training history; remove it to use the history in the "
            "checkpoint instead"
        ) from None
