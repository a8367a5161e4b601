"""The Gluon kernel for the gradient of queries: the forward's walk over the lists, with three products in a step.

Groups, rings and lists are those of the forward (`gluon_kernel.py`, `gluon_lists.py`).
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

from .gluon_consumer import hide, store_tile
from .gluon_language import barriers
from .gluon_lists import Lists, first_key, following, list_of, mask_bits, place_of, pool_steps
from .gluon_loader import load_bias, load_entries, load_query

_NONE: gl.constexpr = gl.constexpr(float("-inf"))
Sources = namedtuple("Sources", ["query", "key", "value", "grad", "pooled_key", "pooled_value", "bias"])
Shared = namedtuple(
    "Shared", ["query", "grad", "key", "value", "out", "bias", "query_full", "query_free", "full", "free", "over"]
)
# stats: see gluon_stats.py; sums (B, H, S) fp32: of the gradients of the scores of pools, or None; blocks: of 64
# queries, for each head
Results = namedtuple("Results", ["grad", "stats", "sums", "blocks"])


@gluon.jit
def load_gradient_tiles(sources, shared, lists, RING: gl.constexpr, C: gl.constexpr):
    """Query rows and the gradients of their outputs, then a stage for every step: its keys and its values."""
    slot, phase, query_phase = 0, 1, 1
    stages: gl.constexpr = RING * C.stages
    for item in range(gl.program_id(0) * C.rings + RING, lists.items, gl.num_programs(0) * C.rings):
        number, head, batch = place_of(lists, item)
        row, length, everything, steps = list_of(lists, item, C)
        full = shared.query_full.index(RING)
        mbarrier.wait(shared.query_free.index(RING), query_phase)
        mbarrier.expect(full, 2 * C.query_bytes)
        load_query(sources.query, batch, head, number * C.query_block, full, shared.query, RING, C)
        load_query(sources.grad, batch, head, number * C.query_block, full, shared.grad, RING, C)
        query_phase ^= 1
        entry = (steps - 1) * C.entries
        for _ in range(steps):
            first = first_key(row, entry, length, everything)
            second = first_key(row, entry + 1, length, everything)
            # nothing to see: rows beyond the end arrive as zeros, and no NaN of a block that is not listed comes in
            first = gl.where(length == 0, lists.tokens, first)
            second = gl.where(length == 0, lists.tokens, second)
            entry -= C.entries
            full = shared.full.index(stages + slot)
            mbarrier.wait(shared.free.index(stages + slot), phase)
            mbarrier.expect(full, 2 * C.step_bytes)
            load_entries(sources.key, batch, head, first, second, full, shared.key.index(stages + slot), C)
            load_entries(sources.value, batch, head, first, second, full, shared.value.index(stages + slot), C)
            slot, phase = following(slot, phase, C.stages)
        if C.pooled:
            for step in range(pool_steps(lists, everything, C)):
                first = step * C.step
                full = shared.full.index(stages + slot)
                mbarrier.wait(shared.free.index(stages + slot), phase)
                mbarrier.expect(full, 2 * C.step_bytes + C.step * 4)
                keys, values = shared.key.index(stages + slot), shared.value.index(stages + slot)
                load_entries(sources.pooled_key, batch, head, first, first + 64, full, keys, C)
                load_entries(sources.pooled_value, batch, head, first, first + 64, full, values, C)
                load_bias(sources.bias, item, first, full, shared.bias.index(stages + slot), C)
                slot, phase = following(slot, phase, C.stages)


@gluon.jit
def multiply_gradient_tiles(results, shared, lists, scale, scale_log2, GROUP: gl.constexpr, C: gl.constexpr):
    """Gradients of this group's query rows, tile by tile."""
    RING: gl.constexpr = GROUP if C.rings == 2 else 0
    HALF: gl.constexpr = 0 if C.rings == 2 else GROUP
    STEP: gl.constexpr = C.step
    HEAD_DIM: gl.constexpr = C.head_dim
    STAGES: gl.constexpr = RING * C.stages
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.step, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.head_dim, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    left_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    zero = gl.zeros([64, STEP], gl.float32, score_layout)
    slot, phase, query_phase = 0, 0, 0
    for item in range(gl.program_id(0) * C.rings + RING, lists.items, gl.num_programs(0) * C.rings):
        number, head, batch = place_of(lists, item)
        row, length, everything, steps = list_of(lists, item, C)
        entry = (steps - 1) * C.entries
        last = gl.minimum(lists.tokens - first_key(row, length - 1, length, everything), 64)
        limit = gl.where(length == 0, 0, (length - 1 - entry) * 64 + last)
        first_bits, second_bits = mask_bits(lists, batch, row, entry, length, everything, C)
        first_row = number * C.query_block + HALF * 64
        block = (batch * lists.heads + head).to(gl.int64) * results.blocks + first_row // 64
        stats = results.stats + block * 128 + gl.arange(0, 64, row_layout)
        lse, delta = gl.load(stats), gl.load(stats + 64)

        query_full = shared.query_full.index(RING)
        mbarrier.wait(query_full, query_phase)
        query = shared.query.index(RING * C.groups + HALF)
        grad = shared.grad.index(RING * C.groups + HALF)
        mbarrier.wait(shared.full.index(STAGES + slot), phase)
        key, value = shared.key.index(STAGES + slot), shared.value.index(STAGES + slot)
        scores = warpgroup_mma(query, key.permute((1, 0)), zero, use_acc=False, is_async=True)
        grads = warpgroup_mma(grad, value.permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        weights = gl.exp2(hide(scores * scale_log2 - lse[:, None], first_bits, second_bits, limit, C))
        grads = warpgroup_mma_wait(0, deps=(grads,))
        grad_scores = weights * (grads - delta[:, None])
        acc = gl.zeros([64, HEAD_DIM], gl.float32, out_layout)
        left = gl.convert_layout(grad_scores.to(gl.bfloat16), left_layout)
        if not C.ahead:
            product = warpgroup_mma(left, shared.key.index(STAGES + slot), acc, is_async=True)
            acc, left = warpgroup_mma_wait(0, deps=(product, left))
            mbarrier.arrive(shared.free.index(STAGES + slot), count=1)
            slot, phase = following(slot, phase, C.stages)
        sums = gl.zeros([64], gl.float32, row_layout)
        left, acc, sums, slot, phase = walk(
            shared, lists, query, grad, zero, lse, delta, scale_log2, batch, row, entry, length, everything,
            steps - 1, left, acc, sums, slot, phase, STAGES, False, C,
        )  # fmt: skip
        if C.pooled:
            left, acc, sums, slot, phase = walk(
                shared, lists, query, grad, zero, lse, delta, scale_log2, batch, row, entry, length, everything,
                pool_steps(lists, everything, C), left, acc, sums, slot, phase, STAGES, True, C,
            )  # fmt: skip
            place = first_row + gl.arange(0, 64, row_layout)
            target = results.sums + (batch * lists.heads + head).to(gl.int64) * lists.tokens + place
            gl.store(target, sums, mask=place < lists.tokens)
        if C.ahead:
            product = warpgroup_mma(left, shared.key.index(STAGES + slot), acc, is_async=True)
            acc, left = warpgroup_mma_wait(0, deps=(product, left))
            mbarrier.arrive(shared.free.index(STAGES + slot), count=1)
            slot, phase = following(slot, phase, C.stages)
        mbarrier.arrive(shared.query_free.index(RING), count=1)
        query_phase ^= 1
        tma.store_wait(0)  # the tile before has left its buffer
        store_tile(results.grad, shared.out.index(GROUP), acc * scale, batch, head, first_row, C)
    tma.store_wait(0)


@gluon.jit
def walk(
    shared, lists, query, grad, zero, lse, delta, scale_log2, batch, row, entry, length, everything, steps, left,
    acc, sums, slot, phase, STAGES: gl.constexpr, POOLS: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """The steps of a list after its first, or those of the pools: they have a bias, and no columns to hide.

    With `ahead` the product of a step is issued with the scores of the next, and runs while their exponentials are
    computed; without, it is issued in its own step, and the other group fills the gaps. sums: over pools, of the
    gradients of their scores.
    """
    column_layout: gl.constexpr = gl.SliceLayout(0, zero.type.layout)
    left_layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    for _ in range(steps):
        if C.masked and not POOLS:
            entry -= C.entries
            first_bits, second_bits = mask_bits(lists, batch, row, entry, length, everything, C)
        read = slot
        if C.ahead:
            slot, phase = following(slot, phase, C.stages)
        mbarrier.wait(shared.full.index(STAGES + slot), phase)
        key, value = shared.key.index(STAGES + slot), shared.value.index(STAGES + slot)
        scores = warpgroup_mma(query, key.permute((1, 0)), zero, use_acc=False, is_async=True)
        grads = warpgroup_mma(grad, value.permute((1, 0)), zero, use_acc=False, is_async=True)
        if C.ahead:
            product = warpgroup_mma(left, shared.key.index(STAGES + read), acc, is_async=True)
            scores = warpgroup_mma_wait(2, deps=(scores,))
        else:
            scores = warpgroup_mma_wait(1, deps=(scores,))
        exponents = scores * scale_log2 - lse[:, None]
        if POOLS:
            exponents = exponents + shared.bias.index(STAGES + slot).load(column_layout)[None, :]
        elif C.masked:
            exponents = hide(exponents, first_bits, second_bits, C.step, C)
        weights = gl.exp2(exponents)
        mbarrier.wait(shared.over.index(0), 0)
        if C.ahead:
            grads = warpgroup_mma_wait(1, deps=(grads,))
            grad_scores = weights * (grads - delta[:, None])
            if POOLS:
                sums = sums + gl.sum(grad_scores, 1)
            mbarrier.wait(shared.over.index(1), 0)
            acc, left = warpgroup_mma_wait(0, deps=(product, left))
            mbarrier.arrive(shared.free.index(STAGES + read), count=1)
            left = gl.convert_layout(grad_scores.to(gl.bfloat16), left_layout)
        else:
            grads = warpgroup_mma_wait(0, deps=(grads,))
            grad_scores = weights * (grads - delta[:, None])
            if POOLS:
                sums = sums + gl.sum(grad_scores, 1)
            left = gl.convert_layout(grad_scores.to(gl.bfloat16), left_layout)
            product = warpgroup_mma(left, key, acc, is_async=True)
            acc, left = warpgroup_mma_wait(0, deps=(product, left))
            mbarrier.arrive(shared.free.index(STAGES + slot), count=1)
            slot, phase = following(slot, phase, C.stages)
    return left, acc, sums, slot, phase


@gluon.jit(do_not_specialize=["tiles", "heads", "total", "slots", "tokens", "pools", "blocks"])
def gluon_query_gradient_kernel(
    query,
    key,
    value,
    grad,
    grad_query,
    pooled_key,
    pooled_value,
    bias,
    stats_ptr,
    sums_ptr,
    lut_ptr,
    count_ptr,
    mask_ptr,
    tiles,
    heads,
    total,
    slots,
    tokens,
    pools,
    blocks,
    scale,
    scale_log2,
    SETTINGS: gl.constexpr,
):
    """grad_query (B, H, S, D); query, key, value, grad, grad_query: descriptors of (B, H, S, D) in boxes of 64 x 64.

    With `pooled`, else None: pooled_key, pooled_value: of (B, H, P, D), bias of (B * H * Mq, W) fp32 in base 2, and
    sums (B, H, S) fp32, which get for each query the sum of the gradients of the scores of pools.
    """
    C: gl.constexpr = SETTINGS
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    key_buffer = gl.allocate_shared_memory(gl.bfloat16, [C.rings * C.stages, C.step, C.head_dim], layout)
    value_buffer = gl.allocate_shared_memory(gl.bfloat16, [C.rings * C.stages, C.step, C.head_dim], layout)
    query_buffer = gl.allocate_shared_memory(gl.bfloat16, [2, 64, C.head_dim], layout)
    grad_buffer = gl.allocate_shared_memory(gl.bfloat16, [2, 64, C.head_dim], layout)
    out_buffer = gl.allocate_shared_memory(gl.bfloat16, [2, 64, C.head_dim], layout)
    bias_buffer = None
    if C.pooled:
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        bias_buffer = gl.allocate_shared_memory(gl.float32, [C.rings * C.stages, C.step], plain)
    query_full, query_free = barriers(C.rings, C.groups)
    full, free = barriers(C.rings * C.stages, C.groups)
    over, _ = barriers(2, 1)
    mbarrier.arrive(over.index(0), count=1)
    mbarrier.arrive(over.index(1), count=1)
    fence_async_shared()
    shared = Shared(
        query_buffer,
        grad_buffer,
        key_buffer,
        value_buffer,
        out_buffer,
        bias_buffer,
        query_full,
        query_free,
        full,
        free,
        over,
    )
    lists = Lists(lut_ptr, count_ptr, None, mask_ptr, tiles, heads, total, slots, tokens, pools)
    results = Results(grad_query, stats_ptr, sums_ptr, blocks)
    sources = Sources(query, key, value, grad, pooled_key, pooled_value, bias)
    if C.rings == 1:
        gl.warp_specialize(
            [
                (multiply_gradient_tiles, (results, shared, lists, scale, scale_log2, 0, C)),
                (multiply_gradient_tiles, (results, shared, lists, scale, scale_log2, 1, C)),
                (load_gradient_tiles, (sources, shared, lists, 0, C)),
            ],
            [4, 1],
            [C.consumer_registers, C.loader_registers],
        )
    else:
        gl.warp_specialize(
            [
                (multiply_gradient_tiles, (results, shared, lists, scale, scale_log2, 0, C)),
                (multiply_gradient_tiles, (results, shared, lists, scale, scale_log2, 1, C)),
                (load_gradient_tiles, (sources, shared, lists, 0, C)),
                (load_gradient_tiles, (sources, shared, lists, 1, C)),
            ],
            [4, 1, 1],
            [C.consumer_registers, C.loader_registers, C.loader_registers],
        )
