"""export.py and examples/score_onnx.py: the numbers of the file are those of eval.py, and what can
go wrong.
"""

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
import pandas as pd
import pytest
import reference
import torch
from conftest import make_lively, tone, write_clip
from torch.nn.modules.batchnorm import _BatchNorm

import export as export_script
import score as score_script
from checkpoint import TrainedModel, build_network, load_model
from config import load_config
from corpus import first_classes, machines_of_classes
from dataloader import ClipSet
from evaluation import onnx_file
from evaluation.graph import ScoringGraph, SumOfProductsPReLU
from evaluation.onnx_file import CPU, compare, largest_difference, make_model, synthetic_clips
from evaluation.scoring import run_model, scores_against
from model import CHANNELS, EMBEDDING_SIZE
from utils import UserError

ROOT = Path(export_script.__file__).parent
SCORER = ROOT / "examples" / "score_onnx.py"
# Each choice of channels, each head with one, two and three of them
CHOICES = [
    {"input": list(choice), "mode": mode}
    for size in (1, 2, 3)
    for choice, mode in zip(
        combinations(CHANNELS, size), ("arcface", "cross_entropy", "noisy_arcmix"), strict=False
    )
] + [{"mode": "cross_entropy"}]
BY_ATTRIBUTES = {
    "machines": {"fan": [0, 2], "press": ["line-3"]},
    "classes": {"fan": {"00": ["slow", "fast"], "02": [""]}, "press": {"line-3": ["a", "b", "c"]}},
}


def reference_model(**keys) -> TrainedModel:
    """With the weights of the reference values, as far as they fit, and a bank that lacks one
    class.
    """
    config = load_config(**keys)
    network, weights = build_network(config), reference.parameters()
    weights["mobilefacenet.conv1.conv.weight"] = weights["mobilefacenet.conv1.conv.weight"][
        :, : len(config.input)
    ]
    for name, own in network.state_dict().items():
        if own.ndim and len(own) <= len(weights[name]):  # the centres of fewer classes
            own.copy_(weights[name][: len(own)])
    labels = np.delete(
        np.arange(len(machines_of_classes(config))).repeat(3), -1
    )  # three clips of each but the last
    kept = torch.from_numpy(labels[labels != 1])
    bank = {"embedding": torch.randn(len(kept), EMBEDDING_SIZE).half(), "label": kept}
    return TrainedModel(Path("run.pth"), network.eval(), config, {"embeddings": {"bank": bank}})


def reference_clips() -> ClipSet:
    clips = ClipSet(pd.DataFrame({"path": Path(), "label": [0] * reference.BATCH}), 1)
    clips.samples = reference.samples()
    return clips


def expected_scores(trained: TrainedModel, clips: ClipSet) -> np.ndarray:
    """As eval.py computes them for single recordings."""
    return scores_against(
        trained, run_model(trained, clips, CPU), first_classes(trained.config).values()
    )


def ranks(scores: np.ndarray) -> list:
    return scores.argsort(axis=0, kind="stable").tolist()


def is_close(scores: np.ndarray, expected: np.ndarray) -> bool:
    return bool((np.abs(scores - expected) <= np.maximum(1e-3 * np.abs(expected), 1e-4)).all())


def run(file: Path | bytes, samples: np.ndarray) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(
        None, {"samples": samples}
    )


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    """Folder of a checkpoint, `run.pth`, under which clips differ, of its file, `run.onnx`, and of
    what was printed, `output`.
    """
    folder = tmp_path_factory.mktemp("exported")
    (folder / "run.pth").write_bytes((trained / "run.pth").read_bytes())
    make_lively(folder)
    traced = onnx_file.trace(ScoringGraph(load_model(folder / "run.pth", load_config(), {})))
    onnx.save(traced, folder / "traced.onnx")
    options = Namespace(checkpoint=folder / "run.pth", output=None)
    with contextlib.redirect_stdout(io.StringIO()) as output, pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_file, "trace", lambda graph: traced)
        export_script.export(load_config(device="cpu"), options, {})
    (folder / "output").write_text(output.getvalue())
    return folder


