"""A folder that fills with recordings: each is found once, when it is complete."""

import contextlib
import json
import stat
import time
from pathlib import Path
from typing import NamedTuple

from errors import UserError, explain
from live.lock import lock_file
from names import list_audio

SETTLED = 10  # seconds without a change after which a file is complete
SPARE_LINES = 1000  # of the list, for files that are gone, before it is written anew


class Version(NamedTuple):
    """A state of a file. If the file is replaced or changed, it has a different version."""

    size: int  # bytes
    changed: int  # nanoseconds since 1970


class Folder:
    """The recordings of a folder, and the list of those that were scored.

    The list is a file with a line for each recording, so that a monitor that is started again goes
    on where it was. If the monitor was killed, the recording that it was scoring is scored again.
    """

    def __init__(self, folder: Path, machine: tuple[str, str], scored: Path | None) -> None:
        """Watch a folder for a machine. The list is the file `scored` (None: a hidden one in the
        folder).

        Raises:
            UserError: If the folder cannot be read, the list not written, or if another process
                uses it.
        """
        self.folder = folder
        self.list = scored or folder / f".{'_'.join(machine)}.scored"
        if not folder.is_dir():
            raise UserError(f"{folder}: not a folder; name the one that fills with recordings")
        self.lock = lock_file(
            self.list.with_name(f"{self.list.name}.lock"),
            f"another monitor watches it for {' '.join(machine)}",
            "end that one, or choose another list with --scored",
        )
        self.scored: dict[str, Version] = {}  # by the name of the file
        self.n_lines = 0
        self.seen: dict[str, tuple[Version, float]] = {}  # and since when it has not changed
        self.read_list()

    def find_complete(self) -> list[tuple[Path, Version]]:
        """List the complete recordings that were not scored, in the order of their last changes.

        Raises:
            UserError: If the folder cannot be read.
        """
        now = time.monotonic()
        versions = self.list_versions()
        seen, complete = {}, []
        for name, version in versions.items():
            known, since = self.seen.get(name, (version, now))
            seen[name] = version, since if known == version else now
            is_new = self.scored.get(name) != version
            if is_new and now - seen[name][1] >= SETTLED:
                complete.append((version.changed, name))
        self.seen = seen
        return [(self.folder / name, versions[name]) for _, name in sorted(complete)]

    def list_versions(self) -> dict[str, Version]:
        """Return the versions of the recordings in the folder, by name."""
        try:
            if not self.folder.is_dir():
                raise UserError(f"{self.folder}: the folder is gone; check the connection to it")
            versions = {path.name: find_version(path) for path in list_audio(self.folder)}
        except OSError as error:
            raise UserError(explain(error, self.folder)) from None
        return {name: version for name, version in versions.items() if version}

    def remember(self, path: Path, version: Version) -> None:
        """Remember a recording until the process ends."""
        self.scored[path.name] = version

    # ---- The list ----

    def add(self, path: Path, version: Version) -> None:
        """Remember a recording, and add it to the list.

        Raises:
            OSError: If the list cannot be written.
        """
        self.remember(path, version)
        self.n_lines += 1
        if self.n_lines > 2 * len(self.seen) + SPARE_LINES:
            self.write_list()
            return
        with self.list.open("a") as file:
            # The line in front may be incomplete, if the process was killed or the disk was full.
            file.write("\n" + json.dumps([path.name, *version]))

    def read_list(self) -> None:
        """Read the list; incomplete lines are left out."""
        if not self.list.exists():
            return
        try:
            lines = self.list.read_text().splitlines()
        except (OSError, UnicodeError) as error:
            raise UserError(
                f"{self.list} cannot be read ({error}); remove it, or choose another with --scored"
            ) from None
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):
                name, size, changed = json.loads(line)
                self.scored[name] = Version(size, changed)
        self.n_lines = len(lines)

    def write_list(self) -> None:
        """Forget files that are gone, and write the list anew."""
        self.scored = {name: x for name, x in self.scored.items() if name in self.seen}
        temporary = self.list.with_name(f"{self.list.name}.new")
        rows = [json.dumps([name, *version]) for name, version in self.scored.items()]
        temporary.write_text("\n".join(rows))
        temporary.replace(self.list)
        self.n_lines = len(rows)


def find_version(path: Path) -> Version | None:
    """Return the version of a file; None if there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return Version(status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None
