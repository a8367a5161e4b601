"""A found slice as a list of calls, for forwards that only run it: nothing is looked up in a graph any more."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx

from salad_compile.position.again import Autocast, is_on, under
from salad_compile.position.slice import Entry, PositionSlice, passed_over


class _Line(NamedTuple):
    """One call. take: of the registers, its arguments. into: the register of its result."""

    target: Callable[..., Any]
    take: Callable[[list[Any]], Iterable[Any]]
    into: int


class _Program:
    """Operations on registers: first come the values to begin with, then what else is read, constants and results.

    Args:
        nodes: the operations, in order. begins: the nodes whose values a run begins with.
        scalings: operations that are passed over. operand: the node whose value is the result.
    """

    def __init__(
        self, nodes: Sequence[fx.Node], begins: Sequence[fx.Node], scalings: frozenset[fx.Node], operand: fx.Node
    ) -> None:
        made = {*nodes, *begins}
        self.read = [n for n in dict.fromkeys(n for node in nodes for n in node.all_input_nodes) if n not in made]
        self._places = {node: at for at, node in enumerate((*begins, *self.read))}
        self._first = len(self._places)
        self._others: list[Any] = []  # what the registers behind those hold at first
        self._lines: list[_Line] = []
        self._autocast: list[Autocast | None] = []
        for node in nodes:
            if node in scalings:
                self._places[node] = self._places[passed_over(node)]
                continue
            target: Any = node.target
            if node.kwargs:
                target = functools.partial(_call_with_keywords, target, tuple(node.kwargs))
            arguments = (*node.args, *node.kwargs.values())
            self._places[node] = self._add(target, arguments, node.meta.get("autocast"))
        self._states = {state for state in self._autocast if state is not None}
        self._result = self._places[operand]

    def run(self, begins: Sequence[Any], value_of: Callable[[fx.Node], Any]) -> Any:
        """The result. value_of: what a node of `read` holds."""
        registers = [*begins, *map(value_of, self.read), *self._others]
        if all(map(is_on, self._states)):
            for target, take, into in self._lines:
                registers[into] = target(*take(registers))
        else:
            for (target, take, into), state in zip(self._lines, self._autocast, strict=True):
                with under(state):
                    registers[into] = target(*take(registers))
        return registers[self._result]

    def _register(self, value: Any) -> int:
        self._others.append(value)
        return self._first + len(self._others) - 1

    def _add(self, target: Callable[..., Any], arguments: Sequence[Any], state: Autocast | None) -> int:
        """Add a call. Returns the register of its result."""
        places = [self._place_of(argument) for argument in arguments]
        if len(places) < 2:  # itemgetter gives one item by itself
            take: Any = operator.itemgetter(slice(places[0], places[0] + 1) if places else slice(0))
        else:
            take = operator.itemgetter(*places)
        into = self._register(None)
        self._lines.append(_Line(target, take, into))
        self._autocast.append(state)
        return into

    def _place_of(self, argument: Any) -> int:
        """The register of an argument; of a container of nodes, a call that makes it is added."""
        if isinstance(argument, fx.Node):
            return self._places[argument]
        within: list[fx.Node] = []
        fx.map_arg(argument, within.append)
        if not within:
            return self._register(argument)
        if isinstance(argument, slice):
            return self._add(slice, (argument.start, argument.stop, argument.step), None)
        if isinstance(argument, dict):
            return self._add(functools.partial(_make_dict, tuple(argument)), tuple(argument.values()), None)
        return self._add(_make_tuple if isinstance(argument, tuple) else _make_list, tuple(argument), None)


def _make_tuple(*entries: Any) -> tuple[Any, ...]:
    return entries


def _make_list(*entries: Any) -> list[Any]:
    return list(entries)


def _make_dict(names: tuple[str, ...], *entries: Any) -> dict[str, Any]:
    return dict(zip(names, entries, strict=True))


def _call_with_keywords(target: Callable[..., Any], names: tuple[str, ...], *given: Any) -> Any:
    """Call `target` with keywords, whose values are the last of the arguments."""
    count = len(given) - len(names)
    return target(*given[:count], **dict(zip(names, given[count:], strict=True)))


class SliceProgram:
    """:meth:`PositionSlice.replay` of tensors, for a slice that is run often."""

    def __init__(self, found: PositionSlice) -> None:
        self._entries = found.entries
        ends, starts = ([getattr(e, cell).node for e in found.entries] for cell in ("end", "start"))
        self._plain = _Program(found.plain, ends, found.scalings, found.operand)
        self._mapped = _Program(found.mapped, starts, found.scalings, found.operand)

    def run(
        self, feature_map: str, start_of: Callable[[Entry], Tensor], value_of: Callable[[fx.Node], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The operand without position, and its features with it; arguments as :func:`again.replay` has them."""
        begins = [entry.begin(start_of(entry), feature_map) for entry in self._entries]
        plain = self._plain.run([value for value, _ in begins], value_of)
        return plain, self._mapped.run([features for _, features in begins], value_of)
