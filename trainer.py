"""Training: one step, one epoch, validation; the run around them, with its history, checkpoints and resuming."""

import importlib.util
import logging
import math
import platform
import shutil
import time
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import distributed
import utils
from checkpoint import HISTORY, RunFiles, State, build_network, save_checkpoint
from config import COMPUTATION_KEYS, KEYS, Config
from dataloader import MACHINE, ClipSet, batches, shuffled_batches
from distributed import is_main, rank, sum_over_ranks, world_size
from losses import Mix, Objective
from model import FrontEnd, TASTgramMFN
from utils import UserError, notice, random_stream

STEPS_BETWEEN_READINGS = 20  # reading a loss makes the host wait for the device


class TrainingLoss(nn.Module):
    """What a training step computes, from samples to loss; compiled, and wrapped for several processes, as a whole.

    Log-mel, mixup and margin are computed in float32, the network between them in `precision`.
    """

    def __init__(self, network: TASTgramMFN, objective: Objective, precision: torch.dtype) -> None:
        super().__init__()
        self.front_end, self.network = FrontEnd(network.channels), network
        self.objective, self.precision = objective, precision

    def forward(self, samples: Tensor, labels: Tensor, mix: Mix | None) -> tuple[Tensor, Tensor]:
        """Samples int16 `(B, T)` and labels `(B,)` -> mean loss and accuracy, scalars."""
        inputs = self.front_end(samples)
        if mix is not None:
            inputs = {name: mix(x) for name, x in inputs.items()}
        with utils.autocast(samples.device, self.precision):
            similarity, _ = self.network(**inputs)
        loss = self.objective.loss(similarity, labels, mix)
        return loss, self.objective.accuracy(similarity.detach(), labels, mix)


