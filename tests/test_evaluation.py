"""The rooms of the evaluation: metrics and intervals, scoring, decisions, tables, comparison,
figures, report.
"""

import html.parser
import itertools
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from conftest import (
    MACHINES,
    clips_of,
    count_first_pairs,
    count_pairs,
    make_lively,
    tone,
    write_clip,
)
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from test_eval import read_csv

from audio import check_recording
from checkpoint import RunFiles, TrainedModel, build_network, load_checkpoint, load_model
from config import load_config
from corpus import MACHINE
from dataloader import ClipSet, load_clips
from evaluation.comparison import (
    compare,
    difference,
    find_pairs,
    group_by_configuration,
    name_configurations,
)
from evaluation.decisions import (
    count_decisions,
    decide,
    explain_thresholds,
    fit_threshold,
    fit_thresholds,
)
from evaluation.figures import (
    MAX_COLUMNS,
    draw_all,
    draw_angles,
    draw_timeline,
    read_history,
    read_samples,
)
from evaluation.metrics import NO_DOMAINS, Group, Metrics, compute, measure, resample
from evaluation.report import write_report
from evaluation.result import Result, evaluate
from evaluation.scoring import anomaly_scores, held_out_scores, run_model, with_embeddings
from evaluation.tables import (
    PUBLISHED_IDS,
    format_table,
    markdown_table,
    published_rows,
    with_interval,
    write_per_machine,
    write_result,
)
from inference import Outputs, pack_embeddings
from model import EMBEDDING_SIZE, LogMel
from utils import UserError

CPU = torch.device("cpu")


def clips(counts: dict[tuple[str, int], tuple[int, int]]) -> pd.DataFrame:
    """A table of clips with so many normal and anomalous ones per machine."""
    rows = [
        (
            Path(f"{prefix}_id_{number:02d}_{index}.wav"),
            machine_type,
            f"{number:02d}",
            label,
            condition,
        )
        for label, ((machine_type, number), (normal, anomalous)) in enumerate(counts.items())
        for prefix, condition, count in (
            ("normal", "normal", normal),
            ("anomaly", "anomalous", anomalous),
        )
        for index in range(count)
    ]
    return pd.DataFrame(rows, columns=["path", *MACHINE, "label", "condition"])


def score_clips(trained: TrainedModel, clips: ClipSet) -> Result:
    """The result for the score that the configuration names."""
    kind = trained.config.scoring
    return evaluate(trained, clips, "test", CPU, [kind])[kind]


def measured(of: pd.DataFrame, scores, draws: int = 10, seed: int = 0) -> Metrics:
    return measure(of.assign(score=scores), draws=draws, seed=seed)


@pytest.fixture(scope="module")
def test_clips(data_root) -> ClipSet:
    return clips_of(data_root, "test")


@pytest.fixture(scope="module")
def result(trained, test_clips, tmp_path_factory) -> Result:
    """An evaluation of the tiny run with lively weights and with held-out scores; scores in
    float64.
    """
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("result") / "trained"))
    make_lively(folder)
    config = load_config(score_dtype="float64", threshold="quantile", threshold_percentile=80)
    return score_clips(load_model(folder / "run.pth", config, {}), test_clips)


# ---- Metrics ----


def test_auc_counts_pairs_and_half_of_the_ties():
    table = measured(clips({("fan", 0): (3, 2)}), [0.1, 0.4, 0.3, 0.3, 0.9]).table
    row = table.loc["fan", "00"]
    assert row["AUC"] == pytest.approx((1 + 0 + 0.5 + 3) / 6)
    assert (row["n_normal"], row["n_anomaly"]) == (3, 2)


def test_partial_auc_is_standardised():
    of, rng = clips({("fan", 0): (2000, 2000)}), np.random.default_rng(0)
    is_anomaly = np.repeat([False, True], 2000)
    chance, separated = rng.normal(size=4000), rng.normal(size=4000) + is_anomaly
    pauc = [
        measured(of, scores).table.loc[("fan", "00"), "pAUC"]
        for scores in (chance, is_anomaly * 1.0, separated)
    ]
    assert pauc[0] == pytest.approx(0.5, abs=0.02)
    assert pauc[1] == 1.0
    assert pauc[2] == pytest.approx(roc_auc_score(is_anomaly, separated, max_fpr=0.1), abs=1e-12)


def test_every_row_agrees_with_scikit_learn():
    """Random scores with many ties; the rows of several IDs combined by hand."""
    of = clips(
        {
            ("fan", 2): (30, 20),
            ("fan", 0): (7, 45),
            ("fan", 11): (50, 1),
            ("pump", 0): (1, 9),
            ("valve", 4): (40, 40),
        }
    )
    rng = np.random.default_rng(5)
    of["score"] = np.round(rng.normal(size=len(of)) + 0.5 * (of["condition"] == "anomalous"), 1)
    assert of["score"].nunique() < len(of) / 3
    table = measure(of, draws=10).table

    def expected(chosen: pd.DataFrame) -> list[float]:
        is_anomaly = chosen["condition"] == "anomalous"
        auc, pauc = (
            roc_auc_score(is_anomaly, chosen["score"], max_fpr=max_fpr) for max_fpr in (None, 0.1)
        )
        return [auc, pauc, sum(~is_anomaly), sum(is_anomaly)]

    rows = {}
    for machine_type, of_type in of.groupby("machine_type"):
        per_id = {name: expected(chosen) for name, chosen in of_type.groupby("machine_id")}
        rows |= {(machine_type, name): row for name, row in per_id.items()}
        rows[machine_type, "pooled"] = expected(of_type)
        rows[machine_type, "mean"] = [
            sum(column) / len(per_id) for column in zip(*per_id.values(), strict=True)
        ]
        rows[machine_type, "min"] = [min(column) for column in zip(*per_id.values(), strict=True)]
    for name in ("pooled", "mean", "min"):
        columns = zip(
            *(rows[machine_type, name] for machine_type in ("fan", "pump", "valve")), strict=True
        )
        rows["average", name] = [sum(column) / 3 for column in columns]
    assert list(table.index) == list(rows)
    for key, row in rows.items():
        assert table.loc[key, ["AUC", "pAUC", "n_normal", "n_anomaly"]].tolist() == pytest.approx(
            row, abs=1e-12
        ), key


