"""The training step against the reference values; the schedule; what an epoch and a validation
give.
"""

import copy
import math
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from conftest import MACHINES, arguments, clips_of
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from checkpoint import load_checkpoint
from config import load_config
from dataloader import ClipSet, keep_on_gpu
from inference import run_network
from losses import MODES, Mix
from model.tastgram import N_SAMPLES
from trainer import Run, Trainer

VALUES = reference.VALUES
CPU = torch.device("cpu")


def reference_trainer(mode: str, **overrides) -> Trainer:
    """A trainer in the published configuration with the reference weights."""
    trainer = Trainer(load_config(mode=mode, device="cpu", **overrides), CPU)
    trainer.network.load_state_dict(reference.parameters())
    return trainer


def mixes(mode: str) -> list[Mix | None]:
    steps = [
        Mix(torch.tensor(lam, dtype=torch.float32), partner) for lam, partner in reference.mixing()
    ]
    return steps if MODES[mode].mixes else [None] * len(steps)


# ---- The step ----


@pytest.mark.parametrize(
    "mode", [pytest.param("arcface", marks=pytest.mark.slow), "arcmix", "noisy_arcmix"]
)
def test_eight_steps_match_the_reference(mode):
    trainer, samples, labels = reference_trainer(mode), reference.samples(), reference.labels()
    parameters = dict(trainer.network.named_parameters())
    trainer.model.train()
    losses = []
    for number, mix in enumerate(mixes(mode)):
        losses.append(trainer.step(samples, labels, mix)[0].item())
        if number == 0:
            for name, expected in zip(
                VALUES[f"{mode}_grad_names"], VALUES[f"{mode}_grad_norms"], strict=True
            ):
                gradient = parameters[str(name)].grad
                assert (gradient is None) == math.isnan(expected), name
                if gradient is not None:
                    assert abs(gradient.norm().item() - expected) <= 3e-2 * expected + 1e-4, name
    assert losses == pytest.approx(VALUES[f"{mode}_losses"].tolist(), rel=1e-2)
    trainer.model.eval()
    with torch.no_grad():
        similarity, embedding = trainer.network(**trainer.front_end(samples))
    score = trainer.objective.anomaly_score(similarity, labels)
    assert reference.distance(score, VALUES[f"{mode}_after_score"]) < 1e-2
    assert reference.distance(embedding, VALUES[f"{mode}_after_embedding"]) < 1e-2


def test_score_before_training_matches_the_reference():
    trainer, samples = reference_trainer("noisy_arcmix"), reference.samples()
    with torch.no_grad():
        similarity, _ = trainer.network.eval()(**trainer.front_end(samples))
    score = trainer.objective.anomaly_score(similarity, reference.labels())
    assert reference.distance(score, VALUES["eval_score"]) < 1e-4


def test_cross_entropy_trains_the_linear_head_and_leaves_the_centres():
    trainer = reference_trainer("cross_entropy")
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    trainer.model.train()
    trainer.step(reference.samples(), reference.labels(), None)
    after = trainer.network.state_dict()
    assert not torch.equal(
        after["mobilefacenet.fc_out.weight"], before["mobilefacenet.fc_out.weight"]
    )
    assert torch.equal(after["arcface.weight"], before["arcface.weight"])


@pytest.mark.slow  # on a CPU
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
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
    assert "notice" not in capfd.readouterr().err
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "something was compiled"
    assert losses == pytest.approx(VALUES[f"{mode}_losses"].tolist(), rel=1e-2)
    shorter = None if mixes(mode)[0] is None else Mix(torch.tensor(0.5), torch.tensor([2, 0, 1]))
    trainer.step(samples[:3], labels[:3], shorter)  # a shorter batch goes past the compiled model


@pytest.mark.slow
def test_where_nothing_can_be_compiled_the_step_is_the_same(monkeypatch, capfd):
    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-compiler-of-this-name",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    monkeypatch.setattr("acceleration.BREAK_EVEN", 0)
    results = []
    for switch in ("auto", False):
        trainer = reference_trainer("noisy_arcmix", compile=switch, batch_size=4)
        trainer.model.train()
        steps = [
            trainer.step(reference.samples(), reference.labels(), mix).tolist()
            for mix in mixes("noisy_arcmix")[:2]
        ]
        results.append((steps, trainer.network.state_dict()))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(
        r"^notice: compile: it fails on .*: No working C\+\+ compiler found in .*no-compiler-of",
        lines[0],
    )
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], value) for name, value in results[1][1].items())


