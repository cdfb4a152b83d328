"""Errors and exit status, random numbers, device and precision, files written whole."""

import argparse
import contextlib
import ctypes
import difflib
import functools
import io
import os
import platform
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import torch

import distributed

# ---- Errors, notices, exit status ----


class UserError(ValueError):
    """Something the user can put right. The message is one line: what is wrong, where, and what to
    do.
    """


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that never abbreviates options and reports a mistake as a `UserError`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and end the process: status 0, 2 after an error the user can put right
    (one line on standard error), 130 after Ctrl-C, 143 after SIGTERM. Any other exception is a bug
    and keeps its traceback.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # file names may hold what the terminal cannot show
    try:
        main()
    except BaseException as error:
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # it comes soon where another process of the job has failed
        distributed.end_process(report(error))
    distributed.end_process(0)


def report(error: BaseException) -> int:
    """Say why the script ends, once for all processes of a job; returns the exit status."""
    if isinstance(error, SystemExit | KeyboardInterrupt):
        status = 130 if isinstance(error, KeyboardInterrupt) else error.code
        if (
            distributed.is_started_by_torchrun()
            and status in (130, 143)
            and distributed.is_first_to_fail()
        ):
            rank = os.environ["RANK"]
            print(
                f"error: process {rank} was stopped, by a user or because another one has died",
                file=sys.stderr,
            )
        return status if isinstance(status, int) else int(status is not None)
    message = describe(error)
    if message is None:
        traceback.print_exception(error)
        return 1
    if distributed.is_first_to_fail():
        print(f"error: {one_line(message)}", file=sys.stderr)
    return 2


def describe(error: BaseException) -> str | None:
    """The message for an error that the user can put right, or that another process has caused;
    else None.
    """
    error = getattr(
        error, "inner_exception", error
    )  # PyTorch wraps what is raised while it compiles
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the GPU is out of memory: lower batch_size, or leave the recordings in their files with data_device: cpu "
            "(precision: bf16 takes half the memory of fp32 in training)"
        )
    if isinstance(error, UserError | OSError):
        return str(error)
    is_pytorchs_own = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if isinstance(error, MemoryError) or is_pytorchs_own:
        return "out of memory: lower batch_size"
    if (
        distributed.is_started_by_torchrun()
        and isinstance(error, RuntimeError)
        and distributed.is_lost_connection(error)
    ):
        return "another process of the job has ended or does not answer; see its message"
    return None


def notice(message: str) -> None:
    """Tell the user something worth knowing, once for all processes, on standard error."""
    if distributed.is_main():
        print(f"notice: {one_line(message)}", file=sys.stderr)


def one_line(message: str) -> str:
    """The message with control characters, which file names may hold, spelt out."""
    return re.sub(r"[\x00-\x1f\x7f]", lambda match: repr(match[0])[1:-1], message)


def suggest(word: str, words: Sequence[str]) -> str:
    """`; did you mean ...?` where one of the words is close, else nothing."""
    close = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {close[0]}?" if close else ""


# ---- Random numbers, device, precision ----

SPLIT, ORDER, MIXING = range(3)  # purposes, so that no two use the same numbers


def random_stream(seed: int, purpose: int, *position: int) -> np.random.Generator:
    """The random numbers of one purpose at one position (epoch, step): they depend on nothing else."""
    return np.random.default_rng([seed, purpose, *position])


def use_device(name: str) -> torch.device:
    """The device that `name` (auto, cpu, cuda, cuda:N) stands for; under torchrun this process's
    own GPU. A GPU becomes the current one of the process.

    Raises `UserError` if it is not there.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"device: {name} asks for a GPU, and PyTorch finds none; use auto or cpu")
    if ":" in name and distributed.planned_processes() > 1:
        raise UserError(f"device: {name} would put all processes on one GPU; use auto or cuda")
    index = int(name.partition(":")[2] or distributed.local_rank())
    count = torch.cuda.device_count()
    if index >= count:
        raise UserError(
            f"device: cuda:{index} is not there; PyTorch finds cuda:0 to cuda:{count - 1}"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast; float32 means none."""
    if name == "auto":
        if device.type != "cuda":
            name = "fp32"
        else:
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def set_up_numerics() -> None:
    """Float32 means float32: no TF32, which would otherwise round the operands of convolutions to
    10 bits.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks for the next step. It would return each activation to the
    system, which hands it out again page by page, zeroed: on the CPU that costs more of a step the
    larger the batch is.
    """
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


@functools.cache
def versions() -> dict[str, str]:
    """What the numbers of a run are computed with. The commit of this project ends in `-dirty`
    where files differ from it, and is empty outside a clone.
    """
    commit = ""
    with contextlib.suppress(OSError):
        command = [
            "git",
            "-C",
            str(Path(__file__).parent),
            "describe",
            "--always",
            "--dirty",
            "--exclude=*",
        ]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "commit": commit,
    }


# ---- Files written whole ----


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it once it is written, so that no reader sees
    half a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_csv(path: Path, table: pd.DataFrame, header: bool = True) -> None:
    """Missing values are empty; file names that are not UTF-8 and the digits of numbers can be read
    back exactly.
    """
    with replace_file(path) as temporary:
        table.to_csv(
            temporary, index=False, header=header, lineterminator="\n", errors="surrogateescape"
        )


def check_writable(path: Path, remedy: str) -> None:
    """Find out before the work whether `path` can be written. The `UserError` ends with the remedy."""
    probe = path.with_name(f"{path.name}.probe")
    try:
        with replace_file(probe) as temporary:
            temporary.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); {remedy}") from None
