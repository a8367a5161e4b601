"""The definition of moving rows, in plain torch; also what runs, on every device."""

import torch


def take_rows(x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """(B, H, S, D) -> (B, H, S, D), row order[i] as row i. Tokens before heads in memory, as models lay them out."""
    return x.transpose(1, 2).index_select(1, order).transpose(1, 2)
