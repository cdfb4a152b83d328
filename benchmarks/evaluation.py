"""What eval.py adds to the scoring of the full development test set, in time and memory.

    python benchmarks/evaluation.py               # 10,868 stand-in clips, in 3.5 GB of disk that it frees again
    python benchmarks/evaluation.py --clips 1000

Like the full-size form of data.py: empty files of the right names and sizes, a store of noise that is written directly,
and weights as they are initialised. Runs what `python eval.py --plots --report` runs, in one process after imports, and
says how long the scoring took, what else `eval.py` does without these options, what figures and report take, and how
much anonymous memory the process had in the end.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval as eval_script
from benchmarks.data import memory, write_stand_ins
from evaluation import scoring
from evaluation.metrics import bootstrap
from trainer import build_model
from utils import OneLineParser, load_config, parse_command_line, run_script, save_checkpoint, versions

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
    parser.add_argument(
        "--scratch", type=Path, help="folder on a disk with room (default: the system's for such files)"
    )
    config, options, _ = parse_command_line(parser)
    chosen = names()
    chosen = chosen if options.clips is None else chosen[:: max(1, len(chosen) // options.clips)]
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        scratch = Path(folder)
        places = {"data_root": scratch / "data", "store_path": scratch / "store", "save_path": scratch / "run.pth"}
        config = load_config(**{**vars(config), **{name: str(place) for name, place in places.items()}})
        write_stand_ins(config, chosen)
        held_out = {machine_type: {f"{i:02d}": [0.1 * x for x in range(1, 40)] for i in ids}
                    for machine_type, ids in config.machines.items()}  # fmt: skip
        state = {"model": build_model(config).state_dict(), "config": vars(config), "held_out": held_out}
        save_checkpoint(config.checkpoint, state)
        figures = measure(config)
    for name, value in figures.items():
        print(f"{name:45} {value:12,.2f}")
    print(json.dumps({"figures": figures, "machine": {"cores": os.cpu_count(), **versions()}}))


def measure(config) -> dict[str, float]:
    """Seconds of scoring, of the bootstrap, and of the whole; MB of anonymous memory."""
    spent = {}

    def timed(name: str, function):
        def call(*arguments, **keywords):
            start = time.perf_counter()
            result = function(*arguments, **keywords)
            spent[name] = time.perf_counter() - start
            return result

        return call

    eval_script.run_model = timed("scoring, s", scoring.run_model)
    eval_script.bootstrap = timed("bootstrap, s", bootstrap)
    eval_script.illustrate = timed("figures and report, s", eval_script.illustrate)
    start = time.perf_counter()
    options = SimpleNamespace(part="test", rebuild_store=False, plots=True, report=True, output=None)
    eval_script.run(config, [config.checkpoint], set(), options)
    whole = time.perf_counter() - start
    rest = whole - spent["scoring, s"] - spent["figures and report, s"]
    return {**spent, "besides scoring, figures and report, s": rest, "anonymous memory, MB": memory()["RssAnon"]}


if __name__ == "__main__":
    run_script(main)
