"""The training step against the reference values; the schedule; epochs and validation."""

import copy
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from conftest import CLASSES, arguments, clips_in_memory, clips_of
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from audio import N_SAMPLES
from checkpoint import Checkpoint, EpochResult
from classes import Classes, MachineClass
from config import load_config
from dataloader import ClipSet, keep_on_gpu
from evaluation.scores import Outputs
from inference import run_network
from losses import MODES, Mix
from model import CHANNELS, PUBLISHED_CHANNELS
from sampling import Batch, draw_mix
from trainer import Averages, Trainer, format_duration

VALUES = reference.VALUES
CPU = torch.device("cpu")
SLOW = pytest.mark.slow


def reference_trainer(mode: str, **overrides) -> Trainer:
    """Return a trainer in the published configuration with the reference weights."""
    config = load_config(mode=mode, device="cpu", **overrides)
    clips = clips_in_memory(reference.samples(), reference.labels())
    trainer = Trainer(config, Classes.from_machines(config.machines), CPU, clips, clips)
    trainer.network.load_state_dict(reference.parameters(reference.shapes_of(trainer.network)))
    return trainer


def take_step(
    trainer: Trainer, samples: torch.Tensor, labels: torch.Tensor, mix: Mix | None
) -> torch.Tensor:
    """Take a step on a whole batch; return loss and accuracy."""
    return trainer.step(Batch(samples, labels, mix, len(labels)))


