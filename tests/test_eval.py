"""eval.py as a user calls it: what it writes, which configuration counts, how it fails."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from conftest import (
    MACHINES,
    arguments,
    copy_test_clips,
    remove_embeddings,
    train_in,
    write_clip,
    write_sections,
    write_set,
)
from sklearn.metrics import roc_auc_score

import eval as eval_script
import score as score_script
import train as train_script
from checkpoint import build_network, load_checkpoint, load_model, save_checkpoint
from config import load_config
from corpus import number_classes
from dataloader import load_clips
from evaluation import tables
from evaluation.scoring import embedding_scores, run_model, with_embeddings
from losses import Objective
from model import TASTgramMFN


def read_csv(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def evaluate(call, folder: Path, data_root: Path, *words: str):
    """Evaluate the run.pth of a folder."""
    return call(
        eval_script.main, folder / "run.pth", "--data_root", data_root, "--device", "cpu", *words
    )


# ---- What an evaluation writes ----


def test_what_an_evaluation_writes(trained_copy, data_root, call):
    status, output, _ = evaluate(call, trained_copy, data_root)
    assert status == 0
    folder = trained_copy / "run" / "test"
    names = {
        "anomaly_score_fan_id_00.csv",
        "anomaly_score_fan_id_02.csv",
        "anomaly_score_valve_id_01.csv",
    }
    others = {"metrics.csv", "metrics.json", "results.md", "decisions.csv"}
    types = load_checkpoint(trained_copy / "run.pth")["held_out"][
        "machine_type"
    ]  # those with held-out clips
    decisions = {
        f"decision_result_{t}_id_{i:02d}.csv"
        for t, ids in MACHINES.items()
        for i in ids
        if t in types
    }
    assert {path.name for path in folder.iterdir()} == names | decisions | others
    assert f"12 scores and metrics: {folder}" in output
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
        assert all(float(np.float32(score)) == float(score) for _, score in rows), (
            "float32, read back exactly"
        )
        auc = roc_auc_score(
            [file.startswith("anomaly") for file, _ in rows], [float(score) for _, score in rows]
        )
        machine_type, machine_id = (
            name.removeprefix("anomaly_score_").removesuffix(".csv").split("_id_")
        )
        assert float(metrics[machine_type, machine_id][0]) == pytest.approx(auc, abs=1e-12)
        assert metrics[machine_type, machine_id][2:4] == ["2", "2"]

    content = json.loads((folder / "metrics.json").read_text())
    assert content["about"]["seed"] == 2023
    assert content["about"]["clips trained on"] == 11
    assert content["about"]["clips of test"] == "6 normal, 6 anomalous"
    assert content["interval"] == {"coverage": 0.95, "draws": 2000, "seed": 0}
    assert [(t, row) for t, of in content["metrics"].items() for row in of] == list(metrics)
    for machine_type, of in content["metrics"].items():
        for name, values in of.items():
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
            name = f"id_{machine_id}_{is_anomaly}{number[1:]}.wav"  # which does not tell
            lines[machine_type].append(f"{name},{path.name},{is_anomaly}")
            for link in (
                root / machine_type / "test" / path.name,
                root / machine_type / "evaluation" / name,
            ):
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)
    status, output, _ = evaluate(call, lively, root)
    assert status == 0
    assert "98.32" in output
    folder, label_list = lively / "run" / "evaluation", root / "eval_data_list.csv"
    names = {
        "anomaly_score_fan_id_00.csv", "anomaly_score_valve_id_01.csv", "decision_result_fan_id_00.csv",
        "decision_result_valve_id_01.csv", "decisions.csv",
    }  # fmt: skip

    label_list.write_text("\n".join(["fan", *lines["fan"], "valve", *lines["valve"]]) + "\n")
    status, output, _ = evaluate(call, lively, root, "--split", "evaluation")
    assert status == 0
    assert "98.32" not in output, "the published table is of the test clips"
    assert {path.name for path in folder.iterdir()} == names | {
        "metrics.csv",
        "metrics.json",
        "results.md",
    }
    of_test, of_evaluation = (
        lively / "run" / split / "metrics.csv" for split in ("test", "evaluation")
    )
    assert of_test.read_text() == of_evaluation.read_text()

    label_list.write_text("\n".join(["fan", *lines["fan"][1:]]) + "\n")
    status, output, errors = evaluate(call, lively, root, "--split", "evaluation")
    assert status == 0
    assert "3 of 6 clips are not in eval_data_list.csv and count in no metric" in errors
    assert "valve" not in output
    assert len(read_csv(folder / "anomaly_score_valve_id_01.csv")) == 2

    label_list.unlink()
    status, output, errors = evaluate(call, lively, root, "--split", "evaluation")
    assert status == 0
    assert "6 of 6 clips are not in eval_data_list.csv and count in no metric" in errors
    assert "AUC" not in output
    assert f"6 scores: {folder}" in output
    assert {path.name for path in folder.iterdir()} == names, (
        "no metrics of labels that are not there any more"
    )
    fails(
        eval_script.main, lively / "run.pth", "--data_root", data_root, "--split", "evaluation",
        match="download.py --parts evaluation",
    )  # fmt: skip


@pytest.mark.slow
def test_figures_and_report_of_unlabelled_clips_and_of_the_linear_head(
    trained, tmp_path, data_root, call
):
    state = load_checkpoint(trained / "run.pth")
    state["config"] |= {"mode": "cross_entropy", "input": ["sgram"]}
    state["model"] = build_network(load_config(**state["config"])).state_dict()
    save_checkpoint(state, tmp_path / "run.pth")
    folder = tmp_path / "data" / "fan" / "evaluation"
    folder.mkdir(parents=True)
    for path in (data_root / "fan" / "test").glob("normal*"):
        (folder / path.name.removeprefix("normal_")).symlink_to(path)
    results = tmp_path / "run" / "evaluation"
    (results / "figures").mkdir(parents=True)
    (results / "figures" / "roc.png").touch()  # of an earlier evaluation, with labels
    status, output, _ = evaluate(
        call, tmp_path, tmp_path / "data", "--split", "evaluation", "--report"
    )
    assert status == 0
    assert {path.stem for path in (results / "figures").iterdir()} == {
        "scores",
        "tastgram",
        "embedding",
        "history",
    }
    assert f"4 figures: {results / 'figures'}" in output
    assert f"report: {results / 'report.html'}" in output
    assert "Hardest" not in (results / "report.html").read_text()


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
        ("machines", "{fan: [0, 2]}"), ("machines", "{valve: [1], fan: [0, 2]}"), ("mode", "arcface"),
        ("input", "[sgram]"), ("m", "0.5"), ("s", "10"), ("sub_centers", "3"),
    ],
)  # fmt: skip
def test_contradicting_the_checkpoint_is_an_error(trained, data_root, fails, option, value):
    words = [trained / "run.pth", "--data_root", data_root, f"--{option}", value]
    fails(
        eval_script.main,
        *words,
        match=rf"command line: {option} .* is not the checkpoint's, .*run.pth",
    )


@pytest.mark.filterwarnings("error")
def test_published_weights_give_the_scores_of_the_reference(tmp_path, call, fails):
    """From WAV files and a bare state dict, scored in the published configuration; no held-out
    scores come with it.
    """
    table, root = list(number_classes(load_config())), tmp_path / "data"
    for index, (label, waveform) in enumerate(
        zip(reference.labels(), reference.waveforms().numpy(), strict=True)
    ):
        machine_type, machine_id = table[label]
        clip = write_clip(
            root / machine_type / "test" / f"normal_id_{machine_id}_{index}.wav", waveform
        )
    torch.save(reference.parameters(), tmp_path / "run.pth")
    status, _, errors = evaluate(call, tmp_path, root)
    assert status == 0
    assert "run.pth is a bare state dict: machines, classes, mode, input" in errors
    assert "run.pth: no scores of held-out clips, so there are no decisions" in errors
    folder = tmp_path / "run" / "test"
    rows = [row for path in folder.glob("anomaly_score_*.csv") for row in read_csv(path)]
    scores = {int(Path(name).stem[-1]): float(score) for name, score in rows}
    assert (
        reference.distance(
            np.array([scores[index] for index in range(4)]), reference.VALUES["eval_score"]
        )
        < 1e-4
    )
    assert not list(folder.glob("decision*"))

    words = ("--machine_type", machine_type, "--machine_id", machine_id)
    _, output, _ = call(score_script.main, tmp_path / "run.pth", clip, *words)
    assert output.rstrip("\n").split("\t")[3:] == ["-", "-"]
    fails(
        eval_script.main, tmp_path / "run.pth", "--machines", "{fan: [0, 2]}", "--data_root", root,
        match=r"does not fit the configuration .*arcface.weight is \(41, 128\) in the file and \(2, 128\)",
    )  # fmt: skip
    fails(
        eval_script.main,
        tmp_path / "run.pth",
        "--input",
        "sgram",
        match="conv1.conv.weight|tgramnet",
    )


# ---- The kinds of score ----


def test_scores_of_another_kind(trained_copy, data_root, call):
    """Of a finished run, whose checkpoint has the embeddings: the training clips are not looked
    for.
    """
    state = load_checkpoint(trained_copy / "run.pth")
    root = trained_copy / "data"
    copy_test_clips(data_root, root)
    status, output, _ = evaluate(
        call, trained_copy, root, "--scoring", "nearest", "--neighbours", "3"
    )
    assert status == 0
    assert "98.32" not in output, "the published figures are of the published score"
    folder = trained_copy / "run" / "test"
    content = json.loads((folder / "metrics.json").read_text())
    assert (content["about"]["scoring"], content["about"]["neighbours"]) == ("nearest", 3)
    assert "nearest score" in (folder / "results.md").read_text()
    rows = [
        (name, float(value))
        for path in folder.glob("anomaly_score_*.csv")
        for name, value in read_csv(path)
    ]
    assert len(rows) == 12
    assert all(0 < value < 2 for _, value in rows), "cosine distances"
    machine = [f"--machine_{name}" for name in ("type", "id")]
    clip = root / "fan" / "test" / rows[0][0]
    words = (
        clip,
        machine[0],
        "fan",
        machine[1],
        clip.name.split("_")[2],
        "--scoring",
        "nearest",
        "--neighbours",
        "3",
    )
    status, output, _ = call(score_script.main, trained_copy / "run.pth", *words, "--json")
    assert status == 0
    assert json.loads(output)[0]["score"] == pytest.approx(rows[0][1], rel=1e-4)
    assert load_checkpoint(trained_copy / "run.pth").keys() == state.keys()


def test_all_scores_side_by_side(trained_copy, data_root, call):
    words = ("--all_scores", "--output", trained_copy / "scores")
    status, output, _ = evaluate(call, trained_copy, data_root, *words)
    assert status == 0
    content = json.loads((trained_copy / "run" / "test" / "metrics.json").read_text())
    assert content["about"]["scoring"] == "published"
    for kind in ("nearest", "angle", "published"):
        assert f"| scoring {kind} (n = 1) | " in output
    assert "| scoring nearest minus scoring published (test clips alone) | " in output
    header, *rows = read_csv(trained_copy / "scores" / "comparison.csv")
    values = {
        row[header.index("scoring")]: float(row[header.index("AUC")])
        for row in rows
        if row[4:6] == ["average", "mean"]
    }
    assert values["published"] == content["metrics"]["average"]["mean"]["AUC"]
    assert re.search(
        rf"\| scoring nearest \(n = 1\) \|.*\| {100 * values['nearest']:.2f} \|", output
    )


def test_weights_without_embeddings_get_them_from_the_training_clips(
    trained_copy, tmp_path, data_root, call, fails
):
    """Computed each time: scores and thresholds are those of the whole checkpoint."""
    test = trained_copy / "run" / "test"
    assert evaluate(call, trained_copy, data_root, "--scoring", "nearest")[0] == 0
    scores, decisions = (
        scores_of(test, "anomaly_score_fan_id_00.csv"),
        read_csv(test / "decisions.csv"),
    )
    remove_embeddings(trained_copy / "run.pth")
    before = sorted(trained_copy.rglob("*"))
    status, _, errors = evaluate(call, trained_copy, data_root, "--scoring", "nearest")
    assert status == 0
    assert (
        f"run.pth holds no embeddings of its training clips; they are computed from {data_root}\n"
        in errors
    )
    assert scores_of(test, "anomaly_score_fan_id_00.csv") == pytest.approx(scores, abs=2**-11)
    for row, expected in zip(read_csv(test / "decisions.csv")[1:], decisions[1:], strict=True):
        assert float(row[2]) == pytest.approx(float(expected[2]), abs=2**-11)
    assert sorted(trained_copy.rglob("*")) == before
    root = tmp_path / "data"
    copy_test_clips(data_root, root)
    _, _, errors = evaluate(call, trained_copy, root, "--scoring", "angle")
    assert "no scores of held-out clips, so there are no decisions" in errors
    words = (trained_copy / "run.pth", "--device", "cpu", "--scoring", "nearest", "--data_root")
    fails(eval_script.main, *words, root, match=r"no folder .*fan/train")
    others = write_set(tmp_path / "others", train_clips=5)
    fails(
        eval_script.main,
        *words,
        others,
        match="the clips under .*others are not those that .* was trained on",
    )


def test_a_bare_state_dict_has_all_training_clips_in_its_bank(trained_copy, data_root, call):
    config = load_config(data_root=str(data_root), machines=MACHINES)
    torch.save(load_checkpoint(trained_copy / "run.pth")["model"], trained_copy / "bare.pth")
    words = (
        "--data_root",
        data_root,
        "--device",
        "cpu",
        "--machines",
        MACHINES,
        "--scoring",
        "nearest",
    )
    status, _, errors = call(eval_script.main, trained_copy / "bare.pth", *words)
    assert status == 0
    model = with_embeddings(
        load_model(trained_copy / "bare.pth", config, {}), ["nearest"], torch.device("cpu")
    )
    assert len(model.state["embeddings"]["bank"]["label"]) == 12
    assert "bare.pth: no scores of held-out clips, so there are no decisions" in errors


def test_an_id_without_training_clips_has_nothing_near(trained_copy, data_root, fails):
    state = load_checkpoint(trained_copy / "run.pth")
    bank = state["embeddings"]["bank"]
    state["embeddings"]["bank"] = {
        name: values[bank["label"] != 1] for name, values in bank.items()
    }
    save_checkpoint(state, trained_copy / "run.pth")
    fails(
        eval_script.main, trained_copy / "run.pth", "--data_root", data_root, "--device", "cpu", "--scoring", "nearest",
        match="run.pth: it has no embeddings of training clips of fan 02, so nothing is near them",
    )  # fmt: skip


# ---- Sections, domains, attributes ----


@pytest.fixture(scope="module")
def sections(tmp_path_factory) -> Path:
    """Folder of a run of the classes by attributes, `run.pth`, and of its data, `data`."""
    folder = tmp_path_factory.mktemp("sections")
    train_in(
        folder,
        write_sections(folder / "data"),
        machines="auto",
        classes="attributes",
        split_ratio=0.7,
    )
    return folder


def by_hand(outputs, own: list[int], config) -> np.ndarray:
    """The lowest score over these classes."""
    objective = Objective(config.mode, config.m, config.s)
    each = [objective.anomaly_score(outputs.similarity, torch.full((len(outputs.similarity),), label), torch.float64)
            for label in own]  # fmt: skip
    return np.min([scores.numpy() for scores in each], axis=0)


def scores_of(folder: Path, name: str) -> dict[str, float]:
    return {clip: float(score) for clip, score in read_csv(folder / name)}


def test_a_clip_has_the_lowest_score_over_the_attributes_of_its_section(sections, call):
    root, results = sections / "data", sections / "run" / "test"
    status, output, _ = evaluate(call, sections, root, "--score_dtype", "float64")
    assert status == 0
    trained = load_model(sections / "run.pth", load_config(data_root=str(root)), {})
    own = ["vel_1", "vel_2", "vel_3"]
    assert trained.config.classes == {"bearing": {"00": own}, "fan": {"00": own}}
    assert trained.network.num_classes == 6
    clips = load_clips(trained.config, "test")
    outputs = run_model(trained, clips, torch.device("cpu"))
    for machine_type, labels in (("bearing", [0, 1, 2]), ("fan", [3, 4, 5])):
        found = scores_of(results, f"anomaly_score_{machine_type}_section_00_test.csv")
        assert len(found) == 6
        of_type = clips.clips["machine_type"] == machine_type
        expected = dict(zip((path.name for path in clips.clips["path"][of_type]),
                            by_hand(outputs, labels, trained.config)[of_type], strict=True))  # fmt: skip
        assert found == pytest.approx(expected, rel=1e-9)
        assert set(
            scores_of(results, f"decision_result_{machine_type}_section_00_test.csv")
        ) == set(found)
    assert "|AUC source AUC target     pAUC official\n" in output
    text = (results / "results.md").read_text()
    assert "rule of DCASE 2022" in text
    assert "- classes: attributes (6 classes)\n" in text

    held_out = load_checkpoint(sections / "run.pth")["held_out"]
    _, valid = load_clips(trained.config, "train").split(0.7, trained.config.seed)
    outputs = run_model(trained, valid, torch.device("cpu"))
    of_type = valid.clips["machine_type"] == "fan"
    lowest = np.where(
        of_type,
        by_hand(outputs, [3, 4, 5], trained.config),
        by_hand(outputs, [0, 1, 2], trained.config),
    )
    assert held_out["score"] == pytest.approx(lowest.tolist(), rel=1e-5), (
        "thresholds rest on the same scores"
    )


@pytest.mark.parametrize("scoring", ["published", "nearest"])
def test_a_single_recording_scores_as_in_the_evaluation_of_its_section(sections, call, scoring):
    root = sections / "data"
    options = ("--scoring", scoring, "--score_dtype", "float64")
    pictures = ("--plots", "--report") if scoring == "published" else ()
    assert evaluate(call, sections, root, *options, *pictures)[0] == 0
    expected = scores_of(sections / "run" / "test", "anomaly_score_fan_section_00_test.csv")
    words = (
        root / "fan" / "test",
        "--machine_type",
        "fan",
        "--machine_id",
        "0",
        "--json",
        "--scoring",
        scoring,
    )
    status, output, _ = call(score_script.main, sections / "run.pth", *words)
    assert status == 0
    assert {Path(row["file"]).name: row["score"] for row in json.loads(output)} == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize("scoring", ["angle", "nearest"])
def test_the_closest_class_of_the_section_counts(sections, scoring):
    config = load_config(data_root=str(sections / "data"), scoring=scoring, neighbours=1)
    trained = load_model(sections / "run.pth", config, {})
    embedding = torch.randn(4, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if scoring == "angle":
        others, labels = trained.network.arcface.weight.detach().double(), torch.arange(6)
    else:
        bank = trained.state["embeddings"]["bank"]
        others, labels = bank["embedding"].double(), bank["label"]
    cosine = torch.nn.functional.normalize(embedding) @ torch.nn.functional.normalize(others).T
    nearest = cosine[:, labels >= 3].amax(dim=1)
    expected = torch.rad2deg(torch.acos(nearest)) if scoring == "angle" else 1 - nearest
    for label in (3, 4, 5):
        found = embedding_scores(trained, embedding, torch.full((4,), label))
        assert found == pytest.approx(expected.numpy(), abs=1e-6)


def test_the_checkpoint_keeps_the_classes(sections, call, fails):
    root = sections / "data"
    assert evaluate(call, sections, root, "--classes", "attributes", "--machines", "auto")[0] == 0
    fails(eval_script.main, sections / "run.pth", "--data_root", root, "--classes", "section",
          match="command line: classes 'section' is not the checkpoint's")  # fmt: skip
    words = arguments(sections, root, machines="auto", classes="attributes", split_ratio=0.7)
    status, output, _ = call(train_script.main, *words, "--resume")
    assert (status, "lowest validation loss" in output) == (0, True)
    words = arguments(sections, root, machines="auto", split_ratio=0.7)
    fails(
        train_script.main,
        *words,
        "--resume",
        match=r"had another configuration: classes \(was attributes \(6 classes\), is 'section'\)",
    )


@pytest.mark.slow
def test_classes_by_section_and_by_attributes_are_compared(sections, tmp_path, call):
    root = sections / "data"
    call(train_script.main, *arguments(tmp_path, root, machines="auto", split_ratio=0.7))
    weights = (sections / "run.pth", tmp_path / "run.pth")
    status, output, _ = call(
        eval_script.main, *weights, "--data_root", root, "--output", tmp_path / "out"
    )
    assert status == 0
    assert "| classes attributes (6 classes) minus classes section (test clips alone) |" in output
    header = next(line for line in output.splitlines() if line.startswith("| configuration |"))
    assert header.endswith(
        "| AUC source, harmonic mean | AUC target, harmonic mean | pAUC, harmonic mean | official score |"
    )
    assert (
        "Domains: rule of DCASE 2022 and later" in (tmp_path / "out" / "comparison.md").read_text()
    )


def test_names_that_lie_are_one_line(sections, tmp_path, fails):
    """From each script, before anything is trained or scored."""
    root = Path(shutil.copytree(sections / "data", tmp_path / "data"))
    (root / "fan/train/section_00_source_train_normal_0000_vel_1.wav").rename(
        root / "fan/train/normal_id_00_0000.wav"
    )
    words = arguments(tmp_path, root, machines="auto")
    both = "bearing/train/section_00_source_train_normal_0000_vel_1.wav and .*fan/train/normal_id_00_0000.wav are named"
    fails(train_script.main, *words, match=both)
    fails(eval_script.main, sections / "run.pth", "--data_root", root, match=both)
    (root / "fan/train/normal_id_00_0000.wav").rename(
        root / "fan/train/section_00_source_train_normal_0000_vel.wav"
    )
    fails(
        train_script.main,
        *words,
        match="its attributes are 2 words and those of .*0000_vel.wav 1, which cannot be",
    )
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".pth"] == []


@pytest.mark.slow
def test_evaluation_clips_of_later_years(sections, tmp_path, call):
    """In the test folder, beside the others; with labels from the organisers' lists, and without."""
    root = tmp_path / "data"
    for machine_type in ("bearing", "fan"):
        for index, path in enumerate(sorted((sections / "data" / machine_type / "test").iterdir())):
            target = root / machine_type / "test" / f"section_00_{index:04d}.wav"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
            for kind, word in (("data", "anomaly"), ("domain", "target")):
                file = (
                    root
                    / f"ground_truth_{kind}"
                    / f"ground_truth_{machine_type}_section_00_test.csv"
                )
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("a") as lines:
                    lines.write(f"{target.name},{int(word in path.name)}\n")
    folder = Path(
        shutil.copytree(sections, tmp_path / "copy", ignore=shutil.ignore_patterns("data"))
    )
    assert evaluate(call, folder, sections / "data")[0] == 0
    status, output, _ = evaluate(call, folder, root, "--split", "evaluation")
    assert status == 0
    rows = {
        name: read_csv(folder / "run" / name / "metrics.csv") for name in ("test", "evaluation")
    }
    assert rows["test"] == rows["evaluation"]
    assert (folder / "run/evaluation/anomaly_score_fan_section_00_test.csv").is_file()
    shutil.rmtree(root / "ground_truth_data")
    status, output, errors = evaluate(call, folder, root, "--split", "evaluation")
    assert (status, "AUC" in output) == (0, False)
    assert (
        "12 of 12 clips are not in ground_truth_data and ground_truth_domain and count in no metric (copy"
        in errors
    )


