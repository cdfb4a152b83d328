"""Run by torchrun in test_distributed.py: eight mixed steps and a validation, which must not depend
on the processes.

With `--reference` steps on the reference inputs, the last batch of which is short; else epochs on
recordings, the last batch of each is short. With `--double` the network computes in float64,
without validation.
"""

import sys

import numpy as np
import reference
import torch

from config import Config, parse_command_line
from dataloader import load_clips
from distributed import (
    barrier,
    is_main,
    is_started_by_torchrun,
    join,
    leave,
    rank,
    sum_over_ranks,
    world_size,
)
from losses import Mix, divide_mix
from model import FrontEnd
from trainer import Trainer
from utils import OneLineParser

CPU = torch.device("cpu")


def build_trainer(config: Config, dtype: torch.dtype) -> Trainer:
    torch.set_default_dtype(dtype)
    trainer = Trainer(config, CPU)
    torch.set_default_dtype(torch.float32)
    trainer.front_end = FrontEnd(config.input)  # the same numbers for all: always in float32
    trainer.network.register_forward_pre_hook(
        lambda _, arguments, inputs: (arguments, {name: x.to(dtype) for name, x in inputs.items()}),
        with_kwargs=True,
    )
    return trainer


def steps_on_reference(trainer: Trainer) -> list[float]:
    """The steps of the reference values; three clips in the last one."""
    samples, labels, losses = reference.samples(), reference.labels(), []
    trainer.network.load_state_dict(reference.parameters())
    trainer.model.train()
    for number, (lam, partner) in enumerate(reference.mixing()):
        partner = partner if number < 7 else torch.tensor([2, 0, 1])
        rows, mix = divide_mix(
            Mix(torch.tensor(lam, dtype=torch.float32), partner), rank(), world_size()
        )
        loss = trainer.step(samples[rows], labels[rows], mix, len(partner))[0]
        losses.append(sum_over_ranks(loss * len(mix.partner) / len(partner)).item())
    return losses


parser = OneLineParser()
parser.add_argument("--reference", action="store_true")
parser.add_argument("--double", action="store_true")
config, options, _ = parse_command_line(parser, sys.argv[1:])
if is_started_by_torchrun():
    join(CPU)
trainer = build_trainer(config, torch.float64 if options.double else torch.float32)
results = {}
if options.reference:
    results["losses"] = steps_on_reference(trainer)
else:
    clips = load_clips(config, "train")
    if not options.double:
        results["first_scores"], _, results["accuracy"] = trainer.validate(clips)
    results["losses"] = [trainer.train_epoch(clips, epoch)[0] for epoch in range(4)]
    if not options.double:
        results["scores"] = trainer.validate(clips)[0]
if is_main():
    values = {name: torch.from_numpy(np.asarray(value)) for name, value in results.items()}
    torch.save(values | {"state": trainer.network.state_dict()}, config.checkpoint)
barrier()
if is_started_by_torchrun():
    leave()
