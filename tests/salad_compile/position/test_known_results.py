"""What is said to follow from the arguments does, and only of torch's own functions on plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salad_compile.position.known_results import heeds_autocast, is_certain

ROW = (..., slice(0, None, 2))
WEIGHT = nn.Parameter(torch.randn(6, 6))
CERTAIN: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda x: (Tensor.view, x.contiguous(), 2, 24),
    "reshape": lambda x: (Tensor.reshape, x, (2, 24)),
    "flatten": lambda x: (Tensor.flatten, x, 1),
    "unflatten": lambda x: (Tensor.unflatten, x, -1, (3, 2)),
    "permute": lambda x: (torch.permute, x, (0, 2, 1)),
    "contiguous": lambda x: (Tensor.contiguous, x),
    "to": lambda x: (Tensor.to, x, torch.float32),
    "float": lambda x: (Tensor.float, x),
    "double": lambda x: (Tensor.double, x),
    "type_as": lambda x: (Tensor.type_as, x, x[:1]),
    "unbind": lambda x: (Tensor.unbind, x, -1),
    "chunk": lambda x: (torch.chunk, x, 2, -1),
    "split": lambda x: (torch.split, x, 3, -1),
    "getitem": lambda x: (Tensor.__getitem__, x, ROW),
    "one place": lambda x: (Tensor.__getitem__, x, 1),
    "setitem": lambda x: (Tensor.__setitem__, x.clone(), ROW, 0.0),
    "mul": lambda x: (torch.mul, x, x[:1]),
    "product": lambda x: (Tensor.__mul__, x, 2.0),
    "sub": lambda x: (Tensor.sub, x, x),
    "neg": lambda x: (Tensor.__neg__, x),
    "empty_like": lambda x: (torch.empty_like, x),
    "cat": lambda x: (torch.cat, [x, x], -1),
    "linear": lambda x: (F.linear, x, WEIGHT),
    "rms_norm": lambda x: (F.rms_norm, x, (6,)),
}


def inputs() -> list[tuple[Tensor, Tensor]]:
    """Pairs alike in all but their values: dense, transposed, expanded, a parameter."""
    pairs = []
    for make in (
        lambda: torch.randn(2, 4, 6),
        lambda: torch.randn(2, 6, 4).transpose(1, 2),
        lambda: torch.randn(2, 1, 6).expand(2, 4, 6),
        lambda: nn.Parameter(torch.randn(2, 4, 6), requires_grad=False),
    ):
        pairs.append((make(), make().mul(0).nan_to_num() if len(pairs) < 2 else make()))
    return pairs


def described(out: Any, given: list[Tensor]) -> Any:
    """Shape, dtype, strides and memory of what came out."""
    if isinstance(out, (tuple, list)):
        return [described(part, given) for part in out]
    if out is None:
        return None
    memory = [torch._C._is_alias_of(out, tensor) for tensor in given]
    return out.shape, out.dtype, out.stride(), memory, [out is tensor for tensor in given]


@pytest.mark.parametrize("name", CERTAIN)
def test_results_follow_from_arguments(name: str) -> None:
    with torch.no_grad():
        for pair in inputs():
            answers = []
            for x in pair:
                func, *args = CERTAIN[name](x)
                tensors = [a for part in args for a in (part if isinstance(part, list) else [part])]
                tensors = [a for a in tensors if isinstance(a, Tensor)]
                assert is_certain(func, args, tensors)
                answers.append(described(func(*args), tensors))
            assert answers[0] == answers[1]


class Own(Tensor):
    """A subclass."""


def mul(x: Tensor, y: Tensor) -> Tensor:
    return x


X = torch.randn(2, 4, 6)


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (torch.nonzero, (X,)),
        (torch.masked_select, (X, X > 0)),
        (Tensor.__getitem__, (X, X > 0)),
        (Tensor.__getitem__, (X, [0, 1])),
        (Tensor.__getitem__, (X, (..., torch.tensor(0)))),
        (Tensor.__getitem__, (X, slice(torch.tensor(0), None))),
        (torch.repeat_interleave, (X, torch.tensor([1, 2]))),
        (mul, (X, X)),
        (torch.mul, (X.as_subclass(Own), X)),
        (torch.mul, (X.to_sparse(), X)),
        (torch.ops.aten.mul.Tensor, (X, X)),
        (F.dropout, (X,)),
    ],
)
def test_nothing_else_is_certain(func: Any, args: tuple[Any, ...]) -> None:
    assert not is_certain(func, args, [a for a in args if isinstance(a, Tensor)])


def test_products_and_norms_heed_autocast() -> None:
    assert heeds_autocast(F.linear)
    assert heeds_autocast(torch.cat)
    assert not heeds_autocast(Tensor.mul)


def test_methods_of_tensors_say_so() -> None:
    """A private name: methods that are written in C belong to the class of which torch.Tensor is one."""
    method: Any = Tensor.mul
    assert method.__objclass__ is torch._C.TensorBase
    assert torch.mul.__module__ == "torch"
