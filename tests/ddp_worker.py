"""Run by torchrun in test_ddp.py: validate untrained weights, whose batch norm statistics are the same everywhere."""

import sys

import torch
import torch.distributed as dist

from dataloader import ClipSet
from trainer import Trainer
from utils import OneLineParser, is_main, parse_command_line

config, _, _ = parse_command_line(OneLineParser(), sys.argv[1:])
dist.init_process_group("gloo")
trainer = Trainer(config, torch.device("cpu"))
loss, accuracy = trainer.validate(ClipSet.load(config, "train"))
if is_main():
    print("validated", repr(loss), repr(accuracy))
dist.destroy_process_group()
