"""Score the recordings in a folder that are not in a log yet, and add them to the log.

    python examples/score_new.py inbox log.jsonl check_points/press.pth \\
        --config press.yaml --machine_type press --machine_id line-3

Call it every few minutes, for instance with cron. After folder and log come the arguments of
score.py, without recordings: a checkpoint or --normal FOLDER, and options. The log has a line of
JSON for each recording, as from `score.py --json`, with `time`. Files that were changed in the last
minute may still be written, and wait for the next call. Anomalous recordings are printed, with what
differs, and so are those that cannot be read; the exit status is 2 then. They are not tried again
unless their lines are removed from the log.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from names import list_audio

ROOT = Path(__file__).resolve().parent.parent
WAIT = 60  # seconds since the last change of a file


def main() -> int:
    if len(sys.argv) < 4:
        print(__doc__, file=sys.stderr)
        return 2
    folder, log, *arguments = sys.argv[1:]
    if not Path(folder).is_dir():
        print(f"error: {folder}: not a folder; name the one with new recordings", file=sys.stderr)
        return 2
    files = find_new(Path(folder).absolute(), Path(log))
    if not files:
        return 0
    command = [sys.executable, str(ROOT / "score.py"), *arguments, *files, "--json"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if not result.stdout:  # score.py has said why
        return result.returncode
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    with Path(log).open("a") as file:
        for row in json.loads(result.stdout):
            file.write(json.dumps({"time": now} | row) + "\n")
            if "error" in row:
                print(f"{row['file']}: error: {row['error']}")
            elif row["decision"] == "anomalous":
                difference = row["difference"] or {"text": ""}
                print(f"{row['file']}: anomalous, {difference['text']}")
    return result.returncode


def find_new(folder: Path, log: Path) -> list[str]:
    """Return the recordings in a folder that are complete and not in the log, by name."""
    known = set()
    if log.exists():
        known = {json.loads(line)["file"] for line in log.read_text().splitlines()}
    files = []
    for path in list_audio(folder):
        is_complete = time.time() - path.stat().st_mtime > WAIT
        if is_complete and str(path) not in known:
            files.append(str(path))
    return files


if __name__ == "__main__":
    sys.exit(main())
