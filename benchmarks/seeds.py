"""Is a difference between the modes more than chance? Trainings of each mode with many seeds, in
one process.

    python benchmarks/seeds.py --config docs/real_recordings.yaml --data_root FOLDER --seeds 30
    # and again
    python benchmarks/seeds.py --config docs/real_recordings.yaml --data_root FOLDER --minutes 10

The recordings are read once and stay in the memory of the device, and the step of a mode is
compiled once. A run trains as train.py does, but writes no checkpoints; the weights of the lowest
validation loss are evaluated as eval.py does. OUTPUT/seeds.csv gets a row after each run: mode,
seed, epoch of the weights, validation loss, and AUC and pAUC of each machine ID for the three
scores, as fractions. OUTPUT/seeds.md has means, and differences between the modes, whose intervals
allow for other seeds but not for other test clips. Started again, it goes on with the runs that are
missing. A run of the 285 recordings of docs/real_recordings.md takes a quarter of an hour on two
cores.

Where the recordings have to be brought to another machine in parts:

1. Here, as FLAC, half as large, in a folder for each part:

       import pathlib, soundfile
       for wav in pathlib.Path("FOLDER/slider/train").glob("*.wav"):
           flac = pathlib.Path("part_1/slider/train", wav.stem + ".flac")
           flac.parent.mkdir(parents=True, exist_ok=True)
           soundfile.write(flac, *soundfile.read(wav, dtype="int16"))

   The recordings of docs/real_recordings.md take 42 MB (slider/train), 30 MB (slider/test) and 18 MB (valve).
2. There, for each part, `mkdir -p ~/recordings && cp -r part_1/* ~/recordings/`, to a folder that stays. The first part
   can come together with another command, such as benchmarks/gpu.py.
3. With the last part: `python3 benchmarks/seeds.py --config docs/real_recordings.yaml --data_root ~/recordings
   --minutes 5 --output DIR`. A part that is missing is an error that names its folder. To go on in another call, bring
   OUTPUT/seeds.csv and OUTPUT/seeds.json back into DIR.
"""

import copy
import itertools
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import State, TrainedModel, check_configuration
from config import SCORINGS, Config, parse_command_line
from corpus import settle_classes
from dataloader import ClipSet, fingerprint, load_clips
from evaluation.metrics import COVERAGE, SUMMARY_ROWS
from evaluation.result import evaluate
from evaluation.tables import markdown_header, markdown_row
from losses import MODES
from trainer import Run
from utils import (
    OneLineParser,
    UserError,
    check_writable,
    run_script,
    use_device,
    write_csv,
    write_text,
)

METRICS = ("AUC", "pAUC")


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument(
        "--seeds", type=int, default=30, help="of each mode, from 1 on (default: %(default)s)"
    )
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=list(MODES), help="default: all"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=np.inf,
        help="after which no run begins (default: no limit)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("check_points/seeds"), help="default: %(default)s"
    )
    config, options, given = parse_command_line(parser)
    end = time.monotonic() + 60 * options.minutes
    for key in {"mode", "seed", "save_path", "init_from"} & given.keys():
        raise UserError(
            f"command line: {key}: --modes, --seeds and --output choose, and every run begins anew"
        )
    config = settle_classes(config)
    device = use_device(config.device)
    clips, test = (load_clips(config, split) for split in ("train", "test"))
    rows = find_rows(options.output, config, fingerprint([clips, test]))
    clips.samples, test.samples = clips.read_all(device), test.read_all(device)
    finished = {(row["mode"], row["seed"]) for row in rows}
    runs = [(mode, seed) for seed in range(1, options.seeds + 1) for mode in options.modes]
    for mode, seed in runs:
        if (mode, seed) in finished:
            continue
        if time.monotonic() > end:
            print(f"{options.minutes:g} minutes are over; start the same command again, it goes on")
            break
        rows.append(
            measure_run(config.model_copy(update={"mode": mode, "seed": seed}), device, clips, test)
        )
        write_csv(options.output / "seeds.csv", pd.DataFrame(rows))
        auc = np.mean(
            [value for name, value in rows[-1].items() if re.fullmatch("published/.*/AUC", name)]
        )
        print(
            f"{mode}, seed {seed}: mean AUC {100 * auc:.2f}, {rows[-1]['seconds']:.1f} s",
            flush=True,
        )
    if rows:
        text = "\n".join(summarise(pd.DataFrame(rows)))
        print("\n" + text)
        write_text(options.output / "seeds.md", text + "\n")


