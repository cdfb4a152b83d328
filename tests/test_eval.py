"""eval.py as a user calls it: what it writes, which configuration counts, how it fails."""

import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from conftest import (
    CLASSES,
    MACHINES,
    arguments,
    change_checkpoint,
    copy_test_clips,
    remove_bank,
    tone,
    train_in,
    write_clip,
    write_sections,
    write_set,
)
from evaluated import read_csv
from sklearn.metrics import roc_auc_score

import eval as eval_script
import score as score_script
import train as train_script
from checkpoint import Checkpoint
from classes import Classes
from config import load_config
from dataloader import load_clips
from evaluation import tables
from evaluation.scores import StoredClips
from inference import build_network, load_model, run_model, with_bank
from locks import lock
from losses import Objective
from model import TASTgramMFN

ROOT = Path(__file__).resolve().parent.parent


def evaluate(call, folder: Path, data_root: Path, *words: str):
    """Evaluate the run.pth of a folder."""
    options = ("--data_root", data_root, "--device", "cpu")
    return call(eval_script.main, folder / "run.pth", *options, *words)


# ---- What an evaluation writes ----


def test_what_an_evaluation_writes(trained_copy, data_root, call):
    status, output, _ = evaluate(call, trained_copy, data_root, "--false_alarms", "0.5")
    assert status == 0
    folder = trained_copy / "run" / "test"
    names = {
        "anomaly_score_fan_id_00.csv",
        "anomaly_score_fan_id_02.csv",
        "anomaly_score_valve_id_01.csv",
    }
    # The rate takes a single recording, and one of each machine is held out
    decisions = {name.replace("anomaly_score", "decision_result") for name in names}
    others = {"metrics.csv", "metrics.json", "results.md", "decisions.csv"}
    assert {path.name for path in folder.iterdir()} == names | decisions | others
    assert f"12 scores and metrics: {folder}" in output
    pattern = r"fan 02   \| of 2 normal \d called anomalous, .*; asked: 50 %\), of 2 anomalous \d"
    assert re.search(pattern, output)
    table = (folder / "results.md").read_text()
    assert "| machine | false alarms (asked: 50 %) | detected | threshold | from |" in table
    assert re.search(r"\| fan 02 \| \d of 2, .* % \(.*\) \| \d of 2, .* % \(", table)
    assert "\nwithout a network | " in output
    assert "\n| without a network | " in table
    baseline = json.loads((folder / "metrics.json").read_text())["without a network"]
    assert 0 <= baseline["average"]["mean"]["AUC"] <= 1
    header, *lines = read_csv(folder / "metrics.csv")
    assert header == [
        "machine_type", "machine_id", "AUC", "pAUC", "n_normal", "n_anomaly",
        "AUC_low", "AUC_high", "pAUC_low", "pAUC_high",
    ]  # fmt: skip
    metrics = {(line[0], line[1]): line[2:] for line in lines}
    assert list(metrics) == [
        ("fan", "00"), ("fan", "02"), ("fan", "pooled"), ("fan", "mean"), ("fan", "min"),
        ("valve", "01"), ("valve", "pooled"), ("valve", "mean"), ("valve", "min"),
        ("average", "pooled"), ("average", "mean"), ("average", "min"),
    ]  # fmt: skip
    for name in names:  # the metrics follow from the score files
        rows = read_csv(folder / name)
        assert [file for file, _ in rows] == sorted(file for file, _ in rows)
        scores = [float(score) for _, score in rows]
        assert scores == [float(np.float32(score)) for score in scores], "exactly float32"
        auc = roc_auc_score([file.startswith("anomaly") for file, _ in rows], scores)
        stem = name.removeprefix("anomaly_score_").removesuffix(".csv")
        machine_type, machine_id = stem.split("_id_")
        assert float(metrics[machine_type, machine_id][0]) == pytest.approx(auc, abs=1e-12)
        assert metrics[machine_type, machine_id][2:4] == ["2", "2"]

    content = json.loads((folder / "metrics.json").read_text())
    assert content["about"]["seed"] == 2023
    assert content["about"]["clips trained on"] == 9
    assert content["about"]["recordings of test"] == "6 normal, 6 anomalous"
    assert content["interval"] == {"coverage": 0.95, "draws": 2000, "seed": 0}
    rows = [(machine, row) for machine, table in content["metrics"].items() for row in table]
    assert rows == list(metrics)
    for machine_type, table in content["metrics"].items():
        for name, values in table.items():
            assert [str(value) for value in values.values()] == metrics[machine_type, name]
            assert values["AUC_low"] <= values["AUC"] <= values["AUC_high"]
    assert "- mode: noisy_arcmix" in (folder / "results.md").read_text()


