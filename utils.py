"""What every script shares: errors and exit status, configuration, seeding, processes, checkpoint files."""

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import importlib.util
import io
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import yaml

from losses import MODES
from model.tastgram_mfn import CHANNELS

T = TypeVar("T")
DEFAULT_CONFIG = Path(__file__).with_name("config.yaml")

# ---------------------------------------------------------------------------------------------------------------
# Errors, notices, exit status
# ---------------------------------------------------------------------------------------------------------------


class UserError(ValueError):
    """Something the user can put right. The message is one line: what is wrong, where, and what to do."""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that never abbreviates options and reports a mistake as a `UserError`."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and end the process: status 0, 2 after an error the user can put right (one line
    on standard error), 130 after Ctrl-C, 143 after SIGTERM. Any other exception is a bug and keeps its traceback.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may hold what the terminal cannot show
    try:
        main()
    except torch.OutOfMemoryError:
        fail("the GPU is out of memory: lower batch_size (bf16 needs less than fp32 in training)")
    except MemoryError:
        fail("out of memory: lower batch_size")
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # PyTorch's form of MemoryError
            raise
        fail("out of memory: lower batch_size")
    except (UserError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def fail(message: str) -> NoReturn:
    if is_first_to_fail():
        print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
    sys.exit(2)


ERRORS = "errors"  # key of the agent's store


def is_first_to_fail() -> bool:
    """Whether no other process of the job has reported an error: what one finds, its siblings mostly find too, or it
    takes them down.
    """
    try:
        store = agent_store(timedelta(seconds=10))
        return store is None or store.add(ERRORS, 1) == 1
    except RuntimeError:  # the agent is gone
        return True


def forget_errors(store: dist.Store) -> None:
    """Let the next error be the first again."""
    store.delete_key(ERRORS)


def agent_store(timeout: timedelta) -> dist.Store | None:
    """The key-value store that torchrun's agent keeps for the processes of its job, whatever state they are in; None
    without torchrun, or where it leaves the store to them.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)


def notice(message: str) -> None:
    """Tell the user something worth knowing, once, on standard error."""
    if is_main():
        print(f"notice: {one_line(message)}", file=sys.stderr)


def one_line(message: str) -> str:
    """The message with control characters, which file names may hold, spelt out."""
    return re.sub(r"[\x00-\x1f\x7f]", lambda match: repr(match[0])[1:-1], message)


def nearest(word: str, words: Sequence[str]) -> str:
    """`; did you mean ...?` where one of the words is close, else nothing."""
    close = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {close[0]}?" if close else ""


# ---------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------


class YamlLoader(yaml.SafeLoader):
    """YAML with the plain scalars of YAML 1.2: 1e-4 is a number, 08 is 8, 010 is 10, `on` and `no` are words.

    A key that is given twice is an error instead of the last one counting.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 (replaces the table of the parent class)

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"{key} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


for tag, pattern, first, construct in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""], lambda text: None),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF"), lambda text: text.lower() == "true"),
    ("int", r"[-+]?[0-9]+", list("-+0123456789"), int),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789"), float),
):
    YamlLoader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), first)
    YamlLoader.add_constructor(
        f"tag:yaml.org,2002:{tag}",
        lambda loader, node, construct=construct: construct(loader.construct_scalar(node)),
    )


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text; a `UserError` that names `source` and the line if it is not YAML."""
    try:
        return yaml.load(text, Loader=YamlLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{source}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:  # such as !!int x
        raise UserError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from None


class Rule:
    """What a key takes: `convert` turns the YAML value into the field's, or raises ValueError; `allowed` in words."""

    def __init__(self, convert: Callable[[Any], Any], allowed: str, choices: Sequence[str] = ()):
        self.convert, self.allowed, self.choices = convert, allowed, choices


def key(convert: Callable[[Any], Any], allowed: str, choices: Sequence[str] = ()) -> Any:
    return dataclasses.field(metadata={"rule": Rule(convert, allowed, choices)})


