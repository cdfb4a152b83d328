"""Score the test clips of a trained model; compute AUC, pAUC and mAUC for each machine type; decide; draw; report.

    python eval.py                                      # the checkpoint at save_path
    python eval.py check_points/arcface.pth --data_root /data/dcase2020 --score_dtype float64
    python eval.py --part evaluation                    # the challenge's evaluation clips
    python eval.py --plots --report                     # figures, and one HTML file with everything
    python eval.py a_1.pth a_2.pth b_1.pth b_2.pth      # several, and a comparison of their configurations
    python eval.py --score clip.wav folder/ --machine_type fan --machine_id 0     # normal or anomalous?

Model, machines, mode, input, attention, m and s come from the checkpoint. Writes, in the folder NAME/eval
(NAME/evaluation for the evaluation clips) beside a checkpoint NAME.pth: metrics.csv and metrics.json (fractions, with
bootstrap intervals), results.md (percent), for each machine ID anomaly_score_<type>_id_<XX>.csv and
decision_result_<type>_id_<XX>.csv as the DCASE evaluators read them, and decisions.csv with the thresholds. The names
of the evaluation clips do not tell which are anomalous; eval_data_list.csv in data_root does, and without it there are
scores and decisions but no metrics.

--score takes files and folders of recordings, scores each against the machine ID given, or against that ID of the
machine type that it fits best, and prints a line for each: file, machine, score, threshold, normal or anomalous. A file
that cannot be read is named in its line; the others are scored, and the exit status is 2.
"""

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataloader import LABEL_LIST, Clip, ClipSet, class_labels, find_recordings, read_clip
from evaluation.comparison import compare
from evaluation.decisions import Threshold, decide, fit_thresholds, rate_decisions
from evaluation.metrics import Draws, Table, add_intervals, bootstrap, rate_all
from evaluation.scoring import Outputs, run_model
from evaluation.tables import (
    format_table,
    name_gaps,
    published_rows,
    write_csv,
    write_per_machine,
    write_results,
)
from losses import Objective
from model import TASTgramMFN
from trainer import build_model
from utils import (
    MODEL_KEYS,
    Config,
    OneLineParser,
    RunFiles,
    UserError,
    check_writable,
    choose_device,
    commit,
    is_same,
    load_checkpoint,
    notice,
    parse_command_line,
    run_script,
    versions,
)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A checkpoint: its model, the configuration with the keys that it decides, and what else it holds."""

    path: Path
    model: TASTgramMFN
    config: Config
    state: dict[str, Any]

    def thresholds(self) -> dict[tuple[str, int], Threshold]:
        """The threshold of each machine; empty, with a notice, where no held-out scores are stored."""
        if "held_out" not in self.state:
            notice(f"{self.path}: no scores of held-out clips (its training has not ended), so there are no decisions")
            return {}
        config = self.config
        return fit_thresholds(config.machines, self.state["held_out"], config.threshold, config.threshold_percentile)

    def about(self, part: str, clips: Sequence[Clip]) -> dict[str, Any]:
        """What the results are of, by name."""
        counts = {name: sum(clip.is_anomaly is x for clip in clips)
                  for name, x in (("normal", False), ("anomalous", True), ("unlabelled", None))}  # fmt: skip
        trained = self.state.get("config", {})
        return {
            "checkpoint": str(self.path),
            "mode": self.config.mode,
            "input": self.config.input,
            "attention": self.config.attention,
            "seed": trained.get("seed"),
            "epoch of the weights": self.state.get("epoch"),
            "epochs": trained.get("epoch"),
            "clips trained on": self.state.get("clip_counts", {}).get("training"),
            f"clips of {part}": ", ".join(f"{count} {name}" for name, count in counts.items() if count),
            "trained with": self.state.get("versions"),
            "evaluated with": versions(),
            "commit": commit(),
        }


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What a checkpoint gives for the clips of a part: outputs, scores in `score_dtype`, and, of the clips whose
    condition is known, the table and its bootstrap draws; None where there is no such clip.
    """

    trained: Trained
    clips: list[Clip]
    outputs: Outputs
    scores: np.ndarray
    exact_scores: np.ndarray  # float64, for decisions
    thresholds: dict[tuple[str, int], Threshold]
    table: Table | None
    draws: Draws | None

    @property
    def known(self) -> list[int]:
        return [index for index, clip in enumerate(self.clips) if clip.is_anomaly is not None]