def test_pooled_mean_and_lowest():
    # Each ID is separated perfectly, or not at all, but on scales of their own: pooling sees that,
    # the mean does not.
    of = clips({("fan", 0): (2, 2), ("fan", 2): (2, 2), ("pump", 0): (1, 3)})
    table = measured(of, [1, 2, 3, 4, 11, 12, 13, 10, 1, 2, 3, 0]).table
    assert list(table.index) == [
        ("fan", "00"), ("fan", "02"), ("fan", "pooled"), ("fan", "mean"), ("fan", "min"),
        ("pump", "00"), ("pump", "pooled"), ("pump", "mean"), ("pump", "min"),
        ("average", "pooled"), ("average", "mean"), ("average", "min"),
    ]  # fmt: skip
    assert table.loc["fan"]["AUC"].tolist() == [1.0, 0.5, (2 * 2 + 4 + 2) / 16, 0.75, 0.5]
    assert table.loc[("pump", "00"), "AUC"] == pytest.approx(2 / 3)
    assert table.loc[("average", "mean"), "AUC"] == pytest.approx((0.75 + 2 / 3) / 2)
    assert table.loc[("average", "min"), "AUC"] == pytest.approx((0.5 + 2 / 3) / 2)
    assert table.loc[("average", "pooled"), "AUC"] == pytest.approx((10 / 16 + 2 / 3) / 2)
    assert table.loc[("fan", "pooled"), "n_normal"] == 4


def test_the_lowest_is_of_each_column_on_its_own():
    """One ID has the lower AUC, the other, whose highest clip is a normal one, the lower pAUC."""
    of = clips({("fan", 0): (3, 8), ("fan", 2): (5, 7)})
    table = measured(of, [9, 0, 0, *[5] * 8, *[5] * 5, *[9] * 4, *[0] * 3]).table.loc["fan"]
    assert table.loc["00", "AUC"] > table.loc["02", "AUC"] == table.loc["min", "AUC"]
    assert table.loc["02", "pAUC"] > table.loc["00", "pAUC"] == table.loc["min", "pAUC"]
    assert table.loc["min", ["n_normal", "n_anomaly"]].tolist() == [3, 7]
    assert str(table.loc["mean", "n_normal"]) == "4", "a whole number of clips"
    assert table.loc["mean", "n_anomaly"] == 7.5


def test_one_class_only_is_left_out_and_named(result, tmp_path, capsys):
    of = clips({("fan", 0): (2, 2), ("fan", 2): (2, 0), ("pump", 0): (0, 2)})
    of = of.assign(
        score=np.arange(8.0), exact_score=0.0, decision=pd.Series(pd.NA, of.index, "Int64")
    )
    metrics = measure(of)
    auc = metrics.table["AUC"]
    assert math.isnan(auc["fan", "02"])
    assert auc["fan", "mean"] == auc["fan", "00"] == 1.0
    assert math.isnan(auc["pump", "pooled"])
    assert math.isnan(auc["pump", "mean"])
    assert auc["average", "mean"] == 1.0
    write_result(replace(result, clips=of, metrics=metrics), tmp_path, "test")
    said = capsys.readouterr().err
    assert (
        "because normal or anomalous clips are missing: fan 02, pump 00, pump pooled, pump mean, pump min"
        in said
    )
    rows = {(row[0], row[1]): row[2:] for row in read_csv(tmp_path / "metrics.csv")}
    assert rows["fan", "02"] == ["", "", "2", "0", "", "", "", ""]
    assert rows["fan", "mean"][:2] == rows["fan", "00"][:2] == ["1.0", "1.0"]


# ---- Intervals ----


@pytest.mark.parametrize("ties", [False, True])
def test_weighted_areas_are_those_of_repeated_clips(ties):
    rng = np.random.default_rng(1)
    is_anomaly = np.repeat([False, True], [60, 40])
    scores = rng.normal(size=100) + is_anomaly
    if ties:
        scores = np.round(scores)
    domain = np.full(100, "")
    counts = resample(is_anomaly, domain, 20, rng)
    assert (counts[0] == 1).all(), "first the clips themselves"
    assert (counts[:, :60].sum(axis=1) == 60).all()
    assert (counts[:, 60:].sum(axis=1) == 40).all()
    rows = compute(Group(is_anomaly, domain, scores, counts), NO_DOMAINS)
    for count, row in zip(counts.astype(int), rows, strict=True):
        repeated = np.repeat(is_anomaly, count), np.repeat(scores, count)
        assert row[0] == pytest.approx(roc_auc_score(*repeated), abs=1e-12)
        assert row[1] == pytest.approx(roc_auc_score(*repeated, max_fpr=0.1), abs=1e-12)


def test_the_bootstrap_draws_within_machine_and_condition():
    of = clips({("fan", 0): (30, 30), ("fan", 2): (30, 30), ("pump", 0): (3, 0)})
    scores = np.random.default_rng(0).normal(size=123) + (of["condition"] == "anomalous")
    (table, draws), again, turned = (
        (metrics.table, metrics.draws)
        for metrics in (measured(of, s, 200, 3) for s in (scores, scores, -scores))
    )
    assert set(draws) == set(table.index)
    assert all(len(drawn) == 201 for drawn in draws.values())
    assert all(np.array_equal(draws[key], again[1][key], equal_nan=True) for key in draws)
    for column, name in enumerate(("AUC", "pAUC")):
        drawn = {key: of_row[:, column] for key, of_row in draws.items()}
        assert [of_row[0] for of_row in drawn.values()] == pytest.approx(
            table[name].tolist(), nan_ok=True
        )
        assert np.allclose(drawn["fan", "mean"], (drawn["fan", "00"] + drawn["fan", "02"]) / 2)
        assert np.array_equal(
            drawn["fan", "min"], np.minimum(drawn["fan", "00"], drawn["fan", "02"])
        )
        assert np.array_equal(drawn["average", "min"], drawn["fan", "min"])
        bounds = np.percentile(drawn["fan", "pooled"][1:], [2.5, 97.5])
        assert table.loc[
            ("fan", "pooled"), [f"{name}_low", f"{name}_high"]
        ].tolist() == pytest.approx(bounds)
    auc, drawn = draws["fan", "pooled"][0, 0], draws["fan", "pooled"][1:, 0]
    assert np.allclose(turned[1]["fan", "pooled"][1:, 0], 1 - drawn), (
        "the same clips whatever the scores"
    )
    # Hanley and McNeil's standard error of an AUC, with 60 normal and 60 anomalous clips
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    error = np.sqrt((auc * (1 - auc) + 59 * (q1 - auc**2) + 59 * (q2 - auc**2)) / 3600)
    assert drawn.mean() == pytest.approx(auc, abs=0.02)
    assert drawn.std() == pytest.approx(error, rel=0.25)


