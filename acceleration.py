"""Compile the training step; where the compiler fails, run it uncompiled."""

import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import distributed
from errors import UserError
from utils import notice

# With fewer training clips, counted over all epochs, compiling takes longer on a CPU than it saves
# (docs/speed.md).
BREAK_EVEN = 8000
# TorchInductor writes a result to memory if it is read more often than this threshold (default: 4).
# It is raised so that the output of a batch norm is computed again at each read instead.
OPTIONS: dict[str, Any] = {"realize_reads_threshold": 12}
# Lines of a compiler's message: those that do not give the reason of a failure, and those that do.
UNINFORMATIVE = re.compile(
    r"internal|exit status|compilation terminated|^(Set TORCH|You can suppress|Repro command)",
    re.IGNORECASE,
)
REASON = re.compile(r"error|fatal|fail|no |not |cannot|denied", re.IGNORECASE)


def should_compile(switch: bool | str, device: torch.device, n_clips: int) -> bool:
    """Return whether to compile the training step. `switch` is True, False or "auto".

    "auto" compiles on a GPU, and on a CPU if training is long enough. `n_clips` is the number of
    training clips, counted over all epochs.
    """
    if switch != "auto":
        return bool(switch)
    return device.type == "cuda" or n_clips >= BREAK_EVEN


def compile_module(module: nn.Module, is_required: bool) -> None:
    """Compile a module in place, at its first call and at the first call with each other shape.

    If the compiler fails in one process, every process runs the module uncompiled, after one
    notice. If compilation is required, the call raises `UserError` instead.
    """
    # One graph: by default, DistributedDataParallel splits it at its buckets of gradients.
    torch._dynamo.config.optimize_ddp = False
    module.compile(dynamic=False, backend=Compiler(OPTIONS, is_required))


@dataclass(frozen=True)
class Compiler:
    """A backend of torch.compile that calls TorchInductor with its options.

    All processes must compile the same graphs. Before a graph runs, they agree whether to run it
    compiled, since every process has to run the same collectives.
    """

    options: dict[str, Any]
    is_required: bool

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        """Compile the forward and the backward pass of a graph.

        Returns the compiled function, or the uncompiled one if the compiler fails in any process.
        Raises `UserError` if it fails and compilation is required.
        """
        compiled, problem = graph.forward, ""
        try:
            # By default, the backward pass is compiled when it first runs, too late for the
            # processes to agree.
            with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                compiled = torch._inductor.compile(graph, list(inputs), options=self.options)
        except Exception as error:
            problem = f"on {platform.node()}: {find_reason(error)}"
        problems = [text for text in distributed.from_all(problem) if text]
        if not problems:
            return compiled
        if self.is_required:
            raise UserError(
                f"compile: true, but compiling fails {problems[0]}; set it to auto or false"
            )
        notice(f"compile: compiling fails {problems[0]}; the steps run uncompiled, which is slower")
        return graph.forward


def find_reason(error: BaseException) -> str:
    """Return the last line of a compiler's message that gives the reason of the failure."""
    while isinstance(inner := getattr(error, "inner_exception", None), BaseException):
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    informative = [line for line in lines if not UNINFORMATIVE.search(line)]
    candidates = informative or lines or [type(error).__name__]
    reasons = [line for line in candidates if REASON.search(line)]
    return (reasons or candidates)[-1]
