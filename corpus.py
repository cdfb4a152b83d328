"""Which recordings there are, what their names say, and which classes they make.

Recordings (.wav or .flac) lie in data_root under <machine type>/{train,test}. In DCASE 2020 Task 2
they are named

    {normal,anomaly}_id_XX_*.wav
    id_XX_*.wav                 evaluation clips, in <machine type>/evaluation; eval_data_list.csv has their labels

and in 2021 and later, where a section is the ID of a machine,

    section_XX_{source,target}_{train,test}_{normal,anomaly}_XXXX[_<attributes>].wav
    section_XX_XXXX.wav         evaluation clips, in test too; lists in ground_truth_data and ground_truth_domain have
                                their labels

In 2021 the folders source_test and target_test stand for test. `find_clips` lists what the machines
of the configuration ask for, as a table with a row per recording.
"""

import csv
import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from config import AUTO, BY_ATTRIBUTES, Classes, Config, Machines, make_config, name_id, parse_id
from distributed import from_main
from utils import UserError, notice

NORMAL, ANOMALOUS, UNLABELLED = "normal", "anomalous", "unlabelled"  # conditions of a clip
SOURCE, TARGET = "source", "target"  # domains of a clip
MACHINE = ["machine_type", "machine_id"]  # the columns that name a machine
COLUMNS = ["path", *MACHINE, "domain", "label", "condition"]
SPLITS = ("train", "test", "evaluation")
LABEL_LIST = "eval_data_list.csv"
GROUND_TRUTH = "ground_truth_data", "ground_truth_domain"
ONE_CLASS = (
    "training clips of one class only, and the method learns by telling classes apart: bring recordings of more "
    "machines, or, where names have attributes, give --classes attributes"
)
NAMES_SHOWN = 5  # of files that are passed over
Machine = tuple[str, str]  # type and ID as in file names, ("fan", "02")
Labels = dict[
    tuple[str, str], tuple[str, str]
]  # condition and domain of (machine type, file name without its ending)

# ---- Names ----


@dataclass(frozen=True, eq=False)
class Form:
    """How recordings are named, by split: the folders of a machine type that they are in, their
    names as messages show them, and how to get them. `labels` is where the labels of evaluation
    clips are, `get_labels` what to do without.
    """

    folders: Mapping[str, Sequence[str]]
    names: Mapping[str, str]
    get: Mapping[str, str]
    labels: str
    get_labels: str

    @property
    def all_folders(self) -> list[str]:
        return list(
            dict.fromkeys(folder for of_split in self.folders.values() for folder in of_split)
        )


GET_2020 = "`python datasets/download.py{}` fetches {} DCASE 2020 Task 2"
GET_DATA = (
    f"{GET_2020.format('', 'the recordings of')}, `python datasets/synthesize.py` makes a small set"
)
GET_LATER = "docs/years.md names the data of each year"
ID_NAME = re.compile(
    r"(?:(?P<condition>normal|anomaly)_)?id_(?P<machine_id>[^_]+)_.*\.(?:wav|flac)", re.IGNORECASE
)
ID_FORM = Form(
    folders={split: (split,) for split in SPLITS},
    names={
        "train": "normal_id_XX_*.wav",
        "test": "{normal,anomaly}_id_XX_*.wav",
        "evaluation": "id_XX_*.wav",
    },
    get={
        "train": GET_DATA,
        "test": GET_DATA,
        "evaluation": GET_2020.format(" --parts evaluation", "those of"),
    },
    labels=LABEL_LIST,
    get_labels="`python datasets/download.py --parts evaluation` fetches it into data_root",
)
SECTION_NAME = re.compile(
    r"section_(?P<machine_id>\d\d)(?:_(?P<domain>source|target)_(?P<split>train|test)(?:_(?P<condition>normal|anomaly))?)?"
    r"_\d{4}(?P<attributes>(?:_[^_]+)*)\.(?:wav|flac)",
    re.IGNORECASE,
)
TEST_FOLDERS = {
    "test": "",
    "source_test": SOURCE,
    "target_test": TARGET,
}  # with the domain of their clips
SECTION_FORM = Form(
    folders={"train": ("train",), "test": tuple(TEST_FOLDERS), "evaluation": tuple(TEST_FOLDERS)},
    names={
        "train": "section_XX_{source,target}_train_normal_XXXX[_<attributes>].wav",
        "test": "section_XX_{source,target}_test_{normal,anomaly}_XXXX[_<attributes>].wav",
        "evaluation": "section_XX_XXXX.wav",
    },
    get=dict.fromkeys(SPLITS, GET_LATER),
    labels=" and ".join(GROUND_TRUTH),
    get_labels="copy these folders of the organisers' evaluator of that year into data_root",
)
FORMS = (ID_FORM, SECTION_FORM)
FOLDERS = tuple(dict.fromkeys(folder for form in FORMS for folder in form.all_folders))


