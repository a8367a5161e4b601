"""What the operations of a forward do to the values that go through them: move, scale linearly, write, or neither.

One table of names for torch functions, methods and ATen overloads alike: graphs of Dynamo and of torch.export, and what
a function mode sees. An operation that is not listed counts as one that is not linear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from salad_compile.common.torch_calls import argument_of, name_of

# Fresh memory without data: their tensor arguments lend a shape.
BLANKS = frozenset(
    {"empty_like", "zeros_like", "empty", "zeros", "new_empty", "new_zeros", "empty_strided", "new_empty_strided"}
)

# What is asked of a tensor that is no data.
SIZES = frozenset({"size", "shape", "dim", "ndim", "numel", "stride", "device", "dtype", "sym_size", "is_complex"})

_VIEWS_AND_CASTS = (
    "view reshape flatten unflatten transpose permute movedim moveaxis swapaxes swapdims squeeze unsqueeze expand "
    "expand_as contiguous clone to float double half bfloat16 type type_as view_as reshape_as to_copy alias T mT H mH "
    "adjoint detach lift_fresh unsafe_view as_strided diagonal resolve_conj resolve_neg convert_element_type cfloat "
    "view_as_complex view_as_real real imag"
)
_SELECTIONS = (
    "getitem slice select narrow split split_with_sizes chunk unsafe_chunk unsafe_split tensor_split unbind repeat "
    "repeat_interleave tile roll flip index_select index gather take_along_dim"
)
# Of these a value from elsewhere may be a part: rows of another origin.
_PLACING = (
    "cat concat concatenate stack hstack vstack dstack pad constant_pad_nd setitem copy index_put index_copy "
    "scatter slice_scatter select_scatter where masked_fill"
)
PLACING = frozenset(_PLACING.split())
MOVES = frozenset((*_VIEWS_AND_CASTS.split(), *_SELECTIONS.split(), *PLACING))

_PRODUCTS = frozenset({"mul", "einsum", "matmul", "mm", "bmm", "outer", "inner"})
_SUMS = frozenset({"add", "sub", "radd", "iadd", "isub", "subtract", "complex"})
_OTHER_LINEAR = frozenset({"neg", "negative", "sum", "conj", "conj_physical"})

# Projections: their weight may be a large matrix of numbers, and is no position.
PROJECTIONS = frozenset({"linear", "addmm"})

_OWN_NAMESPACES = frozenset({"aten", "prims", "salad"})

# Arguments that carry values; the tensors among the others are indices, masks, or lend a shape or a dtype.
_FROM_FIRST = "getitem index_select index gather take_along_dim repeat_interleave masked_fill"
LIKE_ANOTHER = frozenset({"to", "type_as", "view_as", "expand_as", "reshape_as"})  # the others lend a shape or dtype
_DATA = {
    **dict.fromkeys((*_FROM_FIRST.split(), *LIKE_ANOTHER), (0,)),
    **dict.fromkeys(("setitem", "index_put"), (0, 2)),
    **dict.fromkeys(("index_copy", "scatter"), (0, 3)),
    "where": (1, 2),
}
_FIRST = ("input", "self", "tensors")


def operation(node: fx.Node) -> tuple[str, tuple[fx.Node, ...]]:
    """The name of what a node does, and the arguments that it writes into."""
    name, writes = name_of(node.target, node.args)
    if "out" in node.kwargs:
        targets = node.kwargs["out"]
    elif writes:
        targets = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    elif isinstance(node.target, torch._ops.HigherOrderOperator):  # a kernel of Triton's may write into any
        targets = tuple(node.all_input_nodes)
    else:
        targets = written_by_schema(node.target, node.args, node.kwargs)
    targets = targets if isinstance(targets, (tuple, list)) else (targets,)
    return name, tuple(target for target in targets if isinstance(target, fx.Node))


def is_opaque(target: Any) -> bool:
    """Whether an operation may hold a position encoding of its own: a nested graph, an operator that is not torch's."""
    return is_foreign(target) or isinstance(target, torch._ops.HigherOrderOperator)


