"""Pooled inputs, and what every selection must satisfy: the same for all engines."""

import torch

from salad_compile.kernels.block_choice import BlockChoice
from salad_compile.kernels.layout import ALL_BLOCKS
from salad_compile.kernels.routing import reference


def pooled(
    tokens: int,
    query_block: int,
    key_block: int,
    seed: int = 0,
    *,
    batch: int = 2,
    heads: int = 3,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """pooled_query and pooled_key of a sequence of `tokens` tokens."""
    generator = torch.Generator().manual_seed(seed)
    query_blocks, key_blocks = -(-tokens // query_block), -(-tokens // key_block)
    query = torch.randn(batch, heads, query_blocks, head_dim, generator=generator, dtype=torch.float64)
    key = torch.randn(batch, heads, key_blocks, head_dim, generator=generator, dtype=torch.float64)
    return query.to(dtype), key.to(dtype)


def make_mask(tokens: int, block: int, batch: int = 2, seed: int = 2) -> torch.Tensor:
    """A key mask whose valid tokens leave some blocks without any; sequence 0 has few of them."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-tokens // block)
    shares = torch.linspace(0.25, 0.8, batch)[:, None] if batch > 1 else torch.full((1, 1), 0.5)
    present = torch.rand(batch, blocks, generator=generator) < shares
    present[:, 0] = True
    rows = torch.rand(batch, tokens, generator=generator) < 0.7
    mask = rows & present.repeat_interleave(block, dim=1)[:, :tokens]
    mask[:, 0] = True
    return mask


def check_selection(
    query: torch.Tensor,
    key: torch.Tensor,
    blocks: tuple[int, int],
    density: int,
    selection: tuple[torch.Tensor, torch.Tensor],
    sinks: tuple[int, int] = (0, 0),
    key_mask: torch.Tensor | None = None,
) -> None:
    """The selection is as good as the reference's, and as the operator says: ascending, forced, masked, dense."""
    lut, count = (x.cpu() for x in selection)
    query, key = query.cpu().double(), key.cpu().double()
    expected, expected_count = reference.select_blocks(query, key, BlockChoice(*blocks, density, *sinks, key_mask))
    assert lut.dtype == count.dtype == torch.int32
    assert lut.shape == expected.shape
    assert torch.equal(count, expected_count)

    query_blocks, key_blocks, slots = query.shape[2], key.shape[2], lut.shape[-1]
    valid = torch.arange(slots) < count[..., None]
    assert ((lut.diff(dim=-1) > 0) | ~valid[..., 1:]).all()
    assert lut.min() >= 0
    assert lut.max() < key_blocks
    dense = reference.hold_tokens(query_blocks, blocks[0], *sinks)
    assert torch.equal(count == ALL_BLOCKS, dense.expand_as(count))
    unused = torch.where(dense[:, None], torch.arange(slots), 0)
    assert (torch.where(valid, 0, lut - unused) == 0).all()

    chosen = torch.zeros(*lut.shape[:3], key_blocks + 1, dtype=torch.bool)
    chosen = chosen.scatter_(-1, torch.where(valid, lut, key_blocks).long(), True)[..., :-1]
    wanted = reference.overlap(query_blocks, key_blocks, *blocks) | reference.hold_tokens(key_blocks, blocks[1], *sinks)
    wanted = (wanted & ~dense[:, None]).expand_as(chosen)
    if key_mask is not None:
        possible = reference.valid_blocks(key_mask, blocks[1])[:, None, None]
        assert not (chosen & ~possible).any()
        wanted = wanted & possible
    assert (chosen | ~wanted).all()
    # Ties may resolve either way, and rounding may reverse what nearly ties: scores are compared, not ids.
    scores = query @ key.transpose(-1, -2)
    ours, theirs = (scores.gather(-1, ids.long()).masked_fill(~valid, 0).sort(dim=-1).values for ids in (lut, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
