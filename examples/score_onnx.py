"""Score a recording with a file from export.py, and decide whether it is anomalous.

    python score_onnx.py MODEL.onnx RECORDING MACHINE_TYPE [MACHINE_ID]

Prints the same line as score.py, except for the last digit of the scores: file, machine, score,
threshold, decision, and for a longer recording its alarms and the window with the highest score.
Without a machine ID, the ID with the lowest score is used.

Requires onnxruntime, numpy, soundfile and, for recordings at another sample rate than 16 kHz, soxr;
and of this project alarms.py, audio.py, formats.py, names.py and errors.py, which may also lie
beside this file. They read recordings as training does, and refuse the same ones.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from alarms import Alarm, AlarmRule, describe_windows, find_alarms
from audio import N_SAMPLES, Windows, check_recording, read_recording
from errors import UserError
from names import format_id


def score_windows(
    session: onnxruntime.InferenceSession, about: Mapping[str, str], recording: Path
) -> tuple[list[float], np.ndarray]:
    """Score each window of a recording against each machine ID.

    `about` is the metadata of the model's file. Returns the seconds at which the windows start
    `(windows,)` and the scores `(windows, machines)`. A notice says how samples are changed.
    """
    windows = Windows(float(about["hop"]), int(about["channel"]))
    checked = check_recording(recording, windows)
    for change in checked.changes:
        print(f"notice: its samples {change}", file=sys.stderr)
    if checked.n_clipped:
        print(f"notice: {checked.n_clipped} samples are clipped", file=sys.stderr)
    scores = []
    samples = np.empty(N_SAMPLES, dtype=np.int16)
    for start in checked.starts:
        read_recording(recording, samples, start, windows.channel)
        inputs = {"samples": samples[np.newaxis].astype(np.float32) / 32768}
        scores.append(session.run(["scores"], inputs)[0][0].astype(float))
    return checked.starts, np.array(scores)


def main(model: str, recording: str, machine_type: str, machine_id: str = "") -> None:
    """Score a recording, and print a line."""
    try:
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        about = session.get_modelmeta().custom_metadata_map
        machines, thresholds = json.loads(about["machines"]), json.loads(about["thresholds"])
        rule = AlarmRule(int(about["alarm_windows"]), int(about["alarm_span"]))
    except Exception as error:  # onnxruntime has a dozen kinds
        raise UserError(f"{model}: not a file that export.py has written ({error!r})") from None
    columns = []
    for column, (known_type, known_id) in enumerate(machines):
        if known_type == machine_type and format_id(machine_id) in ("", known_id):
            columns.append(column)
    if not columns:
        known = ", ".join(" ".join(machine) for machine in machines)
        raise UserError(f"{model} was not trained on this machine; use one of {known}")

    try:
        starts, window_scores = score_windows(session, about, Path(recording))
    except UserError as error:
        raise UserError(f"{recording}: {str(error).removeprefix(f'{recording}: ')}") from None
    combine = np.max if about["over_windows"] == "max" else np.mean
    scores = {column: combine(window_scores[:, column]) for column in columns}
    best = min(columns, key=lambda column: scores[column])
    threshold, of_windows = thresholds[best], window_scores[:, best]
    cells = [recording, " ".join(machines[best]), f"{scores[best]:.6g}"]
    alarms: list[Alarm] = []
    if threshold is None:
        cells += ["-", "-"]
    else:
        alarms = find_alarms(starts, of_windows, threshold, rule)
        cells += [f"{threshold:.6g}", "anomalous" if alarms else "normal"]
    if len(starts) > 1:
        cells.append(describe_windows(starts, of_windows, threshold, alarms))
    print(*cells, sep="\t")


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        main(*sys.argv[1:])
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