@pytest.fixture
def exported_copy(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "exported"))


@pytest.fixture
def without_tracing(exported, monkeypatch):
    """Take the graph that is there, which is quicker than to trace one."""
    monkeypatch.setattr(onnx_file, "trace", lambda graph: onnx.load(exported / "traced.onnx"))


# ---- The graph, in PyTorch ----


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"mode": "cross_entropy", "input": "sgram"},
        {"scoring": "angle", "sub_centers": 3},
        {"scoring": "angle", "mode": "cross_entropy"},
        *({"scoring": kind, **BY_ATTRIBUTES} for kind in ("published", "nearest")),
        {"scoring": "nearest", "neighbours": 1, "machines": {"fan": [0, 2]}},
    ],
    ids=str,
)
def test_the_graph_gives_the_scores_of_eval(keys):
    trained, clips = reference_model(**keys), reference_clips()
    expected = expected_scores(trained, clips)
    graph = ScoringGraph(trained).eval()
    with torch.no_grad():
        scores, embedding = graph(reference.waveforms())
    assert scores.shape == (reference.BATCH, len(first_classes(trained.config)))
    assert embedding.shape == (reference.BATCH, EMBEDDING_SIZE)
    has_bank = np.isfinite(expected)
    assert has_bank.all() or keys.get("scoring") == "nearest"
    assert (scores.numpy()[~has_bank] == np.inf).all()
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_the_graph_gives_the_published_score():
    trained = reference_model()
    with torch.no_grad():
        scores, embedding = ScoringGraph(trained).eval()(reference.waveforms())
    own = scores[torch.arange(reference.BATCH), reference.labels()]
    assert reference.distance(own, reference.VALUES["eval_score"]) < 1e-4
    assert reference.distance(embedding, reference.VALUES["eval_embedding"]) < 1e-4


def test_the_graph_has_no_batch_norm_and_no_prelu():
    trained = reference_model()
    assert not any(
        isinstance(part, _BatchNorm | torch.nn.PReLU) for part in ScoringGraph(trained).modules()
    )
    assert any(isinstance(part, torch.nn.PReLU) for part in trained.network.modules()), (
        "the model itself is unchanged"
    )


def test_a_prelu_of_sum_and_products():
    theirs, x = torch.nn.PReLU(5), torch.randn(2, 5, 3, 4)
    theirs.weight.data = torch.tensor([-0.5, 0.0, 0.25, 1.0, 2.0])
    torch.testing.assert_close(SumOfProductsPReLU(theirs.weight)(x), theirs(x))


# ---- The file ----


def test_what_the_file_holds(exported):
    model = onnx.load(exported / "run.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert ([(part.domain, part.version) for part in model.opset_import], model.ir_version) == (
        [("", 18)],
        10,
    )
    assert not [
        node for node in model.graph.node if node.op_type in ("BatchNormalization", "PRelu")
    ]
    assert [node.op_type for node in model.graph.node].count("STFT") == 1
    assert str(ROOT).encode() not in (exported / "run.onnx").read_bytes()
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(about["machines"]) == [["fan", "00"], ["fan", "02"], ["valve", "01"]]
    assert len(json.loads(about["thresholds"])) == 3
    fixed = {
        "sample_rate": "16000", "window": "10", "hop": "5.0", "over_windows": "mean", "channel": "0",
        "mode": "noisy_arcmix", "input": '["tgram", "sgram", "tagram"]', "scoring": "published",
    }  # fmt: skip
    assert {key: about[key] for key in fixed} == fixed
    assert about.keys() - fixed.keys() == {"machines", "thresholds", "version", "weights_sha256"}
    assert len(about["weights_sha256"]) == 64
    size = (exported / "run.onnx").stat().st_size / 1e6
    said = f"{exported / 'run.onnx'}: {size:.1f} MB, 3 machine IDs, published scores, which differ from those of eval"
    assert (exported / "output").read_text().startswith(said)


