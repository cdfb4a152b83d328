"""Training: one step, one epoch, validation, checkpoint, resume."""

import csv
import dataclasses
import math
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from dataloader import ClipSet, batches, class_labels, shuffled_batches
from losses import Mix, Objective
from model import LogMel, TASTgramMFN
from utils import (
    COMPUTATION_KEYS,
    MIXING,
    PARTNERS,
    Config,
    RunFiles,
    UserError,
    choose_precision,
    is_main,
    keep_freed_memory,
    notice,
    random_stream,
    rank,
    replace_file,
    save_checkpoint,
    set_up_numerics,
    share_buffers,
    sum_over_ranks,
    versions,
    world_size,
)

HISTORY_COLUMNS = ("epoch", "lr", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "seconds")
STEPS_BETWEEN_READINGS = 20  # reading a loss makes the host wait for the device


def build_model(config: Config) -> TASTgramMFN:
    """The network of a configuration; its initial weights depend on the seed alone."""
    torch.manual_seed(config.seed)
    head = Objective.of(config).head
    return TASTgramMFN(len(class_labels(config.machines)), config.input, head, config.sub_centers)


class Trainer:
    """The state of a run (network, optimiser, schedule, history) and what moves it on.

    Under torchrun each process has one, on its own device; `batch_size` is divided between them.
    """

    def __init__(self, config: Config, device: torch.device):
        set_up_numerics()
        keep_freed_memory()
        self.config, self.device = config, device
        self.files = RunFiles(config.checkpoint)
        self.objective = Objective.of(config)
        self.log_mel = LogMel().to(device)
        self.network = build_model(config).to(device, memory_format=torch.channels_last)
        self.model = DistributedDataParallel(self.network) if world_size() > 1 else self.network
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, T_max=config.epoch, eta_min=config.lr / 10
        )
        self.precision = choose_precision(config.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.epoch = 0  # epochs finished
        self.best_loss = math.inf
        self.history: list[dict[str, float]] = []

    # ---- One step ----

    def step(self, waveform: Tensor, labels: Tensor, mix: Mix, share: float = 1.0) -> Tensor:
        """One optimiser step on waveforms `(B, T)`. Returns loss and accuracy `(2,)`, still on the device.

        `share` weighs the gradient of this process where the processes' parts of the batch differ in size. Log-mel,
        mixup and the margin are computed in float32, the network between them in the precision of the training.
        """
        log_mel = self.log_mel(waveform)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            similarity, _ = self.model(mix(waveform), mix(log_mel))
        loss = self.objective.loss(similarity, labels, mix)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss * share).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return torch.stack([loss.detach(), self.objective.accuracy(similarity.detach(), labels, mix)])

    # ---- One epoch ----

    def train_epoch(self, clips: ClipSet) -> tuple[float, float]:
        """One pass over the clips. Returns mean loss and accuracy; raises `UserError` at a loss that is not finite."""
        self.model.train()
        seed, size = self.config.seed, self.config.batch_size
        plan = shuffled_batches(len(clips), size, seed, self.epoch, least=2 * world_size())
        totals, results = torch.zeros(3, device=self.device), []
        progress = self.progress(plan, f"epoch {self.epoch + 1}/{self.config.epoch}")
        for index, whole in enumerate(progress):
            step = self.epoch * len(plan) + index
            part = whole[rank() :: world_size()]
            waveform, labels = clips.batch(part, self.device)
            shared, own = random_stream(seed, MIXING, step), random_stream(seed, PARTNERS, step, rank())
            mix = self.objective.draw_mix(shared, own, len(part), self.device)
            result = self.step(waveform, labels, mix, share=len(part) * world_size() / len(whole))
            totals += torch.cat([result, result.new_ones(1)]) * len(part)
            results.append(result[0])
            if len(results) == STEPS_BETWEEN_READINGS or index + 1 == len(plan):
                self.check_losses(torch.stack(results).tolist(), step)
                progress.set_postfix_str(f"loss {results[-1].item():.3f}")
                results = []
        return mean_over_ranks(totals)

    def check_losses(self, losses: list[float], last_step: int) -> None:
        for step, loss in enumerate(losses, start=last_step - len(losses) + 1):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at step {step + 1} (epoch {self.epoch + 1}, learning rate "
                    f"{self.optimizer.param_groups[0]['lr']:.3g}): try a lower --lr or --precision fp32; "
                    f"the checkpoint of the last epoch stands"
                )

    @torch.no_grad()
    def validate(self, clips: ClipSet) -> tuple[float, float]:
        """Mean loss (unmixed, with margin) and accuracy in float32, every clip counted once over all processes."""
        share_buffers(self.network)
        self.network.eval()
        totals = torch.zeros(3, device=self.device)
        own = np.arange(len(clips))[rank() :: world_size()]
        for indices in batches(own, self.config.batch_size):
            waveform, labels = clips.batch(indices, self.device)
            similarity, _ = self.network(waveform, self.log_mel(waveform))
            loss = self.objective.loss(similarity, labels)
            accuracy = self.objective.accuracy(similarity, labels)
            totals += torch.stack([loss, accuracy, torch.ones_like(loss)]) * len(indices)
        return mean_over_ranks(totals)

    # ---- The run ----

    def fit(self, train_clips: ClipSet, valid_clips: ClipSet) -> None:
        """Train from the present epoch to the last, with a checkpoint after each."""
        least, processes = 2 * world_size(), f"each of {world_size()} processes needs two, for batch norm"
        if len(train_clips) < least:
            raise UserError(f"{len(train_clips)} clips to train on: {processes}; bring more recordings")
        if self.config.batch_size < least:
            raise UserError(f"batch_size: {self.config.batch_size} clips a step: {processes}; raise it")
        fingerprint = f"{train_clips.fingerprint()}/{valid_clips.fingerprint()}"
        if self.history and self.fingerprint != fingerprint:
            raise UserError(
                f"{self.files.last}: the clips under {self.config.data_root} are not those the run began with; "
                f"bring them back, or start again with --overwrite"
            )
        self.fingerprint = fingerprint
        log = TensorBoardLog(self.files, self.epoch) if self.config.tensorboard and is_main() else None
        try:
            while self.epoch < self.config.epoch:
                self.run_epoch(train_clips, valid_clips)
                if log:
                    log.write(self.history[-1])
        except (KeyboardInterrupt, SystemExit):
            if self.epoch:
                notice(f"stopped in epoch {self.epoch + 1}; --resume goes on after epoch {self.epoch}")
            else:
                notice("stopped in epoch 1, before the first checkpoint")
            raise

    def run_epoch(self, train_clips: ClipSet, valid_clips: ClipSet) -> None:
        start, lr = time.monotonic(), self.optimizer.param_groups[0]["lr"]
        train_loss, train_accuracy = self.train_epoch(train_clips)
        valid_loss, valid_accuracy = self.validate(valid_clips)
        if not math.isfinite(valid_loss):
            raise UserError(
                f"the validation loss is {valid_loss} after epoch {self.epoch + 1} (learning rate {lr:.3g}): try a "
                f"lower --lr or --precision fp32; the checkpoint of the last epoch stands"
            )
        self.scheduler.step()
        self.epoch += 1
        is_best = valid_loss < self.best_loss
        self.best_loss = min(valid_loss, self.best_loss)
        seconds = time.monotonic() - start
        row = (self.epoch, lr, train_loss, train_accuracy, valid_loss, valid_accuracy, seconds)
        self.history.append(dict(zip(HISTORY_COLUMNS, row, strict=True)))
        if is_main():
            self.save(is_best)
            self.report(is_best)

    def progress(self, steps: Iterable, name: str) -> tqdm:
        """A progress bar, on a terminal and in the main process only."""
        return tqdm(steps, desc=name, unit="step", leave=False, disable=None if is_main() else True)

    def report(self, is_best: bool) -> None:
        row = self.history[-1]
        print(
            f"epoch {self.epoch}/{self.config.epoch}  lr {row['lr']:.2e}  "
            f"train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.3f}  "
            f"valid loss {row['valid_loss']:.4f} accuracy {row['valid_accuracy']:.3f}  "
            f"{row['seconds']:.1f} s{'  best' if is_best else ''}",
            flush=True,
        )

    # ---- Checkpoints ----

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs, in tensors and plain values."""
        return {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "best_loss": self.best_loss,
            "history": self.history,
            "clips": self.fingerprint,
            "config": dataclasses.asdict(self.config),
            "versions": versions(),
        }

    def save(self, is_best: bool) -> None:
        """Write the checkpoints and `history.csv`. Cut anywhere, `--resume` repeats at most the last epoch."""
        state = self.state()
        if is_best:
            save_checkpoint(self.files.best, state)
        save_checkpoint(self.files.last, state)
        self.write_history()

    def write_history(self) -> None:
        with replace_file(self.files.history) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, HISTORY_COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.history)

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint of the same configuration; a `UserError` names the keys that differ."""
        now = dataclasses.asdict(self.config)
        differing = [
            f"{name} (was {state['config'].get(name)!r}, is {now[name]!r})"
            for name in now
            if name not in COMPUTATION_KEYS and state["config"].get(name) != now[name]
        ]
        if differing:
            raise UserError(
                f"{self.files.last}: the run to resume had another configuration: {'; '.join(differing)}; give the "
                f"same, or start again with --overwrite"
            )
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.best_loss = state["epoch"], state["best_loss"]
        self.history, self.fingerprint = state["history"], state["clips"]
        if is_main():
            self.write_history()  # a crash may have come between checkpoint and history


def mean_over_ranks(totals: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy from the sums (loss, accuracy, clips) of each process."""
    loss, accuracy, count = sum_over_ranks(totals).tolist()
    return loss / count, accuracy / count


class TensorBoardLog:
    """The columns of the history as TensorBoard scalars; epochs after `epoch`, left by a crash, are dropped."""

    def __init__(self, files: RunFiles, epoch: int):
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self.writer = SummaryWriter(str(files.tensorboard), purge_step=epoch + 1)

    def write(self, row: dict[str, float]) -> None:
        for name in HISTORY_COLUMNS[1:]:
            self.writer.add_scalar(name, row[name], int(row["epoch"]))
        self.writer.flush()
