"""Write a trained model as one ONNX file that takes samples and gives anomaly scores.

    python export.py check_points/noisy_arcmix.pth                        # writes check_points/noisy_arcmix.onnx
    python export.py check_points/noisy_arcmix.pth --scoring nearest      # noisy_arcmix.nearest.onnx, with the bank
    python export.py check_points/noisy_arcmix.pth --precision int8       # noisy_arcmix.int8.onnx
    python examples/score_onnx.py check_points/noisy_arcmix.onnx clip.wav fan 00      # needs no PyTorch

Needs the packages of requirements-export.txt. Without a checkpoint it takes the one at save_path. The file has

    samples     float32 (N, 160000), in      ten seconds at 16 kHz in [-1, 1), any number of clips
    scores      float32 (N, machines), out   against each machine ID, of the kind that scoring names
    embedding   float32 (N, 128), out

and metadata: machines (in the order of the columns) and thresholds (a clip with a higher score is anomalous) as JSON,
sample_rate, window and hop (seconds), over_windows, channel, mode, input, scoring, precision, version, weights_sha256.
All of these are fixed in the file: for another threshold, hop or kind of score, export again.

The file is compared with eval.py before it is written, on the CPU: on synthetic signals and, where they can be read
from data_root, on all test clips, which takes minutes for thousands of them. The AUC of both is printed, from float64
scores (as with eval.py --score_dtype float64). Where a score differs from that of eval.py by more than 0.1 percent and
by more than 1e-4, the script ends in an error and writes nothing.

--precision fp16 and int8 apply to the MobileFaceNet only and have no such bound: the AUC, and the number of decisions
that change, say what the smaller file costs. int8 is calibrated on training clips, which must be in data_root.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pandas as pd

from checkpoint import load_model
from config import Config, parse_command_line
from corpus import first_classes
from dataloader import ClipSet, load_clips
from evaluation.scoring import with_embeddings
from evaluation.tables import percent
from utils import OneLineParser, UserError, check_writable, notice, replace_file, run_script, use_device

PRECISIONS = ("fp32", "fp16", "int8")
# What is left out belongs to training; or is fixed, as the precision of what the file is compared with
EXPORT_KEYS = (
    "data_root", "machines", "classes", "window", "hop", "channel", "mode", "input", "m", "s", "sub_centers",
    "save_path", "device", "num_workers", "scoring", "neighbours", "over_windows", "threshold", "threshold_percentile",
)  # fmt: skip


def export(config: Config, options: Namespace, given: dict[str, Any]) -> None:
    try:
        from evaluation.onnx_file import compare, count_other_decisions, make_model, pooled_aucs, synthetic_clips
    except ImportError as error:
        raise UserError(f"export.py needs other packages ({error}): pip install -r requirements-export.txt") from None
    path, precision = options.checkpoint or config.checkpoint, options.precision
    exact = config.model_copy(update={"eval_precision": "fp32"})  # which the file is compared with
    trained = load_model(path, exact, given)
    output = options.output or path.with_name(name_output(path.stem, config.scoring, precision))
    check_output(output, path)
    trained = with_embeddings(trained, [config.scoring], use_device(config.device))
    model = make_model(trained, precision)
    content = model.SerializeToString()
    print(compare(content, trained, synthetic_clips()).check("synthetic signals", precision))
    if clips := find_test_clips(trained.config):
        comparison = compare(content, trained, clips)
        print(comparison.check("test clips", precision))
        recordings = comparison.of_recordings(trained)
        print_cost(pooled_aucs(recordings), count_other_decisions(recordings), recordings["threshold"].count())
    write(output, content)
    print(
        f"{output}: {len(content) / 1e6:.1f} MB, {precision}, opset {model.opset_import[0].version}, IR version "
        f"{model.ir_version}, {len(first_classes(trained.config))} machine IDs, {config.scoring} scores"
    )


def name_output(run: str, scoring: str, precision: str) -> str:
    """The published score and fp32 are left out of the name."""
    return ".".join([run, *(part for part in (scoring, precision) if part not in ("published", "fp32")), "onnx"])


def check_output(output: Path, checkpoint: Path) -> None:
    if output.suffix != ".onnx" or output.is_dir() or output.resolve() == checkpoint.resolve():
        raise UserError(f"{output}: --output names a file that ends in .onnx and is not the checkpoint")
    check_writable(output, "--output names another file")


def find_test_clips(config: Config) -> ClipSet | None:
    """Those in data_root, or a notice."""
    try:
        return load_clips(config, "test")
    except UserError as error:
        notice(f"there is no comparison on test clips: {error}")
        return None


def print_cost(aucs: pd.DataFrame, other_decisions: int, decisions: int) -> None:
    """The AUC of each machine type, and how many decisions the file makes otherwise."""
    print(f"{'AUC in percent':20} {'eval.py':>8} {'file':>8} {'cost':>8}")
    for name, (before, after) in aucs.iterrows():
        print(f"{name:20} {percent(before):>8} {percent(after):>8} {percent(before - after):>8}")
    if decisions:
        print(f"{other_decisions} of {decisions} decisions differ from those of eval.py")


def write(output: Path, content: bytes) -> None:
    try:
        with replace_file(output) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise UserError(f"{output} is not written ({error.strerror}); --output names another file") from None


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", type=Path, help="file of trained weights (default: save_path)")
    parser.add_argument("--output", metavar="FILE.onnx", type=Path, help="(default: beside the checkpoint)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the MobileFaceNet (default: fp32)")
    config, options, given = parse_command_line(parser, keys=EXPORT_KEYS)
    export(config, options, given)


if __name__ == "__main__":
    run_script(main)
