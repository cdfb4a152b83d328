"""Run by torchrun in test_ddp.py: validation and one training step, whose results must not depend on the processes.

Batch norm is in evaluation mode in both, since its statistics are those of a process's own share.
"""

import sys

import numpy as np
import torch
import torch.distributed as dist

from dataloader import ClipSet
from losses import Mix
from trainer import Trainer
from utils import OneLineParser, is_main, parse_command_line, rank, world_size

config, _, _ = parse_command_line(OneLineParser(), sys.argv[1:])
dist.init_process_group("gloo")
trainer, clips = Trainer(config, torch.device("cpu")), ClipSet.load(config, "train")

if rank() > 0:  # as after an epoch: each process has statistics of its own, and those of rank 0 count
    for buffer in trainer.network.buffers():
        buffer.add_(1)
validation = trainer.validate(clips)

whole = np.arange(5)  # uneven shares
part = whole[rank() :: world_size()]
trainer.model.eval()
trainer.step(*clips.batch(part, trainer.device), Mix(), share=len(part) * world_size() / len(whole))
gradients = {name: value.grad for name, value in trainer.network.named_parameters() if value.grad is not None}
if is_main():
    torch.save({"validation": validation, "gradients": gradients}, config.checkpoint)
dist.destroy_process_group()
