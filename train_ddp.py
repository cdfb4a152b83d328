"""Train TASTgram-MFN with several processes, one on each GPU (NCCL), or on the CPU (gloo).

    torchrun --standalone --nproc_per_node=4 train_ddp.py
    torchrun --standalone --nproc_per_node=4 --max-restarts=3 train_ddp.py     # goes on by itself after a crash
    torchrun --standalone --nproc_per_node=2 train_ddp.py --device cpu --epoch 10
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-id=a_name --rdzv-endpoint=HOST:29400 train_ddp.py

Options, outputs and the global batch size are those of train.py. With several machines, give all of them the same
recordings, and for restarts the same save_path on a shared disk.
"""

import json
import os
import secrets
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from train import parse_options, run
from utils import UserError, agent_store, choose_device, fail, forget_errors, run_script

WAIT = timedelta(minutes=10)  # for another process, before the job is given up


def main() -> None:
    config, options = parse_options(__doc__)
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise UserError(
            "train_ddp.py is started by torchrun: torchrun --standalone --nproc_per_node=N train_ddp.py "
            "(for one process: python train.py)"
        )
    device = choose_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=WAIT, **meeting_point())
    try:
        run(config, **options)
    except UserError as error:
        fail(str(error))  # before the connections close, which the others would take for the cause
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        fail("another process of the job has ended or does not answer; see what it has said")
    finally:
        dist.destroy_process_group()


def meeting_point() -> dict[str, Any]:
    """Arguments that have `init_process_group` meet the processes of this attempt.

    The agent of torchrun (2.11) keeps one store for all attempts of a job: processes that it has restarted would find
    the addresses of the dead ones there and wait for them. So the living first agree on a corner of the store.
    """
    store = agent_store(WAIT)
    if store is None:
        return {}
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    attempt = agree_on_attempt(store, rank, world_size)
    if rank == 0:
        forget_errors(store)
    return {"store": dist.PrefixStore(attempt, store), "rank": rank, "world_size": world_size}


def agree_on_attempt(store: dist.Store, rank: int, world_size: int) -> str:
    """A name for this attempt that no earlier one has had, the same in all its processes.

    Each process leaves a name of its own. Rank 0 lists the names it finds until all that are on the list have
    answered: those of dead processes cannot, and are overwritten by the living ones.
    """
    own = secrets.token_hex(8)
    store.set(f"name of {rank}", own)
    deadline = time.monotonic() + WAIT.total_seconds()
    while time.monotonic() < deadline:
        if rank == 0:
            names = [own, *(store.get(f"name of {other}").decode() for other in range(1, world_size))]
            store.set("names", json.dumps(names))
            if all(store.check([f"{own} heard by {name}"]) for name in names[1:]):
                return own
        else:
            names = json.loads(store.get("names"))
            if own in names:
                store.set(f"{names[0]} heard by {own}", "")
                return names[0]
        time.sleep(0.02)
    raise UserError(f"the other processes of the job have not come within {WAIT}")


def is_lost_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error)


if __name__ == "__main__":
    run_script(main)
