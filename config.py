"""The configuration: the allowed values of each key, and how a `Config` is made from files and the
command line.

config.yaml contains the default values, and the meanings that `--help` prints. This file contains
types and ranges.
"""

import argparse
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
    PrivateAttr,
    ValidationError,
    ValidationInfo,
)

from alarms import AlarmRule
from audio import Windows, choose_windows
from command_line import OneLineParser
from errors import UserError
from evaluation.scores import KINDS
from losses import MODES
from model import CHANNELS
from names import MACHINE_TYPE, format_id, is_machine_id
from utils import suggest

DEFAULT_CONFIG = Path(__file__).with_name("config.yaml")
CHANNEL_NAMES = tuple(CHANNELS)

# ---- The keys. A description completes the sentence "<value> is not ..." ----


def refuse_non_numbers(value: Any) -> Any:
    """Refuse true and "1_000", which Python takes for numbers."""
    if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
        raise ValueError
    return value


def refuse_repeats(values: list) -> list:
    if len(set(values)) < len(values):
        raise ValueError
    return values


def refuse_empty_table(value: Any) -> Any:
    """Refuse an empty table, and one that names a machine type twice, as 7 and "7"."""
    if not value or (isinstance(value, dict) and len(set(map(str, value))) < len(value)):
        raise ValueError
    return value


def refuse_short_span(value: int, info: ValidationInfo) -> int:
    if value < info.data.get("alarm_windows", 1):
        raise ValueError
    return value


def check_id(value: Any) -> str:
    is_number = type(value) is int and value >= 0
    if not is_number and not (isinstance(value, str) and is_machine_id(value)):
        raise ValueError
    return format_id(value)


