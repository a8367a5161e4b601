"""What an emitted graph may hold: which operators, with what arguments, and what may meet what.

`verify` says what is wrong with a graph. The test-suite asks it after every pass (tests/conftest.py).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from salad_compile.passes.provenance import example_value

# Operator -> its arguments in order, and its results. A letter is the kind: f a floating tensor, F a list of them, i an
# int32, b a bool and a any one, with the ranks that it may have; n an integer, maybe symbolic; s a Python float;
# t text. ? may be None.
OPERATORS = {
    "prepare_operand": "x=f4 tables=F4 pairs=t norm=t over=t eps=s feature_map=t block=n weight=f1? bias=f1? "
    "order=i1? inverse=i1? -> f4 f14 f14 f14",
    "take_rows": "x=f4 order=i1 inverse=i1 -> f4",
    "take_rows_with_means": "x=f4 order=i1 inverse=i1 pool=n begin=n end=n -> f4 f4",
    "pool_blocks": "x=f4 block=n key_mask=b2? -> f4",
    "select_blocks": "pooled_query=f4 pooled_key=f4 query_block=n key_block=n density_permille=n "
    "sink_begin=n sink_end=n key_mask=b2? permille=i0? -> i4 i3",
    "select_by_mass": "query=f4 key=f4 value=f4? cell=n scale=s query_block=n key_block=n density_permille=n "
    "sink_begin=n sink_end=n key_mask=b2? permille=i0? -> i4 i3",
    "window_blocks": "query=f4 query_block=n key_block=n density_permille=n window=n "
    "sink_begin=n sink_end=n video_begin=n video_end=n permille=i0? -> i4 i3",
    "block_sparse_attention": "query=f4 key=f4 value=f4 lut=i4 count=i3 query_block=n key_block=n scale=s "
    "key_mask=b2? -> f4 f3",
    "tail_tokens": "lut=i4 count=i3 tokens=n key_block=n pool=n begin=n end=n key_mask=b2? -> f4",
    "tail_means": "x=f4 pool=n begin=n end=n key_mask=b2? block_means=f4? block=n -> f4",
    "attend_with_tail": "query=f4 key=f4 value=f4 pooled_key=f4 pooled_value=f4 pool_tokens=f4 log_weight=f1? "
    "lut=i4 count=i3 query_block=n key_block=n scale=s key_mask=b2? -> f4 f3",
    "linear_state": "key=f4 value=f4 feature_map=t key_mask=b2? rotated_key=f4? -> f4 f3",
    "linear_output": "query=f4 state=f4 key_sum=f3 feature_map=t eps=s rotated_query=f4? -> f4",
    "gather_tokens": "x=f4 group=t -> f4",
    "gather_heads": "x=f4 group=t -> f4",
    "start_tokens": "x=f4 group=t -> f4",
    "finish_tokens": "parts=f4 group=t -> f4",
    "start_heads": "x=f4 group=t -> f4",
    "finish_heads": "parts=f4 group=t -> f4",
    "own_blocks": "x=a34 group=t -> a34",
    "require_equal_samples": "query=f3 batch=i1 key_batch=i1? key_tokens=n -> f3",
    "sum_of_processes": "x=f34 group=t -> f34",
}
MARKERS = ("tag", "site", "projected")
ATTENTION, ROUTED, WINDOWS, STATE, OUTPUT = (
    *("block_sparse_attention", "select_blocks", "window_blocks", "linear_state", "linear_output"),
)
TAILED, COUNTED, MASS = "attend_with_tail", "tail_tokens", "select_by_mass"
PREPARED, MOVED = "prepare_operand", "take_rows_with_means"
POOLED, LISTS = ("pooled_key", "pooled_value"), ("lut", "count", "key_block", "key_mask")
# What holds for attention without pools and with them: a sentence for each call, and how that is seen.
OF_ATTENTION: tuple[tuple[str, Callable[[Call], bool]], ...] = (
    ("lut and count are the results of one selection", lambda c: c.has_selection()),
    ("it has the blocks of its selection", lambda c: c.agrees(c.selection, "query_block", "key_block")),
    ("it has the key mask of its selection", lambda c: c.agrees(c.selection, "key_mask")),
    ("the selection is of its query and key", lambda c: c.selection is None or c.selection.is_of(c)),
    ("query, key and value are in one order", lambda c: c.one_order("query", "key", "value")),
    ("nothing reads its lse", lambda c: all(user.args[1] == 0 for user in c.node.users)),
)
# Operator, a sentence that holds for each call of it, and how that is seen. Of what another rule rejects a rule says
# nothing: `selection`, `state` and the like are then None.
RULES: tuple[tuple[str, str, Callable[[Call], bool]], ...] = (
    *((name, *rule) for name in (ATTENTION, TAILED) for rule in OF_ATTENTION),
    (ATTENTION, "query, key and value have one dtype", lambda c: c.one_dtype("query", "key", "value")),
    (STATE, "key and value have one dtype", lambda c: c.one_dtype("key", "value", "rotated_key")),
    (OUTPUT, "the query has one dtype", lambda c: c.one_dtype("query", "rotated_query")),
    (ROUTED, "pooled query and key have one dtype", lambda c: c.one_dtype("pooled_query", "pooled_key")),
    (TAILED, "query, key, value and pools have one dtype", lambda c: c.one_dtype("query", "key", "value", *POOLED)),
    (TAILED, "pools that were moved with values are of its values", lambda c: c.pools_its_values()),
    (TAILED, "its pools are counted from its lists", lambda c: c.agrees(c.maker("pool_tokens", COUNTED), *LISTS)),
    *((name, "the rows are put back", lambda c: c.is_put_back()) for name in ("take_rows", MOVED)),
    (ROUTED, "its means are of its blocks", lambda c: c.pools("query") and c.pools("key")),
    ("pool_blocks", "no gradient flows into a selection", lambda c: c.is_detached("x")),
    (
        MASS,
        "no gradient flows into a selection",
        lambda c: all(c[side] is None or c.is_detached(side) for side in ("query", "key", "value")),
    ),
    (OUTPUT, "state and key_sum are the results of one linear_state", lambda c: c.state is not None),
    (OUTPUT, "it has the feature map of its state", lambda c: c.agrees(c.state, "feature_map")),
    (OUTPUT, "position is in its query and its keys, or in neither", lambda c: c.turns_both()),
    (OUTPUT, "its query and features are of one preparation", lambda c: c.is_of_one_preparation("query")),
    (STATE, "its key and features are of one preparation", lambda c: c.is_of_one_preparation("key")),
    (PREPARED, "the rows of a preparation are put back", lambda c: c["order"] is None or c.is_put_back()),
    (PREPARED, "a preparation has a norm for its weight and bias", lambda c: c["norm"] != "none" or not c.is_affine()),
)


def verify(graph: fx.Graph, *, erased: bool = True) -> list[str]:
    """What is wrong with an emitted graph: the name of a node and a sentence that does not hold, for each violation.

    Args:
        graph: of Dynamo or export, with the values that they record. erased: whether the markers must be gone.
    """
    calls = [call for call in map(Call.of, graph.nodes) if call is not None]
    found = []
    for call in calls:
        if call.name in MARKERS:
            found += [f"{call.node.name}: markers are erased"] if erased else []
        elif call.name not in OPERATORS:
            found.append(f"{call.node.name}: salad::{call.name} does not belong into an emitted graph")
        else:
            found += [f"{call.node.name}: {fault}" for fault in (*call.misfits(), *call.broken_rules())]
    return found


class Call:
    """A call of one of our operators in a graph: `call["query"]` is that argument, a node, a constant or None."""

    node: fx.Node

    def __init__(self, node: fx.Node, name: str) -> None:
        self.node, self.name = node, name
        given, _, results = OPERATORS.get(name, "").partition(" -> ")
        self.kinds = dict(entry.split("=") for entry in given.split())
        self.results = results.split()
        self.arguments = {**dict(zip(self.kinds, node.args, strict=False)), **node.kwargs}

    @classmethod
    def of(cls, value: object) -> Call | None:
        """The call that a node is, or None; Dynamo keeps the name that was called, export the overload."""
        found = re.fullmatch(r"salad\.(\w+)(\.default)?", str(getattr(value, "target", "")))
        return cls(value, found[1]) if found and isinstance(value, fx.Node) else None

    def __getitem__(self, argument: str) -> Any:
        return self.arguments.get(argument)

    def maker(self, argument: str, *operators: str, result: int | None = None) -> Call | None:
        """The call of one of `operators` whose result (of several: that one) an argument is, or None.

        Sums of a result over processes count as that result, and so do the blocks of it that this process has.
        """
        value = _of_all_processes(self[argument])
        if result is not None:
            if getattr(value, "target", None) is not operator.getitem or value.args[1] != result:
                return None
            value = value.args[0]
        made = Call.of(value)
        return made if made is not None and made.name in operators else None

    def misfits(self) -> list[str]:
        """Arguments and results that are of another kind than OPERATORS says."""
        found = [f"{name} is of kind {kind}" for name, kind in self.kinds.items() if not _fits(kind, self[name])]
        found += [f"it has no argument {name}" for name in self.arguments.keys() - self.kinds.keys()]
        value = example_value(self.node)
        results = value if isinstance(value, (tuple, list)) else [value]
        if len(results) != len(self.results) or not all(map(_fits, self.results, results)):
            found.append(f"its recorded results are of kind {' '.join(self.results)}")
        return found

    def broken_rules(self) -> list[str]:
        """The sentences of RULES that do not hold for this call."""
        return [says for name, says, holds in RULES if name == self.name and not holds(self)]

    @property
    def selection(self) -> Call | None:
        """Whose lists of blocks an attention call reads."""
        return self._maker_of_both("lut", "count", ROUTED, WINDOWS, MASS)

    def has_selection(self) -> bool:
        """Whether the lists of blocks are those of one selection, or plain torch: a pattern may select without us."""
        lists = [self["lut"], _of_all_processes(self["count"])]
        sources = [node.args[0] if node.target is operator.getitem else node for node in lists]
        plain = all(isinstance(source, fx.Node) and Call.of(source) is None for source in sources)
        return plain or self.selection is not None

    @property
    def state(self) -> Call | None:
        """Whose sums an output of linear attention reads, those of all processes included."""
        return self._maker_of_both("state", "key_sum", STATE)

    def _maker_of_both(self, first: str, second: str, *operators: str) -> Call | None:
        makers = self.maker(first, *operators, result=0), self.maker(second, *operators, result=1)
        return makers[0] if makers[0] and makers[1] and makers[0].node is makers[1].node else None

    def agrees(self, other: Call | None, *arguments: str) -> bool:
        """Whether both calls were given the same."""
        return other is None or all(self[name] == other[name] for name in arguments)

    def one_dtype(self, *arguments: str) -> bool:
        """Whether tensors have one dtype; those that are None aside."""
        values = [example_value(self[name]) for name in arguments if isinstance(self[name], fx.Node)]
        return len({value.dtype for value in values if isinstance(value, torch.Tensor)}) == 1

    def order(self, argument: str) -> tuple[Any, Any] | None:
        """By which order and inverse the rows of an argument were moved (in some heads alone: `where`), or None."""
        value = self[argument]
        made, result = self.prepared(argument)
        if made is not None and result == 0 and made["order"] is not None:
            return made["order"], made["inverse"]
        made = self.maker(argument, MOVED, result=0)
        moved = made or Call.of(value.args[1] if getattr(value, "target", None) is torch.where else value)
        return (moved["order"], moved["inverse"]) if moved is not None and moved.name in ("take_rows", MOVED) else None

    def one_order(self, *arguments: str) -> bool:
        """Whether the rows of all these arguments were moved in the same way."""
        return len({self.order(name) for name in arguments}) == 1

    def is_put_back(self) -> bool:
        """Whether some call undoes this move of rows."""
        pairs = [(call["order"], call["inverse"]) for call in map(Call.of, self.node.graph.nodes) if call is not None]
        return (self["inverse"], self["order"]) in pairs

    def pools_its_values(self) -> bool:
        """Whether, if one call moved its values and pooled them, that is one call."""
        rows, pools = self.maker("value", MOVED, result=0), self.maker("pooled_value", MOVED, result=1)
        return (rows and rows.node) is (pools and pools.node)

    def is_detached(self, argument: str) -> bool:
        """Whether no gradient flows into an argument."""
        return getattr(self[argument], "target", None) == "detach"

    def pools(self, side: str) -> bool:
        """Whether the means of query or key blocks were made with this call's block size and mask."""
        made, result = self.prepared(f"pooled_{side}")
        if made is not None:
            return (result, made["block"], self["key_mask"]) == (3, self[f"{side}_block"], None)
        means = self.maker(f"pooled_{side}", "pool_blocks")
        return means is not None and (means["block"], means["key_mask"]) == (self[f"{side}_block"], self["key_mask"])

    def is_of(self, attention: Call) -> bool:
        """Whether a selection was made from the query, and the key, of an attention call."""
        if self.name == WINDOWS:
            return self["query"] is attention["query"]
        if self.name == MASS:
            sides = [side for side in ("query", "key", "value") if self.is_detached(side)]
            return all(self[side].args[0] is attention[side] for side in sides)
        means = {side: self.maker(f"pooled_{side}", "pool_blocks") for side in ("query", "key")}
        prepared = [(self.prepared(f"pooled_{side}")[0], attention.prepared(side)) for side in means]
        if any(made is not None and (whose is None or whose.node is not made.node) for made, (whose, _) in prepared):
            return False
        return all(
            made is None or not made.is_detached("x") or made["x"].args[0] is attention[side]
            for side, made in means.items()
        )

    def prepared(self, argument: str) -> tuple[Call | None, Any]:
        """The preparation that an argument is a result of, as it is or seen otherwise; and which result."""
        value = self[argument]
        while isinstance(value, fx.Node) and value.op == "call_method" and value.target in ("to", "transpose"):
            value = value.args[0]
        if getattr(value, "target", None) is not operator.getitem:
            return None, None
        made = Call.of(value.args[0])
        return (made, value.args[1]) if made is not None and made.name == PREPARED else (None, None)

    def is_of_one_preparation(self, argument: str) -> bool:
        """Whether, if an operand of linear attention was prepared, its features were with it, by the same map."""
        (plain, first), (features, second) = self.prepared(argument), self.prepared(f"rotated_{argument}")
        if plain is None and features is None:
            return True
        same = plain is not None and features is not None and plain.node is features.node
        return same and (first, second) == (1, 2) and self.agrees(plain, "feature_map")

    def is_affine(self) -> bool:
        """Whether it has a weight or a bias."""
        return self["weight"] is not None or self["bias"] is not None

    def turns_both(self) -> bool:
        """Whether position is in the query and in the keys of linear attention, or in neither."""
        return self.state is None or (self["rotated_query"] is None) == (self.state["rotated_key"] is None)


def _of_all_processes(value: Any) -> Any:
    """What a value was before it was summed over processes, or cut to this one's part; others as they are."""
    call = Call.of(value)
    return call["x"] if call is not None and call.name in ("sum_of_processes", "own_blocks") else value


def _fits(kind: str, value: Any) -> bool:
    """Whether an argument, or a recorded result, is of a kind."""
    if value is None:
        return kind.endswith("?")
    value = example_value(value) if isinstance(value, fx.Node) else value
    letter, ranks = kind[0], kind[1:].rstrip("?")
    if letter in "nst":
        wanted = {"n": (int, torch.SymInt), "s": (float,), "t": (str,)}[letter]
        return isinstance(value, wanted) and not isinstance(value, bool)
    if letter == "F":
        return isinstance(value, (list, tuple)) and all(_fits(f"f{ranks}", part) for part in value)
    if not isinstance(value, torch.Tensor) or str(value.dim()) not in ranks:
        return False
    if letter == "a":
        return True
    return value.is_floating_point() if letter == "f" else value.dtype == {"i": torch.int32, "b": torch.bool}[letter]
