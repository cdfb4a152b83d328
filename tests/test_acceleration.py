"""When the training step is compiled, and what happens if the compiler fails. All tests but the
slow ones replace TorchInductor.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import distributed
from acceleration import BREAK_EVEN, OPTIONS, compile_module, find_reason, should_compile

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_what_is_compiled():
    assert should_compile(True, CPU, 1)
    assert not should_compile(False, CPU, 1)
    assert not should_compile("auto", CPU, 1)
    assert should_compile("auto", GPU, 1)
    assert should_compile("auto", CPU, BREAK_EVEN)
    assert not should_compile(False, GPU, BREAK_EVEN)


# ---- A compiler that fails ----

PTXAS = """PTXAS error: Internal Triton PTX codegen error
`ptxas` stderr:
ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'

Repro command: /venv/triton/ptxas -v --gpu-name=sm_121a /tmp/error.ptx -o /tmp/error.ptx.o
"""
CXX = """C++ compile error

Command:
g++ /tmp/a.cpp -shared -fPIC

Output:
/tmp/a.cpp:2:10: fatal error: Python.h: No such file or directory
    2 | #include <Python.h>
      |          ^~~~~~~~~~
compilation terminated.
"""
LINKER = """C++ compile error

Output:
/usr/bin/ld: cannot find -lgomp: No such file or directory
collect2: error: ld returned 1 exit status
"""
WITH_HINT = """The device has too little memory

Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace (please do this if you report an error).
"""


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (PTXAS, "ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'"),
        (CXX, "/tmp/a.cpp:2:10: fatal error: Python.h: No such file or directory"),
        (LINKER, "/usr/bin/ld: cannot find -lgomp: No such file or directory"),
        (WITH_HINT, "The device has too little memory"),
        (
            "[Errno 28] No space left on device: '/tmp/c'",
            "[Errno 28] No space left on device: '/tmp/c'",
        ),
        ("", "RuntimeError"),
    ],
)
def test_the_reason_is_the_line_that_says_something(message, reason):
    error = RuntimeError(message)
    assert find_reason(error) == reason
    wrapped = RuntimeError(f"backend='inductor' raised:\n{message}")
    wrapped.inner_exception = error
    assert find_reason(wrapped) == reason


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, -1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).square().sum()


def run(module: nn.Module, x: Tensor) -> tuple[float, list[float]]:
    """Return the value of the module and its gradient with respect to the weights."""
    module.weight.grad = None
    value = module(x)
    value.backward()
    return value.item(), module.weight.grad.tolist()


def compiled_square(is_required: bool = False) -> nn.Module:
    torch._dynamo.reset()
    module = Square()
    compile_module(module, is_required)
    return module


def fail(*_, **__):
    raise RuntimeError("no kernel image\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack trace")


def compile_quickly(graph, inputs, options, backward=lambda graph, _: graph.forward):
    """Split a graph into forward and backward pass, as TorchInductor does, but compile neither."""
    assert options == OPTIONS
    return aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=backward)(
        graph, inputs
    )


X, EXPECTED = torch.tensor([3.0, 1.0]), (37.0, [36.0, -2.0])


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch, capfd):
    monkeypatch.setattr("torch._inductor.compile", fail)
    module = compiled_square()
    assert [run(module, X) for _ in range(3)] == [EXPECTED] * 3
    said = capfd.readouterr().err
    assert said.startswith("notice: compile: compiling fails on ")
    assert said.endswith(": no kernel image; the steps run uncompiled, which is slower\n")
    assert said.count("notice") == 1


@pytest.mark.parametrize("is_failing", [True, False])
def test_the_backward_pass_is_compiled_with_the_forward_pass(is_failing, monkeypatch, capfd):
    """If the backward pass cannot be compiled, nothing has run yet when this turns out."""
    calls = []

    def compile_backward(graph, _):
        calls.append("compiled")
        return fail() if is_failing else graph.forward

    monkeypatch.setattr(
        "torch._inductor.compile",
        lambda *a, **k: compile_quickly(*a, **k, backward=compile_backward),
    )
    module = compiled_square()
    value = module(X)
    assert calls == ["compiled"]
    value.backward()
    assert (value.item(), module.weight.grad.tolist()) == EXPECTED
    assert ("no kernel image" in capfd.readouterr().err) == is_failing


def test_where_another_process_fails_this_one_runs_uncompiled_too(monkeypatch, capfd):
    compiled = []

    def compile_and_note(*arguments, **options):
        compiled.append(compile_quickly(*arguments, **options))
        return fail

    monkeypatch.setattr("torch._inductor.compile", compile_and_note)
    monkeypatch.setattr(
        distributed, "from_all", lambda problem: [problem, "on other: nvcc: no space"]
    )
    assert run(compiled_square(), X) == EXPECTED
    assert len(compiled) == 1
    said = capfd.readouterr().err
    assert "notice: compile: compiling fails on other: nvcc: no space; the steps" in said


def test_what_has_to_be_compiled_is_an_error_that_names_the_key(monkeypatch, fails):
    monkeypatch.setattr("torch._inductor.compile", fail)
    match = r"^error: compile: true, but compiling fails on \S+: no kernel image; set it to auto"
    fails(lambda: run(compiled_square(is_required=True), X), match=match)


def test_a_shape_that_is_not_to_be_compiled(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "torch._inductor.compile", lambda *a, **k: calls.append(a) or compile_quickly(*a, **k)
    )
    module = compiled_square()
    assert run(module, X) == EXPECTED
    with torch.compiler.set_stance("force_eager"):
        assert run(module, X[:1].expand(2)) == (45.0, [36.0, -18.0])
    assert run(module, X) == EXPECTED
    assert len(calls) == 1


@pytest.mark.slow  # TorchInductor and a C++ compiler that finds no headers
def test_the_reason_of_a_compiler_without_headers(tmp_path, data_root):
    (tmp_path / "cxx").write_text(
        '#!/bin/sh\ncase "$*" in *" -c "*|*main*) '
        'echo "a.cpp:2:10: fatal error: Python.h: No such file"; '
        'echo "compilation terminated."; exit 1;; esac\nexec g++ "$@"\n'
    )
    (tmp_path / "cxx").chmod(0o755)
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from test_acceleration import EXPECTED, X, compiled_square, run\n"
        "assert run(compiled_square(), X) == EXPECTED\n"
    )
    root = Path(__file__).parent
    environment = {
        "PATH": "/usr/bin:/bin",
        "CXX": str(tmp_path / "cxx"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    command = [sys.executable, "-c", code, str(root), str(root.parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fatal error: Python.h: No such file; the steps run uncompiled" in done.stderr
