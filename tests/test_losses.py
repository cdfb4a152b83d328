"""Margin, mixup, loss and published score at known angles and values."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES

from evaluation.scores import Outputs, Scorer
from losses import MODES, Mix, Objective, contrastive_loss, margin_logits

M, S = 0.7, 30.0
N_CLASSES = len(CLASSES)


def on_unit_circle(*angles: float, dtype=torch.float64) -> torch.Tensor:
    """Return the cosines (B, 2) of clips at these angles (radians) to class 0. Class 1 is opposite
    to it.
    """
    cosine = torch.tensor(angles, dtype=dtype).cos()
    return torch.stack([cosine, -cosine], dim=1)


@pytest.mark.parametrize("angle", [0.1, 0.5, 1.2, 2.0, math.pi - M - 1e-6])
def test_margin_adds_to_the_angle(angle):
    logits = margin_logits(on_unit_circle(angle), torch.tensor([0]), M, S)
    assert logits[0, 0].item() == pytest.approx(S * math.cos(angle + M), abs=1e-9)
    assert logits[0, 1].item() == pytest.approx(-S * math.cos(angle), abs=1e-9)


@pytest.mark.parametrize("angle", [math.pi - M + 1e-6, 2.6, 3.1])
def test_margin_goes_on_linearly_beyond_pi(angle):
    logits = margin_logits(on_unit_circle(angle), torch.tensor([0]), M, S)
    assert logits[0, 0].item() == pytest.approx(S * (math.cos(angle) - M * math.sin(M)), abs=1e-9)


@pytest.mark.parametrize("cosine", [1.0, -1.0, 1.0 + 1e-7, 1.0 - 6e-8, -1.0 + 6e-8])
@pytest.mark.parametrize("m", [0.0, M])
def test_gradient_is_finite_at_the_poles(cosine, m):
    x = torch.tensor([[cosine, 0.3]], dtype=torch.float32, requires_grad=True)
    loss = F.cross_entropy(margin_logits(x, torch.tensor([0]), m, S), torch.tensor([0]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()


def test_no_margin_is_plain_scaling():
    cosine = torch.rand(5, 7) * 2 - 1
    assert torch.allclose(margin_logits(cosine, torch.arange(5), 0.0, S), S * cosine, atol=1e-5)


def test_margin_refuses_half_precision():
    with pytest.raises(AssertionError):
        margin_logits(torch.zeros(1, 2, dtype=torch.bfloat16), torch.tensor([0]), M, S)


def test_mix_is_the_published_sum():
    x = torch.arange(6.0).reshape(3, 2)
    mixed = Mix(torch.tensor(0.25), torch.tensor([2, 0, 1]))(x)
    assert torch.equal(mixed, 0.25 * x + 0.75 * x[[2, 0, 1]])


def test_each_mode_is_its_formula():
    torch.manual_seed(0)
    cosine = torch.rand(6, 4) * 2 - 1
    a = torch.tensor([0, 1, 2, 3, 0, 1])
    partner = torch.tensor([3, 0, 5, 1, 2, 4])
    b = a[partner]
    lam = 0.3
    mix = Mix(torch.tensor(lam), partner)

    def ce(margin_on, target):
        return F.cross_entropy(margin_logits(cosine, margin_on, M, S), target)

    embedding = torch.randn(6, 8)
    noisy_arcmix = lam * ce(a, a) + (1 - lam) * ce(a, b)
    expected = {
        "noisy_arcmix": noisy_arcmix,
        "arcmix": lam * ce(a, a) + (1 - lam) * ce(b, b),
        "arcface": ce(a, a),
        "cross_entropy": F.cross_entropy(cosine, a),
        "os_scl": noisy_arcmix + contrastive_loss(embedding, a, batch_size=6),
    }
    assert set(expected) == set(MODES)
    for mode, value in expected.items():
        mix_of_mode = mix if MODES[mode].mixes else None
        loss = Objective(mode, M, S).loss(cosine, embedding, a, mix_of_mode, batch_size=6)
        assert loss == pytest.approx(value.item(), rel=1e-6)
    assert expected["noisy_arcmix"] != pytest.approx(expected["arcmix"].item(), rel=1e-3)


def test_validation_loss_is_unmixed():
    cosine, labels = torch.rand(4, 3) * 2 - 1, torch.tensor([0, 1, 2, 0])
    expected = F.cross_entropy(margin_logits(cosine, labels, M, S), labels)
    embedding = torch.randn(4, 8)
    loss = Objective("noisy_arcmix", M, S).loss(cosine, embedding, labels, None, batch_size=4)
    assert loss == expected


def test_the_contrastive_loss_picks_clips_of_the_same_class():
    """Two clips of class 0 at 60 degrees, a third at 90 degrees to the first, and class 2 alone."""
    degrees = torch.tensor([0.0, 60.0, 90.0, 180.0], dtype=torch.float64)
    embedding = 3 * torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=1)
    labels = torch.tensor([0, 0, 0, 2])

    def loss_of(clip: int) -> float:
        others = [other for other in range(4) if other != clip]
        logits = [math.cos(math.radians(degrees[clip] - degrees[x])) / 0.02 for x in others]
        total = math.log(sum(math.exp(logit) for logit in logits))
        picked = [total - x for x, other in zip(logits, others, strict=True) if labels[other] == 0]
        return 0.02 / 0.07 * sum(picked) / len(picked)

    expected = sum(loss_of(clip) for clip in range(3)) / 4
    assert contrastive_loss(embedding, labels, 4).item() == pytest.approx(expected, rel=1e-9)


def test_without_two_clips_of_a_class_there_is_no_contrastive_loss():
    embedding = torch.randn(3, 5, requires_grad=True)
    loss = contrastive_loss(embedding, torch.arange(3), 3)
    loss.backward()
    assert loss.item() == 0
    assert (embedding.grad == 0).all()


def test_the_contrastive_loss_is_finite_for_equal_clips():
    embedding = torch.ones(4, 5, requires_grad=True)
    loss = contrastive_loss(embedding, torch.tensor([0, 0, 1, 1]), 4)
    loss.backward()
    assert loss.item() == pytest.approx(2 / 7 * math.log(3), rel=1e-5)
    assert torch.isfinite(embedding.grad).all()


def test_accuracy_counts_the_partner_with_its_weight():
    similarity, labels = torch.eye(2), torch.tensor([0, 1])
    objective = Objective("noisy_arcmix", M, S)
    assert objective.accuracy(similarity, labels).item() == 1.0
    mix = Mix(torch.tensor(0.75), torch.tensor([1, 0]))
    assert objective.accuracy(similarity, labels, mix).item() == 0.75


def published_scores(
    mode: str, similarity: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Compute the published score of each clip against its class `(B,)`."""
    scorer = Scorer("published", CLASSES, Objective(mode, M, S), dtype=dtype)
    nothing = torch.empty(len(similarity), 0)
    outputs = Outputs(similarity, nothing, nothing)
    scores = torch.stack([scorer.score_against_class(outputs, label) for label in range(N_CLASSES)])
    return scores[labels, torch.arange(len(labels))]


@pytest.mark.parametrize("mode", MODES)
def test_the_published_score_is_the_cross_entropy_of_each_clip(mode):
    torch.manual_seed(1)
    similarity, labels = torch.rand(5, N_CLASSES) * 2 - 1, torch.tensor([0, 1, 2, 1, 0])
    objective = Objective(mode, M, S)
    expected = objective.cross_entropy(similarity, labels, labels, reduction="none")
    scores = published_scores(mode, similarity, labels, torch.float32)
    assert scores.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    loss = objective.cross_entropy(similarity, labels, labels).item()
    assert scores.mean().item() == pytest.approx(loss, rel=1e-6), "the validation loss"


def test_float64_scores_order_what_float32_ties():
    similarity = torch.tensor([[0.99, -0.2, -0.2], [0.999, -0.3, -0.3]])
    labels = torch.tensor([0, 0])
    tied = published_scores("arcface", similarity, labels, torch.float32)
    assert tied.tolist() == [0.0, 0.0]
    first, second = published_scores("arcface", similarity, labels, torch.float64).tolist()
    assert first > second > 0
