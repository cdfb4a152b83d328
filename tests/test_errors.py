"""What is said about errors of the system: which file, why, and what to do."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from errors import REMEDIES, UserError, explain
from utils import check_writable, remove_temporary, replace_file

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("number", REMEDIES)
def test_an_error_of_the_system_says_file_reason_and_remedy(number):
    message = explain(OSError(number, os.strerror(number), "a/b.csv"))
    assert message == f"a/b.csv: {os.strerror(number)}; {REMEDIES[number]}"
    assert explain(OSError(number, os.strerror(number)), Path("c.csv")).startswith("c.csv: ")


def test_an_unknown_error_of_the_system_has_a_remedy_too():
    assert explain(OSError("odd")) == "odd; check the disk and the path"
    assert explain(TimeoutError()) == "TimeoutError; check the disk and the path"


def test_a_script_says_what_to_do(fails, tmp_path):
    fails(lambda: (tmp_path / "nowhere").read_text(), match="nowhere: No such file .*; check the p")
    fails(tmp_path.read_text, match="Is a directory; name a file instead of a folder")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirection", "status", "message"),
    [
        ("> /dev/full", "2", "error: standard output: No space left on device; free some space"),
        ("| head -n 1 > /dev/null", "141", ""),
        (">&-", "0", ""),
    ],
    ids=["full disk", "pipe that ends", "closed"],
)
def test_output_that_cannot_be_written(redirection, status, message):
    code = (
        "import utils, time\n"
        "def main():\n"
        "    for _ in range(3):\n"
        "        print('x' * 100_000)\n"
        "        time.sleep(0.2)\n"
        "utils.run_script(main)\n"
    )
    command = f'"$0" -c "$1" {redirection}; echo ${{PIPESTATUS[0]}} >&2'
    words = ["bash", "-c", command, sys.executable, code]
    done = subprocess.run(
        words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    *lines, last = done.stderr.splitlines()
    assert last == status, done.stderr
    assert "".join(lines).startswith(message)
    assert len(lines) == bool(message)


# ---- Writing ----


def test_files_are_written_at_the_same_time(tmp_path):
    path = tmp_path / "a.txt"
    with replace_file(path) as one, replace_file(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one", "the last one to end"
    assert list(tmp_path.iterdir()) == [path]


def test_files_are_flushed_where_that_needs_a_file_open_for_writing(tmp_path, monkeypatch):
    """As on Windows."""
    import fcntl

    flush = os.fsync

    def fsync(number: int) -> None:
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flush(number)

    monkeypatch.setattr(os, "fsync", fsync)
    with replace_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("one")
    assert (tmp_path / "a.txt").read_text() == "one"


def test_an_error_of_another_file_is_not_one_of_the_file_that_is_written(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="other"),
        replace_file(tmp_path / "a.txt"),
    ):
        (tmp_path / "other").read_text()


def test_files_of_killed_processes_are_removed(tmp_path):
    with replace_file(tmp_path / "[a].pth") as temporary:
        temporary.touch()
        left = temporary.with_name(temporary.name.replace(".tmp", "")[:-1] + "x.tmp")
        left.touch()
    others = [tmp_path / ".b.pth.01234567.tmp", tmp_path / ".[a].pth.lock"]
    for path in others:
        path.touch()
    remove_temporary(tmp_path / "[a].pth")
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "[a].pth"])


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path, "is a folder; choose"),
        (tmp_path / "file" / "a.txt", r"cannot be written \(Not a directory\); choose"),
        (tmp_path / "file" / "b" / "a.txt", r"cannot be written \(Not a directory\); choose"),
        (tmp_path / ("x" * 300) / "a", r"cannot be written \(File name too long\); choose"),
    ):
        with pytest.raises(UserError, match=reason):
            check_writable(path, "choose another")
    check_writable(tmp_path / "c" / "a.txt", "choose another")
    assert list((tmp_path / "c").iterdir()) == []


def test_a_user_without_a_name(monkeypatch, call):
    """As in a container that was started with `--user 12345`."""
    import getpass

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert call(lambda: print(getpass.getuser())) == (0, "nobody\n", "")
