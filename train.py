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
import os
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
    is_main,
    load_checkpoint,
    notice,
    parse_command_line,
    run_script,
)


def run(config: Config, resume: bool = False, overwrite: bool = False, rebuild_store: bool = False) -> None:
    """Train as configured, from the start or, with `resume`, from the last finished epoch."""
    files = RunFiles(config.checkpoint)
    state = find_run(files, resume, overwrite)
    if is_main():
        check_writable(files.best, "--save_path names another place")
    device = choose_device(config.device)
    clips = ClipSet.load(config, "train", rebuild_store).place(config.store_device, device)
    train_clips, valid_clips = clips.split(config.split_ratio, config.seed)
    trainer = Trainer(config, device)
    if state:
        trainer.resume(state)
    trainer.take(train_clips, valid_clips)
    if not state and is_main():
        clear(files)
    barrier()
    if is_main():
        print(f"{len(train_clips)} clips to train on, {len(valid_clips)} to validate, on {device}", flush=True)
    trainer.fit()
    if is_main():
        print(f"lowest validation loss {trainer.best_loss:.4f}; weights: {files.best}")


def find_run(files: RunFiles, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """The checkpoint to resume from, if any; a `UserError` rather than harm to a run that is already there."""
    if resume and overwrite:
        raise UserError("--resume goes on with a run, --overwrite replaces it: give one of them")
    found = [file for file in (files.last, files.best, files.history) if file.exists()]
    if resume and found and files.best not in found:
        raise UserError(f"{files.best}, the best weights of the run, is missing; bring it back or give --overwrite")
    if resume and found:
        return load_checkpoint(found[0])
    if resume:
        notice(f"{files.last}: nothing to resume, so the run starts from the beginning")
    elif found and not overwrite:
        raise UserError(
            f"{found[0]} is there: --resume goes on with that run, --overwrite replaces it, --save_path names another"
        )
    return None


def clear(files: RunFiles) -> None:
    """Remove what an earlier run under this name has written, and nothing else."""
    for file in (files.best, files.last, files.history):
        file.unlink(missing_ok=True)
    for folder, names in (
        (files.tensorboard, ["events.out.tfevents.*"]),
        (files.results("test"), ["metrics.csv", "anomaly_score_*.csv"]),
        (files.results("evaluation"), ["metrics.csv", "anomaly_score_*.csv"]),
    ):
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
