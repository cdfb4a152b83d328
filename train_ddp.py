"""Train TASTgram-MFN with several processes, one on each GPU (NCCL), or on the CPU (gloo).

    torchrun --standalone --nproc_per_node=4 train_ddp.py
    torchrun --standalone --nproc_per_node=2 train_ddp.py --device cpu --epoch 10

Options, outputs and the global batch size are those of train.py.
"""

import os

import torch
import torch.distributed as dist

from train import parse_options, run
from utils import UserError, choose_device, run_script


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
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        run(config, **options)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
