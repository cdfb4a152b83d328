"""Training: one step, one epoch, validation; the run around them, with its history, checkpoints and
resuming.
"""

import contextlib
import math
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import distributed
import utils
from acceleration import compile_module, is_to_compile
from checkpoint import (
    HISTORY,
    RunFiles,
    State,
    build_network,
    check_configuration,
    load_checkpoint,
    save_checkpoint,
    take_weights,
)
from config import Config
from corpus import MACHINE, alternatives, machines_of_classes
from dataloader import ClipSet, fingerprint, shuffled_batches
from distributed import is_main, rank, sum_over_ranks, world_size
from inference import Outputs, pack_embeddings, run_network, score_classes
from losses import Mix, Objective, divide_mix
from model import FrontEnd, TASTgramMFN
from utils import UserError, notice, random_stream

READ_EVERY = 20  # steps: their losses are read from the device together, which waits for it
ACTIVATIONS = 48_000_000  # bytes that a clip of a batch keeps for its gradients, in half precision
OTHER_MEMORY = 2_000_000_000  # bytes on a GPU: CUDA's context and libraries, weights, validation


class TrainingLoss(nn.Module):
    """What a training step computes, from waveform and log-mel to the loss; compiled, and wrapped
    for several processes, as a whole. Mixup and margin are computed in float32, the network between
    them in `precision`.
    """

    def __init__(self, network: TASTgramMFN, objective: Objective, precision: torch.dtype) -> None:
        super().__init__()
        self.network, self.objective, self.precision = network, objective, precision

    def forward(
        self, inputs: dict[str, Tensor], labels: Tensor, mix: Mix | None
    ) -> tuple[Tensor, Tensor]:
        """Inputs as `FrontEnd` gives them and labels `(B,)` -> mean loss and accuracy, scalars."""
        if mix is not None:
            inputs = {name: mix(x) for name, x in inputs.items()}
        with utils.autocast(labels.device, self.precision):
            similarity, _ = self.network(**inputs)
        loss = self.objective.loss(similarity, labels, mix)
        return loss, self.objective.accuracy(similarity.detach(), labels, mix)


class EpochPlan(NamedTuple):
    """What is drawn for an epoch, batch by batch: the clips that this process reads and how it
    mixes them, on the device, and the number of clips of the whole batch.
    """

    shares: list[np.ndarray]
    mixes: Sequence[Mix | None]
    sizes: list[int]


