"""Counting what block-sparse attention really computed (specification 4.5)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .layout import ALL_BLOCKS, block_count
from .listening import listen
from .selection import Selection


@dataclass(frozen=True)
class Execution:
    """One forward run of `salad::block_sparse_attention`: token pairs summed over batch, heads and queries.

    Keys that a padding mask hides count like the others. Query blocks that attend to nothing do not count: another
    process may attend with them.

    Attributes:
        engine: name of the engine that ran.
    """

    computed_pairs: int
    total_pairs: int
    engine: str

    @property
    def sparsity(self) -> float:
        """Share of token pairs that were left out."""
        return 1 - self.computed_pairs / max(self.total_pairs, 1)


def overall_sparsity(executions: Sequence[Execution]) -> float | None:
    """Share of token pairs that all of them together left out; None if nothing ran."""
    total = sum(execution.total_pairs for execution in executions)
    return 1 - sum(execution.computed_pairs for execution in executions) / total if total else None


_active: list[list[Execution]] = []


@contextmanager
def measure_executions() -> Iterator[list[Execution]]:
    """While active, every forward execution of block-sparse attention appends an `Execution` to the yielded list.

    Sees eager calls and calls from inside compiled graphs alike. Contexts nest; each sees all executions inside it.
    Reading the selection forces the device to finish, so leave it out of timings. Not active, it costs one truth test.
    """
    with listen(_active, []) as executions:
        yield executions


class Captured(NamedTuple):
    """What one forward of `salad::block_sparse_attention` was given and found: its selection, and lse (B, H, S)."""

    selection: Selection
    lse: torch.Tensor


_listening: list[list[Captured]] = []


@contextmanager
def capture_selections() -> Iterator[list[Captured]]:
    """While active, every forward execution of block-sparse attention appends a `Captured` to the yielded list.

    Holds the tensors themselves, which must not be changed. Not active, it costs one truth test.
    """
    with listen(_listening, []) as captured:
        yield captured


def is_listening() -> bool:
    """Whether a `capture_selections` context is active."""
    return bool(_listening)


def record_selection(selection: Selection, lse: torch.Tensor) -> None:
    """Called by the forward operator. Does nothing unless a `capture_selections` context is active."""
    for captured in _listening:
        captured.append(Captured(selection, lse))


def record_execution(selection: Selection, tokens: int, engine: str) -> None:
    """Called by the forward operator. Does nothing unless a `measure_executions` context is active."""
    if not _active:
        return
    lut, count, query_block, key_block, *_ = selection
    query_blocks, slots = lut.shape[2:]
    key_rows = torch.full((block_count(tokens, key_block),), key_block, dtype=torch.int64, device=lut.device)
    key_rows[-1] = tokens - (len(key_rows) - 1) * key_block
    query_rows = torch.full((query_blocks,), query_block, dtype=torch.int64, device=lut.device)
    query_rows[-1] = tokens - (query_blocks - 1) * query_block
    valid = torch.arange(slots, device=lut.device) < count[..., None]
    rows = (key_rows[torch.where(valid, lut, 0).long()] * valid).sum(-1).masked_fill(count == ALL_BLOCKS, tokens)
    total = int((query_rows * (count != 0)).sum()) * tokens
    execution = Execution(int((rows * query_rows).sum()), total, engine)
    for executions in _active:
        executions.append(execution)
