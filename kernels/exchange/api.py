"""Operators by which processes that share a sequence exchange it: Ulysses, as DeepSpeed and diffusers do it.

Outside attention each process has a part of the tokens with all heads, inside it all tokens with a part of the heads.
These are operators, so that they may stand in a traced graph; a graph names its group by the ranks in it. For gradients
the loss is the sum of what the processes compute.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_groups: dict[str, dist.ProcessGroup] = {}


def group_name(group: dist.ProcessGroup) -> str:
    """The name by which the operators below know a process group, the same in all of its processes: "0+1"."""
    name = "+".join(map(str, dist.get_process_group_ranks(group)))
    _groups[name] = group
    return name


def members(name: str) -> int:
    """How many processes a group has; 1 for the empty name."""
    return len(name.split("+"))


def place_in(name: str) -> int:
    """The number of this process in a group."""
    return dist.get_group_rank(_groups[name], dist.get_rank())


@torch.library.custom_op("salad::gather_tokens", mutates_args=())
def gather_tokens(x: Tensor, group: str) -> Tensor:
    """(B, H, S / P, D), a part of the tokens, to (B, H / P, S, D), a part of the heads, in P processes at once."""
    batch, heads, tokens, channels = x.shape
    parts = x.reshape(batch, members(group), heads // members(group), tokens, channels).movedim(1, 0)
    return _exchange(parts, group).permute(1, 2, 0, 3, 4).flatten(2, 3).contiguous()


@gather_tokens.register_fake
def _(x: Tensor, group: str) -> Tensor:
    batch, heads, tokens, channels = x.shape
    return x.new_empty((batch, heads // members(group), tokens * members(group), channels))


@torch.library.custom_op("salad::gather_heads", mutates_args=())
def gather_heads(x: Tensor, group: str) -> Tensor:
    """Inverse of :func:`gather_tokens`."""
    batch, heads, tokens, channels = x.shape
    parts = x.reshape(batch, heads, members(group), tokens // members(group), channels).movedim(2, 0)
    return _exchange(parts, group).movedim(0, 1).flatten(1, 2).contiguous()


@gather_heads.register_fake
def _(x: Tensor, group: str) -> Tensor:
    batch, heads, tokens, channels = x.shape
    return x.new_empty((batch, heads * members(group), tokens // members(group), channels))


@torch.library.custom_op("salad::sum_of_processes", mutates_args=())
def sum_of_processes(x: Tensor, group: str) -> Tensor:
    """The sum over the processes of a group, of any shape."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_groups[group])
    return total


@sum_of_processes.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


def _exchange(parts: Tensor, group: str) -> Tensor:
    """parts[i] of this process becomes the part of this process's number in process i."""
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=_groups[group])
    return received


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group = inputs[1]


gather_tokens.register_autograd(lambda ctx, grad: (gather_heads(grad, ctx.group), None), setup_context=_setup)
gather_heads.register_autograd(lambda ctx, grad: (gather_tokens(grad, ctx.group), None), setup_context=_setup)
sum_of_processes.register_autograd(lambda ctx, grad: (sum_of_processes(grad, ctx.group), None), setup_context=_setup)
