"""Which rows an operator of somebody's makes its results of, where torch does not show it: seen by running it.

The rows are numbered, in binary. For each digit the operator runs twice on stand-ins for its arguments, with NaN in all
elements of the rows whose digit is one, then of those whose digit is zero. An element of a result that is NaN in just
one of the two runs, for every digit, comes from one row, which these digits spell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Undocumented. Seen in torch 2.11 and 2.13; tests/salad_compile/position/test_run_rows.py fails when it moves.
from torch.utils._pytree import tree_flatten, tree_unflatten

from salad_compile.position.shadows import UnknownError, compact, shrink

StandIn = Callable[[Any], "Tensor | None"]


class OperatorRuns:
    """What was seen of operators, kept: blocks of one model call the same ones with the same shapes."""

    def __init__(self) -> None:
        self._known: dict[str, list[tuple[list[Tensor], list[Tensor]]]] = {}

    def rows(
        self,
        function: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        shadows: Mapping[int, Tensor],
        stand_in: StandIn,
        blank: int,
        written: Sequence[Any],
    ) -> list[Tensor]:
        """The shadows of the tensors that an operator returns, then of those that it writes into.

        Args:
            shadows: of the arguments that have rows, by id. stand_in: a tensor like an argument; None if it is none.
            blank: the entry of what has no row. written: the arguments that it writes into.

        Raises:
            UnknownError: it cannot be run here, or mixes rows.
        """
        leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
        numbers, entries = _number(shadows, blank)
        plain = _stand_ins(leaves, stand_in)

        def run(poisoned: Mapping[int, Tensor]) -> list[Tensor]:
            given = [
                leaf if stand is None else _poison(stand, poisoned.get(id(leaf)))
                for leaf, stand in zip(leaves, plain, strict=True)
            ]
            after = [given[at] for at, leaf in enumerate(leaves) if any(leaf is value for value in written)]
            new_args, new_kwargs = tree_unflatten(given, spec)
            out = function(*new_args, **new_kwargs)
            return [result for result in (*tree_flatten(out)[0], *after) if isinstance(result, Tensor)]

        key = str((function, spec, [_describe(leaf, given) for leaf, given in zip(leaves, plain, strict=True)]))
        indices = [numbers[id(leaf)] for leaf in leaves if id(leaf) in numbers]
        found = self._find(key, indices)
        if found is None:
            found = _decode(run, numbers, len(entries))
            self._known.setdefault(key, []).append((indices, found))
        table = torch.cat([entries, entries.new_tensor([blank])])  # -1 is the last
        return [shrink(table[index]) for index in found]

    def _find(self, key: str, indices: Sequence[Tensor]) -> list[Tensor] | None:
        known = self._known.get(key, [])
        return next((found for own, found in known if all(map(torch.equal, own, indices))), None)


def _stand_ins(leaves: Sequence[Any], stand_in: StandIn) -> list[Tensor | None]:
    try:
        return [stand_in(leaf) for leaf in leaves]
    except Exception as error:  # of a device that is not here
        raise UnknownError(f"it cannot be run here ({type(error).__name__})") from error


def _number(shadows: Mapping[int, Tensor], blank: int) -> tuple[dict[int, Tensor], Tensor]:
    """Of each argument the numbers of its rows, -1 for none, that can be expanded to it; and the entry of each."""
    small = {key: compact(shadow) for key, shadow in shadows.items()}
    entries = torch.unique(torch.cat([shadow.reshape(-1) for shadow in small.values()]))
    entries = entries[entries != blank]
    numbers = {
        key: torch.where(shadow == blank, -1, torch.searchsorted(entries, shadow.contiguous()))
        for key, shadow in small.items()
    }
    return numbers, entries


def _describe(leaf: Any, stand: Tensor | None) -> Any:
    return leaf if stand is None else (tuple(stand.shape), stand.dtype, stand.device, stand.stride())


def _poison(stand: Tensor, where: Tensor | None) -> Tensor:
    fresh = stand.detach().clone()
    return fresh if where is None else fresh.masked_fill_(where.to(fresh.device), float("nan"))


def _decode(run: Callable[[Mapping[int, Tensor]], list[Tensor]], numbers: Mapping[int, Tensor], rows: int) -> list[Any]:
    """The number of the row of each element of each result, -1 for none."""
    try:
        with torch.no_grad(), torch.random.fork_rng():
            clean = run({})
            if not all(result.is_floating_point() or result.is_complex() for result in clean):
                raise UnknownError("it has results that are no floating-point numbers")
            if any(bool(result.isnan().any()) for result in clean):
                raise UnknownError("it makes NaN of random numbers")
            found = [torch.zeros(result.shape, dtype=torch.int64) for result in clean]
            touched: list[Any] = [None] * len(clean)
            for digit in range(max((rows - 1).bit_length(), 1)):
                ones, zeros = (
                    [result.isnan().cpu() for result in run(_of_digit(numbers, digit, side))] for side in (1, 0)
                )
                for at, (one, zero) in enumerate(zip(ones, zeros, strict=True)):
                    both = touched[at] is not None and not torch.equal(touched[at], one | zero)
                    if both or bool((one & zero).any()):
                        raise UnknownError("it makes tokens of several")
                    touched[at] = one | zero
                    found[at] |= one.long() << digit
    except UnknownError:
        raise
    except Exception as error:  # whatever an operator raises on stand-ins
        raise UnknownError(f"it does not run on random numbers ({type(error).__name__})") from error
    return [torch.where(seen, number, -1) for seen, number in zip(touched, found, strict=True)]


def _of_digit(numbers: Mapping[int, Tensor], digit: int, side: int) -> dict[int, Tensor]:
    return {key: (number >= 0) & ((number >> digit) & 1 == side) for key, number in numbers.items()}


def like(value: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Random numbers in the place of a tensor that has none here: from 0.5 to 1.5, or zeros where it holds indices."""
    if value.device.type == "meta":
        return None
    empty = torch.empty(tuple(shape), dtype=value.dtype, device=value.device)
    if value.is_floating_point():
        return (0.5 + torch.rand(empty.shape, device=value.device)).to(value.dtype)
    return 0.5 + torch.rand_like(empty) if value.is_complex() else torch.zeros_like(empty)
