"""export.py and its examples: the file gives the scores of eval.py and score.py; errors."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from itertools import combinations
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import reference
import torch
from conftest import clips_in_memory, make_bank, tone, write_clip
from mutations import broken, without_length
from torch.nn.modules.batchnorm import _BatchNorm

import export as export_script
import score as score_script
from checkpoint import Checkpoint
from classes import Classes, MachineClass
from config import Config, load_config
from dataloader import ClipSet
from detector import Detector, load_detector
from errors import UserError
from evaluation import onnx_file
from evaluation.graph import ScoringGraph, SumOfProductsPReLU
from evaluation.onnx_file import CPU, compare, largest_difference, make_file, synthetic_clips
from evaluation.scores import KINDS, Outputs
from inference import Model, build_network, load_model, run_model
from model import CHANNELS, EMBEDDING_SIZE, PUBLISHED_CHANNELS
from model.tastgram import N_MELS

ROOT = Path(export_script.__file__).parent
SLOW = pytest.mark.slow
SCORER = ROOT / "examples" / "score_onnx.py"
MONITOR = ROOT / "examples" / "monitor.py"
# Every choice of published channels; each published head with one, two and three of them
MODES_OF_CHOICES = ("arcface", "cross_entropy", "noisy_arcmix")
CHOICES = [{"mode": "cross_entropy"}]
for size in (1, 2, 3):
    choices = combinations(PUBLISHED_CHANNELS, size)
    for choice, mode in zip(choices, MODES_OF_CHOICES, strict=False):
        CHOICES.append({"input": list(choice), "mode": mode})
CHOICES.append({"input": list(CHANNELS), "mode": "os_scl"})
CHOICES.append({"input": ["specnet"], "mode": "os_scl", "scoring": "angle"})
PUBLISHED = Classes.from_machines(load_config().machines)
BY_ATTRIBUTES = Classes(
    (
        MachineClass("fan", "00", "slow"), MachineClass("fan", "00", "fast"),
        MachineClass("fan", "02"), MachineClass("press", "line-3", "a"),
        MachineClass("press", "line-3", "b"), MachineClass("press", "line-3", "c"),
    )
)  # fmt: skip
TWO_FANS = Classes.from_machines({"fan": ["00", "02"]})
ONE_FAN = Classes.from_machines({"fan": ["00"]})


def reference_model(config: Config, classes: Classes = PUBLISHED) -> Model:
    """Return a model with the reference weights, and a bank that lacks class 1."""
    network = build_network(config, classes)
    network.load_state_dict(reference.parameters(reference.shapes_of(network)))
    # Three clips of each class, two of the last one
    labels = np.arange(len(classes)).repeat(3)[:-1]
    labels = torch.from_numpy(labels[labels != 1])
    count = len(labels)
    spectra = torch.randn(count, 2 * N_MELS) - 20
    outputs = Outputs(torch.zeros(count, 1), torch.randn(count, EMBEDDING_SIZE), spectra)
    bank = make_bank(outputs, labels)
    checkpoint = Checkpoint(Path("run.pth"), network.state_dict(), bank=bank)
    return Model(network.eval(), config, classes, checkpoint)


def expected_scores(model: Model, clips: ClipSet, config: Config) -> np.ndarray:
    """Return the scores that eval.py computes, against each machine."""
    outputs = run_model(model, clips, config, CPU)
    scorer = model.scorer(config.scoring, config.neighbours)
    return scorer.score_against_machines(outputs, model.classes.machines).numpy()


def ranks(scores: np.ndarray) -> list:
    return scores.argsort(axis=0, kind="stable").tolist()


def is_close(scores: np.ndarray, expected: np.ndarray) -> bool:
    return bool((np.abs(scores - expected) <= np.maximum(1e-3 * np.abs(expected), 1e-4)).all())


def run(file: Path | bytes, samples: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, {"samples": samples})


def name_parameter(value: dict | Classes) -> str:
    """Name a parameter of a test: the keys, or the number of classes."""
    return f"{len(value)} classes" if isinstance(value, Classes) else str(value)


@pytest.fixture(scope="module")
def exported(lively_run, tmp_path_factory) -> Path:
    """A folder with a checkpoint that tells clips apart, `run.pth`, and its export, `run.onnx`.

    The file `output` holds what export.py printed.
    """
    folder = tmp_path_factory.mktemp("exported")
    shutil.copy(lively_run / "run.pth", folder)
    config = load_config(device="cpu")
    traced = onnx_file.export(ScoringGraph(load_detector([folder / "run.pth"], config), config))
    onnx.save(traced, folder / "traced.onnx")
    options = Namespace(checkpoint=[folder / "run.pth"], output=None, normal=None)
    with contextlib.redirect_stdout(io.StringIO()) as output, pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_file, "export", lambda graph: traced)
        export_script.export(config, options)
    (folder / "output").write_text(output.getvalue())
    return folder


@pytest.fixture
def exported_copy(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "exported"))


@pytest.fixture
def without_tracing(exported, monkeypatch):
    """Replace tracing, which is slow, by the graph of `exported`."""
    monkeypatch.setattr(onnx_file, "export", lambda graph: onnx.load(exported / "traced.onnx"))


# ---- The graph, in PyTorch ----


@pytest.mark.parametrize(
    ("keys", "classes"),
    [
        ({}, PUBLISHED),
        ({"mode": "cross_entropy", "input": "sgram"}, PUBLISHED),
        ({"scoring": "angle", "sub_centers": 3}, PUBLISHED),
        pytest.param({"scoring": "angle", "mode": "cross_entropy"}, PUBLISHED, marks=SLOW),
        ({"scoring": "published"}, BY_ATTRIBUTES),
        ({"scoring": "nearest"}, BY_ATTRIBUTES),
        ({"scoring": "nearest", "neighbours": 1}, TWO_FANS),
        ({"mode": "os_scl", "input": list(CHANNELS)}, PUBLISHED),
        pytest.param(
            {"mode": "os_scl", "input": "specnet", "scoring": "angle"}, PUBLISHED, marks=SLOW
        ),
    ],
    ids=name_parameter,
)
def test_the_graph_gives_the_scores_of_eval(keys, classes):
    config = load_config(**keys)
    model = reference_model(config, classes)
    clips = clips_in_memory(reference.samples(), reference.labels())
    expected = expected_scores(model, clips, config)
    graph = ScoringGraph(Detector((model,)), config).eval()
    with torch.no_grad():
        scores, embedding = graph(reference.waveforms())
    assert scores.shape == (reference.BATCH, len(classes.machines))
    assert embedding.shape == (reference.BATCH, EMBEDDING_SIZE)
    has_bank = np.isfinite(expected)
    assert has_bank.all() or KINDS[config.scoring].uses_bank
    assert (scores.numpy()[~has_bank] == np.inf).all()
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_the_graph_gives_the_published_score():
    config = load_config()
    graph = ScoringGraph(Detector((reference_model(config),)), config).eval()
    with torch.no_grad():
        scores, embedding = graph(reference.waveforms())
    scores = scores[torch.arange(reference.BATCH), reference.labels()]
    assert reference.distance(scores, reference.VALUES["eval_score"]) < 1e-4
    assert reference.distance(embedding, reference.VALUES["eval_embedding"]) < 1e-4


def test_the_graph_has_no_batch_norm_and_no_prelu():
    config = load_config()
    model = reference_model(config)
    for part in ScoringGraph(Detector((model,)), config).modules():
        assert not isinstance(part, _BatchNorm | torch.nn.PReLU)
    has_prelu = any(isinstance(part, torch.nn.PReLU) for part in model.network.modules())
    assert has_prelu, "the model itself is unchanged"


def test_a_prelu_of_sum_and_products():
    prelu, x = torch.nn.PReLU(5), torch.randn(2, 5, 3, 4)
    prelu.weight.data = torch.tensor([-0.5, 0.0, 0.25, 1.0, 2.0])
    torch.testing.assert_close(SumOfProductsPReLU(prelu.weight)(x), prelu(x))


# ---- The file ----


def test_what_the_file_holds(exported):
    model = onnx.load(exported / "run.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(part.domain, part.version) for part in model.opset_import] == [("", 18)]
    assert model.ir_version == 10
    operations = [node.op_type for node in model.graph.node]
    assert not {"BatchNormalization", "PRelu"} & set(operations)
    assert operations.count("STFT") == 1
    assert str(ROOT).encode() not in (exported / "run.onnx").read_bytes()
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(about["machines"]) == [["fan", "00"], ["fan", "02"], ["valve", "01"]]
    assert len(json.loads(about["thresholds"])) == 3
    fixed = {
        "sample_rate": "16000", "window": "10", "hop": "5.0", "over_windows": "mean",
        "channel": "0", "mode": "noisy_arcmix", "input": '["tgram", "sgram", "tagram"]',
        "scoring": "published", "alarm_windows": "3", "alarm_span": "5",
    }  # fmt: skip
    assert {key: about[key] for key in fixed} == fixed
    assert about.keys() - fixed.keys() == {"machines", "thresholds", "version", "weights_sha256"}
    assert len(about["weights_sha256"]) == 64
    size = (exported / "run.onnx").stat().st_size / 1e6
    summary = (
        f"{exported / 'run.onnx'}: {size:.1f} MB, 3 machine IDs, published scores, which differ "
        "from those of eval"
    )
    assert (exported / "output").read_text().startswith(summary)


def test_the_file_gives_the_scores_of_eval_for_any_number_of_clips(exported):
    config = load_config()
    model = load_model(exported / "run.pth", config)
    clips = synthetic_clips()
    expected = expected_scores(model, clips, config)
    samples = clips.samples.numpy().astype(np.float32) / 32768
    expected_embedding = run_model(model, clips, config, CPU).embedding.numpy()
    for count in (1, 7, 8):
        scores, embedding = run(exported / "run.onnx", samples[:count])
        assert scores.dtype == embedding.dtype == np.float32
        assert (scores.shape, embedding.shape) == ((count, 3), (count, EMBEDDING_SIZE))
        assert is_close(scores, expected[:count])
        assert ranks(scores) == ranks(expected[:count])
        assert reference.distance(embedding, expected_embedding[:count]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "classes"),
    [
        *((keys, PUBLISHED) for keys in CHOICES),
        ({"scoring": "published", "sub_centers": 3}, PUBLISHED),
        ({"scoring": "angle", "mode": "cross_entropy"}, PUBLISHED),
        ({"scoring": "angle", "sub_centers": 3}, PUBLISHED),
        ({"scoring": "published"}, BY_ATTRIBUTES),
        ({"scoring": "angle"}, BY_ATTRIBUTES),
        ({"scoring": "nearest"}, ONE_FAN),
    ],
    ids=name_parameter,
)
def test_every_kind_of_model_passes_the_comparison(keys, classes):
    config = load_config(**keys)
    model = reference_model(config, classes)
    detector = Detector((model,))
    content = make_file(detector, config).SerializeToString()
    assert compare(content, detector, config) < 1e-2
    clips = clips_in_memory(reference.samples(), reference.labels())
    scores, _ = run(content, clips.samples.numpy().astype(np.float32) / 32768)
    expected = expected_scores(model, clips, config)
    assert is_close(scores, expected)
    assert ranks(scores) == ranks(expected)


# ---- Without a network ----


@pytest.mark.slow
def test_a_folder_of_normal_recordings_can_be_exported(tmp_path, call, monkeypatch):
    """It scores as score.py --normal does."""
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        write_clip(Path("normal") / "press3" / f"{number}.wav", tone(number % 3))
    file = write_clip(Path("new.wav"), tone(5, 17.0))
    status, output, errors = call(export_script.main, "--normal", "normal/press3")
    assert status == 0, errors
    exported = Path("check_points", "press3.onnx")
    assert output.startswith(f"{exported}: 0.6 MB, 1 machine ID, spectrum scores, which differ")
    assert run(exported, np.zeros((3, 160_000), np.float32))[1].shape == (3, 0)
    about = {entry.key: entry.value for entry in onnx.load(exported).metadata_props}
    empty = {"mode": "", "input": "[]", "weights_sha256": "", "scoring": "spectrum"}
    assert {key: about[key] for key in empty} == empty
    _, expected, _ = call(score_script.main, "--normal", "normal/press3", file)
    process = print_score(tmp_path / exported, str(tmp_path / file), "machine", "press3")
    line = expected.splitlines()[0].replace(str(file), str(tmp_path / file))
    assert rounded(process.stdout) == rounded(line) + "\n"


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--normal", "x", "a.pth"), "a.pth: --normal needs no checkpoint; leave it out"),
        (("--normal", "x", "--scoring", "nearest"), "scoring has no effect with --normal"),
        (("--normal", "x", "--mode", "arcface"), "unknown option|mode has no effect with --normal"),
        (("a.pth", "--machine_id", "2"), "--machine_id have no effect without --normal"),
    ],
)
def test_options_that_have_no_effect(words, match, fails):
    fails(export_script.main, *words, match=match)


# ---- Scoring without PyTorch ----


def without_packages(example: Path, *words: str | Path) -> list[str]:
    """Return the command of an example where only the packages that it names can be imported."""
    packages = "torch torchaudio librosa pandas scipy sklearn yaml onnx onnxscript filelock"
    code = (
        "import sys, runpy\n"
        f"for name in {packages.split()}:\n"
        "    sys.modules[name] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    return [sys.executable, "-c", code, str(example), *map(str, words)]


def print_score(file: Path, *words: str) -> subprocess.CompletedProcess:
    command = without_packages(SCORER, file, *words)
    return subprocess.run(command, capture_output=True, text=True, cwd=file.parent)


def rounded(line: str) -> str:
    """Round each number of a line to four digits."""
    return re.sub(r"\d+\.\d+", lambda match: f"{float(match[0]):.4g}", line)


@pytest.mark.parametrize(
    ("seconds", "channels", "subtype", "words"),
    [
        (10.0, 1, "PCM_16", ("fan", "2")),
        (3.0, 2, "PCM_24", ("valve",)),
        (22.26, 1, "FLOAT", ("fan",)),
        (10.005, 1, "PCM_16", ("valve", "01")),
    ],
)
def test_the_example_prints_the_line_of_score(
    seconds, channels, subtype, words, exported, tmp_path, call
):
    samples = np.stack([tone(7, seconds)] * channels, axis=1)
    file = write_clip(tmp_path / "new.wav", samples, subtype=subtype)
    options = dict(zip(("--machine_type", "--machine_id"), words, strict=False))
    options_of_score = [word for option in options.items() for word in option]
    _, expected, _ = call(score_script.main, exported / "run.pth", file, *options_of_score)
    process = print_score(exported / "run.onnx", str(file), *words)
    assert process.returncode == 0, process.stderr
    assert rounded(process.stdout) == rounded(expected)
    assert ("worst at" in expected) == (seconds > 10)


def test_the_example_follows_what_the_file_says(exported, tmp_path):
    model = onnx.load(exported / "run.onnx")
    about = {entry.key: entry.value for entry in model.metadata_props}
    thresholds = json.dumps([None, 1e9, -1e9])
    about |= {"thresholds": thresholds, "over_windows": "max", "hop": "2.5", "alarm_span": "4"}
    onnx.helper.set_model_props(model, about)
    onnx.save(model, tmp_path / "run.onnx")
    file = write_clip(tmp_path / "new.wav", tone(1, 20.0))
    for machine, threshold, decision, count in (
        (("fan", "0"), "-", "-", ""),
        (("fan", "02"), "1e+09", "normal", ", 0 of 5 windows anomalous"),
        (("valve", "1"), "-1e+09", "anomalous", ", 5 of 5 windows anomalous"),
    ):
        alarms = {"-": "", "normal": "no alarm, "}.get(decision, r"alarm from 0:00:00 to .*?\), ")
        line = print_score(tmp_path / "run.onnx", str(file), *machine).stdout
        cells = line.rstrip("\n").split("\t")
        assert cells[3:5] == [threshold, decision]
        worst = re.fullmatch(alarms + r"worst at 0:00:\d\d(\.50)? \((.*?)\)(.*)", cells[5])
        assert worst[2] == cells[2], "the highest score counts"
        assert worst[3] == count


@pytest.mark.parametrize(
    ("samples", "rate", "words", "match"),
    [
        (np.zeros(0), 16000, ["fan"], "empty: no samples"),
        (np.full(9, np.nan), 16000, ["fan"], "not finite: it holds NaN or infinite samples"),
        (
            tone(1, 1.0),
            16000,
            ["fan", "7"],
            "has no machine fan 7; use one of fan 00, fan 02, valve 01",
        ),
    ],
    ids=["empty", "NaN", "machine"],
)
def test_what_the_example_cannot_score(samples, rate, words, match, exported, tmp_path):
    file = write_clip(tmp_path / "new.wav", samples, rate, "FLOAT")
    refuses(exported / "run.onnx", file, *words, match=match)


def refuses(model: Path, file: Path, *words: str, match: str) -> None:
    """Check that the example ends with one line that names the file to blame."""
    process = print_score(model, str(file), *words)
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.count("\n") == 1, process.stderr
    assert re.fullmatch(f"error: .*({match}).*\n", process.stderr)


def test_files_that_the_example_cannot_read(exported, tmp_path):
    file, text = write_clip(tmp_path / "new.wav", tone(1, 1.0)), tmp_path / "text.wav"
    text.write_text("no sound")
    refuses(
        exported / "run.onnx",
        tmp_path / "none.wav",
        "fan",
        match="none.wav: unreadable: not a file",
    )
    refuses(exported / "run.onnx", text, "fan", match="text.wav: .*Format not recognised")
    refuses(
        tmp_path / "none.onnx",
        file,
        "fan",
        match="none.onnx: no such file; name one from export.py",
    )
    refuses(exported / "traced.onnx", file, "fan", match="traced.onnx: not a file that export.py")


@pytest.mark.parametrize(
    "kind",
    [
        "silent",
        "cut in half",
        *(pytest.param(x, marks=SLOW) for x in ("24 bits in 4 bytes", "mp4")),
    ],
)
def test_the_example_says_what_score_says(kind, exported, tmp_path, call):
    """Both read recordings with the same code, and refuse the same ones with the same words."""
    file = tmp_path / "new.wav"
    broken(kind, file)
    words = ("--machine_type", "fan")
    status, expected, _ = call(score_script.main, exported / "run.pth", file, *words)
    process = print_score(exported / "run.onnx", str(file), "fan")
    assert (status, process.returncode) == (2, 2)
    assert process.stderr == expected.replace(f"{file}\terror: ", f"error: {file}: ")


@pytest.mark.parametrize("ending", ["flac", pytest.param("wav", marks=SLOW)])
def test_the_example_reads_what_score_reads(ending, exported, tmp_path, call):
    """A stereo recording at another sample rate, of which the writer did not know the length."""
    file = tmp_path / f"new.{ending}"
    samples = np.stack([tone(7, 12.0, rate=22_050), np.zeros(264_600)], axis=1)
    write_clip(file, samples, rate=22_050, subtype="PCM_24")
    content = file.read_bytes()
    if ending == "flac":
        file.write_bytes(without_length(content))
    else:
        size = content.index(b"data") + 4
        file.write_bytes(content[:size] + b"\xff\xff\xff\xff" + content[size + 4 :])
    words = ("--machine_type", "fan")
    _, expected, notices = call(score_script.main, exported / "run.pth", file, *words)
    process = print_score(exported / "run.onnx", str(file), "fan")
    assert process.returncode == 0, process.stderr
    assert rounded(process.stdout) == rounded(expected)
    assert process.stderr.count("notice: its samples") == notices.count("of 1 recordings") == 4


@pytest.mark.parametrize(
    "machine_id", ["2", "two", *(pytest.param(x, marks=SLOW) for x in ("02", "0000000002", "2.0"))]
)
def test_the_example_takes_the_machine_ids_that_score_takes(machine_id, exported, tmp_path, call):
    file = write_clip(tmp_path / "new.wav", tone(1, 1.0))
    words = ("--machine_type", "fan", "--machine_id", machine_id)
    status, _, _ = call(score_script.main, exported / "run.pth", file, *words)
    assert print_score(exported / "run.onnx", str(file), "fan", machine_id).returncode == status


# ---- What can go wrong ----


@pytest.mark.parametrize(
    ("score", "match"),
    [
        (1001.1, "it gives a score of 1001.1 where eval.py gives 1000; check the packages"),
        (np.nan, "it gives a score of nan where eval.py gives 1000"),
    ],
)
def test_the_bound_is_the_larger_of_a_share_and_a_number(score, match):
    expected = np.array([[0.01, 1000.0]] * 2)
    close = np.array([[0.01009, 1000.9], [0.00991, 999.1]])
    assert largest_difference(close, expected) == pytest.approx(0.9)
    with pytest.raises(UserError, match=match):
        largest_difference(np.array([[0.01, 1000.0], [0.01, score]]), expected)
    with pytest.raises(UserError, match=r"it gives a score of 0.01011 where eval.py gives 0.01;"):
        largest_difference(expected + np.array([[0.00011, 0]]), expected)


def test_a_difference_above_the_bound_leaves_no_file(without_tracing, trained_copy, fails):
    before = sorted(trained_copy.iterdir())  # its checkpoint has other weights than the graph
    match = "the ONNX file was not written: it gives a score of .* where eval.py gives"
    fails(export_script.main, trained_copy / "run.pth", "--device", "cpu", match=match)
    assert sorted(trained_copy.iterdir()) == before


def test_a_full_disk(without_tracing, exported_copy, fails, monkeypatch):
    def fail(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", fail)
    before = sorted(exported_copy.iterdir())
    match = r"run.onnx cannot be written: No space left on device; free some space"
    fails(export_script.main, exported_copy / "run.pth", match=match)
    assert sorted(exported_copy.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("none.pth",), "none.pth: no such checkpoint"),
        (("text.pth",), "text.pth: not a readable checkpoint"),
        (("nowhere/run.pth",), "nowhere/run.pth: no such checkpoint"),
        (
            ("run.pth", "--output", "run.pth"),
            "run.pth is a folder, the checkpoint, or does not end in .onnx; choose another",
        ),
        (("copy.onnx",), "copy.onnx is a folder, the checkpoint, or does not"),
        (("run.pth", "--output", "folder.onnx"), "folder.onnx is a folder"),
        (("run.pth", "--output", "text.pth/run.onnx"), "text.pth/run.onnx cannot be written"),
        (("run.pth", "--mode", "arcface"), "command line: mode is 'arcface', but the checkpoint"),
        ((), "noisy_arcmix.pth: no such checkpoint"),
        (
            ("run.pth", "--neighbours", "3"),
            "command line: neighbours has no effect with scoring: published",
        ),
        (("run.pth", "--score_dtype", "float32"), "unknown option --score_dtype"),
    ],
)
def test_mistakes(words, match, trained_copy, fails, monkeypatch):
    monkeypatch.chdir(trained_copy)
    Path("text.pth").write_text("no weights")
    Path("folder.onnx").mkdir()
    shutil.copy("run.pth", "copy.onnx")
    before = sorted(trained_copy.rglob("*"))
    fails(export_script.main, *words, match=match)
    assert sorted(trained_copy.rglob("*")) == before


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package(package, trained_copy, fails, monkeypatch):
    monkeypatch.delitem(sys.modules, "evaluation.onnx_file")
    monkeypatch.setitem(sys.modules, package, None)
    match = f"export.py needs more packages .*{package}.*; run pip install -r requirements-export"
    fails(export_script.main, trained_copy / "run.pth", match=match)


@pytest.mark.slow
def test_training_and_evaluation_do_without_the_packages():
    code = (
        "import sys; sys.modules |= dict.fromkeys(('onnx', 'onnxscript', 'onnxruntime')); import "
        "train_ddp, train, eval"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("rate", [22_050, pytest.param(16_000, marks=SLOW)])
def test_the_monitor_prints_the_windows_and_alarms_of_score(rate, exported, tmp_path, call):
    """It is stopped by SIGTERM when all sound has arrived."""
    sound = np.concatenate([tone(seed, 17.03, rate) for seed in range(3)])
    file = write_clip(tmp_path / "new.wav", sound, rate)
    machine = ("--machine_type", "fan", "--machine_id", "2")
    words = (exported / "run.pth", file, *machine, "--json", "--timeline")
    (row,) = json.loads(call(score_script.main, *words)[1])
    command = without_packages(MONITOR, exported / "run.onnx", "fan", "2", "--json")
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=False)
    with process:
        process.stdin.write(file.read_bytes())
        process.stdin.flush()
        n_lines = len(row["windows"])  # all but the last, and the first line
        lines = [process.stdout.readline() for _ in range(n_lines)]
        process.terminate()
        lines += process.stdout.readlines()
    assert process.returncode == 0
    found = [json.loads(line) for line in lines]
    windows = [event for event in found if event["event"] == "window"]
    for key in ("start", "decision"):
        assert [event[key] for event in windows] == [window[key] for window in row["windows"]]
    expected = np.array([window["score"] for window in row["windows"]])
    assert is_close(np.array([event["score"] for event in windows]), expected)
    alarms = [event["start"] for event in found if event["event"] == "alarm"]
    assert alarms == [alarm["start"] for alarm in row["alarms"]]
    assert found[-1]["reason"] == "stopped"


def test_errors_of_the_monitor_are_one_line(exported):
    for words, message in (
        (("fan", "2", "--rat", "1"), "unrecognized arguments: --rat 1"),
        (("fan", "2"), "standard input: no sound; check the program that records"),
    ):
        command = without_packages(MONITOR, exported / "run.onnx", *words)
        process = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert process.returncode == 2
        assert process.stderr.startswith("error: ")
        assert process.stderr.count("\n") == 1
        assert message in process.stderr
