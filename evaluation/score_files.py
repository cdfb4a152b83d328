"""Score files of any method, in the form of the challenge: metrics without a network."""

import math
import re
from pathlib import Path

import pandas as pd

from errors import UserError
from evaluation.metrics import find_rule, measure
from evaluation.tables import ShownMetrics, show_metrics
from ground_truth import GroundTruth, read_lists
from names import (
    AVERAGE,
    TEST_FOLDERS,
    Form,
    Recording,
    find_form,
    format_id,
    is_machine_id,
    parse_path,
)
from recordings import known_recordings, make_table
from utils import check_writable, notice, read_rows, versions

# The organisers' baseline since 2023 adds the year and the seed, as in
# anomaly_score_DCASE2023T2ToyDrone_section_00_test_seed13711_id(0_)_Eval.csv.
FILE_NAME = re.compile(
    r"anomaly_score_(?:DCASE20\d\dT2(?=.*_seed\d))?"
    rf"(?P<machine_type>(?!{AVERAGE}_).+?)_"
    rf"(?:id_(?P<id>[^_]+)|section_(?P<section>\d\d)_(?P<folder>{'|'.join(TEST_FOLDERS)}))"
    r"(?:_seed\d+.*)?\.csv"
)
FILE_NAMES = "anomaly_score_<type>_id_<XX>.csv or anomaly_score_<type>_section_<XX>_test.csv"

Scores = dict[Recording, float]


def evaluate_score_files(folder: Path, data_root: Path) -> None:
    """Measure the scores in a folder, print the metrics and write them into its folder `metrics`.

    The conditions and domains of the recordings come from their names, or else from the lists of
    labels in `data_root`.
    """
    scores = read_score_files(folder)
    form = find_form(scores)
    output = folder / "metrics"
    check_writable(
        output / "metrics.csv",
        "the metrics are written beside the score files; copy these elsewhere",
    )
    truth = read_lists(data_root, form, scores.keys())
    report_missing(scores, truth)
    recordings = make_table(scores, truth).assign(score=list(scores.values()))
    known = known_recordings(recordings)
    report_unlabelled(len(recordings) - len(known), len(recordings), form, data_root)
    about = {
        "score files": str(folder),
        "recordings": describe_counts(recordings["condition"]),
        "evaluated with": versions(),
    }
    shown = ShownMetrics(measure(known, find_rule(known)))
    show_metrics(shown, f"Score files of {folder}", about, output)
    print(f"metrics of {len(known)} recordings: {output}")


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
    files: dict[Recording, Path] = {}
    for path in paths:
        machine_type, folder_name, machine_id = parse_file_name(path)
        lines = read_rows(path)
        if not lines:
            raise UserError(f"{path}: no scores in it; add them, or remove the file")
        for number, cells in lines:
            where = f"{path}, line {number}"
            recording, score = parse_line(cells, Path(machine_type, folder_name), where)
            if recording.machine_id != machine_id:
                raise UserError(
                    f"{where}: {cells[0]} is not a recording of {machine_type} {machine_id}; "
                    "correct or remove the line"
                )
            if files.setdefault(recording, path) != path:
                raise UserError(
                    f"{where}: {cells[0]} is in {files[recording].name} too; keep the files of one "
                    "run"
                )
            if recording in scores:
                raise UserError(f"{where}: {cells[0]} appears twice; remove one line")
            scores[recording] = score
    return scores


def parse_file_name(path: Path) -> tuple[str, str, str]:
    """Parse the name of a score file. Returns machine type, folder of the recordings in that of the
    type, and machine ID. Raises `UserError` for other names.
    """
    match = FILE_NAME.fullmatch(path.name)
    if not match or (match["id"] and not is_machine_id(match["id"])):
        raise UserError(f"{path}: not a score file; rename it to {FILE_NAMES}, or remove it")
    machine_id = match["section"] or format_id(match["id"])
    return match["machine_type"], match["folder"] or "test", machine_id


def parse_line(cells: list[str], folder: Path, where: str) -> tuple[Recording, float]:
    """Parse a line of a score file, which is at `where`; `folder` is that of the recordings. Raises
    `UserError` for other lines.
    """
    score = to_number(cells[1]) if len(cells) == 2 else math.nan
    if not math.isfinite(score):
        raise UserError(f"{where}: expected `<file name>,<score>`; correct or remove the line")
    path = folder / Path(cells[0]).name
    try:
        recording = parse_path(path)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if recording is None or path.name != cells[0]:
        raise UserError(
            f"{where}: {cells[0]} is not the name of a recording; correct or remove the line"
        )
    return recording, score


def to_number(text: str) -> float:
    """Convert a text to a number; NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


# ---- What is missing ----


def report_missing(scores: Scores, truth: GroundTruth) -> None:
    """Print a notice of the recordings in the lists that have no score though others of their
    machine have one.
    """
    machines = {recording.machine for recording in scores}
    scored = {(recording.machine_type, recording.path.stem) for recording in scores}
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


def report_unlabelled(n_unlabelled: int, n_recordings: int, form: Form, data_root: Path) -> None:
    """Print a notice of the number of recordings whose condition is not known. Raises `UserError`
    if it is known for none.
    """
    lists = f"{form.lists} under {data_root}"
    message = f"{n_unlabelled} of {n_recordings} recordings are not in {lists}"
    if n_unlabelled == n_recordings:
        raise UserError(f"{message}, so there is nothing to measure; {form.get_lists}")
    if n_unlabelled:
        notice(f"{message} and are left out of the metrics ({form.get_lists})")
