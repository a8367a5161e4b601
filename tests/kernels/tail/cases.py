"""Inputs of the tail, and its definition in fp64 with gradients, that the tests on the CPU and on a GPU share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from salad_compile.kernels import attend_with_tail, tail_tokens
from salad_compile.kernels.layout import ALL_BLOCKS
from salad_compile.kernels.pools import Pools
from salad_compile.kernels.selection import Selection
from salad_compile.kernels.tail import reference
from tests.kernels.helpers import make_qkv, make_selection


@dataclass(frozen=True)
class Case:
    """Everything that the operator takes."""

    tokens: int
    blocks: tuple[int, int] = (64, 64)
    pool: int = 64
    head_dim: int = 16
    layout: str = "bshd"
    scale: float = 1.0
    permille: int = 300
    dense_row: bool = False
    masked: bool = False
    text: int = 0

    def selection(self, qkv: tuple[torch.Tensor, ...]) -> Selection:
        """What block-sparse attention is told, on the device of the inputs."""
        device = qkv[0].device
        lut, count = make_selection(qkv[0].cpu(), qkv[1].cpu(), *self.blocks, self.permille)
        count = count.clone()
        if self.dense_row:
            count[:, :, -1] = ALL_BLOCKS
            count[0, 0, 0] = 1  # a row that is not full
        mask = torch.rand(2, self.tokens, generator=torch.Generator().manual_seed(3)) < 0.7 if self.masked else None
        return Selection(
            lut.to(device), count.to(device), *self.blocks, 0.25, None if mask is None else mask.to(device)
        )


def means(x: torch.Tensor, pool: int, valid: torch.Tensor) -> torch.Tensor:
    """(B, H, S, D) -> (B, H, P, D), means of the rows that are valid, (B, S); differentiable."""
    runs = torch.split(x * valid[:, None, :, None], pool, dim=2)
    counts = torch.split(valid, pool, dim=1)
    return torch.stack(
        [
            run.sum(dim=2) / count.sum(dim=1).clamp(min=1)[:, None, None]
            for run, count in zip(runs, counts, strict=True)
        ],
        dim=2,
    )


def run_both(case: Case, dtype: torch.dtype, device: str = "cpu") -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ours, expected) of the result, lse and the gradients of query, key, value and log weights, through the means."""
    qkv = make_qkv(case.tokens, case.layout, dtype, scale=case.scale, head_dim=case.head_dim)
    leaves = [x.to(device).requires_grad_() for x in qkv]
    weight = torch.tensor([-0.5, 0.25, 1.0], dtype=torch.promote_types(dtype, torch.float32), device=device)
    leaves.append(weight.requires_grad_())
    selection = case.selection(tuple(x.detach() for x in leaves[:3]))
    lut, count, _, key_block, _, mask = selection
    begin, end = 0, case.tokens - case.text
    counted = tail_tokens(lut, count, case.tokens, key_block, case.pool, begin, end, mask)
    expected_count = reference.tail_tokens(lut, count, case.tokens, key_block, case.pool, begin, end, mask)
    assert torch.equal(counted, expected_count)
    valid = torch.ones(2, case.tokens, device=device, dtype=torch.bool) if mask is None else mask.clone()
    valid[:, end:] = False

    def pooled(x: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return means(x.to(wide), case.pool, valid.to(wide)).to(x.dtype)

    query, key, value, log_weight = leaves
    out, lse = attend_with_tail(query, key, value, pooled(key), pooled(value), counted, log_weight, *selection)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(device)
    grads = torch.autograd.grad(out, leaves, grad.to(dtype))
    exact = [x.detach().double().requires_grad_() for x in leaves]
    pools = Pools(pooled(exact[1]), pooled(exact[2]), counted, exact[3])
    expected, expected_lse = reference.attend_with_tail(*exact[:3], pools, selection)
    expected_grads = torch.autograd.grad(expected, exact, grad)
    return [(out, expected), (lse, expected_lse), *zip(grads, expected_grads, strict=True)]


def error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """|ours - expected| / |expected| in fp64 over what is finite; |ours - expected| alone where gradients vanish."""
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(ours), finite)
    ours, expected = ours[finite].double(), expected[finite].double()
    norm = float(expected.detach().norm())
    return float((ours - expected).norm()) / (norm if norm > 1e-6 else 1.0)


def brute_force(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """(the definition in fp64, one softmax written out row by row over selected tokens and pooled rest)."""
    query, key, value = make_qkv(case.tokens, head_dim=case.head_dim, scale=case.scale)
    selection = case.selection((query, key, value))
    lut, count, query_block, key_block, scale, _ = selection
    counted = reference.tail_tokens(lut, count, case.tokens, key_block, case.pool, 0, case.tokens)
    ones = torch.ones(2, case.tokens, dtype=torch.float64)
    pools = means(key, case.pool, ones), means(value, case.pool, ones)
    ours, _ = reference.attend_with_tail(query, key, value, Pools(*pools, counted, None), selection)
    rows = []
    for b in range(2):
        for h in range(3):
            for i in range(case.tokens):
                block = i // query_block
                listed = set(lut[b, h, block, : int(count[b, h, block])].tolist())
                seen = [j for j in range(case.tokens) if j // key_block in listed]
                left = [j for j in range(case.tokens) if j // key_block not in listed]
                of_pool = {p: [j for j in left if j // case.pool == p] for p in {j // case.pool for j in left}}
                keys = [key[b, h, j] for j in seen] + [pools[0][b, h, p] for p in of_pool]
                values = [value[b, h, j] for j in seen] + [pools[1][b, h, p] for p in of_pool]
                times = torch.tensor([1.0] * len(seen) + [float(len(js)) for js in of_pool.values()]).double()
                weights = times * torch.exp(torch.stack(keys) @ query[b, h, i] * scale)
                rows.append((weights / weights.sum()) @ torch.stack(values))
    return ours, torch.stack(rows).view(2, 3, case.tokens, -1)
