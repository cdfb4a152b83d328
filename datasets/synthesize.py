"""Synthesize a small set of machine sounds, in the layout of DCASE 2020 Task 2 or of 2023.

    # 576 recordings, 185 MB, in datasets/synthetic
    python datasets/synthesize.py
    # other recordings of the same machines instead
    python datasets/synthesize.py --seed 7 --overwrite
    # more recordings; the earlier ones stay the same
    python datasets/synthesize.py --train 64 --overwrite
    # sections and domains, in datasets/synthetic_2023
    python datasets/synthesize.py --form 2023

A recording is a clip of 10 s (16 kHz, mono, 16-bit PCM) in the file
OUTPUT/<type>/{train,test}/{normal,anomaly}_id_XX_NNNNNNNN.wav. There are six machine types with
three IDs each. Each ID has --train normal recordings for training, and --test normal and --test
anomalous recordings for testing. A recording depends only on the seed and its name. The set shows
that the code works; it says nothing about real machines.

In the form of 2023, a machine type has one section with two domains, and a recording is
OUTPUT/<type>/{train,test}/
section_00_{source,target}_{train,test}_{normal,anomaly}_NNNN_spd_<speed>.wav. In the source domain
the machine runs at two speeds; in the target domain it runs at a third speed, in a louder factory.
--train is the number of training recordings of the source domain; the target domain has an eighth
of it. --test is the number of test recordings of each label in each domain.

The sound of a machine is the sum of the tones of its shaft, broadband noise, and knocks if it moves
in strokes, filtered by the resonances of its housing. The noise of a factory is added. The IDs of a
type differ in speed and resonances. Speed, resonances and levels vary slightly between the normal
recordings of an ID. An anomalous recording has one of FAULTS.

OUTPUT/synthetic.json describes the set; it is empty until the last recording is written. A folder
that already contains the requested set is not changed, and an interrupted set is written again. A
folder without synthetic.json is used only if it is empty.
"""

import argparse
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

from command_line import OneLineParser
from errors import UserError, explain
from locks import lock
from utils import run_script

RATE = 16000  # Hz
SAMPLES = 10 * RATE
TIME = np.arange(SAMPLES) / RATE  # s
FREQUENCY = np.fft.rfftfreq(SAMPLES, 1 / RATE)  # Hz


class MachineType(NamedTuple):
    """The properties of a machine type that determine its sound."""

    shaft_hz: float  # revolutions per second
    blades: int  # or vanes or gear teeth that pass in one revolution
    resonances_hz: tuple[float, float, float]  # of the housing
    noise: float  # level of the noise of air, water or friction, relative to the level of the tones
    stroke_s: float | None = None  # from one stroke to the next; None: it only rotates


TYPES = {
    "fan": MachineType(27, 7, (400, 1400, 3300), noise=1.8),
    "pump": MachineType(48, 5, (640, 1550, 4300), noise=1.1),
    "slider": MachineType(39, 9, (850, 2600, 5300), noise=1.1, stroke_s=1.1),
    "ToyCar": MachineType(109, 5, (1060, 2400, 4900), noise=0.9, stroke_s=0.31),
    "ToyConveyor": MachineType(66, 8, (720, 1800, 4500), noise=1.1, stroke_s=0.86),
    "valve": MachineType(160, 3, (1550, 3500, 6000), noise=1.1, stroke_s=0.55),
}
MACHINES = {
    machine_type: [1, 2, 3] if machine_type.startswith("Toy") else [0, 2, 4]
    for machine_type in TYPES
}
FORMS = ("2020", "2023")
# A weak motor, a loose housing, a damaged bearing, more friction.
FAULTS = ("slow", "loose", "worn", "dry")
MARKER = "synthetic.json"
LOCK = ".lock"


class Clip(NamedTuple):
    """The properties of a clip, from which its name is made."""

    machine_type: str
    machine_id: int
    split: str  # train, test
    label: str  # normal, anomaly
    number: int
    domain: str = ""  # source, target; empty in the form of 2020

    @property
    def speed(self) -> int:
        """Speed from 1 to 3: of the ID, or in the form of 2023 of the clip."""
        if self.domain == "target":
            return 3
        if self.domain == "source":
            return 1 + self.number % 2
        return 1 + MACHINES[self.machine_type].index(self.machine_id)

    @property
    def folder(self) -> str:
        return f"{self.machine_type}/{self.split}"

    @property
    def name(self) -> str:
        """Path below the folder of the set."""
        digits = 4 if self.domain else 8
        return f"{self.folder}/{self.format_name(f'{self.number:0{digits}d}', str(self.speed))}"

    @property
    def pattern(self) -> str:
        """Pattern of the names of such clips in the folder, with any number and speed."""
        digits = 4 if self.domain else 8
        return self.format_name("[0-9]" * digits, "[1-3]")

    def format_name(self, number: str, speed: str) -> str:
        if self.domain:
            kind = f"{self.domain}_{self.split}_{self.label}"
            return f"section_{self.machine_id:02d}_{kind}_{number}_spd_{speed}.wav"
        return f"{self.label}_id_{self.machine_id:02d}_{number}.wav"


