"""The tensors of one site's branch, by name: an attention function's argument, and a flat list in traced graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from salad_compile.config import AttentionSpec

__all__ = ["BranchTensors"]


class BranchTensors(NamedTuple):
    """What one site brings along. C is the width of the layer's input, H its heads, D = H * value head_dim.

    Parameters may have any floating dtype: they are cast to the activations' where they are used, so fp32 masters under
    16-bit activations work without autocast. Those that the site's settings have no use for are None.

    Attributes:
        gate_weight, gate_bias: (C,) and (1,), or (C, H) and (H,) with one gate per head.
        proj_weight, proj_bias: (D, D) and (D,).
        layer_scale, head_scale: () and (H,), the static scales of the "v2" scaling.
        permille: int32 (), key blocks kept per thousand, where that is not fixed.
        temporal_heads: bool (H,), which heads have their sliding window through time.
    """

    gate_weight: Tensor | None = None
    gate_bias: Tensor | None = None
    proj_weight: Tensor | None = None
    proj_bias: Tensor | None = None
    layer_scale: Tensor | None = None
    head_scale: Tensor | None = None
    permille: Tensor | None = None
    temporal_heads: Tensor | None = None

    @staticmethod
    def names(spec: AttentionSpec) -> tuple[str, ...]:
        """The fields that a site with these settings has, in the order of :meth:`flat`."""
        names: tuple[str, ...] = ()
        if spec.linear_branch:
            names += () if spec.gate == "none" else ("gate_weight", "gate_bias")
            names += ("proj_weight", "proj_bias")
            names += ("layer_scale", "head_scale") if spec.scaling == "v2" else ()
        names += ("permille",) if spec.adjustable else ()
        return names + (("temporal_heads",) if spec.pattern == "stswa" else ())

    def flat(self) -> list[Tensor]:
        """Those that are there."""
        return [tensor for tensor in self if tensor is not None]

    @classmethod
    def from_flat(cls, tensors: Sequence[Any], spec: AttentionSpec) -> BranchTensors:
        """Inverse of :meth:`flat`; of proxies as well."""
        return cls(**dict(zip(cls.names(spec), tensors, strict=True)))
