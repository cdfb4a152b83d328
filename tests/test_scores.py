"""benchmarks/scores.py: the scores and weights that only the study has, and the study as a user
runs it.
"""

import csv
import math
from pathlib import Path

import pytest
import torch
from conftest import MACHINES
from test_evaluation import HALF, distance, in_plane, planar_model

from benchmarks import scores
from checkpoint import load_checkpoint
from losses import MODES


def test_other_ids_of_the_type_are_farther_by_the_penalty():
    """fan 00 has clips at 0, 20, -20 and 90 degrees, fan 02 one at 50; the third class is another
    type.
    """
    model, labels = planar_model("nearest", in_plane(0, 90, 180)), torch.tensor([0, 1, 2])
    for penalty, second in ((0.0, distance(20)), (0.5, distance(30))):
        found = scores.type_distances(model, in_plane(30, 50, 0), labels, penalty)
        assert found[0] == pytest.approx((distance(10) + second) / 2, abs=HALF)
        assert found[1] == pytest.approx((distance(0) + distance(30) + penalty) / 2, abs=HALF)
        assert found[2] == math.inf, "no clip of its type"


def test_the_mean_of_states_keeps_their_types():
    states = [
        {"weight": torch.tensor([1.0, 2.0]), "count": torch.tensor(count)} for count in (3, 5)
    ]
    states[1]["weight"] += 1
    mean = scores.mean_of(states)
    assert mean["weight"].tolist() == [1.5, 2.5]
    assert (mean["count"].item(), mean["count"].dtype) == (4, torch.int64)


@pytest.mark.slow
def test_the_study(tmp_path, data_root, call, fails):
    """Three epochs, of which the last one is kept; without a state that was kept it ends in an
    error.
    """
    options = [
        "--data_root",
        data_root,
        "--machines",
        MACHINES,
        "--epoch",
        3,
        "--batch_size",
        4,
        "--device",
        "cpu",
    ]
    options += ["--tensorboard", "false", "--seeds", 1, "--output", tmp_path]
    status, output, errors = call(scores.main, *options)
    assert status == 0, errors
    assert output.count("\n| best, published | ") == 1
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(MODES) * 3 * 9
    assert {row["weights"] for row in rows} == {"best", "last", "mean"}
    last, mean = (
        [row for row in rows if (row["run"], row["weights"]) == ("arcmix_1", weights)]
        for weights in ("last", "mean")
    )
    assert [row["fan mean"] for row in last] == [row["fan mean"] for row in mean], (
        "the mean is of a single state"
    )
    kept = tmp_path / "arcmix_1" / "states" / "003.pth"
    assert load_checkpoint(kept)["epoch"] == 3
    kept.unlink()
    assert call(scores.main, *options)[0] == 0, "it is still the last state"
    assert kept.exists()
    Path(tmp_path / "arcmix_1" / "states" / "002.pth").write_bytes(kept.read_bytes())
    fails(scores.main, *options, match="2 states, not the 1 of the last third; remove the run")
    fails(scores.main, *options, "--mode", "arcmix", match="mode: all are trained")
