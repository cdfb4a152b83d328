"""Evaluated recordings without a network, for the tests of what is computed from scores."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from audio import Windows
from checkpoint import Checkpoint
from classes import Classes
from config import load_config
from detector import Detector
from evaluation.decisions import count_decisions
from evaluation.metrics import Metrics, find_rule, measure
from evaluation.result import Result
from evaluation.thresholds import decide, fit_thresholds
from inference import Model
from recordings import COLUMNS, MACHINE_COLUMNS, known_recordings

Machine = tuple[str, int]  # machine type and the number in the machine ID
NO_HELD_OUT = pd.DataFrame(columns=[*MACHINE_COLUMNS, "recording", "score", "origin"])


def make_recordings(counts: dict[Machine, tuple[int, int]]) -> pd.DataFrame:
    """Make a table of recordings with so many normal and so many anomalous ones of each machine."""
    rows = []
    for (machine_type, number), (normal, anomalous) in counts.items():
        for name, condition, count in (
            ("normal", "normal", normal),
            ("anomaly", "anomalous", anomalous),
        ):
            for index in range(count):
                path = Path(machine_type, "test", f"{name}_id_{number:02d}_{index:08d}.wav")
                part = f"id_{number:02d}"
                rows.append((path, machine_type, f"{number:02d}", "", "", condition, part))
    return pd.DataFrame(rows, columns=COLUMNS)


def make_sections(
    machine_type: str, sections: dict[str, dict[str, tuple[int, int]]]
) -> pd.DataFrame:
    """Make a table of recordings of 2022 and later, with so many normal and so many anomalous ones
    of each domain of each section.
    """
    rows = []
    for section, domains in sections.items():
        for domain, (normal, anomalous) in domains.items():
            for condition, count in (("normal", normal), ("anomalous", anomalous)):
                for index in range(count):
                    name = f"section_{section}_{domain}_test_{condition}_{index:04d}.wav"
                    path, part = Path(machine_type, "test", name), f"section_{section}_test"
                    rows.append((path, machine_type, section, "", domain, condition, part))
    return pd.DataFrame(rows, columns=COLUMNS)


def measured(
    recordings: pd.DataFrame, scores: np.ndarray | list[float], draws: int = 10, seed: int = 0
) -> Metrics:
    """Measure recordings with these scores, with few draws."""
    return measure(recordings.assign(score=scores), draws=draws, seed=seed)


def make_result(
    recordings: pd.DataFrame,
    scores: np.ndarray | list[float],
    held_out: pd.DataFrame = NO_HELD_OUT,
    kind: str = "published",
    draws: int = 200,
    **keys,
) -> Result:
    """Make the result of a model that gave these scores to recordings; `keys` overrides its
    configuration. `held_out` are the scores that thresholds come from.
    """
    machines: dict[str, list[str]] = {}
    for machine_type, group in recordings.groupby("machine_type", sort=False):
        machines[machine_type] = group["machine_id"].unique().tolist()
    config = load_config(machines=machines, **keys)
    classes = Classes.from_machines(machines)
    checkpoint = Checkpoint(Path("run.pth"), weights={}, config=config, classes=classes)
    thresholds = fit_thresholds(classes.machines, held_out, "quantile", 0.2)
    table = recordings.assign(score=scores, level=scores, worst=0.0)
    table = table.join(thresholds["threshold"], on=MACHINE_COLUMNS)
    table["decision"] = decide(table["level"], table["threshold"])
    known = known_recordings(table)
    return Result(
        detector=Detector((Model(None, config, classes, checkpoint),)),
        kind=kind,
        split="test",
        windows=Windows(),
        recordings=table,
        embedding=np.zeros((len(table), 1)),
        thresholds=thresholds,
        metrics=None if known.empty else measure(known, find_rule(known), draws=draws),
        baseline=None,
        decisions=count_decisions(table, thresholds),
        asked="asked: 20 %",
        about={
            "mode": config.mode,
            "scoring": kind,
            "input": config.input,
            "seed": config.seed,
            "epoch of the weights": 1,
        },
    )


def change_model(result: Result, **fields) -> Result:
    """Replace fields of the checkpoint of a result, and its classes where they are among them."""
    model = result.detector.first
    checkpoint = replace(model.checkpoint, **fields)
    model = replace(model, checkpoint=checkpoint, classes=checkpoint.classes)
    return replace(result, detector=Detector((model,)))


def make_held_out(counts: dict[Machine, int]) -> pd.DataFrame:
    """Draw scores of so many recordings of each machine."""
    rng = np.random.default_rng(0)
    rows = []
    for (machine_type, number), count in counts.items():
        for recording, score in enumerate(rng.gamma(20, size=count)):
            rows.append((machine_type, f"{number:02d}", recording, score, "held-out"))
    return pd.DataFrame(rows, columns=NO_HELD_OUT.columns)


def read_csv(path: Path) -> list[list[str]]:
    """Read the cells of a file, line by line."""
    with path.open(newline="") as file:
        return list(csv.reader(file))
