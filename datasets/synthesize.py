"""Make a small set of machine sounds from code alone, in the published DCASE layout.

    python datasets/synthesize.py                           # 576 clips, 185 MB, in datasets/synthetic
    python datasets/synthesize.py --seed 7 --overwrite      # other recordings of the same machines instead
    python datasets/synthesize.py --train 64 --overwrite    # more clips; the earlier ones stay the same

A clip is OUTPUT/<type>/{train,test}/{normal,anomaly}_id_XX_NNNNNNNN.wav: 10 s, 16 kHz, mono, 16-bit PCM.
There are six machine types with three IDs each; per ID, --train normal clips to train on, and --test normal and
--test anomalous clips to test on. A clip depends on the seed and on its own name only. The set shows that the code
works; it says nothing about real machines.

The sound of a machine is the tones of its shaft, broadband noise, and knocks where it moves in strokes, filtered by
the resonances of its housing; the noise of a factory is added. The IDs of a type differ in speed and resonances. Speed,
resonances and levels vary a little between the normal clips of an ID. An anomalous clip has one of FAULTS.

OUTPUT/synthetic.json is empty until the last clip is written. A folder that holds the very set asked for is left
alone, a set that was broken off is made again, and a folder without that file is never touched unless it is empty.
"""

import json
import shlex
import signal
import sys
import wave
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import OneLineParser, UserError, run_script

VERSION = 2  # raise it with any change of the sounds: sets made before are then made again
RATE = 16000  # Hz
SAMPLES = 10 * RATE
TIME = np.arange(SAMPLES) / RATE  # s
FREQUENCY = np.fft.rfftfreq(SAMPLES, 1 / RATE)  # Hz


class Machine(NamedTuple):
    shaft_hz: float  # revolutions per second
    blades: int  # or vanes or gear teeth that pass in one revolution
    resonances_hz: tuple[float, float, float]  # of the housing
    noise: float  # level of the noise of air, water or friction, where that of the tones is 1
    stroke_s: float | None = None  # from one stroke to the next; None for a machine that only rotates


TYPES = {
    "fan": Machine(27, 7, (400, 1400, 3300), noise=1.8),
    "pump": Machine(48, 5, (640, 1550, 4300), noise=1.1),
    "slider": Machine(39, 9, (850, 2600, 5300), noise=1.1, stroke_s=1.1),
    "ToyCar": Machine(109, 5, (1060, 2400, 4900), noise=0.9, stroke_s=0.31),
    "ToyConveyor": Machine(66, 8, (720, 1800, 4500), noise=1.1, stroke_s=0.86),
    "valve": Machine(160, 3, (1550, 3500, 6000), noise=1.1, stroke_s=0.55),
}
MACHINES = {machine_type: [1, 2, 3] if machine_type.startswith("Toy") else [0, 2, 4] for machine_type in TYPES}
FAULTS = ("slow", "loose", "worn", "dry")  # weak motor, loose housing, damaged bearing, more friction


class Clip(NamedTuple):
    machine_type: str
    machine_id: int
    split: str  # train, test
    label: str  # normal, anomaly
    number: int

    @property
    def name(self) -> str:
        return f"{self.machine_type}/{self.split}/{self.label}_id_{self.machine_id:02d}_{self.number:08d}.wav"


def factor(rng: np.random.Generator, deviation: float) -> float:
    """A random factor near 1."""
    return float(np.exp(deviation * rng.normal()))


def resonance(peak_hz: float) -> np.ndarray:
    """The response at FREQUENCY of a damped resonator, 1 at its peak."""
    band = 1j * FREQUENCY * peak_hz / 8
    return band / (peak_hz**2 - FREQUENCY**2 + band)


def filtered(sound: np.ndarray, response: np.ndarray) -> np.ndarray:
    return np.fft.irfft(np.fft.rfft(sound) * response, SAMPLES)


def impulses(count: np.ndarray) -> np.ndarray:
    """An impulse wherever this rising curve passes a whole number, with the energy of 10 ms of noise of rms 1."""
    return np.sqrt(0.01 * RATE) * (np.diff(np.floor(count), prepend=np.floor(count[0])) > 0)