Real = Annotated[float, BeforeValidator(refuse_non_numbers), Field(allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(refuse_non_numbers)]
Positive = Annotated[Real, Field(gt=0, description="a number above 0")]
Flag = Annotated[bool, Field(strict=True, description="true or false")]
Path_ = Annotated[str, Field(strict=True), AfterValidator(os.path.expanduser)]
MachineType = Annotated[str, Field(coerce_numbers_to_str=True, pattern=MACHINE_TYPE)]
MachineIDs = Annotated[
    list[Annotated[str, PlainValidator(check_id)]],
    Field(min_length=1),
    AfterValidator(refuse_repeats),
]
Channels = Annotated[
    list[Literal[CHANNEL_NAMES]],  # type: ignore[valid-type]
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    Field(min_length=1),
    AfterValidator(refuse_repeats),
    AfterValidator(lambda names: sorted(names, key=CHANNEL_NAMES.index)),  # as they are stacked
]


class Config(BaseModel):
    """The configuration of a run: the keys of config.yaml, where each is explained."""

    model_config = ConfigDict(frozen=True, extra="forbid", regex_engine="python-re")

    data_root: Annotated[
        Path_, Field(pattern=r"\S", description="the name of a folder (a number needs quotes)")
    ]
    machines: Annotated[
        Literal["auto"] | dict[MachineType, MachineIDs],
        BeforeValidator(refuse_empty_table),
        Field(
            description="auto or a table of machine types (names of folders, not average) with "
            "lists of different IDs (numbers, or words without _, / and \\, not pooled, mean, "
            "min or hmean), such as {fan: [0, 2], press: [line-3]}"
        ),
    ]
    classes: Literal["section", "attributes"]
    window: Literal["first", "all"]
    hop: Annotated[
        Literal["auto"] | Annotated[Real, Field(ge=0.1, le=10)],
        Field(description="auto or a number of seconds from 0.1 to 10"),
    ]
    channel: Annotated[Whole, Field(ge=0, description="a whole number of at least 0")]
    split_ratio: Annotated[Real, Field(gt=0, lt=1, description="a number above 0 and below 1")]
    mode: Literal[tuple(MODES)]  # type: ignore[valid-type]
    input: Annotated[
        Channels,
        Field(description=f"a list of different channels out of {', '.join(CHANNEL_NAMES)}"),
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
    weight_average: Annotated[
        Real, Field(ge=0, lt=1, description="0 or the decay of a moving average, below 1")
    ]
    seed: Annotated[Whole, Field(ge=0, lt=2**32, description="a whole number from 0 to 4294967295")]
    init_from: Annotated[Path_, Field(description="the name of a file (a number needs quotes)")]
    save_path: Annotated[
        Path_,
        Field(
            pattern=r"^(?!(.*/)?\.pth$)([^{}]|\{mode\}|\{seed\})+\.pth$",
            description="a file name that ends in .pth, without braces but those of {mode} and "
            "{seed}",
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
    scoring: Literal[tuple(KINDS)]  # type: ignore[valid-type]
    neighbours: Annotated[Whole, Field(ge=1, description="a whole number of at least 1")]
    over_windows: Literal["mean", "max"]
    score_dtype: Literal["float32", "float64"]
    threshold: Annotated[
        Literal["conformal", "gamma", "quantile"] | Real,
        Field(description="conformal, gamma, quantile or a number"),
    ]
    false_alarms: Annotated[Real, Field(gt=0, lt=1, description="a number above 0 and below 1")]
    alarm_windows: Annotated[Whole, Field(ge=1, description="a whole number of at least 1")]
    alarm_span: Annotated[
        Whole,
        Field(description="a whole number of at least alarm_windows"),
        AfterValidator(refuse_short_span),
    ]

    _given: frozenset[str] = PrivateAttr(frozenset())

    @property
    def given(self) -> frozenset[str]:
        """The keys that were given on the command line."""
        return self._given

    @property
    def alarm_rule(self) -> AlarmRule:
        """When a recording of several windows is anomalous."""
        return AlarmRule(self.alarm_windows, self.alarm_span)

    @property
    def weights_path(self) -> Path:
        """`save_path` with its placeholders filled in."""
        return Path(self.save_path.replace("{mode}", self.mode).replace("{seed}", str(self.seed)))

    def windows(self, split: str) -> Windows:
        """Return which windows of the recordings of a split are used."""
        return choose_windows(self.window, self.hop, self.channel, split)


KEYS = tuple(Config.model_fields)
# Keys for how clips are scored and classified as anomalous.
DECISION_KEYS = (
    "scoring", "neighbours", "over_windows", "threshold", "false_alarms", "alarm_windows",
    "alarm_span",
)  # fmt: skip
# Keys for the places of files, for the computation, and for scores and decisions: a run can be
# resumed with other values of them.
COMPUTATION_KEYS = (
    "data_root", "save_path", "device", "data_device", "precision", "eval_precision", "compile",
    "num_workers", "tensorboard", "score_dtype", *DECISION_KEYS,
)  # fmt: skip
# Keys of the model and its published score: their values are in the checkpoint.
MODEL_KEYS = ("machines", "classes", "mode", "input", "m", "s", "sub_centers")
# Keys for the part of a recording to use: the values are those of the checkpoint, unless they are
# given on the command line.
RECORDING_KEYS = ("window", "channel")
# The options of the scripts that train, score and evaluate.
TRAINING_KEYS = tuple(
    key for key in KEYS if key not in (*DECISION_KEYS, "eval_precision", "score_dtype")
)
SCORING_KEYS = (
    "data_root", *MODEL_KEYS, *RECORDING_KEYS, "hop", "device", "num_workers", *DECISION_KEYS,
)  # fmt: skip
EVALUATION_KEYS = (*SCORING_KEYS, "batch_size", "eval_precision", "score_dtype")


def make_config(*sources: tuple[str, Mapping[str, Any]], given: Sequence[str] = ()) -> Config:
    """Make a configuration from several sources, (name, values), each of which replaces values of
    those before it. `given` are the keys that were given on the command line.

    Raises:
        UserError: For an unknown or missing key, a wrong type, or a value out of range; the message
            names the source.
    """
    values = {str(key): value for _, part in sources for key, value in part.items()}
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(explain_error(error, sources, values)) from None
    config._given = frozenset(given)
    return config


def explain_error(
    error: ValidationError, sources: Sequence[tuple[str, Mapping[str, Any]]], values: dict[str, Any]
) -> str:
    """Return one line about the first error: source, key, value and allowed values."""
    first = error.errors()[0]
    key = str(first["loc"][0])
    source = str(DEFAULT_CONFIG)
    for name, part in sources:
        if key in map(str, part):
            source = name  # the last that gave it
    if first["type"] == "missing":
        return f"{source}: {key} is missing; add it"
    if key not in KEYS:
        known = ", ".join(KEYS)
        return f"{source}: unknown key {key!r}{suggest(key, KEYS)} (the keys are {known})"
    field = Config.model_fields[key]
    choices = [name for name in get_args(field.annotation) if isinstance(name, str)]
    if key == "input":
        choices = list(CHANNEL_NAMES)
    allowed = field.description or f"one of {', '.join(choices)}"
    hint = suggest(str(values[key]), choices)
    return f"{source}: {key}: {values[key]!r} is not {allowed}{hint}"


def check_effect(config: Config, windows: Windows, kinds: Sequence[str] = ()) -> None:
    """Raise `UserError` for a key on the command line that has no effect where these windows are
    used and these kinds of score computed.
    """
    without_effect: dict[str, str] = {}
    if windows.hop is None:
        keys = ("hop", "over_windows", "alarm_windows", "alarm_span")
        without_effect |= dict.fromkeys(keys, "window: first")
    if isinstance(config.threshold, float):
        without_effect["false_alarms"] = f"threshold: {config.threshold:g}"
    effective = {key for name in kinds for key in KINDS[name].keys}
    for kind in KINDS.values():
        for key in set(kind.keys) - effective:
            without_effect[key] = f"scoring: {config.scoring}"
    for key, reason in without_effect.items():
        if key in config.given:
            raise UserError(f"command line: {key} has no effect with {reason}; leave it out")


# ---- YAML and the command line ----


class YamlLoader(yaml.SafeLoader):
    """PyYAML's loader with three changes: 1e-4 is a number, 010 is ten and not eight, and a key
    that is given twice is an error.
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
    """Parse a YAML text. Raises `UserError` that names `source` and line if it is not YAML."""
    try:
        return yaml.load(text, Loader=YamlLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{source}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML raises them for values such as `!!int x`.
        raise UserError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from None


def read_yaml(file: Path) -> dict[str, Any]:
    """Read the keys and values of a configuration file, without checking them."""
    try:
        values = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except FileNotFoundError:
        raise UserError(f"{file}: no such configuration file; check --config") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not a text file in UTF-8; convert it") from None
    if not isinstance(values, dict | None):
        raise UserError(f"{file}: not a configuration; write it as lines of `key: value`")
    return values or {}


def load_config(*files: Path, given: Sequence[str] = (), **overrides: Any) -> Config:
    """Load config.yaml, with values replaced by those of each of the files in turn, and these by
    `overrides`; `given` are the keys that were given on the command line.
    """
    sources = [(str(path), read_yaml(path)) for path in (DEFAULT_CONFIG, *files)]
    return make_config(*sources, ("command line", overrides), given=given)


def describe_keys() -> dict[str, str]:
    """Return the meaning of each key: its comment in config.yaml, on one line."""
    meaning: dict[str, str] = {}
    above: list[str] = []
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
    """Add `--config`, and an option for each of the keys."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="configuration file, whose values replace those of config.yaml; it may be given "
        "several times, and then the values of the last file count",
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
) -> tuple[Config, argparse.Namespace]:
    """Parse the options of a script: those of `parser`, `--config`, and one for each of `keys`.

    Returns the configuration, and the options that are not keys of it.
    """
    add_config_options(parser, keys)
    options, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        word = unknown[0].split("=")[0]
        raise UserError(f"command line: unknown option {word}{suggest(word, known)} (see --help)")
    values: dict[str, Any] = {}
    for key in keys:
        if key not in options:
            continue
        text = vars(options).pop(key)
        is_text = Config.model_fields[key].annotation is str  # a path is not parsed as YAML
        values[key] = text if is_text else parse_yaml(text, f"command line: {key}")
    return load_config(*options.config, given=tuple(values), **values), options
