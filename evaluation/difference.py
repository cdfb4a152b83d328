"""How the sound of a clip differs from the normal clips of its machine: in level, in a range of
frequencies for some seconds, or in how much a range fluctuates.

A clip is described by the levels of N_BANDS frequency bands in each second, in dB. They are
compared with the mean levels of the N_NEAREST training clips whose spectra have the most similar
shape, whatever their level. In a normal clip, the difference x of band b in second t is u_b + v_bt:
u and v are normally distributed, u drawn once for a clip and v in each second. Their covariances
over the bands are estimated from the training clips. In an anomalous clip, the bands of a range are
louder by a dB for a stretch of seconds. With w one there and zero elsewhere, and S the covariance
of x, the best estimate of a is w'S⁻¹x / w'S⁻¹w, and w'S⁻¹x / √(w'S⁻¹w) is its size in standard
errors (a generalised likelihood ratio test). The range and stretch of the largest size describe the
difference. All bands over the whole clip are the level, which is tested separately.

Fluctuation is the standard deviation of the frames of a clip, in dB. Its difference from the mean
of the training clips is tested in the same way, for each range of bands.

This says where the sound differs, not why a network decides.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from alarms import format_time
from audio import SECONDS
from evaluation.scores import LEAST_SPREAD
from model.tastgram import N_BANDS, N_MELS, band_edges

N_NEAREST = 3
LEAST_CLIPS, MOST_CLIPS = 10, 1000  # of a machine, to measure how they vary; more change little
# Before clips are seen, levels vary by 1 dB. This counts as much as so many clips.
PRIOR_VARIANCE, PRIOR_CLIPS = 1.0, 16
N_PARTS = 5  # of the cross-validation
USUAL = 0.95  # the share of normal clips whose differences are usual

RANGES = [(low, high) for low in range(N_BANDS) for high in range(low + 1, N_BANDS + 1)]
STRETCHES = [(start, end) for start in range(SECONDS) for end in range(start + 1, SECONDS + 1)]
IN_RANGE = np.array([[low <= band < high for band in range(N_BANDS)] for low, high in RANGES])
STARTS, ENDS = np.array(STRETCHES).T
LEVEL = RANGES.index((0, N_BANDS)), STRETCHES.index((0, SECONDS))  # all bands, the whole clip

# ---- Normal clips ----


class Spread(NamedTuple):
    """How the levels of the normal clips of a machine vary.

    Attributes:
        between: Inverse covariance over the bands of the difference between a clip and the nearest
            ones, in 1/dB², `(N_BANDS, N_BANDS)`.
        within: The same of the difference between a second and its clip.
        fluctuation: The same of the difference in fluctuation between a clip and the mean.
        level_limit: The size of the difference in level that the share USUAL of normal clips has
            at most.
        band_limit: The same of the largest difference in a range of bands.
        fluctuation_limit: The same of the largest difference in fluctuation.
    """

    between: Tensor
    within: Tensor
    fluctuation: Tensor
    level_limit: float = math.inf
    band_limit: float = math.inf
    fluctuation_limit: float = math.inf


def measure_spread(spectrum: np.ndarray, levels: np.ndarray) -> Spread | None:
    """Measure how n normal clips vary; None if there are fewer than LEAST_CLIPS. Of more than
    MOST_CLIPS, so many at equal distances are used. `spectrum` `(n, 2 M)` is from `spectrum_of`,
    `levels` `(n, N_BANDS, SECONDS)` from `levels_of`.

    The limits are cross-validated: each of N_PARTS of successive clips, which may be from the same
    recording or day, is compared with the others.
    """
    if len(levels) < LEAST_CLIPS:
        return None
    count = min(len(levels), MOST_CLIPS)
    chosen = np.linspace(0, len(levels) - 1, count).astype(int)
    spectrum, levels = spectrum[chosen], levels[chosen]
    sizes: list[tuple[float, float, float]] = []
    for part in np.array_split(np.arange(count), N_PARTS):
        others = np.delete(np.arange(count), part)
        spread = estimate_spread(spectrum[others], levels[others])
        nearest = find_nearest(spectrum[part], spectrum[others])
        offset = find_offset(spectrum[part], spectrum[others][nearest])
        size, _ = scan(offset, changes_of(levels[part]), spread)
        band = absolute_in_bands(size).max(axis=(1, 2))
        more = find_excess(spectrum[part], spectrum[others])
        fluctuation = np.abs(scan_ranges(more, spread.fluctuation)[0]).max(axis=1)
        sizes += zip(np.abs(size[:, *LEVEL]), band, fluctuation, strict=True)
    place = min(count, math.ceil((count + 1) * USUAL)) - 1
    limits = np.sort(sizes, axis=0)[place].tolist()
    between, within, fluctuations, *_ = estimate_spread(spectrum, levels)
    return Spread(between, within, fluctuations, *limits)


def estimate_spread(spectrum: np.ndarray, levels: np.ndarray) -> Spread:
    """Estimate the covariances from normal clips, without limits."""
    nearest = find_nearest(spectrum, spectrum, is_same=True)
    offset = find_offset(spectrum, spectrum[nearest])
    changes = changes_of(levels).transpose(0, 2, 1).reshape(-1, N_BANDS)
    changes *= math.sqrt(SECONDS / (SECONDS - 1))  # the mean of the clip follows its seconds
    between, within = invert_covariance(offset), invert_covariance(changes)
    return Spread(between, within, invert_covariance(find_excess(spectrum, spectrum)))


def invert_covariance(values: np.ndarray) -> Tensor:
    """Return the inverse of the covariance of values `(n, bands)` of mean 0, with the prior."""
    prior = PRIOR_CLIPS * PRIOR_VARIANCE * np.eye(values.shape[1])
    inverse = np.linalg.inv((values.T @ values + prior) / (len(values) + PRIOR_CLIPS))
    return torch.from_numpy(inverse)


def find_nearest(spectrum: np.ndarray, others: np.ndarray, is_same: bool = False) -> np.ndarray:
    """Return the numbers of the N_NEAREST others `(m, 2 M)` whose spectra have the most similar
    shape, for each of n clips `(n, N_NEAREST)`, the nearest one first. `is_same` tells that they
    are the same clips; none is near to itself then.
    """
    shape, other_shapes = shape_of(spectrum), shape_of(others)
    scale = np.maximum(other_shapes.std(axis=0), LEAST_SPREAD)
    shape, other_shapes = shape / scale, other_shapes / scale
    # The square of a difference, without an array of all differences
    distance = (other_shapes**2).sum(axis=1) - 2 * shape @ other_shapes.T
    if is_same:
        np.fill_diagonal(distance, np.inf)
    return np.argsort(distance, axis=1, kind="stable")[:, :N_NEAREST]


def shape_of(spectrum: np.ndarray) -> np.ndarray:
    """Return spectra `(n, 2 M)` without their level, the mean over the mel bins."""
    means, deviations = np.split(spectrum, [N_MELS], axis=1)
    return np.concatenate([means - means.mean(axis=1, keepdims=True), deviations], axis=1)


def find_offset(spectrum: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """Return the difference of the mean level of each band between clips `(n, 2 M)` and the mean of
    the nearest ones `(n, N_NEAREST, 2 M)`: `(n, bands)` in dB.
    """
    difference = spectrum - nearest.mean(axis=1)
    return difference[:, :N_MELS].reshape(len(spectrum), N_BANDS, -1).mean(axis=2)


def find_excess(spectrum: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the difference in fluctuation of each band between clips `(n, 2 M)` and the mean of
    others `(m, 2 M)`: `(n, bands)` in dB.
    """
    difference = spectrum - others.mean(axis=0)
    return difference[:, N_MELS:].reshape(len(spectrum), N_BANDS, -1).mean(axis=2)


