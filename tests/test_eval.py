"""Metrics on hand-made scores, the files that are written, and which configuration counts."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from conftest import MACHINES, arguments, write_clip, write_set
from sklearn.metrics import roc_auc_score

import eval as eval_script
from dataloader import Clip, ClipSet
from evaluation.metrics import Scores, bootstrap, combine, rate, rate_all, resample, weighted_areas
from evaluation.tables import format_table, name_gaps, published_rows, write_per_machine
from model import TASTgramMFN
from utils import UserError, load_checkpoint, load_config

CPU = torch.device("cpu")


def clips(counts: dict[tuple[str, int], tuple[int, int]]) -> list[Clip]:
    """Clips with so many normal and anomalous ones per machine."""
    return [
        Clip(Path(f"{condition}_id_{machine_id:02d}_{index}.wav"), machine_type, machine_id, 0, condition == "anomaly")
        for (machine_type, machine_id), (normal, anomaly) in counts.items()
        for condition, count in (("normal", normal), ("anomaly", anomaly))
        for index in range(count)
    ]


# ---- Metrics ----


def test_auc_counts_pairs_and_half_of_the_ties():
    is_anomaly = np.array([0, 0, 0, 1, 1], dtype=bool)
    row = rate(is_anomaly, np.array([0.1, 0.4, 0.3, 0.3, 0.9]))
    assert row["AUC"] == pytest.approx((1 + 0 + 0.5 + 3) / 6)
    assert (row["n_normal"], row["n_anomaly"]) == (3, 2)


def test_partial_auc_is_standardised():
    rng = np.random.default_rng(0)
    is_anomaly = np.repeat([False, True], 2000)
    chance = rate(is_anomaly, rng.normal(size=4000))
    assert chance["pAUC"] == pytest.approx(0.5, abs=0.02)
    assert rate(is_anomaly, is_anomaly.astype(float))["pAUC"] == 1.0
    scores = rng.normal(size=4000) + is_anomaly
    assert rate(is_anomaly, scores)["pAUC"] == roc_auc_score(is_anomaly, scores, max_fpr=0.1)


def test_pooled_mean_and_lowest():
    # Each ID is separated perfectly, or not at all, but on scales of their own: pooling sees that, the mean does not.
    of = clips({("fan", 0): (2, 2), ("fan", 2): (2, 2), ("pump", 0): (1, 3)})
    scores = np.array([1, 2, 3, 4, 11, 12, 13, 10, 1, 2, 3, 0], dtype=float)
    table = rate_all(of, scores)
    assert list(table) == ["fan", "pump", "average"]
    assert list(table["fan"]) == ["00", "02", "pooled", "mean", "min"]
    assert [table["fan"][name]["AUC"] for name in ("00", "02", "pooled", "mean", "min")] == [
        1.0, 0.5, (2 * 2 + 4 + 2) / 16, 0.75, 0.5
    ]  # fmt: skip
    assert table["pump"]["00"]["AUC"] == pytest.approx(2 / 3)
    assert table["average"]["mean"]["AUC"] == pytest.approx((0.75 + 2 / 3) / 2)
    assert table["average"]["min"]["AUC"] == pytest.approx((0.5 + 2 / 3) / 2)
    assert table["average"]["pooled"]["AUC"] == pytest.approx((10 / 16 + 2 / 3) / 2)
    assert table["fan"]["pooled"]["n_normal"] == 4
    assert set(table["average"]) == {"pooled", "mean", "min"}


def test_the_lowest_is_of_each_column_on_its_own():
    rows = [
        {"AUC": 0.9, "pAUC": 0.5, "n_normal": 3, "n_anomaly": 8},
        {"AUC": 0.6, "pAUC": 0.8, "n_normal": 5, "n_anomaly": 7},
    ]
    assert combine(rows, np.min) == {"AUC": 0.6, "pAUC": 0.5, "n_normal": 3, "n_anomaly": 7}
    assert str(combine(rows, np.mean)["n_normal"]) == "4", "a whole number of clips"
    assert combine(rows, np.mean)["n_anomaly"] == 7.5


def test_one_class_only_is_left_out_and_named(capsys):
    of = clips({("fan", 0): (2, 2), ("fan", 2): (2, 0), ("pump", 0): (0, 2)})
    table = rate_all(of, np.arange(8.0))
    assert table["fan"]["02"]["AUC"] is None
    assert table["fan"]["mean"]["AUC"] == table["fan"]["00"]["AUC"] == 1.0
    assert table["pump"]["pooled"]["AUC"] is table["pump"]["mean"]["AUC"] is None
    assert table["average"]["mean"]["AUC"] == 1.0
    name_gaps(table)
    assert "test clips: fan 02, pump 00, pump pooled, pump mean, pump min" in capsys.readouterr().err


def test_scores_that_are_not_finite_have_no_place_in_an_order():
    with pytest.raises(UserError, match="1 of 4 scores are not finite"):
        rate_all(clips({("fan", 0): (2, 2)}), np.array([1.0, np.nan, 2.0, 3.0]))


# ---- Intervals ----


@pytest.mark.parametrize("ties", [False, True])
def test_weighted_areas_are_those_of_repeated_clips(ties):
    rng = np.random.default_rng(1)
    is_anomaly = np.repeat([False, True], [60, 40])
    scores = rng.normal(size=100) + is_anomaly
    if ties:
        scores = np.round(scores)
    weights = np.concatenate([np.ones((1, 100)), resample(is_anomaly, 20, rng)])
    assert (weights[:, :60].sum(axis=1) == 60).all()
    assert (weights[:, 60:].sum(axis=1) == 40).all()
    auc, pauc = weighted_areas(is_anomaly, scores, weights)
    for index, weight in enumerate(weights.astype(int)):
        expected = rate(np.repeat(is_anomaly, weight), np.repeat(scores, weight))
        assert auc[index] == pytest.approx(expected["AUC"], abs=1e-12)
        assert pauc[index] == pytest.approx(expected["pAUC"], abs=1e-12)


def test_the_bootstrap_draws_within_machine_and_condition():
    of = clips({("fan", 0): (30, 30), ("fan", 2): (30, 30), ("pump", 0): (3, 0)})
    scores = np.random.default_rng(0).normal(size=123) + [clip.is_anomaly for clip in of]
    draws, again = (bootstrap(of, scores, draws=200, seed=3) for _ in range(2))
    assert set(draws) == {
        *(("fan", name) for name in ("00", "02", "pooled", "mean", "min")),
        *(("average", name) for name in ("pooled", "mean", "min")),
    }
    assert all(np.array_equal(draws[key], again[key]) for key in draws)
    for column in range(2):
        one, other = draws["fan", "00"][column], draws["fan", "02"][column]
        assert np.allclose(draws["fan", "mean"][column], (one + other) / 2)
        assert np.array_equal(draws["fan", "min"][column], np.minimum(one, other))
        assert np.array_equal(draws["average", "min"][column], draws["fan", "min"][column])
    auc = rate_all(of, scores)["fan"]["pooled"]["AUC"]
    drawn = draws["fan", "pooled"][0]
    # Hanley and McNeil's standard error of an AUC, with 60 normal and 60 anomalous clips
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    error = np.sqrt((auc * (1 - auc) + 59 * (q1 - auc**2) + 59 * (q2 - auc**2)) / 3600)
    assert drawn.mean() == pytest.approx(auc, abs=0.02)
    assert drawn.std() == pytest.approx(error, rel=0.25)


def test_perfect_scores_leave_no_room():
    of = clips({("fan", 0): (5, 5)})
    draws = bootstrap(of, np.arange(10.0), draws=50)
    assert (draws["fan", "00"][0] == 1).all()
    assert np.allclose(draws["fan", "00"][1], 1)
    assert Scores(of, np.arange(10.0)).machines["fan"]["00"].tolist() == list(range(10))


# ---- Table and files ----


def test_the_table_labels_both_ways_and_shows_the_published_row():
    of = clips({(t, 0): (2, 2) for t in load_config().machines})
    table = rate_all(of, np.tile([0.0, 1.0, 0.5, 2.0], 6))
    text = format_table(table, published_rows(load_config(), "test"))
    assert "pooled over IDs" in text
    assert "mean over IDs" in text
    assert "mAUC" in text
    fan, average = (next(line for line in text.splitlines() if line.startswith(name)) for name in ("fan", "average"))
    assert "75.00" in fan
    assert fan.endswith("98.32    95.34    92.67")
    assert average.endswith("94.65    89.31    89.78")
    for other in (load_config(mode="arcface"), load_config(input=["sgram"]), load_config(attention="standardised")):
        assert "98.32" not in format_table(table, published_rows(other, "test"))
    del table["fan"]
    assert "94.65" not in format_table(table, published_rows(load_config(), "test")), "an average over other types"


def evaluate(call, folder: Path, data_root: Path, *words: str):
    """Evaluate run.pth in a copy of `folder`'s files."""
    return call(
        eval_script.main, folder / "run.pth", "--data_root", data_root, "--store_path", folder / "store",
        "--device", "cpu", *words,
    )  # fmt: skip


