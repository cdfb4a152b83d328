"""Make a small set of machine sounds from code alone, in the published DCASE layout.

    python datasets/synthesize.py                           # 576 clips, 185 MB, in datasets/synthetic
    python datasets/synthesize.py --output /tmp/set         # in another folder
    python datasets/synthesize.py --seed 7 --overwrite      # other recordings of the same machines instead
    python datasets/synthesize.py --train 64 --overwrite    # more clips; the earlier ones stay the same

A clip is OUTPUT/<type>/{train,test}/{normal,anomaly}_id_XX_NNNNNNNN.wav: 10 s, 16 kHz, mono, 16-bit PCM.
There are six machine types with three IDs each; per ID, --train normal clips to train on, and --test normal and
--test anomalous clips to test on. The set shows that the code works; it says nothing about real machines.

A machine is heard through its housing, in a factory:

    tones      one revolution, repeated: the shaft, and its blades, vanes or gear teeth
    flow       broadband noise of turbulence or friction
    clicks     balls of a bearing that roll over a defect; a little of it is healthy
    knocks     solenoids, end stops, wheels or belt seams, at both ends of every stroke
    housing    three resonances, through which all of these are heard
    hiss       of a leak, beside the housing
    factory    coloured noise that swells and fades, at times with mains hum or distant clanks

The IDs of a type share a design and differ in speed, load and wear (SIBLINGS). Healthy clips of one ID differ in
speed, load, resonances, surroundings and level. A faulty clip has one fault (FAULTS), from subtle to obvious.

A clip depends on the seed and on its own name only: asking for more clips never changes the earlier ones.
OUTPUT/synthetic.json is written last: with it, a folder that holds the very set asked for is left alone. A set that
was broken off is made again.
"""

import json
import shlex
import signal
import sys
import wave
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import OneLineParser, UserError, run_script

FORMAT = 1  # raise it with any change of the sounds: sets made before are then no longer complete
RATE = 16000  # Hz
SAMPLES = 10 * RATE
TIME = np.arange(SAMPLES) / RATE  # s
FREQUENCY = np.fft.rfftfreq(SAMPLES, 1 / RATE)  # Hz


@dataclass(frozen=True)
class Machine:
    """What a machine is, then the condition it is in. Levels are rms values before the housing, where the factory
    noise has about 0.6; a knock or click of level 1 has the energy of 10 ms of noise of rms 1."""

    shaft_hz: float
    mesh: int  # blades, vanes or gear teeth that pass in one revolution
    modes_hz: tuple[float, ...]  # resonances of the housing
    tones: float  # level
    flow: float  # level
    tilt: float  # colour of the flow noise, dB per octave
    stroke_s: float = 0.0  # from one stroke to the next; 0 for a machine that only rotates
    duty: float = 0.0  # part of stroke_s in which the machine moves
    rest: float = 1.0  # what remains of the sound between strokes, 0 to 1
    knocks: float = 0.0  # level

    speed: float = 1.0  # of the shaft and of the strokes
    detuning: float = 1.0  # of the resonances
    imbalance: float = 0.0  # depth of the amplitude modulation at shaft speed
    damage: float = 0.0  # amplitude of the shaft orders that equal blades or teeth would cancel
    clicks: float = 0.0  # level
    hiss: float = 0.0  # level
    missed: float = 0.0  # probability that a stroke fails
    jitter: float = 0.02  # of the times of the strokes, relative to stroke_s
    wander: float = 0.004  # of the speed within a clip, relative


# A valve has no shaft: its tones are the whistle of the jet, whose pitch follows the pressure.
FAMILIES = {
    "fan": Machine(27.0, 7, (400.0, 1400.0, 3300.0), tones=1.4, flow=2.2, tilt=-3.0),
    "pump": Machine(48.0, 5, (640.0, 1550.0, 4300.0), tones=2.0, flow=1.6, tilt=-2.0),
    "slider": Machine(39.0, 9, (850.0, 2600.0, 5300.0), 2.0, 2.2, -1.0, 1.1, duty=0.6, rest=0.1, knocks=4.0),
    "ToyCar": Machine(109.0, 11, (1060.0, 2400.0, 4900.0), 2.0, 1.8, -1.5, 0.31, duty=0.4, knocks=1.6),
    "ToyConveyor": Machine(66.0, 13, (720.0, 1800.0, 4500.0), 1.8, 2.0, -2.5, 0.86, duty=0.3, knocks=3.0),
    "valve": Machine(160.0, 6, (1550.0, 3500.0, 6000.0), 1.6, 1.8, -1.0, 0.78, duty=0.43, rest=0.1, knocks=5.0),
}
MACHINES = {name: [1, 2, 3] if name.startswith("Toy") else [0, 2, 4] for name in FAMILIES}

