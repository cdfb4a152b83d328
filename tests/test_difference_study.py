"""The study of the line that says what differs: benchmarks/difference.py."""

import numpy as np
import pytest
import torch
from conftest import tone

from audio import SECONDS
from benchmarks import difference as study
from evaluation.difference import Deviation, Difference
from model.tastgram import N_BANDS

LEVEL = Deviation(0.0, 0.0, 3.0, 0, N_BANDS, 0, SECONDS)
NOISE = study.Noise(band=5, start=2.5, end=6.5)


def test_noise_is_added_in_its_band_and_seconds():
    clip = 32_768 * tone(0)
    noisy = study.add_noise(clip, NOISE, 10.0, np.random.default_rng(0))
    assert (noisy[:40_000] == clip[:40_000]).all()
    assert (noisy[104_000:] == clip[104_000:]).all()
    samples = torch.from_numpy(np.round(np.stack([clip, noisy])).astype(np.int16))
    _, levels = study.describe(samples)
    change = levels[1] - levels[0]
    assert (change[5, 3:6] > 8).all(), "dB"
    assert np.abs(change[:4]).max() < 0.5
    assert np.abs(change[7:]).max() < 0.5


@pytest.mark.parametrize(
    ("changes", "is_right"),
    [
        ({}, True),
        ({"first_band": 4, "end_band": 7}, True),
        ({"first_band": 4, "end_band": 8}, False),
        ({"first_band": 7, "end_band": 8}, False),
        ({"start": 3, "end": 7}, True),
        ({"start": 4}, False),
        ({"end": 9}, False),
        ({"size": 11.0}, False),
        ({"decibels": -9.0}, False),
    ],
)
def test_what_is_right(changes, is_right):
    band = Deviation(9.0, 20.0, 12.0, 5, 6, 2, 6)._replace(**changes)
    assert study.names_noise(Difference("a.wav", 0.0, LEVEL, band), NOISE) == is_right


def test_noises_lie_within_a_clip():
    rng = np.random.default_rng(0)
    noises = [study.draw_noise(rng) for _ in range(500)]
    assert {noise.band for noise in noises} == set(range(N_BANDS))
    assert {noise.end - noise.start for noise in noises} == set(study.LENGTHS)
    assert min(noise.start for noise in noises) == 0
    assert max(noise.end for noise in noises) == SECONDS
