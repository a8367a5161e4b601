"""Operators by which processes that share a sequence exchange it: Ulysses, as DeepSpeed and diffusers do it.

Outside attention each process has a part of the tokens with all heads, inside it all tokens with a part of the heads.
Where the processes do not divide the heads, two have a head in common, each for a part of its query blocks (shares.py).

These are operators, so that they may stand in a traced graph; a graph names its group by the ranks in it. For gradients
the loss is the sum of what the processes compute.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import KernelExchangeError
from . import under_way
from .shares import blocks_of, heads_of

_groups: dict[str, dist.ProcessGroup] = {}


def group_name(group: dist.ProcessGroup, heads: int = 0) -> str:
    """The name by which the operators below know a process group.

    Args:
        heads: of the attention whose tokens are exchanged. Where the processes do not divide them the name says how
            many there are and which process this is: its shapes are not those of the others, and neither must its
            compiled graphs be.

    Returns:
        The ranks, the same in all of its processes: "0+1"; or "0+1/3/1": 3 heads, the second of the two processes.
    """
    ranks = dist.get_process_group_ranks(group)
    name = "+".join(map(str, ranks))
    if heads % len(ranks):
        name = f"{name}/{heads}/{dist.get_group_rank(group, dist.get_rank())}"
    _groups[name] = group
    return name


def group_of(name: str) -> dist.ProcessGroup:
    """The process group of a name."""
    return _groups[name]


def backend_of(name: str) -> str:
    """The backend of a group, as torch.distributed calls it: "gloo", "nccl", or several, "cpu:gloo,cuda:nccl"."""
    return str(dist.get_backend(_groups[name]))


def members(name: str) -> int:
    """How many processes a group has; 1 for the empty name."""
    return name.partition("/")[0].count("+") + 1


def splits_heads(name: str) -> bool:
    """Whether its processes have heads in common."""
    return "/" in name


def first_head(name: str, own: int) -> int:
    """The first of the `own` heads that this process attends with."""
    if splits_heads(name):
        return _share(name)[0]
    return dist.get_group_rank(_groups[name], dist.get_rank()) * own


def _share(name: str) -> tuple[int, int]:
    """Of a group whose processes have heads in common: this one's first head, and the one after its last."""
    _, heads, place = name.split("/")
    return heads_of(int(place), int(heads), members(name))


def _shares(name: str, heads: int) -> list[tuple[int, int]]:
    """The same of all its processes, of `heads` in all."""
    return [heads_of(place, heads, members(name)) for place in range(members(name))]


