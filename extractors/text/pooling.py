"""Pooling of the hidden states of tokens to one vector."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

TokenPooling = Literal["mean", "cls", "last", "max"]


def pool(states: "torch.Tensor", mask: "torch.Tensor", how: TokenPooling) -> "torch.Tensor":
    """Return (n, d) of (n, tokens, d) states; padding on either side (zeros of the (n, tokens) mask) does not count."""
    import torch

    rows = torch.arange(len(states), device=states.device)
    if how == "cls":
        return states[rows, mask.argmax(dim=1)]
    if how == "last":
        return states[rows, mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)]
    tokens = mask.unsqueeze(-1).bool()
    if how == "max":
        return states.masked_fill(~tokens, float("-inf")).amax(dim=1)
    # Padding may hold NaN, so it is replaced rather than multiplied by 0.
    return states.masked_fill(~tokens, 0.0).sum(dim=1) / mask.sum(dim=1, keepdim=True)
