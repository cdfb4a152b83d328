"""reproduce.py as a user runs it: what it trains, how it continues after a kill, its errors."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MACHINES, write_set

import reproduce
import train
from classes import Classes
from config import DEFAULT_CONFIG, Config, load_config
from locks import Lock

ROOT = Path(__file__).parent.parent


RECIPES = ROOT / "recipes"
MODES = ("noisy_arcmix", "arcmix", "arcface", "cross_entropy")


def planned(
    folder: Path, seeds: list[int], recipes=reproduce.RECIPES, files=(), **keys
) -> list[Config]:
    options = Namespace(config=list(files), seeds=seeds, recipes=recipes, output=folder)
    runs = reproduce.plan_runs(load_config(given=tuple(keys), **keys), options)
    assert [run.recipe for run in runs] == [*recipes] * len(set(seeds))
    return [run.config for run in runs]


def test_the_four_modes_are_planned_for_each_seed():
    runs = planned(Path("out"), [3, 1, 3], epoch=7)
    expected = [(seed, mode) for seed in (3, 1) for mode in MODES]
    assert [(run.seed, run.mode) for run in runs] == expected
    assert all(run.input == ["tgram", "sgram", "tagram"] and run.epoch == 7 for run in runs)
    assert str(runs[0].weights_path) == "out/noisy_arcmix_3.pth"


def test_every_combination_of_the_three_channels_is_a_recipe():
    inputs = [RECIPES / "noisy_arcmix.yaml", *sorted((RECIPES / "inputs").glob("*.yaml"))]
    runs = planned(Path("out"), [1], inputs)
    assert {run.mode for run in runs} == {"noisy_arcmix"}
    assert len({tuple(run.input) for run in runs}) == len(runs) == 7
    assert str(runs[-1].weights_path) == "out/tgram_1.pth"


def test_files_replace_values_of_recipes_and_the_command_line_both(tmp_path):
    (tmp_path / "my.yaml").write_text("batch_size: 8\nepoch: 9\n")
    recipes, files = [RECIPES / "stgram.yaml"], [tmp_path / "my.yaml"]
    (run,) = planned(Path("out"), [1], recipes, files, epoch=7)
    assert (run.weight_decay, run.batch_size, run.epoch) == (0, 8, 7)


def test_recordings_that_are_in_the_projects_folder_already_are_not_downloaded(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    config = load_config(data_root=str(tmp_path / "datasets"))
    classes = Classes.from_machines(config.machines)
    assert reproduce.should_download(config, classes)
    (tmp_path / "datasets" / "fan").mkdir(parents=True)
    assert not reproduce.should_download(config, classes)
    (tmp_path / "datasets" / ".download").mkdir()
    assert reproduce.should_download(config, classes), "download.py may not have finished"
    assert not reproduce.should_download(load_config(data_root=str(tmp_path)), classes)


@pytest.mark.parametrize("machines", [MACHINES, "auto"])
def test_which_scripts_are_called(machines, call, tmp_path, data_root, monkeypatch):
    """Recordings of the project's folder are downloaded first; every script gets the given keys."""
    calls = []
    monkeypatch.setattr(reproduce, "call", lambda *words: calls.append(words))
    monkeypatch.setattr(reproduce, "should_download", lambda config, classes: True)
    keys = ("--data_root", data_root, "--machines", machines, "--device", "cpu", "--batch_size", 2)
    file = tmp_path / "my.yaml"
    file.write_text("lr: 0.002\n")
    recipes = [RECIPES / "stgram.yaml", RECIPES / "os_scl.yaml"]
    options = ("--seeds", 7, "--recipes", *recipes, "--config", file, "--output", tmp_path)
    status, output, _ = call(reproduce.main, *keys, *options)
    assert status == 0
    assert "run 1 of 2, stgram_7: 600 epochs left\n" in output
    assert [words[0] for words in calls] == ["datasets/download.py", *["train.py"] * 2, "eval.py"]
    assert calls[0][1:] == ("--types", "fan", "valve")
    trained = []
    for words in calls[1:-1]:
        monkeypatch.setattr("sys.argv", list(words))
        config, resume, overwrite = train.parse_options("")
        expected = load_config(machines=machines).machines
        assert (config.batch_size, config.machines, config.device) == (2, expected, "cpu")
        assert config.lr == 0.002
        assert resume
        assert not overwrite
        trained.append(config)
    planned_runs = planned(tmp_path, [7], recipes)
    expected = [(run.mode, run.input, run.m, run.weight_average, 7) for run in planned_runs]
    of_runs = [(run.mode, run.input, run.m, run.weight_average, run.seed) for run in trained]
    assert of_runs == expected
    assert calls[-1][1:3] == tuple(str(run.weights_path) for run in trained)
    words = {"--plots", "--output", str(tmp_path), "--data_root", str(data_root), str(file)}
    assert words <= set(calls[-1])


