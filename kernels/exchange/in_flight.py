"""The exchange of api.py in two halves, between which something else is computed.

`start_*` returns a tensor that is still being written: nothing but the `finish_*` of the same name may read it, and
that waits. Only for groups whose processes divide the heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import KernelExchangeError
from . import under_way
from .api import among, group_of, members


@torch.library.custom_op("salad::start_tokens", mutates_args=())
def start_tokens(x: Tensor, group: str) -> Tensor:
    """(B, H, S / P, D) to (H, B, S / P, D), under way: what `finish_tokens` makes `gather_tokens` of."""
    return _start(x.movedim(1, 0), group)


@start_tokens.register_fake
def _(x: Tensor, group: str) -> Tensor:
    batch, heads, tokens, channels = x.shape
    return x.new_empty((heads, batch, tokens, channels))


@torch.library.custom_op("salad::finish_tokens", mutates_args=())
def finish_tokens(parts: Tensor, group: str) -> Tensor:
    """What `start_tokens` returned to (B, H / P, S, D)."""
    _wait(parts, group)
    heads, batch, tokens, channels = parts.shape
    received = parts.view(members(group), heads // members(group), batch, tokens, channels)
    # always a copy: an operator must not return what it was given
    return received.permute(2, 1, 0, 3, 4).clone(memory_format=torch.contiguous_format).flatten(2, 3)


@finish_tokens.register_fake
def _(parts: Tensor, group: str) -> Tensor:
    heads, batch, tokens, channels = parts.shape
    return parts.new_empty((batch, heads // members(group), tokens * members(group), channels))


@torch.library.custom_op("salad::start_heads", mutates_args=())
def start_heads(x: Tensor, group: str) -> Tensor:
    """(B, H / P, S, D) to (H, B, S / P, D), under way: what `finish_heads` makes `gather_heads` of."""
    batch, heads, tokens, channels = x.shape
    parts = x.reshape(batch, heads, members(group), tokens // members(group), channels)
    return _start(parts.permute(2, 1, 0, 3, 4).flatten(0, 1), group)


@start_heads.register_fake
def _(x: Tensor, group: str) -> Tensor:
    batch, heads, tokens, channels = x.shape
    return x.new_empty((heads * members(group), batch, tokens // members(group), channels))


@torch.library.custom_op("salad::finish_heads", mutates_args=())
def finish_heads(parts: Tensor, group: str) -> Tensor:
    """What `start_heads` returned to (B, H, S / P, D)."""
    _wait(parts, group)
    return parts.movedim(0, 1).clone(memory_format=torch.contiguous_format)


@finish_heads.register_fake
def _(parts: Tensor, group: str) -> Tensor:
    heads, batch, tokens, channels = parts.shape
    return parts.new_empty((batch, heads, tokens, channels))


def _start(parts: Tensor, group: str) -> Tensor:
    # always a copy: a compiler may use the memory of what it gave for something else as soon as this returns
    parts = parts.clone(memory_format=torch.contiguous_format)
    received = torch.empty_like(parts)
    with among(group):
        work = dist.all_to_all_single(received, parts, group=group_of(group), async_op=True)
    under_way.exchanges[received.data_ptr()] = work, parts
    return received


def _wait(parts: Tensor, group: str) -> None:
    """Raises KernelExchangeError for a tensor that nothing writes: a copy of one, made too early."""
    if parts.numel() == 0:
        return
    found = under_way.exchanges.pop(parts.data_ptr(), None)
    if found is None:
        raise KernelExchangeError("an exchange under way was copied before it was over, by a pass or a hook of others.")
    with among(group):
        found[0].wait()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group = inputs[1]


# The transpose of one half is a half of the other direction, and under way between them as well.
start_tokens.register_autograd(lambda ctx, grad: (finish_heads(grad, ctx.group), None), setup_context=_setup)
finish_tokens.register_autograd(lambda ctx, grad: (start_heads(grad, ctx.group), None), setup_context=_setup)
start_heads.register_autograd(lambda ctx, grad: (finish_tokens(grad, ctx.group), None), setup_context=_setup)
finish_heads.register_autograd(lambda ctx, grad: (start_tokens(grad, ctx.group), None), setup_context=_setup)