class ClipName(NamedTuple):
    """What the name of a recording says. The domain is "" where there is none, or it is not told;
    `attributes` are the words after the number, as in "vel_12_loc_G".
    """

    form: Form
    machine_id: str
    condition: str
    domain: str = ""
    attributes: str = ""


class File(NamedTuple):
    path: Path
    machine_type: str
    name: ClipName | None


def parse_name(path: Path) -> ClipName | None:
    """What a recording's name says; None for other files. Raises `UserError` where a name that
    begins as that of a section does not go on as one, or contradicts its folder.
    """
    match = ID_NAME.fullmatch(path.name)
    if match:
        return ClipName(ID_FORM, name_id(parse_id(match["machine_id"])), condition_of(match))
    if not re.fullmatch(r"section_.*\.(wav|flac)", path.name, re.IGNORECASE):
        return None
    match, folder = SECTION_NAME.fullmatch(path.name), path.parent.name
    if not match:
        forms = " or ".join(SECTION_FORM.names.values())
        raise UserError(
            f"{path}: the name begins as that of a section and is not {forms}; rename or remove it"
        )
    domain, of_folder = (match["domain"] or "").lower(), TEST_FOLDERS.get(folder, "")
    attributes = match["attributes"].removeprefix("_")
    domains = {domain, of_folder, *({SOURCE, TARGET} & set(attributes.lower().split("_")))} - {""}
    if len(domains) > 1:
        raise UserError(f"{path}: name and folder speak of two domains; rename, move or remove it")
    if match["split"] and match["split"].lower() != ("test" if folder in TEST_FOLDERS else folder):
        raise UserError(
            f"{path}: named as a clip of {match['split']}, and in the folder {folder}; move or remove it"
        )
    return ClipName(
        SECTION_FORM, match["machine_id"], condition_of(match), domain or of_folder, attributes
    )


def condition_of(match: re.Match[str]) -> str:
    return {"": UNLABELLED, "normal": NORMAL, "anomaly": ANOMALOUS}[
        (match["condition"] or "").lower()
    ]


def part_name(path: Path, machine_id: str) -> str:
    """How the challenge names the clips of an ID that are in one folder, in the names of score
    files: "id_02", or "section_00_test", "section_00_source_test".
    """
    if ID_NAME.fullmatch(path.name):
        return f"id_{machine_id}"
    return f"section_{machine_id}_{path.parent.name}"


def scan(root: Path, types: Sequence[str], split: str) -> tuple[Form, list[File]]:
    """The files of machine types in the folders of a split, ordered by type, folder and name, and
    the form of the names in all folders.

    Raises `UserError` where recordings have different forms, names that cannot be, or lie where
    they do not belong.
    """
    files = [
        File(path, machine_type, parse_name(path))
        for machine_type in types
        for folder in FOLDERS
        if (root / machine_type / folder).is_dir()
        for path in sorted((root / machine_type / folder).iterdir(), key=lambda path: path.name)
    ]
    form = form_of(files)
    check_places(files, form)
    files = [file for file in files if file.path.parent.name in form.folders[split]]
    check_attributes(files)
    return form, files


