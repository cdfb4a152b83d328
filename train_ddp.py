"""Train TASTgram-MFN in several processes, one per GPU (NCCL), or on the CPU (gloo).

    torchrun --standalone --nproc_per_node=4 train_ddp.py
    # restart after a crash, and continue
    torchrun --standalone --nproc_per_node=4 --max-restarts=3 train_ddp.py --resume
    torchrun --standalone --nproc_per_node=2 train_ddp.py --device cpu --epoch 10

On several computers, with restarts:

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --nnodes=2 --nproc_per_node=8 --max-restarts=3 \\
        --rdzv-backend=c10d --rdzv-id=a_name --rdzv-endpoint=HOST:29400 train_ddp.py --resume

Options and outputs are those of train.py, and batch_size is the global batch size. Use --resume
with --max-restarts: the first attempt starts the run, and later ones continue it. Several computers
need the same recordings and, for restarts, the same save_path on a shared disk. torchrun takes --m
and --s for options of its own: write `torchrun ... -- train_ddp.py --m 0.5`.
"""

from distributed import environment, is_started_by_torchrun, join, leave
from errors import UserError
from train import parse_options, train
from utils import run_script, use_device


def main() -> None:
    config, resume, overwrite = parse_options(__doc__)
    if not is_started_by_torchrun():
        raise UserError(
            "train_ddp.py was started without torchrun; use torchrun --standalone "
            "--nproc_per_node=N train_ddp.py, or for a single process python train.py"
        )
    if overwrite and environment("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise UserError(
            "--overwrite would replace the run after every restart; remove the old run, and use "
            "--resume instead"
        )
    join(use_device(config.device))
    train(config, resume, overwrite)
    leave()


if __name__ == "__main__":
    run_script(main)
