"""Score a recording with a file from export.py, and decide whether it is anomalous.

    python score_onnx.py MODEL.onnx RECORDING MACHINE_TYPE [MACHINE_ID]

Prints the same line as score.py, except for the last digit of the scores: file, machine, score,
threshold, decision, and for a longer recording its alarms and the window with the highest score.
Without a machine ID, the ID with the lowest score is used.

Requires onnxruntime, numpy, soundfile and, for recordings at another sample rate than 16 kHz, soxr;
and of this project live/model.py, alarms.py, audio.py, formats.py, names.py and errors.py, which
may also lie beside this file. They read recordings as training does, and refuse the same ones.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from alarms import Alarm, describe_windows, find_alarms
from audio import N_SAMPLES, check_recording, read_recording
from errors import UserError
from live.model import OnnxModel, load_onnx


def score_windows(model: OnnxModel, recording: Path) -> tuple[list[float], np.ndarray]:
    """Score each window of a recording against each machine ID.

    Returns the seconds at which the windows start `(windows,)` and the scores
    `(windows, machines)`. A notice says how samples are changed.
    """
    checked = check_recording(recording, model.windows)
    for change in checked.changes:
        print(f"notice: its samples {change}", file=sys.stderr)
    if checked.n_clipped:
        print(f"notice: {checked.n_clipped} samples are clipped", file=sys.stderr)
    scores = []
    samples = np.empty(N_SAMPLES, dtype=np.int16)
    for start in checked.starts:
        read_recording(recording, samples, start, model.windows.channel)
        scores.append(model.score(samples))
    return checked.starts, np.array(scores)


def main(path: str, recording: str, machine_type: str, machine_id: str = "") -> None:
    """Score a recording, and print a line."""
    model = load_onnx(path)
    columns = model.find_machines(machine_type, machine_id)
    try:
        starts, window_scores = score_windows(model, Path(recording))
    except UserError as error:
        raise UserError(f"{recording}: {str(error).removeprefix(f'{recording}: ')}") from None
    combine = np.max if model.over_windows == "max" else np.mean
    scores = {column: combine(window_scores[:, column]) for column in columns}
    best = min(columns, key=lambda column: scores[column])
    threshold, of_windows = model.thresholds[best], window_scores[:, best]
    cells = [recording, " ".join(model.machines[best]), f"{scores[best]:.6g}"]
    alarms: list[Alarm] = []
    if threshold is None:
        cells += ["-", "-"]
    else:
        alarms = find_alarms(starts, of_windows, threshold, model.rule)
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