# ---------------------------------------------------------------------------------------------------------------
# From a checkpoint to scores and metrics
# ---------------------------------------------------------------------------------------------------------------


def load_model(path: Path, config: Config, given: set[str]) -> Trained:
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
    return Trained(path, model.eval(), config, state)


def check_weights(path: Path, model: TASTgramMFN, weights: dict[str, torch.Tensor]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{path} does not fit the configuration (machines, input, attention, sub_centers): {name} is "
                f"{found.get(name, 'absent')} in the file and {expected.get(name, 'absent')} in the model"
            )


def evaluate(trained: Trained, clips: ClipSet, device: torch.device) -> Evaluated:
    """Scores of the clips and, of those whose condition is known, the metrics with their intervals."""
    objective = Objective.of(trained.config)
    outputs = run_model(trained.model, trained.config, clips, device)
    scores = outputs.scores(objective, clips.labels, getattr(torch, trained.config.score_dtype))
    if bad := int(np.sum(~np.isfinite(scores))):
        raise UserError(f"{trained.path}: {bad} of {len(scores)} scores are not finite numbers")
    known = [index for index, clip in enumerate(clips.clips) if clip.is_anomaly is not None]
    table = draws = None
    if known:
        labelled = [clips.clips[index] for index in known]
        table, draws = rate_all(labelled, scores[known]), bootstrap(labelled, scores[known])
        add_intervals(table, draws)
    exact_scores = outputs.scores(objective, clips.labels)
    return Evaluated(trained, clips.clips, outputs, scores, exact_scores, trained.thresholds(), table, draws)


# ---------------------------------------------------------------------------------------------------------------
# From scores to files
# ---------------------------------------------------------------------------------------------------------------


def write(result: Evaluated, part: str, about: dict[str, Any], folder: Path) -> None:
    """Everything that an evaluation writes but figures and report, and the table on the terminal."""
    write_per_machine(folder, "anomaly_score", result.clips, result.scores.astype(np.float64))
    missing = len(result.clips) - len(result.known)
    if missing:
        notice(
            f"{missing} of {len(result.clips)} clips are not in {LABEL_LIST} and count in no metric "
            f"(`python datasets/download.py --parts evaluation` fetches it into data_root)"
        )
    if result.table is None:
        for name in ("metrics.csv", "metrics.json", "results.md"):
            (folder / name).unlink(missing_ok=True)  # of an evaluation with labels
    else:
        name_gaps(result.table)
        write_results(folder, result.table, about)
        print(format_table(result.table, published_rows(result.trained.config, part)))
    write_decisions(result, folder)
    print(f"{len(result.clips)} scores{' and metrics' if result.table else ''}: {folder}")


def write_decisions(result: Evaluated, folder: Path) -> None:
    """decision_result files, and decisions.csv: thresholds and, where the condition is known, how good they are."""
    index, decisions = decide(result.clips, result.exact_scores, result.thresholds)
    clips = [result.clips[i] for i in index]
    write_per_machine(folder, "decision_result", clips, decisions)
    rows = []
    for (machine_type, machine_id), threshold in result.thresholds.items():
        chosen = [
            (clip.is_anomaly, decision)
            for clip, decision in zip(clips, decisions, strict=True)
            if (clip.machine_type, clip.machine_id) == (machine_type, machine_id) and clip.is_anomaly is not None
        ]
        rated = rate_decisions(*np.array(chosen, dtype=np.int64).reshape(-1, 2).T)
        rows.append([machine_type, f"{machine_id:02d}", threshold.value, threshold.source, *rated.values()])
    header = ["machine_type", "machine_id", "threshold", "held_out", "precision", "recall", "F1"]
    if rows:
        write_csv(folder / "decisions.csv", [header, *rows])
    else:
        (folder / "decisions.csv").unlink(missing_ok=True)


