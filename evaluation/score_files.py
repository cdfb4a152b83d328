"""Score files of any method, as the challenge asks for them: metrics without a network."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from config import MACHINE_ID, name_id, parse_id
from corpus import (
    MACHINE,
    TEST_FOLDERS,
    File,
    Labels,
    form_of,
    known_clips,
    label_of,
    parse_name,
    read_csv,
    read_labels,
)
from evaluation.metrics import AVERAGE, find_rule, measure
from evaluation.tables import show_metrics
from utils import UserError, check_writable, notice, versions

FILE_NAME = re.compile(
    rf"anomaly_score_(?P<machine_type>(?!{AVERAGE}_).+)_"
    rf"(?:id_(?P<id>[^_]+)|section_(?P<section>\d\d)_(?P<folder>{'|'.join(TEST_FOLDERS)}))\.csv"
)
FILE_NAMES = "anomaly_score_<type>_id_<XX>.csv or anomaly_score_<type>_section_<XX>_test.csv"


def evaluate_score_files(folder: Path, data_root: Path) -> None:
    """Measure the scores in a folder, print the metrics and write them into its folder `metrics`.
    Conditions and domains are those that the names of the clips tell, or else the lists of labels
    in data_root.
    """
    files, scores = read_score_files(folder)
    form, output = form_of(files), folder / "metrics"
    check_writable(
        output / "metrics.csv",
        "the metrics are written beside the score files; copy these elsewhere",
    )
    labels = read_labels(data_root, form, files)
    report_missing(files, labels)
    rows = [
        (file.path, file.machine_type, file.name.machine_id, *label_of(file, labels))
        for file in files
        if file.name
    ]
    clips = pd.DataFrame(rows, columns=["path", *MACHINE, "condition", "domain"]).assign(
        score=scores
    )
    known = known_clips(clips)
    if len(known) < len(clips):
        message = f"{len(clips) - len(known)} of {len(clips)} clips are not in {form.labels} under {data_root}"
        if known.empty:
            raise UserError(f"{message}, so there is nothing to measure; {form.get_labels}")
        notice(f"{message} and count in no metric ({form.get_labels})")
    counts = ", ".join(
        f"{count} {name}" for name, count in clips["condition"].value_counts().items()
    )
    about = {"score files": str(folder), "clips": counts, "evaluated with": versions()}
    show_metrics(measure(known, find_rule(known)), f"Score files of {folder}", about, output, {})
    print(f"metrics of {len(known)} clips: {output}")


def read_score_files(folder: Path) -> tuple[list[File], list[float]]:
    """The clips and their scores. Raises `UserError` for a file of another name or without scores,
    and for lines that are not those of a clip of its section.
    """
    paths = sorted(folder.glob("anomaly_score_*.csv"))
    if not paths:
        raise UserError(f"{folder}: no score files ({FILE_NAMES})")
    files: dict[Path, File] = {}
    scores = []
    for path in paths:
        match = FILE_NAME.fullmatch(path.name)
        if not match or (match["id"] and not re.fullmatch(MACHINE_ID, match["id"])):
            raise UserError(f"{path}: not named {FILE_NAMES}, or named like a row of the table")
        machine_id = match["section"] or name_id(parse_id(match["id"]))
        lines = read_csv(path)
        if not lines:
            raise UserError(f"{path}: no scores in it; bring them, or remove the file")
        for number, cells in lines:
            where, score = (
                f"{path}, line {number}",
                to_number(cells[1]) if len(cells) == 2 else math.nan,
            )
            if not math.isfinite(score):
                raise UserError(f"{where}: not `<file name>,<score>`")
            clip = Path(match["machine_type"], match["folder"] or "test", Path(cells[0]).name)
            try:
                name = parse_name(clip)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            if name is None or name.machine_id != machine_id or clip.name != cells[0]:
                raise UserError(f"{where}: {cells[0]} is no clip of {machine_id}")
            if clip in files:
                raise UserError(f"{where}: {clip.name} is given twice")
            files[clip] = File(clip, match["machine_type"], name)
            scores.append(score)
    return list(files.values()), scores


def to_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def report_missing(files: Sequence[File], labels: Labels) -> None:
    """Say which clips of the lists, of machines that there are scores of, have no score."""
    machines = {(file.machine_type, file.name.machine_id) for file in files if file.name}
    scored = {(file.machine_type, file.path.stem) for file in files}
    listed = [
        clip
        for clip in labels
        if (clip[0], clip[1].split("_")[1]) in machines and clip not in scored
    ]
    if listed:
        notice(
            f"{len(listed)} clips of the lists have no score and count in no metric, such as {' '.join(listed[0])}"
        )
