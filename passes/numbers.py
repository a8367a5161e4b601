"""Numbers that a graph computes, where the rewriting needs their values: the scale of an attention call.

A size of a graph that serves any length is a symbol; asked for its value, the graph serves that length alone and Dynamo
makes another for others: right in either case. What NumPy computes of numbers (`1 / np.sqrt(64)`) is a tensor in
graphs, made by functions that say their operands: it is computed once more, here.
"""

from __future__ import annotations

import torch
from torch import fx

from salad_compile.passes.provenance import example_value

# Private; seen in torch 2.11 and 2.13. tests/passes/test_numbers.py fails when it moves.
_BY_NUMPY = ("numpy_to_tensor_wrapper", "numpy_operator_wrapper")


def may_be_number(value: object) -> bool:
    """Whether :func:`number_of` may know the value of a node; asks for no value."""
    if not isinstance(value, fx.Node):
        return False
    return isinstance(example_value(value), (int, float, torch.SymInt, torch.SymFloat)) or _is_by_numpy(value)


def number_of(value: object) -> float | None:
    """What a number of Python or a node is worth, or None: a tensor, or known at run time only."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    example = example_value(value)
    try:
        if isinstance(example, (int, float, torch.SymInt, torch.SymFloat)):
            return float(example)
        if not _is_by_numpy(value):
            return None
        operands = [number_of(operand) for operand in value.args]
        result = None if None in operands or value.kwargs else value.target(*operands)  # type: ignore[operator]
    except Exception:  # an unbacked size, in whichever way this release says so, or operands that are no numbers
        return None
    plain = isinstance(result, (int, float)) or (type(result) is torch.Tensor and result.numel() == 1)
    return float(result) if plain else None  # type: ignore[arg-type]


def _is_by_numpy(node: fx.Node) -> bool:
    return node.op == "call_function" and type(node.target).__name__ in _BY_NUMPY
