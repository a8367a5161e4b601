"""The loading warp of the Gluon forward: it walks the lists ahead of the groups that multiply."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .gluon_language import box, load_box, numbers_box
from .gluon_lists import first_key, following, list_of, place_of, pool_steps, tile_of


@gluon.jit
def load_entries(source, batch, head, first, second, full, matrix, C: gl.constexpr):
    """The keys, or the values, of a step, into a matrix of C.step rows."""
    COLUMNS: gl.constexpr = C.columns
    BOXES: gl.constexpr = C.stage_boxes
    for column in gl.static_range(COLUMNS):
        number = column * C.entries
        load_box(source, [batch, head, first, column * 64], full, box(matrix, number, BOXES, source))
        if C.entries == 2:
            load_box(source, [batch, head, second, column * 64], full, box(matrix, number + 1, BOXES, source))


@gluon.jit
def load_values(sources, batch, head, first, second, pool, full, matrix, C: gl.constexpr):
    """The values of the step whose keys were the last: of the list, or, where `pool` > 0, of the pools before that."""
    if C.pooled:
        if pool > 0:
            load_entries(sources.pooled_value, batch, head, pool - C.step, pool - C.step + 64, full, matrix, C)
        else:
            load_entries(sources.value, batch, head, first, second, full, matrix, C)
    else:
        load_entries(sources.value, batch, head, first, second, full, matrix, C)


@gluon.jit
def load_bias(source, tile, pool, full, numbers, C: gl.constexpr):
    """What is added to the scores of a step of pools; -inf for those that stand for nothing."""
    STEP: gl.constexpr = C.step
    load_box(source, [tile, pool], full, numbers_box(numbers, STEP, source))


@gluon.jit
def load_rows(source, batch, head, row, full, matrix, C: gl.constexpr):
    """64 rows of tokens into a matrix."""
    COLUMNS: gl.constexpr = C.columns
    for column in gl.static_range(COLUMNS):
        load_box(source, [batch, head, row, column * 64], full, box(matrix, column, COLUMNS, source))


@gluon.jit
def load_query(source, batch, head, row, full, buffer, slot, C: gl.constexpr):
    """The query rows of a tile: a matrix of 64 rows for each group."""
    GROUPS: gl.constexpr = C.groups
    COLUMNS: gl.constexpr = C.columns
    for group in gl.static_range(GROUPS):
        matrix = buffer.index(slot * GROUPS + group)
        for column in gl.static_range(COLUMNS):
            target = box(matrix, column, COLUMNS, source)
            load_box(source, [batch, head, row + group * 64, column * 64], full, target)


@gluon.jit
def load_tiles(sources, shared, lists, RING: gl.constexpr, C: gl.constexpr):
    """A stage holds the keys of a step and the values of the step before; the first and the last hold one of them."""
    slot = 0
    phase = 1
    query_slot = 0
    query_phase = 1
    stages: gl.constexpr = RING * C.stages
    query_slots: gl.constexpr = RING * C.query_slots
    for item in range(gl.program_id(0) * C.rings + RING, lists.items, gl.num_programs(0) * C.rings):
        tile = tile_of(lists, item, C)
        number, head, batch = place_of(lists, tile)
        row, length, everything, steps = list_of(lists, tile, C)
        entry = (steps - 1) * C.entries
        first = first_key(row, entry, length, everything)
        second = first_key(row, entry + 1, length, everything)
        # nothing to see: rows beyond the end arrive as zeros, so that no NaN of a block that is not listed comes in
        first = gl.where(length == 0, lists.tokens, first)
        second = gl.where(length == 0, lists.tokens, second)

        full = shared.query_full.index(query_slots + query_slot)
        mbarrier.wait(shared.query_free.index(query_slots + query_slot), query_phase)
        mbarrier.expect(full, C.query_bytes)
        load_query(sources.query, batch, head, number * C.query_block, full, shared.query, query_slots + query_slot, C)
        query_slot, query_phase = following(query_slot, query_phase, C.query_slots)

        full = shared.full.index(stages + slot)
        mbarrier.wait(shared.free.index(stages + slot), phase)
        mbarrier.expect(full, C.step_bytes)
        load_entries(sources.key, batch, head, first, second, full, shared.key.index(stages + slot), C)
        slot, phase = following(slot, phase, C.stages)
        for _ in range(1, steps):
            entry -= C.entries
            next_first = first_key(row, entry, length, everything)
            next_second = first_key(row, entry + 1, length, everything)
            full = shared.full.index(stages + slot)
            mbarrier.wait(shared.free.index(stages + slot), phase)
            mbarrier.expect(full, 2 * C.step_bytes)
            load_entries(sources.key, batch, head, next_first, next_second, full, shared.key.index(stages + slot), C)
            load_entries(sources.value, batch, head, first, second, full, shared.value.index(stages + slot), C)
            slot, phase = following(slot, phase, C.stages)
            first = next_first
            second = next_second
        pool = 0
        if C.pooled:
            for _ in range(pool_steps(lists, everything, C)):
                full = shared.full.index(stages + slot)
                mbarrier.wait(shared.free.index(stages + slot), phase)
                mbarrier.expect(full, 2 * C.step_bytes + C.step * 4)
                matrix = shared.key.index(stages + slot)
                load_entries(sources.pooled_key, batch, head, pool, pool + 64, full, matrix, C)
                load_values(sources, batch, head, first, second, pool, full, shared.value.index(stages + slot), C)
                load_bias(sources.bias, tile, pool, full, shared.bias.index(stages + slot), C)
                slot, phase = following(slot, phase, C.stages)
                pool += C.step
        full = shared.full.index(stages + slot)
        mbarrier.wait(shared.free.index(stages + slot), phase)
        mbarrier.expect(full, C.step_bytes)
        load_values(sources, batch, head, first, second, pool, full, shared.value.index(stages + slot), C)
        slot, phase = following(slot, phase, C.stages)