class Trainer:
    """The network, its optimiser and schedule on one device. Under torchrun each process has one of its own, and
    `batch_size` is divided between them.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        utils.set_up_numerics()
        utils.keep_freed_memory()
        self.device, self.batch_size, self.seed, self.alpha = device, config.batch_size, config.seed, config.alpha
        self.objective = Objective(config.mode, config.m, config.s)
        self.precision = utils.choose_precision(config.precision, device)
        network = build_network(config).move_to(device)
        self.network = synchronise_batch_norm(network) if world_size() > 1 and config.sync_batch_norm else network
        self.loss = TrainingLoss(self.network, self.objective, self.precision).to(device)
        # Every process keeps batch norm statistics of its own; those of the main process count, at validation.
        self.model = DistributedDataParallel(self.loss, broadcast_buffers=False) if world_size() > 1 else self.loss
        self.compiled = compile_model(self.model) if is_to_compile(config.compile, device) else None
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, T_max=config.epoch, eta_min=config.lr / 10
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.parts: dict[str, Any] = {
            "model": self.network, "optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler
        }  # fmt: skip

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def step(self, samples: Tensor, labels: Tensor, mix: Mix | None, weight: float = 1.0) -> Tensor:
        """One optimiser step on samples int16 `(B, T)`. Returns loss and accuracy `(2,)`, still on the device.

        `weight` is that of this process's gradient where the processes' shares of the batch differ in size.
        """
        self.optimizer.zero_grad(set_to_none=True)
        # One size alone is compiled, that of full batches, so that a shorter last one costs no second compilation.
        is_full = len(labels) == len(range(rank(), self.batch_size, world_size()))
        model = self.compiled if self.compiled is not None and is_full else self.model
        loss, accuracy = model(samples, labels, mix)
        self.scaler.scale(loss * weight).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return torch.stack([loss.detach(), accuracy])

    def train_epoch(self, clips: ClipSet, epoch: int, title: str = "") -> tuple[float, float]:
        """One pass over the clips. Returns mean loss and accuracy; raises `UserError` at a loss that is not finite."""
        self.model.train()
        plan = shuffled_batches(len(clips), self.batch_size, self.seed, epoch, least=2 * world_size())
        shares = [whole[rank() :: world_size()] for whole in plan]
        totals, losses = torch.zeros(2, device=self.device), []
        data = clips.batches(shares, self.device)
        progress = tqdm(
            data, desc=title, total=len(plan), unit="step", leave=False, disable=None if is_main() else True
        )
        for index, (samples, labels) in enumerate(progress):
            step, size = epoch * len(plan) + index, len(labels)
            common = random_stream(self.seed, utils.MIXING, step)
            own = random_stream(self.seed, utils.PARTNERS, step, rank())
            mix = self.objective.draw_mix(self.alpha, common, own, size, self.device)
            result = self.step(samples, labels, mix, weight=size * world_size() / len(plan[index]))
            totals += result * size
            losses.append(result[0])
            if len(losses) == STEPS_BETWEEN_READINGS or index + 1 == len(plan):
                means = (sum_over_ranks(torch.stack(losses)) / world_size()).tolist()
                for number, loss in enumerate(means, start=step + 2 - len(losses)):
                    self.check_finite("loss", loss, f"step {number}")
                progress.set_postfix_str(f"loss {means[-1]:.3f}")
                losses = []
        loss, accuracy = (sum_over_ranks(totals) / len(clips)).tolist()
        return loss, accuracy

    def check_finite(self, name: str, loss: float, moment: str) -> None:
        """Raise `UserError` with what to try where a loss is not finite; no checkpoint has seen it."""
        if not math.isfinite(loss):
            remedies = "a lower --lr" if self.precision == torch.float32 else "a lower --lr or --precision fp32"
            raise UserError(f"the {name} is {loss} at {moment} (learning rate {self.lr:.3g}): try {remedies}")

    @torch.no_grad()
    def validate(self, clips: ClipSet) -> tuple[np.ndarray, float]:
        """The anomaly scores (float64), whose mean is the loss, and the accuracy, unmixed and in float32. The clips are
        divided between the processes, and every process gets all scores.
        """
        distributed.copy_buffers_from_main(self.network)
        self.model.eval()
        results = torch.zeros(2, len(clips), dtype=torch.float64, device=self.device)
        plan = batches(np.arange(len(clips))[rank() :: world_size()], self.batch_size)
        for indices, (samples, labels) in zip(plan, clips.batches(plan, self.device), strict=True):
            similarity, _ = self.network(**self.loss.front_end(samples))
            results[0, indices] = self.objective.anomaly_score(similarity, labels, torch.float64)
            results[1, indices] = (similarity.argmax(dim=1) == labels).double()
        scores, hits = sum_over_ranks(results).cpu().numpy()
        return scores, float(hits.mean())

    def state(self) -> State:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state(self, state: State) -> None:
        for name, part in self.parts.items():
            if name != "scaler" or state[name]:  # it has a state in fp16 only
                part.load_state_dict(state[name])


def synchronise_batch_norm(network: TASTgramMFN) -> TASTgramMFN:
    """The network with batch norm over the batches of all processes, which PyTorch can do on GPUs only."""
    if next(network.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    notice("on CPUs batch norm sees the share of its process only (sync_batch_norm works on GPUs)")
    return network


def is_to_compile(switch: bool | str, device: torch.device) -> bool:
    """Whether to compile the step: with "auto" on a GPU, in a single process, where the tools are there."""
    has_tools = importlib.util.find_spec("triton") and any(map(shutil.which, ("gcc", "clang", "cc")))
    return (device.type == "cuda" and world_size() == 1 and bool(has_tools)) if switch == "auto" else bool(switch)


class CompilerNotice(logging.Filter):
    """Reports in one notice that the compiler has failed, in place of its tracebacks, and turns it off."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and not torch._dynamo.config.disable:
            error = record.exc_info[1]
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            notice(f"torch.compile does not work here, so the steps run uncompiled ({reason})")
            torch._dynamo.config.disable = True  # it would go on to fail for each function of the network
        return False


def compile_model(model: nn.Module) -> Any:
    """The model, compiled at the first step; where that fails it runs as it is, with a notice."""
    torch._dynamo.config.suppress_errors = True
    logging.getLogger("torch._dynamo.convert_frame").addFilter(CompilerNotice())
    return torch.compile(model, dynamic=False)


