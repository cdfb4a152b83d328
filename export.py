"""Export a trained model as one ONNX file that computes anomaly scores from samples.

    # writes check_points/noisy_arcmix.onnx
    python export.py check_points/noisy_arcmix.pth
    # writes noisy_arcmix.nearest.onnx, with the embeddings of the training clips
    python export.py check_points/noisy_arcmix.pth --scoring nearest
    # writes a_1.together.onnx: the three as one detector
    python export.py a_1.pth a_2.pth a_3.pth
    # one machine, without training: writes check_points/compressor.onnx
    python export.py --normal compressor/
    # needs no PyTorch
    python examples/score_onnx.py check_points/noisy_arcmix.onnx clip.wav fan 00

Requires the packages of requirements-export.txt. Without an argument, the checkpoint at save_path
is exported. With --normal FOLDER, the file compares with the normal recordings in FOLDER, as
score.py --normal does; its machine type is "machine" and its ID is the name of the folder, unless
they are given. The inputs and outputs of the file are

    samples     float32 (N, 160000), in      ten seconds at 16 kHz in [-1, 1), any number of clips
    scores      float32 (N, machines), out   against each machine ID, of the kind set by scoring
    embedding   float32 (N, 128), out        of several checkpoints side by side

and its metadata are machines (in the order of the columns), thresholds (a window with a higher
score is anomalous) and input, all three as JSON, and sample_rate, window and hop (seconds),
over_windows, alarm_windows, alarm_span, channel, mode, scoring, version and weights_sha256 (of
several checkpoints, mode and weights_sha256 may be lists with commas). All of them are fixed in the
file: for another threshold, hop or kind of score, export again. With --normal there is no network:
embedding, mode, input and weights_sha256 are empty.

Before the file is written, ONNX Runtime scores synthetic signals with it on the CPU, from full
scale to silence. If a score differs from that of eval.py by more than 0.1 percent and by more than
1e-4, the script ends with an error and writes nothing.
"""

from argparse import Namespace
from pathlib import Path

from command_line import OneLineParser
from config import SCORING_KEYS, Config, check_effect, parse_command_line
from detector import Detector, load_detector
from errors import UserError
from evaluation.without_network import CHECK_POINTS, check_keys, load_folder, name_machine
from utils import check_writable, replace_file, run_script, use_device


def export(config: Config, options: Namespace) -> None:
    """Write the ONNX file of checkpoints, if its scores agree with those of eval.py."""
    try:
        from evaluation.onnx_file import compare, make_file
    except ImportError as error:
        raise UserError(
            f"export.py needs more packages ({error}); run pip install -r requirements-export.txt"
        ) from None
    detector = load(config, options)
    check_effect(config, detector.windows(config, "test", "all"), [config.scoring])
    output = options.output or name_output(options, config)
    check_output(output, options.checkpoint)
    detector = detector.with_bank(config, [config.scoring], use_device(config.device))
    content = make_file(detector, config).SerializeToString()
    difference = compare(content, detector, config)
    with replace_file(output) as temporary:
        temporary.write_bytes(content)
    count = len(detector.classes.machines)
    print(
        f"{output}: {len(content) / 1e6:.1f} MB, {count} machine ID{'s' if count > 1 else ''}, "
        f"{config.scoring} scores, which differ from those of eval.py by {difference:.1e} at most"
    )


def load(config: Config, options: Namespace) -> Detector:
    """Load the checkpoints, or the recordings of --normal."""
    if not options.normal:
        return load_detector(options.checkpoint, config)
    machine = name_machine(options.normal, options.machine_type, options.machine_id)
    device = use_device(config.device)
    return Detector((load_folder(options.normal, machine, "all", config, device),))


def name_output(options: Namespace, config: Config) -> Path:
    """Return the file to write: beside the first checkpoint and named after it, or named after the
    folder of --normal.
    """
    if options.normal:
        return CHECK_POINTS / f"{options.normal.resolve().name}.onnx"
    ending = ".onnx" if config.scoring == "published" else f".{config.scoring}.onnx"
    first, *others = options.checkpoint
    return first.with_suffix(f".together{ending}" if others else ending)


def check_output(output: Path, checkpoints: list[Path]) -> None:
    """Raise `UserError` if the file cannot be written, or would replace a checkpoint."""
    is_checkpoint = output.resolve() in [path.resolve() for path in checkpoints]
    if output.suffix != ".onnx" or output.is_dir() or is_checkpoint:
        raise UserError(
            f"{output} is a folder, the checkpoint, or does not end in .onnx; choose another file "
            "with --output"
        )
    check_writable(output, "choose another file with --output")


def main() -> None:
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    text = "file of trained weights, or several to score together (default: save_path)"
    add("checkpoint", nargs="*", type=Path, help=text)
    add(
        "--output",
        metavar="FILE.onnx",
        type=Path,
        help="file to write (default: beside the checkpoint)",
    )
    add("--normal", metavar="FOLDER", type=Path, help="folder of normal recordings of one machine")
    add("--machine_type", help="machine type of --normal (default: machine)")
    add("--machine_id", help="machine ID of --normal (default: the name of the folder)")
    keys = [key for key in SCORING_KEYS if key != "window"]
    config, options = parse_command_line(parser, keys=keys)
    if options.normal:
        check_normal(config, options)
        config = config.model_copy(update={"scoring": "spectrum"})
    elif options.machine_type or options.machine_id:
        raise UserError("--machine_type and --machine_id have no effect without --normal")
    elif not options.checkpoint:
        options.checkpoint = [config.weights_path]
    export(config, options)


def check_normal(config: Config, options: Namespace) -> None:
    """Raise `UserError` for what has no effect beside --normal."""
    if options.checkpoint:
        raise UserError(f"{options.checkpoint[0]}: --normal needs no checkpoint; leave it out")
    check_keys(config)


if __name__ == "__main__":
    run_script(main)