def read_history(trained: Trained) -> list[dict[str, float]]:
    """The epochs of the whole run from history.csv; where that is gone, those up to the best, from the checkpoint."""
    path = RunFiles(trained.path).history
    if not path.exists():
        return trained.state.get("history", [])
    try:
        with path.open(newline="") as file:
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    except (ValueError, TypeError):
        raise UserError(
            f"{path}: not the history of a training; remove it, and the checkpoint's own is drawn"
        ) from None


def illustrate(result: Evaluated, clips: ClipSet, about: dict[str, Any], folder: Path, with_report: bool) -> None:
    """The figures and, if asked for, the report."""
    from evaluation.figures import draw_all  # matplotlib takes a second to import

    figures = draw_all(result, clips, folder / "figures", read_history(result.trained))
    print(f"{len(figures)} figures: {folder / 'figures'}")
    if with_report:
        from evaluation.report import write_report

        write_report(result, clips, about, figures, folder / "report.html")
        print(f"report: {folder / 'report.html'}")


# ---------------------------------------------------------------------------------------------------------------
# Single recordings
# ---------------------------------------------------------------------------------------------------------------


def score_files(trained: Trained, paths: Sequence[Path], machine_type: str, machine_id: int | None, device) -> list:
    """What the model says of recordings, as dictionaries: `file`, and either `error` or `machine_type`, `machine_id`,
    `score`, `threshold`, `decision`. Without a machine ID, that of the type with the lowest score counts.
    """
    machines = trained.config.machines
    candidates = machines.get(machine_type, []) if machine_id is None else [machine_id]
    if not candidates or any(i not in machines.get(machine_type, []) for i in candidates):
        known = "; ".join(f"{name} {', '.join(map(str, ids))}" for name, ids in machines.items())
        which = machine_type if machine_id is None else f"{machine_type} {machine_id}"
        raise UserError(f"{trained.path} knows no machine {which}; it was trained on {known}")
    thresholds, size, results = trained.thresholds(), trained.config.batch_size, []
    for start in range(0, len(paths), size):
        some = {path: read_or_error(path) for path in paths[start : start + size]}
        good = [path for path, samples in some.items() if not isinstance(samples, UserError)]
        scored = score_samples(trained, [some[path] for path in good], machine_type, candidates, device)
        scores = dict(zip(good, scored, strict=True))
        for path, samples in some.items():
            if path not in scores:
                results.append({"file": str(path), "error": str(samples)})
                continue
            best = int(np.argmin(scores[path]))
            machine, score = (machine_type, candidates[best]), float(scores[path][best])
            threshold = thresholds[machine].value if machine in thresholds else None
            decision = None if threshold is None else "anomalous" if score > threshold else "normal"
            results.append(
                {"file": str(path), "machine_type": machine_type, "machine_id": candidates[best], "score": score,
                 "threshold": threshold, "decision": decision}
            )  # fmt: skip
    return results


def score_samples(trained: Trained, samples: Sequence[np.ndarray], machine_type: str, ids: Sequence[int], device):
    """The anomaly scores (float64) of int16 waveforms against some IDs of a machine type `(n, IDs)`."""
    if not samples:
        return []
    objective, labels = Objective.of(trained.config), class_labels(trained.config.machines)
    clips = ClipSet([Clip(Path(), machine_type, ids[0], 0, None)] * len(samples), torch.from_numpy(np.stack(samples)),
                    np.arange(len(samples)))  # fmt: skip
    outputs = run_model(trained.model, trained.config, clips, device)
    return np.stack([outputs.scores(objective, np.full(len(clips), labels[machine_type, i])) for i in ids], axis=1)


