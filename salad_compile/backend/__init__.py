"""The Dynamo backend "salad", and what else compiles: exported programs and pipelines.

The entry point `torch_dynamo_backends` names `salad` here, so that it works in a process that never imports
salad_compile.
"""

from salad_compile.common.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, {"dynamo": ("record_graphs", "salad")})
