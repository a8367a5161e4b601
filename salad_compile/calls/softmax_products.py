"""Attention that a model computes by hand: softmax(q @ k^T * scale) @ v, recognised while its operations go by.

The same steps for tensors (discovery, eager twin) and graph nodes (passes). A product of two values starts a candidate;
numbers may scale it, casts and dropout may come, a softmax over its last axis makes it weights, and the product of the
weights with a third value is the attention call. What happens otherwise to the scores (masks, biases, clipping) makes
the call stay dense, with the reason. Scaling query or key beforehand needs no step: then the scale is one.

In the eager twin and in discovery the dense scores have been computed by then: right, and slow. In graphs nothing reads
them any more, and AOTAutograd drops them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

from salad_compile.calls.adapters import AttentionArguments, Layout
from salad_compile.common.torch_calls import argument_of, name_of

_PRODUCTS = frozenset({"matmul", "bmm"})
_CASTS = frozenset({"to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone"})


@dataclass(frozen=True)
class Scores:
    """Scores, or the weights that a softmax made of them.

    Attributes:
        query, key: the operands of the product. query_axes, key_axes: the permutation that makes them (..., S, D).
        axes: what the axes are, "0" and "1" (batch and heads), "q" and "k".
        scale, dropout_p: so far. softmax: whether these are weights. reason: why the call must stay dense.
        factors: nodes of numbers that the scores are multiplied with besides, or divided by, and by which operation.
    """

    query: Any
    key: Any
    query_axes: tuple[int, ...]
    key_axes: tuple[int, ...]
    axes: str
    scale: float = 1.0
    dropout_p: float = 0.0
    softmax: bool = False
    reason: str = ""
    factors: tuple[tuple[Any, str], ...] = ()


class ManualAttention:
    """Follows scores through the operations of one forward or graph.

    Args:
        table: value -> its scores. rank: how many dimensions a value has, 0 for what is no tensor.
        permute: a value with its axes in another order.
        may_be_number, number: whether a value may stand for a number, and the number, or None. A graph of any length
            is one of this length alone once the number is asked for: only where it counts.
    """

    def __init__(
        self,
        table: MutableMapping[Any, Scores],
        rank: Callable[[Any], int],
        permute: Callable[[Any, tuple[int, ...]], Any],
        may_be_number: Callable[[Any], bool] = lambda value: False,
        number: Callable[[Any], float | None] = lambda value: None,
    ) -> None:
        self.table = table
        self.rank = rank
        self.permute = permute
        self.may_be_number = may_be_number
        self.number = number

    def bind(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> AttentionArguments | None:
        """The attention call that this operation completes, or None."""
        if not self.table:
            return None
        name, _ = name_of(function, args)
        operands, equation = _operands(name, args, kwargs)
        weights = self._scores(operands[0]) if len(operands) == 2 else None
        if weights is None or not weights.softmax or self._scores(operands[1]) is not None:
            return None
        if equation is None:
            rank = len(weights.axes)
            if weights.axes[-2:] != "qk" or self.rank(operands[1]) != rank:
                return None
            layout: Layout = "BHSD" if rank == 4 else "HSD"
            value = operands[1]
        else:
            read = _read_weighted_sum(equation, weights.axes)
            if read is None:
                return None
            axes, layout = read
            value = self._permuted(operands[1], axes)
        scale, reason = self._scale(weights)
        return AttentionArguments(
            self._laid_out(weights.query, weights.query_axes, layout),
            self._laid_out(weights.key, weights.key_axes, layout),
            value if equation is None or layout != "BSHD" else self.permute(value, (0, 2, 1, 3)),
            dropout_p=weights.dropout_p,
            scale=scale,
            layout=layout,
            reason=reason,
            by_hand=True,
        )

    def _scale(self, weights: Scores) -> tuple[float, str]:
        """The factor of the scores, and why the call stays dense."""
        scale = weights.scale
        for factor, name in weights.factors:
            number = None if weights.reason else self.number(factor)
            if not number:
                return scale, weights.reason or _goes_through(name)
            scale *= 1 / number if name == "div" else number
        return scale, weights.reason

    def note(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """An operation that completes no attention call."""
        name, writes = name_of(function, args)
        if name in _PRODUCTS or name in ("einsum", "baddbmm"):
            scores = self._product(name, args, kwargs)
            if scores is not None and self.rank(out) == len(scores.axes):
                self.table[out] = scores
            return
        if not self.table:
            return
        if "input" in kwargs:
            args, kwargs = (kwargs["input"], *args), {key: value for key, value in kwargs.items() if key != "input"}
        target = next((value for value in (*args, *kwargs.values()) if self._scores(value) is not None), None)
        if target is None:
            return
        scores = self.table[target]
        if writes or self.rank(out):
            step = self._step(name, target, scores, args, kwargs, self.rank(out))
            if step is not None and self.rank(out):
                self.table[out] = step
            if writes:
                self.table[target] = step or dataclasses.replace(scores, reason=_goes_through(name))
        elif isinstance(out, (tuple, list)) and any(map(self.rank, out)):  # not its shape or strides
            self._alter(target, name)

    def _step(
        self, name: str, target: Any, scores: Scores, args: Sequence[Any], kwargs: Mapping[str, Any], rank: int
    ) -> Scores | None:
        """What scores are after one operation, or None if its result is none."""
        if name in _CASTS:
            return scores if args and args[0] is target else None
        if name == "softmax" and not scores.softmax:
            dim = argument_of(args, kwargs, 1, "dim")
            return dataclasses.replace(scores, softmax=True) if dim in (-1, len(scores.axes) - 1) else None
        if name == "dropout" and scores.softmax:
            p, training = argument_of(args, kwargs, 1, "p", 0.5), argument_of(args, kwargs, 2, "training", True)
            return dataclasses.replace(scores, dropout_p=float(p) if training else scores.dropout_p)
        scaled = name == "mul" or (name == "div" and args and args[0] is target)  # a number by the scores is none
        if scaled and not scores.softmax and not kwargs and len(args) == 2:
            factor = args[1] if args[0] is target else args[0]
            if isinstance(factor, (int, float)) and not isinstance(factor, bool) and factor:
                factor = 1 / factor if name == "div" else factor
                return dataclasses.replace(scores, scale=scores.scale * factor)
            if self.may_be_number(factor):
                return dataclasses.replace(scores, factors=(*scores.factors, (factor, name)))
        self._alter(target, name)
        if name in _READS or rank != len(scores.axes):
            return None
        return dataclasses.replace(scores, reason=_goes_through(name))

    def _alter(self, target: Any, name: str) -> None:
        """A part of the scores was taken, into which the model may write.

        What else reads weights may be for somebody to look at; of scores anything else counts.
        """
        scores = self.table[target]
        if name in _VIEWS or not (scores.softmax or name in _READS):
            self.table[target] = dataclasses.replace(scores, reason=_goes_through(name))

    def _product(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Scores | None:
        operands, equation = _operands(name, args, kwargs)
        if len(operands) != 2 or any(self._scores(operand) is not None for operand in operands):
            return None
        query, key = operands
        rank = self.rank(query)
        if rank not in (3, 4) or self.rank(key) != rank:
            return None
        if equation is not None:
            return _read_scores(equation, query, key)
        scale = 1.0
        if name == "baddbmm":  # with beta=0 the first argument is not read
            if kwargs.get("beta", 1) != 0 or not isinstance(kwargs.get("alpha", 1), (int, float)):
                return None
            scale = float(kwargs.get("alpha", 1))
        straight = tuple(range(rank))
        return Scores(query, key, straight, (*straight[:-2], rank - 1, rank - 2), "01qk"[4 - rank :], scale)

    def _scores(self, value: Any) -> Scores | None:
        return self.table.get(value) if isinstance(value, (Tensor, fx.Node)) else None

    def _permuted(self, value: Any, axes: tuple[int, ...]) -> Any:
        return value if axes == tuple(range(len(axes))) else self.permute(value, axes)

    def _laid_out(self, value: Any, axes: tuple[int, ...], layout: str) -> Any:
        """(..., S, D), or (B, S, H, D) where the result is."""
        return self._permuted(value, (axes[0], axes[2], axes[1], axes[3]) if layout == "BSHD" else axes)


# What is computed from scores and is none, whatever its shape.
_READS = frozenset(
    {"isnan", "isinf", "isfinite", "zeros_like", "ones_like", "empty_like", "full_like", "eq", "ne", "gt", "lt"}
)

# What may answer a part of its operand that writes show in.
_VIEWS = frozenset(
    (
        "getitem",
        "narrow",
        "select",
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "unbind",
        "split",
        "chunk",
        "diagonal",
        "unsqueeze",
        "squeeze",
        "transpose",
        "swapaxes",
        "swapdims",
        "permute",
        "movedim",
        "expand",
        "T",
        "mT",
    )
)


def _goes_through(name: str) -> str:
    return f"its scores go through {name} (a mask or bias?) on the way to the weights"


def _operands(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Sequence[Any], str | None]:
    """The operands of a product, and the equation if it is an einsum."""
    if name == "einsum" and args and isinstance(args[0], str):
        rest = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
        return rest, args[0].replace(" ", "")
    if name == "einsum":
        return _with_letters(args)
    if name == "baddbmm":
        return args[1:3], None
    if name in _PRODUCTS:
        named = [kwargs[other] for other in ("input", "other", "mat2") if other in kwargs]
        return [*args, *named], None
    return (), None


def _with_letters(args: Sequence[Any]) -> tuple[Sequence[Any], str | None]:
    """The same of an einsum whose axes are lists of numbers: einsum(a, [0, 1], b, [1, 2], [0, 2])."""
    axes = args[1::2] if len(args) % 2 == 0 else (*args[1::2], args[-1])
    if len(args) % 2 == 0 or not all(isinstance(one, (list, tuple)) for one in axes):
        return (), None
    if not all(type(axis) is int and 0 <= axis < 26 for one in axes for axis in one):
        return (), None
    *inputs, out = ("".join(chr(ord("a") + axis) for axis in one) for one in axes)
    return args[:-1:2], f"{','.join(inputs)}->{out}"


def _parse(equation: str) -> tuple[str, str, str] | None:
    inputs, arrow, out = equation.partition("->")
    first, comma, second = inputs.partition(",")
    whole = first + second + out
    plain = bool(arrow and comma) and whole.isalpha() and all(len(set(p)) == len(p) for p in (first, second, out))
    return (first, second, out) if plain else None


def _read_scores(equation: str, query: Any, key: Any) -> Scores | None:
    """An einsum of query and key whose result ends with the keys."""
    parsed = _parse(equation)
    if parsed is None:
        return None
    first, second, out = parsed
    width = [letter for letter in first if letter in second and letter not in out]
    shared = [letter for letter in out if letter in first and letter in second]
    q, k = (
        [letter for letter in out if letter in a and letter not in b] for a, b in ((first, second), (second, first))
    )
    if not (len(width) == len(q) == len(k) == 1) or out[-1] != k[0] or len(shared) != len(out) - 2:
        return None
    if sorted(first) != sorted([*shared, *q, *width]) or sorted(second) != sorted([*shared, *k, *width]):
        return None
    labels = {**{letter: "01"[i - len(shared)] for i, letter in enumerate(shared)}, q[0]: "q", k[0]: "k"}
    return Scores(
        query,
        key,
        tuple(first.index(letter) for letter in [*shared, *q, *width]),
        tuple(second.index(letter) for letter in [*shared, *k, *width]),
        "".join(labels[letter] for letter in out),
    )


def _read_weighted_sum(equation: str, axes: str) -> tuple[tuple[int, ...], Layout] | None:
    """The permutation that makes the value of an einsum (..., S, D), and the layout of the result."""
    parsed = _parse(equation)
    if parsed is None or len(parsed[0]) != len(axes):
        return None
    letters = dict(zip(axes, parsed[0], strict=True))
    shared = [letters[axis] for axis in "01" if axis in letters]
    width = [letter for letter in parsed[1] if letter not in parsed[0]]
    if len(width) != 1 or sorted(parsed[1]) != sorted([*shared, letters["k"], *width]):
        return None
    layouts: dict[str, Layout] = {"".join([*shared, letters["q"], *width]): "BHSD" if len(shared) == 2 else "HSD"}
    if len(shared) == 2:
        layouts["".join([shared[0], letters["q"], shared[1], *width])] = "BSHD"
    layout = layouts.get(parsed[2])
    return None if layout is None else (tuple(parsed[1].index(x) for x in [*shared, letters["k"], *width]), layout)


def of_tensors(permute: Callable[[Any, tuple[int, ...]], Any] = Tensor.permute) -> ManualAttention:
    """For function modes; scores are forgotten when the tensors are freed."""
    return ManualAttention(WeakIdKeyDictionary(), _rank_of_tensor, permute)


def _rank_of_tensor(value: Any) -> int:
    return value.dim() if isinstance(value, Tensor) else 0
