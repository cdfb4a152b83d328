"""OS-SCL, TFgram and SpecNet against values that their published implementations computed.

`data/family_values.npz` has two networks of OS-SCL (huangswt/OS-SCL, m = 0.4), `logmel` with the
log-mel alone and `all` with log-mel, Tgram and TFgram, and SpecNet (mgklee/
anomalous-sound-detection), in float32 on a CPU with torch 2.11, on the inputs of reference.py.
TFgram and SpecNet are given for every fourth column.
"""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import clips_in_memory

from classes import Classes
from config import load_config
from losses import contrastive_loss
from model import TASTgramMFN
from model.specnet import SpecNet, magnitude, magnitude_by_products
from model.tfgram import AdaptiveMaxPool
from sampling import Batch
from trainer import Trainer

VALUES = dict(np.load(Path(__file__).parent / "data" / "family_values.npz"))
LABELS = torch.from_numpy(VALUES["labels"])
# Channels of each network in this project's order, and where they come in the published one
NETWORKS = {"logmel": (["sgram"], [0]), "all": (["tgram", "sgram", "tfgram"], [1, 0, 2])}
CPU = torch.device("cpu")


def rename(name: str) -> str:
    """Return the name of a published weight in this project."""
    layers = {"pre_conv0": "0", "pre_bn0": "1"}
    for block, layer in ((1, 3), (2, 5), (3, 7)):
        for part, number in (("conv1", 0), ("bn1", 1), ("conv2", 3), ("bn2", 4)):
            layers[f"pre_block{block}.{part}"] = f"{layer}.{number}"
    for part, layer in layers.items():
        name = name.replace(f"TFgramNet.{part}.", f"tfgramnet.layers.{layer}.")
    return name.replace("head.head.", "projection.")


def published_weights(net: str) -> dict[str, torch.Tensor]:
    state = reference.parameters(reference.shapes_in(VALUES, f"{net}_"))
    weights = {rename(name): value for name, value in state.items()}
    first = "mobilefacenet.conv1.conv.weight"
    return weights | {first: weights[first][:, NETWORKS[net][1]]}


def published_trainer(net: str) -> Trainer:
    config = load_config(mode="os_scl", m=0.4, input=NETWORKS[net][0], device="cpu")
    clips = clips_in_memory(reference.samples(), LABELS)
    trainer = Trainer(config, Classes.from_machines(config.machines), CPU, clips, clips)
    trainer.network.load_state_dict(published_weights(net))
    return trainer


@pytest.mark.parametrize("net", NETWORKS)
@torch.no_grad()
def test_evaluation_mode(net):
    trainer = published_trainer(net)
    inputs = trainer.front_end(reference.samples())
    cosine, feature = trainer.network.eval()(**inputs)
    logits = trainer.objective.logits(cosine, LABELS)
    score = F.cross_entropy(logits, LABELS, reduction="none")
    assert reference.distance(F.normalize(feature), VALUES[f"{net}_eval_feature"]) < 1e-4
    assert reference.distance(logits, VALUES[f"{net}_eval_logits_margin"]) < 1e-4
    assert reference.distance(score, VALUES[f"{net}_eval_score"]) < 1e-4


@pytest.mark.parametrize("net", NETWORKS)
def test_first_step(net):
    """Compare loss, contrastive term, the norm of each gradient, and the loss after the step.

    The published losses of further steps cannot be compared: see
    `test_rounding_decides_later_steps`.
    """
    trainer = published_trainer(net)
    trainer.parallel_loss.train()
    losses = []
    for mix in reference.mixing()[:2]:
        batch = Batch(reference.samples(), LABELS, mix, len(LABELS))
        losses.append(trainer.step(batch)[0].item())
        if len(losses) == 1:
            gradients = {name: x.grad for name, x in trainer.network.named_parameters()}
    assert losses == pytest.approx(VALUES[f"{net}_losses"][:2].tolist(), rel=1e-3)
    assert losses[0] == pytest.approx(VALUES[f"{net}_losses"][0], rel=1e-5)
    names, norms = VALUES[f"{net}_grad_names"], VALUES[f"{net}_grad_norms"]
    for name, expected in zip(map(rename, names.tolist()), norms, strict=True):
        gradient = gradients[name]
        assert (gradient is None) == math.isnan(expected), name
        if gradient is not None:
            assert abs(gradient.norm().item() - expected) <= 3e-2 * expected + 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("net", NETWORKS)
