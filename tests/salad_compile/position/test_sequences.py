"""Position is found once for each sequence of operations, and never taken from a sequence that differs in anything."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import salad_compile
from salad_compile.errors import PositionReplayError
from salad_compile.position import sequences
from salad_compile.position.recording import PositionGraph
from salad_compile.position.sequences import forget_sequences
from tests import toys
from tests.passes import rotary_styles as styles
from tests.support import randomise_branches

CONFIG = salad_compile.SaladConfig(
    compensation="none",
    sparsity=0.5,
    query_block=16,
    key_block=16,
    lora_rank=2,
    min_tokens=64,
    rope_placement="map-then-rotate",
)


@pytest.fixture(autouse=True)
def searches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The operands whose position was searched for."""
    found: list[Tensor] = []
    find = PositionGraph.find
    monkeypatch.setattr(PositionGraph, "find", lambda graph, operand: (found.append(operand), find(graph, operand))[1])
    forget_sequences()
    yield found
    forget_sequences()


def converted(style: type[styles.Rotary]) -> styles.Rotary:
    torch.manual_seed(0)
    model = salad_compile.convert(style(), CONFIG, example_inputs=(toys.tokens(),))
    randomise_branches(model)
    return model


def fresh(model: nn.Module, *args: Tensor) -> Tensor:
    """What the model computes with a search."""
    forget_sequences()
    out: Tensor = model(*args)
    return out


STYLES = [
    *(styles.InPlace, styles.StackedFlat, styles.Halves, styles.Complex, styles.Partial, styles.Matrices, styles.Split),
    *(styles.Products, styles.Normed, styles.Modulated, styles.Scaled, styles.Learned),
]


@pytest.mark.parametrize("style", STYLES)
def test_a_known_sequence_is_not_searched_again(style: type[styles.Rotary], searches: list[Tensor]) -> None:
    model, x, other = converted(style), toys.tokens(), toys.tokens().flip(1)
    model(x)
    before = len(searches)
    actual = model(other)
    assert len(searches) == before > 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(actual.square().sum(), trained, allow_unused=True)
    expected = fresh(model, other)
    assert len(searches) > before
    assert torch.equal(actual, expected)
    again = torch.autograd.grad(expected.square().sum(), trained, allow_unused=True)
    for one, two in zip(gradients, again, strict=True):
        assert (one is None and two is None) or torch.equal(one, two)


@pytest.mark.parametrize("style", STYLES)
def test_what_is_known_longer_is_the_same(style: type[styles.Rotary], searches: list[Tensor]) -> None:
    """From the third forward on, operations that write are compared by their arguments alone, as all others are."""
    model, x = converted(style), toys.tokens()
    for _ in range(3):
        model(x.flip(1))
    before = len(searches)
    with torch.no_grad():
        actual = model(x)
    assert len(searches) == before
    with torch.inference_mode():
        assert torch.equal(model(x), actual)
        assert torch.equal(model(x), actual)
    with torch.no_grad():
        assert torch.equal(model(x), actual)
        assert torch.equal(fresh(model, x), actual)


class Given(styles.Halves):
    """Its position lies in memory as it is told."""

    is_transposed = False

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        if self.is_transposed:
            with torch._C.DisableTorchFunction():
                angle = angle.t().contiguous().t()
        return super().place(x, angle)


def test_other_strides_are_searched(searches: list[Tensor]) -> None:
    model, x = converted(Given), toys.tokens()
    for _ in range(3):
        first = model(x)
    before = len(searches)
    model.is_transposed = True
    assert torch.equal(model(x), first)
    assert len(searches) > before


def test_sites_with_one_sequence_share_what_was_found(searches: list[Tensor]) -> None:
    one, two = converted(styles.InPlace), converted(styles.InPlace)
    one(toys.tokens())
    before = len(searches)
    assert torch.equal(two(toys.tokens()), one(toys.tokens()))
    assert len(searches) == before


def test_values_copied_before_a_write_are_searched_at_every_forward(searches: list[Tensor]) -> None:
    model, x = converted(styles.Overwritten), toys.tokens()
    first = model(x)
    before = len(searches)
    assert torch.equal(model(x), first)
    assert len(searches) > before


class Changing(styles.Rotary):
    """Its operations can be changed after a forward."""

    factor: float | int = 2.0
    swaps_halves = False
    dtype = torch.float32

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        x = styles.heads_of(x) * self.factor
        cos, sin = (torch.cat([part] * 2, -1).to(self.dtype) for part in (angle.cos(), angle.sin()))
        first, second = x.chunk(2, dim=-1)
        halves = [second, -first] if self.swaps_halves else [-second, first]
        return (x * cos + torch.cat(halves, dim=-1) * sin).to(x.dtype)


@pytest.mark.parametrize(
    ("name", "value"), [("factor", 3.0), ("factor", 2), ("swaps_halves", True), ("dtype", torch.float64)]
)
def test_other_operations_and_constants_are_searched(name: str, value: object, searches: list[Tensor]) -> None:
    model, x = converted(Changing), toys.tokens()
    for _ in range(3):
        model(x)
    before = len(searches)
    setattr(model, name, value)
    actual = model(x)
    assert len(searches) > before
    assert torch.equal(actual, fresh(model, x))