# ---- Several checkpoints ----


def test_several_checkpoints_are_compared(lively, tmp_path, data_root, call, fails):
    """Two seeds of one configuration and one of another, which differ in weights made up here."""
    paths = []
    for name, seed, m in (("a", 1, 0.7), ("b", 2, 0.7), ("c", 1, 0.5)):
        state = load_checkpoint(lively / "run.pth")
        generator = torch.Generator().manual_seed(len(paths))
        weight = state["model"]["arcface.weight"]
        state["model"]["arcface.weight"] = weight + 0.5 * torch.randn(
            weight.shape, generator=generator
        )
        state["config"] |= {"seed": seed, "m": m}
        paths.append(tmp_path / f"{name}.pth")
        save_checkpoint(state, paths[-1])
    options = ("--data_root", data_root, "--device", "cpu")
    status, output, _ = call(
        eval_script.main, *paths, *options, "--output", tmp_path / "comparison"
    )
    assert status == 0
    text = (tmp_path / "comparison" / "comparison.md").read_text()
    pooled = [100 * float(row[2]) for path in paths for row in read_csv(path.with_suffix("") / "test" / "metrics.csv")
              if row[:2] == ["average", "pooled"]]  # fmt: skip
    assert len(set(pooled)) == 3
    for path, value in zip(paths, pooled, strict=True):
        assert re.search(
            rf"\| {path} \| {value:.2f} \|.*\| {1 + (path.stem == 'b')} \| 1 \|", text
        ), "seed and epoch"
    both = pooled[:2]
    assert f"| m 0.7 (n = 2) | {np.mean(both):.2f} ± {np.std(both, ddof=1):.2f} |" in text
    assert f"| m 0.5 (n = 1) | {pooled[2]:.2f} |" in text
    assert f"| m 0.7 minus m 0.5 (test clips alone) | {np.mean(both) - pooled[2]:+.2f} (" in text
    assert output.count("in percent  ") == 3
    rows = read_csv(tmp_path / "comparison" / "comparison.csv")
    assert len(rows) == 1 + 3 * 12
    torch.save(TASTgramMFN(2).state_dict(), tmp_path / "other.pth")
    fails(
        eval_script.main, paths[0], tmp_path / "other.pth", *options, match="other.pth does not fit"
    )