class Trainer:
    """The network and its optimiser on one device. Under torchrun each process has one of its own,
    and `batch_size` is divided between them.
    """

    def __init__(self, config: Config, device: torch.device, n_clips: int = 0) -> None:
        """`n_clips` is how many clips are to be trained on in all epochs: whether compiling on a
        CPU pays.
        """
        utils.set_up_numerics()
        utils.keep_freed_memory()
        torch.backends.cudnn.benchmark = (
            True  # choose the fastest kernels: the shapes of a training do not change
        )
        self.config, self.device = config, device
        self.objective = Objective(config.mode, config.m, config.s)
        self.precision = utils.choose_precision(config.precision, device)
        self.network = build_network(config).move_to(device)
        self.front_end = FrontEnd(config.input).to(device)
        self.loss = TrainingLoss(self.network, self.objective, self.precision)
        if is_to_compile(config.compile, device, n_clips):
            compile_module(self.loss, is_required=config.compile is True)
        self.model: nn.Module = self.loss
        if world_size() > 1:
            # The only buffers are batch norm statistics, which are the same in all processes.
            # PyTorch warns of strides that differ where the size is 1, which changes nothing.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            self.model = DistributedDataParallel(
                self.loss, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.alternatives = torch.from_numpy(alternatives(config)).to(device)
        self.planner, self.plans = ThreadPoolExecutor(1), dict[tuple[int, int], Future[EpochPlan]]()

    def step(
        self, samples: Tensor, labels: Tensor, mix: Mix | None, total: int | None = None
    ) -> Tensor:
        """One optimiser step on samples int16 `(B, T)`. Returns loss and accuracy `(2,)` on the
        device.

        `total` is the size of the whole batch, where these clips are this process's share of it,
        followed by partners from other shares.
        """
        own = own_clips(labels, mix)
        total = total or own
        self.optimizer.zero_grad()
        # For a shorter batch the step would be compiled once more.
        with torch.compiler.set_stance(
            "default" if total == self.config.batch_size else "force_eager"
        ):
            loss, accuracy = self.model(self.front_end(samples), labels, mix)
        weight = (
            own * world_size() / total
        )  # of this process's gradient: the shares of a batch may differ in size
        self.scaler.scale(loss * weight).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return torch.stack([loss.detach(), accuracy])

    def train_epoch(self, clips: ClipSet, epoch: int, title: str = "") -> tuple[float, float]:
        """One pass over the clips. Returns mean loss and accuracy; raises `UserError` at a loss
        that is not finite.
        """
        self.model.train()
        self.set_learning_rate(epoch)
        shares, mixes, totals = self.plan(len(clips), epoch)
        results = torch.zeros(len(totals), 2, device=self.device)
        progress = tqdm(
            total=len(totals),
            desc=title,
            unit="step",
            leave=False,
            disable=None if is_main() else True,
        )
        with progress:
            for index, (samples, labels) in enumerate(clips.batches(shares, self.device)):
                results[index] = self.step(samples, labels, mixes[index], totals[index])
                progress.update()
                if (index + 1) % READ_EVERY == 0 or index + 1 == len(totals):
                    first = index - index % READ_EVERY
                    losses = sum_over_ranks(results[first : index + 1, 0] / world_size()).tolist()
                    for number, loss in enumerate(losses, start=epoch * len(totals) + first + 1):
                        self.check_finite("loss", loss, f"step {number}")
                    progress.set_postfix_str(f"loss {losses[-1]:.3f}")
        sizes = torch.tensor(
            [[own_clips(*pair)] for pair in zip(shares, mixes, strict=True)], device=self.device
        )
        loss, accuracy = (
            sum_over_ranks((results.double() * sizes).sum(dim=0)) / len(clips)
        ).tolist()
        return loss, accuracy

    def plan(self, count: int, epoch: int) -> EpochPlan:
        """The plan of an epoch with so many clips; a thread makes that of the next one meanwhile."""
        ready = self.plans.pop((count, epoch), None) or self.planner.submit(
            self.draw_plan, count, epoch
        )
        self.plans = {(count, epoch + 1): self.planner.submit(self.draw_plan, count, epoch + 1)}
        return ready.result()

    def draw_plan(self, count: int, epoch: int) -> EpochPlan:
        """Partners come from the whole batch, whatever the number of processes."""
        least = max(2, world_size())
        batches = shuffled_batches(count, self.config.batch_size, self.config.seed, epoch, least)
        sizes, shares, mixes = [len(batch) for batch in batches], list[np.ndarray](), list[Mix]()
        for step, batch in enumerate(batches, start=epoch * len(batches)):
            stream = random_stream(self.config.seed, utils.MIXING, step)
            mix = self.objective.draw_mix(self.config.alpha, stream, len(batch))
            if mix is None:
                shares.append(np.array_split(batch, world_size())[rank()])
            else:
                rows, mix = divide_mix(mix, rank(), world_size())
                shares.append(batch[rows])
                mixes.append(mix)
        if not mixes:
            return EpochPlan(shares, [None] * len(batches), sizes)
        lam = torch.stack([mix.lam for mix in mixes]).to(self.device)
        partner = torch.cat([mix.partner for mix in mixes]).to(self.device)
        parts = partner.split([len(mix.partner) for mix in mixes])
        return EpochPlan(
            shares, [Mix(*pair) for pair in zip(lam.unbind(), parts, strict=True)], sizes
        )

    def learning_rate(self, epoch: int) -> float:
        """Of the epoch with this number, from 0: a cosine from `lr` to a tenth of it."""
        cosine = math.cos(math.pi * epoch / self.config.epoch)
        return self.config.lr * (0.1 + 0.9 * (1.0 + cosine) / 2.0)

    def set_learning_rate(self, epoch: int) -> None:
        self.optimizer.param_groups[0]["lr"] = self.learning_rate(epoch)

    def check_finite(self, name: str, loss: float, moment: str) -> None:
        """Raise `UserError` with what to try where a loss is not finite; no checkpoint has seen it."""
        if not math.isfinite(loss):
            remedies = (
                "a lower --lr"
                if self.precision == torch.float32
                else "a lower --lr or --precision fp32"
            )
            lr = self.optimizer.param_groups[0]["lr"]
            raise UserError(
                f"the {name} is {loss} at {moment} (learning rate {lr:.3g}): try {remedies}"
            )

    def validate(self, clips: ClipSet) -> tuple[np.ndarray, float, float]:
        """The anomaly scores (float64), the loss, which is the mean score against the own class,
        and the accuracy, unmixed.
        """
        share, labels = self.run_share(clips), clips.labels[rank() :: world_size()].to(self.device)
        score = partial(self.objective.anomaly_score, share.similarity, dtype=torch.float64)
        each = score_classes(self.alternatives[labels], score)
        hits = (share.similarity.argmax(dim=1) == labels).double()
        columns = torch.stack([each.amin(dim=1), each[:, 0], hits], dim=1)
        scores, losses, hits = self.gather(columns, len(clips)).T.cpu().numpy()
        return scores, float(losses.mean()), float(hits.mean())

    def embed(self, clips: ClipSet) -> Tensor:
        """The embeddings `(n, E)` of the clips."""
        return self.gather(self.run_share(clips, "embeddings").embedding, len(clips))

    def run_share(self, clips: ClipSet, title: str | None = None) -> Outputs:
        """What the network gives, in evaluation mode and float32, for the clips that are this
        process's share. A title is that of a progress bar.
        """
        numbers = np.arange(len(clips))[rank() :: world_size()]
        batch_size, title = self.config.batch_size, title if is_main() else None
        return run_network(
            self.network, self.front_end, clips, numbers, batch_size, self.device, title=title
        )

    def gather(self, share: Tensor, count: int) -> Tensor:
        """The rows of all clips, from the shares of all processes."""
        rows = share.new_zeros(count, share.shape[1])
        rows[rank() :: world_size()] = share
        return sum_over_ranks(rows)

    def memory_needed(self) -> int:
        """Bytes of a GPU that training takes besides the clips, estimated from the batch."""
        share = math.ceil(self.config.batch_size / world_size())
        return OTHER_MEMORY + ACTIVATIONS * (2 if self.precision == torch.float32 else 1) * share

    def state(self) -> State:
        return {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: State) -> None:
        """Continue from a state. How the optimiser computes, and its learning rate, are this run's
        own.
        """
        self.network.load_state_dict(state["model"])
        own = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": own})
        if state["scaler"]:  # it has a state in fp16 only
            self.scaler.load_state_dict(state["scaler"])


