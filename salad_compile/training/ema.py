"""An exponential moving average of the trained parameters, by torch's own averaging function.

`torch.optim.swa_utils.AveragedModel` would copy the whole model, base included.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from salad_compile.common.sharding import shard_like, whole


class MovingAverage:
    """average <- decay average + (1 - decay) parameter; it starts at the parameters.

    Args:
        parameters: by name; sharded ones are averaged shard by shard.
        decay: in (0, 1).
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.averages: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}
        self._update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """After a step of the optimizer."""
        current = [parameter.detach() for parameter in self.parameters.values()]
        self._update(list(self.averages.values()), current, 1)

    def tensors(self) -> dict[str, Tensor]:
        """Name -> whole tensor; every process must call it."""
        return {name: whole(tensor) for name, tensor in self.averages.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of :meth:`tensors`."""
        for name, average in self.averages.items():
            average.copy_(shard_like(tensors[name], average))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and parameters: once to use the averaged model, and once more to continue training."""
        for name, parameter in self.parameters.items():
            value = parameter.detach().clone()
            parameter.copy_(self.averages[name])
            self.averages[name].copy_(value)
