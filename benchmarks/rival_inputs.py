"""Inputs of `rivals.py`, which every process makes alike from a seed, and float64 values of a few rows of the results.

Tensors are (B, H, S, D). Most kernels take (B, S, H, D) in memory, as a model has it; some want (B, H, S, D), and
get it before the timing starts, to their advantage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from common import select
from torch import Tensor

PERMILLE = 100  # of the key blocks are kept
SEED = 0
STRUCTURE_RANK, STRUCTURE_RUN = 4, 256
CHUNK = 512  # query rows of dense attention that the reference takes at once
INPUTS = (
    f"normal noise plus {STRUCTURE_RANK} shared directions per head, with a random strength for each run of "
    f"{STRUCTURE_RUN} tokens, in query and key; selected by the routing itself, once for each pair of block sizes"
)
Blocks = tuple[int, int]  # tokens of a query block and of a key block
Triple = tuple[Tensor, Tensor, Tensor]
FORWARD, BOTH = "forward", "forward + backward"


@dataclass(frozen=True)
class Shape:
    """What is attended: batch 1."""

    heads: int
    tokens: int
    head_dim: int = 128

    @property
    def name(self) -> str:
        """As the command line takes it."""
        return f"{self.heads}x{self.tokens}"


class Inputs:
    """Query, key, value and an incoming gradient of one shape, and the selections made from them.

    Args:
        contiguous: whether memory is ordered (B, H, S, D) instead of (B, S, H, D).
    """

    def __init__(self, shape: Shape, device: torch.device, *, contiguous: bool) -> None:
        self.shape, self.device, self.contiguous = shape, device, contiguous
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._generator = torch.Generator(device).manual_seed(SEED)
        size = shape.heads * shape.tokens * shape.head_dim
        self.grad_out = self._ordered(self._draw(1, shape.tokens, shape.heads, shape.head_dim))
        # three sets exceed any L2 cache; one that exceeds it alone is enough
        self.sets = [self._set() for _ in range(3 if size < 2**27 else 1)]
        self._selections: dict[Blocks, list[tuple[Tensor, Tensor]]] = {}
        self._leaves: list[Triple] = []

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=self.dtype)

    def _ordered(self, x: Tensor) -> Tensor:
        """(B, H, S, D) of (B, S, H, D), in the memory order that is wanted."""
        return x.transpose(1, 2).contiguous() if self.contiguous else x.transpose(1, 2)

    def _set(self) -> Triple:
        heads, tokens, head_dim = self.shape.heads, self.shape.tokens, self.shape.head_dim

        def draw(structured: bool) -> Tensor:
            x = self._draw(1, tokens, heads, head_dim)
            if structured:
                directions = self._draw(heads, STRUCTURE_RANK, head_dim)
                runs = -(-tokens // STRUCTURE_RUN)
                strength = self._draw(1, runs, heads, STRUCTURE_RANK) * STRUCTURE_RANK**-0.5
                pattern = torch.einsum("brhk,hkd->brhd", strength, directions)
                x += pattern.repeat_interleave(STRUCTURE_RUN, dim=1)[:, :tokens]
            return self._ordered(x)

        return draw(True), draw(True), draw(False)

    def of(self, number: int) -> Triple:
        """The set of a timing."""
        return self.sets[number % len(self.sets)]

    def leaves(self, number: int) -> Triple:
        """The same tensors, requiring gradients."""
        if not self._leaves:
            alike = [[x.detach().requires_grad_() for x in tensors] for tensors in self.sets]
            self._leaves = [(query, key, value) for query, key, value in alike]
        return self._leaves[number % len(self._leaves)]

    def selections(self, blocks: Blocks) -> list[tuple[Tensor, Tensor]]:
        """(lut, count) of every set."""
        if blocks not in self._selections:
            chosen = [select(query, key, *blocks, PERMILLE) for query, key, _ in self.sets]
            self._selections[blocks] = [(lut.contiguous(), count.contiguous()) for lut, count in chosen]
        return self._selections[blocks]

    def selection(self, blocks: Blocks, number: int) -> tuple[Tensor, Tensor]:
        """(lut, count) of a timing."""
        selections = self.selections(blocks)
        return selections[number % len(selections)]

    def pairs(self, blocks: Blocks | None) -> int:
        """Token pairs that are computed, the mean over the sets; None stands for dense attention."""
        if blocks is None:
            return self.shape.heads * self.shape.tokens**2
        selections = self.selections(blocks)
        return sum(int(count.sum()) for _, count in selections) // len(selections) * blocks[0] * blocks[1]


# ---------------------------------------------------------------- float64 values of a few rows


def forward_error(out: Tensor, inputs: Inputs, blocks: Blocks | None) -> float:
    """Relative L2 error of a result of the first set, (B, H, S, D), in the first, a middle and the last query block.

    Each in another head, against float64.
    """
    wanted, got = [], []
    for head, rows, keys in _probes(inputs, blocks):
        query, key, value = (x[0, head] for x in inputs.sets[0])
        wanted.append(_weights(query[rows], key[keys]) @ value[keys].double())
        got.append(out[0, head, rows].double())
    return _distance(torch.cat(got), torch.cat(wanted))


def gradient_error(gradients: Triple, inputs: Inputs, blocks: Blocks | None) -> float:
    """The largest of three relative L2 errors of gradients of the first set, against float64.

    Query gradients in the query blocks of `forward_error`; those of key and value in the 64 keys that the middle one of
    them attends to last.
    """
    wanted, got = [], []
    for head, rows, keys in _probes(inputs, blocks):
        wanted.append(_score_gradients(inputs, head, rows, keys)[1] @ inputs.sets[0][1][0, head, keys].double())
        got.append(gradients[0][0, head, rows].double())
    scale = inputs.shape.head_dim**-0.5
    errors = [_distance(torch.cat(got), scale * torch.cat(wanted))]
    head, _, keys = list(_probes(inputs, blocks))[1]
    first = int(keys[-1]) // 64 * 64
    columns = torch.arange(first, min(first + 64, inputs.shape.tokens), device=inputs.device)
    key_gradient, value_gradient = _column_gradients(inputs, head, columns, blocks)
    errors.append(_distance(gradients[1][0, head, columns].double(), scale * key_gradient))
    errors.append(_distance(gradients[2][0, head, columns].double(), value_gradient))
    return max(errors)


def _distance(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def _weights(query: Tensor, key: Tensor) -> Tensor:
    scores = query.double() @ key.double().T * query.shape[-1] ** -0.5
    return torch.softmax(scores, dim=-1)


def _rows(inputs: Inputs, block: int, number: int) -> Tensor:
    return torch.arange(block * number, min(block * (number + 1), inputs.shape.tokens), device=inputs.device)


def _keys(inputs: Inputs, blocks: Blocks | None, head: int, number: int) -> Tensor:
    """Ids of the keys that a query block attends to."""
    if blocks is None:
        return torch.arange(inputs.shape.tokens, device=inputs.device)
    lut, count = inputs.selections(blocks)[0]
    chosen = lut[0, head, number, : int(count[0, head, number])].long()
    keys = (chosen[:, None] * blocks[1] + torch.arange(blocks[1], device=inputs.device)).flatten()
    return keys[keys < inputs.shape.tokens]


def _probes(inputs: Inputs, blocks: Blocks | None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(head, query rows, keys) of the three query blocks that are looked at."""
    size = blocks[0] if blocks else 128
    last = -(-inputs.shape.tokens // size) - 1
    for head, number in ((0, 0), (inputs.shape.heads // 2, last // 2), (inputs.shape.heads - 1, last)):
        yield head, _rows(inputs, size, number), _keys(inputs, blocks, head, number)


def _score_gradients(inputs: Inputs, head: int, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Weights, and the gradients of the scores after scaling, each (rows, keys)."""
    query, key, value = (x[0, head] for x in inputs.sets[0])
    weights, grad_out = _weights(query[rows], key[keys]), inputs.grad_out[0, head, rows].double()
    grad_weights = grad_out @ value[keys].double().T
    return weights, weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))


def _column_gradients(inputs: Inputs, head: int, columns: Tensor, blocks: Blocks | None) -> tuple[Tensor, Tensor]:
    """Gradients of the keys, before the factor on the scores, and of the values that `columns` names."""
    size = blocks[0] if blocks else CHUNK
    numbers = range(-(-inputs.shape.tokens // size))
    if blocks is not None:
        lut, count = inputs.selections(blocks)[0]
        listed = torch.arange(lut.shape[-1], device=lut.device) < count[0, head, :, None]
        chosen = (lut[0, head] == int(columns[0]) // blocks[1]) & listed
        numbers = chosen.any(-1).nonzero().flatten().tolist()
    key_gradient = torch.zeros(len(columns), inputs.shape.head_dim, dtype=torch.float64, device=inputs.device)
    value_gradient = torch.zeros_like(key_gradient)
    for number in numbers:
        rows, keys = _rows(inputs, size, number), _keys(inputs, blocks, head, number)
        weights, grad_scores = _score_gradients(inputs, head, rows, keys)
        here = torch.searchsorted(keys, columns)
        key_gradient += grad_scores[:, here].T @ inputs.sets[0][0][0, head, rows].double()
        value_gradient += weights[:, here].T @ inputs.grad_out[0, head, rows].double()
    return key_gradient, value_gradient
