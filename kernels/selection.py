"""What block-sparse attention is told about the keys: one value for operators, engines and those who look on."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .remembered import fact_of, remember


class Selection(NamedTuple):
    """Which keys every query block attends to, and how.

    The fields stand in the order of the operators' arguments after the tensors, so `*selection` passes them.

    Attributes:
        lut: int32 (B, H, Mq, K), ascending ids of the selected key blocks, Mq = ceil(S / query_block).
        count: int32 (B, H, Mq), valid entries per row of lut, or ALL_BLOCKS (-1).
        query_block, key_block: tokens per block; only the last one is short.
        scale: factor on the scores.
        key_mask: bool (B, S), True where a key is valid; None where all are.
    """

    lut: torch.Tensor
    count: torch.Tensor  # type: ignore[assignment]  # hides tuple.count
    query_block: int
    key_block: int
    scale: float
    key_mask: torch.Tensor | None = None

    def contiguous(self) -> Selection:
        """The same, all contiguous, with lists of a slot at least: kernels read the first entry of every list."""
        key_mask = None if self.key_mask is None else self.key_mask.contiguous()
        lut = self.lut.contiguous() if self.lut.shape[-1] else self.lut.new_zeros((*self.lut.shape[:3], 1))
        return self._replace(lut=lut, count=self[1].contiguous(), key_mask=key_mask)


class _Selected(NamedTuple):
    """What a list of selected blocks and its counts have in common.

    Attributes:
        pair: which of them belong together. key_blocks: how many there are. full: whether every list is.
    """

    pair: object
    key_blocks: int
    full: bool


def remember_selected(lut: torch.Tensor, count: torch.Tensor, key_blocks: int, *, full: bool) -> None:
    """Note that these are right, by the way they were made: `are_selected` then spares reading them.

    Args:
        full: whether all entries of `lut` are valid, as far as that is known without reading `count`.
    """
    selected = _Selected(object(), key_blocks, full)
    remember(lut, selected)
    remember(count, selected)


def are_selected(lut: torch.Tensor, count: torch.Tensor, key_blocks: int) -> bool:
    """Whether an operator made these together, for as many key blocks, and nothing wrote into them since."""
    return _selected(lut, count, key_blocks) is not None


def are_full(lut: torch.Tensor, count: torch.Tensor, key_blocks: int) -> bool:
    """Whether they are selected, and all entries of `lut` are known to be valid."""
    selected = _selected(lut, count, key_blocks)
    return selected is not None and selected.full


def _selected(lut: torch.Tensor, count: torch.Tensor, key_blocks: int) -> _Selected | None:
    fact = fact_of(lut)
    known = isinstance(fact, _Selected) and fact.key_blocks == key_blocks and fact_of(count) is fact
    return fact if known else None  # type: ignore[return-value]
