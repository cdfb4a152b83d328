"""A trained model as one ONNX file: made with PyTorch's exporter, compared with eval.py in ONNX
Runtime.
"""

import contextlib
import hashlib
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

from checkpoint import TrainedModel
from corpus import MACHINE, first_classes
from dataloader import ClipSet
from evaluation.decisions import explain_thresholds
from evaluation.graph import ScoringGraph
from evaluation.result import check_finite, find_thresholds
from evaluation.scoring import run_model, scores_against
from model import TASTgramMFN
from model.tastgram import N_SAMPLES, SAMPLE_RATE, SECONDS
from utils import UserError, versions

OPSET = 18  # the oldest that PyTorch's exporter writes
RELATIVE, ABSOLUTE = 1e-3, 1e-4  # by the larger of the two a score may differ from that of eval.py
LEVELS = (
    1.0,
    0.3,
    0.1,
    0.03,
    0.01,
    0.003,
    0.001,
    0.0,
)  # of the signals that are compared; 1 is full scale
CPU = torch.device("cpu")

# ---- Making the model ----


def make_model(trained: TrainedModel) -> onnx.ModelProto:
    """`samples` float32 `(N, T)` in [-1, 1) -> `scores` `(N, M)` and `embedding` `(N, E)`, float32,
    with the metadata of `describe`.
    """
    model = trace(ScoringGraph(trained))
    clear_notes(model)
    onnx.helper.set_model_props(model, describe(trained))
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


def clear_notes(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes for its developers: traces of this program, with the paths of
    this computer.
    """
    graph = model.graph
    for part in (
        graph,
        *graph.node,
        *graph.input,
        *graph.output,
        *graph.value_info,
        *graph.initializer,
    ):
        del part.metadata_props[:]
        part.doc_string = ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' warnings: they concern optional packages and steps that are not used
    here.
    """
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


# ---- What the file says of itself ----


def describe(trained: TrainedModel) -> dict[str, str]:
    """The metadata, lists as JSON: machines in the order of the columns of `scores`, and the
    threshold of each (null where there is none); sample rate in Hz; the windows of `score.py`,
    their length and the time from one to the next in seconds, and how their scores are combined.
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
        "version": versions()["commit"],
        "weights_sha256": hash_weights(trained.network),
    }


def hash_weights(network: TASTgramMFN) -> str:
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- Comparing it with eval.py ----


def compare(content: bytes, trained: TrainedModel) -> float:
    """The largest difference between the scores of an ONNX file with this content and those of
    eval.py, on the CPU: against every machine ID, for signals from full scale to silence.

    Raises `UserError` where a difference is larger than RELATIVE and ABSOLUTE allow, or a score is
    not finite.
    """
    clips = synthetic_clips()
    assert clips.samples is not None
    samples = clips.samples.numpy().astype(np.float32) / 32768.0
    machines = first_classes(trained.config)
    expected = scores_against(trained, run_model(trained, clips, CPU, "eval.py"), machines.values())
    check_finite(
        trained,
        pd.DataFrame(list(machines) * len(clips), columns=MACHINE).assign(score=expected.ravel()),
    )
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    parts = (samples[:1], samples[1:])  # any number of clips is possible
    scores = np.concatenate([session.run(["scores"], {"samples": part})[0] for part in parts])
    return largest_difference(scores, expected)


def largest_difference(scores: np.ndarray, expected: np.ndarray) -> float:
    differences = np.abs(scores - expected)
    excess = differences - np.maximum(RELATIVE * np.abs(expected), ABSOLUTE)
    worst = np.unravel_index(excess.argmax(), excess.shape)  # a NaN counts as the highest
    if not excess[worst] <= 0:
        raise UserError(
            f"no file is written: a score is {scores[worst]:.6g} with it, and {expected[worst]:.6g} with eval.py; "
            f"check the packages (requirements-export.txt)"
        )
    return float(differences.max())


def synthetic_clips() -> ClipSet:
    """A tone with noise at each of LEVELS."""
    rng, time = np.random.default_rng(0), np.arange(N_SAMPLES) / SAMPLE_RATE
    rows = []
    for level in LEVELS:
        sound = np.sin(2 * np.pi * rng.uniform(50, 2000) * time) + rng.normal(0, 0.5, N_SAMPLES)
        rows.append(np.clip(level * sound, -1, 1) * 32767)
    clips = ClipSet(pd.DataFrame({"path": Path(), "label": [0] * len(rows)}), num_workers=1)
    clips.samples = torch.from_numpy(np.stack(rows).astype(np.int16))
    return clips
