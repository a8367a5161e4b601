"""The engine "gluon": block-sparse attention for Hopper, in Gluon, Triton's lower language."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from ..launch import interpreting, recording
from ..layout import block_count
from ..pools import Pools
from ..selection import Selection
from .call import Call
from .engine import GateCall, implementation

_ARCH = (9, 0)
_FORWARD = ("block_sparse_attention", "attend_with_tail")
_KEY_BLOCK, _QUERY_BLOCKS, _HEAD_DIMS = 64, (64, 128), (64, 128)
_POOLS = 5  # of the gate's calls


class GluonEngine:
    """Kernels with specialised warps; what they do not take stays on the Triton kernels."""

    name = "gluon"
    operators = frozenset(
        {"block_sparse_attention", "block_sparse_attention_backward", "attend_with_tail", "attend_with_tail_backward"}
    )

    def supports(self, call: Call) -> str | None:
        """See `Engine`."""
        if interpreting():
            return "Triton interprets in this process, and cannot interpret Gluon"
        if call.device.type != "cuda" and not recording():
            return f"the tensors are on {call.device}, and it needs a GPU"
        if call.arch != _ARCH:
            return f"it is for compute capability 9.0, and {call.device} has {call.arch[0]}.{call.arch[1]}"
        if call.dtype != torch.bfloat16:
            return f"it takes bfloat16, whose range its softmax needs, and not {call.dtype}"
        if call.head_dim not in _HEAD_DIMS or call.value_dim != call.head_dim:
            return f"it takes head_dims 64 and 128, alike for values, and not {call.head_dim} and {call.value_dim}"
        if call.query_block not in _QUERY_BLOCKS or call.key_block != _KEY_BLOCK:
            blocks = f"{call.query_block} and {call.key_block}"
            return f"it takes query blocks of 64 and 128 tokens and key blocks of 64, and not {blocks}"
        if call.masked and call.head_dim == 64 and call.operator in _FORWARD:
            return "with a key mask and head_dim 64 the Triton kernel is faster"
        return None

    def run(self, call: Call, *arguments: Any) -> Any:
        """See `Engine`."""
        return implementation(call.operator, self.name)(*arguments)

    def gate_calls(self, arch: int) -> Iterator[GateCall]:
        """Every build there is. Lengths are no part of a build; here none is a multiple of 16."""
        if divmod(arch, 10) != _ARCH:
            return
        batch, heads, tokens, meta = 2, 3, 1001, torch.device("meta")
        for head_dim, query_block, masked in itertools.product(_HEAD_DIMS, _QUERY_BLOCKS, (False, True)):
            x = torch.empty((batch, tokens, heads, head_dim), dtype=torch.bfloat16, device=meta).transpose(1, 2)
            lut = torch.empty((batch, heads, block_count(tokens, query_block), 3), dtype=torch.int32, device=meta)
            mask = torch.empty((batch, tokens), dtype=torch.bool, device=meta) if masked else None
            selection = Selection(lut, lut[..., 0], query_block, _KEY_BLOCK, 0.125, mask)
            sizes = (head_dim, head_dim, query_block, _KEY_BLOCK)
            words = f"bfloat16 d{head_dim} {query_block}x{_KEY_BLOCK}{' mask' * masked}"
            lse = torch.empty((batch, heads, tokens), device=meta)
            means = torch.empty((batch, heads, _POOLS, head_dim), dtype=torch.bfloat16, device=meta)
            weight = torch.empty(heads, device=meta)
            pools = Pools(means, means, torch.empty((*lut.shape[:3], _POOLS), device=meta), weight)
            for operator, arguments in (
                ("block_sparse_attention", (x, x, x, selection)),
                ("block_sparse_attention_backward", (x, x, x, x, x, lse, selection)),
                ("attend_with_tail", (x, x, x, pools, selection)),
                ("attend_with_tail_backward", (x, x, x, x, x, lse, pools, selection)),
            ):
                call = Call(operator, meta, torch.bfloat16, *sizes, masked=masked)
                if not (masked and head_dim == 64 and operator in _FORWARD):
                    yield GateCall(call, f"{operator} {words}", arguments)
