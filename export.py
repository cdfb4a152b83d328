"""Write a trained model as one ONNX file that takes samples and gives anomaly scores.

    # writes check_points/noisy_arcmix.onnx
    python export.py check_points/noisy_arcmix.pth
    # noisy_arcmix.nearest.onnx, with the bank
    python export.py check_points/noisy_arcmix.pth --scoring nearest
    # needs no PyTorch
    python examples/score_onnx.py check_points/noisy_arcmix.onnx clip.wav fan 00

Needs the packages of requirements-export.txt. Without a checkpoint it takes the one at save_path.
The file has

    samples     float32 (N, 160000), in      ten seconds at 16 kHz in [-1, 1), any number of clips
    scores      float32 (N, machines), out   against each machine ID, of the kind that scoring names
    embedding   float32 (N, 128), out

and metadata: machines (in the order of the columns) and thresholds (a clip with a higher score is
anomalous) as JSON, sample_rate, window and hop (seconds), over_windows, channel, mode, input,
scoring, version, weights_sha256. All of these are fixed in the file: for another threshold, hop or
kind of score, export again.

Before it is written, ONNX Runtime scores synthetic signals with it, from full scale to silence, on
the CPU. Where a score differs from that of eval.py by more than 0.1 percent and by more than 1e-4,
the script ends in an error and writes nothing.
"""

from argparse import Namespace
from pathlib import Path

from checkpoint import load_model
from config import SCORING_KEYS, Config, check_effect, choose_windows, parse_command_line
from evaluation.bank import with_bank
from utils import OneLineParser, UserError, check_writable, replace_file, run_script, use_device


def export(config: Config, options: Namespace) -> None:
    """Write the ONNX file of a checkpoint, if its scores agree with those of eval.py."""
    try:
        from evaluation.onnx_file import compare, make_file
    except ImportError as error:
        raise UserError(
            f"export.py needs other packages ({error}): pip install -r requirements-export.txt"
        ) from None
    path = options.checkpoint or config.checkpoint
    model = load_model(path, config)
    check_effect(config, choose_windows("all", config.hop, 0, "test"), [config.scoring])
    ending = ".onnx" if config.scoring == "published" else f".{config.scoring}.onnx"
    output = options.output or path.with_suffix(ending)
    check_output(output, path)
    model = with_bank(model, config, [config.scoring], use_device(config.device))
    content = make_file(model, config).SerializeToString()
    difference = compare(content, model, config)
    with replace_file(output) as temporary:
        temporary.write_bytes(content)
    print(
        f"{output}: {len(content) / 1e6:.1f} MB, {len(model.classes.machines)} machine IDs, "
        f"{config.scoring} scores, which differ from those of eval.py by {difference:.1e} at most"
    )


def check_output(output: Path, checkpoint: Path) -> None:
    """Raise `UserError` if the file cannot be written, or would replace the checkpoint."""
    if output.suffix != ".onnx" or output.is_dir() or output.resolve() == checkpoint.resolve():
        raise UserError(
            f"{output}: --output names a file that ends in .onnx and is not the checkpoint"
        )
    check_writable(output, "--output names another file")


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument(
        "checkpoint", nargs="?", type=Path, help="file of trained weights (default: save_path)"
    )
    parser.add_argument(
        "--output", metavar="FILE.onnx", type=Path, help="(default: beside the checkpoint)"
    )
    keys = [key for key in SCORING_KEYS if key != "window"]
    config, options = parse_command_line(parser, keys=keys)
    export(config, options)


if __name__ == "__main__":
    run_script(main)
