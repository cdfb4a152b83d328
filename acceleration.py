"""Compilation and CUDA graphs for a training step, each with a fallback where it does not work."""

import functools
import importlib.util
import platform
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

import distributed
from utils import UserError, describe, notice

WARM_UP = 3  # calls before a CUDA graph is recorded: libraries choose their kernels and allocate in them


def is_to_compile(switch: bool | str, device: torch.device) -> bool:
    """Whether to compile the step: with "auto" on GPUs, where all processes have the tools."""
    if switch != "auto":
        return bool(switch)
    has_tools = importlib.util.find_spec("triton") and any(map(shutil.which, ("gcc", "clang", "cc")))
    return device.type == "cuda" and all(distributed.from_all(bool(has_tools)))


def is_alone_on_gpu(device: torch.device) -> bool:
    """Whether a single process computes on a GPU."""
    return device.type == "cuda" and distributed.world_size() == 1


class WithFallback:
    """A function, or a `plain` one that computes the same from the moment on at which the first has failed.

    It may fail in its first `trials` calls, with one notice that names its configuration `key`; after these, errors are
    errors. With several processes they always are, since all have to run the same steps: a `UserError` says what to do.
    """

    def __init__(self, key: str, function: Callable[..., Tensor], plain: Callable[..., Tensor], trials: int) -> None:
        self.key, self.function, self.plain, self.trials = key, function, plain, trials

    def __call__(self, *arguments: Tensor) -> Tensor:
        if self.trials == 0:
            return self.function(*arguments)
        try:
            result = self.function(*arguments)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if distributed.world_size() > 1:
                if describe(error):  # it has a message of its own
                    raise
                raise UserError(
                    f"{self.key}: it does not work on {platform.node()} ({reason}); set it to false"
                ) from None
            notice(f"{self.key}: it does not work here, so the steps run without it ({reason})")
        else:
            self.trials -= 1
            return result
        self.function, self.trials = self.plain, 0
        return self.plain(*arguments)  # outside of the handler, whose error keeps the memory of the failed call


class GraphedFunction:
    """A function of tensors on a GPU, recorded as a CUDA graph: its kernels are launched at once.

    The first calls run as they are. The next one records: the function runs once without computing anything, on tensors
    that are kept. From then on a call copies its arguments into these and replays the kernels; nothing else of the
    function is run again, and its result is valid until the next call. All calls need the same shapes.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.warm_up = function, WARM_UP
        self.arguments: list[Tensor] = []
        self.replay: Callable[[], Tensor] | None = None

    def __call__(self, *arguments: Tensor) -> Tensor:
        if self.warm_up > 0:
            self.warm_up -= 1
            return run_on_side_stream(self.function, *arguments)
        if self.replay is None:
            self.arguments = [argument.clone() for argument in arguments]
            self.replay = record(functools.partial(self.function, *self.arguments))
        for kept, argument in zip(self.arguments, arguments, strict=True):
            kept.copy_(argument)
        return self.replay()


def run_on_side_stream(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """Autograd remembers the stream of a gradient's first use, and a graph cannot be recorded on the default stream."""
    stream, current = side_stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        result = function(*arguments)
    current.wait_stream(stream)
    return result


@functools.cache
def side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # always the same one, since each has cached memory of its own


def record(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the device meanwhile
        result = function()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