def test_a_single_run_is_evaluated_without_a_comparison(call, tmp_path, data_root, monkeypatch):
    calls = []
    monkeypatch.setattr(reproduce, "call", lambda *words: calls.append(words))
    recipe = ("--recipes", RECIPES / "arcface.yaml", "--seeds", 1, "--output", tmp_path)
    keys = ("--data_root", data_root, "--machines", MACHINES)
    assert call(reproduce.main, *recipe, *keys)[0] == 0
    assert calls[-1][:2] == ("eval.py", str(tmp_path / "arcface_1.pth"))
    assert "--output" not in calls[-1]


def test_the_rest_is_estimated_from_the_epochs_that_were_timed(trained_copy):
    (trained_copy / "run" / "history.csv").write_text("epoch,seconds\n1,60.0\n")
    done, other = (
        reproduce.Run(DEFAULT_CONFIG, load_config(epoch=epochs, save_path=str(trained_copy / name)))
        for epochs, name in ((1, "run.pth"), (200, "other.pth"))
    )
    assert reproduce.describe_rest([other]) == "200 epochs left"
    assert reproduce.describe_rest([done, other]) == "200 epochs left, about 3.3 h"


def test_a_script_that_fails_or_is_killed(monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    (tmp_path / "fails.py").write_text("raise SystemExit(2)")
    (tmp_path / "dies.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(SystemExit, match="2"):
        reproduce.call("fails.py")
    message = r"dies.py was killed \(signal 9\); run the same command again"
    with pytest.raises(reproduce.UserError, match=message):
        reproduce.call("dies.py")


@pytest.mark.slow
def test_a_stop_reaches_the_script(tmp_path):
    """The caller alone receives SIGTERM; the script still ends first and cleans up."""
    (tmp_path / "long.py").write_text(
        "import signal, sys, time\n"
        "from pathlib import Path\n"
        "signal.signal(signal.SIGTERM, lambda *_: (Path('stopped').touch(), sys.exit(143)))\n"
        "Path('begun').touch()\n"
        "time.sleep(60)\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import reproduce; from pathlib import Path\n"
        "reproduce.ROOT = Path('.')\n"
        "reproduce.run_script(lambda: reproduce.call('long.py'))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 143
    assert (tmp_path / "stopped").exists()


def test_what_is_refused(trained, tmp_path, data_root, fails, monkeypatch):
    others = ("--output", tmp_path, "--machines", MACHINES)
    options = ("--data_root", data_root, *others)
    message = "command line: mode: the recipes choose it; leave it out"
    fails(reproduce.main, *options, "--mode", "arcface", match=message)
    recipe = RECIPES / "os_scl.yaml"
    message = r"os_scl.yaml: (mode|input): the recipes choose it"
    fails(reproduce.main, *options, "--config", recipe, match=message)
    own = tmp_path / "own.yaml"
    own.write_text("machines: {fan: [0]}\n")
    message = "own.yaml: machines is the same for all recipes; use --machines or --config"
    fails(reproduce.main, *options, "--recipes", own, match=message)
    same = tmp_path / "arcmix.yaml"
    same.write_text("mode: arcmix\n")
    message = "--recipes: two files are called arcmix; rename one"
    fails(reproduce.main, *options, "--recipes", same, RECIPES / same.name, match=message)
    message = "none.yaml: no such configuration file"
    fails(reproduce.main, *options, "--recipes", "none.yaml", match=message)
    fails(reproduce.main, *options, "--seeds", "-1", match="command line: seed: -1 is not")
    fails(reproduce.main, *others, "--data_root", tmp_path, match="no folder .*fan/train")
    shutil.copy(trained / "run.pth", tmp_path / "arcmix_1.pth")
    message = (
        r"arcmix_1.pth: the run to resume had another configuration: mode .* "
        r"choose another folder with --output"
    )
    fails(reproduce.main, *options, match=message)
    (tmp_path / "arcmix_1.pth").unlink()
    monkeypatch.setattr(reproduce, "RUN_BYTES", 10**15)
    fails(reproduce.main, *options, match="the disk is too small")


# ---- The whole ----


def start(folder: Path, data_root: Path, *words: object) -> subprocess.Popen:
    command = [
        sys.executable, ROOT / "reproduce.py", "--seeds", 1, 2, "--output", folder,
        "--data_root", data_root, "--machines", MACHINES,
        "--epoch", 2, "--batch_size", 4, "--device", "cpu", *words,
    ]  # fmt: skip
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_when(process: subprocess.Popen, is_time: Callable[[], bool]) -> None:
    """Kill the script and all processes that it has started."""
    while not is_time():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)


@pytest.mark.slow
def test_killed_twice_it_goes_on_to_the_report(tmp_path, data_root):
    """It is killed in the second run, after its first epoch, and in the evaluation."""
    data_root = write_set(tmp_path / "data", train_clips=20, test_clips=4)
    folder = tmp_path / "paper"
    kill_when(start(folder, data_root), (folder / "arcmix_1" / "history.csv").exists)
    assert not (folder / "arcface_1.pth").exists()
    finished = (folder / "noisy_arcmix_1.last.pth").stat().st_mtime_ns
    kill_when(start(folder, data_root), (folder / "arcmix_1" / "test" / "metrics.csv").exists)
    assert not (folder / "comparison.md").exists()
    process = start(folder, data_root)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    written = (folder / "noisy_arcmix_1.last.pth").stat().st_mtime_ns
    assert written == finished, "a finished run is not written again"
    assert "epoch 1/2" not in output
    assert "noisy_arcmix_1:" not in output
    for mode in MODES:
        for seed in (1, 2):
            lines = (folder / f"{mode}_{seed}" / "history.csv").read_text().splitlines()
            assert [line.split(",")[0] for line in lines] == ["epoch", "1", "2"]
    text = (folder / "comparison.md").read_text()
    assert all(f"| mode {mode} (n = 2) |" in text for mode in MODES)
    assert text.count(" minus ") == 6 * 3, "six pairs for fan, valve and their average"
    assert ", published |" not in text, "the published table has other machine IDs"
    assert "## fan, in percent" in text
    assert text.count("_1.pth |") == text.count("_2.pth |") == 4
    assert "](angles.png)" in text
    assert (folder / "angles.png").exists()


# ---- Several processes ----


@pytest.mark.slow
@pytest.mark.parametrize("kills_group", [True, False], ids=["with train.py", "alone"])
def test_several_processes_share_the_runs(kills_group, tmp_path, data_root):
    """Three at once, one of them through another path. One is killed in the middle of a run, with
    or without its train.py, and a fourth one comes later.
    """
    data_root = write_set(tmp_path / "data", train_clips=20, test_clips=4)
    folder, other_path = tmp_path / "paper", tmp_path / "link"
    folder.mkdir()
    other_path.symlink_to(folder)
    recipes = ("--recipes", RECIPES / "arcface.yaml", RECIPES / "cross_entropy.yaml")
    processes = [start(path, data_root, *recipes) for path in (folder, folder, other_path)]
    killed = processes[0]
    while (
        not (claims := [x for x in folder.glob(".*.claim") if Lock(x).lease.pid == killed.pid])
        or not (folder / claims[0].stem.removeprefix(".") / "history.csv").exists()
    ):
        assert killed.poll() is None, killed.stdout.read()
        time.sleep(0.02)
    (os.killpg if kills_group else os.kill)(killed.pid, signal.SIGKILL)
    killed.wait()  # until then it is a process that the others see
    processes.append(start(folder, data_root, *recipes))
    outputs = [process.communicate(timeout=900)[0] for process in processes[1:]]
    assert [process.returncode for process in processes[1:]] == [0, 0, 0], outputs
    for name in ("arcface_1", "arcface_2", "cross_entropy_1", "cross_entropy_2"):
        lines = (folder / name / "history.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in lines] == ["epoch", "1", "2"]
    begun = re.findall(r"run \d of 4, (\w+): ", "".join(outputs))
    first = claims[0].stem.removeprefix(".")
    assert len(set(begun)) == len(begun) >= 3, "no run is trained twice"
    assert (first in begun) == kills_group, "or its train.py has finished it"
    n_written = sum("another process has written it" in output for output in outputs)
    assert n_written == 2, "there is one report"
    assert [*folder.glob(".*")] == [], "no lock is left"
    assert (folder / "comparison.md").read_text().count(".pth |") == 4
