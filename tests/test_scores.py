"""Scores of known angles, the one place where scores are computed, the bank, and the results."""

import ast
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, change_checkpoint, clips_of, make_bank

from checkpoint import Checkpoint, HeldOut
from classes import Classes, MachineClass
from config import load_config, make_config
from dataloader import ClipSet
from detector import Detector, score_held_out
from evaluation.result import Result, evaluate
from evaluation.scores import Outputs, find_worst, over_windows
from inference import Model, build_network, load_model, run_model, with_bank
from model import EMBEDDING_SIZE, spectrum_of
from recordings import MACHINE_COLUMNS

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


def score_clips(model: Model, clips: ClipSet, kind: str = "published", **keys) -> Result:
    """Evaluate clips with a kind of score; `keys` overrides the configuration."""
    config = load_config(score_dtype="float64", **keys)
    detector = Detector((model,)).with_bank(config, [kind], CPU)
    outputs = detector.run(clips, config, CPU)
    (result,) = evaluate(detector, clips, outputs, config, "test", [kind])
    return result


@pytest.fixture(scope="module")
def test_clips(data_root) -> ClipSet:
    return clips_of(data_root, "test")


@pytest.fixture(scope="module")
def lively_model(lively_run) -> Model:
    return load_model(lively_run / "run.pth", load_config())


# ---- The kinds of score ----

HALF = 2**-11  # the rounding of an angle, in radians, in a bank in half precision


def in_plane(*degrees: float) -> torch.Tensor:
    """Return embeddings of different lengths at these angles in the plane of the first two axes."""
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    vectors = torch.zeros(len(degrees), EMBEDDING_SIZE, dtype=torch.float64)
    vectors[:, 0], vectors[:, 1] = angles.cos(), angles.sin()
    return (vectors * torch.linspace(0.5, 3, len(degrees))[:, None]).float()


def distance(degrees: float) -> float:
    """Return the cosine distance of two embeddings with this angle between them."""
    return 1 - math.cos(math.radians(degrees))


# Two mel bins and no change over time: mean and standard deviation of a bin are the two values
BANK_SPECTRA = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0], [6.0, 1.0], [-8.0, 3.0]])


def planar_model(
    centres: torch.Tensor, sub_centers: int = 1, classes: Classes = CLASSES, mode: str = "arcface"
) -> Model:
    """Return a model with these centres. In its bank the second class has one clip, and the third
    none.
    """
    config = load_config(sub_centers=sub_centers, input="sgram", mode=mode)
    network = build_network(config, classes)
    head = network.mobilefacenet.fc_out if mode == "cross_entropy" else network.arcface
    head.weight.data = centres
    labels = torch.tensor([0, 0, 0, 0, 1])
    outputs = Outputs(torch.zeros(5, 3), in_plane(0, 20, -20, 90, 50), BANK_SPECTRA)
    bank = make_bank(outputs, labels)
    checkpoint = Checkpoint(Path("run.pth"), network.state_dict(), bank=bank)
    return Model(network, config, classes, checkpoint)


def planar_scores(
    model: Model, kind: str, labels: list[int], *degrees: float, neighbours: int = 2
) -> list[float]:
    """Score embeddings at these angles against the machines of these classes."""
    embedding = in_plane(*degrees)
    with torch.no_grad():
        outputs = Outputs(model.network.arcface(embedding), embedding, torch.zeros(len(degrees), 2))
    machines = [model.classes.entries[label].machine for label in labels]
    return model.scorer(kind, neighbours).score_clips(outputs, machines).tolist()


def test_the_published_score_of_known_angles():
    model = planar_model(in_plane(0, 90, 180))
    scores = planar_scores(model, "published", [0, 1, 2], 30, 30, 30)
    cosines = [math.cos(math.radians(angle)) for angle in (30, 60, 150)]
    for label, score in enumerate(scores):
        logits = [30 * cosine for cosine in cosines]
        angle = math.acos(cosines[label]) + 0.7
        with_margin = math.cos(angle) if angle < math.pi else cosines[label] - 0.7 * math.sin(0.7)
        logits[label] = 30 * with_margin
        expected = math.log(sum(map(math.exp, logits))) - logits[label]
        assert score == pytest.approx(expected, rel=1e-5)


