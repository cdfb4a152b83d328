"""Fetch the DCASE 2020 Challenge Task 2 recordings and lay them out as datasets/<type>/{train,test}.

    python datasets/download.py                           # what the paper trains on: development + additional
    python datasets/download.py --dry_run                 # only say what, how large, and where to
    python datasets/download.py --types fan pump          # some machine types
    python datasets/download.py --parts evaluation        # the challenge's evaluation clips and their labels
    python datasets/download.py --output /data/dcase2020  # to another folder

The parts, each one zip per machine type, come from Zenodo (addresses, sizes and md5: dcase2020_task2.yaml):

    development  <type>/train/normal_id_XX_*.wav and <type>/test/{normal,anomaly}_id_XX_*.wav
    additional   <type>/train/normal_id_XX_*.wav of the other machine IDs, merged into the same folder
    evaluation   <type>/evaluation/id_XX_*.wav, unlabelled; the labels are in eval_data_list.csv

Run it again after any error, Ctrl-C or crash: it goes on where it stopped. Where nothing is missing it does
nothing and needs no network. <output>/.download/ holds a zip until it is unpacked, then <zip>.json with its
md5 and clip counts. A zip's clips get their final names when all are unpacked, and replace files of those
names. The exit status is 2, after one line, for an error the user can put right.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import requests
import yaml
from tqdm import tqdm
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import OneLineParser, UserError, run_script

TABLE = Path(__file__).resolve().with_name("dcase2020_task2.yaml")

# What a zip of each part may hold, between "<type>/" and "_XX_NNNNNNNN.wav", and the folders its clips go to.
CLIPS_IN_ZIP = {
    "development": "(train/normal|test/normal|test/anomaly)_id",
    "additional": "train/normal_id",
    "evaluation": "test/id",
}
FOLDERS = {"development": "{train,test}", "additional": "train", "evaluation": "evaluation"}
MAX_CLIP_BYTES = 1_000_000  # the longest published clip has 352,044

TRIES = 6  # in a row without a new byte
PAUSE_SECONDS = 2.0  # after the first of them, doubled after each further one
MAX_PAUSE_SECONDS = 300.0  # a server may ask for hours
TIMEOUT_SECONDS = (10, 60)  # to connect, and without a byte
CHUNK_BYTES = 1 << 14  # what a lost connection may take with it
TRY_AGAIN = {429, 500, 502, 503, 504}  # HTTP status
LOST = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


@dataclasses.dataclass(frozen=True)
class Zip:
    """One zip of the data set and where it lies until it is unpacked. Sizes in bytes."""

    part: str
    machine_type: str
    url: str
    path: Path
    md5: str
    size: int  # 0 until `ask_size`, where the table does not have it
    unpacked_size: int

    @property
    def marker(self) -> Path:  # exists once the zip is unpacked to the end
        return self.path.with_suffix(".json")

    @property
    def unpacking(self) -> Path:  # holds the clips until all are unpacked
        return self.path.with_suffix(".unpacking")


def main(arguments: list[str] | None = None) -> None:
    table = yaml.safe_load(TABLE.read_text())
    options = parse_options(table, arguments)
    output, state, labels = options.output, options.output / ".download", table["evaluation_labels"]
    session = requests.Session()
    session.headers["Accept-Encoding"] = "identity"  # so that ranges and lengths count the bytes of the file

    missing = [item for item in choose_zips(table, options, state) if not is_complete(item, output)]
    missing = [item if item.size else ask_size(session, item) for item in missing]
    labels_missing = "evaluation" in options.parts and not (output / labels["file"]).exists()
    print_plan(missing, output)
    if labels_missing:
        print(f"and {labels['file']} -> {output}")
    if options.dry_run:
        return

    try:
        state.mkdir(parents=True, exist_ok=True)
        for item in missing:
            shutil.rmtree(item.unpacking, ignore_errors=True)  # left by a run that was killed
        check_space(missing, output, options.keep_zips)
        if labels_missing:
            fetch_labels(session, labels, options.url, output, state)
        for item in missing:
            fetch_zip(session, item, output, options.keep_zips)
    except requests.RequestException as error:
        raise UserError(f"{error}; check --url") from None
    except OSError as error:  # a full disk, a folder without rights
        raise UserError(f"{output}: {error.strerror or error}; mend that and start again, it goes on here") from None
    print(f"{output}: complete")


def parse_options(table: dict, arguments: list[str] | None) -> argparse.Namespace:
    types, parts = list(table["clip_bytes"]), ["development", "additional"]
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=TABLE.parent, help="default: this script's folder")
    parser.add_argument("--parts", nargs="+", choices=table["parts"], default=parts, help=f"default: {' '.join(parts)}")
    parser.add_argument("--types", nargs="+", choices=types, default=types, help="default: all")
    parser.add_argument("--dry_run", action="store_true", help="say what would be fetched, write nothing")
    parser.add_argument("--keep_zips", action="store_true", help="leave the zips in <output>/.download")
    parser.add_argument("--url", default=table["url"], help=f"address on a mirror (default: {table['url']})")
    options = parser.parse_args(arguments)
    if "{file}" not in options.url:
        raise UserError(f"--url {options.url}: the place of the file name is missing, as in {table['url']}")
    return options


def choose_zips(table: dict, options: argparse.Namespace, state: Path) -> Iterator[Zip]:
    """The zips of the chosen parts and machine types, in the order of the table."""
    for part, record in table["parts"].items():
        for machine_type, row in record["zips"].items():
            if part in options.parts and machine_type in options.types:
                file = record["file"].format(type=machine_type)
                url = file_url(options.url, record["record"], file)
                unpacked_size = row["clips"] * table["clip_bytes"][machine_type]
                yield Zip(part, machine_type, url, state / file, row["md5"], row["size"] or 0, unpacked_size)


def file_url(pattern: str, record: int, file: str) -> str:
    return pattern.replace("{record}", str(record)).replace("{file}", file)


def ask_size(session: requests.Session, item: Zip) -> Zip:
    """The same zip with the size that the server tells, or else the unpacked size, which it cannot exceed."""
    size = item.unpacked_size
    with contextlib.suppress(requests.RequestException, KeyError):  # whatever lasts, fetching will report
        response = session.head(item.url, allow_redirects=True, timeout=TIMEOUT_SECONDS)
        response.raise_for_status()
        size = int(response.headers["Content-Length"]) or size
    return dataclasses.replace(item, size=size)


def print_plan(missing: list[Zip], output: Path) -> None:
    for item in missing:
        limit = "at most " if item.size == item.unpacked_size else ""  # the server did not tell
        folder = output / item.machine_type / FOLDERS[item.part]
        print(f"{item.path.name}: {limit}{gigabytes(item.size)}, unpacked {gigabytes(item.unpacked_size)} -> {folder}")
    size = gigabytes(sum(item.size for item in missing))
    unpacked_size = gigabytes(sum(item.unpacked_size for item in missing))
    print(f"missing in {output}: {len(missing)} zips, {size}, unpacked {unpacked_size}")


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def check_space(missing: list[Zip], output: Path, keep_zips: bool) -> None:
    """Raise UserError if the disk cannot hold the clips and, beside them, the zips that exist at one time."""
    here = [sum(path.stat().st_size for path in item.path.parent.glob(f"{item.path.name}*")) for item in missing]
    zips = [item.size - size for item, size in zip(missing, here, strict=True)]
    needed = sum(item.unpacked_size for item in missing) + (sum(zips) if keep_zips else max([0, *zips]))
    free = shutil.disk_usage(output).free
    if free < needed:
        remedy = "free some space, or choose fewer --types or --parts or another --output"
        raise UserError(f"{output}: {gigabytes(needed)} needed, {gigabytes(free)} free; {remedy}")


def is_complete(item: Zip, output: Path) -> bool:
    """Whether the zip was unpacked to the end and all its clips are still there."""
    try:
        done = json.loads(item.marker.read_text())
        here = {group: len(list(output.glob(f"{group}_????????.wav"))) for group in done["clips"]}
        return done["md5"] == item.md5 and Counter(done["clips"]) <= Counter(here)
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # or torn, when the machine lost its power
        return False


def fetch_zip(session: requests.Session, item: Zip, output: Path, keep_zips: bool) -> None:
    """Fetch, check and unpack one zip: all its clips beside the data set at first, then into it."""
    fetch(session, item.url, item.path, lambda path: md5_of(path) == item.md5)
    with zipfile.ZipFile(item.path) as archive:
        clips = clips_in(archive, item)
        archive.extractall(item.unpacking, tqdm(clips.values(), desc=f"unpacking {item.path.name}", unit="clip"))
    for clip in clips:
        (output / clip).parent.mkdir(parents=True, exist_ok=True)
        (item.unpacking / clip).replace(output / clip)
    shutil.rmtree(item.unpacking)
    counts = Counter(clip[: -len("_NNNNNNNN.wav")] for clip in clips)  # as in {"fan/train/normal_id_00": 911}
    marker = item.marker.with_suffix(".json.part")
    marker.write_text(json.dumps({"md5": item.md5, "clips": counts}, indent=2) + "\n")
    os.sync()  # so that the marker reaches the disk after the clips
    marker.rename(item.marker)  # last of all: what has no marker is unpacked again
    if not keep_zips:
        item.path.unlink()


def fetch_labels(session: requests.Session, labels: dict, url: str, output: Path, state: Path) -> None:
    """Fetch the list with the labels of the evaluation clips, which is known by its lines alone."""
    row = re.compile(r"^id_\d\d_\d{8}\.wav,(?:normal|anomaly)_id_\d\d_\d{8}\.wav,[01]$", re.MULTILINE)
    url, path = file_url(url, labels["record"], labels["file"]), state / labels["file"]
    fetch(session, url, path, lambda path: len(row.findall(path.read_text("latin-1"))) == labels["clips"])
    path.replace(output / labels["file"])


def md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def fetch(session: requests.Session, url: str, path: Path, is_right: Callable[[Path], bool]) -> None:
    """Have the file of `url` at `path`: take one that is there already, and fetch a wrong one once more."""
    part = path.with_name(f"{path.name}.part")
    for _ in range(2):
        if not path.exists():
            download(session, url, part)
            part.rename(path)
        if is_right(path):
            return
        print(f"{path}: not the published file", file=sys.stderr)
        path.unlink()
    raise UserError(f"{url}: the server does not send the published file; try again later or another --url")


def download(session: requests.Session, url: str, part: Path) -> None:
    """Receive what is missing of `part`, in as many tries as it takes while they bring something."""
    tries = most = 0
    while True:
        pause = 0.0
        try:
            receive(session, url, part)
            return
        except requests.HTTPError as error:
            if error.response is None or error.response.status_code not in TRY_AGAIN:
                raise UserError(f"{error}; check --url or try again later") from None
            reason = str(error)
            with contextlib.suppress(InvalidHeader):
                pause = Retry().get_retry_after(error.response.raw) or 0  # from Retry-After, a number or a date
        except LOST as error:
            cause = getattr(error.args[0], "reason", error.args[0])  # from within urllib3's "max retries"
            reason = f"{url}: {cause.args[-1]}"
        received = part.stat().st_size
        tries = 1 if received > most else tries + 1
        most = max(most, received)
        if tries == TRIES:
            raise UserError(f"{reason}; gave up after {TRIES} tries, start again later to go on")
        pause = min(pause or PAUSE_SECONDS * 2 ** (tries - 1), MAX_PAUSE_SECONDS)
        tqdm.write(f"{reason}; next try in {pause:.0f} s", file=sys.stderr)
        time.sleep(pause)


def receive(session: requests.Session, url: str, part: Path) -> None:
    """Ask once for what is missing of `part` and append it; start over if the server ignores the range."""
    with part.open("ab") as file:
        have = file.tell()
        headers = {"Range": f"bytes={have}-"} if have else {}
        with session.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
            if have and response.status_code == 416:  # nothing lies beyond: all of it is here, right or not
                return
            response.raise_for_status()
            if response.status_code != 206:
                have = file.truncate(0)
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else None
            with tqdm(desc=part.stem, initial=have, total=total, unit="B", unit_scale=True) as bar:
                for chunk in response.iter_content(CHUNK_BYTES):
                    bar.update(file.write(chunk))


def clips_in(archive: zipfile.ZipFile, item: Zip) -> dict[str, zipfile.ZipInfo]:
    """The entries of the clips, each named as its place in the data set.

    Folders are passed over, and so are notes and the files that macOS adds. Anything else is an error: the names
    expected leave no room for absolute paths and "..", the kinds none for links.
    """
    expected = re.compile(rf"{item.machine_type}/{CLIPS_IN_ZIP[item.part]}_\d\d_\d{{8}}\.wav", re.ASCII)
    clips, others = {}, []
    for entry in archive.infolist():
        name, path = entry.filename, PurePosixPath(entry.filename)
        is_file = stat.S_IFMT(entry.external_attr >> 16) in (0, stat.S_IFREG)
        is_elsewhere = path.is_absolute() or ".." in path.parts or "\\" in name
        is_recording = ".wav" in path.name.lower() and path.parts[0] != "__MACOSX"
        if entry.is_dir():
            continue
        if is_file and expected.fullmatch(name) and entry.file_size <= MAX_CLIP_BYTES:
            entry.filename = name.replace("/test/", "/evaluation/") if item.part == "evaluation" else name
            clips[entry.filename] = entry
        elif is_file and not is_elsewhere and not is_recording:
            others.append(repr(name))
        else:
            raise UserError(f"{item.path}: {name!r} is no clip as expected there; nothing of it was unpacked")
    if others:
        print(f"{item.path.name}: passed over {', '.join(others)}", file=sys.stderr)
    return clips


if __name__ == "__main__":
    run_script(main)
