"""Locks that keep several processes from writing the same files, on one computer or several that
share a disk.

A lock is a file, which names its holder (`filelock.SoftFileLease`). It needs no support of the
disk but that a file is created once: the system's own locks are missing or local on some network
disks. The holder refreshes the file every REFRESH seconds. A process that has died leaves it
behind; another process on the same computer takes it over at once, one on another computer after it
has not seen it refreshed for LEASE seconds.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from errors import UserError, explain
from utils import make_folder, notice

REFRESH = 5.0  # seconds
LEASE = 300.0  # seconds; a network disk may not respond for minutes
SHORT_WAIT = 3.0  # seconds for which waiting needs no notice
POLL = 0.2  # seconds between two attempts


class LockHeldError(Exception):
    """A lock is held by another process, which `str` names."""


class Lock:
    """A lock, of which `path` is the file, for at most one process at a time.

    It must be kept between attempts: it remembers since when it has not seen a holder on another
    computer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lease = filelock.SoftFileLease(
            path,
            lease_duration=LEASE,
            heartbeat_interval=REFRESH,
            on_compromise=lambda _: os.kill(os.getpid(), signal.SIGTERM),
            poll_interval=POLL,
            thread_local=False,
        )

    @property
    def holder(self) -> str:
        """The process that holds the lock, as in "process 17 on host"."""
        owner = self.lease.owner
        if owner is None:
            return f"a process (if there is none, remove {self.path})"
        return f"process {owner.pid} on {owner.hostname.partition('?')[0]}"

    def take(self, timeout: float = 0, gives_up: Callable[[], bool] | None = None) -> bool:
        """Take the lock; return False if another process holds it for `timeout` seconds (-1: no
        limit), or until `gives_up` returns true.

        Raises:
            UserError: If the file cannot be written.
        """
        try:
            make_folder(self.path.parent)
            self.lease.acquire(timeout, cancel_check=gives_up)
        except filelock.Timeout:  # a kind of OSError
            return False
        except OSError as error:
            raise UserError(explain(error, self.path)) from None
        return True

    def clear(self) -> bool:
        """Remove the file, unless a process holds the lock; return whether none does."""
        if not self.take():
            return False
        with self.hold():
            return True

    def is_held(self) -> bool:
        """Whether a process has taken the lock, even if it has died since."""
        return self.path.exists()

    def last_refresh(self) -> int | None:
        """Return when the file was refreshed (ns, by the clock of the disk); None without a
        file.
        """
        try:
            return self.path.stat().st_mtime_ns
        except OSError:
            return None

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lock, which was taken, and release it at the end.

        Raises:
            UserError: If the lock was lost. Then this process is interrupted: another one may have
                taken it.
        """
        try:
            yield
        except SystemExit:
            if self.lease.compromise:
                raise UserError(
                    f"{self.path}: the lock was lost, since this process did not refresh it for "
                    f"{LEASE:.0f} s, or the file was removed; start again"
                ) from None
            raise
        finally:
            self.lease.release()


@contextlib.contextmanager
def lock(path: Path, waits: bool = False) -> Iterator[None]:
    """Hold a lock, of which `path` is the file. If another process holds it, wait for it, or raise
    an error.

    Raises:
        LockHeldError: If another process holds it.
        UserError: If its file cannot be written, or as in `Lock.hold`.
    """
    held = Lock(path)
    if waits and not held.take(SHORT_WAIT):
        check_holder(held)
        notice(f"{path.parent}: waiting for {held.holder}, which writes there")
        held.take(-1)
    elif not waits and not held.take():
        wait_for_sign(held)
    with held.hold():
        yield


def check_holder(held: Lock) -> None:
    """Raise `UserError` for a lock whose file names no holder: nobody can tell whether it is in
    use.
    """
    if held.is_held() and held.lease.owner is None:
        raise UserError(
            f"{held.path}: a lock without a holder, as a crash leaves it; if no other program "
            "writes there, remove it"
        )


def wait_for_sign(held: Lock) -> None:
    """Take a lock from a holder that does not refresh it.

    Raises:
        LockHeldError: If the holder is alive.
    """
    before = held.last_refresh()

    def is_refreshed() -> bool:
        return held.last_refresh() not in (before, None)

    if held.take(2 * REFRESH, is_refreshed):
        return
    check_holder(held)
    if not is_refreshed():
        notice(
            f"{held.path}: held by {held.holder}, which shows no sign of life; taking it over in "
            f"{LEASE:.0f} s unless it does"
        )
        if held.take(LEASE + 2 * REFRESH, is_refreshed):
            return
    raise LockHeldError(held.holder)
