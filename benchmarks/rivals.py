"""Attention kernels of other projects, timed beside ours where they are installed.

Each function takes permuted (B, H, S, D) views and returns a call. Layout changes and feature maps that a kernel needs
are computed before the timing, to its advantage. A missing package raises ImportError, which becomes the row's error.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], object]


def installed(module: str) -> Any:
    """The module. Raises ImportError if it is missing or does not load."""
    return importlib.import_module(module)


def has_flash_attention_3() -> bool:
    """Whether the package flash_attn_interface is there."""
    return importlib.util.find_spec("flash_attn_interface") is not None


def flash_attention_3() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Dense attention of the package flash_attn_interface, which takes (B, S, H, D)."""
    attention = installed("flash_attn_interface").flash_attn_func

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        dense: Tensor = out[0] if isinstance(out, tuple) else out
        return dense.transpose(1, 2)

    return attend


def sla(query: Tensor, key: Tensor, value: Tensor, lut: Tensor, query_block: int, key_block: int) -> Call:
    """thu-ml/SLA's kernel on the same selection: sparse attention, and linear attention over what is left out."""
    attention = installed("sparse_linear_attention.kernel")._attention
    query, key, value, lut = (x.contiguous() for x in (query, key, value, lut))
    features = [torch.softmax(x, dim=-1) for x in (query, key)]
    blocks = -(-key.shape[2] // key_block)
    chosen = torch.zeros(*lut.shape[:3], blocks, dtype=torch.int8, device=lut.device)
    chosen.scatter_(-1, lut.long(), 1)
    slots = lut.shape[-1]
    return lambda: attention.apply(query, key, value, *features, chosen, lut, slots, query_block, key_block)


def fastvideo(query: Tensor, key: Tensor, value: Tensor, lut: Tensor, count: Tensor) -> Call:
    """FastVideo's block-sparse attention on the same selection: 64 x 64 blocks, padded to whole ones."""
    attend = installed("fastvideo_kernel.block_sparse_attn").block_sparse_attn_from_indices
    tokens = key.shape[2]
    padding = -tokens % 64
    padded = [torch.nn.functional.pad(x, (0, 0, 0, padding)).contiguous() for x in (query, key, value)]
    sizes = torch.full((lut.shape[2],), 64, dtype=torch.int32, device=lut.device)
    sizes[-1] = 64 - padding
    return lambda: attend(*padded, lut.contiguous(), count.contiguous(), sizes)[0]
