"""Download the recordings of DCASE 2020 Challenge Task 2 to datasets/<type>/{train,test}.

    # the paper's training and test recordings: development + additional
    python datasets/download.py
    python datasets/download.py --dry_run                 # only print names, sizes and folders
    python datasets/download.py --types fan pump          # only these machine types
    # the challenge's evaluation clips and their labels
    python datasets/download.py --parts evaluation
    python datasets/download.py --output /data/dcase2020  # to another folder

Each part has one zip per machine type on Zenodo. dcase2020_task2.yaml lists addresses, sizes and
md5 checksums.

    development  <type>/train/normal_id_XX_*.wav and <type>/test/{normal,anomaly}_id_XX_*.wav
    additional   <type>/train/normal_id_XX_*.wav of the other machine IDs, in the same folder
    evaluation   <type>/evaluation/id_XX_*.wav, unlabelled; the labels are in eval_data_list.csv

After an error, Ctrl-C or a crash, run it again to continue. If nothing is missing, it does nothing
and needs no network. <output>/.download/ contains a zip until it is unpacked, then <zip>.json with
its md5 and the numbers of recordings. Once all recordings of a zip are unpacked, they are moved to
their final names, and replace existing files with these names. After an error that the user can
fix, it prints one line, and the exit status is 2.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import requests
import yaml
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from command_line import OneLineParser
from errors import UserError
from locks import lock
from utils import run_script, write_text

TABLE = Path(__file__).resolve().with_name("dcase2020_task2.yaml")

# Names of the clips in the zips of each part, between "<type>/" and "_XX_NNNNNNNN.wav".
CLIPS_IN_ZIP = {
    "development": "(train/normal|test/normal|test/anomaly)_id",
    "additional": "train/normal_id",
    "evaluation": "test/id",
}
# Folders that they are moved to, below the folder of the machine type.
FOLDERS = {"development": "{train,test}", "additional": "train", "evaluation": "evaluation"}

# Attempts of a request, and successive attempts to resume a download that receive no new byte.
TRIES = 6
# Pause after a lost connection. Between the attempts of a request: none, then 4, 8, 16 and 32 s.
PAUSE_SECONDS = 2.0
MAX_PAUSE_SECONDS = 300  # limit to the pause that a busy server may ask for
TIMEOUT_SECONDS = (10, 60)  # to connect, and to wait for the next byte
CHUNK_BYTES = 1 << 14  # lost at most when a connection is lost
TRY_AGAIN = (429, 500, 502, 503, 504)  # HTTP status codes


@dataclasses.dataclass(frozen=True)
class Zip:
    """One zip of the data set. Sizes in bytes."""

    part: str
    machine_type: str
    url: str
    path: Path  # of the file until it is unpacked
    md5: str
    size: int
    unpacked_size: int

    @property
    def marker(self) -> Path:
        """File that exists once the zip is completely unpacked."""
        return self.path.with_suffix(".json")

    @property
    def unpacking(self) -> Path:
        """Folder that holds the clips until all are unpacked."""
        return self.path.with_suffix(".unpacking")


def main(arguments: list[str] | None = None) -> None:
    """Download the missing zips of the chosen parts and machine types."""
    table = yaml.safe_load(TABLE.read_text())
    options = parse_options(table, arguments)
    output, labels = options.output, table["evaluation_labels"]
    downloads = output / ".download"
    zips = list(choose_zips(table, options, downloads))

    def find_missing() -> tuple[list[Zip], bool]:
        missing = [item for item in zips if not is_complete(item, output)]
        return missing, "evaluation" in options.parts and not (output / labels["file"]).exists()

    missing, lacks_labels = find_missing()
    print_plan(missing, output)
    if lacks_labels:
        print(f"and {labels['file']} -> {output}")
    if options.dry_run:
        return
    if missing or lacks_labels:
        try:
            with lock(downloads / ".lock", waits=True):
                # Another process may have downloaded them.
                fetch_all(*find_missing(), labels, options.url, output)
        except requests.RequestException as error:
            raise UserError(f"{error}; check --url, or run this again later to continue") from None
        except OSError as error:  # such as a full disk, or a folder without write permission
            reason = error.strerror or error
            raise UserError(
                f"{output}: {reason}; fix this, and run this again to continue"
            ) from None
    print(f"{output}: complete")


def fetch_all(missing: list[Zip], lacks_labels: bool, labels: dict, url: str, output: Path) -> None:
    """Download zips and, where they are missing, the labels."""
    session = make_session()
    for item in missing:
        shutil.rmtree(item.unpacking, ignore_errors=True)  # left by a run that was killed
    check_space(missing, output)
    if lacks_labels:
        fetch_labels(session, labels, url, output, output / ".download")
    for item in missing:
        fetch_zip(session, item, output)


def parse_options(table: dict, arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line. `table` is the content of dcase2020_task2.yaml."""
    types, parts = list(table["clip_bytes"]), ["development", "additional"]
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        default=TABLE.parent,
        help="folder to download to (default: this script's folder)",
    )
    add(
        "--parts",
        nargs="+",
        choices=table["parts"],
        default=parts,
        help=f"parts of the data set (default: {' '.join(parts)})",
    )
    add("--types", nargs="+", choices=types, default=types, help="machine types (default: all)")
    add("--dry_run", action="store_true", help="print what would be downloaded, and write nothing")
    add("--url", default=table["url"], help=f"address of a mirror (default: {table['url']})")
    options = parser.parse_args(arguments)
    if "{file}" not in options.url:
        raise UserError(f"--url {options.url} has no {{file}}; add it, as in {table['url']}")
    return options


