"""Decisions, single recordings, comparisons, figures and report of an evaluation; the attention's two gates."""

import csv
import html.parser
import itertools
import json
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import scipy.stats
import torch
from conftest import arguments, tone, write_clip
from test_eval import clips, evaluate

import eval as eval_script
import train
from dataloader import ClipSet
from evaluation.decisions import Threshold, decide, fit_threshold, fit_thresholds, rate_decisions
from evaluation.tables import markdown_table
from model import FrontEnd, TASTgramMFN
from model.tastgram import temporal_gate
from utils import load_checkpoint, load_config, save_checkpoint

CPU = torch.device("cpu")


def read_csv(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.fixture
def decided(trained_copy) -> Path:
    """The tiny run with held-out scores of every machine, of which one ID has enough of its own."""
    path = trained_copy / "run.pth"
    rng = np.random.default_rng(0)
    held_out = {"fan": {"00": rng.gamma(2, 3, 25).tolist(), "02": rng.gamma(2, 5, 5).tolist()},
                "valve": {"01": rng.gamma(1, 1, 30).tolist()}}  # fmt: skip
    save_checkpoint(path, load_checkpoint(path) | {"held_out": held_out})
    return trained_copy


# ---- Score files and results ----


def test_the_dcase_rule_on_score_files_gives_the_mean_rows(trained_copy, data_root, call):
    """Recomputed by counting pairs, from the files alone; pAUC by the area under the first tenth of the curve."""
    assert evaluate(call, trained_copy, data_root, "--score_dtype", "float64")[0] == 0
    folder = trained_copy / "run" / "eval"
    per_type: dict[str, list[tuple[float, float]]] = {}
    for path in sorted(folder.glob("anomaly_score_*.csv")):
        rows = read_csv(path)
        normal, anomalous = (
            np.array([float(score) for name, score in rows if name.startswith(condition)])
            for condition in ("normal", "anomaly")
        )
        auc = np.mean((anomalous[:, None] > normal) + 0.5 * (anomalous[:, None] == normal))
        points = [(0.0, 0.0)]
        for threshold in sorted({*normal, *anomalous}, reverse=True):
            points.append((np.mean(normal >= threshold), np.mean(anomalous >= threshold)))
        area = 0.0
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if x0 < x1 and x0 < 0.1:
                end = min(x1, 0.1)
                area += (end - x0) * (y0 + (y1 - y0) * (end - x0) / (x1 - x0) / 2)
        pauc = 0.5 * (1 + (area - 0.005) / (0.1 - 0.005))
        per_type.setdefault(path.name.split("_")[2], []).append((auc, pauc))
    means = {row[0]: row for row in read_csv(folder / "metrics.csv") if row[1] == "mean"}
    for machine_type, values in per_type.items():
        auc, pauc = np.mean(values, axis=0)
        assert float(means[machine_type][2]) == pytest.approx(auc, abs=1e-9)
        assert float(means[machine_type][3]) == pytest.approx(pauc, abs=1e-9)
    averages = np.mean([np.mean(values, axis=0) for values in per_type.values()], axis=0)
    assert [float(value) for value in means["average"][2:4]] == pytest.approx(averages.tolist(), abs=1e-9)


def test_results_say_what_they_are_of(trained_copy, data_root, call):
    assert evaluate(call, trained_copy, data_root)[0] == 0
    folder = trained_copy / "run" / "eval"
    content = json.loads((folder / "metrics.json").read_text())
    assert content["about"]["seed"] == 2023
    assert content["about"]["clips trained on"] == 11
    assert content["about"]["clips of test"] == "6 normal, 6 anomalous"
    assert content["interval"] == {"coverage": 0.95, "draws": 2000, "seed": 0}
    rows = {(row[0], row[1]): row for row in read_csv(folder / "metrics.csv")[1:]}
    for machine_type, of in content["metrics"].items():
        for name, metrics in of.items():
            assert [str(value) for value in metrics.values()] == rows[machine_type, name][2:]
            assert metrics["AUC_low"] <= metrics["AUC"] <= metrics["AUC_high"]
    text = (folder / "results.md").read_text()
    assert markdown_table(content["metrics"]) in text
    assert "- mode: noisy_arcmix" in text


# ---- Decisions ----


def test_the_threshold_is_a_percentile_of_the_fitted_gamma():
    scores = scipy.stats.gamma.rvs(2.0, scale=3.0, size=5000, random_state=0)
    assert fit_threshold(scores, "gamma", 90) == pytest.approx(scipy.stats.gamma.ppf(0.9, 2.0, scale=3.0), rel=0.03)
    assert fit_threshold(scores, "quantile", 95) == np.percentile(scores, 95)


@pytest.mark.parametrize("scores", [[0.0] * 30, [1e-9] * 30, [0.0] * 29 + [5.0], [1e-300, 1e-9, 3.0] * 10])
def test_thresholds_of_odd_scores_are_finite(scores):
    assert np.isfinite(fit_threshold(scores, "gamma", 90))
    assert fit_threshold(scores, "gamma", 90) >= 0


def test_few_held_out_clips_are_pooled_and_it_is_said(capsys):
    held_out = {"fan": {"00": [1.0] * 20, "02": [3.0] * 5}}
    machines = {"fan": [0, 2, 4], "pump": [1]}
    thresholds = fit_thresholds(machines, held_out, "quantile", 90)
    assert thresholds == {
        ("fan", 0): Threshold(1.0, 20, False),
        ("fan", 2): Threshold(3.0, 25, True),
        ("fan", 4): Threshold(3.0, 25, True),
    }
    said = capsys.readouterr().err
    assert "fewer than 20 held-out clips" in said
    assert "that of the whole machine type: fan 02 (5 of 25), fan 04 (0 of 25)" in said
    assert "no held-out clips of the machine type, so there is no threshold: pump 01" in said


def test_decisions_and_how_they_are_rated():
    of = clips({("fan", 0): (2, 2), ("fan", 2): (1, 0)})
    index, decisions = decide(of, np.array([1.0, 3.0, 2.0, 9.0, 5.0]), {("fan", 0): Threshold(2.0, 20, False)})
    assert index == [0, 1, 2, 3]
    assert decisions.tolist() == [0, 1, 0, 1], "a score equal to the threshold is normal"
    rated = rate_decisions(np.array([0, 0, 1, 1]), decisions)
    assert rated == {"precision": 0.5, "recall": 0.5, "F1": 0.5}
    nothing = rate_decisions(np.array([0, 0]), np.array([0, 0]))
    assert nothing == {"precision": None, "recall": None, "F1": None}


def test_decision_files(decided, data_root, call):
    status, _, errors = evaluate(call, decided, data_root, "--threshold", "quantile", "--threshold_percentile", "80")
    assert status == 0
    assert "fan 02 (5 of 30)" in errors
    folder = decided / "run" / "eval"
    held_out = load_checkpoint(decided / "run.pth")["held_out"]
    whole = held_out["fan"]["00"] + held_out["fan"]["02"]
    expected = {
        ("fan", "00"): (np.percentile(held_out["fan"]["00"], 80), "25 clips of the ID"),
        ("fan", "02"): (np.percentile(whole, 80), "30 clips of the type"),
        ("valve", "01"): (np.percentile(held_out["valve"]["01"], 80), "30 clips of the ID"),
    }
    header, *rows = read_csv(folder / "decisions.csv")
    assert header == ["machine_type", "machine_id", "threshold", "held_out", "precision", "recall", "F1"]
    assert {(row[0], row[1]): (float(row[2]), row[3]) for row in rows} == expected
    assert evaluate(call, decided, data_root, "--threshold", "quantile", "--threshold_percentile", "80",
                    "--score_dtype", "float64")[0] == 0  # fmt: skip
    for (machine_type, machine_id), (threshold, _) in expected.items():
        name = f"{machine_type}_id_{machine_id}.csv"
        scores = read_csv(folder / f"anomaly_score_{name}")
        assert read_csv(folder / f"decision_result_{name}") == [
            [file, str(int(float(score) > threshold))] for file, score in scores
        ]


def test_without_held_out_scores_there_are_no_decisions(trained_copy, data_root, call):
    assert evaluate(call, trained_copy, data_root)[0] == 0
    state = load_checkpoint(trained_copy / "run.pth")
    state.pop("held_out")
    save_checkpoint(trained_copy / "run.pth", state)
    status, _, errors = evaluate(call, trained_copy, data_root)
    assert status == 0
    assert "no scores of held-out clips (its training has not ended), so there are no decisions" in errors
    assert not list((trained_copy / "run" / "eval").glob("decision*"))


def test_held_out_scores_are_those_of_the_validation_clips(trained, data_root):
    """float64 scores of the best weights for the clips that were not trained on."""
    state = load_checkpoint(trained / "run.pth")
    config = load_config(**state["config"])
    result = eval_script.load_model(trained / "run.pth", config, set())
    _, valid_clips = ClipSet.load(config, "train").split(config.split_ratio, config.seed)
    scores = eval_script.evaluate(result, valid_clips, CPU).exact_scores
    stored = [score for ids in state["held_out"].values() for of in ids.values() for score in of]
    assert stored == pytest.approx(scores.tolist(), rel=1e-6, abs=1e-9)


# ---- Single recordings ----


def score(call, folder: Path, *words):
    return call(eval_script.main, folder / "run.pth", "--device", "cpu", "--score", *words)


def test_single_recordings_score_as_in_an_evaluation(decided, data_root, call):
    assert evaluate(call, decided, data_root, "--score_dtype", "float64")[0] == 0
    expected = dict(read_csv(decided / "run" / "eval" / "anomaly_score_fan_id_00.csv"))
    folder = data_root / "fan" / "test"
    status, output, _ = score(call, decided, folder, "--machine_type", "fan", "--machine_id", "0", "--json")
    assert status == 0
    rows = {Path(row["file"]).name: row for row in json.loads(output)}
    assert set(rows) == {path.name for path in folder.iterdir()}
    for name, value in expected.items():
        assert rows[name]["score"] == pytest.approx(float(value), rel=1e-4, abs=1e-6)
        assert (rows[name]["decision"] == "anomalous") == (rows[name]["score"] > rows[name]["threshold"])


def test_the_best_fitting_id_is_named(decided, data_root, call):
    clip = data_root / "fan" / "test" / "normal_id_02_00000000.wav"
    each = {}
    for machine_id in (0, 2):
        _, output, _ = score(call, decided, clip, "--machine_type", "fan", "--machine_id", machine_id, "--json")
        each[machine_id] = json.loads(output)[0]["score"]
    status, output, _ = score(call, decided, clip, "--machine_type", "fan")
    assert status == 0
    file, machine, value, threshold, decision = output.rstrip("\n").split("\t")
    best = min(each, key=each.get)
    assert (file, machine, float(value)) == (str(clip), f"fan {best:02d}", pytest.approx(each[best], rel=1e-4))
    assert decision == ("anomalous" if float(value) > float(threshold) else "normal")


def test_a_bad_recording_is_named_in_its_line_and_the_rest_scored(decided, tmp_path, fails, call):
    good = write_clip(tmp_path / "folder" / "b.wav", tone(5, 2.0), rate=44_100)
    (tmp_path / "folder" / "a.wav").write_text("not audio")
    places = (tmp_path / "folder", tmp_path / "nowhere.wav", "--machine_type", "fan", "--machine_id", "2")
    status, output, errors = score(call, decided, *places)
    assert status == 2
    lines = output.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'folder' / 'a.wav'}\terror: unreadable")
    assert lines[1].split("\t")[:2] == [str(good), "fan 02"]
    assert lines[2] == f"{tmp_path / 'nowhere.wav'}\terror: unreadable: not a file"
    assert errors.splitlines()[-1] == "error: 2 of 3 recordings could not be scored; their lines say why"
    fails(
        eval_script.main, decided / "run.pth", "--score", good, "--machine_type", "fan", "--machine_id", "7",
        match=r"run.pth knows no machine fan 7; it was trained on fan 0, 2; valve 1",
    )  # fmt: skip
    fails(eval_script.main, decided / "run.pth", "--score", good, match="--score needs --machine_type")
    (tmp_path / "empty").mkdir()
    fails(
        eval_script.main, decided / "run.pth", "--score", tmp_path / "empty", "--machine_type", "fan",
        match="empty: no WAV or FLAC files in this folder",
    )  # fmt: skip


