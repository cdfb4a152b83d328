"""The files of a run: their names, lock and removal; saving, finding and reading checkpoints; the
model in one.
"""

import contextlib
import io
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor

from config import (
    AUTO,
    BY_ATTRIBUTES,
    COMPUTATION_KEYS,
    KEYS,
    MODEL_KEYS,
    RECORDING_KEYS,
    Config,
    make_config,
    show_value,
)
from corpus import machines_of_classes, settle_classes
from distributed import from_main
from losses import MODES
from model import CENTRES, TASTgramMFN
from utils import UserError, check_writable, notice, replace_file

State = dict[str, Any]  # what a checkpoint holds: tensors and plain values
HISTORY = (
    "epoch",
    "lr",
    "train_loss",
    "train_accuracy",
    "valid_loss",
    "valid_accuracy",
    "seconds",
)  # history.csv
# What eval.py writes into the folder of its results
RESULT_FILES = ("metrics.csv", "metrics.json", "results.md", "decisions.csv", "report.html", "anomaly_score_*.csv",
                "decision_result_*.csv", "figures/*.png")  # fmt: skip

# ---- Names ----


class RunFiles:
    """Where a run keeps its files: `best` is `save_path`, everything else derives from it."""

    def __init__(self, best: Path) -> None:
        if not best.suffix:
            raise UserError(
                f"{best}: its results go to a folder of its name without the ending, and it has none; rename it to "
                f"{best}.pth"
            )
        self.best = best
        self.last = best.with_name(
            f"{best.stem}.last.pth"
        )  # state after the last epoch, for resuming
        self.lock = best.with_name(f".{best.stem}.lock")
        self.folder = best.with_suffix("")
        self.history = self.folder / "history.csv"
        self.tensorboard = self.folder / "tensorboard"
        self.timelines = (
            self.folder / "timelines"
        )  # pictures of single recordings, which score.py draws

    def results(self, split: str) -> Path:
        """What eval.py writes for the clips of a split, "test" or "evaluation"."""
        return self.folder / split


@contextlib.contextmanager
def lock_run(files: RunFiles) -> Iterator[None]:
    """Keep other processes from training under the same `save_path`, and find out early whether it
    can be written.
    """
    lock = filelock.FileLock(files.lock, timeout=0)

    def acquire() -> None:
        check_writable(files.best, "--save_path names another file")
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"{files.best}: another process is training this run; wait for its end, or --save_path names another"
            ) from None

    from_main(acquire)
    try:
        yield
    finally:
        lock.release()  # where this process has it


def clear_run(files: RunFiles) -> None:
    """Remove what an earlier run under this name has written, and nothing else."""
    for file in (files.best, files.last, files.history):
        file.unlink(missing_ok=True)
    clear(files.tensorboard, ["events.out.tfevents.*"])
    clear(files.timelines, ["*.png"])
    for split in ("test", "evaluation"):
        clear(files.results(split), RESULT_FILES)


def clear(folder: Path, patterns: Sequence[str]) -> None:
    """Remove the files of these names, and folders that are empty then."""
    for file in [file for pattern in patterns for file in folder.glob(pattern)]:
        file.unlink()
    for emptied in (folder / "figures", folder):
        with contextlib.suppress(OSError):  # other files are in it, or it is not there
            emptied.rmdir()


# ---- Saving and finding ----


def save_checkpoint(state: State, *paths: Path) -> None:
    """Write a checkpoint to each of the paths in turn, whole or not at all. An `OSError` (a full
    disk) leaves the one before.
    """
    buffer = io.BytesIO()  # torch reports a full disk as a bug of its own, Python as an OSError
    torch.save(state, buffer)
    for path in paths:
        with replace_file(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())


def find_state(files: RunFiles, resume: bool, overwrite: bool) -> State | None:
    """The checkpoint to resume from, if any. Raises `UserError` rather than replace a run without
    being asked to.
    """
    if resume and overwrite:
        raise UserError("--resume continues a run, --overwrite replaces it: give one of them")
    found = [file for file in (files.last, files.best, files.history) if file.exists()]
    if resume and found and files.best not in found:
        raise UserError(
            f"{files.best}, the best weights of the run, is missing; bring it back or give --overwrite"
        )
    if resume and found:
        return load_newest(files)
    if resume:
        notice(f"{files.last}: nothing to resume, so the run starts from the beginning")
    elif found and not overwrite:
        raise UserError(
            f"{found[0]} is there: --resume continues that run, --overwrite replaces it, --save_path names another"
        )
    return None


def load_newest(files: RunFiles) -> State:
    """The state after the last epoch; where it is damaged or not there yet, that of the best
    weights.
    """
    try:
        best = load_checkpoint(files.best)
    except UserError as error:
        raise UserError(f"{error}; bring it back, or start again with --overwrite") from None
    if not files.last.exists():
        return best
    try:
        return load_checkpoint(files.last)
    except UserError as error:
        notice(f"{error}; continuing from the best weights, of epoch {best.get('epoch')}")
        return best


