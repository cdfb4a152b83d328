"""examples/score_new.py: the new recordings of a folder, every day."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tone, write_clip
from test_without_network import hum

from examples import score_new

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_each_recording_is_logged_once(tmp_path):
    for number in range(12):
        write_clip(tmp_path / "normal" / f"{number}.wav", hum(number))
    inbox = tmp_path / "inbox"
    good, faulty = write_clip(inbox / "a.wav", hum(60)), write_clip(inbox / "b.wav", tone(1))
    bad = inbox / "c.flac"
    bad.write_text("not audio")
    for path in (good, faulty, bad):
        os.utime(path, (0, 0))
    (inbox / "notes.txt").touch()
    unfinished = write_clip(inbox / "d.wav", hum(61))
    log = tmp_path / "log.jsonl"
    words = (inbox, log, "--normal", tmp_path / "normal", "--device", "cpu")
    command = [sys.executable, ROOT / "examples" / "score_new.py", *words]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2, "of the file that is no recording"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["file"] for row in rows] == [str(good), str(faulty), str(bad)]
    assert [row.get("decision") for row in rows] == ["normal", "anomalous", None]
    assert rows[2]["error"].startswith("unreadable")
    assert result.stdout.splitlines() == [
        f"{faulty}: anomalous, {rows[1]['difference']['text']}",
        f"{bad}: error: {rows[2]['error']}",
    ]
    assert score_new.find_new(inbox, log) == []
    os.utime(unfinished, (0, 0))
    assert score_new.find_new(inbox, log) == [str(unfinished)]
