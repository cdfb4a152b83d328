"""Score the test clips of a trained model and compute AUC, pAUC and mAUC for each machine type.

    python eval.py                                      # the checkpoint at save_path
    python eval.py check_points/arcface.pth --data_root /data/dcase2020 --score_dtype float64
    python eval.py --part evaluation                    # the challenge's evaluation clips

Model, machines, mode, input, m and s come from the checkpoint. Writes, in the folder NAME/eval (NAME/evaluation for
the evaluation clips) beside a checkpoint NAME.pth: metrics.csv (fractions) and, for each machine ID,
anomaly_score_<type>_id_<XX>.csv as the DCASE 2020 evaluator reads it. The names of the evaluation clips do not tell
which are anomalous; eval_data_list.csv in data_root does, and without it there are scores but no metrics.
"""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from dataloader import LABEL_LIST, Clip, ClipSet, batches
from losses import Objective
from model import FrontEnd, TASTgramMFN
from trainer import build_model
from utils import (
    MODEL_KEYS,
    Config,
    OneLineParser,
    RunFiles,
    UserError,
    check_writable,
    choose_device,
    choose_precision,
    is_same,
    keep_freed_memory,
    load_checkpoint,
    notice,
    parse_command_line,
    replace_file,
    run_script,
    set_up_numerics,
)

MAX_FPR = 0.1  # pAUC covers false positive rates up to here
COLUMNS = ("AUC", "pAUC", "n_normal", "n_anomaly")

# AUC, pAUC, mAUC in percent on the development test set: the table in the authors' README
PUBLISHED = {
    "noisy_arcmix": {
        "fan": (98.32, 95.34, 92.67),
        "pump": (95.44, 85.99, 91.17),
        "slider": (99.53, 97.50, 97.96),
        "valve": (99.95, 99.74, 99.89),
        "ToyCar": (96.76, 90.11, 88.81),
        "ToyConveyor": (77.90, 67.15, 68.18),
        "average": (94.65, 89.31, 89.78),
    }
}

# ---------------------------------------------------------------------------------------------------------------
# From a checkpoint to scores
# ---------------------------------------------------------------------------------------------------------------


def load_model(path: Path, config: Config, given: set[str]) -> tuple[TASTgramMFN, Config]:
    """The model of a checkpoint, and the configuration with the keys that the checkpoint decides.

    A bare state dict decides nothing: `config` then serves as it is. Raises `UserError` where a key of the command
    line (`given`) contradicts the checkpoint, or the weights do not fit.
    """
    state = load_checkpoint(path)
    if "config" in state:
        for name in MODEL_KEYS:
            if name in given and not is_same(getattr(config, name), state["config"][name]):
                raise UserError(
                    f"command line: {name} {getattr(config, name)!r} is not the checkpoint's, "
                    f"{state['config'][name]!r} ({path}); leave it out"
                )
        config = dataclasses.replace(config, **{name: state["config"][name] for name in MODEL_KEYS})
    else:
        notice(f"{path} is a bare state dict: {', '.join(MODEL_KEYS)} are those of the configuration")
    model = build_model(config)
    check_weights(path, model, state["model"])
    model.load_state_dict(state["model"])
    return model.eval(), config


def check_weights(path: Path, model: TASTgramMFN, weights: dict[str, torch.Tensor]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{path} does not fit the configuration (machines, input, sub_centers): {name} is "
                f"{found.get(name, 'absent')} in the file and {expected.get(name, 'absent')} in the model"
            )


@torch.no_grad()
def score_clips(model: TASTgramMFN, config: Config, clips: ClipSet, device: torch.device) -> np.ndarray:
    """The anomaly score of each clip against its own machine ID, in the precision `config.score_dtype`.

    The network runs in `config.eval_precision`, everything before and after it in float32.
    """
    set_up_numerics()
    keep_freed_memory()
    precision = choose_precision(config.eval_precision, device)
    objective, front_end = Objective.of(config), FrontEnd(config.input).to(device)
    model = model.to(device, memory_format=torch.channels_last)
    scores = []
    for indices in tqdm(
        batches(np.arange(len(clips)), config.batch_size), desc="scoring", unit="batch", leave=False, disable=None
    ):
        waveform, labels = clips.batch(indices, device)
        inputs = front_end(waveform)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            similarity, _ = model(**inputs)
        scores.append(objective.anomaly_score(similarity, labels, getattr(torch, config.score_dtype)))
    return torch.cat(scores).cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------
