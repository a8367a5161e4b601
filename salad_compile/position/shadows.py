"""Shadows: int64 tensors on the CPU with the shape of a value, whose entries say what each of its elements is.

Along axes where nothing changes, such as the channels, they are expanded and take no memory; what is done to them keeps
that so where it can.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Undocumented. Seen in torch 2.11 and 2.13; position/test_private_names.py fails when it moves.
from torch.multiprocessing.reductions import StorageWeakRef

ELSEWHERE, SEVERAL = -1, -2
"""Instead of a row: a value that derives from no projection; one that derives from several rows."""


class UnknownError(Exception):
    """Why a shadow is not known."""


def blank(shape: Sequence[int], entry: int) -> Tensor:
    """A shadow of one entry."""
    return torch.tensor(entry, device="cpu").expand(tuple(shape))


def compact(shadow: Tensor) -> Tensor:
    """One entry along each axis where nothing changes."""
    for axis, (size, stride) in enumerate(zip(shadow.shape, shadow.stride(), strict=True)):
        if stride == 0 and size > 1:
            shadow = shadow.narrow(axis, 0, 1)
    return shadow


def shrink(shadow: Tensor) -> Tensor:
    """The same, expanded along each axis where nothing changes."""
    small = compact(shadow)
    for axis, size in enumerate(small.shape):
        if size > 1:
            first = small.narrow(axis, 0, 1)
            if bool((small == first).all()):
                small = first
    return small.clone().expand(shadow.shape) if small.numel() < shadow.numel() else shadow


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two shadows that can be broadcast agree everywhere."""
    one, other = compact(one), compact(other)
    same = one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
    return same or bool((one == other).all())


def reshape(shadow: Tensor, shape: Sequence[int]) -> Tensor:
    """A shadow in another shape of as many entries."""
    try:
        return shadow.view(shape)
    except RuntimeError:
        own = tuple(shadow.shape)
    if own[-1] == shape[-1] and shadow.stride(-1) == 0:
        return shadow[..., :1].reshape(*shape[:-1], 1).expand(shape)
    return shrink(shadow.reshape(shape))


def cat(shadows: Sequence[Tensor], dim: int) -> Tensor:
    """Shadows one after another."""
    parts = [shadow for shadow in shadows if shadow.shape != (0,)] or list(shadows[:1])  # torch.cat skips these too
    dim = dim % parts[0].dim()
    sizes = list(parts[0].shape)
    sizes[dim] = sum(part.shape[dim] for part in parts)
    for axis in range(len(sizes)):
        if axis != dim and all(part.stride(axis) == 0 or part.shape[axis] == 1 for part in parts):
            parts = [part.narrow(axis, 0, min(1, part.shape[axis])) for part in parts]
    ends = [part for part in parts if part.shape[dim]]
    if ends and all(part.stride(dim) == 0 or part.shape[dim] == 1 for part in ends):
        first = ends[0].narrow(dim, 0, 1)
        if all(equal(first, part.narrow(dim, 0, 1)) for part in ends[1:]):
            return first.expand(sizes)
    return torch.cat(parts, dim).expand(sizes)


def stack(shadows: Sequence[Tensor], dim: int) -> Tensor:
    """Shadows along a new axis."""
    dim = dim % (shadows[0].dim() + 1)
    return cat([shadow.unsqueeze(dim) for shadow in shadows], dim)


def one_channel(shadow: Tensor) -> Tensor:
    """The first entry along the last axis, which must be like all the others."""
    if shadow.dim() == 0:
        return shadow
    first = shadow[..., :1]
    if not equal(shadow, first):
        raise UnknownError("its tokens lie among its channels where it is written into")
    return first


def one_per_token(shadow: Tensor, blank: int) -> Tensor | None:
    """The entry (B, S) of each token of (B, H, S, D) in all its heads and channels, or None if it has several.

    Channels or heads of zeros or of something else, padded or joined to it, are no other token.
    """
    first = shadow[:, :1, :, :1]
    if equal(shadow, first):
        return first[:, 0, :, 0]
    flat = compact(shadow).transpose(1, 2).flatten(2)
    highest = flat.amax(-1, keepdim=True)
    if not bool(((flat == highest) | (flat == blank)).all()):
        return None
    return highest[..., 0].expand(shadow.shape[0], shadow.shape[2])


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors lie in the same memory; those of subclasses without memory of their own do, if in doubt."""
    try:
        first, second = StorageWeakRef(one.untyped_storage()), StorageWeakRef(other.untyped_storage())  # type: ignore[no-untyped-call]
    except (RuntimeError, NotImplementedError):
        return True
    same: bool = first.cdata == second.cdata
    return same
