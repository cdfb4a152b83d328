"""Normal or anomalous? Score recordings of any length with a trained model.

    python score.py check_points/press.pth new.wav --machine_type press --machine_id line-3
    python score.py check_points/press.pth new.wav folder/ --machine_type press      # any ID
    python score.py check_points/press.pth hour.wav --machine_type press --machine_id line-3 \\
        --timeline --plots
    python score.py check_points/press.pth new.wav --machine_type press --machine_id line-3 \\
        --scoring nearest --json

Takes files and folders of recordings, scores each from its beginning to its end against the machine
ID given, or against that ID of the machine type that it fits best, and prints a line for each:
file, machine, score, threshold, normal or anomalous, and where it is worst. --timeline adds the
windows one by one; --json prints the same as JSON; --plots draws the windows, a picture for each
recording in the folder NAME/timelines beside a checkpoint NAME.pth. A file that cannot be read is
named in its line; the others are scored, and the exit status is 2. The exit status does not depend
on the decisions.

Machines, classes, mode, input, m, s, sub_centers and channel come from the checkpoint. The kind of
score and the threshold are those of the configuration, as in eval.py.
"""

from argparse import Namespace
from pathlib import Path

from checkpoint import RunFiles, load_model
from config import SCORING_KEYS, Config, check_effect, parse_command_line
from evaluation.single import (
    find_candidates,
    find_files,
    name_pictures,
    print_json,
    print_scores,
    score_recordings,
)
from utils import OneLineParser, UserError, check_writable, run_script, use_device


def score(config: Config, options: Namespace) -> None:
    """Score recordings and print the results; draw them on request.

    Raises:
        UserError: At the end, if some recordings could not be scored.
    """
    model = load_model(options.checkpoint, config)
    window = config.window if "window" in config.given else "all"
    windows = model.windows(config, "test", window)
    check_effect(config, windows, [config.scoring])
    files, device = find_files(options.recordings), use_device(config.device)
    candidates = find_candidates(model, options.machine_type, options.machine_id)
    folder = RunFiles(options.checkpoint).timelines
    if options.plots:
        remedy = "pictures are written beside the checkpoint, so copy it to another folder"
        check_writable(folder / "picture.png", remedy)
    results = score_recordings(model, files, candidates, config, windows, device)
    pictures = name_pictures(results, folder) if options.plots else {}
    for number, file in pictures.items():
        results[number]["picture"] = str(file)
    if options.json:
        print_json(results, options.timeline)
    else:
        print_scores(results, options.timeline)
    if pictures:
        from evaluation.figures import draw_timeline  # matplotlib takes a second to import

        for number, file in pictures.items():
            draw_timeline(results[number], config.scoring, windows.channel, file)
        if not options.json:
            print(f"{len(pictures)} timelines: {folder}")
    n_bad = sum("error" in row for row in results)
    if n_bad:
        raise UserError(
            f"{n_bad} of {len(results)} recordings could not be scored; their lines say why"
        )


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="file of trained weights")
    parser.add_argument(
        "recordings", nargs="+", type=Path, help="files, or folders with WAV or FLAC files"
    )
    parser.add_argument("--machine_type", required=True, help="machine type of the recordings")
    parser.add_argument(
        "--machine_id", help="their machine ID (default: for each file the best-fitting one)"
    )
    parser.add_argument(
        "--timeline", action="store_true", help="print score and decision of each window too"
    )
    parser.add_argument("--plots", action="store_true", help="draw the timelines (PNG)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    keys = (*SCORING_KEYS, "batch_size", "eval_precision")
    score(*parse_command_line(parser, keys=keys))


if __name__ == "__main__":
    run_script(main)