def check_places(files: Sequence[File], form: Form) -> None:
    """Raise `UserError` for a recording in a folder that its form does not have, or in two of the
    test folders.
    """
    seen: dict[tuple[str, str], Path] = {}
    for path, machine_type, name in files:
        folder = path.parent.name
        if name and folder not in form.all_folders:
            folders = ", ".join(form.all_folders)
            raise UserError(
                f"{path}: recordings that are named like this belong into {folders}; move it"
            )
        if (
            name
            and folder in TEST_FOLDERS
            and seen.setdefault((machine_type, path.name), path) != path
        ):
            raise UserError(
                f"{path} is in {seen[machine_type, path.name].parent} too; remove one of them"
            )


def form_of(files: Sequence[File]) -> Form:
    """The form of the names. Raises `UserError`, naming two of them, where there is more than one."""
    first = {file.name.form: file.path for file in reversed(files) if file.name}
    if len(first) > 1:
        one, other = sorted(first.values())
        raise UserError(
            f"{one} and {other} are named as in different years of the challenge; keep each year in a folder of its own"
        )
    return next(iter(first), ID_FORM)


def check_attributes(files: Sequence[File]) -> None:
    """Raise `UserError` where it is unclear how many attributes a name has: its words are not pairs
    of name and value, nor a single "noAttribute", nor as many as those of the other recordings of
    its section (in 2021 they are no pairs).
    """
    first: dict[tuple[str, str, str], tuple[Path, int, bool]] = {}
    for path, machine_type, name in files:
        if name is None:
            continue
        words = name.attributes.split("_") if name.attributes else []
        is_clear = len(words) % 2 == 0 or words == ["noAttribute"]
        other, count, is_other_clear = first.setdefault(
            (machine_type, path.parent.name, name.machine_id), (path, len(words), is_clear)
        )
        if len(words) != count and not (is_clear and is_other_clear):
            raise UserError(
                f"{path}: its attributes are {len(words)} words and those of {other.name} {count}, which cannot be "
                f"pairs of name and value in both; rename or remove the one that is wrong"
            )


# ---- Classes ----


def name_machines(machines: Machines) -> list[Machine]:
    """The machines of a table, in its order."""
    return [
        (machine_type, name_id(machine_id))
        for machine_type, ids in machines.items()
        for machine_id in ids
    ]


def number_classes(config: Config) -> dict[Machine, dict[str, int]]:
    """For each machine its classes: their numbers, in the order of the tables, by the attributes of
    their recordings. A class without attributes, "", takes all others of its machine.
    """
    numbers, table = itertools.count(), config.classes
    return {
        (machine_type, machine_id): {
            attributes: next(numbers)
            for attributes in (table[machine_type][machine_id] if isinstance(table, dict) else [""])
        }
        for machine_type, machine_id in name_machines(config.machines)
    }


def first_classes(config: Config) -> dict[Machine, int]:
    """For each machine its first class: a score against any of its classes is the score against the
    machine.
    """
    return {machine: next(iter(own.values())) for machine, own in number_classes(config).items()}


def machines_of_classes(config: Config) -> list[Machine]:
    """The machine of each class."""
    return [machine for machine, own in number_classes(config).items() for _ in own]


def alternatives(config: Config) -> np.ndarray:
    """For each class the classes of its machine, itself first `(classes, most)`; a machine of fewer
    has it again.

    The score of a clip is the lowest over them. With `classes: section` there is one: the class
    itself.
    """
    groups = [list(own.values()) for own in number_classes(config).values()]
    most = max(map(len, groups))
    rows = [[label, *(x for x in group if x != label)] for group in groups for label in group]
    return np.array([row + row[:1] * (most - len(row)) for row in rows])


