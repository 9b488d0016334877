"""Spherical Bezier fusion: the modalities' unit vectors are control points of a curve on the sphere."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical linear interpolation from unit vectors `a` (t = 0) to `b` (t = 1), of unit norm everywhere.

    slerp(a, b; t) = sin((1 - t) w) / sin w * a + sin(t w) / sin w * b with w = arccos<a, b> (Shoemake 1985),
    computed as cos(t w) a + sin(t w) n with n the unit vector along b - <a, b> a, which does not lose digits
    near w = pi. Where the angle is tiny the chord is followed and normalised. Where b = -a every great circle
    is as short as another; a fixed one through `a` is taken.

    Args:
        a, b: (..., d) unit vectors.
        t: (...) in [0, 1].

    Returns:
        (..., d) unit vectors; gradients are finite everywhere.
    """
    t = torch.as_tensor(t, dtype=a.dtype, device=a.device).unsqueeze(-1)
    cosine = (a * b).sum(-1, keepdim=True)
    side = b - cosine * a
    # Once more: near the poles the difference above has lost digits, and with them its right angle to `a`.
    side = side - (a * side).sum(-1, keepdim=True) * a
    sine = torch.linalg.vector_norm(side, dim=-1, keepdim=True)
    eps = torch.finfo(a.dtype).eps
    # The chord deviates from the arc by O(w^3), so below this angle by less than a rounding error.
    near = (sine < eps ** (1 / 3)) & (cosine > 0)
    opposite = (sine < 8 * eps) & (cosine < 0)
    # Both branches of `where` are differentiated: the one not taken must stay finite.
    side = torch.where(near | opposite, _perpendicular(a), side)
    angle = torch.atan2(torch.where(near, torch.ones_like(sine), sine), cosine)
    arc = torch.cos(t * angle) * a + torch.sin(t * angle) * functional.normalize(side, dim=-1)
    chord = functional.normalize(torch.where(near, a + t * (b - a), a), dim=-1)
    return torch.where(near, chord, arc)


def _perpendicular(a: Tensor) -> Tensor:
    axis = a.detach().abs().argmin(-1, keepdim=True)
    basis = torch.zeros_like(a).scatter_(-1, axis, 1.0)
    return basis - a.gather(-1, axis) * a


def reference_slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """The reference implementation's slerp, shapes as `slerp`: NaN for equal and for opposite vectors in float32."""
    t = torch.as_tensor(t, dtype=a.dtype, device=a.device).unsqueeze(-1)
    angle = torch.arccos((a * b).sum(-1, keepdim=True).clamp(-1 + 1e-8, 1 - 1e-8))
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


Slerp = Callable[[Tensor, Tensor, Tensor], Tensor]


def spherical_bezier(points: Tensor, t: Tensor, interpolate: Slerp = slerp) -> Tensor:
    """Point at `t` of the spherical Bezier curve through De Casteljau's scheme with slerp in place of lerp.

    P_i^0 = points_i; P_i^r = slerp(P_i^{r-1}, P_{i+1}^{r-1}; t); the result is P_1^{M-1}, and points_1 for M = 1.

    Args:
        points: (M, N, d) unit control points, M >= 1 per item.
        t: (N,) in [0, 1].

    Returns:
        (N, d) unit vectors.
    """
    t = torch.as_tensor(t, dtype=points.dtype, device=points.device)
    while len(points) > 1:
        points = interpolate(points[:-1], points[1:], t.expand(len(points) - 1, points.shape[1]))
    return points[0]