def changes_of(levels: np.ndarray) -> np.ndarray:
    """Return the difference between the levels of each second and of its clip."""
    return levels - levels.mean(axis=2, keepdims=True)


# ---- The test ----


def scan(offset: np.ndarray, changes: np.ndarray, spread: Spread) -> tuple[np.ndarray, np.ndarray]:
    """Test each range of bands in each stretch of seconds.

    Args:
        offset: The differences from the nearest clips `(n, bands)` in dB.
        changes: The differences between seconds and clip `(n, bands, SECONDS)` in dB.

    Returns:
        Sizes in standard errors and estimates in dB, `(n, RANGES, STRETCHES)`. The size is 0 where
        the estimate, which allows for the other bands, has another sign than the difference itself:
        a range that is louder must not be called quieter.
    """
    between, within = spread.between.numpy(), spread.within.numpy()
    share = (ENDS - STARTS) / SECONDS
    matched = (offset @ between @ IN_RANGE.T)[..., None] * share
    matched += sum_over_stretches(IN_RANGE @ within @ changes)
    information = np.outer(power_of(between), share**2)
    information += np.outer(power_of(within), SECONDS * share * (1 - share))
    plain = sum_over_stretches(IN_RANGE @ (offset[..., None] + changes))
    size = np.where(matched * plain < 0, 0, matched / np.sqrt(information))
    return size, matched / information


