"""Train TASTgram-MFN on the normal sounds of machines.

    # config.yaml: the published recipe, all 41 machine IDs
    python train.py
    python train.py --mode arcface --epoch 100 --lr 5e-4 --machines '{slider: [0, 2, 4, 6]}'
    # my.yaml holds the keys that differ from config.yaml
    python train.py --config my.yaml --seed 7
    python train.py --resume                            # continue after the last finished epoch

Writes, for save_path NAME.pth: NAME.pth (weights of the lowest validation loss), NAME.last.pth (for
--resume) and the folder NAME with history.csv and TensorBoard logs. `python eval.py` scores the
test clips with the weights. Several GPUs: see train_ddp.py.
"""

from pathlib import Path

from checkpoint import Checkpoint, RunFiles, clear_run, find_checkpoint, lock_run, take_weights
from config import TRAINING_KEYS, Config, check_effect, parse_command_line
from dataloader import keep_on_gpu, load_clips
from distributed import barrier, from_main, is_main, planned_processes
from evaluation.tables import clear_results
from recordings import find_classes
from trainer import Trainer, check_clips
from utils import OneLineParser, UserError, run_script, use_device


def train(config: Config, resume: bool = False, overwrite: bool = False) -> None:
    """Train as configured, from the start or, with `resume`, from the last finished epoch."""
    files = RunFiles(config.checkpoint)
    with lock_run(files):
        checkpoint = from_main(lambda: find_checkpoint(config, resume, overwrite))
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
        with trainer.announce_stop():
            if len(trainer.history) < config.epoch:
                others = trainer.memory_needed()
                keep_on_gpu((train_clips, valid_clips), config.data_device, device, others)
                if is_main() and not checkpoint:
                    clear_run(files)
                    for split in ("test", "evaluation"):
                        clear_results(files.results(split))
                if is_main():
                    counts = f"{len(train_clips)} clips to train on, {len(valid_clips)} to validate"
                    print(f"{counts}, on {device}", flush=True)
                barrier()
                trainer.fit()
            trainer.add_bank()
        if is_main():
            print(f"lowest validation loss {trainer.best_loss:.4f}; weights: {files.best}")


def parse_options(manual: str) -> tuple[Config, bool, bool]:
    """Parse the command line of a training script whose docstring is `manual`: the configuration,
    --resume and --overwrite.
    """
    parser = OneLineParser(description=manual)
    parser.add_argument(
        "--resume", action="store_true", help="continue after the last finished epoch of save_path"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing run under save_path"
    )
    config, options = parse_command_line(parser, keys=TRAINING_KEYS)
    check_effect(config, config.windows("train"))
    return config, options.resume, options.overwrite


def main() -> None:
    if planned_processes() > 1:
        raise UserError("train.py is one process: with torchrun, start train_ddp.py")
    train(*parse_options(__doc__))


if __name__ == "__main__":
    run_script(main)
