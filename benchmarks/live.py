"""Run examples/monitor.py on a day of sound, and compare it with score.py.

    python export.py check_points/rates_2023.pth --config docs/real_recordings.yaml \\
        --output check_points/rates_2023.onnx
    python benchmarks/live.py check_points/rates_2023.onnx check_points/rates_2023.pth slider 00 \\
        --data_root FOLDER --output check_points/live
    python benchmarks/live.py ... --hours 0.5 --real_time 10

The day consists of normal test clips of the machine in random order, with faults of FAULTS seconds
of anomalous ones. Written to the folder of --output are the day, day.wav, and the lines of the
monitor, day.jsonl. Printed are

- speed and memory of the monitor, which has one core, with the day in a pipe at full speed
- whether a window is missing, and the largest difference to the scores of score.py
- alarms, and false alarms outside the faults, with the rule in the file and with others
- with --real_time, the same for so many minutes of the day at the speed of a microphone, and how
  long after its end a window was printed
"""
