"""Run by torchrun in test_ddp.py: validation and three training steps, whose results must not depend on the processes.

Batch norm is in evaluation mode, since its statistics are those of a process's own share, and nothing is shuffled.
"""

import sys

import numpy as np
import torch

from config import parse_command_line
from dataloader import load_clips
from distributed import is_main, join, leave, rank, world_size
from trainer import Trainer
from utils import OneLineParser

CPU = torch.device("cpu")
config, _, _ = parse_command_line(OneLineParser(), sys.argv[1:])
join(CPU)
trainer, clips = Trainer(config, CPU), load_clips(config.data_root, config.machines, "train", config.num_workers)

if rank() > 0:  # as after an epoch: each process has statistics of its own, and those of rank 0 count
    for buffer in trainer.network.buffers():
        buffer.add_(1)
scores, accuracy = trainer.validate(clips)

trainer.model.eval()
before = {name: value.detach().clone() for name, value in trainer.network.named_parameters()}
gradients = {}
plan = [np.arange(7), np.arange(4, 12), np.arange(2, 9)]  # shares of 3, 2 and 2 clips, or 4 and 3
parts = [whole[rank() :: world_size()] for whole in plan]
for whole, batch in zip(plan, clips.batches(parts, CPU), strict=True):
    trainer.step(*batch, None, len(whole))
    if not gradients:  # of the first step
        gradients = {n: p.grad.clone() for n, p in trainer.network.named_parameters() if p.grad is not None}
changes = {name: value.detach() - before[name] for name, value in trainer.network.named_parameters()}
if is_main():
    results = {"scores": torch.from_numpy(scores), "accuracy": accuracy, "gradients": gradients, "changes": changes}
    torch.save(results, config.checkpoint)
leave()
