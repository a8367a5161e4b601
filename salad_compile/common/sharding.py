"""Tensors and ranks of a model that several processes may share: whole tensors from shards, and shards from them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def is_first_rank() -> bool:
    """Whether this process writes: rank 0, or the only one."""
    distributed = torch.distributed
    return not distributed.is_available() or not distributed.is_initialized() or not distributed.get_rank()


def whole(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous and detached; of a sharded one all shards, so every rank must call it."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):  # a DTensor of FSDP2
        tensor = tensor.full_tensor()
    return tensor.cpu().contiguous()


def whole_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """:func:`whole` of every tensor."""
    return {name: whole(tensor) for name, tensor in state.items()}


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """`value` on the device of `like`, and sharded as it is: of FSDP2 every rank keeps its share."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements)
    return value
