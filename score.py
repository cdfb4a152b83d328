"""Score recordings of any length with a trained model, and decide whether they are anomalous.

    python score.py check_points/press.pth new.wav --machine_type press --machine_id line-3
    python score.py check_points/press.pth new.wav folder/ --machine_type press      # any ID
    python score.py check_points/press.pth hour.wav --machine_type press --machine_id line-3 \\
        --timeline --plots
    python score.py check_points/press.pth new.wav --machine_type press --machine_id line-3 \\
        --scoring nearest --json
    # thresholds from normal recordings of another day
    python score.py check_points/press.pth --calibrate later/
    # another rate of false alarms, or a threshold of your own
    python score.py check_points/press.pth new.wav --machine_type press --false_alarms 0.01
    python score.py check_points/press.pth new.wav --machine_type press --threshold 0.004

Each recording, given as a file or in a folder, is scored from beginning to end (with --window first
its first 10 s alone) against the given machine ID or, without one, against the ID of the machine
type that it fits best. The script prints a line for each recording: file, machine, score,
threshold, normal or anomalous. A recording of several windows is anomalous if it has an alarm: a
stretch in which at least alarm_windows of alarm_span consecutive windows lie above the threshold
(if it has fewer windows, all of them). Its line has the alarms with start, end and highest score,
the start of the window with the highest score, and the number of windows above the threshold.
--timeline also prints every window. --json prints the results as JSON. --plots draws the scores of
the windows, one figure per recording in the folder NAME/timelines beside a checkpoint NAME.pth.

--calibrate FOLDER scores the normal recordings in FOLDER and the folders in it, and writes their
scores to NAME.calibration.json. From then on, the thresholds of their machines come from these
scores, in score.py, eval.py and export.py, instead of those of the recordings that training held
out. The machine of a recording is the one given, or else that of its name, as in training, and of
the folder of its machine type. Remove the file to return to the held-out recordings.

If a file cannot be read, its line says why, the other files are scored, and the exit status is 2.
The exit status does not depend on the decisions.

Machines, classes, mode, input, m, s and sub_centers are those of the checkpoint, and so is channel
unless it is given on the command line. The kind of score and what the threshold is are those of the
configuration, as in eval.py.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from audio import Windows
from checkpoint import RunFiles
from config import SCORING_KEYS, Config, check_effect, parse_command_line
from errors import UserError
from evaluation.calibration import calibrate, find_normal
from evaluation.scores import KINDS
from evaluation.single import (
    find_candidates,
    find_files,
    name_figures,
    print_json,
    print_scores,
    report_rate,
    score_recordings,
)
from evaluation.thresholds import explain_thresholds, find_thresholds, threshold_of
from inference import Model, load_model, with_bank
from recordings import MACHINE_COLUMNS
from utils import OneLineParser, check_writable, run_script, use_device


def score(config: Config, options: Namespace) -> None:
    """Score recordings and print the results; draw them on request.

    Raises:
        UserError: At the end, if some recordings could not be scored.
    """
    model, windows = load(config, options, [config.scoring])
    (files, problems), device = find_files(options.recordings), use_device(config.device)
    candidates = find_candidates(model, options.machine_type, options.machine_id)
    folder = RunFiles(options.checkpoint).timelines
    if options.plots:
        remedy = "copy the checkpoint to a writable folder, where the figures are written too"
        check_writable(folder / "picture.png", remedy)
    results = score_recordings(model, files, candidates, config, windows, device)
    results += [{"file": str(path), "error": reason} for path, reason in problems.items()]
    if options.plots:
        name_figures(results, folder)
    if options.json:
        print_json(results, options.timeline)
    else:
        print_scores(results, options.timeline)
    report_rate(results, config)
    n_drawn = draw(results, config.scoring, windows.channel) if options.plots else 0
    if n_drawn and not options.json:
        print(f"{n_drawn} timelines: {folder}")
    n_bad = sum("error" in row for row in results)
    if n_bad:
        raise UserError(
            f"{n_bad} of {len(results)} recordings could not be scored; see the reasons above"
        )


def load(config: Config, options: Namespace, kinds: Sequence[str]) -> tuple[Model, Windows]:
    """Load the model, and choose which windows of recordings are scored, for these kinds of
    score.
    """
    model = load_model(options.checkpoint, config)
    window = config.window if "window" in config.given else "all"
    windows = model.windows(config, "test", window)
    check_effect(config, windows, kinds)
    return model, windows


def run_calibration(config: Config, options: Namespace) -> None:
    """Score normal recordings, keep the scores for thresholds, and print these."""
    model, windows = load(config, options, list(KINDS))
    device = use_device(config.device)
    remedy = "copy the checkpoint to a writable folder, where the scores are written too"
    check_writable(RunFiles(options.checkpoint).calibration, remedy)
    given = options.machine_type, options.machine_id
    recordings = find_normal(model, options.calibrate, *given, Path(config.data_root))
    model = with_bank(model, config, [config.scoring], device)
    path = calibrate(model, recordings, config, windows, device)
    scorer = model.scorer(config.scoring, config.neighbours)
    machines = list(dict.fromkeys(recordings[MACHINE_COLUMNS].itertuples(index=False, name=None)))
    thresholds = find_thresholds(model, scorer, config).loc[machines]
    explain_thresholds(thresholds, config, options.checkpoint)
    for machine in machines:
        threshold = threshold_of(thresholds, machine)
        shown = "-" if threshold is None else f"{threshold:.6g}"
        print(" ".join(machine), shown, thresholds["source"].at[machine], sep="\t")
    print(f"the scores of {len(recordings)} recordings: {path}")


def draw(results: Sequence[Mapping[str, Any]], kind: str, channel: int) -> int:
    """Draw the recordings that have a file for a figure. Returns how many.

    Raises:
        UserError: At the end, if some could not be read again.
    """
    from evaluation.figures import draw_timeline  # matplotlib takes a second to import

    chosen = [row for row in results if "picture" in row]
    problems = []
    for row in chosen:
        try:
            draw_timeline(row, kind, channel, Path(row["picture"]))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(
            f"{len(problems)} of {len(chosen)} recordings could not be drawn: {'; '.join(problems)}"
        )
    return len(chosen)


def main() -> None:
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="file of trained weights")
    add("recordings", nargs="*", type=Path, help="files, or folders with WAV or FLAC files")
    add("--machine_type", help="machine type of the recordings")
    add(
        "--machine_id",
        help="machine ID of the recordings (default: the best-fitting one for each recording)",
    )
    add(
        "--calibrate",
        metavar="FOLDER",
        type=Path,
        help="folder of normal recordings from which to set the thresholds",
    )
    add("--timeline", action="store_true", help="also print score and decision of each window")
    add("--plots", action="store_true", help="draw the scores over time (PNG)")
    add("--json", action="store_true", help="print the results as JSON")
    keys = (*SCORING_KEYS, "batch_size", "eval_precision")
    config, options = parse_command_line(parser, keys=keys)
    check_options(config, options)
    if options.calibrate:
        run_calibration(config, options)
    else:
        score(config, options)


def check_options(config: Config, options: Namespace) -> None:
    """Raise `UserError` for options that are missing, or have no effect beside --calibrate."""
    if not options.calibrate:
        if not options.recordings or not options.machine_type:
            raise UserError(
                "the recordings and --machine_type are required, or --calibrate (see --help)"
            )
        return
    if options.recordings:
        raise UserError(
            f"{options.recordings[0]}: --calibrate scores only the recordings in its folder; leave "
            "out others"
        )
    names = [name for name in ("timeline", "plots", "json") if getattr(options, name)]
    names += config.given & {"over_windows", "alarm_windows", "alarm_span"}
    if isinstance(config.threshold, float):
        names.append("threshold")
    if names:
        raise UserError(f"{names[0]} has no effect with --calibrate; leave it out")


if __name__ == "__main__":
    run_script(main)
