"""Errors that the user can fix. Needs nothing but Python's standard library."""

import errno
import os


class UserError(ValueError):
    """An error that the user can fix. Its message is one line: what is wrong, where, what to do."""


LFS_POINTER = b"version https://git-lfs"  # the beginning of what Git LFS has put in place of a file

REMEDIES = {
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EROFS: "choose a place on a disk that can be written",
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "free some space, or choose another disk",
    errno.EFBIG: "choose a disk that allows larger files",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; check the path",
    errno.EISDIR: "name a file instead of a folder",
    errno.EEXIST: "remove it, or choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "the path is a link to itself; check the path",
    errno.EMFILE: "lower num_workers, or raise the limit (ulimit -n)",
    errno.ENFILE: "lower num_workers, or end other programs",
    errno.EIO: "check the disk or the connection to it",
    errno.ESTALE: "check the connection to the disk",
}


def explain(error: OSError, path: str | os.PathLike[str] | None = None) -> str:
    """Return a message for an error of the system: file, reason, and what to do. `path` is the file
    where the error does not name one.
    """
    file = error.filename or path
    return give_reason(error) if file is None else f"{os.fsdecode(file)}: {give_reason(error)}"


def give_reason(error: OSError) -> str:
    """Return the reason for an error of the system, and what to do."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{reason}; {REMEDIES.get(error.errno or 0, 'check the disk and the path')}"