@pytest.mark.parametrize("mode", [pytest.param("arcface", marks=pytest.mark.slow), "noisy_arcmix"])
def test_the_step_is_one_graph_for_all_steps(mode):
    """Nothing in it breaks the graph that the compiler sees, and no lambda or partner makes it
    compile anew.
    """
    torch._dynamo.reset()
    trainer, samples, labels = reference_trainer(mode), reference.samples(), reference.labels()
    trainer.model.train()
    inputs = trainer.front_end(samples)
    compiled = torch.compile(trainer.loss, dynamic=False, fullgraph=True, backend="eager")
    mixes = [
        trainer.objective.draw_mix(0.5, np.random.default_rng(number), 4) for number in range(3)
    ]
    with torch._dynamo.config.patch(error_on_recompile=True):
        results = [compiled(inputs, labels, mix) for mix in mixes]
    results[0][0].backward()
    for mix, result in zip(mixes, results, strict=True):
        expected = [value.item() for value in trainer.loss(inputs, labels, mix)]
        assert [value.item() for value in result] == pytest.approx(expected, rel=1e-5)


def put_on_fake_gpu(module: torch.nn.Module) -> None:
    """Replace the tensors of a module by fake ones on a GPU."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, real in tensors.items():
                if real is None:
                    continue
                fake = torch.empty_strided(
                    real.shape, real.stride(), dtype=real.dtype, device="cuda:0"
                )
                tensors[name] = (
                    torch.nn.Parameter(fake, real.requires_grad)
                    if tensors is part._parameters
                    else fake
                )


def test_step_and_scores_stay_on_the_gpu(monkeypatch):
    """On fake tensors, which have a device and no content: it is an error to leave one on the CPU,
    or to read it.
    """
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    trainer, gpu = reference_trainer("noisy_arcmix", precision="bf16"), torch.device("cuda", 0)
    clips = ClipSet(pd.DataFrame({"path": Path(), "label": [0] * 5}), num_workers=1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        put_on_fake_gpu(trainer.loss)
        put_on_fake_gpu(trainer.front_end)
        samples = torch.empty((4, N_SAMPLES), dtype=torch.int16, device=gpu)
        labels = torch.empty(4, dtype=torch.int64, device=gpu)
        inputs = trainer.front_end(samples)
        loss, accuracy = trainer.loss(inputs, labels, Mix(torch.empty((), device=gpu), labels))
        assert (loss.device, accuracy.device) == (gpu, gpu)
        clips.samples = torch.empty((5, N_SAMPLES), dtype=torch.int16, device=gpu)
        outputs = run_network(
            trainer.network, trainer.front_end, clips, np.arange(5), 2, gpu, torch.bfloat16
        )
        score = trainer.objective.anomaly_score(outputs.similarity, clips.labels.to(gpu))
        assert (score.device, score.shape, outputs.embedding.device) == (gpu, (5,), gpu)
        with pytest.raises(RuntimeError, match="device"):
            trainer.loss(inputs, labels.cpu(), None)
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            loss.item()


def test_a_state_is_continued_as_this_run_computes():
    """As when a run goes on from a GPU to a CPU: what the optimiser computes with stays, its state
    is the other's.
    """
    one, other = (
        reference_trainer("arcface"),
        reference_trainer("arcface", lr=1e-2, weight_decay=0.5),
    )
    one.model.train()
    one.step(reference.samples(), reference.labels(), None)
    state = one.state()
    state["optimizer"]["param_groups"][0] |= {"foreach": True, "lr": 3.0}
    other.load_state(state)
    group = other.optimizer.param_groups[0]
    assert (group["foreach"], group["lr"], group["weight_decay"]) == (None, 1e-2, 0.5)
    for ours, theirs in zip(
        other.optimizer.state.values(), one.optimizer.state.values(), strict=True
    ):
        assert all(
            torch.equal(ours[name], theirs[name]) for name in ("step", "exp_avg", "exp_avg_sq")
        )


# ---- On a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("is_compiled", [True, False])
def test_a_step_on_the_gpu_does_not_wait_for_it(is_compiled, data_root):
    """From the plan to the optimiser: nothing in a step makes the host wait for the device."""
    device, clips = torch.device("cuda", 0), clips_of(data_root, num_workers=1)
    keep_on_gpu([clips], "cuda", device, 0)
    trainer = Trainer(load_config(machines=MACHINES, batch_size=4, compile=is_compiled), device)
    trainer.model.train()
    plans = [trainer.draw_plan(len(clips), epoch) for epoch in range(3)]  # of three steps each
    steps = [
        step
        for plan in plans
        for step in zip(clips.batches(plan.shares, device), plan.mixes, strict=True)
    ]
    try:
        for number, ((samples, labels), mix) in enumerate(steps):
            trainer.step(samples, labels, mix)
            if number == 3:  # compiled
                torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == 9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize(
    ("precision", "is_compiled", "bound"),
    [("fp32", False, 1e-2), ("bf16", False, 0.1), ("fp16", False, 0.1), ("bf16", True, 0.1)],
)
def test_eight_steps_on_the_gpu_match_the_reference(precision, is_compiled, bound, capfd):
    device = torch.device("cuda", 0)
    trainer = Trainer(load_config(precision=precision, compile=is_compiled, batch_size=4), device)
    trainer.network.load_state_dict(reference.parameters())
    trainer.scaler = torch.amp.GradScaler("cuda", init_scale=256.0, enabled=precision == "fp16")
    trainer.model.train()
    samples, labels = reference.samples().to(device), reference.labels().to(device)
    losses = []
    for number, mix in enumerate(mixes("noisy_arcmix")):
        losses.append(
            trainer.step(samples, labels, Mix(*(part.to(device) for part in mix)))[0].item()
        )
        if number == 5:  # a shorter batch in between goes past what is compiled
            state = copy.deepcopy(trainer.state())
            trainer.step(
                samples[:3],
                labels[:3],
                Mix(torch.tensor(0.5).to(device), torch.tensor([2, 0, 1]).to(device)),
            )
            trainer.load_state(state)
    assert "notice" not in capfd.readouterr().err
    assert losses == pytest.approx(VALUES["noisy_arcmix_losses"].tolist(), rel=bound)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_run_goes_from_the_cpu_to_the_gpu_and_back(tmp_path, data_root, call):
    options = arguments(tmp_path, data_root, epoch=3, precision="fp32", compile="false")
    device = options.index("--device") + 1
    best = tmp_path / "run.pth"
    for number, name in enumerate(("cpu", "cuda", "cpu"), start=1):
        options[device] = name
        status, _, errors = call(stop_after(number), *options, "--resume")
        assert status == (0 if number == 3 else 143), errors
        assert load_checkpoint(best.with_name("run.last.pth"))["epoch"] == number


def stop_after(epoch: int):
    """train.py, stopped as by SIGTERM when it has trained so many epochs."""

    def main() -> None:
        run_epoch = Run.run_epoch

        def run_or_stop(run: Run):
            if run.epoch == epoch:
                sys.exit(143)
            return run_epoch(run)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "run_epoch", run_or_stop)
            train.main()

    return main


# ---- The schedule ----


def test_the_learning_rate_falls_on_a_cosine_to_a_tenth():
    """As PyTorch's scheduler has it, which the published code uses."""
    trainer = Trainer(
        load_config(epoch=10, lr=1e-3, input=["sgram"], machines={"fan": [0, 1]}), CPU
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=1e-4)
    for epoch in range(10):
        assert trainer.learning_rate(epoch) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-9
        )
        trainer.set_learning_rate(epoch)
        assert trainer.optimizer.param_groups[0]["lr"] == trainer.learning_rate(epoch)
        optimizer.step()
        scheduler.step()
    assert trainer.learning_rate(10) == pytest.approx(1e-4)


