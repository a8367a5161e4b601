"""Tensors and ranks of a model that several processes may share: whole tensors from shards, and shards from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn
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


def mean_like(gradient: Tensor, like: Tensor) -> Tensor:
    """The mean over the processes of what each has whole, sharded as `like` is, a DTensor; every rank must call it."""
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(like, DTensor)
    mesh = like.device_mesh
    summands = DTensor.from_local(gradient / mesh.size(), mesh, [Partial()] * mesh.ndim, run_check=False)
    return summands.redistribute(mesh, like.placements).to(like.device)


def reshard(model: nn.Module) -> None:
    """Put the shards of FSDP2 back as the parameters of every module, whichever were left whole after a forward.

    Of the root, or with reshard_after_forward=False of all, whole parameters stay until the backward pass. Who comes
    before it, or without it, would read or write those, which the optimizer does not know and the next step discards.
    """
    for _, module in _sharded_modules(model):
        module.reshard()


def sharded_around(model: nn.Module, name: str) -> list[Any]:
    """The modules that FSDP2 shards by themselves which submodule `name` of `model` is in, itself included."""
    return [module for path, module in _sharded_modules(model) if not path or f"{name}.".startswith(f"{path}.")]


def _sharded_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of everything in `model` that FSDP2 shards by itself, `model` included."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        yield from ((name, module) for name, module in model.named_modules() if isinstance(module, FSDPModule))