def test_evaluation_clips_with_and_without_labels(
    lively, tmp_path, data_root, call, fails, monkeypatch
):
    monkeypatch.setattr(tables, "PUBLISHED_IDS", {"fan": {"00"}, "valve": {"01"}})
    root, lines = tmp_path / "data", {"fan": [], "valve": []}
    for machine_type, pattern in (("fan", "*_id_00_*"), ("valve", "*_00000000.wav")):
        for path in sorted((data_root / machine_type / "test").glob(pattern)):
            condition, _, machine_id, number = path.stem.split("_")
            is_anomaly = int(condition == "anomaly")
            name = f"id_{machine_id}_{is_anomaly}{number[1:]}.wav"  # without the condition
            lines[machine_type].append(f"{name},{path.name},{is_anomaly}")
            for link in (f"test/{path.name}", f"evaluation/{name}"):
                link = root / machine_type / link
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)
    status, output, _ = evaluate(call, lively, root)
    assert status == 0
    assert "98.32" in output
    folder, label_list = lively / "run" / "evaluation", root / "eval_data_list.csv"
    names = {
        "anomaly_score_fan_id_00.csv", "anomaly_score_valve_id_01.csv",
        "decision_result_fan_id_00.csv", "decision_result_valve_id_01.csv", "decisions.csv",
    }  # fmt: skip

    label_list.write_text("\n".join(["fan", *lines["fan"], "valve", *lines["valve"]]) + "\n")
    status, output, _ = evaluate(call, lively, root, "--split", "evaluation")
    assert status == 0
    assert "98.32" not in output, "the published table is of the test clips"
    metric_files = {"metrics.csv", "metrics.json", "results.md"}
    assert {path.name for path in folder.iterdir()} == names | metric_files
    test_metrics = (lively / "run" / "test" / "metrics.csv").read_text()
    assert (folder / "metrics.csv").read_text() == test_metrics

    label_list.write_text("\n".join(["fan", *lines["fan"][1:]]) + "\n")
    status, output, errors = evaluate(call, lively, root, "--split", "evaluation")
    assert status == 0
    assert "3 of 6 recordings are not listed in eval_data_list.csv and are left out" in errors
    assert "valve" not in output
    assert len(read_csv(folder / "anomaly_score_valve_id_01.csv")) == 2

    label_list.unlink()
    status, output, errors = evaluate(call, lively, root, "--split", "evaluation")
    assert status == 0
    assert "6 of 6 recordings are not listed in eval_data_list.csv and are left out" in errors
    assert "AUC" not in output
    assert f"6 scores: {folder}" in output
    assert {path.name for path in folder.iterdir()} == names, "old metrics are removed"
    words = (lively / "run.pth", "--data_root", data_root, "--split", "evaluation")
    fails(eval_script.main, *words, match="download.py --parts evaluation")


@pytest.mark.slow
def test_figures_and_report_of_unlabelled_clips_and_of_the_linear_head(
    trained, tmp_path, data_root, call
):
    keys = {"mode": "cross_entropy", "input": ["sgram"]}
    weights = build_network(load_config(**keys), CLASSES).state_dict()
    change_checkpoint(trained / "run.pth", tmp_path / "run.pth", keys, weights=weights)
    folder = tmp_path / "data" / "fan" / "evaluation"
    folder.mkdir(parents=True)
    for path in (data_root / "fan" / "test").glob("normal*"):
        (folder / path.name.removeprefix("normal_")).symlink_to(path)
    results = tmp_path / "run" / "evaluation"
    (results / "figures").mkdir(parents=True)
    (results / "figures" / "roc.png").touch()  # from an earlier evaluation with labels
    words = ("--split", "evaluation", "--report")
    status, output, _ = evaluate(call, tmp_path, tmp_path / "data", *words)
    assert status == 0
    figures = {path.stem for path in (results / "figures").iterdir()}
    assert figures == {"scores", "tastgram", "embedding", "history"}
    assert f"4 figures: {results / 'figures'}" in output
    assert f"report: {results / 'report.html'}" in output
    assert "Hardest" not in (results / "report.html").read_text()


