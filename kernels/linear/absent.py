"""What operators return in the place of a result that nobody asked for."""

import torch


def absent(like: torch.Tensor) -> torch.Tensor:
    """What a backward operator returns as the gradient of an optional argument that was None: shape (0,).

    Operators of torch.library return tensors only, each of them new.
    """
    return like.new_empty((0,))