def test_perfect_scores_leave_no_room():
    draws = measured(clips({("fan", 0): (5, 5)}), np.arange(10.0), draws=50).draws
    assert (draws["fan", "00"][:, 0] == 1).all()
    assert np.allclose(draws["fan", "00"][:, 1], 1)


# ---- Scoring ----


def test_scores_do_not_depend_on_the_batch_size(result, test_clips):
    config = load_config(score_dtype="float64", batch_size=5)
    again = score_clips(load_model(result.trained.path, config, {}), test_clips)
    assert again.clips["score"].dtype == np.float64
    assert again.clips["score"].tolist() == pytest.approx(
        result.clips["score"].tolist(), rel=1e-4, abs=1e-6
    )


@pytest.mark.slow
def test_half_precision_scores_stay_near(result, test_clips):
    model = load_model(result.trained.path, load_config(eval_precision="bf16"), {})
    scores = score_clips(model, ClipSet(test_clips.clips[:4], 4)).clips["score"]
    differences = (scores - result.clips["score"][:4]).abs()
    assert differences.max() > 1e-4
    assert differences.max() < 0.5, "of scores around 20"


def test_held_out_scores_are_those_of_the_validation_clips(trained, data_root):
    """float64 scores of the best weights for the clips that were not trained on."""
    state = load_checkpoint(trained / "run.pth")
    config = load_config(**state["config"])
    _, valid_clips = load_clips(config, "train").split(config.split_ratio, config.seed)
    clips_ = score_clips(load_model(trained / "run.pth", config, {}), valid_clips).clips
    assert state["held_out"]["score"] == pytest.approx(
        clips_["exact_score"].tolist(), rel=1e-6, abs=1e-9
    )
    assert {name: state["held_out"][name] for name in MACHINE} == clips_[MACHINE].to_dict("list")


@pytest.mark.parametrize("mode", ["noisy_arcmix", "cross_entropy"])
def test_angles_are_those_to_the_centre_of_the_own_class(result, test_clips, mode):
    network = build_network(load_config(machines=MACHINES, mode=mode))
    config = result.trained.config.model_copy(update={"mode": mode})
    again = score_clips(
        replace(result.trained, network=network, config=config), ClipSet(test_clips.clips[2:6], 4)
    )
    centres = (
        (network.mobilefacenet.fc_out if mode == "cross_entropy" else network.arcface)
        .weight.detach()
        .numpy()
    )
    for angle, embedding, label in zip(
        again.clips["angle"], again.embedding, again.clips["label"], strict=True
    ):
        centre = centres[label]
        cosine = embedding @ centre / np.linalg.norm(embedding) / np.linalg.norm(centre)
        assert angle == pytest.approx(math.degrees(math.acos(cosine)), abs=1e-2)


def in_plane(*degrees: float) -> torch.Tensor:
    """Embeddings of different lengths at these angles in the plane of the first two axes."""
    angles_ = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    vectors = torch.zeros(len(degrees), EMBEDDING_SIZE, dtype=torch.float64)
    vectors[:, 0], vectors[:, 1] = angles_.cos(), angles_.sin()
    return (vectors * torch.linspace(0.5, 3, len(degrees))[:, None]).float()


def distance(degrees: float) -> float:
    return 1 - math.cos(math.radians(degrees))


def planar_model(scoring: str, centres: torch.Tensor, sub_centers: int = 1) -> TrainedModel:
    """A model of three classes with these centres. In its bank the second class has one clip, and
    the third none.
    """
    config = load_config(machines=MACHINES, scoring=scoring, sub_centers=sub_centers, input="sgram")
    network = build_network(config)
    network.arcface.weight.data = centres
    bank = pack_embeddings(in_plane(0, 20, -20, 90, 50), torch.tensor([0, 0, 0, 0, 1]))
    return TrainedModel(Path("run.pth"), network, config, {"embeddings": {"bank": bank}})


def planar_scores(model: TrainedModel, labels: list[int], *degrees: float) -> list[float]:
    embedding = in_plane(*degrees)
    with torch.no_grad():
        outputs = Outputs(model.network.arcface(embedding), embedding)
    return anomaly_scores(model, outputs, torch.tensor(labels)).tolist()


def test_the_published_score_of_known_angles():
    scores = planar_scores(planar_model("published", in_plane(0, 90, 180)), [0, 1, 2], 30, 30, 30)
    cosines = [math.cos(math.radians(angle)) for angle in (30, 60, 150)]
    for label, score in enumerate(scores):
        logits = [30 * cosine for cosine in cosines]
        with_margin = math.acos(cosines[label]) + 0.7
        logits[label] = 30 * (
            math.cos(with_margin) if with_margin < math.pi else cosines[label] - 0.7 * math.sin(0.7)
        )
        assert score == pytest.approx(
            math.log(sum(map(math.exp, logits))) - logits[label], rel=1e-5
        )


def test_the_angle_is_that_to_the_closest_centre_of_the_own_class():
    model = planar_model("angle", in_plane(0, 90, 180))
    assert planar_scores(model, [0, 1, 2, 0, 0], 30, 30, 30, 0, -90) == pytest.approx(
        [30, 60, 150, 0, 90], abs=2e-2
    )
    model = planar_model("angle", in_plane(0, 60, 90, 100, 180, 200), sub_centers=2)
    assert planar_scores(model, [0, 1, 2], 50, 50, -100) == pytest.approx([10, 40, 60], abs=1e-3)


HALF = 2**-11  # the rounding of an angle, in radians, in a bank in half precision


