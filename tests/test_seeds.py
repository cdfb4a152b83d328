"""benchmarks/seeds.py: it trains as train.py does and measures as eval.py does, and goes on where
it was stopped.
"""

import csv
import json

import pandas as pd
import pytest
import torch
from conftest import MACHINES, train_in

import eval as eval_script
from benchmarks import seeds
from checkpoint import load_checkpoint
from config import load_config
from dataloader import load_clips

CPU = torch.device("cpu")
KEYS = {
    "epoch": 2,
    "batch_size": 4,
    "split_ratio": 0.7,
    "input": "[sgram]",
    "mode": "arcmix",
    "seed": 3,
}


@pytest.mark.slow
def test_it_trains_and_measures_as_the_scripts_do(tmp_path, data_root, call):
    train_in(tmp_path, data_root, **KEYS)
    assert (
        call(eval_script.main, tmp_path / "run.pth", "--data_root", data_root, "--device", "cpu")[0]
        == 0
    )
    state = load_checkpoint(tmp_path / "run.pth")
    config = load_config(**state["config"] | {"save_path": str(tmp_path / "other.pth")})
    clips, test = (load_clips(config, split) for split in ("train", "test"))
    clips.samples, test.samples = clips.read_all(CPU), test.read_all(CPU)
    run, best = seeds.train_run(config, CPU, clips)
    last = load_checkpoint(tmp_path / "run.last.pth")
    columns = ["train_loss", "valid_loss", "train_accuracy"]
    assert pd.DataFrame(run.history)[columns].equals(pd.DataFrame(last["history"])[columns])
    assert all(torch.equal(best["model"][name], value) for name, value in state["model"].items())
    row = seeds.measure_run(config, CPU, clips, test)
    assert (row["mode"], row["seed"], row["epoch"], row["loss"]) == (
        "arcmix",
        3,
        state["epoch"],
        state["best_loss"],
    )
    with (tmp_path / "run" / "test" / "metrics.csv").open(newline="") as file:
        expected = {
            (line["machine_type"], line["machine_id"]): line for line in csv.DictReader(file)
        }
    for machine in (("fan", "00"), ("fan", "02"), ("valve", "01")):
        for metric in ("AUC", "pAUC"):
            assert row[f"published/{'/'.join(machine)}/{metric}"] == pytest.approx(
                float(expected[machine][metric])
            )
    assert len([name for name in row if name.endswith("/AUC")]) == 9
    assert not (tmp_path / "other.pth").exists()


def test_it_goes_on_where_it_was_stopped(tmp_path, data_root, call, fails, monkeypatch):
    measured = []

    def measure_run(config, device, clips, test):
        measured.append((config.mode, config.seed))
        auc = 0.5 + 0.1 * config.seed + 0.05 * (config.mode == "arcmix")
        row = {"mode": config.mode, "seed": config.seed, "epoch": 1, "loss": 1.0, "seconds": 1.0}
        return row | {
            f"{kind}/fan/{name}/AUC": auc for kind in seeds.SCORINGS for name in ("00", "02")
        }

    monkeypatch.setattr(seeds, "measure_run", measure_run)
    options = [
        "--data_root",
        data_root,
        "--machines",
        MACHINES,
        "--device",
        "cpu",
        "--output",
        tmp_path,
    ]
    options += ["--modes", "arcmix", "arcface"]
    status, output, _ = call(seeds.main, *options, "--minutes", 0)
    assert (status, measured) == (0, [])
    assert "0 minutes are over" in output
    assert call(seeds.main, *options, "--seeds", 1)[0] == 0
    status, output, _ = call(seeds.main, *options, "--seeds", 3)
    assert status == 0
    assert measured == [(mode, seed) for seed in (1, 2, 3) for mode in ("arcmix", "arcface")]
    assert "| arcmix (n = 3) | 75.00 ± 10.00 |" in output
    assert "| arcmix minus arcface | +5.00 (+5.00 to +5.00) |" in output
    assert (tmp_path / "seeds.md").read_text() in output
    fails(
        seeds.main,
        *options,
        "--epoch",
        7,
        match="another configuration: epoch .was 300, is 7.; give the same",
    )
    fails(
        seeds.main,
        *options,
        "--seed",
        1,
        match="command line: seed: --modes, --seeds and --output choose",
    )
    about = tmp_path / "seeds.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"clips": "others"}))
    fails(seeds.main, *options, match="the finished runs had other clips")
    about.write_text("{")
    fails(seeds.main, *options, match="not both readable; remove them")
