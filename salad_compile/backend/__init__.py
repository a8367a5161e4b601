"""The Dynamo backend "salad", and what else compiles: exported programs and pipelines.

The entry point `torch_dynamo_backends` names `salad` here, so that it works in a process that never imports
salad_compile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from salad_compile.common.lazy import lazy_names

if TYPE_CHECKING:
    from salad_compile.backend.dynamo import record_graphs as record_graphs
    from salad_compile.backend.entry import salad as salad

if not TYPE_CHECKING:
    __getattr__, __dir__, __all__ = lazy_names(__name__, {"dynamo": ("record_graphs",), "entry": ("salad",)})
