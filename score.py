"""Score recordings of any length with a trained model, and decide whether they are anomalous.

    python score.py check_points/press.pth new.wav --machine_type press --machine_id line-3
    python score.py check_points/press.pth new.wav folder/ --machine_type press      # any ID
    python score.py check_points/press.pth hour.wav --machine_type press --machine_id line-3 \\
        --timeline --plots
    python score.py check_points/press.pth new.wav --machine_type press --machine_id line-3 \\
        --scoring nearest --json
    # several trainings as one detector
    python score.py press_1.pth press_2.pth press_3.pth new.wav --machine_type press
    # thresholds from normal recordings of another day
    python score.py check_points/press.pth --calibrate later/
    # another rate of false alarms, or a threshold of your own
    python score.py check_points/press.pth new.wav --machine_type press --false_alarms 0.01
    python score.py check_points/press.pth new.wav --machine_type press --threshold 0.004
    # one machine alone: without training, against a folder of its normal recordings
    python score.py --normal compressor/ new.wav

Each recording, given as a file or in a folder, is scored from beginning to end (with --window first
its first 10 s alone) against the given machine ID or, without one, against the ID of the machine
type that it fits best. The script prints a line for each recording: file, machine, score,
threshold, normal or anomalous. A recording of several windows is anomalous if it has an alarm: a
stretch in which at least alarm_windows of alarm_span consecutive windows lie above the threshold
(if it has fewer windows, all of them). Its line has the alarms with start, end and highest score,
the start of the window with the highest score, and the number of windows above the threshold. A
second line says how the window with the highest score differs from normal training clips of the
machine, in level and in a range of frequencies, and names the most similar one. It describes the
sound, and does not explain the decision.

Several checkpoints, whose names end in .pth, score together as one detector (see eval.py
--together); the files beside a checkpoint are then beside the first, those of --calibrate beside
each.

--timeline also prints every window. --json prints the results as JSON. --plots draws a figure for
each recording in the folder NAME/pictures beside a checkpoint NAME.pth: the scores of its windows,
and the window with the highest score beside the most similar normal clip, if this is in data_root.

--calibrate FOLDER scores the normal recordings in FOLDER and the folders in it, and writes their
scores to NAME.calibration.json. From then on, the thresholds of their machines come from these
scores, in score.py, eval.py and export.py, instead of those of the recordings that training held
out. The machine of a recording is the one given, or else that of its name, as in training, and of
the folder of its machine type. Remove the file to return to the held-out recordings.

--normal FOLDER takes the place of the checkpoint, for a single machine: recordings are compared
with the normal recordings in FOLDER and the folders in it, by the score that uses no network
(scoring: spectrum). Thresholds come from the same recordings, each scored against all others.
--plots writes to check_points/FOLDER/pictures.

If a file cannot be read, its line says why, the other files are scored, and the exit status is 2.
The exit status does not depend on the decisions.

Machines, classes, mode, input, m, s and sub_centers are those of the checkpoint, and so is channel
unless it is given on the command line. The kind of score and what the threshold is are those of the
configuration, as in eval.py.
"""

import itertools
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from audio import Windows
from checkpoint import RunFiles
from command_line import OneLineParser
from config import (
    SCORING_KEYS,
    Config,
    check_effect,
    parse_command_line,
)
from detector import Detector, load_detector
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
from evaluation.without_network import CHECK_POINTS, check_keys, load_folder, name_machine
from names import is_audio
from recordings import MACHINE_COLUMNS
from utils import check_writable, notice, run_script, use_device


def score(config: Config, options: Namespace) -> None:
    """Score recordings and print the results; draw them on request.

    Raises:
        UserError: At the end, if some recordings could not be scored.
    """
    files, problems = find_files(options.recordings)
    device = use_device(config.device)
    if options.normal:
        machine = name_machine(options.normal, options.machine_type, options.machine_id)
        model = load_folder(options.normal, machine, choose_window(config), config, device)
        detector, candidates = Detector((model,)), [machine]
    else:
        detector = load_detector(options.checkpoints, config)
        candidates = find_candidates(detector, options.machine_type, options.machine_id)
        check_scoring(detector, config, options)
    windows = choose_windows(detector, config, [config.scoring])
    pictures = find_pictures(options) if options.plots else None
    results = score_recordings(detector, files, candidates, config, windows, device)
    results += [{"file": str(path), "error": reason} for path, reason in problems.items()]
    if pictures:
        name_figures(results, pictures)
    if options.json:
        print_json(results, options.timeline)
    else:
        print_scores(results, options.timeline)
    report_rate(results, config)
    if pictures:
        root = options.normal.parent if options.normal else Path(config.data_root)
        draw(results, config.scoring, windows.channel, root)
        if not options.json:
            print(f"pictures: {pictures}")
    n_bad = sum("error" in row for row in results)
    if n_bad:
        raise UserError(
            f"{n_bad} of {len(results)} recordings could not be scored; see the reasons above"
        )


def check_scoring(detector: Detector, config: Config, options: Namespace) -> None:
    """Print a notice if the kind of score is that of config.yaml, and the run had another one."""
    of_run = detector.config.scoring
    is_chosen = options.config or "scoring" in config.given
    if not is_chosen and config.scoring != of_run:
        notice(
            f"scoring: {config.scoring}, while the configuration of {detector.path} has {of_run}; "
            "give its file with --config, or --scoring"
        )


