"""datasets/download.py with a local web server that serves small zips and can misbehave."""

import contextlib
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from errors import UserError
from utils import run_script

SCRIPT = Path(__file__).resolve().parent.parent / "datasets" / "download.py"
spec = importlib.util.spec_from_file_location("download", SCRIPT)
download = importlib.util.module_from_spec(spec)
sys.modules["download"] = download
spec.loader.exec_module(download)

Usage = namedtuple("Usage", "free")  # of a disk
FORK = multiprocessing.get_context("fork")
CLIP_BYTES = 3000
LABELS = "eval_data_list.csv"

# Names of the clips in each zip; "{}" stands for the machine type.
CLIPS = {
    "dev_data_{}.zip": [
        *(
            f"{{}}/train/normal_id_{machine:02}_{number:08}.wav"
            for machine in (0, 2)
            for number in range(3)
        ),
        *(
            f"{{}}/test/{kind}_id_{machine:02}_00000000.wav"
            for machine in (0, 2)
            for kind in ("normal", "anomaly")
        ),
    ],
    "eval_data_train_{}.zip": [f"{{}}/train/normal_id_01_{number:08}.wav" for number in range(3)],
    "eval_data_test_{}.zip": [f"{{}}/test/id_01_{number:08}.wav" for number in range(2)],
}
PARTS = dict(zip(("development", "additional", "evaluation"), CLIPS, strict=True))
PARTS_OF_PAPER = ("development", "additional")
TYPES = ("fan", "ToyCar")


