"""Compilation of the training step, and what happens where it fails."""

import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import distributed
from utils import UserError, notice

# Clips to train on in all epochs, below which compiling on a CPU takes longer than it saves
# (docs/speed.md).
BREAK_EVEN = 8000
# Of TorchInductor. A batch norm's output has more reads than the default threshold of 4; with this
# one it is computed again where it is read, instead of written to memory and read back.
OPTIONS: dict[str, Any] = {"realize_reads_threshold": 12}
SAYS_NOTHING = re.compile(
    r"internal|exit status|compilation terminated|^(Set TORCH|You can suppress|Repro command)",
    re.IGNORECASE,
)


def is_to_compile(switch: bool | str, device: torch.device, n_clips: int) -> bool:
    """Whether to compile the step: with "auto" on a GPU, and on a CPU for `n_clips` clips of all
    epochs that pay.
    """
    if switch != "auto":
        return bool(switch)
    return device.type == "cuda" or n_clips >= BREAK_EVEN


def compile_module(module: nn.Module, is_required: bool) -> None:
    """Compile a module in place, at its first call and for each shape anew. Where this fails in one
    process, all of them run the module uncompiled, with one notice; if it is required, the call
    raises an error that names the key.
    """
    torch._dynamo.config.optimize_ddp = (
        False  # one graph: it would be cut where buckets of gradients end
    )
    module.compile(dynamic=False, backend=Compiler(OPTIONS, is_required))


@dataclass(frozen=True)
class Compiler:
    """TorchInductor as a backend of torch.compile, with its options. All processes have to call it
    for the same graphs: they agree on each, before any of them runs it, since they have to run the
    same collectives.
    """

    options: dict[str, Any]
    is_required: bool

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        """Compile forward and backward pass. Returns what computes the same, compiled or not;
        raises `UserError`.
        """
        compiled, problem = graph.forward, ""
        try:
            # PyTorch compiles the backward pass when it is first needed, which is too late to
            # agree.
            with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                compiled = torch._inductor.compile(graph, list(inputs), options=self.options)
        except Exception as error:
            problem = f"on {platform.node()}: {find_reason(error)}"
        problems = [text for text in distributed.from_all(problem) if text]
        if not problems:
            return compiled
        if self.is_required:
            raise UserError(f"compile: true, but it fails {problems[0]}; set it to auto or false")
        notice(f"compile: it fails {problems[0]}; the steps run uncompiled, which is slower")
        return graph.forward


def find_reason(error: BaseException) -> str:
    """The last line of a compiler's message that says what is wrong."""
    while isinstance(inner := getattr(error, "inner_exception", None), BaseException):
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = (
        [line for line in lines if not SAYS_NOTHING.search(line)] or lines or [type(error).__name__]
    )
    telling = [
        line
        for line in lines
        if re.search(r"error|fatal|fail|no |not |cannot|denied", line, re.IGNORECASE)
    ]
    return (telling or lines)[-1]
