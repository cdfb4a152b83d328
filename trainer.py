"""Training: one step, one epoch, validation; the run around them, with its history, checkpoints and resuming."""

import contextlib
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import distributed
import utils
from acceleration import WARM_UP, GraphedFunction, WithFallback, is_alone_on_gpu, is_to_compile
from checkpoint import (
    HISTORY,
    RunFiles,
    State,
    build_network,
    check_configuration,
    copy_state,
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
from utils import UserError, copy_to_host, notice, random_stream

WINDOW = 20  # steps whose losses are read together
ACTIVATIONS = 48_000_000  # bytes that a clip of a batch keeps for its gradients, in half precision
OTHER_MEMORY = 2_000_000_000  # bytes on a GPU: CUDA's context and libraries, weights, validation


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
    """The network and its optimiser on one device. Under torchrun each process has one of its own, and `batch_size` is
    divided between them.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        utils.set_up_numerics()
        utils.keep_freed_memory()
        torch.backends.cudnn.benchmark = True  # choose the fastest kernels: the shapes of a training do not change
        self.config, self.device = config, device
        self.objective = Objective(config.mode, config.m, config.s)
        self.precision = utils.choose_precision(config.precision, device)
        self.network = build_network(config).move_to(device)
        self.loss = TrainingLoss(self.network, self.objective, self.precision).to(device)
        self.model: nn.Module = self.loss
        if world_size() > 1:
            # The only buffers are batch norm statistics, which are the same in all processes. PyTorch warns of strides
            # that differ where the size is 1, which changes nothing.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            self.model = DistributedDataParallel(self.loss, broadcast_buffers=False, gradient_as_bucket_view=True)
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained,
            lr=torch.tensor(config.lr, device=device),  # a tensor, which a CUDA graph reads at each replay
            weight_decay=config.weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.alternatives = torch.from_numpy(alternatives(config)).to(device)
        self.share = len(range(rank(), config.batch_size, world_size()))  # of this process in a full batch
        self.is_recorded = config.cuda_graph and is_alone_on_gpu(device)
        self.full_step = self.build_full_step()

    def build_full_step(self) -> Callable[..., Tensor]:
        """The step of full batches. Shorter ones run as they are: for them nothing is compiled or recorded."""
        weight = self.share * world_size() / self.config.batch_size
        step: Callable[..., Tensor] = partial(self.compute_step, self.model, weight)
        if is_to_compile(self.config.compile, self.device):
            compiled = partial(self.compute_step, torch.compile(self.model, dynamic=False), weight)
            step = WithFallback("compile", compiled, step, trials=WARM_UP)
        if self.is_recorded:
            step = WithFallback("cuda_graph", GraphedFunction(step), step, trials=WARM_UP + 2)
        return step

    def step(self, samples: Tensor, labels: Tensor, mix: Mix | None, total: int | None = None) -> Tensor:
        """One optimiser step on samples int16 `(B, T)`. Returns loss and accuracy `(2,)` on the device, valid until the
        next step.

        `total` is the size of the whole batch, where these clips are this process's share of it, followed by partners
        from other shares.
        """
        own, arguments = own_clips(labels, mix), (samples, labels, *(mix or ()))
        total = total or own
        if total == self.config.batch_size:
            return self.full_step(*arguments)
        return self.compute_step(self.model, own * world_size() / total, *arguments)

    def compute_step(self, model: Any, weight: float, samples: Tensor, labels: Tensor, *mix: Tensor) -> Tensor:
        """`weight` is that of this process's gradient where the processes' shares of the batch differ in size."""
        self.optimizer.zero_grad(set_to_none=True)
        loss, accuracy = model(samples, labels, Mix(*mix) if mix else None)
        self.scaler.scale(loss * weight).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return torch.stack([loss.detach(), accuracy])

    def train_epoch(self, clips: ClipSet, epoch: int, title: str = "") -> tuple[float, float]:
        """One pass over the clips. Returns mean loss and accuracy; raises `UserError` at a loss that is not finite.

        What is drawn for the epoch goes to the device at once, and losses are read one window of steps late, so that
        the device need not wait for the host in between.
        """
        self.model.train()
        self.set_learning_rate(epoch)
        batch_size, seed = self.config.batch_size, self.config.seed
        plan = shuffled_batches(len(clips), batch_size, seed, epoch, least=max(2, world_size()))
        shares, mixes = self.divide(epoch, plan)
        results = torch.zeros(len(plan), 2, device=self.device)
        windows: list[tuple[int, Callable[[], Tensor]]] = []  # number of the first step, losses on their way
        progress = tqdm(total=len(plan), desc=title, unit="step", leave=False, disable=None if is_main() else True)
        with progress:
            for index, (samples, labels) in enumerate(clips.batches(shares, self.device)):
                results[index] = self.step(samples, labels, mixes[index], len(plan[index]))
                progress.update()
                if (index + 1) % WINDOW == 0 or index + 1 == len(plan):
                    first = index - index % WINDOW
                    means = sum_over_ranks(results[first : index + 1, 0] / world_size())
                    windows.append((epoch * len(plan) + first, copy_to_host(means)))
                    if len(windows) > 1:
                        progress.set_postfix_str(f"loss {self.check_losses(*windows.pop(0)):.3f}")
            for window in windows:
                self.check_losses(*window)
        sizes = torch.tensor([[own_clips(*pair)] for pair in zip(shares, mixes, strict=True)], device=self.device)
        loss, accuracy = (sum_over_ranks((results.double() * sizes).sum(dim=0)) / len(clips)).tolist()
        return loss, accuracy

    def divide(self, epoch: int, plan: Sequence[np.ndarray]) -> tuple[list[np.ndarray], Sequence[Mix | None]]:
        """For each batch of an epoch the clips that this process reads, and the mixups, on the device. Partners come
        from the whole batch, whatever the number of processes.
        """
        shares, mixes = [], []
        for step, whole in enumerate(plan, start=epoch * len(plan)):
            stream = random_stream(self.config.seed, utils.MIXING, step)
            mix = self.objective.draw_mix(self.config.alpha, stream, len(whole))
            if mix is None:
                shares.append(np.array_split(whole, world_size())[rank()])
            else:
                rows, mix = divide_mix(mix, rank(), world_size())
                shares.append(whole[rows])
                mixes.append(mix)
        if not mixes:
            return shares, [None] * len(plan)
        lam = torch.stack([mix.lam for mix in mixes]).to(self.device)
        partner = torch.cat([mix.partner for mix in mixes]).to(self.device)
        sizes = [len(mix.partner) for mix in mixes]
        return shares, [Mix(*pair) for pair in zip(lam.unbind(), partner.split(sizes), strict=True)]

    def check_losses(self, first: int, read: Callable[[], Tensor]) -> float:
        """Read the losses of a window of steps, the first of which has this number; returns the last."""
        losses = read().tolist()
        for number, loss in enumerate(losses, start=first + 1):
            self.check_finite("loss", loss, f"step {number}")
        return losses[-1]

    def learning_rate(self, epoch: int) -> float:
        """Of the epoch with this number, from 0: a cosine from `lr` to a tenth of it."""
        cosine = math.cos(math.pi * epoch / self.config.epoch)
        return self.config.lr * (0.1 + 0.9 * (1.0 + cosine) / 2.0)

    def set_learning_rate(self, epoch: int) -> None:
        self.optimizer.param_groups[0]["lr"].fill_(self.learning_rate(epoch))

    def check_finite(self, name: str, loss: float, moment: str) -> None:
        """Raise `UserError` with what to try where a loss is not finite; no checkpoint has seen it."""
        if not math.isfinite(loss):
            remedies = "a lower --lr" if self.precision == torch.float32 else "a lower --lr or --precision fp32"
            lr = self.optimizer.param_groups[0]["lr"].item()
            raise UserError(f"the {name} is {loss} at {moment} (learning rate {lr:.3g}): try {remedies}")

    def validate(self, clips: ClipSet) -> tuple[np.ndarray, float, float]:
        """The anomaly scores (float64), the loss, which is the mean score against the own class, and the accuracy,
        unmixed.
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
        """What the network gives, in evaluation mode and float32, for the clips that are this process's share. A title
        is that of a progress bar.
        """
        numbers = np.arange(len(clips))[rank() :: world_size()]
        batch_size, title = self.config.batch_size, title if is_main() else None
        return run_network(self.network, self.loss.front_end, clips, numbers, batch_size, self.device, title=title)

    def gather(self, share: Tensor, count: int) -> Tensor:
        """The rows of all clips, from the shares of all processes."""
        rows = share.new_zeros(count, share.shape[1])
        rows[rank() :: world_size()] = share
        distributed.barrier()  # a process may have read its clips long before another one
        return sum_over_ranks(rows)

    def memory_needed(self) -> int:
        """Bytes of a GPU that training takes besides the clips, estimated from the batch.

        A recorded step keeps activations of its own, beside those of steps that are not recorded.
        """
        clip = ACTIVATIONS * (2 if self.precision == torch.float32 else 1)
        return OTHER_MEMORY + clip * self.share * (2 if self.is_recorded else 1)

    def state(self) -> State:
        return {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: State) -> None:
        """Continue from a state. How the optimiser computes, and its learning rate, are this run's own."""
        self.network.load_state_dict(state["model"])
        own = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": own})
        if state["scaler"]:  # it has a state in fp16 only
            self.scaler.load_state_dict(state["scaler"])


def own_clips(rows: Tensor | np.ndarray, mix: Mix | None) -> int:
    """How many rows are clips of this process: with several processes, the others serve as partners only."""
    return len(rows if mix is None else mix.partner)


class Run:
    """A training from its first epoch to its last, with a checkpoint after each."""

    def __init__(self, config: Config, device: torch.device, train_clips: ClipSet, valid_clips: ClipSet) -> None:
        """Raises `UserError` where the clips are too few, or not the same on all machines."""
        least = max(2, world_size())
        processes = f"{world_size()} processes need one each" if world_size() > 1 else "batch norm needs two"
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
        self.config, self.files, self.trainer = config, RunFiles(config.checkpoint), Trainer(config, device)
        self.train_clips, self.valid_clips = train_clips, valid_clips
        self.history: list[dict[str, float]] = []  # a row per epoch
        self.best_loss = math.inf
        self.saved = 0  # epochs whose files are written
        self.moment = 0.0  # at which the epoch before ended, or the run began

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return len(self.history)

    def begin(self, weights: Mapping[str, Tensor] | None) -> None:
        """Start a run, with the weights of `init_from` if there are any. Raises `UserError` where they do not fit, or a
        machine has no clips to train on.
        """
        if unseen := [machine for machine in self.valid_clips.machines if machine not in self.train_clips.machines]:
            raise UserError(
                f"all recordings of {', '.join(unseen)} are held out for validation: bring more (a long one can be cut "
                f"into several), or raise split_ratio"
            )
        machines, only_held_out = machines_of_classes(self.config), set(self.valid_clips.labels.tolist())
        only_held_out -= set(self.train_clips.labels.tolist())
        if only_held_out:
            where = ", ".join(dict.fromkeys(" ".join(machines[label]) for label in sorted(only_held_out)))
            notice(
                f"all recordings of {len(only_held_out)} classes are held out for validation, so these are not learned "
                f"(attributes of {where}); a higher split_ratio or another seed may keep them"
            )
        if weights is not None:
            take_weights(self.trainer.network, weights, Path(self.config.init_from))

    def resume(self, state: State) -> None:
        """Continue from a checkpoint of the same configuration and clips; a `UserError` names what differs."""
        if "history" not in state:
            raise UserError(f"{self.files.best}: only weights, no run to resume; start again with --overwrite")
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
            self.write_history(self.history)  # a crash may have come between checkpoint and history

    def fit(self) -> None:
        """Train from the present epoch to the last. The files of an epoch are written while the next one is trained."""
        log = None
        if self.config.tensorboard and is_main():
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            log = SummaryWriter(str(self.files.tensorboard), purge_step=self.saved + 1)  # drops epochs after a crash
        with self.stoppable(), ThreadPoolExecutor(1) as writer:
            self.run_epochs(writer, log)

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[None]:
        """Say, when a user stops the run, what is kept of it."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            how = f"; --resume continues after epoch {self.saved}" if self.saved else " before the first checkpoint"
            notice(f"stopped{how}")
            raise

    def run_epochs(self, writer: ThreadPoolExecutor, log: Any) -> None:
        writing: Future[None] | None = None
        self.moment = time.monotonic()
        while self.epoch < self.config.epoch:
            scores, is_best = self.run_epoch()
            if is_main():
                read = copy_state(self.state(scores))
                if writing:
                    writing.result()  # or the error that it met
                writing = writer.submit(self.write, read, is_best, log)
            distributed.barrier()  # the disk may be slow
        if writing:
            writing.result()
        distributed.barrier()  # a process that ends earlier could end this one while it writes

    def run_epoch(self) -> tuple[np.ndarray, bool]:
        """Train and validate once. Returns the scores of the validation clips, and whether their loss is the lowest."""
        title = f"epoch {self.epoch + 1}/{self.config.epoch}"
        train_loss, train_accuracy = self.trainer.train_epoch(self.train_clips, self.epoch, title)
        scores, valid_loss, valid_accuracy = self.trainer.validate(self.valid_clips)
        self.trainer.check_finite("validation loss", valid_loss, f"the end of epoch {self.epoch + 1}")
        lr, now = self.trainer.learning_rate(self.epoch), time.monotonic()
        row = (self.epoch + 1, lr, train_loss, train_accuracy, valid_loss, valid_accuracy, now - self.moment)
        self.history.append(dict(zip(HISTORY, row, strict=True)))
        self.moment = now
        is_best = valid_loss < self.best_loss
        self.best_loss = min(valid_loss, self.best_loss)
        return scores, is_best

    def state(self, scores: np.ndarray) -> State:
        """What a checkpoint holds. The scores of the validation clips are in it: `eval.py` takes its thresholds from
        them.
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
            "job": distributed.job_name(),
            "versions": utils.versions(),
        }

    def add_embeddings(self) -> None:
        """Put the embeddings of the clips under the best weights into their checkpoint, unless they are in it."""
        best = self.files.best

        def weights_without() -> State | None:
            state = load_checkpoint(best)
            return None if "embeddings" in state else state["model"]

        with self.stoppable():
            weights = distributed.from_main(weights_without)
            if weights is None:
                return
            self.trainer.network.load_state_dict(weights)
            parts = {"bank": self.train_clips, "held_out": self.valid_clips}
            embeddings = {
                name: pack_embeddings(self.trainer.embed(clips), clips.labels) for name, clips in parts.items()
            }
            if is_main():
                save_checkpoint(load_checkpoint(best) | {"embeddings": embeddings}, best)
                print(f"embeddings of the clips: {best}", flush=True)
            distributed.barrier()  # as after the last epoch

    def write(self, read: Callable[[], State], is_best: bool, log: Any) -> None:
        """Write the checkpoints and `history.csv`, and report the epoch. Cut anywhere, `--resume` repeats at most this
        epoch and the one begun since: the best weights come first, and serve where the last state is not there yet.
        """
        state = read()
        paths = [self.files.best, self.files.last] if is_best else [self.files.last]
        save_checkpoint(state, *paths)
        self.write_history(state["history"])
        self.saved = state["epoch"]
        self.report(state["history"][-1], is_best, log)

    def write_history(self, history: list[dict[str, float]]) -> None:
        utils.write_csv(self.files.history, pd.DataFrame(history))

    def report(self, row: dict[str, float], is_best: bool, log: Any) -> None:
        """Print a line about an epoch whose files are written, and log it to TensorBoard."""
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
