"""Text ranges and key masks: what they do to pooling and selection."""

import pytest
import torch

from salad_compile.kernels import KernelArgumentError, kept_blocks, pool_blocks, select_blocks
from salad_compile.kernels.block_choice import BlockChoice
from salad_compile.kernels.layout import ALL_BLOCKS
from salad_compile.kernels.routing import reference
from tests.kernels.helpers import BLOCKS, LAYOUTS, LENGTHS, make_qkv
from tests.kernels.routing.selection import check_selection, make_mask, pooled

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def sink_ranges(tokens: int) -> tuple[tuple[int, int], ...]:
    """Text behind, in front, in the middle; one token of it; none; nothing but text."""
    return (
        (tokens - min(tokens, 40), tokens),
        (0, min(tokens, 70)),
        (tokens // 3, tokens // 2),
        (tokens // 2, tokens // 2 + 1),
        (tokens // 2, tokens // 2),
        (0, tokens),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_masked_pool_equals_reference(tokens: int, layout: str) -> None:
    x, _, _ = make_qkv(tokens, layout)
    for block in (32, 64):
        mask = make_mask(tokens, block)
        expected = reference.pool_blocks(x, block, mask)
        torch.testing.assert_close(pool_blocks(x, block, mask), expected, rtol=1e-12, atol=1e-13)


def test_masked_rows_leave_the_mean() -> None:
    x, _, _ = make_qkv(203)
    mask = make_mask(203, 32)
    mask[:, 64:96] = False
    poisoned = x.masked_fill(~mask[:, None, :, None], float("nan"))
    means = pool_blocks(poisoned, 32, mask)
    for b in range(2):
        for i in range(7):
            rows = x[b, :, 32 * i : 32 * (i + 1)][:, mask[b, 32 * i : 32 * (i + 1)]]
            expected = rows.mean(dim=1) if rows.shape[1] else torch.zeros(3, 16, dtype=torch.float64)
            torch.testing.assert_close(means[b, :, i], expected)
    assert (means[:, :, 2] == 0).all()


def test_a_full_mask_is_no_mask() -> None:
    x, _, _ = make_qkv(203, dtype=torch.bfloat16)
    mask = torch.ones(2, 203, dtype=torch.bool)
    assert torch.equal(pool_blocks(x, 64, mask), pool_blocks(x, 64))
    query, key = pooled(203, 64, 32)
    plain = select_blocks(query, key, 64, 32, 300)
    masked = select_blocks(query, key, 64, 32, 300, 0, 0, mask)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(masked, plain, strict=True))


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("density", [0, 300, 1000])
def test_sinks_equal_reference(tokens: int, blocks: tuple[int, int], density: int) -> None:
    query, key = pooled(tokens, *blocks)
    for sinks in sink_ranges(tokens):
        check_selection(query, key, blocks, density, select_blocks(query, key, *blocks, density, *sinks), sinks)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_masked_selection_equals_reference(tokens: int, blocks: tuple[int, int]) -> None:
    query, key = pooled(tokens, *blocks)
    mask = make_mask(tokens, blocks[1])
    for density in (0, 300, 1000):
        for sinks in ((0, 0), (tokens - min(tokens, 40), tokens)):
            selection = select_blocks(query, key, *blocks, density, *sinks, mask)
            check_selection(query, key, blocks, density, selection, sinks, mask)


def test_sinks_come_on_top() -> None:
    query, key = pooled(64 * 20, 64, 64)
    plain, _ = select_blocks(query, key, 64, 64, 300)
    lut, count = select_blocks(query, key, 64, 64, 300, 64 * 17 + 1, 64 * 20)
    assert lut.shape[-1] == kept_blocks(20, 64, 64, 300) + 3 == plain.shape[-1] + 3
    assert (count[:, :, 17:] == ALL_BLOCKS).all()
    assert (count[:, :, :17] == lut.shape[-1]).all()
    assert torch.equal(lut[:, :, :17, -3:], torch.tensor([17, 18, 19], dtype=torch.int32).expand(2, 3, 17, 3))


def test_a_block_without_a_valid_key_is_never_selected() -> None:
    tokens = 64 * 12
    query, key = pooled(tokens, 64, 64)
    mask = torch.ones(2, tokens, dtype=torch.bool)
    mask[:, 64 * 5 : 64 * 6] = False
    lut, count = select_blocks(query, key, 64, 64, 1000, 64 * 2, 64 * 3, mask)
    expected = torch.tensor([j for j in range(12) if j != 5] + [0], dtype=torch.int32)
    assert torch.equal(lut[:, :, 0], expected.expand(2, 3, 12))
    assert count[0, 0].tolist() == [11, 11, ALL_BLOCKS] + [11] * 9


def test_nothing_valid_selects_nothing() -> None:
    query, key = pooled(64 * 5, 64, 64)
    mask = torch.zeros(2, 64 * 5, dtype=torch.bool)
    lut, count = select_blocks(query, key, 64, 64, 400, 0, 0, mask)
    assert (count == 0).all()
    assert (lut == 0).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf"), 1e38])
def test_bad_scores_outrank_neither_forced_blocks_nor_masks(poison: float) -> None:
    query, key = pooled(64 * 12, 64, 64, dtype=torch.float32)
    query, key = query.abs() + 0.1, key.abs() + 0.1
    key[:, :, 3] = poison
    key[:, :, 7] = float("inf")
    mask = torch.ones(2, 64 * 12, dtype=torch.bool)
    mask[:, 64 * 7 : 64 * 8] = False
    lut, count = select_blocks(query, key, 64, 64, 300, 64 * 11, 64 * 12, mask)
    assert (count[:, :, :11] == 4).all()
    assert (lut != 7).all()
    assert (lut[:, :, :11, 3] == 11).all()
    assert all(i in lut[b, h, i] for b in range(2) for h in range(3) for i in range(11) if i != 7)
    # 1e38 and inf are the best scores, NaN and -inf the worst
    assert ((lut[:, :, 4:11] == 3).any(-1) == (poison > 0)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sink_begin": 3, "sink_end": 2}, "ascending"),
        ({"sink_begin": -1, "sink_end": 2}, "within"),
        ({"sink_begin": 0, "sink_end": 257}, "within"),
        ({"key_mask": torch.ones(1, 256)}, "bool"),
        ({"key_mask": torch.ones(256, dtype=torch.bool)}, "2 dimensions"),
        ({"key_mask": torch.ones(2, 256, dtype=torch.bool)}, r"\(B, S\)"),
        ({"key_mask": torch.ones(1, 192, dtype=torch.bool)}, "key_mask has 192 tokens"),
        ({"key_mask": torch.ones(1, 256, dtype=torch.bool, device="meta")}, "one device"),
    ],
)
def test_selection_rejects(changes: dict[str, object], message: str) -> None:
    query, key = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)
    with pytest.raises(KernelArgumentError, match=message):
        select_blocks(query, key, 64, 64, 100, **changes)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 8), "bool"),
        (torch.ones(8, dtype=torch.bool), "2 dimensions"),
        (torch.ones(1, 8, dtype=torch.bool), r"\(B, S\)"),
        (torch.ones(2, 8, dtype=torch.bool, device="meta"), "one device"),
    ],
)
def test_pool_rejects(mask: torch.Tensor, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        pool_blocks(torch.randn(2, 1, 8, 4), 16, mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [65, 203, 1023])
def test_a_density_that_is_a_tensor(tokens: int, masked: bool) -> None:
    """The lists keep the width of the highest density; what is in them is the selection of the present one."""
    query, key = pooled(tokens, 64, 32)
    mask = make_mask(tokens, 32) if masked else None
    for sinks in ((0, 0), (0, 40), (tokens - 30, tokens)):
        for permille in (0, 100, 333, 600):
            now = torch.tensor(permille, dtype=torch.int32)
            lut, count = select_blocks(query, key, 64, 32, 600, *sinks, mask, now)
            widest = select_blocks(query, key, 64, 32, 600, *sinks, mask)[0]
            expected, expected_count = select_blocks(query, key, 64, 32, permille, *sinks, mask)
            assert lut.shape == widest.shape
            assert torch.equal(count, expected_count)
            valid = torch.arange(expected.shape[-1]) < count[..., None]
            assert torch.equal(lut[..., : expected.shape[-1]].masked_fill(~valid, 0), expected.masked_fill(~valid, 0))
            reference_lut, reference_count = reference.select_blocks(
                query, key, BlockChoice(64, 32, 600, *sinks, mask, now)
            )
            assert torch.equal(lut, reference_lut)
            assert torch.equal(count, reference_count)


def test_wrong_densities() -> None:
    query, key = pooled(70, 32, 32)
    for wrong, message in (
        (torch.tensor(300), "int32"),
        (torch.tensor([300], dtype=torch.int32), "without dimensions"),
        (torch.tensor(301, dtype=torch.int32), "0..300"),
    ):
        with pytest.raises(KernelArgumentError, match=message):
            select_blocks(query, key, 32, 32, 300, 0, 0, None, wrong)