def choose_zips(table: dict, options: argparse.Namespace, downloads: Path) -> Iterator[Zip]:
    """Yield the zips of the chosen parts and machine types, in the order of the table."""
    for part, record in table["parts"].items():
        for machine_type, row in record["zips"].items():
            if part in options.parts and machine_type in options.types:
                file = record["file"].format(type=machine_type)
                url = file_url(options.url, record["record"], file)
                unpacked_size = row["clips"] * table["clip_bytes"][machine_type]
                size = row["size"] or unpacked_size  # an upper limit where the size is unknown
                yield Zip(
                    part, machine_type, url, downloads / file, row["md5"], size, unpacked_size
                )


def file_url(pattern: str, record: int, file: str) -> str:
    return pattern.replace("{record}", str(record)).replace("{file}", file)


def print_plan(missing: list[Zip], output: Path) -> None:
    """Print a line for each missing zip, and their total size."""
    for item in missing:
        is_size_known = item.size != item.unpacked_size
        size = gigabytes(item.size) if is_size_known else f"at most {gigabytes(item.size)}"
        folder = output / item.machine_type / FOLDERS[item.part]
        print(f"{item.path.name}: {size}, unpacked {gigabytes(item.unpacked_size)} -> {folder}")
    size = gigabytes(sum(item.size for item in missing))
    unpacked_size = gigabytes(sum(item.unpacked_size for item in missing))
    print(f"missing in {output}: {len(missing)} zips, {size}, unpacked {unpacked_size}")


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def check_space(missing: list[Zip], output: Path) -> None:
    """Raise `UserError` if the disk is too small for the clips and, beside them, the largest zip.

    The zips are downloaded one by one, and each is deleted once it is unpacked.
    """
    largest = 0
    for item in missing:
        files = item.path.parent.glob(f"{item.path.name}*")
        downloaded = sum(path.stat().st_size for path in files)
        largest = max(largest, item.size - downloaded)
    needed = sum(item.unpacked_size for item in missing) + largest
    free = shutil.disk_usage(output).free
    if free < needed:
        remedy = "free some space, or choose fewer --types or --parts or another --output"
        sizes = f"{gigabytes(needed)} needed, {gigabytes(free)} free"
        raise UserError(f"{output}: the disk is too small ({sizes}); {remedy}")


