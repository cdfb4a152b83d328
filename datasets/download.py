"""Fetch the DCASE 2020 Challenge Task 2 recordings and lay them out as
datasets/<type>/{train,test}.

    # what the paper trains on: development + additional
    python datasets/download.py
    python datasets/download.py --dry_run                 # only say what, how large, and where to
    python datasets/download.py --types fan pump          # some machine types
    # the challenge's evaluation clips and their labels
    python datasets/download.py --parts evaluation
    python datasets/download.py --output /data/dcase2020  # to another folder

The parts, each one zip per machine type, come from Zenodo (addresses, sizes and md5:
dcase2020_task2.yaml):

    development  <type>/train/normal_id_XX_*.wav and <type>/test/{normal,anomaly}_id_XX_*.wav
    additional   <type>/train/normal_id_XX_*.wav of the other machine IDs, merged into the same folder
    evaluation   <type>/evaluation/id_XX_*.wav, unlabelled; the labels are in eval_data_list.csv

Run it again after any error, Ctrl-C or crash: it goes on where it stopped. Where nothing is missing
it does nothing and needs no network. <output>/.download/ holds a zip until it is unpacked, then
<zip>.json with its md5 and clip counts. A zip's clips get their final names when all are unpacked,
and replace files of those names. The exit status is 2, after one line, for an error the user can
put right.
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
from utils import OneLineParser, UserError, run_script, write_text

TABLE = Path(__file__).resolve().with_name("dcase2020_task2.yaml")

# The clips in a zip of each part, between "<type>/" and "_XX_NNNNNNNN.wav", and the folders they go
# to.
CLIPS_IN_ZIP = {
    "development": "(train/normal|test/normal|test/anomaly)_id",
    "additional": "train/normal_id",
    "evaluation": "test/id",
}
FOLDERS = {"development": "{train,test}", "additional": "train", "evaluation": "evaluation"}

TRIES = 6  # of a request; and how often in a row a connection may bring no new byte
PAUSE_SECONDS = (
    2.0  # after a lost connection; between tries of a request none, then 4, 8, 16 and 32
)
MAX_PAUSE_SECONDS = 300  # a busy server may ask for hours
TIMEOUT_SECONDS = (10, 60)  # to connect, and without a byte
CHUNK_BYTES = 1 << 14  # what a lost connection may take with it
TRY_AGAIN = (429, 500, 502, 503, 504)  # HTTP status


@dataclasses.dataclass(frozen=True)
class Zip:
    """One zip of the data set and where it lies until it is unpacked. Sizes in bytes."""

    part: str
    machine_type: str
    url: str
    path: Path
    md5: str
    size: int
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
    missing = [item for item in choose_zips(table, options, state) if not is_complete(item, output)]
    labels_missing = "evaluation" in options.parts and not (output / labels["file"]).exists()
    print_plan(missing, output)
    if labels_missing:
        print(f"and {labels['file']} -> {output}")
    if options.dry_run:
        return

    session = make_session()
    try:
        state.mkdir(parents=True, exist_ok=True)
        for item in missing:
            shutil.rmtree(item.unpacking, ignore_errors=True)  # left by a run that was killed
        check_space(missing, output)
        if labels_missing:
            fetch_labels(session, labels, options.url, output, state)
        for item in missing:
            fetch_zip(session, item, output)
    except requests.RequestException as error:
        raise UserError(f"{error}; check --url, or start again later to go on") from None
    except OSError as error:  # a full disk, a folder without rights
        raise UserError(
            f"{output}: {error.strerror or error}; mend that and start again, it goes on here"
        ) from None
    print(f"{output}: complete")


def parse_options(table: dict, arguments: list[str] | None) -> argparse.Namespace:
    types, parts = list(table["clip_bytes"]), ["development", "additional"]
    parser = OneLineParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=TABLE.parent, help="default: this script's folder"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=table["parts"],
        default=parts,
        help=f"default: {' '.join(parts)}",
    )
    parser.add_argument("--types", nargs="+", choices=types, default=types, help="default: all")
    parser.add_argument(
        "--dry_run", action="store_true", help="say what would be fetched, write nothing"
    )
    parser.add_argument(
        "--url", default=table["url"], help=f"address on a mirror (default: {table['url']})"
    )
    options = parser.parse_args(arguments)
    if "{file}" not in options.url:
        raise UserError(
            f"--url {options.url}: the place of the file name is missing, as in {table['url']}"
        )
    return options


def choose_zips(table: dict, options: argparse.Namespace, state: Path) -> Iterator[Zip]:
    """The zips of the chosen parts and machine types, in the order of the table."""
    for part, record in table["parts"].items():
        for machine_type, row in record["zips"].items():
            if part in options.parts and machine_type in options.types:
                file = record["file"].format(type=machine_type)
                url = file_url(options.url, record["record"], file)
                unpacked_size = row["clips"] * table["clip_bytes"][machine_type]
                size = row["size"] or unpacked_size  # which it cannot exceed
                yield Zip(part, machine_type, url, state / file, row["md5"], size, unpacked_size)


def file_url(pattern: str, record: int, file: str) -> str:
    return pattern.replace("{record}", str(record)).replace("{file}", file)


def print_plan(missing: list[Zip], output: Path) -> None:
    for item in missing:
        limit = (
            "at most " if item.size == item.unpacked_size else ""
        )  # where the table does not have it
        folder = output / item.machine_type / FOLDERS[item.part]
        print(
            f"{item.path.name}: {limit}{gigabytes(item.size)}, unpacked {gigabytes(item.unpacked_size)} -> {folder}"
        )
    size = gigabytes(sum(item.size for item in missing))
    unpacked_size = gigabytes(sum(item.unpacked_size for item in missing))
    print(f"missing in {output}: {len(missing)} zips, {size}, unpacked {unpacked_size}")


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def check_space(missing: list[Zip], output: Path) -> None:
    """Raise UserError if the disk cannot hold the clips and, beside them, what is missing of the
    largest zip.
    """
    here = [
        sum(path.stat().st_size for path in item.path.parent.glob(f"{item.path.name}*"))
        for item in missing
    ]
    zips = [item.size - size for item, size in zip(missing, here, strict=True)]
    needed = sum(item.unpacked_size for item in missing) + max([0, *zips])
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
    except (
        FileNotFoundError,
        ValueError,
        KeyError,
        TypeError,
    ):  # or torn, when the machine lost its power
        return False


# ---- Unpacking ----


def fetch_zip(session: requests.Session, item: Zip, output: Path) -> None:
    """Fetch, check and unpack one zip: all its clips beside the data set at first, then into it."""
    fetch(session, item.url, item.path, lambda path: md5_of(path) == item.md5)
    with zipfile.ZipFile(item.path) as archive:
        clips = clips_in(archive, item)
        archive.extractall(
            item.unpacking, tqdm(clips.values(), desc=f"unpacking {item.path.name}", unit="clip")
        )
    for clip in clips:
        (output / clip).parent.mkdir(parents=True, exist_ok=True)
        (item.unpacking / clip).replace(output / clip)
    shutil.rmtree(item.unpacking)
    counts = Counter(
        clip[: -len("_NNNNNNNN.wav")] for clip in clips
    )  # as in {"fan/train/normal_id_00": 911}
    os.sync()  # the marker reaches the disk after the clips: a zip without one is unpacked again
    write_text(item.marker, json.dumps({"md5": item.md5, "clips": counts}, indent=2) + "\n")
    item.path.unlink()


def clips_in(archive: zipfile.ZipFile, item: Zip) -> dict[str, zipfile.ZipInfo]:
    """The entries of the clips, each named as its place in the data set; whatever else is there is
    passed over.
    """
    expected = re.compile(
        rf"{item.machine_type}/{CLIPS_IN_ZIP[item.part]}_\d\d_\d{{8}}\.wav", re.ASCII
    )
    clips = {}
    for entry in archive.infolist():
        if expected.fullmatch(entry.filename):
            if item.part == "evaluation":
                entry.filename = entry.filename.replace("/test/", "/evaluation/")
            clips[entry.filename] = entry
    return clips


def fetch_labels(
    session: requests.Session, labels: dict, url: str, output: Path, state: Path
) -> None:
    """Fetch the list with the labels of the evaluation clips, which is known by its lines alone."""
    row = re.compile(
        r"^id_\d\d_\d{8}\.wav,(?:normal|anomaly)_id_\d\d_\d{8}\.wav,[01]$", re.MULTILINE
    )
    url, path = file_url(url, labels["record"], labels["file"]), state / labels["file"]
    fetch(
        session,
        url,
        path,
        lambda path: len(row.findall(path.read_text("latin-1"))) == labels["clips"],
    )
    path.replace(output / labels["file"])


def md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


# ---- Fetching ----


def make_session() -> requests.Session:
    """A session that tries again where a server is out of reach or busy, after the pause that it
    asks for.
    """
    session = requests.Session()
    session.headers["Accept-Encoding"] = (
        "identity"  # so that ranges and lengths count the bytes of the file
    )
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
    """Have the file of `url` at `path`: take one that is there already, and fetch a wrong one once
    more.
    """
    part = path.with_name(f"{path.name}.part")
    for _ in range(2):
        if not path.exists():
            download(session, url, part)
            part.rename(path)
        if is_right(path):
            return
        print(f"{path}: not the published file", file=sys.stderr)
        path.unlink()
    raise UserError(
        f"{url}: the server does not send the published file; try again later or another --url"
    )


def download(session: requests.Session, url: str, part: Path) -> None:
    """Receive what is missing of `part`, in as many tries as it takes while they bring something."""
    idle, most = 0, 0  # tries in a row without a new byte; bytes
    while not receive(session, url, part):
        received = part.stat().st_size
        idle = 0 if received > most else idle + 1
        most = max(most, received)
        if idle == TRIES:
            raise UserError(
                f"{url}: the connection is lost at byte {received} again and again; start again later"
            )
        tqdm.write(
            f"{url}: the connection was lost at byte {received}; it goes on there", file=sys.stderr
        )
        time.sleep(PAUSE_SECONDS)


def receive(session: requests.Session, url: str, part: Path) -> bool:
    """Ask once for what is missing of `part` and append it; start over if the server ignores the
    range. Returns whether the end was reached.
    """
    with part.open("ab") as file:
        have = file.tell()
        headers = {"Range": f"bytes={have}-"} if have else {}
        with session.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
            if (
                have and response.status_code == 416
            ):  # nothing lies beyond: all of it is here, right or not
                return True
            response.raise_for_status()
            if response.status_code != 206:
                have = file.truncate(0)
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else None
            with tqdm(desc=part.stem, initial=have, total=total, unit="B", unit_scale=True) as bar:
                try:
                    for chunk in response.iter_content(CHUNK_BYTES):
                        bar.update(file.write(chunk))
                except requests.RequestException:
                    return False
    return True


if __name__ == "__main__":
    run_script(main)
