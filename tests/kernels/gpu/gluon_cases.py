"""What the Gluon forward must get right: `python -m tests.kernels.gpu.gluon_cases HEAD_DIM QUERY_BLOCK [NAME]`.

`test_gluon.py` runs this in a process of its own, as a kernel that waits for ever cannot be stopped from within. It
prints one line for each case, "ok NAME" or "FAIL NAME: why".
"""

from __future__ import annotations

import itertools
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from salad_compile.kernels import KernelArgumentError
from salad_compile.kernels.block_sparse import gluon, reference
from salad_compile.kernels.block_sparse.deferred import raise_pending
from salad_compile.kernels.layout import ALL_BLOCKS, block_count
from salad_compile.kernels.repairs import repairs
from salad_compile.kernels.selection import Selection
from tests.kernels.helpers import FORWARD_BAR, LAYOUTS, make_qkv, relative_l2

KEY_BLOCK = 64
LENGTHS = (1, 63, 64, 65, 113, 203, 1023, 2049)
DEVICE = torch.device("cuda", 0)

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class Call:
    """The arguments of one call."""

    qkv: Tensors
    lut: torch.Tensor
    count: torch.Tensor
    query_block: int
    scale: float
    key_mask: torch.Tensor | None = None

    def selection(self) -> Selection:
        """What the operator calls it."""
        return Selection(self.lut, self.count, self.query_block, KEY_BLOCK, self.scale, self.key_mask)

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse; the memory that they come from is NaN before."""
        batch, heads, tokens, head_dim = self.qkv[0].shape
        poison = [
            torch.full((batch * heads * tokens * head_dim,), torch.nan, dtype=torch.bfloat16, device=DEVICE),
            torch.full((batch * heads * tokens,), torch.nan, device=DEVICE),
        ]
        del poison
        out, lse = gluon.block_sparse_attention(*self.qkv, self.selection())
        torch.cuda.synchronize()
        return out, lse

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The definition in fp64, on the same device."""
        query, key, value = (x.double() for x in self.qkv)
        return reference.block_sparse_attention(query, key, value, self.selection())

    def check(self) -> None:
        """Raise AssertionError unless the kernel gives what the definition gives."""
        (out, lse), (want, want_lse) = self.run(), self.expected()
        seen = want_lse > -torch.inf
        assert bool(torch.isfinite(out).all()), "out has entries that are not finite"
        assert bool((out[~seen] == 0).all()), "rows without keys are not 0"
        assert torch.equal(lse > -torch.inf, seen), "lse is -inf in the wrong rows"
        if bool(seen.any()):
            error = relative_l2(out, want)
            assert error < FORWARD_BAR[torch.bfloat16], f"out is off by {error:.2e}"
            away = ((lse.double() - want_lse).abs() / (1 + want_lse.abs()))[seen].max().item()
            assert away < 2e-4, f"lse is off by {away:.2e} of its size"
        again, again_lse = self.run()
        assert torch.equal(out, again), "two runs differ"
        assert torch.equal(lse, again_lse), "two runs differ in lse"


