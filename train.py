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

from checkpoint import RunFiles, clear_run, find_state, load_checkpoint, lock_run
from config import TRAINING_KEYS, Config, check_effect, parse_command_line
from corpus import settle_classes
from dataloader import keep_on_gpu, load_clips
from distributed import barrier, from_main, is_main, planned_processes
from trainer import Run
from utils import OneLineParser, UserError, run_script, use_device


def train(config: Config, resume: bool = False, overwrite: bool = False) -> None:
    """Train as configured, from the start or, with `resume`, from the last finished epoch."""
    files = RunFiles(config.checkpoint)
    with lock_run(files):
        state = from_main(lambda: find_state(files, resume, overwrite))
        initial = None
        if config.init_from and not state:
            initial = from_main(lambda: load_checkpoint(Path(config.init_from))["model"])
        device = use_device(config.device)
        config = settle_classes(config)
        clips = load_clips(config, "train")
        train_clips, valid_clips = clips.split(config.split_ratio, config.seed)
        run = Run(config, device, train_clips, valid_clips)
        if state:
            run.resume(state)
        else:
            run.begin(initial)
        if run.epoch < config.epoch:
            keep_on_gpu(
                (train_clips, valid_clips), config.data_device, device, run.trainer.memory_needed()
            )
            if is_main():
                if not state:
                    clear_run(files)
                print(
                    f"{len(train_clips)} clips to train on, {len(valid_clips)} to validate, on {device}",
                    flush=True,
                )
            barrier()
            run.fit()
        run.add_embeddings()
        if is_main():
            print(f"lowest validation loss {run.best_loss:.4f}; weights: {files.best}")


def parse_options(manual: str) -> tuple[Config, bool, bool]:
    """The configuration, --resume and --overwrite of a training script whose docstring is `manual`."""
    parser = OneLineParser(description=manual)
    parser.add_argument(
        "--resume", action="store_true", help="continue after the last finished epoch of save_path"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing run under save_path"
    )
    config, options, given = parse_command_line(parser, keys=TRAINING_KEYS)
    check_effect(config, given)
    return config, options.resume, options.overwrite


def main() -> None:
    if planned_processes() > 1:
        raise UserError("train.py is one process: with torchrun, start train_ddp.py")
    train(*parse_options(__doc__))


if __name__ == "__main__":
    run_script(main)
