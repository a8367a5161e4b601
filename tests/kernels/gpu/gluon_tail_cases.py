"""What the Gluon kernels must get right with pools.

`python -m tests.kernels.gpu.gluon_tail_cases HEAD_DIM QUERY_BLOCK [NAME]`. Forward and backward.
Cases are run, and their lines are written, as `gluon_cases.py` does it.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from salad_compile.kernels import tail_tokens
from salad_compile.kernels.pools import Pools
from salad_compile.kernels.selection import Selection
from salad_compile.kernels.tail import gluon, reference, triton
from tests.kernels.gpu.gluon_cases import DEVICE, KEY_BLOCK, Tensors, on_device, ramp, random_lists, redone, run_cases
from tests.kernels.helpers import FORWARD_BAR, LAYOUTS, make_qkv, relative_l2
from tests.kernels.tail.cases import means

BAR = 1e-2
LENGTHS = (1, 63, 65, 203, 1023, 2049, 5000)
NAMES = ("query", "key", "value", "pooled key", "pooled value", "log weight")


@dataclass
class TailCall:
    """The arguments of one call; pools are the means of `pool` valid tokens before `end`."""

    qkv: Tensors
    selection: Selection
    pool: int
    end: int

    def pools(self) -> Pools:
        """pooled key and value, the tokens that they stand for, and log weights."""
        (_, key, value), tokens = self.qkv, self.qkv[0].shape[2]
        lut, count, _, key_block, _, mask = self.selection
        counted = tail_tokens(lut, count, tokens, key_block, self.pool, 0, self.end, mask)
        valid = torch.ones(key.shape[0], tokens, device=DEVICE) if mask is None else mask.float()
        valid[:, self.end :] = 0
        pooled = [means(x.float(), self.pool, valid).bfloat16() for x in (key, value)]
        return Pools(pooled[0], pooled[1], counted, torch.linspace(-0.5, 0.7, key.shape[1], device=DEVICE))

    def check(self) -> None:
        """Raise AssertionError unless the kernels give what the definition gives, or are as close as Triton's."""
        pools = self.pools()
        grad = torch.randn(self.qkv[2].shape, generator=torch.Generator().manual_seed(3)).bfloat16().to(DEVICE)
        assert pools.log_weight is not None
        wide = [x.double().requires_grad_() for x in (*self.qkv, pools.key, pools.value, pools.log_weight)]
        wide_pools = Pools(wide[3], wide[4], pools.tokens, wide[5])
        want, want_lse = reference.attend_with_tail(*wide[:3], wide_pools, self.selection)
        want_grads = torch.autograd.grad(want, wide, grad.double())
        out, lse = gluon.attend_with_tail(*self.qkv, pools, self.selection)
        torch.cuda.synchronize()
        seen = want_lse > -torch.inf
        assert bool(torch.isfinite(out).all()), "out has entries that are not finite"
        assert bool((out[~seen] == 0).all()), "rows without keys and pools are not 0"
        assert torch.equal(lse > -torch.inf, seen), "lse is -inf in the wrong rows"
        off = relative_l2(out[seen], want[seen]) if bool(seen.any()) else 0.0
        assert off < FORWARD_BAR[torch.bfloat16], f"out is off by {off:.2e}"
        away = ((lse.double() - want_lse).abs() / (1 + want_lse.abs()))[seen].max().item() if bool(seen.any()) else 0
        assert away < 2e-4, f"lse is off by {away:.2e} of its size"
        again = gluon.attend_with_tail(*self.qkv, pools, self.selection)
        assert torch.equal(out, again[0]), "two runs differ"
        given = (grad, *self.qkv, out, lse, pools, self.selection)
        grads, repeated = (gluon.attend_with_tail_backward(*given) for _ in range(2))
        other = triton.attend_with_tail_backward(*given)
        for name, ours, twice, exact, theirs in zip(NAMES, grads, repeated, want_grads, other, strict=True):
            assert bool(torch.isfinite(ours).all()), f"the gradient of {name} has entries that are not finite"
            assert torch.equal(ours, twice), f"two runs differ in the gradient of {name}"
            if float(exact.norm()) < 1e-6 * exact.numel() ** 0.5:
                most = max(2e-2, 1.2 * float(theirs.abs().max()))  # a sum over all rows of what rounding leaves
                assert float(ours.abs().max()) <= most, f"the gradient of {name} is not 0"
                continue
            error, bar = relative_l2(ours, exact), max(BAR, 1.2 * relative_l2(theirs, exact))
            assert error < bar, f"the gradient of {name} is off by {error:.2e}, and may be by {bar:.2e}"