def test_half_precision_scores_stay_near(decided, data_root, call):
    scores = []
    for precision in ("fp32", "bf16"):
        assert evaluate(call, decided, data_root, "--eval_precision", precision)[0] == 0
        rows = read_csv(decided / "run" / "eval" / "anomaly_score_fan_id_00.csv")
        scores.append(np.array([float(value) for _, value in rows]))
    assert not np.array_equal(*scores)
    assert np.abs(scores[0] - scores[1]).max() < 0.5, "of scores around 10"


# ---- Several checkpoints ----


def test_several_checkpoints_are_compared(trained, tmp_path, data_root, call, fails):
    """Two seeds of one configuration and one of another, which differ in weights made up here."""
    paths = []
    for name, seed, m in (("a", 1, 0.7), ("b", 2, 0.7), ("c", 1, 0.5)):
        state = load_checkpoint(trained / "run.pth")
        generator = torch.Generator().manual_seed(len(paths))
        weight = state["model"]["arcface.weight"]
        state["model"]["arcface.weight"] = weight + 0.2 * torch.randn(weight.shape, generator=generator)
        state["config"] |= {"seed": seed, "m": m}
        paths.append(tmp_path / f"{name}.pth")
        save_checkpoint(paths[-1], state)
    options = ("--data_root", data_root, "--store_path", trained / "store", "--device", "cpu")
    status, output, _ = call(eval_script.main, *paths, *options, "--output", tmp_path / "comparison")
    assert status == 0
    text = (tmp_path / "comparison" / "comparison.md").read_text()
    pooled = [100 * float(row[2]) for path in paths for row in read_csv(path.with_suffix("") / "eval" / "metrics.csv")
              if row[:2] == ["average", "pooled"]]  # fmt: skip
    for path, value in zip(paths, pooled, strict=True):
        assert f"| {path} | {value:.2f} |" in text
    both = pooled[:2]
    assert f"| m 0.7 (n = 2) | {np.mean(both):.2f} ± {np.std(both, ddof=1):.2f} |" in text
    assert f"| m 0.5 (n = 1) | {pooled[2]:.2f} |" in text
    assert f"| m 0.7 minus m 0.5 | {np.mean(both) - pooled[2]:+.2f} (" in text
    assert output.count("in percent") == 3
    rows = read_csv(tmp_path / "comparison" / "comparison.csv")
    assert len(rows) == 1 + 3 * 12
    torch.save(TASTgramMFN(2).state_dict(), tmp_path / "other.pth")
    fails(eval_script.main, paths[0], tmp_path / "other.pth", *options, match="other.pth does not fit")