# From scores to metrics
# ---------------------------------------------------------------------------------------------------------------

Metrics = dict[str, float | None]  # the COLUMNS; None where there is nothing to compute it from


def rate(is_anomaly: np.ndarray, scores: np.ndarray) -> Metrics:
    """AUC and pAUC (up to a false positive rate of 0.1, standardised to 0.5 for chance), as fractions."""
    n_anomaly = int(is_anomaly.sum())
    counts = {"n_normal": len(is_anomaly) - n_anomaly, "n_anomaly": n_anomaly}
    if min(counts.values()) == 0:
        return {"AUC": None, "pAUC": None, **counts}
    return {
        "AUC": float(roc_auc_score(is_anomaly, scores)),
        "pAUC": float(roc_auc_score(is_anomaly, scores, max_fpr=MAX_FPR)),
        **counts,
    }


def combine(rows: Sequence[Metrics], how) -> Metrics:
    """Each column of several rows combined on its own, leaving out rows without AUC."""
    rated = [row for row in rows if row["AUC"] is not None]
    if not rated:
        return dict.fromkeys(COLUMNS)
    combined = {name: float(how([row[name] for row in rated])) for name in COLUMNS}
    return {name: int(x) if name.startswith("n_") and x.is_integer() else x for name, x in combined.items()}


def rate_all(clips: Sequence[Clip], scores: np.ndarray) -> dict[str, dict[str, Metrics]]:
    """For each machine type the rows per ID (`00`, ...), then `pooled`, `mean` and `min` over its IDs; and for the
    type `average` the means of the last three over the types.
    """
    types = np.array([clip.machine_type for clip in clips])
    ids = np.array([clip.machine_id for clip in clips])
    is_anomaly = np.array([clip.is_anomaly for clip in clips])
    table: dict[str, dict[str, Metrics]] = {}
    for machine_type in dict.fromkeys(types):
        of_type = types == machine_type
        per_id = {}
        for machine_id in np.unique(ids[of_type]):
            chosen = of_type & (ids == machine_id)
            per_id[f"{machine_id:02d}"] = rate(is_anomaly[chosen], scores[chosen])
        rows = list(per_id.values())
        table[str(machine_type)] = per_id | {
            "pooled": rate(is_anomaly[of_type], scores[of_type]),
            "mean": combine(rows, np.mean),
            "min": combine(rows, np.min),
        }
    table["average"] = {
        row: combine([table[machine_type][row] for machine_type in table], np.mean) for row in ("pooled", "mean", "min")
    }
    return table


def name_gaps(table: dict[str, dict[str, Metrics]]) -> None:
    """Say which rows have no AUC because all their test clips are of one class."""
    gaps = [f"{t} {row}" for t, rows in table.items() for row, metrics in rows.items() if metrics["AUC"] is None]
    if gaps:
        notice(f"no AUC, and left out of the averages, for want of normal or anomalous test clips: {', '.join(gaps)}")


# ---------------------------------------------------------------------------------------------------------------
# From metrics to table and files
# ---------------------------------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    return f"{'-' if value is None else format(100 * value, '.2f'):>8}"


def published_rows(config: Config, part: str) -> dict[str, tuple[float, float, float]]:
    """The published rows for what was evaluated: the development test set, all three channels."""
    return PUBLISHED.get(config.mode, {}) if part == "test" and len(config.input) == 3 else {}