def find_rows(folder: Path, config: Config, clips: str) -> list[dict[str, Any]]:
    """The rows of the runs that are finished. Raises `UserError` where these had other clips or
    another configuration.
    """
    about, table = folder / "seeds.json", folder / "seeds.csv"
    check_writable(about, "--output names another folder")
    if not table.exists():
        write_text(about, json.dumps({"config": config.model_dump(), "clips": clips}))
        return []
    try:
        before, rows = json.loads(about.read_text()), pd.read_csv(table).to_dict("records")
    except (OSError, ValueError):
        raise UserError(
            f"{folder}: seeds.csv and seeds.json are not both readable; remove them"
        ) from None
    check_configuration(config, before, about, "give the same, or --output names another folder")
    if before["clips"] != clips:
        raise UserError(
            f"{about}: the finished runs had other clips; --output names another folder"
        )
    return rows


def measure_run(
    config: Config, device: torch.device, clips: ClipSet, test: ClipSet
) -> dict[str, Any]:
    """Train and evaluate: a row of the table."""
    start = time.monotonic()
    run, best = train_run(config, device, clips)
    run.trainer.network.load_state_dict(best["model"])
    trained = TrainedModel(
        config.checkpoint, run.trainer.network.eval(), config, best | {"embeddings": run.embed()}
    )
    row: dict[str, Any] = {
        "mode": config.mode,
        "seed": config.seed,
        "epoch": best["epoch"],
        "loss": run.best_loss,
    }
    for kind, result in evaluate(trained, test, "test", device, SCORINGS).items():
        assert result.metrics  # the clips of the folder `test` have a condition
        table = result.metrics.table
        for machine_type, name in table.index[~table.index.isin(SUMMARY_ROWS, level=1)]:
            values = table.loc[machine_type, name]
            row |= {f"{kind}/{machine_type}/{name}/{metric}": values[metric] for metric in METRICS}
    return row | {"seconds": time.monotonic() - start}


def train_run(config: Config, device: torch.device, clips: ClipSet) -> tuple[Run, State]:
    """Train to the last epoch. Returns the run, and its state after the epoch of the lowest
    validation loss.
    """
    run = Run(config, device, *clips.split(config.split_ratio, config.seed))
    run.begin(None)
    best: State = {}
    while run.epoch < config.epoch:
        scores, is_best = run.run_epoch()
        if is_best:
            best = copy.deepcopy(run.state(scores))
    return run, best


# ---- The summary ----


def summarise(table: pd.DataFrame) -> Iterator[str]:
    """For each score the mean AUC of the IDs of each machine type: mean and deviation over the
    seeds, and differences of the modes, seed by seed.
    """
    values = table.melt(["mode", "seed"], [name for name in table.columns if name.endswith("/AUC")])
    values[["score", "type", "id", "metric"]] = values["variable"].str.split("/", expand=True)
    each = 100 * values.groupby(["score", "type", "mode", "seed"])["value"].mean()
    types, modes = values["type"].unique().tolist(), table["mode"].unique().tolist()
    for score in SCORINGS:
        yield from (
            "",
            f"## {score}: mean AUC of the machine IDs, in percent",
            "",
            *markdown_header("mode", types),
        )
        for mode in modes:
            runs = [each[score, machine_type, mode] for machine_type in types]
            yield markdown_row(f"{mode} (n = {len(runs[0])})", [spread(x) for x in runs])
        yield from ("", *markdown_header(f"difference ({COVERAGE:.0%} interval)", types))
        for one, other in itertools.combinations(modes, 2):
            pairs = [(each[score, name, one] - each[score, name, other]).dropna() for name in types]
            yield markdown_row(
                f"{one} minus {other}", [interval(differences) for differences in pairs]
            )


def spread(values: pd.Series) -> str:
    return (
        f"{values.mean():.2f} ± {values.std():.2f}" if len(values) > 1 else f"{values.mean():.2f}"
    )


def interval(differences: pd.Series) -> str:
    """The mean of the differences and its interval by Student's t."""
    count = len(differences)
    if count < 2:
        return "-"
    half = scipy.stats.t.ppf((1 + COVERAGE) / 2, count - 1) * differences.std() / np.sqrt(count)
    mean = differences.mean()
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


if __name__ == "__main__":
    run_script(main)
