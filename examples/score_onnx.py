"""Normal or anomalous? Score a recording with a file that export.py has written.

    python score_onnx.py MODEL.onnx RECORDING MACHINE_TYPE [MACHINE_ID]

Needs onnxruntime, numpy and soundfile. Prints the line of `score.py`, up to the last digit: file,
machine, score, threshold, decision, and where a longer recording is worst. Without a machine ID,
that of the type counts which fits the recording best. Unlike score.py it does not resample, and
does not notice a WAV file that is cut short.
"""

import json
import sys

import numpy as np
import onnxruntime
import soundfile

Scores = tuple[np.ndarray, np.ndarray]


def score_windows(
    session: onnxruntime.InferenceSession, about: dict[str, str], recording: str
) -> Scores:
    """The seconds at which the windows start, and their scores against each machine ID `(windows,
    machines)`.
    """
    rate, channel = int(about["sample_rate"]), int(about["channel"])
    length, hop = (round(float(about[name]) * rate) for name in ("window", "hop"))
    scores = []
    with soundfile.SoundFile(recording) as file:
        if file.samplerate != rate:
            raise ValueError(
                f"its rate is {file.samplerate} Hz, not {rate}: sox IN.wav -r {rate} OUT.wav"
            )
        if file.frames == 0 or channel >= file.channels:
            raise ValueError(
                f"it has {file.frames} samples of {file.channels} channels; channel {channel} is needed"
            )
        last = max(file.frames - length, 0)
        starts = [*range(0, last, hop), last]
        for start in starts:
            file.seek(start)
            audio = file.read(length, always_2d=True)[:, channel]
            if not np.isfinite(audio).all():
                raise ValueError("it holds NaN or infinite samples")
            samples = (
                np.clip(np.round(audio * 32768), -32768, 32767) / 32768
            )  # 16 bits, as in training
            samples = np.resize(samples, (1, length)).astype(
                np.float32
            )  # a short recording is repeated
            scores.append(session.run(["scores"], {"samples": samples})[0][0].astype(float))
    return np.array(starts) / rate, np.array(scores)


def describe(
    starts: np.ndarray, scores: np.ndarray, threshold: float | None, rule: str
) -> tuple[float, list[str]]:
    """The score against one machine ID, and the cells of the line from the score on."""
    score = scores.max() if rule == "max" else scores.mean()
    cells = [f"{score:.6g}", "-", "-"]
    if threshold is not None:
        cells[1:] = f"{threshold:.6g}", "anomalous" if score > threshold else "normal"
    if len(scores) > 1:
        hundredths = round(100 * round(starts[scores.argmax()], 2))
        seconds = f"{hundredths % 6000 / 100:05.2f}".removesuffix(".00")
        worst = f"worst at {hundredths // 360000}:{hundredths // 6000 % 60:02d}:{seconds} ({scores.max():.6g})"
        count = (
            ""
            if threshold is None
            else f", {(scores > threshold).sum()} of {len(scores)} windows anomalous"
        )
        cells.append(worst + count)
    return score, cells


def main(model: str, recording: str, machine_type: str, machine_id: str = "") -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    machines, thresholds = json.loads(about["machines"]), json.loads(about["thresholds"])
    wanted = f"{int(machine_id):02d}" if machine_id.isdecimal() else machine_id
    columns = [
        i
        for i, (name, own) in enumerate(machines)
        if name == machine_type and (own == wanted or not wanted)
    ]
    if not columns:
        raise ValueError(
            f"{model} knows no such machine; it knows {', '.join(map(' '.join, machines))}"
        )
    starts, scores = score_windows(session, about, recording)
    described = [
        describe(starts, scores[:, i], thresholds[i], about["over_windows"]) for i in columns
    ]
    best = min(range(len(columns)), key=lambda i: described[i][0])
    print(recording, " ".join(machines[columns[best]]), *described[best][1], sep="\t")


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except Exception as error:  # onnxruntime and soundfile have kinds of their own
        sys.exit(f"error: {' '.join(sys.argv[1:])}: {str(error) or repr(error)}")