def format_table(table: dict[str, dict[str, Metrics]], published: dict[str, tuple[float, float, float]]) -> str:
    """The table in percent: pooled over IDs as published, as mean over IDs as DCASE rules, and the published row."""
    has_all = set(published) <= set(table)
    lines = [
        f"{'':12} | {'pooled over IDs':^17} | {'lowest':^8} | {'mean over IDs':^17} | {'published, DCASE 2020':^26}",
        f"{'in percent':12} |{'AUC':>8} {'pAUC':>8}  |{'mAUC':>8}  |{'AUC':>8} {'pAUC':>8}  "
        f"|{'AUC':>8} {'pAUC':>8} {'mAUC':>8}",
    ]
    for machine_type, rows in table.items():
        pooled, mean, least = rows["pooled"], rows["mean"], rows["min"]
        row = published.get(machine_type) if machine_type != "average" or has_all else None
        shown = " ".join(f"{value:8.2f}" for value in row) if row else f"{'-':>8} {'-':>8} {'-':>8}"
        lines.append(
            f"{machine_type:12} |{percent(pooled['AUC'])} {percent(pooled['pAUC'])}  |{percent(least['AUC'])}  "
            f"|{percent(mean['AUC'])} {percent(mean['pAUC'])}  |{shown}"
        )
    return "\n".join(line.rstrip() for line in lines)


def write_metrics(path: Path, table: dict[str, dict[str, Metrics]]) -> None:
    with replace_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["machine_type", "machine_id", *COLUMNS])
        for machine_type, rows in table.items():
            for name, metrics in rows.items():
                writer.writerow([machine_type, name, *(metrics[column] for column in COLUMNS)])


def write_scores(folder: Path, clips: Sequence[Clip], scores: np.ndarray) -> set[Path]:
    """One file per machine ID, `<file name>,<score>` without header; the digits read back to the same number."""
    files: dict[str, list[tuple[str, float]]] = {}
    for clip, score in zip(clips, scores, strict=True):
        name = f"anomaly_score_{clip.machine_type}_id_{clip.machine_id:02d}.csv"
        files.setdefault(name, []).append((clip.path.name, float(score)))
    for name, rows in files.items():
        with (
            replace_file(folder / name) as temporary,
            temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            csv.writer(file, lineterminator="\n").writerows(rows)
    return {folder / name for name in files}


def run(config: Config, path: Path, given: set[str], part: str = "test", rebuild_store: bool = False) -> None:
    """Score the clips of a part with the checkpoint at `path`, print the table and write the files."""
    if not path.suffix:
        raise UserError(f"{path}: the results go to a folder of this name without its ending; rename it to {path}.pth")
    device = choose_device(config.device)
    model, config = load_model(path, config, given)
    folder = RunFiles(path).results(part)
    check_writable(folder / "metrics.csv", "results lie beside the checkpoint, so copy it to a place of your own")
    clips = ClipSet.load(config, part, rebuild_store)
    scores = score_clips(model, config, clips, device)
    if not np.isfinite(scores).all():
        raise UserError(f"{path}: {np.sum(~np.isfinite(scores))} of {len(scores)} scores are not finite numbers")
    written = write_scores(folder, clips.clips, scores)
    for old in set(folder.glob("anomaly_score_*.csv")) - written:
        old.unlink()  # of an ID that has no clips any more
    if rate_labelled(folder / "metrics.csv", clips.clips, scores, published_rows(config, part)):
        print(f"{len(clips)} scores and metrics.csv: {folder}")
    else:
        print(f"{len(clips)} scores: {folder}")


def rate_labelled(path: Path, clips: Sequence[Clip], scores: np.ndarray, published: dict[str, tuple]) -> bool:
    """Print and write the metrics of the clips whose condition is known; whether there are any."""
    known = [index for index, clip in enumerate(clips) if clip.is_anomaly is not None]
    if len(known) < len(clips):
        notice(
            f"{len(clips) - len(known)} of {len(clips)} clips are not in {LABEL_LIST} and count in no metric "
            f"(`python datasets/download.py --parts evaluation` fetches it into data_root)"
        )
    if not known:
        path.unlink(missing_ok=True)  # of an evaluation with labels
        return False
    table = rate_all([clips[index] for index in known], scores[known])
    name_gaps(table)
    write_metrics(path, table)
    print(format_table(table, published))
    return True


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", type=Path, help="file of trained weights (default: save_path)")
    parser.add_argument(
        "--part", choices=("test", "evaluation"), default="test", help="which folder of clips to score (default: test)"
    )
    config, options, given = parse_command_line(parser)
    run(config, options.checkpoint or config.checkpoint, given, options.part, options.rebuild_store)


if __name__ == "__main__":
    run_script(main)