@pytest.mark.slow
def test_figures_of_several_checkpoints(trained, tmp_path, data_root, call):
    paths = [tmp_path / "a.pth", tmp_path / "b.pth"]
    for seed, path in enumerate(paths):
        state = load_checkpoint(trained / "run.pth")
        state["config"]["seed"] = seed
        save_checkpoint(state, path)
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
    fails(eval_script.main, *words, match="have the same folder of results; rename one")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--hop", "5"), "command line: hop has no effect with window: first; leave it out"),
        (("--over_windows", "max"), "command line: over_windows has no effect with window: first"),
        (
            ("--neighbours", "3", "--scoring", "angle"),
            "command line: neighbours has no effect with scoring: angle",
        ),
        (("--output", "here"), "--output is for comparisons"),
        (("--lr", "1"), "unknown option --lr"),
        (
            ("--score_files", "here"),
            "checkpoint has no effect with --score_files, which takes --data_root alone",
        ),
    ],
)
def test_options_without_effect_are_errors(words, match, trained, fails):
    fails(eval_script.main, trained / "run.pth", *words, match=match)


def test_missing_and_damaged_checkpoints(tmp_path, fails):
    fails(
        eval_script.main,
        tmp_path / "weights",
        match=r"weights: its results go to a folder .*weights.pth",
    )
    fails(
        eval_script.main,
        tmp_path / "none.pth",
        match="none.pth: no such checkpoint; train one with",
    )
    (tmp_path / "text.pth").write_text("hello")
    fails(eval_script.main, tmp_path / "text.pth", match="text.pth: not a readable checkpoint")


def test_no_test_clips(trained, tmp_path, fails):
    fails(
        eval_script.main, trained / "run.pth", "--data_root", tmp_path, match="no folder .*fan/test"
    )


def test_scores_that_are_not_finite(tmp_path, fails):
    machines = {"fan": [0, 1]}
    root = write_set(tmp_path / "data", machines, train_clips=0, test_clips=1)
    model = TASTgramMFN(2)
    torch.nn.init.constant_(model.mobilefacenet.linear1.bn.bias, float("nan"))
    torch.save(model.state_dict(), tmp_path / "run.pth")
    options = ("--data_root", root, "--machines", machines, "--device", "cpu")
    fails(eval_script.main, tmp_path / "run.pth", *options, match="4 of 4 scores are not finite")
