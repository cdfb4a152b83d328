"""Errors on one line, the choice of the device, numerics, atomic writing of files."""

import os

import pytest
import torch

import distributed
from errors import UserError
from utils import choose_precision, random_stream, replace_file, set_up_numerics, use_device


def test_a_gpu_out_of_memory_is_one_line(fails):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...\nmore")

    fails(main, match="GPU is out of memory; lower batch_size, or .* data_device: cpu")


def test_a_host_out_of_memory_is_one_line(fails):
    def main():
        torch.empty(2**60)

    fails(main, match="error: out of memory; lower batch_size")


def test_cuda_is_refused_where_there_is_none(fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fails(lambda: use_device("cuda:1"), match="device: cuda:1 needs a GPU")
    assert use_device("auto") == use_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    fails(lambda: use_device("cuda:1"), match="device: there is no cuda:1; use one of cuda:0")
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert use_device("auto") == use_device("cuda:0") == torch.device("cuda", 0)
    assert current == [0, 0]
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails(lambda: use_device("cuda:0"), match="would put all processes on one GPU")


def test_precision_auto_is_float32_on_a_cpu_and_half_on_a_gpu(monkeypatch):
    assert choose_precision("auto", torch.device("cpu")) == torch.float32
    for has_bf16, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda has_bf16=has_bf16, **_: has_bf16
        )
        assert choose_precision("auto", torch.device("cuda")) == expected


def test_float32_means_no_tf32():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    set_up_numerics()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_random_streams_depend_on_seed_purpose_and_position():
    first, again, *others = (
        random_stream(*key).random() for key in ((1, 0), (1, 0), (2, 0), (1, 1), (1, 0, 1))
    )
    assert first == again
    assert len({first, *others}) == 4


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "a.txt"
    with replace_file(path) as temporary:
        temporary.write_text("one")

    def fill_the_disk() -> None:
        with replace_file(path) as temporary:
            temporary.write_text("half of")
            raise OSError(28, os.strerror(28))

    match = "a.txt cannot be written: No space left on device; free some space"
    with pytest.raises(UserError, match=match):
        fill_the_disk()
    assert path.read_text() == "one"
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"]


def test_a_variable_that_is_empty_counts_as_not_set(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    assert distributed.planned_processes() == 1
    assert distributed.local_rank() == 0
    assert not distributed.is_started_by_torchrun()
    assert use_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "")
    assert distributed.attempt_store() is None
