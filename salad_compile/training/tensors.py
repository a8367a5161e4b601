"""The trained parameters of a model by name, whole where FSDP2 shards them, and back."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.common.sharding import shard_like, whole
from salad_compile.common.wrappers import plain_key
from salad_compile.sites.branch import branches


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Plain name (`blocks.0.attn1.salad.gate_weight`) -> parameter, of all branches."""
    return {
        plain_key(f"{name}.{key}"): parameter
        for name, branch in branches(model).items()
        for key, parameter in branch.named_parameters()
    }


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """`exp_avg/blocks.0...` -> whole tensor, of everything that the optimizer remembers of each parameter."""
    return {
        f"{key}/{name}": whole(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Inverse of :func:`optimizer_tensors`. The number of steps stays on the CPU, where AdamW keeps it."""
    for joined, value in tensors.items():
        key, _, name = joined.partition("/")
        parameter = parameters[name]
        optimizer.state[parameter][key] = value if key == "step" else shard_like(value, parameter)
