"""The exchange of heads for tokens, in a group of one process: shapes, order, and what autograd makes of it.

Two processes: tests/trainers/test_context_parallel.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from salad_compile.kernels import KernelExchangeError
from salad_compile.kernels.exchange import api as head_exchange
from salad_compile.kernels.exchange import in_flight, under_way


@pytest.fixture
def group(tmp_path: Path) -> Iterator[str]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield head_exchange.group_name(dist.group.WORLD)
    dist.destroy_process_group()


def test_operators_keep_the_rules_of_torch(group: str) -> None:
    x = torch.randn(2, 4, 6, 3, requires_grad=True).transpose(1, 2).contiguous().transpose(1, 2)
    for operator in (head_exchange.gather_tokens, head_exchange.gather_heads, head_exchange.sum_of_processes):
        torch.library.opcheck(operator, (x, group))
        assert torch.equal(operator(x, group), x)


def test_two_halves_are_the_whole(group: str) -> None:
    x = torch.randn(2, 4, 6, 3, requires_grad=True).transpose(1, 2).contiguous().transpose(1, 2)
    halves = [(in_flight.start_tokens, in_flight.finish_tokens), (in_flight.start_heads, in_flight.finish_heads)]
    for start, finish in halves:
        out = finish(start(x, group), group)
        assert torch.equal(out, x)
        (gradient,) = torch.autograd.grad(out, x, 2 * torch.ones_like(out))
        assert torch.equal(gradient, 2 * torch.ones_like(x))
        assert not under_way.exchanges
        with pytest.raises(KernelExchangeError, match="copied before it was over"):
            finish(start(x, group).clone(), group)
        under_way.exchanges.clear()


def test_sums_follow_what_is_under_way(group: str) -> None:
    """Two operations of one communicator must not run at once, on two streams."""
    x, waited = torch.randn(2, 4, 6, 3), []
    parts = in_flight.start_tokens(x, group)
    ((address, (work, sent)),) = under_way.exchanges.items()

    class Watched:
        def wait(self) -> None:
            waited.append(work.wait())

    under_way.exchanges[address] = Watched(), sent
    head_exchange.sum_of_processes(x, group)
    assert len(waited) == 1
    assert torch.equal(in_flight.finish_tokens(parts, group), x)
    assert len(waited) == 2


def test_a_group_is_named_by_its_ranks(group: str) -> None:
    assert group == "0"
    assert head_exchange.members("0+1+2") == 3
    assert head_exchange.members("") == 1