def settle_classes(config: Config) -> Config:
    """The configuration with all machines and classes in tables: for `machines: auto` and `classes:
    attributes`, those of the training recordings, and said.
    """
    if config.machines != AUTO and config.classes != BY_ATTRIBUTES:
        return config
    machines, classes = from_main(lambda: find_classes(Path(config.data_root), config.machines))
    found = {
        "machines": machines,
        **({"classes": classes} if config.classes == BY_ATTRIBUTES else {}),
    }
    settled = make_config(("configuration", config.model_dump()), (config.data_root, found))
    numbers = number_classes(settled)
    if config.machines == AUTO:
        ids = [
            f"{machine_type} {', '.join(map(name_id, ids))}"
            for machine_type, ids in settled.machines.items()
        ]
        notice(
            f"{config.data_root}: {len(numbers)} machine ID{'s' if len(numbers) > 1 else ''}: {'; '.join(ids)}"
        )
    if config.classes == BY_ATTRIBUTES:
        counts = [f"{' '.join(machine)} ({len(own)})" for machine, own in numbers.items()]
        notice(
            f"{config.data_root}: {sum(map(len, numbers.values()))} classes by attributes: {', '.join(counts)}"
        )
    return settled


def find_classes(root: Path, machines: Machines) -> tuple[Machines, Classes]:
    """The machines given, or else those of the training recordings, and the attributes of the
    recordings of each.

    Types are in alphabetical order, IDs that are numbers in their own, attributes too, whatever the
    order on the disk.
    """
    types = list(machines) or training_types(root)
    _, files = scan(root, types, "train")
    attributes: dict[str, dict[str, set[str]]] = {
        machine_type: defaultdict(set) for machine_type in types
    }
    for file in files:
        if file.name and file.name.condition == NORMAL:
            attributes[file.machine_type][file.name.machine_id].add(file.name.attributes)
    if not machines:
        ids = {
            name: sorted(map(parse_id, found), key=lambda x: (isinstance(x, str), x))
            for name, found in attributes.items()
        }
        machines = {machine_type: own for machine_type, own in ids.items() if own}
        names = " or ".join(form.names["train"] for form in FORMS)
        if not machines:
            missing = "no machines found" if root.is_dir() else f"no folder {root}"
            raise UserError(
                f"{missing}: looked for {root}/<machine type>/train/{names}; {GET_DATA}, {GET_LATER}"
            )
        if passed_over := [machine_type for machine_type in types if machine_type not in machines]:
            notice(
                f"{root}: no recordings named {names} in the train folder of {', '.join(passed_over)}"
            )
    classes = {
        machine_type: {
            name_id(x): sorted(attributes[machine_type][name_id(x)]) or [""] for x in ids
        }
        for machine_type, ids in machines.items()
    }
    return machines, classes


def training_types(root: Path) -> list[str]:
    folders = [
        path for path in (root.iterdir() if root.is_dir() else ()) if not path.name.startswith(".")
    ]
    types = [path.name for path in folders if (path / "train").is_dir()]
    return sorted(types, key=lambda name: (name.casefold(), name))


# ---- The recordings of a split ----


