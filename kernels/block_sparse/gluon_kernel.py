"""The Gluon forward for Hopper: its buffers, its barriers, and who does what."""

from collections import namedtuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from .gluon_consumer import multiply_tiles
from .gluon_language import barriers
from .gluon_lists import Lists
from .gluon_loader import load_tiles

# Matrices in bf16, and a pair of barriers for every slot of a ring: filled, and free again
Sources = namedtuple("Sources", ["query", "key", "value", "pooled_key", "pooled_value", "bias"])
Results = namedtuple("Results", ["out", "lse"])
Shared = namedtuple("Shared", ["query", "key", "value", "out", "bias", "query_full", "query_free", "full", "free"])


@gluon.jit(do_not_specialize=["tiles", "heads", "total", "slots", "tokens", "pools"])
def gluon_forward_kernel(
    query,
    key,
    value,
    out,
    pooled_key,
    pooled_value,
    bias,
    lse_ptr,
    lut_ptr,
    count_ptr,
    mask_ptr,
    redo_ptr,
    repairs_ptr,
    tiles,
    heads,
    total,
    slots,
    tokens,
    pools,
    scale_log2,
    SETTINGS: gl.constexpr,
):
    """out (B, H, S, D) and lse (B, H, S); total tiles of query rows in all, spread over the programs.

    query, key, value, out: descriptors of (B, H, S, D) in boxes of 64 x 64. With `pooled`, else None: pooled_key and
    pooled_value, of (B, H, P, D), and bias of (B * H * Mq, W) fp32, added to scores before they are scaled. redo
    (1 + 2 total) int32, zeros at first: a launch with `fixed` lists the tiles whose sums left the safe range, and one
    with `repair` computes these tiles alone and adds their number, and 1, to repairs (2) int64. Without `fixed` and
    `repair` both are None.
    """
    C: gl.constexpr = SETTINGS
    items = total
    if C.repair:
        items = gl.load(redo_ptr)
        if (items > 0) & (gl.program_id(0) == 0):
            gl.store(repairs_ptr, gl.load(repairs_ptr, volatile=True) + items)
            gl.store(repairs_ptr + 1, gl.load(repairs_ptr + 1, volatile=True) + 1)
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    key_buffer = gl.allocate_shared_memory(gl.bfloat16, [C.rings * C.stages, C.step, C.head_dim], layout)
    value_buffer = gl.allocate_shared_memory(gl.bfloat16, [C.rings * C.stages, C.step, C.head_dim], layout)
    query_buffer = gl.allocate_shared_memory(gl.bfloat16, [2 * C.query_slots, 64, C.head_dim], layout)
    out_buffer = query_buffer
    if not C.in_place:
        out_buffer = gl.allocate_shared_memory(gl.bfloat16, [2, 64, C.head_dim], layout)
    bias_buffer = None
    if C.pooled:
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        bias_buffer = gl.allocate_shared_memory(gl.float32, [C.rings * C.stages, C.step], plain)
    query_full, query_free = barriers(C.rings * C.query_slots, C.groups)
    full, free = barriers(C.rings * C.stages, C.groups)
    fence_async_shared()
    shared = Shared(query_buffer, key_buffer, value_buffer, out_buffer, bias_buffer, query_full, query_free, full, free)
    lists = Lists(lut_ptr, count_ptr, redo_ptr, mask_ptr, tiles, heads, items, slots, tokens, pools)
    results = Results(out, lse_ptr)
    sources = Sources(query, key, value, pooled_key, pooled_value, bias)
    if C.rings == 1:
        gl.warp_specialize(
            [
                (multiply_tiles, (results, shared, lists, scale_log2, total, 0, C)),
                (multiply_tiles, (results, shared, lists, scale_log2, total, 1, C)),
                (load_tiles, (sources, shared, lists, 0, C)),
            ],
            [4, 1],
            [C.consumer_registers, C.loader_registers],
        )
    else:
        gl.warp_specialize(
            [
                (multiply_tiles, (results, shared, lists, scale_log2, total, 0, C)),
                (multiply_tiles, (results, shared, lists, scale_log2, total, 1, C)),
                (load_tiles, (sources, shared, lists, 0, C)),
                (load_tiles, (sources, shared, lists, 1, C)),
            ],
            [4, 1, 1],
            [C.consumer_registers, C.loader_registers, C.loader_registers],
        )