def choose_window(config: Config) -> str:
    """Return which part of recordings to score, "first" or "all"."""
    return config.window if "window" in config.given else "all"


def choose_windows(detector: Detector, config: Config, kinds: Sequence[str]) -> Windows:
    """Return which windows of recordings are scored, for these kinds of score."""
    windows = detector.windows(config, "test", choose_window(config))
    check_effect(config, windows, kinds)
    return windows


def find_pictures(options: Namespace) -> Path:
    """Return the folder of the figures.

    Raises:
        UserError: If it is not writable.
    """
    if options.normal:
        checkpoint = CHECK_POINTS / f"{options.normal.resolve().name}.pth"
        remedy = "start in a writable folder"
    else:
        checkpoint = options.checkpoints[0]
        remedy = "copy the checkpoint to a writable folder, where the figures are written too"
    folder = RunFiles(checkpoint).pictures
    check_writable(folder / "picture.png", remedy)
    return folder


def run_calibration(config: Config, options: Namespace) -> None:
    """Score normal recordings, keep the scores for thresholds, and print these."""
    detector = load_detector(options.checkpoints, config)
    windows = choose_windows(detector, config, list(KINDS))
    device = use_device(config.device)
    remedy = "copy the checkpoint to a writable folder, where the scores are written too"
    for checkpoint in options.checkpoints:
        check_writable(RunFiles(checkpoint).calibration, remedy)
    given = options.machine_type, options.machine_id
    recordings = find_normal(detector.first, options.calibrate, *given, Path(config.data_root))
    detector = detector.with_bank(config, [config.scoring], device)
    paths = calibrate(detector, recordings, config, windows, device)
    scorer = detector.scorer(config.scoring, config.neighbours)
    machines = list(dict.fromkeys(recordings[MACHINE_COLUMNS].itertuples(index=False, name=None)))
    thresholds = find_thresholds(detector, scorer, config).loc[machines]
    explain_thresholds(thresholds, config, detector.path)
    for machine in machines:
        threshold = threshold_of(thresholds, machine)
        shown = "-" if threshold is None else f"{threshold:.6g}"
        print(" ".join(machine), shown, thresholds["source"].at[machine], sep="\t")
    for path in paths:
        print(f"the scores of {len(recordings)} recordings: {path}")


def draw(results: Sequence[Mapping[str, Any]], kind: str, channel: int, normal_root: Path) -> None:
    """Draw the recordings that have a file for a figure. The files of normal clips are in
    `normal_root`.

    Raises:
        UserError: At the end, if some could not be read again.
    """
    from evaluation.recording_figure import draw_recording  # matplotlib takes a second to import

    chosen = [row for row in results if "picture" in row]
    problems = []
    for row in chosen:
        try:
            draw_recording(row, kind, channel, normal_root, Path(row["picture"]))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(
            f"{len(problems)} of {len(chosen)} recordings could not be drawn: {'; '.join(problems)}"
        )


def main() -> None:
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add(
        "recordings",
        metavar="FILE",
        nargs="*",
        type=Path,
        help="first the checkpoint or several, unless --normal is given; then the recordings: "
        "files, or folders with WAV or FLAC files",
    )
    add("--normal", metavar="FOLDER", type=Path, help="folder of normal recordings of one machine")
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
    add("--plots", action="store_true", help="draw a figure for each recording (PNG)")
    add("--json", action="store_true", help="print the results as JSON")
    keys = (*SCORING_KEYS, "batch_size", "eval_precision")
    config, options = parse_command_line(parser, keys=keys)
    if options.normal:
        check_normal(config, options)
        score(config.model_copy(update={"scoring": "spectrum"}), options)
        return
    options.checkpoints, options.recordings = divide_files(options.recordings)
    if options.calibrate:
        check_calibration(config, options)
        run_calibration(config, options)
    elif not options.recordings:
        raise UserError("the recordings to score are missing; name them after the checkpoint")
    elif not options.machine_type:
        raise UserError("--machine_type is missing: the type of the machine in the recordings")
    else:
        score(config, options)


def divide_files(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Return the checkpoints and the recordings among the files of the command line: the first is a
    checkpoint, and so are those after it that end in .pth.
    """
    if not files or is_audio(files[0]):
        raise UserError("the checkpoint is missing; name it first, or give --normal FOLDER")
    others = itertools.takewhile(lambda file: file.suffix == ".pth", files[1:])
    n_checkpoints = 1 + len(list(others))
    return files[:n_checkpoints], files[n_checkpoints:]


def check_normal(config: Config, options: Namespace) -> None:
    """Raise `UserError` for recordings that are missing beside --normal, or for options that have
    no effect there.
    """
    if options.calibrate:
        raise UserError(
            "--calibrate needs a checkpoint; with --normal, add the recordings to its folder"
        )
    if not options.recordings:
        raise UserError("the recordings to score are missing; name them beside --normal")
    if options.recordings[0].suffix == ".pth":
        raise UserError(f"{options.recordings[0]}: --normal needs no checkpoint; leave it out")
    check_keys(config)


def check_calibration(config: Config, options: Namespace) -> None:
    """Raise `UserError` for options that have no effect beside --calibrate."""
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
