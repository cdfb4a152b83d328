"""benchmarks/scores.py: the scores and weights that only this study has, and the whole study."""

import csv
import math

import pytest
import torch
from conftest import CLASSES, MACHINES

from benchmarks import scores
from checkpoint import Checkpoint
from evaluation.scores import StoredClips
from losses import MODES

HALF = 2**-11  # the rounding of an angle, in radians, in a bank in half precision


def in_plane(*degrees: float) -> torch.Tensor:
    """Return vectors of different lengths at these angles."""
    angles = torch.deg2rad(torch.tensor(degrees))
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    return vectors * torch.linspace(0.5, 3, len(degrees))[:, None]


def distance(degrees: float) -> float:
    return 1 - math.cos(math.radians(degrees))


@pytest.mark.parametrize(("penalty", "second"), [(0.0, distance(20)), (0.5, distance(30))])
def test_other_ids_of_the_type_are_farther_by_the_penalty(penalty, second):
    """The bank has clips of fan 00 at 0, 20, -20 and 90 degrees and of fan 02 at 50 degrees.

    The third class is of another machine type and has no clips.
    """
    embedding, labels = in_plane(0, 20, -20, 90, 50), torch.tensor([0, 0, 0, 0, 1])
    bank = StoredClips(embedding, torch.zeros(5, 2), labels)
    clips = in_plane(30, 50, 0)
    distances = scores.type_distances(bank, CLASSES, clips, CLASSES.machines, penalty)
    assert distances[0] == pytest.approx((distance(10) + second) / 2, abs=HALF)
    expected = (distance(0) + distance(30) + penalty) / 2
    assert distances[1] == pytest.approx(expected, abs=HALF)
    assert distances[2] == math.inf, "no clip of its type"


def test_the_mean_of_weights_keeps_their_types():
    states = [
        {"weight": torch.tensor([1.0, 2.0]), "count": torch.tensor(3)},
        {"weight": torch.tensor([2.0, 3.0]), "count": torch.tensor(5)},
    ]
    mean = scores.average_weights(states)
    assert mean["weight"].tolist() == [1.5, 2.5]
    assert (mean["count"].item(), mean["count"].dtype) == (4, torch.int64)


@pytest.mark.slow
def test_the_study(tmp_path, data_root, call, fails):
    """Of three epochs, the state after the last one is stored; a surplus state is an error."""
    options = [
        "--data_root", data_root, "--machines", MACHINES, "--epoch", 3, "--batch_size", 4,
        "--device", "cpu", "--tensorboard", "false", "--seeds", 1, "--output", tmp_path,
    ]  # fmt: skip
    status, output, errors = call(scores.main, *options)
    assert status == 0, errors
    assert output.count("\n| best, published | ") == 1
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(MODES) * 3 * 9
    assert {row["weights"] for row in rows} == {"best", "last", "mean"}
    aucs = {"last": [], "mean": []}
    for row in rows:
        if row["run"] == "arcmix_1" and row["weights"] in aucs:
            aucs[row["weights"]].append(row["fan mean"])
    assert aucs["last"] == aucs["mean"], "the mean over a single state"
    stored = tmp_path / "arcmix_1" / "states" / "003.pth"
    assert Checkpoint.load(stored).epoch == 3
    stored.unlink()
    assert call(scores.main, *options)[0] == 0, "it is still the last state"
    assert stored.exists()
    stored.with_name("002.pth").write_bytes(stored.read_bytes())
    fails(scores.main, *options, match="2 states, not the 1 of the last third; remove the run")
    fails(scores.main, *options, "--mode", "arcmix", match="mode: all modes are trained")
