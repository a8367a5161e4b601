"""Rows are followed through every kind of move, and what cannot be followed says why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from salad_compile.position.gate_rows import find_axes, row_fault
from salad_compile.position.rows import of_tensors
from salad_compile.position.shadows import ELSEWHERE

BATCH, TOKENS, CHANNELS, HEADS = 2, 12, 8, 2
ORDER = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
Move = Callable[[Tensor], Tensor]


class _Followed(TorchFunctionMode):
    def __init__(self, source: Tensor) -> None:
        super().__init__()
        self.tracker = of_tensors(WeakIdKeyDictionary())
        self.tracker.add_source(source)

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.tracker.note(func, args, kwargs or {}, out)
        return out


def rows_of(move: Move, source: Tensor) -> Tensor | str:
    """Of (B, H, S, D) that `move` makes of the output of a projection."""
    with _Followed(source) as mode:
        out = move(source)
    return mode.tracker.rows(out)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def in_place(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[..., 0::2] = -x[..., 1::2]
    out[..., 1::2] = x[..., 0::2]
    return heads(out)


def complex_numbers(x: Tensor) -> Tensor:
    z = torch.view_as_complex(heads(x).unflatten(-1, (-1, 2))) * torch.ones(TOKENS, CHANNELS // HEADS // 2)
    return torch.view_as_real(z).flatten(3)


def by_halves(x: Tensor) -> Tensor:
    first, second = heads(x).chunk(2, -1)
    return torch.cat([-second, first], -1) * torch.ones(TOKENS, 1) + heads(x)


MOVES: dict[str, Move] = {
    "heads": heads,
    "norm": lambda x: heads(F.layer_norm(x, (CHANNELS,))),
    "norm by hand": lambda x: heads(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1)),
    "rotation in place": in_place,
    "complex rotation": complex_numbers,
    "rotation of halves": by_halves,
    "matrices": lambda x: torch.einsum("bhsd,de->bhse", heads(x), torch.eye(CHANNELS // HEADS)),
    "matrices of each token": lambda x: torch.einsum("...sd,sde->...se", heads(x), torch.ones(TOKENS, 4, 4)),
    "matrix from the left": lambda x: (torch.eye(4) @ heads(x).mT).mT,
    "matrix from the right": lambda x: heads(x) @ torch.eye(4),
    "norm over heads": lambda x: heads(x) / heads(x).norm(dim=(1, 3), keepdim=True).clamp_min(1),
    "mean of tokens taken off": lambda x: heads(x - torch.ones(1, TOKENS, 1)),
    "as many channels as tokens": lambda x: heads(F.linear(x, torch.ones(TOKENS * 2, CHANNELS)))[..., :4],
    "dtype of moved tokens": lambda x: heads(x.type_as(x.flip(1)).to(x.roll(1, 1))),
    "zeros where moved tokens are": lambda x: heads(
        torch.where(x.flip(1) > 9, 0.0, x).masked_fill(x.roll(1, 1) > 9, 0)
    ),
    "1 x 1 convolution": lambda x: heads(F.conv1d(x.mT, torch.ones(CHANNELS, CHANNELS, 1)).mT),
    "roll": lambda x: heads(x).roll(3, 2),
    "flip": lambda x: heads(x.flip(1)),
    "index": lambda x: heads(x[:, ORDER]),
    "gather": lambda x: heads(x.gather(1, ORDER[None, :, None].expand_as(x))),
    "samples swapped": lambda x: heads(x.flip(0)),
    "trimmed": lambda x: heads(x[:, 2:-3]),
    "padded": lambda x: heads(F.pad(x, (0, 0, 1, 2))),
    "regrouped": lambda x: heads(x.unflatten(1, (3, 4)).transpose(1, 2).flatten(0, 1)),
    "chunks": lambda x: torch.cat([heads(part) for part in x.split([5, 7], 1)[::-1]], 2),
    "hstack": lambda x: heads(torch.hstack([x[:, 6:], x[:, :6]])),
}


@pytest.mark.parametrize("name", MOVES)
def test_each_token_knows_its_row(name: str) -> None:
    """Compared with what the same moves do to numbers that are the rows themselves."""
    source = torch.randn(BATCH, TOKENS, CHANNELS)
    rows = rows_of(MOVES[name], source)
    assert isinstance(rows, Tensor), rows
    moves_only = name in ("heads", "roll", "flip", "index", "gather", "samples swapped", "trimmed", "regrouped")
    if moves_only or name in ("chunks", "hstack"):
        numbers = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS, 1).expand(BATCH, TOKENS, CHANNELS)
        assert torch.equal(rows, MOVES[name](numbers)[:, 0, :, 0])
    elif name == "padded":
        assert (rows[:, 0] == ELSEWHERE).all()
        assert rows[1, 1] == TOKENS
    else:
        assert torch.equal(rows, torch.arange(BATCH * TOKENS).view(BATCH, TOKENS))


def test_a_part_that_is_written_later_counts() -> None:
    def move(x: Tensor) -> Tensor:
        buffer = x.new_zeros(BATCH, TOKENS + 2, CHANNELS)
        buffer[:, 2:] = x
        return heads(buffer)

    rows = rows_of(move, torch.randn(BATCH, TOKENS, CHANNELS))
    assert isinstance(rows, Tensor)
    assert rows[0].tolist() == [ELSEWHERE, ELSEWHERE, *range(TOKENS)]


def written(write: Callable[[Tensor, Tensor], None]) -> Move:
    """Heads of a buffer into which tokens were written."""

    def move(x: Tensor) -> Tensor:
        buffer = torch.zeros(BATCH, TOKENS, CHANNELS, dtype=x.dtype)
        write(buffer, x)
        return heads(buffer)

    return move


def swap(buffer: Tensor, x: Tensor) -> None:
    buffer[:, :6], buffer[:, 6:] = x[:, 6:], x[:, :6]


def overlap(buffer: Tensor, x: Tensor) -> None:
    buffer.copy_(x)
    buffer[:, :6] = buffer[:, 6:].clone()


WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "swapped": swap,
    "over each other": overlap,
    "through a view": lambda buffer, x: buffer[:, 3:].view(BATCH, 3, 3, CHANNELS).copy_(x[:, :9].unflatten(1, (3, 3))),
    "index_copy": lambda buffer, x: buffer.index_copy_(1, ORDER, x),
    "scatter": lambda buffer, x: buffer.scatter_(1, ORDER[None, :, None].expand_as(x), x),
    "slices of a transpose": lambda buffer, x: buffer.transpose(0, 1)[2:].copy_(x.transpose(0, 1)[:-2]),
    "out": lambda buffer, x: torch.cat([x[:, 5:], x[:, :5]], 1, out=buffer),
    "in place": lambda buffer, x: buffer.copy_(x).mul_(2)[:, :2].add_(1),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_into_counts(name: str) -> None:
    """Compared with what the same writes do to numbers that are the rows themselves, one more than each."""
    move = written(WRITES[name])
    rows = rows_of(move, torch.randn(BATCH, TOKENS, CHANNELS))
    assert isinstance(rows, Tensor), rows
    numbers = torch.arange(1, BATCH * TOKENS + 1).view(BATCH, TOKENS, 1).expand(BATCH, TOKENS, CHANNELS)
    if name == "in place":
        assert torch.equal(rows, numbers[..., 0] - 1)
    else:
        assert torch.equal(rows, move(numbers)[:, 0, :, 0] - 1)


def test_a_write_is_seen_in_views_that_were_there_before() -> None:
    def move(x: Tensor) -> Tensor:
        view = x[:, :6]
        x[:, :6] = x[:, 6:].clone()
        return heads(view)

    rows = rows_of(move, torch.randn(BATCH, TOKENS, CHANNELS))
    assert isinstance(rows, Tensor)
    assert rows[0].tolist() == list(range(6, 12))


MAY_MOVE: dict[str, Move] = {
    "sort": lambda x: heads(x.sort(1).values),
    "topk": lambda x: heads(x.topk(TOKENS, dim=1).values),
    "cumsum": lambda x: heads(x.cumsum(1)),
    "fft": lambda x: heads(torch.fft.ifft(torch.fft.fft(x, dim=1), dim=1).real),
    "permutation matrix": lambda x: heads(torch.eye(TOKENS)[ORDER] @ x),
    "permutation by einsum": lambda x: heads(torch.einsum("ts,bsc->btc", torch.eye(TOKENS)[ORDER], x)),
    "mixed over tokens": lambda x: heads(x - F.conv1d(x, torch.ones(TOKENS, TOKENS, 1))),
    "strides": lambda x: heads(x.as_strided(x.shape, (CHANNELS, BATCH * CHANNELS, 1))),
    "masked scatter": lambda x: heads(torch.zeros_like(x).masked_scatter(torch.ones_like(x) > 0, x)),
    "a mask known at run time": lambda x: heads(x[:, x.mean((0, 2)) < 9]),
}


@pytest.mark.parametrize("name", MAY_MOVE)
def test_what_may_move_tokens_is_never_taken_to_keep_them(name: str) -> None:
    rows = rows_of(MAY_MOVE[name], torch.randn(BATCH, TOKENS, CHANNELS))
    assert isinstance(rows, str) or (rows < 0).all(), rows


def test_heads_of_several_samples_are_seen() -> None:
    reason = rows_of(lambda x: heads(x).flatten(0, 1)[None], torch.randn(BATCH, TOKENS, CHANNELS))
    assert reason == "its heads are of different samples or tokens: heads and batch are one axis"


def test_what_is_not_followed_says_so() -> None:
    reason = rows_of(lambda x: heads(torch.cumsum(x, 1).sort(1)[0].sum(1, keepdim=True)), torch.randn(2, 12, 8))
    assert isinstance(reason, str)
    assert "sum" in reason


@pytest.mark.parametrize(
    ("leading", "permuted", "axes"),
    [((2, 12), (0, 1), ""), ((12, 2), (1, 0), "1 0"), ((12, 1), (1, 0), "1 0"), ((2, 4, 3), (0, 2, 1), "0 2 1")],
)
def test_an_order_of_axes_is_found(leading: tuple[int, ...], permuted: tuple[int, ...], axes: str) -> None:
    rows = torch.arange(torch.Size(leading).numel()).view(leading).permute(permuted)
    rows = rows.reshape(rows.shape[0], -1)
    assert find_axes(rows, leading) == axes
    assert row_fault(rows, leading, axes) == ""


def test_moved_tokens_are_no_order_of_axes() -> None:
    assert find_axes(torch.arange(24).view(2, 12).roll(1, 1), (2, 12)) is None
    assert "moved" in row_fault(torch.arange(24).view(2, 12).flip(0), (2, 12), "")