def random_calls(head_dim: int, query_block: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Lengths, pools, masks, scales, layouts and shares of blocks, each many times but not each combination."""
    scales, shares = (1.0, 4.0, 16.0), (1.0, 0.3, 0.1, 0.03)
    grid = itertools.product(LENGTHS, (64, 256, 16), (False, True) if head_dim == 128 else (False,))
    for number, (tokens, pool, masked) in enumerate(grid):
        layout, scale, share = LAYOUTS[number % 3], scales[number // 2 % 3], shares[number % 4]

        def check(
            number: int = number, tokens: int = tokens, pool: int = pool, masked: bool = masked, layout: str = layout,
            scale: float = scale, share: float = share,
        ) -> None:  # fmt: skip
            batch, heads = 1 + number % 2, 1 + number % 3
            sizes = {"batch": batch, "heads": heads, "head_dim": head_dim}
            qkv = on_device(make_qkv(tokens, layout, torch.bfloat16, scale=scale, seed=number, **sizes))
            generator = torch.Generator().manual_seed(number)
            lut, count = random_lists(batch, heads, tokens, query_block, share, generator)
            mask = None
            if masked:
                mask = torch.rand(batch, tokens, generator=generator) < 0.7
                mask[:, tokens // 3 : tokens // 2] = False
                mask = mask.to(DEVICE)
            selection = Selection(lut, count, query_block, KEY_BLOCK, head_dim**-0.5, mask)
            TailCall(qkv, selection, pool, tokens - (tokens // 5 if number % 2 else 0)).check()

        yield f"random {tokens} of {pool} {layout} x{scale:g} share {share}{' masked' if masked else ''}", check


def special_calls(head_dim: int, query_block: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Scores that grow, lists at their limits, other scales, and many tiles."""

    def of_ramp(growth: float, kept: int | None = None, scale: float = 1.0) -> TailCall:
        call = ramp(1500, head_dim, query_block, growth)
        if kept is not None:
            call.lut, call.count = call.lut[..., :kept].contiguous(), torch.full_like(call.count, kept)
        call.scale = scale
        return TailCall(call.qkv, call.selection(), 64, 1500)

    for growth in (10.0, 100.0, -100.0):
        yield f"maxima grow by {growth:g}", lambda growth=growth: of_ramp(growth, 5).check()  # type: ignore[misc]
    yield "empty lists: pools alone", lambda: of_ramp(30.0, 0).check()
    yield "pools far above the list", lambda: of_ramp(-300.0, 1).check()
    yield "every block listed: no pool counts", lambda: of_ramp(5.0).check()
    yield "scale 0", lambda: of_ramp(5.0, 5, 0.0).check()
    yield "scale below 0", lambda: of_ramp(5.0, 5, -0.3).check()

    def nothing_redone() -> None:
        call = ramp(1500, head_dim, query_block, 3.0)
        assert redone(call) == 0

    yield "ordinary scores are not redone", nothing_redone

    def many_tiles() -> None:
        sizes = {"batch": 2, "heads": 12, "head_dim": head_dim}
        qkv = on_device(make_qkv(3000, "fused", torch.bfloat16, **sizes))
        lists = random_lists(2, 12, 3000, query_block, 0.2, torch.Generator().manual_seed(1))
        TailCall(qkv, Selection(*lists, query_block, KEY_BLOCK, head_dim**-0.5, None), 256, 3000).check()

    yield "more tiles than programs", many_tiles


if __name__ == "__main__":
    sys.exit(run_cases(random_calls, special_calls))
