"""The Gluon kernel for the gradients of pools, which all queries attend to: 64 pools at a time, a part of the queries.

A step is one of the kernel for keys (`gluon_key_gradient.py`). Every tile has as many steps as the others, so a program
is done after one tile for each of its two groups of warps, which have two parts of the queries of the same pools. The
parts are added up afterwards, in a fixed order.
"""

from collections import namedtuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from .gluon_key_gradient import issue_scores, issue_sums
from .gluon_language import barriers, load_box, numbers_box
from .gluon_lists import following
from .gluon_loader import load_rows

# each: query blocks of a part; query_blocks = Mq; blocks: of 64 queries, as stats has them
Parts = namedtuple("Parts", ["pool_blocks", "each", "query_blocks", "blocks"])
Sources = namedtuple("Sources", ["query", "key", "value", "grad", "stats", "bias"])
Shared = namedtuple("Shared", ["key", "value", "query", "grad", "stats", "bias", "pools_full", "full", "free"])


@gluon.jit
def part_of(parts, RING: gl.constexpr, C: gl.constexpr):
    """Number of 64 pools, of the part, of the head over all; the first query block of the part, and its steps."""
    block, pair = gl.program_id(0) % parts.pool_blocks, gl.program_id(0) // parts.pool_blocks
    split, group = 2 * pair + RING, gl.program_id(2) * gl.num_programs(1) + gl.program_id(1)
    first = split * parts.each
    entries = gl.maximum(gl.minimum(parts.each, parts.query_blocks - first), 0)
    return block, split, group, first, entries * (C.query_block // 64)


@gluon.jit
def load_all_queries(sources, shared, parts, RING: gl.constexpr, C: gl.constexpr):
    """The pools, and a stage for every 64 query rows of the part."""
    STAGES: gl.constexpr = RING * C.stages
    block, _split, group, first, steps = part_of(parts, RING, C)
    head, batch = gl.program_id(1), gl.program_id(2)
    pools_full = shared.pools_full.index(RING)
    if steps > 0:
        mbarrier.expect(pools_full, 2 * C.tile_bytes)
        load_rows(sources.key, batch, head, block * 64, pools_full, shared.key.index(RING), C)
        load_rows(sources.value, batch, head, block * 64, pools_full, shared.value.index(RING), C)
    slot, phase = 0, 1
    for step in range(0, steps):
        start = first * C.query_block + step * 64
        full = shared.full.index(STAGES + slot)
        mbarrier.wait(shared.free.index(STAGES + slot), phase)
        mbarrier.expect(full, 2 * C.tile_bytes + 512 + 256)
        load_rows(sources.query, batch, head, start, full, shared.query.index(STAGES + slot), C)
        numbers = numbers_box(shared.stats.index(STAGES + slot), 128, sources.stats)
        load_box(sources.stats, [group * parts.blocks + start // 64, 0], full, numbers)
        numbers = numbers_box(shared.bias.index(STAGES + slot), 64, sources.bias)
        load_box(sources.bias, [group * parts.query_blocks + start // C.query_block, block * 64], full, numbers)
        load_rows(sources.grad, batch, head, start, full, shared.grad.index(STAGES + slot), C)
        slot, phase = following(slot, phase, C.stages)


@gluon.jit
def multiply_all_queries(key_ptr, value_ptr, shared, parts, scale, scale_log2, RING: gl.constexpr, C: gl.constexpr):
    """Sums over the query rows of the part, 64 rows a step."""
    HEAD_DIM: gl.constexpr = C.head_dim  # shapes take no attributes
    STAGES: gl.constexpr = RING * C.stages
    row_layout: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.head_dim, 16])
    key, value = shared.key.index(RING), shared.value.index(RING)
    block, split, group, _first, steps = part_of(parts, RING, C)
    if steps > 0:
        grad_key = gl.zeros([64, HEAD_DIM], gl.float32, out_layout)
        grad_value = gl.zeros([64, HEAD_DIM], gl.float32, out_layout)
        slot, phase = 0, 0
        mbarrier.wait(shared.pools_full.index(RING), 0)
        for _ in range(0, steps):
            mbarrier.wait(shared.full.index(STAGES + slot), phase)
            scores, grads = issue_scores(shared, STAGES + slot, key, value)
            bias = shared.bias.index(STAGES + slot).load(row_layout)
            scores = warpgroup_mma_wait(1, deps=(scores,))
            grad_value, key_sum = issue_sums(
                shared, STAGES + slot, scores, grads, grad_value, grad_key, scale_log2, bias, True
            )
            # here, where the bias takes registers, and not in the next step
            grad_key = warpgroup_mma_wait(0, deps=(key_sum,))
            mbarrier.arrive(shared.free.index(STAGES + slot), count=1)
            slot, phase = following(slot, phase, C.stages)
        groups = gl.num_programs(1) * gl.num_programs(2)
        at = ((split.to(gl.int64) * groups + group) * parts.pool_blocks + block) * 64 * HEAD_DIM
        rows = gl.arange(0, 64, gl.SliceLayout(1, out_layout))
        columns = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, out_layout))
        places = rows[:, None] * HEAD_DIM + columns[None, :]
        gl.store(key_ptr + at + places, grad_key * scale)
        gl.store(value_ptr + at + places, grad_value)


@gluon.jit(do_not_specialize=["pool_blocks", "each", "query_blocks", "blocks"])
def gluon_pool_gradient_kernel(
    query,
    key,
    value,
    grad,
    stats,
    bias,
    key_ptr,
    value_ptr,
    pool_blocks,
    each,
    query_blocks,
    blocks,
    scale,
    scale_log2,
    SETTINGS: gl.constexpr,
):
    """Gradients of pooled keys and values, fp32 (splits, B * H, 64 pool_blocks, D) each, contiguous.

    query, grad: descriptors of (B, H, S, D), key, value: of (B, H, P, D), in boxes of 64 x 64; stats: see
    `gluon_stats`; bias: of (B * H * Mq, 64 pool_blocks or more) fp32 in base 2. Programs: pool_blocks times pairs of
    splits, then H, then B.
    """
    C: gl.constexpr = SETTINGS
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    key_buffer = gl.allocate_shared_memory(gl.bfloat16, [2, 64, C.head_dim], layout)
    value_buffer = gl.allocate_shared_memory(gl.bfloat16, [2, 64, C.head_dim], layout)
    query_buffer = gl.allocate_shared_memory(gl.bfloat16, [2 * C.stages, 64, C.head_dim], layout)
    grad_buffer = gl.allocate_shared_memory(gl.bfloat16, [2 * C.stages, 64, C.head_dim], layout)
    stats_buffer = gl.allocate_shared_memory(gl.float32, [2 * C.stages, 128], plain)
    bias_buffer = gl.allocate_shared_memory(gl.float32, [2 * C.stages, 64], plain)
    pools_full, _ = barriers(2, 1)
    full, free = barriers(2 * C.stages, 1)
    fence_async_shared()
    shared = Shared(
        key_buffer, value_buffer, query_buffer, grad_buffer, stats_buffer, bias_buffer, pools_full, full, free
    )
    parts = Parts(pool_blocks, each, query_blocks, blocks)
    sources = Sources(query, key, value, grad, stats, bias)
    gl.warp_specialize(
        [
            (multiply_all_queries, (key_ptr, value_ptr, shared, parts, scale, scale_log2, 0, C)),
            (multiply_all_queries, (key_ptr, value_ptr, shared, parts, scale, scale_log2, 1, C)),
            (load_all_queries, (sources, shared, parts, 0, C)),
            (load_all_queries, (sources, shared, parts, 1, C)),
        ],
        [4, 1, 1],
        [C.consumer_registers, C.loader_registers, C.loader_registers],
    )
