"""Several checkpoints side by side: mean and deviation over seeds, and the difference of two configurations."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.metrics import BOUNDS, COVERAGE, combine_draws, interval
from evaluation.tables import write_csv
from utils import COMPUTATION_KEYS, UserError, check_writable, replace_file

if TYPE_CHECKING:
    from eval import Evaluated

# What is compared: the row of the table, the column, and its name
FIGURES = (("pooled", "AUC", "AUC, pooled"), ("pooled", "pAUC", "pAUC, pooled"), ("min", "AUC", "mAUC"),
           ("mean", "AUC", "AUC, mean over IDs"), ("mean", "pAUC", "pAUC, mean over IDs"))  # fmt: skip


def compare(results: Sequence["Evaluated"], folder: Path) -> None:
    """Write comparison.md and comparison.csv: one row each, mean ± standard deviation of the runs that differ in their
    seed only, and, for each pair of configurations, the paired bootstrap of the difference of their means.

    Raises `UserError` where the checkpoints have not scored the same clips, or none has a label.
    """
    if any(result.table is None for result in results):
        raise UserError("nothing to compare: the condition of the clips is not known")
    names = [[(clip.machine_type, clip.path.name) for clip in result.clips] for result in results]
    if any(other != names[0] for other in names[1:]):
        raise UserError("the checkpoints were trained on different machines, so their test clips are not the same")
    check_writable(folder / "comparison.md", "--output names another folder")
    groups = group(results)
    text = ["# Comparison\n", f"Averages over {len(results[0].table) - 1} machine types, in percent.\n"]
    text += [*rows_of_runs(results), "", *rows_of_groups(groups)]
    if len(groups) > 1:
        text += ["", *rows_of_differences(groups)]
    with replace_file(folder / "comparison.md") as temporary:
        temporary.write_text("\n".join(text) + "\n", encoding="utf-8")
    write_csv(folder / "comparison.csv", csv_rows(results))
    print("\n" + "\n".join(text[2:]))
    print(f"comparison.md and comparison.csv: {folder}")


def group(results: Sequence["Evaluated"]) -> dict[str, list["Evaluated"]]:
    """The results by configuration, all but seed and computation; a group is named by the keys that tell it apart."""
    settings = [describe(result) for result in results]
    differing = [name for name in settings[0] if any(other.get(name) != settings[0][name] for other in settings)]
    groups: dict[str, list[Evaluated]] = {}
    for result, setting in zip(results, settings, strict=True):
        name = ", ".join(f"{key} {setting[key]}" for key in differing) or f"mode {setting['mode']}"
        groups.setdefault(name, []).append(result)
    return groups


def describe(result: "Evaluated") -> dict[str, str]:
    """What makes a configuration; of a bare state dict the file is all that is known."""
    config = result.trained.state.get("config")
    if config is None:
        return {"mode": result.trained.config.mode, "file": str(result.trained.path)}
    return {name: str(value) for name, value in config.items() if name not in (*COMPUTATION_KEYS, "seed")}


def header(first: str) -> list[str]:
    return [f"| {first} | " + " | ".join(name for *_, name in FIGURES) + " |", "| --- |" + " ---: |" * len(FIGURES)]


def rows_of_runs(results: Sequence["Evaluated"]) -> list[str]:
    lines = header("checkpoint")
    for result in results:
        cells = [percent(result.table["average"][row][column]) for row, column, _ in FIGURES]
        lines.append(f"| {result.trained.path} | " + " | ".join(cells) + " |")
    return lines


def rows_of_groups(groups: dict[str, list["Evaluated"]]) -> list[str]:
    lines = header("configuration (mean ± standard deviation over seeds)")
    for name, runs in groups.items():
        cells = []
        for row, column, _ in FIGURES:
            values = [
                run.table["average"][row][column] for run in runs if run.table["average"][row][column] is not None
            ]
            spread = f" ± {100 * np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
            cells.append(f"{100 * np.mean(values):.2f}{spread}" if values else "-")
        lines.append(f"| {name} (n = {len(runs)}) | " + " | ".join(cells) + " |")
    return lines


def rows_of_differences(groups: dict[str, list["Evaluated"]]) -> list[str]:
    """Each pair of configurations: the difference of their means over seeds, with the interval of the same resampled
    clips. It speaks of the test clips; how the runs of a configuration differ, the deviations above say.
    """
    lines = header(f"difference ({COVERAGE:.0%} interval of the paired bootstrap over test clips)")
    for one, other in itertools.combinations(groups, 2):
        cells = []
        for row, column, _ in FIGURES:
            index = ("AUC", "pAUC").index(column)
            if any(("average", row) not in run.draws for run in (*groups[one], *groups[other])):
                cells.append("-")
                continue
            value = [np.mean([run.table["average"][row][column] for run in groups[name]]) for name in (one, other)]
            drawn = [
                combine_draws([run.draws["average", row] for run in groups[name]], np.mean)[index]
                for name in (one, other)
            ]
            low, high = interval(drawn[0] - drawn[1])
            cells.append(f"{100 * (value[0] - value[1]):+.2f} ({100 * low:+.2f} to {100 * high:+.2f})")
        lines.append(f"| {one} minus {other} | " + " | ".join(cells) + " |")
    return lines


def csv_rows(results: Sequence["Evaluated"]) -> list[list[Any]]:
    """Every row of every table, as fractions."""
    columns = ("AUC", "pAUC", *BOUNDS)
    rows: list[list[Any]] = [["checkpoint", "mode", "seed", "machine_type", "machine_id", *columns]]
    for result in results:
        seed = result.trained.state.get("config", {}).get("seed")
        for machine_type, of in result.table.items():
            for name, row in of.items():
                key = [str(result.trained.path), result.trained.config.mode, seed, machine_type, name]
                rows.append([*key, *(row.get(column) for column in columns)])
    return rows


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
