"""Several checkpoints as one detector: scales, averages, thresholds, and the scripts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
import torch
from conftest import (
    MACHINES,
    change_checkpoint,
    clips_of,
    tone,
    write_clip,
)
from evaluated import read_csv

import eval as eval_script
import export as export_script
import score as score_script
from checkpoint import Checkpoint
from classes import Classes
from config import load_config
from detector import (
    SCORE_COLUMNS,
    Detector,
    DetectorScorer,
    Scale,
    find_scales,
    load_detector,
)
from evaluation import onnx_file
from evaluation.graph import ScoringGraph
from evaluation.scores import KINDS
from evaluation.thresholds import drop_incomplete
from inference import load_model

CPU = torch.device("cpu")
OTHERS = ("angle", "nearest", "spectrum")
FAN = ("--machine_type", "fan", "--machine_id", "0")


@pytest.fixture(scope="module")
def members(lively_run, tmp_path_factory) -> Path:
    """A folder with two checkpoints, a.pth and b.pth, of other seeds, weights and scales."""
    folder = tmp_path_factory.mktemp("members")
    run = lively_run / "run.pth"
    change_checkpoint(run, folder / "a.pth")
    held_out = Checkpoint.load(run).held_out
    files = [file.replace("held_out", "others") for file in held_out.files]
    held_out = replace(held_out, files=files, scores=held_out.scores / 2)
    weights = disturb(Checkpoint.load(run).weights)
    change_checkpoint(run, folder / "b.pth", {"seed": 7}, weights=weights, held_out=held_out)
    return folder


@pytest.fixture(scope="module")
def pair(trained, tmp_path_factory) -> Path:
    """The same of the tiny run, which has embeddings of all clips."""
    folder = tmp_path_factory.mktemp("pair")
    run = trained / "run.pth"
    change_checkpoint(run, folder / "a.pth")
    weights = disturb(Checkpoint.load(run).weights)
    change_checkpoint(run, folder / "b.pth", {"seed": 7}, weights=weights)
    return folder


def disturb(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add noise to weights."""
    rng = torch.Generator().manual_seed(0)
    disturbed = {}
    for name, value in weights.items():
        noise = torch.randn(value.shape, generator=rng)
        disturbed[name] = value * (1 + 0.05 * noise) if value.is_floating_point() else value
    return disturbed


@pytest.fixture
def copied(members, tmp_path) -> Path:
    return Path(shutil.copytree(members, tmp_path / "members"))


def paths(folder: Path) -> list[Path]:
    return [folder / "a.pth", folder / "b.pth"]


# ---- Scales and averages ----


def test_scores_are_moved_to_the_same_place_among_normal_scores():
    rng = np.random.default_rng(0)
    normal = rng.lognormal(size=200)
    one, other = Scale.of_scores(normal), Scale.of_scores(5 * normal**2)
    scores = torch.tensor([0.1, 1.0, 30.0])
    assert one.convert(scores, one).tolist() == pytest.approx(scores.tolist())
    assert other.convert(5 * scores**2, one).tolist() == pytest.approx(scores.tolist())


def test_spreads_count_only_if_there_are_enough_similar_ones():
    normal = np.random.default_rng(0).lognormal(size=20)
    spread = Scale.of_scores(normal).spread
    spreads = [scale.spread for scale in find_scales([normal, normal**2])]
    assert spreads == pytest.approx([spread, 2 * spread])
    for other in (normal[:9], np.full(20, 0.5), normal**10, np.zeros(20)):
        scales = find_scales([normal, other])
        assert [scale.spread for scale in scales] == [1.0, 1.0]
        scores = torch.tensor([0.0, 1e-12, 0.5, 30.0])
        assert scales[1].convert(scores, scales[0]).isfinite().all()


def test_a_detector_of_one_model_has_its_scores(members):
    model = load_model(members / "a.pth", load_config())
    detector = Detector((model,))
    scorer = detector.scorer("published", dtype=torch.float32)
    scores = torch.rand(5)
    assert scorer.average([scores]) is scores


def table_of(scores: dict[str, list[float]]) -> pd.DataFrame:
    """Make a table of normal scores: of the windows of each recording of a machine."""
    rows = [("fan", "00", name, value) for name, values in scores.items() for value in values]
    return pd.DataFrame(rows, columns=SCORE_COLUMNS)


