"""Private names of torch that this room stands on: these tests fail when they move."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from salad_compile.sites.eager_mode import _is_alone
from salad_compile.sites.graph_breaks import hide_from_dynamo


def test_a_function_that_dynamo_must_not_see_is_hidden_once() -> None:
    class Site:
        def run_uncompiled(self) -> None:
            """Nothing."""

    site_class: Any = Site
    hide_from_dynamo(site_class)
    hidden = site_class.run_uncompiled
    assert hidden._torchdynamo_disable
    hide_from_dynamo(site_class)
    assert site_class.run_uncompiled is hidden
    assert not hasattr(lambda: None, "_torchdynamo_disable")
    assert hasattr(torch.compiler.disable(lambda: None), "_torchdynamo_disable")  # type: ignore[no-untyped-call]


def test_a_function_mode_that_is_alone_can_be_left_and_entered_again() -> None:
    class Counting(TorchFunctionMode):
        seen = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen += 1
            return func(*args, **(kwargs or {}))

    x = torch.zeros(2)
    assert not _is_alone(Counting())
    with Counting() as mode:
        assert _is_alone(mode)
        torch._C._pop_torch_function_stack()
        try:
            torch.neg(x)
        finally:
            torch._C._push_on_torch_function_stack(mode)
        assert mode.seen == 0
        torch.neg(x)
        assert mode.seen == 1
        with Counting() as inner:
            assert not _is_alone(mode)
            assert not _is_alone(inner)
