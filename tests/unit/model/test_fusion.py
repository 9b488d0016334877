"""Spherical interpolation and Bezier fusion against textbook formulas."""

import numpy as np
import oracles_cm3 as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cm3.model.fused_slerp import fused_slerp
from cm3.model.fusion import reference_slerp, slerp, spherical_bezier

both = pytest.mark.parametrize("interpolate", [slerp, fused_slerp])


def random_units(seed: int, *shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1
    )


@both
def test_slerp_is_the_textbook_formula(interpolate, device):
    a, b = random_units(0, 50, 8), random_units(1, 50, 8)
    t = torch.linspace(0, 1, 50, dtype=torch.float64)
    expected = [oracle.slerp(x, y, float(s)) for x, y, s in zip(a.numpy(), b.numpy(), t, strict=True)]
    a, b, t = a.to(device), b.to(device), t.to(device)
    np.testing.assert_allclose(interpolate(a, b, t).cpu().numpy(), expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(reference_slerp(a, b, t).cpu().numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("modalities", [1, 2, 3, 5])
def test_bezier_is_de_casteljau(modalities, device):
    points = random_units(modalities, modalities, 20, 6)
    t = torch.linspace(0.05, 0.95, 20, dtype=torch.float64)
    expected = [oracle.bezier(list(points[:, i].numpy()), float(t[i])) for i in range(20)]
    found = spherical_bezier(points.to(device), t.to(device)).cpu()
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)


def test_bezier_starts_and_ends_at_the_outer_points():
    points = random_units(3, 4, 10, 6)
    torch.testing.assert_close(spherical_bezier(points, torch.zeros(10, dtype=torch.float64)), points[0])
    torch.testing.assert_close(spherical_bezier(points, torch.ones(10, dtype=torch.float64)), points[-1])


@both
@settings(deadline=None)
@given(
    seed=st.integers(0, 10_000),
    angle=st.one_of(st.floats(0, 1e-2), st.floats(0, np.pi), st.floats(np.pi - 1e-2, np.pi)),
    t=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_slerp_is_of_unit_norm_and_at_the_right_angle_everywhere(interpolate, seed, angle, t, dtype):
    a, other = random_units(seed, 2, 5)
    side = torch.nn.functional.normalize(other - (a @ other) * a, dim=0)
    b = (np.cos(angle) * a + np.sin(angle) * side).to(dtype)
    a = a.to(dtype)
    result = interpolate(a, b, torch.tensor(t, dtype=dtype))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert abs(float(torch.linalg.vector_norm(result)) - 1) < tolerance
    turned = float(torch.atan2(torch.linalg.vector_norm(result - (a @ result) * a), a @ result))
    # Near the antipode any great circle is right, so only the angle from `a` is checked.
    assert abs(turned - t * angle) < (2e-3 if dtype == torch.float32 else 1e-7)


ANGLES = [1e-3, 3e-2, 0.05, 0.5, 1.5, 2.5, 2.7, np.pi - 0.05, np.pi - 1e-3]


def pair_at(angle: float, n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, d) float64 unit vectors and others at `angle` from them."""
    a, other = random_units(21, n, d), random_units(22, n, d)
    side = torch.nn.functional.normalize(other - (a * other).sum(-1, keepdim=True) * a, dim=-1)
    return a, np.cos(angle) * a + np.sin(angle) * side


@both
@pytest.mark.parametrize("angle", ANGLES)
def test_gradients_match_finite_differences(interpolate, angle, device):
    a, b = (x.to(device) for x in pair_at(angle, 4, 5))
    t = torch.tensor([0.1, 0.4, 0.5, 0.9], dtype=torch.float64, device=device)

    def on_the_sphere(x, y, at):
        return interpolate(torch.nn.functional.normalize(x, dim=-1), torch.nn.functional.normalize(y, dim=-1), at)

    inputs = [x.requires_grad_() for x in (a, b, t)]
    # Differences of 1e-8 lose half of the digits; where the result turns quickly, more of them.
    assert torch.autograd.gradcheck(on_the_sphere, inputs, eps=1e-7, atol=1e-5, rtol=1e-4)


def test_gradients_of_the_curve_match_finite_differences():
    points = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.1, 0.4, 0.5, 0.9], dtype=torch.float64)

    def fused(p: torch.Tensor) -> torch.Tensor:
        return spherical_bezier(torch.nn.functional.normalize(p, dim=-1), t)

    assert torch.autograd.gradcheck(fused, points)


@both
@pytest.mark.parametrize("angle", ANGLES)
def test_float32_gradients_are_those_of_float64(interpolate, angle):
    t, upstream = torch.linspace(0, 1, 30, dtype=torch.float64), random_units(23, 30, 16)
    # The same vectors in both types: rounding them would turn them.
    a, b = (x.float().double() for x in pair_at(angle, 30, 16))
    gradients = {}
    for dtype in (torch.float32, torch.float64):
        raw = [x.to(dtype).requires_grad_() for x in (a, b)]
        result = interpolate(
            *(torch.nn.functional.normalize(x.to(torch.float64), dim=-1).to(dtype) for x in raw), t.to(dtype)
        )
        (result * upstream.to(dtype)).sum().backward()
        gradients[dtype] = [x.grad.double() for x in raw]
    # Between nearly opposite vectors the direction itself is known to eps / (pi - w) only.
    tolerance = 2e-5 + 1e-6 / (np.pi - angle)
    for found, expected in zip(gradients[torch.float32], gradients[torch.float64], strict=True):
        assert float((found - expected).abs().max()) < tolerance * float(expected.abs().max())


@both
@pytest.mark.parametrize("angle", [0.5, 1.5, 2.5])
def test_gradients_are_those_of_the_textbook_formula(interpolate, angle):
    t, upstream = torch.linspace(0, 1, 30, dtype=torch.float64), random_units(23, 30, 16)
    found = []
    for arc in (interpolate, reference_slerp):
        inputs = [x.clone().requires_grad_() for x in (*pair_at(angle, 30, 16), t)]
        (arc(*inputs) * upstream).sum().backward()
        found.append([x.grad for x in inputs])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("nudge", [0.0, 1e-7, 1e-4])
def test_equal_and_opposite_vectors_have_finite_values_and_gradients(interpolate, dtype, sign, nudge):
    a = random_units(5, 30, 16).to(dtype)
    a[:3] = torch.eye(16)[:3]
    b = torch.nn.functional.normalize(sign * a + nudge * random_units(6, 30, 16).to(dtype), dim=-1)
    t = torch.linspace(0, 1, 30, dtype=dtype)
    t[5], t[6] = torch.finfo(dtype).tiny, torch.finfo(dtype).eps
    for x in (a, b, t):
        x.requires_grad_()
    result = interpolate(a, b, t)
    (result * random_units(7, 30, 16).to(dtype)).sum().backward()
    for values in (result, a.grad, b.grad, t.grad):
        assert values is not None and torch.isfinite(values).all()
    assert float((torch.linalg.vector_norm(result.detach(), dim=-1) - 1).abs().max()) < 1e-6
    if sign > 0:
        # Between equal vectors the curve is the chord, and so is its derivative.
        assert float((result - ((1 - t[:, None]) * a + t[:, None] * b)).detach().abs().max()) < 1e-5
    else:
        torch.testing.assert_close((result * a).sum(-1), torch.cos(torch.pi * t), rtol=0, atol=1e-3)


@both
@pytest.mark.parametrize("d", [1, 2, 3])
def test_narrow_vectors(interpolate, d):
    a = torch.nn.functional.normalize(torch.randn(20, d, generator=torch.Generator().manual_seed(1)), dim=-1)
    for b in (a, -a, a.flip(0)):
        assert torch.isfinite(interpolate(a, b, torch.rand(20))).all()


@both
def test_shapes_are_broadcast(interpolate):
    a, b = random_units(9, 6), random_units(10, 3, 4, 6)
    for t in (torch.tensor(0.3), torch.rand(4), torch.rand(2, 1, 1)):
        t = t.double()
        result = interpolate(a, b, t)
        assert result.shape == (*torch.broadcast_shapes(t.shape, (3, 4)), 6)
        torch.testing.assert_close(result, reference_slerp(a, b, t))
    assert interpolate(a, b[:0], torch.rand(0, 4, dtype=torch.float64)).shape == (0, 4, 6)


@both
def test_a_pair_does_not_depend_on_the_other_pairs(interpolate):
    a, b = random_units(11, 40, 16).float(), random_units(12, 40, 16).float()
    b[:5], b[5:10] = a[:5], -a[5:10]
    t = torch.linspace(0, 1, 40)
    whole = interpolate(a, b, t)
    for row in range(0, 40, 3):
        torch.testing.assert_close(whole[row], interpolate(a[row], b[row], t[row]), rtol=0, atol=5e-7)


@both
def test_the_reference_formula_is_undefined_for_equal_float32_vectors(interpolate):
    a = torch.tensor([[1.0, 0.0, 0.0]])
    t = torch.tensor([0.3])
    assert torch.isnan(reference_slerp(a, a, t)).all()
    torch.testing.assert_close(interpolate(a, a, t), a)


def test_reversing_points_and_t_gives_the_same_curve():
    points, t = random_units(8, 5, 12, 7), torch.rand(12, dtype=torch.float64)
    torch.testing.assert_close(spherical_bezier(points, t), spherical_bezier(points.flip(0), 1 - t))
