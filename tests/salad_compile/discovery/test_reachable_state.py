"""What forwards cache outside of their modules is what it was after `plan`, on fake tensors and on real ones."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import salad_compile
from salad_compile.discovery.reachable_state import ReachableState
from salad_compile.errors import ProbeError
from tests.support import TINY
from tests.toys import WIDTH, SelfAttention

TOKENS = 140


def table(tokens: int) -> Tensor:
    return torch.arange(tokens * WIDTH, dtype=torch.float32).reshape(tokens, WIDTH).sin()


@functools.lru_cache(maxsize=8)
def lru_cached(tokens: int) -> tuple[Tensor, int]:
    return table(tokens), tokens


@functools.cache
def cached(tokens: int) -> Tensor:
    return table(tokens)


_TABLES: dict[int, tuple[Tensor]] = {}
_TABLE: Tensor | None = None
_TABLE_TOKENS = 0


def in_dictionary(_: nn.Module, tokens: int) -> Tensor:
    if tokens not in _TABLES:
        _TABLES[tokens] = (table(tokens),)
    return _TABLES[tokens][0]


def in_global(_: nn.Module, tokens: int) -> Tensor:
    global _TABLE, _TABLE_TOKENS
    if _TABLE is None or tokens != _TABLE_TOKENS:
        _TABLE, _TABLE_TOKENS = table(tokens), tokens
    return _TABLE


def in_default(_: nn.Module, tokens: int, made: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006
    if tokens not in made:
        made[tokens] = table(tokens)
    return made[tokens]


def on_function(_: nn.Module, tokens: int) -> Tensor:
    if not hasattr(on_function, "table"):
        on_function.table = table(tokens)  # type: ignore[attr-defined]
    made: Tensor = on_function.table  # type: ignore[attr-defined]
    return made


def _remember(make: Callable[[int], Tensor]) -> Callable[[nn.Module, int], Tensor]:
    last: Tensor | None = None

    def call(_: nn.Module, tokens: int) -> Tensor:
        nonlocal last
        if last is None or len(last) != tokens:
            last = make(tokens)
        return last

    return call


in_closure = _remember(table)


class Tables:
    """An object that is no module, with a count beside its tensors."""

    def __init__(self) -> None:
        self.count = 0
        self.made: list[Tensor] = []
        self.inner = types.SimpleNamespace(last=None)

    def get(self, tokens: int) -> Tensor:
        if not self.count:
            self.count += 1
            self.made.append(table(tokens))
            self.inner.last = self.made[0]
        assert len(self.made) == self.count
        last: Tensor = self.inner.last
        return last


class Slots:
    __slots__ = ("made",)

    def get(self, tokens: int) -> Tensor:
        if not hasattr(self, "made"):
            self.made = table(tokens)
        return self.made


class Model(nn.Module):
    """Adds a table that `get` keeps. reads: whether the forward reads values, which fake tensors do not have."""

    on_class: Tensor | None = None

    def __init__(self, get: Callable[[nn.Module, int], Tensor], reads: bool = False) -> None:
        super().__init__()
        self.get, self.reads = get, reads
        self.attention = SelfAttention()
        self.tables, self.slots = Tables(), Slots()
        self.last = deque[Tensor](maxlen=1)
        self.ordered: OrderedDict[int, Tensor] = OrderedDict()
        self.weak: weakref.WeakKeyDictionary[Model, Tensor] = weakref.WeakKeyDictionary()
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x + self.get(self, x.shape[1]))
        if self.fails:
            raise ValueError("too short")
        if self.reads and x.isnan().any():
            raise ValueError("not a number")
        return x


def _first(held: Any, key: Any, tokens: int) -> Tensor:
    if key not in held:
        held[key] = table(tokens)
    made: Tensor = held[key]
    return made


def in_deque(model: Any, tokens: int) -> Tensor:
    if not model.last:
        model.last.append(table(tokens))
    made: Tensor = model.last[0]
    return made


def on_class(model: Any, tokens: int) -> Tensor:
    if Model.on_class is None:
        Model.on_class = table(tokens)
    return Model.on_class


KINDS: dict[str, Callable[[Any, int], Tensor]] = {
    "lru_cache": lambda _, tokens: lru_cached(tokens)[0],
    "cache": lambda _, tokens: cached(tokens),
    "dictionary": in_dictionary,
    "global": in_global,
    "default": in_default,
    "function": on_function,
    "closure": in_closure,
    "class": on_class,
    "object": lambda model, tokens: model.tables.get(tokens),
    "slots": lambda model, tokens: model.slots.get(tokens),
    "deque": in_deque,
    "ordered": lambda model, tokens: _first(model.ordered, tokens, tokens),
    "weak": lambda model, tokens: _first(model.weak, model, tokens),
}


@pytest.fixture(autouse=True)
def _empty_caches() -> Iterator[None]:
    state = ReachableState(Model(in_global))
    yield
    state.put_back()


@pytest.mark.parametrize("reads", [False, True], ids=["fake", "real"])
@pytest.mark.parametrize("kind", KINDS)
def test_forwards_run_after_plan(kind: str, reads: bool) -> None:
    model, x = Model(KINDS[kind], reads), torch.randn(1, TOKENS, WIDTH)
    assert len(salad_compile.plan(model, (x[:, :-1],), config=TINY).eligible) == 1
    assert not lru_cached.cache_info().currsize
    assert _TABLE is None
    assert not _TABLES
    assert not model.tables.count
    for _ in range(2):  # what is cached has no graph of the trial run behind it, that could be run backward once
        model(x).sum().backward()
    assert model.get(model, TOKENS).equal(table(TOKENS))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_cached_stays(kind: str) -> None:
    model, x = Model(KINDS[kind]), torch.randn(1, TOKENS, WIDTH)
    model(x)
    before = model.get(model, TOKENS)
    salad_compile.plan(model, (x,), config=TINY)
    assert model.get(model, TOKENS) is before


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_that_fails_leaves_nothing(kind: str) -> None:
    model, x = Model(KINDS[kind]), torch.randn(1, TOKENS, WIDTH)
    model.fails = True
    with pytest.raises(ProbeError, match="too short"):
        salad_compile.plan(model, (x,), config=TINY)
    model.fails = False
    assert model(x).isfinite().all()


def test_other_state_of_code_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was imported or counted meanwhile is not undone."""
    monkeypatch.setitem(globals(), "imported", None)

    def get(_: nn.Module, tokens: int) -> Tensor:
        globals()["imported"] = functools
        return table(tokens)

    salad_compile.plan(Model(get), (torch.randn(1, TOKENS, WIDTH),), config=TINY)
    assert globals()["imported"] is functools


modes: list[bool] = []


class Copies(nn.Module):
    """Deep copies of sizes, of activations and of what it owns, as Wan2.2 S2V makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = SelfAttention()
        self.register_buffer("offset", table(TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        sizes = torch.stack([torch.tensor([2, 7, 10])])
        copied, again = copy.deepcopy([sizes, sizes])
        assert copied is again
        offset = copy.deepcopy({"offset": self.offset})["offset"]  # type: ignore[has-type]
        x = self.attention(copy.deepcopy(x + offset))
        modes.extend(made.fake_mode is sizes.fake_mode for made in (copied, offset) if isinstance(made, FakeTensor))
        if x.isnan().any():  # fake tensors have no values: the trial run on them fails here
            raise ValueError("not a number")
        return x * copied.ndim


def test_deep_copies_are_no_copies_of_the_fake_mode() -> None:
    """Which holds raw pointers to storages, that both copies would free: the heap was corrupted."""
    model, x = Copies(), torch.randn(1, TOKENS, WIDTH)
    modes.clear()
    plan = salad_compile.plan(model, (x,), config=TINY)
    assert modes == [True, True]
    assert [site.name for site in plan.eligible] == ["attention"]
    with torch.no_grad():
        assert model(x).isfinite().all()