def random_lists(
    batch: int, heads: int, tokens: int, query_block: int, share: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending lists of random blocks: every length up to `share` of the blocks; some empty, some of all blocks."""
    query_blocks, key_blocks = block_count(tokens, query_block), block_count(tokens, KEY_BLOCK)
    slots = max(1, round(share * key_blocks))
    noise = torch.rand(batch, heads, query_blocks, key_blocks, generator=generator)
    lut = noise.argsort(-1)[..., :slots]
    count = torch.randint(0, slots + 1, lut.shape[:-1], generator=generator)
    count[..., -1] = torch.where(count[..., -1] % 3 == 0, ALL_BLOCKS, count[..., -1])
    used = torch.arange(slots) < count[..., None]
    # unlisted entries hold what must not be read
    lut = torch.where(used, lut, 2**30).sort(-1).values
    return lut.int().to(DEVICE), count.int().to(DEVICE)


def on_device(qkv: Tensors) -> Tensors:
    """The same, with the strides they have."""
    moved = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x) for x in qkv]
    return moved[0], moved[1], moved[2]


def dense_lists(tokens: int, query_block: int, heads: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Every block, listed."""
    query_blocks, key_blocks = block_count(tokens, query_block), block_count(tokens, KEY_BLOCK)
    lut = torch.arange(key_blocks, dtype=torch.int32, device=DEVICE).expand(1, heads, query_blocks, key_blocks)
    return lut.contiguous(), torch.full((1, heads, query_blocks), key_blocks, dtype=torch.int32, device=DEVICE)


def random_calls(head_dim: int, query_block: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Lengths, scales, layouts, shares of blocks and masks, each value many times but not each combination."""
    scales, shares = (1.0, 4.0, 16.0), (1.0, 0.5, 0.1, 0.03)
    grid = itertools.product(LENGTHS, (False, True), range(3))
    for number, (tokens, masked, _) in enumerate(grid):
        layout, scale, share = LAYOUTS[number % 3], scales[number // 2 % 3], shares[number % 4]

        def check(
            number: int = number, tokens: int = tokens, masked: bool = masked, layout: str = layout,
            scale: float = scale, share: float = share,
        ) -> None:  # fmt: skip
            batch, heads = 1 + number % 2, 1 + number % 3
            sizes = {"batch": batch, "heads": heads, "head_dim": head_dim}
            qkv = on_device(make_qkv(tokens, layout, torch.bfloat16, scale=scale, seed=number, **sizes))
            generator = torch.Generator().manual_seed(number)
            lut, count = random_lists(batch, heads, tokens, query_block, share, generator)
            key_mask = None
            if masked:  # also whole blocks, at the end too
                key_mask = torch.rand(batch, tokens, generator=generator) < 0.7
                key_mask[:, tokens // 3 : tokens // 2] = False
                key_mask[:, tokens - tokens // 4 :] &= torch.rand(batch, 1, generator=generator) < 0.5
                key_mask = key_mask.to(DEVICE)
            Call(qkv, lut, count, query_block, head_dim**-0.5, key_mask).check()

        yield f"random {tokens} {layout} x{scale:g} share {share}{' masked' if masked else ''}", check


def ramp(tokens: int, head_dim: int, query_block: int, growth: float, *, rows: slice = slice(None)) -> Call:
    """Scores that grow by `growth` natural units from the end of a list, where it is read first, to its beginning."""
    (query, key, value) = on_device(make_qkv(tokens, "bshd", torch.bfloat16, batch=1, heads=1, head_dim=head_dim))
    query, key = query.clone(), key.clone()
    query[..., 0], key[..., 0] = 0, growth * torch.linspace(1, 0, tokens, device=DEVICE)
    query[:, :, rows, 0] = 1
    query[..., 1:] *= 0.1
    return Call((query, key, value), *dense_lists(tokens, query_block), query_block, 1.0)


def redone(call: Call) -> int:
    """How many tiles one run computes again."""
    before = repairs()[DEVICE].redone
    call.run()
    return repairs()[DEVICE].redone - before


def adversarial_calls(head_dim: int, query_block: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """What the fixed reference must either stand or have repaired."""
    tokens = 1500
    tiles = block_count(tokens, query_block)

    def growing(growth: float, repaired: int | None) -> None:
        call = ramp(tokens, head_dim, query_block, growth)
        call.check()
        found = redone(call)
        assert repaired is None or found == repaired, f"{found} tiles were redone, not {repaired}"

    yield "maxima grow by 10", lambda: growing(10.0, 0)
    yield "maxima grow by 44", lambda: growing(44.0, None)
    yield "maxima grow by 100", lambda: growing(100.0, tiles)
    yield "maxima grow by 1000", lambda: growing(1000.0, tiles)
    yield "maxima fall by 100", lambda: growing(-100.0, 0)

    def one_row() -> None:
        call = ramp(tokens, head_dim, query_block, 300.0, rows=slice(700, 701))
        call.check()
        assert redone(call) == 1, f"one row grows; {redone(call)} tiles were redone"

    yield "maxima of one row grow: one tile is redone", one_row

    def ties() -> None:
        call = ramp(tokens, head_dim, query_block, 0.0)
        call.qkv[0].zero_()
        call.check()
        assert redone(call) == 0, "equal scores were redone"

    yield "ties", ties

    def minus_infinity(keys: slice) -> None:
        call = ramp(tokens, head_dim, query_block, 0.0)
        call.qkv[0][..., 0] = 1
        call.qkv[1][:, :, keys, 0] = -torch.inf
        call.check()

    yield "scores of -inf, scattered", lambda: minus_infinity(slice(0, None, 7))
    yield "scores of -inf in all of the first step", lambda: minus_infinity(slice(tokens - 200, None))

    def far_below() -> None:
        call = ramp(tokens, head_dim, query_block, 0.0)
        call.qkv[0][..., 0] = 1
        call.qkv[1][..., 0] = -300.0
        call.qkv[1][:, :, tokens - 200 :, 0] = -torch.inf
        call.check()

    yield "scores of -inf first, then far below 0", far_below


def special_calls(head_dim: int, query_block: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Masks and lists at their limits, wrong lists, and many tiles."""

    def all_masked() -> None:
        call = ramp(300, head_dim, query_block, 0.0)
        call.key_mask = torch.zeros(1, 300, dtype=torch.bool, device=DEVICE)
        call.check()

    yield "every key masked", all_masked

    def masked_tail() -> None:
        call = ramp(1000, head_dim, query_block, 200.0)
        call.key_mask = torch.ones(1, 1000, dtype=torch.bool, device=DEVICE)
        call.key_mask[0, 300:] = False
        call.check()

    yield "all but the first keys masked, maxima that grow", masked_tail

    def scaled_by(scale: float, extra: int) -> None:
        call = ramp(1000, head_dim, query_block, 3.0)
        call.scale = scale
        wide = torch.randn(1, 1000, 1, head_dim + extra, device=DEVICE).bfloat16()
        call.qkv = (wide[..., extra:].transpose(1, 2), *call.qkv[1:])
        call.check()

    yield "scale 0", lambda: scaled_by(0.0, 0)
    yield "scale below 0", lambda: scaled_by(-0.3, 0)
    yield "rows at odd addresses", lambda: scaled_by(0.3, 3)

    def one_key() -> None:
        call = ramp(300, head_dim, query_block, 5.0)
        call.key_mask = torch.zeros(1, 300, dtype=torch.bool, device=DEVICE)
        call.key_mask[0, 17] = True
        call.check()

    yield "one key left by the mask", one_key

    def empty_and_all() -> None:
        call = ramp(1000, head_dim, query_block, 3.0)
        call.count[..., ::2] = 0
        call.count[..., 1::4] = ALL_BLOCKS
        call.check()

    yield "empty lists beside lists of all blocks", empty_and_all

    def no_slots() -> None:
        call = ramp(1000, head_dim, query_block, 3.0)
        call.lut, call.count = call.lut[..., :0], torch.zeros_like(call.count)
        call.check()

    yield "lists without a slot", no_slots

    def unlisted_nan() -> None:
        call = ramp(1024, head_dim, query_block, 3.0)
        call.count[:] = 0
        call.qkv[2][:] = torch.nan
        out, lse = call.run()
        assert bool((out == 0).all()), "a block that is not listed was read"
        assert bool((lse == -torch.inf).all()), "lse of an empty list"

    yield "values that no list names are NaN", unlisted_nan

    def wrong_lists() -> None:
        call = ramp(1000, head_dim, query_block, 3.0)
        right = call.run()[0]
        call.lut = torch.randint(-(2**31), 2**31 - 1, call.lut.shape, dtype=torch.int64, device=DEVICE).int()
        call.count[:] = 2**30
        call.run()
        try:
            raise_pending(DEVICE, wait=True)
        except KernelArgumentError:
            pass
        else:
            raise AssertionError("wrong lists were not reported")
        assert torch.equal(ramp(1000, head_dim, query_block, 3.0).run()[0], right)

    yield "wrong lists read no foreign memory", wrong_lists

    def many_tiles() -> None:
        sizes = {"batch": 2, "heads": 12, "head_dim": head_dim}
        qkv = on_device(make_qkv(3000, "fused", torch.bfloat16, **sizes))
        lists = random_lists(2, 12, 3000, query_block, 0.2, torch.Generator().manual_seed(1))
        Call(qkv, *lists, query_block, head_dim**-0.5).check()

    yield "more tiles than programs", many_tiles


def run_cases(*makers: Callable[[int, int], Iterator[tuple[str, Callable[[], None]]]]) -> int:
    """Run every case of the command line's head_dim and query block. Returns how many failed, 100 at most."""
    head_dim, query_block = int(sys.argv[1]), int(sys.argv[2])
    only = " ".join(sys.argv[3:])
    failed = 0
    for make in makers:
        for name, check in make(head_dim, query_block):
            if only not in name:
                continue
            try:
                check()
                print("ok", name, flush=True)
            except AssertionError as error:
                failed += 1
                print(f"FAIL {name}: {error}", flush=True)
            except Exception as error:
                failed += 1
                print(f"FAIL {name}: {type(error).__name__}: {error}", flush=True)
                traceback.print_exc()
                if "CUDA" in str(error):  # nothing works after it
                    break
    print(f"{failed} failed", flush=True)
    return min(failed, 100)


if __name__ == "__main__":
    sys.exit(run_cases(random_calls, adversarial_calls, special_calls))