@pytest.mark.parametrize(
    ("plots", "report", "removed"),
    [
        (False, False, "figures and report.html of the earlier evaluation; --report"),
        (True, False, "report.html of the earlier evaluation; --report"),
        (False, True, ""),
    ],
)
def test_what_is_removed_and_not_written_again_is_announced(
    plots, report, removed, tmp_path, capsys
):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "roc.png").touch()
    (tmp_path / "report.html").touch()
    eval_script.announce_removal(tmp_path, Namespace(plots=plots, report=report))
    expected = f"notice: {tmp_path}: removed {removed} writes new ones\n" if removed else ""
    assert capsys.readouterr().err == expected


def test_the_figures_of_an_earlier_evaluation_are_removed(trained_copy, data_root, call):
    folder = trained_copy / "run" / "test"
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "roc.png").touch()
    _, _, errors = evaluate(call, trained_copy, data_root)
    notice = f"notice: {folder}: removed figures of the earlier evaluation; --plots writes new ones"
    assert f"{notice}\n" in errors
    assert not (folder / "figures").exists()


# ---- Which configuration counts ----


def test_editing_the_configuration_cannot_change_the_model(lively, data_root, tmp_path, call):
    agreeing = ("--mode", "noisy_arcmix", "--m", "0.7")
    assert evaluate(call, lively, data_root, *agreeing)[0] == 0
    file = lively / "run" / "test" / "anomaly_score_fan_id_00.csv"
    before = file.read_text()
    file.unlink()
    other = tmp_path / "other.yaml"
    other.write_text(
        "machines: {valve: [1], fan: [2, 0]}\nmode: cross_entropy\ninput: [sgram]\nm: 0.1\ns: 3\n"
    )
    assert evaluate(call, lively, data_root, "--config", other)[0] == 0
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("machines", "{fan: [0, 2]}"), ("machines", "{valve: [1], fan: [0, 2]}"),
        ("mode", "arcface"), ("input", "[sgram]"), ("m", "0.5"), ("s", "10"), ("sub_centers", "3"),
    ],
)  # fmt: skip
def test_contradicting_the_checkpoint_is_an_error(trained, data_root, fails, option, value):
    words = [trained / "run.pth", "--data_root", data_root, f"--{option}", value]
    message = rf"command line: {option} is .*, but the checkpoint .*run.pth has"
    fails(eval_script.main, *words, match=message)


@pytest.mark.filterwarnings("error")
def test_published_weights_give_the_scores_of_the_reference(tmp_path, call, fails):
    """A bare state dict scores WAV files in the published configuration.

    It has no held-out scores, so there are no decisions.
    """
    table = Classes.from_machines(load_config().machines).machines
    root = tmp_path / "data"
    waveforms = reference.waveforms().numpy()
    for index, label in enumerate(reference.labels()):
        machine_type, machine_id = table[label]
        clip = root / machine_type / "test" / f"normal_id_{machine_id}_{index}.wav"
        write_clip(clip, waveforms[index])
    torch.save(reference.parameters(), tmp_path / "run.pth")
    status, _, errors = evaluate(call, tmp_path, root)
    assert status == 0
    assert "run.pth is a bare state dict: machines, classes, mode, input" in errors
    assert "run.pth: no scores of held-out recordings, so there are no decisions" in errors
    folder = tmp_path / "run" / "test"
    rows = [row for path in folder.glob("anomaly_score_*.csv") for row in read_csv(path)]
    scores = {int(Path(name).stem[-1]): float(score) for name, score in rows}
    scores = np.array([scores[index] for index in range(4)])
    assert reference.distance(scores, reference.VALUES["eval_score"]) < 1e-4
    assert not list(folder.glob("decision*"))

    words = ("--machine_type", machine_type, "--machine_id", machine_id)
    _, output, _ = call(score_script.main, tmp_path / "run.pth", clip, *words)
    assert output.rstrip("\n").split("\t")[3:] == ["-", "-"]
    words = (tmp_path / "run.pth", "--machines", "{fan: [0, 2]}", "--data_root", root)
    message = (
        r"does not fit the configuration .*"
        r"arcface.weight is \(41, 128\) in the file and \(2, 128\)"
    )
    fails(eval_script.main, *words, match=message)
    words = (tmp_path / "run.pth", "--input", "sgram")
    fails(eval_script.main, *words, match="conv1.conv.weight|tgramnet")


# ---- The kinds of score ----