def test_the_nearest_clips_of_the_own_class_count():
    model = planar_model("nearest", in_plane(0, 90, 180))
    expected = [
        (distance(5) + distance(15)) / 2,  # to those at 0 and 20
        (distance(0) + distance(20)) / 2,  # ties: one of those at 20 and -20
        (distance(45) + distance(65)) / 2,
        distance(60),  # a single clip in the class, though two are asked for
        math.inf,  # none
    ]
    assert planar_scores(model, [0, 0, 0, 1, 2], 5, 0, -65, 110, 0) == pytest.approx(
        expected, abs=HALF
    )
    one, four, ten = (
        replace(model, config=model.config.model_copy(update={"neighbours": count}))
        for count in (1, 4, 10)
    )
    assert planar_scores(one, [0, 0], 5, 180) == pytest.approx(
        [distance(5), distance(90)], abs=HALF
    )
    mean = np.mean([distance(angle) for angle in (5, 15, 25, 85)])
    assert (
        planar_scores(four, [0], 5) == planar_scores(ten, [0], 5) == pytest.approx([mean], abs=HALF)
    )


def test_the_bank_is_that_of_a_fresh_computation(trained, data_root):
    """Of the clips trained on, under the best weights; the clips held out are apart."""
    model = load_model(trained / "run.pth", load_config(data_root=str(data_root)), {})
    parts = clips_of(data_root).split(0.95, 2023)
    assert [len(part) for part in parts] == [11, 1]
    for name, part in zip(("bank", "held_out"), parts, strict=True):
        embedding = run_model(model, part, CPU).embedding
        kept = model.state["embeddings"][name]
        assert torch.equal(kept["label"], part.labels)
        assert kept["embedding"].dtype == torch.float16
        normalised = torch.nn.functional.normalize(embedding)
        assert torch.allclose(kept["embedding"].float(), normalised, rtol=0, atol=HALF)


@pytest.mark.parametrize("kind", ["angle", "nearest"])
def test_thresholds_and_decisions_are_of_the_same_kind_of_score(
    kind, result, data_root, test_clips
):
    """The held-out clips, which have their scores as other clips do, and the bank, which they are
    not in.
    """
    config = result.trained.config.model_copy(
        update={"scoring": "nearest", "data_root": str(data_root)}
    )
    model = with_embeddings(replace(result.trained, config=config), ["nearest"], CPU)
    model = replace(model, config=config.model_copy(update={"scoring": kind}))
    training, held_out = clips_of(data_root).split(0.95, 2023)
    own = score_clips(model, held_out).clips
    assert held_out_scores(model)["score"].tolist() == pytest.approx(
        own["exact_score"].tolist(), rel=1e-2
    )
    again = score_clips(model, test_clips)
    assert set(again.thresholds["held_out"]) == {"1 clips of the type"}
    assert again.thresholds["threshold"].to_numpy() == pytest.approx(
        own["exact_score"].item(), rel=1e-2
    )
    decided = again.clips[again.clips["decision"].notna()]
    assert len(decided)
    assert (decided["decision"] == (decided["exact_score"] > decided["threshold"])).all()
    if kind == "nearest":
        assert score_clips(model, training).clips["score"].min() < 1e-2 < own["exact_score"].min()


def test_the_hardest_clips_are_high_normal_and_low_anomalous_ones(result):
    of = clips({("pump", 3): (5, 4), ("fan", 0): (1, 2)})
    scores = [3.0, 9.0, 1.0, 5.0, 7.0, 4.0, 2.0, 8.0, 6.0, 1.0, 2.0, 1.0]
    hardest = replace(result, clips=of.assign(exact_score=scores)).hardest
    assert hardest["exact_score"].tolist() == [9.0, 7.0, 5.0, 2.0, 4.0, 6.0, 1.0, 1.0, 2.0]
    assert hardest["machine_id"].tolist() == ["03"] * 6 + ["00"] * 3


# ---- Decisions ----


def test_the_threshold_is_a_percentile_of_the_fitted_gamma():
    scores = scipy.stats.gamma.rvs(2.0, scale=3.0, size=5000, random_state=0)
    assert fit_threshold(scores, "gamma", 90) == pytest.approx(
        scipy.stats.gamma.ppf(0.9, 2.0, scale=3.0), rel=0.03
    )
    assert fit_threshold(scores, "quantile", 95) == np.percentile(scores, 95)


@pytest.mark.parametrize(
    "scores",
    [[0.0] * 30, [5.0 + 1e-7 * x for x in range(30)], [0.0] * 29 + [5.0], [1e-300, 1e-9, 3.0] * 10],
)
def test_thresholds_of_odd_scores_are_finite(scores):
    assert np.isfinite(fit_threshold(np.array(scores), "gamma", 90))
    assert fit_threshold(np.array(scores), "gamma", 90) >= 0


def test_few_held_out_clips_are_pooled_and_it_is_said(capsys):
    rows = [("fan", "00", 1.0)] * 20 + [("fan", "02", 3.0)] * 5
    held_out = pd.DataFrame(rows, columns=[*MACHINE, "score"])
    machines = {"fan": [0, 2, 4], "pump": [1]}
    thresholds = fit_thresholds(machines, held_out, "quantile", 90)
    assert thresholds.to_dict("index") == {
        ("fan", "00"): {"threshold": 1.0, "held_out": "20 clips of the ID", "held_out_of_id": 20},
        ("fan", "02"): {"threshold": 3.0, "held_out": "25 clips of the type", "held_out_of_id": 5},
        ("fan", "04"): {"threshold": 3.0, "held_out": "25 clips of the type", "held_out_of_id": 0},
    }
    explain_thresholds(thresholds, machines, Path("run.pth"))
    said = capsys.readouterr().err
    assert "fewer than 20 held-out clips" in said
    assert "that of the whole machine type: fan 02 (5), fan 04 (0)\n" in said
    assert "no held-out clips of the machine type, so there is no threshold: pump 01" in said


def test_decisions_and_how_they_are_rated():
    of = clips({("fan", 0): (2, 2), ("fan", 2): (1, 0), ("pump", 0): (2, 0)})
    thresholds = pd.Series([2.0] * 4 + [np.nan] + [9.0] * 2)
    decisions = decide(pd.Series([1.0, 3.0, 2.0, 9.0, 5.0, 1.0, 2.0]), thresholds)
    assert decisions[:4].tolist() == [0, 1, 0, 1], "a score equal to the threshold is normal"
    assert decisions.isna().tolist() == [False] * 4 + [True] + [False] * 2
    of = pd.concat(
        [of.assign(decision=decisions), of[:1].assign(condition="unlabelled", decision=1)]
    )
    machines = pd.MultiIndex.from_tuples(
        [("fan", "00"), ("pump", "00"), ("valve", "01")], names=MACHINE
    )
    counted = count_decisions(of, pd.DataFrame({"threshold": [2.0, 9.0, 1.0]}, machines))
    assert counted.loc["fan", "00"].to_dict() == {
        "threshold": 2.0,
        "precision": 0.5,
        "recall": 0.5,
        "F1": 0.5,
    }
    assert counted.loc[["pump", "valve"], ["precision", "recall", "F1"]].isna().all(axis=None), (
        "nothing to count"
    )