def find_clips(config: Config, split: str) -> pd.DataFrame:
    """The recordings of a split, ordered by type, folder and file name: "train" (normal only),
    "test" (normal and anomalous), or "evaluation" (the file's name does not tell; the lists of
    labels do, where there are any).

    Columns: `path`, `machine_type`, `machine_id` ("02", read from the file name), `domain` (SOURCE,
    TARGET or ""), `label` (the class; in other splits than "train" the first one of the machine),
    `condition` (NORMAL, ANOMALOUS or UNLABELLED). Notices report what is passed over and what is
    missing. Raises `UserError` where there is nothing to read: for training any missing folder of a
    machine type, otherwise only if all are.
    """
    root, classes = Path(config.data_root), number_classes(config)
    form, files = scan(root, list(config.machines), split)
    place, remedy = form.folders[split][0], form.get[split]
    looked_for = f"{root}/<machine type>/{place}/{form.names[split]}"
    absent = [
        x
        for x in config.machines
        if not any((root / x / folder).is_dir() for folder in form.folders[split])
    ]
    if absent and (split == "train" or len(absent) == len(config.machines)):
        folder = root / absent[0] / place if root.is_dir() else root
        others = (
            ", --machines other machine types (auto: those that are there)"
            if split == "train"
            else ""
        )
        raise UserError(
            f"no folder {folder} (looked for {looked_for}); {remedy}; --data_root names another folder{others}"
        )
    labels = read_labels(root, form, files) if split == "evaluation" else {}
    rows: list[tuple] = []
    skipped: dict[str, list[str]] = defaultdict(list)
    for file in files:
        row = make_row(file, form, split, classes, labels)
        if isinstance(row, str):
            skipped[row].append(file.path.name)
        elif row:
            rows.append(row)
    if not rows:
        other = "evaluation" if split == "test" else "test"
        is_other = split != "train" and any(
            isinstance(make_row(file, form, other, classes, {}), tuple) for file in files
        )
        hint = f"what is there is for --split {other}" if is_other else remedy
        raise UserError(f"no clips found: looked for {looked_for} of the IDs in machines; {hint}")
    clips = pd.DataFrame(rows, columns=COLUMNS, dtype=object)
    if split == "train" and clips["label"].nunique() < 2:
        raise UserError(f"{root}: {ONE_CLASS}")
    report_skipped(f"{root}, {split}", skipped)
    if absent:
        notice(f"{root}: no {place} folder for {', '.join(absent)}")
    present = set(zip(clips["machine_type"], clips["machine_id"], strict=True))
    missing = [
        " ".join(machine)
        for machine in classes
        if machine not in present and machine[0] not in absent
    ]
    if missing:
        notice(
            f"{root}, {split}: {len(missing)} of {len(classes)} machine IDs have no clips: {', '.join(missing)}"
        )
    return clips


def make_row(
    file: File, form: Form, split: str, classes: Mapping[Machine, Mapping[str, int]], labels: Labels
) -> tuple | str | None:
    """The row of a file in the table of a split, or why it is skipped; None where it is of another
    split.
    """
    path, machine_type, name = file
    if name is None or (name.condition == UNLABELLED) != (split == "evaluation"):
        is_of_other_split = name is not None and form is SECTION_FORM and split != "train"
        return None if is_of_other_split else f"not named {form.names[split]} or .flac"
    own = classes.get((machine_type, name.machine_id))
    if not own:
        return "of IDs outside the table of machines"
    condition, domain = label_of(file, labels)
    if split == "train" and condition == ANOMALOUS:
        return "named anomaly: training takes normal ones only"
    if split == "train" and not {name.attributes, ""} & set(own):
        return "with attributes outside the table of classes"
    first = next(iter(own.values()))
    label = own.get(name.attributes, own.get("", first)) if split == "train" else first
    return path, machine_type, name.machine_id, domain, label, condition


def label_of(file: File, labels: Labels) -> tuple[str, str]:
    """Condition and domain of a recording: those that its name tells, or else the lists."""
    path, machine_type, name = file
    assert name
    condition, domain = labels.get((machine_type, path.stem), (UNLABELLED, ""))
    return (condition if name.condition == UNLABELLED else name.condition), name.domain or domain


def report_skipped(where: str, skipped: Mapping[str, Sequence[str]]) -> None:
    for what, names in skipped.items():
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        count = f"{len(names)} file{'s' if len(names) > 1 else ''}"
        notice(f"{where}: skipped {count} {what}: {', '.join(names[:NAMES_SHOWN])}{more}")


def known_clips(clips: pd.DataFrame) -> pd.DataFrame:
    """The clips whose condition is known."""
    return clips[clips["condition"] != UNLABELLED]


