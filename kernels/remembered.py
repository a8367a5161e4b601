"""What is known of the contents of tensors that were checked or made here, so that they are read once.

A fact holds for one tensor object as long as torch counts no write into it. Tensors of inference mode, whose writes
torch does not count, are never known.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import NamedTuple

import torch

_MOST = 1024  # then it starts anew


class _Entry(NamedTuple):
    tensor: weakref.ref[torch.Tensor]
    version: int
    fact: Hashable


_entries: dict[int, _Entry] = {}  # by id, which a later tensor may have: the reference tells


def remember(tensor: torch.Tensor, fact: Hashable) -> None:
    """From now on :func:`fact_of` of this tensor is `fact`, until something writes into it."""
    if tensor.is_inference():
        return
    if len(_entries) >= _MOST:
        _entries.clear()
    _entries[id(tensor)] = _Entry(weakref.ref(tensor), tensor._version, fact)


def fact_of(tensor: torch.Tensor) -> Hashable:
    """What was remembered last of this very tensor; None if nothing was, or if it was written into since."""
    entry = _entries.get(id(tensor))
    if entry is None or entry.tensor() is not tensor or entry.version != tensor._version:
        return None
    return entry.fact
