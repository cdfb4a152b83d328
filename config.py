"""What each key of config.yaml may be; how the file and the command line become a `Config`.

config.yaml is the only place of values and meanings: `--help` prints its comments. This file holds
types and ranges.
"""

import argparse
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
)

from losses import MODES
from model import CHANNELS
from utils import OneLineParser, UserError, suggest

SCORINGS = ("published", "angle", "nearest")  # evaluation/scoring.py computes them
DEFAULT_CONFIG = Path(__file__).with_name("config.yaml")

MachineID = int | str
Machines = Mapping[str, Sequence[MachineID]]  # by machine type, their order numbers the classes
AUTO: Machines = {}  # `machines: auto`, until `corpus.settle_classes` has looked which there are
Classes = Mapping[
    str, Mapping[str, Sequence[str]]
]  # by machine type and ID ("02"), the attributes of each class
BY_ATTRIBUTES = (
    "attributes"  # `classes: attributes`, until `corpus.settle_classes` has looked which there are
)
MACHINE_ID = r"(?!(pooled|mean|min)$)[^_/\\\x00-\x1f\x7f]+"

# ---- The keys. A description completes the sentence "<value> is not ..." ----


def refuse_non_numbers(value: Any) -> Any:
    if isinstance(value, bool) or (
        isinstance(value, str) and "_" in value
    ):  # which Python takes for numbers
        raise ValueError
    return value


def refuse_repeats(values: list) -> list:
    if len(set(values)) < len(values):
        raise ValueError
    return values


def read_machines(value: Any) -> Any:
    if not value or (isinstance(value, dict) and len(set(map(str, value))) < len(value)):
        raise ValueError
    return AUTO if value == "auto" else value