def test_scores_of_another_kind(trained_copy, data_root, call):
    """The checkpoint of a finished run has the embeddings, so no training clips are needed."""
    before = (trained_copy / "run.pth").read_bytes()
    root = trained_copy / "data"
    copy_test_clips(data_root, root)
    options = ("--scoring", "nearest", "--neighbours", "3")
    status, output, _ = evaluate(call, trained_copy, root, *options)
    assert status == 0
    assert "98.32" not in output, "the published figures are of the published score"
    folder = trained_copy / "run" / "test"
    content = json.loads((folder / "metrics.json").read_text())
    assert (content["about"]["scoring"], content["about"]["neighbours"]) == ("nearest", 3)
    assert "nearest score" in (folder / "results.md").read_text()
    rows = [row for path in folder.glob("anomaly_score_*.csv") for row in read_csv(path)]
    assert len(rows) == 12
    assert all(0 < float(value) < 2 for _, value in rows), "cosine distances"
    name, value = read_csv(folder / "anomaly_score_fan_id_00.csv")[0]
    words = (
        root / "fan" / "test" / name, "--machine_type", "fan", "--machine_id", "00", "--json",
    )  # fmt: skip
    status, output, _ = call(score_script.main, trained_copy / "run.pth", *words, *options)
    assert status == 0
    assert json.loads(output)[0]["score"] == pytest.approx(float(value), rel=1e-4)
    assert (trained_copy / "run.pth").read_bytes() == before


def test_all_scores_side_by_side(trained_copy, data_root, call):
    words = ("--all_scores", "--output", trained_copy / "scores")
    status, output, _ = evaluate(call, trained_copy, data_root, *words)
    assert status == 0
    content = json.loads((trained_copy / "run" / "test" / "metrics.json").read_text())
    assert content["about"]["scoring"] == "published"
    for kind in ("nearest", "angle", "published"):
        assert f"| scoring {kind} (n = 1) | " in output
    assert "| scoring nearest minus scoring published (test recordings alone) | " in output
    header, *rows = read_csv(trained_copy / "scores" / "comparison.csv")
    values = {
        row[header.index("scoring")]: float(row[header.index("AUC")])
        for row in rows
        if row[4:6] == ["average", "mean"]
    }
    assert values["published"] == content["metrics"]["average"]["mean"]["AUC"]
    row = rf"\| scoring nearest \(n = 1\) \|.*\| {100 * values['nearest']:.2f} \|"
    assert re.search(row, output)


def test_weights_without_embeddings_get_them_from_the_training_clips(
    trained_copy, tmp_path, data_root, call, fails
):
    """They give the scores and thresholds of the whole checkpoint, and are not stored."""
    test = trained_copy / "run" / "test"
    words = ("--scoring", "nearest", "--false_alarms", "0.5")
    assert evaluate(call, trained_copy, data_root, *words)[0] == 0
    scores = scores_of(test, "anomaly_score_fan_id_00.csv")
    decisions = read_csv(test / "decisions.csv")
    remove_bank(trained_copy / "run.pth")
    before = sorted(trained_copy.rglob("*"))
    status, _, errors = evaluate(call, trained_copy, data_root, *words)
    assert status == 0
    notice = "run.pth holds no embeddings of its training clips; they are computed from"
    assert f"{notice} {data_root}\n" in errors
    assert scores_of(test, "anomaly_score_fan_id_00.csv") == pytest.approx(scores, abs=2**-11)
    for row, expected in zip(read_csv(test / "decisions.csv")[1:], decisions[1:], strict=True):
        assert float(row[2]) == pytest.approx(float(expected[2]), abs=2**-11)
    assert sorted(trained_copy.rglob("*")) == before
    root = tmp_path / "data"
    copy_test_clips(data_root, root)
    _, _, errors = evaluate(call, trained_copy, root, "--scoring", "angle")
    assert "no scores of held-out recordings, so there are no decisions" in errors
    words = (trained_copy / "run.pth", "--device", "cpu", "--scoring", "nearest", "--data_root")
    fails(eval_script.main, *words, root, match=r"no folder .*fan/train")
    others = write_set(tmp_path / "others", train_clips=5)
    message = "the recordings under .*others are not those that .* was trained on"
    fails(eval_script.main, *words, others, match=message)


