"""The fast plain-torch engine of block-sparse attention. Runs on any device; tuned for the CPU.

The selected key and value blocks of a few query blocks at a time are gathered side by side, which turns the work into
three large batched matmuls over buffers that stay in cache. Nothing ever holds S x S elements.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..checks import accumulation_dtype
from ..layout import block_count, empty_bshd, take_in_order

_GROUP_BYTES = 16 << 20  # query, key and value of the heads worked on together: half of a common last-level cache
_CHUNK_BYTES = 4 << 20  # gathered keys and values and the scores of the query blocks worked on together


@dataclass(frozen=True)
class _Plan:
    """Sizes of one call, and the rows of the selection that need a mask."""

    query_block: int
    key_block: int
    query_blocks: int
    key_blocks: int
    slots: int
    short: int  # valid tokens of the last key block where that block is short, else 0

    @classmethod
    def of(cls, tokens: int, lut: torch.Tensor, query_block: int, key_block: int) -> "_Plan":
        key_blocks = block_count(tokens, key_block)
        return cls(
            query_block=query_block,
            key_block=key_block,
            query_blocks=block_count(tokens, query_block),
            key_blocks=key_blocks,
            slots=lut.shape[-1],
            short=tokens % key_block,
        )

    @property
    def gathered(self) -> int:
        """Key tokens that one query block sees."""
        return self.slots * self.key_block

    def chunk(self, width: int, itemsize: int) -> int:
        """Query blocks worked on together; width is the number of channels gathered per key token."""
        per_query_block = self.gathered * (width + 2 * self.query_block) * itemsize
        return max(1, _CHUNK_BYTES // per_query_block)


def _head_groups(query: torch.Tensor, width: int, itemsize: int) -> Iterator[tuple[int, slice]]:
    """(batch index, run of heads) pairs small enough for their blocks to stay in the last-level cache."""
    batch, heads, tokens, _ = query.shape
    step = max(1, _GROUP_BYTES // max(1, tokens * width * itemsize))
    for b in range(batch):
        for start in range(0, heads, step):
            yield b, slice(start, min(start + step, heads))


def _to_blocks(x: torch.Tensor, order: torch.Tensor | None, block: int, dtype: torch.dtype) -> torch.Tensor:
    """(G, S, D) of any strides -> contiguous (G * M, block, D) in token order; the short last block ends in zeros."""
    groups, tokens, head_dim = x.shape
    x = take_in_order(x, order)
    padded = block_count(tokens, block) * block
    if padded == tokens:
        blocks = x.to(dtype).contiguous()
    else:
        blocks = x.new_zeros((groups, padded, head_dim), dtype=dtype)
        blocks[:, :tokens] = x
    return blocks.view(-1, block, head_dim)


def _from_blocks(blocks: torch.Tensor, order: torch.Tensor | None, out: torch.Tensor) -> None:
    """The inverse of `_to_blocks`, written into out: (G, S, D) of any strides and dtype, or (G, S) for 2-D blocks."""
    groups, tokens = out.shape[:2]
    rows = blocks.view(groups, -1, *out.shape[2:])[:, :tokens]
    if order is None:
        out.copy_(rows)
    else:
        out.index_copy_(1, order.long(), rows.to(out.dtype))


def _hidden(plan: _Plan, lut: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """bool (G * Mq, K): the slots with tokens that must not be seen, unused ones and those of the short last block."""
    unused = torch.arange(plan.slots, device=lut.device) >= count[:, None]
    return unused | (lut == plan.key_blocks - 1) if plan.short else unused


def _mask_scores(plan: _Plan, scores: torch.Tensor, lut: torch.Tensor, count: torch.Tensor) -> None:
    """Set the scores of unused slots, and of the padding of the short last block, to -inf in place."""
    first_hidden = torch.full_like(lut, plan.key_block)
    if plan.short:
        first_hidden.masked_fill_(lut == plan.key_blocks - 1, plan.short)
    first_hidden.masked_fill_(torch.arange(plan.slots, device=lut.device) >= count[:, None], 0)
    offset = torch.arange(plan.key_block, device=lut.device)
    mask = (offset >= first_hidden[..., None]).view(len(lut), 1, plan.gathered)
    scores.masked_fill_(mask, float("-inf"))


class _Selection:
    """The selection of one group of heads, as rows of a flat list of query blocks."""

    def __init__(self, plan: _Plan, lut: torch.Tensor, count: torch.Tensor) -> None:
        """lut: (G, Mq, K) and count: (G, Mq) of the heads of the group."""
        groups = lut.shape[0]
        self.plan = plan
        self.lut, self.count = lut.reshape(-1, plan.slots), count.reshape(-1)
        unused = torch.arange(plan.slots, device=lut.device) >= count[..., None]
        head_start = torch.arange(groups, device=lut.device)[:, None, None] * plan.key_blocks
        # unused slots may hold anything: they read block 0 of the head and are masked afterwards
        self.index = (lut.long().masked_fill(unused, 0) + head_start).view(-1)
        # On the CPU we look which rows need a mask; elsewhere that would sync, so every row gets one.
        self._masked: list[bool] | None = None
        if lut.device.type == "cpu":
            self._masked = _hidden(plan, self.lut, self.count).any(dim=-1).tolist()

    def chunks(self, step: int) -> Iterator[tuple[slice, torch.Tensor, bool]]:
        """(rows, ids of their gathered key blocks, does any of them need a mask), in order."""
        for start in range(0, len(self.lut), step):
            rows = slice(start, min(start + step, len(self.lut)))
            masked = self._masked is None or any(self._masked[rows])
            yield rows, self.index[rows.start * self.plan.slots : rows.stop * self.plan.slots], masked

    def mask(self, scores: torch.Tensor, rows: slice) -> None:
        """Hide from scores (n, query_block, gathered) what the query blocks `rows` must not see."""
        _mask_scores(self.plan, scores, self.lut[rows], self.count[rows])


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lut: torch.Tensor,
    count: torch.Tensor,
    order: torch.Tensor | None,
    query_block: int,
    key_block: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.block_sparse_attention`."""
    batch, heads, tokens, head_dim = query.shape
    dtype = accumulation_dtype(query.dtype)
    # bf16 weights times bf16 values: twice as fast as fp32 where the CPU has bf16 units. Scores stay fp32 throughout,
    # because a 16-bit matmul rounds its result to 16 bits here, and a score of 300 would be off by one.
    value_dtype = torch.bfloat16 if query.dtype == torch.bfloat16 else dtype
    plan = _Plan.of(tokens, lut, query_block, key_block)
    out = empty_bshd(query, batch, heads, tokens, value.shape[-1])
    lse = query.new_empty((batch, heads, tokens), dtype=dtype)
    width = 2 * head_dim + value.shape[-1]
    for b, group in _head_groups(query, width, dtype.itemsize):
        selection = _Selection(plan, lut[b, group], count[b, group])
        blocks_out, blocks_lse = _forward_group(
            _to_blocks(query[b, group], order, query_block, dtype),
            _to_blocks(key[b, group], order, key_block, dtype),
            _to_blocks(value[b, group], order, key_block, value_dtype),
            selection,
            scale,
        )
        _from_blocks(blocks_out, order, out[b, group])
        _from_blocks(blocks_lse, order, lse[b, group])
    return out, lse


