"""Outputs of the network in evaluation mode, in batches of any size."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import reference
import torch

from dataloader import ClipSet
from inference import run_network
from model import CHANNELS, PUBLISHED_CHANNELS, FrontEnd, LogMel, TASTgramMFN, spectrum_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("batch_size", "channels", "head", "has_onednn"),
    [
        (1, PUBLISHED_CHANNELS, "arcface", True),
        (2, ("sgram",), "fc_out", True),
        (2, PUBLISHED_CHANNELS, "fc_out", False),
        (2, tuple(CHANNELS), "projected", True),
        (64, ("sgram",), "arcface", False),
    ],
)
def test_outputs_are_those_of_the_network_for_the_chosen_clips(
    batch_size, channels, head, has_onednn, monkeypatch
):
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: has_onednn)
    network = TASTgramMFN(reference.NUM_CLASSES, channels, head).move_to(CPU)
    network.load_state_dict(reference.parameters(reference.shapes_of(network)))
    front_end = FrontEnd(channels)
    clips = ClipSet(pd.DataFrame({"path": Path(), "label": [0] * 4}), 1)
    clips.samples = reference.samples()
    numbers = np.array([3, 0, 2])
    outputs = run_network(network.train(), clips, numbers, batch_size)
    assert network.training
    with torch.no_grad():
        similarity, embedding = network.eval()(**front_end(reference.samples()[numbers]))
    assert reference.distance(outputs.similarity, similarity.numpy()) < 1e-5
    assert reference.distance(outputs.embedding, embedding.numpy()) < 1e-5
    log_mel = LogMel()(reference.samples()[numbers] / 32768)
    assert torch.allclose(outputs.spectrum, spectrum_of(log_mel))


def test_no_clips_give_no_outputs():
    network = TASTgramMFN(3, ("sgram",))
    clips = ClipSet(pd.DataFrame({"path": [], "label": []}), 1)
    outputs = run_network(network, clips, np.arange(0), 4)
    assert outputs.similarity.shape == (0, 3)
