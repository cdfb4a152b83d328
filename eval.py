"""Score the test recordings with a trained model, and write AUC, pAUC and mAUC of each machine
type, decisions, figures and a report.

    python eval.py                                      # the checkpoint at save_path
    python eval.py check_points/arcface.pth --data_root /data/dcase2020 --score_dtype float64
    python eval.py --split evaluation                   # the challenge's evaluation clips
    python eval.py --plots --report                     # figures, and one HTML file with everything
    # several checkpoints, and a comparison of their configurations
    python eval.py a_1.pth a_2.pth b_1.pth b_2.pth
    # also as one detector
    python eval.py a_1.pth a_2.pth a_3.pth --together
    # another score: distance to the nearest training clips
    python eval.py --scoring nearest
    python eval.py --all_scores                         # a comparison of all kinds of score
    # metrics of score files, of this or another method
    python eval.py --score_files FOLDER

Machines, classes, mode, input, m, s and sub_centers are those of the checkpoint, or those of the
configuration for a file with weights alone. Window and channel are those of the checkpoint, unless
they are given on the command line. The results of a checkpoint NAME.pth are written to the folder
NAME/test beside it, or to NAME/evaluation for the evaluation clips: metrics.csv and metrics.json
(fractions, with bootstrap intervals), results.md (percent), decisions.csv (for each machine ID the
threshold, false alarms and detections), and for each machine ID
anomaly_score_<type>_id_<XX>.csv and decision_result_<type>_id_<XX>.csv in the format of the DCASE
evaluators (after 2020 ..._section_<XX>_test.csv).

The names of the evaluation clips do not show which are anomalous. Metrics therefore require
eval_data_list.csv in data_root or, after 2020, the folders ground_truth_data and
ground_truth_domain of that year's evaluator. Without them, only scores and decisions are written.

With --together, all checkpoints are also evaluated as one detector, with the mean of their scores;
its results are written to the folder OUTPUT/test (or OUTPUT/evaluation). It takes recordings that
each training has held out, to put the scores on one scale.

If recordings have domains, there are also metrics of each domain, and the official score of the
challenge. --score_files computes all metrics from score files alone, and writes them to
FOLDER/metrics.

The key `scoring` selects the score, on which the thresholds and all results are based. nearest and
spectrum compare with the training clips. Training stores their embeddings and spectra in the
checkpoint; for weights without them, each call computes them from the training recordings in
data_root. The row "without a network" is the average of the score spectrum, which does not use the
network.

Thresholds come from recordings that training held out, or from those of score.py --calibrate.

To score single recordings, use score.py.
"""

from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

from checkpoint import RunFiles
from command_line import OneLineParser
from config import EVALUATION_KEYS, Config, check_effect, parse_command_line
from dataloader import ClipSet, load_clips
from detector import Detector, DetectorOutputs, join_models
from errors import UserError
from evaluation.comparison import compare, group_by_configuration
from evaluation.result import Result, evaluate
from evaluation.score_files import evaluate_score_files
from evaluation.scores import KINDS
from evaluation.tables import write_result
from evaluation.thresholds import explain_thresholds
from inference import Model, load_model
from locks import lock
from utils import check_writable, notice, run_script, use_device

COMPARISON = Path("check_points/comparison")


class Run(NamedTuple):
    """A detector with its outputs for the clips of a split."""

    detector: Detector
    clips: ClipSet
    outputs: DetectorOutputs


def evaluate_all(config: Config, paths: list[Path], options: Namespace) -> None:
    """Evaluate checkpoints, each into its folder; together and in comparison on request."""
    check_paths(paths, options)
    models = [load_model(path, config) for path in paths]
    if options.together:
        check_together(models, config, options)
    output = options.output or COMPARISON
    if is_comparison(paths, options):
        check_writable(output / "comparison.md", "choose another folder with --output")
    runs, results = [], []
    for model in models:
        if len(models) > 1:
            print(f"\n{model.path}")
        folder = RunFiles(model.path).results(options.split)
        remedy = "copy the checkpoint to a writable folder, where the results are written too"
        check_writable(folder / "metrics.csv", remedy)
        run = run_detector(Detector((model,)), config, options)
        results += evaluate_run(run, folder, config, options)
        if options.together:
            runs.append(run)
    if options.together:
        print(f"\n{len(models)} checkpoints together")
        # In the comparison, the others are subtracted from it.
        results = evaluate_run(join_runs(runs), output / options.split, config, options) + results
    if options.together and results[0].metrics is None:
        notice("no comparison: no recording is labelled normal or anomalous")
    elif is_comparison(paths, options):
        compare_all(config, results, output, options)


def check_together(models: list[Model], config: Config, options: Namespace) -> None:
    """Raise `UserError` if models cannot score together, before the first is evaluated."""
    detector = join_models(models)
    detector.windows(config, options.split)
    for kind in kinds_of(config, options):
        if not KINDS[kind].uses_bank:  # which may have to be computed
            detector.scorer(kind)


