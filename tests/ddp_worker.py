"""Run by torchrun in test_ddp.py: validation and three training steps, whose results must not depend on the processes.

Batch norm is in evaluation mode, since its statistics are those of a process's own share, and nothing is shuffled.
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

trainer.model.eval()
before = {name: value.detach().clone() for name, value in trainer.network.named_parameters()}
gradients = {}
for whole in (np.arange(7), np.arange(4, 12), np.arange(2, 9)):  # shares of 3, 2 and 2 clips, or 4 and 3
    part = whole[rank() :: world_size()]
    trainer.step(*clips.batch(part, trainer.device), Mix(), share=len(part) * world_size() / len(whole))
    if not gradients:  # of the first step
        gradients = {n: p.grad.clone() for n, p in trainer.network.named_parameters() if p.grad is not None}
changes = {name: value.detach() - before[name] for name, value in trainer.network.named_parameters()}
if is_main():
    torch.save({"validation": validation, "gradients": gradients, "changes": changes}, config.checkpoint)
dist.destroy_process_group()
