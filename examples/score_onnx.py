"""Normal or anomalous? Score a recording with a file that export.py has written.

    python score_onnx.py MODEL.onnx RECORDING.wav MACHINE_TYPE [MACHINE_ID]

Needs onnxruntime, numpy and soundfile. Prints the line of `eval.py --score`: file, machine, score, threshold, decision,
and where a longer recording is worst; without a machine ID, for that of the type which the recording fits best. Unlike
eval.py it does not notice a WAV file that is cut short.
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
wanted = [f"{int(word):02d}" if word.isdecimal() else word for word in machine_id]
candidates = [i for i, (name, own) in enumerate(machines) if name == machine_type and wanted in ([], [own])]
if not candidates:
    sys.exit(
        f"{model} knows no machine {machine_type} {' '.join(wanted)}; it knows {', '.join(map(' '.join, machines))}"
    )

# The scores of each window against each machine ID. Samples are rounded to 16 bits, as in training
windows = []
with soundfile.SoundFile(recording) as file:
    if file.samplerate != rate or file.frames == 0 or channel >= file.channels:
        sys.exit(f"{recording}: not a recording at {rate} Hz with a channel {channel} (sox IN.wav -r {rate} OUT.wav)")
    last = max(file.frames - length, 0)
    starts = [*range(0, last, hop), last]
    for start in starts:
        file.seek(start)
        audio = file.read(length, always_2d=True)[:, channel]
        if not np.isfinite(audio).all():
            sys.exit(f"{recording}: it holds NaN or infinite samples")
        samples = np.clip(np.round(audio * 32768), -32768, 32767).astype(np.float32) / 32768
        samples = np.resize(samples, (1, length))  # a short recording is repeated
        windows.append(session.run(["scores"], {"samples": samples})[0][0].astype(float))

# The score of the recording against each; of the machine IDs in question the lowest counts
of_recording = np.max(windows, axis=0) if about["over_windows"] == "max" else np.mean(windows, axis=0)
best = min(candidates, key=lambda i: of_recording[i])
score, of_windows, threshold = of_recording[best], np.array(windows)[:, best], thresholds[best]
line = [recording, " ".join(machines[best]), f"{score:.6g}", "-", "-"]
if threshold is not None:
    line[3:] = f"{threshold:.6g}", "anomalous" if score > threshold else "normal"
if len(starts) > 1:
    hundredths = round(100 * round(starts[of_windows.argmax()] / rate, 2))
    clock = f"{hundredths // 360000}:{hundredths // 6000 % 60:02d}:{hundredths % 6000 / 100:05.2f}".removesuffix(".00")
    count = "" if threshold is None else f", {(of_windows > threshold).sum()} of {len(starts)} windows anomalous"
    line.append(f"worst at {clock} ({of_windows.max():.6g}){count}")
print(*line, sep="\t")