def test_the_angle_is_that_to_the_closest_centre_of_the_class():
    model = planar_model(in_plane(0, 90, 180))
    scores = planar_scores(model, "angle", [0, 1, 2, 0, 0], 30, 30, 30, 0, -90)
    assert scores == pytest.approx([30, 60, 150, 0, 90], abs=2e-2)
    model = planar_model(in_plane(0, 60, 90, 100, 180, 200), sub_centers=2)
    scores = planar_scores(model, "angle", [0, 1, 2], 50, 50, -100)
    assert scores == pytest.approx([10, 40, 60], abs=1e-3)
    model = planar_model(in_plane(0, 90, 180), mode="cross_entropy")
    assert planar_scores(model, "angle", [1], 30) == pytest.approx([60], abs=2e-2), "to the weights"


def test_the_nearest_clips_of_the_class_count():
    model = planar_model(in_plane(0, 90, 180))
    expected = [
        (distance(5) + distance(15)) / 2,  # to those at 0 and 20
        (distance(0) + distance(20)) / 2,  # ties: one of those at 20 and -20
        (distance(45) + distance(65)) / 2,
        distance(60),  # a single clip in the class, though two are asked for
        math.inf,  # none
    ]
    scores = planar_scores(model, "nearest", [0, 0, 0, 1, 2], 5, 0, -65, 110, 0)
    assert scores == pytest.approx(expected, abs=HALF)
    scores = planar_scores(model, "nearest", [0, 0], 5, 180, neighbours=1)
    assert scores == pytest.approx([distance(5), distance(90)], abs=HALF)
    mean = np.mean([distance(angle) for angle in (5, 15, 25, 85)])
    for neighbours in (4, 10):
        scores = planar_scores(model, "nearest", [0], 5, neighbours=neighbours)
        assert scores == pytest.approx([mean], abs=HALF)


def test_the_spectrum_is_compared_with_those_of_the_machine_without_a_network():
    """The first value has the standard deviation sqrt(5) in the first machine, the second none, so
    that LEAST_SPREAD stands for it.
    """
    model = planar_model(in_plane(0, 90, 180))
    spectra = torch.tensor([[0.0, 1.0], [3.0, 1.0], [0.0, 1.2], [5.0, 1.0], [0.0, 0.0]])
    outputs = Outputs(torch.zeros(5, 3), torch.zeros(5, EMBEDDING_SIZE), spectra)
    machines = [model.classes.machines[number] for number in (0, 0, 0, 1, 2)]
    scores = model.scorer("spectrum", 2).score_clips(outputs, machines)
    halves = [  # the squares of both values in standard deviations
        [(0, 0), (4 / 5, 0)],  # to those at 0 and 2
        [(1 / 5, 0), (1 / 5, 0)],
        [(0, 4), (4 / 5, 4)],
        [(13 / 0.1) ** 2, (2 / 0.1) ** 2],  # a single clip in the bank
    ]
    expected = [np.mean([math.sqrt(sum(pair) / 2) for pair in pairs]) for pairs in halves[:3]]
    expected += [math.sqrt(sum(halves[3]) / 2), math.inf]
    assert scores.tolist() == pytest.approx(expected, rel=1e-2)


def test_all_classes_of_a_machine_make_its_spectrum():
    entries = [MachineClass("fan", "00", "a"), MachineClass("fan", "00", "b")]
    model = planar_model(in_plane(0, 80), classes=Classes(tuple(entries)))
    outputs = Outputs(torch.zeros(1, 2), torch.zeros(1, EMBEDDING_SIZE), BANK_SPECTRA[4:])
    scorer = model.scorer("spectrum", 1)
    for label in (0, 1):  # the bank has that clip in the second class
        assert scorer.score_against_class(outputs, label).item() == pytest.approx(0, abs=1e-6)


def test_spectra_are_means_and_standard_deviations_over_time():
    log_mel = torch.randn(2, 1, 128, 313)
    spectrum = spectrum_of(log_mel)
    assert spectrum.shape == (2, 256)
    assert torch.allclose(spectrum[:, :128], log_mel[:, 0].mean(dim=2))
    expected = torch.tensor(log_mel[:, 0].numpy().std(axis=2))
    assert torch.allclose(spectrum[:, 128:], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("angle", [10, 10, 60]), ("nearest", [distance(20), distance(20), math.inf])],
)
def test_the_closest_class_of_the_machine_counts(kind, expected):
    """The first two classes are of one machine, with centres at 0 and 80 degrees."""
    entries = [MachineClass("fan", "00", "a"), MachineClass("fan", "00", "b")]
    classes = Classes((*entries, MachineClass("fan", "02")))
    model = planar_model(in_plane(0, 80, 130), classes=classes)
    scores = planar_scores(model, kind, [0, 1, 2], 70, 70, 70, neighbours=1)
    assert scores == pytest.approx(expected, abs=2e-2)


