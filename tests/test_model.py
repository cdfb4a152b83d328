"""Features, network and state dict against the reference values."""

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from losses import margin_logits
from model import CHANNELS, EMBEDDING_SIZE, FrontEnd, LogMel, TASTgramMFN, fold_batch_norm
from model.mobilefacenet import WholeMapConv2d
from model.tastgram import N_FRAMES, TemporalAttention
from model.tastgram_mfn import CosineHead

VALUES = reference.VALUES


@pytest.fixture(scope="module")
def model():
    model = TASTgramMFN(reference.NUM_CLASSES)
    model.load_state_dict(reference.parameters())
    return model.eval()


@pytest.fixture(scope="module")
def log_mel():
    return LogMel()(reference.waveforms())


def test_state_dict_has_the_published_names_and_shapes():
    model = TASTgramMFN(reference.NUM_CLASSES)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes == reference.SHAPES
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_161_855


def test_log_mel_matches_the_reference_element_by_element(log_mel):
    assert log_mel.shape == (4, 1, 128, N_FRAMES)
    assert np.abs(log_mel[:, 0].numpy() - VALUES["log_mel"]).max() < 1e-3


def test_log_mel_is_float32_inside_autocast(log_mel):
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(LogMel()(reference.waveforms()), log_mel)


def test_the_front_end_computes_the_inputs_that_the_channels_need(log_mel):
    inputs = FrontEnd(CHANNELS)(reference.samples())
    assert torch.equal(inputs["waveform"], reference.waveforms())
    assert torch.equal(inputs["log_mel"], log_mel)
    assert set(FrontEnd(["tgram"])(reference.samples())) == {"waveform"}
    assert set(FrontEnd(["sgram"])(reference.samples())) == {"log_mel"}


def test_log_mel_of_digital_silence_is_the_floor():
    silent = LogMel()(torch.zeros(1, 160_000))
    floor = 10 * np.log10(np.finfo(np.float64).eps)
    assert torch.allclose(silent, torch.full_like(silent, floor))


@torch.no_grad()
def test_tgram(model):
    assert reference.distance(model.tgramnet(reference.waveforms()), VALUES["tgram"]) < 1e-4


def test_tagram_row_by_row(log_mel):
    for row, expected in zip(TemporalAttention()(log_mel[:, 0]), VALUES["tagram"], strict=True):
        assert reference.distance(row, expected) < 1e-4


@torch.no_grad()
def test_evaluation_mode(model, log_mel):
    labels = reference.labels()
    cosine, embedding = model(reference.waveforms(), log_mel)
    logits = margin_logits(cosine, labels, m=0.7, s=30.0)
    assert reference.distance(embedding, VALUES["eval_embedding"]) < 1e-4
    assert reference.distance(logits, VALUES["eval_logits_margin"]) < 1e-4
    assert reference.distance(model.mobilefacenet.fc_out(embedding), VALUES["eval_fc_out"]) < 1e-4


@torch.no_grad()
def test_folding_batch_norms_changes_a_copy_but_no_output(model, log_mel):
    expected, _ = model(reference.waveforms(), log_mel)
    folded = fold_batch_norm(model.train())
    model.eval()
    assert not [name for name, part in folded.named_modules() if isinstance(part, _BatchNorm)]
    assert (folded(reference.waveforms(), log_mel)[0] - expected).abs().max() < 2e-6
    assert torch.equal(model(reference.waveforms(), log_mel)[0], expected)


def test_a_convolution_over_the_whole_map_is_that_convolution():
    layer = WholeMapConv2d(6, 6, (3, 5), groups=6, bias=False)
    x = torch.randn(2, 6, 3, 5)
    expected = F.conv2d(x, layer.weight, groups=6)
    assert layer(x).shape == expected.shape == (2, 6, 1, 1)
    assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize("sub_centers", [1, 3])
def test_margin_head_alone(sub_centers):
    def value(name: str) -> torch.Tensor:
        return torch.from_numpy(VALUES[f"margin_sub{sub_centers}_{name}"])

    head = CosineHead(reference.NUM_CLASSES, sub_centers)
    head.load_state_dict({"weight": value("weight")})
    logits = margin_logits(head(value("x")), value("labels"), m=0.7, s=30.0)
    assert reference.distance(logits, value("logits").numpy()) < 1e-4


@pytest.mark.parametrize("sub_centers", [1, 3])
@torch.no_grad()
def test_the_similarity_is_that_to_the_closest_centre_of_each_class(sub_centers):
    model = TASTgramMFN(5, ("sgram",), sub_centers=sub_centers).eval()
    similarity, embedding = model(log_mel=torch.randn(2, 1, 128, N_FRAMES))
    centres = model.centres()
    assert centres.shape == (5, sub_centers, EMBEDDING_SIZE)
    cosine = F.cosine_similarity(embedding[:, None, None], centres, dim=-1)  # (B, C, K)
    assert torch.allclose(cosine.amax(dim=2), similarity, atol=1e-6)


@torch.no_grad()
def test_linear_head(log_mel):
    model = TASTgramMFN(reference.NUM_CLASSES, head="fc_out")
    model.load_state_dict(reference.parameters())
    logits, _ = model.eval()(reference.waveforms(), log_mel)
    assert reference.distance(logits, VALUES["eval_fc_out"]) < 1e-4
    assert torch.equal(model.centres()[:, 0], model.mobilefacenet.fc_out.weight)


@pytest.mark.parametrize(
    "channels", [("sgram",), ("tgram", "sgram"), ("sgram", "tagram"), tuple(CHANNELS)]
)
@torch.no_grad()
def test_channel_choice_builds_what_is_used(channels, log_mel):
    model = TASTgramMFN(5, channels)
    assert hasattr(model, "tgramnet") == ("tgram" in channels)
    features = model.features(reference.waveforms(), log_mel)
    assert features.shape == (4, len(channels), 128, N_FRAMES)
    assert torch.equal(features[:, channels.index("sgram")], log_mel[:, 0])
    assert model.eval()(reference.waveforms(), log_mel)[0].shape == (4, 5)


@torch.no_grad()
def test_channels_are_stacked_in_the_fixed_order(model, log_mel):
    features = model.features(reference.waveforms(), log_mel)
    for channel, key in enumerate(("tgram", "log_mel", "tagram")):
        assert reference.distance(features[:, channel], VALUES[key]) < 1e-4
    assert TASTgramMFN(5, ("tagram", "tgram")).channels == ("tgram", "tagram")


@pytest.mark.parametrize(
    ("head", "frozen"), [("arcface", "mobilefacenet.fc_out"), ("fc_out", "arcface")]
)
def test_the_unused_head_is_frozen(head, frozen):
    model = TASTgramMFN(5, ("sgram",), head)
    fixed = [name for name, value in model.named_parameters() if not value.requires_grad]
    assert {name.rpartition(".")[0] for name in fixed} == {frozen}


def test_initial_convolutions_have_the_published_spread():
    torch.manual_seed(0)
    weight = TASTgramMFN(41).mobilefacenet.conv2.conv.weight  # 1x1, 512 outputs
    assert weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)


def test_margin_head_stays_in_float32_inside_autocast(model, log_mel):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        cosine, embedding = model(reference.waveforms(), log_mel)
    assert cosine.dtype == embedding.dtype == torch.float32
