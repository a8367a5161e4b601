"""What the host does for the forward and for the backward of the Gluon engine."""

from __future__ import annotations

from functools import lru_cache

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..launch import launch
from ..layout import block_count, describable, descriptor_strides
from .gluon_mask import pack_mask_kernel
from .gluon_settings import BOX, KEY_BLOCK

_WORDS = 16  # key blocks whose mask one program packs


def pack_mask(key_mask: torch.Tensor) -> torch.Tensor:
    """int64 (B, W): a bit for every key of (B, S), a word for every key block."""
    batch, tokens = key_mask.shape
    words = block_count(tokens, KEY_BLOCK)
    packed = key_mask.new_empty((batch, words), dtype=torch.int64)
    grid = (-(-words // _WORDS), batch)
    arguments = (key_mask.contiguous(), packed, tokens, words)
    launch(pack_mask_kernel, grid, packed.device, *arguments, num_warps=4, WORDS=_WORDS)
    return packed


def describe(x: torch.Tensor) -> TensorDescriptor:
    """(B, H, S, D) in boxes of one head's rows; of a copy where the copy engine cannot read x itself."""
    if not describable(x):
        x = x.contiguous()
        x = x if describable(x) else x.clone()  # contiguous already, from an odd address on
    return TensorDescriptor(x, list(x.shape), descriptor_strides(x), [1, 1, BOX, BOX], _layout())


def describe_rows(numbers: torch.Tensor, count: int) -> TensorDescriptor:
    """(..., W) fp32, contiguous, as (N, W) in boxes of `count` numbers of a row."""
    width = numbers.shape[-1]
    return TensorDescriptor(numbers, [numbers.numel() // width, width], [width, 1], [1, count], _plain_layout())


@lru_cache(maxsize=1)
def _plain_layout() -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(0, 32, 2)


@lru_cache(maxsize=1)
def _layout() -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(128, 16, 4)


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """How many there are; 1 where launches are recorded, and run nowhere."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
