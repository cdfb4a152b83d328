"""What eval.py adds to the scoring of the full development test set, in time and memory.

    python benchmarks/evaluation.py               # 10,868 clips: hard links to one recording of noise
    python benchmarks/evaluation.py --clips 1000

Weights are as they are initialised. Runs what `python eval.py --plots --report` runs, in one process after imports, and
says how long the scoring took, what else `eval.py` does without these options, what figures and report take, and how
much anonymous memory the process had in the end. Of the scoring it says what the kinds of score take once the network
has run, nearest with the embeddings of 36,283 training clips.
"""

import json
import os
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval as eval_script
from benchmarks.data import anonymous_memory
from checkpoint import build_network, load_model, save_checkpoint
from config import SCORINGS, Config, load_config, parse_command_line
from corpus import machines_of_classes, number_classes
from evaluation import figures, report, result
from evaluation.scoring import anomaly_scores
from inference import Outputs, pack_embeddings
from model import EMBEDDING_SIZE
from model.tastgram import N_SAMPLES, SAMPLE_RATE
from utils import OneLineParser, run_script, versions

TRAINING_CLIPS = 36_283  # of the published set
# Clips of the development test set: normal ones of each ID, and anomalous ones by ID
TEST_SET = {
    "fan": (100, {0: 407, 2: 359, 4: 348, 6: 361}),
    "pump": (100, {0: 143, 2: 111, 4: 100, 6: 102}),
    "slider": (100, {0: 356, 2: 267, 4: 178, 6: 89}),
    "ToyCar": (350, {1: 264, 2: 265, 3: 265, 4: 265}),
    "ToyConveyor": (800, {1: 400, 2: 355, 3: 355}),
    "valve": (100, {0: 119, 2: 120, 4: 120, 6: 120}),
}


def names() -> list[str]:
    """The names of all test clips; of one ToyConveyor ID a normal clip is missing in the published set too."""
    result = []
    for machine_type, (normal, ids) in TEST_SET.items():
        for machine_id, anomalous in ids.items():
            counts = (("normal", normal - ((machine_type, machine_id) == ("ToyConveyor", 3))), ("anomaly", anomalous))
            for condition, count in counts:
                result += [f"{machine_type}/test/{condition}_id_{machine_id:02d}_{i:08d}.wav" for i in range(count)]
    return result


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--clips", type=int, help="only so many of the clips, spread over the set")
    config, options, _ = parse_command_line(parser)
    chosen = names()
    chosen = chosen if options.clips is None else chosen[:: max(1, len(chosen) // options.clips)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        samples = np.random.default_rng(0).integers(-300, 300, N_SAMPLES, dtype=np.int16)
        soundfile.write(root / "noise.wav", samples, SAMPLE_RATE)
        for name in chosen:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(root / "noise.wav", root / name)
        config = load_config(**config.model_dump() | {"data_root": folder, "save_path": str(root / "run.pth")})
        machines = [machine for machine in number_classes(config) for _ in range(40)]
        held_out = {"machine_type": [machine_type for machine_type, _ in machines],
                    "machine_id": [machine_id for _, machine_id in machines],
                    "score": [0.1 + index % 40 for index in range(len(machines))]}  # fmt: skip
        state = {"model": build_network(config).state_dict(), "config": config.model_dump(), "held_out": held_out}
        save_checkpoint(state, config.checkpoint)
        measured = measure(config)
    for name, value in measured.items():
        print(f"{name:45} {value:12,.2f}")
    print(json.dumps({"figures": measured, "machine": {"cores": os.cpu_count(), **versions()}}))


def measure(config: Config) -> dict[str, float]:
    """Seconds of scoring, of metrics with bootstrap, and of the whole; MB of anonymous memory."""
    spent: dict[str, float] = {}

    def timed(name: str, function):
        def call(*arguments, **keywords):
            start = time.perf_counter()
            value = function(*arguments, **keywords)
            spent[name] = spent.get(name, 0) + time.perf_counter() - start
            return value

        return call

    result.run_model = timed("scoring, s", result.run_model)
    result.measure = timed("metrics and bootstrap, s", result.measure)
    figures.draw_all = timed("figures and report, s", figures.draw_all)
    report.write_report = timed("figures and report, s", report.write_report)
    start = time.perf_counter()
    options = Namespace(split="test", plots=True, report=True, output=None, all_scores=False)
    eval_script.evaluate_all(config, [config.checkpoint], {}, options)
    whole = time.perf_counter() - start
    rest = whole - spent["scoring, s"] - spent["figures and report, s"]
    measured = {**spent, "besides scoring, figures and report, s": rest, "anonymous memory, MB": anonymous_memory()}
    return measured | seconds_of_kinds(config, len(names()))


def seconds_of_kinds(config: Config, n_clips: int) -> dict[str, float]:
    """Seconds for the scores of each kind from random outputs of the network."""
    n_classes, generator = len(machines_of_classes(config)), torch.Generator().manual_seed(0)
    trained = load_model(config.checkpoint, config, {})
    tables = [(torch.randn(n, EMBEDDING_SIZE, generator=generator), torch.arange(n) % n_classes)
              for n in (TRAINING_CLIPS, n_clips)]  # fmt: skip
    bank = pack_embeddings(*tables[0])
    trained = replace(trained, state=trained.state | {"embeddings": {"bank": bank}})
    with torch.no_grad():
        outputs, labels = Outputs(trained.network.arcface(tables[1][0]), tables[1][0]), tables[1][1]
    spent = {}
    for kind in SCORINGS:
        model = replace(trained, config=trained.config.model_copy(update={"scoring": kind}))
        start = time.perf_counter()
        anomaly_scores(model, outputs, labels)
        spent[f"score {kind} of {n_clips} clips, s"] = time.perf_counter() - start
    return spent


if __name__ == "__main__":
    run_script(main)