def sum_over_stretches(values: np.ndarray) -> np.ndarray:
    """Add up the seconds of each stretch: `(n, RANGES, SECONDS)` -> `(n, RANGES, STRETCHES)`."""
    sums = np.pad(np.cumsum(values, axis=2), ((0, 0), (0, 0), (1, 0)))
    return sums[..., ENDS] - sums[..., STARTS]


def scan_ranges(values: np.ndarray, inverse: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Test each range of bands, for values of the bands `(n, bands)` and their inverse covariance.
    Returns sizes in standard errors and estimates, `(n, RANGES)`.
    """
    matched = values @ inverse.numpy() @ IN_RANGE.T
    information = power_of(inverse.numpy())
    return matched / np.sqrt(information), matched / information


def power_of(inverse: np.ndarray) -> np.ndarray:
    """Return w'S⁻¹w of each range of bands, for an inverse covariance S⁻¹."""
    return np.einsum("rb,bc,rc->r", IN_RANGE, inverse, IN_RANGE)


def absolute_in_bands(size: np.ndarray) -> np.ndarray:
    """Return sizes `(n, RANGES, STRETCHES)` without sign, and 0 for the level."""
    absolute = np.abs(size)
    absolute[:, *LEVEL] = 0
    return absolute


# ---- The difference of a clip ----


class NormalClips(NamedTuple):
    """Normal clips of a machine.

    Attributes:
        spectrum: Mean and standard deviation of each mel bin in dB, `(n, 2 M)`, float64.
        files: The file of each clip.
        starts: The start of each clip in its file, in seconds.
        spread: How their levels vary; None if there are too few clips.
    """

    spectrum: np.ndarray
    files: Sequence[str]
    starts: Sequence[float]
    spread: Spread | None


class Deviation(NamedTuple):
    """A difference from normal clips, in a range of bands for a stretch of a clip.

    Attributes:
        decibels: By how much the clip is louder, or fluctuates more.
        size: The same in standard errors.
        limit: The size that few normal clips exceed, see `Spread`.
        first_band: The first band of the range.
        end_band: The band after the last.
        start: The first second of the stretch, from the start of the clip.
        end: The second after the last.
    """

    decibels: float
    size: float
    limit: float
    first_band: int
    end_band: int
    start: int
    end: int

    @property
    def is_unusual(self) -> bool:
        return abs(self.size) > self.limit

    @property
    def hertz(self) -> tuple[float, float]:
        """The limits of the range in Hz."""
        edges = band_edges()
        return float(edges[self.first_band]), float(edges[self.end_band])


class Difference(NamedTuple):
    """How a clip differs from normal clips of its machine.

    Attributes:
        file: The file of the normal clip with the most similar spectrum.
        start: The start of that clip in its file, in seconds.
        level: The difference in level; None where there are fewer than LEAST_CLIPS normal clips.
        band: The largest difference in a range of bands; None as well.
        fluctuation: The largest difference in fluctuation; None as well.
    """

    file: str
    start: float
    level: Deviation | None = None
    band: Deviation | None = None
    fluctuation: Deviation | None = None

    @property
    def named(self) -> str:
        """The deviation that is named beside the level: "band" or, where only that is unusual,
        "fluctuation".
        """
        band, fluctuation = self.band, self.fluctuation
        is_named = fluctuation and fluctuation.is_unusual and not (band and band.is_unusual)
        return "fluctuation" if is_named else "band"


def find_difference(spectrum: np.ndarray, levels: np.ndarray, normal: NormalClips) -> Difference:
    """Compare a clip with normal clips. `spectrum` `(2 M,)` is from `spectrum_of`, `levels`
    `(N_BANDS, SECONDS)` from `levels_of`.

    Of level and band, the one that exceeds its limit the most is removed from the clip before the
    other is tested: a louder band alone also raises the level.
    """
    nearest = find_nearest(spectrum[None], normal.spectrum)
    file, start = normal.files[nearest[0, 0]], normal.starts[nearest[0, 0]]
    spread = normal.spread
    if spread is None:
        return Difference(file, start)
    offset = find_offset(spectrum[None], normal.spectrum[nearest])
    changes = changes_of(levels[None])
    level, band = find_deviations(offset, changes, spread)
    is_level_first = abs(level.size) * band.limit >= abs(band.size) * level.limit
    if is_level_first and level.is_unusual:
        _, band = find_deviations(offset - level.decibels, changes, spread)
    elif not is_level_first and band.is_unusual:
        share = (band.end - band.start) / SECONDS
        offset[:, band.first_band : band.end_band] -= band.decibels * share
        level, _ = find_deviations(offset, changes, spread)
    more = find_excess(spectrum[None], normal.spectrum)
    return Difference(file, start, level, band, find_fluctuation(more, spread))


def find_deviations(
    offset: np.ndarray, changes: np.ndarray, spread: Spread
) -> tuple[Deviation, Deviation]:
    """Return the difference in level, and the largest one in a range of bands, of one clip."""
    sizes, estimates = scan(offset, changes, spread)
    size, decibels, absolute = sizes[0], estimates[0], absolute_in_bands(sizes)[0]
    places = LEVEL, np.unravel_index(absolute.argmax(), absolute.shape)
    limits = spread.level_limit, spread.band_limit
    deviations = []
    for place, limit in zip(places, limits, strict=True):
        where = *RANGES[place[0]], *STRETCHES[place[1]]
        deviations.append(Deviation(float(decibels[place]), float(size[place]), limit, *where))
    level, band = deviations
    return level, band


def find_fluctuation(more: np.ndarray, spread: Spread) -> Deviation:
    """Return the largest difference in fluctuation `(1, bands)`."""
    size, decibels = (values[0] for values in scan_ranges(more, spread.fluctuation))
    place = np.abs(size).argmax()
    low, high = RANGES[place]
    found, limit = (float(decibels[place]), float(size[place])), spread.fluctuation_limit
    return Deviation(*found, limit, low, high, 0, SECONDS)


# ---- In words ----


def describe_difference(difference: Difference, clip_start: float) -> str:
    """Describe a difference, as in "2.5 to 4.4 kHz 9 dB above normal, from 0:00:03 to 0:00:06;
    level as usual (+0 dB); most similar normal recording: normal_id_00_0001.wav". `clip_start` is
    that of the clip in its recording, in seconds.
    """
    similar = f"most similar normal recording: {difference.file}"
    if difference.start:
        similar += f" from {format_time(difference.start)}"
    if difference.level is None or difference.band is None:
        return similar
    if difference.named == "fluctuation" and difference.fluctuation:
        first = describe_fluctuation(difference.fluctuation)
    else:
        first = describe_band(difference.band, clip_start)
    return "; ".join([first, describe_level(difference.level), similar])


def describe_band(band: Deviation, clip_start: float) -> str:
    """Describe the largest difference in a range of bands."""
    if not band.is_unusual and round(band.decibels) == 0:
        return "no band unusual"
    side = "above" if band.decibels > 0 else "below"
    text = f"{format_range(*band.hertz)} {abs(band.decibels):.0f} dB {side} normal"
    start, end = clip_start + band.start, clip_start + band.end
    if clip_start or end > SECONDS:
        text += f", from {format_time(start)} to {format_time(end)}"
    elif band.end - band.start < SECONDS:
        text += f", from {start:.0f} to {end:.0f} s"
    return text if band.is_unusual else f"no band unusual (largest: {text})"


def describe_fluctuation(fluctuation: Deviation) -> str:
    """Describe the largest difference in fluctuation."""
    side = "more" if fluctuation.decibels > 0 else "less"
    decibels = f"{abs(fluctuation.decibels):.1f} dB {side}"
    return f"{format_range(*fluctuation.hertz)} rises and falls by {decibels} than normal"


def describe_level(level: Deviation) -> str:
    """Describe the difference in level."""
    if not level.is_unusual:
        return f"level as usual ({round(level.decibels):+d} dB)"
    side = "louder" if level.decibels > 0 else "quieter"
    size = f"the whole {abs(level.decibels):.0f} dB {side} than normal"
    return f"{size} (has microphone, gain or place changed?)"


def format_range(low: float, high: float) -> str:
    """Format frequencies in Hz with two digits, as in "390 to 760 Hz" or "2.5 to 4.4 kHz"."""
    low, high = (float(f"{value:.2g}") for value in (low, high))
    if high < 1000:
        return f"{low:.0f} to {high:.0f} Hz"
    if low and low < 1000:
        return f"{low:.0f} Hz to {high / 1000:g} kHz"
    return f"{low / 1000:g} to {high / 1000:g} kHz"