def test_the_file_gives_the_scores_of_eval_for_any_number_of_clips(exported):
    model = load_model(exported / "run.pth", load_config(), {})
    clips = synthetic_clips()
    expected, samples = (
        expected_scores(model, clips),
        clips.samples.numpy().astype(np.float32) / 32768,
    )
    expected_embedding = run_model(model, clips, CPU).embedding.numpy()
    for count in (1, 7, 8):
        scores, embedding = run(exported / "run.onnx", samples[:count])
        assert scores.dtype == embedding.dtype == np.float32
        assert (scores.shape, embedding.shape) == ((count, 3), (count, EMBEDDING_SIZE))
        assert is_close(scores, expected[:count])
        assert ranks(scores) == ranks(expected[:count])
        assert reference.distance(embedding, expected_embedding[:count]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        *CHOICES,
        {"scoring": "published", "sub_centers": 3},
        {"scoring": "angle", "mode": "cross_entropy"},
        {"scoring": "angle", "sub_centers": 3},
        *({"scoring": kind, **BY_ATTRIBUTES} for kind in ("published", "angle")),
        {"scoring": "nearest", "machines": {"fan": [0]}},
    ],
    ids=str,
)
def test_every_kind_of_model_passes_the_comparison(keys):
    trained = reference_model(**keys)
    content = make_model(trained).SerializeToString()
    assert compare(content, trained) < 1e-2
    clips = reference_clips()
    scores, _ = run(content, clips.samples.numpy().astype(np.float32) / 32768)
    expected = expected_scores(trained, clips)
    assert is_close(scores, expected)
    assert ranks(scores) == ranks(expected)


# ---- Scoring without PyTorch ----


