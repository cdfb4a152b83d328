"""Exit status, random numbers, device and precision, atomic writing of files."""

import contextlib
import csv
import ctypes
import difflib
import errno
import functools
import getpass
import glob
import io
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd
import torch

import distributed
from errors import UserError, explain, give_reason

# ---- Errors, notices, exit status ----


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and end the process with an exit status.

    The status is 0 after success, 2 after an error that the user can fix (one line on standard
    error), 130 after Ctrl-C, 143 after SIGTERM, and 1 after any other exception: a bug, printed
    with its traceback.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # File names may hold characters that the terminal cannot show.
            stream.reconfigure(errors="backslashreplace")
    provide_user_name()
    try:
        main()
        flush_output()
    except BaseException as error:
        # torchrun sends SIGTERM soon after another process of the job has failed.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        distributed.end_process(report(error))
    distributed.end_process(0)


def provide_user_name() -> None:
    """Make a user name for PyTorch, which names folders of compiled code after it: in a container
    the number of the user may have no name.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["USER"] = "nobody"


def flush_output() -> None:
    """Write what was printed. Raises `UserError` if that is not possible, as on a full disk."""
    if sys.stdout is None:  # it was closed before the start
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_output()
        raise UserError(explain(error, "standard output")) from None


def discard_output() -> None:
    """Discard what was printed and is not written, so that Python does not try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def report(error: BaseException) -> int:
    """Print why the script ends, once for all processes of a job. Returns the exit status."""
    if isinstance(error, BrokenPipeError) and error.filename is None:
        discard_output()  # the reader, such as `head`, has read enough
        return 141
    if isinstance(error, KeyboardInterrupt):
        report_stop()
        return 130
    if isinstance(error, SystemExit):
        if error.code in (130, 143):
            report_stop()
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    message = describe(error)
    if message is None:
        traceback.print_exception(error)
        return 1
    if distributed.fails_first():
        print(f"error: {one_line(message)}", file=sys.stderr)
    return 2


def report_stop() -> None:
    """Print which process of a job was stopped first; nothing without torchrun."""
    if distributed.is_started_by_torchrun() and distributed.fails_first():
        rank = os.environ["RANK"]
        print(
            f"error: process {rank} was stopped by a user or because another process has died; "
            "continue with --resume",
            file=sys.stderr,
        )


def describe(error: BaseException) -> str | None:
    """Return the message for an error that the user can fix or that another process has caused.

    Returns None for any other error.
    """
    error = getattr(error, "inner_exception", error)  # PyTorch wraps errors of compiled code
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the GPU is out of memory; lower batch_size, or read the recordings from their files "
            "with data_device: cpu (in training, precision: bf16 needs half the memory of fp32)"
        )
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        # `replace_file` names files that cannot be written.
        is_output = error.filename is None and error.errno == errno.ENOSPC
        return explain(error, "standard output" if is_output else None)
    if isinstance(error, MemoryError):
        return "out of memory; lower batch_size"
    if isinstance(error, RuntimeError):
        if "can't allocate memory" in str(error):  # PyTorch's message for the memory of the CPU
            return "out of memory; lower batch_size"
        if "can't start new thread" in str(error):
            return "the system allows no more threads; lower num_workers, or raise `ulimit -u`"
        if distributed.is_started_by_torchrun() and distributed.is_lost_connection(error):
            return "another process of the job has ended or does not respond; see its message"
    return None


def notice(message: str) -> None:
    """Print a notice on standard error, once for all processes."""
    if distributed.is_main():
        print(f"notice: {one_line(message)}", file=sys.stderr)


