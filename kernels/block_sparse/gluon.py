"""Host side of the Gluon engine of block-sparse attention: Hopper, bf16, forward only. Reads no tensor's values."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..launch import launch, recording
from ..layout import block_count, describable, descriptor_strides, empty_bshd
from ..selection import Selection
from .deferred import check_selection
from .gluon_kernel import gluon_forward_kernel
from .gluon_mask import pack_mask_kernel
from .gluon_settings import BOX, KEY_BLOCK, Settings, settings_of

_WORDS = 16  # key blocks whose mask one program packs
_SMALLEST_SCALE = 2.0**-100  # of a score it leaves nothing, and of -inf it leaves -inf, which 0 would turn into NaN
_repairs: dict[torch.device, torch.Tensor] = {}
_tiles: dict[torch.device, int] = {}


def block_sparse_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, selection: Selection
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.block_sparse_attention`; only for what the engine supports.

    Without a mask there are two launches: the second computes again, with the online softmax, the tiles whose scores
    grew too far beyond those of their first step. Mostly there is none, and it ends at once.
    """
    batch, heads, tokens, head_dim = query.shape
    lut, count, scale = selection.lut.contiguous(), selection.count.contiguous(), selection.scale
    if scale < 0:  # the kernels take the largest score before they scale it
        query, scale = -query, -scale
    check_selection(lut, count, block_count(tokens, KEY_BLOCK))
    out = empty_bshd(query, batch, heads, tokens, head_dim)
    lse = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    total, masked = count.numel(), selection.key_mask is not None
    mask = redo = counts = None
    if selection.key_mask is not None:
        mask = _pack(selection.key_mask)
    else:
        redo, counts = lut.new_zeros(1 + 2 * total), _counts(query.device, total)
    arguments = (*map(_describe, (query, key, value, out)), lse, lut, count, mask, redo, counts)
    lengths = (lut.shape[2], heads, total, lut.shape[-1], tokens)

    def run(settings: Settings) -> None:
        grid = (min(_multiprocessors(query.device), -(-total // settings.rings)),)
        options: dict[str, Any] = {"num_warps": 4, "SETTINGS": settings}
        scale_log2 = max(scale, _SMALLEST_SCALE) * math.log2(math.e)
        launch(gluon_forward_kernel, grid, query.device, *arguments, *lengths, scale_log2, **options)

    run(settings_of(head_dim, selection.query_block, masked=masked))
    if not masked:
        run(settings_of(head_dim, selection.query_block, masked=False, repair=True))
    return out, lse


def repairs(device: torch.device) -> tuple[int, int, int]:
    """How often tiles were computed again on a CUDA device, as far as it has come: it is not waited for.

    Returns:
        tiles redone, calls that redid any, and the tiles of all calls, where a replay of a CUDA graph is not a call.
    """
    device = torch.device(device.type, torch.cuda.current_device() if device.index is None else device.index)
    counted = _repairs[device].tolist() if device in _repairs else [0, 0]
    return counted[0], counted[1], _tiles.get(device, 0)


def _counts(device: torch.device, total: int) -> torch.Tensor:
    """Host memory that the device counts in, as `deferred` has: device memory would belong to a captured graph."""
    if recording():
        return torch.empty(2, dtype=torch.int64, device=device)
    if device not in _repairs:
        _repairs[device] = torch.zeros(2, dtype=torch.int64, pin_memory=True)
    _tiles[device] = _tiles.get(device, 0) + total
    return _repairs[device]


def _pack(key_mask: torch.Tensor) -> torch.Tensor:
    """int64 (B, W): a bit for every key of (B, S), a word for every key block."""
    batch, tokens = key_mask.shape
    words = block_count(tokens, KEY_BLOCK)
    packed = key_mask.new_empty((batch, words), dtype=torch.int64)
    grid = (-(-words // _WORDS), batch)
    arguments = (key_mask.contiguous(), packed, tokens, words)
    launch(pack_mask_kernel, grid, packed.device, *arguments, num_warps=4, WORDS=_WORDS)
    return packed


def _describe(x: torch.Tensor) -> TensorDescriptor:
    """(B, H, S, D) in boxes of one head's rows; of a copy where the copy engine cannot read x itself."""
    if not describable(x):
        x = x.contiguous()
        x = x if describable(x) else x.clone()  # contiguous already, from an odd address on
    return TensorDescriptor(x, list(x.shape), descriptor_strides(x), [1, 1, BOX, BOX], _layout())


@lru_cache(maxsize=1)
def _layout() -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(128, 16, 4)


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # launches are recorded, and run nowhere
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