def is_complete(item: Zip, output: Path) -> bool:
    """Return whether the zip was completely unpacked and all its clips still exist."""
    try:
        marker = json.loads(item.marker.read_text())
        return marker["md5"] == item.md5 and has_clips(output, marker["clips"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False  # not unpacked yet, or the marker was damaged by a power failure


def has_clips(output: Path, counts: dict[str, int]) -> bool:
    """Return whether all clips exist; `counts` is as {"fan/train/normal_id_00": 911}."""
    for group, count in counts.items():
        if len(list(output.glob(f"{group}_????????.wav"))) < count:
            return False
    return True


# ---- Unpacking ----


def fetch_zip(session: requests.Session, item: Zip, output: Path) -> None:
    """Download, check and unpack one zip."""
    fetch(session, item.url, item.path, lambda path: compute_md5(path) == item.md5)
    with zipfile.ZipFile(item.path) as archive:
        clips = find_clips(archive, item)
        progress = tqdm(clips.values(), desc=f"unpacking {item.path.name}", unit="clip")
        archive.extractall(item.unpacking, progress)
    for clip in clips:
        (output / clip).parent.mkdir(parents=True, exist_ok=True)
        (item.unpacking / clip).replace(output / clip)
    shutil.rmtree(item.unpacking)
    counts = Counter(clip.removesuffix(".wav").rpartition("_")[0] for clip in clips)
    if hasattr(os, "sync"):  # not on Windows
        os.sync()  # the marker reaches the disk after the clips: without one, it is unpacked again
    write_text(item.marker, json.dumps({"md5": item.md5, "clips": counts}, indent=2) + "\n")
    item.path.unlink()


def find_clips(archive: zipfile.ZipFile, item: Zip) -> dict[str, zipfile.ZipInfo]:
    """Find the clips among the entries of a zip, and rename them to their paths in the data set.

    Returns the entries by path. Other entries are ignored.
    """
    pattern = rf"{item.machine_type}/{CLIPS_IN_ZIP[item.part]}_\d\d_\d{{8}}\.wav"
    expected = re.compile(pattern, re.ASCII)
    clips = {}
    for entry in archive.infolist():
        if expected.fullmatch(entry.filename):
            if item.part == "evaluation":
                entry.filename = entry.filename.replace("/test/", "/evaluation/")
            clips[entry.filename] = entry
    return clips


def fetch_labels(
    session: requests.Session, labels: dict, url: str, output: Path, downloads: Path
) -> None:
    """Download the labels of the evaluation clips. Their list has no md5; its lines are counted."""
    name = r"id_\d\d_\d{8}\.wav"
    row = re.compile(rf"^{name},(?:normal|anomaly)_{name},[01]$", re.MULTILINE)

    def is_published_list(path: Path) -> bool:
        return len(row.findall(path.read_text("latin-1"))) == labels["clips"]

    path = downloads / labels["file"]
    fetch(session, file_url(url, labels["record"], labels["file"]), path, is_published_list)
    path.replace(output / labels["file"])


def compute_md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


# ---- Downloading ----


def make_session() -> requests.Session:
    """Make a session that repeats a request if the server cannot be reached or is busy.

    It waits as long as the server asks for.
    """
    session = requests.Session()
    # Ranges and lengths must count the bytes of the file, not those of a compressed transfer.
    session.headers["Accept-Encoding"] = "identity"
    retry = Retry(
        TRIES - 1,
        backoff_factor=PAUSE_SECONDS,
        status_forcelist=TRY_AGAIN,
        raise_on_status=False,
        retry_after_max=MAX_PAUSE_SECONDS,
    )
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    return session


def fetch(
    session: requests.Session, url: str, path: Path, is_right: Callable[[Path], bool]
) -> None:
    """Download `url` to `path`, unless the right file is already there.

    A wrong file is deleted and downloaded once more. Raises `UserError` if it is wrong again.
    """
    partial = path.with_name(f"{path.name}.part")
    for _ in range(2):
        if not path.exists():
            download(session, url, partial)
            partial.rename(path)
        if is_right(path):
            return
        print(f"{path}: not the published file", file=sys.stderr)
        path.unlink()
    raise UserError(
        f"{url}: the server does not send the published file; try again later, or use another --url"
    )


def download(session: requests.Session, url: str, partial: Path) -> None:
    """Download the rest of a partial file, and resume whenever the connection is lost.

    Raises `UserError` after too many successive attempts without a new byte.
    """
    idle_tries, largest_size = 0, 0
    while not receive(session, url, partial):
        size = partial.stat().st_size
        idle_tries = 0 if size > largest_size else idle_tries + 1
        largest_size = max(largest_size, size)
        if idle_tries == TRIES:
            raise UserError(
                f"{url}: the connection is lost at byte {size} every time; try again later"
            )
        message = f"{url}: the connection was lost at byte {size}; resuming from there"
        tqdm.write(message, file=sys.stderr)
        time.sleep(PAUSE_SECONDS)


def receive(session: requests.Session, url: str, partial: Path) -> bool:
    """Request the rest of a partial file once, and append it.

    If the server ignores the requested range, the file is replaced. Returns whether the end was
    reached.
    """
    with partial.open("ab") as file:
        size = file.tell()
        headers = {"Range": f"bytes={size}-"} if size else {}
        with session.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
            if size and response.status_code == 416:  # the range is beyond the end of the file
                return True
            response.raise_for_status()
            if response.status_code != 206:
                size = file.truncate(0)
            length = response.headers.get("Content-Length")
            total = size + int(length) if length else None
            with tqdm(
                desc=partial.stem, initial=size, total=total, unit="B", unit_scale=True
            ) as bar:
                try:
                    for chunk in response.iter_content(CHUNK_BYTES):
                        bar.update(file.write(chunk))
                except requests.RequestException:
                    return False
    return True


if __name__ == "__main__":
    run_script(main)