def test_a_bare_state_dict_has_all_training_clips_in_its_bank(trained_copy, data_root, call):
    config = load_config(data_root=str(data_root), machines=MACHINES)
    torch.save(Checkpoint.load(trained_copy / "run.pth").weights, trained_copy / "bare.pth")
    words = ("--machines", MACHINES, "--scoring", "nearest", "--data_root", data_root)
    status, _, errors = call(eval_script.main, trained_copy / "bare.pth", *words, "--device", "cpu")
    assert status == 0
    model = load_model(trained_copy / "bare.pth", config)
    model = with_bank(model, config, ["nearest"], torch.device("cpu"))
    assert len(model.checkpoint.bank.clips.labels) == 12
    assert "bare.pth: no scores of held-out recordings, so there are no decisions" in errors


def test_an_id_without_training_clips_has_nothing_near(trained_copy, data_root, fails, call):
    bank = Checkpoint.load(trained_copy / "run.pth").bank
    clips = StoredClips(*(values[bank.clips.labels != 1] for values in bank.clips))
    change_checkpoint(trained_copy / "run.pth", bank=replace(bank, clips=clips))
    words = ("--data_root", data_root, "--device", "cpu", "--scoring", "nearest")
    message = "run.pth: the checkpoint has no training clips of fan 02, which nearest needs"
    fails(eval_script.main, trained_copy / "run.pth", *words, match=message)
    clip = data_root / "fan" / "test" / "normal_id_02_00000000.wav"
    words = (trained_copy / "run.pth", clip, "--machine_type", "fan", "--machine_id", "2")
    status, output, _ = call(score_script.main, *words, "--device", "cpu", "--json")
    assert status == 0
    assert json.loads(output)[0]["difference"] is None


# ---- Sections, domains, attributes ----


@pytest.fixture(scope="module")
def sections(tmp_path_factory) -> Path:
    """A folder with a run trained on classes by attributes, `run.pth`, and its data, `data`."""
    folder = tmp_path_factory.mktemp("sections")
    options = {"machines": "auto", "classes": "attributes", "split_ratio": 0.7}
    train_in(folder, write_sections(folder / "data"), **options)
    return folder


def lowest_scores(outputs, labels: list[int], config) -> np.ndarray:
    """Return the lowest published score of each clip over the given classes."""
    objective = Objective(config.mode, config.m, config.s)
    similarity = outputs.similarity
    scores = []
    for label in labels:
        targets = torch.full((len(similarity),), label)
        losses = objective.cross_entropy(similarity.double(), targets, targets, "none")
        scores.append(losses.numpy())
    return np.min(scores, axis=0)


def scores_of(folder: Path, name: str) -> dict[str, float]:
    return {clip: float(score) for clip, score in read_csv(folder / name)}


def test_a_clip_has_the_lowest_score_over_the_attributes_of_its_section(sections, call):
    root, results = sections / "data", sections / "run" / "test"
    words = ("--score_dtype", "float64", "--false_alarms", "0.5")
    status, output, _ = evaluate(call, sections, root, *words)
    assert status == 0
    config = load_config(data_root=str(root))
    model = load_model(sections / "run.pth", config)
    attributes = ["vel_1", "vel_2", "vel_3"]
    entries = [(name, "00", words) for name in ("bearing", "fan") for words in attributes]
    assert list(model.classes.entries) == entries
    assert model.network.num_classes == 6
    clips = load_clips(config, model.classes, "test", model.windows(config, "test"))
    outputs = run_model(model, clips, config, torch.device("cpu"))
    for machine_type, labels in (("bearing", [0, 1, 2]), ("fan", [3, 4, 5])):
        scores = scores_of(results, f"anomaly_score_{machine_type}_section_00_test.csv")
        assert len(scores) == 6
        is_type = clips.recordings["machine_type"] == machine_type
        names = [path.name for path in clips.recordings["path"][is_type]]
        lowest = lowest_scores(outputs, labels, model.config)[is_type]
        assert scores == pytest.approx(dict(zip(names, lowest, strict=True)), rel=1e-9)
        decisions = scores_of(results, f"decision_result_{machine_type}_section_00_test.csv")
        assert set(decisions) == set(scores)
    assert "|AUC source AUC target     pAUC official\n" in output
    text = (results / "results.md").read_text()
    assert "rule of DCASE 2022" in text
    assert "- classes: attributes (6 classes)\n" in text

    clips = load_clips(config, model.classes, "train", model.config.windows("train"))
    _, valid_clips = clips.split(0.7, model.config.seed)
    outputs = run_model(model, valid_clips, config, torch.device("cpu"))
    lowest = np.where(
        valid_clips.recordings["machine_type"] == "fan",
        lowest_scores(outputs, [3, 4, 5], model.config),
        lowest_scores(outputs, [0, 1, 2], model.config),
    )
    # Thresholds are fitted to the same kind of score.
    held_out = model.checkpoint.held_out.scores
    assert held_out.tolist() == pytest.approx(lowest.tolist(), rel=1e-5)


