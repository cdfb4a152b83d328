"""Make a small set of machine sounds from code alone, in the layout of DCASE 2020 Task 2 or of
2023.

    # 576 clips, 185 MB, in datasets/synthetic
    python datasets/synthesize.py
    # other recordings of the same machines instead
    python datasets/synthesize.py --seed 7 --overwrite
    # more clips; the earlier ones stay the same
    python datasets/synthesize.py --train 64 --overwrite
    # sections and domains, in datasets/synthetic_2023
    python datasets/synthesize.py --form 2023

A clip is OUTPUT/<type>/{train,test}/{normal,anomaly}_id_XX_NNNNNNNN.wav: 10 s, 16 kHz, mono, 16-bit
PCM. There are six machine types with three IDs each; per ID, --train normal clips to train on, and
--test normal and --test anomalous clips to test on. A clip depends on the seed and on its own name
only. The set shows that the code works; it says nothing about real machines.

In the form of 2023 a machine type has one section with two domains, and a clip is
OUTPUT/<type>/{train,test}/
section_00_{source,target}_{train,test}_{normal,anomaly}_NNNN_spd_<speed>.wav. In the source domain
the machine runs at two speeds, in the target domain at a third one and in a louder factory. --train
is the number of source clips, with an eighth as many of the target domain; --test that of each
domain.

The sound of a machine is the tones of its shaft, broadband noise, and knocks where it moves in
strokes, filtered by the resonances of its housing; the noise of a factory is added. The IDs of a
type differ in speed and resonances. Speed, resonances and levels vary a little between the normal
clips of an ID. An anomalous clip has one of FAULTS.

OUTPUT/synthetic.json is empty until the last clip is written. A folder that holds the very set
asked for is left alone, a set that was broken off is made again, and a folder without that file is
never touched unless it is empty.
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

RATE = 16000  # Hz
SAMPLES = 10 * RATE
TIME = np.arange(SAMPLES) / RATE  # s
FREQUENCY = np.fft.rfftfreq(SAMPLES, 1 / RATE)  # Hz


class Machine(NamedTuple):
    shaft_hz: float  # revolutions per second
    blades: int  # or vanes or gear teeth that pass in one revolution
    resonances_hz: tuple[float, float, float]  # of the housing
    noise: float  # level of the noise of air, water or friction, where that of the tones is 1
    stroke_s: float | None = (
        None  # from one stroke to the next; None for a machine that only rotates
    )


TYPES = {
    "fan": Machine(27, 7, (400, 1400, 3300), noise=1.8),
    "pump": Machine(48, 5, (640, 1550, 4300), noise=1.1),
    "slider": Machine(39, 9, (850, 2600, 5300), noise=1.1, stroke_s=1.1),
    "ToyCar": Machine(109, 5, (1060, 2400, 4900), noise=0.9, stroke_s=0.31),
    "ToyConveyor": Machine(66, 8, (720, 1800, 4500), noise=1.1, stroke_s=0.86),
    "valve": Machine(160, 3, (1550, 3500, 6000), noise=1.1, stroke_s=0.55),
}
MACHINES = {
    machine_type: [1, 2, 3] if machine_type.startswith("Toy") else [0, 2, 4]
    for machine_type in TYPES
}
FORMS = ("2020", "2023")
FAULTS = (
    "slow",
    "loose",
    "worn",
    "dry",
)  # weak motor, loose housing, damaged bearing, more friction


class Clip(NamedTuple):
    machine_type: str
    machine_id: int
    split: str  # train, test
    label: str  # normal, anomaly
    number: int
    domain: str = ""  # source, target; none in the form of 2020

    @property
    def speed(self) -> int:
        """1 to 3, in the order of the IDs, or of the speeds of a section."""
        if self.domain:
            return 3 if self.domain == "target" else 1 + self.number % 2
        return 1 + MACHINES[self.machine_type].index(self.machine_id)

    @property
    def folder(self) -> str:
        return f"{self.machine_type}/{self.split}"

    @property
    def name(self) -> str:
        return f"{self.folder}/{self.name_with(f'{self.number:08d}', f'{self.number:04d}_spd_{self.speed}')}"

    @property
    def pattern(self) -> str:
        """The names of all such clips in the folder, whatever their number."""
        return self.name_with("[0-9]" * 8, "[0-9]" * 4 + "_spd_[1-3]")

    def name_with(self, number: str, number_and_speed: str) -> str:
        if self.domain:
            kind = f"{self.domain}_{self.split}_{self.label}"
            return f"section_{self.machine_id:02d}_{kind}_{number_and_speed}.wav"
        return f"{self.label}_id_{self.machine_id:02d}_{number}.wav"


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
    """An impulse wherever this rising curve passes a whole number, with the energy of 10 ms of
    noise of rms 1.
    """
    return np.sqrt(0.01 * RATE) * (np.diff(np.floor(count), prepend=np.floor(count[0])) > 0)


def machine_sound(clip: Clip, severity: dict[str, float], rng: np.random.Generator) -> np.ndarray:
    """The machine without its surroundings, with each of FAULTS in a severity from 0 to 1."""
    machine = TYPES[clip.machine_type]
    variant = clip.speed - 2
    speed = 1.09**variant * factor(rng, 0.012) * (1 - 0.15 * severity["slow"])
    tuning = 0.95**variant * (1 - 0.22 * severity["loose"])

    turns = rng.random() + speed * machine.shaft_hz * TIME
    # The exponential function makes harmonics of the cosine of the blades; the shaft modulates
    # them.
    tones = np.exp(6 * np.cos(2 * np.pi * machine.blades * turns) + 0.5 * np.cos(2 * np.pi * turns))
    sound = factor(rng, 0.15) * (tones - tones.mean()) / tones.std()
    sound += (
        factor(rng, 0.15) * machine.noise * (1 + 4 * severity["dry"]) * rng.normal(size=SAMPLES)
    )
    sound += (
        3 * severity["worn"] * impulses(3.6 * turns)
    )  # 3.6 balls pass the damage in one revolution
    if machine.stroke_s:
        strokes = rng.random() + speed / machine.stroke_s * TIME
        sound *= np.clip(
            5 * np.sin(2 * np.pi * strokes), 0.1, 1
        )  # moves in the first half of a stroke, then rests
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
    loudness = 1.5 if clip.domain == "target" else 1.0
    sound = (
        machine_sound(clip, severity, rng)
        + loudness * rng.uniform(0.4, 0.8) * factory / factory.std()
    )
    rms = np.clip(0.01 * factor(rng, 0.2), 0.005, 0.02)
    return np.clip(sound * rms / np.sqrt(np.mean(sound**2)), -1, 1)


def clips_of_set(form: str, train: int, test: int) -> list[Clip]:
    counts = {("train", "normal"): train, ("test", "normal"): test, ("test", "anomaly"): test}
    machines = [
        (machine_type, machine_id) for machine_type, ids in MACHINES.items() for machine_id in ids
    ]
    domains = [""]
    if form == "2023":
        machines, domains = [(machine_type, 0) for machine_type in MACHINES], ["source", "target"]
    return [
        Clip(*machine, *part, i, domain)
        for machine in machines
        for part, count in counts.items()
        for domain in domains
        for i in range(max(1, count // 8) if (part[0], domain) == ("train", "target") else count)
    ]


def write(clip: Clip, output: Path, seed: int) -> None:
    samples = np.round(32767 * synthesize(clip, seed)).astype("<i2")
    with wave.open(str(output / clip.name), "wb") as file:
        file.setparams((1, 2, RATE, SAMPLES, "NONE", ""))
        file.writeframes(samples.tobytes())


def make_set(output: Path, clips: list[Clip], seed: int) -> None:
    """Remove the clips of an earlier set, of whatever size and form, and write these."""
    for clip in [clip for form in FORMS for clip in clips_of_set(form, 1, 1)]:
        folder = output / clip.folder
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(clip.pattern):
            path.unlink()
    # Ctrl-C reaches the workers too: they leave the message to this process.
    with ProcessPoolExecutor(
        initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    ) as pool:
        written = pool.map(partial(write, output=output, seed=seed), clips, chunksize=4)
        for _ in tqdm(written, total=len(clips), unit="clip"):
            pass


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument(
        "--form", choices=FORMS, default="2020", help="year of the layout (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, help="default: datasets/synthetic, or datasets/synthetic_2023"
    )
    parser.add_argument(
        "--train", type=int, default=16, help="training clips per ID (default: %(default)s)"
    )
    parser.add_argument(
        "--test",
        type=int,
        default=8,
        help="test clips per ID, of each label (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=2023, help="default: %(default)s")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the clips of an earlier run"
    )
    options = parser.parse_args(arguments)
    output = options.output or Path(
        "datasets/synthetic" if options.form == "2020" else "datasets/synthetic_2023"
    )
    if min(options.train, options.test) < 1:
        raise UserError(f"--train {options.train} --test {options.test}: both must be at least 1")
    if options.form == "2023" and max(options.train, options.test) > 10_000:
        raise UserError(
            f"--train {options.train} --test {options.test}: names of 2023 have numbers of four digits"
        )
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is not a folder: choose another --output")

    clips = clips_of_set(options.form, options.train, options.test)
    mark = output / "synthetic.json"
    found = mark.read_text() if mark.is_file() else ""
    wanted = json.dumps(
        {"form": options.form, "train": options.train, "test": options.test, "seed": options.seed}
    )
    done = (
        found == wanted
        and not options.overwrite
        and all((output / clip.name).is_file() for clip in clips)
    )
    if not done:
        if output.is_dir() and not mark.is_file() and any(output.iterdir()):
            raise UserError(
                f"{output} holds files that were not made by this script: choose another --output"
            )
        if found not in ("", wanted) and not options.overwrite:  # empty: a set that was broken off
            raise UserError(
                f"{output} holds another set: choose another --output, or add --overwrite"
            )
        output.mkdir(parents=True, exist_ok=True)
        mark.write_text("")
        make_set(output, clips, options.seed)
        mark.write_text(wanted)
    print(
        f"{output}: {len(clips)} clips{', complete already' if done else ''}; next: "
        f"python train.py --data_root {shlex.quote(str(output))} --machines auto"
    )


if __name__ == "__main__":
    run_script(main)
