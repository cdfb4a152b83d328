"""Normal or anomalous? Score a recording with a file that export.py has written.

    python score_onnx.py MODEL.onnx RECORDING.wav MACHINE_TYPE [MACHINE_ID]

Needs onnxruntime, numpy and soundfile. Prints the line of `eval.py --score`: file, machine, score, threshold, decision,
and where a longer recording is worst; without a machine ID, for that of the type which the recording fits best.
"""

import json
import sys

import numpy as np
import onnxruntime
import soundfile

if len(sys.argv) not in (4, 5):
    sys.exit(__doc__)
model, recording, machine_type, *machine_id = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
machines, thresholds = json.loads(about["machines"]), json.loads(about["thresholds"])
rate, channel = int(about["sample_rate"]), int(about["channel"])
length, hop = (round(float(about[name]) * rate) for name in ("window", "hop"))

# The samples of one channel, rounded to 16 bits as in training, in windows; a short recording is repeated
audio, its_rate = soundfile.read(recording, always_2d=True)
if its_rate != rate:
    sys.exit(f"{recording}: {its_rate} Hz, and the model takes {rate}: sox IN.wav -r {rate} OUT.wav")
samples = np.clip(np.round(audio[:, channel] * 32768), -32768, 32767).astype(np.float32) / 32768
samples = np.resize(samples, max(len(samples), length))
starts = [*range(0, len(samples) - length, hop), len(samples) - length]
windows = (samples[None, start : start + length] for start in starts)
scores = np.concatenate([session.run(["scores"], {"samples": window})[0] for window in windows]).astype(float)

# The score of the recording against each machine ID; of those in question the lowest counts
of_recording = scores.max(axis=0) if about["over_windows"] == "max" else scores.mean(axis=0)
wanted = [f"{int(word):02d}" if word.isdigit() else word for word in machine_id]
candidates = [i for i, (name, own) in enumerate(machines) if name == machine_type and wanted in ([], [own])]
if not candidates:
    sys.exit(f"{model} knows no machine {machine_type} {' '.join(wanted)}; it knows {machines}")
best = min(candidates, key=lambda i: of_recording[i])
score, of_windows, threshold = of_recording[best], scores[:, best], thresholds[best]
line = [recording, " ".join(machines[best]), f"{score:.6g}"]
if threshold is None:
    line += ["-", "-"]
else:
    line += [f"{threshold:.6g}", "anomalous" if score > threshold else "normal"]
if len(starts) > 1:
    hundredths = round(100 * starts[of_windows.argmax()] / rate)
    clock = f"{hundredths // 360000}:{hundredths // 6000 % 60:02d}:{hundredths % 6000 / 100:05.2f}".removesuffix(".00")
    count = "" if threshold is None else f", {(of_windows > threshold).sum()} of {len(starts)} windows anomalous"
    line.append(f"worst at {clock} ({of_windows.max():.6g}){count}")
print(*line, sep="\t")
