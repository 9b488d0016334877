"""The device of a setting, and processes that torchrun started."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cm3.common import gpus
from cm3.common.device import float32_arithmetic, is_out_of_memory, memory_advice, select_device, set_threads
from cm3.common.errors import UserError
from cm3.common.torchrun import started_by_torchrun, torchrun_rank


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_is_the_first_that_works(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert select_device("auto") == torch.device(expected)
    assert select_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "mps", "tpu"])
def test_the_error_names_the_key_and_the_usable_devices(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    message = rf"^extractors\.clip\.device = '{name}': not available on this machine; use auto, cpu$"
    with pytest.raises(UserError, match=message):
        select_device(name, "extractors.clip.device")
    with pytest.raises(UserError, match=rf"^training\.device = '{name}'"):
        select_device(name)


def test_threads_are_set_where_they_are_given():
    before = torch.get_num_threads()
    set_threads(None)
    assert torch.get_num_threads() == before
    set_threads(1)
    assert torch.get_num_threads() == 1
    set_threads(before)


@pytest.mark.parametrize(
    ("variables", "started", "rank"),
    [
        ({}, False, 0),
        ({"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "1", "RANK": "0"}, False, 0),
        ({"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "4", "RANK": "3"}, True, 3),
        # Of a scheduler, and not of torchrun: nobody would answer.
        ({"WORLD_SIZE": "4", "RANK": "3"}, False, 0),
    ],
)
def test_processes_of_torchrun(monkeypatch, variables, started, rank):
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (started_by_torchrun(), torchrun_rank()) == (started, rank)


@pytest.mark.parametrize(
    ("modules", "blocked"),
    [
        ("cm3.common.device cm3.common.torchrun cm3.common.cli cm3.config", "torch"),
        ("cm3.model.fusion cm3.model.fused_slerp cm3.model.losses cm3.model.pair_potential", "pydantic scipy pyarrow"),
        ("cm3.model.sampling cm3.model.network", "pydantic scipy pyarrow"),
        ("cm3.model.model", "pyarrow transformers snakemake"),
    ],
)
def test_modules_do_without_libraries(modules, blocked):
    code = f"import sys\nfor name in {blocked.split()}: sys.modules[name] = None\nimport {', '.join(modules.split())}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def old_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU whose driver is too old for torch."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase "$1" in *driver*) echo 470.82.01;; *) echo "0, GPU-1";; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(gpus, "SHARED_FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    for name in ("CUDA_VISIBLE_DEVICES", gpus.ALLOTTED):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("old_driver")
def test_an_allotted_gpu_that_torch_cannot_use_is_an_error(caplog):
    versions = r"driver 470\.82\.01.*torch .* CUDA 13\.2"
    with gpus.own_gpus(1), pytest.raises(UserError, match=rf"^training\.device = 'auto': .*{versions}.*set training"):
        select_device("auto")
    with pytest.raises(UserError, match=rf"^training\.device = 'cuda': .*{versions}"):
        select_device("cuda")
    # Started by hand, or off the GPUs: the CPU is what was asked for.
    assert select_device("auto") == torch.device("cpu") and "470.82.01" in caplog.text
    caplog.clear()
    with gpus.own_gpus(0):
        assert select_device("auto") == torch.device("cpu")
    with gpus.own_gpus(1):
        assert select_device("cpu") == torch.device("cpu")
    assert not caplog.text


@pytest.mark.usefixtures("old_driver")
def test_a_build_without_cuda_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match="built without CUDA"):
        select_device("auto")


def test_a_device_file_without_nvidia_smi_is_a_gpu(tmp_path, monkeypatch):
    """As in a container that was started without the libraries of the driver."""
    monkeypatch.setenv("PATH", "")
    for name in ("CUDA_VISIBLE_DEVICES", gpus.ALLOTTED):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpus, "DEVICE_FOLDER", tmp_path)
    monkeypatch.setattr(gpus, "DRIVER_FILE", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with gpus.own_gpus(1):
        assert gpus.allotted_gpus() == 1
        assert select_device("auto").type in ("cpu", "mps")
        (tmp_path / "nvidia0").touch()
        with pytest.raises(UserError, match="driver of unknown version"):
            select_device("auto")
        (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Mon\n")
        with pytest.raises(UserError, match=r"driver 535\.161\.08"):
            select_device("auto")
    assert gpus.allotted_gpus() == 0


def test_memory_advice_is_for_memory_alone():
    message = r"^ranking ran out of memory \(CUDA out of memory\. Tried\); lower it$"
    with pytest.raises(UserError, match=message), memory_advice("ranking", "lower it"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore lines")
    with pytest.raises(RuntimeError, match="shape"), memory_advice("ranking", "lower it"):
        raise RuntimeError("shape")
    assert is_out_of_memory(RuntimeError("CUDA error: CUSPARSE_STATUS_INSUFFICIENT_RESOURCES"))
    assert not is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))


def test_float32_arithmetic_is_restored():
    def flags():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = flags()
    for tf32 in (True, False):
        with contextlib.suppress(KeyError), float32_arithmetic(tf32):
            assert flags() == (tf32, tf32)
            raise KeyError
        assert flags() == before