def own_clips(rows: Tensor | np.ndarray, mix: Mix | None) -> int:
    """How many rows are clips of this process: with several processes, the others serve as partners
    only.
    """
    return len(rows if mix is None else mix.partner)


class Run:
    """A training from its first epoch to its last, with a checkpoint after each."""

    def __init__(
        self, config: Config, device: torch.device, train_clips: ClipSet, valid_clips: ClipSet
    ) -> None:
        """Raises `UserError` where the clips are too few, or not the same on all machines."""
        least = max(2, world_size())
        processes = (
            f"{world_size()} processes need one each"
            if world_size() > 1
            else "batch norm needs two"
        )
        if len(train_clips) < least:
            raise UserError(
                f"{len(train_clips)} clips to train on: {processes}; bring more recordings, or raise split_ratio"
            )
        if config.batch_size < least:
            raise UserError(f"batch_size: {config.batch_size} clips a step: {processes}; raise it")
        self.fingerprint = fingerprint([train_clips, valid_clips])
        if distributed.from_main(lambda: self.fingerprint) != self.fingerprint:
            raise UserError(
                f"{config.data_root} on {platform.node()}: the clips are not those of the first process; give "
                f"every machine the same recordings"
            )
        self.config, self.files = config, RunFiles(config.checkpoint)
        self.trainer = Trainer(config, device, len(train_clips) * config.epoch)
        self.train_clips, self.valid_clips = train_clips, valid_clips
        self.history: list[dict[str, float]] = []  # a row per epoch
        self.best_loss = math.inf
        self.saved = 0  # epochs whose files are written
        self.moment = time.monotonic()  # at which the epoch before ended, or the run began

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return len(self.history)

    def begin(self, weights: Mapping[str, Tensor] | None) -> None:
        """Start a run, with the weights of `init_from` if there are any. Raises `UserError` where
        they do not fit, or a machine has no clips to train on.
        """
        if unseen := [
            machine
            for machine in self.valid_clips.machines
            if machine not in self.train_clips.machines
        ]:
            raise UserError(
                f"all recordings of {', '.join(unseen)} are held out for validation: bring more (a long one can be cut "
                f"into several), or raise split_ratio"
            )
        machines, only_held_out = (
            machines_of_classes(self.config),
            set(self.valid_clips.labels.tolist()),
        )
        only_held_out -= set(self.train_clips.labels.tolist())
        if only_held_out:
            where = ", ".join(
                dict.fromkeys(" ".join(machines[label]) for label in sorted(only_held_out))
            )
            notice(
                f"all recordings of {len(only_held_out)} classes are held out for validation, so these are not learned "
                f"(attributes of {where}); a higher split_ratio or another seed may keep them"
            )
        if weights is not None:
            take_weights(self.trainer.network, weights, Path(self.config.init_from))

    def resume(self, state: State) -> None:
        """Continue from a checkpoint of the same configuration and clips; a `UserError` names what
        differs.
        """
        if "history" not in state:
            raise UserError(
                f"{self.files.best}: only weights, no run to resume; start again with --overwrite"
            )
        self.config = self.config.model_copy(update={"init_from": state["config"]["init_from"]})
        remedy = "give the same, or start again with --overwrite"
        check_configuration(self.config, state, self.files.last, remedy)
        if state["clips"] != self.fingerprint:
            raise UserError(
                f"{self.files.last}: the clips under {self.config.data_root} are not those the run began with; "
                f"bring them back, or start again with --overwrite"
            )
        try:
            self.trainer.load_state(state)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{self.files.last}: its weights or optimiser state do not fit; start again with --overwrite"
            ) from None
        self.history, self.best_loss = state["history"], state["best_loss"]
        self.saved = self.epoch
        if is_main():
            self.write_history()  # a crash may have come between checkpoint and history

    def fit(self) -> None:
        """Train from the present epoch to the last; the files of an epoch are written at its end."""
        log = None
        if self.config.tensorboard and is_main():
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            log = SummaryWriter(
                str(self.files.tensorboard), purge_step=self.saved + 1
            )  # drops epochs after a crash
        self.moment = time.monotonic()
        with self.stoppable():
            while self.epoch < self.config.epoch:
                scores, is_best = self.run_epoch()
                if is_main():
                    self.save(scores, is_best)
                    self.report(is_best, log)
                # the disk may be slow, and a process that ends earlier could end this one
                distributed.barrier()

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[None]:
        """Say, when a user stops the run, what is kept of it."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            how = (
                f"; --resume continues after epoch {self.saved}"
                if self.saved
                else " before the first checkpoint"
            )
            notice(f"stopped{how}")
            raise

    def run_epoch(self) -> tuple[np.ndarray, bool]:
        """Train and validate once. Returns the scores of the validation clips, and whether their
        loss is the lowest.
        """
        title = f"epoch {self.epoch + 1}/{self.config.epoch}"
        train_loss, train_accuracy = self.trainer.train_epoch(self.train_clips, self.epoch, title)
        scores, valid_loss, valid_accuracy = self.trainer.validate(self.valid_clips)
        self.trainer.check_finite(
            "validation loss", valid_loss, f"the end of epoch {self.epoch + 1}"
        )
        lr, now = self.trainer.learning_rate(self.epoch), time.monotonic()
        row = (
            self.epoch + 1,
            lr,
            train_loss,
            train_accuracy,
            valid_loss,
            valid_accuracy,
            now - self.moment,
        )
        self.history.append(dict(zip(HISTORY, row, strict=True)))
        self.moment = now
        is_best = valid_loss < self.best_loss
        self.best_loss = min(valid_loss, self.best_loss)
        return scores, is_best

    def state(self, scores: np.ndarray) -> State:
        """What a checkpoint holds. The scores of the validation clips are in it: `eval.py` takes
        its thresholds from them.
        """
        held_out = self.valid_clips.clips[MACHINE].assign(score=scores)
        return self.trainer.state() | {
            "epoch": self.epoch,
            "best_loss": self.best_loss,
            "history": self.history,
            "held_out": held_out.to_dict("list"),
            "clips": self.fingerprint,
            "clip_counts": {"training": len(self.train_clips), "validation": len(self.valid_clips)},
            "config": self.config.model_dump(),
            "versions": utils.versions(),
        }

    def embed(self) -> State:
        """The embeddings of the clips under the present weights."""
        parts = {"bank": self.train_clips, "held_out": self.valid_clips}
        return {
            name: pack_embeddings(self.trainer.embed(clips), clips.labels)
            for name, clips in parts.items()
        }

    def add_embeddings(self) -> None:
        """Put the embeddings of the clips under the best weights into their checkpoint, unless they
        are in it.
        """
        best = self.files.best

        def weights_without() -> State | None:
            state = load_checkpoint(best)
            return None if "embeddings" in state else state["model"]

        with self.stoppable():
            weights = distributed.from_main(weights_without)
            if weights is None:
                return
            self.trainer.network.load_state_dict(weights)
            embeddings = self.embed()
            if is_main():
                save_checkpoint(load_checkpoint(best) | {"embeddings": embeddings}, best)
                print(f"embeddings of the clips: {best}", flush=True)
            distributed.barrier()  # as after the last epoch

    def save(self, scores: np.ndarray, is_best: bool) -> None:
        """Write the checkpoints and `history.csv`. Cut anywhere, `--resume` repeats at most this
        epoch: the best weights come first, and serve where the last state is not there yet.
        """
        save_checkpoint(
            self.state(scores), *([self.files.best] if is_best else []), self.files.last
        )
        self.write_history()
        self.saved = self.epoch

    def write_history(self) -> None:
        utils.write_csv(self.files.history, pd.DataFrame(self.history))

    def report(self, is_best: bool, log: Any) -> None:
        """Print a line about the last epoch, whose files are written, and log it to TensorBoard."""
        row = self.history[-1]
        tqdm.write(
            f"epoch {row['epoch']}/{self.config.epoch}  lr {row['lr']:.2e}  "
            f"train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.3f}  "
            f"valid loss {row['valid_loss']:.4f} accuracy {row['valid_accuracy']:.3f}  "
            f"{row['seconds']:.1f} s{'  best' if is_best else ''}"
        )
        sys.stdout.flush()
        if log:
            for name in HISTORY[1:]:
                log.add_scalar(name, row[name], row["epoch"])
            log.flush()
