"""The Gluon kernel for the gradients of keys and values: two key blocks at a time, for each a group of four warps.

Each group has a list, a ring of buffers and a warp that fetches the query rows of the blocks that attend to its key
block. `triton_backward.py` has the formulas. The scores are held transposed, keys by queries: then weights and their
gradients are left factors of the next products as they stand in registers.
"""

from collections import namedtuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_consumer import store_tile
from .gluon_language import barrier, barriers, load_box, numbers_box, stats_row
from .gluon_lists import following
from .gluon_loader import load_rows

# rows, start: see inverted_index.py; order (B * H, Mk): key blocks of a head, the longest runs first; mask (B, S) bool
# or None; next_tile: int32, how many were taken of total = B * H * Mk; blocks: of 64 queries, as stats has them
Inverted = namedtuple(
    "Inverted",
    ["rows", "start", "order", "mask", "next_tile", "total", "heads", "tokens", "key_blocks", "capacity", "blocks"],
)
Sources = namedtuple("Sources", ["query", "key", "value", "grad", "stats"])
Results = namedtuple("Results", ["key", "value"])
Shared = namedtuple(
    "Shared", ["key", "value", "query", "grad", "stats", "out", "tile", "tile_full", "tile_free", "full", "free"]
)
_NUMBER: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
_NUMBERS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])


