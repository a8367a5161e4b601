"""`salad::window_blocks`: the key blocks of a sliding window over the tokens in their order (specification 4.3)."""

import torch

from ..checks import check_permille, check_permille_type, require
from ..differentiation import without_gradient
from ..direct import direct
from ..layout import ALL_BLOCKS, block_count, empty_lists
from ..routing.density import check_density, touched_blocks
from .reach import doubled_reach, doubled_reach_of, list_width


@torch.library.custom_op("salad::window_blocks", mutates_args=())
@direct("salad::window_blocks")
def window_blocks(
    query: torch.Tensor,
    query_block: int,
    key_block: int,
    density_permille: int,
    window: int,
    sink_begin: int,
    sink_end: int,
    video_begin: int,
    video_end: int,
    permille: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The key blocks whose centre lies within `w` tokens of the query block's (specification 4.3; our choice).

    Whole blocks, clipped at the ends. Key blocks that overlap the query block always belong to it. w is `window`, or
    N (1 - sqrt(sparsity)) with N the video's tokens, which computes about density * N^2 pairs. Sinks as in
    `select_blocks`: blocks with text belong to every window, and query blocks with text attend to everything. Plain
    torch on every device: the list is the same for all heads, so it is small work. Not differentiable.

    Args:
        query: (B, H, S, D), any strides and dtype; only its shape and device are read.
        query_block, key_block: tokens per block; one divides the other.
        density_permille: 1000 * (1 - sparsity), in 0..1000.
        window: w in tokens, 1 or more, or 0 to derive it from the density.
        sink_begin, sink_end: positions of the text; none where they are equal.
        video_begin, video_end: positions of the video.
        permille: as in `select_blocks`; ignored with a `window`.

    Returns:
        lut: int32 (B, H, Mq, K), ids of the key blocks, ascending and unique. count: int32 (B, H, Mq), how many are
        valid, or ALL_BLOCKS (-1).

    Raises:
        KernelArgumentError: on wrong block sizes, density, window or ranges.
    """
    batch, heads, tokens, _ = query.shape
    check_density(query_block, key_block, density_permille)
    check_permille(permille, density_permille)
    require(window >= 0, f"window must be 0 or more tokens, got {window}")
    video = video_end - video_begin
    require(
        0 <= sink_begin <= sink_end <= tokens and 0 <= video_begin < video_end <= tokens,
        f"text [{sink_begin}, {sink_end}) and video [{video_begin}, {video_end}) must lie within {tokens} tokens",
    )
    query_blocks, key_blocks = block_count(tokens, query_block), block_count(tokens, key_block)
    blocks = (query_block, key_block)
    widest = doubled_reach(video, density_permille, window, *blocks)
    slots = list_width(key_blocks, widest, key_block, sink_begin, sink_end)
    reach = _reach_now(query, video, density_permille, window, blocks, permille)
    first, end = touched_blocks(sink_begin, sink_end, key_block)
    ids = torch.arange(key_blocks, dtype=torch.int32, device=query.device)
    centres = (2 * torch.arange(query_blocks, dtype=torch.int32, device=query.device) + 1) * query_block
    distance = ((2 * ids + 1) * key_block - centres[:, None]).abs()
    member = (distance <= reach) | ((ids >= first) & (ids < end))
    lut = torch.where(member, ids, key_blocks).sort(dim=-1).values[:, :slots]
    count = member.sum(dim=-1, dtype=torch.int32)
    lut = torch.where(lut == key_blocks, 0, lut)
    text = slice(*touched_blocks(sink_begin, sink_end, query_block))
    lut[text], count[text] = ids[:slots], ALL_BLOCKS
    return lut.expand(batch, heads, -1, -1).contiguous(), count.expand(batch, heads, -1).contiguous()


def _reach_now(
    query: torch.Tensor,
    video: int,
    density_permille: int,
    window: int,
    blocks: tuple[int, int],
    permille: torch.Tensor | None,
) -> torch.Tensor | int:
    """2 w, a tensor where the density is one: reading it would wait for the device."""
    if permille is None or window:
        return int(doubled_reach(video, density_permille, window, *blocks))
    return doubled_reach_of(permille.clamp(0, density_permille), video, *blocks)


@window_blocks.register_fake
def _(
    query: torch.Tensor,
    query_block: int,
    key_block: int,
    density_permille: int,
    window: int,
    sink_begin: int,
    sink_end: int,
    video_begin: int,
    video_end: int,
    permille: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_density(query_block, key_block, density_permille)
    check_permille_type(permille)
    batch, heads, tokens, _ = query.shape
    reach = doubled_reach(video_end - video_begin, density_permille, window, query_block, key_block)
    slots = list_width(block_count(tokens, key_block), reach, key_block, sink_begin, sink_end)
    return empty_lists(query, batch, heads, block_count(tokens, query_block), slots)


without_gradient(window_blocks)
