"""Operators without the dispatcher: the same results, and never where a mode, a transform or autograd looks on."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from salad_compile.kernels.block_sparse.api import attend
from salad_compile.kernels.direct import call_operator, call_together, is_direct, without_autograd
from salad_compile.kernels.engines import use_engine
from salad_compile.kernels.errors import KernelArgumentError, UnsupportedKernelError
from salad_compile.kernels.measure import capture_selections, measure_executions
from salad_compile.kernels.selection import Selection
from tests.kernels.helpers import FORWARD_BAR, make_qkv, make_selection, relative_l2

TAKE_ROWS = torch.ops.salad.take_rows.default
ORDER = torch.tensor([2, 0, 1], dtype=torch.int32)
INVERSE = torch.tensor([1, 2, 0], dtype=torch.int32)


class Dispatched(TorchDispatchMode):
    """Notes which operators it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    """Notes which functions it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def values() -> Tensor:
    return torch.arange(6.0).view(1, 1, 3, 2)


def test_a_plain_call_is_direct_and_equal() -> None:
    assert is_direct((values(), ORDER, INVERSE, 1, 0.5, "relu", None))
    assert torch.equal(call_operator(TAKE_ROWS, values(), ORDER, INVERSE), TAKE_ROWS(values(), ORDER, INVERSE))


def test_a_direct_call_checks_its_arguments() -> None:
    with pytest.raises(KernelArgumentError, match="permutation"):
        call_operator(TAKE_ROWS, values(), torch.zeros(3, dtype=torch.int32), INVERSE)


@pytest.mark.parametrize("mode_class", [Dispatched, Called])
def test_modes_see_the_operator(mode_class: type[Dispatched] | type[Called]) -> None:
    with mode_class() as mode:
        call_operator(TAKE_ROWS, values(), ORDER, INVERSE)
    assert TAKE_ROWS in mode.seen


def test_attention_without_its_lse_is_the_operators() -> None:
    query, key, value = make_qkv(70, dtype=torch.float32)
    lut, count = make_selection(query, key, 16, 16, 400)
    selection = Selection(lut, count, 16, 16, 0.5)
    given = (query, key, value, selection)
    expected, lse = torch.ops.salad.block_sparse_attention.default(query, key, value, *selection)
    assert relative_l2(attend(*given), expected.double()) < FORWARD_BAR[torch.float32]
    with capture_selections() as captured:
        attend(*given)
    assert torch.equal(captured[0].lse, lse)
    with measure_executions() as executions:
        attend(*given)
    assert len(executions) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_l2(attend(*given), expected.double()) < FORWARD_BAR[torch.float32]
    query.requires_grad_()
    attend(*given).sum().backward()
    assert query.grad is not None


def test_arguments_alike_are_checked_once_and_wrong_ones_always() -> None:
    query, key, value = make_qkv(70, dtype=torch.float32)
    lut, count = make_selection(query, key, 16, 16, 400)
    for _ in range(2):
        with pytest.raises(KernelArgumentError, match="one dtype"):
            attend(query, key, value.double(), Selection(lut, count, 16, 16, 0.5))
        with pytest.raises(KernelArgumentError, match="ascending"):
            attend(query, key, value, Selection(lut.flip(-1), count, 16, 16, 0.5))
        attend(query, key, value, Selection(lut, count, 16, 16, 0.5))
        with use_engine("triton"), pytest.raises(UnsupportedKernelError):
            attend(query, key, value, Selection(lut, count, 16, 16, 0.5))


def test_autograd_sees_the_operator() -> None:
    x = values().requires_grad_()
    call_operator(TAKE_ROWS, x, ORDER, INVERSE)[0, 0, 0].sum().backward()
    assert x.grad is not None
    assert x.grad[0, 0].tolist() == [[0, 0], [0, 0], [1, 1]]
    with torch.no_grad():
        assert is_direct((x,))


def test_transforms_see_the_operator() -> None:
    watched = []

    def note(x: Tensor) -> Tensor:
        watched.append(not is_direct((x,)))
        return x

    torch.func.vmap(note)(values())
    torch.func.grad(lambda x: note(x).sum())(values())
    assert watched == [True, True]


def test_other_devices_and_other_tensors_are_not_direct() -> None:
    assert not is_direct((values().to("meta"),))
    assert not is_direct((values().as_subclass(type("Own", (Tensor,), {})),))
    assert call_operator(TAKE_ROWS, values().to("meta"), ORDER.to("meta"), INVERSE.to("meta")).shape == (1, 1, 3, 2)


def test_a_traced_call_is_a_node_of_the_operator() -> None:
    class Taken(torch.nn.Module):
        def forward(self, x: Tensor) -> Any:
            return call_operator(TAKE_ROWS, x, ORDER, INVERSE)

    tracer = fx.Tracer()
    proxy = fx.Proxy(fx.Graph(tracer_cls=None).placeholder("x"), tracer)
    tracer.graph = proxy.node.graph
    assert call_operator(TAKE_ROWS, proxy, None, None).node.target is TAKE_ROWS
    traced = torch.export.export(Taken(), (values(),)).graph
    assert TAKE_ROWS in {node.target for node in traced.nodes}
    compiled = torch.compile(Taken(), backend=_keep(targets := []), fullgraph=True)
    compiled(values())
    assert TAKE_ROWS in targets


def _keep(targets: list[Any]) -> Any:
    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        targets.extend(node.target for node in graph.graph.nodes)
        return graph

    return backend


def test_calls_together_are_decided_once_and_in_one_thread() -> None:
    def inside() -> tuple[bool, bool]:
        elsewhere: list[bool] = []
        mode = Called()
        thread = threading.Thread(target=lambda: elsewhere.append(_is_direct_under(mode)))
        thread.start()
        thread.join()
        return is_direct((values().requires_grad_(),)), elsewhere[0]

    assert call_together((values(), None, 1), inside) == (True, False)
    assert not is_direct((values().requires_grad_(),))  # it is over
    with pytest.raises(ZeroDivisionError):
        call_together((values(),), lambda: 1 // 0)
    assert not is_direct((values().requires_grad_(),))


def _is_direct_under(mode: Called) -> bool:
    with mode:
        return is_direct((values(),))


def test_calls_are_together_only_where_each_would_be_direct() -> None:
    def inside() -> bool:
        return is_direct((values().requires_grad_(),))

    assert not call_together((values().requires_grad_(),), inside)
    with Called():
        assert not call_together((values(),), inside)
    with torch.autocast("cpu", torch.bfloat16):
        assert not call_together((values(),), inside)


def test_autograd_is_passed_by_only_without_gradients_and_watchers() -> None:
    x = torch.zeros(3, requires_grad=True)

    def tracks() -> bool:
        with without_autograd():
            return bool((x.detach().requires_grad_() * 2).requires_grad)

    assert tracks()
    with torch.no_grad(), without_autograd():
        base = torch.zeros(3)
        base[1:].add_(1)
        assert (base._version, base[1:]._version) == (1, 1)  # writes are counted
        with torch.enable_grad():  # nobody sees to gradients in here
            assert not (x * 2).requires_grad
    with torch.no_grad(), Called() as mode:
        assert isinstance(without_autograd(), contextlib.nullcontext)
        assert not mode.seen
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), without_autograd():
        assert nn.functional.linear(torch.zeros(2, 3), torch.zeros(4, 3)).dtype == torch.bfloat16