def read_or_error(path: Path) -> np.ndarray | UserError:
    try:
        return read_clip(path)[0]
    except UserError as error:
        return error


def print_scores(results: Sequence[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(results, indent=2))
        return
    for row in results:
        if "error" in row:
            print(f"{row['file']}\terror: {row['error']}")
            continue
        threshold = "-" if row["threshold"] is None else f"{row['threshold']:.6g}"
        machine = f"{row['machine_type']} {row['machine_id']:02d}"
        print(f"{row['file']}\t{machine}\t{row['score']:.6g}\t{threshold}\t{row['decision'] or '-'}")


# ---------------------------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------------------------


def run(config: Config, paths: Sequence[Path], given: set[str], options: Any) -> None:
    """Evaluate the checkpoints, each into its folder, and compare them if there are several."""
    for path in paths:
        if not path.suffix:
            raise UserError(f"{path}: results go to a folder of this name without its ending; rename it to {path}.pth")
    device = choose_device(config.device)
    results = []
    for path in paths:
        trained = load_model(path, config, given)
        folder = RunFiles(path).results(options.part)
        check_writable(folder / "metrics.csv", "results lie beside the checkpoint, so copy it to a place of your own")
        clips = ClipSet.load(trained.config, options.part, options.rebuild_store and not results)
        result = evaluate(trained, clips, device)
        if len(paths) > 1:
            print(f"\n{path}")
        about = trained.about(options.part, result.clips)
        write(result, options.part, about, folder)
        if options.plots or options.report:
            illustrate(result, clips, about, folder, options.report)
        results.append(result)
    if len(paths) > 1:
        compare(results, options.output)
        if options.plots or options.report:
            from evaluation.figures import draw_angles

            draw_angles(results, options.output / "angles.png")
            print(f"angles.png: {options.output}")


def run_score(config: Config, path: Path, given: set[str], options: Any) -> None:
    """Score single recordings; a `UserError` at the end if some could not be read."""
    if options.machine_type is None:
        raise UserError("--score needs --machine_type, and takes --machine_id")
    trained = load_model(path, config, given)
    files = list(dict.fromkeys(file for place in options.score for file in find_recordings(place)))  # each once
    results = score_files(trained, files, options.machine_type, options.machine_id, choose_device(config.device))
    print_scores(results, options.json)
    bad = sum("error" in row for row in results)
    if bad:
        raise UserError(f"{bad} of {len(results)} recordings could not be scored; their lines say why")


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="*", type=Path, help="files of trained weights (default: save_path)")
    parser.add_argument(
        "--part", choices=("test", "evaluation"), default="test", help="which folder of clips to score (default: test)"
    )
    parser.add_argument("--plots", action="store_true", help="draw the figures (PNG)")
    parser.add_argument("--report", action="store_true", help="write report.html, with the figures in it")
    place = Path("check_points/comparison")
    parser.add_argument("--output", type=Path, default=place, help=f"folder for comparisons (default: {place})")
    files = parser.add_argument_group("scoring of single recordings")
    files.add_argument("--score", nargs="+", metavar="FILE", type=Path, help="files or folders to score, nothing else")
    files.add_argument("--machine_type", help="machine type of these recordings")
    files.add_argument("--machine_id", type=int, help="their machine ID (default: for each file the best-fitting one)")
    files.add_argument("--json", action="store_true", help="print the scores as JSON")
    config, options, given = parse_command_line(parser)
    paths = options.checkpoint or [config.checkpoint]
    if not options.score:
        run(config, paths, given, options)
    elif len(paths) == 1:
        run_score(config, paths[0], given, options)
    else:
        raise UserError(f"--score takes one checkpoint, and {len(paths)} are given")


if __name__ == "__main__":
    run_script(main)
