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

from checkpoint import Checkpoint, find_checkpoint
from config import TRAINING_KEYS, Config, check_effect, parse_command_line
from dataloader import check_clips, load_clips
from distributed import barrier, from_main, is_main, planned_processes
from evaluation.tables import clear_results
from recordings import find_classes
from run_files import RunFiles, clear_run, lock_run
from trained import take_weights
from trainer import Trainer
from utils import OneLineParser, UserError, run_script, use_device


def train(config: Config, resume: bool = False, overwrite: bool = False) -> None:
    """Train as configured, from the start or, with `resume`, from the last finished epoch."""
    files = RunFiles(config.weights_path)
    with lock_run(files):
        checkpoint = from_main(lambda: find_checkpoint(config, resume, overwrite))
        trainer = prepare(config, checkpoint)
        with trainer.announce_stop():
            if len(trainer.history) < config.epoch:
                trainer.keep_clips_on_gpu()
                if is_main() and not checkpoint:
                    clear(files)
                barrier()
                trainer.fit()
            trainer.add_bank()
        if is_main():
            print(f"lowest validation loss {trainer.best_loss:.4f}; weights: {files.best}")


def prepare(config: Config, checkpoint: Checkpoint | None) -> Trainer:
    """Find the classes and the clips, and return the trainer of a new run or, with a checkpoint, of
    the run to resume.
    """
    initial = None
    if config.init_from and not checkpoint:
        initial = from_main(lambda: Checkpoint.load(Path(config.init_from)))
    device = use_device(config.device)
    classes = checkpoint.classes if checkpoint else from_main(lambda: find_classes(config))
    clips = load_clips(config, classes, "train", config.windows("train"))
    train_clips, valid_clips = clips.split(config.split_ratio, config.seed)
    check_clips(config, classes, train_clips, valid_clips)
    trainer = Trainer(config, classes, device, train_clips, valid_clips)
    if checkpoint:
        trainer.load(checkpoint)
    elif initial:
        take_weights(trainer.network, initial)
    return trainer


def clear(files: RunFiles) -> None:
    """Remove what an earlier run under this name and its evaluations have written."""
    clear_run(files)
    for split in ("test", "evaluation"):
        clear_results(files.results(split))


def parse_options(manual: str) -> tuple[Config, bool, bool]:
    """Parse the command line of a training script whose docstring is `manual`: the configuration,
    --resume and --overwrite.
    """
    parser = OneLineParser(description=manual)
    parser.add_argument(
        "--resume", action="store_true", help="continue the run after its last finished epoch"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing run with the same save_path"
    )
    config, options = parse_command_line(parser, keys=TRAINING_KEYS)
    check_effect(config, config.windows("train"))
    return config, options.resume, options.overwrite


def main() -> None:
    if planned_processes() > 1:
        raise UserError("train.py is a single process; with torchrun, start train_ddp.py instead")
    train(*parse_options(__doc__))


if __name__ == "__main__":
    run_script(main)
