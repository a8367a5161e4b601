"""The groups of the Gluon forward that multiply: 64 query rows each, one step of keys at a time.

While the tensor cores multiply the query by the next keys, and the weights of the step before by its values, the other
units work out the exponentials in between. docs/kernels.md says what keeps the assembler from undoing that order.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_language import barrier, box, store_box
from .gluon_lists import (
    claim,
    first_key,
    following,
    list_of,
    mask_bits,
    place_of,
    pool_steps,
    tile_of,
)

_LN2: gl.constexpr = gl.constexpr(0.6931471805599453)
_NONE: gl.constexpr = gl.constexpr(float("-inf"))
# A sum of weights between these is exact enough. The row's first maximum alone gives 1, less what rounding takes.
_LEAST: gl.constexpr = gl.constexpr(0.5)
_MOST: gl.constexpr = gl.constexpr(2.0**64)


@gluon.jit
def row_sums(weights, C: gl.constexpr):
    """Sums over the columns that one thread holds; four threads hold a row and add up only at its end."""
    return gl.sum(gl.sum(weights.reshape([64, C.step // 8, 4, 2]), 3), 1)


@gluon.jit
def row_maxima(scores, LAYOUT: gl.constexpr, C: gl.constexpr):
    """Largest score of each row, found in a few short chains of dependent steps where one would be long."""
    parts = scores.reshape([64, 4, C.step // 32, 4, 2])
    return gl.convert_layout(gl.max(gl.max(gl.max(gl.max(parts, 4), 2), 1), 1), LAYOUT)


@gluon.jit
def hide(scores, first_bits, second_bits, limit, C: gl.constexpr):
    """Scores with -inf in the columns from `limit` on, and in those of keys that the mask leaves out.

    In runs of eight: the numbers of all columns would stay in registers, through the whole kernel.
    """
    STEP: gl.constexpr = C.step
    runs = scores.reshape([64, STEP // 8, 8])
    layout: gl.constexpr = gl.SliceLayout(0, runs.type.layout)
    begin = gl.arange(0, STEP // 8, gl.SliceLayout(1, layout)) * 8
    column = gl.arange(0, 8, gl.SliceLayout(0, layout))
    visible = column[None, :] < (limit - begin)[:, None]
    if C.masked:
        bits = gl.where(begin < 64, first_bits, second_bits) >> (begin % 64).to(gl.int64)
        visible = visible & (((bits.to(gl.int32)[:, None] >> column[None, :]) & 1) != 0)
    hidden = gl.where(visible[None, :, :], runs, _NONE).reshape([64, STEP])
    return gl.convert_layout(hidden, scores.type.layout)


@gluon.jit
def scaled(highest, scale_log2):
    """The reference of a softmax in base 2. A row that has seen no key yet has none: -inf - -inf would be NaN."""
    return gl.where(highest == _NONE, 0.0, highest) * scale_log2


@gluon.jit
def store_lse(lse, reference, weight, first_row, tokens):
    """Natural logarithm of the softmax denominators of 64 rows; -inf where there is none."""
    value = gl.where(weight == 0.0, _NONE, (reference + gl.log2(gl.where(weight == 0.0, 1.0, weight))) * _LN2)
    rows = first_row + gl.arange(0, 64, weight.type.layout)
    gl.store(lse + rows, value, mask=rows < tokens)


@gluon.jit
def store_tile(out, staged, values, batch, head, first_row, C: gl.constexpr):
    """Write 64 rows through shared memory; the bulk copy engine leaves out those beyond the end."""
    COLUMNS: gl.constexpr = C.columns
    barrier()
    staged.store(values.to(gl.bfloat16))
    fence_async_shared()
    barrier()
    for column in gl.static_range(COLUMNS):
        store_box(out, [batch, head, first_row, column * 64], box(staged, column, COLUMNS, out))


@gluon.jit
def multiply_steps(
    shared, lists, query, query_full, query_phase, zero, scale_log2, first_bits, second_bits, batch, row, entry, length,
    everything, steps, left, acc, highest, reference, sums, slot, phase, STAGES: gl.constexpr,
    POOLS: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """The steps of a list after its first, or those of the pools: they have a bias, and no columns to hide."""
    column_layout: gl.constexpr = gl.SliceLayout(0, zero.type.layout)
    row_layout: gl.constexpr = gl.SliceLayout(1, zero.type.layout)
    out_rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    for _ in range(steps):
        key = shared.key.index(STAGES + slot).permute((1, 0))
        scores = warpgroup_mma(query, key, zero, use_acc=False, is_async=True)
        product = warpgroup_mma(left, shared.value.index(STAGES + slot), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        if POOLS:
            scores = scores + shared.bias.index(STAGES + slot).load(column_layout)[None, :]
        elif C.masked:
            scores = hide(scores, first_bits, second_bits, C.step, C)
            entry -= C.entries
            first_bits, second_bits = mask_bits(lists, batch, row, entry - C.entries, length, everything, C)
        if not C.fixed:
            before = highest
            highest = gl.maximum(highest, row_maxima(scores, row_layout, C))
            reference = scaled(highest, scale_log2)
            correction = gl.exp2(before * scale_log2 - reference)
            sums = sums * gl.convert_layout(correction, gl.SliceLayout(1, sums.type.layout))[:, None]
        weights = gl.exp2(scores * scale_log2 - reference[:, None])
        sums = sums + row_sums(weights, C)
        read = slot
        slot, phase = following(slot, phase, C.stages)
        # Over already: it ends a basic block. Without it ptxas moves the wait for the products up over the
        # exponentials, or the one for the next step, which must come late. Its next phase cannot complete before
        # this tile is done.
        mbarrier.wait(query_full, query_phase)
        mbarrier.wait(shared.full.index(STAGES + slot), phase)
        acc, left = warpgroup_mma_wait(0, deps=(product, left))
        mbarrier.arrive(shared.free.index(STAGES + read), count=1)
        if not C.fixed:
            acc = acc * gl.convert_layout(correction, out_rows)[:, None]
        left = gl.convert_layout(weights.to(gl.bfloat16), weight_layout)
    return left, acc, highest, reference, sums, slot, phase


@gluon.jit
def multiply_tiles(results, shared, lists, scale_log2, total, GROUP: gl.constexpr, C: gl.constexpr):
    """Output and lse of this group's rows, tile by tile. total: all tiles, of which lists.items are to be computed."""
    RING: gl.constexpr = GROUP if C.rings == 2 else 0
    HALF: gl.constexpr = 0 if C.rings == 2 else GROUP
    STEP: gl.constexpr = C.step  # shapes and static ranges take no attributes
    HEAD_DIM: gl.constexpr = C.head_dim
    STAGES: gl.constexpr = RING * C.stages
    QUERIES: gl.constexpr = RING * C.query_slots
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.step, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.head_dim, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    out_rows: gl.constexpr = gl.SliceLayout(1, out_layout)
    zero = gl.zeros([64, STEP], gl.float32, score_layout)
    slot, phase, query_slot, query_phase = 0, 0, 0, 0
    for item in range(gl.program_id(0) * C.rings + RING, lists.items, gl.num_programs(0) * C.rings):
        tile = tile_of(lists, item, C)
        number, head, batch = place_of(lists, tile)
        row, length, everything, steps = list_of(lists, tile, C)
        # what is visible in the first step is a prefix of its columns
        entry = (steps - 1) * C.entries
        last = gl.minimum(lists.tokens - first_key(row, length - 1, length, everything), 64)
        limit = gl.where(length == 0, 0, (length - 1 - entry) * 64 + last)
        first_bits, second_bits = mask_bits(lists, batch, row, entry, length, everything, C)

        query_full = shared.query_full.index(QUERIES + query_slot)
        mbarrier.wait(query_full, query_phase)
        query = shared.query.index((QUERIES + query_slot) * C.groups + HALF)
        mbarrier.wait(shared.full.index(STAGES + slot), phase)
        key = shared.key.index(STAGES + slot).permute((1, 0))
        scores = warpgroup_mma(query, key, zero, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(shared.free.index(STAGES + slot), count=1)
        scores = hide(scores, first_bits, second_bits, limit, C)
        highest = row_maxima(scores, row_layout, C)
        reference = scaled(highest, scale_log2)
        weights = gl.exp2(scores * scale_log2 - reference[:, None])
        sums = row_sums(weights, C)
        left = gl.convert_layout(weights.to(gl.bfloat16), weight_layout)
        acc = gl.zeros([64, HEAD_DIM], gl.float32, out_layout)
        first_bits, second_bits = mask_bits(lists, batch, row, entry - C.entries, length, everything, C)  # a step ahead
        slot, phase = following(slot, phase, C.stages)
        mbarrier.wait(shared.full.index(STAGES + slot), phase)
        left, acc, highest, reference, sums, slot, phase = multiply_steps(
            shared, lists, query, query_full, query_phase, zero, scale_log2, first_bits, second_bits, batch, row, entry,
            length, everything, steps - 1, left, acc, highest, reference, sums, slot, phase, STAGES, False, C,
        )  # fmt: skip
        if C.pooled:
            left, acc, highest, reference, sums, slot, phase = multiply_steps(
                shared, lists, query, query_full, query_phase, zero, scale_log2, 0, 0, batch, row, entry, length,
                everything, pool_steps(lists, everything, C), left, acc, highest, reference, sums, slot, phase,
                STAGES, True, C,
            )  # fmt: skip
        if not C.in_place:
            mbarrier.arrive(shared.query_free.index(QUERIES + query_slot), count=1)
        product = warpgroup_mma(left, shared.value.index(STAGES + slot), acc, is_async=True)
        weight = gl.convert_layout(gl.sum(sums, 1), row_layout)
        first_row = number * C.query_block + HALF * 64
        lse = results.lse + (batch * lists.heads + head).to(gl.int64) * lists.tokens
        store_lse(lse, reference, weight, first_row, lists.tokens)
        inverse = gl.convert_layout(1.0 / gl.where(weight == 0.0, 1.0, weight), out_rows)
        if not C.in_place:
            tma.store_wait(0)  # the tile before has left its buffer
        acc, left = warpgroup_mma_wait(0, deps=(product, left))
        mbarrier.arrive(shared.free.index(STAGES + slot), count=1)
        slot, phase = following(slot, phase, C.stages)
        staged = query if C.in_place else shared.out.index(GROUP)
        store_tile(results.out, staged, acc * inverse[:, None], batch, head, first_row, C)
        if C.in_place:
            tma.store_wait(0)
            mbarrier.arrive(shared.query_free.index(QUERIES + query_slot), count=1)
        query_slot, query_phase = following(query_slot, query_phase, C.query_slots)
        if C.fixed:
            inside = (weight >= _LEAST) & (weight < _MOST)
            outside = gl.max(gl.where(inside, 0, 1), 0) > 0
            if not C.pooled:  # pools have weights where a list is empty
                outside = outside & (length > 0)
            if outside:
                claim(lists, tile, total)
    tma.store_wait(0)
