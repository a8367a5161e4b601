"""The trained parameters of a model by name, whole where FSDP2 shards them, and back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.common.sharding import shard_like, whole
from salad_compile.common.wrappers import plain_key
from salad_compile.sites.branch import branches
from salad_compile.training.optimizers import make_state

_CODES, _SCALE = ".codes", ".scale"


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Plain name (`blocks.0.attn1.salad.gate_weight`) -> parameter, of all branches."""
    return {
        plain_key(f"{name}.{key}"): parameter
        for name, branch in branches(model).items()
        for key, parameter in branch.named_parameters()
    }


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """`exp_avg/blocks.0...` -> whole tensor, of everything that the optimizer remembers of each parameter.

    Of moments in 8 bits `exp_avg.codes/...`, (as the parameter) of 0 to 255, and `exp_avg.scale/...`, (blocks,).
    """
    found = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if _is_coded(value):
                found[f"{key}{_CODES}/{name}"] = value.codes.to(torch.bfloat16)  # has 8 bits: exact
                found[f"{key}{_SCALE}/{name}"] = value.scale
            else:
                found[f"{key}/{name}"] = whole(value)
    return found


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Inverse of :func:`optimizer_tensors`. The number of steps stays on the CPU, where AdamW keeps it."""
    if any(joined.partition("/")[0].endswith(_SCALE) for joined in tensors):
        make_state(optimizer)
    for joined, value in tensors.items():
        key, _, name = joined.partition("/")
        parameter = parameters[name]
        if key.endswith((_CODES, _SCALE)):
            moment, _, part = key.rpartition(".")
            getattr(optimizer.state[parameter][moment], part).copy_(value)
            continue
        optimizer.state[parameter][key] = value if key == "step" else shard_like(value, parameter)


def fits_shape(kind: str, tensor: Tensor, parameter: Tensor) -> bool:
    """Whether what is stored under `kind/name` can be of the parameter of that name: scales are one a block."""
    return kind == "step" or kind.endswith(_SCALE) or tensor.shape == parameter.shape


def _is_coded(value: Any) -> bool:
    """Whether it is torchao's (0.18) tensor of 8-bit codes and their scales."""
    return hasattr(value, "codes") and hasattr(value, "scale")