# ---- Epochs ----


def test_a_validation_gives_the_score_of_each_clip_and_the_accuracy(data_root):
    clips = clips_of(data_root, num_workers=2)
    trainer = Trainer(load_config(machines=MACHINES, batch_size=5, input=["sgram"]), CPU)
    scores, loss, accuracy = trainer.validate(clips)
    with torch.no_grad():
        ((samples, labels),) = clips.batches([np.arange(len(clips))], CPU)
        similarity, _ = trainer.network.eval()(**trainer.front_end(samples))
    expected = trainer.objective.anomaly_score(similarity, labels, torch.float64)
    assert scores.dtype == np.float64
    assert scores == pytest.approx(expected.numpy(), rel=1e-5)
    assert (
        loss
        == scores.mean()
        == pytest.approx(trainer.objective.loss(similarity, labels).item(), rel=1e-5)
    )
    assert accuracy == pytest.approx(trainer.objective.accuracy(similarity, labels).item())


def test_an_epoch_depends_on_seed_and_number_alone(data_root):
    clips = ClipSet(clips_of(data_root).clips[:5], num_workers=3)
    config = load_config(machines=MACHINES, batch_size=3, input=["sgram"])
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


@pytest.mark.slow
def test_a_last_batch_of_one_clip_is_trained(tmp_path, data_root, call):
    # 12 clips, int(0.8 * 12) = 9 to train on: two batches of 4 and one clip
    status, _, _ = call(train.main, *arguments(tmp_path, data_root, split_ratio=0.8))
    assert status == 0
