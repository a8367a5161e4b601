"""What the engine "flash" must get right.

    python -m tests.kernels.gpu.flash_cases HEAD_DIM QUERY_BLOCK KEY_BLOCK [DTYPE]

`test_flash.py` runs this in processes of their own, as a kernel that waits for ever cannot be stopped from within. It
prints one line for each case, "ok NAME" or "FAIL NAME: why", and needs flash-attn-4 and a Hopper GPU.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator

import pytest
import torch

from salad_compile.kernels import KernelArgumentError, block_sparse_attention, measure_executions, use_engine
from salad_compile.kernels.block_sparse import flash, reference
from salad_compile.kernels.block_sparse.deferred import raise_pending
from salad_compile.kernels.layout import ALL_BLOCKS, block_count
from salad_compile.kernels.selection import Selection
from tests.kernels.gpu.gluon_cases import DEVICE, Tensors, on_device
from tests.kernels.helpers import FORWARD_BAR, LAYOUTS, make_qkv, relative_l2

LENGTHS = (1, 64, 113, 203, 1023, 2049)
Blocks = tuple[int, int]
Case = tuple[str, Callable[[], None]]


def random_lists(batch: int, heads: int, tokens: int, blocks: Blocks, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending lists of random blocks, up to half of them; some empty, some of all blocks."""
    generator = torch.Generator().manual_seed(seed)
    query_blocks, key_blocks = (block_count(tokens, block) for block in blocks)
    slots = max(1, key_blocks // 2)
    lut = torch.rand(batch, heads, query_blocks, key_blocks, generator=generator).argsort(-1)[..., :slots]
    count = torch.randint(0, slots + 1, lut.shape[:-1], generator=generator)
    count[..., -1] = torch.where(count[..., -1] % 3 == 0, ALL_BLOCKS, count[..., -1])
    used = torch.arange(slots) < count[..., None]
    # unlisted entries hold what must not be read
    lut = torch.where(used, lut, 2**30).sort(-1).values
    return lut.int().to(DEVICE), count.int().to(DEVICE)


def check(qkv: Tensors, selection: Selection) -> None:
    """Raise AssertionError unless the engine gives what the definition gives in fp64, twice the same."""
    out, lse = flash.block_sparse_attention(*qkv, selection)
    want, want_lse = reference.block_sparse_attention(*(x.double() for x in qkv), selection)
    seen = want_lse > -torch.inf
    assert bool(torch.isfinite(out).all()), "out has entries that are not finite"
    assert bool((out[~seen] == 0).all()), "rows without keys are not 0"
    assert torch.equal(lse > -torch.inf, seen), "lse is -inf in the wrong rows"
    if bool(seen.any()):
        error = relative_l2(out, want)
        assert error < FORWARD_BAR[out.dtype], f"out is off by {error:.2e}"
        away = ((lse.double() - want_lse).abs() / (1 + want_lse.abs()))[seen].max().item()
        assert away < 2e-4, f"lse is off by {away:.2e} of its size"
    again, again_lse = flash.block_sparse_attention(*qkv, selection)
    assert torch.equal(out, again), "two runs differ"
    assert torch.equal(lse, again_lse), "two runs differ in lse"


def random_cases(head_dim: int, blocks: Blocks, dtype: torch.dtype) -> Iterator[Case]:
    """Lengths, scales and layouts, each value several times but not each combination."""
    for number in range(3 * len(LENGTHS)):
        tokens, layout = LENGTHS[number % len(LENGTHS)], LAYOUTS[number % 3]
        scale, sign = (1.0, 4.0, 16.0)[number // len(LENGTHS)], -1 if number % 5 == 4 else 1

        def run(number: int = number, tokens: int = tokens, layout: str = layout, scale: float = scale * sign) -> None:
            batch, heads = 1 + number % 2, 1 + number % 3
            sizes = {"batch": batch, "heads": heads, "head_dim": head_dim}
            qkv = on_device(make_qkv(tokens, layout, dtype, scale=abs(scale), seed=number, **sizes))
            lists = random_lists(batch, heads, tokens, blocks, number)
            check(qkv, Selection(*lists, *blocks, head_dim**-0.5 * (1 if scale > 0 else -1)))

        yield f"random {tokens} {layout} x{scale * sign:g}", run


def other_cases(head_dim: int, blocks: Blocks, dtype: torch.dtype) -> Iterator[Case]:
    """Through the operator, and with lists that are wrong."""

    def training() -> None:
        """The backward, on the engine that has one, goes on from this out and lse."""
        leaves = [x.requires_grad_() for x in on_device(make_qkv(515, "bshd", dtype, head_dim=head_dim))]
        lists = random_lists(2, 3, 515, blocks, 0)
        with use_engine("flash"), measure_executions() as executions:
            out = block_sparse_attention(*leaves, *lists, *blocks, head_dim**-0.5)[0]
            got = torch.autograd.grad(out.float().square().sum(), leaves)
        assert [execution.engine for execution in executions] == ["flash"]
        exact = [x.detach().double().requires_grad_() for x in leaves]
        selection = Selection(*lists, *blocks, head_dim**-0.5)
        wanted = reference.block_sparse_attention(exact[0], exact[1], exact[2], selection)[0]
        for name, ours, theirs in zip("qkv", got, torch.autograd.grad(wanted.square().sum(), exact), strict=True):
            error = relative_l2(ours, theirs)
            assert error < 1e-2, f"gradient of {name} is off by {error:.2e}"

    def compiled() -> None:
        qkv, lists = on_device(make_qkv(515, "bshd", dtype, head_dim=head_dim)), random_lists(2, 3, 515, blocks, 0)
        attend = torch.compile(
            lambda query, key, value: block_sparse_attention(query, key, value, *lists, *blocks, head_dim**-0.5)[0] + 1,
            fullgraph=True,
            backend="aot_eager",
        )
        with use_engine("flash"):
            expected = block_sparse_attention(*qkv, *lists, *blocks, head_dim**-0.5)[0] + 1
            assert torch.equal(attend(*qkv), expected)

    def wrong_lists() -> None:
        qkv = on_device(make_qkv(515, "bshd", dtype, head_dim=head_dim))
        lut, count = random_lists(2, 3, 515, blocks, 0)
        flash.block_sparse_attention(*qkv, Selection(lut - 5, count + 40, *blocks, 1.0))
        with pytest.raises(KernelArgumentError, match="count has entries outside"):
            raise_pending(DEVICE, wait=True)

    yield "training", training
    yield "compiled", compiled
    yield "wrong lists", wrong_lists


def main() -> None:
    head_dim, query_block, key_block = map(int, sys.argv[1:4])
    dtype: torch.dtype = getattr(torch, sys.argv[4] if len(sys.argv) > 4 else "bfloat16")
    settings = (head_dim, (query_block, key_block), dtype)
    for name, case in (*random_cases(*settings), *other_cases(*settings)):
        try:
            case()
            print("ok", name, flush=True)
        except Exception as error:
            print(f"FAIL {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            traceback.print_exc()


if __name__ == "__main__":
    main()
