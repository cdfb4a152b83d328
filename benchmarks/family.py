"""Measure size and speed of the networks of recipes: the table of docs/family.md.

    # all recipes, on the GPU, or on the CPU if there is none
    python benchmarks/family.py
    python benchmarks/family.py --recipes recipes/noisy_arcmix.yaml recipes/inputs/*.yaml

Multiply-adds are those of convolutions and matrix products for one clip, without the log-mel and
the Fourier transform. Each recipe trains and scores on random clips in memory, as trainer.py and
eval.py do, uncompiled; the median of the repeats counts.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from audio import N_SAMPLES
from benchmarks.throughput import (
    CLASSES,
    print_machine,
    random_clips,
    seconds,
    train_epochs,
    untrained_model,
)
from command_line import OneLineParser
from config import Config, load_config
from evaluation.tables import markdown_header, markdown_row
from inference import build_network, run_model
from model import FrontEnd
from trainer import Trainer
from utils import run_script, use_device

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("parameters", "multiply-adds (G)", "training (clips/s)", "scoring (clips/s)")
EPOCHS = 10**6  # so many that every decay of a moving average fits


def main() -> None:
    parser = OneLineParser(description=__doc__)
    files = sorted(ROOT.glob("recipes/*.yaml"))
    text = "default: all in recipes/"
    parser.add_argument("--recipes", nargs="+", type=Path, default=files, help=text)
    parser.add_argument("--device", default="auto", help="cpu or cuda (default: auto)")
    parser.add_argument("--batch_size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    options = parser.parse_args()
    device = use_device(options.device)
    keys = {"device": options.device, "batch_size": options.batch_size, "epoch": EPOCHS}
    recipes = {file.stem: load_config(file, compile=False, **keys) for file in options.recipes}
    for line in markdown_header("recipe", COLUMNS):
        print(line)
    for name, config in recipes.items():
        print(markdown_row(name, list(measure(config, device, options.repeats))), flush=True)
    print_machine()


def measure(config: Config, device: torch.device, repeats: int) -> Iterator[str]:
    """Yield the cells of COLUMNS."""
    network = build_network(config, CLASSES).eval()
    yield f"{sum(weight.numel() for weight in network.parameters()):,}"
    inputs = FrontEnd(config.input)(torch.zeros(1, N_SAMPLES, dtype=torch.int16))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(**inputs)
    yield f"{counter.get_total_flops() / 2e9:.3f}"
    clips = random_clips(4 * config.batch_size, device)
    trainer = Trainer(config, CLASSES, device, clips, clips)
    model = untrained_model(config)
    for action in (train_epochs(trainer), lambda: run_model(model, clips, config, device)):
        yield f"{len(clips) / seconds(action, device, repeats):.1f}"


if __name__ == "__main__":
    run_script(main)
