"""A trained model as one ONNX file: made with PyTorch's exporter and ONNX Runtime's tools, compared with eval.py."""

import contextlib
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxscript.optimizer
import pandas as pd
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from tqdm import tqdm

from checkpoint import TrainedModel, hash_weights
from corpus import MACHINE, first_classes, machines_of_classes
from dataloader import ClipSet, batches, load_clips
from evaluation.decisions import decide, explain_thresholds
from evaluation.graph import ScoringGraph
from evaluation.metrics import find_rule, measure
from evaluation.result import check_finite, find_thresholds
from evaluation.scoring import run_model, scores_against, training_config
from model.tastgram import N_SAMPLES, SAMPLE_RATE, SECONDS
from utils import UserError, versions

OPSET = 18  # the oldest that PyTorch's exporter writes
RELATIVE, ABSOLUTE = 1e-3, 1e-4  # by the larger of the two a score in fp32 may differ from that of eval.py
BATCH = 7  # clips; the last batch, and that of another size at calibration, show that N is dynamic
CALIBRATION_CLIPS = 128  # whose activations set the scales of int8
BACKBONE = "'network.mobilefacenet'"  # in the names of modules that the exporter notes for each node
BOTH = ("eval.py", "file")  # whose scores are compared
CPU = torch.device("cpu")

# ---- Making the model ----


def make_model(trained: TrainedModel, precision: str) -> onnx.ModelProto:
    """`samples` float32 `(N, T)` in [-1, 1) -> `scores` `(N, M)` and `embedding` `(N, E)`, float32, with the metadata
    of `describe`. Lower precisions apply to the MobileFaceNet only; the rest stays in float32 or float64.

    Raises `UserError` where int8 is asked for and there are no training clips.
    """
    clips = calibration_clips(trained) if precision == "int8" else None
    model = trace(ScoringGraph(trained))
    backbone = {node.name for node in model.graph.node if BACKBONE in scopes(node)}
    assert backbone, "the exporter notes the names of modules otherwise"
    if precision == "fp16":
        model = to_half(model, backbone)
    if clips:
        model = quantize(model, backbone, clips)
    clear_notes(model)
    onnx.helper.set_model_props(model, describe(trained, precision))
    model.producer_name, model.producer_version = "TASTgram-MFN", versions()["commit"]
    return model


def trace(graph: ScoringGraph) -> onnx.ModelProto:
    example = torch.zeros(2, N_SAMPLES)  # not 1: that would count as a fixed size
    with quiet():
        program = torch.onnx.export(
            graph.eval(),
            (example,),
            input_names=["samples"],
            output_names=["scores", "embedding"],
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("N")},),
            verbose=False,
            optimize=False,  # the exporter's optimiser replaces POWER_FLOOR, 2e-16, by 0
        )
        assert program is not None
        onnxscript.optimizer.inline(program.model)
        onnxscript.optimizer.fold_constants(program.model, onnx_shape_inference=True)
        onnxscript.optimizer.remove_unused_nodes(program.model)
    return program.model_proto


def scopes(node: onnx.NodeProto) -> str:
    return next((note.value for note in node.metadata_props if note.key == "pkg.torch.onnx.name_scopes"), "")


def clear_notes(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes for its developers: traces of this program, with the paths of this computer."""
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' warnings: they concern optional packages and steps that are not used here."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


# ---- Lower precision ----


def to_half(model: onnx.ModelProto, backbone: set[str]) -> onnx.ModelProto:
    """The model with these nodes, which make the embedding, in half precision.

    They are converted by themselves: in a model that is converted as a whole, values between nodes that stay in float32
    are rounded to half precision too, and the power of a quiet sound to 0.
    """
    graph = model.graph
    others = [node for node in graph.node if node.name not in backbone]
    outputs = {name for node in others for name in node.output}
    inputs = [name for node in graph.node if node.name in backbone for name in node.input if name in outputs]
    part = onnx.utils.Extractor(model).extract_model(list(dict.fromkeys(inputs)), ["embedding"])
    weights = {tensor.name for tensor in part.graph.initializer}
    other_weights = [tensor for tensor in graph.initializer if tensor.name not in weights]
    assert not weights & {name for node in others for name in node.input}, "shared weights would be in half precision"
    half = convert_float_to_float16(part, keep_io_types=True, op_block_list=[]).graph
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend([*others, *half.node])
    graph.initializer.extend([*other_weights, *half.initializer])
    OnnxModel(model).topological_sort()
    return model


class Calibration(CalibrationDataReader):
    """Clips one by one, as ONNX Runtime's quantisation asks for them."""

    def __init__(self, clips: ClipSet) -> None:
        self.inputs = read_inputs(clips, 1)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.inputs, None)


def calibration_clips(trained: TrainedModel) -> ClipSet:
    """Training clips from all over the list, so that each machine ID has its share."""
    config = training_config(trained)
    try:
        clips = load_clips(config, "train")
    except UserError as error:
        raise UserError(f"int8 is calibrated on training clips: {error}") from None
    chosen = np.unique(np.linspace(0, len(clips) - 1, CALIBRATION_CLIPS).astype(int))
    return ClipSet(clips.clips.iloc[chosen], config.num_workers, config.channel)


def quantize(model: onnx.ModelProto, backbone: set[str], clips: ClipSet) -> onnx.ModelProto:
    """The model with the convolutions among these nodes in int8, weights by channel."""
    convolutions = [node.name for node in model.graph.node if node.op_type == "Conv" and node.name in backbone]
    with tempfile.TemporaryDirectory() as folder, quiet():
        file = Path(folder) / "int8.onnx"
        quantize_static(
            model,
            file,
            Calibration(clips),
            quant_format=QuantFormat.QDQ,
            nodes_to_quantize=convolutions,
            op_types_to_quantize=["Conv"],
            per_channel=True,
        )
        return onnx.load(file)