def is_foreign(target: Any) -> bool:
    """Whether it is an operator that is neither torch's nor ours."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target).partition(".")[0] not in _OWN_NAMESPACES
    return isinstance(target, torch._ops.OpOverload) and target.namespace not in _OWN_NAMESPACES


# Of torch's collectives; seen in torch 2.13. position/test_run_rows.py fails when one comes that is not here.
_COLLECTIVES = frozenset({"c10d", "c10d_functional", "_c10d_functional", "_c10d_functional_autograd", "symm_mem"})
_GROUPS = frozenset({"group", "group_name", "process_group", "pg"})


def may_communicate(target: Any) -> bool:
    """Whether an operator may exchange values with other processes, by its namespace or because it takes a group.

    Run by one process more often than by the others, it would keep all of them waiting.
    """
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(may_communicate(getattr(target, name)) for name in target.overloads())  # type: ignore[no-untyped-call]
    if not isinstance(target, torch._ops.OpOverload):
        return False
    takes_group = any(
        (argument.name in _GROUPS and str(argument.type) != "int") or "ProcessGroup" in str(argument.type)
        for argument in target._schema.arguments
    )
    return takes_group or target.namespace in _COLLECTIVES


def writes(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call writes into one of its arguments."""
    return name_of(function, args)[1] or "out" in kwargs or bool(written_by_schema(function, args, kwargs))


def written_by_schema(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Of operators whose name does not tell."""
    if isinstance(function, torch._ops.OpOverloadPacket):
        function = getattr(function, function.overloads()[0])  # type: ignore[no-untyped-call]
    if not isinstance(function, torch._ops.OpOverload) or not function._schema.is_mutable:
        return ()
    written = [
        (at, a.name) for at, a in enumerate(function._schema.arguments) if a.alias_info and a.alias_info.is_write
    ]
    return tuple(args[at] if at < len(args) else kwargs.get(name) for at, name in written)


def data_arguments(node: fx.Node, name: str) -> list[fx.Node]:
    """The nodes whose values, and not only shapes, go into a node's."""
    if name in BLANKS or name in SIZES:
        return []
    named = [node.kwargs[key] for key in _FIRST if key in node.kwargs]
    if name not in _DATA or (named and node.args):
        return list(node.all_input_nodes)
    arguments = [*named, *node.args]
    chosen = [arguments[at] for at in _DATA[name] if at < len(arguments)]
    return [argument for argument in chosen if isinstance(argument, fx.Node)]


def is_scaling(node: fx.Node, name: str) -> bool:
    """Whether a node multiplies or divides a value by a plain number."""
    tensors = node.all_input_nodes
    divides = name == "div" and tensors and node.args and node.args[0] is tensors[0]
    return len(tensors) == 1 and not node.kwargs and (name == "mul" or bool(divides))


def nonlinear(node: fx.Node, name: str, carriers: Sequence[fx.Node]) -> str:
    """Why a node is not linear in its arguments `carriers`, taken together; the empty string if it is."""
    if name in BLANKS or name in _OTHER_LINEAR:
        return ""
    data = data_arguments(node, name)
    carried = [argument for argument in data if argument in carriers]
    if name in MOVES:
        return "" if _places_nothing_but(node, name) else f"{name} puts other values among its rows"
    if name in _PRODUCTS:
        squared = len(carried) != 1 or sum(argument is carried[0] for argument in node.args) > 1
        return f"{name} multiplies it with itself" if squared else ""
    if name == "div":
        return "" if node.args[:1] == (carried[0],) and len(carried) == 1 else "it is a divisor"
    if name in _SUMS:
        whole = all(isinstance(argument, fx.Node) for argument in node.args) and len(carried) == len(data)
        return "" if whole else f"{name} adds something else to it"
    if name == "addcmul":
        factors = [argument for argument in node.args[1:3] if argument in carriers]
        fits = node.args[:1] and node.args[0] in carriers and len(factors) == 1
        return "" if fits else "addcmul adds something else to it"
    return f"{name} is not known to be linear"


def _places_nothing_but(node: fx.Node, name: str) -> bool:
    """Whether the numbers that a node puts into a tensor are zeros."""
    value: Any = 0
    if name == "setitem":
        value = node.args[2]
    elif name == "masked_fill":
        value = argument_of(node.args, node.kwargs, 2, "value", 0)
        return not isinstance(value, fx.Node) and value == 0
    elif name == "pad":
        value = argument_of(node.args, node.kwargs, 3, "value", 0) or 0
        if argument_of(node.args, node.kwargs, 2, "mode", "constant") != "constant":
            return False
    elif name == "constant_pad_nd":
        value = argument_of(node.args, node.kwargs, 2, "value", 0)
    elif name == "where":
        return all(isinstance(argument, fx.Node) or argument == 0 for argument in node.args[1:3])
    return isinstance(value, fx.Node) or value == 0
