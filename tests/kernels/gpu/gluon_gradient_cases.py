"""What the Gluon backward must get right.

`python -m tests.kernels.gpu.gluon_gradient_cases HEAD_DIM QUERY_BLOCK [NAME]`. Cases are run,
and their lines are written, as `gluon_cases.py` does it.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from salad_compile.kernels.block_sparse import gluon, reference, triton
from salad_compile.kernels.layout import ALL_BLOCKS
from tests.kernels.gpu.gluon_cases import (
    DEVICE,
    LENGTHS,
    Call,
    Tensors,
    dense_lists,
    on_device,
    ramp,
    random_lists,
    run_cases,
)
from tests.kernels.helpers import LAYOUTS, make_qkv, relative_l2

BAR = 1e-2


@dataclass
class GradientCall(Call):
    """A call of the forward and the gradient of its output."""

    grad: torch.Tensor | None = None

    def gradients(self, out: torch.Tensor, lse: torch.Tensor) -> Tensors:
        """Those of query, key and value; the memory that they come from is NaN before."""
        batch, heads, tokens, head_dim = self.qkv[0].shape
        sizes = [batch * heads * tokens * head_dim] * 3 + [batch * heads * (tokens + 128) * 2]
        poison = [torch.full((size,), torch.nan, dtype=torch.bfloat16, device=DEVICE) for size in sizes]
        del poison
        assert self.grad is not None
        grads = gluon.block_sparse_attention_backward(self.grad, *self.qkv, out, lse, self.selection())
        torch.cuda.synchronize()
        return grads

    def check(self) -> None:
        """Raise AssertionError unless the kernels give what the definition gives, or are as close as Triton's."""
        if self.grad is None:
            generator = torch.Generator().manual_seed(3)
            self.grad = torch.randn(self.qkv[2].shape, generator=generator).bfloat16().to(DEVICE)
        out, lse = self.run()
        grads = self.gradients(out, lse)
        wide = [x.double().requires_grad_() for x in self.qkv]
        want_out, want_lse = reference.block_sparse_attention(*wide, self.selection())
        want = torch.autograd.grad(want_out, wide, self.grad.double())
        other = triton.block_sparse_attention_backward(self.grad, *self.qkv, out, lse, self.selection())
        seen = want_lse > -torch.inf
        assert bool((grads[0][~seen] == 0).all()), "queries without keys have a gradient"
        for name, grad, exact, yardstick in zip(("query", "key", "value"), grads, want, other, strict=True):
            assert grad.transpose(1, 2).is_contiguous()
            assert bool(torch.isfinite(grad).all()), f"the gradient of {name} has entries that are not finite"
            if float(exact.norm()) < 1e-6 * exact.numel() ** 0.5:  # one key: the weights are all 1
                assert float(grad.abs().max()) < 2e-2, f"the gradient of {name} is not 0"
                continue
            error, bar = relative_l2(grad, exact), max(BAR, 1.2 * relative_l2(yardstick, exact))
            assert error < bar, f"the gradient of {name} is off by {error:.2e}, and may be by {bar:.2e}"
        for name, grad, again in zip(("query", "key", "value"), grads, self.gradients(out, lse), strict=True):
            assert torch.equal(grad, again), f"two runs differ in the gradient of {name}"


def like(call: Call) -> GradientCall:
    """The same call, with a gradient."""
    return GradientCall(call.qkv, call.lut, call.count, call.query_block, call.scale, call.key_mask)


def random_calls(head_dim: int, query_block: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Lengths, scales, layouts, shares of blocks and masks, each value many times but not each combination."""
    scales, shares = (1.0, 4.0, 16.0), (1.0, 0.5, 0.1, 0.03)
    for number, (tokens, masked, _) in enumerate(itertools.product(LENGTHS, (False, True), range(3))):
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
            if masked:
                key_mask = torch.rand(batch, tokens, generator=generator) < 0.7
                key_mask[:, tokens // 3 : tokens // 2] = False
                key_mask = key_mask.to(DEVICE)
            GradientCall(qkv, lut, count, query_block, head_dim**-0.5, key_mask).check()

        yield f"random {tokens} {layout} x{scale:g} share {share}{' masked' if masked else ''}", check


def special_calls(head_dim: int, query_block: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Extreme scores, masks and lists at their limits, odd gradients, and many tiles."""

    def growing(growth: float) -> None:
        like(ramp(1500, head_dim, query_block, growth)).check()

    for growth in (10.0, 100.0, -1000.0):
        yield f"maxima grow by {growth:g}", lambda growth=growth: growing(growth)  # type: ignore[misc]

    def far_below() -> None:  # exp2(0 - lse) of a column beyond the end would be inf
        call = ramp(1001, head_dim, query_block, 0.0)
        call.qkv[0][..., 0], call.qkv[1][..., 0] = 1, -300.0
        like(call).check()

    yield "all scores far below 0, ragged", far_below

    def all_masked() -> None:
        call = like(ramp(300, head_dim, query_block, 1.0))
        call.key_mask = torch.zeros(1, 300, dtype=torch.bool, device=DEVICE)
        call.check()

    yield "every key masked", all_masked

    def empty_and_all() -> None:
        call = like(ramp(1000, head_dim, query_block, 3.0))
        call.count[..., ::2] = 0
        call.count[..., 1::4] = ALL_BLOCKS
        call.check()

    yield "empty lists beside lists of all blocks", empty_and_all

    def nobody_attends() -> None:
        call = like(ramp(1024, head_dim, query_block, 3.0))
        call.lut, call.count = call.lut[..., :1].contiguous(), torch.ones_like(call.count)
        out, lse = call.run()
        call.grad = torch.ones_like(out)
        for grad in call.gradients(out, lse)[1:]:
            assert bool((grad[:, :, 64:] == 0).all()), "keys that nobody attends to have a gradient"
            assert bool(torch.isfinite(grad).all())
        call.check()

    yield "keys that nobody attends to", nobody_attends

    def scaled_by(scale: float, extra: int) -> None:
        call = like(ramp(1000, head_dim, query_block, 3.0))
        call.scale = scale
        wide = torch.randn(1, 1000, 1, head_dim + extra, device=DEVICE).bfloat16()
        call.qkv = (wide[..., extra:].transpose(1, 2), *call.qkv[1:])
        call.check()

    yield "scale 0", lambda: scaled_by(0.0, 0)
    yield "scale below 0", lambda: scaled_by(-0.3, 0)
    yield "rows at odd addresses", lambda: scaled_by(0.3, 3)

    def expanded() -> None:
        call = like(ramp(200, head_dim, query_block, 3.0))
        call.grad = torch.ones((), dtype=torch.bfloat16, device=DEVICE).expand(call.qkv[2].shape)
        call.check()

    yield "the gradient of a sum", expanded

    def many_tiles() -> None:
        qkv = on_device(make_qkv(3000, "fused", torch.bfloat16, batch=2, heads=12, head_dim=head_dim))
        lists = random_lists(2, 12, 3000, query_block, 0.2, torch.Generator().manual_seed(1))
        GradientCall(qkv, *lists, query_block, head_dim**-0.5).check()

    yield "more tiles than programs", many_tiles

    def no_token() -> None:
        qkv = on_device(make_qkv(0, "bshd", torch.bfloat16, batch=1, heads=1, head_dim=head_dim))
        call = GradientCall(qkv, *dense_lists(0, query_block), query_block, 1.0, grad=qkv[0])
        assert [grad.shape for grad in call.gradients(*call.run())] == [x.shape for x in qkv]

    yield "no token", no_token


if __name__ == "__main__":
    sys.exit(run_cases(random_calls, special_calls))
