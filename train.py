"""Train TASTgram-MFN on normal recordings of machines.

    # config.yaml: the published recipe, all 41 machine IDs
    python train.py
    python train.py --mode arcface --epoch 100 --lr 5e-4 --machines '{slider: [0, 2, 4, 6]}'
    # my.yaml holds the keys that differ from config.yaml
    python train.py --config my.yaml --seed 7
    python train.py --resume                            # continue after the last finished epoch

For save_path NAME.pth, it writes NAME.pth (the weights with the lowest validation loss),
NAME.last.pth (for --resume) and the folder NAME with history.csv and TensorBoard logs. Evaluate the
weights with `python eval.py`. For several GPUs, see train_ddp.py.
"""

from pathlib import Path

from checkpoint import Checkpoint, RunFiles, find_checkpoint, lock_run
from command_line import OneLineParser
from config import TRAINING_KEYS, Config, check_effect, parse_command_line
from dataloader import check_clips, load_clips
from distributed import barrier, from_main, is_main, planned_processes
from errors import UserError
from evaluation.tables import clear_results
from recordings import find_classes
from trainer import Trainer
from utils import remove_files, run_script, use_device


def train(config: Config, resume: bool = False, overwrite: bool = False) -> None:
    """Train as configured, from the start or, with `resume`, from the last finished epoch."""
    files = RunFiles(config.weights_path)
    with lock_run(files):
        device = use_device(config.device)
        start = from_main(lambda: find_start(config, files, resume, overwrite))
        clips = load_clips(config, start.classes, "train", config.windows("train"))
        train_clips, valid_clips = clips.split(config.split_ratio, config.seed)
        check_clips(config, train_clips, valid_clips)
        trainer = Trainer(config, start.classes, device, train_clips, valid_clips)
        if start.history:
            trainer.resume(start)
        elif start.weights:
            trainer.start_from(start)
        with trainer.announce_stop():
            if len(trainer.history) < config.epoch:
                trainer.keep_clips_on_gpu()
                if is_main() and not start.history:
                    clear(files)
                barrier()
                trainer.fit()
            trainer.add_bank()
        if is_main():
            best = min(trainer.history, key=lambda result: result.valid_loss)
            loss, accuracy = f"{best.valid_loss:.4f}", f"{best.valid_accuracy:.3f}"
            print(f"lowest validation loss {loss}, accuracy {accuracy}; weights: {files.best}")


def find_start(config: Config, files: RunFiles, resume: bool, overwrite: bool) -> Checkpoint:
    """Return the checkpoint of the run to resume. For a new run, return one with an empty history,
    the classes to train and, with `init_from`, weights.
    """
    checkpoint = find_checkpoint(files, config, resume, overwrite)
    if checkpoint:
        return checkpoint
    path, weights = files.last, {}
    if config.init_from:
        path = Path(config.init_from)
        weights = Checkpoint.load(path).weights
    return Checkpoint(path, weights, classes=find_classes(config))


def clear(files: RunFiles) -> None:
    """Remove what an earlier run under this name, its evaluations and score.py have written."""
    for file in (files.best, files.last, files.history, files.calibration):
        file.unlink(missing_ok=True)
    remove_files(files.tensorboard, ["events.out.tfevents.*"])
    remove_files(files.pictures, ["*.png"])
    for split in ("test", "evaluation"):
        clear_results(files.results(split))


def parse_options(manual: str) -> tuple[Config, bool, bool]:
    """Parse the command line of a training script whose docstring is `manual`: the configuration,
    --resume and --overwrite.
    """
    parser = OneLineParser(description=manual)
    add = parser.add_argument
    add("--resume", action="store_true", help="continue the run after its last finished epoch")
    add("--overwrite", action="store_true", help="replace an existing run with the same save_path")
    config, options = parse_command_line(parser, keys=TRAINING_KEYS)
    if options.resume and options.overwrite:
        raise UserError(
            "--resume continues a run and --overwrite replaces it; use only one of them"
        )
    check_effect(config, config.windows("train"))
    return config, options.resume, options.overwrite


def main() -> None:
    if planned_processes() > 1:
        raise UserError("train.py is a single process; with torchrun, start train_ddp.py instead")
    train(*parse_options(__doc__))


if __name__ == "__main__":
    run_script(main)
