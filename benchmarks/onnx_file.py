"""What the file of export.py takes, and how near its scores are to those of eval.py, on the CPU.

    python benchmarks/onnx_file.py check_points/demo.pth --data_root datasets/synthetic       # after make demo
    python benchmarks/onnx_file.py RUN.pth --data_root FOLDER --machines '{slider: [0, 2, 4, 6]}'

First, for each kind of score and each precision, the size of the file; on all test clips the largest difference of two
scores, absolute and relative; how many ranks differ, counted over the clips and the machine IDs they are scored
against; the AUC of eval.py (mean of the machine types, pooled over IDs, from float64 scores) and by how much that of
the file is lower, in percent; and how many decisions differ.

Then clips a second of eval.py and of each file with the published score, with one thread and with two, clips one by one
and in batches of 16 (eval.py takes 16): medians of rounds in which all take their turn. The samples are in memory.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import TrainedModel, load_model
from config import SCORINGS, parse_command_line
from dataloader import ClipSet, load_clips
from evaluation.metrics import AVERAGE
from evaluation.onnx_file import CPU, compare, count_other_decisions, make_model, pooled_aucs, read_inputs
from evaluation.scoring import run_model, with_embeddings
from export import EXPORT_KEYS, PRECISIONS
from utils import OneLineParser, run_script, versions


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="file of trained weights")
    parser.add_argument("--clips", type=int, default=32, help="how many clips the times are of (default: 32)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    config, options, given = parse_command_line(parser, keys=EXPORT_KEYS)
    trained = with_embeddings(load_model(options.checkpoint, config, given), SCORINGS, CPU)
    clips = load_clips(trained.config, "test")
    files = {}
    print(f"{len(clips)} test clips")
    for kind in SCORINGS:
        own = dataclasses.replace(trained, config=trained.config.model_copy(update={"scoring": kind}))
        for precision in PRECISIONS:
            content = files[kind, precision] = make_model(own, precision).SerializeToString()
            said = agreement(content, own, clips)
            print(f"{kind:10} {precision:5} {len(content) / 1e6:.2f} MB; {said}", flush=True)
    chosen = {precision: files["published", precision] for precision in PRECISIONS}
    few = ClipSet(clips.clips.iloc[: options.clips], clips.num_workers, clips.channel)
    few.samples = few.read_all(CPU)
    measured = {}
    for threads in (1, 2):
        measured |= measure_speed(chosen, trained, few, threads, options.repeats)
    for name, value in measured.items():
        whole = measured[f"eval.py, {name.rpartition(', ')[2]}"]
        print(f"{name:40} {value:8.1f} clips/s, {value / whole:.2f} of eval.py")
    print(json.dumps({"figures": measured, "machine": {"cores": os.cpu_count(), **versions()}}))


def agreement(content: bytes, trained: TrainedModel, clips: ClipSet) -> str:
    comparison = compare(content, trained, clips)
    expected, scores = comparison.expected, comparison.scores
    differences = np.abs(scores - expected)
    other_ranks = int((scores.argsort(axis=0).argsort(axis=0) != expected.argsort(axis=0).argsort(axis=0)).sum())
    recordings = comparison.of_recordings(trained)
    before, after = 100 * pooled_aucs(recordings).loc[AVERAGE]
    return (
        f"differences {differences.max():.1e}, relative {(differences / expected).max():.1e}; {other_ranks} of "
        f"{scores.size} ranks; AUC {before:.2f}, cost {before - after:.4f}; {count_other_decisions(recordings)} of "
        f"{recordings['threshold'].count()} decisions"
    )


def measure_speed(
    files: dict[str, bytes], trained: TrainedModel, clips: ClipSet, threads: int, repeats: int
) -> dict[str, float]:
    """Clips a second, by what took them."""
    torch.set_num_threads(threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    ways: dict[str, Callable[[], object]] = {"eval.py": lambda: run_model(trained, clips, CPU)}
    for precision, content in files.items():
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        for size in (1, 16):
            batches = list(read_inputs(clips, size))
            ways[f"{precision}, batches of {size}"] = lambda session=session, batches=batches: [
                session.run(None, batch) for batch in batches
            ]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {f"{name}, threads: {threads}": len(clips) / statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    run_script(main)