def print_score(file: Path, *words: str) -> subprocess.CompletedProcess:
    """What the example prints where only the packages it names can be imported."""
    code = (
        "import sys, runpy\n"
        "for name in ('torch', 'torchaudio', 'librosa', 'pandas', 'scipy', 'sklearn', 'yaml', 'onnx', 'onnxscript'):\n"
        "    sys.modules[name] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, SCORER, file, *words]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=file.parent)


def rounded(line: str) -> str:
    """The line, with four digits of each number."""
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
    file = write_clip(
        tmp_path / "new.wav", np.stack([tone(7, seconds)] * channels, axis=1), subtype=subtype
    )
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
    onnx.helper.set_model_props(
        model, about | {"thresholds": thresholds, "over_windows": "max", "hop": "2.5"}
    )
    onnx.save(model, tmp_path / "run.onnx")
    file = write_clip(tmp_path / "new.wav", tone(1, 20.0))
    lines = [
        print_score(tmp_path / "run.onnx", str(file), *machine).stdout.rstrip("\n").split("\t")
        for machine in (("fan", "0"), ("fan", "02"), ("valve", "1"))
    ]
    assert [line[3:5] for line in lines] == [
        ["-", "-"],
        ["1e+09", "normal"],
        ["-1e+09", "anomalous"],
    ]
    endings = [re.fullmatch(r"worst at 0:00:\d\d(\.50)? \((.*?)\)(.*)", line[5]) for line in lines]
    assert [ending[2] for ending in endings] == [line[2] for line in lines], "the highest counts"
    assert [ending[3] for ending in endings] == [
        "",
        ", 0 of 5 windows anomalous",
        ", 5 of 5 windows anomalous",
    ]


@pytest.mark.parametrize(
    ("samples", "rate", "words", "match"),
    [
        (
            tone(1, 1.0, rate=8000),
            8000,
            ["fan"],
            r"its rate is 8000 Hz, not 16000: sox IN.wav -r 16000 OUT.wav",
        ),
        (np.zeros(0), 16000, ["fan"], "it has 0 samples of 1 channels; channel 0 is needed"),
        (np.full(9, np.nan), 16000, ["fan"], "it holds NaN or infinite samples"),
        (
            tone(1, 1.0),
            16000,
            ["fan", "7"],
            "knows no such machine; it knows fan 00, fan 02, valve 01",
        ),
    ],
    ids=["8 kHz", "empty", "NaN", "machine"],
)
def test_what_the_example_cannot_score(samples, rate, words, match, exported, tmp_path):
    file = write_clip(tmp_path / "new.wav", samples, rate, "FLOAT")
    refuses(exported / "run.onnx", file, *words, match=match)


def refuses(model: Path, file: Path, *words: str, match: str) -> None:
    """In one line that names both files."""
    process = print_score(model, str(file), *words)
    assert (process.returncode, process.stdout, process.stderr.count("\n")) == (1, "", 1), (
        process.stderr
    )
    assert re.fullmatch(f"error: {model} {file} .*: .*({match}).*\n", process.stderr)


def test_files_that_the_example_cannot_read(exported, tmp_path):
    file, text = write_clip(tmp_path / "new.wav", tone(1, 1.0)), tmp_path / "text.wav"
    text.write_text("no sound")
    refuses(exported / "run.onnx", tmp_path / "none.wav", "fan", match="opening .*none.wav")
    refuses(exported / "run.onnx", text, "fan", match="Format not recognised")
    refuses(tmp_path / "none.onnx", file, "fan", match="File doesn't exist")
    refuses(exported / "traced.onnx", file, "fan", match="machines")


# ---- What can go wrong ----


@pytest.mark.parametrize(
    ("score", "match"),
    [
        (1001.1, "a score is 1001.1 with it, and 1000 with eval.py; check the packages"),
        (np.nan, "a score is nan with it, and 1000 with"),
    ],
)
def test_the_bound_is_the_larger_of_a_share_and_a_number(score, match):
    expected = np.array([[0.01, 1000.0]] * 2)
    close = np.array([[0.01009, 1000.9], [0.00991, 999.1]])
    assert largest_difference(close, expected) == pytest.approx(0.9)
    with pytest.raises(UserError, match=match):
        largest_difference(np.array([[0.01, 1000.0], [0.01, score]]), expected)
    with pytest.raises(UserError, match=r"a score is 0.01011 with it, and 0.01 with"):
        largest_difference(expected + np.array([[0.00011, 0]]), expected)


def test_a_difference_above_the_bound_leaves_no_file(without_tracing, trained_copy, fails):
    before = sorted(trained_copy.iterdir())  # a checkpoint of other weights than those in the file
    match = "no file is written: a score is .* with it, and .* with eval.py"
    fails(export_script.main, trained_copy / "run.pth", "--device", "cpu", match=match)
    assert sorted(trained_copy.iterdir()) == before


def test_a_full_disk(without_tracing, exported_copy, fails, monkeypatch):
    def fail(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", fail)
    before = sorted(exported_copy.iterdir())
    match = r"No space left on device: .*run.onnx"
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
            "run.pth: --output names a file that ends in .onnx and is not the checkpoint",
        ),
        (("copy.onnx",), "copy.onnx: --output names a file that .* is not the checkpoint"),
        (("run.pth", "--output", "folder.onnx"), "folder.onnx: --output names a file"),
        (("run.pth", "--output", "text.pth/run.onnx"), "text.pth/run.onnx cannot be written"),
        (("run.pth", "--mode", "arcface"), "command line: mode 'arcface' is not the checkpoint's"),
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
    match = f"export.py needs other packages .*{package}.*: pip install -r requirements-export.txt"
    fails(export_script.main, trained_copy / "run.pth", match=match)


@pytest.mark.slow
def test_training_and_evaluation_do_without_the_packages():
    code = "import sys; sys.modules |= dict.fromkeys(('onnx', 'onnxscript', 'onnxruntime')); import train_ddp, train, eval"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