@torch.library.custom_op("salad::gather_tokens", mutates_args=())
def gather_tokens(x: Tensor, group: str) -> Tensor:
    """(B, H, S / P, D), a part of the tokens, to (B, H / P, S, D), a part of the heads, in P processes at once.

    Where P does not divide H: to (B, h, S, D), h the heads that this process has something of.
    """
    batch, heads, tokens, channels = x.shape
    processes = members(group)
    if not splits_heads(group):
        parts = x.reshape(batch, processes, heads // processes, tokens, channels).movedim(1, 0)
        return _exchange(parts, group).permute(1, 2, 0, 3, 4).flatten(2, 3).contiguous()
    begin, end = _share(group)
    sent = [last - first for first, last in _shares(group, heads)]
    index = [head for first, last in _shares(group, heads) for head in range(first, last)]
    parts = x.movedim(1, 0)[index]
    received = _exchange(parts, group, sent, [end - begin] * processes)
    received = received.view(processes, end - begin, batch, tokens, channels)
    return received.permute(2, 1, 0, 3, 4).flatten(2, 3).contiguous()


@gather_tokens.register_fake
def _(x: Tensor, group: str) -> Tensor:
    batch, heads, tokens, channels = x.shape
    processes = members(group)
    begin, end = _share(group) if splits_heads(group) else (0, heads // processes)
    return x.new_empty((batch, end - begin, tokens * processes, channels))


@torch.library.custom_op("salad::gather_heads", mutates_args=())
def gather_heads(x: Tensor, group: str) -> Tensor:
    """(B, h, S, D) to (B, H, S / P, D): inverse of :func:`gather_tokens`, and its transpose.

    What processes have in common of a head is added up.
    """
    batch, heads, tokens, channels = x.shape
    processes = members(group)
    if not splits_heads(group):
        parts = x.reshape(batch, heads, processes, tokens // processes, channels).movedim(2, 0)
        return _exchange(parts, group).movedim(0, 1).flatten(1, 2).contiguous()
    parts = x.reshape(batch, heads, processes, tokens // processes, channels).permute(2, 1, 0, 3, 4).flatten(0, 1)
    total = int(group.split("/")[1])
    shares = _shares(group, total)
    got = [last - first for first, last in shares]
    received = _exchange(parts, group, [heads] * processes, got)
    whole = received.new_zeros((total, *received.shape[1:]))
    done = 0
    for first, last in shares:  # one after the other: sums are the same each time
        whole[first:last] += received[done : done + last - first]
        done += last - first
    return whole.movedim(0, 1).contiguous()


@gather_heads.register_fake
def _(x: Tensor, group: str) -> Tensor:
    batch, heads, tokens, channels = x.shape
    total = int(group.split("/")[1]) if splits_heads(group) else heads * members(group)
    return x.new_empty((batch, total, tokens // members(group), channels))


@torch.library.custom_op("salad::own_blocks", mutates_args=())
def own_blocks(x: Tensor, group: str) -> Tensor:
    """(B, h, Mq, ...), something of each query block, with zeros for the blocks that other processes attend with.

    Not differentiable. Only for groups whose processes have heads in common.
    """
    begin, end = _share(group)
    _, heads, place = group.split("/")
    own = torch.zeros_like(x)
    for head in range(begin, end):
        first, last = blocks_of(int(place), int(heads), members(group), head, x.shape[2])
        own[:, head - begin, first:last] = x[:, head - begin, first:last]
    return own


@own_blocks.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("salad::sum_of_processes", mutates_args=())
def sum_of_processes(x: Tensor, group: str) -> Tensor:
    """The sum over the processes of a group, of any shape."""
    total = x.clone(memory_format=torch.contiguous_format)
    with among(group):
        under_way.follow()
        dist.all_reduce(total, group=_groups[group])
    return total


@sum_of_processes.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


def _exchange(parts: Tensor, group: str, sent: list[int] | None = None, received: list[int] | None = None) -> Tensor:
    """parts[i] of this process becomes the part of this process's number in process i.

    Args:
        sent, received: how many of `parts` go to each process, and come from it; None: one each.
    """
    parts = parts.contiguous()
    got = torch.empty_like(parts) if received is None else parts.new_empty((sum(received), *parts.shape[1:]))
    with among(group):
        under_way.follow()
        dist.all_to_all_single(got, parts, received, sent, group=_groups[group])
    return got


@contextlib.contextmanager
def among(group: str) -> Iterator[None]:
    """A context that raises KernelExchangeError where torch.distributed says that another process does not answer."""
    try:
        yield
    except RuntimeError as error:
        ranks = group.partition("/")[0].replace("+", ", ")
        raise KernelExchangeError(
            f"the exchange among the processes {ranks}, which share the tokens of one sequence, failed: most likely "
            f"one of them has ended, and its own message says why. Start all of them again. ({error})"
        ) from error


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group = inputs[1]


gather_tokens.register_autograd(lambda ctx, grad: (gather_heads(grad, ctx.group), None), setup_context=_setup)
gather_heads.register_autograd(lambda ctx, grad: (gather_tokens(grad, ctx.group), None), setup_context=_setup)
sum_of_processes.register_autograd(lambda ctx, grad: (sum_of_processes(grad, ctx.group), None), setup_context=_setup)
