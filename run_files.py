"""The files of a run: their names, the lock, and their removal."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock

from distributed import from_main
from utils import UserError, check_writable, remove_files


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
        check_writable(files.best, "choose another file with --save_path")
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"{files.best}: another process is training this run; wait until it ends, or "
                "choose "
                f"another file with --save_path"
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
