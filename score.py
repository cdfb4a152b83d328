"""Score recordings of any length with a trained model, and decide whether they are anomalous.

    python score.py check_points/press.pth new.wav --machine_type press --machine_id line-3
    python score.py check_points/press.pth new.wav folder/ --machine_type press      # any ID
    python score.py check_points/press.pth hour.wav --machine_type press --machine_id line-3 \\
        --timeline --plots
    python score.py check_points/press.pth new.wav --machine_type press --machine_id line-3 \\
        --scoring nearest --json

Each recording, given as a file or in a folder, is scored from beginning to end (with --window first
its first 10 s alone) against the given machine ID or, without one, against the ID of the machine
type that it fits best. The script prints a line for each recording: file, machine, score,
threshold, normal or anomalous, and the start of the window with the highest score. --timeline also
prints every window. --json prints the results as JSON. --plots draws the scores of the windows, one
figure per recording in the folder NAME/timelines beside a checkpoint NAME.pth.

If a file cannot be read, its line says why, the other files are scored, and the exit status is 2.
The exit status does not depend on the decisions.

Machines, classes, mode, input, m, s and sub_centers are those of the checkpoint, and so is channel
unless it is given on the command line. The kind of score and the threshold are those of the
configuration, as in eval.py.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint import RunFiles
from config import SCORING_KEYS, Config, check_effect, parse_command_line
from errors import UserError
from evaluation.single import (
    find_candidates,
    find_files,
    name_figures,
    print_json,
    print_scores,
    score_recordings,
)
from inference import load_model
from utils import OneLineParser, check_writable, run_script, use_device


def score(config: Config, options: Namespace) -> None:
    """Score recordings and print the results; draw them on request.

    Raises:
        UserError: At the end, if some recordings could not be scored.
    """
    model = load_model(options.checkpoint, config)
    window = config.window if "window" in config.given else "all"
    windows = model.windows(config, "test", window)
    check_effect(config, windows, [config.scoring])
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
    n_drawn = draw(results, config.scoring, windows.channel) if options.plots else 0
    if n_drawn and not options.json:
        print(f"{n_drawn} timelines: {folder}")
    n_bad = sum("error" in row for row in results)
    if n_bad:
        raise UserError(
            f"{n_bad} of {len(results)} recordings could not be scored; see the reasons above"
        )


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
    add("recordings", nargs="+", type=Path, help="files, or folders with WAV or FLAC files")
    add("--machine_type", required=True, help="machine type of the recordings")
    add(
        "--machine_id",
        help="machine ID of the recordings (default: the best-fitting one for each recording)",
    )
    add("--timeline", action="store_true", help="also print score and decision of each window")
    add("--plots", action="store_true", help="draw the scores over time (PNG)")
    add("--json", action="store_true", help="print the results as JSON")
    keys = (*SCORING_KEYS, "batch_size", "eval_precision")
    score(*parse_command_line(parser, keys=keys))


if __name__ == "__main__":
    run_script(main)