def published_score(
    trainer: Trainer, similarity: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Score each clip against its class, in float32 as published."""
    scorer = replace(trainer.scorer, dtype=torch.float32)
    machines = [trainer.classes.entries[label].machine for label in labels]
    nothing = torch.empty(len(labels), 0)
    return scorer.score_clips(Outputs(similarity, nothing, nothing), machines)


def mixes(mode: str) -> list[Mix | None]:
    """Return the mix of each reference step; None for a mode that does not mix."""
    return reference.mixing() if MODES[mode].mixes else [None] * reference.STEPS


def test_the_remaining_time_is_that_of_the_last_epoch(capsys):
    trainer = reference_trainer("arcface", epoch=4)
    trainer.history = [EpochResult(1, 1e-4, 1.0, 0.5, 1.0, 0.5, seconds=90.0)]
    trainer.report_duration()
    assert capsys.readouterr().out == "about 4 min left at this speed\n"
    trainer.history *= 4
    trainer.report_duration()
    assert capsys.readouterr().out == "", "after the last one"
    assert [format_duration(x) for x in (41.2, 610, 12_600)] == ["41 s", "10 min", "3.5 h"]


# ---- The step ----


@pytest.mark.parametrize(
    "mode",
    [pytest.param("arcface", marks=SLOW), pytest.param("arcmix", marks=SLOW), "noisy_arcmix"],
)
def test_eight_steps_match_the_reference(mode):
    trainer, samples, labels = reference_trainer(mode), reference.samples(), reference.labels()
    parameters = dict(trainer.network.named_parameters())
    trainer.parallel_loss.train()
    losses = []
    for number, mix in enumerate(mixes(mode)):
        losses.append(take_step(trainer, samples, labels, mix)[0].item())
        if number == 0:
            names, norms = VALUES[f"{mode}_grad_names"], VALUES[f"{mode}_grad_norms"]
            for name, expected in zip(names, norms, strict=True):
                gradient = parameters[str(name)].grad
                assert (gradient is None) == math.isnan(expected), name
                if gradient is not None:
                    assert abs(gradient.norm().item() - expected) <= 3e-2 * expected + 1e-4, name
    assert losses == pytest.approx(VALUES[f"{mode}_losses"].tolist(), rel=1e-2)
    trainer.parallel_loss.eval()
    with torch.no_grad():
        similarity, embedding = trainer.network(**trainer.front_end(samples))
    score = published_score(trainer, similarity, labels)
    assert reference.distance(score, VALUES[f"{mode}_after_score"]) < 1e-2
    assert reference.distance(embedding, VALUES[f"{mode}_after_embedding"]) < 1e-2


def test_score_before_training_matches_the_reference():
    trainer, samples = reference_trainer("noisy_arcmix"), reference.samples()
    with torch.no_grad():
        similarity, _ = trainer.network.eval()(**trainer.front_end(samples))
    score = published_score(trainer, similarity, reference.labels())
    assert reference.distance(score, VALUES["eval_score"]) < 1e-4


def test_cross_entropy_trains_the_linear_head_and_leaves_the_centres():
    trainer = reference_trainer("cross_entropy")
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    trainer.parallel_loss.train()
    take_step(trainer, reference.samples(), reference.labels(), None)
    after = trainer.network.state_dict()
    linear = "mobilefacenet.fc_out.weight"
    assert not torch.equal(after[linear], before[linear])
    assert torch.equal(after["arcface.weight"], before["arcface.weight"])


@pytest.mark.slow  # on a CPU
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_the_reference(precision):
    trainer, mix = reference_trainer("noisy_arcmix", precision=precision), mixes("noisy_arcmix")[0]
    trainer.parallel_loss.train()
    loss = take_step(trainer, reference.samples(), reference.labels(), mix)[0].item()
    assert loss == pytest.approx(VALUES["noisy_arcmix_losses"][0], rel=0.05)
    assert trainer.scaler.is_enabled() == (precision == "fp16")
    before = reference.parameters()["arcface.weight"]
    # A step whose gradients overflow is skipped, and the scale is halved.
    while trainer.scaler.is_enabled() and torch.equal(trainer.network.arcface.weight, before):
        scale = trainer.scaler.get_scale()
        assert scale >= 256
        take_step(trainer, reference.samples(), reference.labels(), mix)
        assert trainer.scaler.get_scale() in (scale / 2, scale)
    assert all(torch.isfinite(parameter).all() for parameter in trainer.network.parameters())
    assert not torch.equal(trainer.network.arcface.weight, before)


@pytest.mark.slow  # the compiler takes a minute or two
@pytest.mark.parametrize("mode", ["arcface", "noisy_arcmix"])
def test_eight_compiled_steps_match_the_reference(mode, capfd):
    trainer = reference_trainer(mode, compile=True, batch_size=4)
    samples, labels = reference.samples(), reference.labels()
    trainer.parallel_loss.train()
    losses = [take_step(trainer, samples, labels, mix)[0].item() for mix in mixes(mode)]
    assert "notice" not in capfd.readouterr().err
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "something was compiled"
    assert losses == pytest.approx(VALUES[f"{mode}_losses"].tolist(), rel=1e-2)
    shorter = None if mixes(mode)[0] is None else Mix(torch.tensor(0.5), torch.tensor([2, 0, 1]))
    take_step(
        trainer, samples[:3], labels[:3], shorter
    )  # a shorter batch bypasses the compiled model


@pytest.mark.slow
def test_where_nothing_can_be_compiled_the_step_is_the_same(monkeypatch, capfd):
    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-compiler-of-this-name",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    monkeypatch.setattr("acceleration.BREAK_EVEN", 0)
    results = []
    for switch in ("auto", False):
        trainer = reference_trainer("noisy_arcmix", compile=switch, batch_size=4)
        trainer.parallel_loss.train()
        steps = [
            take_step(trainer, reference.samples(), reference.labels(), mix).tolist()
            for mix in mixes("noisy_arcmix")[:2]
        ]
        results.append((steps, trainer.network.state_dict()))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    reason = r"No working C\+\+ compiler found in .*no-compiler-of"
    assert re.search(rf"^notice: compile: compiling fails on .*: {reason}", lines[0])
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], value) for name, value in results[1][1].items())


@pytest.mark.parametrize(
    ("mode", "channels"),
    [
        pytest.param("arcface", PUBLISHED_CHANNELS, marks=SLOW),
        pytest.param("noisy_arcmix", PUBLISHED_CHANNELS, marks=SLOW),
        pytest.param("os_scl", tuple(CHANNELS), marks=SLOW),
    ],
)
def test_the_step_is_one_graph_for_all_steps(mode, channels):
    """Nothing breaks the graph of the compiler, and no lambda or partner causes a recompilation."""
    torch._dynamo.reset()
    trainer = reference_trainer(mode, input=list(channels))
    samples, labels = reference.samples(), reference.labels()
    trainer.parallel_loss.train()
    inputs = trainer.front_end(samples)
    compiled = torch.compile(trainer.loss, dynamic=False, fullgraph=True, backend="eager")
    rngs = [np.random.default_rng(seed) for seed in range(3)]
    mixes = [draw_mix(0.5, rng, 4) if MODES[mode].mixes else None for rng in rngs]
    with torch._dynamo.config.patch(error_on_recompile=True):
        results = [compiled(inputs, labels, mix, 4) for mix in mixes]
    results[0][0].backward()
    for mix, result in zip(mixes, results, strict=True):
        expected = [value.item() for value in trainer.loss(inputs, labels, mix, 4)]
        assert [value.item() for value in result] == pytest.approx(expected, rel=1e-5)


def put_on_fake_gpu(module: torch.nn.Module) -> None:
    """Replace the tensors of a module by fake ones on a GPU."""

    def fake(real: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device="cuda:0")

    for part in module.modules():
        for name, real in part._parameters.items():
            if real is not None:
                part._parameters[name] = torch.nn.Parameter(fake(real), real.requires_grad)
        for name, real in part._buffers.items():
            if real is not None:
                part._buffers[name] = fake(real)


def test_step_and_scores_stay_on_the_gpu(monkeypatch):
    """Fake tensors have a device but no content, so reading one or leaving the GPU is an error."""
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
        mix = Mix(torch.empty((), device=gpu), labels)
        loss, accuracy = trainer.loss(inputs, labels, mix, 4)
        assert (loss.device, accuracy.device) == (gpu, gpu)
        clips.samples = torch.empty((5, N_SAMPLES), dtype=torch.int16, device=gpu)
        monkeypatch.setattr("inference.FrontEnd", lambda channels: trainer.front_end)
        outputs = run_network(trainer.network, clips, np.arange(5), 2, torch.bfloat16)
        score = trainer.scorer.score_against_class(outputs, 0)
        assert (score.device, score.shape, outputs.embedding.device) == (gpu, (5,), gpu)
        with pytest.raises(RuntimeError, match="device"):
            trainer.loss(inputs, labels.cpu(), None, 4)
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            loss.item()


def test_a_state_is_continued_as_this_run_computes(tmp_path):
    """The optimiser takes over the state but not the options, as when a run moves to a CPU."""
    path = tmp_path / "run.pth"
    one = reference_trainer("arcface", save_path=str(path))
    other = reference_trainer("arcface", save_path=str(path), lr=1e-2, weight_decay=0.5)
    one.parallel_loss.train()
    take_step(one, reference.samples(), reference.labels(), None)
    checkpoint = one.make_checkpoint(np.zeros(4))
    checkpoint.optimizer["param_groups"][0] |= {"foreach": True, "lr": 3.0}
    other.resume(checkpoint)
    group = other.optimizer.param_groups[0]
    assert (group["foreach"], group["lr"], group["weight_decay"]) == (None, 1e-2, 0.5)
    states = zip(other.optimizer.state.values(), one.optimizer.state.values(), strict=True)
    for loaded, saved in states:
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(loaded[name], saved[name]), name


# ---- On a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("is_compiled", [True, False])
def test_a_step_on_the_gpu_does_not_wait_for_it(is_compiled, data_root):
    """Nothing in a step, from the batch to the optimiser, makes the host wait for the device."""
    device, clips = torch.device("cuda", 0), clips_of(data_root, num_workers=1)
    keep_on_gpu([clips], "cuda", device, 0)
    config = load_config(batch_size=4, compile=is_compiled)
    trainer = Trainer(config, CLASSES, device, clips, clips)
    trainer.parallel_loss.train()
    plans = [trainer.sampler.draw(epoch) for epoch in range(3)]  # of three steps each
    number = 0
    try:
        for plan in plans:
            data = clips.batches(plan.shares, device)
            for (samples, labels), mix, size in zip(data, plan.mixes, plan.sizes, strict=True):
                trainer.step(Batch(samples, labels, mix, size))
                number += 1
                if number == 4:  # compiled
                    torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert number == 9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize(
    ("precision", "is_compiled", "bound"),
    [("fp32", False, 1e-2), ("bf16", False, 0.1), ("fp16", False, 0.1), ("bf16", True, 0.1)],
)
def test_eight_steps_on_the_gpu_match_the_reference(precision, is_compiled, bound, capfd):
    device = torch.device("cuda", 0)
    config = load_config(precision=precision, compile=is_compiled, batch_size=4)
    clips = clips_in_memory(reference.samples(), reference.labels())
    trainer = Trainer(config, Classes.from_machines(config.machines), device, clips, clips)
    trainer.network.load_state_dict(reference.parameters())
    trainer.scaler = torch.amp.GradScaler("cuda", init_scale=256.0, enabled=precision == "fp16")
    trainer.parallel_loss.train()
    samples, labels = reference.samples().to(device), reference.labels().to(device)
    shorter = Mix(torch.tensor(0.5, device=device), torch.tensor([2, 0, 1], device=device))
    losses = []
    for number, mix in enumerate(mixes("noisy_arcmix")):
        mix = Mix(mix.lam.to(device), mix.partner.to(device))
        losses.append(take_step(trainer, samples, labels, mix)[0].item())
        if number == 5:  # a shorter batch in between bypasses the compiled model
            state = copy.deepcopy((trainer.network.state_dict(), trainer.optimizer.state_dict()))
            take_step(trainer, samples[:3], labels[:3], shorter)
            trainer.network.load_state_dict(state[0])
            trainer.optimizer.load_state_dict(state[1])
    assert "notice" not in capfd.readouterr().err
    assert losses == pytest.approx(VALUES["noisy_arcmix_losses"].tolist(), rel=bound)


def stop_after(epoch: int):
    """Return a `main` of train.py that stops as if by SIGTERM after the given epoch."""

    def main() -> None:
        set_learning_rate = Trainer.set_learning_rate

        def set_or_stop(trainer: Trainer, number: int) -> None:
            if number == epoch:
                sys.exit(143)
            set_learning_rate(trainer, number)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "set_learning_rate", set_or_stop)
            train.main()

    return main


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
        assert Checkpoint.load(best.with_name("run.last.pth")).epoch == number


# ---- The schedule ----


def test_the_learning_rate_falls_on_a_cosine_to_a_tenth():
    """The rates equal those of PyTorch's scheduler, which the published code uses."""
    config = load_config(epoch=10, lr=1e-3, input=["sgram"])
    clips = clips_in_memory(reference.samples(), reference.labels())
    trainer = Trainer(config, CLASSES, CPU, clips, clips)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=1e-4)
    for epoch in range(10):
        expected = optimizer.param_groups[0]["lr"]
        assert trainer.learning_rate(epoch) == pytest.approx(expected, rel=1e-9)
        trainer.set_learning_rate(epoch)
        assert trainer.optimizer.param_groups[0]["lr"] == trainer.learning_rate(epoch)
        optimizer.step()
        scheduler.step()
    assert trainer.learning_rate(10) == pytest.approx(1e-4)


