"""How block-sparse attention is cut to stay in cache: heads in groups, query blocks in chunks, one set of buffers."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..layout import block_count
from ..selection import Selection

_GROUP_BYTES = 16 << 20  # query, key and value of the heads worked on together: half of a common last-level cache
# Gathered keys or values, and scores, of the query blocks that a thread works on, measured, and of all threads.
_THREAD_BYTES, _CHUNK_BYTES = 2 << 20, 32 << 20


@dataclass(frozen=True)
class Plan:
    """Sizes of one call."""

    query_block: int
    key_block: int
    query_blocks: int
    key_blocks: int
    slots: int
    short: int  # valid tokens of the last key block where that block is short, else 0

    @classmethod
    def of(cls, tokens: int, selection: Selection) -> "Plan":
        query_block, key_block = selection.query_block, selection.key_block
        return cls(
            query_block=query_block,
            key_block=key_block,
            query_blocks=block_count(tokens, query_block),
            key_blocks=block_count(tokens, key_block),
            slots=selection.lut.shape[-1],
            short=tokens % key_block,
        )

    @property
    def gathered(self) -> int:
        """Key tokens that one query block sees."""
        return self.slots * self.key_block

    def chunk(self, width: int, itemsize: int) -> int:
        """Query blocks worked on together; width is the number of elements kept per gathered key token."""
        per_query_block = self.gathered * width * itemsize
        threads = torch.get_num_threads()
        blocks = max(1, min(threads * _THREAD_BYTES, _CHUNK_BYTES) // per_query_block)
        return blocks // threads * threads if blocks > threads else blocks  # every thread gets whole matrices


def head_groups(query: torch.Tensor, width: int, itemsize: int) -> Iterator[tuple[int, slice]]:
    """(batch index, run of heads) pairs small enough for their blocks to stay in the last-level cache."""
    batch, heads, tokens, _ = query.shape
    step = max(1, _GROUP_BYTES // max(1, tokens * width * itemsize))
    for b in range(batch):
        for start in range(0, heads, step):
            yield b, slice(start, min(start + step, heads))


class Scratch:
    """Named buffers that live for one call: fresh memory for every chunk would cost a page fault per 4 KiB."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, torch.Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...], torch.dtype], torch.Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of that shape; contents are whatever was there."""
        view = self._views.get((name, shape, dtype))
        if view is None:
            size = math.prod(shape) * dtype.itemsize
            buffer = self._buffers.get(name)
            if buffer is None or len(buffer) < size:
                buffer = self._buffers[name] = torch.empty(size, dtype=torch.uint8, device=self._device)
                self._views = {key: kept for key, kept in self._views.items() if key[0] != name}
            view = self._views[name, shape, dtype] = buffer[:size].view(dtype).view(shape)
        return view

    def blocks(self, name: str, x: torch.Tensor, block: int, dtype: torch.dtype) -> torch.Tensor:
        """(G, S, D) of any strides -> contiguous (G * M, block, D); the short last block ends in 0."""
        groups, tokens, head_dim = x.shape
        padded = block_count(tokens, block) * block
        blocks = self(name, (groups, padded, head_dim), dtype)
        blocks[:, :tokens] = x
        blocks[:, tokens:] = 0
        return blocks.view(-1, block, head_dim)

    def rows(self, name: str, x: torch.Tensor, block: int, dtype: torch.dtype) -> torch.Tensor:
        """`blocks` for what is only read where it lies: of one head without a short block, a view."""
        view = whole_blocks(x, block) if x.dtype == dtype else None
        return self.blocks(name, x, block, dtype) if view is None else view

    def gather(self, blocks: torch.Tensor, index: torch.Tensor, gathered: int) -> torch.Tensor:
        """blocks: (M, block, D), index: (n * K,) -> (n, gathered, D), the blocks of each row side by side.

        Overwrites the last result: with one buffer for keys and values a chunk stays in a core's own cache.
        """
        _, block, head_dim = blocks.shape
        out = self("gathered", (len(index), block, head_dim), blocks.dtype)
        return torch.index_select(blocks, 0, index, out=out).view(-1, gathered, head_dim)


