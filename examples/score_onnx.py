"""Score a recording with a file from export.py, and decide whether it is anomalous.

    python score_onnx.py MODEL.onnx RECORDING MACHINE_TYPE [MACHINE_ID]

Requires onnxruntime, numpy and soundfile. Prints the same line as score.py, except for the last
digit of the scores: file, machine, score, threshold, decision, and for a longer recording the
window with the highest score. Without a machine ID, the ID with the lowest score is used. Unlike
score.py, it does not resample and does not detect truncated WAV files.
"""

import json
import re
import sys

import numpy as np
import onnxruntime
import soundfile


def score_windows(
    session: onnxruntime.InferenceSession, about: dict[str, str], recording: str
) -> tuple[np.ndarray, np.ndarray]:
    """Score each window of a recording against each machine ID.

    `about` is the metadata of the model's file. Returns the seconds at which the windows start
    `(windows,)` and the scores `(windows, machines)`.
    """
    rate, channel = int(about["sample_rate"]), int(about["channel"])
    length = round(float(about["window"]) * rate)
    hop = round(float(about["hop"]) * rate)
    scores = []
    with soundfile.SoundFile(recording) as file:
        check_properties(file, rate, channel)
        last = max(file.frames - length, 0)
        starts = [*range(0, last, hop), last]
        for start in starts:
            file.seek(start)
            samples = convert(file.read(length, always_2d=True)[:, channel], length)
            scores.append(session.run(["scores"], {"samples": samples})[0][0].astype(float))
    return np.array(starts) / rate, np.array(scores)


def check_properties(file: soundfile.SoundFile, rate: int, channel: int) -> None:
    """Raise `ValueError` if the model cannot score the recording."""
    if file.samplerate != rate:
        raise ValueError(
            f"its sample rate is {file.samplerate} Hz, not {rate} Hz; convert it with sox IN.wav "
            f"-r {rate} OUT.wav"
        )
    if file.frames == 0 or channel >= file.channels:
        raise ValueError(
            f"it has {file.frames} samples in {file.channels} channels, but channel {channel} is "
            "needed; use another recording"
        )


def convert(samples: np.ndarray, length: int) -> np.ndarray:
    """Round samples to 16 bits, as in training, and repeat a short recording up to the length.

    Returns float32 `(1, length)`.
    """
    if not np.isfinite(samples).all():
        raise ValueError("it contains NaN or infinite samples; use another recording")
    rounded = np.clip(np.round(samples * 32768), -32768, 32767) / 32768
    return np.resize(rounded, (1, length)).astype(np.float32)


def format_time(seconds: float) -> str:
    """Format seconds as h:mm:ss, with hundredths unless they are 0."""
    hundredths = round(100 * round(seconds, 2))
    hours, rest = divmod(hundredths, 360_000)
    minutes, rest = divmod(rest, 6_000)
    return f"{hours}:{minutes:02d}:{rest / 100:05.2f}".removesuffix(".00")


def describe_worst(starts: np.ndarray, scores: np.ndarray, threshold: float | None) -> str:
    """Describe the window with the highest score, and count the anomalous windows."""
    worst = f"worst at {format_time(starts[scores.argmax()])} ({scores.max():.6g})"
    if threshold is None:
        return worst
    return f"{worst}, {(scores > threshold).sum()} of {len(scores)} windows anomalous"


def main(model: str, recording: str, machine_type: str, machine_id: str = "") -> None:
    """Score a recording, and print a line."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    machines, thresholds = json.loads(about["machines"]), json.loads(about["thresholds"])
    if re.fullmatch("[0-9]{1,9}", machine_id):
        machine_id = f"{int(machine_id):02d}"
    columns = []
    for column, (known_type, known_id) in enumerate(machines):
        if known_type == machine_type and machine_id in ("", known_id):
            columns.append(column)
    if not columns:
        known = ", ".join(" ".join(machine) for machine in machines)
        raise ValueError(f"{model} was not trained on this machine; use one of {known}")

    starts, window_scores = score_windows(session, about, recording)
    rule = np.max if about["over_windows"] == "max" else np.mean
    scores = {column: rule(window_scores[:, column]) for column in columns}
    best = min(columns, key=lambda column: scores[column])
    threshold = thresholds[best]
    cells = [recording, " ".join(machines[best]), f"{scores[best]:.6g}"]
    if threshold is None:
        cells += ["-", "-"]
    else:
        decision = "anomalous" if scores[best] > threshold else "normal"
        cells += [f"{threshold:.6g}", decision]
    if len(starts) > 1:
        cells.append(describe_worst(starts, window_scores[:, best], threshold))
    print(*cells, sep="\t")


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except Exception as error:  # also the exceptions of onnxruntime and soundfile
        sys.exit(f"error: {' '.join(sys.argv[1:])}: {str(error) or repr(error)}")
