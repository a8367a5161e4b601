"""Private names of torch that this room stands on: these tests fail when they move."""

from __future__ import annotations

from typing import Any

import torch

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