# ---- Epochs ----


def test_a_validation_gives_the_score_of_each_clip_and_the_accuracy(data_root):
    clips = clips_of(data_root, num_workers=2)
    config = load_config(batch_size=5, input=["sgram"])
    trainer = Trainer(config, CLASSES, CPU, clips, clips)
    scores, loss, accuracy = trainer.validate(clips)
    with torch.no_grad():
        ((samples, labels),) = clips.batches([np.arange(len(clips))], CPU)
        similarity, _ = trainer.network.eval()(**trainer.front_end(samples))
    expected = trainer.objective.cross_entropy(similarity.double(), labels, labels, "none")
    assert scores.dtype == np.float64
    assert scores == pytest.approx(expected.numpy(), rel=1e-5)
    assert loss == scores.mean()
    expected = trainer.objective.cross_entropy(similarity, labels, labels).item()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert accuracy == pytest.approx(trainer.objective.accuracy(similarity, labels).item())


def test_the_score_of_a_held_out_clip_is_the_lowest_over_the_classes_of_its_machine():
    """The loss is that of its class."""
    clips = clips_in_memory(reference.samples(), torch.tensor([0, 1, 2, 2]))
    entries = [MachineClass("fan", "00", "a"), MachineClass("fan", "00", "b")]
    classes = Classes((*entries, MachineClass("fan", "02")))
    trainer = Trainer(load_config(input=["sgram"]), classes, CPU, clips, clips)
    scores, loss, _ = trainer.validate(clips)
    with torch.no_grad():
        similarity, _ = trainer.network.eval()(**trainer.front_end(clips.samples))
    of_classes = []
    for label in range(3):
        labels = torch.full((4,), label)
        of_classes.append(
            trainer.objective.cross_entropy(similarity.double(), labels, labels, "none")
        )
    lowest = torch.minimum(of_classes[0], of_classes[1])
    assert scores[:2] == pytest.approx(lowest[:2].numpy(), rel=1e-5)
    assert scores[2:] == pytest.approx(of_classes[2][2:].numpy(), rel=1e-5)
    own = [of_classes[label][clip].item() for clip, label in enumerate((0, 1, 2, 2))]
    assert loss == pytest.approx(np.mean(own), rel=1e-5)


