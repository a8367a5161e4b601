"""Operators that are not torch's: which rows their results have is seen by running them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import salad_compile
from salad_compile.errors import NoEligibleSiteError
from salad_compile.position import run_rows
from salad_compile.position.operations import may_communicate
from tests import toys
from tests.salad_compile.position.test_rows import BATCH, TOKENS, heads, rows_of
from tests.support import TINY, check_rewrite, randomise_branches


def operator(function: Any, *mutates: str) -> Any:
    """A custom operator with a fake of its own."""
    defined = torch.library.custom_op(f"rows::{function.__name__}", mutates_args=mutates)(function)
    defined.register_fake((lambda *args: None) if mutates else function)
    return defined


def turn_both(q: Tensor, k: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, S, D) each, turned by (S, 1)."""
    return q * angle.cos() - q.flip(-1) * angle.sin(), k * angle.cos() - k.flip(-1) * angle.sin()


def norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def roll(x: Tensor) -> Tensor:
    return x.roll(1, dims=-2)


def smooth(x: Tensor) -> Tensor:
    return x + x.roll(1, dims=-2)


def quantise(x: Tensor) -> Tensor:
    return (x * 8).to(torch.int8)


def strict(x: Tensor) -> Tensor:
    if type(x) is Tensor and x.isnan().any():
        raise ValueError("no numbers")
    return x * 2


def norm_in_place(x: Tensor) -> None:
    x.copy_(norm(x))


def roll_in_place(x: Tensor) -> None:
    x.copy_(roll(x))


TURN, NORM, ROLL = (operator(function) for function in (turn_both, norm, roll))
SMOOTH, QUANTISE, STRICT = (operator(function) for function in (smooth, quantise, strict))
NORM_IN_PLACE, ROLL_IN_PLACE = (operator(function, "x") for function in (norm_in_place, roll_in_place))
TURN.register_autograd(lambda ctx, of_query, of_key: (of_query, of_key, None))
NORM.register_autograd(lambda ctx, grad: grad)
ROLL.register_autograd(lambda ctx, grad: grad)

SOURCE = torch.randn(BATCH, TOKENS, 8)
IN_PLACE = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS)


def after(function: Any, x: Tensor) -> Tensor:
    x = heads(x).contiguous()
    function(x)
    return x


@pytest.mark.parametrize(
    ("move", "expected"),
    [
        (lambda x: TURN(heads(x), heads(x.flip(0)), torch.ones(TOKENS, 1))[0], IN_PLACE),
        (lambda x: TURN(heads(x), heads(x.flip(0)), torch.ones(TOKENS, 1))[1], IN_PLACE.flip(0)),
        (lambda x: NORM(NORM(heads(x))), IN_PLACE),
        (lambda x: ROLL(heads(x)), IN_PLACE.roll(1, 1)),
        (lambda x: after(NORM_IN_PLACE, x), IN_PLACE),
        (lambda x: after(ROLL_IN_PLACE, x), IN_PLACE.roll(1, 1)),
        (lambda x: SMOOTH(heads(x)), "smooth is not torch's, and it makes tokens of several"),
        (lambda x: QUANTISE(heads(x)).float(), "quantise is not torch's, and it has results that are no floating"),
        (lambda x: STRICT(heads(x)), "strict is not torch's, and it does not run on random numbers (ValueError)"),
    ],
    ids=["turned", "turned beside it", "norm", "rolled", "norm in place", "rolled in place", "mixed", "int8", "strict"],
)
def test_rows_of_an_operator(move: Any, expected: Tensor | str) -> None:
    rows = rows_of(move, SOURCE)
    if isinstance(expected, str):
        assert isinstance(rows, str)
        assert rows.startswith(expected)
    else:
        assert isinstance(rows, Tensor), rows
        assert torch.equal(rows, expected)


def test_an_operator_runs_once_for_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    decode = run_rows._decode
    monkeypatch.setattr(run_rows, "_decode", lambda *args: runs.append(1) or decode(*args))
    rows_of(lambda x: NORM(NORM(NORM(heads(x)))), SOURCE)
    assert len(runs) == 1


class Kernel(toys.SelfAttention):
    """Somebody's operator between projection and attention."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (toys.heads(p(x)) for p in (self.q, self.k, self.v))
        if self.kind == "turned":
            q, k = TURN(NORM(q), NORM(k), torch.arange(x.shape[1], dtype=x.dtype)[:, None])
        else:
            q, k, v = ROLL(q), ROLL(k), ROLL(v)
        result: Tensor = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return result


def test_a_fused_rotation_is_converted() -> None:
    model: nn.Module = toys.Stack(Kernel("turned"), Kernel("turned"))
    inputs = {"x": toys.tokens(100)}
    assert len(salad_compile.plan(model, inputs, config=TINY).eligible) == 2
    salad_compile.convert(model, dataclasses.replace(TINY, rope_placement="auto"), example_inputs=inputs)
    randomise_branches(model)
    check_rewrite(model, inputs, sites=2)


def test_a_kernel_that_moves_tokens_is_refused() -> None:
    with pytest.raises(NoEligibleSiteError, match=r"the\s+tokens\s+are\s+moved"):
        salad_compile.convert(Kernel("rolled"), TINY, example_inputs={"x": toys.tokens(100)})


# --- operators that other processes wait for --------------------------------------------------------------------------


def test_what_may_exchange_tokens_with_other_processes_is_not_run() -> None:
    runs: list[str] = []

    def exchange(x: Tensor, group_name: str) -> Tensor:
        runs.append(group_name)
        return x.clone()

    exchange.__annotations__ = {"x": Tensor, "group_name": str, "return": Tensor}
    defined = operator(exchange)
    reason = rows_of(lambda x: defined(heads(x), "world"), SOURCE)
    assert isinstance(reason, str)
    assert "exchange tokens with other processes" in reason
    assert runs == ["world"]  # the model's own call


def test_every_collective_of_torch_may_communicate() -> None:
    import torch.distributed._functional_collectives
    import torch.distributed._symmetric_memory

    assert may_communicate(torch.ops._c10d_functional.wait_tensor)
    assert not may_communicate(torch.ops.aten.native_group_norm.default)
    takers = {
        schema.name
        for schema in torch._C._jit_get_all_schemas()
        if any(argument.name == "group_name" or "ProcessGroup" in str(argument.type) for argument in schema.arguments)
    }
    assert len(takers) > 20
    for name in takers:
        namespace, operator_name = name.split("::")
        assert may_communicate(getattr(getattr(torch.ops, namespace), operator_name)), name
