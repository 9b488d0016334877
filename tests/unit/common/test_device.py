"""The device of a setting, and processes that torchrun started."""

import subprocess
import sys

import pytest
import torch

from cm3.common.device import select_device, set_threads
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
