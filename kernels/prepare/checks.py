"""What the arguments of `prepare_operand` must satisfy."""

from __future__ import annotations

import torch

from ..checks import FLOAT_DTYPES, check_block, check_float_4d, check_order_type, check_same_device, require
from ..linear.feature_maps import find_feature_map
from ..preparation import Preparation

PAIRS = ("interleaved", "halves")
NORMS = ("none", "rms", "layer")
OVER = ("head", "width")


def check_types(x: torch.Tensor, preparation: Preparation) -> None:
    """What can be checked without reading a size of tokens or of the batch; the fake calls it as well."""
    tables, pairs, norm, over, _, feature_map, block, weight, bias, order, inverse = preparation
    given = dict(zip(("first", "second", "third", "fourth"), tables, strict=False))
    check_same_device(x=x, weight=weight, bias=bias, order=order, inverse=inverse, **given)
    check_float_4d(x=x)
    for name, value, known in (("pairs", pairs, PAIRS), ("norm", norm, NORMS), ("over", over, OVER)):
        require(value in known, f"{name} must be one of {', '.join(known)}, got {value!r}")
    if feature_map:
        find_feature_map(feature_map)
    if block:
        check_block("block", block)
    require(len(tables) in (2, 4), f"tables must be two, or four, got {len(tables)}")
    require(x.shape[-1] % 2 == 0, f"x must have an even number of channels, got {x.shape[-1]}")
    width = tables[0].shape[-1]
    for table in tables:
        require(table.dim() == 4, f"a table must have 4 dimensions (B, H, S, P), got {table.dim()}")
        require(table.dtype in FLOAT_DTYPES, f"a table has dtype {table.dtype}, which is not floating point")
        require(table.shape[-1] == width, "the tables have different numbers of pairs")
    require(2 * width <= x.shape[-1], f"{width} pairs do not fit into {x.shape[-1]} channels")
    require(norm != "none" or (weight is None and bias is None), "weight and bias belong to a norm, and there is none")
    channels = x.shape[-1] * (x.shape[1] if over == "width" else 1)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            require(tensor.dtype in FLOAT_DTYPES, f"{name} has dtype {tensor.dtype}, which is not floating point")
            require(tensor.shape == (channels,), f"{name} must be ({channels},), got {tuple(tensor.shape)}")
    require((order is None) == (inverse is None), "order and inverse go together")
    for permutation in (order, inverse):
        if permutation is not None:
            check_order_type(permutation)


def check_sizes(x: torch.Tensor, preparation: Preparation) -> None:
    """The rest of the checks, but for the order, whose contents they would have to read: see `checks.check_move`."""
    require(x.shape[2] > 0, "x has no tokens: S must be at least 1")
    for table in preparation.tables:
        fits = all(size in (1, wanted) for size, wanted in zip(table.shape[:3], x.shape[:3], strict=True))
        require(fits, f"a table of shape {tuple(table.shape)} does not broadcast to x of shape {tuple(x.shape)}")