# A change, from ID to ID or by a fault, multiplies these numbers of a machine and is added to the others.
FACTORS = {"speed", "detuning", "duty", "tones", "flow", "knocks"}
# The three IDs of every type. They are close: a fault can make one machine sound a little like its neighbour.
SIBLINGS = (
    {"speed": 0.92, "duty": 0.85, "imbalance": 0.25, "damage": 0.05, "hiss": 0.15},
    {"detuning": 1.04, "flow": 0.85, "imbalance": 0.05, "damage": 0.2, "clicks": 0.25},
    {"speed": 1.09, "detuning": 0.965, "duty": 1.15, "flow": 1.2, "imbalance": 0.1, "damage": 0.1, "clicks": 0.1},
)
# Faults at their worst. Hardly any has one symptom only: friction slows the motor, a bent blade is out of balance.
FAULTS = {
    "imbalance": {"imbalance": 1.0, "damage": 0.4, "speed": 0.94},
    "bearing": {"clicks": 3.0, "flow": 1.5, "speed": 0.94},
    "damaged": {"damage": 1.0, "imbalance": 0.4, "speed": 0.94},
    "leaking": {"hiss": 2.0, "speed": 1.08},
    "dry": {"flow": 2.0, "tilt": 3.0, "speed": 0.9},
    "loose": {"detuning": 0.82, "knocks": 2.0},
    "slipping": {"wander": 0.06, "jitter": 0.1, "speed": 0.94},
    "sticking": {"missed": 0.5, "jitter": 0.15, "duty": 1.5, "speed": 0.9},
    "undervoltage": {"speed": 0.85, "tones": 0.5, "flow": 0.5, "knocks": 0.5},
}
FAULTS_OF = {
    "fan": ("imbalance", "bearing", "damaged", "loose", "undervoltage"),
    "pump": ("leaking", "bearing", "damaged", "dry", "undervoltage"),
    "slider": ("sticking", "bearing", "dry", "loose", "undervoltage"),
    "ToyCar": ("imbalance", "bearing", "damaged", "loose", "undervoltage"),
    "ToyConveyor": ("slipping", "bearing", "damaged", "loose", "undervoltage"),
    "valve": ("sticking", "leaking", "loose", "undervoltage"),
}

STARTED, COMPLETE = "synthetic.json.started", "synthetic.json"  # mark a set before and after its last clip


class Clip(NamedTuple):
    machine_type: str
    machine_id: int
    split: str  # train, test
    label: str  # normal, anomaly
    index: int

    @property
    def path(self) -> Path:
        """Relative to the root of the set."""
        return Path(self.machine_type, self.split, f"{self.label}_id_{self.machine_id:02d}_{self.index:08d}.wav")


def changed(machine: Machine, change: dict[str, float], severity: float = 1.0) -> Machine:
    numbers = {name: getattr(machine, name) for name in change}
    for name, full in change.items():
        numbers[name] = numbers[name] * full**severity if name in FACTORS else numbers[name] + full * severity
    return replace(machine, **numbers)


def spread(rng: np.random.Generator, relative: float) -> float:
    """A factor near 1: how one healthy clip differs from the next."""
    return float(np.exp(relative * rng.normal()))


def slow(rng: np.random.Generator, period_s: float) -> np.ndarray:
    """A curve that wanders about 0, by about 1, and takes a new direction every period."""
    knots_s = np.arange(0, SAMPLES / RATE + period_s, period_s)
    return np.interp(TIME, knots_s, rng.normal(size=len(knots_s)))


def tilted(db_per_octave: float) -> np.ndarray:
    """The amplitude response at FREQUENCY of noise that rises or falls from 100 Hz on, and fades below 50 Hz."""
    return (np.maximum(FREQUENCY, 50) / 100) ** (db_per_octave / 6.02) * np.minimum(FREQUENCY / 50, 1)


def resonance(mode_hz: float, quality: float) -> np.ndarray:
    """The response at FREQUENCY of a damped resonator, 1 at its peak: struck, it rings and dies away."""
    band = 1j * FREQUENCY * (mode_hz / quality)
    return band / (mode_hz**2 - FREQUENCY**2 + band)


def through(response: np.ndarray, sound: np.ndarray) -> np.ndarray:
    return np.fft.irfft(np.fft.rfft(sound) * response, SAMPLES)


def coloured_noise(rng: np.random.Generator, response: np.ndarray) -> np.ndarray:
    """Gaussian noise of rms 1 with this response."""
    noise = np.fft.irfft(response * rng.normal(size=2 * len(FREQUENCY)).view(complex), SAMPLES)
    return noise / noise.std()