class Site:
    """A web server with the files of a small data set.

    A fault is a function that answers a request of a file (GET) in place of the server. Each of
    `faults` answers one request, then `fault` answers the others. `requests` lists "<method> <file>
    <range>".
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list = []
        self.fault = answer
        self.victim = None  # the process that `World.run_apart` has started
        handler = type("BoundHandler", (Handler,), {"site": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/{{record}}/{{file}}?download=1"

    def gets(self) -> list[str]:
        return [request for request in self.requests if request.startswith("GET")]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    site: Site

    def do_GET(self) -> None:
        body = self.find("GET")
        if body is not None:
            fault = self.site.faults.pop(0) if self.site.faults else self.site.fault
            with contextlib.suppress(ConnectionError):
                fault(self, body)

    def find(self, method: str) -> bytes | None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        self.site.requests.append(f"{method} {name} {self.headers.get('Range', '')}".rstrip())
        if name not in self.site.files:
            self.start(404, 0)
        return self.site.files.get(name)

    def start(self, status: int, length: int, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


def answer(handler: Handler, body: bytes, length: int | None = None) -> None:
    """Answer as a good server does. With `length`, close the connection after so many bytes."""
    first = int(handler.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
    if first and first >= len(body):
        handler.start(416, 0, Content_Range=f"bytes */{len(body)}")
        return
    rest = body[first:]
    span = f"bytes {first}-{len(body) - 1}/{len(body)}"
    handler.start(206 if first else 200, len(rest), Content_Range=span)
    handler.wfile.write(rest[:length])
    handler.close_connection = length is not None


def cut(length: int):
    return lambda handler, body: answer(handler, body, length)


def ignore_range(handler: Handler, body: bytes) -> None:
    handler.start(200, len(body))
    handler.wfile.write(body)


def send_wrong_bytes(handler: Handler, body: bytes) -> None:
    ignore_range(handler, body[::-1])


def cut_without_length(handler: Handler, body: bytes) -> None:
    """Break off as a server of HTTP/1.0 would: without a length, the file seems to end here."""
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.close_connection = True


def refuse(status: int, **headers: str):
    return lambda handler, body: handler.start(status, 0, **headers)


def stall(handler: Handler, body: bytes) -> None:
    time.sleep(0.6)
    handler.close_connection = True


def make_zip(clips: dict[str, bytes]) -> bytes:
    return extend_zip(b"", {f"{Path(name).parent}/": b"" for name in clips} | clips)


def extend_zip(content: bytes, entries: dict) -> bytes:
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return file.getvalue()


def place_of(clip: str, part: str) -> str:
    return clip.replace("/test/", "/evaluation/") if part == "evaluation" else clip


def tree(output: Path) -> dict[str, bytes]:
    """Return the content of each file below the output, by path, without the folder .download."""
    files = (path for path in output.rglob("*") if path.is_file() and ".download" not in path.parts)
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files}


class World:
    """A site, a table that describes it, an output folder, and the files expected in it."""

    def __init__(self, folder: Path, site: Site) -> None:
        self.site, self.table_path, self.output = site, folder / "table.yaml", folder / "data"
        self.parts: dict[str, dict[str, bytes]] = {}
        records = {}
        rng = random.Random(1)
        for record, (part, file) in enumerate(PARTS.items()):
            records[part] = {"record": record, "file": file.replace("{}", "{type}"), "zips": {}}
            self.parts[part] = {}
            for machine_type in TYPES:
                clips = {
                    name.format(machine_type): rng.randbytes(CLIP_BYTES) for name in CLIPS[file]
                }
                self.parts[part] |= {place_of(name, part): clip for name, clip in clips.items()}
                site.files[file.format(machine_type)] = make_zip(clips)
                records[part]["zips"][machine_type] = {"clips": len(clips)}
        rows = [
            f"{Path(clip).name},normal_{Path(clip).name},0" for clip in self.parts["evaluation"]
        ]
        site.files[LABELS] = "\n".join(["fan", *rows, ""]).encode()
        self.table = {
            "url": site.url,
            "clip_bytes": dict.fromkeys(TYPES, CLIP_BYTES),
            "parts": records,
            "evaluation_labels": {"record": 9, "file": LABELS, "clips": len(rows)},
        }
        self.write_table()

    def write_table(self) -> None:
        """Write the size and md5 of each zip to the table. Evaluation sizes stay unknown."""
        for part, file in PARTS.items():
            for machine_type, row in self.table["parts"][part]["zips"].items():
                content = self.site.files[file.format(machine_type)]
                row["md5"] = hashlib.md5(content).hexdigest()
                row["size"] = None if part == "evaluation" else len(content)
        self.table_path.write_text(yaml.safe_dump(self.table, sort_keys=False))

    def publish(self, content: bytes) -> None:
        """Replace the first zip on the site, and its entry in the table."""
        self.site.files["dev_data_fan.zip"] = content
        self.write_table()

    def leave(self, path: str, content: bytes) -> Path:
        """Write a file to the folder .download, as an earlier run may have left it."""
        file = self.output / ".download" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return file

    def run(self, *arguments: str) -> list[str]:
        """Run in this process; return the requests that it makes."""
        count = len(self.site.requests)
        download.main(["--output", str(self.output), *arguments])
        return self.site.requests[count:]

    def fail(self, match: str, *arguments: str) -> str:
        """Run in this process; return the error that it ends with, one line that matches."""
        with pytest.raises(UserError, match=match) as error:
            self.run(*arguments)
        assert "\n" not in str(error.value)
        return str(error.value)

    def run_apart(self, prepare=lambda: None) -> int:
        """Run as a script in a new process; return its status, negative after a signal."""
        process = FORK.Process(target=lambda: (prepare(), run_script(self.run)))
        self.site.victim = process
        process.start()
        process.join(20)
        return process.exitcode

    def expected(self, *parts: str) -> dict[str, bytes]:
        return {
            name: clip
            for part in parts or PARTS_OF_PAPER
            for name, clip in self.parts[part].items()
        }

    def run_to_completion(self) -> None:
        """Run without faults: every file must exist in the end, and no temporary file."""
        self.site.fault = answer
        self.run()
        self.assert_complete()

    def assert_complete(self) -> None:
        assert tree(self.output) == self.expected()
        left = {path.name for path in (self.output / ".download").iterdir()}
        assert left - {".lock"} == {
            f"{stem}_{t}.json" for stem in ("dev_data", "eval_data_train") for t in TYPES
        }

    def part_size(self, file: str = "dev_data_fan.zip") -> int:
        return (self.output / ".download" / f"{file}.part").stat().st_size


@pytest.fixture
def world(tmp_path, monkeypatch):
    site = Site()
    world = World(tmp_path, site)
    monkeypatch.setattr(download, "TABLE", world.table_path)
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(download, "CHUNK_BYTES", 500)
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", (5, 5))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=site.server.serve_forever, kwargs={"poll_interval": 0.005})
    thread.start()
    yield world
    site.server.shutdown()
    site.server.server_close()
    thread.join()


def test_fetches_and_merges_development_and_additional(world, capsys):
    world.run_to_completion()
    assert world.site.requests == [
        f"GET {file.format(t)}" for file in list(CLIPS)[:2] for t in TYPES
    ]
    shown = capsys.readouterr()
    assert "dev_data_fan.zip: 100%" in shown.err
    assert "B/s]" in shown.err
    assert shown.out.endswith(f"{world.output}: complete\n")


def test_second_run_makes_no_request_and_changes_nothing(world):
    world.run()
    before = {path: path.stat().st_mtime_ns for path in world.output.rglob("*")}
    assert world.run() == []
    assert {path: path.stat().st_mtime_ns for path in world.output.rglob("*")} == before


def test_dry_run_writes_nothing(world, capsys):
    world.run("--dry_run", "--parts", "development", "evaluation", "--types", "fan")
    assert not world.output.exists()
    assert world.site.requests == []
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"dev_data_fan.zip: 0.00 GB, unpacked 0.00 GB -> {world.output}/fan/{{train,test}}",
        "eval_data_test_fan.zip: at most 0.00 GB, unpacked 0.00 GB -> "
        f"{world.output}/fan/evaluation",
        f"missing in {world.output}: 2 zips, 0.00 GB, unpacked 0.00 GB",
        f"and {LABELS} -> {world.output}",
    ]


def test_types_and_parts_can_be_chosen(world):
    world.run("--types", "fan", "--parts", "additional")
    assert tree(world.output) == {
        name: clip for name, clip in world.expected("additional").items() if name.startswith("fan/")
    }


def test_evaluation_lies_apart_from_the_test_set(world):
    world.run("--parts", "development", "evaluation")
    labels = {LABELS: world.site.files[LABELS]}
    assert tree(world.output) == world.expected("development", "evaluation") | labels
    assert (world.output / "fan" / "evaluation" / "id_01_00000000.wav").exists()
    assert not (world.output / "fan" / "test" / "id_01_00000000.wav").exists()
    assert world.run("--parts", "development", "evaluation") == []


def test_label_list_is_checked_by_its_lines(world):
    good = world.site.files[LABELS]
    world.site.files[LABELS] = b"<html>sign in</html>"
    world.fail(LABELS, "--parts", "evaluation")
    assert tree(world.output) == {}
    world.site.files[LABELS] = good.replace(b"\n", b"\r\n")
    world.run("--parts", "evaluation")
    assert tree(world.output).keys() == {LABELS, *world.expected("evaluation")}


def test_deleted_clip_is_noticed(world):
    world.run()
    (world.output / "fan" / "test" / "anomaly_id_02_00000000.wav").unlink()
    assert world.run() == ["GET dev_data_fan.zip"]
    world.assert_complete()


def test_other_edition_in_the_table_is_fetched(world):
    world.run()
    new = {"fan/train/normal_id_00_00000000.wav": b"another recording"}
    world.publish(make_zip(new))
    assert world.run() == ["GET dev_data_fan.zip"]
    assert tree(world.output) == world.expected() | new


def test_torn_marker_is_no_marker(world):
    world.run()
    world.leave("dev_data_fan.json", b"")
    world.run_to_completion()


def test_cut_connection_is_resumed_where_it_ended(world):
    world.site.faults = [cut(1000), cut(500)]
    world.run()
    assert world.site.gets()[:3] == [
        "GET dev_data_fan.zip",
        "GET dev_data_fan.zip bytes=1000-",
        "GET dev_data_fan.zip bytes=1500-",
    ]
    world.assert_complete()


def test_many_cuts_are_no_failure_while_bytes_arrive(world):
    world.site.faults = [cut(1000)] * (download.TRIES + 2)
    world.run_to_completion()


def test_server_is_asked_for_the_bytes_as_they_are(world):
    """A compressed answer would have other lengths and ranges than the file."""
    encodings = set()
    world.site.faults = [
        lambda handler, body: (
            encodings.add(handler.headers["Accept-Encoding"]) or answer(handler, body)
        )
    ]
    world.run()
    assert encodings == {"identity"}


def test_missing_file_is_not_asked_for_again(world):
    world.site.fault = refuse(404)
    world.fail(r"404 Client Error: Not Found for url: .*; check --url")
    assert len(world.site.requests) == 1


def test_next_run_resumes_too(world):
    world.site.faults, world.site.fault = [cut(1000)], refuse(404)
    world.fail("404")
    assert world.part_size() == 1000
    world.site.fault = answer
    world.run()
    assert "GET dev_data_fan.zip bytes=1000-" in world.site.requests
    world.assert_complete()


def test_part_that_is_whole_is_not_fetched_again(world):
    world.leave("dev_data_fan.zip.part", world.site.files["dev_data_fan.zip"])
    world.run("--types", "fan", "--parts", "development")
    assert len(world.site.requests) == 1
    assert tree(world.output).items() <= world.expected("development").items()


def test_part_of_another_file_is_fetched_anew(world):
    world.leave("dev_data_fan.zip.part", b"x" * 1000)
    world.run()
    assert world.site.gets()[:2] == ["GET dev_data_fan.zip bytes=1000-", "GET dev_data_fan.zip"]
    world.assert_complete()


def test_server_without_ranges_sends_the_whole_file_again(world):
    world.site.faults = [cut(1000), ignore_range]
    world.run_to_completion()


def test_connection_cut_at_the_same_place_for_ever_is_given_up(world):
    def cut_from_start(handler, body):
        handler.start(200, len(body))
        handler.wfile.write(body[:1000])
        handler.close_connection = True

    world.site.fault = cut_from_start
    world.fail(
        r"dev_data_fan\.zip.*: the connection is lost at byte 1000 every time; try again later"
    )
    assert len(world.site.requests) == 1 + download.TRIES
    world.run_to_completion()


@pytest.mark.parametrize("fault", [refuse(503), refuse(429), cut(0), stall])
def test_passing_trouble_is_sat_out(world, fault, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", (5, 0.3))
    world.site.faults = [fault] * 3
    world.run()
    assert len(world.site.requests) == 4 + 3
    world.assert_complete()


def test_a_busy_server_is_given_the_time_that_it_asks_for(world):
    world.site.faults = [refuse(429, Retry_After="1")]
    start = time.monotonic()
    world.run()
    assert time.monotonic() - start > 1


def test_lasting_trouble_ends_with_one_line_and_status_2(world, capfd):
    world.site.fault = refuse(503)
    assert world.run_apart() == 2
    *_, last = capfd.readouterr().err.splitlines()
    assert last.startswith("error: 503 Server Error: Service Unavailable for url: http://127.0.0.1")
    assert last.endswith("check --url, or run this again later to continue")
    assert len(world.site.requests) == download.TRIES
    world.fail("Connection refused", "--url", "http://127.0.0.1:9/{file}")
    world.run_to_completion()


@pytest.mark.parametrize("fault", [send_wrong_bytes, cut_without_length])
def test_wrong_bytes_once_are_fetched_again(world, fault):
    world.site.faults = [fault]
    world.run()
    assert world.site.gets()[:2] == ["GET dev_data_fan.zip"] * 2
    world.assert_complete()


def test_wrong_bytes_twice_are_an_error(world):
    world.site.fault = send_wrong_bytes
    world.fail(r"dev_data_fan\.zip.*does not send the published file")
    assert len(world.site.requests) == 2
    assert tree(world.output) == {}
    world.run_to_completion()


def test_what_is_no_clip_is_passed_over(world, tmp_path):
    """Notes, files that macOS adds, clips of other machines, and paths outside the output."""
    others = (
        "fan/README.md",
        "__MACOSX/fan/train/._normal_id_00_00000000.wav",
        "../outside.wav",
        "pump/train/normal_id_00_00000009.wav",
        "fan/train/anomaly_id_00_00000009.wav",
    )
    world.publish(extend_zip(world.site.files["dev_data_fan.zip"], dict.fromkeys(others, b"...")))
    world.run_to_completion()
    assert {path.name for path in tmp_path.iterdir()} == {"table.yaml", "data"}


@pytest.fixture
def set_free_space(monkeypatch):
    """Return a function that sets how many bytes the disk seems to have free."""
    return lambda free: monkeypatch.setattr(download.shutil, "disk_usage", lambda _: Usage(free))


def test_too_little_space_is_said_before_anything_is_fetched(world, set_free_space):
    clips = sum(map(len, world.expected().values()))
    largest = max(len(world.site.files[file.format(t)]) for file in list(CLIPS)[:2] for t in TYPES)
    set_free_space(clips + largest - 1)
    world.fail(r"needed, .* free\); free some space")
    assert world.site.requests == []
    set_free_space(clips + largest)
    world.run_to_completion()


@pytest.mark.slow
def test_full_disk_in_the_middle(world, monkeypatch):
    """On a small real file system, the check is shown more space than there is."""
    world.output.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", world.output]).returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        with monkeypatch.context() as patch:
            patch.setattr(download.shutil, "disk_usage", lambda _: Usage(1e9))
            world.fail("data: No space left on device; fix this, and run this again")
        world.fail(r"needed, .* free")
        subprocess.run(["mount", "-o", "remount,size=1m", world.output], check=True)
        world.run()
        world.assert_complete()
    finally:
        subprocess.run(["umount", world.output], check=True)


def die_at(moment: int, output: Path):
    """Make the process kill itself when it opens, renames, makes or deletes a file for the n-th
    time, n being `moment`.
    """
    moments = iter(range(1, moment))

    def hook(event: str, arguments: tuple) -> None:
        changes = event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
        if changes and str(output) in str(arguments[0]) and next(moments, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.addaudithook(hook)


def assert_survives_death_at(world: World, moment: int) -> int:
    status = world.run_apart(die_at(moment, world.output))
    assert status in (0, -signal.SIGKILL)
    assert tree(world.output).items() <= world.expected().items(), (
        "half a clip under its final name"
    )
    for marker in world.output.glob(".download/*.json"):
        counts = json.loads(marker.read_text())["clips"]
        for group, count in counts.items():
            assert len(list(world.output.glob(f"{group}_*.wav"))) == count, (
                "a marker before its clips"
            )
    world.run()
    assert tree(world.output) == world.expected()
    return status


@pytest.mark.parametrize("moment", random.Random(7).sample(range(1, 100), 3))
def test_kill_9_at_some_moments(world, moment):
    assert assert_survives_death_at(world, moment) == -signal.SIGKILL


@pytest.mark.slow
def test_kill_9_at_every_moment(world):
    moment, status = 0, None
    while status != 0:
        moment += 1
        world.output = world.output.with_name(f"data_{moment}")
        status = assert_survives_death_at(world, moment)
    assert moment > 100


@pytest.mark.parametrize("length", [0, 1, 10_000])
def test_kill_9_while_bytes_arrive(world, length):
    def kill(handler, body):
        answer(handler, body, length)
        handler.wfile.flush()
        time.sleep(0.05)  # for the bytes to arrive
        os.kill(world.site.victim.pid, signal.SIGKILL)

    world.site.faults = [answer, kill]
    assert world.run_apart() == -signal.SIGKILL
    world.run_to_completion()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--types", "fans"], "argument --types: invalid choice: 'fans'"),
        (["--parts", "train"], "argument --parts: invalid choice: 'train'"),
        (["--type", "fan"], "unrecognized arguments: --type fan"),
        (["--url", "http://127.0.0.1/x.zip"], r"x\.zip has no {file}; add it, as in http"),
    ],
)
def test_wrong_options_are_one_line(world, arguments, message):
    world.fail(message, *arguments)
    assert not world.output.exists()


def test_url_without_scheme_is_one_line(world):
    world.fail(r"No scheme supplied.*check --url", "--url", "mirror/{file}")


def test_published_table_needs_no_network_for_the_default_parts(tmp_path, capsys):
    download.main(["--dry_run", "--output", str(tmp_path), "--url", "http://127.0.0.1:9/{file}"])
    *_, last = capsys.readouterr().out.splitlines()
    assert last == f"missing in {tmp_path}: 12 zips, 12.32 GB, unpacked 15.39 GB"
    assert list(tmp_path.iterdir()) == []


def test_published_table():
    table = yaml.safe_load(SCRIPT.with_name("dcase2020_task2.yaml").read_text())
    clips = {
        part: sum(row["clips"] for row in rows["zips"].values())
        for part, rows in table["parts"].items()
    }
    assert clips == {"development": 20119 + 10868, "additional": 16164, "evaluation": 7103}
    assert table["evaluation_labels"]["clips"] == clips["evaluation"]
    assert set(table["parts"]) == set(download.CLIPS_IN_ZIP) == set(download.FOLDERS)
    md5s = [row["md5"] for rows in table["parts"].values() for row in rows["zips"].values()]
    assert len({md5 for md5 in md5s if len(bytes.fromhex(md5)) == 16}) == 18
    for rows in table["parts"].values():
        assert set(rows["zips"]) == set(table["clip_bytes"])
        for machine_type, row in rows["zips"].items():
            unpacked = row["clips"] * table["clip_bytes"][machine_type]
            assert row["size"] is None or 0.7 < row["size"] / unpacked < 0.95
