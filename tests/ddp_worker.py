"""Train eight mixed steps and validate; torchrun starts this script for test_distributed.py.

The results must not depend on the number of processes. With `--reference` the steps use the
reference inputs, and the last batch is short. Otherwise they are epochs on recordings, each with a
short last batch. With `--double` the network computes in float64 and there is no validation.
"""

import sys

import numpy as np
import reference
import torch
from conftest import clips_in_memory

from classes import Classes
from command_line import OneLineParser
from config import Config, parse_command_line
from dataloader import ClipSet, load_clips
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
from model import FrontEnd
from recordings import find_classes
from sampling import Batch, divide_mix
from trainer import Averages, Trainer

CPU = torch.device("cpu")


def build_trainer(config: Config, classes: Classes, clips: ClipSet, dtype: torch.dtype) -> Trainer:
    torch.set_default_dtype(dtype)
    trainer = Trainer(config, classes, CPU, clips, clips)
    torch.set_default_dtype(torch.float32)
    trainer.front_end = FrontEnd(config.input)  # the same numbers for all: always in float32
    trainer.network.register_forward_pre_hook(
        lambda _, arguments, inputs: (arguments, {name: x.to(dtype) for name, x in inputs.items()}),
        with_kwargs=True,
    )
    return trainer


def steps_on_reference(trainer: Trainer) -> list[float]:
    """Return the losses of the reference steps; the last batch has three clips."""
    samples, labels, losses = reference.samples(), reference.labels(), []
    trainer.network.load_state_dict(reference.parameters(reference.shapes_of(trainer.network)))
    trainer.parallel_loss.train()
    *mixing, last = reference.mixing()
    for whole in (*mixing, last._replace(partner=torch.tensor([2, 0, 1]))):
        size = len(whole.partner)
        rows, mix = divide_mix(whole, rank(), world_size())
        loss = trainer.step(Batch(samples[rows], labels[rows], mix, size))[0]
        losses.append(sum_over_ranks(loss * len(mix.partner) / size).item())
    return losses


def train_epochs(trainer: Trainer) -> list[float]:
    """Return the mean losses of four epochs."""
    losses = []
    for epoch in range(4):
        trainer.parallel_loss.train()
        averages = Averages(trainer.sampler.n_steps)
        trainer.set_learning_rate(epoch)
        for batch in trainer.sampler.batches(epoch):
            averages.add(trainer.step(batch), batch)
        losses.append(averages.means()[0])
    return losses


parser = OneLineParser()
parser.add_argument("--reference", action="store_true")
parser.add_argument("--double", action="store_true")
config, options = parse_command_line(parser, sys.argv[1:])
if is_started_by_torchrun():
    join(CPU)
classes = find_classes(config)
if options.reference:
    clips = clips_in_memory(reference.samples(), reference.labels())
else:
    clips = load_clips(config, classes, "train", config.windows("train"))
dtype = torch.float64 if options.double else torch.float32
trainer = build_trainer(config, classes, clips, dtype)
results = {}
if options.reference:
    results["losses"] = steps_on_reference(trainer)
else:
    if not options.double:
        results["first_scores"], _, results["accuracy"] = trainer.validate(clips)
    results["losses"] = train_epochs(trainer)
    if not options.double:
        results["scores"] = trainer.validate(clips)[0]
if is_main():
    values = {name: torch.from_numpy(np.asarray(value)) for name, value in results.items()}
    torch.save(values | {"state": trainer.scored_network.state_dict()}, config.weights_path)
barrier()
if is_started_by_torchrun():
    leave()
