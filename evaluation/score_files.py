"""Score files of any method, in the form of the challenge: metrics without a network."""

import math
import re
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from evaluation.metrics import AVERAGE, find_rule, measure
from evaluation.tables import show_metrics
from ground_truth import GroundTruth, read_lists
from names import TEST_FOLDERS, File, Form, find_form, is_machine_id, name_id, parse_name
from recordings import COLUMNS, known_recordings, make_row
from utils import UserError, check_writable, notice, read_rows, versions

FILE_NAME = re.compile(
    rf"anomaly_score_(?P<machine_type>(?!{AVERAGE}_).+)_"
    rf"(?:id_(?P<id>[^_]+)|section_(?P<section>\d\d)_(?P<folder>{'|'.join(TEST_FOLDERS)}))\.csv"
)
FILE_NAMES = "anomaly_score_<type>_id_<XX>.csv or anomaly_score_<type>_section_<XX>_test.csv"

Scores = dict[File, float]


class ScoreFile(NamedTuple):
    """A score file. `folder` is the folder of a machine type that its recordings come from."""

    path: Path
    machine_type: str
    machine_id: str
    folder: str


def evaluate_score_files(folder: Path, data_root: Path) -> None:
    """Measure the scores in a folder, print the metrics and write them into its folder `metrics`.

    The conditions and domains of the recordings come from their names, or else from the lists of
    labels in `data_root`.
    """
    scores = read_score_files(folder)
    form = find_form(list(scores))
    output = folder / "metrics"
    check_writable(
        output / "metrics.csv",
        "the metrics are written beside the score files; copy these elsewhere",
    )
    truth = read_lists(data_root, form, list(scores))
    report_missing(scores, truth)
    rows = [make_row(file, truth) for file in scores]
    recordings = pd.DataFrame(rows, columns=COLUMNS).assign(score=list(scores.values()))
    known = known_recordings(recordings)
    report_unlabelled(len(recordings) - len(known), len(recordings), form, data_root)
    about = {
        "score files": str(folder),
        "clips": describe_counts(recordings["condition"]),
        "evaluated with": versions(),
    }
    show_metrics(measure(known, find_rule(known)), f"Score files of {folder}", about, output, {})
    print(f"metrics of {len(known)} clips: {output}")


def describe_counts(conditions: pd.Series) -> str:
    """Count the conditions, as in "200 normal, 200 anomalous"; the most frequent one is first."""
    return ", ".join(f"{count} {name}" for name, count in conditions.value_counts().items())


# ---- Reading ----


def read_score_files(folder: Path) -> Scores:
    """Read the score of each recording from the score files in a folder.

    Raises:
        UserError: For a file with another name or without scores, and for lines that are no score
            of a recording of the section.
    """
    paths = sorted(folder.glob("anomaly_score_*.csv"))
    if not paths:
        raise UserError(f"{folder}: no score files ({FILE_NAMES})")
    scores: Scores = {}
    for path in paths:
        score_file = parse_file_name(path)
        lines = read_rows(path)
        if not lines:
            raise UserError(f"{path}: no scores in it; add them, or remove the file")
        for number, cells in lines:
            where = f"{path}, line {number}"
            file, score = parse_line(cells, score_file, where)
            if file in scores:
                raise UserError(f"{where}: {file.path.name} appears twice; remove one line")
            scores[file] = score
    return scores


def parse_file_name(path: Path) -> ScoreFile:
    """Parse the name of a score file. Raises `UserError` for other names."""
    match = FILE_NAME.fullmatch(path.name)
    if not match or (match["id"] and not is_machine_id(match["id"])):
        raise UserError(f"{path}: not a score file; rename it to {FILE_NAMES}, or remove it")
    machine_id = match["section"] or name_id(match["id"])
    return ScoreFile(path, match["machine_type"], machine_id, match["folder"] or "test")


def parse_line(cells: list[str], score_file: ScoreFile, where: str) -> tuple[File, float]:
    """Parse a line of a score file, which is at `where`. Raises `UserError` for other lines."""
    score = to_number(cells[1]) if len(cells) == 2 else math.nan
    if not math.isfinite(score):
        raise UserError(f"{where}: expected `<file name>,<score>`; correct or remove the line")
    path = Path(score_file.machine_type, score_file.folder, Path(cells[0]).name)
    try:
        name = parse_name(path)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if name is None or name.machine_id != score_file.machine_id or path.name != cells[0]:
        raise UserError(f"{where}: {cells[0]} is not a recording of {score_file.machine_id}")
    return File(path, score_file.machine_type, name), score


def to_number(text: str) -> float:
    """Convert a text to a number; NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


# ---- What is missing ----


def report_missing(scores: Scores, truth: GroundTruth) -> None:
    """Say how many clips in the lists have no score, of the machines that there are scores of."""
    machines, scored = set(), set()
    for file in scores:
        assert file.name
        machines.add((file.machine_type, file.name.machine_id))
        scored.add((file.machine_type, file.path.stem))
    missing = []
    for machine_type, clip in truth:
        machine_id = clip.split("_")[1]
        if (machine_type, machine_id) in machines and (machine_type, clip) not in scored:
            missing.append(f"{machine_type} {clip}")
    if missing:
        notice(
            f"{len(missing)} recordings in the lists have no score and are left out of the "
            f"metrics, such as {missing[0]}"
        )


def report_unlabelled(n_unlabelled: int, n_clips: int, form: Form, data_root: Path) -> None:
    """Say how many clips have no condition. Raises `UserError` if none has one."""
    message = f"{n_unlabelled} of {n_clips} recordings are not in {form.lists} under {data_root}"
    if n_unlabelled == n_clips:
        raise UserError(f"{message}, so there is nothing to measure; {form.get_lists}")
    if n_unlabelled:
        notice(f"{message} and are left out of the metrics ({form.get_lists})")