def _forward_group(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, selection: _Selection, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """query: (G * Mq, query_block, D); key and value: (G * Mk, key_block, D). Returns blocks of out and lse."""
    plan, head_dim, value_dim = selection.plan, key.shape[-1], value.shape[-1]
    step = plan.chunk(head_dim + value_dim, key.element_size())
    out = value.new_empty((*query.shape[:2], value_dim))
    lse = query.new_empty(query.shape[:2])
    for rows, index, masked in selection.chunks(step):
        keys = key.index_select(0, index).view(-1, plan.gathered, head_dim)
        scores = torch.bmm(query[rows], keys.transpose(1, 2)).mul_(scale)
        if masked:
            selection.mask(scores, rows)
        highest = scores.amax(dim=-1)
        weights = torch.softmax(scores, dim=-1)
        # the largest weight is exp(highest - lse), and never small enough to lose digits
        torch.sub(highest, weights.amax(dim=-1).log_(), out=lse[rows])
        if masked:
            empty = highest == float("-inf")
            weights.masked_fill_(empty[..., None], 0)
            lse[rows].masked_fill_(empty, float("-inf"))
        values = value.index_select(0, index).view(-1, plan.gathered, value_dim)
        torch.bmm(weights.to(value.dtype), values, out=out[rows])
    return out, lse


def backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lut: torch.Tensor,
    count: torch.Tensor,
    order: torch.Tensor | None,
    query_block: int,
    key_block: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `forward`, all in fp32 (fp64 for fp64) until the result is written."""
    dtype = accumulation_dtype(query.dtype)
    plan = _Plan.of(query.shape[2], lut, query_block, key_block)
    grads = tuple(empty_bshd(x, *x.shape) for x in (query, key, value))
    width = 4 * (query.shape[-1] + value.shape[-1])
    for b, group in _head_groups(query, width, dtype.itemsize):
        # d/dscore = weight * (grad_out . value - delta), with delta = grad_out . out per query
        delta = (grad_out[b, group].to(dtype) * out[b, group].to(dtype)).sum(-1)
        # a row without keys has lse -inf; +inf makes its weights exp(-inf) = 0 instead of NaN
        safe_lse = lse[b, group].masked_fill(lse[b, group] == float("-inf"), float("inf"))
        blocks = _backward_group(
            _to_blocks(grad_out[b, group], order, query_block, dtype),
            _to_blocks(query[b, group], order, query_block, dtype),
            _to_blocks(key[b, group], order, key_block, dtype),
            _to_blocks(value[b, group], order, key_block, dtype),
            _to_blocks(delta[..., None], order, query_block, dtype),
            _to_blocks(safe_lse[..., None], order, query_block, dtype),
            _Selection(plan, lut[b, group], count[b, group]),
            scale,
        )
        for grad, block in zip(grads, blocks, strict=True):
            _from_blocks(block, order, grad[b, group])
    return grads


def _backward_group(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    delta: torch.Tensor,
    lse: torch.Tensor,
    selection: _Selection,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All as blocks, delta and lse (G * Mq, query_block, 1). Returns the blocks of the three gradients."""
    plan, head_dim, value_dim = selection.plan, key.shape[-1], value.shape[-1]
    step = plan.chunk(2 * (head_dim + value_dim), key.element_size())
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for rows, index, masked in selection.chunks(step):
        keys = key.index_select(0, index).view(-1, plan.gathered, head_dim)
        values = value.index_select(0, index).view(-1, plan.gathered, value_dim)
        weights = torch.bmm(query[rows], keys.transpose(1, 2)).mul_(scale).sub_(lse[rows])
        if masked:
            selection.mask(weights, rows)
        weights.exp_()
        grad_scores = torch.bmm(grad_out[rows], values.transpose(1, 2)).sub_(delta[rows]).mul_(weights).mul_(scale)
        torch.bmm(grad_scores, keys, out=grad_query[rows])
        _accumulate(grad_key, index, torch.bmm(grad_scores.transpose(1, 2), query[rows]))
        _accumulate(grad_value, index, torch.bmm(weights.transpose(1, 2), grad_out[rows]))
    return grad_query, grad_key, grad_value


def _accumulate(total: torch.Tensor, index: torch.Tensor, parts: torch.Tensor) -> None:
    """total[index[i]] += parts[i], in a fixed order. total: (M, block, D); parts: the same blocks, one per index."""
    parts = parts.view(-1, *total.shape[1:])
    if total.device.type == "cpu":
        total.index_add_(0, index, parts)  # adds one after the other
    else:
        total.index_put_((index,), parts, accumulate=True)  # sorts by index, where index_add_ would use atomics
