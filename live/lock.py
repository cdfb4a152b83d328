"""A lock that lasts as long as the process that holds it. Needs Linux or macOS."""

import fcntl
from pathlib import Path
from typing import TextIO

from errors import UserError, explain


def lock_file(path: Path, holder: str, remedy: str) -> TextIO:
    """Create a file, if it is missing, and lock it until the returned object is closed or the
    process ends, in whatever way.

    Raises:
        UserError: If another process holds it, or if the file cannot be written.
    """
    try:
        file = path.open("a")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path.parent}: {holder}; {remedy}") from None
    except OSError as error:
        raise UserError(explain(error, path)) from None
    return file
