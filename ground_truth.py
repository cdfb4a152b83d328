"""Conditions and domains of evaluation clips, whose names do not say them, from published lists.

In 2020 eval_data_list.csv in data_root has the conditions. For later years the organisers'
evaluator has two lists for each machine type and section: conditions in the folder
ground_truth_data, domains in ground_truth_domain.
"""

from collections.abc import Collection
from pathlib import Path

from errors import UserError
from names import (
    ANOMALOUS,
    GROUND_TRUTH,
    ID_FORM,
    LABEL_LIST,
    NORMAL,
    SOURCE,
    TARGET,
    TEST_FOLDERS,
    UNLABELLED,
    Form,
    Recording,
)
from utils import read_rows

# By (machine type, file name without its ending): condition and domain ("" where not known)
GroundTruth = dict[tuple[str, str], tuple[str, str]]


def read_lists(root: Path, form: Form, recordings: Collection[Recording]) -> GroundTruth:
    """Read the lists under `root` that concern these recordings; empty without lists.

    Raises:
        UserError: If a list is damaged, contradicts the name of a recording, or gives a condition
            for a recording whose domain is unknown.
    """
    if form is ID_FORM:
        conditions = read_label_list(root / LABEL_LIST)
        return {clip: (condition, "") for clip, condition in conditions.items()}
    parts = {(x.machine_type, x.part) for x in recordings if x.condition == UNLABELLED}
    truth: GroundTruth = {}
    for machine_type, part in sorted(parts):
        truth |= read_part(root, form, recordings, machine_type, part)
    return truth


def read_part(
    root: Path, form: Form, recordings: Collection[Recording], machine_type: str, part: str
) -> GroundTruth:
    """Read the two lists of a section, as in ground_truth_<machine type>_section_00_test.csv."""
    data, domains = (
        root / folder / f"ground_truth_{machine_type}_{part}.csv" for folder in GROUND_TRUTH
    )
    named_domains = {x.path.stem: x.domain for x in recordings if x.machine_type == machine_type}
    folder_domain = TEST_FOLDERS[part.split("_", 2)[2]]
    is_target = read_ground_truth(domains, part)
    truth: GroundTruth = {}
    for clip, is_anomalous in read_ground_truth(data, part).items():
        listed = (TARGET if is_target[clip] else SOURCE) if clip in is_target else ""
        named = named_domains.get(clip, "") or folder_domain
        if not (listed or named):
            raise UserError(
                f"{domains} does not give the domain of {clip}, which is listed in {data}; "
                f"{form.get_lists}"
            )
        if listed and named and listed != named:
            raise UserError(
                f"{domains}: {clip} is listed as {listed} domain, but its name or folder says "
                f"{named}; correct the list, or rename or move the recording"
            )
        truth[machine_type, clip] = (ANOMALOUS if is_anomalous else NORMAL), listed
    return truth


def read_ground_truth(path: Path, part: str) -> dict[str, bool]:
    """Read a list of lines `<file name>,<0 or 1>`; empty if there is no such file.

    Returns, by file name without its ending, whether the clip is anomalous, or of the target
    domain. Raises `UserError` for other lines.
    """
    section = "_".join(part.split("_")[:2])
    truth: dict[str, bool] = {}
    for number, cells in read_rows(path):
        where = f"{path}, line {number}"
        if len(cells) != 2 or cells[1] not in ("0", "1"):
            raise UserError(f"{where}: expected `<file name>,<0 or 1>`; correct or remove the line")
        clip = Path(cells[0]).stem
        if not clip.startswith(section):
            raise UserError(
                f"{where}: {cells[0]} is not a recording of {part}; correct or remove the line"
            )
        if clip in truth:
            raise UserError(f"{where}: {cells[0]} appears twice; remove one line")
        truth[clip] = cells[1] == "1"
    return truth


def read_label_list(path: Path) -> dict[tuple[str, str], str]:
    """Read eval_data_list.csv as published; empty if there is no such file.

    A line names a machine type, those after it the clips of the type: `<file name>,<file name with
    the condition>,<0 or 1>`. Returns the conditions by (machine type, file name without its
    ending). Raises `UserError` for other lines.
    """
    conditions: dict[tuple[str, str], str] = {}
    machine_type = ""
    for number, cells in read_rows(path):
        if len(cells) == 1:
            machine_type = cells[0]
        elif len(cells) == 3 and machine_type and cells[2] in ("0", "1"):
            condition = ANOMALOUS if cells[2] == "1" else NORMAL
            conditions[machine_type, Path(cells[0]).stem] = condition
        else:
            raise UserError(
                f"{path}, line {number}: expected `<file name>,<name with the condition>,<0 or "
                "1>`; correct or remove the line"
            )
    return conditions