@gluon.jit
def run_of(lists, tile):
    """The rows of a head, where the run of a key block begins, its length, where what follows it begins, all entries.

    What follows are the query blocks that attend to everything, which are in no other run.
    """
    block, group = tile % lists.key_blocks, (tile // lists.key_blocks).to(gl.int64)
    start = lists.start + group * (lists.key_blocks + 2)
    begin = gl.load(start + block)
    listed = gl.load(start + block + 1) - begin
    dense_begin = gl.load(start + lists.key_blocks)
    entries = listed + gl.load(start + lists.key_blocks + 1) - dense_begin
    return lists.rows + group * lists.capacity, begin, listed, dense_begin, entries


@gluon.jit
def take_tile(lists):
    """The next key block: which warp gets it is chance, what is computed for it is not."""
    number = gl.atomic_add(lists.next_tile, 1)
    exists = number < lists.total
    block = gl.load(lists.order + number, mask=exists, other=0)
    return gl.where(exists, number - number % lists.key_blocks + block, lists.total)


@gluon.jit
def hand_over(shared, tile, phase, RING: gl.constexpr):
    """Once the ring's group needs neither keys nor values nor the number of the key block before, give it the next."""
    mbarrier.wait(shared.tile_free.index(RING), phase)
    shared.tile.index(RING).store(gl.full([1], tile, gl.int32, _NUMBER))
    barrier()


@gluon.jit
def load_queries(sources, shared, lists, RING: gl.constexpr, C: gl.constexpr):
    """A stage for every 64 query rows: the rows, the gradients of their outputs, stats. Keys and values once.

    The first stages of a key block are on their way before the group is done with the key block before.
    """
    PARTS: gl.constexpr = C.query_block // 64
    STAGES: gl.constexpr = RING * C.stages
    slot, phase, tile_phase = 0, 1, 1
    tile_full = shared.tile_full.index(RING)
    tile = take_tile(lists)
    while tile < lists.total:
        block, group = tile % lists.key_blocks, tile // lists.key_blocks
        head, batch = group % lists.heads, group // lists.heads
        rows, begin, listed, dense_begin, entries = run_of(lists, tile)
        final = gl.maximum(entries - 1, 0)
        upcoming = gl.load(rows + gl.where(listed > 0, begin, dense_begin), mask=entries > 0, other=0)
        steps = gl.maximum(entries * PARTS, 1)
        for part in range(0, steps):
            start = upcoming * C.query_block + part % PARTS * 64
            entry = gl.minimum((part + 1) // PARTS, final)
            place = gl.where(entry < listed, begin + entry, dense_begin + entry - listed)
            upcoming = gl.load(rows + place, mask=entries > 0, other=0)
            # nobody attends: rows and stats beyond the end, which arrive as zeros and add nothing
            start = gl.where(entries > 0, start, lists.blocks * 64)
            stats = gl.where(entries > 0, group * lists.blocks + start // 64, 1 << 30)
            full = shared.full.index(STAGES + slot)
            mbarrier.wait(shared.free.index(STAGES + slot), phase)
            mbarrier.expect(full, 2 * C.tile_bytes + 512)
            load_rows(sources.query, batch, head, start, full, shared.query.index(STAGES + slot), C)
            numbers = numbers_box(shared.stats.index(STAGES + slot), 128, sources.stats)
            load_box(sources.stats, [stats, 0], full, numbers)
            load_rows(sources.grad, batch, head, start, full, shared.grad.index(STAGES + slot), C)
            slot, phase = following(slot, phase, C.stages)
            if part == gl.minimum(steps, C.stages) - 1:
                hand_over(shared, tile, tile_phase, RING)
                mbarrier.expect(tile_full, 2 * C.tile_bytes)
                load_rows(sources.key, batch, head, block * 64, tile_full, shared.key.index(RING), C)
                load_rows(sources.value, batch, head, block * 64, tile_full, shared.value.index(RING), C)
        tile_phase ^= 1
        tile = take_tile(lists)
    hand_over(shared, tile, tile_phase, RING)
    mbarrier.arrive(tile_full, count=1)


@gluon.jit
def tile_of_group(shared, RING: gl.constexpr):
    """The key block that the ring's loader has taken; as many as there are if none was left."""
    return gl.max(shared.tile.index(RING).load(_NUMBERS), 0)


@gluon.jit
def issue_scores(shared, number, key, value):
    """Begin scores and gradients of the weights, 64 keys x 64 queries of a stage."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    zero = gl.zeros([64, 64], gl.float32, layout)
    query, grad = shared.query.index(number), shared.grad.index(number)
    scores = warpgroup_mma(key, query.permute((1, 0)), zero, use_acc=False, is_async=True)
    return scores, warpgroup_mma(value, grad.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def issue_sums(shared, number, scores, grads, grad_value, grad_key, scale_log2, bias, POOLS: gl.constexpr):
    """What a stage adds to both sums, from its scores; grads are in flight still, and grad_key is afterwards.

    bias: with POOLS in the place of keys, what is added to the scores of each.

    The sum of values runs while the gradients of the scores are computed. The other sum is left to run beside the
    scores of the next step: its wait would stop the group once a step.
    """
    columns: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
    left_layout: gl.constexpr = gl.DotOperandLayout(0, grad_value.type.layout, 2)
    query, grad = shared.query.index(number), shared.grad.index(number)
    lse = stats_row(shared.stats.index(number), 0).load(columns)
    if POOLS:
        weights = gl.exp2(scores * scale_log2 + bias[:, None] - lse[None, :])
    else:
        weights = gl.exp2(scores * scale_log2 - lse[None, :])
    left = gl.convert_layout(weights.to(gl.bfloat16), left_layout)
    value_sum = warpgroup_mma(left, grad, grad_value, is_async=True)
    grads = warpgroup_mma_wait(1, deps=(grads,))
    delta = stats_row(shared.stats.index(number), 1).load(columns)
    grad_left = gl.convert_layout((weights * (grads - delta[None, :])).to(gl.bfloat16), left_layout)
    key_sum = warpgroup_mma(grad_left, query, grad_key, is_async=True)
    return warpgroup_mma_wait(1, deps=(value_sum,)), key_sum


@gluon.jit
def multiply_queries(results, shared, lists, scale, scale_log2, RING: gl.constexpr, C: gl.constexpr):
    """Sums over all query rows that attend to 64 keys, 64 rows a step."""
    HEAD_DIM: gl.constexpr = C.head_dim  # shapes take no attributes
    STAGES: gl.constexpr = RING * C.stages
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.head_dim, 16])
    key, value = shared.key.index(RING), shared.value.index(RING)
    tile_full, tile_free = shared.tile_full.index(RING), shared.tile_free.index(RING)
    slot, phase, tile_phase = 0, 0, 0
    mbarrier.wait(tile_full, tile_phase)
    tile = tile_of_group(shared, RING)
    while tile < lists.total:
        _rows, _begin, _listed, _dense_begin, entries = run_of(lists, tile)
        steps = gl.maximum(entries * (C.query_block // 64), 1)
        grad_key = gl.zeros([64, HEAD_DIM], gl.float32, out_layout)
        grad_value = gl.zeros([64, HEAD_DIM], gl.float32, out_layout)
        mbarrier.wait(shared.full.index(STAGES + slot), phase)
        scores, grads = issue_scores(shared, STAGES + slot, key, value)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        grad_value, key_sum = issue_sums(
            shared, STAGES + slot, scores, grads, grad_value, grad_key, scale_log2, 0.0, False
        )
        for _ in range(1, steps):
            read = slot
            slot, phase = following(slot, phase, C.stages)
            mbarrier.wait(shared.full.index(STAGES + slot), phase)
            scores, grads = issue_scores(shared, STAGES + slot, key, value)
            scores = warpgroup_mma_wait(1, deps=(scores,))  # with it the last product of the step before is done
            mbarrier.arrive(shared.free.index(STAGES + read), count=1)
            grad_value, key_sum = issue_sums(
                shared, STAGES + slot, scores, grads, grad_value, key_sum, scale_log2, 0.0, False
            )
        grad_key = warpgroup_mma_wait(0, deps=(key_sum,))
        mbarrier.arrive(shared.free.index(STAGES + slot), count=1)
        slot, phase = following(slot, phase, C.stages)

        tile = tile_of_group(shared, RING)  # again: it would take a register through the loop
        mbarrier.arrive(tile_free, count=1)
        block, group = tile % lists.key_blocks, tile // lists.key_blocks
        head, batch = group % lists.heads, group // lists.heads
        if C.masked:
            row = block * 64 + gl.arange(0, 64, gl.SliceLayout(1, out_layout))
            pointers = lists.mask + batch.to(gl.int64) * lists.tokens + row
            visible = (gl.load(pointers, mask=row < lists.tokens, other=0) != 0)[:, None]
            grad_key = gl.where(visible, grad_key, 0.0)
            grad_value = gl.where(visible, grad_value, 0.0)
        out = shared.out.index(RING)
        tma.store_wait(0)  # the key block before has left the buffer
        store_tile(results.key, out, grad_key * scale, batch, head, block * 64, C)
        tma.store_wait(0)
        store_tile(results.value, out, grad_value, batch, head, block * 64, C)
        tile_phase ^= 1
        mbarrier.wait(tile_full, tile_phase)
        tile = tile_of_group(shared, RING)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["total", "heads", "tokens", "key_blocks", "capacity", "blocks"])
def gluon_key_gradient_kernel(
    query,
    key,
    value,
    grad,
    stats,
    grad_key,
    grad_value,
    rows_ptr,
    start_ptr,
    order_ptr,
    mask_ptr,
    next_ptr,
    total,
    heads,
    tokens,
    key_blocks,
    capacity,
    blocks,
    scale,
    scale_log2,
    SETTINGS: gl.constexpr,
):
    """grad_key and grad_value (B, H, S, D). All are descriptors of boxes of 64 x 64, but stats: see `gluon_stats`.

    next (1,) int32, 0 at first: it counts the key blocks that were taken. They are taken one by one, and not shared out
    beforehand, because their runs differ much in length.
    """
    C: gl.constexpr = SETTINGS
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    key_buffer = gl.allocate_shared_memory(gl.bfloat16, [2, 64, C.head_dim], layout)
    value_buffer = gl.allocate_shared_memory(gl.bfloat16, [2, 64, C.head_dim], layout)
    query_buffer = gl.allocate_shared_memory(gl.bfloat16, [2 * C.stages, 64, C.head_dim], layout)
    grad_buffer = gl.allocate_shared_memory(gl.bfloat16, [2 * C.stages, 64, C.head_dim], layout)
    stats_buffer = gl.allocate_shared_memory(gl.float32, [2 * C.stages, 128], plain)
    out_buffer = gl.allocate_shared_memory(gl.bfloat16, [2, 64, C.head_dim], layout)
    tile_buffer = gl.allocate_shared_memory(gl.int32, [2, 1], plain)
    tile_full, tile_free = barriers(2, 1)
    full, free = barriers(2 * C.stages, 1)
    fence_async_shared()
    ring = (query_buffer, grad_buffer, stats_buffer)
    tiles = (out_buffer, tile_buffer, tile_full, tile_free)
    shared = Shared(key_buffer, value_buffer, *ring, *tiles, full, free)
    runs = (rows_ptr, start_ptr, order_ptr, mask_ptr, next_ptr)
    lists = Inverted(*runs, total, heads, tokens, key_blocks, capacity, blocks)
    sources = Sources(query, key, value, grad, stats)
    results = Results(grad_key, grad_value)
    gl.warp_specialize(
        [
            (multiply_queries, (results, shared, lists, scale, scale_log2, 0, C)),
            (multiply_queries, (results, shared, lists, scale, scale_log2, 1, C)),
            (load_queries, (sources, shared, lists, 0, C)),
            (load_queries, (sources, shared, lists, 1, C)),
        ],
        [4, 1, 1],
        [C.consumer_registers, C.loader_registers, C.loader_registers],
    )
