"""One vector out of the hidden states of a sequence of tokens."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

TokenPooling = Literal["mean", "cls", "last", "max"]


def pool(states: "torch.Tensor", mask: "torch.Tensor", how: TokenPooling) -> "torch.Tensor":
    """Return (n, d) of (n, tokens, d) states; padding before or behind the (n, tokens) mask's ones does not count."""
    import torch

    rows = torch.arange(len(states), device=states.device)
    if how == "cls":
        return states[rows, mask.argmax(dim=1)]
    if how == "last":
        return states[rows, mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)]
    there = mask.unsqueeze(-1).bool()
    if how == "max":
        return states.masked_fill(~there, float("-inf")).amax(dim=1)
    # Padding may hold anything, NaN too, so that it is taken out rather than multiplied by 0.
    return states.masked_fill(~there, 0.0).sum(dim=1) / mask.sum(dim=1, keepdim=True)