# ---- What the file says of itself ----


def describe(trained: TrainedModel, precision: str) -> dict[str, str]:
    """The metadata, lists as JSON: machines in the order of the columns of `scores`, and the threshold of each (null
    where there is none); sample rate in Hz; the windows of `eval.py --score`, their length and the time from one to the
    next in seconds, and how their scores are combined.
    """
    config, machines = trained.config, list(first_classes(trained.config))
    thresholds = find_thresholds(trained)
    explain_thresholds(thresholds, config.machines, trained.path)
    values = thresholds["threshold"].reindex(pd.MultiIndex.from_tuples(machines))
    return {
        "machines": json.dumps(machines),
        "thresholds": json.dumps([None if np.isnan(value) else value for value in values.tolist()]),
        "sample_rate": str(SAMPLE_RATE),
        "window": str(SECONDS),
        "hop": str(config.model_copy(update={"window": "all"}).hop_of("test")),
        "over_windows": config.over_windows,
        "channel": str(config.channel),
        "mode": config.mode,
        "input": json.dumps(config.input),
        "scoring": config.scoring,
        "precision": precision,
        "version": versions()["commit"],
        "weights_sha256": hash_weights(trained.network),
    }


# ---- Comparing it with eval.py ----


@dataclass(frozen=True)
class Comparison:
    """The scores of clips against each machine ID `(n, M)`: those of eval.py, float64, and those of the file."""

    clips: ClipSet
    expected: np.ndarray
    scores: np.ndarray

    def check(self, clips_name: str, precision: str) -> str:
        """A line about the largest difference.

        Raises `UserError` where a difference is too large for fp32, or a score is not finite.
        """
        differences = np.abs(self.scores - self.expected)
        excess = differences - np.maximum(RELATIVE * np.abs(self.expected), ABSOLUTE)
        worst = np.unravel_index(excess.argmax(), excess.shape)  # a NaN counts as the highest
        is_wrong = not excess[worst] <= 0 if precision == "fp32" else not np.isfinite(self.scores[worst])
        if is_wrong:
            remedy = "check the packages (requirements-export.txt)" if precision == "fp32" else "use --precision fp32"
            raise UserError(
                f"no file is written: with {precision} a score of {clips_name} is {self.scores[worst]:.6g}, and "
                f"{self.expected[worst]:.6g} with eval.py; {remedy}"
            )
        return f"{len(self.clips)} {clips_name}: scores differ from those of eval.py by {differences.max():.1e} at most"

    def of_recordings(self, trained: TrainedModel) -> pd.DataFrame:
        """The recordings, with the scores of `eval.py` and `file` against their own ID, and its `threshold`."""
        config = trained.config
        columns = {machine: column for column, machine in enumerate(first_classes(config))}
        own = np.array([columns[machine] for machine in machines_of_classes(config)])[self.clips.labels]
        of_clips = np.stack([self.expected, self.scores], axis=2)[np.arange(len(own)), own]
        scores = self.clips.over_windows(of_clips, config.over_windows)
        table = self.clips.recordings.assign(**dict(zip(BOTH, scores.T, strict=True)))
        return table.join(find_thresholds(trained)["threshold"], on=MACHINE)


def compare(content: bytes, trained: TrainedModel, clips: ClipSet) -> Comparison:
    """Score clips with eval.py and a file of this content, on the CPU. Raises `UserError` where eval.py cannot."""
    machines = first_classes(trained.config)
    expected = scores_against(trained, run_model(trained, clips, CPU, "eval.py"), machines.values())
    check_finite(trained, pd.DataFrame(list(machines) * len(clips), columns=MACHINE).assign(score=expected.ravel()))
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    count = math.ceil(len(clips) / BATCH)
    inputs = tqdm(read_inputs(clips, BATCH), "ONNX Runtime", count, unit="batch", leave=False, disable=None)
    return Comparison(clips, expected, np.concatenate([session.run(["scores"], batch)[0] for batch in inputs]))


def read_inputs(clips: ClipSet, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    for samples, _ in clips.batches(batches(np.arange(len(clips)), batch_size), CPU):
        yield {"samples": samples.numpy().astype(np.float32) / 32768.0}


def pooled_aucs(recordings: pd.DataFrame) -> pd.DataFrame:
    """The AUC of each machine type and their average, for `eval.py` and `file`."""
    rule = find_rule(recordings)
    tables = {name: measure(recordings.assign(score=recordings[name]), rule, draws=1).table for name in BOTH}
    return pd.DataFrame({name: table["AUC"].xs("pooled", level=1) for name, table in tables.items()})


def count_other_decisions(recordings: pd.DataFrame) -> int:
    """How many recordings the two decide differently, of those that have a threshold."""
    one, other = (decide(recordings[name], recordings["threshold"]) for name in BOTH)
    return int((one != other).fillna(False).sum())


def synthetic_clips() -> ClipSet:
    """Eight clips: tones with noise from full scale to very quiet, and silence."""
    rng, time = np.random.default_rng(0), np.arange(N_SAMPLES) / SAMPLE_RATE
    rows = []
    for level in (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0):
        sound = np.sin(2 * np.pi * rng.uniform(50, 2000) * time) + rng.normal(0, 0.5, N_SAMPLES)
        rows.append(np.clip(level * sound, -1, 1) * 32767)
    clips = ClipSet(pd.DataFrame({"path": Path(), "label": [0] * len(rows)}), num_workers=1)
    clips.samples = torch.from_numpy(np.stack(rows).astype(np.int16))
    return clips
