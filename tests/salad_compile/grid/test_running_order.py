"""The order belongs to the forward that runs: around the root, in threads, nested, and in backward passes."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import salad_compile
from salad_compile.errors import ConfigError, GridMismatchError, NotConvertedError
from tests.salad_compile.grid.test_video_grid import Clip, clip, video
from tests.support import relative_error

EAGER = {"backend": "salad", "options": {"lowering": "eager"}}


def transposed() -> Tensor:
    """As many tokens as `video()`, in another grid."""
    return video().transpose(3, 4).contiguous()


def around_the_root(model: Any, x: Tensor) -> Tensor:
    """What the forward does, as a pipeline does it that calls the blocks itself."""
    out: Tensor = model.body(model.patch(x).flatten(2).transpose(1, 2))
    return out


def compile_layers(model: nn.Module) -> nn.Module:
    for layer in model.body.layers:
        layer.compile(**EAGER)
    return model


def refuses(call: Callable[[], Any]) -> None:
    with pytest.raises(Exception, match="does not run around this site") as caught:
        call()
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), GridMismatchError)


@pytest.mark.parametrize("prepare", [lambda m: m, compile_layers], ids=["uncompiled", "compiled"])
def test_a_site_without_its_root_has_no_order_and_guesses_none(prepare: Any) -> None:
    model, x = prepare(clip()), transposed()
    refuses(lambda: around_the_root(model, x))
    expected = model(x)
    refuses(lambda: around_the_root(model, x))
    model(video())
    refuses(lambda: around_the_root(model, x))
    with salad_compile.token_grid(model, (5, 6, 5)):
        assert relative_error(around_the_root(model, x), expected) < 1e-6
    refuses(lambda: around_the_root(model, x))
    assert relative_error(model(x), expected) < 1e-6


def test_a_compiled_function_around_the_root() -> None:
    model, x = clip(), transposed()
    function = torch.compile(around_the_root, **EAGER)
    refuses(lambda: function(model, x))
    with salad_compile.token_grid(model, (5, 6, 5)):
        assert relative_error(function(model, x), model(x)) < 1e-6


def test_a_failed_forward_leaves_no_order() -> None:
    model = clip()
    hook = model.body.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(video())
    hook.remove()
    refuses(lambda: around_the_root(model, transposed()))


def test_a_grid_is_held_for_converted_models_alone() -> None:
    with pytest.raises(NotConvertedError), salad_compile.token_grid(Clip(), (5, 6, 5)):
        pass
    with pytest.raises(ConfigError, match="three integers"), salad_compile.token_grid(clip(), (5, 6)):
        pass


def test_a_forward_that_is_replaced_on_the_instance_is_an_error() -> None:
    model = clip()
    model.forward = types.MethodType(around_the_root, model)
    refuses(lambda: model(video()))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_forward_that_is_replaced_on_the_class_is_what_runs(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As caches of steps do it."""
    model = clip()
    call = torch.compile(model, **EAGER) if compiled else model
    expected = call(video())
    monkeypatch.setattr(Clip, "forward", lambda self, video, strength=1.0: 2 * around_the_root(self, video))
    assert relative_error(call(video()), 2 * expected) < 1e-6


@pytest.mark.parametrize("prepare", [lambda m: m, compile_layers], ids=["uncompiled", "compiled"])
def test_threads_run_one_model_each_with_its_own_video(prepare: Any) -> None:
    model = prepare(clip())
    videos = [video(), transposed(), video(3, 10, 20)]  # 150 tokens each
    with torch.no_grad():
        expected = [model(x) for x in videos]
    errors: list[Any] = []

    def work(x: Tensor, right: Tensor) -> None:
        try:
            with torch.no_grad():
                errors.extend(relative_error(model(x), right) for _ in range(12))
        except Exception as error:  # in a thread it would be lost
            errors.append(error)

    threads = [threading.Thread(target=work, args=given) for given in zip(videos, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 36
    assert all(isinstance(error, float) and error < 1e-6 for error in errors), errors


def test_a_forward_inside_a_forward_has_its_own_order() -> None:
    model, plain = clip(), clip()
    inner: list[Tensor] = []

    def run_again(*_: Any) -> None:
        if not inner:
            inner.append(torch.empty(0))
            inner.append(model(transposed()))

    model.body.layers[0].register_forward_hook(run_again)
    assert relative_error(model(video()), plain(video())) < 1e-6
    assert relative_error(inner[1], plain(transposed())) < 1e-6


@pytest.mark.parametrize("prepare", [lambda m: m, compile_layers], ids=["uncompiled", "compiled"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_recomputed_has_the_order_of_its_forward(prepare: Any, reentrant: bool) -> None:
    """Two forwards before one backward pass, the second of another grid of equally many tokens."""

    def gradients(model: Any) -> dict[str, Tensor]:
        sum(model(x).square().sum() for x in (video(), transposed())).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def recompute(body: Any, x: Tensor) -> Tensor:
        for layer in body.layers:
            x = x + checkpoint(layer, x.requires_grad_() if x.is_leaf else x, use_reentrant=reentrant)
        return x

    expected = gradients(clip())
    model = prepare(clip())
    model.body.forward = types.MethodType(recompute, model.body)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert relative_error(gradient, expected[name]) < 1e-5 or expected[name].norm() < 1e-9, name


def test_a_backward_pass_from_a_hidden_value_knows_the_only_grid() -> None:
    """No output brings the order along, and all forwards had one."""
    model = clip()
    hidden: list[Tensor] = []
    model.body.register_forward_hook(lambda module, args, out: hidden.append(out) or out.detach())
    model.body.recompute = True
    model(video())
    hidden[0].sum().backward()
    model(transposed())
    with pytest.raises(GridMismatchError, match="does not run around this site"):
        hidden[1].sum().backward()
