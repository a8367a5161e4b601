"""The same checks at the edge for every engine: tests/kernels/test_edges.py, and tests/kernels/gpu/test_edges.py."""

from __future__ import annotations

import pytest
import torch

from salad_compile.kernels import block_sparse_attention, linear_output, linear_state, pool_blocks, use_engine
from salad_compile.kernels.errors import KernelArgumentError
from tests.kernels.helpers import make_qkv, make_selection

BAD = (float("nan"), float("inf"), float("-inf"), 6e4)
TOKENS, SCALE = 113, 0.25


def mask_of(device: str) -> torch.Tensor:
    """A hole across blocks in one sample, the end of the other."""
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[0, 20:70], mask[1, 90:] = False, False
    return mask.to(device)


def attention(bad: float, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """out, lse and the three gradients with `bad` in masked keys and values."""
    mask = mask_of(device)
    query, key, value = (x.to(device) for x in make_qkv(TOKENS, dtype=dtype, head_dim=16))
    lut, count = (x.to(device) for x in make_selection(query.cpu(), key.cpu(), 32, 16))
    given = [query, *(x.masked_fill(~mask[:, None, :, None], bad) for x in (key, value))]
    given = [x.requires_grad_() for x in given]
    out, lse = block_sparse_attention(*given, lut, count, 32, 16, SCALE, mask)
    grad = make_qkv(TOKENS, dtype=dtype, head_dim=16, seed=3)[0].to(device)
    return [out, lse, *torch.autograd.grad(out, given, grad)]


def check_attention(bad: float, device: str, dtype: torch.dtype) -> None:
    """Bit for bit what it is with zeros there, and no gradient for what is masked."""
    expected, actual = attention(0.0, device, dtype), attention(bad, device, dtype)
    hidden = ~mask_of(device)[:, None, :, None]
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.isfinite().all()
        assert torch.equal(ours, theirs)
    for grad in actual[3:]:
        assert not grad.masked_select(hidden).any()


def check_pooling_and_state(bad: float, device: str, dtype: torch.dtype, feature_map: str = "relu") -> None:
    """Pooled means, state and its gradients."""
    mask = mask_of(device)
    results = []
    for filled in (0.0, bad):
        _, key, value = (x.to(device) for x in make_qkv(TOKENS, dtype=dtype, head_dim=16))
        key, value = (x.masked_fill(~mask[:, None, :, None], filled).requires_grad_() for x in (key, value))
        state, total = linear_state(key, value, feature_map, mask)
        grads = torch.autograd.grad((state.sum() + total.square().sum()), (key, value))
        results.append([pool_blocks(key.detach(), 16, mask), state, total, *grads])
    for ours, theirs in zip(*results[::-1], strict=True):
        assert ours.isfinite().all()
        assert torch.equal(ours, theirs)


def check_fp16_state(device: str, feature_map: str) -> None:
    """Sums far beyond the largest number of fp16, and their quotient within it."""
    query, key, value = (x.to(device).abs() * 300 + 100 for x in make_qkv(512, dtype=torch.float16, head_dim=16))
    state, total = linear_state(key, value, feature_map)
    out = linear_output(query, state, total, feature_map, 1e-6)
    wide = [x.double().cpu() for x in (query, key, value)]
    with use_engine("torch"):
        expected = linear_output(wide[0], *linear_state(*wide[1:], feature_map), feature_map, 1e-6)
    if feature_map != "softmax":
        assert state.max() > 65504
    assert out.dtype == torch.float16
    assert out.isfinite().all()
    torch.testing.assert_close(out.double().cpu(), expected, rtol=4e-3, atol=0)


def far_apart(x: torch.Tensor, step: int) -> torch.Tensor:
    """The same values, `step` elements from token to token; the pages between are never touched."""
    batch, heads, tokens, width = x.shape
    room = torch.empty(tokens * step, dtype=x.dtype, device=x.device)
    spread = room.as_strided((batch, heads, tokens, width), (heads * width, width, step, 1))
    spread.copy_(x)
    return spread


def check_far_strides(device: str, dtype: torch.dtype, step: int = 2**26) -> None:
    """Offsets beyond 2^31 elements: exact."""
    query, key, value = (x.to(device) for x in make_qkv(40, dtype=dtype, head_dim=16, batch=1, heads=1))
    lut, count = (x.to(device) for x in make_selection(query.cpu(), key.cpu(), 16, 16, 1000))
    assert 39 * step > 2**31

    def all_of(key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
        out = block_sparse_attention(query, key, value, lut, count, 16, 16, SCALE)[0]
        return [out, *linear_state(key, value, "relu"), pool_blocks(key, 16)]

    for ours, theirs in zip(all_of(far_apart(key, step), far_apart(value, step)), all_of(key, value), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def check_block_sizes(device: str) -> None:
    """Those of the README and no others."""
    query, key, value = (x.to(device) for x in make_qkv(64, dtype=torch.float32, head_dim=16))
    lut, count = (x.to(device) for x in make_selection(query.cpu(), key.cpu(), 32, 32))
    for block in (0, -16, 1, 8, 15, 48, 96, 512):
        for sizes in ((block, 32), (32, block)):
            with pytest.raises(KernelArgumentError, match="16, 32, 64, 128, 256"):
                block_sparse_attention(query, key, value, lut, count, *sizes, SCALE)
        with pytest.raises(KernelArgumentError, match="16, 32, 64, 128, 256"):
            pool_blocks(key, block)
