"""Which kind of attention call a site makes, and so what the eager twin must look for in its forward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from salad_compile.calls.adapters import AttentionArguments

# "" is a kind that nobody knows, or several kinds in one forward: the eager twin looks for all of them.
CallKind = Literal["", "sdpa", "flex", "products", "adapter"]

_SDPA = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
_FOUND_BY_NAME: frozenset[CallKind] = frozenset({"sdpa", "adapter"})


def kind_of(target: Any, arguments: AttentionArguments) -> CallKind:
    """Of one attention call of `target`."""
    if arguments.by_hand:
        return "products"
    if target is flex_attention:
        return "flex"
    return "sdpa" if target in _SDPA else "adapter"


def kind_among(kind: CallKind, others: Iterable[CallKind]) -> CallKind:
    """The kind of a call in a forward whose calls are `others`: unknown where looking for it alone would miscount."""
    alike = _FOUND_BY_NAME if kind in _FOUND_BY_NAME else {kind}
    return kind if alike >= set(others) else ""