# ---- Sounds ----


def random_factor(rng: np.random.Generator, deviation: float) -> float:
    """Draw a factor near 1, with this standard deviation of its logarithm."""
    return float(np.exp(deviation * rng.normal()))


def resonance_response(peak_hz: float) -> np.ndarray:
    """Return the response at FREQUENCY of a damped resonator, 1 at its peak."""
    band = 1j * FREQUENCY * peak_hz / 8
    return band / (peak_hz**2 - FREQUENCY**2 + band)


def filter_sound(sound: np.ndarray, response: np.ndarray) -> np.ndarray:
    return np.fft.irfft(np.fft.rfft(sound) * response, SAMPLES)


def make_impulses(count: np.ndarray) -> np.ndarray:
    """Return an impulse at each sample at which `count`, a rising curve, passes a whole number.

    An impulse has the energy of 10 ms of noise with an rms value of 1.
    """
    is_passing = np.diff(np.floor(count), prepend=np.floor(count[0])) > 0
    return np.sqrt(0.01 * RATE) * is_passing


def machine_sound(clip: Clip, severity: dict[str, float], rng: np.random.Generator) -> np.ndarray:
    """Return the sound of the machine alone. Each of FAULTS has a severity from 0 to 1."""
    machine = TYPES[clip.machine_type]
    variant = clip.speed - 2
    speed = 1.09**variant * random_factor(rng, 0.012) * (1 - 0.15 * severity["slow"])
    tuning = 0.95**variant * (1 - 0.22 * severity["loose"])

    turns = rng.random() + speed * machine.shaft_hz * TIME
    # The exponential function adds harmonics to the cosine of the blades. The shaft modulates them.
    tones = np.exp(6 * np.cos(2 * np.pi * machine.blades * turns) + 0.5 * np.cos(2 * np.pi * turns))
    sound = random_factor(rng, 0.15) * (tones - tones.mean()) / tones.std()
    noise_level = random_factor(rng, 0.15) * machine.noise * (1 + 4 * severity["dry"])
    sound += noise_level * rng.normal(size=SAMPLES)
    # 3.6 balls of the bearing pass the damage in one revolution.
    sound += 3 * severity["worn"] * make_impulses(3.6 * turns)
    if machine.stroke_s:
        strokes = rng.random() + speed / machine.stroke_s * TIME
        # It moves in the first half of a stroke, then rests.
        sound *= np.clip(5 * np.sin(2 * np.pi * strokes), 0.1, 1)
        sound += 3 * random_factor(rng, 0.15) * make_impulses(strokes)

    peaks_hz = [peak_hz * tuning * random_factor(rng, 0.012) for peak_hz in machine.resonances_hz]
    responses = [random_factor(rng, 0.15) * resonance_response(peak_hz) for peak_hz in peaks_hz]
    return filter_sound(sound, 0.15 + np.sum(responses, axis=0))


def synthesize(clip: Clip, seed: int) -> np.ndarray:
    """Return the samples of a clip, within ±1."""
    rng = np.random.default_rng(list(f"{seed} {clip.name}".encode()))
    severity = dict.fromkeys(FAULTS, 0.0)
    if clip.label == "anomaly":
        severity[FAULTS[clip.number % len(FAULTS)]] = rng.uniform(0.3, 1)
    noise = rng.normal(size=SAMPLES)
    factory = filter_sound(noise, np.maximum(FREQUENCY, 50) ** rng.uniform(-1, -0.7))
    loudness = 1.5 if clip.domain == "target" else 1.0
    sound = machine_sound(clip, severity, rng)
    sound = sound + loudness * rng.uniform(0.4, 0.8) * factory / factory.std()
    rms = np.clip(0.01 * random_factor(rng, 0.2), 0.005, 0.02)
    return np.clip(sound * rms / np.sqrt(np.mean(sound**2)), -1, 1)


# ---- The set ----


