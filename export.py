"""Write a trained model as one ONNX file that takes samples and gives anomaly scores.

    python export.py check_points/noisy_arcmix.pth                        # writes check_points/noisy_arcmix.onnx
    python export.py check_points/noisy_arcmix.pth --scoring nearest      # the embeddings of the training clips in it
    python export.py check_points/noisy_arcmix.pth --precision int8       # check_points/noisy_arcmix.int8.onnx
    python examples/score_onnx.py check_points/noisy_arcmix.onnx clip.wav fan 00      # needs no PyTorch

Needs the packages of requirements-export.txt. The file has

    samples     float32 (N, 160000), in      ten seconds at 16 kHz in [-1, 1), any number of clips
    scores      float32 (N, machines), out   against each machine ID, of the kind that scoring names
    embedding   float32 (N, 128), out

and metadata: machines (in the order of the columns) and thresholds (a clip with a higher score is anomalous) as JSON,
sample_rate, window and hop (seconds), over_windows, channel, mode, input, scoring, precision, version, weights_sha256.

The file is compared with eval.py before it is written: on signals that are made up, and on the test clips, where they
are in data_root, with the AUC of both. Where a score is further off than 1e-3 of itself and 1e-4, the script ends in an
error and writes nothing. --precision fp16 and int8 have no such bound: there the AUC says what the smaller file costs.
They concern the backbone alone. int8 is calibrated on training clips, which must be in data_root.
"""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from checkpoint import load_model
from config import KEYS, Config, parse_command_line
from dataloader import ClipSet, load_clips
from evaluation.scoring import with_embeddings
from utils import OneLineParser, UserError, check_writable, notice, replace_file, run_script, use_device

if TYPE_CHECKING:
    from evaluation.onnx_file import Comparison

PRECISIONS = ("fp32", "fp16", "int8")


def export(config: Config, options: Namespace, given: dict[str, Any]) -> None:
    try:
        from evaluation.onnx_file import compare, made_up_clips, make_model
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install -r requirements-export.txt") from None
    output = options.output or name_output(options.checkpoint, options.precision)
    if output.suffix != ".onnx":
        raise UserError(f"--output {output}: the name of an ONNX file ends in .onnx")
    check_writable(output, "--output names another file")
    device = use_device(config.device)
    trained = with_embeddings(load_model(options.checkpoint, config, given), [config.scoring], device)
    model = make_model(trained, options.precision)
    comparison = compare(model, trained, made_up_clips(), device)
    judge(comparison, "made-up signals", options.precision, output)
    if clips := find_test_clips(trained.config):
        comparison = compare(model, trained, clips, device)
        judge(comparison, "test clips", options.precision, output)
        print_aucs(comparison.aucs(trained.config))
    content = model.SerializeToString()
    write(output, content)
    print(
        f"{output}: {len(content) / 1e6:.1f} MB, {options.precision}, opset {model.opset_import[0].version}, "
        f"IR version {model.ir_version}, {comparison.scores.shape[1]} machine IDs, {config.scoring} scores"
    )


def name_output(checkpoint: Path, precision: str) -> Path:
    return checkpoint.with_suffix(".onnx" if precision == "fp32" else f".{precision}.onnx")


def find_test_clips(config: Config) -> ClipSet | None:
    """Those in data_root, or a notice."""
    try:
        return load_clips(config, "test")
    except UserError as error:
        notice(f"there is no comparison on test clips: {error}")
        return None


def judge(comparison: "Comparison", clips: str, precision: str, output: Path) -> None:
    """Say how far the scores of the file are off; raise `UserError` where that is too far for fp32."""
    what = (
        f"{len(comparison.clips)} {clips}: scores differ from those of eval.py by {comparison.difference:.1e} at most"
    )
    if precision == "fp32" and not comparison.is_within_bound:
        raise UserError(f"{output} is not written: {what}; more than 1e-3 of a score and 1e-4 are not allowed")
    if not np.isfinite(comparison.scores).all():
        raise UserError(
            f"{output} is not written: {clips} have scores that are no finite numbers; use --precision fp32"
        )
    print(what)


def print_aucs(table: pd.DataFrame) -> None:
    """In percent, a line for each machine type and one for the average; nothing where no condition is known."""
    if table.empty:
        return
    print(f"{'AUC in percent':20} {'eval.py':>8} {'file':>8} {'cost':>8}")
    for name, (before, after) in (100 * table).iterrows():
        print(f"{name:20} {before:8.2f} {after:8.2f} {before - after:8.2f}")


def write(output: Path, content: bytes) -> None:
    try:
        with replace_file(output) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise UserError(f"{output} is not written ({error.strerror}); --output names another file") from None


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="file of trained weights")
    parser.add_argument("--output", metavar="FILE.onnx", type=Path, help="(default: beside the checkpoint)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the backbone (default: fp32)")
    keys = [key for key in KEYS if key != "precision"]  # that of training
    config, options, given = parse_command_line(parser, keys=keys)
    export(config, options, given)


if __name__ == "__main__":
    run_script(main)
