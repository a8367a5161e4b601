"""Stand-ins for the packages that `rivals.py` times: the same functions with the same arguments, in plain torch."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from salad_compile.kernels.block_sparse import reference
from salad_compile.kernels.selection import Selection


class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor | None = None
    full_block_idx: Tensor | None = None
    cu_total_m_blocks: Tensor | None = None
    cu_block_idx_offsets: Tensor | None = None
    block_size: tuple[int, int] | None = None


def sparse(query: Tensor, key: Tensor, value: Tensor, lut: Tensor, count: Tensor, blocks: tuple[int, int]) -> Any:
    selection = Selection(lut, count, *blocks, query.shape[-1] ** -0.5)
    return reference.block_sparse_attention(query, key, value, selection)


def listed(lut: Tensor) -> Tensor:
    return torch.full(lut.shape[:3], lut.shape[-1], dtype=torch.int32)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    block_sparse_tensors: BlockSparseTensorsTorch | None = None,
    block_sparse_tensors_bwd: BlockSparseTensorsTorch | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(B, S, H, D), as in flash_attn.cute.interface."""
    assert q.shape[1] > q.shape[2], "(B, S, H, D)"
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    if block_sparse_tensors is None:
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2), None
    lists = block_sparse_tensors
    assert not lists.mask_block_cnt.any()
    assert lists.full_block_cnt is not None
    assert lists.full_block_idx is not None
    assert lists.block_size is not None
    if block_sparse_tensors_bwd is not None:
        check_inverse(lists, block_sparse_tensors_bwd)
    lists_of = (lists.full_block_idx, lists.full_block_cnt, lists.block_size)
    selection = Selection(*lists_of[:2], *lists.block_size, softmax_scale or query.shape[-1] ** -0.5)
    out, lse = reference.block_sparse_attention(query, key, value, selection)
    return out.transpose(1, 2), lse


def check_inverse(lists: BlockSparseTensorsTorch, inverse: BlockSparseTensorsTorch) -> None:
    forward, backward = (
        reference.block_mask(x.full_block_idx, x.full_block_cnt, blocks)  # type: ignore[arg-type]
        for x, blocks in ((lists, inverse.mask_block_cnt.shape[2]), (inverse, lists.mask_block_cnt.shape[2]))
    )
    assert torch.equal(forward, backward.transpose(-1, -2))


def frontend_forward(
    q_tensor: Tensor, k_tensor: Tensor, v_tensor: Tensor, q2k_block_index: Tensor, *, sparse_block_size: int
) -> dict[str, Tensor]:
    assert all(x.is_contiguous() for x in (q_tensor, k_tensor, v_tensor, q2k_block_index))
    blocks = (sparse_block_size, sparse_block_size)
    out, lse = sparse(q_tensor, k_tensor, v_tensor, q2k_block_index, listed(q2k_block_index), blocks)
    return {"o_tensor": out, "lse_tensor": lse}


def frontend_backward(
    do_tensor: Tensor,
    q_tensor: Tensor,
    k_tensor: Tensor,
    v_tensor: Tensor,
    o_tensor: Tensor,
    lse_tensor: Tensor,
    q2k_block_index: Tensor,
    *,
    sparse_block_size: int,
) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q_tensor, k_tensor, v_tensor)]
    blocks = (sparse_block_size, sparse_block_size)
    with torch.enable_grad():
        out, lse = sparse(*leaves, q2k_block_index, listed(q2k_block_index), blocks)
    torch.testing.assert_close(out, o_tensor)
    torch.testing.assert_close(lse, lse_tensor)
    gradients = torch.autograd.grad(out, leaves, do_tensor)
    return dict(zip(("dq_tensor", "dk_tensor", "dv_tensor"), gradients, strict=True))


def fastvideo(q: Tensor, k: Tensor, v: Tensor, idx: Tensor, num: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    assert int(sizes.sum()) == k.shape[2]
    out, lse = sparse(q, k, v, idx, num, (64, 64))
    return out, lse


def sla(
    q: Tensor, k: Tensor, v: Tensor, block_id: Tensor, lut: Tensor, topk: int, query_block: int, key_block: int
) -> Tensor:
    assert topk == lut.shape[-1]
    assert torch.equal(block_id.bool(), reference.block_mask(lut, listed(lut), k.shape[2] // key_block))
    out: Tensor = sparse(q, k, v, lut, listed(lut), (query_block, key_block))[0]
    return out


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all of them importable."""
    frontend = SimpleNamespace(
        block_sparse_attention_forward=frontend_forward,
        block_sparse_attention_fp8_forward=frontend_forward,
        block_sparse_attention_backward=frontend_backward,
    )
    contents: dict[str, dict[str, Any]] = {
        "flash_attn": {},
        "flash_attn.cute": {},
        "flash_attn.cute.interface": {"flash_attn_func": flash_attn_func},
        "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": BlockSparseTensorsTorch},
        "fa3_fwd_interface": {"flash_attn_func": lambda q, k, v: flash_attn_func(q, k, v)[0]},
        "cudnn": {},
        "cudnn.block_sparse_attention": {"BSA": frontend},
        "fastvideo_kernel": {},
        "fastvideo_kernel.block_sparse_attn": {"block_sparse_attn_triton": fastvideo},
        "sparse_linear_attention": {},
        "sparse_linear_attention.kernel": {"_attention": SimpleNamespace(apply=sla)},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