def test_other_shapes_dtypes_and_autocast_are_searched(searches: list[Tensor]) -> None:
    model = converted(styles.InPlace)
    model(toys.tokens())
    for given in (toys.tokens(90), toys.tokens(batch=1)):
        before = len(searches)
        actual = model(given)
        assert len(searches) > before
        assert torch.equal(actual, fresh(model, given))
    model(toys.tokens())
    before = len(searches)
    with torch.autocast("cpu", torch.bfloat16):
        model(toys.tokens())
        assert len(searches) > before
    before = len(searches)
    model.double()(toys.tokens(dtype=torch.float64))
    assert len(searches) > before


class Shared(styles.Halves):
    """The key's position may lie in the memory of the query's."""

    is_shared = False

    def forward(self, x: Tensor) -> Tensor:
        angle = styles.angles(x.shape[1], x.dtype)
        other = angle if self.is_shared else angle.clone()
        q, k = self.place(self.q(x), angle), self.place(self.k(x), other)
        result: Tensor = self.o(self.attend(q, k, styles.heads_of(self.v(x))).transpose(1, 2).flatten(2))
        return result


def test_other_data_flow_is_searched(searches: list[Tensor]) -> None:
    model, x = converted(Shared), toys.tokens()
    first = model(x)
    before = len(searches)
    model.is_shared = True
    assert torch.equal(model(x), first)
    assert len(searches) > before


class Masked(styles.Halves):
    """Attends under a mask that it computes, if it is told how."""

    padding = 0

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.padding:
            return super().attend(q, k, v)
        mask = torch.arange(k.shape[2]) < k.shape[2] - self.padding
        return nn.functional.scaled_dot_product_attention(q, k, v, mask.expand(q.shape[0], 1, 1, -1))


def test_a_mask_changes_what_is_attended_to_and_not_what_was_found() -> None:
    model, x = converted(Masked), toys.tokens()
    model(x)
    for padding in (5, 9):
        model.padding = padding
        actual = model(x)
        assert torch.equal(actual, fresh(model, x))


class Silent(styles.Halves):
    """Writes into its projections behind the back of every function mode, if it is told to."""

    writes = False

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        x = x * 1.0
        if self.writes:
            with torch._C.DisableTorchFunction():
                x.mul_(2)
        return super().place(x, angle)


@pytest.mark.parametrize("forwards", [1, 3])
def test_an_unseen_write_is_an_error_on_a_known_sequence_too(forwards: int) -> None:
    model, x = converted(Silent), toys.tokens()
    with torch.no_grad():
        for _ in range(forwards):
            first = model(x)
        model.writes = True
        with pytest.raises(PositionReplayError, match="torch functions do not show"):
            model(x)
        model.writes = False
        assert torch.equal(model(x), first)


class Stale(styles.Halves):
    """Overwrites its position before the attention call, if it is told to."""

    writes = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.writes:
            with torch._C.DisableTorchFunction():
                self.angle.zero_()
        return super().attend(q, k, v)

    def place(self, x: Tensor, angle: Tensor) -> Tensor:
        self.angle = torch.cat([angle.cos()] * 2, -1)
        x = styles.heads_of(x)
        first, second = x.chunk(2, dim=-1)
        return x * self.angle + torch.cat([-second, first], dim=-1) * torch.cat([angle.sin()] * 2, -1)


@pytest.mark.parametrize("forwards", [1, 3])
def test_overwritten_position_is_an_error_on_a_known_sequence_too(forwards: int) -> None:
    model, x = converted(Stale), toys.tokens()
    with torch.no_grad():
        for _ in range(forwards):
            model(x)
        model.writes = True
        with pytest.raises(PositionReplayError, match="has been overwritten by now"):
            model(x)


def test_nothing_is_kept_of_a_forward_and_the_trees_start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "_MOST_EDGES", 100)
    model = converted(styles.InPlace)
    for count in range(70, 80):
        model(toys.tokens(count))
        assert sequences._edges <= 100
    edges = [edge for tree in sequences._trees.values() for edge in tree.next]
    assert edges
    assert not any(isinstance(part, Tensor) for edge in edges for part in torch.utils._pytree.tree_leaves(edge))


@pytest.mark.parametrize("style", [styles.InPlace, styles.Complex])
def test_a_forward_keeps_nothing_alive(style: type[styles.Rotary], monkeypatch: pytest.MonkeyPatch) -> None:
    """What refers to itself would keep the tensors of a forward until Python looks for such."""
    model, recordings = converted(style), []
    enter = sequences.PositionRecording.mapped

    def note(recording: sequences.PositionRecording, *given: object) -> object:
        recordings.append(weakref.ref(recording))
        return enter(recording, *given)  # type: ignore[arg-type]

    model(toys.tokens())
    monkeypatch.setattr(sequences.PositionRecording, "mapped", note)
    gc.disable()
    try:
        with torch.no_grad():
            model(toys.tokens())
        assert recordings
        assert all(reference() is None for reference in recordings)
    finally:
        gc.enable()
