"""The recordings in data_root: which classes they make, and the table with a row for each."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from classes import Classes, MachineClass
from config import Config
from errors import UserError
from ground_truth import GroundTruth, read_lists
from names import (
    ANOMALOUS,
    FORMS,
    GET_DATA,
    GET_LATER,
    ID_FORM,
    MACHINE_TYPE,
    NORMAL,
    UNLABELLED,
    Form,
    Recording,
    format_id,
    is_machine_id,
    list_files,
)
from utils import notice

MACHINE_COLUMNS = ["machine_type", "machine_id"]
COLUMNS = ["path", *MACHINE_COLUMNS, "attributes", "domain", "condition", "part"]
ONE_CLASS = (
    "all training recordings are of one class, but the method learns by telling classes apart; add "
    "recordings of more machines or, if file names have attributes, use --classes attributes; one "
    "machine alone can be scored without training: score.py --normal FOLDER"
)
NAMES_SHOWN = 5  # of files that are skipped

# ---- The classes ----


def find_classes(config: Config) -> Classes:
    """Return the classes to train. The machines are those of the configuration, or those of the
    training folders (`machines: auto`). Each is a class or, with `classes: attributes`, has a class
    for each set of attributes in the names of its training recordings.

    Machine types from folders are in alphabetical order, IDs that are numbers in numerical order,
    attributes in alphabetical order. A notice says what was found in the folders.
    """
    root = Path(config.data_root)
    if isinstance(config.machines, dict):
        machines = config.machines
        recordings = list_normal(root, list(machines)) if config.classes == "attributes" else []
    else:
        types = find_types(root)
        report_deeper_types(root, types)
        recordings = list_normal(root, types)
        machines = find_machines(root, types, recordings)
        count = sum(map(len, machines.values()))
        shown = Classes.from_machines(machines).describe_machines()
        notice(f"{root}: {count} machine ID{'s' if count > 1 else ''}: {shown}")
    if config.classes == "section":
        return Classes.from_machines(machines)
    classes = divide_by_attributes(machines, recordings)
    notice(f"{root}: {len(classes)} classes by attributes: {classes.describe_counts()}")
    return classes


def find_types(root: Path) -> list[str]:
    """Return the folders of `root` that have a folder train, in alphabetical order."""
    folders = root.iterdir() if root.is_dir() else ()
    types = [path.name for path in folders if (path / "train").is_dir() and path.name[0] != "."]
    return sorted(types, key=lambda name: (name.casefold(), name))


def report_deeper_types(root: Path, types: Sequence[str]) -> None:
    """Print a notice of folders of machine types that lie one folder too deep."""
    deeper = []
    for folder in sorted(root.glob("*/*/train")):
        parent = folder.parents[1]
        if folder.is_dir() and parent.name not in types and not parent.name.startswith("."):
            deeper.append(str(folder.parent))
    if deeper:
        notice(
            f"{root}: passed over {', '.join(deeper)}, one folder too deep; move them into {root}, "
            f"or set --data_root to the folder that they are in"
        )


def list_normal(root: Path, types: Sequence[str]) -> list[Recording]:
    """List the normal training recordings of machine types."""
    _, recordings, _ = list_files(root, types, "train")
    return [recording for recording in recordings if recording.condition == NORMAL]


def find_machines(
    root: Path, types: Sequence[str], recordings: Sequence[Recording]
) -> dict[str, list[str]]:
    """Return the machine IDs of recordings by type. Raises `UserError` if there are none."""
    ids: dict[str, set[str]] = defaultdict(set)
    for recording in recordings:
        ids[recording.machine_type].add(recording.machine_id)
    machines = {name: sorted(ids[name], key=sort_key) for name in types if name in ids}
    for machine_type in machines:
        check_names(root, machine_type, machines[machine_type])
    names = " or ".join(form.names["train"] for form in FORMS)
    if not machines:
        missing = "no machines found" if root.is_dir() else f"no folder {root}"
        raise UserError(
            f"{missing}: looked for {root}/<machine type>/train/{names}; {GET_DATA}, {GET_LATER}"
        )
    without = [machine_type for machine_type in types if machine_type not in machines]
    if without:
        notice(f"{root}: no recordings named {names} in the train folder of {', '.join(without)}")
    return machines


def sort_key(machine_id: str) -> tuple[bool, int, str]:
    """Sort numbers before words, numbers by their value."""
    is_number = format_id(machine_id) == machine_id and machine_id.isdecimal()
    return not is_number, int(machine_id) if is_number else 0, machine_id


def check_names(root: Path, machine_type: str, ids: Sequence[str]) -> None:
    """Raise `UserError` for a name that is that of another row of the results, or has characters
    that no name can have.
    """
    if not re.fullmatch(MACHINE_TYPE, machine_type):
        raise UserError(
            f"{root}/{machine_type}: a machine type cannot have this name, which is reserved or "
            "invalid; rename it"
        )
    for machine_id in ids:
        if not is_machine_id(machine_id):
            raise UserError(
                f"{root}/{machine_type}/train: a machine ID cannot be named {machine_id}, which is "
                "reserved or invalid; rename its recordings"
            )


def divide_by_attributes(
    machines: Mapping[str, Sequence[str]], recordings: Sequence[Recording]
) -> Classes:
    """Return a class for each set of attributes of each machine; one without attributes for a
    machine without recordings.
    """
    attributes: dict[tuple[str, str], set[str]] = defaultdict(set)
    for recording in recordings:
        attributes[recording.machine].add(recording.attributes)
    entries: list[MachineClass] = []
    for machine in Classes.from_machines(machines).machines:
        names = sorted(attributes[machine]) or [""]
        entries += [MachineClass(*machine, name) for name in names]
    return Classes(tuple(entries))


# ---- The table ----


def find_recordings(config: Config, classes: Classes, split: str) -> pd.DataFrame:
    """List the recordings of the machines of `classes` in a split: "train" (normal ones), "test"
    (normal and anomalous ones), or "evaluation" (whose conditions come from published lists).

    Returns:
        A row for each recording, by machine type, folder and file name: `path`, `machine_type`,
        `machine_id`, `attributes`, `domain`, `condition` and `part` as in `names.Recording`; for
        "train" also `label`, the number of the class. Notices say what is skipped or missing.

    Raises:
        UserError: If there are no recordings; for "train" also if the folder of a machine type is
            missing, or if there is only one class.
    """
    root = Path(config.data_root)
    form, recordings, others = list_files(root, classes.machine_types, split)
    absent = find_absent_types(root, classes, form, split)
    truth = read_lists(root, form, recordings) if split == "evaluation" else {}
    chosen: list[Recording] = []
    skipped: dict[str, list[str]] = defaultdict(list)
    for path in others:
        skipped[reason_for_name(form, split)].append(path.name)
    for recording in recordings:
        reason = reason_to_skip(recording, split, classes)
        if reason is None:
            chosen.append(recording)
        elif split == "train" or form is ID_FORM or is_of_split(recording, split):
            skipped[reason].append(recording.path.name)
    if not chosen:
        raise UserError(explain_nothing(root, form, recordings, split, classes))
    table = make_table(chosen, truth)
    if split == "train":
        table["label"] = [classes.of_recording(x.machine, x.attributes) for x in chosen]
        if table["label"].nunique() == 1:
            raise UserError(f"{root}: {ONE_CLASS}")
    report_skipped(f"{root}, {split}", skipped)
    if absent:
        notice(f"{root}: no {form.folders[split][0]} folder for {', '.join(absent)}")
    report_missing_machines(root, table, classes, split, absent)
    report_unlabelled(table, form)
    return table


def make_table(recordings: Iterable[Recording], truth: GroundTruth) -> pd.DataFrame:
    """Return the table of recordings. Conditions and domains come from their names, or else from
    the lists.
    """
    rows = []
    for recording in recordings:
        key = recording.machine_type, recording.path.stem
        condition, domain = truth.get(key, (UNLABELLED, ""))
        if recording.condition != UNLABELLED:
            condition = recording.condition
        rows.append(recording._replace(condition=condition, domain=recording.domain or domain))
    return pd.DataFrame(rows, columns=Recording._fields, dtype=object)[COLUMNS]


def reason_to_skip(recording: Recording, split: str, classes: Classes) -> str | None:
    """Return why a recording is not used for a split, as in "skipped 2 files <reason>"; None if it
    is.
    """
    if not is_of_split(recording, split):
        return reason_for_name(recording.form, split)
    if recording.machine not in classes.machines:
        return "whose machine ID is not in machines"
    if split != "train":
        return None
    if recording.condition == ANOMALOUS:
        return "named anomaly (training uses normal recordings only)"
    if classes.of_recording(recording.machine, recording.attributes) is None:
        return "whose attributes belong to no class"
    return None


def is_of_split(recording: Recording, split: str) -> bool:
    """Whether the name is one of the split: only evaluation clips are named without condition."""
    return (recording.condition == UNLABELLED) == (split == "evaluation")


def reason_for_name(form: Form, split: str) -> str:
    return f"not named {form.names[split]} or .flac"


def known_recordings(recordings: pd.DataFrame) -> pd.DataFrame:
    """Return the recordings whose condition is known."""
    return recordings[recordings["condition"] != UNLABELLED]


# ---- What is missing ----


def find_absent_types(root: Path, classes: Classes, form: Form, split: str) -> list[str]:
    """Return the machine types without a folder of the split.

    Raises `UserError` if there are such types in "train", or if all are such types.
    """
    absent = []
    for machine_type in classes.machine_types:
        folders = [root / machine_type / folder for folder in form.folders[split]]
        if not any(folder.is_dir() for folder in folders):
            absent.append(machine_type)
    if absent and (split == "train" or len(absent) == len(classes.machine_types)):
        place = root / absent[0] / form.folders[split][0] if root.is_dir() else root
        others = ", or choose other machine types with --machines (auto: those in the folders)"
        raise UserError(
            f"no folder {place} (looked for {describe_place(root, form, split)}); "
            f"{form.get_data[split]}; --data_root names another "
            f"folder{others if split == 'train' else ''}"
        )
    return absent


def describe_place(root: Path, form: Form, split: str) -> str:
    return f"{root}/<machine type>/{form.folders[split][0]}/{form.names[split]}"


def explain_nothing(
    root: Path, form: Form, recordings: Sequence[Recording], split: str, classes: Classes
) -> str:
    """Return the message for a split without recordings."""
    hint = form.get_data[split]
    if split != "train":
        other = "evaluation" if split == "test" else "test"
        if any(reason_to_skip(recording, other, classes) is None for recording in recordings):
            hint = f"the recordings in these folders are for --split {other}"
    place = describe_place(root, form, split)
    return f"no recordings found: looked for {place} with the IDs in machines; {hint}"


def report_skipped(where: str, skipped: Mapping[str, Sequence[str]]) -> None:
    for reason, names in skipped.items():
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        count = f"{len(names)} file{'s' if len(names) > 1 else ''}"
        notice(f"{where}: skipped {count} {reason}: {', '.join(names[:NAMES_SHOWN])}{more}")


def report_missing_machines(
    root: Path, table: pd.DataFrame, classes: Classes, split: str, absent: Sequence[str]
) -> None:
    """Print a notice of the machines without recordings, except for types without a folder."""
    present = set(zip(table["machine_type"], table["machine_id"], strict=True))
    missing = [
        " ".join(machine)
        for machine in classes.machines
        if machine not in present and machine[0] not in absent
    ]
    if missing:
        notice(
            f"{root}, {split}: {len(missing)} of {len(classes.machines)} machine IDs have no "
            f"recordings: {', '.join(missing)}"
        )


def report_unlabelled(table: pd.DataFrame, form: Form) -> None:
    """Print a notice of the number of recordings whose condition is not known."""
    unlabelled = len(table) - len(known_recordings(table))
    if unlabelled:
        notice(
            f"{unlabelled} of {len(table)} recordings are not listed in {form.lists} and are left "
            f"out of the metrics ({form.get_lists})"
        )