def test_scores_against_several_machines_are_columns():
    model = planar_model(in_plane(0, 90, 180))
    outputs = Outputs(torch.zeros(2, 3), in_plane(30, 60), torch.zeros(2, 2))
    machines = model.classes.machines[::-1]
    scores = model.scorer("angle").score_against_machines(outputs, machines)
    assert scores.tolist() == [
        pytest.approx(row, abs=2e-2) for row in ([150, 60, 30], [120, 30, 60])
    ]


def test_float32_is_the_published_precision():
    """Very normal clips tie at exactly 0 there, and are ordered in float64."""
    model = planar_model(in_plane(0, 90, 180))
    similarity = torch.tensor([[1.0, -0.2, -0.2], [0.999, -0.2, -0.2]])
    outputs = Outputs(similarity, in_plane(0, 0), torch.zeros(2, 2))
    first, second = model.scorer("published").score_against_class(outputs, 0).tolist()
    assert 0 < first < second
    rounded = model.scorer("published", dtype=torch.float32).score_against_class(outputs, 0)
    assert rounded.dtype == torch.float32
    assert rounded.tolist() == [0.0, 0.0]


def test_scores_are_computed_in_one_file():
    """What the formulas need is named nowhere else: cosines, margins and cross-entropies of classes
    are in model/, losses.py (training) and evaluation/scores.py.
    """
    names = {"log_softmax", "cross_entropy", "logits", "acos", "topk", "arcface", "normalize"}
    allowed = {
        "losses.py": {"cross_entropy", "logits", "log_softmax", "normalize"},  # contrastive term
        "trainer.py": {"cross_entropy"},  # the validation loss
        "evaluation/onnx_file.py": {"acos"},  # its translation
    }
    files = [*ROOT.glob("*.py"), *ROOT.glob("evaluation/*.py")]
    for file in files:
        place = str(file.relative_to(ROOT))
        if place == "evaluation/scores.py":
            continue
        nodes = ast.walk(ast.parse(file.read_text()))
        used = {node.attr for node in nodes if isinstance(node, ast.Attribute)} & names
        assert used <= allowed.get(place, set()), f"{place} computes scores"


# ---- Over windows ----


def test_values_of_windows_are_combined():
    recording = np.array([0, 0, 0, 1, 2, 2, 2, 3])
    values = np.arange(8, dtype=np.float32)[::-1].copy()
    means = over_windows(values, recording, "mean")
    assert means.dtype == np.float32
    assert means.tolist() == [6, 4, 2, 0]
    assert over_windows(values, recording, "max").tolist() == [7, 4, 3, 0]
    columns = np.stack([values, -values], axis=1)
    assert over_windows(columns, recording, "mean")[:2].tolist() == [[6, -6], [4, -4]]
    assert find_worst(values, recording).tolist() == [0, 3, 4, 7]
    assert find_worst(-values, recording).tolist() == [2, 3, 6, 7]


# ---- Evaluations ----


