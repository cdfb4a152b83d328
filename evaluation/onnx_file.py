"""A detector as one ONNX file: made with PyTorch's exporter, compared with eval.py in ONNX
Runtime.
"""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxscript.optimizer
import pandas as pd
import torch
from onnxscript import opset18 as op

from audio import N_SAMPLES, SAMPLE_RATE, SECONDS
from config import Config
from dataloader import ClipSet
from detector import Detector
from errors import UserError
from evaluation.graph import ScoringGraph
from evaluation.scores import check_scores
from evaluation.thresholds import explain_thresholds, find_thresholds, threshold_of
from utils import versions

OPSET = 18  # the oldest that PyTorch's exporter writes
RELATIVE, ABSOLUTE = 1e-3, 1e-4  # by the larger of the two a score may differ from that of eval.py
LEVELS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0)  # of the signals compared; 1 is full scale
CPU = torch.device("cpu")

# ---- Making the file ----


def make_file(detector: Detector, config: Config) -> onnx.ModelProto:
    """Make an ONNX model: `samples` float32 `(N, T)` in [-1, 1) -> `scores` `(N, M)` and
    `embedding` `(N, E)`, float32, with the metadata of `describe`.
    """
    proto = export(ScoringGraph(detector, config))
    clear_notes(proto)
    onnx.helper.set_model_props(proto, describe(detector, config))
    proto.producer_name, proto.producer_version = "TASTgram-MFN", versions()["commit"]
    return proto


def export(graph: ScoringGraph) -> onnx.ModelProto:
    """Translate a graph into ONNX."""
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
            custom_translation_table={torch.ops.aten.acos.default: translate_acos},
            verbose=False,
            optimize=False,  # the exporter's optimiser replaces POWER_FLOOR, 2e-16, by 0
        )
        assert program is not None
        onnxscript.optimizer.inline(program.model)
        onnxscript.optimizer.fold_constants(program.model, onnx_shape_inference=True)
        onnxscript.optimizer.remove_unused_nodes(program.model)
    return program.model_proto


def translate_acos(cosine):  # type: ignore[no-untyped-def]  # an ONNX value, whose type is private
    """Translate the arccosine of a cosine in float64: as twice the arcsine of the sine of half the
    angle. ONNX Runtime has inverse trigonometric functions for float32 only, in which a small angle
    follows accurately from its sine, but not from its cosine.
    """
    one, two = (
        op.Constant(value=onnx.helper.make_tensor("", onnx.TensorProto.DOUBLE, [], [x]))
        for x in (1.0, 2.0)
    )
    half_sine = op.Sqrt(op.Div(op.Sub(one, cosine), two))
    half_angle = op.Asin(op.Cast(half_sine, to=onnx.TensorProto.FLOAT))
    return op.Mul(two, op.Cast(half_angle, to=onnx.TensorProto.DOUBLE))


def clear_notes(proto: onnx.ModelProto) -> None:
    """Remove the notes of the exporter for its developers: traces of this program, with paths."""
    graph = proto.graph
    nodes = (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for part in (graph, *nodes):
        del part.metadata_props[:]
        part.doc_string = ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings of the libraries about optional packages and steps that are not used."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


# ---- The metadata ----


def describe(detector: Detector, config: Config) -> dict[str, str]:
    """Return the metadata. Lists are JSON: the machines in the order of the columns of `scores`,
    and the threshold of each (null where there is none). The sample rate is in Hz; `window` and
    `hop` are the length of a window of score.py and the time from one to the next, in seconds;
    `alarm_windows` and `alarm_span` are those of the configuration.
    """
    machines = detector.classes.machines
    scorer = detector.scorer(config.scoring, config.neighbours)
    thresholds = find_thresholds(detector, scorer, config)
    explain_thresholds(thresholds, config, detector.path)
    windows = detector.windows(config, "test", "all")
    return {
        "machines": json.dumps(machines),
        "thresholds": json.dumps([threshold_of(thresholds, machine) for machine in machines]),
        "sample_rate": str(SAMPLE_RATE),
        "window": str(SECONDS),
        "hop": str(windows.hop),
        "over_windows": config.over_windows,
        "alarm_windows": str(config.alarm_windows),
        "alarm_span": str(config.alarm_span),
        "channel": str(windows.channel),
        "mode": detector.mode,
        "input": json.dumps(detector.channels),
        "scoring": config.scoring,
        "version": versions()["commit"],
        "weights_sha256": ", ".join(x.weights_sha256 for x in detector.members if x.network),
    }


# ---- The comparison with eval.py ----


def compare(content: bytes, detector: Detector, config: Config) -> float:
    """Return the largest difference between the scores of an ONNX file with this content and those
    of eval.py, on the CPU: against every machine, for signals from full scale to silence.

    Raises:
        UserError: If a difference is larger than RELATIVE and ABSOLUTE allow, or a score is not
            finite.
    """
    clips = synthetic_clips()
    assert clips.samples is not None
    machines = detector.classes.machines
    outputs = detector.run(clips, config, CPU, "eval.py", precision="fp32")
    scorer = detector.scorer(config.scoring, config.neighbours)
    expected = scorer.score_against_machines(outputs, machines).numpy()
    check_scores(expected.ravel(), machines * len(clips), config.scoring, detector.name)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    samples = clips.samples.numpy().astype(np.float32) / 32768.0
    parts = (samples[:1], samples[1:])  # any number of clips is possible
    scores = np.concatenate([session.run(["scores"], {"samples": part})[0] for part in parts])
    return largest_difference(scores, expected)


def largest_difference(scores: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference. Raises `UserError` if one is larger than allowed."""
    differences = np.abs(scores - expected)
    excess = differences - np.maximum(RELATIVE * np.abs(expected), ABSOLUTE)
    worst = np.unravel_index(excess.argmax(), excess.shape)  # a NaN counts as the highest
    if not excess[worst] <= 0:
        raise UserError(
            f"the ONNX file was not written: it gives a score of {scores[worst]:.6g} where eval.py "
            f"gives {expected[worst]:.6g}; check the packages (requirements-export.txt)"
        )
    return float(differences.max())


def synthetic_clips() -> ClipSet:
    """Make a tone with noise at each of LEVELS."""
    rng, time = np.random.default_rng(0), np.arange(N_SAMPLES) / SAMPLE_RATE
    rows = []
    for level in LEVELS:
        sound = np.sin(2 * np.pi * rng.uniform(50, 2000) * time) + rng.normal(0, 0.5, N_SAMPLES)
        rows.append(np.clip(level * sound, -1, 1) * 32767)
    clips = ClipSet(pd.DataFrame({"path": [Path()] * len(rows)}), num_workers=1)
    clips.samples = torch.from_numpy(np.stack(rows).astype(np.int16))
    return clips
