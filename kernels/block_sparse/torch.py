"""The fast plain-torch engine of block-sparse attention. Runs on any device; tuned for the CPU.

The selected key and value blocks of a few query blocks at a time are gathered side by side, which turns the work into
large batched matmuls over buffers that stay in cache. Nothing ever holds S x S elements.
"""

from typing import NamedTuple

import torch

from ..checks import accumulation_dtype
from ..layout import ALL_BLOCKS, empty_bshd
from ..selection import Selection
from .chunks import KeyLists, Plan, Scratch, from_blocks, head_groups, valid_blocks, whole_blocks
from .whole import attend_whole


def block_sparse_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, selection: Selection, wants_lse: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `reference.block_sparse_attention`. wants_lse: if not, the lse may be None."""
    attended = attend_whole(query, key, value, selection, wants_lse)
    if attended is not None:
        return attended
    lut, count, query_block, key_block, scale, key_mask = selection
    batch, heads, tokens, head_dim = query.shape
    dtype = accumulation_dtype(query.dtype)
    # bf16 weights times bf16 values: twice as fast as fp32 where the CPU has bf16 units. Scores stay fp32 throughout,
    # because a 16-bit matmul rounds its result to 16 bits here, and a score of 300 would be off by one.
    value_dtype = torch.bfloat16 if query.dtype == torch.bfloat16 else dtype
    plan = Plan.of(tokens, selection)
    out = empty_bshd(query, batch, heads, tokens, value.shape[-1])
    lse = query.new_empty((batch, heads, tokens), dtype=dtype)
    width = 2 * head_dim + value.shape[-1]
    scratch, dense_scratch = Scratch(query.device), Scratch(query.device)
    any_dense = bool((count == ALL_BLOCKS).any())
    for b, group in head_groups(query, width, dtype.itemsize):
        valid = valid_blocks(None if key_mask is None else key_mask[b], key_block)
        queries = scratch.rows("query", query[b, group], query_block, dtype)
        keys = scratch.blocks("key", key[b, group], key_block, dtype)
        values = scratch.blocks("value", value[b, group], key_block, value_dtype)
        listed = KeyLists.listed(plan, lut[b, group], count[b, group], valid)
        blocks_out = whole_blocks(out[b, group], query_block)
        in_scratch = blocks_out is None
        if blocks_out is None:
            blocks_out = scratch("out", (*queries.shape[:2], value.shape[-1]), value_dtype)
        blocks_lse = _forward_group(queries, keys, values, listed, scale, scratch, blocks_out)
        if any_dense and len(rows := _dense_rows(count[b, group])):
            everything = KeyLists.everything(plan, rows, valid)
            dense = dense_scratch("out", (len(rows), *blocks_out.shape[1:]), value_dtype)
            blocks_lse[rows] = _forward_group(queries[rows], keys, values, everything, scale, dense_scratch, dense)
            blocks_out[rows] = dense.to(blocks_out.dtype)
        if in_scratch:
            from_blocks(blocks_out, out[b, group])
        from_blocks(blocks_lse, lse[b, group])
    return out, lse


def _dense_rows(count: torch.Tensor) -> torch.Tensor:
    """Which query blocks of a group attend to everything, as rows of the flat list. count: (G, Mq)."""
    return (count.reshape(-1) == ALL_BLOCKS).nonzero()[:, 0]


def _forward_group(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: KeyLists,
    scale: float,
    scratch: Scratch,
    out: torch.Tensor,
) -> torch.Tensor:
    """query: (R, query_block, D); key and value: (G * Mk, key_block, D). Writes blocks of out; returns those of lse."""
    plan = lists.plan
    lse, largest = (scratch(name, query.shape[:2], query.dtype) for name in ("lse", "largest"))
    step = plan.chunk(max(key.shape[-1], value.shape[-1]) + plan.query_block, key.element_size())
    # Cut and allocated up front: between two operations of a chunk all threads but one wait for Python.
    pieces = zip(*(torch.split(x, step) for x in (query, lse, largest, out)), strict=True)
    buffers = _Buffers.of(min(step, len(query)), plan, key, value, scratch)
    for (rows, index, masked), (queries, highest, share, result) in zip(lists.chunks(step), pieces, strict=True):
        if len(queries) != len(buffers.scores):  # the last ones
            buffers = _Buffers.of(len(queries), plan, key, value, scratch)
        scores = buffers.scores
        keys = buffers.gather_keys(key, index)
        torch.baddbmm(scores, queries, keys, beta=0, alpha=scale, out=scores)
        if masked:
            lists.mask(scores, rows)
        torch.amax(scores, dim=-1, out=highest)
        # In place on the CPU, where the kernel is done with a row before it writes it (tested); not promised elsewhere.
        weights = torch.softmax(scores, dim=-1, out=scores if scores.is_cpu else None)
        torch.amax(weights, dim=-1, out=share)
        if masked:
            empty = highest == float("-inf")
            weights.masked_fill_(empty[..., None], 0)
            share.masked_fill_(empty, 1)
        if buffers.rounded is not None:
            weights = buffers.rounded.copy_(weights)
        torch.bmm(weights, buffers.gather_values(value, index), out=buffers.attended)
        result.copy_(buffers.attended)  # while it is in cache
    # the largest weight is exp(highest - lse), and at least 1 / gathered: its logarithm loses no digits
    return lse.sub_(largest.log_())


class _Buffers(NamedTuple):
    """What the forward needs for n query blocks at a time. Keys and values share memory, which then stays in cache."""

    scores: torch.Tensor  # (n, query_block, gathered)
    rounded: torch.Tensor | None  # the same in the dtype of values, if that is another
    keys: torch.Tensor  # (n * K, key_block, D)
    values: torch.Tensor  # (n * K, key_block, Dv)
    keys_transposed: torch.Tensor  # (n, D, gathered)
    values_by_row: torch.Tensor  # (n, gathered, Dv)
    attended: torch.Tensor  # (n, query_block, Dv)

    @classmethod
    def of(cls, n: int, plan: Plan, key: torch.Tensor, value: torch.Tensor, scratch: Scratch) -> "_Buffers":
        shape = (n, plan.query_block, plan.gathered)
        keys, values = (scratch("gathered", (n * plan.slots, *x.shape[1:]), x.dtype) for x in (key, value))
        return cls(
            scores=scratch("scores", shape, key.dtype),
            rounded=None if key.dtype == value.dtype else scratch("rounded", shape, value.dtype),
            keys=keys,
            values=values,
            keys_transposed=keys.view(n, plan.gathered, -1).transpose(1, 2),
            values_by_row=values.view(n, plan.gathered, -1),
            attended=scratch("attended", (*shape[:2], value.shape[-1]), value.dtype),
        )

    def gather_keys(self, key: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The blocks of `key` that each query block sees, side by side."""
        torch.index_select(key, 0, index, out=self.keys)
        return self.keys_transposed

    def gather_values(self, value: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The same of `value`; overwrites the keys."""
        torch.index_select(value, 0, index, out=self.values)
        return self.values_by_row


def block_sparse_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    selection: Selection,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `block_sparse_attention`, all in fp32 (fp64 for fp64) until the result is written."""
    lut, count, query_block, key_block, scale, key_mask = selection
    dtype = accumulation_dtype(query.dtype)
    plan = Plan.of(query.shape[2], selection)
    grads = empty_bshd(query, *query.shape), empty_bshd(key, *key.shape), empty_bshd(value, *value.shape)
    width = 4 * (query.shape[-1] + value.shape[-1])
    scratch, dense_scratch = Scratch(query.device), Scratch(query.device)
    any_dense = bool((count == ALL_BLOCKS).any())
    for b, group in head_groups(query, width, dtype.itemsize):
        # d/dscore = weight * (grad_out . value - delta), with delta = grad_out . out per query
        delta = (grad_out[b, group].to(dtype) * out[b, group].to(dtype)).sum(-1, keepdim=True)
        # a row without keys has lse -inf; +inf makes its weights exp(-inf) = 0 instead of NaN
        safe_lse = lse[b, group, :, None].masked_fill(lse[b, group, :, None] == float("-inf"), float("inf"))
        keys = scratch.blocks("key", key[b, group], key_block, dtype)
        values = scratch.blocks("value", value[b, group], key_block, dtype)
        grads_out = scratch.blocks("grad_out", grad_out[b, group], query_block, dtype)
        queries = scratch.blocks("query", query[b, group], query_block, dtype)
        deltas = scratch.blocks("delta", delta, query_block, dtype)
        lses = scratch.blocks("lse", safe_lse, query_block, dtype)
        valid = valid_blocks(None if key_mask is None else key_mask[b], key_block)
        listed = KeyLists.listed(plan, lut[b, group], count[b, group], valid)
        blocks = _backward_group(grads_out, queries, deltas, lses, keys, values, listed, scale, scratch)
        if any_dense and len(rows := _dense_rows(count[b, group])):
            everything = KeyLists.everything(plan, rows, valid)
            some = grads_out[rows], queries[rows], deltas[rows], lses[rows]
            dense = _backward_group(*some, keys, values, everything, scale, dense_scratch)
            blocks[0][rows] = dense[0]
            for total, part in zip(blocks[1:], dense[1:], strict=True):
                total += part
        for grad, block in zip(grads, blocks, strict=True):
            from_blocks(block, grad[b, group])
    return grads


def _backward_group(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    delta: torch.Tensor,
    lse: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: KeyLists,
    scale: float,
    scratch: Scratch,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All as blocks, delta and lse (R, query_block, 1). Returns the blocks of the three gradients."""
    plan, dtype = lists.plan, query.dtype
    grad_query = scratch("grad_query", query.shape, dtype)
    grad_key = scratch("grad_key", key.shape, dtype).zero_()
    grad_value = scratch("grad_value", value.shape, dtype).zero_()
    widest = max(key.shape[-1], value.shape[-1])
    for rows, index, masked in lists.chunks(plan.chunk(widest + 2 * plan.query_block, key.element_size())):
        shape = (rows.stop - rows.start, plan.query_block, plan.gathered)
        # `gathered` holds, one after the other: values, keys, gradients of the keys, gradients of the values
        gathered = scratch.gather(value, index, plan.gathered)
        grad_scores = scratch("grad_scores", shape, dtype)
        torch.baddbmm(delta[rows], grad_out[rows], gathered.transpose(1, 2), beta=-1, out=grad_scores)
        gathered = scratch.gather(key, index, plan.gathered)
        weights = scratch("weights", shape, dtype)
        torch.baddbmm(lse[rows], query[rows], gathered.transpose(1, 2), beta=-1, alpha=scale, out=weights)
        if masked:
            lists.mask(weights, rows)
        weights.exp_()
        grad_scores.mul_(weights)
        torch.baddbmm(grad_query[rows], grad_scores, gathered, beta=0, alpha=scale, out=grad_query[rows])
        torch.baddbmm(gathered, grad_scores.transpose(1, 2), query[rows], beta=0, alpha=scale, out=gathered)
        _accumulate(grad_key, index, gathered)
        gathered = scratch("gathered", (shape[0], plan.gathered, value.shape[-1]), dtype)
        _accumulate(grad_value, index, torch.bmm(weights.transpose(1, 2), grad_out[rows], out=gathered))
    return grad_query, grad_key, grad_value


def _accumulate(total: torch.Tensor, index: torch.Tensor, parts: torch.Tensor) -> None:
    """total[index[i]] += parts[i], in a fixed order. total: (M, block, D); parts: the same blocks, one per index."""
    parts = parts.view(-1, *total.shape[1:])
    if total.device.type == "cpu":
        total.index_add_(0, index, parts)  # adds one after the other
    else:
        total.index_put_((index,), parts, accumulate=True)  # sorts by index, where index_add_ would use atomics