def test_scores_do_not_depend_on_the_batch_size(lively_model, test_clips):
    scores = score_clips(lively_model, test_clips).recordings["score"]
    again = score_clips(lively_model, test_clips, batch_size=5).recordings["score"]
    assert again.dtype == np.float64
    assert again.tolist() == pytest.approx(scores.tolist(), rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_half_precision_scores_stay_near(lively_model, test_clips):
    some = test_clips.select(np.arange(12) < 4)
    scores, exact = (
        score_clips(lively_model, some, eval_precision=precision).recordings["score"]
        for precision in ("bf16", "fp32")
    )
    differences = (scores - exact).abs()
    assert differences.max() > 1e-4
    assert differences.max() < 0.5, "of scores around 20"


def test_held_out_scores_are_those_of_the_validation_clips(trained, data_root):
    """They are the float64 scores of the best weights for the clips that were not trained on."""
    model = load_model(trained / "run.pth", load_config())
    _, valid_clips = clips_of(data_root).split(0.95, 2023)
    expected = score_clips(model, valid_clips).recordings
    held_out = score_held_out(model, model.scorer("published"))
    assert held_out["score"].tolist() == pytest.approx(
        expected["level"].tolist(), rel=1e-6, abs=1e-9
    )
    assert held_out[MACHINE_COLUMNS].to_dict("list") == expected[MACHINE_COLUMNS].to_dict("list")


@pytest.mark.parametrize("mode", ["noisy_arcmix", "cross_entropy"])
def test_angles_are_those_to_the_centre_of_the_machine(trained, test_clips, mode, tmp_path):
    path = tmp_path / "run.pth"
    config = Checkpoint.load(trained / "run.pth").config.model_dump() | {"mode": mode}
    network = build_network(make_config(("test", config)), CLASSES)
    weights = network.state_dict()
    change_checkpoint(trained / "run.pth", path, keys={"mode": mode}, weights=weights)
    clips = test_clips.select((np.arange(12) >= 2) & (np.arange(12) < 6))
    result = score_clips(load_model(path, load_config()), clips)
    head = network.mobilefacenet.fc_out if mode == "cross_entropy" else network.arcface
    centres = head.weight.detach().numpy()
    for row, embedding in zip(result.recordings.itertuples(), result.embedding, strict=True):
        centre = centres[CLASSES.machines.index((row.machine_type, row.machine_id))]
        cosine = embedding @ centre / np.linalg.norm(embedding) / np.linalg.norm(centre)
        assert row.angle == pytest.approx(math.degrees(math.acos(cosine)), abs=1e-2)


def test_the_bank_is_that_of_a_fresh_computation(trained, data_root):
    """It has the clips trained on, under the best weights; the clips held out are apart."""
    config = load_config(data_root=str(data_root))
    model = load_model(trained / "run.pth", config)
    train_clips, valid_clips = clips_of(data_root).split(0.95, 2023)
    assert (len(train_clips), len(valid_clips)) == (9, 3)
    checkpoint = model.checkpoint
    assert checkpoint.bank.files[0] == "fan/train/normal_id_00_00000000.wav"
    for clips, kept in ((train_clips, checkpoint.bank.clips), (valid_clips, checkpoint.held_out)):
        outputs = run_model(model, clips, config, CPU)
        assert torch.equal(kept.labels, clips.labels)
        assert kept.embedding.dtype == kept.spectrum.dtype == torch.float16
        normalised = torch.nn.functional.normalize(outputs.embedding)
        assert torch.allclose(kept.embedding.float(), normalised, rtol=0, atol=HALF)
        assert torch.allclose(kept.spectrum.float(), outputs.spectrum, rtol=1e-3)


@pytest.mark.parametrize(
    "kind",
    [
        "nearest",
        pytest.param("angle", marks=pytest.mark.slow),
        pytest.param("spectrum", marks=pytest.mark.slow),
    ],
)
def test_thresholds_and_decisions_are_of_the_same_kind_of_score(
    kind, lively_model, data_root, test_clips
):
    """The held-out clips are scored as other clips are, and are not in the bank."""
    config = load_config(data_root=str(data_root))
    train_clips, valid_clips = clips_of(data_root).split(0.95, 2023)
    held_out = HeldOut(["a", "b", "c"], valid_clips.labels, torch.zeros(3))
    checkpoint = replace(lively_model.checkpoint, held_out=held_out)
    model = with_bank(replace(lively_model, checkpoint=checkpoint), config, ["nearest"], CPU)
    keys = {"false_alarms": 0.5}
    held_out = score_clips(model, valid_clips, kind, **keys).recordings["level"]
    scores = score_held_out(model, model.scorer(kind, 2))["score"]
    assert scores.tolist() == pytest.approx(held_out.tolist(), rel=1e-2)
    result = score_clips(model, test_clips, kind, **keys)
    assert result.thresholds["source"].tolist() == ["1 held-out recordings of the ID"] * 3
    assert result.thresholds["threshold"].tolist() == pytest.approx(held_out.tolist(), rel=1e-2)
    decided = result.recordings[result.recordings["decision"].notna()]
    assert len(decided)
    assert (decided["decision"] == (decided["level"] > decided["threshold"])).all()
    if kind == "nearest":
        scores = score_clips(model, train_clips, kind).recordings["score"]
        assert scores.min() < 1e-2 < held_out.min()