# ---- Figures and report ----


class Reader(html.parser.HTMLParser):
    """Collects what a page refers to, and checks that its tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.references, self.images = [], [], 0

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href")]
        self.images += tag == "img"
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_figures_and_report(decided, data_root, call):
    status, output, _ = evaluate(call, decided, data_root, "--report")
    assert status == 0
    folder = decided / "run" / "eval"
    figures = {path.stem: matplotlib.image.imread(path) for path in (folder / "figures").iterdir()}
    assert set(figures) == {"angles", "roc", "scores", "tastgram", "embedding", "history"}
    assert all(image.std() > 0.02 for image in figures.values()), "not empty"
    assert f"6 figures: {folder / 'figures'}" in output
    page = (folder / "report.html").read_text()
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert reader.images == 6 + 12  # of each of three IDs two normal and two anomalous clips, all there are
    assert all(reference.startswith("data:image/png;base64,") for reference in reader.references)
    assert "anomaly_id_02_00000001.wav" in page
    assert "epoch: 1\n" in page, "the training's configuration"


def test_figures_of_unlabelled_clips_and_of_the_linear_head(tmp_path, data_root, call):
    options = arguments(tmp_path, data_root, mode="cross_entropy", input="[sgram]")
    assert call(train.main, *options)[0] == 0
    assert evaluate(call, tmp_path, data_root, "--plots")[0] == 0
    assert (tmp_path / "run/eval/figures/angles.png").exists()
    root = tmp_path / "data"
    for path in (data_root / "fan" / "test").glob("normal*"):
        (root / "fan" / "evaluation").mkdir(parents=True, exist_ok=True)
        (root / "fan" / "evaluation" / path.name.removeprefix("normal_")).symlink_to(path)
    assert evaluate(call, tmp_path, root, "--part", "evaluation", "--report")[0] == 0
    names = {path.stem for path in (tmp_path / "run/evaluation/figures").iterdir()}
    assert names == {"scores", "tastgram", "embedding", "history"}
    assert "Hardest" not in (tmp_path / "run/evaluation/report.html").read_text()


def test_panels_of_several_checkpoints(trained, tmp_path, data_root, call):
    paths = [Path(shutil.copy(trained / "run.pth", tmp_path / f"{name}.pth")) for name in "ab"]
    options = ("--data_root", data_root, "--store_path", trained / "store", "--device", "cpu")
    assert call(eval_script.main, *paths, *options, "--output", tmp_path / "both", "--plots")[0] == 0
    height, width, _ = matplotlib.image.imread(tmp_path / "both" / "angles.png").shape
    assert width > 2 * height


def test_a_spoilt_history_is_named(trained_copy, data_root, fails):
    (trained_copy / "run" / "history.csv").write_text("epoch,lr\n1,fast\n")
    options = ("--data_root", data_root, "--store_path", trained_copy / "store", "--device", "cpu", "--plots")
    fails(eval_script.main, trained_copy / "run.pth", *options, match="history.csv: not the history of a training")


# ---- The attention ----


def test_the_standardised_gate_is_open_where_the_published_one_is_shut(tmp_path, data_root, call):
    options = arguments(tmp_path, data_root, attention="standardised")
    assert call(train.main, *options)[0] == 0
    state = load_checkpoint(tmp_path / "run.pth")
    config = load_config(**state["config"])
    clips_ = ClipSet.load(config, "train")
    train_clips, _ = clips_.split(config.split_ratio, config.seed)
    log_mel = FrontEnd(["sgram"])(train_clips.batch(np.arange(len(train_clips)), CPU)[0])["log_mel"]
    mean, std = state["model"]["log_mel_mean"], state["model"]["log_mel_std"]
    assert torch.allclose(mean[:, 0], log_mel.mean(dim=(0, 1, 3)), atol=1e-3)
    assert torch.allclose(std[:, 0], log_mel.std(dim=(0, 1, 3)), rtol=1e-3)
    model = eval_script.load_model(tmp_path / "run.pth", load_config(), set()).model
    assert temporal_gate(log_mel).max() < 1e-3
    assert temporal_gate(model.gate_source(log_mel)).min() > 0.5
    assert evaluate(call, tmp_path, data_root)[0] == 0


def test_the_published_attention_adds_nothing_to_the_weights():
    plain, standardised = TASTgramMFN(3).state_dict(), TASTgramMFN(3, attention="standardised").state_dict()
    assert set(standardised) - set(plain) == {"log_mel_mean", "log_mel_std"}
    without = TASTgramMFN(3, channels=["sgram"], attention="standardised")
    assert not {"log_mel_mean", "log_mel_std"} & set(without.state_dict())


def test_a_checkpoint_from_before_there_was_a_choice_is_of_the_published_attention(trained_copy, data_root, call):
    state = load_checkpoint(trained_copy / "run.pth")
    state["config"].pop("attention")
    save_checkpoint(trained_copy / "run.pth", state)
    assert evaluate(call, trained_copy, data_root)[0] == 0