def parse_id(text: str) -> MachineID:
    """A machine ID: a number of up to nine digits, zeros before it or not, or else the word it is."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else text


def check_id(value: Any) -> MachineID:
    """An ID that can be read from a file name, and names no row of the table of results."""
    is_number = type(value) is int and value >= 0
    if not is_number and not (isinstance(value, str) and re.fullmatch(MACHINE_ID, value)):
        raise ValueError
    return parse_id(str(value))


def name_id(machine_id: MachineID) -> str:
    """A machine ID as outputs name it: a number has two digits, as in the published file names."""
    return f"{machine_id:02d}" if isinstance(machine_id, int) else machine_id


Real = Annotated[float, BeforeValidator(refuse_non_numbers), Field(allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(refuse_non_numbers)]
Positive = Annotated[Real, Field(gt=0, description="a number above 0")]
Flag = Annotated[bool, Field(strict=True, description="true or false")]
Path_ = Annotated[str, Field(strict=True), AfterValidator(os.path.expanduser)]
# A folder name, but `average`, a row of the table of results.
MachineType = Annotated[
    str, Field(coerce_numbers_to_str=True, pattern=r"^(?!(average|\.{1,2})$)[^/\\\x00-\x1f\x7f]+$")
]
MachineIDs = Annotated[
    list[Annotated[MachineID, PlainValidator(check_id)]],
    Field(min_length=1),
    AfterValidator(refuse_repeats),
]
MachineTable = Annotated[dict[MachineType, MachineIDs], BeforeValidator(read_machines)]
Channels = Annotated[
    list[Literal[CHANNELS]],  # type: ignore[valid-type]
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    Field(min_length=1),
    AfterValidator(refuse_repeats),
    AfterValidator(
        lambda names: sorted(names, key=CHANNELS.index)
    ),  # the order in which they are stacked
]


class Config(BaseModel):
    """The configuration of a run: the keys of config.yaml, where each is explained."""

    model_config = ConfigDict(frozen=True, extra="forbid", regex_engine="python-re")

    data_root: Annotated[
        Path_, Field(pattern=r"\S", description="the name of a folder (a number needs quotes)")
    ]
    machines: Annotated[
        MachineTable,
        Field(
            description="auto or a table of machine types (names of folders, not average) with lists of different IDs "
            "(numbers, or words without _, / and \\, not pooled, mean or min), such as {fan: [0, 2], press: [line-3]}"
        ),
    ]
    classes: Annotated[
        Literal["section", "attributes"]
        | dict[
            MachineType,
            dict[str, Annotated[list[str], Field(min_length=1), AfterValidator(refuse_repeats)]],
        ],
        Field(description="section, attributes, or a table of the attributes of each machine"),
    ]
    window: Literal["first", "all"]
    hop: Annotated[
        Literal["auto"] | Annotated[Real, Field(ge=0.1, le=10)],
        Field(description="auto or a number of seconds from 0.1 to 10"),
    ]
    channel: Annotated[Whole, Field(ge=0, description="a whole number of at least 0")]
    split_ratio: Annotated[Real, Field(gt=0, lt=1, description="a number above 0 and below 1")]
    mode: Literal[tuple(MODES)]  # type: ignore[valid-type]
    input: Annotated[
        Channels, Field(description=f"a list of different channels out of {', '.join(CHANNELS)}")
    ]
    alpha: Positive
    m: Annotated[Real, Field(ge=0, le=math.pi, description="an angle from 0 to 3.14 radians")]
    s: Positive
    sub_centers: Annotated[Whole, Field(ge=1, le=1000, description="a whole number from 1 to 1000")]
    epoch: Annotated[Whole, Field(ge=1, description="a whole number of at least 1")]
    batch_size: Annotated[
        Whole, Field(ge=2, description="a whole number of at least 2 (batch norm)")
    ]
    lr: Positive
    weight_decay: Annotated[Real, Field(ge=0, description="a number of at least 0")]
    seed: Annotated[Whole, Field(ge=0, lt=2**32, description="a whole number from 0 to 4294967295")]
    init_from: Annotated[Path_, Field(description="the name of a file (a number needs quotes)")]
    save_path: Annotated[
        Path_,
        Field(
            pattern=r"^(?!(.*/)?\.pth$)([^{}]|\{mode\}|\{seed\})+\.pth$",
            description="a file name that ends in .pth, without braces but those of {mode} and {seed}",
        ),
    ]
    device: Annotated[
        str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$", description="auto, cpu, cuda or cuda:N")
    ]
    data_device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    eval_precision: Literal["fp32", "bf16", "fp16"]
    compile: Annotated[Literal["auto", True, False], Field(description="auto, true or false")]
    num_workers: Annotated[Whole, Field(ge=1, le=1000, description="a whole number from 1 to 1000")]
    tensorboard: Flag
    scoring: Literal[SCORINGS]  # type: ignore[valid-type]
    neighbours: Annotated[Whole, Field(ge=1, description="a whole number of at least 1")]
    over_windows: Literal["mean", "max"]
    score_dtype: Literal["float32", "float64"]
    threshold: Literal["gamma", "quantile"]
    threshold_percentile: Annotated[
        Real, Field(gt=0, lt=100, description="a number above 0 and below 100")
    ]

    @property
    def checkpoint(self) -> Path:
        """`save_path` with its placeholders filled in."""
        return Path(self.save_path.replace("{mode}", self.mode).replace("{seed}", str(self.seed)))

    def hop_of(self, split: str) -> float | None:
        """Seconds between the windows of a recording of the split; None where its first window
        alone counts.
        """
        if self.window == "first":
            return None
        return {"train": 10.0}.get(split, 5.0) if self.hop == "auto" else self.hop

    def differences(self, other: dict[str, Any], keys: Sequence[str]) -> list[str]:
        """Those of the keys whose values in another configuration differ; the order of the machines
        counts.
        """
        return [key for key in keys if json.dumps(getattr(self, key)) != json.dumps(other.get(key))]


KEYS = tuple(Config.model_fields)
# Where things lie, how they are computed, and how eval.py scores and decides: a resumed run may
# have others.
COMPUTATION_KEYS = (
    "data_root", "save_path", "device", "data_device", "precision", "eval_precision", "compile",
    "num_workers", "tensorboard", "scoring", "neighbours", "over_windows", "score_dtype", "threshold",
    "threshold_percentile",
)  # fmt: skip
# What makes the model and its published score: it is taken from the checkpoint.
MODEL_KEYS = ("machines", "classes", "mode", "input", "m", "s", "sub_centers")
# Which part of a recording the model was trained on: taken from the checkpoint too, but the command
# line may differ.
RECORDING_KEYS = ("window", "channel")
# How clips are scored and decided upon.
DECISION_KEYS = ("scoring", "neighbours", "over_windows", "threshold", "threshold_percentile")
# What the command lines take: those of training, and those of the scripts that score.
TRAINING_KEYS = tuple(
    key for key in KEYS if key not in (*DECISION_KEYS, "eval_precision", "score_dtype")
)
SCORING_KEYS = (
    "data_root",
    *MODEL_KEYS,
    *RECORDING_KEYS,
    "hop",
    "device",
    "num_workers",
    *DECISION_KEYS,
)
EVALUATION_KEYS = (*SCORING_KEYS, "batch_size", "eval_precision", "score_dtype")


def make_config(*sources: tuple[str, dict[str, Any]]) -> Config:
    """The configuration of several sources, (name, values); a later one replaces the values of
    those before it.

    Raises `UserError` for an unknown or missing key, a wrong type, or a value out of range; it
    names the source.
    """
    values = {str(key): value for _, given in sources for key, value in given.items()}
    try:
        return check_classes(Config.model_validate(values))
    except ValidationError as error:
        first = error.errors()[0]
    key = str(first["loc"][0])
    source = next(
        (name for name, given in reversed(sources) if key in map(str, given)), str(DEFAULT_CONFIG)
    )
    if first["type"] == "missing":
        raise UserError(f"{source}: {key} is missing")
    if key not in KEYS:
        raise UserError(
            f"{source}: unknown key {key!r}{suggest(key, KEYS)} (the keys are {', '.join(KEYS)})"
        )
    field = Config.model_fields[key]
    choices = (
        CHANNELS
        if key == "input"
        else [name for name in get_args(field.annotation) if isinstance(name, str)]
    )
    allowed = field.description or f"one of {', '.join(choices)}"
    raise UserError(
        f"{source}: {key}: {values[key]!r} is not {allowed}{suggest(str(values[key]), choices)}"
    )


def check_classes(config: Config) -> Config:
    """The same, unless a table of classes has other machines than the table of machines."""
    if isinstance(config.classes, dict):
        machines = {
            machine_type: set(map(name_id, ids)) for machine_type, ids in config.machines.items()
        }
        if {machine_type: set(ids) for machine_type, ids in config.classes.items()} != machines:
            raise UserError(
                "classes: a table that has not the machine types and IDs of machines; give attributes"
            )
    return config


def check_effect(config: Config, given: Mapping[str, Any], kinds: Sequence[str] = SCORINGS) -> None:
    """Raise `UserError` for a key on the command line (`given`) that has no effect on these kinds
    of score.
    """
    idle: dict[str, str] = {}
    if config.window == "first":
        idle |= dict.fromkeys(("hop", "over_windows"), "window: first")
    if "nearest" not in kinds:
        idle["neighbours"] = f"scoring: {config.scoring}"
    for key, other in idle.items():
        if key in given:
            raise UserError(f"command line: {key} has no effect with {other}; leave it out")


def show_value(key: str, value: Any) -> str:
    """A value in a message; a table of classes is too long for it."""
    if key == "classes" and isinstance(value, dict):
        return f"{BY_ATTRIBUTES} ({sum(len(own) for ids in value.values() for own in ids.values())} classes)"
    return repr(value)


# ---- YAML and the command line ----


class YamlLoader(yaml.SafeLoader):
    """PyYAML's loader, but 1e-4 is a number, 010 is ten and not eight, and a key that is given
    twice is an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"{key} is given twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
