"""Score the test clips of a trained model; compute AUC, pAUC and mAUC for each machine type; decide; draw; report.

    python eval.py                                      # the checkpoint at save_path
    python eval.py check_points/arcface.pth --data_root /data/dcase2020 --score_dtype float64
    python eval.py --split evaluation                   # the challenge's evaluation clips
    python eval.py --plots --report                     # figures, and one HTML file with everything
    python eval.py a_1.pth a_2.pth b_1.pth b_2.pth      # several, and a comparison of their configurations
    python eval.py --scoring nearest                    # another score: distance to the nearest training clips
    python eval.py --all_scores                         # the three kinds of score side by side
    python eval.py --score_files FOLDER                 # metrics of score files, of this or another method
    python eval.py --score clip.wav folder/ --machine_type fan --machine_id 0     # normal or anomalous?
    python eval.py --score hour.wav --machine_type fan --machine_id 0 --timeline --plots     # and when?

Machines, classes, mode, input, m, s and sub_centers come from the checkpoint; window and channel too, unless they are
given here. Written, in the folder NAME/test (NAME/evaluation for the evaluation clips) beside a checkpoint NAME.pth:
metrics.csv and metrics.json (fractions, with bootstrap intervals), results.md (percent), for each machine ID
anomaly_score_<type>_id_<XX>.csv and decision_result_<type>_id_<XX>.csv as the DCASE evaluators read them (of the years
after 2020 ..._section_<XX>_test.csv), and decisions.csv with the thresholds. The names of the evaluation clips do not
tell which are anomalous; eval_data_list.csv in data_root does, or the folders ground_truth_data and ground_truth_domain
of later years' evaluators. Without them there are scores and decisions but no metrics.

Where clips have domains, the metrics are those of each domain too, and the official score of the challenge.
--score_files computes all metrics from files of scores alone, and writes them into FOLDER/metrics.

Scores, thresholds and all that follows are of the kind that `scoring` names. nearest needs the embeddings of the
training clips. Training leaves them in the checkpoint; for other weights they are computed from the training clips in
data_root, each time.

--score takes files and folders of recordings, scores each from its beginning to its end against the machine ID given,
or against that ID of the machine type that it fits best, and prints a line for each: file, machine, score, threshold,
normal or anomalous, and where it is worst. --timeline adds the windows one by one; --plots draws them, a picture for
each recording in NAME/timelines. A file that cannot be read is named in its line; the others are scored, and the exit
status is 2.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from checkpoint import RunFiles, load_model
from config import SCORINGS, Config, parse_command_line
from dataloader import load_clips
from evaluation.comparison import compare, group_by_configuration
from evaluation.recordings import find_recordings, picture_files, print_json, print_scores, score_recordings
from evaluation.result import Result, evaluate
from evaluation.score_files import evaluate_score_files
from evaluation.tables import write_result
from utils import OneLineParser, UserError, check_writable, run_script, use_device

COMPARISON = Path("check_points/comparison")


def evaluate_all(config: Config, paths: list[Path], given: dict[str, Any], options: Namespace) -> None:
    """Evaluate the checkpoints, each into its folder; compare them if there are several, and the scores on request."""
    for path in paths:
        check_folder(path)
    if len({RunFiles(path).folder for path in paths}) < len(paths):
        raise UserError("two checkpoints of one name without its ending have the same folder of results; rename one")
    is_comparison = len(paths) > 1 or options.all_scores
    if is_comparison:
        check_writable(options.output / "comparison.md", "--output names another folder")
    device, has_figures = use_device(config.device), options.plots or options.report
    results: list[Result] = []
    for path in paths:
        trained = load_model(path, config, given)
        folder = RunFiles(path).results(options.split)
        check_writable(folder / "metrics.csv", "results lie beside the checkpoint, so copy it to a folder of your own")
        clips = load_clips(trained.config, options.split)
        kinds = SCORINGS[::-1] if options.all_scores else [config.scoring]  # the published one is subtracted
        scored = evaluate(trained, clips, options.split, device, kinds)
        result = scored[config.scoring]
        if len(paths) > 1:
            print(f"\n{path}")
        write_result(result, folder, options.split)
        if has_figures:
            from evaluation.figures import draw_all  # matplotlib takes a second to import

            figures = draw_all(result, folder / "figures")
            print(f"{len(figures)} figures: {folder / 'figures'}")
        if options.report:
            from evaluation.report import write_report

            write_report(result, figures, folder / "report.html")
            print(f"report: {folder / 'report.html'}")
        results += scored.values()
    if is_comparison:
        groups, figure = group_by_configuration(results), "angles.png" if has_figures else ""
        if has_figures:
            from evaluation.figures import draw_angles

            chosen = {name: runs for name, runs in groups.items() if runs[0].trained.config.scoring == config.scoring}
            draw_angles(chosen, options.output / figure)
        compare(groups, options.split, options.output, figure)


def check_folder(path: Path) -> None:
    if not path.suffix:
        raise UserError(f"{path}: results go to a folder of this name without its ending; rename it to {path}.pth")


def score(config: Config, path: Path, given: dict[str, Any], options: Namespace) -> None:
    """Score single recordings, the whole of them; a `UserError` at the end if some could not be read."""
    if options.machine_type is None:
        raise UserError("--score needs --machine_type, and takes --machine_id")
    trained = load_model(path, config, given)
    files, device, folder = find_recordings(options.score), use_device(config.device), RunFiles(path).timelines
    if options.plots:
        check_folder(path)
        check_writable(folder / "picture.png", "pictures lie beside the checkpoint, so copy it to a folder of your own")
    window = given.get("window", "all")
    results = score_recordings(trained, files, options.machine_type, options.machine_id, window, device)
    pictures = list(picture_files(results, folder)) if options.plots else []
    for row, file in pictures:
        row["picture"] = str(file)
    (print_json if options.json else print_scores)(results, options.timeline)
    if pictures:
        from evaluation.figures import draw_timeline

        for row, file in pictures:
            draw_timeline(row, trained.config, file)
        if not options.json:
            print(f"{len(pictures)} timelines: {folder}")
    if bad := sum("error" in row for row in results):
        raise UserError(f"{bad} of {len(results)} recordings could not be scored; their lines say why")


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="*", type=Path, help="files of trained weights (default: save_path)")
    splits = ("test", "evaluation")
    parser.add_argument("--split", choices=splits, default="test", help="which clips to score (default: test)")
    parser.add_argument("--plots", action="store_true", help="draw the figures (PNG); with --score the timelines")
    parser.add_argument("--report", action="store_true", help="write report.html, with the figures in it")
    parser.add_argument(
        "--output", type=Path, default=COMPARISON, help=f"folder for comparisons (default: {COMPARISON})"
    )
    parser.add_argument("--all_scores", action="store_true", help="compare the three kinds of score (see scoring)")
    files = parser.add_argument_group("scoring of single recordings")
    files.add_argument("--score", nargs="+", metavar="FILE", type=Path, help="files or folders to score, nothing else")
    files.add_argument("--machine_type", help="machine type of these recordings")
    files.add_argument("--machine_id", help="their machine ID (default: for each file the best-fitting one)")
    files.add_argument("--timeline", action="store_true", help="print the score and the decision of each window too")
    files.add_argument("--json", action="store_true", help="print the scores as JSON")
    parser.add_argument(
        "--score_files", metavar="FOLDER", type=Path, help="measure the score files in it, nothing else"
    )
    config, options, given = parse_command_line(parser)
    paths = options.checkpoint or [config.checkpoint]
    if options.timeline and not options.score:
        raise UserError("--timeline needs --score")
    if options.score_files:
        if options.score or options.checkpoint:
            raise UserError("--score_files takes neither checkpoints nor --score")
        evaluate_score_files(options.score_files, Path(config.data_root))
    elif not options.score:
        evaluate_all(config, paths, given, options)
    elif len(paths) == 1:
        score(config, paths[0], given, options)
    else:
        raise UserError(f"--score takes one checkpoint, and {len(paths)} are given")


if __name__ == "__main__":
    run_script(main)