def list_clips(form: str, train: int, test: int) -> list[Clip]:
    """List the clips of a set, for the options --form, --train and --test."""
    if form == "2020":
        machines = MACHINES
        groups = [
            ("train", "normal", "", train),
            ("test", "normal", "", test),
            ("test", "anomaly", "", test),
        ]
    else:
        machines = {machine_type: [0] for machine_type in MACHINES}
        groups = [
            ("train", "normal", "source", train),
            ("train", "normal", "target", max(1, train // 8)),
            ("test", "normal", "source", test),
            ("test", "normal", "target", test),
            ("test", "anomaly", "source", test),
            ("test", "anomaly", "target", test),
        ]
    clips = []
    for machine_type, machine_ids in machines.items():
        for machine_id in machine_ids:
            for split, label, domain, count in groups:
                for number in range(count):
                    clips.append(Clip(machine_type, machine_id, split, label, number, domain))
    return clips


def write_clip(clip: Clip, output: Path, seed: int) -> None:
    samples, path = np.round(32767 * synthesize(clip, seed)).astype("<i2"), output / clip.name
    try:
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, RATE, SAMPLES, "NONE", ""))
            file.writeframes(samples.tobytes())
    except OSError as error:
        raise UserError(explain(error, path)) from None


def remove_clips(output: Path) -> None:
    """Remove the clips of an earlier set of any size and form, and make the folders."""
    for form in FORMS:
        for clip in list_clips(form, train=1, test=1):
            folder = output / clip.folder
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob(clip.pattern):
                path.unlink(missing_ok=True)  # another process may do the same


def write_clips(output: Path, clips: list[Clip], seed: int) -> None:
    """Write the clips with several processes."""
    # The workers ignore Ctrl-C, which reaches them too: this process alone prints the message.
    with ProcessPoolExecutor(
        initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    ) as pool:
        written = pool.map(partial(write_clip, output=output, seed=seed), clips, chunksize=4)
        for _ in tqdm(written, total=len(clips), unit="clip"):
            pass


def write_set(output: Path, clips: list[Clip], seed: int, description: str) -> None:
    """Write all clips in place of earlier ones, and the marker at the end."""
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).write_text("")
    remove_clips(output)
    write_clips(output, clips, seed)
    (output / MARKER).write_text(description)


def read_marker(output: Path) -> str | None:
    """Read the description of the set in a folder.

    Returns an empty string for an interrupted set, and None if there is no set.
    """
    marker = output / MARKER
    return marker.read_text() if marker.is_file() else None


def check_output(output: Path, description: str, overwrite: bool) -> None:
    """Raise `UserError` if a folder contains other files or another set."""
    existing = read_marker(output)
    others = [path for path in output.iterdir() if path.name != LOCK] if output.is_dir() else []
    if existing is None and others:
        raise UserError(
            f"{output} contains files that this script did not write; choose another --output"
        )
    if existing and existing != description and not overwrite:
        raise UserError(
            f"{output} contains another set; choose another --output, or replace it with "
            "--overwrite"
        )


def main(arguments: list[str] | None = None) -> None:
    """Write the set that the command line describes, unless the folder already contains it."""
    options = parse_options(arguments)
    output, seed = options.output, options.seed
    clips = list_clips(options.form, options.train, options.test)
    description = json.dumps(
        {"form": options.form, "train": options.train, "test": options.test, "seed": seed}
    )

    def is_complete() -> bool:
        has_all = all((output / clip.name).is_file() for clip in clips)
        return not options.overwrite and read_marker(output) == description and has_all

    state = ", already complete"
    if not is_complete():
        with lock(output / LOCK, waits=True):
            if not is_complete():  # another process may have written it
                check_output(output, description, options.overwrite)
                write_set(output, clips, seed, description)
                state = ""
    command = f"python train.py --data_root {shlex.quote(str(output))} --machines auto"
    print(f"{output}: {len(clips)} recordings{state}; next: {command}")


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__)
    add = parser.add_argument
    add("--form", choices=FORMS, default="2020", help="year of the layout (default: %(default)s)")
    add(
        "--output",
        type=Path,
        help="folder to write to (default: datasets/synthetic, or datasets/synthetic_2023)",
    )
    add("--train", type=int, default=16, help="training recordings per ID (default: %(default)s)")
    add(
        "--test",
        type=int,
        default=8,
        help="test recordings per ID and label (default: %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=2023,
        help="random seed of the recordings (default: %(default)s)",
    )
    add("--overwrite", action="store_true", help="replace the set of an earlier run")
    options = parser.parse_args(arguments)
    if options.output is None:
        name = "synthetic" if options.form == "2020" else "synthetic_2023"
        options.output = Path("datasets") / name
    counts = f"--train {options.train} --test {options.test}"
    if min(options.train, options.test) < 1:
        raise UserError(f"{counts}: both must be at least 1")
    if options.form == "2023" and max(options.train, options.test) > 10_000:
        raise UserError(f"{counts}: file names of 2023 have four digits; use at most 10000")
    if options.output.exists() and not options.output.is_dir():
        raise UserError(f"{options.output} is not a folder; choose another --output")
    return options


if __name__ == "__main__":
    run_script(main)