def read_metrics(folder: Path) -> dict[tuple[str, str], list[str]]:
    with (folder / "run" / "eval" / "metrics.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == [
        "machine_type", "machine_id", "AUC", "pAUC", "n_normal", "n_anomaly",
        "AUC_low", "AUC_high", "pAUC_low", "pAUC_high",
    ]  # fmt: skip
    return {(line[0], line[1]): line[2:] for line in lines}


def test_what_an_evaluation_writes(trained_copy, data_root, call):
    status, output, _ = evaluate(call, trained_copy, data_root)
    assert status == 0
    folder = trained_copy / "run" / "eval"
    names = {"anomaly_score_fan_id_00.csv", "anomaly_score_fan_id_02.csv", "anomaly_score_valve_id_01.csv"}
    others = {"metrics.csv", "metrics.json", "results.md", "decisions.csv"}
    decisions = {f"decision_result_{machine}.csv" for machine in held_out_machines(trained_copy)}
    assert {path.name for path in folder.iterdir()} == names | decisions | others
    metrics = read_metrics(trained_copy)
    assert list(metrics) == [
        ("fan", "00"), ("fan", "02"), ("fan", "pooled"), ("fan", "mean"), ("fan", "min"),
        ("valve", "01"), ("valve", "pooled"), ("valve", "mean"), ("valve", "min"),
        ("average", "pooled"), ("average", "mean"), ("average", "min"),
    ]  # fmt: skip
    for name in names:  # the metrics follow from the score files, at full precision
        lines = [line.rsplit(",", 1) for line in (folder / name).read_text().splitlines()]
        assert [file for file, _ in lines] == sorted(file for file, _ in lines)
        assert all(float(np.float32(score)) == float(score) for _, score in lines), "float32, read back exactly"
        auc = roc_auc_score([file.startswith("anomaly") for file, _ in lines], [float(score) for _, score in lines])
        machine_type, machine_id = name.removeprefix("anomaly_score_").removesuffix(".csv").split("_id_")
        assert float(metrics[machine_type, machine_id][0]) == auc
        assert metrics[machine_type, machine_id][2:4] == ["2", "2"]
    assert f"12 scores and metrics: {folder}" in output


