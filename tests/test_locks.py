"""Locks: held by one process at a time, taken over from dead ones on this computer and others."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

import pytest

import locks
from errors import UserError
from locks import Lock, LockHeldError, lock

ROOT = Path(__file__).parent.parent
# Without locks.py, which takes seconds to import PyTorch
HOLD = """
import socket, sys
host, path, lease, refresh = sys.argv[1:]
if host:
    socket.gethostname = lambda: host
from filelock import SoftFileLease
with SoftFileLease(path, lease_duration=float(lease), heartbeat_interval=float(refresh)):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _short_lease(monkeypatch):
    monkeypatch.setattr(locks, "REFRESH", 0.2)
    monkeypatch.setattr(locks, "LEASE", 2.0)


@contextmanager
def holder(path: Path, host: str = "") -> Iterator[subprocess.Popen]:
    """Start a process that holds a lock, on a computer of this name."""
    path.parent.mkdir(exist_ok=True)
    words = [host, str(path), str(locks.LEASE), str(locks.REFRESH)]
    command = [sys.executable, "-c", HOLD, *words]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("host", ["", "gpu-3"])
def test_a_lock_of_a_living_process_is_refused_and_its_holder_named(host, tmp_path):
    path = tmp_path / "new" / ".lock"
    with holder(path, host) as process:
        name = f"^process {process.pid} on {host}"
        with pytest.raises(LockHeldError, match=name), lock(path):
            pass
        process.communicate("")  # it ends
        with lock(path):
            pass
    assert not path.exists()


def test_a_lock_of_a_process_that_was_killed_is_taken_at_once(tmp_path, capsys):
    with holder(tmp_path / ".lock") as process:
        process.kill()
        process.wait()
        begin = time.monotonic()
        with lock(tmp_path / ".lock"):
            assert time.monotonic() - begin < 1
    assert capsys.readouterr().err == ""


def test_a_lock_of_another_computer_is_taken_when_it_is_not_refreshed_any_more(tmp_path, capsys):
    path = tmp_path / ".lock"
    with holder(path, "gpu-3") as process:
        process.kill()
        process.wait()
        begin = time.monotonic()
        with lock(path):
            assert 1.5 < time.monotonic() - begin < 10
    assert capsys.readouterr().err == (
        f"notice: {path}: held by process {process.pid} on gpu-3, which shows no sign of life; "
        "taking it over in 2 s unless it does\n"
    )


def test_single_attempts_add_up(tmp_path):
    """As of a process that looks at several locks in turn."""
    with holder(tmp_path / ".lock", "gpu-3") as process:
        tried = Lock(tmp_path / ".lock")
        assert not tried.take()
        process.kill()
        process.wait()
        time.sleep(2.2)
        assert tried.take()
        with tried.hold():
            assert not Lock(tmp_path / ".lock").take()


def test_a_lock_is_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(locks, "SHORT_WAIT", 0.1)
    with holder(tmp_path / ".lock") as process:
        Timer(0.5, process.kill).start()
        with lock(tmp_path / ".lock", waits=True):
            assert process.wait(1) != 0
    text = f"notice: {tmp_path}: waiting for process {process.pid} on "
    assert capsys.readouterr().err.startswith(text)


@pytest.mark.slow
def test_a_process_that_has_lost_its_lock_ends(tmp_path):
    """As one that was suspended, after which another process has taken the lock."""
    code = (
        "import locks, time, utils\nfrom pathlib import Path\n"
        "locks.REFRESH = 0.1\n"
        "def main():\n"
        "    with locks.lock(Path('.lock')):\n"
        "        Path('.lock').unlink()\n"
        "        time.sleep(60)\n"
        "utils.run_script(main)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: .lock: the lock was lost")
    assert result.stderr.count("\n") == 1


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"), lock(tmp_path / "file" / ".lock"):
        pass


@pytest.mark.parametrize("waits", [True, False])
def test_a_lock_without_a_holder_is_an_error(waits, tmp_path, monkeypatch):
    """As a crash leaves it, after which nobody can tell whether the lock is in use."""
    monkeypatch.setattr(locks, "SHORT_WAIT", 0.1)
    (tmp_path / ".lock").touch()
    message = ".lock: a lock without a holder, as a crash leaves it; .* remove it"
    with pytest.raises(UserError, match=message), lock(tmp_path / ".lock", waits):
        pass
