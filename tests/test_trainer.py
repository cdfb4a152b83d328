"""The training step against the reference values; the schedule; what an epoch and a validation give."""

import math

import numpy as np
import pytest
import reference
import torch
from conftest import MACHINES, arguments

import train
from config import load_config
from dataloader import load_clips
from losses import MODES, Mix
from trainer import Trainer, is_to_compile

VALUES = reference.VALUES
CPU = torch.device("cpu")


def reference_trainer(mode: str, **overrides) -> Trainer:
    """A trainer in the published configuration with the reference weights."""
    trainer = Trainer(load_config(mode=mode, device="cpu", **overrides), CPU)
    trainer.network.load_state_dict(reference.parameters())
    return trainer


def mixes(mode: str) -> list[Mix | None]:
    steps = [Mix(torch.tensor(lam, dtype=torch.float32), partner) for lam, partner in reference.mixing()]
    return steps if MODES[mode].mixes else [None] * len(steps)


# ---- The step ----


@pytest.mark.parametrize("mode", ["arcface", "arcmix", "noisy_arcmix"])
def test_eight_steps_match_the_reference(mode):
    trainer, samples, labels = reference_trainer(mode), reference.samples(), reference.labels()
    parameters = dict(trainer.network.named_parameters())
    trainer.model.train()
    losses = []
    for number, mix in enumerate(mixes(mode)):
        losses.append(trainer.step(samples, labels, mix)[0].item())
        if number == 0:
            for name, expected in zip(VALUES[f"{mode}_grad_names"], VALUES[f"{mode}_grad_norms"], strict=True):
                gradient = parameters[str(name)].grad
                assert (gradient is None) == math.isnan(expected), name
                if gradient is not None:
                    assert abs(gradient.norm().item() - expected) <= 3e-2 * expected + 1e-4, name
    assert losses == pytest.approx(VALUES[f"{mode}_losses"].tolist(), rel=1e-2)
    trainer.model.eval()
    with torch.no_grad():
        similarity, embedding = trainer.network(**trainer.loss.front_end(samples))
    score = trainer.objective.anomaly_score(similarity, labels)
    assert reference.distance(score, VALUES[f"{mode}_after_score"]) < 1e-2
    assert reference.distance(embedding, VALUES[f"{mode}_after_embedding"]) < 1e-2


def test_score_before_training_matches_the_reference():
    trainer, samples = reference_trainer("noisy_arcmix"), reference.samples()
    with torch.no_grad():
        similarity, _ = trainer.network.eval()(**trainer.loss.front_end(samples))
    score = trainer.objective.anomaly_score(similarity, reference.labels())
    assert reference.distance(score, VALUES["eval_score"]) < 1e-4


def test_cross_entropy_trains_the_linear_head_and_leaves_the_centres():
    trainer = reference_trainer("cross_entropy")
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    trainer.model.train()
    trainer.step(reference.samples(), reference.labels(), None)
    after = trainer.network.state_dict()
    assert not torch.equal(after["mobilefacenet.fc_out.weight"], before["mobilefacenet.fc_out.weight"])
    assert torch.equal(after["arcface.weight"], before["arcface.weight"])


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])  # slow on a CPU
def test_half_precision_stays_near_the_reference(precision):
    trainer, mix = reference_trainer("noisy_arcmix", precision=precision), mixes("noisy_arcmix")[0]
    trainer.model.train()
    loss = trainer.step(reference.samples(), reference.labels(), mix)[0].item()
    assert loss == pytest.approx(VALUES["noisy_arcmix_losses"][0], rel=0.05)
    assert trainer.scaler.is_enabled() == (precision == "fp16")
    before = reference.parameters()["arcface.weight"]
    while trainer.scaler.is_enabled() and torch.equal(trainer.network.arcface.weight, before):
        scale = (
            trainer.scaler.get_scale()
        )  # a step whose gradients overflow is passed over, at half the scale next time
        assert scale >= 256
        trainer.step(reference.samples(), reference.labels(), mix)
        assert trainer.scaler.get_scale() in (scale / 2, scale)
    assert all(torch.isfinite(parameter).all() for parameter in trainer.network.parameters())
    assert not torch.equal(trainer.network.arcface.weight, before)


@pytest.mark.slow  # the compiler takes a minute or two
@pytest.mark.parametrize("mode", ["arcface", "noisy_arcmix"])
def test_eight_compiled_steps_match_the_reference(mode, capfd):
    trainer, samples, labels = (
        reference_trainer(mode, compile=True, batch_size=4),
        reference.samples(),
        reference.labels(),
    )
    trainer.model.train()
    losses = [trainer.step(samples, labels, mix)[0].item() for mix in mixes(mode)]
    assert "torch.compile" not in capfd.readouterr().err
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "something was compiled"
    assert losses == pytest.approx(VALUES[f"{mode}_losses"].tolist(), rel=1e-2)
    shorter = None if mixes(mode)[0] is None else Mix(torch.tensor(0.5), torch.tensor([2, 0, 1]))
    trainer.step(samples[:3], labels[:3], shorter)  # a shorter batch goes past the compiled model