# ---- Tables and files ----


def test_the_table_labels_both_ways_and_shows_the_published_row():
    of = clips(
        {
            (machine_type, int(x)): (2, 2)
            for machine_type, ids in PUBLISHED_IDS.items()
            for x in sorted(ids)
        }
    )
    metrics = measured(of, np.tile([0.0, 1.0, 0.5, 2.0], 23))
    text = format_table(metrics, published_rows(load_config(), "test", metrics))
    assert "pooled over IDs" in text
    assert "mean over IDs" in text
    assert "mAUC" in text
    fan, average = (
        next(line for line in text.splitlines() if line.startswith(name))
        for name in ("fan", "average")
    )
    assert "75.00" in fan
    assert fan.endswith("98.32    95.34    92.67")
    assert average.endswith("94.65    89.31    89.78")
    for other in (
        load_config(mode="arcface"),
        load_config(input=["sgram"]),
        load_config(window="all"),
    ):
        assert "98.32" not in format_table(metrics, published_rows(other, "test", metrics))
    others = replace(metrics, table=metrics.table.drop("fan", level="machine_type"))
    assert "94.65" not in format_table(others, published_rows(load_config(), "test", others)), (
        "an average over other types"
    )
    few = measured(
        clips({("ToyConveyor", 1): (2, 2), ("ToyCar", 1): (2, 2)}), np.tile([0.0, 1.0, 0.5, 2.0], 2)
    )
    assert not published_rows(load_config(), "test", few), "other IDs"


def test_the_dcase_rule_on_score_files_gives_the_mean_rows(result, tmp_path):
    """Recomputed by counting pairs, from the files alone; pAUC by the area under the first tenth of
    the curve.
    """
    write_result(result, tmp_path, "test")
    per_type: dict[str, list[tuple[float, float]]] = {}
    for path in sorted(tmp_path.glob("anomaly_score_*.csv")):
        rows = read_csv(path)
        normal, anomalous = (
            [float(score) for name, score in rows if name.startswith(condition)]
            for condition in ("normal", "anomaly")
        )
        rates = float(count_pairs(normal, anomalous)), float(count_first_pairs(normal, anomalous))
        per_type.setdefault(path.name.split("_")[2], []).append(rates)
    means = {row[0]: row for row in read_csv(tmp_path / "metrics.csv") if row[1] == "mean"}
    for machine_type, values in per_type.items():
        auc, pauc = np.mean(values, axis=0)
        assert float(means[machine_type][2]) == pytest.approx(auc, abs=1e-9)
        assert float(means[machine_type][3]) == pytest.approx(pauc, abs=1e-9)
    averages = np.mean([np.mean(values, axis=0) for values in per_type.values()], axis=0)
    assert [float(value) for value in means["average"][2:4]] == pytest.approx(
        averages.tolist(), abs=1e-9
    )
    assert markdown_table(result.metrics) in (tmp_path / "results.md").read_text()


def test_decision_files(result, tmp_path):
    write_result(result, tmp_path, "test")
    held_out = pd.DataFrame(result.trained.state["held_out"])
    of = {machine: group["score"] for machine, group in held_out.groupby(MACHINE)}
    whole = held_out.loc[held_out["machine_type"] == "fan", "score"]
    expected = {
        ("fan", "00"): (np.percentile(of["fan", "00"], 80), "25 clips of the ID"),
        ("fan", "02"): (np.percentile(whole, 80), "30 clips of the type"),
        ("valve", "01"): (np.percentile(of["valve", "01"], 80), "30 clips of the ID"),
    }
    header, *rows = read_csv(tmp_path / "decisions.csv")
    assert header == [
        "machine_type", "machine_id", "threshold", "held_out", "held_out_of_id", "precision", "recall", "F1",
    ]  # fmt: skip
    assert {(row[0], row[1]): (float(row[2]), row[3]) for row in rows} == expected
    decided = []
    for (machine_type, machine_id), (threshold, _) in expected.items():
        name = f"{machine_type}_id_{machine_id}.csv"
        scores = read_csv(tmp_path / f"anomaly_score_{name}")
        decisions = read_csv(tmp_path / f"decision_result_{name}")
        assert decisions == [[file, str(int(float(score) > threshold))] for file, score in scores]
        decided += [decision for _, decision in decisions]
    assert set(decided) == {"0", "1"}


def test_files_of_an_earlier_evaluation_go(result, tmp_path):
    """Those of an ID without clips, and of decisions without thresholds; what is somebody else's
    stays.
    """
    write_result(result, tmp_path, "test")
    (tmp_path / "mine.csv").touch()
    rest = result.clips[result.clips["machine_id"] != "02"].assign(decision=pd.NA)
    write_result(replace(result, clips=rest, thresholds=result.thresholds[:0]), tmp_path, "test")
    names = {
        "anomaly_score_fan_id_00.csv",
        "anomaly_score_valve_id_01.csv",
        "metrics.csv",
        "metrics.json",
        "results.md",
    }
    assert {path.name for path in tmp_path.iterdir()} == names | {"mine.csv"}


def test_file_names_with_commas_are_quoted(tmp_path):
    of = clips({("fan", 0): (1, 0)}).assign(path=[Path('normal_id_00_a,"b".wav')], score=1.5)
    write_per_machine(tmp_path, "anomaly_score", of, "score")
    (path,) = tmp_path.iterdir()
    assert read_csv(path) == [['normal_id_00_a,"b".wav', "1.5"]]


# ---- Comparison ----


def run_of(result: Result, of: pd.DataFrame, scores: np.ndarray, **keys) -> Result:
    """A result with these scores, of a configuration with these keys."""
    config = load_config(**keys)
    trained = replace(result.trained, config=config, state={"config": config.model_dump()})
    about = result.about | {"seed": config.seed, "mode": config.mode}
    return replace(
        result, trained=trained, clips=of, metrics=measured(of, scores, 200), about=about
    )


