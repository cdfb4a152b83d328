"""What differs from normal clips: on made-up levels whose bands vary together, as real ones do."""

import numpy as np
import pytest
import torch

from audio import SECONDS
from evaluation.difference import (
    LEAST_CLIPS,
    Deviation,
    Difference,
    NormalClips,
    describe_difference,
    find_difference,
    find_nearest,
    format_range,
    measure_spread,
    scan,
)
from model.tastgram import N_BANDS, N_FRAMES, N_MELS, band_edges, levels_of, spectrum_of

N_CLIPS = 60
SHARED = np.exp(-np.abs(np.subtract.outer(np.arange(N_BANDS), np.arange(N_BANDS))) / 4)


def make_log_mel(rng: np.random.Generator, count: int) -> torch.Tensor:
    """Make log-mels `(count, 1, M, F)` of a falling spectrum. Neighbouring bands vary together, by
    1.5 dB from clip to clip and by 2 dB from second to second.
    """
    root = np.linalg.cholesky(SHARED)
    clip = 1.5 * rng.normal(size=(count, 1, N_BANDS)) @ root.T
    second = 2 * rng.normal(size=(count, SECONDS, N_BANDS)) @ root.T
    levels = (clip + second - 2 * np.arange(N_BANDS)).transpose(0, 2, 1)
    frames = np.minimum(np.arange(N_FRAMES) * 512 // 16_000, SECONDS - 1)
    image = np.repeat(levels[:, :, frames], N_MELS // N_BANDS, axis=1)
    image = image + rng.normal(size=image.shape)
    return torch.from_numpy(image[:, None])


def describe(log_mel: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    return spectrum_of(log_mel).numpy(), levels_of(log_mel).numpy()


@pytest.fixture(scope="module")
def normal() -> NormalClips:
    spectrum, levels = describe(make_log_mel(np.random.default_rng(0), N_CLIPS))
    files = [f"{number}.wav" for number in range(N_CLIPS)]
    return NormalClips(spectrum, files, [0.0] * N_CLIPS, measure_spread(spectrum, levels))


def difference_of(log_mel: torch.Tensor, normal: NormalClips) -> Difference:
    spectrum, levels = describe(log_mel[None])
    return find_difference(spectrum[0], levels[0], normal)


def test_levels_are_means_over_bins_and_seconds():
    log_mel = torch.randn(2, 1, N_MELS, N_FRAMES)
    levels = levels_of(log_mel)
    assert levels.shape == (2, N_BANDS, SECONDS)
    frames = [frame for frame in range(N_FRAMES) if 2 <= frame * 512 / 16_000 < 3]
    expected = log_mel[1, 0, 8:16, frames].mean()
    assert levels[1, 1, 2] == pytest.approx(float(expected), abs=1e-5)
    assert frames == list(range(63, 94))
    edges = band_edges()
    assert (edges[0], edges[-1]) == (0, 8000)
    assert (np.diff(edges) > 150).all()


@pytest.mark.parametrize("decibels", [9, -9])
def test_a_louder_band_is_found_with_its_seconds(decibels, normal):
    rng = np.random.default_rng(1)
    found = 0
    for log_mel in make_log_mel(rng, 10):
        band, start = rng.integers(N_BANDS), rng.integers(SECONDS - 3)
        first = int(np.ceil(start * 16_000 / 512))
        end = int(np.ceil((start + 4) * 16_000 / 512))
        log_mel[0, 8 * band : 8 * band + 8, first:end] += decibels
        difference = difference_of(log_mel, normal)
        expected = (band, band + 1, start, start + 4)
        found += difference.band[3:] == expected and difference.band.is_unusual
        assert difference.band.decibels == pytest.approx(decibels, abs=3)
    assert found >= 9


def test_a_gain_is_a_level_and_no_band(normal):
    """It changes the level by as much, and neither the band nor the most similar clip."""
    for log_mel in make_log_mel(np.random.default_rng(2), 10):
        before, after = difference_of(log_mel, normal), difference_of(log_mel + 6, normal)
        assert after.level.decibels == pytest.approx(before.level.decibels + 6, abs=1e-6)
        assert after.level.is_unusual
        assert after.file == before.file
        assert after.band.is_unusual == before.band.is_unusual
        assert after.fluctuation == pytest.approx(before.fluctuation)


def test_a_range_that_rises_and_falls_is_found(normal):
    """By 8 dB from one frame to the next, in bands whose frames differ by 1 dB otherwise."""
    rng = np.random.default_rng(7)
    (log_mel,) = make_log_mel(rng, 1)
    before = difference_of(log_mel, normal)
    assert not before.fluctuation.is_unusual
    log_mel[0, 32:64] += torch.from_numpy(8.0 * rng.choice([-1, 1], size=N_FRAMES))
    after = difference_of(log_mel, normal).fluctuation
    assert after.is_unusual
    assert (after.first_band, after.end_band) == (4, 8)
    assert after.decibels == pytest.approx(6, abs=2)


def test_few_normal_clips_are_unusual(normal):
    """About a twentieth of them in level, and in a band, as the limits say."""
    clips = make_log_mel(np.random.default_rng(3), 200)
    differences = [difference_of(log_mel, normal) for log_mel in clips]
    for name in ("level", "band", "fluctuation"):
        rate = np.mean([getattr(difference, name).is_unusual for difference in differences])
        assert 0 < rate < 0.12, name


def test_sizes_are_those_of_the_whole_covariance(normal):
    """Against the formula with the inverse covariance of all bands and seconds at once."""
    spread = normal.spread
    rng = np.random.default_rng(4)
    offset, changes = rng.normal(size=(1, N_BANDS)), rng.normal(size=(1, N_BANDS, SECONDS))
    changes -= changes.mean(axis=2, keepdims=True)
    mean = np.full((SECONDS, SECONDS), 1 / SECONDS)
    about_mean = np.eye(SECONDS) - mean
    # Inverse covariance of (band, second): of the mean over seconds, and about it
    inverse = np.kron(spread.between.numpy(), mean / SECONDS)
    inverse += np.kron(spread.within.numpy(), about_mean)
    x = (offset[0][:, None] + changes[0]).ravel()
    size, decibels = scan(offset, changes, spread)
    where = np.zeros((N_BANDS, SECONDS))
    where[3:5, 2:6] = 1
    w = where.ravel()
    ranges = [(low, high) for low in range(N_BANDS) for high in range(low + 1, N_BANDS + 1)]
    stretches = [(low, high) for low in range(SECONDS) for high in range(low + 1, SECONDS + 1)]
    place = 0, ranges.index((3, 5)), stretches.index((2, 6))
    assert decibels[place] == pytest.approx(w @ inverse @ x / (w @ inverse @ w))
    assert size[place] == pytest.approx(w @ inverse @ x / np.sqrt(w @ inverse @ w))


def test_a_louder_range_is_never_called_quieter(normal):
    """Where one band is less loud than its neighbours, they are louder, and it is not quieter."""
    offset = np.full((1, N_BANDS), 6.0)
    offset[0, 7] = 3.0
    size, decibels = scan(offset, np.zeros((1, N_BANDS, SECONDS)), normal.spread)
    assert (decibels < 0).any()
    assert (size >= 0).all()


def test_the_most_similar_clip_has_the_shape_and_not_the_level():
    spectrum = np.random.default_rng(5).normal(size=(12, 2 * N_MELS))
    louder = spectrum[[4]]
    louder[:, :N_MELS] += 30
    assert find_nearest(louder, spectrum)[0, 0] == 4
    assert 4 not in find_nearest(spectrum, spectrum, is_same=True)[4]


def test_few_clips_are_no_measure():
    clips = make_log_mel(np.random.default_rng(6), LEAST_CLIPS - 1)
    spectrum, levels = describe(clips)
    assert measure_spread(spectrum, levels) is None
    normal = NormalClips(spectrum, list("abcdefghi"), [0.0] * 8 + [20.0], None)
    difference = difference_of(clips[8], normal)
    assert difference == Difference("i", 20.0)
    assert describe_difference(difference, 0.0) == "most similar normal recording: i from 0:00:20"


def test_of_many_clips_some_are_measured(monkeypatch):
    spectrum, levels = describe(make_log_mel(np.random.default_rng(8), 39))
    some = measure_spread(spectrum[::2], levels[::2])
    monkeypatch.setattr("evaluation.difference.MOST_CLIPS", 20)
    assert torch.equal(measure_spread(spectrum, levels).within, some.within)


# ---- In words ----

BAND = Deviation(-9.4, -20.0, 12.0, 10, 13, 3, 6)
LEVEL = Deviation(0.4, 0.5, 3.0, 0, N_BANDS, 0, SECONDS)


FLUCTUATION = Deviation(2.34, 5.0, 4.0, 10, 13, 0, SECONDS)


def test_a_fluctuation_is_named_where_no_band_is():
    text = "2.5 to 4.4 kHz rises and falls by 2.3 dB more than normal; level as usual (+0 dB)"
    difference = Difference("a.wav", 0.0, LEVEL, BAND._replace(size=11.0), FLUCTUATION)
    assert describe_difference(difference, 0.0).startswith(f"{text}; ")
    difference = difference._replace(band=BAND)
    assert "rises" not in describe_difference(difference, 0.0)
    difference = Difference("a.wav", 0.0, LEVEL, BAND, FLUCTUATION._replace(size=3.0))
    assert "rises" not in describe_difference(difference, 0.0)


@pytest.mark.parametrize(
    ("band", "level", "start", "text"),
    [
        (
            BAND,
            LEVEL,
            0.0,
            "2.5 to 4.4 kHz 9 dB below normal, from 3 to 6 s; level as usual (+0 dB)",
        ),
        (
            BAND._replace(size=2.0, decibels=0.4),
            LEVEL,
            0.0,
            "no band unusual; level as usual (+0 dB)",
        ),
        (
            BAND._replace(start=0, end=SECONDS, decibels=9.4),
            LEVEL._replace(decibels=3.1, size=4.0),
            0.0,
            "2.5 to 4.4 kHz 9 dB above normal; the whole 3 dB louder than normal (has microphone, "
            "gain or place changed?)",
        ),
        (
            BAND._replace(size=11.0, start=0, end=SECONDS),
            LEVEL._replace(decibels=-3.1, size=-4.0),
            2400.0,
            "no band unusual (largest: 2.5 to 4.4 kHz 9 dB below normal, from 0:40:00 to 0:40:10); "
            "the whole 3 dB quieter than normal (has microphone, gain or place changed?)",
        ),
    ],
)
def test_a_difference_in_words(band, level, start, text):
    described = describe_difference(Difference("a.wav", 0.0, level, band), start)
    assert described == f"{text}; most similar normal recording: a.wav"


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (0.0, 198.5, "0 to 200 Hz"),
        (386.0, 760.0, "390 to 760 Hz"),
        (947.0, 2484.0, "950 Hz to 2.5 kHz"),
        (0.0, 8000.0, "0 to 8 kHz"),
        (4431.5, 5374.5, "4.4 to 5.4 kHz"),
        (947.0, 999.0, "950 Hz to 1 kHz"),
    ],
)
def test_frequencies_in_words(low, high, text):
    assert format_range(low, high) == text
