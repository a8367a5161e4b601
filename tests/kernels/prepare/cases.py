"""Inputs of prepared operands that the tests on the CPU and on a GPU share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """Everything that the operator takes. table_heads, table_batch: whether tables differ from one to the next."""

    heads: int = 3
    head_dim: int = 16
    tokens: int = 70
    pairs: str = "interleaved"
    turned: int = 8
    tables: int = 2
    table_dtype: torch.dtype = torch.float32
    table_heads: bool = False
    table_batch: bool = False
    norm: str = "rms"
    over: str = "width"
    affine: bool = True
    feature_map: str = "relu"
    block: int = 0
    ordered: bool = True
    fused: bool = False
    scale: float = 1.0

    def arguments(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Any, ...]:
        """Of the operator."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        parts = 3 if self.fused else 1
        projected = (self.scale * draw(2, self.tokens, parts, self.heads, self.head_dim)).to(dtype).to(device)
        x = projected[:, :, -1].transpose(1, 2)
        shape = (2 if self.table_batch else 1, self.heads if self.table_heads else 1, self.tokens, 2 * self.turned)
        # every second entry of tables that hold each twice, as models give them
        tables = tuple(draw(*shape).to(self.table_dtype)[..., i % 2 :: 2].to(device) for i in range(self.tables))
        channels = self.head_dim * (self.heads if self.over == "width" else 1)
        weight = (1 + draw(channels) / 4).to(dtype) if self.affine else None
        bias = draw(channels).to(dtype) if self.affine and self.norm == "layer" else None
        order = torch.randperm(self.tokens, generator=generator) if self.ordered else None
        inverse = None if order is None else torch.argsort(order)
        moved = [
            None if given is None else (given.int() if given.dtype == torch.int64 else given).to(device)
            for given in (weight, bias, order, inverse)
        ]
        settings = (self.pairs, self.norm, self.over, 1e-6, self.feature_map, self.block)
        return (x, tables, *settings, *moved)


CASES = (
    Case(),  # Wan
    Case(heads=5, tokens=33, block=16, table_batch=True),
    Case(heads=4, tables=4, table_heads=True, table_dtype=torch.bfloat16, block=32, fused=True),  # LTX
    Case(heads=6, head_dim=20, turned=10, over="head", tables=4, block=64, scale=16.0),  # HunyuanVideo
    Case(pairs="halves", norm="layer", over="head", feature_map="softmax", head_dim=24, turned=12, block=16),
    Case(pairs="halves", turned=4, norm="layer", feature_map="elu", fused=True, scale=4.0),
    Case(turned=3, norm="none", affine=False, feature_map="elu", table_dtype=torch.float64),
    Case(heads=1, tokens=1, head_dim=2, turned=1, block=16, norm="none", affine=False, ordered=False),
    Case(heads=9, feature_map="", affine=False, over="head", tokens=129, block=128, ordered=False),
)