def check_configuration(config: Config, state: State, path: Path, remedy: str) -> None:
    """Raise `UserError` where the run of a checkpoint had another configuration, but for how and
    where it computes.
    """
    before = state.get("config", {})
    keys = config.differences(before, [key for key in KEYS if key not in COMPUTATION_KEYS])
    was = {
        key: (show_value(key, before.get(key)), show_value(key, getattr(config, key)))
        for key in keys
    }
    if differing := [f"{key} (was {one}, is {other})" for key, (one, other) in was.items()]:
        raise UserError(
            f"{path}: the run to resume had another configuration: {'; '.join(differing)}; {remedy}"
        )


# ---- Reading ----


def load_checkpoint(path: Path) -> State:
    """Read a checkpoint, or a bare state dict, onto the CPU.

    A bare state dict comes back as `{"model": state_dict}`. Raises `UserError` for a file that is
    missing, is not a checkpoint, or holds more than tensors and plain values (such a pickle could
    run code).
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such checkpoint; train one with `python train.py` or name another"
        )
    state = load_file(path)
    if is_state_dict(state):
        return {"model": state}
    config = state.get("config") if isinstance(state, dict) else None
    if (
        not isinstance(config, dict)
        or set(config) != set(KEYS)
        or not is_state_dict(state.get("model"))
    ):
        raise UserError(f"{path}: neither a checkpoint of this version nor a state dict of weights")
    return state


def load_file(path: Path) -> Any:
    """What `save_checkpoint` or torch has written; a `UserError` for anything else."""
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
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
        )
    )


def build_network(config: Config) -> TASTgramMFN:
    """The network of a configuration; its initial weights depend on the seed alone."""
    torch.manual_seed(config.seed)
    return TASTgramMFN(
        len(machines_of_classes(config)), config.input, MODES[config.mode].head, config.sub_centers
    )


@dataclass(frozen=True)
class TrainedModel:
    """The network of a checkpoint, the configuration with the keys that the checkpoint decides, and
    its state.
    """

    path: Path
    network: TASTgramMFN
    config: Config
    state: State


def load_model(path: Path, config: Config, given: Mapping[str, Any]) -> TrainedModel:
    """The model of a checkpoint. A bare state dict decides no key: `config` then serves as it is.

    Raises `UserError` where a key of the command line (`given`) contradicts the checkpoint, or the
    weights do not fit.
    """
    state = load_checkpoint(path)
    if "config" in state:
        trained = state["config"]
        unsettled = AUTO, (BY_ATTRIBUTES if isinstance(trained["classes"], dict) else None)
        checked = [
            key for key in MODEL_KEYS if key in given and getattr(config, key) not in unsettled
        ]
        for key in config.differences(trained, checked):
            raise UserError(
                f"command line: {key} {show_value(key, getattr(config, key))} is not the checkpoint's, "
                f"{show_value(key, trained[key])} ({path}); leave it out"
            )
        decided = {key: trained[key] for key in MODEL_KEYS}
        decided |= {key: trained[key] for key in RECORDING_KEYS if key not in given}
        config = make_config(("configuration", config.model_dump()), (str(path), decided))
    else:
        notice(
            f"{path} is a bare state dict: {', '.join(MODEL_KEYS)} are those of the configuration"
        )
        config = settle_classes(config)
    network = build_network(config)
    check_fit(state["model"], network.state_dict(), path, "machines, classes, input, sub_centers")
    network.load_state_dict(state["model"])
    return TrainedModel(path, network.eval(), config, state)


def check_fit(
    weights: Mapping[str, Tensor], model: Mapping[str, Tensor], path: Path, keys: str
) -> None:
    """Raise `UserError` where the weights of a file are not those of the model; the keys are what
    may be the reason.
    """
    found, expected = (
        {name: tuple(tensor.shape) for name, tensor in part.items()} for part in (weights, model)
    )
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{path} does not fit the configuration ({keys}): {name} is {found.get(name, 'absent')} in the file "
                f"and {expected.get(name, 'absent')} in the model"
            )


def take_weights(network: TASTgramMFN, weights: Mapping[str, Tensor], path: Path) -> None:
    """Give a network the weights of a file, but for the centres of the classes, which are those of
    other machines.
    """
    own = network.state_dict()
    taken, replaced = (
        {name: tensor for name, tensor in part.items() if name not in CENTRES}
        for part in (weights, own)
    )
    check_fit(taken, replaced, path, "input")
    network.load_state_dict(own | taken)
    notice(
        f"init_from: the weights of {path} are taken, but for the class centres ({', '.join(CENTRES)})"
    )