def whole_blocks(x: torch.Tensor, block: int) -> torch.Tensor | None:
    """(1, S, D) -> (M, block, D), a view; None for several heads or a short block, which need memory of their own."""
    if len(x) > 1 or x.shape[1] % block or x.stride(-1) != 1:
        return None
    return x[0].view(-1, block, x.shape[-1])


def from_blocks(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """The inverse of `Scratch.blocks`, written into out: (G, S, D), any strides and dtype, or (G, S) for 2-D blocks."""
    groups, tokens = out.shape[:2]
    out.copy_(blocks.view(groups, -1, *out.shape[2:])[:, :tokens])


class KeyLists:
    """Which key blocks some query blocks attend to: rows of a flat list of the query blocks of a group of heads."""

    def __init__(
        self, plan: Plan, ids: torch.Tensor, unused: torch.Tensor, head: torch.Tensor, valid: torch.Tensor | None
    ) -> None:
        """ids and unused: (R, K), key blocks of the row's head; head: (R,); valid: bool (Mk, key_block), or None."""
        self.plan = plan
        # unused slots may hold anything: they read block 0 of the head and are masked afterwards
        self._ids = ids.long().masked_fill(unused, 0)
        self._index = (self._ids + head[:, None] * plan.key_blocks).view(-1)
        visible = torch.full_like(ids, plan.key_block)  # leading tokens of each slot that may be seen
        if plan.short:
            visible.masked_fill_(ids == plan.key_blocks - 1, plan.short)
        self._visible = visible.masked_fill_(unused, 0)
        self._valid = valid
        # On the CPU we look which rows need a mask; elsewhere that would sync, so every row gets one.
        self._masked: list[bool] | None = None
        if ids.device.type == "cpu" and valid is None:
            self._masked = (self._visible < plan.key_block).any(dim=-1).tolist()

    @classmethod
    def listed(cls, plan: Plan, lut: torch.Tensor, count: torch.Tensor, valid: torch.Tensor | None) -> "KeyLists":
        """The lists of all query blocks of a group. lut: (G, Mq, K) and count: (G, Mq); a dense row lists nothing."""
        groups, query_blocks, slots = lut.shape
        unused = torch.arange(slots, device=lut.device) >= count[..., None]
        head = torch.arange(groups, device=lut.device).repeat_interleave(query_blocks)
        return cls(plan, lut.reshape(-1, slots), unused.view(-1, slots), head, valid)

    @classmethod
    def everything(cls, plan: Plan, rows: torch.Tensor, valid: torch.Tensor | None) -> "KeyLists":
        """All key blocks for the query blocks `rows` (R,) of a group."""
        ids = torch.arange(plan.key_blocks, device=rows.device, dtype=torch.int32).expand(len(rows), -1)
        wide = replace(plan, slots=plan.key_blocks)
        return cls(wide, ids, torch.zeros_like(ids, dtype=torch.bool), rows // plan.query_blocks, valid)

    def chunks(self, step: int) -> Iterator[tuple[slice, torch.Tensor, bool]]:
        """(rows, ids of their gathered key blocks, does any of them need a mask), in order."""
        total = len(self._visible)
        for start in range(0, total, step):
            rows = slice(start, min(start + step, total))
            masked = self._masked is None or any(self._masked[rows])
            yield rows, self._index[rows.start * self.plan.slots : rows.stop * self.plan.slots], masked

    def mask(self, scores: torch.Tensor, rows: slice) -> None:
        """Set to -inf what the query blocks `rows` must not see: unused slots, padding keys, the end of the last block.

        scores: (n, query_block, gathered).
        """
        offset = torch.arange(self.plan.key_block, device=scores.device)
        hidden = offset >= self._visible[rows, :, None]
        if self._valid is not None:
            hidden |= ~self._valid[self._ids[rows]]
        scores.masked_fill_(hidden.view(-1, 1, self.plan.gathered), float("-inf"))


def valid_blocks(key_mask: torch.Tensor | None, key_block: int) -> torch.Tensor | None:
    """bool (S,) -> (Mk, key_block); the padding of the last block is not valid."""
    if key_mask is None:
        return None
    padded = torch.nn.functional.pad(key_mask, (0, -len(key_mask) % key_block))
    return padded.view(-1, key_block)