def hits(times_s: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Impulses at these times; those outside the clip are not heard."""
    sound = np.zeros(SAMPLES)
    position = np.round(times_s * RATE).astype(int)
    heard = (position >= 0) & (position < SAMPLES)
    np.add.at(sound, position[heard], levels[heard] * np.sqrt(0.01 * RATE))
    return sound


def harmonics(machine: Machine, turns: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The tones of a shaft after `turns` revolutions, of rms near 1 where nothing is damaged."""
    order = np.arange(1, 5 * machine.mesh + 1)
    amplitude = np.where(order % machine.mesh == 0, machine.mesh / order, 0) + np.where(order <= 3, 0.4 / order, 0)
    amplitude /= np.sqrt(np.sum(amplitude**2) / 2)
    amplitude += machine.damage * np.exp(-order / (2 * machine.mesh))
    amplitude *= np.exp(0.2 * rng.normal(size=len(order)))
    points = 65536  # of one revolution: so many that the nearest is good enough
    spectrum = np.zeros(points // 2 + 1, complex)
    spectrum[order] = amplitude * np.exp(2j * np.pi * rng.random(len(order)))
    waveform = np.fft.irfft(spectrum) * points / 2
    return waveform[(points * turns).astype(int) % points]


def bearing_clicks(turns: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """3.6 balls of a bearing pass its defect in one revolution, with some slip, and never equally hard."""
    passed = np.floor(3.6 * turns + 0.05 * slow(rng, 0.02))
    times_s = TIME[1:][np.diff(passed) > 0]
    return hits(times_s, np.exp(0.4 * rng.normal(size=len(times_s))))


def strokes(machine: Machine, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """How strongly the machine sounds while it moves and rests, 0 to 1; and the knocks that start and end strokes."""
    period_s = machine.stroke_s / machine.speed * spread(rng, 0.02)
    number = int(SAMPLES / RATE / period_s) + 3
    starts = np.arange(number) - 1 - rng.random() + machine.jitter * rng.normal(size=number)
    stops = starts + machine.duty * np.exp(machine.jitter * rng.normal(size=number))
    done = rng.random(number) >= machine.missed
    starts_s, stops_s = period_s * starts[done], period_s * stops[done]
    hard = np.exp(0.15 * rng.normal(size=(2, len(starts_s))))
    knocks = hits(starts_s, hard[0]) + hits(stops_s, 0.6 * hard[1])

    strength = np.full(SAMPLES, machine.rest)
    for start, stop in np.searchsorted(TIME, np.transpose((starts_s, stops_s))):
        motion = np.sin(np.pi * (np.arange(stop - start) + 0.5) / (stop - start)) ** 0.5
        strength[start:stop] = machine.rest + (1 - machine.rest) * motion
    return strength, knocks


def machine_sound(machine: Machine, rng: np.random.Generator) -> np.ndarray:
    """One clip of the machine alone, through its housing."""
    speed_hz = machine.speed * machine.shaft_hz * spread(rng, 0.012) * (1 + machine.wander * slow(rng, 0.7))
    turns = rng.random() + np.cumsum(speed_hz) / RATE
    sound = machine.tones * spread(rng, 0.15) * harmonics(machine, turns, rng)
    sound += machine.flow * spread(rng, 0.15) * coloured_noise(rng, tilted(machine.tilt))
    if machine.clicks:
        sound += machine.clicks * bearing_clicks(turns, rng)
    sound *= 1 + machine.imbalance * np.sin(2 * np.pi * turns)
    if machine.stroke_s:
        strength, knocks = strokes(machine, rng)
        sound = strength * sound + machine.knocks * spread(rng, 0.1) * knocks
    modes_hz = [machine.detuning * mode_hz * spread(rng, 0.012) for mode_hz in machine.modes_hz]
    housing = 0.15 + sum(spread(rng, 0.15) * resonance(mode_hz, 8) for mode_hz in modes_hz)
    sound = through(housing, sound)
    if machine.hiss:
        sound += machine.hiss * coloured_noise(rng, resonance(rng.uniform(3000, 6000), 2))
    return sound


def factory_noise(rng: np.random.Generator) -> np.ndarray:
    """The hall around the machine, of rms near 1: the same for all machines, and no clue to a fault."""
    noise = coloured_noise(rng, tilted(rng.uniform(-6, -4))) * np.exp(0.15 * slow(rng, 1.5))
    if rng.random() < 0.3:
        noise += rng.uniform(0.1, 0.4) * sum(np.sin(2 * np.pi * hum_hz * TIME) for hum_hz in (50, 100, 200))
    clanks = rng.poisson(0.5)
    if clanks:
        steel = sum(resonance(mode_hz, 60) for mode_hz in rng.uniform(500, 4000, 3))
        noise += through(steel, hits(rng.uniform(0, SAMPLES / RATE, clanks), rng.uniform(2, 6, clanks)))
    return noise


def synthesize(machine_type: str, machine_id: int, split: str, label: str, index: int, seed: int) -> np.ndarray:
    """The samples of one clip, within ±1."""
    name = f"{seed} {machine_type} {machine_id} {split} {label} {index}"
    rng = np.random.default_rng(list(name.encode()))
    machine = changed(FAMILIES[machine_type], SIBLINGS[MACHINES[machine_type].index(machine_id)])
    if label == "anomaly":
        fault = rng.choice(FAULTS_OF[machine_type])
        machine = changed(machine, FAULTS[fault], severity=rng.uniform(0.3, 1))
    sound = machine_sound(machine, rng) + rng.uniform(0.4, 0.8) * factory_noise(rng)
    rms = np.clip(0.01 * spread(rng, 0.2), 0.005, 0.02)
    return np.clip(sound * rms / np.sqrt(np.mean(sound**2)), -1, 1)


def clips_of_set(train: int, test: int) -> list[Clip]:
    counts = {("train", "normal"): train, ("test", "normal"): test, ("test", "anomaly"): test}
    machines = [(machine_type, machine_id) for machine_type, ids in MACHINES.items() for machine_id in ids]
    return [Clip(*machine, *part, i) for machine in machines for part, count in counts.items() for i in range(count)]


def write(clip: Clip, output: Path, seed: int) -> None:
    samples = np.round(32767 * synthesize(*clip, seed)).astype("<i2")
    with wave.open(str(output / clip.path), "wb") as file:
        file.setparams((1, 2, RATE, SAMPLES, "NONE", ""))
        file.writeframes(samples.tobytes())


def clear(output: Path) -> None:
    """Remove the clips of an earlier run, of whatever size. Real recordings may bear the same names: a folder
    without the mark of this script keeps its clips."""
    names = [str(clip.path).replace("00000000", "[0-9]" * 8) for clip in clips_of_set(1, 1)]
    found = [path for name in names for path in output.glob(name)]
    if found and not any((output / mark).exists() for mark in (STARTED, COMPLETE)):
        raise UserError(f"{found[0]} was not made by this script: choose another --output")
    (output / STARTED).touch()
    (output / COMPLETE).unlink(missing_ok=True)
    for path in found:
        path.unlink()


def is_unfinished(output: Path) -> bool:
    """Whether the folder holds a set of this script that was broken off, or sounds as it no longer makes them."""
    if (output / STARTED).exists():
        return True
    return (output / COMPLETE).is_file() and json.loads((output / COMPLETE).read_bytes())["format"] != FORMAT


def make_set(output: Path, clips: list[Clip], seed: int, mark: bytes) -> None:
    output.mkdir(parents=True, exist_ok=True)
    clear(output)
    for folder in {(output / clip.path).parent for clip in clips}:
        folder.mkdir(parents=True, exist_ok=True)
    # Ctrl-C reaches the workers too: they leave the message to this process.
    with ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        with closing(pool.map(partial(write, output=output, seed=seed), clips, chunksize=4)) as written:
            for _ in tqdm(written, total=len(clips), unit="clip"):
                pass
    (output / STARTED).write_bytes(mark)
    (output / STARTED).replace(output / COMPLETE)


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("datasets/synthetic"), help="default: %(default)s")
    parser.add_argument("--train", type=int, default=16, help="training clips per ID (default: %(default)s)")
    parser.add_argument("--test", type=int, default=8, help="test clips per ID, of each label (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=2023, help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace the clips of an earlier run")
    options = parser.parse_args(arguments)
    output = options.output
    if min(options.train, options.test) < 1:
        raise UserError(f"--train {options.train} --test {options.test}: both must be at least 1")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is not a folder: choose another --output")

    clips = clips_of_set(options.train, options.test)
    made_with = {"format": FORMAT, "train": options.train, "test": options.test, "seed": options.seed}
    mark = (json.dumps(made_with) + "\n").encode()
    marked = (output / COMPLETE).is_file() and (output / COMPLETE).read_bytes() == mark
    done = marked and not options.overwrite and all((output / clip.path).is_file() for clip in clips)
    if not done:
        if output.exists() and any(output.iterdir()) and not options.overwrite and not is_unfinished(output):
            raise UserError(f"{output} holds something else: choose another --output, or add --overwrite")
        make_set(output, clips, options.seed, mark)
    table = ", ".join(f"{machine_type}: {ids}" for machine_type, ids in MACHINES.items())
    print(
        f"{output}: {len(clips)} clips{', complete already' if done else ''}; next: "
        f"python train.py --data_root {shlex.quote(str(output))} --machines '{{{table}}}'"
    )


if __name__ == "__main__":
    run_script(main)
