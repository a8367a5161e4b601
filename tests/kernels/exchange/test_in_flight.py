"""The exchange in two halves: compiled, what stands between them stays there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from salad_compile.backend.dynamo import salad
from salad_compile.kernels.exchange import group_name
from salad_compile.kernels.exchange.under_way import exchanges


@pytest.fixture
def group(tmp_path: Path) -> Iterator[str]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield group_name(dist.group.WORLD)
    dist.destroy_process_group()


def test_inductor_keeps_the_halves_apart(group: str) -> None:
    operators = torch.ops.salad

    def exchange(key: Tensor, value: Tensor) -> Tensor:
        under_way = [operators.start_tokens(x, group) for x in (key, value)]
        state, key_sum = operators.linear_state(key, value, "relu", None, None)
        key_sum = operators.sum_of_processes(key_sum, group)
        out = sum(operators.finish_tokens(x, group) for x in under_way)
        back = operators.start_heads(out, group)
        linear = operators.linear_output(key, state, key_sum, "relu", 1e-6, None)
        return operators.finish_heads(back, group) + linear  # type: ignore[no-any-return]

    tensors = [torch.randn(1, 4, 64, 16) for _ in range(2)]
    with torch.no_grad():
        compiled = torch.compile(exchange, backend=lambda gm, inputs: salad(gm, inputs))
        out, (code, *_) = run_and_get_code(compiled, *tensors)
        assert torch.allclose(out, exchange(*tensors), atol=1e-5)
    order = re.findall(r"= torch\.ops\.salad\.(\w+)\.default\(", code)
    assert order == [
        *("start_tokens", "start_tokens", "linear_state", "sum_of_processes", "finish_tokens", "finish_tokens"),
        *("start_heads", "linear_output", "finish_heads"),
    ]


def test_what_is_under_way_is_no_view_of_what_was_given(group: str) -> None:
    """A compiler writes something else there as soon as nothing reads it any more, and the exchange goes on."""
    given = torch.randn(1, 4, 64, 16)  # contiguous with its heads in front, too
    expected = given.clone()
    under_way = torch.ops.salad.start_tokens(given, group)
    (_, sent), *others = exchanges.values()
    assert not others
    assert sent.untyped_storage().data_ptr() != given.untyped_storage().data_ptr()
    assert torch.equal(torch.ops.salad.finish_tokens(under_way, group), expected)
