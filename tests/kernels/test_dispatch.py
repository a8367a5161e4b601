"""use_engine and the engine that an operator gets."""

from __future__ import annotations

import threading

import pytest
import torch

from salad_compile.kernels import UnsupportedKernelError, linear_state, use_engine
from salad_compile.kernels.dispatch import engine_for, engine_name, interpreting
from salad_compile.kernels.launch import launch, record_launches, recording
from salad_compile.kernels.linear import cpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ALL = ("triton", "torch", "flex")


@pytest.fixture(autouse=True)
def _compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_the_device_decides_by_default() -> None:
    assert engine_name(CPU) == "torch"
    assert engine_name(CUDA) == "triton"


def test_contexts_nest() -> None:
    with use_engine("torch"):
        assert engine_name(CUDA) == "torch"
        with use_engine("triton"):
            assert engine_name(CUDA) == "triton"
            with use_engine("torch"):
                assert engine_name(CUDA) == "torch"
            assert engine_name(CUDA) == "triton"
        assert engine_name(CUDA) == "torch"
    assert engine_name(CUDA) == "triton"


def test_an_error_ends_the_context() -> None:
    with pytest.raises(ValueError, match="inside"), use_engine("torch"):
        raise ValueError("inside")
    assert engine_name(CUDA) == "triton"


def test_an_engine_that_an_operator_does_not_have_leaves_it_on_its_default() -> None:
    with use_engine("flex"):
        assert engine_name(CUDA) == "triton"
        assert engine_name(CPU) == "torch"
        assert engine_name(CPU, ALL) == "flex"


def test_an_unknown_engine_is_an_error_that_lists_them() -> None:
    with (
        pytest.raises(UnsupportedKernelError, match=r"unknown engine 'cuda'.*'triton', 'torch', 'flex'"),
        use_engine("cuda"),
    ):
        pass
    assert engine_name(CPU) == "torch"


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    with use_engine("triton"):
        with pytest.raises(UnsupportedKernelError, match=r"tensors are on cpu.*CUDA.*TRITON_INTERPRET=1"):
            linear_state(*torch.randn(2, 1, 2, 65, 16), "relu")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert interpreting()
        assert engine_name(CPU) == "triton"


def test_operators_run_on_the_engine_of_their_folder() -> None:
    assert engine_for("salad_compile.kernels.linear", CPU) is cpu


def test_other_threads_see_the_engine() -> None:
    seen: list[str] = []

    def backward() -> None:
        seen.append(engine_name(CUDA))

    with use_engine("torch"):
        thread = threading.Thread(target=backward)  # autograd's threads inherit no context variables either
        thread.start()
        thread.join()
    assert seen == ["torch"]


def test_backward_runs_on_the_engine_too(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(
        cpu, "linear_state_backward", lambda *x, f=cpu.linear_state_backward: called.append(engine_name(CUDA)) or f(*x)
    )
    key, value = (x.requires_grad_() for x in torch.randn(2, 1, 2, 65, 16))
    with use_engine("torch"):
        linear_state(key, value, "relu")[0].sum().backward()
    assert called == ["torch"]


def test_recordings_nest() -> None:
    def note(number: int) -> None:
        launch(None, (1,), CPU, num_warps=4, NUMBER=number)

    with record_launches() as outer:
        with record_launches() as inner:
            pass
        note(0)
        with record_launches() as other:
            note(1)
        assert recording()
    assert not recording()
    assert [[recorded.constants["NUMBER"] for recorded in seen] for seen in (outer, inner, other)] == [[0], [], [1]]
