"""Training: one step, one epoch, validation, checkpoint, resume."""

import csv
import dataclasses
import math
import platform
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from dataloader import ClipSet, batches, class_labels, shuffled_batches
from evaluation.scoring import by_machine, run_model
from losses import Mix, Objective
from model import FrontEnd, TASTgramMFN
from model.tastgram import N_FRAMES, N_MELS
from utils import (
    COMPUTATION_KEYS,
    MIXING,
    PARTNERS,
    Config,
    RunFiles,
    UserError,
    barrier,
    choose_compile,
    choose_precision,
    from_main,
    is_main,
    is_same,
    keep_freed_memory,
    load_checkpoint,
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
    classes = len(class_labels(config.machines))
    return TASTgramMFN(classes, config.input, head, config.sub_centers, config.attention)


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
        self.front_end = FrontEnd(config.input).to(device)
        network = build_model(config).to(device, memory_format=torch.channels_last)
        self.network = share_batch_norm(network) if world_size() > 1 and config.sync_batch_norm else network
        self.model = DistributedDataParallel(self.network) if world_size() > 1 else self.network
        self.compiled = torch.compile(self.model, dynamic=False) if choose_compile(config.compile, device) else None
        self.is_compiled = False  # it happens at the first step
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, T_max=config.epoch, eta_min=config.lr / 10
        )
        self.precision = choose_precision(config.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.epoch = self.saved_epoch = 0  # epochs finished, and of the last checkpoint
        self.best_loss = math.inf
        self.history: list[dict[str, float]] = []
        self.fingerprint = ""  # of the clips the run began with
        self.log: TensorBoardLog | None = None

    # ---- One step ----

    def step(self, waveform: Tensor, labels: Tensor, mix: Mix, share: float = 1.0) -> Tensor:
        """One optimiser step on waveforms `(B, T)`. Returns loss and accuracy `(2,)`, still on the device.

        `share` weighs the gradient of this process where the processes' parts of the batch differ in size. Log-mel,
        mixup and the margin are computed in float32, the network between them in the precision of the training.
        """
        inputs = {name: mix(x) for name, x in self.front_end(waveform).items()}
        self.optimizer.zero_grad(set_to_none=True)
        # One size alone is compiled, that of full batches, so that a shorter last one costs no second compilation.
        if self.compiled is None or len(labels) != len(range(rank(), self.config.batch_size, world_size())):
            result = self.compute_gradient(self.model, inputs, labels, mix, share)
        elif self.is_compiled:
            result = self.compute_gradient(self.compiled, inputs, labels, mix, share)
        else:
            result = self.try_compiled(inputs, labels, mix, share)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return result

    def compute_gradient(self, model, inputs: dict[str, Tensor], labels: Tensor, mix: Mix, share: float) -> Tensor:
        """The gradient of a batch, left in the parameters. Returns its loss and accuracy `(2,)`."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            similarity, _ = model(**inputs)
        loss = self.objective.loss(similarity, labels, mix)
        self.scaler.scale(loss * share).backward()
        return torch.stack([loss.detach(), self.objective.accuracy(similarity.detach(), labels, mix)])

    def try_compiled(self, inputs: dict[str, Tensor], labels: Tensor, mix: Mix, share: float) -> Tensor:
        """The gradient with the model as it is compiled on first use; given up, with a notice, where that fails."""
        from torch._dynamo.exc import TorchDynamoException  # what all stages of the compiler raise

        statistics = [buffer.clone() for buffer in self.network.buffers()]  # of batch norm, moved by a forward pass
        try:
            result = self.compute_gradient(self.compiled, inputs, labels, mix, share)
            self.is_compiled = True
            return result
        except TorchDynamoException as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            notice(f"torch.compile does not work here, so the steps run uncompiled ({reason})")
        self.compiled = None
        for buffer, value in zip(self.network.buffers(), statistics, strict=True):
            buffer.copy_(value)
        self.optimizer.zero_grad(set_to_none=True)
        return self.compute_gradient(self.model, inputs, labels, mix, share)

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
                losses = (sum_over_ranks(torch.stack(results)) / world_size()).tolist()
                self.check_losses(losses, step)
                progress.set_postfix_str(f"loss {losses[-1]:.3f}")
                results = []
        return mean_over_ranks(totals)

    def check_losses(self, losses: list[float], last_step: int) -> None:
        for step, loss in enumerate(losses, start=last_step - len(losses) + 1):
            self.check_finite("loss", loss, f"step {step + 1}")

    def check_finite(self, name: str, loss: float, moment: str) -> None:
        """Raise `UserError` with what to try where a loss is not finite; no checkpoint has seen it."""
        if math.isfinite(loss):
            return
        rate = self.optimizer.param_groups[0]["lr"]
        remedies = "a lower --lr" if self.precision == torch.float32 else "a lower --lr or --precision fp32"
        rest = f"; the checkpoint of epoch {self.saved_epoch} stands" if self.saved_epoch else ""
        raise UserError(
            f"the {name} is {loss} at {moment} (epoch {self.epoch + 1}, learning rate {rate:.3g}): try {remedies}{rest}"
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
            similarity, _ = self.network(**self.front_end(waveform))
            loss = self.objective.loss(similarity, labels)
            accuracy = self.objective.accuracy(similarity, labels)
            totals += torch.stack([loss, accuracy, torch.ones_like(loss)]) * len(indices)
        return mean_over_ranks(totals)

    # ---- The run ----

    def take(self, train_clips: ClipSet, valid_clips: ClipSet) -> None:
        """The clips to train on and to validate with. Raises `UserError` if the run cannot go on with them."""
        least, processes = 2 * world_size(), f"each of {world_size()} processes needs two, for batch norm"
        if len(train_clips) < least:
            raise UserError(
                f"{len(train_clips)} clips to train on: {processes}; bring more recordings, or raise split_ratio"
            )
        if self.config.batch_size < least:
            raise UserError(f"batch_size: {self.config.batch_size} clips a step: {processes}; raise it")
        fingerprint = f"{train_clips.fingerprint()}/{valid_clips.fingerprint()}"
        if from_main(lambda: fingerprint) != fingerprint:
            raise UserError(
                f"{self.config.data_root} on {platform.node()}: the clips are not those of the first process; give "
                f"every machine the same recordings"
            )
        if self.history and self.fingerprint != fingerprint:
            raise UserError(
                f"{self.files.last}: the clips under {self.config.data_root} are not those the run began with; "
                f"bring them back, or start again with --overwrite"
            )
        self.fingerprint, self.train_clips, self.valid_clips = fingerprint, train_clips, valid_clips
        if not self.history and self.network.is_standardised:
            self.measure_log_mel()

    @torch.no_grad()
    def measure_log_mel(self) -> None:
        """Give the attention mean and deviation of the log-mel in each mel bin, over 1,000 training clips at most."""
        chosen = np.unique(np.linspace(0, len(self.train_clips) - 1, 1000).astype(np.int64))
        sums = torch.zeros(2, N_MELS, 1, dtype=torch.float64, device=self.device)
        for indices in batches(chosen, self.config.batch_size):
            log_mel = self.front_end(self.train_clips.batch(indices, self.device)[0])["log_mel"].double()
            sums += torch.stack([log_mel, log_mel.square()]).sum(dim=(1, 2, 4)).unsqueeze(2)
        mean, square = sums / (len(chosen) * N_FRAMES)
        self.network.log_mel_mean.copy_(mean)
        self.network.log_mel_std.copy_((square - mean.square()).clamp(min=1e-6).sqrt())

    def fit(self) -> None:
        """Train from the present epoch to the last, with a checkpoint after each."""
        if self.config.tensorboard and is_main():
            self.log = TensorBoardLog(self.files, self.epoch)
        try:
            while self.epoch < self.config.epoch:
                self.run_epoch()
        except (KeyboardInterrupt, SystemExit):
            if self.saved_epoch:
                notice(f"stopped; --resume goes on after epoch {self.saved_epoch}")
            else:
                notice("stopped before the first checkpoint")
            raise

    def run_epoch(self) -> None:
        start, lr = time.monotonic(), self.optimizer.param_groups[0]["lr"]
        train_loss, train_accuracy = self.train_epoch(self.train_clips)
        valid_loss, valid_accuracy = self.validate(self.valid_clips)
        self.check_finite("validation loss", valid_loss, "the end")
        self.scheduler.step()
        self.epoch += 1
        is_best = valid_loss < self.best_loss
        self.best_loss = min(valid_loss, self.best_loss)
        seconds = time.monotonic() - start
        row = (self.epoch, lr, train_loss, train_accuracy, valid_loss, valid_accuracy, seconds)
        self.history.append(dict(zip(HISTORY_COLUMNS, row, strict=True)))
        if is_main():
            if self.log:
                self.log.write(self.history[-1])
            self.save(is_best)
            self.report(is_best)
        barrier()  # a process that ended earlier could take this one down while it writes

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
            "clip_counts": {"training": len(self.train_clips), "validation": len(self.valid_clips)},
            "config": dataclasses.asdict(self.config),
            "versions": versions(),
        }

    def save(self, is_best: bool) -> None:
        """Write the checkpoints and `history.csv`. Cut anywhere, `--resume` repeats at most the last epoch: the
        best weights come first, and serve where the last state is not there yet.
        """
        state = self.state()
        if is_best:
            save_checkpoint(self.files.best, state)
        save_checkpoint(self.files.last, state, previous=self.files.previous)
        self.saved_epoch = self.epoch
        self.write_history()

    def write_history(self) -> None:
        with replace_file(self.files.history) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, HISTORY_COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.history)

    def keep_held_out_scores(self) -> None:
        """Enter the anomaly scores (float64) of the validation clips under the best weights into the checkpoint of
        these: `eval.py` takes its thresholds from them. Ends the run: the network has the best weights then.
        """
        if is_main():
            state = load_checkpoint(self.files.best)
            if "held_out" not in state:
                self.network.load_state_dict(state["model"])
                outputs = run_model(self.network, self.config, self.valid_clips, self.device)
                scores = outputs.scores(self.objective, self.valid_clips.labels)
                save_checkpoint(self.files.best, state | {"held_out": by_machine(self.valid_clips.clips, scores)})
        barrier()

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint of the same configuration; a `UserError` names the keys that differ."""
        if missing := {"optimizer", "scheduler", "scaler", "epoch", "best_loss", "history", "clips"} - set(state):
            raise UserError(
                f"{self.files.best}: no run to resume: {', '.join(sorted(missing))} is missing in the checkpoint; "
                f"start again with --overwrite"
            )
        now = dataclasses.asdict(self.config)
        differing = [
            f"{name} (was {state['config'].get(name)!r}, is {now[name]!r})"
            for name in now
            if name not in COMPUTATION_KEYS and not is_same(state["config"].get(name), now[name])
        ]
        if differing:
            raise UserError(
                f"{self.files.last}: the run to resume had another configuration: {'; '.join(differing)}; give the "
                f"same, or start again with --overwrite"
            )
        try:
            self.network.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{self.files.last}: its weights or optimiser state do not fit; start again with --overwrite"
            ) from None
        self.epoch = self.saved_epoch = state["epoch"]
        self.best_loss = state["best_loss"]
        self.history, self.fingerprint = state["history"], state["clips"]
        if is_main():
            self.write_history()  # a crash may have come between checkpoint and history


def mean_over_ranks(totals: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy from the sums (loss, accuracy, clips) of each process."""
    loss, accuracy, count = sum_over_ranks(totals).tolist()
    return loss / count, accuracy / count


def share_batch_norm(network: TASTgramMFN) -> TASTgramMFN:
    """The network with batch norm over the batches of all processes, which PyTorch can do on GPUs only."""
    if next(network.parameters()).is_cuda:
        return SyncBatchNorm.convert_sync_batchnorm(network)
    notice("on CPUs batch norm sees the share of its process only (sync_batch_norm works on GPUs)")
    return network


class TensorBoardLog:
    """The columns of the history as TensorBoard scalars; epochs after `epoch`, left by a crash, are dropped."""

    def __init__(self, files: RunFiles, epoch: int):
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self.writer = SummaryWriter(str(files.tensorboard), purge_step=epoch + 1)

    def write(self, row: dict[str, float]) -> None:
        for name in HISTORY_COLUMNS[1:]:
            self.writer.add_scalar(name, row[name], int(row["epoch"]))
        self.writer.flush()