def number(kind: type, allowed: str, is_allowed: Callable[[float], bool]) -> Any:
    def convert(value):
        if isinstance(value, bool) or (isinstance(value, str) and "_" in value):
            raise ValueError(value)
        if kind is int and isinstance(value, float) and not value.is_integer():
            raise ValueError(value)
        value = kind(value)
        if not math.isfinite(value) or not is_allowed(value):
            raise ValueError(value)
        return value

    return key(convert, allowed)


def choice(*choices: str) -> Any:
    def convert(value):
        if value not in choices:
            raise ValueError(value)
        return value

    return key(convert, f"one of {', '.join(choices)}", choices)


def text(allowed: str, pattern: str) -> Any:
    def convert(value):
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError(value)
        return os.path.expanduser(value)  # noqa: PTH111 (a configuration holds plain values)

    return key(convert, allowed)


def folder() -> Any:
    return text("the name of a folder (a number needs quotes)", r"(?s).*\S.*")


def flag() -> Any:
    def convert(value):
        if not isinstance(value, bool):
            raise ValueError(value)
        return value

    return key(convert, "true or false")


def to_switch(value: Any) -> str:
    """auto, true or false, as words."""
    word = str(value).lower() if isinstance(value, bool) else value
    if word not in ("auto", "true", "false"):
        raise ValueError(value)
    return word