def held_out_machines(folder: Path) -> list[str]:
    """The machines of the types that have held-out clips, as file names have them."""
    types = load_checkpoint(folder / "run.pth")["held_out"]
    return [f"{t}_id_{i:02d}" for t, ids in MACHINES.items() for i in ids if t in types]


def test_scores_do_not_depend_on_the_batch_size(trained, data_root):
    config = load_config(
        data_root=str(data_root), store_path=str(trained / "store"), machines=MACHINES, score_dtype="float64"
    )
    one, five = (
        eval_script.evaluate(
            eval_script.load_model(trained / "run.pth", load_config(**vars(config) | {"batch_size": size}), set()),
            ClipSet.load(config, "test"),
            CPU,
        ).scores
        for size in (2, 5)
    )
    assert one.dtype == np.float64
    assert one == pytest.approx(five, rel=1e-4, abs=1e-6)


def test_one_class_only_gives_empty_cells(trained, tmp_path, call):
    root = write_set(tmp_path / "data")
    for path in (root / "fan/test").glob("anomaly_id_02_*"):
        path.unlink()
    shutil.copy(trained / "run.pth", tmp_path / "run.pth")
    status, _, errors = evaluate(call, tmp_path, root)
    assert status == 0
    assert "fan 02" in errors
    metrics = read_metrics(tmp_path)
    assert metrics["fan", "02"] == ["", "", "2", "0", "", "", "", ""]
    assert metrics["fan", "mean"][:2] == metrics["fan", "00"][:2]


