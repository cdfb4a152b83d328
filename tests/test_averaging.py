"""The moving average of the weights, alone and in a training."""

import pytest
import torch
from conftest import arguments, clips_in_memory, train_in
from torch import nn

import train
from audio import N_SAMPLES
from averaging import WEIGHT_DECAY, MovingAverage, check_decay, real_values
from checkpoint import Checkpoint
from dataloader import load_clips
from errors import UserError
from inference import load_model, run_model
from trainer import Trainer


def test_it_is_the_published_recursion():
    """The average of the weights before each decay, from the initial weights on; counts stay."""
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = MovingAverage(network, decay=0.9)
    expected = [value.clone() for value in real_values(network)]
    for _ in range(4):
        with torch.no_grad():
            for value in network.state_dict().values():
                value += 1
        before = [value.clone() for value in real_values(network)]
        expected = [0.9 * mean + 0.1 * value for mean, value in zip(expected, before, strict=True)]
        average.update()
        for value, former in zip(real_values(network), before, strict=True):
            torch.testing.assert_close(value, former * (1 - 2e-6))
    assert WEIGHT_DECAY == 2e-6
    for mean, value in zip(real_values(average.network), expected, strict=True):
        torch.testing.assert_close(mean, value)
    assert average.network[1].num_batches_tracked == 0
    assert not torch.equal(average.network[0].weight, network[0].weight)


@pytest.mark.parametrize(("decay", "n_steps"), [(0.9999, 170_000), (0.99, 510), (0.92, 170)])
def test_a_decay_that_fits(decay, n_steps):
    check_decay(decay, n_steps)


def test_a_training_that_is_too_short():
    message = (
        r"weight_average: 0.9999 averages over about 10000 steps, and the training has 510: its "
        r"result would contain 95% of the initial weights; use at most 0.991, or 0"
    )
    with pytest.raises(UserError, match=message):
        check_decay(0.9999, 510)
    check_decay(0.991, 510)
    with pytest.raises(UserError):
        check_decay(0.9911, 510)


def test_too_short_a_run_is_refused_before_anything_is_removed(trained_copy, data_root, fails):
    options = arguments(trained_copy, data_root, weight_average=0.9)
    fails(train.main, *options, "--overwrite", match="weight_average: 0.9 averages over about 10")
    assert (trained_copy / "run.pth").exists()


def test_averaged_weights_are_validated_saved_and_scored(tmp_path, data_root):
    keys = {"epoch": 2, "input": "[sgram]", "mode": "os_scl", "lr": 1e-3, "weight_average": 0.1}
    train_in(tmp_path, data_root, **keys)
    best, last = (Checkpoint.load(tmp_path / name) for name in ("run.pth", "run.last.pth"))
    centres = "arcface.weight"
    assert not torch.equal(last.weights[centres], last.trained_weights[centres])
    model = load_model(tmp_path / "run.pth", best.config)
    assert torch.equal(model.network.state_dict()[centres], best.weights[centres])
    clips = load_clips(best.config, best.classes, "train", best.config.windows("train"))
    _, valid_clips = clips.split(best.config.split_ratio, best.config.seed)
    outputs = run_model(model, valid_clips, best.config, torch.device("cpu"))
    scores = model.scorer("published").score_clips(outputs, valid_clips.machines)
    torch.testing.assert_close(scores, best.held_out.scores, rtol=1e-4, atol=1e-5)
    embedding = torch.nn.functional.normalize(outputs.embedding)
    assert (best.held_out.embedding.float() - embedding).abs().max() < 1e-3, "also in the bank"


def test_the_average_starts_from_the_weights_of_init_from(trained):
    given = Checkpoint.load(trained / "run.pth")
    config = given.config.model_copy(update={"weight_average": 0.01, "seed": 1})
    clips = clips_in_memory(torch.zeros(8, N_SAMPLES, dtype=torch.int16), torch.arange(8) % 3)
    trainer = Trainer(config, given.classes, torch.device("cpu"), clips, clips)
    trainer.start_from(given)
    averaged, name = trainer.scored_network.state_dict(), "mobilefacenet.linear7.conv.weight"
    assert torch.equal(averaged[name], given.weights[name])