def compared(results: list[Result], folder: Path, split: str = "test") -> list[list[str]]:
    """The cells of each line of a table in comparison.md."""
    compare(group_by_configuration(results), split, folder)
    return [
        line.strip("| ").split(" | ")
        for line in (folder / "comparison.md").read_text().splitlines()
    ]


def draws_of(values: np.ndarray, clip_noise: np.ndarray) -> np.ndarray:
    """Runs `(runs, 1 + draws, 1)` with these values, and the same deviation of all in each draw of
    the clips.
    """
    return (values[:, None] + np.concatenate([[0.0], clip_noise]))[:, :, None]


def test_the_interval_of_seeds_alone_is_that_of_welch():
    rng = np.random.default_rng(0)
    for sizes in ((3, 3), (2, 7)):
        one, other = (
            rng.normal(0.9, scale, size) for scale, size in zip((0.01, 0.04), sizes, strict=True)
        )
        value, half = difference(*(draws_of(values, np.zeros(100)) for values in (one, other)))
        welch = scipy.stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
        assert (value[0] - half[0], value[0] + half[0]) == pytest.approx(tuple(welch))


def test_names_of_configurations(result):
    """By the keys and the kinds of score that differ."""

    def run(mode: str, kind: str) -> Result:
        state, config = (
            {"config": load_config(mode=mode).model_dump()},
            load_config(mode=mode, scoring=kind),
        )
        return replace(result, trained=replace(result.trained, state=state, config=config))

    runs = [run(mode, kind) for mode in ("arcmix", "arcface") for kind in ("nearest", "published")]
    assert name_configurations(runs) == [
        "mode arcmix, scoring nearest", "mode arcmix, scoring published",
        "mode arcface, scoring nearest", "mode arcface, scoring published",
    ]  # fmt: skip
    assert name_configurations(runs[:2]) == ["scoring nearest", "scoring published"]
    assert name_configurations(runs[1::2]) == ["mode arcmix", "mode arcface"]
    assert name_configurations(runs[:1]) == ["mode arcmix"]
    paths = [Path(f"{run.trained.config.mode}.pth") for run in runs]
    runs = [
        replace(run, trained=replace(run.trained, path=path))
        for run, path in zip(runs, paths, strict=True)
    ]
    groups = dict(zip("abcd", [[run] for run in runs], strict=True))
    assert find_pairs(groups) == [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")]


def test_the_interval_of_clips_alone_is_that_of_the_same_draws():
    one, other = np.random.default_rng(0).normal(0, 0.02, (2, 500))
    same = difference(draws_of(np.full(3, 0.9), one), draws_of(np.full(3, 0.8), one))
    assert np.allclose(same, [[0.1], [0]]), "what both sides have in common is no difference"
    for count in (1, 3):
        values = 0.9 + np.linspace(-0.05, 0.05, count) if count > 1 else np.array([0.9])
        value, half = difference(draws_of(values, one), draws_of(np.full(1, 0.8), other))
        assert value[0] == pytest.approx(0.1)
        assert half[0] == pytest.approx(1.96 * np.std(one - other), rel=1e-3)


def test_intervals_of_seeds_and_clips_contain_the_truth():
    """2,000 comparisons of two configurations that do not differ, with two and four seeds."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(2000):
        sides = []
        for seeds in (2, 4):
            of_clips = rng.normal(0, 0.01)
            sides.append(draws_of(of_clips + rng.normal(0, 0.01, seeds), rng.normal(0, 0.01, 400)))
        value, half = difference(*sides)
        hits += abs(value[0]) <= half[0]
    assert 0.93 < hits / 2000 < 0.985


def test_a_difference_beyond_its_interval(result, tmp_path):
    of, rng = clips({("fan", 0): (40, 40), ("pump", 1): (30, 20)}), np.random.default_rng(0)
    signal, noise = 1.0 * (of["condition"] == "anomalous"), [rng.normal(size=130) for _ in range(3)]
    runs = [run_of(result, of, 3 * signal + x, seed=seed) for seed, x in enumerate(noise)]
    runs += [run_of(result, of, signal + x, m=0.5, seed=seed) for seed, x in enumerate(noise)]
    runs += [
        run_of(result, of, 3 * signal + rng.normal(size=130), m=0.3, seed=seed) for seed in range(3)
    ]
    every = compared(runs, tmp_path)
    ends = [
        every.index([f"## {title}, in percent"])
        for title in ("Average over 2 machine types", "fan", "pump")
    ]
    lines, of_fan = (
        {line[0]: line[1:] for line in every[i:j] if "minus" in line[0]}
        for i, j in itertools.pairwise(ends)
    )
    assert list(lines) == ["m 0.7 minus m 0.5", "m 0.7 minus m 0.3", "m 0.5 minus m 0.3"]
    better, same, _ = (line[0] for line in lines.values())
    assert re.fullmatch(r"\+\d+\.\d\d \(\+\d+\.\d\d to \+\d+\.\d\d\)", better)
    assert re.fullmatch(r"[+-]\d+\.\d\d \(-\d+\.\d\d to \+\d+\.\d\d\)", same)
    auc = [100 * run.metrics.table.loc[("average", "pooled"), "AUC"] for run in runs]
    assert float(better.split()[0]) == pytest.approx(np.mean(auc[:3]) - np.mean(auc[3:6]), abs=0.01)
    fan = [100 * run.metrics.table.loc[("fan", "pooled"), "AUC"] for run in runs]
    difference_of_fan = float(of_fan["m 0.7 minus m 0.5"][0].split()[0])
    assert difference_of_fan == pytest.approx(np.mean(fan[:3]) - np.mean(fan[3:6]), abs=0.01)


def test_the_published_figures_below_the_measured_ones(result, tmp_path):
    of = clips({(kind, x): (5, 5) for kind in ("fan", "pump") for x in (0, 2, 4, 6)})
    rng, signal = np.random.default_rng(0), 3.0 * (of["condition"] == "anomalous")
    runs = [run_of(result, of, signal + rng.normal(size=80), seed=seed) for seed in range(3)]
    lines = compared(runs, tmp_path)
    published = [line for line in lines if line[0] == "mode noisy_arcmix, published"]
    assert published == [
        ["mode noisy_arcmix, published", "98.32", "95.34", "92.67", "-", "-"],
        ["mode noisy_arcmix, published", "95.44", "85.99", "91.17", "-", "-"],
    ], "of fan and pump; the published average is of six types"
    measured_ones = [line for line in lines if line[0] == "mode noisy_arcmix (n = 3)"]
    auc = [100 * run.metrics.table.loc[("fan", "pooled"), "AUC"] for run in runs]
    assert measured_ones[1][1] == f"{np.mean(auc):.2f} ± {np.std(auc, ddof=1):.2f}"
    other = [run_of(result, of, signal, mode="arcface")]
    for results, split in ((other, "test"), (runs, "evaluation")):
        assert not any(", published" in line[0] for line in compared(results, tmp_path, split))


def test_the_figure_is_in_the_comparison(result, tmp_path):
    groups = {"x": [result], "y": [result]}
    compare(groups, "test", tmp_path, "angles.png")
    assert "](angles.png)" in (tmp_path / "comparison.md").read_text()
    compare(groups, "test", tmp_path)
    assert "angles.png" not in (tmp_path / "comparison.md").read_text()


def test_a_machine_type_without_known_clips_is_left_out(result, tmp_path):
    of = clips({("fan", 0): (5, 5), ("fan", 2): (5, 5), ("own", 0): (3, 3)})
    is_own = of["machine_type"] == "own"
    of = of.assign(condition=of["condition"].mask(is_own, "unlabelled"), score=np.arange(26.0))
    metrics = measure(of[~is_own], draws=200)
    runs = [
        replace(result, clips=of, metrics=metrics, about=result.about | {"seed": i}) for i in (1, 2)
    ]
    lines = compared(runs, tmp_path)
    assert ["## Average over 1 machine types, in percent"] in lines
    assert not any(line[0] == "own" for line in lines)


def test_what_cannot_be_compared(result):
    with pytest.raises(
        UserError, match="nothing to compare: the condition of the clips is not known"
    ):
        group_by_configuration([result, replace(result, metrics=None)])
    with pytest.raises(
        UserError,
        match="were not trained on the same machines in the same order, so their clips differ",
    ):
        group_by_configuration([result, replace(result, clips=result.clips[1:])])
    again = replace(result, trained=replace(result.trained, path=Path("run.last.pth")))
    with pytest.raises(
        UserError,
        match=r"run.pth and run.last.pth are of the same configuration and seed; leave one out",
    ):
        group_by_configuration([result, again])


def test_files_without_configuration_are_groups_of_their_own(result):
    def of(file: str, config: dict | None) -> Result:
        state = {"model": {}} if config is None else {"model": {}, "config": config}
        return replace(result, trained=replace(result.trained, path=Path(file), state=state))

    config = load_config().model_dump()
    runs = [
        of("x.pth", None),
        of("a.pth", config),
        of("b.pth", config | {"m": 0.5}),
        of("c.pth", config | {"seed": 7}),
    ]
    for ordered in (runs, runs[::-1]):
        names = dict(
            zip(
                [run.trained.path.stem for run in ordered],
                name_configurations(ordered),
                strict=True,
            )
        )
        assert names["a"] == names["c"]
        assert len(set(names.values())) == 3


# ---- Figures and report ----


def keep_figures(patch: pytest.MonkeyPatch) -> list[Figure]:
    """A list that each figure joins when it is written."""
    kept, save = [], Figure.savefig

    def keep_and_save(figure, *words, **options):
        kept.append(figure)
        save(figure, *words, **options)

    patch.setattr(Figure, "savefig", keep_and_save)
    return kept


@pytest.fixture(scope="module")
def figures(result, tmp_path_factory) -> dict[Path, Figure]:
    """All figures of an evaluation, by their files."""
    with pytest.MonkeyPatch.context() as patch:
        kept = keep_figures(patch)
        files = draw_all(result, tmp_path_factory.mktemp("figures") / "figures")
    return dict(zip(files, kept, strict=True))


@pytest.fixture
def axes(figures):
    """The axes of a figure, by its name."""
    return {file.stem: figure.axes for file, figure in figures.items()}


def shows(axis, of: pd.DataFrame, values: pd.Series) -> bool:
    """Whether the axis holds a density histogram of each condition's values."""
    groups = [values[of["condition"] == condition] for condition in ("normal", "anomalous")]
    for bars, group in zip(axis.containers, groups, strict=True):
        shares = [bar.get_height() * bar.get_width() for bar in bars]
        centres = [bar.get_x() + bar.get_width() / 2 for bar in bars]
        if (
            abs(sum(shares) - 1) > 1e-6
            or abs(np.dot(shares, centres) - group.mean()) > bars[0].get_width()
        ):
            return False
    return True


def test_angles_and_scores_are_drawn_as_histograms(result, axes):
    (axis,) = axes["angles"]
    assert shows(axis, result.clips, result.clips["angle"])
    assert [text.get_text() for text in axis.figure.legends[0].get_texts()] == [
        "normal",
        "anomalous",
    ]
    assert [axis.get_title() for axis in axes["scores"]] == ["fan 00", "fan 02", "valve 01"]
    for axis, (_, of) in zip(axes["scores"], result.clips.groupby(MACHINE), strict=True):
        assert shows(axis, of, np.log10(of["exact_score"]))
        (line,) = axis.lines
        assert line.get_xdata()[0] == pytest.approx(np.log10(of["threshold"].iloc[0]))


def test_the_area_under_each_curve_is_its_auc(result, axes):
    (axis,) = axes["roc"]
    *curves, diagonal = axis.lines
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]
    for machine_type, curve in zip(("fan", "valve"), curves, strict=True):
        auc = result.metrics.table.loc[(machine_type, "pooled"), "AUC"]
        false, true = (np.array(values) for values in curve.get_data())
        assert np.sum(np.diff(false) * (true[1:] + true[:-1]) / 2) == pytest.approx(auc)
        assert curve.get_label() == f"{machine_type}, AUC {100 * auc:.1f} %"