@pytest.mark.parametrize("scoring", ["published", pytest.param("nearest", marks=pytest.mark.slow)])
def test_a_single_recording_scores_as_in_the_evaluation_of_its_section(sections, call, scoring):
    root = sections / "data"
    options = ("--scoring", scoring, "--score_dtype", "float64")
    pictures = ("--plots", "--report") if scoring == "published" else ()
    assert evaluate(call, sections, root, *options, *pictures)[0] == 0
    expected = scores_of(sections / "run" / "test", "anomaly_score_fan_section_00_test.csv")
    machine = ("--machine_type", "fan", "--machine_id", "0")
    words = (root / "fan" / "test", *machine, "--json", "--scoring", scoring)
    status, output, _ = call(score_script.main, sections / "run.pth", *words)
    assert status == 0
    scores = {Path(row["file"]).name: row["score"] for row in json.loads(output)}
    assert scores == pytest.approx(expected, rel=1e-5)


def test_the_checkpoint_keeps_the_classes(sections, call, fails):
    root = sections / "data"
    assert evaluate(call, sections, root, "--classes", "attributes", "--machines", "auto")[0] == 0
    words = (sections / "run.pth", "--data_root", root, "--classes", "section")
    message = "command line: classes is 'section', but the checkpoint .* has 'attributes'"
    fails(eval_script.main, *words, match=message)
    words = arguments(sections, root, machines="auto", classes="attributes", split_ratio=0.7)
    status, output, _ = call(train_script.main, *words, "--resume")
    assert (status, "lowest validation loss" in output) == (0, True)
    words = arguments(sections, root, machines="auto", split_ratio=0.7)
    message = r"had another configuration: classes \(was 'attributes', is 'section'\)"
    fails(train_script.main, *words, "--resume", match=message)


@pytest.mark.slow
def test_classes_by_section_and_by_attributes_are_compared(sections, tmp_path, call):
    root = sections / "data"
    call(train_script.main, *arguments(tmp_path, root, machines="auto", split_ratio=0.7))
    weights = (sections / "run.pth", tmp_path / "run.pth")
    options = ("--data_root", root, "--output", tmp_path / "out")
    status, output, _ = call(eval_script.main, *weights, *options)
    assert status == 0
    assert (
        "| classes attributes (6 classes) minus classes section (test recordings alone) |" in output
    )
    header = next(line for line in output.splitlines() if line.startswith("| configuration |"))
    assert header.endswith(
        "| AUC source, harmonic mean | AUC target, harmonic mean | pAUC, harmonic mean | official "
        "score |"
    )
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "Domains: rule of DCASE 2022 and later" in text


def test_names_that_lie_are_one_line(sections, tmp_path, fails):
    """Each script ends with one line before anything is trained or scored."""
    root = Path(shutil.copytree(sections / "data", tmp_path / "data"))
    folder = root / "fan" / "train"
    clip = folder / "section_00_source_train_normal_0000_vel_1.wav"
    clip = clip.rename(folder / "normal_id_00_0000.wav")
    words = arguments(tmp_path, root, machines="auto")
    message = (
        "bearing/train/section_00_source_train_normal_0000_vel_1.wav and "
        ".*fan/train/normal_id_00_0000.wav follow the"
    )
    fails(train_script.main, *words, match=message)
    fails(eval_script.main, sections / "run.pth", "--data_root", root, match=message)
    clip.rename(folder / "section_00_source_train_normal_0000_vel.wav")
    message = "has 2 attribute words and .*0000_vel.wav has 1, so they cannot both consist of pairs"
    fails(train_script.main, *words, match=message)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".pth"] == []


