"""Fallbacks of compiled and recorded functions; a recorded step on tensors that are kept. CUDA graphs are replaced by a
stand-in that behaves like them, since they need a GPU: nothing is computed while recording.
"""

from functools import partial

import pytest
import reference
import torch
from torch import Tensor

import acceleration
from acceleration import WARM_UP, GraphedFunction, WithFallback, is_alone_on_gpu, is_to_compile
from config import load_config
from losses import Mix
from trainer import Trainer
from utils import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_what_is_compiled_and_recorded(monkeypatch):
    assert [is_to_compile(switch, CPU) for switch in (True, False, "auto")] == [True, False, False]
    assert not is_alone_on_gpu(CPU)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name: name)
    assert is_to_compile("auto", GPU)
    assert is_alone_on_gpu(GPU)
    with monkeypatch.context() as several:
        several.setattr("distributed.world_size", lambda: 2)
        several.setattr("distributed.from_all", lambda has_tools: [has_tools, True])
        assert is_to_compile("auto", GPU)
        assert not is_alone_on_gpu(GPU)
        several.setattr("distributed.from_all", lambda has_tools: [has_tools, False])
        assert not is_to_compile("auto", GPU), "another machine lacks the tools"
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not is_to_compile("auto", GPU)


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_what_fails_in_a_first_call_is_given_up_with_a_notice(failing, capfd):
    calls = []

    def fast(x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) == failing:
            raise RuntimeError("no kernel image\nand a long explanation")
        return x + 1

    function = WithFallback("compile", fast, lambda x: x + 1, trials=3)
    assert [function(torch.tensor(number)).item() for number in range(5)] == [1, 2, 3, 4, 5]
    assert len(calls) == failing
    said = "notice: compile: it does not work here, so the steps run without it (no kernel image)\n"
    assert capfd.readouterr().err == said


def test_what_fails_later_is_an_error():
    calls = []

    def breaking(x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) == 4:
            raise RuntimeError("a lost GPU")
        return x

    function = WithFallback("compile", breaking, lambda x: x, trials=3)
    for _ in range(3):
        function(torch.zeros(1))
    with pytest.raises(RuntimeError, match="a lost GPU"):
        function(torch.zeros(1))


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (RuntimeError("no kernel image\nand more"), UserError, r"^compile: .* \(no kernel image\); set it to false$"),
        (torch.OutOfMemoryError("40 GiB"), torch.OutOfMemoryError, "40 GiB"),
    ],
)
def test_with_several_processes_a_first_failure_is_an_error(error, expected, message, monkeypatch):
    def fail(x: Tensor) -> Tensor:
        raise error

    monkeypatch.setattr("distributed.world_size", lambda: 2)
    with pytest.raises(expected, match=message):
        WithFallback("compile", fail, lambda x: x, trials=3)(torch.zeros(1))


def record_like_a_gpu(function):
    """Recording computes nothing; a replay computes with what the kept arguments hold then, into one result."""
    results = []

    def replay() -> Tensor:
        value = function()
        results.append(value) if not results else results[0].copy_(value)
        return results[0]

    return replay


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(acceleration, "run_on_side_stream", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(acceleration, "record", record_like_a_gpu)


def train_six_steps(is_recorded: bool) -> tuple[list[list[float]], dict[str, Tensor]]:
    trainer = Trainer(load_config(device="cpu", batch_size=4), CPU)
    trainer.network.load_state_dict(reference.parameters())
    trainer.model.train()
    if is_recorded:
        step = partial(trainer.compute_step, trainer.model, 1.0)
        trainer.full_step = WithFallback("cuda_graph", GraphedFunction(step), step, WARM_UP + 2)
    results = []
    for lam, partner in reference.mixing()[: WARM_UP + 3]:
        mix = Mix(torch.tensor(lam, dtype=torch.float32), partner)
        results.append(trainer.step(reference.samples(), reference.labels(), mix).tolist())
        if len(results) == WARM_UP + 2:  # a shorter batch in between
            shorter = Mix(torch.tensor(0.5), torch.tensor([2, 0, 1]))
            trainer.step(reference.samples()[:3], reference.labels()[:3], shorter)
    return results, trainer.network.state_dict()


@pytest.fixture(scope="module")
def unrecorded():
    return train_six_steps(is_recorded=False)


def test_recorded_steps_are_the_same_bit_for_bit(without_gpu, unrecorded):
    results, weights = train_six_steps(is_recorded=True)
    expected, expected_weights = unrecorded
    assert results == expected
    assert all(torch.equal(weights[name], value) for name, value in expected_weights.items())


def test_where_a_step_cannot_be_recorded_it_is_the_same(without_gpu, unrecorded, monkeypatch, capfd):
    def fail(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(acceleration, "record", fail)
    results, weights = train_six_steps(is_recorded=True)
    assert capfd.readouterr().err.count("cuda_graph: it does not work here") == 1
    expected, expected_weights = unrecorded
    assert results == expected
    assert all(torch.equal(weights[name], value) for name, value in expected_weights.items())


def test_a_recorded_function_copies_its_arguments(without_gpu):
    function = GraphedFunction(lambda x, y: x * y)
    for number in range(WARM_UP + 3):
        x, y = torch.tensor([number, 2.0]), torch.tensor(3.0)
        assert function(x, y).tolist() == [3.0 * number, 6.0]