def test_the_channels_are_those_of_a_normal_clip(result, figures, axes):
    *channels, gate = axes["tastgram"][:4]  # the rest are colour bars
    clip = result.clips[result.clips["condition"] == "normal"].iloc[0]
    assert [axis.get_title() for axis in channels] == ["tgram", "sgram (dB)", "tagram (dB)"]
    images = [axis.images[0].get_array() for axis in channels]
    assert all(image.shape == (128, 313) for image in images)
    assert np.std(images[0]) > 0.01
    assert np.allclose(
        images[1], LogMel()(read_samples(clip["path"], 0.0, channel=0) / 32768.0)[0, 0], atol=1e-3
    )
    assert len(gate.lines[0].get_ydata()) == 313
    (title,) = (
        figure.get_suptitle() for file, figure in figures.items() if file.stem == "tastgram"
    )
    assert title == f"fan, {clip['path'].name}"


def test_a_timeline_shows_each_window_and_the_whole_recording(tmp_path, monkeypatch):
    path, kept = tmp_path / "a.wav", keep_figures(monkeypatch)
    loud = np.concatenate([tone(0, 20.0), 10 * tone(0, 10.0), tone(0, 103.0)])
    write_clip(path, loud)
    starts = check_recording(path, hop=5).starts
    windows = [
        {"start": start, "score": 3.0 + (start == 20), "decision": "normal"} for start in starts
    ]
    windows[4]["decision"] = "anomalous"
    row = {"file": str(path), "machine_type": "fan", "machine_id": "b", "score": 3.1, "threshold": 3.5,
           "decision": "normal", "windows": windows, "worst": windows[4]}  # fmt: skip
    draw_timeline(row, load_config(), tmp_path / "a.png")
    (drawn,) = kept
    score, image = drawn.axes
    line, normal, anomalous, threshold = score.lines
    assert list(line.get_xdata()) == [pytest.approx((start + 5) / 60) for start in starts]
    assert list(line.get_ydata()) == [window["score"] for window in windows]
    assert (len(normal.get_xdata()), anomalous.get_ydata()) == (len(starts) - 1, [4.0])
    assert set(threshold.get_ydata()) == {3.5}
    left, right = (
        score.patches[0].get_x(),
        score.patches[0].get_x() + score.patches[0].get_width(),
    )
    assert (left, right) == pytest.approx((20 / 60, 30 / 60)), "the worst window"
    log_mel = image.images[0].get_array()
    assert log_mel.shape == (128, MAX_COLUMNS)
    level = log_mel.mean(axis=0)
    columns = np.arange(len(level)) / len(level) * 133
    is_loud = (columns > 20.1) & (columns < 29.8)
    is_soft = (columns < 19.8) | (columns > 30.2)
    assert level[is_loud].min() > level[is_soft].max() + 5, "dB"
    assert drawn.get_suptitle() == "a.wav: fan b, score 3.1, normal"
    assert image.get_xlabel() == "time (min)"


