"""Whether the rows of a query projection's input are the tokens of the attention call, and in which order of axes.

The gate of a token is computed from its row of the projection's input, (..., C). The leading axes of that may stand in
another order than batch and tokens (sequence first, space before time): `axes` names the permutation that puts them
right, as text, "" for none.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

# Private; seen in torch 2.11 and 2.13 (tests/salad_compile/position/test_private_names.py).
from torch._subclasses.fake_tensor import unset_fake_temporarily

OTHER_TOKENS = (
    "the gate of each token is computed from its row of the query projection's input, and between projection and "
    "attention the tokens are moved in a way that no order of that input's axes gives: move them before the projections"
)

FOREIGN_TOKENS = (
    "some tokens of the attention come from no one row of its query projection, as far as torch shows: padded or mixed "
    "tokens, or a kernel of the model's own between projection and attention"
)


def find_axes(rows: Tensor, leading: Sequence[int]) -> str | None:
    """The permutation of the leading axes that gives these rows, or None if there is none.

    Args:
        rows: int64 (B, S), which row of the flattened input each token is. leading: sizes of the input's axes but C.
    """
    count = len(leading)
    identity = tuple(range(count))
    candidates = sorted(
        itertools.permutations(identity) if count <= 4 else [identity],
        # an axis of size one may stand anywhere: where it is the only sample, take it for the samples
        key=lambda axes: (leading[axes[0]] != rows.shape[0], axes),
    )
    if identity in candidates and leading[0] != rows.shape[0] and rows.shape[0] > 1:
        candidates.insert(0, identity)
    for axes in candidates:
        if not row_fault(rows, leading, encode_axes(axes)):
            return encode_axes(axes)
    return None


def encode_axes(axes: Sequence[int]) -> str:
    """As text."""
    return "" if list(axes) == list(range(len(axes))) else " ".join(map(str, axes))


def decode_axes(axes: str, count: int) -> list[int]:
    """Inverse of :func:`encode_axes`, of an input with `count` leading axes."""
    return [int(axis) for axis in axes.split()] or list(range(count))


def row_fault(rows: Tensor, leading: Sequence[int], axes: str) -> str:
    """Why these are not the rows of the permuted input, or the empty string. Arguments: see :func:`find_axes`."""
    with unset_fake_temporarily():
        order = decode_axes(axes, len(leading))
        if len(order) != len(leading) or torch.Size(leading).numel() != rows.numel():
            return f"the query projection sees {tuple(leading)} rows, the attention {tuple(rows.shape)} tokens"
        expected = torch.arange(rows.numel(), device="cpu").view(*leading).permute(order).reshape(rows.shape)
        if bool((rows < 0).any()):
            return FOREIGN_TOKENS
        return "" if torch.equal(rows, expected) else OTHER_TOKENS
