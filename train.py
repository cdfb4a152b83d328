"""Train TASTgram-MFN on the normal sounds of machines.

    python train.py                                     # config.yaml: the published recipe, all 41 machine IDs
    python train.py --mode arcface --epoch 100 --lr 5e-4 --machines '{slider: [0, 2, 4, 6]}'
    python train.py --config my.yaml --seed 7           # my.yaml holds the keys that differ from config.yaml
    python train.py --resume                            # go on after the last finished epoch

Writes, for save_path NAME.pth: NAME.pth (weights of the lowest validation loss), NAME.last.pth (for --resume) and
the folder NAME with history.csv and TensorBoard logs. `python eval.py` scores the test clips with the weights.
Several GPUs: see train_ddp.py.
"""

import contextlib
import fcntl
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dataloader import ClipSet
from trainer import Trainer
from utils import (
    Config,
    OneLineParser,
    RunFiles,
    UserError,
    barrier,
    check_writable,
    choose_device,
    from_main,
    is_main,
    is_restarted,
    load_checkpoint,
    notice,
    parse_command_line,
    run_script,
)

RESULT_FILES = [  # of eval.py
    "metrics.csv", "metrics.json", "results.md", "decisions.csv", "report.html",
    "anomaly_score_*.csv", "decision_result_*.csv",
]  # fmt: skip


def run(config: Config, resume: bool = False, overwrite: bool = False, rebuild_store: bool = False) -> None:
    """Train as configured, from the start or, with `resume`, from the last finished epoch."""
    files = RunFiles(config.checkpoint)
    with hold(files):
        if is_restarted() and from_main(lambda: files.lock.read_text() == job()):  # it had begun this run
            resume, overwrite = True, False
        state = from_main(lambda: find_run(files, resume, overwrite))
        device = choose_device(config.device)
        clips = ClipSet.load(config, "train", rebuild_store).place(config.store_device, device)
        train_clips, valid_clips = clips.split(config.split_ratio, config.seed)
        trainer = Trainer(config, device)
        if state:
            trainer.resume(state)
        trainer.take(train_clips, valid_clips)
        if is_main():
            if not state:
                clear(files)
            files.lock.write_text(job())
            print(f"{len(train_clips)} clips to train on, {len(valid_clips)} to validate, on {device}", flush=True)
        barrier()
        trainer.fit()
        trainer.keep_held_out_scores()
        if is_main():
            print(f"lowest validation loss {trainer.best_loss:.4f}; weights: {files.best}")


@contextlib.contextmanager
def hold(files: RunFiles) -> Iterator[None]:
    """Keep other runs from the same `save_path` while this one lasts, and find out early whether it can be written."""
    if not is_main():
        yield
        return
    check_writable(files.best, "--save_path names another place")
    with files.lock.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{files.best}: another process is training this run; wait for its end, or --save_path names another"
            ) from None
        yield


def job() -> str:
    """What tells this job of torchrun from others, the same after it has restarted its workers; empty without it."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{name} {platform.node()} {os.getppid()}" if name == "none" else name  # "none" is everybody's default


def find_run(files: RunFiles, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """The checkpoint to resume from, if any; a `UserError` rather than harm to a run that is already there."""
    if resume and overwrite:
        raise UserError("--resume goes on with a run, --overwrite replaces it: give one of them")
    states = [file for file in files.states if file.exists()]
    found = states + [file for file in (files.history,) if file.exists()]
    if resume and found and files.best not in found:
        raise UserError(f"{files.best}, the best weights of the run, is missing; bring it back or give --overwrite")
    if resume and found:
        return load_newest(states)
    if resume:
        notice(f"{files.last}: nothing to resume, so the run starts from the beginning")
    elif found and not overwrite:
        raise UserError(
            f"{found[0]} is there: --resume goes on with that run, --overwrite replaces it, --save_path names another"
        )
    return None


def load_newest(states: Sequence[Path]) -> dict[str, Any]:
    """The first of several states, newest first and the best weights last, that is not damaged.

    Raises `UserError` where the best weights are, which the run goes on to compare with.
    """
    *newer, best = states
    try:
        best_state = load_checkpoint(best)
    except UserError as error:
        raise UserError(f"{error}; bring it back, or start again with --overwrite") from None
    for file in newer:
        try:
            return load_checkpoint(file)
        except UserError as error:
            notice(f"{error}; going on from the state before it")
    return best_state


def clear(files: RunFiles) -> None:
    """Remove what an earlier run under this name has written, and nothing else."""
    for file in (files.best, files.last, files.previous, files.history):
        file.unlink(missing_ok=True)
    folders = [(files.tensorboard, ["events.out.tfevents.*"])]
    for results in (files.results("test"), files.results("evaluation")):
        folders += [(results / "figures", ["*.png"]), (results, RESULT_FILES)]
    for folder, names in folders:
        for file in [file for name in names for file in folder.glob(name)]:
            file.unlink()
        with contextlib.suppress(OSError):  # it holds files of someone else, or is not there
            folder.rmdir()


def parse_options(manual: str) -> tuple[Config, dict[str, bool]]:
    """The configuration and the options of a training script whose docstring is `manual`."""
    parser = OneLineParser(description=manual)
    parser.add_argument("--resume", action="store_true", help="go on after the last finished epoch of save_path")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing run under save_path")
    config, options, _ = parse_command_line(parser)
    return config, {name: getattr(options, name) for name in ("resume", "overwrite", "rebuild_store")}


def main() -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("train.py is one process: with torchrun, start train_ddp.py")
    config, options = parse_options(__doc__)
    run(config, **options)


if __name__ == "__main__":
    run_script(main)