def machine_sound(clip: Clip, severity: dict[str, float], rng: np.random.Generator) -> np.ndarray:
    """The machine without its surroundings, with each of FAULTS in a severity from 0 to 1."""
    machine = TYPES[clip.machine_type]
    variant = MACHINES[clip.machine_type].index(clip.machine_id) - 1
    speed = 1.09**variant * factor(rng, 0.012) * (1 - 0.15 * severity["slow"])
    tuning = 0.95**variant * (1 - 0.22 * severity["loose"])

    turns = rng.random() + speed * machine.shaft_hz * TIME
    # The exponential function makes harmonics of the cosine of the blades; the shaft modulates them.
    tones = np.exp(6 * np.cos(2 * np.pi * machine.blades * turns) + 0.5 * np.cos(2 * np.pi * turns))
    sound = factor(rng, 0.15) * (tones - tones.mean()) / tones.std()
    sound += factor(rng, 0.15) * machine.noise * (1 + 4 * severity["dry"]) * rng.normal(size=SAMPLES)
    sound += 3 * severity["worn"] * impulses(3.6 * turns)  # 3.6 balls pass the damage in one revolution
    if machine.stroke_s:
        strokes = rng.random() + speed / machine.stroke_s * TIME
        sound *= np.clip(5 * np.sin(2 * np.pi * strokes), 0.1, 1)  # moves in the first half of a stroke, then rests
        sound += 3 * factor(rng, 0.15) * impulses(strokes)
    peaks_hz = [peak_hz * tuning * factor(rng, 0.012) for peak_hz in machine.resonances_hz]
    responses = [factor(rng, 0.15) * resonance(peak_hz) for peak_hz in peaks_hz]
    return filtered(sound, 0.15 + np.sum(responses, axis=0))


def synthesize(clip: Clip, seed: int) -> np.ndarray:
    """The samples of one clip, within ±1."""
    rng = np.random.default_rng(list(f"{seed} {clip.name}".encode()))
    severity = dict.fromkeys(FAULTS, 0.0)
    if clip.label == "anomaly":
        severity[FAULTS[clip.number % len(FAULTS)]] = rng.uniform(0.3, 1)
    factory = filtered(rng.normal(size=SAMPLES), np.maximum(FREQUENCY, 50) ** rng.uniform(-1, -0.7))
    sound = machine_sound(clip, severity, rng) + rng.uniform(0.4, 0.8) * factory / factory.std()
    rms = np.clip(0.01 * factor(rng, 0.2), 0.005, 0.02)
    return np.clip(sound * rms / np.sqrt(np.mean(sound**2)), -1, 1)


def clips_of_set(train: int, test: int) -> list[Clip]:
    counts = {("train", "normal"): train, ("test", "normal"): test, ("test", "anomaly"): test}
    machines = [(machine_type, machine_id) for machine_type, ids in MACHINES.items() for machine_id in ids]
    return [Clip(*machine, *part, i) for machine in machines for part, count in counts.items() for i in range(count)]


def write(clip: Clip, output: Path, seed: int) -> None:
    samples = np.round(32767 * synthesize(clip, seed)).astype("<i2")
    with wave.open(str(output / clip.name), "wb") as file:
        file.setparams((1, 2, RATE, SAMPLES, "NONE", ""))
        file.writeframes(samples.tobytes())


def make_set(output: Path, clips: list[Clip], seed: int) -> None:
    """Remove the clips of an earlier set, of whatever size, and write these."""
    for clip in clips_of_set(1, 1):
        folder = (output / clip.name).parent
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"{clip.label}_id_{clip.machine_id:02d}_{'[0-9]' * 8}.wav"):
            path.unlink()
    # Ctrl-C reaches the workers too: they leave the message to this process.
    with ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        written = pool.map(partial(write, output=output, seed=seed), clips, chunksize=4)
        for _ in tqdm(written, total=len(clips), unit="clip"):
            pass


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
    mark = output / "synthetic.json"
    found = mark.read_text() if mark.is_file() else ""
    wanted = json.dumps({"train": options.train, "test": options.test, "seed": options.seed, "version": VERSION})
    done = found == wanted and not options.overwrite and all((output / clip.name).is_file() for clip in clips)
    if not done:
        if output.is_dir() and not mark.is_file() and any(output.iterdir()):
            raise UserError(f"{output} holds files that were not made by this script: choose another --output")
        is_current = found.endswith(f'"version": {VERSION}}}')  # else broken off, or made by an earlier version
        if is_current and found != wanted and not options.overwrite:
            raise UserError(f"{output} holds another set: choose another --output, or add --overwrite")
        output.mkdir(parents=True, exist_ok=True)
        mark.write_text("")
        make_set(output, clips, options.seed)
        mark.write_text(wanted)
    table = ", ".join(f"{machine_type}: {ids}" for machine_type, ids in MACHINES.items())
    print(
        f"{output}: {len(clips)} clips{', complete already' if done else ''}; next: "
        f"python train.py --data_root {shlex.quote(str(output))} --machines '{{{table}}}'"
    )


if __name__ == "__main__":
    run_script(main)
