"""Score files of any method, as the challenge asks for them: metrics without a network."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from config import name_id, parse_id
from corpus import MACHINE, TEST_FOLDERS, UNLABELLED, File, form_of, known_clips, parse_name, read_csv, read_labels
from evaluation.metrics import find_rule, measure
from evaluation.tables import format_table, report_gaps, write_metrics
from utils import UserError, check_writable, notice, versions

FILE_NAME = re.compile(
    rf"anomaly_score_(?P<machine_type>.+)_(?:id_(?P<id>[^_]+)|section_(?P<section>\d\d)_(?P<folder>{'|'.join(TEST_FOLDERS)}))\.csv"
)
FILE_NAMES = "anomaly_score_<type>_id_<XX>.csv or anomaly_score_<type>_section_<XX>_test.csv"


def evaluate_score_files(folder: Path, data_root: Path) -> None:
    """Measure the scores in a folder, print the metrics and write them there. Conditions and domains are those that the
    names of the clips tell, or else the lists of labels in data_root.
    """
    files, scores = read_score_files(folder)
    check_writable(folder / "metrics.csv", "the metrics are written beside the score files; copy these elsewhere")
    form, clips = form_of(files), label(files, data_root).assign(score=scores)
    known = known_clips(clips)
    if len(known) < len(clips):
        message = f"{len(clips) - len(known)} of {len(clips)} clips are not in {form.labels} under {data_root}"
        if known.empty:
            raise UserError(f"{message}, so there is nothing to measure; {form.get_labels}")
        notice(f"{message} and count in no metric ({form.get_labels})")
    metrics = measure(known, find_rule(known))
    report_gaps(metrics)
    counts = ", ".join(f"{count} {name}" for name, count in clips["condition"].value_counts().items())
    about = {"score files": str(folder), "clips": counts, "evaluated with": versions()}
    write_metrics(metrics, f"Score files of {folder}", about, folder)
    print(format_table(metrics, {}))
    print(f"metrics of {len(known)} clips: {folder}")


def read_score_files(folder: Path) -> tuple[list[File], list[float]]:
    """The clips and their scores. Raises `UserError` for a file of another name, and for lines that are not those of a
    clip of its section.
    """
    paths = sorted(folder.glob("anomaly_score_*.csv"))
    if not paths:
        raise UserError(f"{folder}: no score files ({FILE_NAMES})")
    files, scores = [], []
    for path in paths:
        match = FILE_NAME.fullmatch(path.name)
        if not match:
            raise UserError(f"{path}: not named {FILE_NAMES}")
        machine_id = match["section"] or name_id(parse_id(match["id"]))
        seen = set()
        for number, cells in read_csv(path):
            score = to_number(cells[1]) if len(cells) == 2 else math.nan
            if not math.isfinite(score):
                raise UserError(f"{path}, line {number}: not `<file name>,<score>`")
            clip = Path(match["machine_type"], match["folder"] or "test", cells[0])
            name = parse_name(clip)
            if name is None or name.machine_id != machine_id:
                raise UserError(f"{path}, line {number}: {clip.name} is no clip of {machine_id}")
            if clip in seen:
                raise UserError(f"{path}, line {number}: {clip.name} is given twice")
            seen.add(clip)
            files.append(File(clip, match["machine_type"], name))
            scores.append(score)
    if not files:
        raise UserError(f"{folder}: no scores in the score files")
    return files, scores


def to_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def label(files: Sequence[File], data_root: Path) -> pd.DataFrame:
    """What is known of clips: `path`, `machine_type`, `machine_id`, `domain`, `condition`."""
    labels = read_labels(data_root, form_of(files), files)
    rows = []
    for path, machine_type, name in files:
        assert name
        own = (name.condition, name.domain)
        condition, domain = labels.get((machine_type, path.stem), own) if name.condition == UNLABELLED else own
        rows.append((path, machine_type, name.machine_id, domain, condition))
    return pd.DataFrame(rows, columns=["path", *MACHINE, "domain", "condition"])
