"""The training: its loop, the step, the validation, and the files it leaves."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

import utils
from acceleration import compile_module, should_compile
from averaging import MovingAverage, check_decay
from checkpoint import RESTART, Checkpoint, EpochResult, HeldOut, RunFiles
from classes import Classes
from config import Config
from dataloader import ClipSet, fingerprint_of, keep_on_gpu
from distributed import (
    average_gradients,
    barrier,
    from_main,
    gather_rows,
    is_main,
    select_share,
    sum_over_ranks,
    world_size,
)
from errors import UserError
from evaluation.scores import Outputs, Scorer, StoredClips
from inference import build_network, make_bank, run_network
from losses import Mix, Objective
from model import CHANNELS, HEAD_WEIGHTS, FrontEnd, TASTgramMFN
from sampling import Batch, Sampler
from utils import notice

READ_EVERY = 20  # steps: reading their losses waits for the device
# Bytes that a clip keeps for its gradients, in half precision, with the published channels
ACTIVATIONS = 48_000_000
OTHER_MEMORY = 2_000_000_000  # bytes on a GPU: CUDA's context and libraries, weights, validation


class Trainer:
    """A training on one device, with a checkpoint after each epoch.

    Under torchrun each process has a trainer, and computes its share of each batch. A new run
    starts from random weights, or from those that `start_from` is given; `resume` continues one.
    """

    def __init__(
        self,
        config: Config,
        classes: Classes,
        device: torch.device,
        train_clips: ClipSet,
        valid_clips: ClipSet,
    ) -> None:
        utils.set_up_numerics()
        utils.keep_freed_memory()
        torch.backends.cudnn.benchmark = True  # choose the fastest kernels: the shapes stay
        self.config, self.classes, self.device = config, classes, device
        self.train_clips, self.valid_clips = train_clips, valid_clips
        self.sampler = Sampler(config, train_clips, device)
        self.fingerprint = fingerprint_of(train_clips, valid_clips)
        self.files = RunFiles(config.weights_path)
        self.history: list[EpochResult] = []
        self.n_saved = 0  # epochs whose files are written
        self.network = build_network(config, classes).move_to(device)
        self.average = None
        if config.weight_average:
            check_decay(config.weight_average, self.sampler.n_steps * config.epoch)
            self.average = MovingAverage(self.network, config.weight_average)
        self.front_end = FrontEnd(config.input).to(device)
        self.precision = utils.choose_precision(config.precision, device)
        self.objective = Objective(config.mode, config.m, config.s)
        self.scorer = Scorer("published", classes, self.objective)
        self.loss = TrainingLoss(self.network, self.objective, self.precision)
        if should_compile(config.compile, device, len(train_clips) * config.epoch):
            compile_module(self.loss, is_required=config.compile is True)
        self.parallel_loss = average_gradients(self.loss)
        trained = [weight for weight in self.network.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)

    @property
    def scored_network(self) -> TASTgramMFN:
        """The network that is validated, saved and scored: with averaged weights where there are
        any.
        """
        return self.network if self.average is None else self.average.network

    # ---- The loop ----

    def fit(self) -> None:
        """Train from the first epoch that is not finished to the last.

        Raises:
            UserError: If a loss is not finite.
        """
        if is_main():
            counts = (
                f"{len(self.train_clips)} clips to train on, {len(self.valid_clips)} to validate"
            )
            print(f"{counts}, on {self.device}", flush=True)
        log = self.open_log()
        first = len(self.history)
        for epoch in range(first, self.config.epoch):
            begin = time.monotonic()
            self.set_learning_rate(epoch)
            self.parallel_loss.train()
            averages = Averages(self.sampler.n_steps, epoch)
            progress = self.show_progress(epoch)
            for batch in progress:
                averages.add(self.step(batch), batch)
                for step, loss in averages.new_losses():
                    self.check_loss("loss", loss, f"step {step}")
                    progress.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            train_loss, train_accuracy = averages.means()
            scores, valid_loss, valid_accuracy = self.validate(self.valid_clips)
            self.check_loss("validation loss", valid_loss, f"the end of epoch {epoch + 1}")
            is_best = valid_loss < self.best_loss
            results = (train_loss, train_accuracy, valid_loss, valid_accuracy)
            seconds = time.monotonic() - begin
            lr = self.learning_rate(epoch)
            self.history.append(EpochResult(epoch + 1, lr, *results, seconds))
            self.save(scores, is_best)
            self.report(is_best, log)
            if epoch == first:
                self.report_duration()
            # torchrun ends the job when a process fails: wait until the files are written.
            barrier()

    def step(self, batch: Batch) -> Tensor:
        """Take an optimiser step. Returns loss and accuracy `(2,)` on the device."""
        self.optimizer.zero_grad()
        inputs = self.front_end(batch.samples)
        # For a last batch of another size the step would be compiled once more.
        is_whole = batch.size == self.config.batch_size
        with torch.compiler.set_stance("default" if is_whole else "force_eager"):
            loss, accuracy = self.parallel_loss(inputs, batch.labels, batch.mix, batch.size)
        # DistributedDataParallel averages over processes, whose shares may differ in size: with
        # this weight the gradient is that of the mean over the clips of the whole batch.
        weight = batch.share_size * world_size() / batch.size
        self.scaler.scale(loss * weight).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update()
        return torch.stack([loss.detach(), accuracy])

    def learning_rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch, from 0: a cosine from `lr` to a tenth of it."""
        cosine = math.cos(math.pi * epoch / self.config.epoch)
        return self.config.lr * (0.1 + 0.9 * (1.0 + cosine) / 2.0)

    def set_learning_rate(self, epoch: int) -> None:
        self.optimizer.param_groups[0]["lr"] = self.learning_rate(epoch)

    def show_progress(self, epoch: int) -> tqdm:
        """Return the batches of an epoch, with a progress bar in the main process."""
        return tqdm(
            self.sampler.batches(epoch),
            f"epoch {epoch + 1}/{self.config.epoch}",
            self.sampler.n_steps,
            unit="step",
            leave=False,
            disable=None if is_main() else True,
        )

    def check_loss(self, name: str, loss: float, moment: str) -> None:
        """Raise `UserError` with what to try where a loss is not finite. No checkpoint is written
        with such a loss.
        """
        if math.isfinite(loss):
            return
        remedy = "a lower --lr"
        if self.precision != torch.float32:
            remedy += " or --precision fp32"
        lr = self.optimizer.param_groups[0]["lr"]
        raise UserError(f"the {name} is {loss} at {moment} (learning rate {lr:.3g}): try {remedy}")

    # ---- Validation ----

    def validate(self, clips: ClipSet) -> "Validation":
        """Compute scores, mean loss and accuracy of clips without mixup: the network runs in
        float32, the rest in float64.
        """
        share = self.run_share(clips)
        labels = clips.labels[select_share(len(clips))]
        machines = [self.classes.entries[label].machine for label in labels]
        labels = labels.to(self.device)
        scores = self.scorer.score_clips(share, machines)
        similarity = share.similarity.double()
        losses = self.objective.cross_entropy(similarity, labels, labels, reduction="none")
        hits = (share.similarity.argmax(dim=1) == labels).double()
        columns = torch.stack([scores, losses, hits], dim=1)
        scores, losses, hits = gather_rows(columns, len(clips)).T.cpu().numpy()
        return Validation(scores, float(losses.mean()), float(hits.mean()))

    def embed(self, clips: ClipSet) -> Outputs:
        """Compute the outputs for clips that the checkpoint is to keep."""
        share = self.run_share(clips, "embeddings")
        return share.apply(lambda values: gather_rows(values, len(clips)))

    def run_share(self, clips: ClipSet, title: str | None = None) -> Outputs:
        """Run the network in evaluation mode and float32 on this process's share of the clips.
        `title` is that of a progress bar.
        """
        share, batch_size = select_share(len(clips)), self.config.batch_size
        shown = title if is_main() else None
        return run_network(self.scored_network, clips, share, batch_size, title=shown)

    # ---- The files ----

    @property
    def best_loss(self) -> float:
        """The lowest validation loss of the finished epochs; infinite before the first."""
        return min((result.valid_loss for result in self.history), default=math.inf)

    def start_from(self, checkpoint: Checkpoint) -> None:
        """Start a run from the weights of another one, except for those of the heads, which belong
        to its classes.

        Raises:
            UserError: If the weights do not fit the network.
        """
        checkpoint.fill(self.network, omitted=HEAD_WEIGHTS)
        if self.average is not None:
            self.average.network.load_state_dict(self.network.state_dict())
        notice(
            f"init_from: starting from the weights of {checkpoint.path}, except for those of the "
            f"classes ({', '.join(HEAD_WEIGHTS)})"
        )

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue a run. The moments of the optimiser are restored, its settings are those of the
        configuration.

        Raises:
            UserError: If the run had other clips, or the state does not fit.
        """
        path = checkpoint.path
        if checkpoint.fingerprint != self.fingerprint:
            raise UserError(
                f"{path}: the recordings under {self.config.data_root} are not those that the run "
                f"started with; restore the original ones, or {RESTART}"
            )
        groups = self.optimizer.state_dict()["param_groups"]
        try:
            self.network.load_state_dict(checkpoint.trained_weights or checkpoint.weights)
            if self.average is not None:
                self.average.network.load_state_dict(checkpoint.weights)
            self.optimizer.load_state_dict(checkpoint.optimizer | {"param_groups": groups})
            if checkpoint.scaler:
                self.scaler.load_state_dict(checkpoint.scaler)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path}: its weights or optimiser state do not match this model; {RESTART}"
            ) from None
        self.history = list(checkpoint.history)
        self.n_saved = len(self.history)
        self.write_history()  # a crash may have come between checkpoint and history

    def save(self, scores: np.ndarray, is_best: bool) -> None:
        """Write the checkpoints and history.csv, in the main process. The best weights come first:
        stopped between the two, the run is resumed from them, and no epoch is repeated.
        """
        if is_main():
            paths = [self.files.best, self.files.last] if is_best else [self.files.last]
            self.make_checkpoint(scores).save(*paths)
            self.write_history()
        self.n_saved = len(self.history)

    def make_checkpoint(self, scores: np.ndarray) -> Checkpoint:
        """Return the present state; `scores` are those of the held-out clips."""
        return Checkpoint(
            path=self.files.last,
            weights=self.scored_network.state_dict(),
            trained_weights={} if self.average is None else self.network.state_dict(),
            config=self.config,
            classes=self.classes,
            history=self.history,
            n_training=len(self.train_clips),
            held_out=HeldOut(
                self.valid_clips.files_in(Path(self.config.data_root)),
                self.valid_clips.labels,
                torch.from_numpy(scores),
            ),
            fingerprint=self.fingerprint,
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            versions=utils.versions(),
        )

    def write_history(self) -> None:
        if is_main():
            utils.write_csv(self.files.history, pd.DataFrame(self.history))

    def add_bank(self) -> None:
        """Compute the embeddings of all clips with the best weights, and add them to the checkpoint
        of these weights unless it contains them.
        """
        best = from_main(lambda: Checkpoint.load(self.files.best))
        if best.bank is not None:
            return
        complete = self.complete(best)
        if is_main():
            complete.save(self.files.best)
            print(f"added the embeddings of the clips to {self.files.best}", flush=True)
        barrier()

    def complete(self, checkpoint: Checkpoint) -> Checkpoint:
        """Load the weights of a checkpoint; return it with the embeddings of all clips."""
        self.scored_network.load_state_dict(checkpoint.weights)
        outputs, valid_outputs = self.embed(self.train_clips), self.embed(self.valid_clips)
        assert checkpoint.held_out
        bank = make_bank(outputs, self.train_clips, self.classes, Path(self.config.data_root))
        stored = StoredClips.from_outputs(valid_outputs, self.valid_clips.labels)
        return replace(checkpoint, bank=bank, held_out=checkpoint.held_out.with_outputs(stored))

    def open_log(self) -> Any:
        """Return a writer of TensorBoard logs; None where there are to be none."""
        if not self.config.tensorboard or not is_main():
            return None
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        # Drops epochs that were logged before a crash and are trained again.
        return SummaryWriter(str(self.files.tensorboard), purge_step=self.n_saved + 1)

    def report(self, is_best: bool, log: Any) -> None:
        """Print a line about the last epoch, and log it."""
        if not is_main():
            return
        result = self.history[-1]
        tqdm.write(
            f"epoch {result.epoch}/{self.config.epoch}  lr {result.lr:.2e}  train loss "
            f"{result.train_loss:.4f} accuracy {result.train_accuracy:.3f}  valid loss "
            f"{result.valid_loss:.4f} accuracy {result.valid_accuracy:.3f}  {result.seconds:.1f} "
            f"s{'  best' if is_best else ''}"
        )
        sys.stdout.flush()
        if log:
            for name, value in result._asdict().items():
                if name != "epoch":
                    log.add_scalar(name, value, result.epoch)
            log.flush()

    def report_duration(self) -> None:
        """Print how long the remaining epochs take if they are as fast as the last one."""
        n_left = self.config.epoch - len(self.history)
        if n_left and is_main():
            duration = format_duration(n_left * self.history[-1].seconds)
            print(f"about {duration} left at this speed", flush=True)

    @contextlib.contextmanager
    def announce_stop(self) -> Iterator[None]:
        """Print a notice of what can be resumed when Ctrl-C or SIGTERM stops the training."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            if self.n_saved:
                notice(f"stopped; --resume continues after epoch {self.n_saved}")
            else:
                notice("stopped before the first checkpoint")
            raise

    def keep_clips_on_gpu(self) -> None:
        """Keep the clips in the memory of the GPU, where `data_device` asks for it and they fit."""
        share = math.ceil(self.config.batch_size / world_size())
        width = 2 if self.precision == torch.float32 else 1
        activations = ACTIVATIONS + sum(CHANNELS[name].activations for name in self.config.input)
        reserved = OTHER_MEMORY + activations * width * share  # bytes, estimated
        clips = (self.train_clips, self.valid_clips)
        keep_on_gpu(clips, self.config.data_device, self.device, reserved)


