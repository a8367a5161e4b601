"""salad::block_sparse_attention, forward, against its definition and against PyTorch's dense attention."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from salad_compile.kernels import block_sparse_attention
from salad_compile.kernels.block_sparse import chunks, reference
from salad_compile.kernels.layout import ALL_BLOCKS
from salad_compile.kernels.selection import Selection
from tests.kernels.helpers import (
    ACCURACY,
    BLOCKS,
    FORWARD_BAR,
    LAYOUTS,
    LENGTHS,
    make_qkv,
    make_selection,
    relative_l2,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SCALE = 0.25


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_equals_reference(tokens: int, blocks: tuple[int, int]) -> None:
    expected = None
    for layout in LAYOUTS:  # of the same numbers
        qkv = make_qkv(tokens, layout)
        selection = Selection(*make_selection(*qkv[:2], *blocks), *blocks, SCALE)
        out, lse = block_sparse_attention(*qkv, *selection)
        if expected is None:
            expected, expected_lse = reference.block_sparse_attention(*qkv, selection)
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-11, atol=1e-12)
        assert out.transpose(1, 2).is_contiguous()
        assert lse.is_contiguous()


def masked_dense(
    qkv: tuple[torch.Tensor, ...], selection: tuple[torch.Tensor, ...], blocks: tuple[int, int]
) -> torch.Tensor:
    """PyTorch's own attention on the same selection, in the dtype of qkv."""
    mask = reference.token_mask(Selection(*selection, *blocks, 1.0), qkv[0].shape[2])
    return F.scaled_dot_product_attention(*qkv, attn_mask=mask)


@ACCURACY
def test_accuracy_bars(dtype: torch.dtype, scale: float) -> None:
    for tokens, blocks in ((1023, (128, 64)), (640, (128, 128))):
        qkv = make_qkv(tokens, dtype=dtype, head_dim=64, scale=scale)
        selection = make_selection(*qkv[:2], *blocks)
        out, lse = block_sparse_attention(*qkv, *selection, *blocks, 0.125)
        wide = [x.double() for x in qkv]
        expected, expected_lse = reference.block_sparse_attention(*wide, Selection(*selection, *blocks, 0.125))
        torch_error = relative_l2(masked_dense(qkv, selection, blocks), expected)
        bar = FORWARD_BAR[dtype] if scale == 1 else max(FORWARD_BAR[dtype], 1.5 * torch_error)
        assert out.dtype == dtype
        assert lse.dtype == torch.float32
        assert relative_l2(out, expected) <= bar
        assert (lse.double() - expected_lse).abs().max() <= 1e-6 * max(1, expected_lse.abs().max())


@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_sparsity_zero_is_dense_attention(dtype: torch.dtype, scale: float) -> None:
    qkv = make_qkv(1023, dtype=dtype, head_dim=64, scale=scale)
    selection = make_selection(*qkv[:2], 128, 64, 1000)
    exact = F.scaled_dot_product_attention(*(x.double() for x in qkv))
    torch_error = relative_l2(F.scaled_dot_product_attention(*qkv), exact)
    out, _ = block_sparse_attention(*qkv, *selection, 128, 64, 0.125)
    # PyTorch in fp64 is the yardstick itself, so its own error reads 0 there
    assert relative_l2(out, exact) <= max(1.5 * torch_error, 1e-13)


def test_lse_is_the_logarithm_of_the_denominator() -> None:
    qkv = make_qkv(203)
    selection = make_selection(*qkv[:2], 64, 64, 1000)
    _, lse = block_sparse_attention(*qkv, *selection, 64, 64, SCALE)
    torch.testing.assert_close(lse, (qkv[0] @ qkv[1].transpose(-1, -2) * SCALE).logsumexp(-1))


def test_value_width_may_differ() -> None:
    query, key, value = make_qkv(203)
    qkv = query, key, value[..., :5]
    selection = make_selection(query, key, 64, 64)
    out, _ = block_sparse_attention(*qkv, *selection, 64, 64, SCALE)
    expected, _ = reference.block_sparse_attention(*qkv, Selection(*selection, 64, 64, SCALE))
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)


def test_entries_past_count_are_ignored() -> None:
    qkv = make_qkv(331)
    lut, _ = make_selection(*qkv[:2], 64, 32, 700)
    count = torch.randint(0, lut.shape[-1] + 1, lut.shape[:3], generator=torch.Generator().manual_seed(3)).int()
    count[0, 0, 0], count[0, 0, 1] = 0, 1
    past = torch.arange(lut.shape[-1]) >= count[..., None]
    expected, expected_lse = reference.block_sparse_attention(*qkv, Selection(lut, count, 64, 32, SCALE))
    for filler in (0, -7, 10_000):
        out, lse = block_sparse_attention(*qkv, lut.masked_fill(past, filler), count, 64, 32, SCALE)
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-11, atol=1e-12)
    assert (expected[0, 0, :64] == 0).all()  # a query block without keys
    assert (lse[0, 0, :64] == float("-inf")).all()