def test_where_nothing_can_be_compiled_the_step_is_the_same(monkeypatch, capfd):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-compiler-of-this-name",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    monkeypatch.setattr("torch._dynamo.config.disable", False)  # and so once the test has ended
    results = []
    for switch in (True, False):
        trainer = reference_trainer("noisy_arcmix", compile=switch, batch_size=4)
        trainer.model.train()
        steps = [
            trainer.step(reference.samples(), reference.labels(), mix).tolist() for mix in mixes("noisy_arcmix")[:2]
        ]
        results.append((steps, trainer.network.state_dict()))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("notice: torch.compile does not work here, so the steps run uncompiled (")
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], value) for name, value in results[1][1].items())


def test_what_auto_compiles(monkeypatch):
    gpu = torch.device("cuda", 0)
    assert [is_to_compile(switch, CPU) for switch in (True, False, "auto")] == [True, False, False]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert is_to_compile("auto", gpu)
    monkeypatch.setattr("trainer.world_size", lambda: 2)
    assert not is_to_compile("auto", gpu)
    monkeypatch.setattr("trainer.world_size", lambda: 1)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not is_to_compile("auto", gpu)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_step_on_the_gpu_does_not_wait_for_it(data_root):
    """From the plan to the optimiser: nothing in a step makes the host wait for the device."""
    device = torch.device("cuda", 0)
    clips = load_clips(data_root, MACHINES, "train", num_workers=1)
    clips.keep_on("cuda", device)
    trainer = Trainer(load_config(machines=MACHINES, batch_size=4), device)
    trainer.model.train()

    def step() -> None:
        for samples, labels in clips.batches([np.arange(4)], device):
            mix = trainer.objective.draw_mix(0.5, np.random.default_rng(0), np.random.default_rng(1), 4, device)
            trainer.step(samples, labels, mix)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("switch", [True, False])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-2), ("bf16", 0.05), ("fp16", 0.05)])
def test_a_step_on_the_gpu_matches_the_reference(precision, bound, switch):
    device = torch.device("cuda", 0)
    trainer = Trainer(load_config(precision=precision, compile=switch, batch_size=4), device)
    trainer.network.load_state_dict(reference.parameters())
    lam, partner = reference.mixing()[0]
    trainer.model.train()
    mix = Mix(torch.tensor(lam, dtype=torch.float32, device=device), partner.to(device))
    loss = trainer.step(reference.samples().to(device), reference.labels().to(device), mix)[0].item()
    assert loss == pytest.approx(VALUES["noisy_arcmix_losses"][0], rel=bound)


# ---- The schedule ----


def test_the_learning_rate_falls_on_a_cosine_to_a_tenth():
    trainer = Trainer(load_config(epoch=10, lr=1e-3, input=["sgram"], machines={"fan": [0, 1]}), CPU)
    rates = []
    for _ in range(10):
        rates.append(trainer.lr)
        trainer.optimizer.step()
        trainer.scheduler.step()
    expected = [1e-4 + 9e-4 * (1 + math.cos(math.pi * epoch / 10)) / 2 for epoch in range(10)]
    assert rates == pytest.approx(expected, rel=1e-9)
    assert trainer.scheduler.get_last_lr() == pytest.approx([1e-4])


# ---- Epochs ----


def test_a_validation_gives_the_score_of_each_clip_and_the_accuracy(data_root):
    clips = load_clips(data_root, MACHINES, "train", num_workers=2)
    trainer = Trainer(load_config(machines=MACHINES, batch_size=5, input=["sgram"]), CPU)
    scores, accuracy = trainer.validate(clips)
    with torch.no_grad():
        ((samples, labels),) = clips.batches([np.arange(len(clips))], CPU)
        similarity, _ = trainer.network.eval()(**trainer.loss.front_end(samples))
    expected = trainer.objective.anomaly_score(similarity, labels, torch.float64)
    assert scores.dtype == np.float64
    assert scores == pytest.approx(expected.numpy(), rel=1e-5)
    assert scores.mean() == pytest.approx(trainer.objective.loss(similarity, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx(trainer.objective.accuracy(similarity, labels).item())


def test_an_epoch_depends_on_seed_and_number_alone(data_root):
    clips = load_clips(data_root, MACHINES, "train", num_workers=3)
    config = load_config(machines=MACHINES, batch_size=5, input=["sgram"])
    first, again = (Trainer(config, CPU).train_epoch(clips, epoch=0) for _ in range(2))
    assert first == again
    assert first != Trainer(config, CPU).train_epoch(clips, epoch=1)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, data_root, fails):
    options = arguments(tmp_path, data_root, lr=1e30, epoch=3)
    fails(
        train.main,
        *options,
        match=r"loss is (nan|inf) at (step 2|the end of epoch 1) \(learning rate 1e\+30\): try a lower --lr",
    )
    assert not list(tmp_path.glob("*.pth"))


def test_a_last_batch_of_one_clip_is_trained(tmp_path, data_root, call):
    # 12 clips, int(0.8 * 12) = 9 to train on: two batches of 4 and one clip
    status, _, _ = call(train.main, *arguments(tmp_path, data_root, split_ratio=0.8))
    assert status == 0
