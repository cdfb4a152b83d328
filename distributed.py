"""Several processes, one per device, as torchrun starts them. In a single process every function here does nothing."""

import functools
import os
import platform
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # for another process, before the job is given up


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
def attempt_store() -> dist.Store | None:
    """The key-value store that torchrun's agent keeps, for the processes of this attempt alone.

    The agent (torch 2.11) keeps one store for all attempts: without a prefix, restarted processes would find the
    addresses of dead ones. None without torchrun, and where TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives every attempt
    a store of its own, as restarts on several machines need: the agents there count attempts differently.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=TIMEOUT)
    return dist.PrefixStore(f"attempt {restart_count()}", store)


def join(device: torch.device) -> None:
    """Wait for the other processes of the job. `device` is the one this process uses, under NCCL its own GPU."""
    backend, store = "nccl" if device.type == "cuda" else "gloo", attempt_store()
    if store is None:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        rank_, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank_, world_size=size)


def leave() -> None:
    dist.destroy_process_group()


def restart_count() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def is_restarted() -> bool:
    """Whether torchrun has restarted the processes: the agent of at least one of them counts it."""
    counts = [restart_count()] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(counts, restart_count())
    return max(counts) > 0


def job_name() -> str:
    """The same for all attempts of a torchrun job, different for other jobs; empty without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{name} {platform.node()} {os.getppid()}" if name == "none" else name  # "none" is everybody's default


# ---- Failing together ----


def is_first_to_fail() -> bool:
    """Whether no other process of this attempt has reported an error: usually all meet the same one, or one error
    ends the others.
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
    if dist.is_initialized():
        dist.barrier()


def from_main(function: Callable[[], T]) -> T:
    """Call `function` in the main process alone; every process gets what it returns."""
    if not dist.is_initialized():
        return function()
    values = [function() if is_main() else None]
    dist.broadcast_object_list(values, src=0)
    return values[0]  # type: ignore[return-value]


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of each element over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def copy_buffers_from_main(module: nn.Module) -> None:
    """Give every process the buffers (batch norm statistics) of the main process."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