def test_scores_of_an_id_that_went_are_removed(trained, tmp_path, call):
    root = write_set(tmp_path / "data")
    shutil.copy(trained / "run.pth", tmp_path / "run.pth")
    evaluate(call, tmp_path, root)
    for path in (root / "fan/test").glob("*_id_02_*"):
        path.unlink()
    evaluate(call, tmp_path, root)
    assert not (tmp_path / "run/eval/anomaly_score_fan_id_02.csv").exists()


# ---- Which configuration counts ----


def test_editing_the_configuration_cannot_move_a_score(trained_copy, data_root, tmp_path, call):
    evaluate(call, trained_copy, data_root)
    before = (trained_copy / "run/eval/anomaly_score_fan_id_00.csv").read_text()
    file = tmp_path / "other.yaml"
    file.write_text("machines: {valve: [1], fan: [2, 0]}\nmode: cross_entropy\ninput: [sgram]\nm: 0.1\ns: 3\n")
    assert evaluate(call, trained_copy, data_root, "--config", file)[0] == 0
    assert (trained_copy / "run/eval/anomaly_score_fan_id_00.csv").read_text() == before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("machines", "{fan: [0, 2]}"), ("machines", "{valve: [1], fan: [0, 2]}"), ("mode", "arcface"),
        ("input", "[sgram]"), ("m", "0.5"), ("s", "10"), ("sub_centers", "3"),
    ],
)  # fmt: skip
def test_contradicting_the_checkpoint_is_an_error(trained, data_root, fails, option, value):
    words = [trained / "run.pth", "--data_root", data_root, f"--{option}", value]
    fails(eval_script.main, *words, match=rf"command line: {option} .* is not the checkpoint's, .*run.pth")


def test_agreeing_with_the_checkpoint_is_none(trained_copy, data_root, call):
    assert evaluate(call, trained_copy, data_root, "--mode", "noisy_arcmix", "--m", "0.7")[0] == 0


def test_a_bare_state_dict_takes_the_configuration(tmp_path, data_root, call, fails):
    """Published weights: a state dict in the names of the reference, scored in the published configuration."""
    torch.save(reference.parameters(), tmp_path / "run.pth")
    status, _, errors = evaluate(call, tmp_path, data_root)
    assert status == 0
    assert "run.pth is a bare state dict: machines, mode, input" in errors
    fails(
        eval_script.main, tmp_path / "run.pth", "--machines", "{fan: [0, 2]}", "--data_root", data_root,
        match=r"does not fit the configuration .*arcface.weight is \(41, 128\) in the file and \(2, 128\)",
    )  # fmt: skip
    fails(eval_script.main, tmp_path / "run.pth", "--input", "sgram", match="conv1.conv.weight|tgramnet")


def test_scores_of_published_weights_are_the_reference(tmp_path):
    """From WAV files and a bare state dict to the scores that the reference values give."""
    labels, machines = reference.labels().tolist(), load_config().machines
    table = [(machine_type, machine_id) for machine_type, ids in machines.items() for machine_id in ids]
    for index, (label, waveform) in enumerate(zip(labels, reference.waveforms().numpy(), strict=True)):
        machine_type, machine_id = table[label]
        write_clip(tmp_path / machine_type / "test" / f"normal_id_{machine_id:02d}_{index}.wav", waveform)
    torch.save(reference.parameters(), tmp_path / "published.pth")
    config = load_config(data_root=str(tmp_path), store_path=str(tmp_path / "store"))
    trained = eval_script.load_model(tmp_path / "published.pth", config, set())
    test_clips = ClipSet.load(config, "test")
    scores = eval_script.evaluate(trained, test_clips, CPU).scores
    order = [int(clip.path.stem[-1]) for clip in test_clips.clips]
    assert reference.distance(scores, reference.VALUES["eval_score"][order]) < 1e-4


# ---- The challenge's evaluation clips ----