@pytest.mark.slow
def test_evaluation_clips_of_later_years(sections, tmp_path, call):
    """They lie in the test folder; the organisers' lists have their labels, or there are none."""
    root = tmp_path / "data"
    for machine_type in ("bearing", "fan"):
        test_folder = sections / "data" / machine_type / "test"
        for index, path in enumerate(sorted(test_folder.iterdir())):
            target = root / machine_type / "test" / f"section_00_{index:04d}.wav"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
            for kind, word in (("data", "anomaly"), ("domain", "target")):
                name = f"ground_truth_{machine_type}_section_00_test.csv"
                file = root / f"ground_truth_{kind}" / name
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("a") as lines:
                    lines.write(f"{target.name},{int(word in path.name)}\n")
    folder = tmp_path / "copy"
    shutil.copytree(sections, folder, ignore=shutil.ignore_patterns("data"))
    assert evaluate(call, folder, sections / "data")[0] == 0
    status, output, _ = evaluate(call, folder, root, "--split", "evaluation")
    assert status == 0
    metrics = read_csv(folder / "run" / "evaluation" / "metrics.csv")
    assert metrics == read_csv(folder / "run" / "test" / "metrics.csv")
    assert (folder / "run/evaluation/anomaly_score_fan_section_00_test.csv").is_file()
    shutil.rmtree(root / "ground_truth_data")
    status, output, errors = evaluate(call, folder, root, "--split", "evaluation")
    assert (status, "AUC" in output) == (0, False)
    notice = (
        "12 of 12 recordings are not listed in ground_truth_data and ground_truth_domain and are "
        "left out of the metrics (copy"
    )
    assert notice in errors


# ---- Several checkpoints ----


def test_several_checkpoints_are_compared(lively, tmp_path, data_root, call, fails):
    """Compare two seeds of one configuration and one of another, with artificial weights."""
    paths = []
    for name, seed, m in (("a", 1, 0.7), ("b", 2, 0.7), ("c", 1, 0.5)):
        weights = Checkpoint.load(lively / "run.pth").weights
        generator = torch.Generator().manual_seed(len(paths))
        weight = weights["arcface.weight"]
        weights["arcface.weight"] = weight + 0.5 * torch.randn(weight.shape, generator=generator)
        paths.append(tmp_path / f"{name}.pth")
        keys = {"seed": seed, "m": m}
        change_checkpoint(lively / "run.pth", paths[-1], keys, weights=weights)
    options = ("--data_root", data_root, "--device", "cpu")
    folder = tmp_path / "comparison"
    status, output, _ = call(eval_script.main, *paths, *options, "--output", folder)
    assert status == 0
    text = (folder / "comparison.md").read_text()
    pooled = []
    for path, seed in zip(paths, (1, 2, 1), strict=True):
        rows = read_csv(path.with_suffix("") / "test" / "metrics.csv")
        (auc,) = [100 * float(row[2]) for row in rows if row[:2] == ["average", "pooled"]]
        pooled.append(auc)
        line = rf"\| {path} \| {auc:.2f} \|.*\| {seed} \| 1 \|"  # with seed and epoch
        assert re.search(line, text)
    assert len(set(pooled)) == 3
    both = pooled[:2]
    assert f"| m 0.7 (n = 2) | {np.mean(both):.2f} ± {np.std(both, ddof=1):.2f} |" in text
    assert f"| m 0.5 (n = 1) | {pooled[2]:.2f} |" in text
    assert (
        f"| m 0.7 minus m 0.5 (test recordings alone) | {np.mean(both) - pooled[2]:+.2f} (" in text
    )
    assert output.count("in percent  ") == 3
    rows = read_csv(folder / "comparison.csv")
    assert len(rows) == 1 + 3 * 12
    other = tmp_path / "other.pth"
    torch.save(TASTgramMFN(2).state_dict(), other)
    fails(eval_script.main, paths[0], other, *options, match="other.pth does not fit")


@pytest.mark.slow
def test_figures_of_several_checkpoints(trained, tmp_path, data_root, call):
    paths = [tmp_path / "a.pth", tmp_path / "b.pth"]
    for seed, path in enumerate(paths):
        change_checkpoint(trained / "run.pth", path, {"seed": seed})
    options = ("--data_root", data_root, "--device", "cpu", "--output", tmp_path / "both")
    status, output, _ = call(eval_script.main, *paths, *options, "--plots")
    assert status == 0
    assert output.count("6 figures: ") == 2
    assert f"comparison.md, comparison.csv, angles.png: {tmp_path / 'both'}" in output
    assert "](angles.png)" in (tmp_path / "both" / "comparison.md").read_text()
    assert (tmp_path / "both" / "angles.png").exists()


# ---- Errors ----


