"""Spherical Bezier fusion: the modalities' unit vectors are control points of a curve on the sphere."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cm3.model.fused_slerp import fused_slerp


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical linear interpolation from unit vectors `a` (t = 0) to `b` (t = 1), of unit norm everywhere.

    slerp(a, b; t) = sin((1 - t) w) / sin w * a + sin(t w) / sin w * b with w = arccos<a, b> (Shoemake 1985),
    computed as cos(t w) a + sin(t w) n with n the unit vector along b - <a, b> a, which does not lose digits
    near w = pi. Where the angle is tiny the chord is followed and normalised. Where b = -a every great circle
    is as short as another; a fixed one through `a` is taken. On an accelerator `cm3.model.fused_slerp` computes the
    same up to rounding, with fewer kernel launches.

    Args:
        a, b: (..., d) unit vectors.
        t: (...) in [0, 1].

    Returns:
        (..., d) unit vectors; gradients are finite everywhere.
    """
    if a.device.type != "cpu":
        return fused_slerp(a, b, t)
    t = torch.as_tensor(t, dtype=a.dtype, device=a.device).unsqueeze(-1)
    if a.shape == b.shape and _easy(a, b):
        found: Tensor = _Arc.apply(a, b, t.expand(*a.shape[:-1], 1))
        return found
    return _careful_slerp(a, b, t)


@torch.no_grad()
def _easy(a: Tensor, b: Tensor) -> bool:
    """Whether no angle is near 0 or pi, so that the plain formula loses hardly a digit."""
    cosine = (a * b).sum(-1)
    return not cosine.numel() or bool((cosine.max() < 0.999) & (cosine.min() > -0.9))


class _Arc(torch.autograd.Function):
    """alpha a + beta b with alpha = sin((1 - t) w) / sin w, beta = sin(t w) / sin w, for angles far from 0 and pi.

    With c = <a, b> the gradient needs dalpha/dc and dbeta/dc alone: a few passes over the vectors in place of fifty.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        cosine = (a * b).sum(-1, keepdim=True)
        sine = (1 - cosine.square()).sqrt_()
        angle = torch.atan2(sine, cosine)
        alpha, beta = (torch.sin(share * angle).div_(sine) for share in (1 - t, t))
        ctx.save_for_backward(a, b, t, cosine, sine, angle, alpha, beta)
        return (alpha * a).addcmul_(beta, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        a, b, t, cosine, sine, angle, alpha, beta = ctx.saved_tensors
        along_a, along_b = ((grad * side).sum(-1, keepdim=True) for side in (a, b))
        bends = [torch.cos(share * angle) for share in (1 - t, t)]
        by_angle = along_a * ((1 - t) * bends[0] - alpha * cosine) + along_b * (t * bends[1] - beta * cosine)
        # dw/dc = -1 / sin w, and both slopes above still lack their 1 / sin w.
        by_cosine = by_angle.div_(sine.square()).neg_()
        by_t = (along_b * bends[1] - along_a * bends[0]).mul_(angle).div_(sine) if ctx.needs_input_grad[2] else None
        return (alpha * grad).addcmul_(by_cosine, b), (beta * grad).addcmul_(by_cosine, a), by_t


def _careful_slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
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


def lerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Point on the chord, (1 - t) a + t b, shapes as `slerp`; not of unit norm."""
    return torch.lerp(a, b, t.unsqueeze(-1))