def test_evaluation_clips_with_and_without_labels(trained_copy, tmp_path, data_root, call, fails):
    root, test_scores = tmp_path / "data", {}
    assert evaluate(call, trained_copy, data_root)[0] == 0
    for path in sorted(data_root.glob("*/test/*.wav")):  # the test clips, under names that do not tell
        machine_type, name = path.parent.parent.name, path.name.replace("normal_", "").replace("anomaly_id", "id_1")
        new = root / machine_type / "evaluation" / re.sub(r"id_1_(\d\d)_0", r"id_\1_1", name)
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, new)
        test_scores[new.name, machine_type] = path.name
    folder = trained_copy / "run" / "evaluation"

    status, output, errors = evaluate(call, trained_copy, root, "--part", "evaluation")
    assert status == 0
    assert "12 of 12 clips are not in eval_data_list.csv and count in no metric" in errors
    assert "AUC" not in output
    assert f"12 scores: {folder}" in output
    names = {"anomaly_score_fan_id_00.csv", "anomaly_score_fan_id_02.csv", "anomaly_score_valve_id_01.csv"}
    names |= {f"decision_result_{machine}.csv" for machine in held_out_machines(trained_copy)} | {"decisions.csv"}
    assert {path.name for path in folder.iterdir()} == names

    lines = {"fan": [], "valve": []}
    for (name, machine_type), original in test_scores.items():
        lines[machine_type].append(f"{name},{original},{int(original.startswith('anomaly'))}")
    (root / "eval_data_list.csv").write_text("\n".join(["fan", *lines["fan"], "valve", *lines["valve"]]) + "\n")
    status, output, errors = evaluate(call, trained_copy, root, "--part", "evaluation")
    assert status == 0
    assert "98.32" not in output, "the published table is of the test clips"
    assert {path.name for path in folder.iterdir()} == names | {"metrics.csv", "metrics.json", "results.md"}
    of_test, of_evaluation = (trained_copy / "run" / part / "metrics.csv" for part in ("eval", "evaluation"))
    assert of_test.read_text() == of_evaluation.read_text()

    (root / "eval_data_list.csv").write_text("\n".join(["fan", *lines["fan"][1:]]) + "\n")
    status, output, errors = evaluate(call, trained_copy, root, "--part", "evaluation")
    assert "5 of 12 clips are not in" in errors
    assert "valve" not in output.replace("anomaly_score_valve", "")
    assert len((folder / "anomaly_score_valve_id_01.csv").read_text().splitlines()) == 4
    (root / "eval_data_list.csv").unlink()
    evaluate(call, trained_copy, root, "--part", "evaluation")
    assert {path.name for path in folder.iterdir()} == names, "of labels that are not there any more"
    fails(
        eval_script.main, trained_copy / "run.pth", "--data_root", data_root, "--part", "evaluation",
        match="download.py --parts evaluation",
    )  # fmt: skip


def test_file_names_with_commas_are_quoted(tmp_path):
    of = [Clip(Path('normal_id_00_a,"b".wav'), "fan", 0, 0, False)]
    write_per_machine(tmp_path, "anomaly_score", of, np.array([1.5]))
    (path,) = tmp_path.iterdir()
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [['normal_id_00_a,"b".wav', "1.5"]]


# ---- Errors ----


def test_missing_and_damaged_checkpoints(tmp_path, fails):
    fails(eval_script.main, tmp_path / "weights", match=r"weights: results go to a folder of this name .*weights.pth")
    fails(eval_script.main, tmp_path / "none.pth", match="none.pth: no such checkpoint; train one with")
    (tmp_path / "text.pth").write_text("hello")
    fails(eval_script.main, tmp_path / "text.pth", match="text.pth: not a readable checkpoint")


def test_no_test_clips(trained, tmp_path, fails):
    fails(eval_script.main, trained / "run.pth", "--data_root", tmp_path, match="no folder .*fan/test")


def test_scores_that_are_not_finite(tmp_path, data_root, fails):
    model = TASTgramMFN(3)
    torch.nn.init.constant_(model.mobilefacenet.linear1.bn.bias, float("nan"))
    torch.save(model.state_dict(), tmp_path / "run.pth")
    options = arguments(tmp_path, data_root)
    fails(eval_script.main, tmp_path / "run.pth", *options, match="12 of 12 scores are not finite")