def test_two_checkpoints_of_one_folder_are_refused(trained_copy, data_root, fails):
    shutil.copy(trained_copy / "run.pth", trained_copy / "run.pt")
    words = [trained_copy / "run.pth", trained_copy / "run.pt", "--data_root", data_root]
    fails(eval_script.main, *words, match="and so the same folder of results; rename one")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--hop", "5"), "command line: hop has no effect with window: first; leave it out"),
        (("--over_windows", "max"), "command line: over_windows has no effect with window: first"),
        (
            ("--neighbours", "3", "--scoring", "angle"),
            "command line: neighbours has no effect with scoring: angle",
        ),
        (("--output", "here"), "--output has no effect without a comparison"),
        (("--lr", "1"), "unknown option --lr"),
        (
            ("--score_files", "here"),
            "checkpoint has no effect with --score_files, which uses only --data_root",
        ),
    ],
)
def test_options_without_effect_are_errors(words, match, trained, fails):
    fails(eval_script.main, trained / "run.pth", *words, match=match)


def test_missing_and_damaged_checkpoints(tmp_path, fails):
    message = r"weights: the file name has no extension, .*weights.pth"
    fails(eval_script.main, tmp_path / "weights", match=message)
    message = "none.pth: no such checkpoint; train one with"
    fails(eval_script.main, tmp_path / "none.pth", match=message)
    (tmp_path / "text.pth").write_text("hello")
    fails(eval_script.main, tmp_path / "text.pth", match="text.pth: not a readable checkpoint")


def test_no_test_clips(trained, tmp_path, fails):
    words = (trained / "run.pth", "--data_root", tmp_path)
    fails(eval_script.main, *words, match="no folder .*fan/test")


def test_scores_that_are_not_finite(tmp_path, fails):
    machines = {"fan": [0, 1]}
    root = write_set(tmp_path / "data", machines, train_clips=0, test_clips=1)
    model = TASTgramMFN(2)
    torch.nn.init.constant_(model.mobilefacenet.linear1.bn.bias, float("nan"))
    torch.save(model.state_dict(), tmp_path / "run.pth")
    options = ("--data_root", root, "--machines", machines, "--device", "cpu")
    fails(eval_script.main, tmp_path / "run.pth", *options, match="4 of 4 scores are not finite")


# ---- Several programs, and few recordings ----


@pytest.mark.slow
def test_an_evaluation_waits_while_another_one_writes(trained_copy, data_root):
    held = lock(trained_copy / "run" / ".test.lock")
    command = [sys.executable, ROOT / "eval.py", trained_copy / "run.pth", "--data_root", data_root]
    with held:
        process = subprocess.Popen(
            [*command, "--device", "cpu"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr
        while "which writes there" not in process.stderr.readline():
            assert process.poll() is None
        assert not (trained_copy / "run" / "test" / "metrics.csv").exists()
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert (trained_copy / "run" / "test" / "metrics.csv").exists()


@pytest.mark.slow
def test_three_evaluations_at_once(trained_copy, data_root):
    """All end well, and the files are those of one of them."""
    command = [sys.executable, ROOT / "eval.py", trained_copy / "run.pth", "--data_root", data_root]
    processes = [
        subprocess.Popen(
            [*command, "--scoring", kind, "--report"],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for kind in ("published", "angle", "nearest")
    ]
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    folder = trained_copy / "run" / "test"
    about = json.loads((folder / "metrics.json").read_text())["about"]
    assert f"{about['scoring']} score" in (folder / "report.html").read_text()
    assert f"{about['scoring']} score" in (folder / "results.md").read_text()
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("scoring", "condition"),
    [
        ("published", "anomaly"),
        pytest.param("published", "normal", marks=pytest.mark.slow),
        pytest.param("published", "both", marks=pytest.mark.slow),
        pytest.param("angle", "anomaly", marks=pytest.mark.slow),
        pytest.param("angle", "normal", marks=pytest.mark.slow),
        pytest.param("angle", "both", marks=pytest.mark.slow),
    ],
)
def test_one_recording(trained_copy, tmp_path, call, condition, scoring):
    """One machine type, one machine and one window, of one condition or of each."""
    for name in ("normal", "anomaly") if condition == "both" else (condition,):
        write_clip(tmp_path / f"data/fan/test/{name}_id_02_0.wav", tone(len(name), 10.0))
    words = ("--scoring", scoring, "--report")
    status, output, errors = evaluate(call, trained_copy, tmp_path / "data", *words)
    assert status == 0, errors
    assert "Warning" not in errors
    assert f"{'2 scores' if condition == 'both' else '1 score'} and metrics" in output
    decisions = read_csv(trained_copy / "run" / "test" / "anomaly_score_fan_id_02.csv")
    assert len(decisions) == (2 if condition == "both" else 1)