def test_normal_scores_are_averaged_over_the_members_that_have_them(members):
    scorers = load_detector(paths(members), load_config()).scorer("published").members
    scorer = DetectorScorer(scorers, [Scale(0.0, 1.0), Scale(0.0, 1.0)])
    tables = [table_of({"a": [1.0], "b": [2.0, 3.0]}), table_of({"b": [4.0, 9.0], "c": [5.0]})]
    averages = scorer.average_tables(tables)
    assert averages["recording"].tolist() == ["a", "b", "b", "c"]
    expected = [1.0, 15**0.5 - 1, 40**0.5 - 1, 5.0]  # 1 + score: sqrt(3 x 5) and sqrt(4 x 10)
    assert averages["score"].tolist() == pytest.approx(expected)
    empty = table_of({})
    assert len(scorer.average_tables([empty, empty])) == 0
    tables[1].loc[0, "score"] = np.nan
    scores = scorer.average_tables(tables)["score"].tolist()
    assert np.isnan(scores[1]), "a score that is missing in one member is not that of the others"
    assert scores[2] == pytest.approx(expected[2])


def test_calibrations_with_different_recordings_are_not_used(capsys):
    one = table_of({"a": [1.0], "b": [2.0]})
    other = one.assign(machine_id="02")
    same = [pd.concat([one, other])] * 2
    assert [len(table) for table in drop_incomplete(same)] == [4, 4]
    assert capsys.readouterr().err == ""
    different = [same[0], pd.concat([one[:1], other])]
    kept = drop_incomplete(different)
    assert [table["machine_id"].unique().tolist() for table in kept] == [["02"], ["02"]]
    assert "the calibrations of fan 00 are not used" in capsys.readouterr().err


# ---- The scripts ----


def scores_of(call, checkpoints: list[Path], clip: Path, *words) -> dict:
    """Score a recording; return its entry in the output."""
    status, output, errors = call(
        score_script.main, *checkpoints, clip, *FAN, *words, "--json", "--device", "cpu"
    )
    assert status == 0, errors
    return json.loads(output)[0]


def test_score_py_averages_the_scores_on_one_scale(members, tmp_path, call):
    clip = write_clip(tmp_path / "clip.wav", tone(1))
    alone = [scores_of(call, [path], clip) for path in paths(members)]
    together = scores_of(call, paths(members), clip)
    scorer = load_detector(paths(members), load_config()).scorer("published")
    scores = [torch.tensor([row["score"]], dtype=torch.float64) for row in alone]
    assert together["score"] == pytest.approx(scorer.average(scores).item(), rel=1e-5)
    assert min(together["threshold"], together["score"]) > 0


def test_eval_py_compares_it_with_its_members(copied, data_root, tmp_path, call):
    words = ("--together", "--output", tmp_path / "out")
    options = ("--data_root", data_root, "--device", "cpu")
    status, output, errors = call(eval_script.main, *paths(copied), *options, *words)
    assert status == 0, errors
    assert "\n2 checkpoints together\n" in output
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| detector of 2 (n = 1) |" in text
    assert "| detector of 1 (n = 2) |" in text
    assert "| detector of 2 minus detector of 1 (test recordings alone) |" in text
    folder = tmp_path / "out" / "test"
    about = json.loads((folder / "metrics.json").read_text())["about"]
    assert about["checkpoint"] == ", ".join(map(str, paths(copied)))
    assert (about["mode"], about["seed"]) == ("noisy_arcmix", [2023, 7])
    clip = data_root / "fan" / "test" / "anomaly_id_00_00000000.wav"
    score = dict(read_csv(folder / "anomaly_score_fan_id_00.csv"))[clip.name]
    assert float(score) == pytest.approx(scores_of(call, paths(copied), clip)["score"], rel=1e-4)
    assert (copied / "a" / "test" / "metrics.csv").exists()


@pytest.mark.slow
def test_later_recordings_set_its_threshold_once_all_members_have_scored_them(
    copied, tmp_path, call
):
    later = tmp_path / "fan" / "later"
    for number in range(2):
        write_clip(later / f"normal_id_00_{number}.wav", tone(number))
    clip = write_clip(tmp_path / "clip.wav", tone(20))
    rate = ("--false_alarms", 0.4)
    words = ("--calibrate", later, *rate, "--device", "cpu")
    before = scores_of(call, paths(copied), clip, *rate)["threshold"]
    assert call(score_script.main, copied / "a.pth", *words)[0] == 0
    assert scores_of(call, paths(copied), clip, *rate)["threshold"] == before
    status, output, _ = call(score_script.main, *paths(copied), *words)
    assert status == 0
    assert output.splitlines()[0].endswith("2 later recordings of the ID")
    assert [line.split(": ")[1] for line in output.splitlines()[1:]] == [
        str(copied / "a.calibration.json"), str(copied / "b.calibration.json"),
    ]  # fmt: skip
    highest = max(scores_of(call, paths(copied), path)["score"] for path in later.iterdir())
    now = scores_of(call, paths(copied), clip, *rate)["threshold"]
    assert now == pytest.approx(highest, rel=1e-5)


