"""benchmarks/seeds.py: it trains as train.py, evaluates as eval.py, and continues when stopped."""

import csv
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import CLASSES, MACHINES, train_in

import eval as eval_script
from benchmarks import seeds
from checkpoint import Checkpoint
from dataloader import load_clips
from evaluation.scores import KINDS

CPU = torch.device("cpu")
RECIPES = Path(__file__).parent.parent / "recipes"
KEYS = {
    "epoch": 2, "batch_size": 4, "split_ratio": 0.7, "input": "[sgram]", "mode": "arcmix",
    "seed": 3,
}  # fmt: skip


@pytest.mark.slow
def test_it_trains_and_measures_as_the_scripts_do(tmp_path, data_root, call):
    train_in(tmp_path, data_root, **KEYS)
    words = (tmp_path / "run.pth", "--data_root", data_root, "--device", "cpu")
    assert call(eval_script.main, *words)[0] == 0
    best = Checkpoint.load(tmp_path / "run.pth")
    config = best.config.model_copy(update={"save_path": str(tmp_path / "other.pth")})
    clips, test_clips = (
        load_clips(config, CLASSES, split, config.windows(split)) for split in ("train", "test")
    )
    clips.keep_on(CPU)
    test_clips.keep_on(CPU)
    trainer = seeds.train_run(config, CLASSES, CPU, clips)
    last = Checkpoint.load(tmp_path / "run.last.pth")
    columns = ["train_loss", "valid_loss", "train_accuracy"]
    assert pd.DataFrame(trainer.history)[columns].equals(pd.DataFrame(last.history)[columns])
    for name, value in best.weights.items():
        assert torch.equal(trainer.best.weights[name], value)
    row = seeds.measure_run(config, CLASSES, CPU, clips, test_clips)
    assert row["seed"] == 3
    assert (row["epoch"], row["loss"]) == (best.epoch, trainer.best_loss)
    with (tmp_path / "run" / "test" / "metrics.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    expected = {f"{line['machine_type']}/{line['machine_id']}": line for line in lines}
    for machine in ("fan/00", "fan/02", "valve/01"):
        for metric in ("AUC", "pAUC"):
            value = float(expected[machine][metric])
            assert row[f"published/{machine}/{metric}"] == pytest.approx(value)
    assert len([name for name in row if name.endswith("/AUC")]) == 3 * len(KINDS)
    assert not (tmp_path / "other.pth").exists()


def test_it_goes_on_where_it_was_stopped(tmp_path, data_root, call, fails, monkeypatch):
    measured = []

    def measure_run(config, *arguments):
        measured.append((config.mode, config.seed))
        auc = 0.5 + 0.1 * config.seed + 0.05 * (config.mode == "arcmix")
        row = {"seed": config.seed, "epoch": 1, "loss": 1.0, "seconds": 1.0}
        for kind in KINDS:
            row |= {f"{kind}/fan/00/AUC": auc, f"{kind}/fan/02/AUC": auc}
        return row

    monkeypatch.setattr(seeds, "measure_run", measure_run)
    options = [
        "--data_root", data_root, "--machines", MACHINES, "--device", "cpu",
        "--output", tmp_path, "--recipes", RECIPES / "arcmix.yaml", RECIPES / "arcface.yaml",
    ]  # fmt: skip
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
    message = "another configuration: epoch .was 300, is 7.; use the same"
    fails(seeds.main, *options, "--epoch", 7, match=message)
    fails(seeds.main, *options, "--seed", 1, match="command line: seed: use --seeds instead")
    message = "arcmix: init_from is not supported here"
    fails(seeds.main, *options, "--init_from", "other.pth", match=message)
    assert call(seeds.main, *options, RECIPES / "stgram.yaml", "--seeds", 1)[0] == 0
    assert measured[6:] == [("arcface", 1)], "a recipe that was added"
    about = tmp_path / "seeds.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"clips": "others"}))
    fails(seeds.main, *options, match="the finished runs had other clips")
    about.write_text("{")
    fails(seeds.main, *options, match="not both readable; remove them")
