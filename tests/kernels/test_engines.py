"""Which engine a call gets, what asking for one does, and an engine that is added."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from salad_compile.kernels import (
    UnsupportedKernelError,
    block_sparse_attention,
    capability,
    linear_state,
    measure_executions,
    use_engine,
)
from salad_compile.kernels.block_sparse import reference
from salad_compile.kernels.engines import Call, GateCall, choose, engines, find, register, unregister
from salad_compile.kernels.linear import torch as plain
from tests.kernels.helpers import make_qkv, make_selection

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _compiling_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(capability, "_cuda_arch", lambda device: (9, 0))


def engine_on(device: torch.device, **changes: Any) -> str:
    """The engine of a plain call."""
    sizes = {"head_dim": 64, "value_dim": 64, "query_block": 128, "key_block": 64}
    facts = {"operator": "block_sparse_attention", "device": device, "dtype": torch.float16} | sizes
    return choose(Call(**(facts | changes))).name


def test_the_device_decides_by_default() -> None:
    assert engine_on(CPU) == "torch"
    assert engine_on(CUDA) == "triton"
    assert engine_on(CUDA, dtype=torch.bfloat16) == "gluon"


def test_contexts_nest() -> None:
    with use_engine("torch"):
        assert engine_on(CUDA) == "torch"
        with use_engine("triton"):
            assert engine_on(CUDA) == "triton"
            with use_engine("torch"):
                assert engine_on(CUDA) == "torch"
            assert engine_on(CUDA) == "triton"
        assert engine_on(CUDA) == "torch"
    assert engine_on(CUDA) == "triton"


def test_an_error_ends_the_context() -> None:
    with pytest.raises(ValueError, match="inside"), use_engine("torch"):
        raise ValueError("inside")
    assert engine_on(CUDA) == "triton"


def test_an_unknown_engine_is_an_error_that_lists_them() -> None:
    with (
        pytest.raises(UnsupportedKernelError, match=r"unknown engine 'cuda'.*'flash', 'torch'"),
        use_engine("cuda"),
    ):
        pass
    assert engine_on(CPU) == "torch"


def test_nothing_falls_to_the_slow_engine_on_a_gpu_unless_it_is_asked_for() -> None:
    with pytest.raises(UnsupportedKernelError, match=r"no engine.*float64.*'torch'.*slow.*use_engine\('torch'\)"):
        engine_on(CUDA, dtype=torch.float64)
    with use_engine("torch"):
        assert engine_on(CUDA, dtype=torch.float64) == "torch"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "no Triton kernel for torch.float64"),
        ({"head_dim": 136}, "head_dim 136"),
        ({"value_dim": 200}, "head_dim 200"),
        ({"key_block": 48}, "blocks of 48 tokens"),
    ],
)
def test_an_engine_that_cannot_serve_a_request_says_why(change: dict[str, Any], reason: str) -> None:
    with use_engine("triton"), pytest.raises(UnsupportedKernelError, match=f"'triton' was asked for.*{reason}"):
        engine_on(CUDA, **change)


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    with use_engine("triton"):
        with pytest.raises(UnsupportedKernelError, match=r"tensors are on cpu.*CUDA.*TRITON_INTERPRET=1"):
            linear_state(*torch.randn(2, 1, 2, 65, 16), "relu")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert engine_on(CPU) == "triton"
    assert engine_on(CPU) == "torch"  # nobody asked for slow kernels


def test_other_threads_see_the_request() -> None:
    seen: list[str] = []

    def backward() -> None:
        seen.append(engine_on(CUDA))

    with use_engine("torch"):
        thread = threading.Thread(target=backward)  # autograd's threads inherit no context variables either
        thread.start()
        thread.join()
    assert seen == ["torch"]


def test_the_backward_runs_on_the_engine_too(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    real = plain.linear_state_backward
    monkeypatch.setattr(plain, "linear_state_backward", lambda *x: called.append(engine_on(CUDA)) or real(*x))
    key, value = (x.requires_grad_() for x in torch.randn(2, 1, 2, 65, 16))
    with use_engine("torch"):
        linear_state(key, value, "relu")[0].sum().backward()
    assert called == ["torch"]


# --- an engine that is added ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Definition:
    """An engine in one piece: the definition itself, for narrow heads."""

    name: str = "definition"
    operators: tuple[str, ...] = ("block_sparse_attention",)
    asked: list[Call] = dataclasses.field(default_factory=list)

    def supports(self, call: Call) -> str | None:
        self.asked.append(call)
        return None if call.head_dim == 16 else f"it wants heads of 16 channels, not {call.head_dim}"

    def run(self, call: Call, *arguments: Any) -> Any:
        return reference.block_sparse_attention(*arguments)

    def gate_calls(self, arch: int) -> tuple[GateCall, ...]:
        return ()


@pytest.fixture
def definition() -> Iterator[Definition]:
    engine = Definition()
    register(engine, before="torch")
    yield engine
    unregister("definition")


def attend(head_dim: int, **options: Any) -> tuple[list[str], torch.Tensor]:
    """Names of the engines that ran the forward, and the gradient of the query."""
    qkv = make_qkv(113, head_dim=head_dim, grad=True, **options)
    with measure_executions() as executions:
        out, _ = block_sparse_attention(*qkv, *make_selection(*qkv[:2], 64, 64), 64, 64, 0.25)
    return [execution.engine for execution in executions], torch.autograd.grad(out.sum(), qkv)[0]


def test_an_added_engine_serves_what_it_supports_and_is_reported(definition: Definition) -> None:
    ran, gradient = attend(16)
    assert ran == ["definition"]
    assert attend(8)[0] == ["torch"]
    assert [engine.name for engine in engines()] == ["gluon", "triton", "flash", "definition", "torch"]
    unregister("definition")
    ran, expected = attend(16)
    assert ran == ["torch"]
    torch.testing.assert_close(gradient, expected)  # the backward, which it does not offer, ran on the usual engine
    register(definition)
    assert attend(16)[0] == ["torch"]  # last in the order of priority


def test_an_added_engine_can_be_asked_for(definition: Definition) -> None:
    with use_engine("definition"):
        assert attend(16)[0] == ["definition"]
        with pytest.raises(UnsupportedKernelError, match=r"'definition' was asked for.*heads of 16 channels, not 8"):
            attend(8)
        linear_state(*torch.randn(2, 1, 2, 65, 16), "relu")  # it offers none: the usual engine runs


def test_what_an_engine_is_asked_about(definition: Definition) -> None:
    attend(16)
    attend(16)
    (call,) = definition.asked  # the answer is kept
    assert call == Call(
        "block_sparse_attention",
        CPU,
        torch.float64,
        head_dim=16,
        value_dim=16,
        query_block=64,
        key_block=64,
        needs_gradient=True,
    )
    qkv = make_qkv(113)
    mask = torch.ones(2, 113, dtype=torch.bool)
    block_sparse_attention(*qkv, *make_selection(*qkv[:2], 64, 64), 64, 64, 0.25, mask)
    assert (definition.asked[1].masked, definition.asked[1].needs_gradient) == (True, False)
    assert call.arch == (9, 0)


def test_a_name_is_taken_once(definition: Definition) -> None:
    with pytest.raises(UnsupportedKernelError, match="already"):
        register(Definition())
    with pytest.raises(UnsupportedKernelError, match="unknown engine 'fast'"):
        register(Definition(name="other"), before="fast")
    with pytest.raises(UnsupportedKernelError, match="unknown engine 'fast'"):
        unregister("fast")
    assert find("definition") is definition