@pytest.mark.slow
def test_export_py_writes_one_file(copied, call):
    status, output, errors = call(export_script.main, *paths(copied), "--device", "cpu")
    assert status == 0, errors
    file = copied / "a.together.onnx"
    assert output.startswith(f"{file}: ")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    samples = np.stack([tone(1), tone(2)]).astype(np.float32)
    scores, embedding = session.run(None, {"samples": samples})
    assert scores.shape == (2, 3)
    assert embedding.shape == (2, 256)
    about = onnx.load(file).metadata_props
    hashes = next(entry.value for entry in about if entry.key == "weights_sha256").split(", ")
    assert len(set(hashes)) == 2


@pytest.mark.parametrize(
    "kind",
    ["published", *(pytest.param(x, marks=pytest.mark.slow) for x in OTHERS)],
)
def test_the_graph_for_onnx_has_its_scores(kind, pair, data_root):
    config = load_config(data_root=str(data_root), scoring=kind)
    detector = load_detector(paths(pair), config).with_bank(config, [kind], CPU)
    clips = clips_of(data_root, "test")
    outputs = detector.run(clips, config, CPU)
    scorer = detector.scorer(kind, config.neighbours)
    machines = detector.classes.machines
    expected = scorer.score_against_machines(outputs, machines)
    of_members = [
        member.score_against_machines(x, machines)
        for member, x in zip(scorer.members, outputs.members, strict=True)
    ]
    is_same = torch.allclose(*of_members, rtol=1e-3)
    assert is_same == (kind == "spectrum"), "which no network is needed for"
    assert torch.allclose(scorer.average(of_members), expected)
    (samples,) = clips.read([np.arange(len(clips))], CPU)
    with torch.no_grad():
        scores, embedding = ScoringGraph(detector, config)(samples.float() / 32768)
    assert torch.allclose(scores, expected.float(), rtol=1e-4, atol=1e-5)
    assert torch.allclose(embedding, outputs.embedding, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_score_can_be_exported(kind, pair, data_root):
    config = load_config(data_root=str(data_root), scoring=kind)
    detector = load_detector(paths(pair), config).with_bank(config, [kind], CPU)
    content = onnx_file.make_file(detector, config).SerializeToString()
    assert onnx_file.compare(content, detector, config) < 1e-2


@pytest.mark.slow
def test_all_kinds_of_score_are_compared(pair, data_root, tmp_path, call):
    shutil.copytree(pair, tmp_path / "pair")
    words = ("--data_root", data_root, "--together", "--all_scores", "--output", tmp_path / "out")
    options = ("--plots", "--report", "--device", "cpu")
    status, _, errors = call(eval_script.main, *paths(tmp_path / "pair"), *words, *options)
    assert status == 0, errors
    figures = {"scores", "roc", "angles", "embedding"}
    assert {path.stem for path in tmp_path.glob("out/test/figures/*")} == figures
    assert (tmp_path / "out" / "test" / "report.html").read_text().count("\nseed: ") == 2
    text = (tmp_path / "out" / "comparison.md").read_text()
    for kind in KINDS:
        assert f"| detector of 2, scoring {kind} (n = 1) |" in text
        assert f"| detector of 1, scoring {kind} (n = 2) |" in text


def test_what_is_refused(copied, trained, data_root, tmp_path, fails):
    a, b = paths(copied)
    clip = write_clip(tmp_path / "clip.wav", tone(1))
    fails(score_script.main, a, b, a, clip, *FAN, match=r"a.pth is given twice; leave one out")
    fails(eval_script.main, a, "--together", match="--together needs several checkpoints")
    machines = {"fan": ["00", "04"], "valve": ["01"]}
    other = copied / "c.pth"
    classes = Classes.from_machines(machines)
    change_checkpoint(a, other, keys={"machines": machines}, classes=classes)
    message = (
        r"c.pth knows other machines \(fan 00, 04; valve 01\) than .*a.pth \(fan 00, 02; valve "
        r"01\), so they cannot score together; leave one out"
    )
    fails(score_script.main, a, other, clip, *FAN, match=message)
    fails(eval_script.main, a, other, "--together", "--data_root", data_root, match=message)
    fails(export_script.main, a, other, match=message)
    torch.save(Checkpoint.load(a).weights, copied / "bare.pth")
    message = (
        r"bare.pth has no published scores of recordings that were held out of its training, which "
        "put the scores of several checkpoints on one scale; leave it out"
    )
    words = (a, copied / "bare.pth", clip, *FAN, "--machines", json.dumps(MACHINES))
    fails(score_script.main, *words, match=message)
    fails(
        eval_script.main, a, b, "--together", "--output", copied / "a", match="choose another one"
    )
    change_checkpoint(b, keys={"window": "all"})
    message = r"a.pth and .*b.pth were trained on other windows or another channel"
    fails(eval_script.main, a, b, "--together", "--data_root", data_root, match=message)