def read_labels(root: Path, form: Form, files: Sequence[File]) -> Labels:
    """Those of evaluation clips, as far as there are lists of them. Raises `UserError` where a list
    tells the condition of a clip, and nothing its domain, or name and list contradict each other.
    """
    if form is ID_FORM:
        return {
            clip: (condition, "") for clip, condition in read_label_list(root / LABEL_LIST).items()
        }
    named = {(file.machine_type, file.path.stem): file.name.domain for file in files if file.name}
    parts = {
        (file.machine_type, part_name(file.path, file.name.machine_id))
        for file in files
        if file.name and file.name.condition == UNLABELLED
    }
    labels: Labels = {}
    for machine_type, part in sorted(parts):
        data, domains = (
            root / folder / f"ground_truth_{machine_type}_{part}.csv" for folder in GROUND_TRUTH
        )
        is_target = read_ground_truth(domains, part)
        for name, is_anomalous in read_ground_truth(data, part).items():
            told = (TARGET if is_target[name] else SOURCE) if name in is_target else ""
            of_name = named.get((machine_type, name), "") or TEST_FOLDERS[part.split("_", 2)[2]]
            if not (told or of_name):
                raise UserError(
                    f"{domains} does not tell the domain of {name}, which is in {data}; {form.get_labels}"
                )
            if told and of_name and told != of_name:
                raise UserError(
                    f"{domains}: {name} is of the {told} domain, and its name or folder says {of_name}"
                )
            labels[machine_type, name] = (ANOMALOUS if is_anomalous else NORMAL), told
    return labels


def read_ground_truth(path: Path, part: str) -> dict[str, bool]:
    """What a list of the organisers says of each clip, by file name without its ending: whether it
    is anomalous, or of the target domain. Its lines are `<file name>,<0 or 1>`; empty without a
    list. Raises `UserError` for other lines.
    """
    truth: dict[str, bool] = {}
    for number, cells in read_csv(path):
        if len(cells) != 2 or cells[1] not in ("0", "1"):
            raise UserError(f"{path}, line {number}: not `<file name>,<0 or 1>`")
        name = Path(cells[0]).stem
        if not name.startswith("_".join(part.split("_")[:2])):
            raise UserError(f"{path}, line {number}: {cells[0]} is no clip of {part}")
        if name in truth:
            raise UserError(f"{path}, line {number}: {cells[0]} is given twice")
        truth[name] = cells[1] == "1"
    return truth


def read_label_list(path: Path) -> dict[tuple[str, str], str]:
    """The condition of the evaluation clip of (machine type, file name without its ending); empty
    without a list.

    The list, published as eval_data_list.csv, names a machine type on a line of its own and then
    its clips: `<file name>,<file name with the condition>,<0 or 1>`. Raises `UserError` for any
    other line.
    """
    conditions: dict[tuple[str, str], str] = {}
    machine_type = ""
    for number, cells in read_csv(path):
        if len(cells) == 1:
            machine_type = cells[0]
        elif len(cells) == 3 and machine_type and cells[2] in ("0", "1"):
            conditions[machine_type, Path(cells[0]).stem] = ANOMALOUS if cells[2] == "1" else NORMAL
        else:
            raise UserError(
                f"{path}, line {number}: not `<file name>,<name with the condition>,<0 or 1>`"
            )
    return conditions


def read_csv(path: Path) -> list[tuple[int, list[str]]]:
    """The lines of a list of labels or scores, each with its number and cells; none if there is no
    such file.
    """
    try:
        rows = list(
            csv.reader(path.read_text(encoding="utf-8-sig").splitlines())
        )  # Excel writes a mark at the start
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, csv.Error):
        raise UserError(
            f"{path}: not a list of labels or scores; remove it, or bring the right one"
        ) from None
    return [
        (number, [cell.strip() for cell in row]) for number, row in enumerate(rows, start=1) if row
    ]