def one_line(message: str) -> str:
    """Escape control characters in a message, such as line breaks in file names."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: repr(match[0])[1:-1], message)


def suggest(word: str, words: Sequence[str]) -> str:
    """Return `; did you mean ...?` if one of the words resembles `word`, else an empty string."""
    close = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {close[0]}?" if close else ""


# ---- Random numbers, device, precision ----

SPLIT, ORDER, MIXING = range(3)  # purposes; no two of them use the same random numbers


def random_stream(seed: int, purpose: int, *position: int) -> np.random.Generator:
    """Return a generator that depends on seed, purpose and position (epoch, step) alone."""
    return np.random.default_rng([seed, purpose, *position])


def use_device(name: str) -> torch.device:
    """Find the device called `name` (auto, cpu, cuda or cuda:N), and make a GPU the current one.

    Under torchrun, each process gets the GPU whose index is its local rank. Raises `UserError` if
    PyTorch does not find the device.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"device: {name} needs a GPU, but PyTorch finds none; use auto or cpu")
    if ":" in name and distributed.planned_processes() > 1:
        raise UserError(f"device: {name} would put all processes on one GPU; use auto or cuda")
    index = int(name.partition(":")[2] or distributed.local_rank())
    count = torch.cuda.device_count()
    if index >= count:
        raise UserError(
            f"device: there is no cuda:{index}; use one of cuda:0 to cuda:{count - 1}, or fewer "
            "processes"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype for autocast that `name` (auto, fp32, bf16 or fp16) means on the device.

    "auto" is bf16 on a GPU that supports it, fp16 on another GPU, and fp32 on a CPU. float32 means
    no autocast.
    """
    if name == "auto":
        if device.type != "cuda":
            name = "fp32"
        else:
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Return the context manager for a precision from `choose_precision`."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def set_up_numerics() -> None:
    """Compute float32 in full precision on a GPU.

    By default, cuDNN uses TF32, which rounds the operands of convolutions to 10 bits.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def keep_freed_memory() -> None:
    """Make glibc keep large freed blocks of memory for the next step on a CPU.

    By default, glibc returns large activations to the system, which zeroes every page when the
    memory is allocated again. This takes a larger share of a step with larger batches.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python, PyTorch, NumPy and this project, to be stored with a run.

    The commit of this project ends in `-dirty` if files differ from it, and is empty outside a
    clone.
    """
    commit = ""
    folder = str(Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError):
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "commit": commit,
    }


# ---- Writing of files ----


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; once its file is written, it replaces `path`.

    No reader ever sees an incomplete file, and other processes may replace it at the same time.

    Raises:
        UserError: If it cannot be written; the file that was there before stays.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        make_folder(path.parent)
        yield temporary
        with temporary.open("r+b") as file:  # Windows needs it open for writing
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename not in (None, str(temporary), str(path), str(path.parent)):
            raise  # it concerns another file
        raise UserError(f"{path} cannot be written: {give_reason(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder that may exist. Raises `OSError` if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(folder)) from None


def remove_temporary(*paths: Path) -> None:
    """Remove the temporary files that killed processes have left of these files."""
    for path in paths:
        remove_files(path.parent, [f".{glob.escape(path.name)}.????????.tmp"])


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8. Bytes of file names that are not UTF-8 are escaped."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_csv(path: Path, table: pd.DataFrame, header: bool = True) -> None:
    """Write a table without its index. Missing values are empty.

    Numbers, and file names that are not UTF-8, can be read back exactly.
    """
    with replace_file(path) as temporary:
        table.to_csv(
            temporary, index=False, header=header, lineterminator="\n", errors="surrogateescape"
        )


def read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Read a list of labels or scores: the number and the cells of each line that is not empty.

    Without a file the list is empty. Raises `UserError` for a file that is not text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Excel writes a byte order mark
        rows = list(csv.reader(io.StringIO(text, newline="")))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(explain(error, path)) from None
    except (UnicodeDecodeError, csv.Error):
        raise UserError(
            f"{path}: not a list of labels or scores; remove it, or replace it with the right one"
        ) from None
    return [(number, [cell.strip() for cell in row]) for number, row in enumerate(rows, 1) if row]


def remove_files(folder: Path, patterns: Sequence[str]) -> None:
    """Remove the files whose names match, and the folder if it is empty then."""
    for pattern in patterns:
        for file in list(folder.glob(pattern)):
            file.unlink(missing_ok=True)  # another process may do the same
    with contextlib.suppress(OSError):  # it holds other files, or does not exist
        folder.rmdir()


def check_writable(path: Path, remedy: str) -> None:
    """Raise `UserError`, ending with the remedy, if a file cannot be written at `path`."""
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; {remedy}")
        make_folder(path.parent)
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(b"a byte")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); {remedy}") from None