def check_paths(paths: list[Path], options: Namespace) -> None:
    """Raise `UserError` if results of two checkpoints would have the same folder, or if an option
    has no effect with these checkpoints.
    """
    if len({RunFiles(path).folder for path in paths}) < len(paths):
        raise UserError(
            "two checkpoints have the same path without the extension, and so the same folder of "
            "results; rename one, or leave it out"
        )
    if options.together and len(paths) == 1:
        raise UserError("--together needs several checkpoints; name more, or leave it out")
    output = options.output or COMPARISON
    for path in paths:
        if options.together and RunFiles(path).folder.resolve() == output.resolve():
            raise UserError(
                f"{output} is also the folder of the results of {path}; choose another one with "
                "--output"
            )
    if options.output and not is_comparison(paths, options):
        raise UserError(
            "--output has no effect without a comparison (several checkpoints or --all_scores); "
            "leave it out"
        )


def is_comparison(paths: list[Path], options: Namespace) -> bool:
    return len(paths) > 1 or options.all_scores


def kinds_of(config: Config, options: Namespace) -> list[str]:
    """Return the kinds of score to compute."""
    # The published kind comes last: it is subtracted from the others.
    return list(KINDS)[::-1] if options.all_scores else [config.scoring]


def run_detector(detector: Detector, config: Config, options: Namespace) -> Run:
    """Run a detector on the clips of the split."""
    kinds = kinds_of(config, options)
    windows = detector.windows(config, options.split)
    check_effect(config, windows, kinds)
    device = use_device(config.device)
    clips = load_clips(config, detector.classes, options.split, windows)
    detector = detector.with_bank(config, kinds, device)
    return Run(detector, clips, detector.run(clips, config, device))


def join_runs(runs: list[Run]) -> Run:
    """Return the run of all members together."""
    members = [model for run in runs for model in run.detector.members]
    outputs = [x for run in runs for x in run.outputs.members]
    return Run(Detector(tuple(members)), runs[0].clips, DetectorOutputs(tuple(outputs)))


def evaluate_run(run: Run, folder: Path, config: Config, options: Namespace) -> list[Result]:
    """Evaluate a run, and write the results of the kind of score of the configuration. Returns the
    results of all kinds that are compared.
    """
    kinds = kinds_of(config, options)
    results = evaluate(*run, config, options.split, kinds)
    chosen = results[kinds.index(config.scoring)]
    explain_thresholds(chosen.thresholds, config, run.detector.path)
    # Of several evaluations at once, the files of the last one stay.
    with lock(folder.with_name(f".{options.split}.lock"), waits=True):
        announce_removal(folder, options)
        write_result(chosen, folder)
        if options.plots or options.report:
            draw(chosen, folder, options.report)
    return results


def announce_removal(folder: Path, options: Namespace) -> None:
    """Print a notice if figures or report of an earlier evaluation will be removed and not written
    again.
    """
    removed = []
    if any((folder / "figures").glob("*.png")) and not (options.plots or options.report):
        removed.append("figures")
    if (folder / "report.html").exists() and not options.report:
        removed.append("report.html")
    if removed:
        option = "--report" if "report.html" in removed else "--plots"
        names = " and ".join(removed)
        notice(f"{folder}: removed {names} of the earlier evaluation; {option} writes new ones")


def draw(result: Result, folder: Path, has_report: bool) -> None:
    """Draw the figures of an evaluation, and write the report on request."""
    from evaluation.figures import draw_all  # matplotlib takes a second to import

    figures = draw_all(result, folder / "figures")
    print(f"{len(figures)} figures: {folder / 'figures'}")
    if has_report:
        from evaluation.report import write_report

        write_report(result, figures, folder / "report.html")
        print(f"report: {folder / 'report.html'}")


def compare_all(config: Config, results: list[Result], output: Path, options: Namespace) -> None:
    """Compare the configurations and kinds of score of results; draw the angles on request."""
    groups, figure = group_by_configuration(results), ""
    if options.plots or options.report:
        from evaluation.figures import draw_angles

        figure = "angles.png"
        chosen = {name: runs for name, runs in groups.items() if runs[0].kind == config.scoring}
    with lock(output / ".comparison.lock", waits=True):
        if figure:
            draw_angles(chosen, output / figure)
        compare(groups, output, figure)


def main() -> None:
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", nargs="*", type=Path, help="files of trained weights (default: save_path)")
    add("--split", choices=("test", "evaluation"), help="recordings to score (default: test)")
    add("--plots", action="store_true", help="draw the figures (PNG)")
    add("--report", action="store_true", help="write report.html, which contains the figures")
    text = "also score with all checkpoints as one detector"
    add("--together", action="store_true", help=text)
    text = f"folder for comparisons and --together (default: {COMPARISON})"
    add("--output", type=Path, help=text)
    add("--all_scores", action="store_true", help="compare all kinds of score (see scoring)")
    add("--score_files", metavar="FOLDER", type=Path, help="folder of score files to use instead")
    config, options = parse_command_line(parser, keys=EVALUATION_KEYS)
    if options.score_files:
        check_alone(config, options)
        evaluate_score_files(options.score_files, Path(config.data_root))
    else:
        options.split = options.split or "test"
        evaluate_all(config, options.checkpoint or [config.weights_path], options)


def check_alone(config: Config, options: Namespace) -> None:
    """Raise `UserError` for options beside --score_files that have no effect then."""
    names = [name for name, value in vars(options).items() if value]
    names = [name for name in names if name not in ("config", "score_files")]
    names += sorted(config.given - {"data_root"})
    if names:
        raise UserError(
            f"{names[0]} has no effect with --score_files, which uses only --data_root; leave it "
            "out"
        )


if __name__ == "__main__":
    run_script(main)
