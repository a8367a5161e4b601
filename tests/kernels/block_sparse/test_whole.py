"""Short sequences in the plain-torch engine: one product over all pairs."""

import pytest
import torch

from salad_compile.kernels import block_sparse_attention
from salad_compile.kernels.block_sparse import reference, whole
from salad_compile.kernels.layout import ALL_BLOCKS
from salad_compile.kernels.selection import Selection
from tests.kernels.helpers import FORWARD_BAR, LAYOUTS, make_qkv, make_selection, relative_l2

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SCALE = 0.25


@pytest.fixture(autouse=True)
def _everything_is_short(_gathering: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "_MOST_PAIRS", 1 << 30)


@pytest.mark.parametrize("dtype", FORWARD_BAR)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("tokens", "blocks"), [(1, (16, 16)), (63, (64, 32)), (203, (32, 64)), (192, (64, 64))])
def test_equals_reference(tokens: int, blocks: tuple[int, int], layout: str, dtype: torch.dtype) -> None:
    for scale in (1.0, 4.0, 16.0):
        qkv = make_qkv(tokens, layout, dtype, scale=scale)
        selection = Selection(*make_selection(*qkv[:2], *blocks, 300), *blocks, SCALE)
        attended = whole.attend_whole(*qkv, selection)
        assert attended is not None
        exact = [x.double() for x in qkv]
        expected, expected_lse = reference.block_sparse_attention(*exact, selection)  # type: ignore[arg-type]
        assert relative_l2(attended[0], expected) < FORWARD_BAR[dtype]
        torch.testing.assert_close(attended[1].double(), expected_lse, rtol=1e-5, atol=1e-4)
        assert attended[0].stride() == (tokens * 48, 16, 48, 1)


@pytest.mark.parametrize("masked", [False, True])
def test_masks_text_and_short_lists(masked: bool) -> None:
    query, key, value = make_qkv(203)
    lut, count = make_selection(query, key, 64, 32, 400)
    count = count.clone()
    count[0, 0, 1], count[1, :, -1] = 1, ALL_BLOCKS
    mask = torch.rand(2, 203, generator=torch.Generator().manual_seed(1)) < 0.7 if masked else None
    if mask is not None:
        mask[:, 64:128] = True
        mask[:, :4] = True  # a valid key in every first block
    selection = Selection(lut, count, 64, 32, SCALE, mask)
    expected = reference.block_sparse_attention(query, key, value, selection)
    attended = whole.attend_whole(query, key, value, selection)
    if attended is None:  # a row has no key
        assert not bool(torch.isfinite(expected[1]).all())
        attended = block_sparse_attention(query, key, value, *selection)
    for ours, theirs in zip(attended, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_what_is_not_selected_does_not_reach_the_result() -> None:
    query, key, value = make_qkv(192)
    lut = torch.zeros(2, 3, 3, 1, dtype=torch.int32)  # all attend to the first block
    count = torch.ones(2, 3, 3, dtype=torch.int32)
    selection = Selection(lut, count, 64, 64, SCALE)
    expected, _ = block_sparse_attention(query, key, value, *selection)
    for tensor, bad in ((key, float("nan")), (key, float("inf")), (value, float("nan")), (value, float("inf"))):
        kept = tensor[:, :, 100].clone()
        tensor[:, :, 100] = bad
        out, _ = block_sparse_attention(query, key, value, *selection)
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
        tensor[:, :, 100] = kept


def test_a_row_without_keys_is_zero() -> None:
    query, key, value = make_qkv(128)
    lut, count = make_selection(query, key, 64, 64, 500)
    count = count.clone()
    count[0, 0, 0] = 0
    out, lse = block_sparse_attention(query, key, value, lut, count, 64, 64, SCALE)
    assert (out[0, 0, :64] == 0).all()
    assert (lse[0, 0, :64] == float("-inf")).all()
    assert torch.isfinite(lse[0, 0, 64:]).all()
