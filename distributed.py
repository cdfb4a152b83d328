"""Several processes, one per device, as torchrun starts them. In a single process every function
here does nothing.
"""

import functools
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
# How long a collective waits before the job fails: one process may read or write files while the
# others wait. One that has died is noticed at once by torchrun's agent, which ends the job.
TIMEOUT = timedelta(hours=1)


def is_started_by_torchrun() -> bool:
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)


def planned_processes() -> int:
    """How many processes torchrun has started, before they have joined."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """The number of this process on its machine, which is the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    """Whether this process writes the files and prints."""
    return rank() == 0


# ---- Joining and leaving ----


@functools.cache
def agent_store() -> dist.Store | None:
    """The key-value store that torchrun's agent keeps. None without torchrun, and where every
    attempt has a store of its own (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1), as restarts on several
    machines need: agents there count attempts differently.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=TIMEOUT)


def attempt_store() -> dist.Store | None:
    """The agent's store for the processes of this attempt alone.

    The agent (torch 2.11) keeps one store for all attempts: without a prefix, restarted processes
    would find the addresses of dead ones.
    """
    store, attempt = agent_store(), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return None if store is None else dist.PrefixStore(f"attempt {attempt}", store)


def join(device: torch.device) -> None:
    """Wait for the other processes of the job. `device` is the one this process uses, under NCCL
    its own GPU.
    """
    is_cuda, agent = device.type == "cuda", agent_store()
    if agent is not None:
        # NCCL's watchdog announces here, without a prefix, that a process has failed. Found by a
        # restarted process, it would end the new attempt as well.
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
    """Close the connections. Under NCCL this waits for the other processes: only for the end of a
    successful job.
    """
    dist.destroy_process_group()


def end_process(status: int) -> NoReturn:
    """End with this status. A process of a job does so at once: after an error, what Python and
    NCCL do at a normal exit waits for the others, which may be waiting for this one; after success,
    gloo at times aborts (torch 2.11).
    """
    if not is_started_by_torchrun():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# ---- Failing together ----


def is_first_to_fail() -> bool:
    """Whether no other process of this attempt has reported an error: usually all meet the same
    one, or one error ends the others.
    """
    try:
        store = attempt_store()
        return store is None or store.add("errors", 1) == 1
    except RuntimeError:  # the agent has ended
        return True


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether the error says that another process has ended."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error)


# ---- Collectives ----


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def from_main(function: Callable[[], T]) -> T:
    """Call `function` in the main process alone; every process gets what it returns, or the error
    that it raises.
    """
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
    """The values of all processes."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of each element over all processes, bit for bit the same in each; differentiable."""
    return all_reduce(values) if dist.is_initialized() else values


@torch.library.custom_op("tastgram_mfn::all_reduce", mutates_args=())
def all_reduce(values: Tensor) -> Tensor:
    """An operation that the compiler leaves as it is. Of PyTorch's own (torch 2.11) it loses one in
    the backward pass, and turns the other into a sum in place, also where another part of the graph
    still reads the summand.
    """
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


all_reduce.register_fake(
    lambda values: torch.empty_like(values, memory_format=torch.contiguous_format)
)
all_reduce.register_autograd(lambda context, gradient: all_reduce(gradient))
