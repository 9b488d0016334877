"""Adam: the numbers of torch's, wherever its moments are, and no import of torch's compiler."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cm3.training import adam
from cm3.training.adam import Adam

SHAPES = ((50, 3, 4), (7,), (4, 4))


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]


def set_gradients(held: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for n, parameter in enumerate(held):
        # The second one has a gradient from the third step on.
        parameter.grad = None if n == 1 and step < 2 else torch.randn(parameter.shape, generator=generator)


def take_steps(held: list[Tensor], optimiser: Adam | torch.optim.Adam, steps: range) -> None:
    for step in steps:
        set_gradients(held, step)
        optimiser.step()


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("state", ["memory", "disk"])
def test_numbers_are_those_of_torch(monkeypatch, state, decay):
    monkeypatch.setattr(adam, "MAPPED_FROM", 10)
    expected, found = parameters(), parameters()
    take_steps(expected, torch.optim.Adam(expected, lr=0.01, weight_decay=decay, fused=True), range(6))
    take_steps(found, Adam(found, 0.01, decay, state), range(6))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("state", ["memory", "disk"])
def test_an_optimiser_that_is_loaded_goes_on_as_the_first_one(monkeypatch, state):
    monkeypatch.setattr(adam, "MAPPED_FROM", 10)
    whole, first = parameters(), parameters()
    take_steps(whole, Adam(whole, 0.01), range(6))
    stopped = Adam(first, 0.01)
    take_steps(first, stopped, range(3))
    second = [parameter.detach().clone().requires_grad_() for parameter in first]
    resumed = Adam(second, 0.01, state=state)
    resumed.load(stopped.tensors().items())
    take_steps(first, stopped, range(5, 6))  # what was loaded is a copy
    take_steps(second, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


def test_moments_on_disk_are_in_files_without_a_name(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(adam, "MAPPED_FROM", 10)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    held = parameters()
    optimiser = Adam(held, 0.01, state="disk")
    take_steps(held, optimiser, range(1))
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert sum(str(tmp_path) in line for line in maps.read_text().splitlines()) == 4, (
            "two moments of two parameters"
        )
    assert not list(tmp_path.iterdir())


def test_torch_does_not_load_its_compiler():
    code = (
        "import sys, torch; from cm3.training.adam import Adam; p = torch.zeros(3, requires_grad=True); "
        "p.grad = torch.ones(3); Adam([p], 0.1).step(); print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