def format_duration(seconds: float) -> str:
    """Format a duration in round numbers, as in "40 s", "12 min" or "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class Validation(NamedTuple):
    """The result of a validation.

    Attributes:
        scores: Published score of each clip against its machine, float64 `(n,)`.
        loss: Mean cross-entropy of the clips, each against its class.
        accuracy: Fraction of the clips whose most similar class is theirs.
    """

    scores: np.ndarray
    loss: float
    accuracy: float


class TrainingLoss(nn.Module):
    """The part of a step that is compiled, and wrapped for several processes: from waveform and
    log-mel to the loss. Mixup and margin are computed in float32, the network between them in
    `precision`.
    """

    def __init__(self, network: TASTgramMFN, objective: Objective, precision: torch.dtype) -> None:
        super().__init__()
        self.network, self.objective, self.precision = network, objective, precision

    def forward(
        self, inputs: dict[str, Tensor], labels: Tensor, mix: Mix | None, batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """Compute mean loss and accuracy, scalars, of B clips in R rows: the share of this process
        of a batch of `batch_size` clips.

        `inputs` are the outputs of `FrontEnd`, `labels` `(R,)` the classes of the rows. With `mix`,
        rows after the first B are partners only.
        """
        if mix is not None:
            inputs = {name: mix(x) for name, x in inputs.items()}
        with utils.autocast(labels.device, self.precision):
            similarity, embedding = self.network(**inputs)
        loss = self.objective.loss(similarity, embedding, labels, mix, batch_size)
        return loss, self.objective.accuracy(similarity.detach(), labels, mix)


class Averages:
    """Loss and accuracy of the steps of an epoch. They stay on the device and are read only every
    READ_EVERY steps, since the device is waited for then.
    """

    def __init__(self, n_steps: int, epoch: int = 0) -> None:
        self.n_steps, self.first_step = n_steps, epoch * n_steps + 1
        self.results: list[Tensor] = []
        self.counts: list[int] = []  # clips of this process
        self.n_clips = 0  # of all processes
        self.n_read = 0  # steps

    def add(self, result: Tensor, batch: Batch) -> None:
        """Add loss and accuracy `(2,)` of a step."""
        self.results.append(result)
        self.counts.append(batch.share_size)
        self.n_clips += batch.size

    def new_losses(self) -> list[tuple[int, float]]:
        """Return number and loss of each step since the last reading; nothing in most steps: they
        are read every READ_EVERY steps and at the end of the epoch.
        """
        n_steps = len(self.results)
        if n_steps - self.n_read < READ_EVERY and n_steps < self.n_steps:
            return []
        losses = torch.stack(self.results[self.n_read :])[:, 0]
        values = sum_over_ranks(losses / world_size()).tolist()
        numbers = range(self.first_step + self.n_read, self.first_step + n_steps)
        self.n_read = n_steps
        return list(zip(numbers, values, strict=True))

    def means(self) -> tuple[float, float]:
        """Return the means of loss and accuracy over all clips of the epoch."""
        results = torch.stack(self.results)
        counts = torch.tensor(self.counts, device=results.device).unsqueeze(1)
        sums = sum_over_ranks((results.double() * counts).sum(dim=0))
        loss, accuracy = (sums / self.n_clips).tolist()
        return loss, accuracy