class Run:
    """A training from its first epoch to its last, with a checkpoint after each."""

    def __init__(self, config: Config, device: torch.device, train_clips: ClipSet, valid_clips: ClipSet) -> None:
        """Raises `UserError` where the clips are too few, or not the same on all machines."""
        least, processes = 2 * world_size(), f"each process (of {world_size()}) needs two, for batch norm"
        if len(train_clips) < least:
            raise UserError(
                f"{len(train_clips)} clips to train on: {processes}; bring more recordings, or raise split_ratio"
            )
        if config.batch_size < least:
            raise UserError(f"batch_size: {config.batch_size} clips a step: {processes}; raise it")
        self.fingerprint = f"{train_clips.fingerprint()}/{valid_clips.fingerprint()}"
        if distributed.from_main(lambda: self.fingerprint) != self.fingerprint:
            raise UserError(
                f"{config.data_root} on {platform.node()}: the clips are not those of the first process; give "
                f"every machine the same recordings"
            )
        self.config, self.files, self.trainer = config, RunFiles(config.checkpoint), Trainer(config, device)
        self.train_clips, self.valid_clips = train_clips, valid_clips
        self.history: list[dict[str, float]] = []  # a row per epoch
        self.best_loss = math.inf

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return len(self.history)

    def resume(self, state: State) -> None:
        """Continue from a checkpoint of the same configuration and clips; a `UserError` names what differs."""
        if "history" not in state:
            raise UserError(f"{self.files.best}: only weights, no run to resume; start again with --overwrite")
        before = state["config"]
        keys = self.config.differences(before, [key for key in KEYS if key not in COMPUTATION_KEYS])
        if differing := [f"{key} (was {before.get(key)!r}, is {getattr(self.config, key)!r})" for key in keys]:
            raise UserError(
                f"{self.files.last}: the run to resume had another configuration: {'; '.join(differing)}; give the "
                f"same, or start again with --overwrite"
            )
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
        if is_main():
            self.write_history()  # a crash may have come between checkpoint and history

    def fit(self) -> None:
        """Train from the present epoch to the last."""
        log, saved = None, self.epoch
        if self.config.tensorboard and is_main():
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            log = SummaryWriter(str(self.files.tensorboard), purge_step=saved + 1)  # drops epochs after a crash
        try:
            while self.epoch < self.config.epoch:
                scores, is_best = self.run_epoch()
                if is_main():
                    self.save(scores, is_best)
                    self.report(is_best, log)
                distributed.barrier()  # a process that ends earlier could end this one while it writes
                saved = self.epoch
        except (KeyboardInterrupt, SystemExit):
            remedy = f"; --resume continues after epoch {saved}" if saved else " before the first checkpoint"
            notice(f"stopped{remedy}")
            raise

    def run_epoch(self) -> tuple[np.ndarray, bool]:
        """Train and validate once. Returns the scores of the validation clips, and whether their loss is the lowest."""
        start, lr = time.monotonic(), self.trainer.lr
        title = f"epoch {self.epoch + 1}/{self.config.epoch}"
        train_loss, train_accuracy = self.trainer.train_epoch(self.train_clips, self.epoch, title)
        scores, valid_accuracy = self.trainer.validate(self.valid_clips)
        valid_loss = float(scores.mean())
        self.trainer.check_finite("validation loss", valid_loss, f"the end of epoch {self.epoch + 1}")
        self.trainer.scheduler.step()
        row = (self.epoch + 1, lr, train_loss, train_accuracy, valid_loss, valid_accuracy, time.monotonic() - start)
        self.history.append(dict(zip(HISTORY, row, strict=True)))
        is_best = valid_loss < self.best_loss
        self.best_loss = min(valid_loss, self.best_loss)
        return scores, is_best

    def save(self, scores: np.ndarray, is_best: bool) -> None:
        """Write the checkpoints and `history.csv`. Cut anywhere, `--resume` repeats at most the last epoch: the best
        weights come first, and serve where the last state is not there yet.

        The scores of the validation clips go with the weights: `eval.py` takes its thresholds from them.
        """
        held_out = self.valid_clips.clips[MACHINE].assign(score=scores)
        state = self.trainer.state() | {
            "epoch": self.epoch,
            "best_loss": self.best_loss,
            "history": self.history,
            "held_out": held_out.to_dict("list"),
            "clips": self.fingerprint,
            "clip_counts": {"training": len(self.train_clips), "validation": len(self.valid_clips)},
            "config": self.config.model_dump(),
            "job": distributed.job_name(),
            "versions": utils.versions(),
        }
        if is_best:
            save_checkpoint(self.files.best, state)
        save_checkpoint(self.files.last, state)
        self.write_history()

    def write_history(self) -> None:
        utils.write_csv(self.files.history, pd.DataFrame(self.history))

    def report(self, is_best: bool, log: Any) -> None:
        """Print a line about the last epoch, and log it to TensorBoard."""
        row = self.history[-1]
        print(
            f"epoch {self.epoch}/{self.config.epoch}  lr {row['lr']:.2e}  "
            f"train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.3f}  "
            f"valid loss {row['valid_loss']:.4f} accuracy {row['valid_accuracy']:.3f}  "
            f"{row['seconds']:.1f} s{'  best' if is_best else ''}",
            flush=True,
        )
        if log:
            for name in HISTORY[1:]:
                log.add_scalar(name, row[name], self.epoch)
            log.flush()