def test_scores_far_from_zero() -> None:
    # exp(lse) overflows on one side and underflows on the other; the softmax must not care
    query, key, value = make_qkv(203, dtype=torch.float32)
    selection = make_selection(query, key, 64, 64)
    for shift in (-40.0, 40.0):
        qkv = torch.full_like(query, shift) + query, torch.full_like(key, 10.0) + key, value
        out, lse = block_sparse_attention(*qkv, *selection, 64, 64, SCALE)
        wide = [x.double() for x in qkv]
        expected, expected_lse = reference.block_sparse_attention(*wide, Selection(*selection, 64, 64, SCALE))
        assert expected_lse.abs().min() > 1000
        assert relative_l2(lse, expected_lse) < 1e-6
        assert relative_l2(out, expected) < 2e-3  # scores of 1,600 carry 1e-4 of absolute error in fp32


def test_chunking_does_not_show() -> None:
    # small blocks make many query blocks: several chunks per group, and a chunk that ends inside a head
    qkv = make_qkv(2000, head_dim=8)
    for permille in (100, 1000):
        selection = make_selection(*qkv[:2], 16, 16, permille)
        out, _ = block_sparse_attention(*qkv, *selection, 16, 16, SCALE)
        expected, _ = reference.block_sparse_attention(*qkv, Selection(*selection, 16, 16, SCALE))
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_head_groups_agree_with_one_head_at_a_time(dtype: torch.dtype) -> None:
    qkv = make_qkv(9000, dtype=dtype, batch=1, heads=4, head_dim=128)
    selection = make_selection(*qkv[:2], 128, 128, 30)
    out, lse = block_sparse_attention(*qkv, *selection, 128, 128, 0.1)
    for h in range(4):
        one = [x[:, h : h + 1] for x in (*qkv, *selection)]
        single, single_lse = block_sparse_attention(*one, 128, 128, 0.1)
        assert torch.equal(out[:, h : h + 1], single)
        assert torch.equal(lse[:, h : h + 1], single_lse)


@pytest.mark.parametrize(("scale", "dtype"), [(1.0, torch.bfloat16), (4.0, torch.float32), (16.0, torch.float32)])
@pytest.mark.parametrize("tokens", [640, 641])  # whole blocks of one head are written where they belong
def test_one_head_by_itself(tokens: int, scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 1 << 18)  # several chunks, the last of them short
    qkv = make_qkv(tokens, dtype=dtype, heads=1, head_dim=32, scale=scale)
    lut, count = make_selection(*qkv[:2], 64, 32)
    count = count.clone()
    count[0, 0, 3] = ALL_BLOCKS
    count[1, 0, 0] = 0
    selection = Selection(lut, count, 64, 32, 32**-0.5)
    out, lse = block_sparse_attention(*qkv, *selection)
    expected, expected_lse = reference.block_sparse_attention(*(x.double() for x in qkv), selection)
    assert relative_l2(out, expected) < FORWARD_BAR[dtype]
    empty = expected_lse == float("-inf")
    assert empty.any()
    assert torch.equal(lse == float("-inf"), empty)
    torch.testing.assert_close(lse[~empty].double(), expected_lse[~empty], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_show(threads: int) -> None:
    qkv = make_qkv(2048, dtype=torch.float32, batch=1, heads=1, head_dim=64)
    selection = Selection(*make_selection(*qkv[:2], 128, 128), 128, 128, SCALE)
    expected, _ = reference.block_sparse_attention(*(x.double() for x in qkv), selection)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out, _ = block_sparse_attention(*qkv, *selection)
    finally:
        torch.set_num_threads(before)
    assert relative_l2(out, expected) < FORWARD_BAR[torch.float32]


@pytest.mark.parametrize("tokens", [65, 1023])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_element_is_written(tokens: int, dtype: torch.dtype) -> None:
    qkv = make_qkv(tokens, dtype=dtype)
    selection = make_selection(*qkv[:2], 128, 64)
    out, lse = block_sparse_attention(*qkv, *selection, 128, 64, SCALE)
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()


def test_two_runs_are_bitwise_equal() -> None:
    qkv = make_qkv(1023, dtype=torch.float32)
    selection = make_selection(*qkv[:2], 128, 64)
    runs = [block_sparse_attention(*qkv, *selection, 128, 64, SCALE) for _ in range(3)]
    for out, lse in runs[1:]:
        assert torch.equal(out, runs[0][0])
        assert torch.equal(lse, runs[0][1])


def test_the_yardstick_is_not_the_math_kernel() -> None:
    # the dense rows of the accuracy bars use the kernel users get
    qkv = make_qkv(128, dtype=torch.bfloat16, head_dim=64)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        flash = F.scaled_dot_product_attention(*qkv)
    assert torch.equal(flash, F.scaled_dot_product_attention(*qkv))