def test_rounding_decides_later_steps(net):
    """The losses of this program in float32 and float64 agree for two steps, and later differ by
    more than 1 percent, the tolerance of other modes: the temperature of 0.02 amplifies rounding
    errors.
    """
    trainer, losses = published_trainer(net), {}
    inputs = trainer.front_end(reference.samples())
    for dtype in (torch.float32, torch.float64):
        network = copy.deepcopy(trainer.network).to(dtype).train()
        trained = [weight for weight in network.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        losses[dtype] = []
        for mix in reference.mixing():
            outputs = network(**{name: mix(x).to(dtype) for name, x in inputs.items()})
            loss = trainer.objective.loss(*outputs, LABELS, mix, len(LABELS))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[dtype].append(loss.item())
        print(f"\n{net}, {dtype}:", *(f"{loss:.4f}" for loss in losses[dtype]))
    print("published:", *(f"{loss:.4f}" for loss in VALUES[f"{net}_losses"]))
    single, double = losses.values()
    assert single[:2] == pytest.approx(double[:2], rel=1e-3)
    assert single != pytest.approx(double, rel=0.01)


@pytest.mark.parametrize("net", NETWORKS)
def test_contrastive_term(net):
    trainer = published_trainer(net)
    mix = reference.mixing()[0]
    inputs = {name: mix(x) for name, x in trainer.front_end(reference.samples()).items()}
    with torch.no_grad():
        _, feature = trainer.network.train()(**inputs)
    term = contrastive_loss(feature, LABELS, len(LABELS)).item()
    assert term == pytest.approx(VALUES[f"{net}_supcon"][0], rel=1e-3)


@torch.no_grad()
def test_tfgram():
    network = TASTgramMFN(reference.NUM_CLASSES, NETWORKS["all"][0], "projected").eval()
    network.load_state_dict(published_weights("all"))
    tfgram = network.tfgramnet(reference.waveforms())
    assert reference.distance(tfgram[:, :, ::4], VALUES["tfgram"]) < 1e-4


@torch.no_grad()
def test_specnet():
    specnet, shapes = SpecNet(), reference.shapes_in(VALUES, "specnet_")
    specnet.load_state_dict(reference.parameters(shapes, reference.SEED + 4))
    features = specnet(reference.waveforms())
    assert features.shape == (4, 128, 313)
    assert reference.distance(features[:, :, ::4], VALUES["specnet"]) < 1e-4
    expected = magnitude(reference.waveforms()).unsqueeze(1)
    for conv in (specnet.conv1, specnet.conv2, specnet.conv3):
        expected = F.relu(conv(expected))
    assert reference.distance(features, expected.numpy()) < 1e-6


@torch.no_grad()
def test_specnet_of_a_loud_clip_is_finite_in_half_precision():
    """The magnitude of a tone at full scale is 80,000, and float16 ends at 65,504."""
    tone = torch.sin(2 * math.pi * 440 * torch.arange(160_000) / 16_000).unsqueeze(0)
    assert magnitude(tone).max() > 65_504
    with torch.autocast("cpu", torch.float16):
        assert torch.isfinite(SpecNet()(tone)).all()


# ---- The forms for ONNX ----


def test_the_transform_as_products_is_the_same():
    expected = magnitude(reference.waveforms()).numpy()
    assert reference.distance(magnitude_by_products(reference.waveforms()), expected) < 1e-6


@pytest.mark.parametrize(("length", "size"), [(8000, 626), (626, 313), (10, 10), (11, 7)])
def test_the_pooling_by_indices_is_the_same(length, size, monkeypatch):
    x, pool = torch.randn(2, 3, length), AdaptiveMaxPool(size)
    expected = pool(x)
    monkeypatch.setattr("torch.compiler.is_exporting", lambda: True)
    assert torch.equal(pool(x), expected)
