"""Padding masks and query blocks that attend to everything, in the plain-torch engine."""

import pytest
import torch

from salad_compile.kernels import block_sparse_attention, measure_executions
from salad_compile.kernels.block_sparse import reference
from salad_compile.kernels.block_sparse import torch as engine
from salad_compile.kernels.layout import ALL_BLOCKS
from salad_compile.kernels.selection import Selection
from tests.kernels.helpers import make_qkv, make_selection

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SCALE = 0.25


def random_mask(tokens: int) -> torch.Tensor:
    """One sample with holes, one without any valid key."""
    mask = torch.rand(2, tokens, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[0, : tokens // 4] = False
    mask[1] = False
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("text_blocks", [0, 2])
@pytest.mark.parametrize("blocks", [(64, 64), (128, 32), (32, 64)])
def test_equals_reference(
    blocks: tuple[int, int], text_blocks: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from salad_compile.kernels.block_sparse import chunks

    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 1 << 18)  # several chunks
    tokens = 333
    qkv = make_qkv(tokens, grad=True)
    key_mask = random_mask(tokens) if masked else None
    lut, count = make_selection(*qkv[:2], *blocks, 300)
    count = count.clone()
    if text_blocks:
        count[:, :, -text_blocks:] = ALL_BLOCKS
        count[0, 1, 0] = ALL_BLOCKS
        lut = lut.clone()
        lut[0, 1, 0] = -7  # ignored where everything is attended to
    selection = Selection(lut, count, *blocks, SCALE, key_mask)
    out, lse = block_sparse_attention(*qkv, *selection)
    selection = selection._replace(lut=lut.masked_fill(lut < 0, 0))
    expected, expected_lse = reference.block_sparse_attention(*qkv, selection)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-11, atol=1e-12)
    grad = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(5))
    for ours, theirs in zip(torch.autograd.grad(out, qkv, grad), torch.autograd.grad(expected, qkv, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
    if masked:
        assert (out[1] == 0).all()


def test_dense_rows_count_as_computed() -> None:
    query, key, value = make_qkv(203)
    lut, count = make_selection(query, key, 64, 64, 0)
    count = count.clone()
    count[:, :, 3] = ALL_BLOCKS
    with measure_executions() as executions:
        block_sparse_attention(query, key, value, lut, count, 64, 64, SCALE)
    own = 3 * 64 * 64
    assert executions[0].computed_pairs == 2 * 3 * (own + 11 * 203)


def test_no_dense_row_costs_no_second_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    group = engine._forward_group
    monkeypatch.setattr(engine, "_forward_group", lambda *a: calls.append(a) or group(*a))
    query, key, value = make_qkv(203)
    block_sparse_attention(query, key, value, *make_selection(query, key, 64, 64), 64, 64, SCALE)
    assert len(calls) == 2  # one for each sample
