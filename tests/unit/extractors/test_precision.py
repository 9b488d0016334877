"""Arithmetic of an extractor's forward passes by its setting."""

import pytest
import torch

from extractors.runtime.precision import arithmetic, torch_dtype


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_tf32_only_where_it_is_asked_for(precision):
    def flags():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = flags()
    assert before[1], "torch's default is TF32 in convolutions"
    with arithmetic("cpu", precision):
        assert flags() == (precision == "tf32",) * 2
    assert flags() == before


def test_autocast_computes_products_in_bfloat16():
    x = torch.ones(2, 2)
    with arithmetic("cpu", "autocast"):
        assert (x @ x).dtype == torch.bfloat16
    assert torch_dtype("autocast") == torch_dtype("tf32") == torch.float32 and torch_dtype("bfloat16") == torch.bfloat16
