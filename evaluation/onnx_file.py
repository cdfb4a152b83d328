"""A trained model as one ONNX file: made with PyTorch's exporter and ONNX Runtime's tools, compared with eval.py."""

import contextlib
import json
import logging
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
from tqdm import tqdm

from checkpoint import TrainedModel, hash_weights
from config import Config
from corpus import MACHINE, first_classes, known_clips, machines_of_classes
from dataloader import ClipSet, batches, load_clips
from evaluation.decisions import explain_thresholds
from evaluation.graph import ScoringGraph
from evaluation.metrics import find_rule, measure
from evaluation.result import check_finite, find_thresholds
from evaluation.scoring import run_model, scores_against, training_config
from model.tastgram import N_SAMPLES, SAMPLE_RATE, SECONDS
from utils import UserError, versions

OPSET = 18  # the one that PyTorch's exporter writes, and the oldest
RELATIVE, ABSOLUTE = 1e-3, 1e-4  # by the larger of the two a score in fp32 may differ from that of eval.py
CALIBRATION_CLIPS = 128  # whose activations set the scales of int8
BACKBONE = "'network.mobilefacenet'"  # in the names of modules that the exporter notes for each node
CPU = torch.device("cpu")

# ---- Making the model ----


def make_model(trained: TrainedModel, precision: str) -> onnx.ModelProto:
    """`samples` float32 `(N, T)` in [-1, 1) -> `scores` `(N, M)` and `embedding` `(N, E)`, float32, with the metadata
    of `describe`. Lower precisions concern the backbone: everything before and after it is in float32, and in float64.

    Raises `UserError` where int8 is asked for and there are no training clips.
    """
    model = trace(ScoringGraph(trained, has_prelu=precision == "int8"))
    backbone = {node.name for node in model.graph.node if BACKBONE in scopes(node)}
    if precision == "fp16":
        others = [node.name for node in model.graph.node if node.name not in backbone]
        model = convert_float_to_float16(model, keep_io_types=True, op_block_list=[], node_block_list=others)
    elif precision == "int8":
        model = quantize(model, backbone, calibration_clips(trained))
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
            optimize=False,  # it takes the floor of the log-mel, 2e-16, for 0
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
    """Keep warnings of the libraries to themselves: they are about libraries and steps that are not needed."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


# ---- int8 ----


class Calibration(CalibrationDataReader):
    """Clips one by one, as ONNX Runtime's quantisation asks for them."""

    def __init__(self, clips: ClipSet) -> None:
        self.inputs = read_inputs(clips, 1)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.inputs, None)


def calibration_clips(trained: TrainedModel) -> ClipSet:
    """Training clips from all over the list, so that each machine has its share."""
    config = training_config(trained)
    try:
        clips = load_clips(config, "train")
    except UserError as error:
        raise UserError(f"int8 is calibrated on training clips, and there are none: {error}") from None
    chosen = np.unique(np.linspace(0, len(clips) - 1, CALIBRATION_CLIPS).astype(int))
    return ClipSet(clips.clips.iloc[chosen], config.num_workers, config.channel)


def quantize(model: onnx.ModelProto, nodes: set[str], clips: ClipSet) -> onnx.ModelProto:
    """The model with the convolutions among these nodes in int8, weights by channel."""
    convolutions = [node.name for node in model.graph.node if node.op_type == "Conv" and node.name in nodes]
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
        "hop": f"{config.model_copy(update={'window': 'all'}).hop_of('test'):g}",
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

    @property
    def difference(self) -> float:
        """The largest difference of two scores."""
        return float(np.abs(self.scores - self.expected).max())

    @property
    def is_within_bound(self) -> bool:
        allowed = np.maximum(RELATIVE * np.abs(self.expected), ABSOLUTE)
        return bool((np.abs(self.scores - self.expected) <= allowed).all())  # not so where one is NaN

    def aucs(self, config: Config) -> pd.DataFrame:
        """The pooled AUC of each machine type and their average, with each of the two; empty where no condition is
        known.
        """
        columns = {machine: column for column, machine in enumerate(first_classes(config))}
        own = np.array([columns[machine] for machine in machines_of_classes(config)])[self.clips.labels]
        table = {}
        for name, scores in (("eval.py", self.expected), ("file", self.scores)):
            of_clips = np.take_along_axis(scores.astype(float), own[:, None], axis=1)[:, 0]
            of_recordings = self.clips.over_windows(of_clips, config.over_windows)
            known = known_clips(self.clips.recordings.assign(score=of_recordings))
            if len(known):
                table[name] = measure(known, find_rule(known)).table["AUC"].xs("pooled", level=1)
        return pd.DataFrame(table)


def compare(model: onnx.ModelProto, trained: TrainedModel, clips: ClipSet, device: torch.device) -> Comparison:
    """Score clips with both; the device is that of eval.py."""
    machines = first_classes(trained.config)
    expected = scores_against(trained, run_model(trained, clips, device, "eval.py"), machines.values())
    check_finite(trained, pd.DataFrame(list(machines), columns=MACHINE).assign(score=expected.sum(axis=0)))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = tqdm(read_inputs(clips, 7), "ONNX Runtime", leave=False, disable=None)
    return Comparison(clips, expected, np.concatenate([session.run(["scores"], batch)[0] for batch in inputs]))


def read_inputs(clips: ClipSet, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    for samples, _ in clips.batches(batches(np.arange(len(clips)), batch_size), CPU):
        yield {"samples": samples.numpy().astype(np.float32) / 32768.0}


def made_up_clips() -> ClipSet:
    """Eight clips to compare on where there are no recordings: tones with noise from full scale to very quiet, and
    silence.
    """
    rng, time = np.random.default_rng(0), np.arange(N_SAMPLES) / SAMPLE_RATE
    rows = []
    for level in (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0):
        sound = np.sin(2 * np.pi * rng.uniform(50, 2000) * time) + rng.normal(0, 0.5, N_SAMPLES)
        rows.append(np.clip(level * sound, -1, 1) * 32767)
    clips = ClipSet(pd.DataFrame({"path": Path(), "label": [0] * len(rows)}), num_workers=1)
    clips.samples = torch.from_numpy(np.stack(rows).astype(np.int16))
    return clips
