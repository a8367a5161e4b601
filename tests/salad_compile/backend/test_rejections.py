"""Errors under torch.compile arrive as themselves: class, message, and a trace without Dynamo's insides."""

from __future__ import annotations

import gc
import pickle
import traceback
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed, ShortenTraceback
from torch._inductor.exc import InductorError

import salad_compile
from salad_compile import errors
from salad_compile.backend import dynamo as backend
from salad_compile.backend.rejections import reject_plainly
from salad_compile.kernels.errors import UnsupportedKernelError
from tests import toys
from tests.support import randomise_branches

CLASSES = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.SaladError)]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def failing(error: Exception) -> Any:
    @reject_plainly
    def backend(*_: Any, **__: Any) -> Any:
        raise error

    return backend


def rejected(error: Exception) -> BaseException:
    """What a user gets when the backend raises `error`."""
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(toys.SelfAttention(), backend=failing(error))(toys.tokens())
    return caught.value


@pytest.mark.parametrize("kind", [*CLASSES, UnsupportedKernelError], ids=lambda kind: kind.__name__)
def test_every_error_is_itself(kind: type[Exception]) -> None:
    error = kind("a site, and what to do.")
    with pytest.raises(kind) as caught:
        failing(error)()
    got = caught.value
    assert isinstance(got, BackendCompilerFailed)  # for those who catch torch's
    assert got.inner_exception is error
    assert str(got) == "a site, and what to do."
    last = traceback.format_exception(got)[-1]
    assert last == f"{kind.__module__}.{kind.__name__}: a site, and what to do.\n"
    plain = pickle.loads(pickle.dumps(got))
    assert type(plain) is kind
    assert str(plain) == str(got)


def test_attributes_come_along() -> None:
    got = rejected(errors.WriteError(28, "No space left on device", "salad.safetensors"))
    assert isinstance(got, errors.WriteError)
    assert (got.errno, got.filename) == (28, "salad.safetensors")


def test_other_errors_stay_what_torch_makes_of_them() -> None:
    got = rejected(ZeroDivisionError("not ours"))
    assert type(got) is BackendCompilerFailed
    assert "ZeroDivisionError" in str(got)


def test_what_inductor_wrapped_is_unwrapped() -> None:
    got = rejected(InductorError(UnsupportedKernelError("no kernel."), None))
    assert isinstance(got, UnsupportedKernelError)
    assert isinstance(got, ShortenTraceback)
    assert str(got) == "no kernel."


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_lost_site_is_told_in_few_lines_and_can_be_mended(monkeypatch: pytest.MonkeyPatch, fullgraph: bool) -> None:
    """The model's state, unlike options, may be right at the next call: nothing of the failure is kept."""
    config = salad_compile.SaladConfig(compensation="none", sparsity=0.6, query_block=16, key_block=16, min_tokens=0)
    model = salad_compile.convert(toys.SelfAttention(), config, example_inputs=(toys.tokens(),))
    randomise_branches(model)
    compiled = torch.compile(model, backend="salad", options={"lowering": "eager"}, fullgraph=fullgraph)
    with monkeypatch.context() as broken:
        broken.setattr(backend, "run_passes", _lose)
        with pytest.raises(errors.SiteLostError) as caught:
            compiled(toys.tokens())
    shown = "".join(traceback.format_exception(caught.value))
    assert shown.splitlines()[-1] == "salad_compile.errors.SiteLostError: a site is lost."
    assert len(shown.splitlines()) <= 20, shown
    assert "TORCH_LOGS" not in shown
    assert torch.equal(compiled(toys.tokens()), model(toys.tokens()))


def _lose(*_: Any) -> Any:
    raise errors.SiteLostError("a site is lost.")


def test_the_frame_does_not_keep_the_error() -> None:
    """It would keep the graph and its inputs until Python collects garbage."""
    made = []

    class NoError(errors.ConfigError):
        def __init__(self, *args: Any) -> None:
            made.append(weakref.ref(self))

    @reject_plainly
    def backend() -> None:
        raise NoError("no.")

    gc.disable()
    try:
        with pytest.raises(NoError):
            backend()
        assert [error() for error in made] == [None, None]  # the error, and what is raised for it
    finally:
        gc.enable()