def to_channels(value: Any) -> list[str]:
    """The input channels in the order in which they are stacked."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or any(names.count(n) > 1 or n not in CHANNELS for n in names):
        raise ValueError(value)
    return [channel for channel in CHANNELS if channel in names]


def to_machines(value: Any) -> dict[str, list[int]]:
    """The class table with machine types as str and IDs as int (an ID may be written 2, "02" or 08)."""
    if not isinstance(value, dict):
        raise ValueError(value)
    machines = {}
    for machine_type, ids in value.items():
        name = str(machine_type)
        is_folder_name = name.isprintable() and not set(name) & set("/\\") and name not in ("", ".", "..")
        if not is_folder_name or name in machines or name == "average":  # a row of the table
            raise ValueError(value)
        if not isinstance(ids, list) or any(not re.fullmatch("[0-9]{1,9}", str(machine_id)) for machine_id in ids):
            raise ValueError(value)
        machines[name] = [int(machine_id) for machine_id in ids]
        if not ids or len(set(machines[name])) < len(ids):
            raise ValueError(value)
    if sum(map(len, machines.values())) < 2:
        raise ValueError(value)
    return machines


@dataclass(frozen=True)
class Config:
    """The configuration of a run: the keys of config.yaml, where each is explained, and what each takes."""

    data_root: str = folder()
    machines: dict = key(
        to_machines,
        "a table of machine types with lists of different IDs, at least two in all, such as {fan: [0, 2], pump: [0]}",
    )
    split_ratio: float = number(float, "a number above 0 and below 1", lambda x: 0 < x < 1)
    store_path: str = folder()
    store_device: str = choice("auto", "cpu", "cuda")
    mode: str = choice(*MODES)
    input: list = key(to_channels, f"a list of different channels out of {', '.join(CHANNELS)}", CHANNELS)
    attention: str = choice("published", "standardised")
    alpha: float = number(float, "a number above 0", lambda x: x > 0)
    m: float = number(float, "an angle from 0 to 3.14 radians", lambda x: 0 <= x <= math.pi)
    s: float = number(float, "a number above 0", lambda x: x > 0)
    sub_centers: int = number(int, "a whole number from 1 to 1000", lambda x: 1 <= x <= 1000)
    epoch: int = number(int, "a whole number of at least 1", lambda x: x >= 1)
    batch_size: int = number(int, "a whole number of at least 2 (batch norm)", lambda x: x >= 2)
    lr: float = number(float, "a number above 0", lambda x: x > 0)
    weight_decay: float = number(float, "a number of at least 0", lambda x: x >= 0)
    sync_batch_norm: bool = flag()
    seed: int = number(int, "a whole number from 0 to 4294967295", lambda x: 0 <= x < 2**32)
    save_path: str = text(
        "a file name that ends in .pth, without braces but those of {mode} and {seed}",
        r"(?!(.*/)?\.pth$)([^{}]|\{mode\}|\{seed\})+\.pth",
    )
    device: str = text("auto, cpu, cuda or cuda:N", r"auto|cpu|cuda(:[0-9]+)?")
    precision: str = choice("auto", "fp32", "bf16", "fp16")
    eval_precision: str = choice("fp32", "bf16", "fp16")
    compile: str = key(to_switch, "auto, true or false")
    num_workers: int = number(int, "a whole number from 1 to 1000", lambda x: 1 <= x <= 1000)
    tensorboard: bool = flag()
    score_dtype: str = choice("float32", "float64")
    threshold: str = choice("gamma", "quantile")
    threshold_percentile: float = number(float, "a number above 0 and below 100", lambda x: 0 < x < 100)

    @property
    def checkpoint(self) -> Path:
        """`save_path` with its placeholders filled in."""
        return Path(self.save_path.replace("{mode}", self.mode).replace("{seed}", str(self.seed)))


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
# Keys that say where things lie and how they are computed: a resumed run may have others.
COMPUTATION_KEYS = (
    "data_root", "store_path", "store_device", "save_path",
    "device", "precision", "eval_precision", "compile", "num_workers", "tensorboard", "score_dtype",
    "threshold", "threshold_percentile",
)  # fmt: skip
# Keys that make the model and its score: they come from the checkpoint.
MODEL_KEYS = ("machines", "mode", "input", "attention", "m", "s", "sub_centers")


def is_same(one: Any, other: Any) -> bool:
    """Whether two values of a key mean the same; the order of the machines numbers the classes."""
    return one == other and (not isinstance(one, dict) or list(one) == list(other))


def check_value(name: str, value: Any, source: str) -> Any:
    """The value of a key as its field holds it; a `UserError` that says what is allowed if it may not be that."""
    if name not in FIELDS:
        known = ", ".join(FIELDS)
        raise UserError(f"{source}: unknown key {name!r}{nearest(name, list(FIELDS))} (the keys are {known})")
    rule = FIELDS[name].metadata["rule"]
    try:
        return rule.convert(value)
    except (ValueError, TypeError, OverflowError):
        hint = nearest(str(value), rule.choices)
        raise UserError(f"{source}: {name}: {value!r} is not {rule.allowed}{hint}") from None


def read_config(file: Path) -> dict[str, Any]:
    """The keys that a YAML file holds, checked."""
    try:
        content = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{file}: no such configuration file") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not a text file in UTF-8") from None
    values = parse_yaml(content, str(file))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{file}: a configuration is lines of `key: value`")
    return {name: check_value(str(name), value, str(file)) for name, value in values.items()}


def load_config(file: Path = DEFAULT_CONFIG, **overrides: Any) -> Config:
    """The configuration of config.yaml, replaced by the keys of `file`, replaced by `overrides`.

    Raises `UserError` for an unknown key, a wrong type or a value out of range.
    """
    values = read_config(DEFAULT_CONFIG) | (read_config(file) if file != DEFAULT_CONFIG else {})
    values |= {name: check_value(name, value, "command line") for name, value in overrides.items()}
    missing = [name for name in FIELDS if name not in values]
    if missing:
        raise UserError(f"{DEFAULT_CONFIG}: {', '.join(missing)} is missing")
    return Config(**values)


def describe_keys(file: Path = DEFAULT_CONFIG) -> dict[str, str]:
    """The meaning of each key: the comment above or behind it in config.yaml, on one line."""
    meaning, above = {}, []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            above.append(line.strip("# "))
        elif match := re.match(r"(\w+):[^#]*(?:#(.*))?", line):
            meaning[match[1]] = " ".join([*above, (match[2] or "").strip()]).strip()
            above = []
        elif not line.strip():
            above = []
    return meaning


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """`--config`, `--rebuild_store` and an option for each key."""
    parser.add_argument("--config", metavar="FILE", type=Path, default=DEFAULT_CONFIG, help="configuration file")
    parser.add_argument("--rebuild_store", action="store_true", help="decode all recordings anew into store_path")
    values, meaning = read_config(DEFAULT_CONFIG), describe_keys()
    keys = parser.add_argument_group("keys of the configuration")
    for name in FIELDS:
        default = yaml.safe_dump(values.get(name), default_flow_style=True, width=math.inf, sort_keys=False)
        default = default.removesuffix("\n").removesuffix("\n...")
        help_text = f"{meaning.get(name, '')} (default: {default})"
        keys.add_argument(f"--{name}", metavar="VALUE", default=argparse.SUPPRESS, help=help_text.replace("%", "%%"))


def parse_command_line(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> tuple[Config, argparse.Namespace, set[str]]:
    """The configuration, the options that are not keys of it, and which keys stood on the command line."""
    add_config_options(parser)
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        word = unknown[0].split("=")[0]
        raise UserError(f"command line: unknown option {word}{nearest(word, options)} (see --help)")
    given = {name: vars(namespace).pop(name) for name in FIELDS if name in namespace}
    typed = {
        name: value if FIELDS[name].type is str else parse_yaml(value, f"command line: {name}")
        for name, value in given.items()
    }
    return load_config(namespace.config, **typed), namespace, set(given)


# ---------------------------------------------------------------------------------------------------------------
# Randomness and devices
# ---------------------------------------------------------------------------------------------------------------

SPLIT, ORDER, MIXING, PARTNERS = range(4)  # purposes, so that no two share a stream


def random_stream(seed: int, purpose: int, *position: int) -> np.random.Generator:
    """The random numbers of one purpose at one position (epoch, step, rank): they depend on nothing else."""
    return np.random.default_rng([seed, purpose, *position])


def choose_device(name: str) -> torch.device:
    """The device that `name` (auto, cpu, cuda, cuda:N) stands for here; under torchrun this process's own GPU.

    Raises `UserError` if it is not there.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"device: {name} asks for a GPU, and PyTorch finds none; use auto or cpu")
    if ":" in name and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"device: {name} would put all processes on one GPU; use auto or cuda")
    index = int(name.partition(":")[2] or local_rank())
    count = torch.cuda.device_count()
    if index >= count:
        raise UserError(f"device: cuda:{index} is not there; PyTorch finds cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the training's autocast; float32 means none."""
    if name == "auto":
        if device.type != "cuda":
            name = "fp32"
        else:
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def choose_compile(name: str, device: torch.device) -> bool:
    """Whether to compile the training step: with "auto" on a GPU, in a single process, where the tools are there."""
    if name != "auto":
        return name == "true"
    has_tools = importlib.util.find_spec("triton") and any(map(shutil.which, ("gcc", "clang", "cc")))
    return device.type == "cuda" and world_size() == 1 and bool(has_tools)


def set_up_numerics() -> None:
    """Float32 means float32: no TF32, which would otherwise round the operands of convolutions to 10 bits."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks for the next step. It would return each activation to the system, which
    hands it out again page by page, zeroed: on the CPU that costs the more of a step the larger the batch is.
    """
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


# ---------------------------------------------------------------------------------------------------------------
# Several processes: every helper also works, as a no-op, in a single process
# ---------------------------------------------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def from_main(function: Callable[[], T]) -> T:
    """What `function` returns in the main process, which alone calls it, in every process."""
    if not dist.is_initialized():
        return function()
    box = [function() if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def is_restarted() -> bool:
    """Whether torchrun has restarted the processes, of which some may have an agent that does not count it."""
    counts = [int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(counts, counts[0])
    return max(counts) > 0


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of each element over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def share_buffers(module: torch.nn.Module) -> None:
    """Give every process the buffers (batch norm statistics) of rank 0."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


# ---------------------------------------------------------------------------------------------------------------
# Files of a run
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunFiles:
    """Where a run keeps its files: `best` is `save_path`, everything else derives from it."""

    best: Path

    @property
    def last(self) -> Path:
        """State after the last epoch, for resuming."""
        return self.best.with_name(f"{self.best.stem}.last.pth")

    @property
    def previous(self) -> Path:
        """State after the epoch before the last, for resuming where `last` is damaged."""
        return self.best.with_name(f"{self.best.stem}.previous.pth")

    @property
    def states(self) -> list[Path]:
        """What a run can be resumed from, newest first."""
        return [self.last, self.previous, self.best]

    @property
    def lock(self) -> Path:
        """Held by the process that trains; its content names the job, for torchrun's restarts."""
        return self.best.with_name(f".{self.best.stem}.lock")

    @property
    def folder(self) -> Path:
        return self.best.with_suffix("")

    @property
    def history(self) -> Path:
        return self.folder / "history.csv"

    @property
    def tensorboard(self) -> Path:
        return self.folder / "tensorboard"

    def results(self, part: str) -> Path:
        """What eval.py writes for the clips of a part: "test" or "evaluation"."""
        return self.folder / {"test": "eval", "evaluation": "evaluation"}[part]


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place once it is written, so that no reader sees a half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path, option: str) -> None:
    """Find out before the work, not after it, whether `path` can be written. The `UserError` names the `option`."""
    try:
        with replace_file(path.with_name(f"{path.name}.probe")) as temporary:
            temporary.touch()
        path.with_name(f"{path.name}.probe").unlink()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); {option}") from None


def save_checkpoint(path: Path, state: Mapping[str, Any], previous: Path | None = None) -> None:
    """Write a checkpoint whole or not at all. An `OSError` (a full disk) leaves the one before in place.

    The one before goes to `previous`, where that is given, once the new one is written.
    """
    buffer = io.BytesIO()  # torch reports a full disk as a bug of its own, Python as an OSError
    torch.save(dict(state), buffer)
    with replace_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
        if previous is not None and path.exists():
            path.replace(previous)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this project, or a bare state dict, onto the CPU.

    A bare state dict comes back as `{"model": state_dict}`. Raises `UserError` for a file that is missing, is not
    a checkpoint, or holds more than tensors and plain values (such a pickle could run code).
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; train one with `python train.py` or name another")
    try:
        if zipfile.is_zipfile(path):  # PyTorch before 1.6 wrote another format
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch does not compare the checksums
                    raise ValueError(damaged)
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises a dozen kinds for what is not a checkpoint
        raise UserError(f"{path}: not a readable checkpoint (it is something else, or damaged)") from None
    if is_state_dict(state):
        return {"model": state}
    config = state.get("config") if isinstance(state, dict) else None
    if isinstance(config, dict):
        config.setdefault("attention", "published")  # there was no other before there was this key
    if not isinstance(config, dict) or not set(MODEL_KEYS) <= set(config) or not is_state_dict(state.get("model")):
        raise UserError(f"{path}: neither a checkpoint of this project nor a state dict of weights")
    for name in MODEL_KEYS:
        config[name] = check_value(name, config[name], str(path))
    return state


def is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items())
    )


def commit() -> str:
    """The commit of this project, `-dirty` where files differ from it; empty outside a clone."""
    command = ["git", "-C", str(DEFAULT_CONFIG.parent), "describe", "--always", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""


def versions() -> dict[str, str]:
    """What the numbers of a run were computed with."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
