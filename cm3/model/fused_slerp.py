"""Spherical linear interpolation as one fused function: no branch depends on the data, so an accelerator never waits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def fused_slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical linear interpolation from unit vectors `a` (t = 0) to `b` (t = 1), equal to `cm3.slerp` up to rounding.

    The formula is chosen for each pair of vectors; `cm3.slerp` on a CPU chooses one for all pairs of a call, which other
    last digits follow from. The result has unit norm and the gradient is finite for all unit vectors, equal and opposite
    ones included. Where b = -a the great circle is not unique; a fixed one through `a` is used. Differentiable once.

    Args:
        a, b: (..., d) unit vectors, float32 or float64.
        t: (...) in [0, 1]; the leading dimensions of all three are broadcast.

    Returns:
        (..., d) unit vectors.

    Source: Shoemake, Animating rotation with quaternion curves (1985).
    """
    t = torch.as_tensor(t, dtype=a.dtype, device=a.device)
    shape = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1], t.shape)
    found: Tensor = _Slerp.apply(a.expand(*shape, -1), b.expand(*shape, -1), t.expand(shape).unsqueeze(-1))
    return found


class _Slerp(torch.autograd.Function):
    """Fused slerp: result = p a + q v with p and q one number per pair of vectors, and three ranges of the angle w.

    Ordinary angles: v = b and the plain formula. With c = <a, b> the gradient needs dp/dc and dq/dc only.

    Near 0 (`near`) those two derivatives cancel to rounding errors; a power series in (1 - c) / 2 replaces them.

    Near pi (`far`) sin w has lost its digits, but a + b is exact: v = a + b. With k = <a, v> and h = |v - k a|, the unit
    vector n = (v - k a) / h is orthogonal to `a`, w = atan2(h, k - 1), and result = cos(t w) a + sin(t w) n. Where a + b
    vanishes (`opposite`), a coordinate axis is added to v, which defines n.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        eps = torch.finfo(a.dtype).eps
        product = a * b  # one buffer for all products: fresh memory would cost more than the arithmetic
        cosine = product.sum(-1, keepdim=True)
        far = cosine < _FAR
        v = torch.addcmul(b, far.to(a.dtype), a)
        length = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        opposite = far & (length < 8 * eps)
        axis = a[..., :2].abs().argmin(-1, keepdim=True)  # of two axes, the one less parallel to `a`
        v.scatter_add_(-1, axis, opposite.to(a.dtype))
        along = torch.mul(a, v, out=product).sum(-1, keepdim=True)
        height = torch.where(opposite, 1, length).square() - along.square()

        # The lower bound gives equal vectors their limit: sin(t w) / sin w = t.
        sine = torch.where(far, height, 1 - cosine.square()).clamp_min_(eps**2).sqrt_()
        angle = torch.atan2(sine, torch.where(far, along - 1, cosine))
        angle = torch.where(opposite, torch.pi, angle)
        p, q = (torch.sin(share * angle).div_(sine) for share in (1 - t, t))
        ctx.save_for_backward(a, v, t, cosine, along, sine, angle, p, q)
        p = torch.where(far, torch.cos(t * angle) - along * q, p)
        return torch.mul(p, a, out=product).addcmul_(q, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        a, v, t, cosine, along, sine, angle, p, q = ctx.saved_tensors
        far = cosine < _FAR
        product = grad * a
        by_a = product.sum(-1, keepdim=True)
        by_v = torch.mul(grad, v, out=product).sum(-1, keepdim=True)
        bends = [torch.cos(share * angle) for share in (1 - t, t)]

        # The same factor for both gradients: dw/dc = -1 / sin w, and both slopes still lack their 1 / sin w.
        slope = by_a * ((1 - t) * bends[0] - p * cosine) + by_v * (t * bends[1] - q * cosine)
        slope = slope.div_(sine.square()).neg_()
        z = (1 - cosine) / 2
        near = z < _NEAR * torch.finfo(a.dtype).eps ** (1 / 3)
        slope = torch.where(near, by_a * _sine_ratio_slope(1 - t, z) + by_v * _sine_ratio_slope(t, z), slope)

        # Products of the incoming gradient with n and with the tangent at the result. Multiples of `a` in its own
        # gradient, and of `b` in its own, are left out: they would only change the length of a unit vector.
        by_n = (by_v - along * by_a) / sine
        by_angle = torch.where(far, bends[1] * by_n - torch.sin(t * angle) * by_a, 0)
        slope_a = torch.where(far, ((1 - t) * by_angle - p * by_n) / sine, slope)
        slope_b = torch.where(far, -t * by_angle / sine - q * (by_a + by_n * (1 - along) / sine), slope)
        by_t = None
        if ctx.needs_input_grad[2]:
            by_t = (by_v * bends[1] - by_a * bends[0]).mul_(angle).div_(sine)
            by_t = torch.where(far, by_angle * angle, by_t)
        grad_a = torch.mul(p, grad, out=product).addcmul_(slope_a, v)
        return grad_a, (q * grad).addcmul_(slope_b, a), by_t


_FAR = -0.9  # cosine
_NEAR = 0.1  # of the cube root of eps: the formula and the series are then equally accurate


def _sine_ratio_slope(s: Tensor, z: Tensor) -> Tensor:
    """Return d/dc of sin(s w) / sin w = s 2F1(1 + s, 1 - s; 3/2; z), z = (1 - c) / 2, by two terms of the series."""
    square = s.square()
    return -s * (1 - square) / 3 * (1 + (4 - square) * z / 2.5)
