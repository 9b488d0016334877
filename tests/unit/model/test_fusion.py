"""Spherical interpolation and Bezier fusion against textbook formulas."""

import numpy as np
import oracles_cm3 as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3.model.fusion import reference_slerp, slerp, spherical_bezier


def random_units(seed: int, *shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1
    )


def test_slerp_is_the_textbook_formula():
    a, b = random_units(0, 50, 8), random_units(1, 50, 8)
    t = torch.linspace(0, 1, 50, dtype=torch.float64)
    expected = [oracle.slerp(x, y, float(s)) for x, y, s in zip(a.numpy(), b.numpy(), t, strict=True)]
    np.testing.assert_allclose(slerp(a, b, t).numpy(), expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(reference_slerp(a, b, t).numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("modalities", [1, 2, 3, 5])
def test_bezier_is_de_casteljau(modalities):
    points = random_units(modalities, modalities, 20, 6)
    t = torch.linspace(0.05, 0.95, 20, dtype=torch.float64)
    expected = [oracle.bezier(list(points[:, i].numpy()), float(t[i])) for i in range(20)]
    np.testing.assert_allclose(spherical_bezier(points, t).numpy(), expected, rtol=0, atol=1e-12)


def test_bezier_starts_and_ends_at_the_outer_points():
    points = random_units(3, 4, 10, 6)
    torch.testing.assert_close(spherical_bezier(points, torch.zeros(10, dtype=torch.float64)), points[0])
    torch.testing.assert_close(spherical_bezier(points, torch.ones(10, dtype=torch.float64)), points[-1])


@settings(deadline=None)
@given(
    seed=st.integers(0, 10_000),
    angle=st.one_of(st.floats(0, 1e-2), st.floats(0, np.pi), st.floats(np.pi - 1e-2, np.pi)),
    t=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_slerp_is_of_unit_norm_and_at_the_right_angle_everywhere(seed, angle, t, dtype):
    a, other = random_units(seed, 2, 5)
    side = torch.nn.functional.normalize(other - (a @ other) * a, dim=0)
    b = (np.cos(angle) * a + np.sin(angle) * side).to(dtype)
    a = a.to(dtype)
    result = slerp(a, b, torch.tensor(t, dtype=dtype))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert abs(float(torch.linalg.vector_norm(result)) - 1) < tolerance
    turned = float(torch.atan2(torch.linalg.vector_norm(result - (a @ result) * a), a @ result))
    # Near the antipode any great circle is right, so only the angle from `a` is checked.
    assert abs(turned - t * angle) < (2e-3 if dtype == torch.float32 else 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("nudge", [0.0, 1e-7, 1e-4])
def test_equal_and_opposite_vectors_have_finite_values_and_gradients(dtype, sign, nudge):
    a = random_units(5, 30, 16).to(dtype)
    b = torch.nn.functional.normalize(sign * a + nudge * random_units(6, 30, 16).to(dtype), dim=-1)
    a.requires_grad_()
    b.requires_grad_()
    t = torch.linspace(0, 1, 30, dtype=dtype)
    result = slerp(a, b, t)
    (result * random_units(7, 30, 16).to(dtype)).sum().backward()
    for values in (result, a.grad, b.grad):
        assert values is not None and torch.isfinite(values).all()
    if sign > 0:
        # Between equal vectors the curve is the chord, and so is its derivative.
        assert float((result - ((1 - t[:, None]) * a + t[:, None] * b)).detach().abs().max()) < 1e-5


def test_reference_slerp_is_undefined_for_equal_float32_vectors_and_ours_is_not():
    a = torch.tensor([[1.0, 0.0, 0.0]])
    t = torch.tensor([0.3])
    assert torch.isnan(reference_slerp(a, a, t)).all()
    torch.testing.assert_close(slerp(a, a, t), a)


def test_gradients_match_finite_differences():
    points = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.1, 0.4, 0.5, 0.9], dtype=torch.float64)

    def fused(p: torch.Tensor) -> torch.Tensor:
        return spherical_bezier(torch.nn.functional.normalize(p, dim=-1), t)

    assert torch.autograd.gradcheck(fused, points)


def test_reversing_points_and_t_gives_the_same_curve():
    points, t = random_units(8, 5, 12, 7), torch.rand(12, dtype=torch.float64)
    torch.testing.assert_close(spherical_bezier(points, t), spherical_bezier(points.flip(0), 1 - t))
