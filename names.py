"""The names of recordings in all years of DCASE Task 2, and the files that have them.

Recordings (.wav or .flac) lie in data_root under <machine type>/{train,test}. In 2020 they are
named

    {normal,anomaly}_id_XX_*.wav
    id_XX_*.wav                 evaluation clips, in <machine type>/evaluation

and in 2021 and later, where a section is the ID of a machine,

    section_XX_{source,target}_{train,test}_{normal,anomaly}_XXXX[_<attributes>].wav
    section_XX_XXXX.wav         evaluation clips, in test too

In 2021 the folders source_test and target_test stand for test.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from errors import UserError

NORMAL, ANOMALOUS, UNLABELLED = "normal", "anomalous", "unlabelled"  # conditions of a recording
SOURCE, TARGET = "source", "target"  # domains of a recording
SPLITS = ("train", "test", "evaluation")
TEST_FOLDERS = {"test": "", "source_test": SOURCE, "target_test": TARGET}  # and their domains
LABEL_LIST = "eval_data_list.csv"
GROUND_TRUTH = "ground_truth_data", "ground_truth_domain"

# ---- Machine types and IDs ----

# Rows of the results, whose names no machine type or ID may have
AVERAGE = "average"  # in place of a machine type: all machine types
POOLED, MEAN, MIN, HMEAN = SUMMARY_ROWS = ("pooled", "mean", "min", "hmean")  # of an ID
# A folder name that is not that row
MACHINE_TYPE = rf"^(?!({AVERAGE}|\.{{1,2}})$)[^/\\\x00-\x1f\x7f]+$"


def format_id(machine_id: int | str) -> str:
    """Format a machine ID for file names and outputs: a number of up to nine digits is padded to
    two digits ("02"), other text is unchanged.
    """
    text = str(machine_id)
    return f"{int(text):02d}" if re.fullmatch("[0-9]{1,9}", text) else text


def is_machine_id(text: str) -> bool:
    """Whether a text can be a machine ID: part of a file name, and not a row of the results."""
    return text not in SUMMARY_ROWS and bool(re.fullmatch(r"[^_/\\\x00-\x1f\x7f]+", text))


# ---- The two forms of names ----


@dataclass(frozen=True, eq=False)
class Form:
    """A way in which recordings are named.

    Attributes:
        folders: By split, the folders of a machine type that hold the recordings.
        names: By split, the names of the recordings, as messages show them.
        get_data: By split, how to get the recordings, as a clause of a message.
        lists: The lists that say which evaluation clips are anomalous.
        get_lists: How to get these lists.
    """

    folders: Mapping[str, Sequence[str]]
    names: Mapping[str, str]
    get_data: Mapping[str, str]
    lists: str
    get_lists: str

    @property
    def all_folders(self) -> list[str]:
        folders = [folder for split in SPLITS for folder in self.folders[split]]
        return list(dict.fromkeys(folders))


GET_2020 = "`python datasets/download.py{}` fetches {} DCASE 2020 Task 2"
GET_DATA = (
    f"{GET_2020.format('', 'the recordings of')}, `python datasets/synthesize.py` makes a small set"
)
GET_LATER = "docs/years.md lists the data of each year"

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
    get_data={
        "train": GET_DATA,
        "test": GET_DATA,
        "evaluation": GET_2020.format(" --parts evaluation", "the evaluation clips of"),
    },
    lists=LABEL_LIST,
    get_lists=(
        "`python datasets/download.py --parts evaluation --output DATA_ROOT` fetches it into the "
        "folder DATA_ROOT"
    ),
)

SECTION_NAME = re.compile(
    r"section_(?P<machine_id>\d\d)"
    r"(?:_(?P<domain>source|target)_(?P<split>train|test)(?:_(?P<condition>normal|anomaly))?)?"
    r"_\d{4}(?P<attributes>(?:_[^_]+)*)\.(?:wav|flac)",
    re.IGNORECASE,
)
SECTION_FORM = Form(
    folders={"train": ("train",), "test": tuple(TEST_FOLDERS), "evaluation": tuple(TEST_FOLDERS)},
    names={
        "train": "section_XX_{source,target}_train_normal_XXXX[_<attributes>].wav",
        "test": "section_XX_{source,target}_test_{normal,anomaly}_XXXX[_<attributes>].wav",
        "evaluation": "section_XX_XXXX.wav",
    },
    get_data=dict.fromkeys(SPLITS, GET_LATER),
    lists=" and ".join(GROUND_TRUTH),
    get_lists="copy these folders of the organisers' evaluator of that year into data_root",
)
FORMS = (ID_FORM, SECTION_FORM)
FOLDERS = tuple(dict.fromkeys(folder for form in FORMS for folder in form.all_folders))

# ---- One name ----


class Recording(NamedTuple):
    """A recording, as its path describes it.

    Attributes:
        path: The file, <data_root>/<machine type>/<folder>/<name>.
        form: The form of the name.
        machine_type: The machine type.
        machine_id: The machine ID, as in "02".
        condition: NORMAL, ANOMALOUS or UNLABELLED.
        part: The group of the recording in the names of score files: "id_02" in 2020, later
            "section_00_test", "section_00_source_test" or "section_00_target_test".
        domain: SOURCE, TARGET or, if it is unknown, "".
        attributes: The words after the number, as in "vel_12_loc_G".
    """

    path: Path
    form: Form
    machine_type: str
    machine_id: str
    condition: str
    part: str
    domain: str = ""
    attributes: str = ""

    @property
    def machine(self) -> tuple[str, str]:
        return self.machine_type, self.machine_id

    @property
    def folder(self) -> str:
        return self.path.parent.name


def parse_path(path: Path) -> Recording | None:
    """Parse the path of a recording; None for other files.

    Raises:
        UserError: If the name begins as that of a section and does not continue as one, or
            contradicts the folder it is in.
    """
    folder, machine_type = path.parent.name, path.parent.parent.name
    match = ID_NAME.fullmatch(path.name)
    if match:
        machine_id = format_id(match["machine_id"])
        condition = parse_condition(match)
        return Recording(path, ID_FORM, machine_type, machine_id, condition, f"id_{machine_id}")
    if not re.fullmatch(r"section_.*\.(wav|flac)", path.name, re.IGNORECASE):
        return None
    match = SECTION_NAME.fullmatch(path.name)
    if not match:
        names = " or ".join(SECTION_FORM.names.values())
        raise UserError(
            f"{path}: the name starts with section_ but does not have the form {names}; rename or "
            "remove it"
        )
    check_split(path, match)
    machine_id, attributes = match["machine_id"], match["attributes"].removeprefix("_")
    return Recording(
        path,
        SECTION_FORM,
        machine_type,
        machine_id,
        parse_condition(match),
        part=f"section_{machine_id}_{folder}",
        domain=find_domain(path, match, attributes),
        attributes=attributes,
    )


def parse_name(name: str) -> tuple[str, str] | None:
    """Return machine ID and condition that the name of a file says; None if it says none."""
    match = ID_NAME.fullmatch(name) or SECTION_NAME.fullmatch(name)
    return (format_id(match["machine_id"]), parse_condition(match)) if match else None


def parse_condition(match: re.Match[str]) -> str:
    word = (match["condition"] or "").lower()
    return {"": UNLABELLED, "normal": NORMAL, "anomaly": ANOMALOUS}[word]


def find_domain(path: Path, match: re.Match[str], attributes: str) -> str:
    """Return the domain that the name of a section or its folder says; "" if neither does."""
    from_name = (match["domain"] or "").lower()
    from_folder = TEST_FOLDERS.get(path.parent.name, "")
    from_attributes = {SOURCE, TARGET} & set(attributes.lower().split("_"))
    if len({from_name, from_folder, *from_attributes} - {""}) > 1:
        raise UserError(
            f"{path}: its name and folder contain both source and target; rename, move or remove it"
        )
    return from_name or from_folder


def check_split(path: Path, match: re.Match[str]) -> None:
    """Raise `UserError` where the name of a section says another split than its folder."""
    folder = path.parent.name
    expected = "test" if folder in TEST_FOLDERS else folder
    if match["split"] and match["split"].lower() != expected:
        raise UserError(
            f"{path}: its name says {match['split']}, but it is in the folder {folder}; move or "
            "remove it"
        )


# ---- The files of a folder ----


def list_files(
    root: Path, types: Sequence[str], split: str
) -> tuple[Form, list[Recording], list[Path]]:
    """List the files of machine types in the folders of a split, by type, folder and name.

    Returns the form of the names in all folders, the recordings, and the other files.

    Raises:
        UserError: If recordings have different forms, contradictory names, or are in the wrong
            folder.
    """
    recordings: list[Recording] = []
    others: list[Path] = []
    for machine_type in types:
        for folder in FOLDERS:
            for path in list_folder(root / machine_type / folder):
                recording = parse_path(path)
                if recording:
                    recordings.append(recording)
                else:
                    others.append(path)
    form = find_form(recordings)
    check_folders(recordings, form)
    folders = form.folders[split]
    recordings = [recording for recording in recordings if recording.folder in folders]
    check_copies([recording.path for recording in recordings])
    check_attributes(recordings)
    return form, recordings, [path for path in others if path.parent.name in folders]


def list_folder(folder: Path) -> list[Path]:
    """Return the files of a folder by name; none if there is no such folder. Hidden files, as macOS
    puts them beside others on foreign disks, are no recordings.
    """
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return sorted(paths, key=lambda path: path.name)


def list_audio(folder: Path) -> list[Path]:
    """Return the WAV and FLAC files among the files of a folder from `list_folder`."""
    return [path for path in list_folder(folder) if is_audio(path)]


def is_audio(path: Path) -> bool:
    """Whether a file is named as a WAV or FLAC file."""
    return path.suffix.lower() in (".wav", ".flac")


def find_form(recordings: Iterable[Recording]) -> Form:
    """Return the form of the names. Raises `UserError`, naming two files, if there are two."""
    examples: dict[Form, Path] = {}
    for recording in recordings:
        examples.setdefault(recording.form, recording.path)
    if len(examples) > 1:
        one, other = sorted(examples.values())
        raise UserError(
            f"{one} and {other} follow the naming of different years of the challenge; keep each "
            "year in a separate folder"
        )
    return next(iter(examples), ID_FORM)


def check_folders(recordings: Sequence[Recording], form: Form) -> None:
    """Raise `UserError` for a recording in a folder that its form does not have, or in two of the
    test folders.
    """
    test_paths: dict[tuple[str, str], Path] = {}
    for recording in recordings:
        path, folder = recording.path, recording.folder
        if folder not in form.all_folders:
            folders = ", ".join(form.all_folders)
            raise UserError(
                f"{path}: recordings named like this must be in one of the folders {folders}; "
                "move it"
            )
        if folder in TEST_FOLDERS:
            first = test_paths.setdefault((recording.machine_type, path.name), path)
            if first != path:
                raise UserError(f"{path} is in {first.parent} too; remove one of them")


def check_copies(paths: Sequence[Path]) -> None:
    """Raise `UserError` for a recording that is in its folder twice, as WAV and FLAC file: copies
    may be on both sides of the split.
    """
    first: dict[Path, Path] = {}
    for path in paths:
        other = first.setdefault(path.with_suffix(""), path)
        if other != path:
            raise UserError(
                f"{path} and {other.name} are the same recording in two formats; remove one of them"
            )


def check_attributes(recordings: Sequence[Recording]) -> None:
    """Raise `UserError` where it is unclear which words of a name are its attributes.

    It is clear if they are pairs of name and value or the word "noAttribute", or if all recordings
    of a section and folder have equally many words (in 2021 they are no pairs).
    """
    first: dict[tuple[str, str, str], Recording] = {}
    for recording in recordings:
        other = first.setdefault((*recording.machine, recording.folder), recording)
        words, other_words = split_attributes(recording), split_attributes(other)
        if len(words) != len(other_words) and not (has_pairs(words) and has_pairs(other_words)):
            raise UserError(
                f"{recording.path} has {len(words)} attribute words and {other.path.name} has "
                f"{len(other_words)}, so they cannot both consist of pairs of name and value; "
                "rename or remove the wrong one"
            )


def split_attributes(recording: Recording) -> list[str]:
    return recording.attributes.split("_") if recording.attributes else []


def has_pairs(words: Sequence[str]) -> bool:
    return len(words) % 2 == 0 or list(words) == ["noAttribute"]