YamlLoader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))
YamlLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text; a `UserError` that names `source` and the line if it is not YAML."""
    try:
        return yaml.load(text, Loader=YamlLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{source}{line}: not valid YAML: {error.problem}") from None
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:  # as !!int x
        raise UserError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from None


def read_yaml(file: Path) -> dict[str, Any]:
    """The keys and values of a configuration file, not checked yet."""
    try:
        values = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except FileNotFoundError:
        raise UserError(f"{file}: no such configuration file") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not a text file in UTF-8") from None
    if not isinstance(values, dict | None):
        raise UserError(f"{file}: a configuration is lines of `key: value`")
    return values or {}


def load_config(file: Path = DEFAULT_CONFIG, **overrides: Any) -> Config:
    """The configuration of config.yaml, replaced by the keys of `file`, replaced by `overrides`."""
    sources = [(str(path), read_yaml(path)) for path in dict.fromkeys((DEFAULT_CONFIG, file))]
    return make_config(*sources, ("command line", overrides))


def describe_keys() -> dict[str, str]:
    """The meaning of each key: the comment above or behind it in config.yaml, on one line."""
    meaning, above = {}, []
    for line in DEFAULT_CONFIG.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            above.append(line.strip("# "))
        elif match := re.match(r"(\w+):[^#]*(?:#(.*))?", line):
            meaning[match[1]] = " ".join([*above, (match[2] or "").strip()]).strip()
            above = []
        elif not line.strip():
            above = []
    return meaning


def add_config_options(parser: argparse.ArgumentParser, keys: Sequence[str]) -> None:
    """`--config` and an option for each of the keys."""
    parser.add_argument(
        "--config", metavar="FILE", type=Path, default=DEFAULT_CONFIG, help="configuration file"
    )
    values, meaning = read_yaml(DEFAULT_CONFIG), describe_keys()
    group = parser.add_argument_group("keys of the configuration")
    for key in keys:
        default = yaml.safe_dump(
            values.get(key), default_flow_style=True, width=math.inf, sort_keys=False
        )
        default = default.removesuffix("\n").removesuffix("\n...")
        help_text = f"{meaning.get(key, '')} (default: {default})"
        group.add_argument(
            f"--{key}",
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=help_text.replace("%", "%%"),
        )


def parse_command_line(
    parser: OneLineParser, arguments: Sequence[str] | None = None, keys: Sequence[str] = KEYS
) -> tuple[Config, argparse.Namespace, dict[str, Any]]:
    """The configuration, the options that are not keys of it, and the keys that stood on the
    command line; `keys` are those that it takes.
    """
    add_config_options(parser, keys)
    options, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        word = unknown[0].split("=")[0]
        raise UserError(f"command line: unknown option {word}{suggest(word, known)} (see --help)")
    given = {key: vars(options).pop(key) for key in keys if key in options}
    for key, text in given.items():
        if Config.model_fields[key].annotation is not str:  # a path is taken as it stands
            given[key] = parse_yaml(text, f"command line: {key}")
    return load_config(options.config, **given), options, given