def test_the_map_has_a_point_for_each_clip(axes):
    (axis,) = axes["embedding"]
    points = np.concatenate([collection.get_offsets() for collection in axis.collections])
    assert len(np.unique(points, axis=0)) == 12
    assert [len(collection.get_offsets()) for collection in axis.collections] == [2] * 6 + [0]
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names == ["fan 00", "fan 02", "valve 01", "anomalous"]


def test_the_history_is_drawn(result, axes):
    history = pd.read_csv(RunFiles(result.trained.path).history)
    names = [["train_loss", "valid_loss"], ["train_accuracy", "valid_accuracy"], ["lr"]]
    for axis, columns in zip(axes["history"], names, strict=True):
        assert [list(line.get_ydata()) for line in axis.lines] == [
            list(history[name]) for name in columns
        ]


def test_a_panel_holds_the_runs_of_a_configuration(result, tmp_path, monkeypatch):
    kept = keep_figures(monkeypatch)
    turned = replace(result, clips=result.clips.assign(angle=180 - result.clips["angle"]))
    draw_angles(
        {"mode arcface": [result, turned], "mode arcmix": [turned]}, tmp_path / "angles.png"
    )
    both = pd.concat([result.clips, turned.clips])
    one, other = kept[0].axes
    assert [axis.get_title() for axis in (one, other)] == ["mode arcface", "mode arcmix"]
    assert shows(one, both, both["angle"])
    assert shows(other, turned.clips, turned.clips["angle"])
    left, right = (axis.get_position() for axis in (one, other))
    assert left.x1 < right.x0
    assert left.y0 == pytest.approx(right.y0)


def test_a_spoilt_history_is_named_and_a_lost_one_is_in_the_checkpoint(trained_copy):
    trained, history = (
        load_model(trained_copy / "run.pth", load_config(), {}),
        trained_copy / "run" / "history.csv",
    )
    whole = read_history(trained)
    for content in ("epoch,lr\n1,fast\n", "a,b\n1,2\n", ""):
        history.write_text(content)
        with pytest.raises(UserError, match=r"history.csv: not the history of a training"):
            read_history(trained)
    history.unlink()
    pd.testing.assert_frame_equal(read_history(trained), whole, check_dtype=False)


class Reader(html.parser.HTMLParser):
    """Collects what a page refers to, and checks that its tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.references, self.images, self.text = [], [], 0, ""

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href")]
        self.images += tag == "img"
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_figures_and_report(result, figures, tmp_path):
    assert {file.stem for file in figures} == {
        "angles",
        "roc",
        "scores",
        "tastgram",
        "embedding",
        "history",
    }
    assert all(matplotlib.image.imread(file).ndim == 3 for file in figures)
    odd = tmp_path / "normal_id_00_<i>&amp;.wav"
    odd.symlink_to(result.clips["path"][3])
    paths = [odd, *result.clips["path"][1:]]
    write_report(
        replace(result, clips=result.clips.assign(path=paths)),
        list(figures),
        tmp_path / "report.html",
    )
    page = (tmp_path / "report.html").read_text()
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert (
        reader.images == 6 + 12
    )  # of each of three IDs two normal and two anomalous clips, all there are
    assert all(reference.startswith("data:image/png;base64,") for reference in reader.references)
    assert "anomaly_id_02_00000001.wav" in reader.text
    assert odd.name in reader.text, "as it is, whatever it means in HTML"
    assert "epoch: 1\n" in reader.text, "the training's configuration"
    assert with_interval(result.metrics.table.loc["fan", "pooled"], "AUC") in reader.text
    assert "30 clips of the type" in reader.text
