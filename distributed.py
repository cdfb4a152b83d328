"""Communication between several processes, one per device, that torchrun has started.

In a single process the collectives do nothing.
"""

import functools
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
# How long a collective waits before the job fails: one process may read or write files while the
# others wait. If a process dies, torchrun's agent notices at once and ends the job.
TIMEOUT = timedelta(hours=1)


def environment(name: str, default: str = "") -> str:
    """Return an environment variable; the default where it is not set, or empty."""
    return os.environ.get(name) or default


def is_started_by_torchrun() -> bool:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(environment(name) for name in names)


def planned_processes() -> int:
    """Return the number of processes that torchrun has started; valid before `join`, too."""
    return int(environment("WORLD_SIZE", "1"))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Return the number of this process on its computer, which is the index of its GPU."""
    return int(environment("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Return whether this process is the one that writes files and prints."""
    return rank() == 0


# ---- Joining and leaving ----


@functools.cache
def agent_store() -> dist.Store | None:
    """Connect to the key-value store of torchrun's agent.

    Returns None without torchrun, and if each attempt has a separate store
    (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1). Restarts on several computers need separate stores,
    because the agents count attempts differently.
    """
    if environment("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=TIMEOUT)


def attempt_store() -> dist.Store | None:
    """Return the agent's store with a prefix for this attempt of the job.

    The agent (torch 2.11) has one store for all attempts: without a prefix, restarted processes
    would find the addresses of dead ones.
    """
    store, attempt = agent_store(), environment("TORCHELASTIC_RESTART_COUNT", "0")
    return None if store is None else dist.PrefixStore(f"attempt {attempt}", store)


def join(device: torch.device) -> None:
    """Connect to the other processes of the job: with NCCL if `device` is a GPU, else with gloo."""
    is_cuda = device.type == "cuda"
    agent = agent_store()
    if agent is not None:
        # NCCL's watchdog sets this key, without a prefix, when a process has failed. A restarted
        # process that finds it would end the new attempt as well.
        agent.delete_key("exception_dump")
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        timeout=TIMEOUT,
        store=attempt_store() or next(dist.rendezvous("env://", timeout=TIMEOUT))[0],
        rank=int(os.environ["RANK"]),
        world_size=planned_processes(),
        device_id=device if is_cuda else None,
    )


def leave() -> None:
    """Close the connections at the end of a successful job.

    After an error, use `end_process` instead: NCCL would wait here for the other processes.
    """
    dist.destroy_process_group()


def end_process(status: int) -> NoReturn:
    """End this process with an exit status, in a job without the cleanup of a normal exit.

    After an error, the cleanup of NCCL waits for the other processes, which may be waiting for this
    one. After success, gloo sometimes aborts during the cleanup (torch 2.11).
    """
    if not is_started_by_torchrun():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# ---- Failing together ----


def fails_first() -> bool:
    """Count this process as failed; return whether it is the first in this attempt of the job.

    Usually all processes raise the same error, or the error of one ends the others.
    """
    try:
        store = attempt_store()
        return store is None or store.add("errors", 1) == 1
    except RuntimeError:  # the agent has ended
        return True


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether the error means that another process has ended."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error)


# ---- Collectives ----


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def from_main(function: Callable[[], T]) -> T:
    """Call `function` in the main process; every process returns its result or raises its error."""
    if not dist.is_initialized():
        return function()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def from_all(value: T) -> list[T]:
    """Return the values of all processes, in the order of their ranks."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def average_gradients(module: nn.Module) -> nn.Module:
    """Wrap a module so that its gradients are averaged over all processes; with one, return it."""
    if world_size() == 1:
        return module
    # PyTorch warns of strides that differ where the size is 1, which changes nothing.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    # The only buffers are batch norm statistics, which are the same in all processes.
    return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)


def share_of_rows() -> slice:
    """Return which rows this process computes, where they are divided among the processes in
    turn.
    """
    return slice(rank(), None, world_size())


def select_share(count: int) -> np.ndarray:
    """Return which of `count` rows this process computes, where every row is computed once."""
    return np.arange(count)[share_of_rows()]


def gather_rows(share: Tensor, count: int) -> Tensor:
    """Return all rows `(count, ...)`, from the shares that `share_of_rows` gives the processes.
    Differentiable.
    """
    rows = share.new_zeros(count, *share.shape[1:])
    rows[share_of_rows()] = share
    return sum_over_ranks(rows)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum each element over all processes; every process gets the same bits. Differentiable."""
    return all_reduce(values) if dist.is_initialized() else values


@torch.library.custom_op("tastgram_mfn::all_reduce", mutates_args=())
def all_reduce(values: Tensor) -> Tensor:
    """Sum over all processes, in an operation that the compiler leaves unchanged.

    PyTorch has two differentiable operations for this, and torch 2.11 compiles neither correctly:
    one is missing from the compiled backward pass, the other is turned into a sum in place although
    the graph still reads its input.
    """
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


all_reduce.register_fake(
    lambda values: torch.empty_like(values, memory_format=torch.contiguous_format)
)
all_reduce.register_autograd(lambda context, gradient: all_reduce(gradient))