def test_an_epoch_depends_on_seed_and_number_alone(data_root):
    """Losses of the steps of an epoch by two trainers, and of the next epoch."""
    clips = ClipSet(clips_of(data_root).recordings[:5], num_workers=3)
    config = load_config(batch_size=3, input=["sgram"])

    def losses(epoch: int) -> list[float]:
        trainer = Trainer(config, CLASSES, CPU, clips, clips)
        trainer.parallel_loss.train()
        batches = trainer.sampler.batches(epoch)
        return [trainer.step(batch)[0].item() for batch in batches]

    first = losses(0)
    assert first == losses(0)
    assert first != losses(1)


def test_averages_are_over_clips_and_read_some_steps_at_a_time():
    """The steps of an epoch have 4, 4 and 2 clips."""
    averages = Averages(n_steps=42, epoch=2)
    numbers = []
    for step in range(42):
        size = 2 if step == 41 else 4
        batch = Batch(torch.zeros(size), torch.zeros(size), None, size)
        averages.add(torch.tensor([float(step), 0.5]), batch)
        for number, loss in averages.new_losses():
            assert loss == number - 85
            numbers.append(number)
        assert len(numbers) == {True: step + 1}.get(
            (step + 1) % 20 == 0 or step == 41, len(numbers)
        )
    assert numbers == list(range(85, 127))
    loss, accuracy = averages.means()
    assert loss == pytest.approx((4 * sum(range(41)) + 2 * 41) / (4 * 41 + 2))
    assert accuracy == pytest.approx(0.5)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, data_root, fails):
    options = arguments(tmp_path, data_root, lr=1e30, epoch=3)
    message = (
        r"loss is (nan|inf) at (step 2|the end of epoch 1) "
        r"\(learning rate 1e\+30\): try a lower --lr"
    )
    fails(train.main, *options, match=message)
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.slow
def test_a_last_batch_of_one_clip_is_trained(tmp_path, data_root, call):
    # 12 clips, int(0.8 * 12) = 9 to train on: two batches of 4 and one clip
    status, _, _ = call(train.main, *arguments(tmp_path, data_root, split_ratio=0.8))
    assert status == 0
