"""The model in a file from export.py, run by ONNX Runtime."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from alarms import AlarmRule
from audio import FULL_SCALE, Windows
from errors import UserError
from names import format_id

if TYPE_CHECKING:
    import onnxruntime


@dataclass(frozen=True)
class OnnxModel:
    """A model that scores windows, with what the file says about it.

    Attributes:
        path: The file.
        session: What runs it.
        machines: Machine type and ID, in the order of the scores.
        thresholds: By machine; None for one that has no threshold.
        windows: The windows of recordings that are scored.
        rule: What an alarm is.
        over_windows: How the scores of windows make that of a recording: mean or max.
    """

    path: str
    session: "onnxruntime.InferenceSession"
    machines: list[tuple[str, str]]
    thresholds: list[float | None]
    windows: Windows
    rule: AlarmRule
    over_windows: str

    def find_machines(self, machine_type: str, machine_id: str = "") -> list[int]:
        """Return the numbers of the machines of a type that have this ID; without one, of all.

        Raises:
            UserError: If there are none.
        """
        wanted = format_id(machine_id)
        numbers = [
            number
            for number, (known_type, known_id) in enumerate(self.machines)
            if known_type == machine_type and wanted in ("", known_id)
        ]
        if not numbers:
            known = ", ".join(" ".join(machine) for machine in self.machines)
            name = f"{machine_type} {machine_id}".strip()
            raise UserError(f"{self.path} has no machine {name}; use one of {known}")
        return numbers

    def score(self, samples: np.ndarray) -> np.ndarray:
        """Score a window, int16 `(N_SAMPLES,)`, against each machine `(machines,)`."""
        inputs = {"samples": samples[np.newaxis].astype(np.float32) / FULL_SCALE}
        scores = self.session.run(["scores"], inputs)[0]
        return np.asarray(scores)[0].astype(float)


def load_onnx(path: str, n_threads: int = 0) -> OnnxModel:
    """Load a file from export.py. `n_threads` is the number of threads; 0: one for each core.

    Raises:
        UserError: If it is not such a file, or if ONNX Runtime is not installed.
    """
    try:
        import onnxruntime  # takes a second on a small computer, in which sound already arrives
    except ImportError as error:
        raise UserError(f"onnxruntime is missing ({error}); pip install onnxruntime") from None

    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; name one from export.py")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        about = session.get_modelmeta().custom_metadata_map
        return OnnxModel(
            path,
            session,
            [
                (machine_type, machine_id)
                for machine_type, machine_id in json.loads(about["machines"])
            ],
            json.loads(about["thresholds"]),
            Windows(float(about["hop"]), int(about["channel"])),
            AlarmRule(int(about["alarm_windows"]), int(about["alarm_span"])),
            about["over_windows"],
        )
    except Exception as error:  # onnxruntime has a dozen kinds
        raise UserError(f"{path}: not a file that export.py has written ({error!r})") from None
