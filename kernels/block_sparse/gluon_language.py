"""Gluon under one name for each thing: names moved between Triton 3.6 and 3.9."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# 3.6: async_copy_global_to_shared and async_copy_shared_to_global, thread_barrier, and
# shared_memory_descriptor._reinterpret
load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_box = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_PUBLIC: gl.constexpr = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def _reinterpret(buffer, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    if _PUBLIC:
        return buffer.reinterpret(buffer.dtype, SHAPE, LAYOUT)
    else:  # noqa: RET505 - Triton compiles one of the two
        return buffer._reinterpret(buffer.dtype, SHAPE, LAYOUT)


@gluon.jit
def box(matrix, number, BOXES: gl.constexpr, descriptor):
    """One of the boxes of 64 x 64 that a matrix consists of, as the bulk copy engine takes it.

    A matrix in the layout that wgmma reads is runs of 64 columns one after the other, and each run is boxes of 64 rows.
    """
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    boxes = _reinterpret(matrix, [BOXES, 64, 64], layout)
    described: gl.constexpr = descriptor.layout
    return _reinterpret(boxes.index(number), [1, 1, 64, 64], described)


@gluon.jit
def numbers_box(numbers, COUNT: gl.constexpr, descriptor):
    """So many numbers, as the bulk copy engine takes them."""
    described: gl.constexpr = descriptor.layout
    return _reinterpret(numbers, [1, COUNT], described)


@gluon.jit
def stats_row(numbers, ROW: gl.constexpr):
    """The first or the second 64 of 128 numbers."""
    return _reinterpret(numbers, [2, 64], gl.SwizzledSharedLayout(1, 1, 1, [0])).index(ROW)


@gluon.jit
def barriers(SLOTS: gl.constexpr, ARRIVALS: gl.constexpr):
    """Two barriers for each slot: the copy engine arrives at the first, so many readers at the second."""
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], layout)
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], layout)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(free.index(slot), count=ARRIVALS)
    return full, free
